import itertools
import json
import re

import av
import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, VJEPA2Config, VJEPA2Model

from models.language_model import PROMPT
from runtime import files
from sample import __main__ as sample
from sample import models as sample_models
from sample import world as sample_world
from sample.world import ACTIONS, OPPOSITES, Clip

MODELS = sample.MODELS
FULL = {"train": 1800, "validation": 300, "test": 300}
RED_BALL, BLUE_BOX = ("red", "ball"), ("blue", "box")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    sample.main(["render", "--data", str(folder), "--train", "24", "--validation", "12", "--test", "12"])
    return folder


def test_the_layout_and_the_records_are_ssv2s(data):
    train, validation, test, labels = (
        json.loads((data / "labels" / f"{name}.json").read_text()) for name in ("train", "validation", "test", "labels")
    )
    assert (len(train), len(validation), len(test)) == (24, 12, 12)
    assert all(set(record) == {"id"} for record in test)
    assert labels == {template: str(index) for index, template in enumerate(sorted(ACTIONS))}
    for record in train + validation:
        filled = record["template"]
        for name in record["placeholders"]:
            filled = filled.replace("[something]", name, 1)
        assert record["label"] == filled.lower() and "[" not in filled
    ids = [record["id"] for record in train + validation + test]
    assert sorted(path.stem for path in (data / "20bn-something-something-v2").glob("*.webm")) == sorted(ids)
    answers = [line.split(";") for line in (data / "labels" / "test-answers.csv").read_text().splitlines()]
    assert [clip_id for clip_id, _ in answers] == [record["id"] for record in test]
    assert all(re.match(r"[A-Z][a-z ]+$", caption) for _, caption in answers)
    assert set(json.loads((data / "ssv2_paraphrase.json").read_text())) == {record["id"] for record in train}
    opposites = json.loads((data / "labels" / "opposites.json").read_text())
    assert len(opposites) == 8 and all(opposites[b] == a and b in labels for a, b in opposites.items())


def test_clips_are_vp9_at_12_frames_a_second_and_show_what_was_drawn(data):
    clip_id, clip = next(
        iter(sample_world.choose_clips({"train": 24, "validation": 12, "test": 12}, 0)["train"].items())
    )
    with av.open(str(data / "20bn-something-something-v2" / f"{clip_id}.webm")) as container:
        stream = container.streams.video[0]
        assert "vp9" in stream.codec.name and stream.average_rate == 12
        assert (stream.width, stream.height) == (112, 84)
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    assert 30 <= len(decoded) <= 42
    drawn = sample_world.render_clip(clip, frames=len(decoded))
    assert np.abs(decoded.astype(int) - drawn).mean() < 6


def test_no_pair_of_action_and_thing_and_no_label_is_in_two_splits():
    pairs, labels, things = {}, {}, {}
    for split, clips in sample_world.choose_clips(FULL, seed=0).items():
        assert len(clips) == FULL[split]
        pairs[split] = {(clip.template, thing) for clip in clips.values() for thing in clip.things}
        labels[split] = {clip.caption.lower() for clip in clips.values()}
        things[split] = {thing for clip in clips.values() for thing in clip.things}
    for one, other in itertools.combinations(FULL, 2):
        assert not pairs[one] & pairs[other]
        assert not labels[one] & labels[other]
    assert things["train"] == things["validation"] == things["test"] and len(things["train"]) == 24


