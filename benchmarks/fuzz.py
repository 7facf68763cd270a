"""Damaged files through the scripts: each must be used, or refused in one line that says what is wrong.

Videos go through preprocess_something_something_v2.py; .pt, .safetensors, JSON and CSV files through
prepare_annotations.py, train.py and evaluate.py. What is counted as a failure: a traceback, a hang, a process that
dies, memory asked for by a size that a file claims, a pickle that acts, a file written where none belongs, and an
unfinished file left behind. Every case depends on --seed and its number alone. Needs the tests' tiny models.
"""

import contextlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests"))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # a damaged name of a model is not looked for on the hub

import numpy as np
import torch

import evaluate
import prepare_annotations
import train
from benchmarks import damage
from features import cache
from models import checkpoint
from models import language_model as language
from runtime import cli as arguments
from runtime import distributed as ranks
from runtime import files, provenance
from runtime.signals import Interrupted, Interrupts
from tests import tiny
from tests.fuzz import videos as fuzz_videos

ROOT = Path(__file__).resolve().parents[1]
MAINS = {"prepare_annotations": prepare_annotations.main, "train": train.main, "evaluate": evaluate.main}
MEMORY = 4 << 30  # bytes beyond what it starts with that a case may ask for
VIDEOS_AT_ONCE = 50
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
    end: str  # GOOD, or what went wrong
    told: str


# ---- one case ----


def make_base(folder: Path) -> None:
    """A dataset, a model and checkpoints, all good: a case is a copy of it with one file damaged."""
    data = tiny.make_dataset(folder / "data")
    labels = data / "labels"
    (labels / "test.json").write_text(json.dumps([{"id": "16"}, {"id": "17"}]))
    (labels / "test-answers.csv").write_text("16;moving a red ball up\n17;covering a cup with paper\n")
    (labels / "opposites.json").write_text(json.dumps({"Moving [something] up": "Moving [something] down"}))
    (data / "ssv2_paraphrase.json").write_text(json.dumps({str(clip): ["a", "b"] for clip in range(1, 11)}))
    tiny.save_lm(folder / "lm")
    within = iter(range(10))

    def stop(_: Interrupts) -> None:
        if next(within) == 4:
            raise Interrupted(15)

    with contextlib.chdir(folder):
        train.main(words("train", "--epochs", 1))
        check, Interrupts.check = Interrupts.check, stop
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
        line += f" --checkpoint {saved} --results results --llm lm --num-queries 4 --num-heads 2 --epochs 2"
        line += (
            " --batch-size 2 --accumulate 2 --save-every 1 --max-new-tokens 4 --captions-per-clip 2 --max-missing 30"
        )
    if script == "evaluate":
        line += f" --checkpoint {saved} --results evaluated --max-new-tokens 4 --no-meteor --max-missing 30"
        line += " --actions --grounding"
    return [*line.split(), *map(str, more)]


def run_case(number: int, seed: int, base: Path, place: Path) -> Outcome:
    """Damage one file of a copy of `base`, and run what reads it."""
    random = np.random.default_rng([seed, number])
    name = list(TARGETS)[int(random.integers(len(TARGETS)))]
    folder = place / "around" / f"case{number}"
    shutil.copytree(base, folder, copy_function=shutil.copy)
    try:
        marker = folder / "it-ran"
        paths = sorted(folder.glob(TARGETS[name].files))
        path = paths[int(random.integers(len(paths)))]
        path.write_bytes(damaged(path, random, marker))
        scripts = TARGETS[name].scripts
        script = scripts[int(random.integers(len(scripts)))]
        saved = path.parts[-1] if path.parent == folder and name != "checkpoint_best.pt" else "checkpoint.pt"
        saved = "folder" if name == "checkpoint's folder" else saved
        data = "int8" if name == "int8 features" else "data"
        command = words(script, data=data, saved=saved)
        end, told = call(script, command, folder)
        if end in GOOD and number % REAL == 0:
            end, told = call_for_real(script, command, folder, end, told)
        if marker.exists():
            end = "a pickle acted"
        elif end in GOOD and (left := [p for p in folder.rglob(".*.tmp")]):
            end, told = "left a file", str(left[0])
        elif [p.name for p in (place / "around").iterdir()] != [folder.name]:
            end = "wrote outside"
        return Outcome(number, name, end, f"{script}, {path.relative_to(folder)}: {told}")
    finally:
        shutil.rmtree(place / "around")


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
    said = io.StringIO()
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            ranks.run(lambda: MAINS[script](command))
    except SystemExit as end:
        return judged(end.code, said.getvalue())
    except BaseException:
        return "traceback", traceback.format_exc()
    return "traceback", "files.run came back"


def call_for_real(script: str, command: list[str], folder: Path, end: str, told: str) -> tuple[str, str]:
    """The same command in a process of its own, after the first call: it ends well, or is refused."""
    line = [sys.executable, str(ROOT / f"{script}.py"), *command]
    run = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=120)
    really, said = judged(run.returncode, run.stdout + run.stderr)
    return (end, told) if really in GOOD else (really, said)


