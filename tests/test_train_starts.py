"""Where a run begins: new, from another run's weights (--init-from), or where it was; and what its end says."""

import json
import shutil

import pytest
import torch

import evaluate
import infer
import train
from models import checkpoint
from qformer import VideoCaptioner
from runtime.files import UserError
from tests import tiny
from tests.test_train import data, flags, models, outcome, run_train, run_until, without_java  # noqa: F401


@pytest.fixture
def first(data, models, tmp_path):  # noqa: F811
    """The checkpoint of a run of one epoch, whose sizes are not the defaults."""
    run_train(data, models, tmp_path / "first", epochs=1, num_heads=4, depth=2)
    return tmp_path / "first" / "checkpoint.pt"


def begin(data, out, monkeypatch, **changes):  # noqa: F811
    """What a run without sizes and --llm writes before its first step."""
    words = flags(data, "-", out, **changes)
    given = {"--llm": changes.get("llm"), "--num-queries": changes.get("num_queries"), "--num-heads": None}
    for name, value in given.items():
        if value is None:
            place = words.index(name)
            del words[place : place + 2]
    with monkeypatch.context() as patch:
        patch.setattr(train.Interrupts, "check", _stop)
        with pytest.raises(train.Interrupted):
            train.main(words)
    return checkpoint.read(out / "checkpoint.pt")


def _stop(_):
    raise train.Interrupted(15)


def test_a_new_run_begins_with_another_runs_weights_and_nothing_else_of_it(data, models, first, tmp_path, monkeypatch):  # noqa: F811
    made = checkpoint.read(first)
    begun = begin(data, tmp_path / "second", monkeypatch, init_from=first, seed=7)
    assert begun.weights.keys() == made.weights.keys()
    assert all(torch.equal(begun.weights[name], made.weights[name]) for name in made.weights)
    sizes = ("num_queries", "num_heads", "depth", "mlp_ratio", "dim", "visual_dim")
    assert [begun.config["qformer"][key] for key in sizes] == [4, 4, 2, 4, 32, 16]
    assert (begun.epoch, begun.progress["step"], begun.progress["history"]) == (0, 0, [])
    assert begun.optimizer["state"] == {}  # a new one
    assert begun.config["init_from"] == {"checkpoint": str(first), "epoch": 1}
    assert begun.config["llm"] == str(models) and begun.config["trained_by"].keys() == {"command", "commit"}


def test_a_folder_and_a_published_checkpoint_are_begun_with_too(data, models, first, tmp_path, monkeypatch):  # noqa: F811
    VideoCaptioner.from_checkpoint(first, device="cpu").save_pretrained(tmp_path / "folder")
    begun = begin(data, tmp_path / "second", monkeypatch, init_from=tmp_path / "folder")
    assert torch.equal(begun.weights["query_tokens"], checkpoint.read(first).weights["query_tokens"])
    assert begun.config["init_from"]["epoch"] == 1

    qformer = tiny.tiny_qformer(seed=9)
    state = {f"qformer.{name}": tensor for name, tensor in qformer.state_dict().items()}
    torch.save({"epoch": 8, "model_state_dict": state}, tmp_path / "published.pt")
    begun = begin(data, tmp_path / "third", monkeypatch, init_from=tmp_path / "published.pt", llm=models)
    assert torch.equal(begun.weights["query_tokens"], qformer.query_tokens)
    assert begun.config["caption_space"] is False and begun.config["init_from"]["epoch"] == 8


def test_a_run_that_began_with_weights_goes_on_from_itself_bit_for_bit(
    data,  # noqa: F811
    models,  # noqa: F811
    first,
    tmp_path,
    monkeypatch,
    capsys,
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings = {"init_from": first, "num_heads": 4, "seed": 3}
    run_train(data, models, whole, **settings)
    run_until(4, data, models, broken, monkeypatch, **settings)
    capsys.readouterr()
    shutil.rmtree(first.parent)  # it is needed no more
    run_train(data, models, broken, **settings)
    assert (
        f"--init-from {first} is not read: the run goes on from {broken / 'checkpoint.pt'}" in capsys.readouterr().out
    )
    assert outcome(whole) == outcome(broken)
    ended = checkpoint.read(broken / "checkpoint.pt").config
    assert ended == checkpoint.read(whole / "checkpoint.pt").config and ended["init_from"]["epoch"] == 1


def test_weights_that_do_not_fit_are_refused_in_one_line_and_nothing_is_written(data, models, first, tmp_path):  # noqa: F811
    wide, other = tmp_path / "wide", tmp_path / "other"
    tiny.make_dataset(wide)
    for path in (wide / "features").glob("*/*.pt"):
        torch.save(torch.zeros(6, 24).half(), path)
    (wide / "features" / "config.json").unlink()
    shutil.copytree(data, other)
    config = json.loads((other / "features" / "config.json").read_text())
    (other / "features" / "config.json").write_text(json.dumps({**config, "frames": 8}))
    tiny.tiny_lm(seed=1).save_pretrained(tmp_path / "lm1")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "lm1")
    good = {"data": data, "models": models, "num_heads": 4, "init_from": first}
    cases = [
        ({"num_queries": 5}, "first/checkpoint.pt is of another shape: --num-queries is 5, and was 4"),
        ({"num_heads": 2}, "--num-heads is 2, and was 4"),
        ({"depth": 1}, "--depth is 1, and was 2"),
        ({"data": wide}, "the width of the features is 24, and was 16"),
        ({"data": other}, "was trained on other features than those in .*frames 4, not 8"),
        ({"models": tmp_path / "lm1"}, "lm1 is not the language model that .* was trained with; give that one"),
        ({"published_captions": True}, "leave --published-captions out"),
        ({"init_from": tmp_path / "none.pt"}, "there is no file .*none.pt"),
    ]
    for changes, message in cases:
        with pytest.raises(UserError, match=message) as error:
            train.main(flags(**{**good, "out": tmp_path / "second", **changes}))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "second" / "checkpoint.pt").exists()