def test_every_action_has_its_share_of_every_split():
    for split, clips in sample_world.choose_clips(FULL, seed=3).items():
        actions = [clip.template for clip in clips.values()]
        assert all(actions.count(action) == FULL[split] // 12 for action in ACTIONS)


@pytest.mark.parametrize("forwards", OPPOSITES)
def test_a_clip_played_backwards_is_the_opposite_action_frame_by_frame(forwards):
    things = (RED_BALL, BLUE_BOX)[: forwards.count("[something]")]
    clip, opposite = (
        sample_world.render_clip(Clip(template, things, seed=5), frames=12)
        for template in (forwards, OPPOSITES[forwards])
    )
    assert np.abs(clip[::-1].astype(int) - opposite).max() <= 2
    assert np.abs(clip.astype(int) - opposite).mean() > 1  # and it does move


def test_a_clip_is_drawn_the_same_each_time_and_at_any_size():
    clip = Clip("Covering [something] with [something]", (RED_BALL, BLUE_BOX), seed=1)
    small = sample_world.render_clip(clip, frames=3)
    assert small.shape == (3, 84, 112, 3) and small.dtype == np.uint8
    assert np.array_equal(small, sample_world.render_clip(clip, frames=3))
    large = sample_world.render_clip(clip, width=224, height=168, frames=3)
    reduced = large.reshape(3, 84, 2, 112, 2, 3).mean((2, 4))
    assert np.abs(reduced - small).mean() < 2


def test_covering_hides_the_first_thing_and_pretending_leaves_it_where_it_was():
    covering = Clip("Covering [something] with [something]", (RED_BALL, BLUE_BOX), seed=2)
    [(_, *under, _), (top, *over, _)] = sample_world.scene(covering, 1).things
    assert top == BLUE_BOX and under == pytest.approx(over)
    for template, moved in (("Picking [something] up", True), ("Pretending to pick [something] up", False)):
        clip = Clip(template, (RED_BALL,), seed=2)
        before, after = (sample_world.scene(clip, time).things[0][2] for time in (0, 1))
        assert (after < before - 0.2) is moved


@pytest.mark.parametrize("template", ACTIONS)
def test_boxes_are_where_a_clips_things_are_drawn(template, monkeypatch):
    """What changes with the things' colours lies in the boxes and fills them; a hand could hide an edge of one."""
    scene, count = sample_world.scene, template.count("[something]")
    monkeypatch.setattr(sample_world, "scene", lambda *moment: scene(*moment)._replace(hand=None))
    found, drawn = [], []
    for colour in ("red", "blue"):
        for shape in ("cup", "cone"):
            monkeypatch.setitem(sample_world.WORLD["shapes"][shape], "mark", sample_world.COLOURS[colour])
        clip = Clip(template, tuple((colour, shape) for shape in ("cup", "cone"))[:count], seed=7)
        found.append(sample_world.boxes(clip))
        drawn.append(sample_world.render_clip(clip, frames=clip.length).astype(int))
    assert found[0] == found[1] and len(found[0]["frames"]) == clip.length
    changed = np.abs(drawn[0] - drawn[1]).sum(-1) > 60  # (frames, height, width)
    for boxes, pixels in zip(found[0]["frames"], changed, strict=True):
        assert len(boxes) == count
        rows, columns = np.nonzero(pixels)
        ends = [columns.min(), rows.min(), -columns.max() - 1, -rows.max() - 1]
        assert ends == pytest.approx((np.array(boxes) * [1, 1, -1, -1]).min(0), abs=1.5)


def test_boxes_are_written_for_the_clips_that_are_scored(data):
    found = json.loads((data / "labels" / "boxes.json").read_text())
    splits = sample_world.choose_clips({"train": 24, "validation": 12, "test": 12}, 0)
    assert set(found) == set(splits["validation"]) | set(splits["test"])
    for clip_id, clip in found.items():
        with av.open(str(data / "20bn-something-something-v2" / f"{clip_id}.webm")) as container:
            stream = container.streams.video[0]
            assert (clip["width"], clip["height"]) == (stream.width, stream.height)
            assert len(clip["frames"]) == len(list(container.decode(stream)))


def test_paraphrases_are_many_distinct_and_keep_the_things():
    for clip in sample_world.choose_clips({"train": 120}, seed=1)["train"].values():
        said = sample_world.paraphrases(clip)
        assert len(set(said)) == len(said) == 7 and clip.caption.lower() not in said
        assert all(name in text and "{" not in text for text in said for name in clip.placeholders)


def test_a_clip_written_again_is_the_same_file_byte_for_byte(tmp_path):
    frames = sample_world.render_clip(Clip("Moving [something] up", (RED_BALL,), 3), frames=6)
    for name in ("one.webm", "two.webm"):
        sample.write_video(tmp_path / name, frames)
    assert (tmp_path / "one.webm").read_bytes() == (tmp_path / "two.webm").read_bytes()


def test_rendering_again_is_allowed_and_into_anything_else_is_refused(data, tmp_path):
    again = ["render", "--data", str(data), "--train", "24", "--validation", "12"]
    sample.main([*again, "--test", "12"])
    with pytest.raises(files.UserError, match="another sample"):
        sample.main([*again, "--test", "13"])
    (tmp_path / "labels").mkdir()
    with pytest.raises(files.UserError, match="holds other files"):
        sample.main(["render", "--data", str(tmp_path)])
    assert list(tmp_path.iterdir()) == [tmp_path / "labels"]


@pytest.mark.parametrize("name", ["vjepa2", "qwen2"])
def test_the_committed_models_are_two_megabytes_or_less(name):
    assert 100_000 < sum(path.stat().st_size for path in (MODELS / name).iterdir()) <= 2_000_000


@torch.no_grad()
def test_the_encoders_tokens_know_their_place_as_a_random_encoders_do_not(data):
    """A linear probe reads each token's row of the grid, fitted on half of the clips and tried on the other half."""
    pixels, _ = sample_models.load_clips(sample_models.choose_clips(data)["train"], data)
    rows = torch.arange(64) // 4 % 4

    def probed(model: torch.nn.Module) -> float:
        tokens = model.eval().get_vision_features(sample_models.normalize(pixels)).double()
        fitted, tried = tokens[:12].flatten(0, 1), tokens[12:].flatten(0, 1)
        targets = torch.nn.functional.one_hot(rows.repeat(12)).double()
        weights = torch.linalg.solve(fitted.T @ fitted + torch.eye(128), fitted.T @ targets)
        return ((tried @ weights).argmax(-1) == rows.repeat(12)).double().mean().item()

    encoder = AutoModel.from_pretrained(MODELS / "vjepa2", dtype=torch.float32)
    assert isinstance(encoder, VJEPA2Model) and encoder.get_vision_features(pixels[:1] / 255).shape == (1, 64, 128)
    torch.manual_seed(0)
    random_encoder = VJEPA2Model(VJEPA2Config.from_pretrained(MODELS / "vjepa2"))
    assert probed(encoder) > 0.9 > 0.5 > probed(random_encoder)


@torch.no_grad()
def test_the_language_model_writes_the_caption_that_its_context_hints_at_and_ends_it():
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "qwen2")
    lm = AutoModelForCausalLM.from_pretrained(MODELS / "qwen2", dtype=torch.float32).eval()
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>" and lm.config.max_position_embeddings >= 512
    embedding = lm.get_input_embeddings().weight
    for hints, start in (
        (["moving up", "first purple cone"], " moving purple cone"),
        (["pushing from left to right", "first black cup"], " pushing black cup"),
        (["dropping onto", "second red ball", "first green cup"], " dropping green cup onto red"),
    ):
        places = [tokenizer(f" {hint}").input_ids for hint in hints]
        places = [[token] for token in places[0]] + places[1:]  # the action word by word, each thing in one place
        context = [embedding[ids].sum(0) for ids in 6 * places] + list(embedding[tokenizer(PROMPT + start).input_ids])
        ids = lm.generate(
            inputs_embeds=torch.stack(context)[None],
            attention_mask=torch.ones(1, len(context), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
        )[0]
        caption = start + tokenizer.decode(ids, skip_special_tokens=True)
        names = [" ".join(hint.split()[1:]) for hint in sorted(hints[1:])]
        expected = " " + hints[0].split()[0] + " " + names[0] + " " + " ".join([*hints[0].split()[1:], *names[1:]])
        assert ids[-1] == tokenizer.eos_token_id and caption.startswith(expected)


def test_any_text_survives_the_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "qwen2")
    text = "Zwei grüne Bälle, 3 <cups> \U0001f3a5\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_training_again_gives_the_same_models(data, tmp_path):
    for run in ("a", "b"):
        probes = sample_models.train_encoder(data, tmp_path / run / "vjepa2", steps=2, batch=4, clips=12)
        assert list(probes) == ["action", "first colour", "first shape", "second colour", "second shape"]
        assert all(
            0 <= share <= 1 and share * 12 == pytest.approx(round(share * 12), abs=0.01) for share in probes.values()
        )
        sample_models.train_lm(data, tmp_path / run / "qwen2", steps=2, batch=4)
    for name in ("vjepa2/model.safetensors", "qwen2/model.safetensors", "qwen2/tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_a_patch_shows_moves_as_the_thing_does():
    for template, sign in (
        ("Pushing [something] from left to right", 1),
        ("Pushing [something] from right to left", -1),
    ):
        clip, what, where = sample_models.answers_of(Clip(template, (RED_BALL,), seed=4))
        assert clip.tolist() == [sorted(ACTIONS).index(template), 0, 0, 6, 4]  # the last two: there is no second thing
        there = what[..., 2] == 0
        assert there.any() and torch.equal(there, (what[..., 0] == 0) & (what[..., 1] == 0))
        ways = sign * where[..., 2][there]
        assert ways.min() >= -1e-6 and ways.max() > 0.05
        columns = torch.arange(4.0).expand(4, 4, 4)
        first, last = (columns[t][there[t]].mean() for t in (0, -1))
        assert sign * (last - first) > 0.5


def test_fresh_clips_show_nothing_that_another_split_holds(data):
    splits = sample_models.choose_clips(data, fresh=600)
    fresh = splits["fresh"].values()
    assert 500 < len(fresh) <= 600
    for split in ("validation", "test"):
        held = splits[split].values()
        for of in (
            lambda clip: {(clip.template, thing) for thing in clip.things},
            lambda clip: {clip.caption},
            lambda clip: {clip.seed},
        ):
            assert not set().union(*map(of, fresh)) & set().union(*map(of, held))
    assert len({clip.caption for clip in fresh}) > len({clip.caption for clip in splits["train"].values()})


def test_a_drawn_clip_is_what_preprocessing_reads_from_its_file_but_for_noise(data):
    clips = sample_models.choose_clips(data)["validation"]
    (read, known), (drawn, same) = sample_models.load_clips(clips, data), sample_models.load_clips(clips)
    assert read.shape == (12, 8, 3, 64, 64) and all(map(torch.equal, known, same))
    difference = read.float() - drawn.float()
    assert difference.mean().abs() < 0.3 and difference.std() < 2.5
    others = read.float() - drawn.flip(1).float()  # the times are the right ones
    assert difference.std() < others.std() / 3
