"""A data set of the user's own: its captions file in three forms, through all five scripts, and what goes wrong."""

import csv
import json
import os
import shutil
import unicodedata
from pathlib import Path

import pytest
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

import dataset
import evaluate
import infer
import prepare_annotations
import preprocess_something_something_v2 as preprocess
import train
from evaluation import ngrams
from features import cache
from runtime.files import UserError
from sample.world import choose_clips, paraphrases, render_clip
from tests import tiny, videos

FORMS = ("csv", "json", "msr-vtt")
NAMES = ["my clip {}.webm", "été à la plage {}.WEBM", "Ünï/{}.mp4", "sub dir/vidéo n°{}.mkv", "plain-{}.webm"]


def captions_file(path, form, rows):
    """`rows`: name, captions, split."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if form == "csv":
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.writer(file)
            writer.writerow(["video", "caption", "split"])
            writer.writerows([name, text, split] for name, texts, split in rows for text in texts)
    elif form == "json":
        path.write_text(json.dumps({name: texts for name, texts, _ in rows}, ensure_ascii=False), encoding="utf-8")
    else:
        word = {"validation": "validate"}
        clips = [{"video_id": name, "split": word.get(split, split), "id": 0} for name, _, split in rows]
        said = [{"video_id": name, "caption": text, "sen_id": 0} for name, texts, _ in rows for text in texts]
        path.write_text(json.dumps({"info": {}, "videos": clips, "sentences": said}))
    return path


@pytest.fixture(scope="module")
def filmed(tmp_path_factory):
    """The folder of 15 clips of the sample's world under awkward names, and each one's captions and split."""
    folder, rows = tmp_path_factory.mktemp("my films"), []
    for split, clips in choose_clips({"train": 8, "validation": 4, "test": 3}, seed=0).items():
        for clip_id, clip in clips.items():
            name = NAMES[int(clip_id) % len(NAMES)].format(clip_id)
            on_disk = unicodedata.normalize("NFD" if int(clip_id) % 2 else "NFC", name)  # macOS writes the first
            codec = "libx264" if name.endswith(("mp4", "mkv")) else "libvpx-vp9"
            lower = (folder / on_disk).with_suffix(Path(on_disk).suffix.lower())
            videos.write(lower, render_clip(clip, 64, 48, 10), codec).rename(folder / on_disk)
            said = [clip.caption.lower(), *paraphrases(clip)[:2]]
            rows.append((name, [f"{said[0]}, again\nand again", *said[1:]] if clip_id == "3" else said, split))
    return folder, rows


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return ["--encoder", str(tiny.save_encoder(folder / "encoder"))], ["--llm", str(tiny.save_lm(folder / "lm"))]


def prepare(data, *words):
    prepare_annotations.main(["--data", str(data), *map(str, words)])
    return dataset.Layout(data)


def ready(data, split):
    return (
        {r["id"]: r["label"] for r in dataset.read_ready(data, split)} if split in dataset.Layout(data).splits else {}
    )


def train_flags(data, out, llm):
    words = ["--data", data, "--checkpoint", out / "checkpoint.pt", "--results", out, *llm, "--epochs", 1]
    return [str(w) for w in (*words, "--num-queries", 4, "--max-new-tokens", 5, "--workers", 0)]


def evaluate_flags(data, out):
    words = ["--data", data, "--checkpoint", out / "checkpoint.pt", "--results", out, "--no-meteor"]
    return [str(word) for word in (*words, "--max-new-tokens", 5)]


@pytest.mark.parametrize("form", FORMS)
def test_three_forms_go_through_the_five_scripts_with_all_their_captions(
    filmed, models, tmp_path, form, monkeypatch, without_java
):
    folder, rows = filmed
    said = [(name.rpartition(".")[0] if i % 2 else name, texts, split) for i, (name, texts, split) in enumerate(rows)]
    path = captions_file(tmp_path / f"captions.{'csv' if form == 'csv' else 'json'}", form, said)
    data, out, (encoder, llm) = tmp_path / "mine", tmp_path / "out", models
    layout = prepare(data, "--videos", folder, "--captions", path)
    captions = {split: ready(data, split) for split in dataset.SPLITS}
    assert {split: len(found) for split, found in captions.items() if form != "json"} in (
        {},
        {"train": 8, "validation": 4, "test": 3},
    )
    by_name = {
        unicodedata.normalize("NFC", layout.source(i)): texts for some in captions.values() for i, texts in some.items()
    }
    assert by_name == {name: [dataset.clean(text) for text in texts] for name, texts, _ in rows}
    assert all(
        layout.video(clip_id).samefile(folder / layout.source(clip_id))
        for some in captions.values()
        for clip_id in some
    )
    assert layout.name == "mine"

    assert preprocess.main(["--data", str(data), *encoder, "--num-frames", "4", "--workers", "1"]) == 0
    train.main(train_flags(data, out, llm))
    validated = json.loads((out / "validation_epoch_1.json").read_text())
    assert validated["CIDEr"] == pytest.approx(plain_cider(validated["predictions"], captions["validation"]), abs=1e-9)
    assert evaluate.main([*evaluate_flags(data, out), "--split", "test", "--grounding", "--copy-videos"]) == 0
    result = json.loads((out / "evaluation.json").read_text())
    assert {row["id"]: row["references"] for row in result["predictions"]} == captions["test"]
    predictions = {row["id"]: row["prediction"] for row in result["predictions"]}
    assert result["metrics"]["CIDEr"] == pytest.approx(plain_cider(predictions, captions["test"]), abs=1e-9)
    assert {path.stem for path in (out / "videos").iterdir()} == set(captions["test"])
    assert "ssv2" not in result and "CIDEr_shuffled" in result["grounding"]

    flags = [
        "--data",
        data,
        "--checkpoint",
        out / "checkpoint.pt",
        "--results",
        out,
        "--num-samples",
        3,
        "--workers",
        0,
    ]
    assert infer.main(list(map(str, flags))) == 0
    shown = json.loads((out / "inference" / "results.json").read_text())["predictions"]
    assert {row["id"]: row["references"] for row in shown} == captions["test"] and not any(
        row["error"] for row in shown
    )
    with pytest.raises(UserError, match="mine has no .*labels.json: action templates are"):
        evaluate.main([*evaluate_flags(data, out), "--actions"])


def plain_cider(predictions, references):
    """pycocoevalcap's CIDEr of words cut without Java."""
    gts = {key: list(map(ngrams.plain_tokens, references[key])) for key in predictions}
    return Cider().compute_score(gts, {key: [ngrams.plain_tokens(text)] for key, text in predictions.items()})[0]


