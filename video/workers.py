"""Many videos in worker processes, each with a time limit: one that hangs or crashes its decoder costs its own clip.

Letters: T frames, S pixels as the encoder sees them.
"""

import contextlib
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
from video.container import NO_MEMORY, VideoError

AHEAD = 16  # clips that are begun or finished and not yet taken, or two for each worker: they bound the memory
MEMORY = 4 << 30  # bytes that a worker may take beyond what it starts with: a damaged header can ask for any size


class Decoded(NamedTuple):
    """A whole clip, or one window of a long video. Either `frames` or `error` is there."""

    key: Any  # the caller's own name for the file
    frames: Tensor | None  # uint8 (T, 3, S, S)
    error: str | None = None
    warning: str | None = None  # the file is cut off, say: its frames stand for what is left
    start: float | None = None  # seconds from the start of the file; None: the whole clip
    end: float | None = None
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

        Calls are asked for one at a time: `ahead` of those that were taken, two for each worker or more.
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
        self, paths: Iterable[tuple[Any, Path | str]], transform: reader.Transform, frames: int
    ) -> Iterator[Decoded]:
        """Whole clips, each (key, path), as `reader.read_clip` reads them, in the order asked for."""
        located = ((key, os.path.abspath(path)) for key, path in paths)  # a worker's working directory may be another
        calls = ((key, partial(reader.read_clip, path, frames, transform), 1) for key, path in located)
        for key, result in self.run(calls, AHEAD):
            failed = isinstance(result, VideoError)
            yield Decoded(key, None, str(result)) if failed else Decoded(key, result[0], warning=result[1])


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
    """Workers fork from a clean process that has imported what they need, where the system can; else they spawn."""
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
    except MemoryError:
        return VideoError(NO_MEMORY)
    except Exception as error:  # nobody expected it: its class is named, so that a bug of ours is seen as one
        return VideoError(f"unexpected {type(error).__name__}: {error}")
