"""What people look at: curves and the results page.

The page is one file that opens from disk. Its captions travel as JSON and reach the document only as text
(textContent), and its clips stay where they are: the page points at them by relative path.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from runtime import files
from runtime.files import shown

# A clip may have 14 paraphrases; on a page of 24,777 clips the rest would double its size and nobody reads them.
REFERENCES_SHOWN = 5


def write_page(
    path: Path | str,
    title: str,
    clips: Iterable[Mapping[str, Any]],
    history: Sequence[Mapping[str, Any]] | None = None,
    scores: Sequence[Mapping[str, Any]] | Mapping[str, Any] | None = None,
    made_by: str | None = None,
    confused: Sequence[Sequence[Any]] | None = None,
) -> None:
    """Write one self-contained HTML page: curves, scores, and a gallery of clips beside their captions.

    clips: dicts of "id" and, each where there is one: "prediction", "references" (list), "video" and "tracks"
      (.webm/.mp4 and .vtt, relative to the page, as `relative` gives them), "template", "outcome" ("exact",
      "template" or "wrong"), "score", "segments" (list of {"start", "end" (seconds), "caption"}) and "error"
      (why the clip has no caption).
    history: one {"epoch", "train_loss", "val_loss", "CIDEr"} an epoch; a missing, None or NaN value leaves a gap.
    scores: rows of "name", "value" and, where there are any, "low", "high" (95 % interval), "note", "group";
      or a dict of name to value or to (value, low, high).
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
        charts=_charts(history or []),
        groups=_score_groups(scores or []),
        confused=confused or [],
        data=_embedded({"clips": [_clip(clip, path.parent) for clip in clips]}),
    )
    files.write_text(path, html)


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
    embedded = {
        "id": shown(clip["id"]),
        "prediction": shown(clip.get("prediction") or ""),
        "references": [shown(text) for text in references[:REFERENCES_SHOWN]],
        "unseen": max(0, len(references) - REFERENCES_SHOWN),
        "video": _address(clip.get("video")),
        "template": shown(clip.get("template") or ""),
        "outcome": clip.get("outcome"),
        "score": _finite(clip.get("score"), digits=4),
        "error": shown(clip["error"]) if clip.get("error") else None,
    }
    if clip.get("segments"):
        embedded["segments"] = [
            {"start": _finite(s["start"], 3), "end": _finite(s["end"], 3), "caption": shown(s["caption"])}
            for s in clip["segments"]
        ]
    if clip.get("tracks"):
        embedded["tracks"] = _address(clip["tracks"])
        # Browsers refuse a <track> from file://, so the page carries the text; the address serves where it is missing.
        try:
            text = (folder / clip["tracks"]).read_text(encoding="utf-8-sig", errors="replace")
            embedded["vtt"] = shown(text)
        except OSError:
            embedded["vtt"] = None
    return {key: value for key, value in embedded.items() if value not in (None, "", [], 0) or key == "score"}


def _address(path: Path | str | None) -> str | None:
    """A URL for a path: names may hold '#', '?', '%' or bytes that are no UTF-8."""
    if not path:
        return None
    text = os.fspath(path)
    if text.startswith("file://"):
        return text
    if os.path.isabs(text):
        return Path(text).as_uri()
    return quote(os.fsencode(Path(text).as_posix()))


def _finite(value: Any, digits: int | None = None) -> float | None:
    """The number, rounded; None for None, NaN and infinities, which JSON cannot say."""
    if value is None or not math.isfinite(value):
        return None
    return float(value) if digits is None else round(float(value), digits)


# ---- scores ----


