"""Features to files in the background, a bounded number of batches behind the encoder."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from features import cache
from features.cache import Packed

BATCHES = 2  # that wait or are being written: a disk slower than the encoder must not fill the memory
THREADS = 8  # each waits for the disk most of its time


class Writer:
    """Writes batches of clips in threads; use it in a `with`, which ends with all of them written."""

    def __init__(self, failures: dict[Any, str]) -> None:
        """`failures` gets the reason, by its key, of each clip whose features are not numbers."""
        self.failures = failures
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="writing")
        self._waiting: deque[list[Future[None]]] = deque()

    def __enter__(self) -> "Writer":
        """Ready."""
        return self

    def __exit__(self, error_type: type | None, *_: object) -> None:
        """Wait for all that was begun; where the `with` ends with an error, give up what was not begun."""
        try:
            while self._waiting and error_type is None:
                self._finish_oldest()
        finally:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def write(self, clips: list[tuple[Any, Path]], packed: Packed) -> None:
        """Write a batch soon: `clips` holds the key and the file of each row of `packed` (B, N, D).

        Raises: OSError where an earlier one could not be written.
        """
        if len(self._waiting) == BATCHES:
            self._finish_oldest()
        rows = [Packed(*(None if part is None else part[row] for part in packed)) for row in range(len(clips))]
        begun = [self._threads.submit(self._save, *clip, row) for clip, row in zip(clips, rows, strict=True)]
        self._waiting.append(begun)

    def _finish_oldest(self) -> None:
        for future in self._waiting.popleft():
            future.result()

    def _save(self, key: Any, path: Path, clip: Packed) -> None:
        try:
            cache.save(path, clip)
        except ValueError as error:
            self.failures[key] = str(error)
