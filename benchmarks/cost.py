"""What Something-Something V2 costs: operations of encoding its clips and of training on them, and hours at a rate.

Operations are counted at the published sizes, on tensors without data. The rate is for you to say: what your GPU
sustains in half precision, which is a third to a half of what its maker prints.
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import VJEPA2Config, VJEPA2Model
from transformers.initialization import no_init_weights

from benchmarks import measure, sizes, train_step
from runtime import cli as arguments
from runtime import files

CLIPS = {"train": 168_913, "validation": 24_777}
ENCODER = {  # facebook/vjepa2-vitl-fpc64-256; its predictor is not used
    "real": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "crop_size": 256},
    "small": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "crop_size": 64},
}
FRAMES = 32


def encoding(size: str) -> int:
    """Operations of encoding one clip."""

    def prepare() -> Callable[[], object]:
        predictor = {"pred_hidden_size": 12, "pred_num_attention_heads": 1, "pred_num_hidden_layers": 1}
        with no_init_weights():
            encoder = VJEPA2Model(VJEPA2Config(**ENCODER[size], **predictor, frames_per_clip=FRAMES)).encoder
        edge = ENCODER[size]["crop_size"]
        clip = torch.empty(1, FRAMES, 3, edge, edge)
        return lambda: encoder(clip)

    with torch.no_grad():
        return measure.flops(prepare)


def main(argv: list[str] | None = None) -> None:
    """Count, and print the table."""
    parser = measure.parser(__doc__.splitlines()[0], runs=None)
    parser.add_argument("--size", choices=ENCODER, default="real", help="of the models")
    parser.add_argument("--rate", type=arguments.positive, default=20.0, help="TFLOP a second that the GPU sustains")
    parser.add_argument("--epochs", type=arguments.count, default=10, help="of training")
    parser.add_argument("--captions", type=arguments.count, nargs="+", default=[1, 4], help="captions a clip")
    args = parser.parse_args(argv)
    clips = sum(CLIPS.values())
    work = {f"encode {clips:,} clips": encoding(args.size) * clips}
    for count in args.captions:
        clip = train_step.flops(sizes.SIZES[args.size], count) / train_step.COUNTED_BATCH
        name = f"train {args.epochs} epochs of {CLIPS['train']:,} clips, {count} caption(s) a clip"
        work[name] = clip * CLIPS["train"] * args.epochs
    rows = [[name, f"{total / 1e15:,.3g}", f"{total / args.rate / 3.6e15:,.1f}"] for name, total in work.items()]
    title = f"What Something-Something V2 costs at {args.rate:g} TFLOP/s, {args.size} size"
    measure.report(__file__, title, ("", "PFLOP", "hours"), rows)


if __name__ == "__main__":
    files.run(main)
