"""Damage files at random and run the scripts on them: python -m tests.fuzz --videos 1000 --files 1000 --seed 0

Videos go through preprocess_something_something_v2.py; .pt, .safetensors, JSON and CSV files through
prepare_annotations.py, train.py and evaluate.py. What counts as a failure: a traceback, a hang, a process that dies,
memory asked for by a size that a file claims, a pickle that acts, a file written where none belongs, and an unfinished
file left behind.
"""

import os
import sys
import time
from collections import Counter, defaultdict

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # a damaged name of a model is not looked for on the hub

from runtime import cli, provenance  # noqa: E402
from tests.fuzz import cases, videos  # noqa: E402
from tests.fuzz.cases import GOOD, Outcome  # noqa: E402


def table(outcomes: list[Outcome]) -> str:
    """Counts by what was damaged and how it ended."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for outcome in outcomes:
        counts[outcome.target][outcome.end] += 1
        counts["~all"][outcome.end] += 1
    ends = [*GOOD, *sorted({outcome.end for outcome in outcomes} - set(GOOD))]
    rows = [("damaged", "cases", *ends)]
    rows += [(name.strip("~"), str(n.total()), *(str(n[end]) for end in ends)) for name, n in sorted(counts.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def main(argv: list[str] | None = None) -> int:
    """Fuzz, print the table, and end with 1 where anything went wrong."""
    parser = cli.Parser(__doc__.splitlines()[0])
    parser.add_argument("--videos", type=int, default=1000, help="damaged videos, rounded up to a multiple of 50")
    parser.add_argument("--files", type=int, default=1000, help="damaged .pt, .safetensors, JSON and CSV files")
    parser.add_argument("--first", type=int, default=0, help="number of the first file's case, to repeat one")
    parser.add_argument("--seed", type=int, default=0, help="decides the damage")
    parser.add_argument("--limit", type=cli.positive, default=60.0, help="seconds that a case may take")
    args = parser.parse_args(argv)
    begun, outcomes = time.monotonic(), []
    for outcome in cases.fuzz(range(args.first, args.first + args.files), args.seed, args.limit):
        outcomes.append(outcome)
        if outcome.end not in GOOD:
            print(f"case {outcome.number}: {outcome.end}: {outcome.told}", file=sys.stderr, flush=True)
        if len(outcomes) % 50 == 0:
            print(f"{len(outcomes)} of {args.files}, {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    outcomes += videos.fuzz_all(args.videos, args.seed)
    print(table(outcomes))
    made = provenance.made_by(argv)
    print(f"{made['command']} at {made['commit']}, {time.monotonic() - begun:.0f} s")
    return int(any(outcome.end not in GOOD for outcome in outcomes))


if __name__ == "__main__":
    cli.run(main)
