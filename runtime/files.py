"""Files that appear whole or not at all, and errors that people can act on.

Every file of this project is written beside its final name, flushed to the disk and renamed, so that a
process killed at any moment leaves either the old file or the new one, never half of one.
"""

import contextlib
import errno
import glob
import json
import os
import pickle
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch


class UserError(Exception):
    """A mistake that the user can mend: printed as one line (what, where, what to do)."""

    code = 2  # the exit code


class Vanished(UserError):
    """A file that was there when the run began, and is not now: nobody's mistake on the command line."""

    code = 1


def write_atomic(path: Path | str, write: Callable[[BinaryIO], None]) -> None:
    """Call `write(file)` on a new file beside `path`, flush it to the disk, and rename it to `path`.

    On any failure (disk full, folder read-only) `path` is as it was before and the new file is gone. `write` may be
    called again, on another file.
    """
    path = Path(path)
    try:
        _write_and_rename(path, write)
    except FileNotFoundError:  # another run that starts in this folder took the unfinished file for a dead run's
        _write_and_rename(path, write)


def _write_and_rename(path: Path, write: Callable[[BinaryIO], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = None
    try:
        # A name of its own for each writer: two runs that meet in one folder do not write into one file.
        handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, 0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        os.replace(beside, path)
    except BaseException as error:
        if beside is not None:
            Path(beside).unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # not the unfinished one's name, or none at all
        raise


def check_writable(folder: Path | str) -> None:
    """Make the folder and write into it, so that a run fails before its work and not after. Raises: OSError."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def remove_unfinished(path: Path | str) -> None:
    """Remove what processes that were killed had not finished of `path`; what grew in the last minute is let be."""
    path = Path(path)
    for beside in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - beside.stat().st_mtime > 60:
                beside.unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 text, whole or not at all. Halves of surrogate pairs, which UTF-8 has not, are written as escapes."""
    write_atomic(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def write_json(path: Path | str, value: Any, indent: int | None = 2) -> None:
    """Write strict JSON (no NaN: it is not JSON), whole or not at all."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def copy(source: Path, target: Path) -> None:
    """Copy a file, whole or not at all; nothing to do where they are one file."""
    if target.exists() and target.samefile(source):
        return
    with open(source, "rb") as file:

        def write(beside: BinaryIO) -> None:
            file.seek(0)
            shutil.copyfileobj(file, beside, 1 << 20)

        write_atomic(target, write)


def read_json(path: Path | str, what: str) -> Any:
    """Read JSON; `what` names the file's role in the error ("the training labels").

    Raises: UserError where the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{what}: there is no file {path}") from None
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        reason = " ".join(str(error).split())
        raise UserError(f"{what}: {path} is not valid JSON ({reason}); write or download it again") from None


def save_tensors(path: Path | str, value: Any) -> None:
    """torch.save, whole or not at all."""

    def write(file: BinaryIO) -> None:
        try:
            torch.save(value, file)
        except RuntimeError as error:  # torch, as it closes its archive after the disk's own error
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    write_atomic(path, write)


def load_tensors(path: Path | str, what: str, mmap: bool = False) -> Any:
    """torch.load of tensors and plain values only: a pickle that would run code is refused.

    Tensors come to the CPU; `mmap` leaves their bytes in the page cache until they are used.
    Raises: UserError where the file is missing, truncated, or holds anything but tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise UserError(f"{what}: there is no file {path}") from None
    except PermissionError:
        raise UserError(f"{what}: {path} cannot be read; check its permissions") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{what}: {path} holds more than tensors and plain values, or is damaged; "
            "it was refused and nothing in it was run"
        ) from None
    # What torch.load raises on damaged bytes is not documented and differs by where the damage is.
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: torch seeks before a short file
            raise
        raise UserError(f"{what}: {path} is damaged or not a .pt file; make it again") from None


def tell(line: str, _error: BaseException) -> None:
    """Print an error."""
    print(line, file=sys.stderr, flush=True)


def run(main: Callable[[], Any], tell: Callable[[str, BaseException], None] = tell) -> None:
    """Run a script's main: a user's mistake is one line and exit code 2, a failing disk one line and code 1."""
    try:
        code = main()
    except BrokenPipeError:
        sys.exit(1)
    except (UserError, KeyboardInterrupt, OSError, MemoryError, RuntimeError) as error:
        message, code = _explain(error)
        tell(f"error: {printable(' '.join(message.split()))}", error)
    sys.exit(code or 0)


def _explain(error: BaseException) -> tuple[str, int]:
    """What to tell the user, and the exit code."""
    if isinstance(error, UserError):
        return str(error), error.code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or error}{where}; everything written before is still good", 1
    on_gpu = isinstance(error, torch.OutOfMemoryError)
    # torch's error where the CPU's memory is not enough has no class of its own.
    if isinstance(error, RuntimeError) and not on_gpu and "can't allocate memory" not in str(error):
        raise error
    where = "the GPU's memory" if on_gpu else "memory"
    return f"{where} is not enough; use smaller batches; everything written before is still good", 1


def printable(text: str) -> str:
    """Text without the control characters that could drive a terminal (a caption may hold any bytes)."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
