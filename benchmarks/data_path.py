"""What reading the cache costs training: train.py's steps with features from disk, and with tensors in memory.

In memory the features are float32 already, stacked into batches: nothing is left to do. Passes over the same steps
alternate, each with a loader of its own, so that what is read ahead is paid for in its own pass. Real size is the
published models' with made-up weights and features; the sample's is the demo's.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import shlex

import torch

import train
from benchmarks import demo, measure, sizes
from features import cache
from models import language_model as language
from runtime import cli as arguments
from runtime import distributed as ranks
from runtime import files

WANTED = {"real": "<= 1.03", "sample": "<= 1.10", "small": ""}
TOKENS = 12  # of a caption


class Passes:
    """The first steps of an epoch, again and again."""

    def __init__(self, trainer: train.Trainer, count: int) -> None:
        self.trainer, self.steps = trainer, trainer._plan()[:count]
        self.from_disk = trainer._loader
        folder = trainer.layout.feature_folder("train")
        self.in_memory = [
            (ids, cache.Packed(train.unpack_for(trainer.captioner, packed, folder)))
            for ids, packed in self.from_disk(self.steps)
        ]

    def disk(self) -> None:
        """A pass with features from the cache."""
        self._train()

    def memory(self) -> None:
        """A pass with features that are there."""
        with patch.object(self.trainer, "_loader", lambda steps: self.in_memory):
            self._train()

    def _train(self) -> None:
        self.trainer.step = 0
        self.trainer._train_epoch(self.steps)


def made_up(size: sizes.Size, data: Path, clips: int, dtype: str) -> Path:
    """A dataset of random features with captions of `TOKENS` tokens; for validation one clip."""
    for split, count in (("train", clips), ("validation", 1)):
        records = [{"id": str(number), "label": sizes.captions(1, TOKENS)} for number in range(count)]
        for record, features in zip(records, (sizes.features(size, 1)[0] for _ in records), strict=True):
            cache.save(data / "features" / split / f"{record['id']}.pt", cache.quantize(features, dtype))
        files.write_json(data / "annotations" / train.dataset.READY[split], records)
    return data


def trainer_of(args: argparse.Namespace, work: Path) -> train.Trainer:
    """train.py's trainer, on the sample or on made-up models and features."""
    nowhere = ["--checkpoint", str(work / "none.pt"), "--results", str(work), "--save-every", "1000000"]
    if args.size == "sample":
        data = args.data
        if not (data / "features").is_dir():
            data = demo.encoded(args.data, work / "data", args.encode)
        return train.Trainer(train.parse(["--data", str(data), *shlex.split(args.train), *nowhere]), ranks.Ranks())
    size = sizes.SIZES[args.size]
    data = made_up(size, work / "data", args.steps * args.batch, args.dtype)
    flags = ["--data", str(data), "--batch-size", str(args.batch), "--accumulate", "1", *nowhere]
    for name, value in size.qformer.items():
        flags += [f"--{name.replace('_', '-')}", str(value)]
    tokenizer = sizes.WordTokenizer(size.lm["vocab_size"])
    with patch.object(language, "load", lambda *_: (sizes.language_model(size), tokenizer)):
        return train.Trainer(train.parse(flags), ranks.Ranks())


def main(argv: list[str] | None = None) -> None:
    """Compare, and print the table."""
    parser = measure.parser(__doc__.splitlines()[0], runs=5)
    demo.add_flags(parser)
    parser.add_argument("--size", choices=WANTED, default="real", help="of the models; real needs 10 GB of memory")
    parser.add_argument("--steps", type=arguments.count, help="training steps of a pass (default: 4; the sample's 50)")
    parser.add_argument(
        "--batch", type=arguments.count, default=2, help="clips of a step; the sample's recipe has its own"
    )
    parser.add_argument("--dtype", choices=cache.DTYPES, default="float16", help="of made-up features")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.steps = args.steps or (50 if args.size == "sample" else 4)
    with tempfile.TemporaryDirectory() as work:
        trainer = trainer_of(args, Path(work))
        passes = Passes(trainer, args.steps)
        seconds = measure.times({"memory": passes.memory, "disk": passes.disk}, args.runs)
    count = len(passes.steps)
    each = [measure.spread(seconds[name], 1, 1000 / count) for name in ("memory", "disk")]
    ratio = measure.median(seconds["disk"]) / measure.median(seconds["memory"])
    title = f"Training's data path, {args.size} size, passes of {count} steps"
    header = ("ms a step, in memory", "ms a step, from the cache", "ratio", "median of pairs", "wanted")
    row = [*each, f"{ratio:.3f}", f"{measure.paired(seconds['disk'], seconds['memory']):.3f}", WANTED[args.size]]
    measure.report(__file__, title, header, [row])


if __name__ == "__main__":
    files.run(main)
