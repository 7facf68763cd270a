"""SIGTERM and SIGINT, answered where a script can stop in good order."""

import signal
import threading
from types import FrameType


class Interrupted(Exception):
    """A signal asked the process to end; `code` is the exit code that shells expect of it (128 + signal)."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class Interrupts:
    """Notes SIGTERM and SIGINT; `check` raises Interrupted where the script chooses. A second SIGINT ends it at once.

    With `at_once` the signal itself raises Interrupted: for scripts whose files are whole at any moment. Leaving the
    `with` puts the handlers back that were there before. Python allows handlers in the main thread only: in any
    other one this does nothing.
    """

    def __init__(self, at_once: bool = False) -> None:
        self.at_once, self.received = at_once, None
        in_main_thread = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGTERM, signal.SIGINT) if in_main_thread else ()
        self._before = {number: signal.signal(number, self._note) for number in numbers}

    def __enter__(self) -> "Interrupts":
        """Already listening."""
        return self

    def __exit__(self, *_: object) -> None:
        """Listen no more."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.received = number
        if self.at_once:
            self.check()

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.received is not None:
            raise Interrupted(self.received)

    def stop_with_others(self) -> None:
        """Raise Interrupted where another rank was asked to stop, if not this one."""
        self.received = self.received or signal.SIGTERM
        self.check()
