"""How large the results page of a whole validation split is, and how soon it can be used.

Writes a page of made-up captions, opens it from disk in headless Chromium, and times from the start of the
navigation until cards are there and until a search has been answered. Needs the `test` extra and Chromium.
"""

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation import report
from runtime import files

VERBS = ["moving", "pushing", "pretending to put", "putting", "dropping", "holding", "turning", "covering"]
THINGS = ["a bottle of water", "box", "a red cup", "phone", "a pair of scissors", "notebook", "pen", "a small toy car"]
PLACES = ["behind", "next to", "on the edge of", "in front of", "from left to right over", "without touching"]


def made_up_clips(count: int, references: int) -> list[dict]:
    """Clips as evaluate.py hands them to the page, with captions of SSv2's length (seeded)."""
    rng = random.Random(0)
    clips = []
    for i in range(count):
        said = [f"{rng.choice(VERBS)} {rng.choice(THINGS)} {rng.choice(PLACES)} {rng.choice(THINGS)}" for _ in range(6)]
        verb, place = rng.choice(VERBS), rng.choice(PLACES)
        clips.append(
            {
                "id": str(100_000 + i),
                "prediction": said[0],
                "references": [said[1 + n % 5] for n in range(references)],
                "video": f"../../data/something-something-v2/20bn-something-something-v2/{100_000 + i}.webm",
                "template": f"{verb.capitalize()} [something] {place} [something]",
                "outcome": rng.choice(["exact", "template", "wrong"]),
                "score": rng.random() * 3,
            }
        )
    return clips


def main(argv: list[str] | None = None) -> None:
    """Write the page, open it, print the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--clips", type=int, default=24_777, help="clips on the page (default: SSv2's validation split)"
    )
    parser.add_argument("--references", type=int, default=1, help="references of each clip")
    parser.add_argument("--runs", type=int, default=5, help="times the page is opened")
    args = parser.parse_args(argv)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise files.UserError("Playwright is not installed: pip install -e .[test]") from None
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise files.UserError("there is no Chromium on this machine: install Debian's package `chromium`")

    clips = made_up_clips(args.clips, args.references)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = Path(folder) / "index.html"
        start = time.perf_counter()
        report.write_page(path, "Page benchmark", clips)
        print(
            f"{args.clips:,} clips: {path.stat().st_size / 1e6:.1f} MB, written in {time.perf_counter() - start:.1f} s"
        )

        # A new browser for each run, as for somebody who opens the file: nothing of it is in a cache.
        shown, answered = [], []
        for _ in range(args.runs):
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
    for what, seconds in (("cards shown", shown), ("first search answered", answered)):
        print(f"{what} after {statistics.median(seconds):.2f} s (median of {args.runs}; most {max(seconds):.2f} s)")


if __name__ == "__main__":
    files.run(main)
