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

from dataset import Layout, Record
from evaluation.scores import Scorer, table
from qformer import VideoCaptioner
from runtime import files, provenance
from runtime.progress import Progress

Row = Mapping[str, Any]
# Of each curve: panel, name, colour (page.html.j2 puts its theme's in its place), line.
CURVES = files.read_json(Path(__file__).with_name("curves.json"), "the curves")
# The pages of a results folder.
PAGES = {"Evaluation": "index.html", "Inference": "inference/index.html", "Training": "training/index.html"}


def write_page(
    path: Path | str,
    title: str,
    clips: Iterable[Row],
    history: Sequence[Row] = (),
    scores: Sequence[Row] = (),
    made_by: Mapping[str, str | None] | None = None,
    confused: Sequence[Sequence[Any]] = (),
    links: Sequence[tuple[str, str]] = (),
    recipe: Row | None = None,
    compared: Row | None = None,
) -> None:
    """Write one self-contained HTML page: curves, scores, and a gallery of clips beside their captions.

    clips: dicts of "id" and, each where there is one: "prediction", "references" (list), "video" (as `relative` gives
      it), "overlays" (such paths by what they show), "template", "read" (the template read from the prediction),
      "outcome" ("exact", "template" or "wrong"), "score", "segments" (list of {"start", "end" (seconds), "caption"}),
      "error" (why a clip has no caption), "warning" (what is wrong with one that has), "source" (where its user's
      video lies), "links" (as below), "compared" (as `comparison.compare` gives it).
    history: one {"epoch", "train_loss", "val_loss", "CIDEr"} an epoch; a missing, None or NaN value leaves a gap.
    scores: rows of "name", "value" and, where there are any, "low", "high" (95 % interval), "note", "group".
    made_by: as provenance.made_by gives it; confused: (true template, predicted one, count) rows, most frequent first.
    links: (text, path as `relative` gives it); recipe: as `recipe` gives it; compared: of evaluation.json.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    page.filters |= {"shown": lambda text: files.printable(text or ""), "address": _address}
    content = {"title": title, "clips": clips, "scores": scores, "made_by": made_by, "confused": confused}
    content |= {"links": links, "recipe": recipe or {}, "compared": compared}
    content |= {"points": curve_points(history), "svg": _svg(history) if history else ""}
    files.write_text(path, page.get_template("page.html.j2").render(content))


def write_scored_page(
    page: Path,
    title: str,
    result: Row,
    layout: Layout,
    history: Sequence[Row],
    copies: Path | None = None,
    links: Sequence[tuple[str, str]] = (),
) -> None:
    """The page of what evaluation.json holds (`result`); `copies` is a folder to copy the videos into, to move both."""
    clips = []
    for row in Progress(result["predictions"], "page", unit="clip", leave=False):
        video = layout.video(row["id"])
        if video and copies:
            copy = copies / f"{row['id']}{video.suffix}"  # own videos in two folders may share a name
            files.copy(video, copy)
            video = copy
        own = {"score": row["CIDEr"], "video": video and relative(video, page), "source": layout.source(row["id"])}
        clips.append({**row, **own})
    if compared := result.get("compared"):
        near = Path(compared["path"]).with_name("index.html")
        other = relative(near if near.is_file() else compared["path"], page)
        links = [*links, ("the run that it is compared with", other)]
    made = {"checkpoint": result.get("checkpoint"), **result.get("recipe", {})}
    confused, more = result.get("ssv2", {}).get("confused", ()), {"recipe": made, "compared": compared}
    write_page(page, title, clips, history, table(result), result["made_by"], confused, links, **more)


def recipe(captioner: VideoCaptioner) -> dict[str, Any]:
    """How a captioner's checkpoint was made: its config, models' folders as seen from here, train.py's flags."""
    config, features = captioner.config, dict(captioner.config["features"] or {})
    if "encoder" in features:
        features["encoder"] = files.display_path(features["encoder"])
    own = {"llm": files.display_path(config["llm"]), "features": features, "training": captioner.recipe}
    return {"epoch": captioner.epoch, **config, **own}


