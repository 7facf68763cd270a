"""Memory over a long run: resident bytes of training and of preprocessing at step 2000, against step 200.

Each runs as its script does, in a process of its own; decoders count too. Training goes many times over a small
made-up dataset, with validation and checkpoints as they come. A preprocessing step is a batch of one clip.
"""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import preprocess_something_something_v2 as preprocessing
import train
from benchmarks import data_path, measure, preprocess, sizes
from models import language_model as language
from runtime import cli as arguments
from runtime import distributed as ranks
from runtime import files

SIZE = replace(sizes.SIZES["small"], tokens=512, visual_dim=256)
CLIPS = 64  # of the made-up training set
MORE = 32  # clips to preprocess after the last step that counts, so that the decoders are still at work in it
BATCH = 4


class Done(Exception):
    """All steps are done."""


class Watch:
    """Resident bytes of this process and its children after each step."""

    def __init__(self, steps: int) -> None:
        self.steps, self.resident = steps, []

    def after(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run`, a step, with a look after it. Raises: Done after the last one."""

        def watched(*values: Any) -> Any:
            found = run(*values)
            self.resident.append(measure.resident_tree(os.getpid()))
            if len(self.resident) == self.steps:
                raise Done
            return found

        return watched

    def around(self, step: int) -> float:
        """The median of the twentieth of all steps that ends with `step`, in bytes."""
        return measure.median(self.resident[step - max(1, step // 20) : step])


def training(work: Path, steps: int, threads: int) -> Watch:
    """`steps` training steps, over as many epochs as that takes."""
    torch.set_num_threads(threads)
    data = data_path.made_up(SIZE, work / "data", CLIPS, "float16")
    out = ["--checkpoint", str(work / "checkpoint.pt"), "--results", str(work / "results")]
    flags = ["--data", str(data), *out, "--batch-size", str(BATCH), "--accumulate", "1", "--epochs", str(steps)]
    tokenizer = sizes.WordTokenizer(SIZE.lm["vocab_size"])
    with patch.object(language, "load", lambda *_: (sizes.language_model(SIZE), tokenizer)):
        trainer = train.Trainer(train.parse(flags), ranks.Ranks())
    watch = Watch(steps)
    with patch.object(trainer, "_gradients", watch.after(trainer._gradients)):
        try:
            trainer.train()
        except Done:
            return watch
    raise RuntimeError("training ended early")


def encoding(work: Path, steps: int, threads: int) -> Watch:
    """`steps` batches of one clip, preprocessed."""
    torch.set_num_threads(threads)
    preprocess.make_data(work / "data", steps + MORE, size=(112, 84), drawn=4)
    encoder = preprocess.make_encoder(work / "encoder", hidden=64, layers=2, pixels=64, frames=8)
    flags = ["--data", str(work / "data"), "--splits", "train", "--encoder", str(encoder), "--frames", "8"]
    watch = Watch(steps + MORE + 1)  # it ends by itself
    with patch.object(preprocessing.Saver, "save", watch.after(preprocessing.Saver.save)):
        preprocessing.main([*flags, "--batch-size", "1"])
    return watch


def main(argv: list[str] | None = None) -> None:
    """Run both, and print the table."""
    parser = measure.parser(__doc__.splitlines()[0], runs=None)
    parser.add_argument("--steps", type=arguments.count, default=2000, help="the last step; the first is a tenth of it")
    args = parser.parse_args(argv)
    first, last = max(1, args.steps // 10), args.steps
    rows = []
    for what, run in (("training", training), ("preprocessing", encoding)):
        with (
            tempfile.TemporaryDirectory() as work,
            ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
        ):
            watch = pool.submit(run, Path(work), args.steps, args.threads).result()
        early, late = watch.around(first), watch.around(last)
        shown = [f"{value / 1e6:.1f}" for value in (early, late)]
        rows.append([what, *shown, f"{100 * (late / early - 1):+.1f} %", "<= +5 %"])
    header = ("", f"MB at step {first}", f"MB at step {last}", "growth", "wanted")
    measure.report(__file__, "Memory over a long run", header, rows)


if __name__ == "__main__":
    files.run(main)
