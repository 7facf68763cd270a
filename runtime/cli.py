"""The command line: numbers that are checked where they are read, and mistakes that are told in one line."""

import argparse
import contextlib
import difflib
import errno
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

from runtime.files import UserError, printable

DEVICE = "cuda, cuda:1, ..., cpu, or mps (default: cuda where there is one, else cpu)"  # the help of --device
_GOOD = "everything written before is still good"
_ADVICE = {  # what to do about a disk's errors
    **dict.fromkeys(("EACCES", "EPERM", "EROFS", "ENOTDIR", "EEXIST"), "mend that, or name another place"),
    **dict.fromkeys(("ENOSPC", "EFBIG", "EDQUOT", "EIO"), _GOOD),
    "ENOENT": "it is gone since the run began: bring it back",
}


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        says_nothing = action.default is None or action.default is False
        return action.help if says_nothing else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are told like all others: in one line, once, with exit code 2."""

    def __init__(self, description: str | None = None, **options: Any) -> None:
        super().__init__(description=description, formatter_class=_Help, **options)

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None) -> Any:
        """Raises: UserError for a flag that is not there, with the one that is most like it."""
        found, unknown = self.parse_known_args(args, namespace)
        for word in unknown:
            near = difflib.get_close_matches(word.split("=")[0], self._option_string_actions, n=1)
            self.error(f"there is no {word}" + (f": did you mean {near[0]}?" if near else ""))
        return found

    def error(self, message: str) -> NoReturn:
        """Raises: UserError."""
        raise UserError(f"{message}; see python {self.prog} --help")


def _number(kind: type, fits: Callable[[Any], bool], what: str) -> Callable[[str], Any]:
    def number(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if fits(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")

    return number


whole = _number(int, lambda value: value >= 0, "a whole number, 0 or more")
count = _number(int, lambda value: value >= 1, "a whole number, 1 or more")
amount = _number(float, lambda value: 0 <= value < math.inf, "a number, 0 or more")
positive = _number(float, lambda value: 0 < value < math.inf, "a number above 0")
probability = _number(float, lambda value: 0 <= value < 1, "a number from 0 to below 1")


def device(name: str | None) -> torch.device:
    """The device that --device names. Raises: UserError where there is no such device."""
    cards = [f"cuda:{i}" for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    usable = ["cpu", *(["cuda", *cards] if cards else []), *(["mps"] if torch.backends.mps.is_available() else [])]
    name = name or ("cuda" if cards else "cpu")
    if name not in usable:
        raise UserError(f"--device {name}: there is no such device here; there is {', '.join(usable)}")
    return torch.device(name)


def run(main: Callable[[], Any]) -> None:
    """Run a script's main: a user's mistake is one line and exit code 2, a failing disk one line and code 1."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # Its encoding may lack a caption's letters; and a log is to hold both streams' lines in their order.
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        code = main()
    except (UserError, KeyboardInterrupt, OSError, MemoryError, RuntimeError) as error:
        message, code = _explain(error)
        print(f"error: {printable(' '.join(message.split()))}", file=sys.stderr, flush=True)
    sys.exit(code or 0)


def _explain(error: BaseException) -> tuple[str, int]:
    """What to tell the user, and the exit code."""
    if isinstance(error, UserError):
        return str(error), error.code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; what was written is kept", getattr(error, "code", 130)  # signals.Interrupted has one
    if isinstance(error, OSError):
        advice = _ADVICE.get(errno.errorcode.get(error.errno))
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or error}{where}" + (f"; {advice}" if advice else ""), 1
    on_gpu = isinstance(error, torch.OutOfMemoryError)
    # torch's error where the CPU's memory is not enough has no class of its own.
    if isinstance(error, RuntimeError) and not on_gpu and "can't allocate memory" not in str(error):
        raise error
    where = "the GPU's memory" if on_gpu else "memory"
    return f"{where} is not enough; use smaller batches; {_GOOD}", 1
