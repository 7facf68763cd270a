"""Scores and page of a whole validation split: seconds, the page's size, and how soon it can be used.

The captions are made up, of SSv2's length and built as its labels are: templates with their placeholders filled. The
page is opened from disk in headless Chromium, where there is one, with nothing of it in a cache.
"""

import itertools
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import measure
from evaluation import ngrams, report, ssv2
from runtime import cli
from runtime.files import UserError

VERBS = ["moving", "pushing", "pretending to put", "putting", "dropping", "holding", "turning", "covering"]
THINGS = ["a bottle of water", "box", "a red cup", "phone", "a pair of scissors", "notebook", "pen", "a small toy car"]
PLACES = ["behind", "next to", "on the edge of", "in front of", "from left to right over", "without touching"]
TEMPLATES = 174  # as many as SSv2 has


def made_up(count: int, seed: int = 0) -> tuple[list[str], dict[str, str], dict[str, dict[str, Any]]]:
    """Templates, predictions by clip id, and the records they are scored against; about a third are right."""
    chosen = random.Random(seed)
    ways = itertools.product(VERBS, PLACES, ("", " slowly", " again", " until it falls"))
    templates = [f"{verb} [something] {place} [something]{how}" for verb, place, how in ways][:TEMPLATES]
    things = [f"{colour} {thing}" for colour in ("red", "blue", "old", "small") for thing in THINGS]
    predictions, records = {}, {}
    for i in range(count):
        template, others = chosen.choice(templates), chosen.sample(things, 2)
        label = fill(template, others)
        wrong = fill(chosen.choice(templates), chosen.sample(things, 2))
        half = fill(template, chosen.sample(things, 2))
        records[str(i)] = {"id": str(i), "label": [label], "template": template, "placeholders": others}
        predictions[str(i)] = chosen.choice((label, half, wrong))
    return templates, predictions, records


def fill(template: str, things: list[str]) -> str:
    """A label of a template with two placeholders."""
    first, second = things
    return template.replace("[something]", first, 1).replace("[something]", second, 1)


def page_rows(predictions: dict[str, str], records: dict[str, dict[str, Any]], runs: int) -> list[list[str]]:
    """The page's size, and seconds until cards are shown and a search is answered, from the start of the navigation."""
    random.seed(0)
    videos = "../../data/something-something-v2/20bn-something-something-v2"
    clips = [
        {
            "id": key,
            "prediction": text,
            "references": records[key]["label"],
            "template": records[key]["template"],
            "video": f"{videos}/{key}.webm",
            "outcome": random.choice(["exact", "template", "wrong"]),
            "score": 3 * random.random(),
        }
        for key, text in predictions.items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.html"
        report.write_page(path, "Page benchmark", clips)
        shown, answered = opened(path, runs)
        rows = [["the page, MB", f"{path.stat().st_size / 1e6:.1f}"]]
    rows += [["its cards shown", measure.spread(shown)]] if shown else []
    return rows + ([["a search answered", measure.spread(answered)]] if answered else [])


def opened(path: Path, runs: int) -> tuple[list[float], list[float]]:
    """Seconds until cards are shown, and until a search is answered, in a new browser each time; none without one."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    shown, answered = [], []
    if chromium is None:
        return shown, answered
    with sync_playwright() as playwright:
        for _ in range(runs):
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            start = time.perf_counter()
            page.goto(path.as_uri(), wait_until="commit")
            page.wait_for_selector("#cards .card")
            shown.append(time.perf_counter() - start)
            page.fill("#search", "red cup")
            page.wait_for_function("document.querySelector('#count').textContent.includes(' of ')")
            answered.append(time.perf_counter() - start)
            browser.close()
    return shown, answered


def main(argv: list[str] | None = None) -> None:
    """Time each kind of score, and print the table."""
    parser = measure.parser(__doc__, runs=3)
    parser.add_argument("--clips", type=cli.count, default=24_777, help="predictions; SSv2's validation split has")
    args = parser.parse_args(argv)
    templates, predictions, records = made_up(args.clips)
    references = {key: record["label"] for key, record in records.items()}
    reader = ssv2.TemplateReader(templates)
    parts: dict[str, Callable[[], Any]] = {
        "BLEU, ROUGE-L, CIDEr, their intervals": lambda: ngrams.ngram_scores(predictions, references, meteor=False),
        "... and METEOR": lambda: ngrams.ngram_scores(predictions, references),
        "SSv2's own, overall and by template, their intervals": lambda: ssv2.ssv2_scores(predictions, records, reader),
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(args.runs):
        for name, run in parts.items():
            begun = time.perf_counter()
            found = run()
            seconds[name].append(time.perf_counter() - begun)
            if found and found.get("notes"):
                raise UserError(f"this would time something else: {found['notes'][0]}")
    rows = [[name, measure.spread(values, 1)] for name, values in seconds.items()]
    rows += page_rows(predictions, records, args.runs)
    measure.report(__file__, f"Scoring {args.clips:,} predictions", ("what", "seconds"), rows)


if __name__ == "__main__":
    cli.run(main)