def link_pages(results: Path) -> None:
    """Have the pages of a results folder that are there link to each other, also to those that were made later."""
    there = {name: results / place for name, place in PAGES.items() if (results / place).is_file()}
    for page in there.values():
        links = [(name, quote(relative(other, page)), other == page) for name, other in there.items()]
        marked = [f'<a href="{place}"{" aria-current=page" * here}>{name}</a>' for name, place, here in links]
        before = page.read_text(encoding="utf-8", errors="replace")
        after = re.sub("(?s)(?<=<!--pages-->).*?(?=<!--/pages-->)", " ".join(marked), before, count=1)
        if after != before:
            files.write_text(page, after)


def write_training_page(
    results: Path, captioner: VideoCaptioner, checkpoint: Path, records: list[Record], layout: Layout
) -> str:
    """Write losses.png, and the last epoch's captions of the validation split; returns a line that says where."""
    history, curves, page = captioner.history, results / "losses.png", results / "training" / "index.html"
    epoch = history[-1]["epoch"]
    files.write_atomic(curves, lambda file: draw_curves(history, file))
    said = files.read_json(results / f"validation_epoch_{epoch}.json", "the last predictions")["predictions"]
    kept = [record for record in records if record["id"] in said]
    scored = Scorer(kept, layout).scores({record["id"]: said[record["id"]] for record in kept}, meteor=False)
    made = {"checkpoint": str(checkpoint), "recipe": recipe(captioner), "made_by": provenance.made_by()}
    links = [(name, f"../{name}") for name in (curves.name, f"validation_epoch_{epoch}.json")]
    write_scored_page(page, f"Training, epoch {epoch}", {**scored, **made}, layout, history, links=links)
    link_pages(results)
    return f"curves: {curves}, page: {page}"


def relative(target: Path | str, page: Path | str) -> str:
    """The path of `target` as seen from the folder of `page`, for "video"."""
    try:
        return Path(os.path.relpath(target, Path(page).parent)).as_posix()
    except ValueError:  # Windows: on another drive
        return os.path.abspath(target)


def _address(path: Path | str) -> str:
    """A URL for a path: names may hold '#', '?', '%' or bytes that are no UTF-8."""
    return Path(path).as_uri() if os.path.isabs(path) else quote(os.fsencode(Path(path).as_posix()))


def curve_points(history: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """(epoch, value) of each curve that has any."""
    values = {key: [(row["epoch"], row.get(key)) for row in history] for key in CURVES}
    found = {key: [(e, x) for e, x in pairs if x is not None and math.isfinite(x)] for key, pairs in values.items()}
    return {key: points for key, points in found.items() if points}


def draw_curves(history: Sequence[Row], file: Any, **settings: Any) -> None:
    """Draw the losses and CIDEr against the epoch, a panel each; `settings` are savefig's, a PNG without any."""
    from matplotlib import figure, rc_context  # half a second, and captioning a video needs none of it

    points = curve_points(history)
    panels = list(dict.fromkeys(CURVES[key][0] for key in points)) or ["loss"]
    with rc_context(fname=Path(__file__).with_name("curves.mplstyle")):
        drawing = figure.Figure(figsize=(5, 2.6 * len(panels) + 0.2))
        for panel, axes in drawing.subplot_mosaic([[panel] for panel in panels]).items():
            axes.set(xlabel="epoch", ylabel=panel)
            axes.xaxis.get_major_locator().set_params(integer=True)
            for key in (key for key in points if CURVES[key][0] == panel):
                _, name, colour, line = CURVES[key]
                axes.plot(*zip(*points[key], strict=True), line, label=name, color=colour)
            if len(axes.lines) > 1:
                axes.legend()
        drawing.savefig(file, **settings)


def _svg(history: Sequence[Row]) -> str:
    """The curves as an <svg> within HTML: without what comes before it, its metadata, and namespaces."""
    drawn = io.StringIO()
    draw_curves(history, drawn, format="svg", transparent=True)
    return re.sub(r'(?s) xmlns(:xlink)?="[^"]*"|^.*?(?=<svg)|<metadata>.*?</metadata>', "", drawn.getvalue())
