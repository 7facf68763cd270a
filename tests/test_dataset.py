import json
import multiprocessing
import re
import time

import pytest
import torch

import dataset
from features import cache, reader
from runtime.distributed import DistributedContext
from runtime.files import UserError
from tests import tiny


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
        ({"id": 1}, "holds no clips .it is to be a list of records"),
        ([1], "holds no clips"),
        ([], "holds no clips"),
        ([{"label": "x"}], "the clip id None is not a plain name"),
        ([{"id": 1}, {"id": "1"}], "the clip 1 is there twice"),
        ([{"id": 1, "template": 3}], "template or the placeholders of clip 1"),
        ([{"id": 1, "placeholders": [3]}], "template or the placeholders of clip 1"),
    ],
)
def test_labels_of_another_form_are_plain_errors(tmp_path, content, message):
    write(tmp_path / "labels" / "train.json", content)
    with pytest.raises(UserError, match=message):
        dataset.read_split(tmp_path, "train")


def test_no_dataset_and_no_labels_say_what_to_do(tmp_path):
    with pytest.raises(UserError, match="give --data"):
        dataset.read_split(tmp_path / "none", "train")
    with pytest.raises(UserError, match="download SSv2's labels"):
        dataset.read_split(tmp_path, "train")


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


def paraphrases(data, path=None):
    return dataset.read_paraphrases(dataset.paraphrase_files(path, dataset.Layout(data)))


def test_paraphrases_of_one_file_a_folder_or_published_parts_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "ROOT", tmp_path / "root")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    first, second = {"1": ["a", "b"]}, {"2": ["c"], "1": ["d"]}
    expected = {"1": ["a", "b", "d"], "2": ["c"]}
    write(tmp_path / "x" / "train" / "ssv2_paraphrase_train_0.json", first)
    write(tmp_path / "x" / "train" / "ssv2_paraphrase_train_1.json", second)
    assert paraphrases(tmp_path / "x") == expected
    assert paraphrases(tmp_path, tmp_path / "x" / "train") == expected
    write(tmp_path / "y" / "ssv2_paraphrase.json", expected)
    assert paraphrases(tmp_path / "y") == expected
    write(tmp_path / "z" / "ssv2_paraphrase" / "0.json", expected)
    assert paraphrases(tmp_path / "z") == expected
    assert paraphrases(tmp_path) == {}
    with pytest.raises(UserError, match="no file or folder"):
        paraphrases(tmp_path, tmp_path / "none")


@pytest.mark.parametrize("name", ["ssv2_paraphrase.json", "ssv2_paraphrase_train_3.json", "ssv2_paraphrase/3.json"])
def test_paraphrases_are_found_where_the_published_instructions_put_them_and_for_ssv2_only(tmp_path, monkeypatch, name):
    monkeypatch.setattr(dataset, "ROOT", tmp_path / "root")
    (tmp_path / "data").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write(tmp_path / "root" / name, {"1": ["beside the scripts"]})
    assert paraphrases(tmp_path / "data") == {"1": ["beside the scripts"]}
    write(tmp_path / "here" / name, {"1": ["here"]})
    assert paraphrases(tmp_path / "data") == {"1": ["here"]}
    write(tmp_path / "data" / name, {"1": ["in the data set"]})
    assert paraphrases(tmp_path / "data") == {"1": ["in the data set"]}
    # Other data sets have a clip 1, too.
    for marker in ("sample.json", "labels/videos.json"):
        write(tmp_path / marker[:3] / marker, {"folder": None, "clips": {}})
        assert paraphrases(tmp_path / marker[:3]) == {}


def test_captions_are_drawn_by_run_epoch_and_clip_alone():
    record = {"id": "5", "label": [f"caption {n}" for n in range(14)]}
    drawn = dataset.draw_captions(record, 4, seed=1, epoch=2)
    assert drawn == dataset.draw_captions(dict(record), 4, seed=1, epoch=2) and len(set(drawn)) == 4
    others = [dataset.draw_captions(record, 1, seed=1, epoch=epoch)[0] for epoch in range(40)]
    assert len(set(others)) > 8
    assert sorted(dataset.draw_captions({"id": "5", "label": ["x", "y", "x"]}, 4, 0, 0)) == ["x", "y"]


def test_captions_are_one_line_without_control_characters():
    assert dataset.clean(" a\nb\x00c\x1b[31m  d ") == "a b c [31m d"


# ---- cached features, in batches ----


def stacked(clips, ids):
    parts = zip(*(clips[i] for i in ids), strict=True)
    return [None if part[0] is None else torch.stack(part) for part in parts]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_batches_come_in_order_and_equal_to_the_files(tmp_path, dtype, workers):
    clips = tiny.fill_cache(tmp_path, 23, dtype)
    torch.save(torch.nn.Parameter(clips["1"].values), tmp_path / "1.pt") if dtype != "int8" else None
    torch.save(clips["2"].values[None].clone(), tmp_path / "2.pt") if dtype != "int8" else None  # as published
    wanted = [["3", "1"], ["22"], ["5", "5", "0"]] + [[str(i), str(22 - i)] for i in range(23)]
    for ids, batch in zip(wanted, reader.feature_batches(tmp_path, wanted, workers), strict=True):
        for ours, theirs in zip(batch, stacked(clips, ids), strict=True):
            assert ours is theirs is None or torch.equal(ours, theirs)


