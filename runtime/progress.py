"""Progress of long work: tqdm's bar on a terminal; elsewhere (nohup, a pipe, CI) a plain line a minute."""

import contextlib
import math
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from tqdm import tqdm

NOWHERE = SimpleNamespace(write=lambda _: None, flush=lambda: None)


class Progress(tqdm):
    """tqdm, to be used as tqdm is. Where stderr is no terminal, it prints lines instead of redrawing a bar.

    A line comes from a thread once an interval, so that it also comes while one step takes longer than that; one more
    comes at the end, however it ends. `unit` is a singular ("clip"); `disable`: say nothing (a rank beside the main).
    """

    interval = 60.0  # seconds between two lines

    def __init__(self, *arguments: Any, disable: bool | None = False, **settings: Any) -> None:
        self._ended = threading.Event()
        settings.pop("name", None)  # the hub's own bars have one
        if in_lines := not disable and not sys.stderr.isatty():
            settings |= {"file": NOWHERE, "mininterval": math.inf}  # tqdm counts, and is not seen to draw
        else:
            self._ended.set()
        super().__init__(*arguments, disable=bool(disable), **settings)
        if in_lines:
            threading.Thread(target=self._tell_now_and_then, daemon=True).start()

    def __iter__(self) -> Iterator:
        """Each item, counted once it is done with."""
        with self:
            for item in self.iterable:
                yield item
                self.update()

    def close(self) -> None:
        """Come to an end: the bar stays as it is, or one more line comes."""
        if not self._ended.is_set():
            self._ended.set()
            self._tell()
        super().close()

    def _tell_now_and_then(self) -> None:
        while not self._ended.wait(self.interval):
            is_all = self.total and self.n == self.total  # the hub leaves some of its bars open
            self.close() if is_all else self._tell()

    def _tell(self) -> None:
        """What is done of all, the rate, the time left or taken, and the postfix, in one write."""
        done, seconds = self.n - self.initial, max(self._time() - self.start_t, 1e-3)
        rate, things = done / seconds, "" if self.unit_scale or self.unit == "it" else f" {self.unit}s"
        counts = " of ".join(self._amount(number) for number in (self.n, self.total) if number is not None)
        parts = [f"{counts}{things}" + (f" ({100 * self.n / self.total:.1f} %)" if self.total else "")]
        if done:
            fast = f"{self._amount(round(rate, 1 if rate < 100 else None))}{things}/s"
            parts.append(fast if rate >= 1 or self.unit_scale else f"{1 / rate:.1f} s/{self.unit}")
        if self._ended.is_set() or not done or not self.total:
            parts.append(f"{duration(seconds)} {'in all' if self._ended.is_set() else 'so far'}")
        else:
            parts.append(f"{duration(max(0, self.total - self.n) / rate)} left")
        if self.postfix and not self.unit_scale:
            parts.append(self.postfix)
        with contextlib.suppress(OSError, ValueError):  # a log that is full, or closed, does not end the work
            sys.stderr.write(f"{self.desc.rstrip(': ')}: {', '.join(parts)}\n")
            sys.stderr.flush()

    def _amount(self, number: float) -> str:
        return tqdm.format_sizeof(number, self.unit) if self.unit_scale else f"{number:,}"


def duration(seconds: float) -> str:
    """Seconds as one reads them: "12 s", "4 min 5 s", "10 h 54 min"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
