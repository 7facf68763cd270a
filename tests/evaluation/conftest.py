"""A browser, and two pages for it: a gallery of scored clips, and what infer writes for long videos."""

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
    """Clips of four kinds, and two pages: a gallery of 120 scored clips, and what infer writes for long videos."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "clips #1").mkdir()
    write_video(folder / "clips #1/a%b.webm", 24, 112, 84)
    write_video(folder / "long.webm", 48, 112, 64)
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
    clips[1] |= {"prediction": HOSTILE, "references": [HOSTILE]}
    history = [{"epoch": e, "train_loss": 2 / e, "val_loss": 2.2 / e, "CIDEr": e / 3} for e in (1, 2, 3)]
    scores = [{"name": "CIDEr", "value": 1.1, "low": 1.0, "high": 1.2}, {"name": "CIDEr, shuffled", "value": 0.1}]
    made_by = {"command": "evaluate.py", "commit": None}
    report.write_page(folder / "index.html", "Gallery", clips, history, scores, made_by, [[*TEMPLATES[:2], 4]])

    parts = [timeline.Segment(i, i + 1, text) for i, text in enumerate(SAID)]
    segments = [part._asdict() for part in parts]
    report.write_page(
        folder / "long.html",
        "Long",
        [
            {"id": "long", "video": "long.webm", "segments": segments},
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
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda said: troubles.append(said.text) if said.type in ("error", "warning") else None)
        page.on(
            "request",
            lambda asked: None if asked.url.startswith(("file:", "blob:", "data:")) else troubles.append(asked.url),
        )
        page.goto((folder / name).as_uri())
        page.wait_for_selector("#cards .card")
        page.may_fail = may_fail
        return page

    yield open_page
    allowed = [page.may_fail for context in contexts for page in context.pages if page.may_fail]
    for context in contexts:
        context.close()
    assert [trouble for trouble in troubles if not any(part in trouble for part in allowed)] == []
