"""The share of attention on objects, against maps and boxes whose answer is known; and evaluate.py --attention."""

import json
import shutil

import numpy as np
import pytest
import torch

import evaluate
from dataset import Layout
from evaluation.attention import Attention, coverage, read_boxes
from evaluation.captioning import SplitReader
from features import cache
from features.cache import CacheConfig
from models import checkpoint
from qformer import VideoCaptioner
from runtime.distributed import DistributedContext
from runtime.files import UserError
from tests import tiny, videos
from video import overlay
from video.reader import Transform, probe


def made(frames=4, size=32, crop=False, pool=1, tokens=32):
    return CacheConfig("e", frames, size, crop, (0,) * 3, (1,) * 3, "float16", pool, tokens, 16)


def boxes(*frames, width=64, height=48):
    """A clip's boxes from lists of (left, top, right, bottom), one list a frame."""
    return width, height, [np.array(frame, np.float64).reshape(-1, 4) for frame in frames]


# ---- what objects cover ----


def test_boxes_cover_patches_by_their_area_in_a_frame_that_is_squashed():
    """64 x 48 pixels, 4 x 4 patches: a patch is 16 x 12 of them."""
    left_half_of_the_first = (0, 0, 8, 12)
    found = coverage(boxes([left_half_of_the_first, (16, 12, 48, 24)]), made())
    expected = np.zeros((2, 4, 4))
    expected[:, 0, 0], expected[:, 1, 1:3] = 0.5, 1
    assert found == pytest.approx(expected)


def test_what_two_boxes_cover_counts_once_and_nothing_counts_outside():
    both = coverage(boxes([(0, 0, 32, 24), (16, 12, 48, 36), (-50, -50, 0, 0), (64, 0, 90, 48)]), made())
    assert both.mean() == pytest.approx((2 * 4 - 1) / 16)
    assert coverage(boxes([(-9, -9, 99, 99)]), made()).min() == 1
    assert coverage(boxes([]), made()).max() == 0


def test_frames_are_those_that_were_sampled_and_a_tubelet_is_their_mean():
    """Of 7 frames 0, 2, 4 and 6 are sampled: what the others show is not asked."""
    full, none = [(0, 0, 64, 48)], []
    found = coverage(boxes(full, none, none, full, full, none, full), made())
    assert found[:, 0, 0] == pytest.approx([0.5, 1.0])
    repeated = coverage(boxes(full, none), made())  # 0, 0, 0, 1
    assert repeated[:, 0, 0] == pytest.approx([1.0, 0.5])


def test_a_pooled_grid_has_the_mean_of_its_patches():
    one = boxes([(3, 7, 37, 29)], [(10, 10, 50, 40)], [(0, 0, 9, 9)])
    fine, coarse = coverage(one, made()), coverage(one, made(pool=2, tokens=8))
    assert coarse.shape == (2, 2, 2)
    assert coarse == pytest.approx(fine.reshape(2, 2, 2, 2, 2).mean((2, 4)))


def test_with_a_crop_places_are_counted_in_the_part_that_is_seen():
    made_with_crop = made(crop=True)
    top, left, bottom, right = Transform(32, crop=True).seen(90, 160)
    middle = (left, top, left + (right - left) / 2, top + (bottom - top) / 4)
    found = coverage(boxes([middle, (0, 0, left, 90)], width=160, height=90), made_with_crop)
    expected = np.zeros((2, 4, 4))
    expected[:, 0, :2] = 1
    assert found == pytest.approx(expected)


# ---- boxes.json ----


@pytest.fixture
def layout(tmp_path):
    (tmp_path / "labels").mkdir()
    return Layout(tmp_path)


def write_boxes(layout, content):
    (layout.labels / "boxes.json").write_text(json.dumps(content))


