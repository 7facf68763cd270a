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
from markupsafe import Markup

from dataset import Layout
from evaluation.scores import table
from runtime import files
from runtime.files import shown

Row = Mapping[str, Any]
SHOWN = 5  # references of a clip: it may have 14, and all of those of 24,777 clips would double the page's size
CURVES = (  # key of the history, panel, name, the page's name of its colour and that colour in the light theme, line
    ("train_loss", "loss", "training", "--first", "#1d62b5", "o-"),
    ("val_loss", "loss", "validation", "--second", "#b2561a", "s--"),
    ("CIDEr", "CIDEr", "CIDEr", "--exact", "#0a7350", "^-"),
)
DIM = "#5d6168"  # the page's --dim, in curves.mplstyle


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
    made_by: the command and commit, shown under the title.
    confused: (true template, predicted template, count) rows, most frequent first.
    """
    content = {"title": title, "scores": scores, "made_by": made_by, "confused": confused}
    content["curves"] = _embedded_curves(history)
    content["clips"] = [_clip(clip, Path(path).parent) for clip in clips]
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.filters["shown"] = shown
    page.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    files.write_text(path, page.get_template("page.html.j2").render(content))


def write_scored_page(
    page: Path, title: str, result: Row, layout: Layout, history: Sequence[Row], copies: Path | None = None
) -> None:
    """The page of what evaluation.json holds (`result`), with the dataset's videos; history: as in `write_page`.

    `copies` is a folder to copy the videos into, so that page and videos can be moved together.
    """
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


def _clip(clip: Row, folder: Path) -> dict[str, Any]:
    """What the page's script reads of a clip."""
    references, tracks, score = clip.get("references") or [], clip.get("tracks"), clip.get("score")
    embedded = {key: shown(clip.get(key) or "") for key in ("prediction", "template", "error", "warning")}
    embedded |= {key: _address(clip.get(key)) for key in ("video", "tracks")}
    embedded |= {"id": shown(clip["id"]), "outcome": clip.get("outcome")}
    embedded |= {"references": list(map(shown, references[:SHOWN])), "unseen": len(references[SHOWN:])}
    embedded["segments"] = [
        {"start": round(part["start"], 3), "end": round(part["end"], 3), "caption": shown(part["caption"])}
        for part in clip.get("segments") or []
    ]
    if tracks and (folder / tracks).exists():
        # Browsers refuse a <track> from file://, so the page carries the text; the address serves where it is missing.
        embedded["vtt"] = shown((folder / tracks).read_text(encoding="utf-8-sig", errors="replace"))
    score = round(float(score), 4) if _is_finite(score) else None
    return {**{key: value for key, value in embedded.items() if value}, "score": score}


def _address(path: Path | str | None) -> str | None:
    """A URL for a path: names may hold '#', '?', '%' or bytes that are no UTF-8."""
    if path and os.path.isabs(path):
        return Path(path).as_uri()
    return quote(os.fsencode(Path(path).as_posix())) if path else None


def _is_finite(value: float | None) -> bool:
    """Whether there is a number: JSON has no NaN and no infinities."""
    return value is not None and math.isfinite(value)


# ---- curves ----


def save_curves(path: Path | str, history: Sequence[Row]) -> None:
    """Draw training and validation loss, and CIDEr, against the epoch, as a PNG; history: as in `write_page`."""
    # No version in the file: the same history gives the same bytes.
    settings = {"format": "png", "dpi": 150, "metadata": {"Software": None}}
    files.write_atomic(path, lambda file: _draw(_points(history), file, **settings))


def _points(history: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """(epoch, value) of each curve that has any."""
    found = {key: [(row["epoch"], row[key]) for row in history if _is_finite(row.get(key))] for key, *_ in CURVES}
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
            for key, _, name, _, colour, line in (curve for curve in curves if curve[1] == panel):
                axes.plot(*zip(*points[key], strict=True), line, label=name, color=colour)
            if len(axes.lines) > 1:
                axes.legend()
        figure.savefig(file, **settings)


def _embedded_curves(history: Sequence[Row]) -> Markup | None:
    """The curves as an <svg> in the page's colours, with a label that says them; None where there are none."""
    if not (points := _points(history)):
        return None
    drawn = io.StringIO()
    _draw(points, drawn, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"|^.*?(?=<svg)', "", drawn.getvalue(), flags=re.DOTALL)
    for name, light in (("--dim", DIM), *(curve[3:5] for curve in CURVES)):
        svg = svg.replace(light, f"var({name})")
    ends = (f"{key.replace('_', ' ')} {pairs[0][1]:.3g} to {pairs[-1][1]:.3g}" for key, pairs in points.items())
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="By epoch: {"; ".join(ends)}"', 1))