def _score_groups(scores: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows under their headings, in order; each row with its texts and, in percent of the group's scale, its bar."""
    if isinstance(scores, Mapping):
        scores = [_score_row(name, value) for name, value in scores.items()]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in scores:
        groups.setdefault(row.get("group") or "", []).append(dict(row))
    for rows in groups.values():
        for row in rows:
            row["text"] = _number(row.get("value"))
            row["interval"] = f"{_number(row['low'])} – {_number(row['high'])}" if _has_interval(row) else ""
        # Rates are drawn on the scale 0 to 1, CIDEr (0 to 10) on one of its own. Counts have no bar.
        fractions = [r for r in rows if isinstance(r.get("value"), float) and math.isfinite(r["value"])]
        for kin in ([r for r in fractions if _is_rate(r)], [r for r in fractions if not _is_rate(r)]):
            ends = [r["high"] if _has_interval(r) else r["value"] for r in kin]
            scale = max([1.0, *ends])
            for row in kin:
                low, high = (row["low"], row["high"]) if _has_interval(row) else (row["value"], row["value"])
                row["bar"] = [round(100 * min(max(v, 0.0), scale) / scale, 2) for v in (row["value"], low, high)]
    return [{"name": name, "rows": rows} for name, rows in groups.items()]


def _is_rate(row: Mapping[str, Any]) -> bool:
    return not row["name"].startswith("CIDEr")


def _score_row(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, tuple | list):
        value, low, high = value
        return {"name": name, "value": value, "low": low, "high": high}
    return {"name": name, "value": value}


def _has_interval(row: Mapping[str, Any]) -> bool:
    return _finite(row.get("low")) is not None and _finite(row.get("high")) is not None


def _number(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if math.isfinite(value) else "–"


# ---- curves ----

_CURVES = {"Loss": {"train": "train_loss", "validation": "val_loss"}, "CIDEr": {"CIDEr": "CIDEr"}}
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 440, 220, 44, 14, 12, 30  # of a chart, in SVG units


def _points(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    pairs = [(_finite(row.get("epoch", i + 1)), _finite(row.get(key))) for i, row in enumerate(history)]
    return [(x, y) for x, y in pairs if x is not None and y is not None]


def _charts(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    charts = []
    for title, curves in _CURVES.items():
        lines = {name: _points(history, key) for name, key in curves.items()}
        lines = {name: points for name, points in lines.items() if points}
        if lines:
            charts.append(_chart(title, lines))
    return charts


def _chart(title: str, lines: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Where everything of one SVG chart goes: ticks, lines and dots in SVG units."""
    xs, ys = zip(*(point for points in lines.values() for point in points), strict=True)
    x_ticks, y_ticks = _ticks(min(xs), max(xs), 8, whole=True), _ticks(min(ys), max(ys), 5)
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def right(x: float) -> float:
        part = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        return round(_LEFT + part * (_WIDTH - _LEFT - _RIGHT), 1)

    def down(y: float) -> float:
        return round(_TOP + (y_high - y) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM), 1)

    said = "; ".join(f"{name} {points[0][1]:.3g} to {points[-1][1]:.3g}" for name, points in lines.items())
    return {
        "title": title,
        "label": f"{title} by epoch: {said}",
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "right": _WIDTH - _RIGHT,
        "bottom": _HEIGHT - _BOTTOM,
        "x_ticks": [(right(x), f"{x:g}") for x in x_ticks if x_low <= x <= x_high],
        "y_ticks": [(down(y), f"{y:g}") for y in y_ticks],
        "lines": [
            {
                "name": name,
                "points": " ".join(f"{right(x)},{down(y)}" for x, y in points),
                "dots": [(right(x), down(y), f"{name}, epoch {x:g}: {y:.4g}") for x, y in points],
            }
            for name, points in lines.items()
        ],
    }


def _ticks(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that enclose low..high, about `most` of them."""
    if high <= low:
        low, high = low - (1 if whole else abs(low) * 0.1 or 1), high + (1 if whole else abs(high) * 0.1 or 1)
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def save_curves(path: Path | str, history: Sequence[Mapping[str, Any]]) -> None:
    """Draw train and validation loss, and CIDEr on an axis of its own, against the epoch, as a PNG.

    history: as in `write_page`.
    """
    # matplotlib takes half a second to import, and captioning a video needs none of it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    losses = figure.add_subplot(xlabel="epoch", ylabel="loss")
    losses.xaxis.set_major_locator(MaxNLocator(integer=True))
    losses.grid(alpha=0.25)
    for name, key, style in (("training loss", "train_loss", "C0o-"), ("validation loss", "val_loss", "C1s--")):
        if points := _points(history, key):
            losses.plot(*zip(*points, strict=True), style, label=name, markersize=4)
    if points := _points(history, "CIDEr"):
        cider = losses.twinx()
        cider.set_ylabel("CIDEr")
        cider.plot(*zip(*points, strict=True), "C2^:", label="CIDEr", markersize=4)
    if history:
        figure.legend(loc="outside upper center", ncols=3, frameon=False)
    # No version in the file: the same history gives the same bytes.
    files.write_atomic(path, lambda file: figure.savefig(file, format="png", metadata={"Software": None}))