def test_a_run_goes_on_with_its_own_sizes_and_language_model(data, first, tmp_path, monkeypatch):  # noqa: F811
    words = flags(data, "-", first.parent, epochs=2)
    for name in ("--llm", "--num-queries", "--num-heads"):
        place = words.index(name)
        del words[place : place + 2]
    train.main(words)
    assert checkpoint.read(first).epoch == 2 and checkpoint.read(first).config["qformer"]["num_heads"] == 4


def test_a_checkpoint_says_what_it_was_trained_on_and_by(data, models, tmp_path, monkeypatch):  # noqa: F811
    for epochs, command in ((1, "python train.py"), (2, "python other.py")):
        monkeypatch.setattr(train.provenance, "made_by", lambda command=command: {"command": command, "commit": "1f2e"})
        run_train(data, models, tmp_path, epochs=epochs)
    saved = checkpoint.read(tmp_path / "checkpoint.pt")
    assert saved.config["trained_by"] == {"command": "python train.py", "commit": "1f2e"}  # as it began
    captioner = VideoCaptioner.from_checkpoint(tmp_path / "checkpoint.pt", device="cpu")
    assert captioner.recipe["lr"] == 1e-3 and captioner.recipe["clips"] == 10


def test_the_end_says_which_checkpoints_there_are_and_what_best_means(data, models, tmp_path, monkeypatch, capsys):  # noqa: F811
    scores = iter([0.1, 0.5, 0.2])
    monkeypatch.setattr(train.ngrams, "cider", lambda *_: next(scores))
    run_train(data, models, tmp_path, epochs=3)
    last, best = tmp_path / "checkpoint.pt", tmp_path / "checkpoint_best.pt"
    line = f"{last}: epoch 3; {best}: epoch 2, the best by CIDEr in validation (0.5000)"
    assert line in capsys.readouterr().out.splitlines()


def test_a_rehearsals_best_is_not_the_runs_and_a_checkpoint_that_goes_on_with_other_clips_says_so(
    data,  # noqa: F811
    models,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
):
    scores = iter([0.9, 0.5])
    monkeypatch.setattr(train.ngrams, "cider", lambda *_: next(scores))
    ready = {name: data / "annotations" / f"{name}_ready.json" for name in ("train", "val")}
    whole = {name: path.read_text() for name, path in ready.items()}
    try:
        for name, path in ready.items():
            path.write_text(json.dumps(json.loads(whole[name])[:2]))
        run_train(data, models, tmp_path, epochs=1)
    finally:
        for name, path in ready.items():
            path.write_text(whole[name])
    capsys.readouterr()
    run_train(data, models, tmp_path, epochs=2)
    said = capsys.readouterr().out
    assert "note: it has learnt from 2 clips of" in said and "and now from 10 clips of" in said
    assert "epoch 2, the best by CIDEr in validation (0.5000)" in said
    assert checkpoint.read(tmp_path / "checkpoint_best.pt").epoch == 2


def test_a_checkpoint_that_is_there_is_gone_on_from_and_not_begun_with(data, models, first, capsys):  # noqa: F811
    run_train(data, models, first.parent, epochs=2, num_heads=4, depth=2, init_from=first)
    said = capsys.readouterr().out
    assert f"--init-from {first} is not read" in said and "a new run begins" not in said
    assert "init_from" not in checkpoint.read(first).config


def test_evaluate_and_infer_take_the_best_checkpoint_where_none_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for script in (evaluate, infer):
        assert str(script.parse([]).checkpoint) == "checkpoint.pt"
    (tmp_path / "checkpoint_best.pt").touch()
    for script in (evaluate, infer):
        assert str(script.parse([]).checkpoint) == "checkpoint_best.pt"
        assert str(script.parse(["--checkpoint", "checkpoint.pt"]).checkpoint) == "checkpoint.pt"
        with pytest.raises(UserError):
            script.main(["--data", "nowhere"])
        assert capsys.readouterr().err == "captions by checkpoint_best.pt\n"
