"""What infer's page links to: its files, its neighbours, and how its checkpoint was made."""

import json
import re
from urllib.parse import unquote

from evaluation import report
from tests.test_infer import namer, run, trained, write_video  # noqa: F401  two of them are fixtures


def test_the_page_links_to_its_files_and_neighbours_and_says_how_its_checkpoint_was_made(namer, tmp_path):  # noqa: F811
    video = write_video(tmp_path / "in" / "a #b.webm", "red blue", seconds=2)
    report.write_page(tmp_path / "out" / "index.html", "Evaluation", [])
    run(tmp_path / "out", "--video", video, "--window", 1)
    page = tmp_path / "out" / "inference" / "index.html"
    text = page.read_text()
    places = re.findall('href="([^#"]+)"', text.split("<main>")[0])[1:]
    assert places == ["../index.html", "index.html", "results.json"] and "<span>lr 0.002</span>" in text
    (clip,) = json.loads(re.search('id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert [kind for kind, _ in clip["files"]] == [".srt", ".vtt", ".json"] and clip["source"] == str(video)
    places += [place for _, place in clip["files"]]
    assert [place for place in places if not (page.parent / unquote(place)).is_file()] == []
    assert "inference/index.html" in (tmp_path / "out" / "index.html").read_text()
