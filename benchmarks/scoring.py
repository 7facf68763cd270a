"""How long the scores of a whole validation split take, after the captions are there: n-gram, SSv2's own, intervals.

The captions are made up, of SSv2's length and built as its labels are: templates with their placeholders filled.
"""

import itertools
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measure, page
from evaluation import ngrams as metrics
from evaluation.ssv2 import TemplateReader
from runtime import files

TEMPLATES = 174  # as many as SSv2 has


def made_up(count: int, seed: int = 0) -> tuple[list[str], dict[str, str], dict[str, dict[str, Any]]]:
    """Templates, predictions by clip id, and the records they are scored against; about a third are right."""
    chosen = random.Random(seed)
    ways = itertools.product(page.VERBS, page.PLACES, ("", " slowly", " again", " until it falls"))
    templates = [f"{verb} [something] {place} [something]{how}" for verb, place, how in ways][:TEMPLATES]
    things = [f"{colour} {thing}" for colour in ("red", "blue", "old", "small") for thing in page.THINGS]
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


def main(argv: list[str] | None = None) -> None:
    """Time each kind of score, and print the table."""
    parser = measure.parser(__doc__.splitlines()[0], runs=3)
    parser.add_argument("--clips", type=int, default=24_777, help="predictions (default: SSv2's validation split)")
    args = parser.parse_args(argv)
    templates, predictions, records = made_up(args.clips)
    references = {key: record["label"] for key, record in records.items()}
    reader = TemplateReader(templates)
    parts: dict[str, Callable[[], Any]] = {
        "BLEU, ROUGE-L, CIDEr, their intervals": lambda: metrics.ngram_scores(predictions, references, meteor=False),
        "... and METEOR": lambda: metrics.ngram_scores(predictions, references),
        "SSv2's own, overall and by template, their intervals": lambda: metrics.ssv2_scores(
            predictions, records, reader
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(args.runs):
        for name, run in parts.items():
            begun = time.perf_counter()
            found = run()
            seconds[name].append(time.perf_counter() - begun)
            if getattr(found, "notes", None):
                raise files.UserError(f"this would time something else: {found.notes[0]}")
    rows = [[name, measure.spread(values, 1)] for name, values in seconds.items()]
    measure.report(__file__, f"Scoring {args.clips:,} predictions", ("what", "seconds"), rows)


if __name__ == "__main__":
    files.run(main)
