"""A training step and the Q-Former alone: time, operations, captions a second and memory, against the reference.

The reference's step projects all patch tokens, makes logits at all positions and reads one caption a pass. Both have
the same language model, initial weights and features, and dropout as in training. Captions a second count the
reference's passes, one caption a clip each, against passes that read a clip once for all its captions.

The Q-Former's forward and backward pass: absorbed cross-attention against projected keys and values. With dropout off
both compute the same: outputs and gradients are compared as |difference| / |reference|, each tensor's norms (the key
bias, whose gradient is zero but for rounding, is a part of in_proj_bias). With it on, each clip has queries of its own.

The cost of Something-Something V2 is counted, not measured: operations at the published sizes, and hours at a rate
that is for you to say: what your GPU sustains in half precision, a third to a half of what its maker prints.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import VJEPA2Config, VJEPA2Model
from transformers.initialization import no_init_weights

import dataset
import train
from benchmarks import measure
from features import cache
from runtime import cli, files
from tests.reference import textbook_loss

PARTS = ("qformer", "memory", "flops", "times", "cost", "long")
CLIPS = {"train": 168_913, "validation": 24_777}  # of Something-Something V2
ENCODER = {  # real: facebook/vjepa2-vitl-fpc64-256; its predictor is not used
    "real": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "crop_size": 256},
    "small": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "crop_size": 64},
}
FRAMES = 32
TOKENS = 12  # of a caption
COUNTED_BATCH = 8  # clips in the batch whose FLOPs are counted
WANTED = {"seconds": ">= 7 x", "GFLOP": ">= 6 x"}  # with dropout off, batch 8
Step = Callable[[], Tensor]


def optimized(model: nn.Module, loss: Step) -> Step:
    """A training step with the published recipe's optimizer, as train.py has it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.03, fused=True)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        optimizer.step()
        return value.detach()

    return step


class Sides:
    """The two losses on one batch of clips, over one language model."""

    def __init__(self, size: measure.Size, batch: int) -> None:
        self.captioner = measure.captioner(size).train()
        _, textbook = measure.qformers(size)
        self.textbook = textbook.train()
        torch.manual_seed(1)
        self.features = measure.features(size, batch)
        self.batch = batch

    def product(self, captions: int) -> Step:
        """The product's loss, with so many captions a clip."""
        rows = [measure.captions(captions, TOKENS)] * self.batch
        return lambda: self.captioner.loss(self.features, rows)

    def reference(self) -> Step:
        """The reference's loss, one caption a clip."""
        captioner = self.captioner
        ids = [captioner.caption_ids(caption) for caption in measure.captions(1, TOKENS)] * self.batch
        return lambda: textbook_loss(
            captioner.lm, self.textbook, self.features, captioner.prompt_ids, ids, captioner.eos_id, captioner.eos_id
        )

    def step(self, captions: int | None) -> Step:
        """The product's training step, or with None the reference's."""
        if captions is None:
            return optimized(self.textbook, self.reference())
        return optimized(self.captioner.qformer, self.product(captions))


def one_step(size: str, batch: int, captions: int | None) -> Step:
    """A step in a process of its own; what libraries set up once is no part of it, and comes before."""
    Sides(measure.SIZES["small"], batch).step(captions)()
    return Sides(measure.SIZES[size], batch).step(captions)


def forward_backward(qformer: nn.Module, batch: Tensor, weights: Tensor) -> Callable[[], Tensor]:
    """One pass, with the gradients of the outputs' weighted sum: returns the outputs (B, Q, C)."""

    def run() -> Tensor:
        qformer.zero_grad(set_to_none=True)
        outputs = qformer(batch)
        (outputs * weights).sum().backward()
        return outputs.detach()

    return run


def relative_error(one: Tensor, other: Tensor) -> float:
    """|one - other| / |other|."""
    return ((one - other).norm() / other.norm()).item()


def qformer_pass(size: measure.Size, batch: int, which: int, dropout: bool = True) -> Callable[[], Tensor]:
    """A pass of the absorbed (0) or the reference's (1) Q-Former, as in training unless `dropout` is False."""
    model = measure.qformers(size)[which].train(dropout)
    torch.manual_seed(1)
    weights = torch.randn(batch, model.query_tokens.shape[1], size.lm["hidden_size"])
    return forward_backward(model, measure.features(size, batch), weights)


def one_pass(size: str, batch: int, which: int) -> Callable[[], Tensor]:
    """`qformer_pass` for a process of its own; what libraries set up once is no part of it."""
    qformer_pass(measure.SIZES["small"], batch, which)()
    return qformer_pass(measure.SIZES[size], batch, which)


