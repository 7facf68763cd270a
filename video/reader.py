"""Any video file to the frames that a player shows: sampled uniformly and resized to squares for the encoder.

Letters: T frames, H and W pixels as shown, S pixels as the encoder sees them, N frames of a file.
"""

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import VideoReformatter
from torch import Tensor

from video import container
from video.container import Video, VideoError, read_index

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as V-JEPA 2 was trained with
RESIZED_AT_ONCE = 4  # frames: one by one takes longer, all at once more memory


class VideoInfo(NamedTuple):
    """A video as it is shown."""

    frames: int
    fps: float
    duration: float  # seconds from the start of the file to the end of the last frame
    width: int
    height: int


@dataclass(frozen=True)
class Transform:
    """Frames as they were filmed to squares of `size` pixels, still uint8: the encoder normalizes on its device.

    Without `crop` the whole frame is squashed to the square; with it, V-JEPA 2's own evaluation transform: the
    shortest edge to size * 256 / 224 (292 for 256), then the centre.
    """

    size: int
    crop: bool = False
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD

    def apply(self, frames: np.ndarray | Tensor) -> Tensor:
        """uint8 (T, H, W, 3) to uint8 (T, 3, S, S). Antialiased bilinear on uint8, 13 times faster than on floats."""
        frames = torch.as_tensor(frames).permute(0, 3, 1, 2)  # (T, 3, H, W), in channels-last memory as decoded
        (top, height), (left, width) = self._cut(*frames.shape[-2:])
        return _resize(frames, height, width)[..., top : top + self.size, left : left + self.size].contiguous()

    def _cut(self, height: int, width: int) -> list[tuple[int, int]]:
        """Where the square begins within the resized frame, and how long that is: for rows and for columns."""
        edge, short = (int(self.size * 256 / 224), min(height, width)) if self.crop else (self.size, None)
        resized = [edge * length // (short or length) for length in (height, width)]
        return [((length - self.size) // 2, length) for length in resized]

    def seen(self, height: int, width: int) -> tuple[float, float, float, float]:
        """The part of a frame that the encoder sees: top, left, bottom, right, in the frame's own pixels."""
        (top, rows), (left, columns) = self._cut(height, width)
        down, across = height / rows, width / columns
        return top * down, left * across, (top + self.size) * down, (left + self.size) * across


def _resize(frames: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(frames, (height, width), mode="bilinear", antialias=True).contiguous()


def frame_indices(total: int, count: int) -> np.ndarray:
    """`count` frames uniformly over `total`, first and last included; frames repeat where there are fewer. (count,)"""
    return np.linspace(0, total - 1, count).astype(np.int64)


def choose_frames(times: np.ndarray, spans: Sequence[tuple[float, float]], count: int) -> list[np.ndarray]:
    """For each span [start, end) in seconds, `count` frames of it by the one sampler: indices into `times`, (count,).

    A span between two frames shows the one before it.
    """
    chosen = []
    for start, end in spans:
        first, after = np.searchsorted(times, (start - container.EARLY, end - container.EARLY)).tolist()
        if after <= first:
            first = max(0, first - 1)
        chosen.append(first + frame_indices(max(1, after - first), count))
    return chosen


def read_frames(path: Path | str, count: int, start: float | None = None, end: float | None = None) -> np.ndarray:
    """`count` frames of a video, or of its span [start, end) in seconds: uint8 RGB (count, H, W, 3), as FFmpeg's.

    Seconds count from the start of the file. Raises: VideoError for anything that cannot be decoded.
    """
    if start is None and end is None:
        return read_clip(path, count, None)[0].numpy()
    span = (start or 0.0, np.inf if end is None else end)
    (frames,), _ = read_spans(Video(path, read_index(path)), [span], count, None)
    if frames is None:
        raise VideoError("no frame of this part could be decoded")
    return frames.numpy()


def read_clip(path: Path | str, count: int, transform: Transform | None) -> tuple[Tensor, str | None, float]:
    """`count` frames sampled over a whole video, by their numbers, transformed: uint8 (count, 3, S, S).

    Without a transform (count, H, W, 3). Also a warning if the file is cut off, and its seconds. Raises: VideoError.
    """
    with container.opened(path) as video:
        index = video.index
        numbered = index._replace(stamps=np.arange(len(index.stamps)), keys=index.keys[:0], stamped=False)
        (frames,), decoded = read_spans(video._replace(index=numbered), [(-np.inf, np.inf)], count, transform)
    if frames is None:
        raise VideoError("none of its frames can be decoded")
    return frames, index.warning(decoded), index.end


def probe(path: Path | str) -> VideoInfo:
    """A video's length and size as it is shown, from its index and its first frame. Raises: VideoError."""
    with container.opened(path) as video, contextlib.closing(video.frames()) as shown:
        stamp, frame = next(shown, (None, None))
        if frame is None:
            raise VideoError("none of its frames can be decoded")
        height, width, _ = container.rgb(frame, (frame.width, frame.height), VideoReformatter()).shape
        index = video.index
    frames = int((index.stamps >= stamp).sum())  # packets before the first frame that decodes are not shown
    return VideoInfo(frames, 1 / index.frame, index.end, width, height)


def read_spans(
    video: Video, spans: Sequence[tuple[float, float]], count: int, transform: Transform | None
) -> tuple[list[Tensor | None], int]:
    """`count` frames of each ascending span [start, end) in seconds, and how many frames were decoded on the way.

    uint8 (count, 3, S, S), without a transform (count, H, W, 3); None for a span of which nothing decodes. Where the
    index is wrong (packets that do not decode, or hold several frames), it is all done once more with the frames that
    there are. Raises: VideoError.
    """
    index, stamps, after = video.index, video.index.stamps, spans[-1][1]
    for _ in range(3):
        chosen = [stamps[indices] for indices in choose_frames(index.seconds(stamps), spans, count)]
        wanted = np.unique(np.concatenate(chosen))
        store, seen = _decode(video, wanted, after, transform)
        if not len(seen):
            return [None] * len(spans), 0
        if np.array_equal(seen[seen >= wanted[0]], stamps[(stamps >= wanted[0]) & index.before(stamps, after)]):
            break
        stamps = seen
    else:
        raise VideoError("it decodes to other frames each time")
    found: list[Tensor | None] = []
    for span, frames in zip(spans, chosen, strict=True):
        told, left = (index.before(each, span[1]) & ~index.before(each, span[0]) for each in (index.stamps, seen))
        is_lost = told.any() and not left.any()
        found.append(None if is_lost else torch.stack([store[stamp] for stamp in frames.tolist()]))
    return found, len(seen)


def _decode(
    video: Video, wanted: np.ndarray, after: float, transform: Transform | None
) -> tuple[dict[int, Tensor], np.ndarray]:
    """The frames of stamps `wanted`, and the stamps of all frames decoded on the way, before `after` seconds."""
    seen, store, part, chosen = [], {}, {}, set(wanted.tolist())
    size, reformatter = None, VideoReformatter()

    def transformed(part: dict[int, Any]) -> dict[int, Tensor]:
        pixels = torch.from_numpy(np.stack([container.rgb(frame, size, reformatter) for frame in part.values()]))
        return dict(zip(part, transform.apply(pixels) if transform else pixels, strict=True))

    with (
        container.expected_errors(),
        contextlib.closing(video.frames(wanted[0])) as frames,
        ThreadPoolExecutor(1) as beside,  # while it transforms a part, the next one is decoded
    ):
        begun = beside.submit(dict)
        for stamp, frame in frames:
            if stamp > wanted[-1] and not video.index.before(stamp, after):
                break
            seen.append(stamp)
            size = size or (frame.width, frame.height)
            if stamp in chosen:
                part[stamp] = frame
            if len(part) == RESIZED_AT_ONCE:
                store |= begun.result()  # no more than two parts are in memory
                begun, part = beside.submit(transformed, part), {}
        store |= begun.result() | (transformed(part) if part else {})
    return store, np.sort(np.array(seen, dtype=np.int64))
