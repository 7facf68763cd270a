"""Names, splits and mistakes in a captions file of the user's own data."""

import json
import os
from pathlib import Path

import pytest

import dataset
import infer
import prepare_annotations
from runtime.files import UserError
from tests.own_data import captions_file, own, prepare, ready, touch

# ---- names, ids, places ----


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("a", "a.mp4"),
        ("A.MP4", "a.mp4"),
        ("a.avi", "a.mp4"),
        ("films/a.mp4", "a.mp4"),
        ("./deep\\Mr. X.webm", "deep/Mr. X.webm"),
        ("Mr. X", "deep/Mr. X.webm"),
        (" e\u0301te\u0301 ", "\u00e9t\u00e9.MOV"),
        ("1.5", "1.5.mkv"),
        ("recording.vid", "recording.vid"),
    ],
)
def test_a_name_means_the_video_that_a_reader_would_take(tmp_path, name, place):
    layout = own(
        tmp_path,
        [(name, ["x"], "train")],
        ["a.mp4", "deep/Mr. X.webm", "\u00e9t\u00e9.MOV", "1.5.mkv", "recording.vid"],
    )
    (clip_id,) = ready(layout.data, "train")
    assert layout.source(clip_id) == place and layout.video(clip_id).samefile(tmp_path / "films" / place)


def test_an_absolute_path_is_a_name_too(tmp_path):
    layout = own(tmp_path, [(str(tmp_path / "films" / "a b.mp4"), ["x"], "train")], ["a b.mp4"])
    assert list(layout.own["clips"].values()) == ["a b.mp4"]


def test_a_name_that_fits_two_videos_is_refused_and_its_folder_tells_them_apart(tmp_path):
    with pytest.raises(UserError, match=r"'a' fits one/a.mp4, two/a.mp4: name it with its folder"):
        own(tmp_path, [("a", ["x"], "train")], ["one/a.mp4", "two/a.mp4"])
    assert not (tmp_path / "mine" / "labels").exists()
    layout = own(tmp_path, [("one/a", ["x"], "train"), ("two/a.mp4", ["y"], "train")], [])
    first, second = ready(layout.data, "train")
    assert (first, layout.source(first), layout.source(second)) == ("a", "one/a.mp4", "two/a.mp4")
    assert second.startswith("a-")


def test_a_whole_name_comes_before_one_that_lacks_its_suffix(tmp_path):
    names = ["a.mp4", "a.mp4.webm", "b", "b.mp4"]
    layout = own(tmp_path, [(name, [f"caption of {name}"], "train") for name in names])
    said = {layout.source(clip_id): texts for clip_id, texts in ready(layout.data, "train").items()}
    assert said == {name: [f"caption of {name}"] for name in names}


def test_ids_are_safe_readable_each_ones_own_and_stay_when_clips_come_and_go(tmp_path):
    rows = [(name, ["x"], "train") for name in ("plain_1.mp4", "une idée.mp4", "日本.mp4", ".5.mp4", "sub/B.mp4")]
    before = own(tmp_path, [row for row in rows if row[0] != ".5.mp4"]).own["clips"]
    assert all(dataset.SAFE_ID.fullmatch(clip_id) for clip_id in before)
    shown = {place: clip_id for clip_id, place in before.items()}
    assert shown["plain_1.mp4"] == "plain_1" and shown["sub/B.mp4"] == "B"
    assert shown["une idée.mp4"].startswith("une_idee-") and shown["日本.mp4"].startswith("clip-")
    more = [("a/plain_1.mp4", ["y"], "train"), ("b.mp4", ["z"], "train"), *rows[1:3]]
    layout = own(tmp_path, more)
    after = layout.own["clips"]
    assert before.items() <= after.items() and len({clip_id.casefold() for clip_id in after}) == len(after) == 6
    # sub/B.mp4 and plain_1.mp4 have no captions now, and their ids stay theirs; b.pt would be B.pt on many disks.
    assert set(ready(layout.data, "train")) == {
        i for i, place in after.items() if place in dict((n, 0) for n, *_ in more)
    }
    assert not {"B", "b", "plain_1"} & set(ready(layout.data, "train"))


