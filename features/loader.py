"""Batches of cached features, read ahead faster than training can use them.

Letters: B clips, N tokens a clip, D their width.
"""

import os
import threading
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from features import cache
from features.cache import Packed
from runtime.files import UserError


class _Layout:
    """Where the tensors lie in a file, learnt from one clip's file and true for every file made alike.

    torch.load takes half a millisecond a file, most of it under the interpreter's lock: for small features more
    than a training step has to spare. Files of the same length, whose bytes up to the first tensor (the pickle
    among them) are the same, differ in nothing but the tensors' numbers. Those are read from the page cache
    straight into their row of the batch, in one system call: the only copy there is.
    """

    def __init__(self, path: Path, clip: Packed) -> None:
        tensors = [tensor for tensor in clip if tensor is not None]
        offsets = []
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            self.size = os.fstat(file.fileno()).st_size
            for record in sorted(archive.infolist(), key=lambda r: r.header_offset):
                if "/data/" in record.filename:
                    file.seek(record.header_offset + 26)
                    name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
                    offsets.append(record.header_offset + 30 + name + extra)
            file.seek(0)
            self.head = file.read(offsets[0])
        ends = [offset + tensor.nbytes for offset, tensor in zip(offsets, tensors, strict=True)]
        # What lies after each tensor, up to the next one or the end; one byte more than there should be at the end.
        self.gaps = [after - end for after, end in zip([*offsets[1:], self.size + 1], ends, strict=True)]

    def read(self, path: Path, rows: list[np.ndarray]) -> bool:
        """Read `path` into `rows` (bytes, one for each tensor); False where it is not laid out like the first."""
        head = bytearray(len(self.head))
        parts: list[Any] = [head]
        for row, gap in zip(rows, self.gaps, strict=True):
            parts += [row, bytearray(gap)]
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return False  # `load` says it in words
        try:
            return os.preadv(handle, parts, 0) == self.size and head == self.head
        finally:
            os.close(handle)

    @staticmethod
    def learn(path: Path, clip: Packed) -> "_Layout | None":
        """The layout of `path`; None where reading by it does not give what torch.load gave."""
        rows = [np.empty(tensor.nbytes, np.uint8) for tensor in clip if tensor is not None]
        try:
            layout = _Layout(path, clip)
            same = layout.read(path, rows)
        except (IndexError, OSError, ValueError, zipfile.BadZipFile):
            return None
        tensors = [tensor for tensor in clip if tensor is not None]
        same = same and all(np.array_equal(row, _bits(t).reshape(-1)) for row, t in zip(rows, tensors, strict=True))
        return layout if same else None


class FeatureLoader:
    """Batches of cached features, read ahead by threads, in the order asked for.

    Iterating gives (ids, Packed of (B, N, D)). Threads, since the work is copying from mapped files: no second
    process, no shared memory. At most `ahead` batches are in memory beyond the one in use, however large the cache.
    Raises, while iterating: UserError naming the file that is missing, damaged, or of another size than the first.
    """

    def __init__(
        self, folder: Path | str, batches: Iterable[list[str]], workers: int = 2, ahead: int = 4, pin: bool = False
    ) -> None:
        """`pin`: into page-locked memory, for non-blocking copies to a GPU."""
        self.folder = Path(folder)
        self.batches = batches
        self.workers = workers
        self.ahead = ahead
        self.pin = pin
        self._lock = threading.Lock()
        self._first: tuple[Path, Packed] | None = None
        self._layout: _Layout | None = None

    def __len__(self) -> int:
        """Batches, where they were given as a list."""
        if not isinstance(self.batches, Sized):
            raise TypeError("these batches have no length")
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[list[str], Packed]]:
        """Read ahead; leaving early stops the threads."""
        waiting: deque[tuple[list[str], Future[Packed]]] = deque()
        threads = ThreadPoolExecutor(self.workers, thread_name_prefix="features")
        try:
            for ids in self.batches:
                waiting.append((ids, threads.submit(self._read_batch, list(ids))))
                if len(waiting) > self.ahead:
                    ids, batch = waiting.popleft()
                    yield ids, batch.result()
            while waiting:
                ids, batch = waiting.popleft()
                yield ids, batch.result()
        finally:
            threads.shutdown(wait=True, cancel_futures=True)

    def _read_batch(self, ids: list[str]) -> Packed:
        paths = [self.folder / f"{clip_id}.pt" for clip_id in ids]
        _, first = self._learn(paths[0])
        batch = Packed(*(None if t is None else self._empty(len(ids), t) for t in first))
        # numpy copies without the interpreter's lock, and starts no second pool of torch's threads in this thread
        bits = [_bits(tensor).reshape(len(ids), -1) for tensor in batch if tensor is not None]
        for row, path in enumerate(paths):
            if self._layout is None or not self._layout.read(path, [tensor[row] for tensor in bits]):
                clip = self._load_alike(path)
                for whole, part in zip(batch, clip, strict=True):
                    if part is not None:
                        np.copyto(_bits(whole[row]), _bits(part))
        if not cache.all_finite(batch):
            for row, path in enumerate(paths):
                cache.check_finite(path, Packed(*(None if t is None else t[row] for t in batch)))
        return batch

    def _empty(self, count: int, like: Tensor) -> Tensor:
        return torch.empty(count, *like.shape, dtype=like.dtype, pin_memory=self.pin)

    def _learn(self, path: Path) -> tuple[Path, Packed]:
        """The first clip that was read, the one that all others must be like."""
        with self._lock:
            if self._first is None:
                clip = cache.load(path)
                self._layout = _Layout.learn(path, clip)
                self._first = (path, clip)
            return self._first

    def _load_alike(self, path: Path) -> Packed:
        """A file that was not written like the first (another torch, another maker, damaged), opened by torch."""
        clip = cache.load(path)
        first_path, first = self._first
        if clip.values.shape != first.values.shape or clip.values.dtype != first.values.dtype:
            raise UserError(
                f"two kinds of features in one cache: {first_path} is {_kind(first)}, {path} is {_kind(clip)}; "
                "preprocess the odd one again"
            )
        return clip


def _bits(tensor: Tensor) -> np.ndarray:
    """The tensor's own memory as numpy knows it (numpy has no bfloat16)."""
    return tensor.view(torch.uint8).numpy()


def _kind(packed: Packed) -> str:
    return f"{'x'.join(map(str, packed.values.shape))} {str(packed.values.dtype).removeprefix('torch.')}"
