"""SIGTERM and SIGINT, answered where a script can stop in good order."""

import signal
from types import FrameType


class Interrupted(Exception):
    """A signal asked the process to end; `code` is the exit code that shells expect of it (128 + signal)."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class Interrupts:
    """Notes SIGTERM and SIGINT; `check` raises them where the script chooses. A second SIGINT ends it at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.received is not None:
            raise Interrupted(self.received)
