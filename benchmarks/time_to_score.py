"""Seconds of training to a score on the sample: the reference, in the published code's way, against ours.

The reference (tests/reference.py) projects all patch tokens, makes logits at all positions, reads one caption a pass
and loads features in the training process. Ours is train.py's own loop. Both start from the same weights and take the
same recipe, clips, captions and order, and train an epoch in turns, so that what else the machine does slows both; a
clock runs while its side trains. Copies of the weights, taken every so many steps, are scored afterwards, by the same
code and outside the clocks; between two copies a score is taken to grow evenly.

`--only recipe`: train.py with the published recipe and with the sample's, in epochs and seconds to the same scores.

`--only busy`: a training alone, two at once, and `infer.py --window` beside one, with threads that wait as
runtime/threads.py has it and as OpenMP has it by default.
"""

import argparse
import contextlib
import os
import shlex
import tempfile
import time
from collections import defaultdict, namedtuple
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import infer
import train
from benchmarks import measure, preprocessing, train_step
from benchmarks.feature_cache import recipe
from dataset import plan_epoch
from evaluation import ngrams
from evaluation.captioning import SplitReader
from features.reader import feature_batches
from runtime import cli
from runtime.distributed import DistributedContext
from tests import reference

PUBLISHED = "--lr 5e-5 --schedule constant --warmup 0 --batch-size 8 --accumulate 16"
SPINS = {"runtime/threads.py": os.environ.get("GOMP_SPINCOUNT", ""), "OpenMP's default": "300000"}
Copy = namedtuple("Copy", "step epoch seconds weights")  # the Q-Former's weights at a place in a training


class Clock:
    """Seconds of a training by part, and copies of what it trains every `every` steps."""

    def __init__(self, qformer: nn.Module, optimizer: torch.optim.Optimizer, every: int) -> None:
        self.qformer, self.optimizer, self.every = qformer, optimizer, every
        self.parts: dict[str, float] = defaultdict(float)
        self.copies: list[Copy] = []
        self.begun = self.last = self.spent = 0.0

    def mark(self, part: str) -> None:
        """All that passed since the last call was `part`."""
        now = time.perf_counter()
        self.parts[part] += now - self.last
        self.last = now

    def copy(self, step: int, steps: int) -> None:
        """Copy the weights as they are after `step` steps, of which an epoch has `steps`."""
        weights = {name: value.clone() for name, value in self.qformer.state_dict().items()}
        self.copies.append(Copy(step, step / steps, self.spent + time.perf_counter() - self.begun, weights))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Go on, and watch the steps within."""

        def after_qformer(_module: nn.Module, _inputs: Any, visual: Tensor) -> None:
            self.mark("Q-Former, forward")
            visual.register_hook(lambda _: self.mark("language model, backward"))

        def backward(loss: Tensor) -> None:
            self.mark("language model and loss, forward")
            plain(loss)
            self.mark("Q-Former, backward")

        plain = Tensor.backward
        hooks = [
            self.qformer.register_forward_pre_hook(lambda *_: self.mark("the rest")),
            self.qformer.register_forward_hook(after_qformer),
            self.optimizer.register_step_pre_hook(lambda *_: self.mark("the rest")),
            self.optimizer.register_step_post_hook(lambda *_: self.mark("AdamW")),
        ]
        self.begun = self.last = time.perf_counter()
        with patch.object(Tensor, "backward", backward):
            yield
        self.mark("the rest")
        self.spent += self.last - self.begun
        for hook in hooks:
            hook.remove()

    def reading(self, batches: Iterator[Any]) -> Iterator[Any]:
        """`batches`: what passes until each is there is reading."""
        while True:
            self.mark("the rest")
            batch = next(batches, None)
            self.mark("reading features")
            if batch is None:
                return
            yield batch


# ---- the two sides ----


def ours(run: train.Run, every: int) -> tuple[Clock, Callable[[], None]]:
    """What trains an epoch by train.py's own loop; where that would save its checkpoint, a copy is taken."""
    clock, steps = Clock(run.captioner.qformer, run.optimizer, every), len(plan(run, 0))
    run.args.save_every, run.save = every, lambda: clock.copy(run.epoch * steps + run.step, steps)

    def epoch() -> None:
        run.step, run.total, run.captions = 0, 0.0, 0
        with patch.object(train, "feature_batches", lambda *a: clock.reading(feature_batches(*a))):
            train.train_epoch(run)
        run.save()
        run.epoch += 1

    return clock, epoch


