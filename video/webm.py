"""What the first bytes of a WebM file (EBML, RFC 8794, and Matroska, RFC 9559) tell about it, in microseconds."""

import os
import re
from pathlib import Path

HEAD = 4096  # bytes: the header, and the tracks of nearly every file
EBML, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
DURATION, PROJECTION, TEN_BITS = b"\x44\x89", b"\x76\x70", b"\x55\xb2\x81\x0a"
CODEC = re.compile(rb"\x86.(V_[A-Z0-9/]+)", re.DOTALL)


def is_plain(path: Path | str) -> bool:
    """Whether a file is a whole WebM of known length with one video track, VP9 of 8 bits, that is not turned.

    Something-Something V2's clips are; decord 0.6.0 decodes these exactly. Everything else is PyAV's.
    """
    head = _head(path)
    if b"webm" not in head[:64] or CODEC.findall(head) != [b"V_VP9"] or DURATION not in head:
        return False
    end = _segment_end(head)
    return end is not None and end <= os.path.getsize(path) and PROJECTION not in head and TEN_BITS not in head


def is_cut(path: Path | str) -> bool:
    """Whether a Matroska or WebM file ends before its own header says."""
    end = _segment_end(_head(path))
    return end is not None and end > os.path.getsize(path)


def _head(path: Path | str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(HEAD)
    except OSError:
        return b""  # whoever opens the file next says why


def _segment_end(head: bytes) -> int | None:
    """Where the file's one segment ends, in bytes; None where it does not say (a live stream) or is no Matroska."""
    try:
        at, size = _size(head, 4)
        if not head.startswith(EBML) or size is None or head[at + size : at + size + 4] != SEGMENT:
            return None
        at, size = _size(head, at + size + 4)
    except IndexError:
        return None
    return None if size is None else at + size


def _size(head: bytes, at: int) -> tuple[int, int | None]:
    """An EBML size at a place: the place behind it, and its value (None: unknown)."""
    length = 9 - head[at].bit_length()
    most = (1 << 7 * length) - 1
    value = int.from_bytes(head[at : at + length], "big") & most
    return at + length, None if value == most else value
