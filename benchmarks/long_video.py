"""Memory of captioning a long video through windows: `infer.py --window` on 10 minutes, and on two hours.

The videos are made up, the Q-Former is not trained, the other two models are the sample's: none of that changes
what is in memory. Decoders count too.
"""

import tempfile
import time
from pathlib import Path

import av
import numpy as np
import torch

import infer
from benchmarks import measure
from models import checkpoint
from models.language_model import PROMPT
from models.vjepa2 import VideoEncoder
from qformer import QFormer
from runtime import cli, files

FPS = 12


def make_video(path: Path, minutes: float, width: int, height: int) -> None:
    """A square that crosses the picture again and again, another colour each time."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(round(minutes * 60 * FPS)):
            picture = np.full((height, width, 3), 90, np.uint8)
            left = 4 * i % (width - 40)
            picture[height // 3 : height // 3 + 40, left : left + 40] = np.random.default_rng(i // 60).integers(
                0, 255, 3
            )
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def make_checkpoint(path: Path) -> None:
    """The sample's Q-Former before its first step."""
    torch.manual_seed(0)
    encoder = VideoEncoder(str(measure.SAMPLE / "vjepa2"), "cpu", 8)
    qformer = QFormer(num_queries=16, dim=128, visual_dim=128)
    features = encoder.cache_config("float16", 1).to_dict()
    config = {"llm": str(measure.SAMPLE / "qwen2"), "prompt": PROMPT, "features": features}
    checkpoint.write(path, checkpoint.Checkpoint({**config, "qformer": qformer.config}, qformer.state_dict()))


def caption(work: Path, video: Path, flags: list[str], threads: int) -> tuple[float, float, int]:
    """Seconds, bytes of all processes at their peak, and captions of one run."""
    torch.set_num_threads(threads)
    words = ["--checkpoint", str(work / "checkpoint.pt"), "--video", str(video), "--results", str(work / video.stem)]
    begun = time.perf_counter()
    with measure.Memory() as memory:
        if code := infer.main([*words, *flags]):
            raise RuntimeError(f"infer.py ended with {code}")
    took = time.perf_counter() - begun
    windows = files.read_json(work / video.stem / "inference" / f"{video.stem}.json", "the timeline")["windows"]
    return took, max(memory.values), len(windows)


def main(argv: list[str] | None = None) -> None:
    """Caption both, and print the table."""
    parser = measure.parser(__doc__, runs=None)
    parser.add_argument("--minutes", type=cli.positive, nargs="+", default=[10, 120], help="lengths of the videos")
    parser.add_argument("--window", type=cli.positive, default=4.0, help="seconds, as infer.py's")
    parser.add_argument("--stride", type=cli.positive, default=2.0, help="seconds, as infer.py's")
    parser.add_argument("--width", type=cli.count, default=320, help="of the videos, in pixels")
    parser.add_argument("--height", type=cli.count, default=240, help="of the videos, in pixels")
    args = parser.parse_args(argv)
    flags = ["--window", str(args.window), "--stride", str(args.stride)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_checkpoint(work / "checkpoint.pt")
        for minutes in args.minutes:
            video = work / f"{minutes:g}.mp4"
            make_video(video, minutes, args.width, args.height)
            took, peak, windows = measure.in_child(caption, work, video, flags, args.threads)
            rows.append([f"{minutes:g} min", f"{windows:,}", f"{took:.0f}", f"{peak / 1e6:.0f}"])
    header = ("video", "windows", "seconds", "MB at the peak, all processes")
    measure.report(__file__, f"Captioning a long video, {args.width} x {args.height}, {FPS} fps", header, rows)


if __name__ == "__main__":
    cli.run(main)
