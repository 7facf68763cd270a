"""What people look at: the results page, and the curves of training.

The page is one file that opens from disk. Its captions travel as JSON and reach the document only as text
(textContent), and its clips stay where they are: the page points at them by relative path.
"""

import io
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

from dataset import Layout
from evaluation.scores import table
from runtime import files

Row = Mapping[str, Any]
CURVES = (  # key of the history, panel, name, colour (page.html.j2 puts its theme's in its place), line
    ("train_loss", "loss", "training", "#1d62b5", "o-"),
    ("val_loss", "loss", "validation", "#b2561a", "s--"),
    ("CIDEr", "CIDEr", "CIDEr", "#0a7350", "^-"),
)


def write_page(
    path: Path | str,
    title: str,
    clips: Iterable[Row],
    history: Sequence[Row] = (),
    scores: Sequence[Row] = (),
    made_by: str | None = None,
    confused: Sequence[Sequence[Any]] = (),
) -> None:
    """Write one self-contained HTML page: curves, scores, and a gallery of clips beside their captions.

    clips: dicts of "id" and, each where there is one: "prediction", "references" (list), "video" and "tracks"
      (.webm/.mp4 and .vtt, relative to the page, as `relative` gives them), "template", "outcome" ("exact",
      "template" or "wrong"), "score", "segments" (list of {"start", "end" (seconds), "caption"}), "error" (why the
      clip has no caption) and "warning" (what is wrong with a clip that has one).
    history: one {"epoch", "train_loss", "val_loss", "CIDEr"} an epoch; a missing, None or NaN value leaves a gap.
    scores: rows of "name", "value" and, where there are any, "low", "high" (95 % interval), "note", "group".
    made_by: the command and commit; confused: (true template, predicted one, count) rows, most frequent first.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    page.filters |= {"shown": lambda text: files.printable(text or ""), "address": _address}
    page.filters["content"] = lambda track: _content(Path(path).parent / track) if track else None
    points = _points(history)
    content = {"title": title, "clips": clips, "scores": scores, "made_by": made_by, "confused": confused}
    svg = _svg(points) if points else None
    files.write_text(path, page.get_template("page.html.j2").render(content, points=points, svg=svg))


def write_scored_page(
    page: Path, title: str, result: Row, layout: Layout, history: Sequence[Row], copies: Path | None = None
) -> None:
    """The page of what evaluation.json holds (`result`); `copies` is a folder to copy the videos into, to move both."""
    clips = []
    for row in result["predictions"]:
        video = layout.video(row["id"])
        if video and copies:
            files.copy(video, copies / video.name)
            video = copies / video.name
        clips.append({**row, "score": row["CIDEr"], "video": video and relative(video, page)})
    made_by = " at ".join(filter(None, result["made_by"].values()))
    write_page(page, title, clips, history, table(result), made_by, result.get("ssv2", {}).get("confused", ()))


def relative(target: Path | str, page: Path | str) -> str:
    """The path of `target` as seen from the folder of `page`, for "video" and "tracks"."""
    try:
        return Path(os.path.relpath(target, Path(page).parent)).as_posix()
    except ValueError:  # Windows: on another drive
        return os.path.abspath(target)


def _content(track: Path) -> str | None:
    """The subtitles in a file. Browsers refuse a <track> from file://, so the page carries its text."""
    return track.read_text(encoding="utf-8-sig", errors="replace") if track.exists() else None


def _address(path: Path | str | None) -> str | None:
    """A URL for a path: names may hold '#', '?', '%' or bytes that are no UTF-8."""
    if path and os.path.isabs(path):
        return Path(path).as_uri()
    return quote(os.fsencode(Path(path).as_posix())) if path else None


def save_curves(path: Path | str, history: Sequence[Row]) -> None:
    """Draw training and validation loss, and CIDEr, against the epoch, as a PNG; history: as in `write_page`."""
    # No version in the file: the same history gives the same bytes.
    settings = {"format": "png", "dpi": 150, "metadata": {"Software": None}}
    files.write_atomic(path, lambda file: _draw(_points(history), file, **settings))


def _points(history: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """(epoch, value) of each curve that has any."""
    values = {key: [(row["epoch"], row.get(key)) for row in history] for key, *_ in CURVES}
    found = {key: [(e, x) for e, x in pairs if x is not None and math.isfinite(x)] for key, pairs in values.items()}
    return {key: points for key, points in found.items() if points}


def _draw(points: dict[str, list[tuple[float, float]]], file: Any, **settings: Any) -> None:
    """One panel for the losses and one for CIDEr, where they have values, saved to `file`."""
    # matplotlib takes half a second to import, and captioning a video needs none of it.
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    curves = [curve for curve in CURVES if curve[0] in points]
    panels = dict.fromkeys(panel for _, panel, *_ in curves) or ["loss"]
    with matplotlib.rc_context(fname=Path(__file__).with_name("curves.mplstyle")):
        figure = Figure(figsize=(5, 2.6 * len(panels) + 0.2), layout="constrained")
        for panel, axes in zip(panels, figure.subplots(len(panels), squeeze=False)[:, 0], strict=True):
            axes.set(xlabel="epoch", ylabel=panel)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            for key, _, name, colour, line in (curve for curve in curves if curve[1] == panel):
                axes.plot(*zip(*points[key], strict=True), line, label=name, color=colour)
            if len(axes.lines) > 1:
                axes.legend()
        figure.savefig(file, **settings)


def _svg(points: dict[str, list[tuple[float, float]]]) -> str:
    """The curves as an <svg> within HTML: without what comes before it, and without namespaces."""
    drawn = io.StringIO()
    _draw(points, drawn, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return re.sub(r' xmlns(:xlink)?="[^"]*"|^.*?(?=<svg)', "", drawn.getvalue(), flags=re.DOTALL)
