"""Videos to the frames that an encoder sees: sampled uniformly, decoded as FFmpeg does, resized to squares.

One sampler and one transform, used by preprocessing, by inference and to train the sample's encoder.

Letters: T frames, H and W pixels as they are in the file, S pixels as the encoder sees them.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as V-JEPA 2 was trained with
MAX_PIXELS = 8192 * 4352  # a frame of 8K; a damaged header can claim far more
MAX_STRETCH = 32  # longest edge / shortest edge, with --crop: the resized frame grows with it
RESIZED_AT_ONCE = 64 << 20  # bytes of decoded frames that wait to be resized


class VideoError(Exception):
    """A video that cannot be decoded; its text is the reason, without the file's name."""


class VideoInfo(NamedTuple):
    """What a video's index says."""

    frames: int
    fps: float
    duration: float  # seconds
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
        """uint8 (T, H, W, 3) to uint8 (T, 3, S, S). Antialiased bilinear on uint8, 13 times faster than on floats.

        Raises: VideoError for frames too long and thin to crop.
        """
        frames = torch.as_tensor(frames).permute(0, 3, 1, 2)  # (T, 3, H, W), in channels-last memory as decoded
        if not self.crop:
            return _resize(frames, self.size, self.size)
        height, width = frames.shape[-2:]
        if max(height, width) > MAX_STRETCH * min(height, width):
            raise VideoError(f"a frame of {width}x{height} is too long and thin to crop")
        edge = int(self.size * 256 / 224)
        short, long = min(height, width), int(edge * max(height, width) / min(height, width))
        frames = _resize(frames, edge, long) if short == height else _resize(frames, long, edge)
        top, left = ((length - self.size) // 2 for length in frames.shape[-2:])
        return frames[..., top : top + self.size, left : left + self.size].contiguous()


def _resize(frames: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(frames, (height, width), mode="bilinear", antialias=True).contiguous()


def frame_indices(total: int, count: int) -> np.ndarray:
    """`count` frames uniformly over `total`, first and last included; frames repeat where there are fewer. (count,)"""
    return np.linspace(0, total - 1, count).astype(np.int64)


# ---- decoding ----


def read_frames(path: Path | str, count: int, start: float | None = None, end: float | None = None) -> np.ndarray:
    """`count` frames of a video, or of its window [start, end) in seconds: uint8 RGB (count, H, W, 3).

    Equal to FFmpeg's frames to the last bit. Raises: VideoError for anything that cannot be decoded.
    """
    unique, repeats = _sample(path, count, start, end)
    try:
        return np.stack(list(unique))[repeats]
    except ValueError:
        raise VideoError("its frames change size") from None


def read_clip(
    path: Path | str, count: int, transform: Transform, start: float | None = None, end: float | None = None
) -> Tensor:
    """`read_frames` and `transform` in one, a few frames at a time: uint8 (count, 3, S, S), in bounded memory."""
    unique, repeats = _sample(path, count, start, end)
    squares, waiting = [], []
    try:
        for frame in unique:
            waiting.append(frame)
            if len(waiting) * frame.nbytes >= RESIZED_AT_ONCE:
                squares.append(transform.apply(np.stack(waiting)))
                waiting = []
        if waiting:
            squares.append(transform.apply(np.stack(waiting)))
    except ValueError:
        raise VideoError("its frames change size") from None
    return torch.cat(squares)[torch.from_numpy(repeats)]


def probe(path: Path | str) -> VideoInfo:
    """A video's length and size, from its index and first frame. Raises: VideoError."""
    reader = _open(path)
    times, fps = _times(reader)
    height, width, _ = next(_in_order(reader, [0])).shape
    return VideoInfo(len(times), fps, float(times[-1]) + 1 / fps, width, height)


def _sample(
    path: Path | str, count: int, start: float | None, end: float | None
) -> tuple[Iterator[np.ndarray], np.ndarray]:
    """The distinct frames (H, W, 3) to be read, in order, and which of them each of `count` samples is."""
    reader = _open(path)
    first, after = 0, len(reader)
    if start is not None or end is not None:
        times, _ = _times(reader)
        first = int(np.searchsorted(times, start or 0.0))
        after = len(times) if end is None else int(np.searchsorted(times, end))
        if after <= first:  # a window between two frames shows the one before it
            first = max(0, min(first, len(times)) - 1)
            after = first + 1
    wanted, repeats = np.unique(first + frame_indices(after - first, count), return_inverse=True)
    return _in_order(reader, wanted.tolist()), repeats


def _open(path: Path | str) -> Any:
    """A decord reader with the frames of `path`."""
    from decord import VideoReader, logging

    logging.set_level(logging.QUIET)  # damaged files: FFmpeg would tell the terminal, we name the clip
    os.environ.setdefault("DECORD_EOF_RETRY_MAX", "256")  # its 10240 tries are minutes on a truncated file
    path = Path(path)
    try:
        if not path.is_file():
            raise VideoError("there is no such file" if not path.exists() else "it is not a file")
        if path.stat().st_size == 0:
            raise VideoError("the file is empty")
        # One thread: with more, decord 0.6.0 fails on VP9 ("Error sending packet"). Processes run side by side.
        reader = VideoReader(str(path), num_threads=1)
        frames = len(reader)
    except OSError as error:
        raise VideoError(f"the file cannot be read ({error.strerror})") from None
    except VideoError:
        raise
    except Exception as error:
        raise VideoError(f"it does not open as a video{_reason(error)}") from None
    if frames == 0:
        raise VideoError("it holds no frames")
    return reader


def _in_order(reader: Any, wanted: list[int]) -> Iterator[np.ndarray]:
    """The frames of ascending indices `wanted`, decoding all up to the last one.

    decord's own random access (get_batch, skip_frames) gives other frames than asked for in h264 with open groups
    of pictures, and broken ones; decoding in order never did.
    """
    at = -1
    for index in wanted:
        try:
            while at < index:
                frame = reader.next()
                at += 1
                if at == 0 and frame.shape[0] * frame.shape[1] > MAX_PIXELS:
                    raise VideoError(f"a frame of {frame.shape[1]}x{frame.shape[0]} is too large")
            yield frame.asnumpy()
        except VideoError:
            raise
        except MemoryError:
            raise VideoError("it needs more memory than decoding may use") from None
        except Exception as error:
            raise VideoError(f"frame {at + 1} of {len(reader)} cannot be decoded{_reason(error)}") from None


def _times(reader: Any) -> tuple[np.ndarray, float]:
    """When each frame is shown, seconds from the first (frames,), and frames a second."""
    try:
        times = np.asarray(reader.get_frame_timestamp(range(len(reader))), dtype=np.float64)[:, 0]
        fps = float(reader.get_avg_fps())
    except Exception as error:
        raise VideoError(f"its frames have no times{_reason(error)}") from None
    times = np.maximum.accumulate(times - times[0])
    if not np.isfinite(times).all() or times[-1] > 3600 * len(times):
        raise VideoError("its frames have impossible times")
    if not 0 < fps < 1e4:
        fps = (len(times) - 1) / times[-1] if times[-1] > 0 else 25.0
    return times, fps


_SAID_BY_DECORD = {  # parts of its messages, which hold addresses, times and file names beside
    "st_nb": "no video stream that this decoder knows",
    "Failed to measure": "its length cannot be told",
    "avcodec_open2": "its codec does not start",
    "getting stream info": "its streams are damaged",
}


def _reason(error: Exception) -> str:
    """What is known about an error of decord, the same words each time: " (...)" or ""."""
    return next((f" ({words})" for part, words in _SAID_BY_DECORD.items() if part in str(error)), "")
