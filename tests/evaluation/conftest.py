"""A browser, and pages for it: a gallery of scored clips, two runs side by side, what infer writes for long videos."""

import shutil

import av
import numpy as np
import pytest

from evaluation import report
from video import subtitles as timeline

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = '<img src=x onerror="document.title=`run`"> </script><script>document.title="run"</script> & \u202eabc'
TEMPLATES = ["Moving [something] up", "Pushing [something] from left to right", "Putting [something] on a surface"]
OUTCOMES = ["exact", "template", "wrong"]
CHANGES = ["same", "better", "worse"]
SAID = ["moving a square --> & left", "second <b>caption</b>", "third"]


def write_video(path, frames, width, height):
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libvpx-vp9", rate=12)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"deadline": "realtime", "cpu-used": "8"}
        for i in range(frames):
            picture = np.full((height, width, 3), 200, np.uint8)
            picture[20:40, 2 * i % (width - 20) :][:, :20] = (200, 40, 30)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install -e .[test]")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--headless", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield started
        started.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Clips of four kinds, and three pages: a gallery of 120 scored clips, the same as one of two runs, long videos."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "clips #1").mkdir()
    write_video(folder / "clips #1/a%b.webm", 24, 112, 84)
    write_video(folder / "long.webm", 48, 112, 64)
    for name in ("attention", "query 3"):
        write_video(folder / f"clips #1/a%b.{name}.webm", 24, 112, 84)
    clips = [
        {
            "id": str(1000 + i),
            "prediction": f"caption {i} of colour{i % 4}",
            "references": [f"reference {i}"],
            "video": "clips #1/a%b.webm",
            "template": TEMPLATES[i % 3],
            "outcome": OUTCOMES[i % 5 % 3],
            "score": None if i == 7 else (i * 37 % 120) / 40,
        }
        for i in range(120)
    ]
    for i, clip in enumerate(clips):  # wrong ones were read as one of two templates, or none
        clip["read"] = clip["template"] if i % 5 % 3 != 2 else [TEMPLATES[2], None][i % 2]
    clips[1] |= {"prediction": HOSTILE, "references": [HOSTILE]}
    for i, names in enumerate((("attention", "query 3"), ("attention",), ("query 3",), ("gone",))):
        clips[i]["overlays"] = {name: f"clips #1/a%b.{name}.webm" for name in names}
    for clip, source in ((clips[4], HOSTILE), (clips[5], "holiday/ä #1.mov")):
        clip["source"] = source
    history = [{"epoch": e, "train_loss": 2 / e, "val_loss": 2.2 / e, "CIDEr": e / 3} for e in (1, 2, 3)]
    scores = [{"name": "CIDEr", "value": 1.1, "low": 1.0, "high": 1.2}, {"name": "CIDEr, shuffled", "value": 0.1}]
    made_by = {"command": "evaluate.py", "commit": None}
    confused = [[TEMPLATES[1], TEMPLATES[2], 4], [TEMPLATES[0], None, 4]]
    report.write_page(folder / "index.html", "Gallery", clips, history, scores, made_by, confused)

    for i, clip in enumerate(clips[:100]):  # the other run lacks 20 of the clips
        said = clip["prediction"] if i % 3 == 0 else HOSTILE if i == 1 else f"other {i}"
        gain = [0, i / 100, -i / 100][i % 3]
        other = {"prediction": said, "CIDEr": (clip["score"] or 0) - gain, "difference": gain, "change": CHANGES[i % 3]}
        clip["compared"] = other
    gains = {"difference": -0.25, "gain_low": -0.5, "gain_high": -0.01}
    scores = [{"name": "CIDEr", "value": 1.1, "low": 1.0, "high": 1.2, **gains}]
    scores.append({"name": "BLEU-4", "value": 0.5, "low": 0.4, "high": 0.6, **gains, "gain_high": 0.2})
    scores.append({"name": "METEOR", "value": 0.3, "difference": 0.1})
    other = {"path": "old/evaluation.json", "checkpoint": "old.pt", "epoch": 3, "clips": 100, "made_by": made_by}
    recipe = {"checkpoint": "new.pt", "data": "sample", "training": {"lr": 0.002, "epochs": 11}}
    more = {"compared": other, "recipe": recipe, "links": [("evaluation.json", "evaluation.json")]}
    report.write_page(folder / "compared.html", "Compared", clips, history, scores, made_by, confused, **more)

    parts = [timeline.Segment(i, i + 1, text) for i, text in enumerate(SAID)]
    segments = [part._asdict() for part in parts]
    report.write_page(
        folder / "long.html",
        "Long",
        [
            {"id": "long", "video": "long.webm", "segments": segments, "links": [("long #1.srt", "long #1.srt")]},
            {"id": "failed", "error": "no frames could be decoded", "prediction": None},
            {"id": "gone", "video": "gone.webm", "prediction": "x"},
            {"id": "cut", "prediction": "moving up", "warning": "cut off: 29 of 33 frames could be decoded"},
        ],
    )
    return folder


@pytest.fixture
def visit(browser, folder):
    """visit(name, **context options) -> page. None may have an error, or ask for anything but files."""
    contexts, troubles = [], []

    def open_page(name="index.html", may_fail="", **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.may_fail = may_fail
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda said: troubles.append(said.text) if said.type in ("error", "warning") else None)
        page.on(
            "request",
            lambda asked: None if asked.url.startswith(("file:", "blob:", "data:")) else troubles.append(asked.url),
        )
        name, _, view = name.partition("#")
        page.goto((folder / name).as_uri() + (f"#{view}" if view else ""))
        page.wait_for_selector("#cards .card")
        return page

    yield open_page
    allowed = [page.may_fail for context in contexts for page in context.pages if page.may_fail]
    for context in contexts:
        context.close()
    assert [trouble for trouble in troubles if not any(part in trouble for part in allowed)] == []
