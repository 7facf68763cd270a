"""A training step (forward, backward, AdamW): time, FLOPs, captions a second and peak memory, against the textbook.

The textbook's step projects all patch tokens, makes logits at all positions and reads one caption a pass. Both have
the same language model, initial weights and features, and dropout as in training. Captions a second count the
textbook's passes, one caption a clip each, against passes in which a clip's captions share its prefix.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

import qformer
from benchmarks import measure, sizes
from runtime import cli as arguments
from runtime import files
from tests.reference import textbook_loss

TOKENS = 12  # of a caption
COUNTED_BATCH = 8  # clips in the batch whose FLOPs are counted
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

    def __init__(self, size: sizes.Size, batch: int) -> None:
        self.captioner = sizes.captioner(size).train()
        _, textbook = sizes.qformers(size)
        self.textbook = textbook.train()
        torch.manual_seed(1)
        self.features = sizes.features(size, batch)
        self.batch = batch

    def product(self, captions: int) -> Step:
        """The product's loss, with so many captions a clip."""
        rows = [sizes.captions(captions, TOKENS)] * self.batch
        return lambda: self.captioner.loss(self.features, rows)

    def reference(self) -> Step:
        """The textbook's loss, one caption a clip."""
        told = self.captioner
        ids = [told.caption_ids(caption) for caption in sizes.captions(1, TOKENS)] * self.batch
        arguments = (told.text, ids, told.eos_id, told.pad_id)
        return lambda: textbook_loss(told.lm, self.textbook, self.features, *arguments)

    def step(self, captions: int | None) -> Step:
        """The product's training step, or with None the textbook's."""
        if captions is None:
            return optimized(self.textbook, self.reference())
        return optimized(self.captioner.qformer, self.product(captions))


def one_step(size: str, batch: int, captions: int | None) -> Step:
    """A step in a process of its own; what libraries set up once is no part of it, and comes before."""
    Sides(sizes.SIZES["small"], batch).step(captions)()
    return Sides(sizes.SIZES[size], batch).step(captions)


def flops(size: sizes.Size, captions: int | None) -> int:
    """Of a forward and backward pass.

    Which logits the labels choose depends on their values, which are not there: the mean of all that were made
    stands in, with the same matrix products.
    """

    def prepare() -> Step:
        sides = Sides(size, COUNTED_BATCH)
        loss = sides.reference() if captions is None else sides.product(captions)
        return lambda: loss().backward()

    with patch.object(qformer, "_mean_nll", lambda logits, packed, count: logits.float().mean().expand(count)):
        return measure.flops(prepare)


def main(argv: list[str] | None = None) -> None:
    """Compare, and print the table."""
    parser = measure.parser(__doc__.splitlines()[0])
    parser.add_argument("--size", choices=sizes.SIZES, default="real", help="of the models; real needs 10 GB of memory")
    parser.add_argument("--batch", type=arguments.count, default=2, help="clips")
    parser.add_argument("--captions", type=arguments.count, nargs="+", default=[1, 4, 14], help="captions a clip")
    parser.add_argument("--only", choices=("times", "flops", "memory"), nargs="+", help="leave the others out")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    size, only = sizes.SIZES[args.size], args.only or ("times", "flops", "memory")
    names = {None: "textbook", **{count: f"{count} a clip" for count in args.captions}}
    rows = []
    if "memory" in only:  # before this process has a language model of its own
        peaks = {
            side: measure.peak_memory(one_step, args.size, args.batch, side, threads=args.threads) for side in names
        }
        for count in args.captions:
            share = f"{peaks[count] / max(peaks[None], 1):.2f}"
            rows.append(_row(count, "peak MB above the weights", [peaks[None] / 1e6, peaks[count] / 1e6], share, 0))
    if "flops" in only:
        counted = {side: flops(size, side) / 1e12 for side in names}
        for count in args.captions:
            gain = f"{count * counted[None] / counted[count]:.2f} x"
            what = f"TFLOP of a batch of {COUNTED_BATCH}"
            rows.append(_row(count, what, [counted[None], counted[count]], gain, 3 if args.size == "real" else 6))
    if "times" in only:
        rows += timed(Sides(size, args.batch), args.captions, args.runs)
    title = f"Training step, {args.size} size, batch {args.batch}, captions of {TOKENS} tokens"
    notes = (
        "wanted, one caption a clip: 1.35 x, <= 3.70 TFLOP, memory <= 0.70; captions/s: 4 a clip 3.9 x, 14 a clip 6 x"
    )
    measure.report(__file__, title, ("captions a clip", "what", "textbook", "product", "gain"), rows, notes)


def timed(sides: Sides, captions: list[int], runs: int) -> list[list[str]]:
    """Rows of seconds and of captions a second; the gain is the median of the rounds' own."""
    with torch.no_grad():
        losses = [float(loss()) for loss in (_in_eval(sides, sides.reference()), _in_eval(sides, sides.product(1)))]
    rows = [["1", "loss before, dropout off", *(f"{loss:.6f}" for loss in losses), ""]]
    for count in captions:  # each beside the textbook alone: the memory that one leaves behind changes another's time
        seconds = measure.times({"textbook": sides.step(None), "product": sides.step(count)}, runs)
        textbook, mine = seconds["textbook"], seconds["product"]
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
    files.run(main)