@pytest.mark.skipif(shutil.which("java") is None, reason="Java is not installed: nothing to compare with")
def test_cider_against_three_references_equals_pycocoevalcaps(tmp_path):
    clips = [
        clip for some in choose_clips({"train": 4, "validation": 20, "test": 1}, 0).values() for clip in some.values()
    ]
    rows = [
        (f"Clip Nr. {i}", [clip.caption, *paraphrases(clip)[:2]], "val" if i > 3 else "train")
        for i, clip in enumerate(clips)
    ]
    data = tmp_path / "mine"
    prepare(data, "--captions", captions_file(tmp_path / "captions.csv", "csv", rows))
    references = ready(data, "validation")
    assert len(references) == 21 and all(len(texts) == 3 for texts in references.values())
    said = {
        key: references[other][-1] for key, other in zip(references, [*list(references)[1:], *references], strict=False)
    }
    tokenizer = PTBTokenizer()
    gts = tokenizer.tokenize({key: [{"caption": text} for text in texts] for key, texts in references.items()})
    res = tokenizer.tokenize({key: [{"caption": text}] for key, text in said.items()})
    theirs, _ = Cider().compute_score(gts, res)
    assert theirs > 0.1
    assert ngrams.cider(said, references) == pytest.approx(theirs, abs=1e-9)
    assert ngrams.ngram_scores(said, references, meteor=False)["metrics"]["CIDEr"] == pytest.approx(theirs, abs=1e-9)


