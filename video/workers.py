"""Many videos in worker processes, each with a time limit: one that hangs or crashes its decoder costs its own clip.

Letters: T frames, S pixels as the encoder sees them.
"""

import contextlib
import ctypes
import itertools
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, TimeoutError
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pebble
import torch
import torch.multiprocessing  # noqa: F401  tensors that a worker returns travel through shared memory
from torch import Tensor

from video import reader
from video.container import Index, Video, VideoError
from video.reader import Transform
from video.subtitles import check_window, windows

AHEAD = 16  # clips that are begun or finished and not yet taken, or two for each worker: they bound the memory
MEMORY = 4 << 30  # bytes that a worker may take beyond what it starts with: a damaged header can ask for any size
RUN_SECONDS = 60.0  # of video that a call decodes, beside the way from the key frame before
RUN_BYTES = 48 << 20  # of frames that a call returns
WHOLE = [(None, None)]  # the span of a clip


class Decoded(NamedTuple):
    """A whole clip, or one window of a long video. Either `frames` or `error` is there."""

    key: Any  # the caller's own name for the file
    frames: Tensor | None  # uint8 (T, 3, S, S)
    error: str | None = None
    warning: str | None = None  # the file is cut off, say: its frames stand for what is left
    start: float | None = None  # seconds from the start of the file; None: the whole clip
    end: float | None = None  # likewise; the duration of a whole clip
    total: int = 1  # the file's windows


class Workers:
    """Processes that decode; use it in a `with`, as early as possible: they start while the models load."""

    def __init__(self, count: int, timeout: float = 60.0) -> None:
        """`count` processes; 0: decode in this one, without time limits. `timeout`: seconds for a clip or window."""
        self.count, self.timeout, self._pool = count, timeout, None

    def __enter__(self) -> "Workers":
        """Start them."""
        if self.count:
            self._pool = pebble.ProcessPool(self.count, initializer=_prepare, context=_context())
            self._pool.schedule(os.getpid)  # pebble starts its processes with the first task
        return self

    def __exit__(self, *_: object) -> None:
        """End them, whatever they are at."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()

    def run(self, calls: Iterable[tuple[Any, Callable[[], Any], int]], ahead: int = 0) -> Iterator[tuple[Any, Any]]:
        """(key, what the call returned, or a VideoError) of each (key, call, time limits it may take), in order.

        At most `ahead` of them, or two for each worker, are begun or finished and not yet taken: they bound the memory.
        """
        if self._pool is None:
            yield from ((key, _attempt(call)) for key, call, _ in calls)
            return
        calls = iter(calls)
        waiting = deque(self._begin(*call) for call in itertools.islice(calls, max(ahead, 2 * self.count)))
        while waiting:
            key, limit, future = waiting.popleft()
            try:
                result = future.result()
            except TimeoutError:
                result = VideoError(f"decoding took longer than {limit:g} s")
            except pebble.ProcessExpired:
                result = VideoError("decoding it ended the worker process")
            yield key, result
            waiting.extend(self._begin(*call) for call in itertools.islice(calls, 1))

    def _begin(self, key: Any, call: Callable[[], Any], limits: int) -> tuple[Any, float, Future]:
        limit = self.timeout * limits
        return key, limit, self._pool.schedule(_attempt, args=(call,), timeout=limit)

    def read_clips(
        self,
        paths: Iterable[tuple[Any, Path | str]],
        transform: Transform,
        frames: int,
        window: float | None = None,
        stride: float | None = None,
    ) -> Iterator[Decoded]:
        """The clip of each (key, path), or its windows, in order; as `reader.read_clip` and `read_spans` read them.

        Seconds: `window`, `stride` (default: the window). Windows begin with the video's track, which need not be the
        start of the file. A file that fails as a whole gives one Decoded with the error and no times.
        """
        paths = ((key, os.path.abspath(path)) for key, path in paths)  # a worker's working directory may be another
        if window is None:
            calls = (((key, WHOLE, 1), partial(_read, path, None, WHOLE, frames, transform), 1) for key, path in paths)
        else:
            calls = self._runs(paths, transform, frames, window, window if stride is None else stride)
        for (key, spans, total), result in self.run(calls, AHEAD if window is None else 0):
            found, warning, spans = ([result] * len(spans), None, spans) if isinstance(result, VideoError) else result
            for span, clip in zip(spans, found, strict=True):
                failed = isinstance(clip, VideoError)
                yield Decoded(key, None if failed else clip, str(clip) if failed else None, warning, *span, total)

    def _runs(
        self, paths: Iterable[tuple[Any, str]], transform: Transform, frames: int, window: float, stride: float
    ) -> Iterator[tuple[Any, Callable[[], Any], int]]:
        """A call for each run of consecutive windows, for opening a long file costs more than they do."""
        check_window(window, stride)
        each = max(1, min(int(RUN_SECONDS / stride), RUN_BYTES // (frames * 3 * transform.size**2)))  # windows of a run
        for (key, path), index in self.run((item, partial(reader.read_index, item[1]), 1) for item in paths):
            if isinstance(index, VideoError):
                yield (key, WHOLE, 1), partial(VideoError, str(index)), 1  # in its turn
                continue
            spans = [(a + index.start, b + index.start) for a, b in windows(index.end - index.start, window, stride)]
            for first in range(0, len(spans), each):
                run = spans[first : first + each]
                yield (key, run, len(spans)), partial(_read, path, index, run, frames, transform), len(run)


def _read(
    path: str, index: Index | None, spans: list[tuple[float, float]], frames: int, transform: Transform
) -> tuple[list[Tensor | VideoError], str | None, list[tuple[float | None, float]]]:
    """In a worker: the clip or the windows, a warning, and from where to where each is, in seconds."""
    if index is None:
        clip, warning, seconds = reader.read_clip(path, frames, transform)
        return [clip], warning, [(None, seconds)]
    found, _ = reader.read_spans(Video(path, index), spans, frames, transform)
    with contextlib.suppress(OSError, AttributeError, TypeError):  # only glibc has it, and only it needs it:
        ctypes.CDLL(None).malloc_trim(0)  # it would keep what was freed, over a gigabyte in two hours of video
    nothing = VideoError("no frame of this window could be decoded")
    return [nothing if clip is None else clip for clip in found], index.warning(len(index.stamps)), spans


def batches(decoded: Iterable[Decoded], size: int) -> Iterator[list[Decoded]]:
    """Lists of which `size` have frames; those that failed travel along, in order."""
    batch: list[Decoded] = []
    for one in decoded:
        batch.append(one)
        if sum(each.frames is not None for each in batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _context() -> multiprocessing.context.BaseContext:
    """Workers fork from a clean process with what scripts import slowly, where the system can; else they spawn."""
    with_forks = hasattr(os, "fork") and "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if with_forks else "spawn")
    if with_forks:
        context.set_forkserver_preload(["video.workers", "transformers"])
    return context


def _prepare() -> None:
    """In a worker, before its first task."""
    torch.set_num_threads(1)  # workers run side by side
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(ImportError, OSError, ValueError):  # where the system can, a limit for damaged headers
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _end_with_parent() -> None:
    """A parent that was killed cannot end its workers: they notice, even over a video that hangs."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _attempt(call: Callable[[], Any]) -> Any:
    """What the call returns, or a VideoError: a run of days must not end over one video."""
    try:
        return call()
    except VideoError as error:
        return error
    except Exception as error:  # nobody expected it: its class is named, so that a bug of ours is seen as one
        return VideoError(f"unexpected {type(error).__name__}: {error}")