def test_no_batches_are_none_and_start_nothing(tmp_path):
    assert list(reader.feature_batches(tmp_path, [])) == []


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batches", [[["0", "odd"]], [["0"], ["1"], ["odd"]]])
def test_two_sizes_of_features_are_refused_with_both_named(tmp_path, batches, workers):
    tiny.fill_cache(tmp_path, 2)
    cache.save(tmp_path / "odd.pt", cache.quantize(tiny.tokens(12, 8), "float16"))
    with pytest.raises(UserError, match=r"0.pt is 16x8 float16, \S*odd.pt is 12x8 float16"):
        list(reader.feature_batches(tmp_path, batches, workers))


def test_a_float_and_an_int8_file_do_not_mix(tmp_path):
    tiny.fill_cache(tmp_path, 1)
    cache.save(tmp_path / "int8.pt", cache.quantize(tiny.tokens(16, 8), "int8"))
    with pytest.raises(UserError, match="two kinds"):
        list(reader.feature_batches(tmp_path, [["0", "int8"]]))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_file_far_ahead_is_raised_in_one_line_when_its_batch_is_due(tmp_path, damage, workers):
    tiny.fill_cache(tmp_path, 6)
    if damage == "missing":
        (tmp_path / "5.pt").unlink()
    else:
        (tmp_path / "5.pt").write_bytes((tmp_path / "5.pt").read_bytes()[:-30])
    got = 0
    with pytest.raises(FileNotFoundError if damage == "missing" else UserError, match=r"5.pt") as error:
        for batch in reader.feature_batches(tmp_path, [[str(i)] for i in range(6)], workers):
            got += len(batch.values)
    assert got == 5 and "\n" not in str(error.value)
    assert not multiprocessing.active_children()


def test_leaving_early_ends_the_workers_at_once(tmp_path):
    tiny.fill_cache(tmp_path, 1)
    batches = reader.feature_batches(tmp_path, [["0"]] * 100, workers=2)
    next(batches)
    began = time.monotonic()
    batches.close()
    assert time.monotonic() - began < 3 and not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_leaves_the_random_numbers_of_dropout_alone(tmp_path, workers):
    tiny.fill_cache(tmp_path, 1)
    before = torch.get_rng_state()
    list(reader.feature_batches(tmp_path, [["0"]] * 3, workers))
    assert torch.equal(torch.get_rng_state(), before)


# ---- an epoch's plan ----


def test_an_epochs_plan_holds_every_clip_once_and_distinct_captions():
    records = [{"id": str(clip), "label": [f"{clip} {n}" for n in range(clip % 4 + 1)]} for clip in range(21)]
    steps = dataset.plan_epoch(records, batch_size=4, accumulate=3, captions_per_clip=3, seed=0, epoch=0)
    drawn = [clip for step in steps for batch in step for clip in batch]
    assert sorted(clip_id for clip_id, _ in drawn) == sorted(record["id"] for record in records)
    assert [len(step) for step in steps] == [3, 3]
    for clip_id, captions in drawn:
        assert len(set(captions)) == len(captions) == min(3, int(clip_id) % 4 + 1)
    assert dataset.plan_epoch(records[::-1], 4, 3, 3, seed=0, epoch=0) == steps  # whatever the file's order
    assert dataset.plan_epoch(records, 4, 3, 3, seed=0, epoch=1) != steps


# ---- clips without features ----


def test_clips_without_features_are_counted_and_refused_beyond_what_is_allowed(tmp_path, capsys):
    layout = dataset.Layout(tiny.make_dataset(tmp_path / "my data"))
    (layout.features / "train" / "3.pt").unlink()
    found = dataset.usable_records(layout, "train", 10.0, DistributedContext())
    assert [record["id"] for record in found] == ["1", "2", *map(str, range(4, 11))]
    assert capsys.readouterr().out == "train: 1 clips have no features and are left out\n"
    with pytest.raises(UserError, match=r"1 of 10 train clips have no features .*first is 3.*--max-missing") as error:
        dataset.usable_records(layout, "train", 9.0, DistributedContext())
    assert f"--data '{layout.data}' --splits train --encoder tiny-encoder --num-frames 4" in str(error.value)
    (why := layout.features / "train" / "failures.jsonl").touch()
    with pytest.raises(UserError, match=f"--max-missing, or read {re.escape(str(why))}"):
        dataset.usable_records(layout, "train", 9.0, DistributedContext())


def test_a_split_without_any_features_names_the_command_that_makes_them_like_the_others(tmp_path):
    layout = dataset.Layout(tiny.make_dataset(tmp_path / "data"))
    made = {**tiny.features_config("other").to_dict(), "crop": True, "pool": 2, "dtype": "int8"}
    for path in layout.features.glob("validation/*.pt"):
        path.unlink()
    with pytest.raises(UserError, match="all 5 validation clips have no features") as error:
        dataset.usable_records(layout, "validation", 100.0, DistributedContext(), made)
    assert "--splits validation --encoder tiny-encoder --num-frames 4" in str(error.value)  # the folder's own
    assert "--max-missing" not in str(error.value)
    (layout.features / "config.json").unlink()
    with pytest.raises(UserError, match="--encoder other --num-frames 4 --crop --dtype int8 --pool 2"):
        dataset.usable_records(layout, "validation", 100.0, DistributedContext(), made)
    with pytest.raises(UserError, match=r"--splits validation$"):
        dataset.usable_records(layout, "validation", 100.0, DistributedContext())