# ---- names, ids, places ----


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def own(tmp_path, rows, files=None, *words):
    folder = touch(tmp_path / "films", *(files if files is not None else [name for name, *_ in rows]))
    path = captions_file(tmp_path / "captions.csv", "csv", rows)
    return prepare(tmp_path / "mine", "--videos", folder, "--captions", path, *words)


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
    layout = own(tmp_path, [("one/a", ["x"], "train"), ("two/a.mp4", ["y"], "train")])
    first, second = ready(layout.data, "train")
    assert (first, layout.source(first), layout.source(second)) == ("a", "one/a.mp4", "two/a.mp4")
    assert second.startswith("a-")


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
        ("c.json", '{"videos": [{}], "sentences": [{"video_id": "a"}]}', "it is to be a CSV"),
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
        "Video;CAPTION;more;Split",
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


# ---- once more, with more, with fewer ----


def test_a_second_run_with_more_clips_keeps_what_is_cached(tmp_path, capsys):
    rows = [(f"clip {i}.mp4", ["x"], "") for i in range(12)]
    layout = own(tmp_path, rows[:8])
    first = {i: split for split in dataset.SPLITS for i in ready(layout.data, split)}
    for clip_id, split in [*first.items()][:5]:
        touch(layout.features, f"{split}/{clip_id}.pt")
    layout = own(tmp_path, rows, None, "--seed", 7)
    again = {i: split for split in dataset.SPLITS for i in ready(layout.data, split)}
    assert first.items() <= again.items() and len(again) == 12
    capsys.readouterr()
    prepare(layout.data, "--captions", tmp_path / "captions.csv")  # the folder of the videos is known
    assert {i: split for split in dataset.SPLITS for i in ready(layout.data, split)} == again
    assert layout.own == dataset.Layout(layout.data).own and "note:" not in capsys.readouterr().out
    moved = (tmp_path / "films").rename(tmp_path / "moved")
    prepare(layout.data, "--captions", tmp_path / "captions.csv", "--videos", moved)
    assert f"note: the videos were in {tmp_path / 'films'}; " in capsys.readouterr().out
    assert all(dataset.Layout(layout.data).video(clip_id) for clip_id in again)
    prepare(layout.data)  # what train.py's error says
    assert {i: split for split in dataset.SPLITS for i in ready(layout.data, split)} == again


def test_a_rehearsal_takes_the_same_clips_everywhere_and_its_features_serve_the_full_run(
    filmed, models, tmp_path, capsys
):
    folder, rows = filmed
    data, out, (encoder, llm) = tmp_path / "mine", tmp_path / "out", models
    path = captions_file(tmp_path / "captions.csv", "csv", rows)
    prepare(data, "--videos", folder, "--captions", path, "--limit", 2)
    assert "a rehearsal on the first 2 clips of each split" in capsys.readouterr().out
    words = ["--data", str(data), *encoder, "--num-frames", "4", "--workers", "1"]
    assert preprocess.main([*words, "--limit", "2"]) == 0
    assert {(p.parent.name, p.stem) for p in (data / "features").rglob("*.pt")} == {
        (split, clip_id) for split in dataset.SPLITS for clip_id in ready(data, split)
    }
    train.main(train_flags(data, out, llm))
    assert evaluate.main([*evaluate_flags(data, out), "--split", "test"]) == 0
    assert "have no features" not in capsys.readouterr().out
    prepare(data)
    assert [len(ready(data, split)) for split in dataset.SPLITS] == [8, 4, 3]
    preprocess.main(words)
    assert "6 clips cached, 9 to encode" in capsys.readouterr().out


