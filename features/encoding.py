"""Batches of clips to files: encoded without waiting for the disk, and on a CPU several batches at a time."""

import contextlib
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from features import cache
from features.cache import CacheConfig, Packed
from models.vjepa2 import VideoEncoder

BATCHES_TO_SAVE = 2  # that wait or are being written: a disk slower than the encoder must not fill the memory
MOST_THREADS = 8  # that encode, each with a batch's activations in memory


def encode_ahead(
    encoder: VideoEncoder, config: CacheConfig, batches: Iterable[tuple[list, Tensor]]
) -> Iterator[tuple[list, Packed]]:
    """(keys, features packed as `config` says), in order, of (keys, uint8 frames (B, T, 3, S, S)).

    On a CPU, threads encode a batch each, with one core to every operation: nothing waits at the end of each
    operation for the slowest of several threads, whose core a decoder may have just then (measured with two workers
    on two cores: a third of the processor time).
    """

    def encode(frames: Tensor) -> Packed:
        return cache.pack(encoder.encode(frames), config.dtype, config.pool, encoder.grid)

    if encoder.device.type == "cuda":
        for keys, frames in batches:
            yield keys, encode(frames.pin_memory())
        return
    with one_core_each() as cores:
        count = min(cores, MOST_THREADS)
        threads = ThreadPoolExecutor(count, thread_name_prefix="encoding")
        waiting: deque[tuple[list, Future[Packed]]] = deque()
        try:
            for keys, frames in batches:
                waiting.append((keys, threads.submit(encode, frames)))
                if len(waiting) > count:
                    keys, packed = waiting.popleft()
                    yield keys, packed.result()
            while waiting:
                keys, packed = waiting.popleft()
                yield keys, packed.result()
        finally:
            encoder.stop.set()
            threads.shutdown(wait=True, cancel_futures=True)
            encoder.stop.clear()


@contextlib.contextmanager
def one_core_each() -> Iterator[int]:
    """torch's operations take one core within it; gives how many they took before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


class Saver:
    """Writes features in the background, a bounded number of batches behind the encoder."""

    def __init__(self, failures: dict[Any, str]) -> None:
        """`failures`: gets the reason, by its key, of each clip whose features are not numbers."""
        self.failures = failures
        self.threads = ThreadPoolExecutor(BATCHES_TO_SAVE, thread_name_prefix="saving")
        self.waiting: deque[Future[None]] = deque()
        self.closing = threading.Event()

    def __enter__(self) -> "Saver":
        """Ready."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop after the files that are being written."""
        self.closing.set()
        self.threads.shutdown(wait=True, cancel_futures=True)

    def save(self, names: list[tuple[Any, Path]], packed: Packed) -> None:
        """Write a batch's clips soon: `names` holds each one's key and file.

        Raises: OSError where an earlier one could not be written.
        """
        if len(self.waiting) == BATCHES_TO_SAVE:
            self.waiting.popleft().result()
        on_host, event = to_host(packed)
        self.waiting.append(self.threads.submit(self._write, names, on_host, event))

    def finish(self) -> None:
        """Wait for all that is being written. Raises: OSError where something could not be."""
        while self.waiting:
            self.waiting.popleft().result()

    def _write(self, names: list[tuple[Any, Path]], packed: Packed, event: Any) -> None:
        if event is not None:
            event.synchronize()
        for row, (key, path) in enumerate(names):
            if self.closing.is_set():
                return
            clip = Packed(*(None if part is None else part[row] for part in packed))
            try:
                cache.save(path, clip)
            except ValueError as error:
                self.failures[key] = str(error)


def to_host(packed: Packed) -> tuple[Packed, Any]:
    """The features in main memory, and the event after which they are there (None: now). The GPU is not waited for."""
    if packed.values.device.type != "cuda":
        return packed, None
    parts = [None if p is None else torch.empty(p.shape, dtype=p.dtype, pin_memory=True) for p in packed]
    for ours, theirs in zip(parts, packed, strict=True):
        if ours is not None:
            ours.copy_(theirs, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return Packed(*parts), event
