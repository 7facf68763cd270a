"""The sample: a small world in Something-Something V2's layout, and two tiny frozen models that know nothing else.

python -m sample render --data data/sample      clips, labels, paraphrases
python -m sample models --data data/sample      the two tiny models in sample/, trained again from scratch
"""

import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import runtime.threads  # noqa: F401  how torch's threads wait

import dataset
from runtime import cli, files
from runtime.files import UserError
from runtime.progress import Progress
from sample.world import ACTIONS, FORWARDS, OPPOSITES, Clip, boxes, choose_clips, paraphrases, render_clip
from video.overlay import write_video

MODELS = Path(__file__).parent


def render(data: Path, counts: dict[str, int], seed: int, workers: int | None = None) -> None:
    """Write clips, labels and paraphrases under `data`, as SSv2 lays them out; `counts`: clips of each split.

    Raises: UserError where `data` holds anything that this very call would not write.
    """
    marker, settings = data / "sample.json", {"version": 1, "seed": seed, **counts}
    made = files.read_json(marker, "the sample's settings") if marker.exists() else None
    if made != settings and data.exists() and any(data.iterdir()):
        raise UserError(f"{data} holds other files, or another sample; name an empty folder with --data")
    files.write_json(marker, settings)

    splits = choose_clips(counts, seed)
    write_labels(data, splits)
    videos = data / "20bn-something-something-v2"
    clips = {videos / f"{i}.webm": clip for some in splits.values() for i, clip in some.items()}
    with ProcessPoolExecutor(workers) as pool:
        sizes = pool.map(_render_file, clips, clips.values(), chunksize=8)
        size = sum(Progress(sizes, total=len(clips), unit="clip", desc="rendering"))
    print(f"{data}: " + ", ".join(f"{n} {split}" for split, n in counts.items()) + f" clips, {size / 1e6:.1f} MB")


def _render_file(path: Path, clip: Clip) -> int:
    write_video(path, render_clip(clip, frames=clip.length))
    return path.stat().st_size


def write_labels(data: Path, splits: dict[str, dict[str, Clip]]) -> None:
    """Write SSv2's label files, the paraphrases, and what SSv2 does not have: opposites.json, boxes.json."""
    labels = data / "labels"
    for split in ("train", "validation"):
        records = [
            {"id": i, "label": clip.caption.lower(), "template": clip.template, "placeholders": clip.placeholders}
            for i, clip in splits[split].items()
        ]
        files.write_json(labels / f"{split}.json", records)
    files.write_json(labels / "test.json", [{"id": i} for i in splits["test"]])
    files.write_text(labels / "test-answers.csv", "".join(f"{i};{c.caption}\n" for i, c in splits["test"].items()))
    files.write_json(labels / "labels.json", {template: str(i) for i, template in enumerate(sorted(ACTIONS))})
    files.write_json(labels / "opposites.json", OPPOSITES | FORWARDS)
    scored = {**splits["validation"], **splits["test"]}
    files.write_text(labels / "boxes.json", json.dumps({i: boxes(clip) for i, clip in scored.items()}))
    files.write_json(data / "ssv2_paraphrase.json", {i: paraphrases(clip) for i, clip in splits["train"].items()})


def main(argv: list[str] | None = None) -> None:
    """Run `render` or `models`."""
    words = sys.argv[1:] if argv is None else argv
    parser = cli.Parser(__doc__.splitlines()[0], prog="-m sample")
    add = parser.add_argument
    add("command", choices=("render", "models"), help="clips and labels, or the two models, trained from scratch")
    command = parser.parse_args(words[:1]).command  # what other flags there are depends on it
    add("--data", type=Path, default=Path("data/sample"), help="folder of the sample's data")
    add("--seed", type=int, default=0, help="decides all random choices")
    if command == "render":
        for split, clips in (("train", 1800), ("validation", 300), ("test", 300)):
            add(f"--{split}", type=cli.count, default=clips, help=f"clips in the {split} split")
        add("--workers", type=cli.count, default=os.cpu_count(), help="processes that draw and encode")
        args = parser.parse_args(words)
        render(args.data, {split: getattr(args, split) for split in dataset.SPLITS}, args.seed, args.workers)
    else:
        add("--out", type=Path, default=MODELS, help="folder for the models: OUT/vjepa2, OUT/qwen2")
        args = parser.parse_args(words)
        import torch

        from sample import models  # here, since it takes seconds and the clips do not need it

        torch.set_num_threads(1)  # sums in another order would make other models
        print("probes of validation clips:", models.train_encoder(args.data, args.out / "vjepa2", args.seed))
        models.train_lm(args.data, args.out / "qwen2", args.seed)


if __name__ == "__main__":
    cli.run(main)
