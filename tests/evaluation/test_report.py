import html.parser
import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

import dataset
from evaluation import report

HOSTILE = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> & \u2028 \"quoted\" 'too' {{ 7 * 7 }}"


class Scripts(html.parser.HTMLParser):
    """Reads a page as a browser would: which elements there are, and what each script holds."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self.within = [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.within = dict(attrs).get("id", "code") if tag == "script" else None

    def handle_data(self, data):
        if self.within:
            self.scripts[self.within] = self.scripts.get(self.within, "") + data


def page_of(tmp_path, clips, **more):
    report.write_page(tmp_path / "index.html", more.pop("title", "Title"), clips, **more)
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    parsed = Scripts(text)
    return text, parsed, json.loads(parsed.scripts["data"])


COMPARED = {"path": "other/evaluation.json", "checkpoint": "c.pt", "epoch": 2, "clips": 3, "made_by": None}

# ---- the page ----


def test_captions_with_html_arrive_whole_and_add_no_element(tmp_path):
    _, plain, _ = page_of(tmp_path, [{"id": "1", "prediction": "p", "references": ["r"]}])
    text, parsed, clips = page_of(
        tmp_path,
        [{"id": HOSTILE, "prediction": HOSTILE, "references": [HOSTILE], "template": HOSTILE, "error": HOSTILE}],
    )
    assert parsed.elements == plain.elements
    assert clips[0]["prediction"] == clips[0]["id"] == clips[0]["template"] == clips[0]["error"] == HOSTILE
    assert clips[0]["references"] == [HOSTILE]
    assert "\u2028" not in text and "alert(1)</script>" not in text


def test_title_command_score_names_and_templates_are_escaped(tmp_path):
    text, parsed, _ = page_of(
        tmp_path,
        [],
        title="<dfn>&\x1b[31m",
        made_by={"command": "x --y '<i>'", "commit": None},
        scores=[{"name": "<u>", "value": 1.0, "note": "<s>", "group": "<tt>"}],
        confused=[("<em>", '"><q>', 3), ("<em>", None, 1)],
        links=[("<samp>", "a b/'<var>'.json")],
        recipe={"<sub>": "<sup>", "settings": {"<small>": "<big>", "lr": 0.1}},
        compared={**COMPARED, "path": "<code>", "checkpoint": "<pre>", "made_by": {"commit": "<ins>"}},
    )
    bad = {"dfn", "u", "s", "tt", "em", "q", "samp", "var", "sub", "sup", "small", "big", "code", "pre", "ins"}
    assert bad.isdisjoint(parsed.elements)
    assert 'href="a%20b/%27%3Cvar%3E%27.json">&lt;samp&gt;</a>' in text and "lr 0.1" in text
    assert "<h1>&lt;dfn&gt;&amp;\N{REPLACEMENT CHARACTER}[31m</h1>" in text
    assert "x --y &#39;&lt;i&gt;&#39;" in text and "&lt;em&gt;" in text
    assert 'data-read="&#34;&gt;&lt;q&gt;"' in text and "→</span> no template</button>" in text


def test_what_could_hide_or_reverse_a_caption_becomes_visible(tmp_path):
    persian, mark = "می\u200cخواهم", "\N{REPLACEMENT CHARACTER}"
    captions = ["a\x00b\x1b[2Jc", "abc\u202edef", "half \ud800 pair", persian, "two\nlines"]
    _, _, clips = page_of(tmp_path, [{"id": str(i), "prediction": text} for i, text in enumerate(captions)])
    assert [clip["prediction"] for clip in clips] == [
        f"a{mark}b{mark}[2Jc",
        f"abc{mark}def",
        f"half {mark} pair",
        persian,
        "two\nlines",
    ]


def test_scores_are_rounded_and_a_clip_may_have_none(tmp_path):
    scores = [None, 0.0, 1.23456789, np.float32(0.5)]
    _, _, clips = page_of(tmp_path, [{"id": str(i), "score": score} for i, score in enumerate(scores)])
    assert [clip.get("score") for clip in clips] == [None, 0.0, 1.2346, 0.5]


def test_a_clip_with_many_references_shows_five_and_counts_the_rest(tmp_path):
    _, _, clips = page_of(tmp_path, [{"id": "1", "references": [f"r{i}" for i in range(14)]}])
    assert clips[0]["references"] == ["r0", "r1", "r2", "r3", "r4"] and clips[0]["unseen"] == 9


def test_a_failed_clip_has_no_caption_and_one_with_a_warning_keeps_its_own(tmp_path):
    failed = {"id": "1", "prediction": None, "error": "no frames"}
    _, _, clips = page_of(tmp_path, [failed, {"id": "2", "prediction": "moving up", "warning": "cut off"}])
    assert clips[0]["error"] == "no frames" and "prediction" not in clips[0] and "warning" not in clips[0]
    assert clips[1]["prediction"] == "moving up" and clips[1]["warning"] == "cut off" and "error" not in clips[1]


@pytest.mark.parametrize(
    ("path", "address"),
    [
        ("../clips/1.webm", "../clips/1.webm"),
        ("a b#c?d%e.mp4", "a%20b%23c%3Fd%25e.mp4"),
        ("javascript:alert(1)", "javascript%3Aalert%281%29"),
        ("/data/a b.webm", "file:///data/a%20b.webm"),
        ("bad\udcff.webm", "bad%FF.webm"),
        (Path("x/é.webm"), "x/%C3%A9.webm"),
    ],
)
def test_paths_become_addresses_that_name_the_same_file(tmp_path, path, address):
    _, _, clips = page_of(tmp_path, [{"id": "1", "video": path}])
    assert clips[0]["video"] == address


def test_relative_leads_from_the_page_to_the_clip(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert report.relative(tmp_path / "data/1.webm", tmp_path / "results/sample/index.html") == "../../data/1.webm"
    assert report.relative("results/1.webm", "results/index.html") == "1.webm"


def test_segments_are_carried_in_milliseconds(tmp_path):
    _, _, clips = page_of(tmp_path, [{"id": "1", "segments": [{"start": 0, "end": 1.00049, "caption": "moving <up>"}]}])
    assert clips[0]["segments"] == [{"start": 0.0, "end": 1.0, "caption": "moving <up>"}]


def test_the_page_asks_nothing_of_the_network(tmp_path):
    text, parsed, _ = page_of(tmp_path, [{"id": "1"}], history=HISTORY, scores=[{"name": "CIDEr", "value": 1.0}])
    assert "http://" not in text and "https://" not in text and "@import" not in text
    assert parsed.elements.count("link") == 1 and '<link rel="icon" href="data:,">' in text


def test_a_clip_that_cannot_be_written_leaves_the_old_page(tmp_path):
    before, _, _ = page_of(tmp_path, [{"id": "1"}])
    with pytest.raises(ValueError, match="JSON"):
        report.write_page(tmp_path / "index.html", "new", [{"id": "2", "score": math.nan}])
    assert (tmp_path / "index.html").read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["index.html"]


# ---- scores ----


def score_rows(tmp_path, scores):
    """The table's groups: of each its name, and of its rows name, bar (left, [left, width]), value and interval."""
    text, _, _ = page_of(tmp_path, [], scores=scores)
    groups = []
    for body in re.findall("<tbody>(.*?)</tbody>", re.search("<table id=.scores.*?</table>", text, re.DOTALL)[0], re.S):
        rows = []
        for row in re.findall(r"<tr>\s*<th scope=\"row\">.*?</tr>", body, re.DOTALL):
            cells = [re.sub("<.*?>", "", cell) for cell in re.findall("<t[hd].*?>(.*?)</t[hd]>", row)]
            bars = [[float(n) for n in re.findall(r"([\d.]+)%", bar)] for bar in re.findall("<[ib] style=.*?>", row)]
            rows.append((cells[0], bars, *cells[2:]))
        groups.append(("".join(re.findall("rowgroup.*?>(.*?)<", body)), rows))
    return groups


