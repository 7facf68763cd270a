"""The timeline of a long video: its windows, its captions merged into segments, and SRT and VTT text.

A window is what the captioner sees; a segment is what the viewer reads. Windows may overlap, segments never do.
Times are seconds from the start of the video.
"""

import html
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from runtime.files import UserError

MIN_STRIDE = 0.04  # seconds: a frame at 25 fps; smaller steps only caption the same frames again


class Segment(NamedTuple):
    """A caption and the half-open interval [start, end) of the video that it is for, in seconds."""

    start: float
    end: float
    caption: str


def check_window(window: float, stride: float) -> None:
    """Raises: UserError where the two lengths, in seconds, cannot cover a video."""
    if not MIN_STRIDE <= stride <= window < math.inf:
        reason = f"the stride is at least {MIN_STRIDE:g} s, and at most the window"
        raise UserError(f"--window {window:g} --stride {stride:g} cannot cover a video: {reason}")


def windows(duration: float, window: float, stride: float) -> list[tuple[float, float]]:
    """The windows [start, end) that cover `duration` seconds, in order.

    What is left after the last full window is a shorter window of its own where it holds half a stride or more.
    A smaller rest (often a frame or two of rounding) joins the last window: alone it is too short to show an action.
    """
    count = max(1, 1 + math.floor((duration - window) / stride + 0.5))
    spans = [(i * stride, min(i * stride + window, duration)) for i in range(count)]
    return [*spans[:-1], (spans[-1][0], duration)]


def segments(spans: Sequence[tuple[float, float]], captions: Sequence[str | None]) -> list[Segment]:
    """One segment for each run of windows that say the same; `spans` are sorted, None is a window without a caption.

    Two overlapping windows meet in the middle of their overlap: each instant goes to the window whose centre is
    nearer. Case and white space do not make two captions different; the first wording is kept.
    """
    merged: list[Segment] = []
    for i, ((start, end), caption) in enumerate(zip(spans, captions, strict=True)):
        caption = " ".join((caption or "").split())  # a blank line would end a cue
        if not caption:
            continue
        if i > 0:
            start = (start + max(start, spans[i - 1][1])) / 2
        if i + 1 < len(spans):
            end = (end + min(end, spans[i + 1][0])) / 2
        start, end = round(start, 3), round(end, 3)  # SRT and VTT count milliseconds: so does everything else
        if merged and merged[-1].end == start and merged[-1].caption.casefold() == caption.casefold():
            merged[-1] = merged[-1]._replace(end=end)
        elif end > start:
            merged.append(Segment(start, end, caption))
    return merged


def srt(parts: Sequence[Segment]) -> str:
    """SubRip text. The format has no escapes: an arrow in a caption, which ends it in some players, is shortened."""
    cues = [_cue(part, ",", re.sub(r"-{2,}>", "->", part.caption)) for part in parts]
    return "\n".join(f"{number}\n{cue}" for number, cue in enumerate(cues, start=1))


def vtt(parts: Sequence[Segment]) -> str:
    """WebVTT text (W3C): `&`, `<` and `>` are escaped, so that no caption can hold a tag or an arrow."""
    cues = [_cue(part, ".", html.escape(part.caption, quote=False)) for part in parts]
    return "\n".join(["WEBVTT\n", *cues])


def _cue(part: Segment, point: str, caption: str) -> str:
    return f"{_clock(part.start, point)} --> {_clock(part.end, point)}\n{caption}\n"


def _clock(seconds: float, point: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{milliseconds // 1000:02d}{point}{milliseconds % 1000:03d}"
