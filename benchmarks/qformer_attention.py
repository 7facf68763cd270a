"""The Q-Former, forward and backward: absorbed cross-attention against the reference's projected keys and values.

With dropout off both compute the same: outputs and gradients are compared as |difference| / |reference|, each
tensor's norms (the key bias, whose gradient is zero but for rounding, is a part of in_proj_bias). With dropout on,
as in training, they are timed again; there the queries of each clip are its own from the start.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import measure
from runtime import cli


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


def flops(size: measure.Size, batch: int, dropout: bool) -> list[int]:
    """Of the absorbed and the reference's pass."""

    def prepare(which: int) -> Callable[[], Tensor]:
        qformer = measure.qformers(size)[which].train(dropout)
        outputs = torch.empty(batch, qformer.query_tokens.shape[1], size.lm["hidden_size"])
        return forward_backward(qformer, measure.features(size, batch), outputs)

    return [measure.flops(lambda which=which: prepare(which)) for which in (0, 1)]


def one_pass(size: str, batch: int, which: int) -> Callable[[], Tensor]:
    """A pass in training mode, in a process of its own; what libraries set up once is no part of it."""

    def prepare(size: measure.Size) -> Callable[[], Tensor]:
        qformer = measure.qformers(size)[which].train()
        outputs = torch.ones(batch, qformer.query_tokens.shape[1], size.lm["hidden_size"])
        return forward_backward(qformer, measure.features(size, batch), outputs)

    prepare(measure.SIZES["small"])()
    return prepare(measure.SIZES[size])


def main(argv: list[str] | None = None) -> None:
    """Compare, and print the table."""
    parser = measure.parser(__doc__)
    parser.add_argument("--size", choices=measure.SIZES, default="real", help="of the models")
    parser.add_argument("--batch", type=cli.count, default=8, help="clips")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    size = measure.SIZES[args.size]
    peaks = [measure.peak_memory(one_pass, args.size, args.batch, which, threads=args.threads) for which in (0, 1)]
    models = measure.qformers(size)
    torch.manual_seed(1)
    batch = measure.features(size, args.batch)
    weights = torch.randn(args.batch, models[0].query_tokens.shape[1], size.lm["hidden_size"])
    rows = []
    for dropout in (False, True):
        sides = {
            name: forward_backward(model.train(dropout), batch, weights)
            for name, model in zip(("absorbed", "reference"), models, strict=True)
        }
        if not dropout:
            outputs = [run() for run in sides.values()]
            error = relative_error(*outputs)
            pairs = zip(*(model.named_parameters() for model in models), strict=True)
            errors = {name: relative_error(one.grad, other.grad) for (name, one), (_, other) in pairs}
            worst = max(errors, key=errors.__getitem__)
        seconds = measure.times(sides, args.runs)
        ratio = measure.paired(seconds["reference"], seconds["absorbed"])
        counted = flops(size, args.batch, dropout)
        label = "training mode, dropout on" if dropout else "dropout off"
        spreads = [measure.spread(seconds[name]) for name in ("reference", "absorbed")]
        rows.append([f"seconds, {label}", *spreads, f"{ratio:.2f} x", "" if dropout else ">= 7 x"])
        shown = [f"{counted[1] / 1e9:.4g}", f"{counted[0] / 1e9:.4g}", f"{counted[1] / counted[0]:.2f} x"]
        rows.append([f"GFLOP, {label}", *shown, "" if dropout else ">= 6 x"])
    shown = [f"{peaks[1] / 1e6:,.0f}", f"{peaks[0] / 1e6:,.0f}", f"{peaks[1] / max(peaks[0], 1):.2f} x", ""]
    rows.append(["peak MB above the weights, training mode", *shown])
    rows.append(["outputs, relative error", "", "", f"{error:.1e}", "<= 1e-5"])
    rows.append([f"gradients, the worst ({worst})", "", "", f"{errors[worst]:.1e}", "<= 1e-5"])
    title = f"Q-Former, forward + backward, {args.size} size, batch {args.batch}"
    measure.report(__file__, title, ("", "reference", "absorbed", "gain", "wanted"), rows)


if __name__ == "__main__":
    cli.run(main)