def test_the_folder_moves_together_with_its_videos_and_another_drive_is_named_whole(tmp_path, monkeypatch):
    own(tmp_path / "here", [("my clip.mp4", ["x"], "train")])
    assert json.loads((tmp_path / "here/mine/labels/videos.json").read_text())["folder"] == "../../films"
    (tmp_path / "here").rename(tmp_path / "there")
    layout = dataset.Layout(tmp_path / "there" / "mine")
    assert layout.video(*ready(layout.data, "train")).samefile(tmp_path / "there" / "films" / "my clip.mp4")

    def relpath(*_):
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr(os.path, "relpath", relpath)
    layout = own(tmp_path / "there", [("my clip.mp4", ["x"], "train")])
    assert Path(layout.own["folder"]).is_absolute() and layout.video(*ready(layout.data, "train")).is_file()


# ---- splits ----


def test_a_tenth_each_is_drawn_for_validation_and_test_by_the_seed():
    draw, ids = prepare_annotations.draw_splits, [f"clip{i}" for i in range(200)]
    for count, expected in ((200, [160, 20, 20]), (30, [24, 3, 3]), (3, [1, 1, 1]), (2, [1, 1, 0]), (1, [1, 0, 0])):
        drawn = draw(ids[:count], [], 0)
        assert [list(drawn.values()).count(split) for split in dataset.SPLITS] == expected
        assert drawn == draw(ids[:count][::-1], [], 0)
    assert draw(ids, [], 1) != draw(ids, [], 0) and draw([], ["train"], 0) == {}
    assert draw(["new"], ["train"] * 9 + ["validation"], 0) == {"new": "test"}
    assert draw(["new"], ["train"] * 8 + ["validation", "test"], 0) == {"new": "train"}


def test_splits_as_given_in_many_words_and_drawn_where_there_is_none(tmp_path):
    words = ["Train", "VAL", "validate", "dev", " test ", "testing", ""]
    layout = own(tmp_path, [(f"{i}.mp4", ["x"], word) for i, word in enumerate(words)])
    found = {clip_id: split for split in dataset.SPLITS for clip_id in ready(layout.data, split)}
    assert [found[str(i)] for i in range(6)] == ["train", "validation", "validation", "validation", "test", "test"]
    assert found["6"] in dataset.SPLITS


def test_a_split_without_clips_is_told_and_what_asks_for_it_says_so(tmp_path, capsys):
    own(tmp_path, [("a.mp4", ["x"], "train"), ("b.mp4", ["y"], "val"), ("c.mp4", ["z"], "test")])
    layout = own(tmp_path, [("a.mp4", ["x"], "train"), ("b.mp4", ["y"], "val")])
    assert "no clip is in the test split" in capsys.readouterr().out
    assert layout.splits == ["train", "validation"] and not (layout.annotations / "test_ready.json").exists()
    with pytest.raises(UserError, match="mine has no .*test.json: its clips are all of train and validation"):
        dataset.read_ready(layout.data, "test")
    with pytest.raises(UserError, match="mine has no .*test.json"):
        infer.choose_test_clips(layout.data, 1, 0)