def test_scores_show_value_and_interval_and_say_what_is_missing(tmp_path):
    scores = [{"name": "Bleu_1", "value": 0.23456, "low": 0.2, "high": 0.3}, {"name": "METEOR", "value": None}]
    assert score_rows(tmp_path, [*scores, {"name": "top 1", "value": 0.5, "low": None, "high": None}]) == [
        (
            "",
            [
                ("Bleu_1", [[20.0, 10.0], [23.46]], "0.235", "0.200 – 0.300"),
                ("METEOR", [], "–", ""),
                ("top 1", [[50.0]], "0.500", ""),
            ],
        )
    ]


def test_groups_keep_their_order_and_cider_does_not_squeeze_the_bars_of_rates(tmp_path):
    groups = score_rows(
        tmp_path,
        [
            {"name": "CIDEr", "value": 6.0, "low": 4.0, "high": 8.0, "group": "G"},
            {"name": "Bleu_4", "value": 0.5, "group": "G"},
            {"name": "CIDEr, shuffled", "value": 2.0, "group": "B"},
        ],
    )
    bars = [(name, [bars for _, bars, *_ in rows]) for name, rows in groups]
    assert bars == [("G", [[[50.0, 50.0], [75.0]], [[50.0]]]), ("B", [[[25.0]]])]


