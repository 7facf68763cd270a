import json

import pytest

import dataset
import prepare_annotations
from runtime.files import UserError

TRAIN = [
    {"id": "1", "label": "moving a ball up", "template": "Moving [something] up", "placeholders": ["a ball"]},
    {"id": "2", "label": "moving a cup down", "template": "Moving [something] down", "placeholders": ["a cup"]},
    {"id": "3", "label": "  ", "template": "Moving [something] down", "placeholders": []},
]


@pytest.fixture
def data(tmp_path):
    labels = tmp_path / "labels"
    labels.mkdir()
    (labels / "train.json").write_text(json.dumps(TRAIN))
    (labels / "validation.json").write_text(json.dumps([{**TRAIN[0], "id": "4"}]))
    (labels / "labels.json").write_text(json.dumps({"Moving something up": "0", "Moving something down": "1"}))
    (labels / "test-answers.csv").write_text("5;Moving a red box down\n6;Moving something up\n")
    paraphrases = {"1": ["a ball goes up", "moving a ball up", "up goes a <b>ball</b>\n"], "9": ["nothing"]}
    (tmp_path / "ssv2_paraphrase.json").write_text(json.dumps(paraphrases))
    return tmp_path


def test_the_label_comes_first_then_its_paraphrases_each_once(data, capsys):
    prepare_annotations.main(["--data", str(data)])
    train = json.loads((data / "annotations" / "train_ready.json").read_text())
    assert train == [
        {
            "id": "1",
            "label": ["moving a ball up", "a ball goes up", "up goes a <b>ball</b>"],
            "template": "Moving [something] up",
            "placeholders": ["a ball"],
        },
        {
            "id": "2",
            "label": ["moving a cup down"],
            "template": "Moving [something] down",
            "placeholders": ["a cup"],
        },
    ]
    validation = json.loads((data / "annotations" / "val_ready.json").read_text())
    assert [record["label"] for record in validation] == [["moving a ball up"]]
    said = capsys.readouterr().out
    assert "train_ready.json: 2 clips, 4 captions; 1 clips have none" in said and "no paraphrases" not in said


def test_the_test_split_is_read_out_of_its_answers(data):
    prepare_annotations.main(["--data", str(data)])
    test = json.loads((data / "annotations" / "test_ready.json").read_text())
    assert test[0]["label"] == ["Moving a red box down"] and test[0]["placeholders"] == ["a red box"]
    assert test[0]["template"].replace("[", "").replace("]", "") == "Moving something down"
    assert test[1]["placeholders"] == []  # SSv2's own answers name no objects


def test_which_paraphrases_were_taken_is_told(data, capsys, monkeypatch):
    monkeypatch.setattr(dataset, "ROOT", data / "root")
    monkeypatch.chdir(data / "labels")
    (data / "ssv2_paraphrase.json").rename(data / "labels" / "ssv2_paraphrase.json")
    prepare_annotations.main(["--data", str(data)])
    assert "2 clips, 4 captions" in (said := capsys.readouterr().out)
    assert said.endswith("1 files of paraphrases, of 2 clips by id, were taken: ssv2_paraphrase.json\n")
    (data / "labels" / "ssv2_paraphrase.json").unlink()
    prepare_annotations.main(["--data", str(data)])
    assert "no paraphrases were found" in capsys.readouterr().out


def test_a_rehearsal_takes_the_clips_that_preprocessing_takes(data, capsys):
    (data / "labels" / "test.json").write_text(json.dumps([{"id": "6"}, {"id": "7"}, {"id": "5"}]))
    prepare_annotations.main(["--data", str(data), "--limit", "1"])
    assert "run this again without --limit" in capsys.readouterr().out
    assert [[r["id"] for r in dataset.read_ready(data, split)] for split in dataset.SPLITS] == [["1"], ["4"], ["6"]]
    prepare_annotations.main(["--data", str(data)])
    assert [len(dataset.read_ready(data, split)) for split in dataset.SPLITS] == [2, 1, 2]


def test_mistakes_are_named_and_nothing_is_written(data):
    (data / "labels" / "validation.json").write_text("[{")
    with pytest.raises(UserError, match="the validation labels: .* not valid JSON"):
        prepare_annotations.main(["--data", str(data)])
    with pytest.raises(UserError, match="the paraphrases"):
        prepare_annotations.main(["--data", str(data), "--paraphrases", str(data / "none")])
    assert not (data / "annotations").exists()


def test_labels_without_any_caption_are_refused_and_replace_nothing(data):
    prepare_annotations.main(["--data", str(data)])
    before = (data / "annotations" / "val_ready.json").read_text()
    (data / "labels" / "validation.json").write_text(json.dumps([{"id": "4"}]))  # as the test split's are
    with pytest.raises(UserError, match="the validation labels hold no clip with a caption"):
        prepare_annotations.main(["--data", str(data)])
    assert (data / "annotations" / "val_ready.json").read_text() == before
