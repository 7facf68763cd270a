"""SIGTERM and SIGINT, answered where a script can stop in good order."""

import contextlib
import signal
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to end; `code` is the exit code that shells expect of it (128 + signal)."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class Interrupts(contextlib.AbstractContextManager):
    """Notes SIGTERM and SIGINT; `check` raises Interrupted where the script chooses. A second SIGINT ends it at once.

    With `at_once` the signal itself raises Interrupted: for scripts whose files are whole at any moment. Leaving the
    `with` puts the handlers back that were there before.
    """

    def __init__(self, at_once: bool = False) -> None:
        self.at_once, self.received = at_once, None
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def __exit__(self, *_: object) -> None:
        """Listen no more."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number
            if self.at_once:
                self.check()
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    def check(self, others: bool = False) -> None:
        """Raise Interrupted if a signal has come, to this process or to `others`."""
        if self.received is not None or others:
            raise Interrupted(self.received or signal.SIGTERM)
