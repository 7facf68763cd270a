"""Windows of long videos: which there are, and their frames, decoded in runs of consecutive windows.

Opening a long file and seeking in it costs more than decoding a window: a worker's task is a run of windows.

Letters: T frames, S pixels as the encoder sees them.
"""

import contextlib
import ctypes
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from runtime.files import UserError
from video.container import Index, Video, VideoError, read_index
from video.reader import Transform, read_spans
from video.workers import Decoded, Workers

MIN_STRIDE = 0.04  # seconds: a frame at 25 fps; smaller steps only caption the same frames again
RUN_SECONDS = 60.0  # of video that a task decodes, beside the way from the key frame before
RUN_BYTES = 48 << 20  # of frames that a task returns

Span = tuple[float, float]  # [start, end) in seconds


def check_window(window: float, stride: float) -> None:
    """Raises: UserError where the two lengths, in seconds, cannot cover a video."""
    for flag, seconds in (("--window", window), ("--stride", stride)):
        if not MIN_STRIDE <= seconds < math.inf:
            raise UserError(f"{flag} {seconds:g}: this is a number of seconds, {MIN_STRIDE:g} or more")
    if stride > window:
        raise UserError(f"--stride {stride:g} is longer than --window {window:g}: take the window's length or less")


def windows(duration: float, window: float, stride: float) -> list[Span]:
    """The windows [start, end) that cover `duration` seconds, in order.

    What is left after the last full window is a shorter window of its own where it holds half a stride or more.
    A smaller rest (often a frame or two of rounding) joins the last window: alone it is too short to show an action.
    """
    count = max(1, 1 + math.floor((duration - window) / stride + 0.5))
    spans = [(i * stride, min(i * stride + window, duration)) for i in range(count)]
    return [*spans[:-1], (spans[-1][0], duration)]


def read_windows(
    workers: Workers,
    paths: Iterable[tuple[Any, Path | str]],
    transform: Transform,
    frames: int,
    window: float,
    stride: float,
) -> Iterator[Decoded]:
    """The windows of each (key, path): files in order, and each file's windows in order.

    Windows begin with the video's track, which need not be the start of the file. A file that fails as a whole gives
    one Decoded with the error and no times. Seconds: `window`, `stride`.
    """
    check_window(window, stride)
    each = max(1, min(int(RUN_SECONDS / stride), RUN_BYTES // (frames * 3 * transform.size**2)))  # windows of a run

    def calls() -> Iterator[tuple[Any, Callable[[], Any], int]]:
        located = ((key, os.path.abspath(path)) for key, path in paths)  # workers may be elsewhere
        for (key, path), index in workers.run((item, partial(read_index, item[1]), 1) for item in located):
            if isinstance(index, VideoError):
                yield (key, [(None, None)], 1), partial(VideoError, str(index)), 1  # in its turn
                continue
            spans = [(a + index.start, b + index.start) for a, b in windows(index.end - index.start, window, stride)]
            for first in range(0, len(spans), each):
                run = spans[first : first + each]
                yield (key, run, len(spans)), partial(read_run, path, index, run, frames, transform), len(run)

    for (key, run, total), result in workers.run(calls()):
        failed = isinstance(result, VideoError)
        clips, warning = ([None] * len(run), None) if failed else result
        error = str(result) if failed else "no frame of this window could be decoded"
        for (start, end), clip in zip(run, clips, strict=True):
            yield Decoded(key, clip, error if clip is None else None, warning, start, end, total)


def read_run(
    path: str, index: Index, spans: Sequence[Span], frames: int, transform: Transform
) -> tuple[list[Tensor | None], str | None]:
    """In a worker: uint8 (T, 3, S, S) of each window, or None where nothing of it decodes; and a warning."""
    found, _ = read_spans(Video(path, index), spans, frames, transform)
    with contextlib.suppress(OSError, AttributeError, TypeError):  # only glibc has it, and only it needs it:
        ctypes.CDLL(None).malloc_trim(0)  # it would keep what was freed, over a gigabyte in two hours of video
    return found, index.warning(len(index.stamps))