# ---- curves ----

HISTORY = [
    {"epoch": 1, "train_loss": 2.0, "val_loss": 1.0, "CIDEr": None},
    {"epoch": 2, "train_loss": math.nan, "CIDEr": 0.5},
    {"epoch": 3, "train_loss": 1.0, "val_loss": 1.5, "CIDEr": 1.0},
]


def curves_of(tmp_path, history):
    text, _, _ = page_of(tmp_path, [], history=history)
    return ElementTree.fromstring(re.sub("xlink:", "", re.search("<svg.*?</svg>", text, re.DOTALL)[0]))


def test_the_pages_curves_say_what_they_show_and_follow_its_width_and_theme(tmp_path):
    svg = curves_of(tmp_path, HISTORY)
    assert svg.get("role") == "img"
    assert svg.get("aria-label") == "By epoch: train loss 2 to 1; val loss 1 to 1.5; CIDEr 0.5 to 1"
    assert svg.get("viewBox")
    texts = {element.text for element in svg.iter("text")}  # text, which a browser finds and reads out
    assert {"epoch", "loss", "CIDEr", "training", "validation", "1", "2", "3"} <= texts
    styles = " ".join(element.get("style", "") for element in svg.iter())
    colours = set(re.findall(r"(?:fill|stroke): (?!none)(\S+?)(?:;|\s|$)", styles))
    assert colours == {"var(--dim)", "var(--first)", "var(--second)", "var(--exact)"}


def test_curves_leave_out_what_is_not_a_number_and_what_has_no_value(tmp_path):
    drawn = [
        len(element.get("d").split("L"))
        for element in curves_of(tmp_path, HISTORY).iter("path")
        if re.search(r"fill: none;.* stroke: var\(--(first|second|exact)\)", element.get("style", ""))
    ]
    assert sorted(drawn) == [2, 2, 2, 3, 3]  # of each curve two points; in the legend two lines have three
    assert "CIDEr" not in {e.text for e in curves_of(tmp_path, [{"epoch": 1, "train_loss": 1.0}]).iter("text")}
    for history in ([], [{"epoch": 1, "train_loss": math.nan}]):
        assert "<svg" not in page_of(tmp_path, [], history=history)[0]