def textbook(run: train.Run, every: int) -> tuple[Clock, Callable[[], None]]:
    """What trains an epoch by the reference's steps."""
    args, captioner = run.args, run.captioner
    qformer = reference.TextbookQFormer(**captioner.qformer.config).train()
    qformer.load_state_dict(captioner.qformer.state_dict())
    optimizer = torch.optim.AdamW(qformer.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    clock, folder = Clock(qformer, optimizer, every), run.layout.features / "train"

    def read(clip_ids: list[str]) -> Tensor:
        clock.mark("the rest")
        features = reference.textbook_read(folder, clip_ids)
        clock.mark("reading features")
        return features

    def loss(features: Tensor, captions: list[str]) -> Tensor:
        ids, eos = list(map(captioner.caption_ids, captions)), captioner.eos_id
        return reference.textbook_loss(captioner.lm, qformer, features, captioner.prompt_ids, ids, eos, eos)

    def epoch() -> None:
        steps = plan(run, run.epoch)
        for number, step in enumerate(steps):
            at, total = run.epoch * len(steps) + number, args.epochs * len(steps)
            optimizer.param_groups[0]["lr"] = train.get_lr(at, total, args.lr, args.schedule, args.warmup)
            reference.textbook_step(optimizer, step, read, loss)
            if (number + 1) % every == 0 or number + 1 == len(steps):
                clock.copy(at + 1, len(steps))
        run.epoch += 1

    return clock, epoch


def plan(run: train.Run, epoch: int) -> list[Any]:
    """An epoch's steps, for both sides."""
    return plan_epoch(run.records["train"], run.args.batch_size, run.args.accumulate, 1, run.args.seed, epoch)


SIDES = {"reference": textbook, "ours": ours}


def trained(sides: list[str], data: Path, flags: str, seed: int, every: int, scores: list[float]) -> dict[str, tuple]:
    """A training of each side, and its places at each of `scores`: (epochs, seconds), or the best score there was."""
    with tempfile.TemporaryDirectory() as work:
        runs, clocks = {}, {}
        for side in sides:
            places = ["--data", str(data), "--checkpoint", f"{work}/{side}.pt", "--results", f"{work}/{side}"]
            args = train.parse([*places, *shlex.split(flags), "--seed", str(seed), "--device", "cpu"])
            runs[side] = train.Run(args, DistributedContext("cpu"))
            clocks[side] = SIDES[side](runs[side], every)
        torch.manual_seed(seed)
        for number in range(args.epochs):
            for side in sides[:: -1 if number % 2 else 1]:
                clock, epoch = clocks[side]
                with clock.running():
                    epoch()
        return {side: (clocks[side][0], places_of(runs[side], clocks[side][0].copies, scores)) for side in sides}


def places_of(run: train.Run, copies: list[Copy], wanted: list[float]) -> list[tuple[float, float] | float]:
    """Epochs and seconds to each wanted CIDEr on the validation split; the best score where it is not reached."""
    records, folder = run.records["validation"], run.layout.features / "validation"
    reader = SplitReader(run.captioner, records, folder, len(records), run.context)
    references = {record["id"]: record["label"] for record in records}
    found, best = [], 0.0
    before, score_before = Copy(0, 0.0, 0.0, {}), 0.0
    for copy in copies:
        if len(found) == len(wanted):
            break
        run.captioner.qformer.load_state_dict(copy.weights)
        score = ngrams.cider(reader.captions(run.args.max_new_tokens), references)
        while len(found) < len(wanted) and score >= wanted[len(found)]:
            rise = score - score_before
            share = (wanted[len(found)] - score_before) / rise if rise > 0 else 1.0
            found.append(tuple(a + share * (b - a) for a, b in zip(before[1:3], copy[1:3], strict=True)))
        before, score_before, best = copy, score, max(best, score)
    return found + [best] * (len(wanted) - len(found))


# ---- tables ----


def score_tables(args: argparse.Namespace) -> None:
    """Seconds to each score on both sides, by seed, and where they went."""
    places, parts, steps = {side: [] for side in SIDES}, {side: defaultdict(list) for side in SIDES}, 0
    for seed in args.seeds:
        for side, (clock, found) in trained([*SIDES], args.data, args.train, seed, args.every, args.scores).items():
            places[side].append(found)
            steps = clock.copies[-1].step
            for part, seconds in clock.parts.items():
                parts[side][part].append(seconds)
            print(f"seed {seed}, {side}: {clock.spent:.1f} s for {steps} steps", flush=True)
    rows = []
    for number, score in enumerate(args.scores):
        both = [[found[number] for found in places[side]] for side in SIDES]
        pairs = [pair for pair in zip(*both, strict=True) if all(isinstance(place, tuple) for place in pair)]
        for unit, of in (("seconds", 1), ("epochs", 0)):
            ratios = [a[of] / b[of] for a, b in pairs]
            cells = [" ".join(shown(place, of) for place in side) for side in both]
            rows.append([f"{unit} to CIDEr {score:g}", *cells, f"{measure.median(ratios):.2f} x" if ratios else ""])
    counted = [train_step.flops(measure.SIZES[args.size], captions) / 1e12 for captions in (None, 1)]
    name = f"TFLOP of a batch of {train_step.COUNTED_BATCH}, {args.size} size"
    rows.append([name, *(f"{count:.3g}" for count in counted), f"{counted[0] / counted[1]:.2f} x"])
    title = f"Training to a score on the validation split, seeds {args.seeds}"
    measure.report(__file__, title, ("", *SIDES, "gain"), rows)
    rows = []
    for part in sorted(parts["reference"], key=lambda part: -sum(parts["reference"][part])):
        each = [1000 * measure.median(parts[side][part]) / steps for side in SIDES]
        rows.append([part, *(f"{value:.2f}" for value in each), f"{each[0] / max(each[1], 1e-9):.2f} x"])
    each = [1000 * measure.median(map(sum, zip(*parts[side].values(), strict=True))) / steps for side in SIDES]
    rows.append(["all", *(f"{value:.2f}" for value in each), f"{each[0] / each[1]:.2f} x"])
    measure.report(__file__, "Milliseconds of a training step, by part", ("", *SIDES, "gain"), rows)


def shown(place: tuple[float, float] | float, of: int) -> str:
    """Epochs (0) or seconds (1), or how far it came."""
    return f"{place[of]:.3g}" if isinstance(place, tuple) else f"(not reached: {place:.2f})"


def recipe_table(args: argparse.Namespace) -> None:
    """Epochs and seconds to each score, of the sample's recipe and of the published one."""
    rows = []
    for name, more in {"the sample's": "", "the published": f"{PUBLISHED} --epochs {args.published_epochs}"}.items():
        for seed in args.seeds:
            _, found = trained(["ours"], args.data, f"{args.train} {more}", seed, args.every, args.scores)["ours"]
            cells = [" in ".join(dict.fromkeys(shown(place, of) for of in (0, 1))) for place in found]
            rows.append([name, seed, *cells])
    header = ("recipe", "seed", *(f"epochs in seconds to CIDEr {score:g}" for score in args.scores))
    measure.report(__file__, f"What a schedule is worth ({args.published_epochs} epochs at most)", header, rows)


# ---- a busy machine ----


def train_once(words: list[str]) -> float:
    """Seconds of a training, with its models loaded."""
    run = train.Run(train.parse(words), DistributedContext("cpu"))
    begun = time.perf_counter()
    train.train(run)
    return time.perf_counter() - begun


def infer_until(words: list[str], ended: Path) -> float:
    """Seconds of one run of infer.py, the median of those before there is a file `ended`; one at least."""
    seconds = []
    while not seconds or not ended.exists():
        begun = time.perf_counter()
        if code := infer.main(words):
            raise RuntimeError(f"infer.py ended with {code}")
        seconds.append(time.perf_counter() - begun)
    return measure.median(seconds[:-1] or seconds)


def busy_round(spins: str, work: Path, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of each, with OpenMP's threads spinning so often before they sleep."""
    places = [["--data", str(args.data), "--checkpoint", f"{work}/{n}.pt", "--results", f"{work}/{n}"] for n in "abcd"]
    trainings = [[*words, *shlex.split(args.train), "--epochs", "2"] for words in places]
    words = f"--checkpoint {work}/start.pt --video {work}/video.mp4 --results {work}/captions --window 4 --stride 2"
    captioning, ended = shlex.split(words), work / "ended"
    preprocessing.make_checkpoint(work / "start.pt")
    preprocessing.make_video(work / "video.mp4", args.minutes, 320, 240)
    with patch.dict(os.environ, GOMP_SPINCOUNT=spins), ProcessPoolExecutor(2, get_context("spawn")) as pool:
        found = {"a training": pool.submit(train_once, trainings[0]).result()}
        both = [pool.submit(train_once, words) for words in trainings[1:3]]
        found["... beside another"] = sum(future.result() for future in both) / 2
        ended.touch()
        found["infer.py --window"] = pool.submit(infer_until, captioning, ended).result()
        ended.unlink()
        beside = pool.submit(infer_until, captioning, ended)
        found["a training beside infer.py --window"] = pool.submit(train_once, trainings[3]).result()
        ended.touch()
        found["infer.py --window beside a training"] = beside.result()
    return found


def busy_table(args: argparse.Namespace) -> None:
    """Seconds alone and beside other work, and the speed that is kept of each setting's own."""
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in SPINS}
    for number in range(args.runs):
        for name, spins in list(SPINS.items())[:: -1 if number % 2 else 1]:
            with tempfile.TemporaryDirectory() as work:
                rounds[name].append(busy_round(spins, Path(work), args))
            print(name, {key: round(value, 1) for key, value in rounds[name][-1].items()}, flush=True)
    rows = []
    for what in rounds["OpenMP's default"][0]:
        alone = "infer.py --window" if what.startswith("infer") else "a training"
        cells = []
        for name in SPINS:
            kept = measure.median([found[alone] / found[what] for found in rounds[name]])
            seconds = measure.spread([found[what] for found in rounds[name]], 1)
            cells += [seconds, "" if what == alone else f"{kept:.2f}"]
        both = ([found[what] for found in rounds[name]] for name in SPINS)
        rows.append([what, *cells, f"{measure.paired(*both):.2f}"])
    header = ("seconds of", *(cell for name in SPINS for cell in (name, "speed kept")), "first / second")
    measure.report(__file__, f"A busy machine: 2 epochs, a video of {args.minutes:g} min", header, rows)


def main(argv: list[str] | None = None) -> None:
    """Train, and print the tables."""
    parser = measure.parser(__doc__, runs=3)
    tables = {"score": score_tables, "recipe": recipe_table, "busy": busy_table}
    add = parser.add_argument
    add("--data", type=Path, default=Path("data/sample"), help="the sample with its features (make demo makes both)")
    add("--only", choices=tables, nargs="+", default=["score"], help="which tables")
    add("--train", default=recipe("RECIPE := .*").split(":= ", 1)[1], help="the recipe: flags of train.py")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the trainings, a pair for each")
    add("--scores", type=float, nargs="+", default=[4.0, 6.0, 8.0], help="CIDEr to reach, rising")
    add("--every", type=cli.count, default=20, help="steps between two copies of the weights")
    add("--size", choices=measure.SIZES, default="real", help="of the models whose operations are counted")
    add("--published-epochs", type=cli.count, default=100, help="of the published recipe, at most")
    add("--minutes", type=cli.positive, default=5.0, help="of the video that is captioned beside it")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    for table in args.only:
        tables[table](args)


if __name__ == "__main__":
    cli.run(main)
