"""Where a captioner looked, drawn over a clip's frames: a WebM that plays beside it.

All colour is attention: the picture under it is grey and dimmed. Colour and opacity grow with a patch's weight, from
zero to the largest of the clip: moments of a clip can be compared, two clips cannot.

Letters: Q queries; the grid (T', H', W') of patch tokens; T frames that the encoder saw; n frames drawn, H x W pixels.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from runtime import files
from runtime.progress import Progress
from video.reader import Transform, probe, read_clip
from video.workers import VideoError, Workers

MOST, LONGEST = 256, 640  # frames and pixels of an overlay: a longer video is thinned out, a larger one reduced
COLOURS = "plasma"  # matplotlib's: of even lightness, for colour-blind viewers too, and nowhere grey
DIM, UNSEEN, OPACITY = 0.7, 0.3, 0.8  # the picture's light; that of what a crop left out; of the largest weight
Maps = Mapping[str, np.ndarray]  # (T', H', W') each, by what a page calls them


def write_video(path: Path | str, frames: Iterable[np.ndarray], fps: float = 12) -> None:
    """Write uint8 frames (H, W, 3) as VP9 in WebM, which is what SSv2's clips are, with 12 frames a second."""

    def encode(file: object) -> None:
        # bitexact: Matroska's random ids would make each rendering another file
        with av.open(file, "w", format="webm", options={"fflags": "+bitexact"}) as container:
            stream = container.add_stream("libvpx-vp9", rate=Fraction(fps).limit_denominator(1000))
            stream.pix_fmt = "yuv420p"
            stream.options = {"deadline": "realtime", "cpu-used": "8", "crf": "32", "b": "0"}
            stream.thread_count = 1  # processes are what fills the cores here
            for frame in frames:
                if not stream.codec_context.is_open:
                    stream.height, stream.width = frame.shape[:2]
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())

    files.write_atomic(path, encode)


def named(attention: Tensor, queries: Sequence[int] = ()) -> dict[str, np.ndarray]:
    """A clip's Maps from its attention (Q, T', H', W'): "attention", all queries' mean, and "query 3" for 3."""
    maps = {"attention": attention.mean(0), **{f"query {query}": attention[query] for query in queries}}
    return {name: one.float().cpu().numpy() for name, one in maps.items()}


def write_all(
    workers: Workers, clips: Mapping[str, tuple[Path, Maps]], folder: Path, transform: Transform, frames: int
) -> Iterator[tuple[str, dict[str, str]]]:
    """`write` for clips (videos and Maps by name), into `folder`; gives their files. Who cannot be drawn is told."""
    calls = (
        (name, partial(write, path.absolute(), folder.absolute() / name, maps, transform, frames), len(maps))
        for name, (path, maps) in clips.items()
    )
    for name, drawn in Progress(workers.run(calls), total=len(clips), desc="overlays", unit="clip") if clips else ():
        if isinstance(drawn, VideoError):
            Progress.write(files.printable(f"{name}: no overlay: {drawn}"))
        else:
            yield name, drawn


def write(path: Path, stem: Path, maps: Maps, transform: Transform, frames: int) -> dict[str, str]:
    """Draw each of `maps` over the video `path` into <stem>.<what it is called>.webm; returns their file names.

    `transform` and `frames` (T) tell what the encoder saw. An overlay lasts as long as its video. Raises: VideoError.
    """
    video, steps, drawn = probe(path), len(maps["attention"]), {}
    count = max(steps, min(MOST, video.frames))
    pictures = read_clip(path, count, SimpleNamespace(apply=_reduced))[0].numpy()  # (n, H, W, 3)
    # Frames drawn and frames seen are both uniform from first to last; a frame shows the map of the nearest one seen.
    nearest = np.linspace(0, frames - 1, count).round().astype(int) // (frames // steps)  # (n,) of the T' steps
    for name, weights in maps.items():
        drawn[name] = f"{stem.name}.{name.replace(' ', '-')}.webm"
        overlay = _drawn(pictures, weights, nearest, transform)
        write_video(stem.with_name(drawn[name]), overlay, count / video.duration)
    return drawn


def _reduced(frames: Tensor) -> Tensor:
    """uint8 (T, H, W, 3), H and W LONGEST at most."""
    scale = min(1.0, LONGEST / max(frames.shape[1:3]))
    return F.interpolate(frames.movedim(-1, 1), scale_factor=scale, mode="bilinear", antialias=True).movedim(1, -1)


def _drawn(pictures: np.ndarray, weights: np.ndarray, steps: np.ndarray, transform: Transform) -> Iterator[np.ndarray]:
    """Each picture with the map of its time step over the part that the encoder saw."""
    from matplotlib import colormaps  # a third of a second, and only overlays need it

    colours = np.array(colormaps[COLOURS].colors, np.float32) * 255  # (256, 3)
    top, left, bottom, right = map(round, transform.seen(*pictures.shape[1:3]))
    levels = torch.from_numpy(weights / weights.max())[:, None]  # (T', 1, H', W')
    levels = F.interpolate(levels, (bottom - top, right - left), mode="bilinear").movedim(1, -1).numpy()
    for picture, step in zip(pictures, steps, strict=True):
        grey, level = picture @ np.float32([[0.299], [0.587], [0.114]]), levels[step]  # (H, W, 1), (h, w, 1)
        frame = np.repeat(UNSEEN * grey, 3, axis=2)
        part = DIM * grey[top:bottom, left:right]
        frame[top:bottom, left:right] = part + OPACITY * level * (colours[(level[..., 0] * 255).astype(int)] - part)
        yield frame.round().astype(np.uint8)