def judged(code: int | None, said: str) -> tuple[str, str]:
    """What an exit code and output amount to."""
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    if "Traceback" in said:
        return "traceback", said
    if code in (0, None) and not errors:
        return "used", ""
    if code in (1, 2) and len(errors) == 1:
        return ("memory" if "memory" in errors[0] else "refused"), errors[0]
    return "odd end", f"exit code {code}, {errors}"


# ---- many cases, in processes that may hang or die ----


def work(pipe: Any, seed: int, base: Path, place: Path) -> None:
    """Run the cases whose numbers come through the pipe."""
    torch.set_num_threads(1)
    os.environ["PATH"] = str(place)  # without Java, a second a call
    language.load = lru_cache(language.load)
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    while (number := pipe.recv()) is not None:
        pipe.send(run_case(number, seed, base, place))


def film(pipe: Any, seed: int, base: Path, place: Path) -> None:
    """Preprocess a batch of damaged videos for each number that comes through the pipe."""
    torch.set_num_threads(1)
    while (number := pipe.recv()) is not None:
        folder = Path(tempfile.mkdtemp(dir=place))
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                reasons = fuzz_videos.fuzz(folder, VIDEOS_AT_ONCE, seed * 1000 + number)
            pipe.send([Outcome(number, "videos", "refused" if r else "used", r or "") for r in reasons.values()])
        except BaseException:
            pipe.send([Outcome(number, "videos", "traceback", traceback.format_exc())])
        shutil.rmtree(folder)


def in_processes(worker: Any, numbers: range, seed: int, base: Path, place: Path, limit: float) -> Iterator[Any]:
    """What `worker` makes of each number; a case that hangs or kills its process is named as that."""
    context = multiprocessing.get_context("forkserver")
    process = pipe = None
    for number in numbers:
        if process is None:
            pipe, theirs = context.Pipe()
            process = context.Process(target=worker, args=(theirs, seed, base, place))
            process.start()
            theirs.close()
        pipe.send(number)
        try:
            if not pipe.poll(limit):
                raise TimeoutError
            yield pipe.recv()
        except (EOFError, OSError) as error:
            process.kill()
            process.join()
            shutil.rmtree(place / "around", ignore_errors=True)
            end = "hang" if isinstance(error, TimeoutError) else f"died ({process.exitcode})"
            yield Outcome(number, "?", end, f"case {number}")
            process = None
    if process is not None:
        pipe.send(None)
        process.join()


def fuzz(videos: int, cases: range, seed: int, limit: float = 60.0) -> list[Outcome]:
    """All outcomes; `limit`: seconds a case."""
    found: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            make_base(place / "base")
        (place / "cases").mkdir()
        begun = time.monotonic()
        for outcome in in_processes(work, cases, seed, place / "base", place / "cases", limit):
            found.append(outcome)
            progress(outcome, len(found), len(cases), begun)
        batches = range(-(-videos // VIDEOS_AT_ONCE))
        for outcomes in in_processes(film, batches, seed, place / "base", place, limit * VIDEOS_AT_ONCE):
            found += outcomes if isinstance(outcomes, list) else [outcomes]
            print(f"{len(found)}: videos", file=sys.stderr, flush=True)
    return found


def progress(outcome: Outcome, done: int, count: int, begun: float) -> None:
    """Say now and then how far it is, and at once what went wrong."""
    if outcome.end not in GOOD:
        print(f"case {outcome.number}: {outcome.end}: {outcome.told}", file=sys.stderr, flush=True)
    if done % 50 == 0:
        print(f"{done} of {count}, {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)


def table(outcomes: list[Outcome]) -> str:
    """Counts by what was damaged and how it ended."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for outcome in outcomes:
        counts[outcome.target][outcome.end] += 1
    ends = [*GOOD, *sorted({outcome.end for outcome in outcomes} - set(GOOD))]
    rows = [("damaged", "cases", *ends)]
    rows += [(name, str(n.total()), *(str(n[end]) for end in ends)) for name, n in sorted(counts.items())]
    total = Counter(outcome.end for outcome in outcomes)
    rows.append(("all", str(total.total()), *(str(total[end]) for end in ends)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def main(argv: list[str] | None = None) -> int:
    """Fuzz, print the table, and end with 1 where anything went wrong."""
    parser = arguments.Parser(__doc__)
    parser.add_argument("--videos", type=int, default=1000, help="damaged videos, rounded up to a multiple of 50")
    parser.add_argument("--files", type=int, default=1000, help="damaged .pt, .safetensors, JSON and CSV files")
    parser.add_argument("--first", type=int, default=0, help="number of the first file's case, to repeat one")
    parser.add_argument("--seed", type=int, default=0, help="decides the damage")
    parser.add_argument("--limit", type=arguments.positive, default=60.0, help="seconds that a case may take")
    args = parser.parse_args(argv)
    begun = time.monotonic()
    outcomes = fuzz(args.videos, range(args.first, args.first + args.files), args.seed, args.limit)
    print(table(outcomes))
    made = provenance.made_by(argv)
    print(f"{made['command']} at {made['commit']}, {time.monotonic() - begun:.0f} s")
    return int(any(outcome.end not in GOOD for outcome in outcomes))


if __name__ == "__main__":
    files.run(main)