# ---- mistakes ----


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.csv", "a.mp4,moving a cup\n", "begins with 'a.mp4,moving a cup', not with the header; it is to be a CSV"),
        ("c.csv", "video,caption\na.mp4,one, two\n", "line 2 has too many fields: quote captions that hold ','"),
        ("c.csv", 'video,caption\nb.mp4,x\na.mp4,"moving\n', "the row after line 2: unexpected end of data"),
        ("c.csv", "video,caption,split\na.mp4,x,holdout\n", "'a.mp4' is of the split 'holdout'; use train"),
        ("c.csv", "video,caption,split\na.mp4,x,train\na,y,test\n", "'a' is in two splits, train and test"),
        ("c.csv", "video,caption\na.mp4,caf\xe9\n".encode("latin-1"), "is not UTF-8 .*Excel's name is 'CSV UTF-8'"),
        ("c.csv", "video,caption\na.mp4,x\n".encode("utf-16"), "is not UTF-8"),
        ("c.csv", "", "begins with '', not with the header"),
        ("c.csv", "video,caption,caption\na.mp4,x,y\n", "begins with 'video,caption,caption', not with the header"),
        ("c.csv", "video,caption\n", "holds no captions"),
        (
            "c.csv",
            "video,caption\nz.mp4,x\n",
            "all captions are empty, or of clips without a video in .*films, as 'z.mp4'",
        ),
        ("c.csv", "video,caption\na.mp4,\n", "all captions are empty"),
        ("c.json", "{", "c.json: Expecting .*; it is to be a CSV"),
        ("c.json", '{"a": 3}', "captions that are not text"),
        ("c.json", '{"a": {"caption": "x"}}', "captions that are not text"),
        ("c.json", '{"a": ["x"], "a": ["y"]}', "'a' is there twice"),
        ("c.json", '{"videos": [{}], "sentences": [{"video_id": "a"}]}', "an entry has no 'video_id'; it is to be"),
        (
            "labels.json",
            '[{"id": "1", "label": "moving a cup up", "template": "x"}]',
            "Something-Something V2's own labels",
        ),
        ("none.csv", None, "there is no file .*none.csv"),
    ],
)
def test_mistakes_in_a_captions_file_are_one_line_and_write_nothing(tmp_path, name, content, message):
    folder = touch(tmp_path / "films", "a.mp4")
    if content is not None:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=message) as error:
        prepare(tmp_path / "mine", "--videos", folder, "--captions", tmp_path / name)
    assert "\n" not in str(error.value) and str(error.value).count("it is to be") < 2
    assert not (tmp_path / "mine" / "labels").exists()


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_as_programs_write_it(tmp_path, delimiter):
    rows = [
        " Video ;CAPTION;more;Split",
        'a.mp4;"one; two";;train',
        'a; "a ""red"" cup";1;',
        "",
        ";;;",
        "b.mp4;it's fine;2;val",
    ]
    text = "\r\n".join(row if ";" in row and '"' not in row else row for row in rows)
    text = text.replace("one; two", "one@ two").replace(";", delimiter).replace("@", delimiter)
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    layout = prepare(
        tmp_path / "mine", "--videos", touch(tmp_path / "f", "a.mp4", "b.mp4"), "--captions", tmp_path / "c.txt"
    )
    assert ready(layout.data, "train") == {"a": [dataset.clean(f"one{delimiter} two"), 'a "red" cup']}
    assert ready(layout.data, "validation") == {"b": ["it's fine"]}


def test_msr_vtt_without_its_list_of_videos_has_no_splits(tmp_path):
    said = [{"video_id": name, "caption": f"clip {name}", "sen_id": 0} for name in "abc"]
    (tmp_path / "c.json").write_text(json.dumps({"sentences": said}))
    folder = touch(tmp_path / "films", "a.mp4", "b.mp4", "c.mp4")
    layout = prepare(tmp_path / "mine", "--videos", folder, "--captions", tmp_path / "c.json")
    found = [ready(layout.data, split) for split in dataset.SPLITS]
    assert [len(clips) for clips in found] == [1, 1, 1]
    assert found[0] | found[1] | found[2] == {name: [f"clip {name}"] for name in "abc"}


def test_a_json_of_plain_strings_and_two_files_at_once(tmp_path):
    (tmp_path / "1.json").write_text('{"a": "one", "b": ["two"]}')
    (tmp_path / "2.json").write_text('{"sentences": ["a clip of this name"], "c": ["four"]}')
    folder = touch(tmp_path / "films", "a.mp4", "b.mp4", "c.mp4", "sentences.mp4")
    layout = prepare(tmp_path / "mine", "--videos", folder, "--captions", tmp_path / "1.json", tmp_path / "2.json")
    assert {i: texts for split in dataset.SPLITS for i, texts in ready(layout.data, split).items()} == {
        "a": ["one"], "b": ["two"], "c": ["four"], "sentences": ["a clip of this name"]
    }  # fmt: skip


