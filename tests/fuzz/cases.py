"""Damaged files through the scripts: each must be used, or refused in one line that says what is wrong.

Every case is a copy of one good run (data, checkpoints, a language model) with one file damaged, and the scripts that
read it. It depends on the seed and its number alone.
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from concurrent.futures import TimeoutError
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pebble import ProcessExpired, ProcessPool

import evaluate
import prepare_annotations
import train
from features import cache
from models import checkpoint
from models import language_model as language
from runtime import cli
from runtime.signals import Interrupted, Interrupts
from tests import processes, tiny
from tests.fuzz import damage

MAINS = {"prepare_annotations": prepare_annotations.main, "train": train.main, "evaluate": evaluate.main}
MEMORY = 4 << 30  # bytes beyond what it starts with that a case may ask for
REAL = 100  # every so many cases also run as a user runs them, in a process of their own
GOOD = ("used", "refused")


class Target(NamedTuple):
    """Files that are damaged (one of them a case), and the scripts that read them."""

    files: str  # a glob in the case's folder
    scripts: tuple[str, ...]


TARGETS = {
    "training features": Target("data/features/train/*.pt", ("train",)),
    "validation features": Target("data/features/validation/*.pt", ("train", "evaluate")),
    "int8 features": Target("int8/features/validation/*.pt", ("evaluate",)),
    "features' config.json": Target("data/features/config.json", ("train", "evaluate")),
    "checkpoint, end of an epoch": Target("checkpoint.pt", ("train", "evaluate")),
    "checkpoint, within an epoch": Target("within.pt", ("train",)),
    "checkpoint_best.pt": Target("checkpoint_best.pt", ("train",)),
    "checkpoint's folder": Target("folder/*", ("evaluate",)),
    "train_ready, val_ready": Target("data/annotations/*.json", ("train", "evaluate")),
    "labels and answers": Target("data/labels/*", ("prepare_annotations", "evaluate")),
    "paraphrases": Target("data/ssv2_paraphrase.json", ("prepare_annotations",)),
}


class Outcome(NamedTuple):
    """What came of a case."""

    number: int
    target: str
    end: str  # one of GOOD, or what went wrong
    told: str


def make_base(folder: Path) -> None:
    """A dataset, a model and checkpoints, all good."""
    data = tiny.make_dataset(folder / "data")
    labels = data / "labels"
    (labels / "test.json").write_text(json.dumps([{"id": "16"}, {"id": "17"}]))
    (labels / "test-answers.csv").write_text("16;moving a red ball up\n17;covering a cup with paper\n")
    (labels / "opposites.json").write_text(json.dumps({"Moving [something] up": "Moving [something] down"}))
    (data / "ssv2_paraphrase.json").write_text(json.dumps({str(clip): ["a", "b"] for clip in range(1, 11)}))
    tiny.save_lm(folder / "lm")
    checks = iter(range(100))

    def stop(_: Interrupts) -> None:
        if next(checks) == 4:
            raise Interrupted(15)

    with contextlib.chdir(folder):
        train.main(words("train", "--epochs", 1))
        check, Interrupts.check = Interrupts.check, stop
        with contextlib.suppress(Interrupted):
            train.main(words("train", "--checkpoint", "within.pt", "--epochs", 1))
        Interrupts.check = check
        saved = checkpoint.read(Path("checkpoint.pt"))
        captioner = tiny.tiny_captioner(num_heads=2)
        checkpoint.load_weights(captioner.qformer, saved.weights, "checkpoint.pt")
        checkpoint.write_folder(Path("folder"), saved.config, captioner.qformer)
        shutil.copytree("data", "int8")
        for path in Path("int8/features").glob("*/*.pt"):
            cache.save(path, cache.quantize(cache.load(path).values.float(), "int8"))


def words(script: str, *more: Any, data: str = "data", saved: str = "checkpoint.pt") -> list[str]:
    """A script's command line in a case's folder."""
    line = f"--data {data}"
    if script == "train":
        line += f" --checkpoint {saved} --results results --llm lm --num-queries 4 --num-heads 2 --epochs 2 --workers 0"
        line += " --batch-size 2 --accumulate 2 --save-every 1 --max-new-tokens 4 --captions-per-clip 2"
    if script == "evaluate":
        line += f" --checkpoint {saved} --results evaluated --max-new-tokens 4 --no-meteor --actions --grounding"
    if script != "prepare_annotations":
        line += " --max-missing 30"
    return [*line.split(), *map(str, more)]


def run_case(number: int, seed: int, base: Path, place: Path) -> Outcome:
    """Damage one file of a copy of `base`, and run what reads it."""
    random = np.random.default_rng([seed, number])
    name = list(TARGETS)[int(random.integers(len(TARGETS)))]
    shutil.rmtree(place / "around", ignore_errors=True)  # what a case before left, where it ended its process
    folder = place / "around" / f"case{number}"
    shutil.copytree(base, folder, copy_function=shutil.copy)
    marker = folder / "it-ran"
    paths = sorted(folder.glob(TARGETS[name].files))
    path = paths[int(random.integers(len(paths)))]
    path.write_bytes(damaged(path, random, marker))
    scripts = TARGETS[name].scripts
    script = scripts[int(random.integers(len(scripts)))]
    saved = path.name if path.parent == folder and name != "checkpoint_best.pt" else "checkpoint.pt"
    saved = "folder" if name == "checkpoint's folder" else saved
    command = words(script, data="int8" if name == "int8 features" else "data", saved=saved)
    end, told = call(script, command, folder)
    if end in GOOD and number % REAL == 0:
        end, told = call_for_real(script, command, folder, end, told)
    if marker.exists():
        end = "a pickle acted"
    elif end in GOOD and (left := list(folder.rglob(".*.tmp"))):
        end, told = "left a file", str(left[0])
    elif [p.name for p in (place / "around").iterdir()] != [folder.name]:
        end = "wrote outside"
    return Outcome(number, name, end, f"{script}, {path.relative_to(folder)}: {told}")


def damaged(path: Path, random: np.random.Generator, marker: Path) -> bytes:
    """The file's content, damaged in one way."""
    content = path.read_bytes()
    if random.random() < 0.4:
        return damage.damage_bytes(content, random)
    match path.suffix:
        case ".pt":
            return damage.damage_pt(content, random, marker)
        case ".json":
            return damage.damage_json(content, random)
        case ".safetensors":
            return damage.damage_safetensors(content, random)
    return damage.damage_bytes(content, random)


