"""How near preprocessing is to its limit, and what long runs and long videos take of the memory.

Clips are 240 pixels high and VP9 in WebM, as Something-Something V2's, drawn here; the encoder is a random V-JEPA 2.
Wall time is that of preprocess_something_something_v2.py from its first line to its last, models loaded and workers
started. The limit is the largest of encoding alone, decoding alone / workers, and their CPU seconds together / cores.

`--minutes`: `infer.py --window` on made-up videos of those lengths. The Q-Former is not trained, the other two models
are the sample's: none of that changes what is in memory. Decoders count too.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import av
import numpy as np
import torch
from transformers import VJEPA2Config, VJEPA2Model

import dataset
import infer
import preprocess_something_something_v2 as preprocess
from benchmarks import measure
from models import checkpoint
from models.language_model import PROMPT
from models.vjepa2 import VideoEncoder
from qformer import QFormer
from runtime import cli, files
from sample import __main__ as sample
from video.reader import read_clip

SIZE = (320, 240)
FRAMES = 48  # of a clip: four seconds of 12 a second
DRAWN = 24  # different clips; the rest are copies
FPS = 12  # of the long videos


def draw(number: int, clip: sample.Clip, size: tuple[int, int], folder: Path) -> Path:
    """One clip's file; the noise of a camera makes decoding it as much work as a real one's."""
    frames = sample.render_clip(clip, *size, FRAMES)
    noise = torch.randint(0, 16, frames.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
    path = folder / f"{number}.webm"
    sample.write_video(path, frames // 16 * 15 + noise.numpy())
    return path


def make_data(data: Path, clips: int, size: tuple[int, int] = SIZE) -> list[Path]:
    """A training split of `clips` clips of `size` (width, height), `DRAWN` different ones; the files."""
    data.mkdir(parents=True, exist_ok=True)
    layout = dataset.Layout(data)
    layout.videos.mkdir()
    chosen = list(sample.choose_clips({"train": min(clips, DRAWN)}, 0)["train"].values())
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
    """Wall seconds, and CPU seconds of this process alone."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def rounds(args: argparse.Namespace, work: Path) -> list[dict[str, tuple[float, float]]]:
    """Decoding alone, encoding alone and all of preprocessing, `args.runs` times in turns."""
    data = work / "data"
    paths = make_data(data, args.clips)
    name = make_encoder(work / "encoder", args.hidden, args.layers, args.pixels, args.frames)
    encoder = VideoEncoder(name, "cpu", args.frames)
    batch = torch.stack([read_clip(paths[0], args.frames, encoder.transform)[0]] * args.batch_size)
    flags = ["--data", str(data), "--splits", "train", "--encoder", str(name), "--num-frames", str(args.frames)]
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
        preprocess.main(flags)
        if (written := len(list((data / "features" / "train").glob("*.pt")))) != args.clips:
            raise RuntimeError(f"{written} of {args.clips} clips were encoded")

    parts = {"decode": decode, "encode": encode, "all": everything}
    return [{part: clocked(run) for part, run in parts.items()} for _ in range(args.runs)]


def long_run(work: Path, clips: int, threads: int) -> tuple[float, float]:
    """Bytes of all processes, decoders among them, early and late in preprocessing many small clips."""
    torch.set_num_threads(threads)
    make_data(work / "data", clips, size=(112, 84))
    encoder = make_encoder(work / "encoder", hidden=64, layers=2, pixels=64, frames=8)
    flags = ["--data", str(work / "data"), "--splits", "train", "--encoder", str(encoder), "--num-frames", "8"]
    with measure.Memory() as memory:
        preprocess.main([*flags, "--batch-size", "1"])
    return memory.early_and_late


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


def long_videos(args: argparse.Namespace, work: Path) -> list[list[str]]:
    """Rows: seconds and the memory's peak of captioning videos of `args.minutes`."""
    make_checkpoint(work / "checkpoint.pt")
    rows, flags = [], ["--window", str(args.window), "--stride", str(args.stride)]
    for minutes in args.minutes:
        video = work / f"{minutes:g}.mp4"
        make_video(video, minutes, args.width, args.height)
        took, peak, windows = measure.in_child(caption, work, video, flags, args.threads)
        rows.append([f"{minutes:g} min", f"{windows:,}", f"{took:.0f}", f"{peak / 1e6:.0f}"])
    return rows


def main(argv: list[str] | None = None) -> None:
    """Measure, and print the tables."""
    parser = measure.parser(__doc__, runs=3)
    add = parser.add_argument
    add("--clips", type=cli.count, default=800, help="clips to preprocess")
    add("--workers", type=cli.count, default=preprocess.cores(), help="processes that decode")
    add("--batch-size", type=cli.count, default=8, help="clips encoded at once")
    add("--hidden", type=cli.count, default=192, help="the encoder's width")
    add("--layers", type=cli.count, default=4, help="of the encoder")
    add("--pixels", type=cli.count, default=128, help="that the encoder sees, each way")
    add("--frames", type=cli.count, default=16, help="sampled of a clip")
    add("--long", type=cli.count, metavar="CLIPS", help="instead: memory over a run of so many small clips")
    add("--minutes", type=cli.positive, nargs="+", help="instead: infer.py --window on videos so long (10 120, say)")
    add("--window", type=cli.positive, default=4.0, help="seconds, as infer.py's")
    add("--stride", type=cli.positive, default=2.0, help="seconds, as infer.py's")
    add("--width", type=cli.count, default=320, help="of the long videos, in pixels")
    add("--height", type=cli.count, default=240, help="of the long videos, in pixels")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as work:
        if args.minutes:
            title = f"Captioning a long video, {args.width} x {args.height}, {FPS} fps"
            header = ("video", "windows", "seconds", "MB at the peak, all processes")
            measure.report(__file__, title, header, long_videos(args, Path(work)))
            return
        if args.long:
            early, late = measure.in_child(long_run, Path(work), args.long, args.threads)
            row = [f"{early / 1e6:.1f}", f"{late / 1e6:.1f}", f"{100 * (late / max(early, 1) - 1):+.1f} %", "<= +5 %"]
            title = f"Memory of preprocessing {args.long} clips, all processes"
            measure.report(__file__, title, ("MB early", "MB late", "growth", "wanted"), [row])
            return
        measured = rounds(args, Path(work))
    rows, ratios = [], []
    for parts in measured:
        (decoding, decode_cpu), (encoding, encode_cpu), (wall, _) = (
            parts[part] for part in ("decode", "encode", "all")
        )
        limits = (encoding, decoding / args.workers, (decode_cpu + encode_cpu) / (os.cpu_count() or 1))
        ratios.append(wall / max(limits))
        rows.append([*(f"{value:.2f}" for value in (*limits, wall)), f"{ratios[-1]:.3f}"])
    rows.append(["median", "", "", "", f"{measure.median(ratios):.3f} (wanted: <= 1.10)"])
    title = f"Preprocessing {args.clips} clips of {SIZE[0]}x{SIZE[1]}, {args.workers} workers; seconds"
    header = ("encode alone", "decode alone / workers", "CPU of both / cores", "all", "all / largest")
    measure.report(__file__, title, header, rows)


if __name__ == "__main__":
    cli.run(main)
