import html.parser
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
    return text, parsed, json.loads(parsed.scripts["data"])["clips"]


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
        made_by="x --y '<i>'",
        scores=[{"name": "<u>", "value": 1.0, "note": "<s>", "group": "<tt>"}],
        confused=[("<em>", "<q>", 3), ("<em>", None, 1)],
    )
    assert {"dfn", "u", "s", "tt", "em", "q"}.isdisjoint(parsed.elements)
    assert "<h1>&lt;dfn&gt;&amp;\N{REPLACEMENT CHARACTER}[31m</h1>" in text
    assert "x --y &#39;&lt;i&gt;&#39;" in text and "&lt;em&gt;" in text
    assert "<td>no template</td>" in text


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


def test_numbers_that_json_cannot_say_become_null(tmp_path):
    scores = [math.nan, math.inf, None, 0.0, 1.23456789, np.float32(0.5)]
    _, _, clips = page_of(tmp_path, [{"id": str(i), "score": score} for i, score in enumerate(scores)])
    assert [clip["score"] for clip in clips] == [None, None, None, 0.0, 1.2346, 0.5]


def test_a_clip_with_many_references_shows_five_and_counts_the_rest(tmp_path):
    _, _, clips = page_of(tmp_path, [{"id": "1", "references": [f"r{i}" for i in range(14)]}])
    assert clips[0]["references"] == ["r0", "r1", "r2", "r3", "r4"] and clips[0]["unseen"] == 9


def test_a_failed_clip_is_no_caption(tmp_path):
    _, _, clips = page_of(tmp_path, [{"id": "1", "prediction": None, "error": "no frames"}])
    assert clips[0]["error"] == "no frames" and "prediction" not in clips[0]