def call(script: str, command: list[str], folder: Path) -> tuple[str, str]:
    """Run a script's main in this process, as `python script.py` would; how it ended, and what it told."""
    printed = io.StringIO()
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            cli.run(lambda: MAINS[script](command))
    except SystemExit as end:
        return judged(end.code, printed.getvalue())
    except BaseException:
        return "traceback", traceback.format_exc()
    return "traceback", "cli.run came back"


def call_for_real(script: str, command: list[str], folder: Path, end: str, told: str) -> tuple[str, str]:
    """The same command in a process of its own, after the first call: it ends well, or is refused."""
    line = [sys.executable, str(processes.ROOT / f"{script}.py"), *command]
    run = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=120)
    really, printed = judged(run.returncode, run.stdout + run.stderr)
    return (end, told) if really in GOOD else (really, printed)


def judged(code: int | None, printed: str) -> tuple[str, str]:
    """What an exit code and output amount to."""
    errors = [line for line in printed.splitlines() if line.startswith("error:")]
    if "Traceback" in printed:
        return "traceback", printed
    if code in (0, None) and not errors:
        return "used", ""
    if code in (1, 2) and len(errors) == 1:
        return ("memory" if "memory" in errors[0] else "refused"), errors[0]
    return "odd end", f"exit code {code}, {errors}"


def prepare(place: Path) -> None:
    """What a process does before its first case."""
    torch.set_num_threads(1)
    os.environ["PATH"] = str(place)  # without Java, a second a call
    language.load = lru_cache(language.load)
    with contextlib.suppress(ImportError, OSError):  # only Linux limits a process's address space so
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def run_cases(run: Any, numbers: range, limit: float, *values: Any, prepare: Any = None) -> Iterator[Outcome]:
    """What `run(number, *values)` makes of each number; one that hangs or kills its process is named as that."""
    settings = {"initializer": prepare, "initargs": values[-1:]} if prepare else {}
    with ProcessPool(1, context=processes.forks, **settings) as pool:
        for number in numbers:
            try:
                yield pool.schedule(run, args=(number, *values), timeout=limit).result()
            except TimeoutError:
                yield Outcome(number, "?", "hang", f"case {number}")
            except ProcessExpired as death:
                yield Outcome(number, "?", f"died ({death.exitcode})", f"case {number}")


def fuzz(numbers: range, seed: int, limit: float = 60.0) -> Iterator[Outcome]:
    """The outcomes of the cases of these numbers; `limit`: seconds a case."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            make_base(place / "base")
        (place / "cases").mkdir()
        yield from run_cases(run_case, numbers, limit, seed, place / "base", place / "cases", prepare=prepare)