def test_videos_that_are_gone_are_named_with_what_to_do(filmed, models, tmp_path):
    folder, rows = filmed
    kept = shutil.copytree(folder, tmp_path / "kept")
    path = captions_file(tmp_path / "captions.csv", "csv", rows)
    layout = prepare(tmp_path / "mine", "--videos", kept, "--captions", path)
    layout.video(next(iter(ready(layout.data, "train")))).unlink()
    words = ["--data", str(layout.data), *models[0], "--num-frames", "4", "--workers", "1"]
    with pytest.raises(UserError, match="1 clips of mine have no video in .*kept.*prepare_annotations.py --videos"):
        preprocess.main(words)
    shutil.rmtree(kept)
    with pytest.raises(
        UserError, match="mine has no video of the test clips .*prepare_annotations.py --videos"
    ) as error:
        infer.choose_test_clips(layout.data, 2, 0)
    assert "SSv2" not in str(error.value)


# ---- features of the user's own ----


@pytest.fixture
def featured(tmp_path):
    """Features by another program under the clips' own names, all in one folder, and their captions."""
    rows = [(f"Film {i}", [f"moving a cup {i}", "a cup moves", "up it goes"], "") for i in range(12)]
    for i, (name, *_) in enumerate(rows):
        cache.save(tmp_path / "mine" / "features" / f"{name}.pt", cache.Packed(tiny.tokens(6, 16, seed=i)))
    return captions_file(tmp_path / "captions.csv", "csv", rows)


def test_features_of_ones_own_train_and_are_evaluated_without_any_video(featured, models, tmp_path, without_java):
    data, out = tmp_path / "mine", tmp_path / "out"
    layout = prepare(data, "--captions", featured)
    assert all(ready(data, split) for split in dataset.SPLITS) and layout.source("nothing") is None
    found = {(path.parent.name, path.stem) for path in layout.features.rglob("*.pt")}
    assert found == {(split, clip_id) for split in dataset.SPLITS for clip_id in ready(data, split)}
    train.main(train_flags(data, out, models[1]))
    assert evaluate.main([*evaluate_flags(data, out), "--split", "test", "--grounding"]) == 0
    result = json.loads((out / "evaluation.json").read_text())
    assert {row["id"]: row["references"] for row in result["predictions"]} == ready(data, "test")
    checkpoint = ["--checkpoint", str(out / "checkpoint.pt"), "--results", str(out), "--workers", "0"]
    video = videos.write(tmp_path / "a.webm", videos.moving(10))
    with pytest.raises(UserError, match="does not say what made its features"):
        infer.main([*checkpoint, "--video", str(video)])
    with pytest.raises(UserError, match="mine has no video of the test clips .*it is made of features, without videos"):
        infer.main([*checkpoint, "--data", str(data)])
    with pytest.raises(UserError, match="mine has no videos to encode: it is made of features"):
        preprocess.main(["--data", str(data)])


def test_features_in_a_splits_folder_decide_the_split_and_missing_ones_are_told(featured, tmp_path, capsys):
    data = tmp_path / "mine"
    features = data / "features"
    for split, numbers in (("train", range(6)), ("validation", range(6, 11))):
        (features / split).mkdir()
        for i in numbers:
            (features / f"Film {i}.pt").rename(features / split / f"Film {i}.pt")
    (features / "Film 11.pt").unlink()
    layout = prepare(data, "--captions", featured, "--seed", 3)
    assert {layout.source(clip_id) for clip_id in ready(data, "validation")} >= {f"Film {i}" for i in range(6, 11)}
    said = capsys.readouterr().out
    name = said.partition("1 clips have no features (N, D) yet, to be written by you: ")[2].splitlines()[0]
    cache.save(name, cache.Packed(tiny.tokens(6, 16)))
    assert Path(name).parent.parent == features
    prepare(data, "--captions", featured)
    assert "no features" not in capsys.readouterr().out
    shutil.rmtree(features / "train")
    with pytest.raises(
        UserError, match=r"all \d train clips have no features .* put each clip's own features, .*<id>.pt"
    ):
        dataset.usable_records(layout, "train", 1.0, None)