def qformer_rows(size: str, batch: int, runs: int, threads: int) -> list[list[str]]:
    """Rows of the Q-Former alone: time and operations with dropout off and on, memory, and how alike both are."""
    rows, models = [], measure.qformers(measure.SIZES[size])
    torch.manual_seed(1)
    clips = measure.features(measure.SIZES[size], batch)
    weights = torch.randn(batch, models[0].query_tokens.shape[1], models[0].query_tokens.shape[2])
    outputs = [forward_backward(model.eval(), clips, weights)() for model in models]
    pairs = list(zip(*(model.named_parameters() for model in models), strict=True))
    errors = {name: relative_error(one.grad, other.grad) for (name, one), (_, other) in pairs}
    for dropout in (False, True):
        sides = [forward_backward(model.train(dropout), clips, weights) for model in models]
        seconds = measure.times(dict(zip(("absorbed", "reference"), sides, strict=True)), runs)
        label = "training mode, dropout on" if dropout else "dropout off"
        spreads = [measure.spread(seconds[name]) for name in ("reference", "absorbed")]
        gain = measure.paired(seconds["reference"], seconds["absorbed"])
        rows.append([f"seconds, {label}", *spreads, f"{gain:.2f} x", "" if dropout else WANTED["seconds"]])
        passes = [partial(qformer_pass, measure.SIZES[size], batch, which, dropout) for which in (1, 0)]
        counted = [measure.flops(prepare) / 1e9 for prepare in passes]
        shown = [f"{counted[0]:.4g}", f"{counted[1]:.4g}", f"{counted[0] / counted[1]:.2f} x"]
        rows.append([f"GFLOP, {label}", *shown, "" if dropout else WANTED["GFLOP"]])
    peaks = [measure.peak_memory(one_pass, size, batch, which, threads=threads, times=1) / 1e6 for which in (1, 0)]
    gain = f"{peaks[0] / max(peaks[1], 1e-6):.2f} x"
    rows.append(["peak MB above the weights, training mode", f"{peaks[0]:,.0f}", f"{peaks[1]:,.0f}", gain, ""])
    rows.append(["outputs, relative error", "", "", f"{relative_error(*outputs):.1e}", "<= 1e-5"])
    worst = max(errors, key=errors.__getitem__)
    return [*rows, [f"gradients, the worst ({worst})", "", "", f"{errors[worst]:.1e}", "<= 1e-5"]]


def flops(size: measure.Size, captions: int | None) -> int:
    """Of a forward and backward pass."""

    def prepare() -> Step:
        sides = Sides(size, COUNTED_BATCH)
        loss = sides.reference() if captions is None else sides.product(captions)
        return lambda: loss().backward()

    return measure.flops(prepare)


def encoder_flops(size: str) -> int:
    """Of encoding one clip."""

    def prepare() -> Callable[[], object]:
        predictor = {"pred_hidden_size": 12, "pred_num_attention_heads": 1, "pred_num_hidden_layers": 1}
        with no_init_weights():
            encoder = VJEPA2Model(VJEPA2Config(**ENCODER[size], **predictor, frames_per_clip=FRAMES)).encoder
        edge = ENCODER[size]["crop_size"]
        clip = torch.empty(1, FRAMES, 3, edge, edge)
        return lambda: encoder(clip)

    with torch.no_grad():
        return measure.flops(prepare)


def cost(size: str, captions: list[int], epochs: int, rate: float) -> list[list[str]]:
    """Rows: operations of encoding SSv2's clips and of training on them, and hours at `rate` TFLOP a second."""
    clips = sum(CLIPS.values())
    work = {f"encode {clips:,} clips": encoder_flops(size) * clips}
    for count in captions:
        name = f"train {epochs} epochs of {CLIPS['train']:,} clips, {count} caption(s) a clip"
        work[name] = flops(measure.SIZES[size], count) / COUNTED_BATCH * CLIPS["train"] * epochs
    return [[name, f"{total / 1e15:,.3g}", f"{total / rate / 3.6e15:,.1f}"] for name, total in work.items()]


def long_run(work: Path, steps: int, threads: int) -> tuple[float, float]:
    """Bytes of all processes early and late in `steps` steps of train.py, on the sample's language model."""
    torch.set_num_threads(threads)
    (work / "data").mkdir()
    layout, clips = dataset.Layout(work / "data"), 64
    for split, count in (("train", clips), ("validation", 1)):
        records = [{"id": str(number), "label": measure.captions(1, TOKENS)} for number in range(count)]
        for record in records:
            cache.save(layout.features / split / f"{record['id']}.pt", cache.Packed(torch.randn(512, 256).half()))
        files.write_json(layout.annotations / dataset.READY[split], records)
    words = f"--batch-size 4 --accumulate 1 --num-queries 16 --max-new-tokens 4 --epochs {-(-steps // (clips // 4))}"
    places = ["--data", layout.data, "--llm", measure.SAMPLE / "qwen2", "--checkpoint", work / "checkpoint.pt"]
    with measure.Memory() as memory:
        train.main([*map(str, places), "--results", str(work / "results"), *words.split()])
    return memory.early_and_late