@pytest.mark.parametrize(
    ("path", "address"),
    [
        ("../clips/1.webm", "../clips/1.webm"),
        ("a b#c?d%e.mp4", "a%20b%23c%3Fd%25e.mp4"),
        ("javascript:alert(1)", "javascript%3Aalert%281%29"),
        ("/data/a b.webm", "file:///data/a%20b.webm"),
        ("file:///data/a%20b.webm", "file:///data/a%20b.webm"),
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


def test_the_page_carries_the_text_of_its_tracks(tmp_path):
    vtt = "WEBVTT\n\n00:00.000 --> 00:01.000\nmoving &lt;up&gt;\n"
    (tmp_path / "1.vtt").write_text(vtt)
    segments = [{"start": 0, "end": 1.00049, "caption": "moving <up>"}]
    _, _, clips = page_of(
        tmp_path,
        [{"id": "1", "tracks": "1.vtt", "segments": segments}, {"id": "2", "tracks": "gone.vtt", "segments": segments}],
    )
    assert clips[0]["vtt"] == vtt and clips[0]["tracks"] == "1.vtt"
    assert clips[0]["segments"] == [{"start": 0.0, "end": 1.0, "caption": "moving <up>"}]
    assert clips[1]["tracks"] == "gone.vtt" and "vtt" not in clips[1]


def test_the_page_asks_nothing_of_the_network(tmp_path):
    text, parsed, _ = page_of(tmp_path, [{"id": "1"}], history=[{"epoch": 1, "train_loss": 1.0}], scores={"CIDEr": 1.0})
    assert "http://" not in text and "https://" not in text and "@import" not in text
    assert parsed.elements.count("link") == 1 and '<link rel="icon" href="data:,">' in text


def test_a_clip_that_cannot_be_written_leaves_the_old_page(tmp_path):
    before, _, _ = page_of(tmp_path, [{"id": "1"}])
    with pytest.raises(KeyError):
        report.write_page(tmp_path / "index.html", "new", [{"prediction": "no id"}])
    assert (tmp_path / "index.html").read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["index.html"]


# ---- scores ----


def test_scores_show_value_and_interval_and_say_what_is_missing():
    (group,) = report._score_groups(
        [{"name": "CIDEr", "value": 1.23456, "low": 1.2, "high": 1.3}, {"name": "METEOR", "value": None}]
        + [{"name": "clips", "value": 24777}, {"name": "tokenizer", "value": "PTB"}]
    )
    assert [(row["text"], row["interval"]) for row in group["rows"]] == [
        ("1.235", "1.200 – 1.300"),
        ("–", ""),
        ("24,777", ""),
        ("PTB", ""),
    ]


def test_scores_may_be_a_dict():
    (group,) = report._score_groups({"exact": (0.5, 0.4, 0.6), "CIDEr": 1.0})
    assert [(row["name"], row["text"], row["interval"]) for row in group["rows"]] == [
        ("exact", "0.500", "0.400 – 0.600"),
        ("CIDEr", "1.000", ""),
    ]


def test_bars_of_one_group_share_a_scale_and_groups_keep_their_order():
    groups = report._score_groups(
        [{"name": "a", "value": 2.0, "low": 1.0, "high": 4.0, "group": "G"}, {"name": "b", "value": 0.5, "group": "H"}]
        + [{"name": "c", "value": 1.0, "group": "G"}]
    )
    assert [group["name"] for group in groups] == ["G", "H"]
    assert [row["bar"] for row in groups[0]["rows"]] == [[50.0, 25.0, 100.0], [25.0, 25.0, 25.0]]
    assert groups[1]["rows"][0]["bar"] == [50.0, 50.0, 50.0]


def test_cider_does_not_squeeze_the_bars_of_rates_beside_it():
    rows = [
        {"name": "CIDEr", "value": 8.0},
        {"name": "Bleu_4", "value": 0.5},
        {"name": "CIDEr, shuffled", "value": 2.0},
    ]
    (group,) = report._score_groups(rows)
    assert [row["bar"][0] for row in group["rows"]] == [100.0, 50.0, 25.0]


# ---- curves ----


@pytest.mark.parametrize(
    ("low", "high", "most", "whole", "ticks"),
    [
        (0.6, 2.3, 5, False, [0.5, 1.0, 1.5, 2.0, 2.5]),
        (1, 10, 8, True, [0, 2, 4, 6, 8, 10]),
        (1, 3, 8, True, [1, 2, 3]),
        (0.001, 0.0042, 5, False, [0.001, 0.002, 0.003, 0.004, 0.005]),
        (5, 5, 8, True, [4, 5, 6]),
        (0, 0, 5, False, [-1.0, -0.5, 0.0, 0.5, 1.0]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low, high, most, whole, ticks):
    assert report._ticks(low, high, most, whole) == ticks


def test_curves_lie_between_their_ticks_and_leave_out_what_is_not_a_number():
    history = [
        {"epoch": 1, "train_loss": 2.0, "val_loss": 1.0, "CIDEr": None},
        {"epoch": 2, "train_loss": math.nan, "CIDEr": 0.5},
        {"epoch": 3, "train_loss": 1.0, "val_loss": 1.5, "CIDEr": 1.0},
    ]
    loss, cider = report._charts(history)
    assert [(line["name"], line["points"]) for line in loss["lines"]] == [
        ("train", "44.0,12.0 426.0,190.0"),
        ("validation", "44.0,190.0 426.0,101.0"),
    ]
    assert loss["label"] == "Loss by epoch: train 2 to 1; validation 1 to 1.5"
    assert [text for _, text in loss["x_ticks"]] == ["1", "2", "3"]
    assert [dot[2] for dot in cider["lines"][0]["dots"]] == ["CIDEr, epoch 2: 0.5", "CIDEr, epoch 3: 1"]


def test_a_history_without_numbers_draws_no_chart():
    assert report._charts([]) == report._charts([{"epoch": 1, "train_loss": math.nan}]) == []


def coloured(path, hue):
    """How many pixels have the colour of a curve (matplotlib's tab:blue, tab:orange, tab:green)."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int((np.abs(pixels - hue).sum(-1) < 20).sum())


def test_losses_png_draws_each_curve_that_has_values(tmp_path):
    history = [{"epoch": e, "train_loss": 2 / e, "val_loss": 2.2 / e, "CIDEr": e / 3} for e in (1, 2, 3)]
    report.save_curves(tmp_path / "losses.png", history)
    assert all(coloured(tmp_path / "losses.png", hue) > 500 for hue in ((31, 119, 180), (255, 127, 14), (44, 160, 44)))
    report.save_curves(tmp_path / "losses.png", [{"epoch": 1, "train_loss": 2.0}, {"epoch": 2, "train_loss": 1.0}])
    assert coloured(tmp_path / "losses.png", (31, 119, 180)) > 500
    assert coloured(tmp_path / "losses.png", (255, 127, 14)) == coloured(tmp_path / "losses.png", (44, 160, 44)) == 0


def test_losses_png_of_one_history_has_the_same_bytes_each_time_and_none_is_no_error(tmp_path):
    history = [{"epoch": 1, "train_loss": 2.0, "val_loss": None}]
    for name in ("a.png", "b.png"):
        report.save_curves(tmp_path / name, history)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    report.save_curves(tmp_path / "none.png", [])
    assert Image.open(tmp_path / "none.png").size == (1050, 600)