def coloured(path, hue):
    """How many pixels have the colour of a curve (training, validation, CIDEr)."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int((np.abs(pixels - hue).sum(-1) < 20).sum())


def test_losses_png_draws_each_curve_that_has_values(tmp_path):
    train, validation, cider = (0x1D, 0x62, 0xB5), (0xB2, 0x56, 0x1A), (0x0A, 0x73, 0x50)
    report.draw_curves(HISTORY, tmp_path / "losses.png")
    assert all(coloured(tmp_path / "losses.png", hue) > 500 for hue in (train, validation, cider))
    report.draw_curves([{"epoch": 1, "train_loss": 2.0}, {"epoch": 2, "train_loss": 1.0}], tmp_path / "losses.png")
    assert coloured(tmp_path / "losses.png", train) > 500
    assert coloured(tmp_path / "losses.png", validation) == coloured(tmp_path / "losses.png", cider) == 0


def test_one_history_has_the_same_bytes_each_time_and_none_is_no_error(tmp_path):
    for name in ("a.png", "b.png"):
        report.draw_curves(HISTORY, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert page_of(tmp_path, [], history=HISTORY)[0] == page_of(tmp_path, [], history=HISTORY)[0]
    report.draw_curves([], tmp_path / "none.png")
    assert Image.open(tmp_path / "none.png").size[0] > 500


# ---- the page of what evaluation.json holds ----


def test_a_scored_page_points_at_the_videos_or_at_copies_of_them(tmp_path):
    (tmp_path / "data" / "20bn-something-something-v2").mkdir(parents=True)
    layout = dataset.Layout(tmp_path / "data")
    (layout.videos / "1.webm").write_bytes(b"video")
    result = {
        "predictions": [{"id": "1", "prediction": "x", "CIDEr": 2.0}, {"id": "2", "prediction": "y", "CIDEr": 0.0}],
        "tokenizer": "PTB",
        "notes": [],
        "metrics": {"CIDEr": 1.25, "METEOR": None},
        "intervals": {"CIDEr": [1.0, 1.5]},
        "ssv2": {"confused": [["Up", "Down", 3]], "intervals": {}},
        "made_by": {"command": "python evaluate.py", "commit": None},
    }
    page = tmp_path / "results" / "index.html"
    for copies, video in (
        (None, "../data/20bn-something-something-v2/1.webm"),
        (page.parent / "videos", "videos/1.webm"),
    ):
        report.write_scored_page(page, "T", result, layout, HISTORY, copies)
        text = page.read_text()
        clips = json.loads(Scripts(text).scripts["data"])
        assert clips[0]["video"] == video and clips[0]["score"] == 2.0 and "video" not in clips[1]
        parts = ("1.000 – 1.500", "→</span> Down</button>", "python evaluate.py<", "<svg")
        assert [part for part in parts if part not in text] == []
    assert (tmp_path / "results" / "videos" / "1.webm").read_bytes() == b"video"


def test_a_scored_page_shows_where_own_videos_lie_and_links_to_the_run_that_it_is_compared_with(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(dataset.Layout, "source", lambda _, clip_id: f"holiday #{clip_id}/ä.mov")
    result = {
        "predictions": [{"id": "1", "prediction": "x", "CIDEr": 2.0, "outcome": "wrong", "read": None}],
        "tokenizer": "PTB",
        "notes": [],
        "metrics": {"CIDEr": 1.25, "METEOR": None},
        "intervals": {"CIDEr": [1.0, 1.5]},
        "made_by": {"command": "python evaluate.py", "commit": None},
        "compared": {**COMPARED, "path": str(tmp_path / "old" / "evaluation.json")},
        "recipe": {"checkpoint": "c.pt", "data": None, "training": {"lr": 0.002}},
    }
    page = tmp_path / "results" / "index.html"
    layout = dataset.Layout(tmp_path / "data")
    report.write_scored_page(page, "T", result, layout, (), links=[("evaluation.json", "evaluation.json")])
    assert re.findall('href="([^#"]*)"', page.read_text())[1:] == ["evaluation.json", "../old/evaluation.json"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "index.html").touch()
    report.write_scored_page(page, "T", result, layout, ())
    text = page.read_text()
    assert 'href="../old/index.html"' in text and "<span>lr 0.002</span>" in text and "<dt>data</dt>" not in text
    clips = json.loads(Scripts(text).scripts["data"])
    assert clips[0]["source"] == "holiday #1/ä.mov" and clips[0]["read"] == ""
