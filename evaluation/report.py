"""What people look at: the results page, and the curves of training.

The page is one file that opens from disk. Its captions travel as JSON and reach the document only as text
(textContent), and its clips stay where they are: the page points at them by relative path.
"""

import contextlib
import io
import json
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
from runtime import files
from runtime.files import shown

# A clip may have 14 paraphrases; on a page of 24,777 clips the rest would double its size and nobody reads them.
REFERENCES_SHOWN = 5
# The page's colours in its light theme, by their names there: within a page the curves take those of its theme.
THEME = {"--dim": "#5d6168", "--first": "#1d62b5", "--second": "#b2561a", "--exact": "#0a7350"}
CURVES = (  # panel, key of the history, name, colour, line
    ("loss", "train_loss", "training", "--first", "o-"),
    ("loss", "val_loss", "validation", "--second", "s--"),
    ("CIDEr", "CIDEr", "CIDEr", "--exact", "^-"),
)


def write_page(
    path: Path | str,
    title: str,
    clips: Iterable[Mapping[str, Any]],
    history: Sequence[Mapping[str, Any]] = (),
    scores: Sequence[Mapping[str, Any]] = (),
    made_by: str | None = None,
    confused: Sequence[Sequence[Any]] | None = None,
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
    path = Path(path)
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.filters["shown"] = shown
    html = page.get_template("page.html.j2").render(
        title=title,
        made_by=made_by,
        curves=_embedded_curves(history),
        groups=_score_groups(scores),
        confused=confused or [],
        data=_embedded({"clips": [_clip(clip, path.parent) for clip in clips]}),
    )
    files.write_text(path, html)


def gallery(
    predictions: list[dict[str, Any]], layout: Layout, page: Path, copies: Path | None = None
) -> list[dict[str, Any]]:
    """The page's clips, from the "predictions" of evaluation.json: with the video as the page finds it.

    `copies` is a folder to copy the videos into, so that page and videos can be moved together.
    """
    rows = []
    for row in predictions:
        video = layout.video(row["id"])
        if video and copies:
            files.copy(video, copies / video.name)
            video = copies / video.name
        rows.append({**row, "score": row.get("CIDEr"), "video": relative(video, page) if video else None})
    return rows


def relative(target: Path | str, page: Path | str) -> str:
    """The path of `target` as seen from the folder of `page`, for "video" and "tracks"."""
    try:
        return Path(os.path.relpath(target, Path(page).parent)).as_posix()
    except ValueError:  # Windows: on another drive
        return os.path.abspath(target)


def _embedded(value: Any) -> Markup:
    """JSON for a <script type="application/json">: ASCII only, and nothing in it can end the element."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _clip(clip: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    references = clip.get("references") or []
    embedded = {key: shown(clip.get(key) or "") for key in ("prediction", "template", "error", "warning")}
    embedded |= {
        "id": shown(clip["id"]),
        "references": [shown(text) for text in references[:REFERENCES_SHOWN]],
        "unseen": max(0, len(references) - REFERENCES_SHOWN),
        "video": _address(clip.get("video")),
        "tracks": _address(clip.get("tracks")),
        "outcome": clip.get("outcome"),
        "segments": [
            {"start": round(part["start"], 3), "end": round(part["end"], 3), "caption": shown(part["caption"])}
            for part in clip.get("segments") or []
        ],
    }
    if clip.get("tracks"):
        # Browsers refuse a <track> from file://, so the page carries the text; the address serves where it is missing.
        with contextlib.suppress(OSError):
            embedded["vtt"] = shown((folder / clip["tracks"]).read_text(encoding="utf-8-sig", errors="replace"))
    score = clip.get("score")
    score = round(float(score), 4) if _is_finite(score) else None
    return {**{key: value for key, value in embedded.items() if value}, "score": score}


def _address(path: Path | str | None) -> str | None:
    """A URL for a path: names may hold '#', '?', '%' or bytes that are no UTF-8."""
    if not path:
        return None
    text = os.fspath(path)
    if text.startswith("file://"):
        return text
    return Path(text).as_uri() if os.path.isabs(text) else quote(os.fsencode(Path(text).as_posix()))


def _is_finite(value: float | None) -> bool:
    """Whether there is a number: JSON has no NaN and no infinities."""
    return value is not None and math.isfinite(value)


# ---- scores ----


def _score_groups(scores: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows under their headings, in order; each row with its texts and, in percent of a scale, its bar."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in scores:
        ends = [row["low"], row["high"]] if _is_finite(row.get("low")) else None
        texts = {"text": _number(row.get("value")), "interval": " – ".join(map(_number, ends or []))}
        groups.setdefault(row.get("group") or "", []).append({**row, **texts, "ends": ends})
    for rows in groups.values():
        for cider in (True, False):  # rates are drawn on the scale 0 to 1, CIDEr (0 to 10) on one of its own
            kin = [row for row in rows if row["name"].startswith("CIDEr") == cider]
            kin = [
                row for row in kin if isinstance(row.get("value"), float) and math.isfinite(row["value"])
            ]  # no counts
            places = [[row["value"], *(row["ends"] or [row["value"]] * 2)] for row in kin]
            scale = max([1.0, *(high for *_, high in places)])
            for row, place in zip(kin, places, strict=True):
                row["bar"] = [round(100 * min(max(value, 0.0), scale) / scale, 2) for value in place]
    return [{"name": name, "rows": rows} for name, rows in groups.items()]


def _number(value: Any) -> str:
    if isinstance(value, int | str):
        return f"{value:,}" if isinstance(value, int) else value
    return f"{value:.3f}" if _is_finite(value) else "–"


# ---- curves ----


def save_curves(path: Path | str, history: Sequence[Mapping[str, Any]]) -> None:
    """Draw training and validation loss, and CIDEr, against the epoch, as a PNG; history: as in `write_page`."""
    # No version in the file: the same history gives the same bytes.
    settings = {"format": "png", "dpi": 150, "metadata": {"Software": None}}
    files.write_atomic(path, lambda file: _draw(_points(history), file, **settings))


def _points(history: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """(epoch, value) of each curve that has any."""
    found = {
        key: [(row.get("epoch", i + 1), row[key]) for i, row in enumerate(history) if _is_finite(row.get(key))]
        for _, key, *_ in CURVES
    }
    return {key: points for key, points in found.items() if points}


def _draw(points: Mapping[str, Sequence[tuple[float, float]]], file: Any, **settings: Any) -> None:
    """One panel for the losses and one for CIDEr, where they have values, saved to `file`."""
    # matplotlib takes half a second to import, and captioning a video needs none of it.
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = dict.fromkeys(panel for panel, key, *_ in CURVES if key in points) or ["loss"]
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    # Texts stay texts, and the names within the file come from its content.
    style = {"font.size": 12, "svg.fonttype": "none", "svg.hashsalt": "curves", **dict.fromkeys(inked, THEME["--dim"])}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5, 2.6 * len(panels) + 0.2), layout="constrained")
        for panel, axes in zip(panels, figure.subplots(len(panels), squeeze=False)[:, 0], strict=True):
            axes.set(xlabel="epoch", ylabel=panel)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(color=THEME["--dim"], alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            for _, key, name, colour, line in (curve for curve in CURVES if curve[0] == panel and curve[1] in points):
                axes.plot(*zip(*points[key], strict=True), line, label=name, color=THEME[colour], markersize=5)
            if len(axes.lines) > 1:
                axes.legend(frameon=False)
        figure.savefig(file, **settings)


def _embedded_curves(history: Sequence[Mapping[str, Any]]) -> Markup | None:
    """The curves as an <svg> in the page's colours, with a label that says them; None where there are none."""
    if not (points := _points(history)):
        return None
    drawn = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    _draw(points, drawn, format="svg", transparent=True, metadata=metadata)
    svg = drawn.getvalue()
    # Within HTML: no namespaces, no style for the whole document, and no ids but those that name their content.
    svg = re.sub(
        r' xmlns(:xlink)?="[^"]*"|<style.*?</style>|(?<=<g) id="[^"]*"', "", svg[svg.index("<svg") :], flags=re.S
    )
    for name, light in THEME.items():
        svg = svg.replace(light, f"var({name})")
    label = "; ".join(
        f"{key.replace('_', ' ')} {pairs[0][1]:.3g} to {pairs[-1][1]:.3g}" for key, pairs in points.items()
    )
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="By epoch: {label}"', 1))