def test_what_is_left_out_is_told(tmp_path, capsys):
    rows = [
        ("a.mp4", ["x", "x", " "], "train"),
        ("b.mp4", [""], "train"),
        *[(f"gone{i}", ["y"], "val") for i in range(7)],
    ]
    layout = own(tmp_path, rows, ["a.mp4", "b.mp4", "c.mp4"])
    said = capsys.readouterr().out
    films = tmp_path / "films"
    assert (
        f"7 clips of the captions are without a video in {films}, and left out: gone0, gone1, gone2, gone3, gone4, ..."
        in said
    )
    assert "1 videos have no captions, and are left out: c.mp4\n" in said
    assert "3 captions are empty or a clip's twice, and are left out\n" in said
    assert "1 clips have empty captions only, and are left out: b.mp4\n" in said
    assert ready(layout.data, "train") == {"a": ["x"]}


def test_videos_and_captions_belong_together_and_want_a_folder(tmp_path):
    path = captions_file(tmp_path / "c.csv", "csv", [("a.mp4", ["x"], "train")])
    with pytest.raises(UserError, match="--videos needs --captions FILE, a CSV with the header"):
        prepare(tmp_path / "mine", "--videos", tmp_path)
    with pytest.raises(UserError, match="name a folder for it, as in --data data/mine"):
        prepare_annotations.main(["--videos", str(tmp_path), "--captions", str(path)])
    for folder, said in ((tmp_path / "none", "no such folder"), (tmp_path, "no video in this folder")):
        with pytest.raises(UserError, match=f"--videos {folder}: there is {said}"):
            prepare(tmp_path / "mine", "--videos", folder, "--captions", path)


@pytest.mark.parametrize("kind", ["SSv2's labels", "older names", "videos only", "sample"])
def test_another_data_set_is_never_written_over(tmp_path, kind):
    data, name = tmp_path / "data", "something-something-v2-train.json" if kind == "older names" else "train.json"
    if kind == "videos only":
        (data / "20bn-something-something-v2").mkdir(parents=True)
    else:
        touch(data, f"labels/{name}", *["sample.json"] * (kind == "sample"))
    before = sorted(data.rglob("*"))
    path = captions_file(tmp_path / "c.csv", "csv", [("a.mp4", ["x"], "train")])
    with pytest.raises(
        UserError, match=f"holds another data set .{'sample' if kind == 'sample' else 'Something-Something V2'}.: name"
    ):
        prepare(data, "--videos", touch(tmp_path / "films", "a.mp4"), "--captions", path)
    assert sorted(data.rglob("*")) == before


def test_no_data_set_at_the_default_place_names_all_three_ways(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for way in (
        "Something-Something V2 there",
        "python -m sample render",
        "--videos FOLDER --captions FILE --data data/mine",
    ):
        with pytest.raises(UserError, match=way):
            dataset.Layout(dataset.DEFAULT_DATA)
    with pytest.raises(UserError, match="--captions FILE --data data/mine$"):
        dataset.Layout("data/mine")


def test_data_sets_have_names(tmp_path):
    (tmp_path / "a").mkdir()
    assert dataset.Layout(tmp_path / "a").name == "Something-Something V2"
    assert dataset.Layout(tmp_path / "a").source("1") is None
    touch(tmp_path / "a", "sample.json")
    assert dataset.Layout(tmp_path / "a").name == "sample"
    (own(tmp_path, [("a.mp4", ["x"], "train")]).labels / "videos.json").write_text("[]")
    with pytest.raises(UserError, match="does not say where the clips lie"):
        dataset.Layout(tmp_path / "mine").name  # noqa: B018
