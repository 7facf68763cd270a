"""The sample's recipe as the Makefile has it, and folders in which it runs beside itself with other features."""

import argparse
import re
import shlex
from pathlib import Path

import dataset
import prepare_annotations
import preprocess_something_something_v2 as preprocessing
from runtime.files import UserError

ROOT = Path(__file__).resolve().parents[1]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What the benchmarks that train on the sample take."""
    add = parser.add_argument
    add("--data", type=Path, default=ROOT / "data" / "sample", help="the sample, rendered (make demo does it)")
    add("--encode", default=recipe("--encoder .*"), help="flags of preprocess_something_something_v2.py")
    add("--train", default=recipe("RECIPE := .*").split(":= ", 1)[1], help="flags of train.py")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="runs of each setting")


def recipe(pattern: str) -> str:
    """The Makefile's line from `pattern` on, with the sample's models by their whole paths."""
    lines = re.sub(r"\\\n\s*", "", (ROOT / "Makefile").read_text())
    found = re.search(pattern, lines).group()
    return re.sub(r"(?<=\s)sample/(?=\w+2\b)", f"{ROOT}/sample/", found)


def encoded(data: Path, folder: Path, flags: str) -> Path:
    """The dataset `data` in `folder` with features of its own, by links to its videos and labels.

    `flags` are those of preprocess_something_something_v2.py, without --data and --splits.
    """
    layout = dataset.check_data(data)
    if not layout.videos.is_dir():
        raise UserError(f"there are no videos in {layout.videos}; make demo renders the sample")
    folder.mkdir(parents=True)
    for entry in data.iterdir():
        if entry.name not in (layout.features.name, layout.annotations.name):
            (folder / entry.name).symlink_to(entry.resolve())
    prepare_annotations.main(["--data", str(folder)])
    splits = [split for split in dataset.SPLITS if dataset.Layout(folder).ready(split).exists()]
    preprocessing.main(["--data", str(folder), "--splits", *splits, *shlex.split(flags)])
    return folder
