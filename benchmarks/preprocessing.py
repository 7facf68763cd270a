"""How near preprocessing is to its limit: all of it, against encoding alone and decoding alone.

Clips are 240 pixels high and VP9 in WebM, as Something-Something V2's, drawn here; the encoder is a random V-JEPA 2.
Wall time is that of preprocess_something_something_v2.py from its first line to its last, models loaded and workers
started. The limit is the largest of encoding alone, decoding alone / workers, and their CPU seconds together / cores.
"""

import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import shutil

import torch
from transformers import VJEPA2Config, VJEPA2Model

import dataset
import preprocess_something_something_v2 as preprocessing
from benchmarks import measure
from models.vjepa2 import VideoEncoder
from runtime import cli as arguments
from runtime import files
from sample import __main__ as sample
from video.reader import read_clip

SIZE = (320, 240)
FRAMES = 48  # of a clip: four seconds of 12 a second
DRAWN = 24  # different clips; the rest are copies


def draw(number: int, clip: sample.Clip, size: tuple[int, int], folder: Path) -> Path:
    """One clip's file; the noise of a camera makes decoding it as much work as a real one's."""
    frames = sample.render_clip(clip, *size, FRAMES)
    noise = torch.randint(0, 16, frames.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
    path = folder / f"{number}.webm"
    sample.write_video(path, frames // 16 * 15 + noise.numpy())
    return path


def make_data(data: Path, clips: int, size: tuple[int, int] = SIZE, drawn: int = DRAWN) -> list[Path]:
    """A training split of `clips` clips of `size` (width, height), `drawn` different ones; the files."""
    layout = dataset.Layout(data)
    layout.videos.mkdir(parents=True)
    chosen = list(sample.choose_clips({"train": min(clips, drawn)}, 0)["train"].values())
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        paths = list(pool.map(draw, range(len(chosen)), chosen, [size] * len(chosen), [layout.videos] * len(chosen)))
    for number in range(len(paths), clips):
        paths.append(Path(shutil.copy(paths[number % len(chosen)], layout.videos / f"{number}.webm")))
    files.write_json(layout.labels / "train.json", [{"id": str(number)} for number in range(clips)])
    return paths


def make_encoder(folder: Path, hidden: int, layers: int, pixels: int, frames: int) -> Path:
    """A random V-JEPA 2 in a local folder."""
    sizes = {"crop_size": pixels, "frames_per_clip": frames, "hidden_size": hidden, "num_hidden_layers": layers}
    predictor = {"pred_hidden_size": 12, "pred_num_attention_heads": 1, "pred_num_hidden_layers": 1}
    config = VJEPA2Config(**sizes, num_attention_heads=max(1, hidden // 64), **predictor)
    VJEPA2Model(config).save_pretrained(folder)
    return folder


def clocked(run: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of this process and of those that it started and waited for."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    run()
    return time.perf_counter() - wall, cpu_seconds() - cpu


def cpu_seconds() -> float:
    """Of this process and the children that have ended."""
    kinds = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in kinds)


def main(argv: list[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = measure.parser(__doc__.splitlines()[0], runs=3)
    add = parser.add_argument
    add("--clips", type=arguments.count, default=400, help="clips to preprocess")
    add("--workers", type=arguments.count, default=preprocessing.cores(), help="processes that decode")
    add("--batch-size", type=arguments.count, default=8, help="clips encoded at once")
    add("--hidden", type=arguments.count, default=192, help="the encoder's width")
    add("--layers", type=arguments.count, default=4, help="of the encoder")
    add("--pixels", type=arguments.count, default=128, help="that the encoder sees, each way")
    add("--frames", type=arguments.count, default=16, help="sampled of a clip")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as work:
        data = Path(work) / "data"
        paths = make_data(data, args.clips)
        name = make_encoder(Path(work) / "encoder", args.hidden, args.layers, args.pixels, args.frames)
        encoder = VideoEncoder(name, "cpu", args.frames)
        batch = torch.stack([read_clip(paths[0], args.frames, encoder.transform)] * args.batch_size)
        flags = ["--data", str(data), "--splits", "train", "--encoder", str(name), "--frames", str(args.frames)]
        flags += ["--workers", str(args.workers), "--batch-size", str(args.batch_size)]

        def decode() -> None:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # as a worker has it
            for path in paths:
                read_clip(path, args.frames, encoder.transform)
            torch.set_num_threads(threads)

        def encode() -> None:
            for start in range(0, args.clips, args.batch_size):
                encoder.encode(batch[: args.clips - start])

        def everything() -> None:
            shutil.rmtree(data / "features", ignore_errors=True)
            preprocessing.main(flags)

        parts = {"decode": decode, "encode": encode, "all": everything}
        rounds = [{part: clocked(run) for part, run in parts.items()} for _ in range(args.runs)]
        written = len(list((data / "features" / "train").glob("*.pt")))
    if written != args.clips:
        raise RuntimeError(f"{written} of {args.clips} clips were encoded")
    rows, ratios = [], []
    for measured in rounds:
        (decoding, decode_cpu), (encoding, encode_cpu), (wall, cpu) = (measured[part] for part in parts)
        limits = (encoding, decoding / args.workers, (decode_cpu + encode_cpu) / (os.cpu_count() or 1))
        ratios.append(wall / max(limits))
        rows.append([*(f"{value:.2f}" for value in (*limits, wall)), f"{ratios[-1]:.3f}", f"{cpu:.1f}"])
    rows.append(["median", "", "", "", f"{measure.median(ratios):.3f}", "wanted: <= 1.10"])
    decoding, encoding = (f"{1000 * rounds[-1][part][0] / args.clips:.0f} ms" for part in ("decode", "encode"))
    each = f"decoding one takes {decoding} and encoding one {encoding}"
    title = f"Preprocessing {args.clips} clips of {SIZE[0]}x{SIZE[1]}, {args.workers} workers ({each}); seconds"
    header = ("encode alone", "decode alone / workers", "CPU of both / cores", "all", "all / largest", "CPU of all")
    measure.report(__file__, title, header, rows)


if __name__ == "__main__":
    files.run(main)