def test_boxes_are_read_as_they_were_written(layout):
    assert read_boxes(layout) == {}
    write_boxes(layout, {"7": {"width": 112, "height": 84, "frames": [[], [[1, 2, 3.5, 4], [5, 6, 7, 8]]]}})
    width, height, frames = read_boxes(layout)["7"]
    assert (width, height) == (112, 84) and [frame.tolist() for frame in frames] == [[], [[1, 2, 3.5, 4], [5, 6, 7, 8]]]


GOOD = {"width": 9, "height": 9, "frames": [[]]}


@pytest.mark.parametrize(
    "clip",
    [
        *({**GOOD, "frames": frames} for frames in ([], 3, None, [[1, 2, 3, 4]], [[[1, 2, 3]]], [[["a", 1, 2, 3]]])),
        *({**GOOD, "width": width} for width in (0, -3, "wide", None)),
        {"frames": [[]]},
        [],
        None,
    ],
)
def test_boxes_of_another_form_are_refused_with_the_clip_and_the_form(layout, clip):
    write_boxes(layout, {"7": GOOD, "8": clip})
    with pytest.raises(UserError, match=r"boxes.json: clip '8' is not width, .*\[left, top, right, bottom\]"):
        read_boxes(layout)


@pytest.mark.parametrize("content", [[], 3, "text"])
def test_boxes_that_are_no_map_are_refused(layout, content):
    write_boxes(layout, content)
    with pytest.raises(UserError, match=r"boxes.json: "):
        read_boxes(layout)


