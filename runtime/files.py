"""Files that appear whole or not at all, and text that a terminal and a page can show."""

import contextlib
import errno
import glob
import io
import json
import os
import pickle
import re
import shutil
import struct
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

# What torch.load raises on damaged bytes, found by damaging files at every place: it differs by where the damage is.
_DAMAGED = (RuntimeError, ValueError, LookupError, EOFError, TypeError, AttributeError, AssertionError)
_DAMAGED += (struct.error, pickle.UnpicklingError)

# Control characters, text-direction overrides and halves of surrogate pairs: they can hide or reverse what a
# caption says. Joiners (U+200C, U+200D) stay: Persian and emoji need them.
_UNSHOWABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff\uffff]")


class UserError(Exception):
    """A mistake that the user can mend: printed as one line (what, where, what to do)."""

    code = 2  # the exit code


def write_atomic(path: Path | str, write: Callable[[BinaryIO], Any]) -> None:
    """Call `write(file)` on a new file beside `path`, flush it to the disk, and rename it to `path`.

    On any failure (disk full, folder read-only) `path` is as it was before and the new file is gone.
    """
    path = Path(path)
    # Each writer has a name of its own, so that two runs that meet in one folder do not write into one file.
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError):
            error.filename = str(path)  # not the unfinished one's name, or none at all
        raise


def check_writable(folder: Path | str) -> None:
    """Make the folder and write into it, so that a run fails before its work and not after. Raises: OSError."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def remove_unfinished(path: Path | str) -> None:
    """Remove what killed processes left of a file, or in a folder; what grew in the last minute is let be."""
    path = Path(path)
    of_file = path.parent.glob(f".{glob.escape(path.name)}.*.tmp")
    for beside in path.rglob(".*.tmp") if path.is_dir() else of_file:
        with contextlib.suppress(FileNotFoundError):
            if time.time() - beside.stat().st_mtime > 60:
                beside.unlink()


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 text, whole or not at all. Halves of surrogate pairs, which UTF-8 has not, are written as escapes."""
    write_atomic(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def write_json(path: Path | str, value: Any) -> None:
    """Write strict JSON (no NaN: it is not JSON), whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def copy(source: Path, target: Path) -> None:
    """Copy a file, whole or not at all; nothing to do where they are one file."""
    if not (target.exists() and target.samefile(source)):
        with open(source, "rb") as file:
            write_atomic(target, lambda beside: shutil.copyfileobj(file, beside, 1 << 20))


def read_json(path: Path | str, what: str) -> Any:
    """Read JSON; `what` names the file's role in the error ("the training labels").

    Raises: UserError where the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{what}: there is no file {path}") from None
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise UserError(f"{what}: {path} is not valid JSON ({error}); write or download it again") from None


def save_tensors(path: Path | str, value: Any) -> None:
    """torch.save, whole or not at all."""
    content = io.BytesIO()  # torch.save into a file on a full disk raises an error that names no file and no reason
    torch.save(value, content)
    write_atomic(path, lambda file: file.write(content.getbuffer()))


def load_tensors(path: Path | str, what: str, mmap: bool = False) -> Any:
    """torch.load of tensors and plain values only: a pickle that would run code is refused.

    Tensors come to the CPU; `mmap` leaves their bytes in the page cache until they are used.
    Raises: UserError where the file is damaged or holds anything else, OSError where it cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (*_DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: torch seeks before a short file
            raise
        reason = "is damaged, or holds more than tensors and plain values (nothing in it was run); make it again"
        raise UserError(f"{what}: {path} {reason}") from None


def printable(text: str) -> str:
    """Text for a terminal, a page or a GIF: what could hide or reverse it becomes a visible replacement character."""
    return _UNSHOWABLE.sub("\N{REPLACEMENT CHARACTER}", re.sub("[\t\r]", " ", str(text)))


def display_path(path: Path | str) -> str:
    """A path, or a hub's name, as results show it: below the working directory relative to it, else as it is."""
    if os.path.isabs(path) and Path(path).is_relative_to(Path.cwd()):
        path = Path(path).relative_to(Path.cwd())
    return os.fsencode(path).decode(errors="replace")  # a name on a disk may hold bytes that are no UTF-8
