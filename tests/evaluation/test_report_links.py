"""Pages that reach each other, and the recipe that they show of a checkpoint."""

import re

from evaluation import report
from tests import tiny


def test_a_recipes_models_are_shown_from_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    captioner = tiny.tiny_captioner()
    captioner.config |= {"llm": str(tmp_path / "models" / "llm"), "features": {"encoder": str(tmp_path / "encoder")}}
    found = report.recipe(captioner)
    assert (found["llm"], found["features"]["encoder"]) == ("models/llm", "encoder")
    captioner.config |= {"llm": "Qwen/Qwen2-1.5B", "features": None}
    found = report.recipe(captioner)
    assert (found["llm"], found["features"], found["training"]) == ("Qwen/Qwen2-1.5B", {}, captioner.recipe)


def nav(page):
    return re.findall('<a href="([^"]*)"( aria-current=page)?>([^<]*)</a>', page.read_text().split("</nav>")[0])


def test_pages_link_to_those_that_are_there_in_whatever_order_they_are_made(tmp_path):
    pages = [tmp_path / place for place in ("training/index.html", "index.html", "inference/index.html")]
    hostile = "<!--pages--> <!--/pages-->"  # captions cannot take the links' place
    for page in pages:
        report.write_page(page, hostile, [{"id": hostile}])
        report.link_pages(tmp_path)
    assert nav(pages[1]) == [
        ("index.html", " aria-current=page", "Evaluation"),
        ("inference/index.html", "", "Inference"),
        ("training/index.html", "", "Training"),
    ]
    assert [place for place, *_ in nav(pages[0])] == ["../index.html", "../inference/index.html", "index.html"]
    for page in pages:
        assert all((page.parent / place).is_file() for place, *_ in nav(page))
        assert page.read_text().count("&lt;!--pages--&gt;") == 2  # in title and heading
    pages[2].unlink()
    report.link_pages(tmp_path)
    assert [name for *_, name in nav(pages[0])] == ["Evaluation", "Training"]


def test_what_is_no_page_of_ours_is_left_as_it_is(tmp_path):
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "index.html").write_bytes(b"\xff\r\n<h1>mine</h1>")
    report.write_page(tmp_path / "index.html", "T", [{"id": "1"}])
    report.link_pages(tmp_path)
    assert (tmp_path / "training" / "index.html").read_bytes() == b"\xff\r\n<h1>mine</h1>"
    report.link_pages(tmp_path / "nothing")
