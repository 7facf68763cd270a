"""A data set of the user's own: its captions file in three forms, through all five scripts, and what goes wrong."""

import json
import shutil
import unicodedata
from pathlib import Path

import pytest
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

import dataset
import evaluate
import infer
import preprocess_something_something_v2 as preprocess
import train
from evaluation import ngrams
from features import cache
from runtime.files import UserError
from sample.world import choose_clips, paraphrases, render_clip
from tests import tiny, videos
from tests.own_data import captions_file, own, prepare, ready, touch

FORMS = ("csv", "json", "msr-vtt")
NAMES = ["my clip {}.webm", "été à la plage {}.WEBM", "Ünï/{}.mp4", "sub dir/vidéo n°{}.mkv", "plain-{}.webm"]


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


def test_a_clips_features_never_become_those_of_one_whose_name_is_its_id(tmp_path):
    both = [("clip.mp4", ["one"], "train"), ("b/clip.mp4.webm", ["two"], "train")]
    layout = own(tmp_path, both)
    assert layout.own["clips"] == {"clip.mp4": "b/clip.mp4.webm", "clip": "clip.mp4"}
    cache.save(layout.features / "train" / "clip.mp4.pt", cache.Packed(tiny.tokens(6, 16)))
    for rows in (both, both[:1]):  # a clip that is left out keeps its id
        own(tmp_path, rows)
        assert [path.name for path in layout.features.rglob("*.pt")] == ["clip.mp4.pt"]


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
