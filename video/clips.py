"""A bridge to the decoders of today, until workers.py has this interface itself."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from video.nursery import Nursery
from video.workers import ClipDecoder, Failure


class Decoded(NamedTuple):
    """One clip's frames, or why there are none."""

    key: Any
    frames: Tensor | None
    error: str | None = None
    warning: str | None = None


class Workers:
    """Processes that decode."""

    def __init__(self, count: int, timeout: float) -> None:
        self.count, self.timeout, self.nursery = count, timeout, Nursery()

    def __enter__(self) -> "Workers":
        """Ready."""
        return self

    def __exit__(self, *_: object) -> None:
        """End them."""
        self.nursery.close()

    def read_clips(self, paths: Iterable, transform: Any, frames: int) -> Iterator[Decoded]:
        """Clips as they are decoded."""
        with ClipDecoder(paths, transform, frames, self.count, self.timeout, nursery=self.nursery) as decoder:
            for key, found in decoder:
                yield Decoded(key, None, found.reason) if isinstance(found, Failure) else Decoded(key, found)


def batches(decoded: Iterable[Decoded], size: int) -> Iterator[list[Decoded]]:
    """Lists in which `size` have frames."""
    batch, good = [], 0
    for clip in decoded:
        batch.append(clip)
        good += clip.error is None
        if good == size:
            yield batch
            batch, good = [], 0
    if batch:
        yield batch
