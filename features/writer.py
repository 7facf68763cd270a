"""Features to files in the background, a bounded number of batches behind the encoder."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from features import cache
from features.cache import Packed

BATCHES = 2  # that wait or are being written: a disk slower than the encoder must not fill the memory
THREADS = 8  # each waits for the disk most of its time


class Writer(ThreadPoolExecutor):
    """Writes batches of clips in threads; use it in a `with`, which ends with all of them written."""

    def __init__(self, failures: dict[Any, str]) -> None:
        """`failures` gets the reason, by its key, of each clip whose features are not numbers."""
        super().__init__(THREADS)
        self._failures = failures
        self._batches: deque[Iterator[None]] = deque()

    def write(self, clips: list[tuple[Any, Path]], packed: Packed) -> None:
        """Write a batch soon: `clips` holds the key and the file of each row of `packed` (B, N, D).

        Raises: OSError where an earlier one could not be written.
        """
        if len(self._batches) == BATCHES:
            list(self._batches.popleft())
        rows = [Packed(*(None if part is None else part[row] for part in packed)) for row in range(len(clips))]
        self._batches.append(self.map(self._save, clips, rows))

    def _save(self, clip: tuple[Any, Path], packed: Packed) -> None:
        key, path = clip
        try:
            cache.save(path, packed)
        except ValueError as error:
            self._failures[key] = str(error)

    def __exit__(self, error_type: type | None, *_: object) -> None:
        """Wait for all that was begun; where the `with` ends with an error, give up what was not begun."""
        try:
            while self._batches and error_type is None:
                list(self._batches.popleft())
        finally:
            self.shutdown(cancel_futures=True)
