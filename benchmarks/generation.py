"""Captioning a validation set: batches with a key-value cache, against one clip at a time, and without a cache.

Times cover reading the cached features, the Q-Former and greedy decoding. The textbook's way reads a clip's whole
row again for each token; it is timed on the first clips only.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import dataset
from benchmarks import measure
from evaluation import captioning as validation
from qformer import VideoCaptioner
from runtime import cli as arguments
from runtime import distributed as ranks
from runtime import files


@torch.no_grad()
def without_cache(captioner: VideoCaptioner, reader: validation.SplitReader, max_new_tokens: int) -> dict[str, str]:
    """Greedy captions of clips one at a time, the row computed anew for each token."""
    captioner.eval()
    found = {}
    for (record,), features in reader.batches("without a cache"):
        row, ids = captioner.prefix(features), []
        while len(ids) < max_new_tokens:
            ids.append(captioner.lm(inputs_embeds=row, use_cache=False).logits[0, -1].argmax().item())
            if ids[-1] == captioner.eos_id:
                break
            row = torch.cat([row, captioner.lm.get_input_embeddings()(torch.tensor([ids[-1:]]))], dim=1)
        found[record["id"]] = " ".join(captioner.tokenizer.decode(ids, skip_special_tokens=True).split())
    return found


def main(argv: list[str] | None = None) -> None:
    """Compare, and print the table."""
    parser = measure.parser(__doc__.splitlines()[0], runs=3)
    parser.add_argument("--data", type=Path, default=Path("data/sample"), help="with cached features")
    parser.add_argument("--checkpoint", type=Path, default=Path("build/sample/checkpoint.pt"), help="of train.py")
    parser.add_argument("--split", choices=dataset.SPLITS, default="validation", help="what to caption")
    parser.add_argument("--batch-size", type=arguments.count, default=64, help="clips that are captioned at once")
    parser.add_argument("--max-new-tokens", type=arguments.count, default=50, help="longest caption, in tokens")
    parser.add_argument("--uncached", type=arguments.count, default=50, help="clips captioned without a cache")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    layout = dataset.check_data(args.data)
    captioner = VideoCaptioner.from_checkpoint(args.checkpoint, "cpu")
    validation.check_features(captioner.config, layout, args.checkpoint)
    folder = layout.feature_folder(args.split)
    records, _ = validation.with_features(dataset.read_ready(args.data, args.split), layout, args.split, 0)

    def reader(batch_size: int, chosen: list = records) -> validation.SplitReader:
        return validation.SplitReader(captioner, chosen, folder, batch_size, ranks.Ranks())

    first = records[: args.uncached]
    captions = {}

    def keep(name: str, found: dict[str, str]) -> None:
        captions[name] = found

    sides = {
        "batches": lambda: keep("batches", reader(args.batch_size).captions(args.max_new_tokens)),
        "one clip at a time": lambda: keep("one clip at a time", reader(1).captions(args.max_new_tokens)),
        "no cache": lambda: keep("no cache", without_cache(captioner, reader(1, first), args.max_new_tokens)),
    }
    seconds = measure.times(sides, args.runs)
    rates = {name: len(captions[name]) / measure.median(values) for name, values in seconds.items()}
    rows = []
    for name, wanted in (("no cache", ""), ("one clip at a time", ""), ("batches", ">= 3 x one at a time")):
        same = sum(captions["one clip at a time"][clip] == text for clip, text in captions[name].items())
        gain = f"{rates[name] / rates['one clip at a time']:.2f} x"
        shown = [measure.spread(seconds[name]), f"{rates[name]:.1f}", gain, f"{same} of {len(captions[name])}"]
        rows.append([name.replace("batches", f"batches of {args.batch_size}"), *shown, wanted])
    title = f"Captioning {len(records)} clips of {args.data}, {args.split}"
    header = ("", "seconds", "clips a second", "gain", "same captions", "wanted")
    measure.report(__file__, title, header, rows)


if __name__ == "__main__":
    files.run(main)