# ---- a split ----


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Clips 1 to 5 of a validation split with random features of a 2 x 2 x 2 grid, videos, boxes, and a checkpoint."""
    root = tmp_path_factory.mktemp("run")
    data = tiny.make_dataset(root / "data", features=False)
    config = tiny.features_config(tokens=8)
    for number in range(11, 16):
        cache.save(data / "features" / "validation" / f"{number}.pt", cache.Packed(tiny.tokens(8, 16, seed=number)))
        videos.write(data / "20bn-something-something-v2" / f"{number}.webm", videos.moving(12, seed=number))
    (data / "features" / "config.json").write_text(json.dumps(config.to_dict()))
    torch.manual_seed(0)
    qformer = tiny.tiny_qformer()
    for parameter in qformer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    settings = {"llm": str(tiny.save_lm(root / "lm")), "prompt": "a video showing:", "features": config.to_dict()}
    saved = checkpoint.Checkpoint({**settings, "qformer": qformer.config}, qformer.state_dict())
    checkpoint.write(root / "checkpoint.pt", saved)
    return root


def evaluated(data, checkpoint_path, out, *more):
    words = ["--data", data, "--checkpoint", checkpoint_path, "--results", out, "--no-meteor", *more]
    assert evaluate.main([*map(str, words), "--max-new-tokens", "3"]) == 0
    return json.loads((out / "evaluation.json").read_text())


def corner(clip_id):
    """An object that fills a quarter of the picture, another one for each clip."""
    x, y = 32 * (int(clip_id) % 2), 24 * (int(clip_id) // 2 % 2)
    return {"width": 64, "height": 48, "frames": [[[x, y, x + 32, y + 24]]] * 12}


@pytest.fixture
def with_boxes(run, tmp_path, without_java):
    data = shutil.copytree(run / "data", tmp_path / "data")
    write_boxes(Layout(data), {clip_id: corner(clip_id) for clip_id in ("11", "12", "13", "15", "99")})
    return data


def reader_of(captioner, data):
    records = json.loads((data / "annotations" / "val_ready.json").read_text())
    return SplitReader(captioner, records, data / "features" / "validation", 2, DistributedContext("cpu"))


def test_shares_of_hand_made_maps_are_what_they_must_be(run, with_boxes):
    """Attention all on the object, all beside it, even, and of two queries that do the one and the other."""
    captioner = VideoCaptioner.from_checkpoint(run / "checkpoint.pt")
    where = Attention(reader_of(captioner, with_boxes), Layout(with_boxes), 0, 0)
    on = {i: coverage(where.boxes[i], where.made) / 2 for i in where.boxes}  # a quarter of 8 patches
    beside, even = {i: (1 - 2 * one) / 6 for i, one in on.items()}, dict.fromkeys(on, np.full((2, 2, 2), 1 / 8))
    for queries, expected in (([on], [1]), ([beside], [0]), ([even], [0.25]), ([on, beside], [1, 0])):
        looked = {i: ({}, where.shares(i, np.stack([maps[i] for maps in queries]))) for i in on}
        scores = where.scores(looked | {"14": ({}, where.shares("14", even["11"][None]))})  # whose places are not known
        assert scores["clips"] == 4 and scores["area"] == pytest.approx(0.25)
        assert [scores[f"query {i}"] for i in range(len(queries))] == pytest.approx(expected)
        mean = np.mean(expected)
        assert scores["on_objects"] == pytest.approx(mean) and scores["ratio"] == pytest.approx(4 * mean)
        assert scores["intervals"]["on_objects"] == pytest.approx([mean] * 2)  # all clips are alike
    others = where.scores({i: ({}, where.shares(i, on[i][None])) for i in on})["on_others"]
    met = [(on[i] * coverage(where.boxes[other], where.made)).sum() for i, other in where.others.items()]
    assert others == pytest.approx(np.mean(met)) and all(one != other for one, other in where.others.items())


def test_evaluate_scores_the_captioners_own_attention_and_draws_it(run, with_boxes, tmp_path, capsys):
    out = tmp_path / "out"
    result = evaluated(with_boxes, run / "checkpoint.pt", out, "--attention", "2", "--batch-size", "2")
    captioner, found = VideoCaptioner.from_checkpoint(run / "checkpoint.pt"), []
    for clip_id in ("11", "12", "13", "15"):
        features = cache.dequantize(cache.load(with_boxes / "features" / "validation" / f"{clip_id}.pt"))
        weights = captioner.attention(features)[0].mean(0).numpy()
        found.append((weights * coverage(read_boxes(Layout(with_boxes))[clip_id], made(tokens=8))).sum())
    scores = result["attention"]
    assert scores["clips"] == 4 and scores["on_objects"] == pytest.approx(np.mean(found)) and np.std(found) > 0.01
    assert scores["area"] == pytest.approx(0.25) and scores["ratio"] == pytest.approx(4 * np.mean(found))
    low, high = scores["intervals"]["on_objects"]
    assert min(found) <= low < np.mean(found) < high <= max(found)
    kept = [row["attention"] for row in result["predictions"] if "attention" in row]  # for a later run's --compare
    assert [shares["on_objects"][0] for shares in kept] == pytest.approx(found) and "query 0" not in kept[0]
    again = evaluated(with_boxes, run / "checkpoint.pt", tmp_path / "again", "--attention", "0", "--compare", out)
    assert again["compared"]["attention"]["on_objects"] == 0.0
    said = capsys.readouterr().out
    assert "attention on objects" in said and "4 clips" in said
    rows = {row["id"]: row["overlays"] for row in result["predictions"] if "overlays" in row}
    assert len(rows) == 2
    for clip_id, overlays in rows.items():
        assert overlays == {"attention": f"attention/{clip_id}.attention.webm"}
        info = probe(out / overlays["attention"])
        assert (info.width, info.height, info.frames) == (64, 48, 12)


def test_the_clips_that_are_drawn_are_the_seeds_and_have_a_video(run, with_boxes, tmp_path):
    for clip_id in ("11", "12", "14"):
        (with_boxes / "20bn-something-something-v2" / f"{clip_id}.webm").unlink()
    chosen = []
    for seed in (1, 1, 2, 3, 4, 5):
        result = evaluated(with_boxes, run / "checkpoint.pt", tmp_path / "out", "--attention", 1, "--seed", seed)
        chosen += [[row["id"] for row in result["predictions"] if "overlays" in row]]
    assert chosen[0] == chosen[1] and {one for (one,) in chosen} == {"13", "15"}


def test_without_boxes_there_is_no_score_and_without_clips_no_overlay(run, with_boxes, tmp_path):
    result = evaluated(run / "data", run / "checkpoint.pt", tmp_path / "a", "--attention", "9")
    assert result["attention"] == {} and sum("overlays" in row for row in result["predictions"]) == 5
    result = evaluated(with_boxes, run / "checkpoint.pt", tmp_path / "b", "--attention", "0")
    assert result["attention"]["clips"] == 4 and not any("overlays" in row for row in result["predictions"])
    assert not (tmp_path / "b" / "attention").exists()
    assert "attention" not in evaluated(with_boxes, run / "checkpoint.pt", tmp_path / "c")


def test_single_queries_are_drawn_on_demand(run, with_boxes, tmp_path):
    result = evaluated(with_boxes, run / "checkpoint.pt", tmp_path / "out", "--attention", 1, "--queries", 0, 3)
    ((clip_id, overlays),) = [(row["id"], row["overlays"]) for row in result["predictions"] if "overlays" in row]
    assert overlays == {
        "attention": f"attention/{clip_id}.attention.webm",
        "query 0": f"attention/{clip_id}.query-0.webm",
        "query 3": f"attention/{clip_id}.query-3.webm",
    }
    contents = {(tmp_path / "out" / path).read_bytes() for path in overlays.values()}
    assert len(contents) == 3
    with pytest.raises(UserError, match="--queries 4: the Q-Former has 4 queries, 0 to 3"):
        evaluated(with_boxes, run / "checkpoint.pt", tmp_path / "out", "--attention", 1, "--queries", 4)
    with pytest.raises(UserError, match="give --attention CLIPS"):
        evaluated(with_boxes, run / "checkpoint.pt", tmp_path / "out", "--queries", 0)


def test_who_interrupts_the_drawing_has_the_scores(run, with_boxes, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(overlay, "write_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluated(with_boxes, run / "checkpoint.pt", tmp_path / "out", "--attention", "2")
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["attention"]["clips"] == 4


def test_a_clip_that_cannot_be_decoded_costs_its_overlay_only(run, with_boxes, tmp_path, capsys):
    (with_boxes / "20bn-something-something-v2" / "13.webm").write_bytes(b"damaged" * 99)
    result = evaluated(with_boxes, run / "checkpoint.pt", tmp_path / "out", "--attention", "9")
    assert [row["id"] for row in result["predictions"] if "overlays" not in row] == ["13"]
    assert result["attention"]["clips"] == 4 and "13: no overlay: it " in capsys.readouterr().out


@pytest.mark.parametrize("features", [None, tiny.features_config(tokens=6).to_dict()])
def test_features_without_a_grid_are_refused_before_any_clip_is_captioned(run, tmp_path, monkeypatch, features):
    saved = checkpoint.read(run / "checkpoint.pt")
    saved.config["features"] = features
    checkpoint.write(tmp_path / "other.pt", saved)
    data = shutil.copytree(run / "data", tmp_path / "data")
    (data / "features" / "config.json").unlink()
    monkeypatch.setattr(VideoCaptioner, "generate", lambda *_: pytest.fail("captioned"))
    with pytest.raises(UserError, match=r"--attention: .*; leave it out|no grid"):
        evaluated(data, tmp_path / "other.pt", tmp_path / "out", "--attention", "1")


def test_damaged_boxes_are_refused_before_any_clip_is_captioned(run, with_boxes, tmp_path, monkeypatch):
    monkeypatch.setattr(VideoCaptioner, "generate", lambda *_: pytest.fail("captioned"))
    (with_boxes / "labels" / "boxes.json").write_text('{"11": 3}')
    with pytest.raises(UserError, match="clip '11'"):
        evaluated(with_boxes, run / "checkpoint.pt", tmp_path / "out", "--attention", "1")
