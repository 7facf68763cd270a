"""Files from strangers: labels that would drive a page or a terminal, ids that would leave the folder, live pickles.

Damage at random is in fuzz/test_fuzz.py, each page's own escapes in evaluation/test_report.py.
"""

import json
import os
import shutil
from html.parser import HTMLParser

import pytest
import torch

import evaluate
import prepare_annotations
import train
from runtime import files
from runtime.files import UserError
from tests import tiny

NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)> {{7*7}} \x1b[2J\x1b]0;x\x07 \x00 \u202e \ud800"


@pytest.fixture(autouse=True)
def no_java(monkeypatch):
    """Which takes a second a call."""
    found = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, *more: None if name == "java" else found(name, *more))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny.save_lm(tmp_path_factory.mktemp("models") / "lm")


def run_all(data, models, out):
    """prepare, train and evaluate."""
    prepare_annotations.main(["--data", str(data)])
    words = f"--data {data} --checkpoint {out}/checkpoint.pt --max-new-tokens 5 --results {out}/"
    train.main([*f"{words}trained --llm {models} --num-queries 4 --epochs 1 --lr 1e-3".split()])
    evaluate.main([*f"{words}evaluated --no-meteor --grounding --actions".split()])


def spoil_labels(data):
    """Every text of the annotations ends in what would harm a page, a terminal or a JSON file."""
    labels = data / "labels"
    templates = {f"{template} {NASTY}": number for template, number in tiny.TEMPLATES.items()}
    (labels / "labels.json").write_text(json.dumps(templates))
    for name in ("train.json", "validation.json"):
        records = json.loads((labels / name).read_text())
        for record in records:
            record["label"] += NASTY
            record["template"] += f" {NASTY}"
            record["placeholders"] = [word + NASTY for word in record["placeholders"]]
        (labels / name).write_text(json.dumps(records))
    paraphrases = {str(clip): [NASTY, f"a clip{NASTY}"] for clip in range(1, 11)} | {f"../../{NASTY}": ["x"]}
    (data / "ssv2_paraphrase.json").write_text(json.dumps(paraphrases))


class Tags(HTMLParser):
    """The elements of a page with the names of their attributes, and its scripts' content."""

    def __init__(self, page):
        super().__init__()
        self.found, self.data, self.inside = [], {}, None
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, sorted(name for name, _ in attributes)))
        self.inside = dict(attributes).get("id") if tag == "script" else None

    def handle_data(self, data):
        if self.inside:
            self.data[self.inside] = json.loads(data)
        self.inside = None


def strict(text):
    """JSON without NaN and infinities, which are not JSON."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_labels_cannot_break_json_page_or_terminal(models, tmp_path, capfd):
    plain, nasty = tiny.make_dataset(tmp_path / "plain"), tiny.make_dataset(tmp_path / "nasty")
    run_all(plain, models, tmp_path / "of-plain")
    capfd.readouterr()
    spoil_labels(nasty)
    run_all(nasty, models, tmp_path / "of-nasty")
    said = "".join(capfd.readouterr())
    assert not [c for c in said if not c.isprintable() and c not in "\n\r"]
    result = strict((tmp_path / "of-nasty" / "evaluated" / "evaluation.json").read_text(encoding="utf-8"))
    captions = [text for row in result["predictions"] for text in row["references"]]
    for file in (nasty / "annotations").iterdir():
        captions += [text for record in strict(file.read_text(encoding="utf-8")) for text in record["label"]]
    assert captions and all(text.isprintable() and "alert(1)" in text for text in captions)
    strict((tmp_path / "of-nasty" / "trained" / "validation_epoch_1.json").read_text(encoding="utf-8"))
    for page in ("evaluated/index.html", "trained/training/index.html"):
        of_nasty, of_plain = Tags(tmp_path / "of-nasty" / page), Tags(tmp_path / "of-plain" / page)
        for tag in ("script", "img", "iframe", "object", "style", "link", "base", "form"):
            assert sum(found == tag for found, _ in of_nasty.found) == sum(found == tag for found, _ in of_plain.found)
        assert not [name for _, names in of_nasty.found for name in names if name.startswith("on")]
        assert "alert(1)" in json.dumps(of_nasty.data["data"])  # it is there, as text


@pytest.mark.parametrize("name", ["labels/train.json", "labels/validation.json", "labels/test-answers.csv"])
@pytest.mark.parametrize("bad", ["../../x", "..", "/etc/passwd", "a/../../b", "~", "x\n"])
def test_ids_that_would_leave_the_folder_are_refused_by_every_script(models, tmp_path, name, bad):
    data = tiny.make_dataset(tmp_path / "data")
    before = sorted(tmp_path.rglob("*"))
    if name.endswith("csv"):
        (data / name).write_text(f'"{bad}";moving a ball up\n')
        before = sorted([*before, data / name])
        if bad == "x\n":
            return  # the table's own line end
    else:
        spoil_id(data / name, bad)
    with pytest.raises(UserError, match="is not a plain name"):
        prepare_annotations.main(["--data", str(data)])
    words = f"--data {data} --checkpoint {tmp_path}/c.pt --results {tmp_path}/r".split()
    for ready in ("train_ready.json", "val_ready.json"):
        spoil_id(data / "annotations" / ready, bad)
    for main, more in ((train.main, ["--llm", str(models)]), (evaluate.main, [])):
        with pytest.raises(UserError, match="is not a plain name"):
            main([*words, *more])
    assert sorted(tmp_path.rglob("*")) == before


def spoil_id(path, bad):
    records = json.loads(path.read_text())
    records[2]["id"] = bad
    path.write_text(json.dumps(records))


class Bomb:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("script", ["train", "evaluate"])
@pytest.mark.parametrize("place", ["features/train/3.pt", "features/validation/12.pt", "checkpoint.pt"])
def test_a_pickle_that_acts_is_refused_and_does_not_act(models, tmp_path, script, place):
    data = tiny.make_dataset(tmp_path / "data")
    words = f"--data {data} --checkpoint {data}/checkpoint.pt --results {tmp_path}/out --max-new-tokens 3".split()
    training = [*words, "--llm", str(models), "--num-queries", "4", "--epochs"]
    train.main([*training, "1"])
    read = script == "train" or place in ("features/validation/12.pt", "checkpoint.pt")
    good = torch.load(data / place, weights_only=True)
    for bomb in ({"values": good, "scales": Bomb(tmp_path / "ran")}, [good, Bomb(tmp_path / "ran")]):
        torch.save(bomb, data / place)
        if read:
            with pytest.raises(UserError, match=f"{place} is damaged, or holds more than .*nothing in it was run"):
                train.main([*training, "2"]) if script == "train" else evaluate.main(words)
        assert not (tmp_path / "ran").exists()
    torch.load(data / place, weights_only=False)
    assert (tmp_path / "ran").exists()  # the pickle was a live one


def test_what_a_page_says_is_where_it_was_said(models, tmp_path):
    """Results cannot be sent elsewhere by a clip's id or a link in its place."""
    data = tiny.make_dataset(tmp_path / "data")
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "validation_epoch_1.json").symlink_to(tmp_path / "elsewhere")
    words = f"--data {data} --checkpoint {tmp_path}/c.pt --results {tmp_path}/results --llm {models} --num-queries 4"
    train.main([*words.split(), "--epochs", "1", "--max-new-tokens", "3"])
    assert (tmp_path / "elsewhere").read_text() == "mine"  # the link was replaced, not followed
    files.read_json(tmp_path / "results" / "validation_epoch_1.json", "it")
