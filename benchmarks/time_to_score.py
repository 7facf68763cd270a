"""How soon training reaches a CIDEr on the sample: all captions of a clip against one, absorbed against textbook.

Each run is train.py's own loop with the sample's recipe. The clock stops while the validation split is captioned
and scored. Runs of the same seed begin with the same weights and read the same clips in the same order.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import shlex

import torch

import train
from benchmarks import demo, measure
from evaluation import ngrams as metrics
from features import schedule
from runtime import cli as arguments
from runtime import distributed as ranks
from runtime import files
from tests.reference import TextbookQFormer


class Reached(Exception):
    """The score is there."""


class ConfiguredTextbook(TextbookQFormer):
    """The textbook's Q-Former with the one attribute that the captioner asks for."""

    def __init__(self, **sizes: float) -> None:
        super().__init__(**sizes)
        self.config = sizes


class Timed(train.Trainer):
    """Training whose clock stops every --save-every steps, and after each epoch, to score the validation split.

    Nothing is saved.
    """

    def __init__(self, args: argparse.Namespace, wanted: float) -> None:
        super().__init__(args, ranks.Ranks())
        self.wanted, self.seconds, self.steps, self.looked, self.best = wanted, 0.0, 0, 0, 0.0

    def run(self) -> bool:
        """Train; whether the score was reached."""
        self.begun = time.perf_counter()
        try:
            self.train()
        except Reached:
            return True
        return False

    def _gradients(self, step: schedule.Step, loader: Any) -> float:
        self.steps += 1
        return super()._gradients(step, loader)

    def save(self) -> None:
        """Stop the clock and look. Raises: Reached."""
        if self.steps == self.looked:
            return
        self.seconds += time.perf_counter() - self.begun
        self.looked = self.steps
        references = {record["id"]: record["label"] for record in self.records["validation"]}
        score = metrics.cider(self.validation.captions(self.args.max_new_tokens), references)
        self.best = max(self.best, score)
        if score >= self.wanted:
            raise Reached
        self.captioner.train()
        self.begun = time.perf_counter()

    def _finish_epoch(self) -> None:
        self.epoch, self.step, self.total, self.captions = self.epoch + 1, 0, 0.0, 0

    def write_results(self) -> None:
        """Nothing."""


def one_run(args: argparse.Namespace, data: Path, flags: list[str], textbook: bool) -> tuple[bool, Timed]:
    """A run from its first step to the score, or to its end."""
    nowhere = ["--checkpoint", str(data / "benchmark" / "none.pt"), "--results", str(data / "benchmark")]
    words = ["--data", str(data), *shlex.split(args.train), "--save-every", str(args.every), *nowhere, *flags]
    with patch.object(train, "QFormer", ConfiguredTextbook if textbook else train.QFormer):
        trainer = Timed(train.parse(words), args.score)
        return trainer.run(), trainer


def main(argv: list[str] | None = None) -> None:
    """Compare, and print the table."""
    parser = measure.parser(__doc__.splitlines()[0], runs=None)
    demo.add_flags(parser)
    parser.add_argument("--score", type=arguments.positive, default=6.0, help="CIDEr on the validation split")
    parser.add_argument("--every", type=arguments.count, default=25, help="steps between two looks at the score")
    parser.add_argument("--captions-per-clip", type=arguments.count, nargs="+", default=[1, 14], help="settings of it")
    parser.add_argument("--queries", type=arguments.count, nargs="+", default=[16], help="settings of --num-queries")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rows = []
    with tempfile.TemporaryDirectory() as work:
        data = args.data
        if not (data / "features").is_dir():
            data = demo.encoded(args.data, Path(work) / "data", args.encode)
        settings = [
            (queries, captions, textbook)
            for queries in args.queries
            for captions in args.captions_per_clip
            for textbook in ((False, True) if captions == 1 else (False,))
        ]
        found: dict[tuple, list[tuple[bool, Timed]]] = {setting: [] for setting in settings}
        for seed, setting in itertools.product(args.seeds, settings):  # in turns, as the machine is slow or fast
            queries, captions, textbook = setting
            flags = ["--seed", seed, "--num-queries", queries, "--captions-per-clip", captions]
            found[setting].append(one_run(args, data, list(map(str, flags)), textbook))
    for (queries, captions, textbook), runs in found.items():
        seconds = [run.seconds for reached, run in runs if reached]
        shown = [
            f"{run.seconds:.0f} s, {run.steps} steps" if reached else f"not by {run.steps} steps: {run.best:.2f}"
            for reached, run in runs
        ]
        median = f"{statistics.median(seconds):.0f}" if len(seconds) == len(runs) else "-"
        pace = statistics.median(run.seconds / run.steps for _, run in runs)
        name = "textbook" if textbook else "absorbed"
        rows.append([queries, name, captions, median, f"{1000 * pace:.0f}", "; ".join(shown)])
    title = f"Time to CIDEr {args.score:g} on the validation split of {args.data}, seeds {args.seeds}"
    header = ("queries", "attention", "captions a clip", "median seconds", "ms a step", "each seed")
    measure.report(__file__, title, header, rows)


if __name__ == "__main__":
    files.run(main)