def main(argv: list[str] | None = None) -> None:
    """Compare, and print the tables."""
    parser = measure.parser(__doc__)
    add = parser.add_argument
    add("--size", choices=measure.SIZES, default="real", help="of the models; real needs 10 GB of memory")
    add("--batch", type=cli.count, default=2, help="clips")
    add("--captions", type=cli.count, nargs="+", default=[1, 4, 14], help="captions a clip")
    add("--only", choices=PARTS, nargs="+", default=PARTS, help="what to measure")
    add("--rate", type=cli.positive, default=20.0, help="TFLOP a second that a GPU sustains")
    add("--epochs", type=cli.count, default=10, help="of training, for the cost")
    add("--steps", type=cli.count, default=2000, help="of the long run")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    size, rows = measure.SIZES[args.size], []
    if "qformer" in args.only:
        title = f"Q-Former, forward + backward, {args.size} size, batch {args.batch}"
        alone = qformer_rows(args.size, args.batch, args.runs, args.threads)
        measure.report(__file__, title, ("", "reference", "absorbed", "gain", "wanted"), alone)
    if "memory" in args.only:  # before this process has a language model of its own
        rows += memory_rows(args.size, args.batch, args.captions, args.threads)
    if "flops" in args.only:
        rows += flops_rows(size, args.captions, 3 if args.size == "real" else 6)
    if "times" in args.only:
        rows += timed(Sides(size, args.batch), args.captions, args.runs)
    if rows:
        title = f"Training step, {args.size} size, batch {args.batch}, captions of {TOKENS} tokens"
        measure.report(__file__, title, ("captions a clip", "what", "reference", "product", "gain"), rows)
    if "cost" in args.only:
        title = f"What Something-Something V2 costs at {args.rate:g} TFLOP/s, {args.size} size"
        rows = cost(args.size, args.captions, args.epochs, args.rate)
        measure.report(__file__, title, ("", "PFLOP", "hours"), rows)
    if "long" in args.only:
        with tempfile.TemporaryDirectory() as work:
            early, late = measure.in_child(long_run, Path(work), args.steps, args.threads)
        row = [f"{early / 1e6:.1f}", f"{late / 1e6:.1f}", f"{100 * (late / early - 1):+.1f} %", "<= +5 %"]
        title = f"Memory of training over {args.steps} steps, all processes"
        measure.report(__file__, title, ("MB early", "MB late", "growth", "wanted"), [row])


def memory_rows(size: str, batch: int, captions: list[int], threads: int) -> list[list[str]]:
    """Rows of peak memory."""
    sides = [None, *captions]
    peaks = {side: measure.peak_memory(one_step, size, batch, side, threads=threads) for side in sides}
    return [
        _row(count, "peak MB above the weights", [peaks[None] / 1e6, peaks[count] / 1e6], _share(peaks, count), 0)
        for count in captions
    ]


def _share(peaks: dict[int | None, int], count: int) -> str:
    return f"{peaks[count] / max(peaks[None], 1):.2f}"


def flops_rows(size: measure.Size, captions: list[int], digits: int) -> list[list[str]]:
    """Rows of operations."""
    counted = {side: flops(size, side) / 1e12 for side in (None, *captions)}
    return [
        _row(
            count,
            f"TFLOP of a batch of {COUNTED_BATCH}",
            [counted[None], counted[count]],
            f"{count * counted[None] / counted[count]:.2f} x",
            digits,
        )
        for count in captions
    ]


def timed(sides: Sides, captions: list[int], runs: int) -> list[list[str]]:
    """Rows of seconds and of captions a second; the gain is the median of the rounds' own."""
    with torch.no_grad():
        losses = [float(loss()) for loss in (_in_eval(sides, sides.reference()), _in_eval(sides, sides.product(1)))]
    rows = [["1", "loss before, dropout off", *(f"{loss:.6f}" for loss in losses), ""]]
    for count in captions:  # each beside the textbook alone: the memory that one leaves behind changes another's time
        seconds = measure.times({"reference": sides.step(None), "product": sides.step(count)}, runs)
        textbook, mine = seconds["reference"], seconds["product"]
        gain = f"{count * measure.paired(textbook, mine):.2f} x"
        rows.append([str(count), "seconds a step", measure.spread(textbook), measure.spread(mine), ""])
        rates = [sides.batch / measure.median(textbook), count * sides.batch / measure.median(mine)]
        rows.append(_row(count, "captions a second", rates, gain, 3))
    return rows


def _in_eval(sides: Sides, loss: Step) -> Step:
    def run() -> Tensor:
        sides.captioner.eval(), sides.textbook.eval()
        value = loss()
        sides.captioner.train(), sides.textbook.train()
        return value

    return run


def _row(count: int, what: str, values: list[float], gain: str, digits: int) -> list[str]:
    return [str(count), what, *(f"{value:,.{digits}f}" for value in values), gain]


if __name__ == "__main__":
    cli.run(main)
