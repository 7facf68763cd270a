import json

import pytest

import dataset
from runtime.files import UserError


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


@pytest.mark.parametrize("bad", ["../x", "a/b", "", ".hidden", "a\\b", "x\n", "a" * 200, None, True, 1.5, ["x"]])
def test_ids_that_could_leave_the_folder_are_refused(tmp_path, bad):
    write(tmp_path / "labels" / "train.json", [{"id": bad, "label": "x"}])
    with pytest.raises(UserError, match="not a plain name"):
        dataset.read_split(tmp_path, "train")


def test_ids_may_be_numbers_or_names(tmp_path):
    write(tmp_path / "labels" / "train.json", [{"id": 7}, {"id": "clip_8-b.2"}])
    assert [record["id"] for record in dataset.read_split(tmp_path, "train")] == ["7", "clip_8-b.2"]


def test_older_file_names_are_read(tmp_path):
    write(tmp_path / "labels" / "something-something-v2-validation.json", [{"id": "1"}])
    assert dataset.read_split(tmp_path, "validation") == [{"id": "1"}]


@pytest.mark.parametrize(
    "content, message",
    [
        ("{not json", "not valid JSON"),
        ({"id": 1}, "not a list of records"),
        ([1], "not a list of records"),
        ([], "holds no clips"),
        ([{"label": "x"}], "record 0 has no id"),
        ([{"id": 1}, {"id": "1"}], "the clip 1 is there twice"),
        ([{"id": 1, "template": 3}], "template of clip 1"),
        ([{"id": 1, "placeholders": [3]}], "placeholders of clip 1"),
    ],
)
def test_labels_of_another_form_are_plain_errors(tmp_path, content, message):
    write(tmp_path / "labels" / "train.json", content)
    with pytest.raises(UserError, match=message):
        dataset.read_split(tmp_path, "train")


def test_no_dataset_no_labels_and_unknown_splits_say_what_to_do(tmp_path):
    with pytest.raises(UserError, match="give --data"):
        dataset.read_split(tmp_path / "none", "train")
    with pytest.raises(UserError, match="download SSv2's labels"):
        dataset.read_split(tmp_path, "train")
    with pytest.raises(UserError, match="SSv2 has train, validation, test"):
        dataset.read_split(tmp_path, "dev")


def test_a_video_is_found_as_webm_or_mp4(tmp_path):
    layout = dataset.Layout(tmp_path)
    layout.videos.mkdir()
    (layout.videos / "1.mp4").touch()
    assert layout.video("1").name == "1.mp4" and layout.video("2") is None
    (layout.videos / "1.webm").touch()
    assert layout.video("1").name == "1.webm"


def test_templates_come_in_the_order_of_their_numbers(tmp_path):
    write(tmp_path / "labels" / "labels.json", {"b": "10", "a": "9", "c": 0})
    assert dataset.read_templates(tmp_path) == ["c", "a", "b"]


def test_answers_are_split_at_the_first_semicolon_and_cleaned(tmp_path):
    write(tmp_path / "labels" / "test-answers.csv", '1;Moving  a ball\x1b up\n2;Showing a "cup"; again\n')
    assert dataset.read_answers(tmp_path) == {"1": "Moving a ball up", "2": 'Showing a "cup"; again'}
    assert dataset.read_answers(tmp_path / "labels") == {"1": "Moving a ball up", "2": 'Showing a "cup"; again'}


def test_paraphrases_of_one_file_a_folder_or_published_parts_are_the_same(tmp_path):
    first, second = {"1": ["a", "b"]}, {"2": ["c"], "1": ["d"]}
    expected = {"1": ["a", "b", "d"], "2": ["c"]}
    write(tmp_path / "x" / "train" / "ssv2_paraphrase_train_0.json", first)
    write(tmp_path / "x" / "train" / "ssv2_paraphrase_train_1.json", second)
    assert dataset.read_paraphrases(None, tmp_path / "x") == expected
    assert dataset.read_paraphrases(tmp_path / "x" / "train") == expected
    write(tmp_path / "y" / "ssv2_paraphrase.json", expected)
    assert dataset.read_paraphrases(None, tmp_path / "y") == expected
    write(tmp_path / "z" / "ssv2_paraphrase" / "0.json", expected)
    assert dataset.read_paraphrases(None, tmp_path / "z") == expected
    assert dataset.read_paraphrases(None, tmp_path / "none") == {}
    with pytest.raises(UserError, match="no file or folder"):
        dataset.read_paraphrases(tmp_path / "none")


def test_captions_are_drawn_by_run_epoch_and_clip_alone():
    record = {"id": "5", "label": [f"caption {n}" for n in range(14)]}
    drawn = dataset.draw_captions(record, 4, seed=1, epoch=2)
    assert drawn == dataset.draw_captions(dict(record), 4, seed=1, epoch=2) and len(set(drawn)) == 4
    others = [dataset.draw_captions(record, 1, seed=1, epoch=epoch)[0] for epoch in range(40)]
    assert len(set(others)) > 8
    assert sorted(dataset.draw_captions({"id": "5", "label": ["x", "y", "x"]}, 4, 0, 0)) == ["x", "y"]


def test_captions_are_one_line_without_control_characters():
    assert dataset.clean(" a\nb\x00c\x1b[31m  d ") == "a b c [31m d"
