import json
import os
import random
import shutil
import signal
import time

import pytest
import torch

import train
from models import checkpoint
from qformer import VideoCaptioner
from runtime.files import UserError
from runtime.signals import Interrupted
from tests import processes, tiny


@pytest.fixture(autouse=True)
def without_java(request, monkeypatch):
    """Each call of Java takes a second; the test of what a run leaves has it."""
    if request.function is not test_a_run_leaves_what_was_promised:
        monkeypatch.setenv("PATH", "/nowhere")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny.save_lm(tmp_path_factory.mktemp("models") / "lm")


@pytest.fixture
def data(tmp_path):
    return tiny.make_dataset(tmp_path / "data")


def flags(data, models, out, **changes):
    wanted = {
        "data": data,
        "llm": models,
        "checkpoint": out / "checkpoint.pt",
        "results": out / "results",
        "num_queries": 4,
        "num_heads": 2,
        "epochs": 2,
        "batch_size": 2,
        "accumulate": 2,
        "lr": 1e-3,
        "max_new_tokens": 5,
        **changes,
    }
    words = []
    for name, value in wanted.items():
        words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return words


def run_train(data, models, out, **changes):
    return train.main(flags(data, models, out, **changes))


def run_until(place, data, models, out, monkeypatch, **changes):
    """A run that a signal ends before its batch number `place`."""
    calls = iter(range(1000))

    def stop_once(self):
        if next(calls) == place:
            raise Interrupted(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(train.Interrupts, "check", stop_once)
        with pytest.raises(Interrupted):
            run_train(data, models, out, **changes)


def outcome(out):
    """All that a run leaves behind, in a form that shows every bit."""
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    weights = {name: tensor.numpy().tobytes() for name, tensor in saved["model_state_dict"].items()}
    texts = {path.name: path.read_bytes() for path in [out / "losses.txt", *sorted((out / "results").glob("*.json"))]}
    return weights, texts, saved["progress"], saved["epoch"]


def test_a_run_leaves_what_was_promised(data, models, tmp_path):
    run_train(data, models, tmp_path, schedule="cosine", warmup=0.1, clip_norm=1.0)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["epoch"] == 2 and set(saved) >= {"model_state_dict", "optimizer_state_dict", "train_loss", "config"}
    assert all(name.startswith("qformer.") for name in saved["model_state_dict"])  # the frozen LM is not in it
    lines = (tmp_path / "losses.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == ["Epoch 1", "Epoch 2"]
    assert "train_loss=" in lines[0] and "val_loss=" in lines[0]
    content = json.loads((tmp_path / "results" / "validation_epoch_2.json").read_text())
    assert list(content["predictions"]) == [str(clip) for clip in range(11, 16)]
    assert isinstance(content["CIDEr"], float)
    assert (tmp_path / "results" / "losses.png").stat().st_size > 1000
    page = (tmp_path / "results" / "training" / "index.html").read_text()
    for shown in ('"template":"Moving [something] up"', '"outcome":', '"score":0', "template accuracy", "at "):
        assert shown in page
    recipe = page.split('<details id="recipe">')[1].split("</details>")[0]
    for shown in ("schedule cosine", "grad clip 1.0", "<dt>epoch</dt><dd>2</dd>", "checkpoint.pt"):
        assert shown in recipe
    assert (tmp_path / "checkpoint_best.pt").exists()


def test_the_flags_of_model_and_optimizer_are_what_is_trained(data, models, tmp_path):
    wanted = {"num_queries": 3, "num_heads": 4, "depth": 2, "mlp_ratio": 2, "dropout": 0.2, "mlp_dropout": 0.4}
    run_train(data, models, tmp_path, **wanted, epochs=1, weight_decay=0.5, lr=3e-3)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert {key: saved["config"]["qformer"][key] for key in wanted} == wanted
    assert saved["model_state_dict"]["qformer.blocks.1.mlp.0.weight"].shape == (2 * 32, 32)
    settings = saved["optimizer_state_dict"]["param_groups"][0]
    assert (settings["weight_decay"], settings["lr"]) == (0.5, 3e-3)


def test_gradients_are_clipped_to_their_longest(data, models, tmp_path, monkeypatch):
    norms, step = [], torch.optim.AdamW.step

    def look(self):
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        norms.append(torch.cat(gradients).norm().item())
        return step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    for longest in (0, 1e-3):
        run_train(data, models, tmp_path / str(longest), epochs=1, clip_norm=longest)
    unclipped, clipped = norms[: len(norms) // 2], norms[len(norms) // 2 :]
    assert min(unclipped) > 1e-2 and clipped == pytest.approx([1e-3] * len(clipped), rel=1e-3)


def test_only_the_qformer_learns_and_the_loss_falls(data, models, tmp_path):
    run_train(data, models, tmp_path, epochs=12, lr=1e-2, dropout=0, mlp_dropout=0)
    history = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["progress"]["history"]
    assert history[-1]["train_loss"] < history[0]["train_loss"] - 0.25


def test_the_best_checkpoint_is_never_replaced_by_a_worse_one(data, models, tmp_path, monkeypatch):
    scores = iter([0.1, 0.5, 0.2])
    monkeypatch.setattr(train.ngrams, "cider", lambda *_: next(scores))
    run_train(data, models, tmp_path, epochs=3)
    best = torch.load(tmp_path / "checkpoint_best.pt", weights_only=True)
    assert best["epoch"] == 2 and best["progress"]["history"][-1]["CIDEr"] == 0.5


def test_a_new_run_moves_another_runs_best_checkpoint_aside_and_says_so(data, models, tmp_path, capsys):
    run_train(data, models, tmp_path, epochs=2)
    best = (tmp_path / "checkpoint_best.pt").read_bytes()
    (tmp_path / "checkpoint.pt").unlink()
    run_train(data, models, tmp_path, epochs=1, seed=3)
    assert f"{tmp_path / 'checkpoint_best_before.pt'} now" in capsys.readouterr().out
    assert (tmp_path / "checkpoint_best_before.pt").read_bytes() == best
    assert torch.load(tmp_path / "checkpoint_best.pt", weights_only=True)["epoch"] == 1


def test_a_run_in_two_halves_equals_one_undisturbed(data, models, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run_train(data, models, whole, epochs=2)
    run_train(data, models, halves, epochs=1)
    run_train(data, models, halves, epochs=2)
    assert outcome(whole) == outcome(halves)


@pytest.mark.parametrize("place", [1, 4, 7])
def test_an_interruption_at_any_batch_changes_nothing(data, models, tmp_path, monkeypatch, place):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_train(data, models, whole, captions_per_clip=2)
    run_until(place, data, models, broken, monkeypatch, captions_per_clip=2)
    run_train(data, models, broken, captions_per_clip=2)
    assert outcome(whole) == outcome(broken)


def test_killed_at_random_moments_and_resumed_ends_bit_identical(models, tmp_path):
    """SIGKILL at five random moments, anywhere between start-up and the last validation."""
    data = tiny.make_dataset(tmp_path / "data", train=60)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings = {"epochs": 3, "save_every": 2, "accumulate": 1}
    processes.Script("train", ["--help"], tmp_path / "log").wait()  # the first one imports for all of them
    began = time.monotonic()
    assert processes.Script("train", flags(data, models, whole, **settings), tmp_path / "log").wait() == 0
    length = time.monotonic() - began
    generator, kills = random.Random(), 0
    while kills < 5:
        script = processes.Script("train", flags(data, models, broken, **settings), tmp_path / "log")
        script.process.join(generator.uniform(0, length * 0.5))
        script.process.kill()
        if script.wait() == 0:  # it had come to the end: begin again
            shutil.rmtree(broken)
            continue
        kills += 1
    assert processes.Script("train", flags(data, models, broken, **settings), tmp_path / "log").wait() == 0
    assert outcome(whole) == outcome(broken)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_exit_with_their_code(data, models, tmp_path, number, code):
    words = flags(data, models, tmp_path, epochs=100000, save_every=100000)
    script = processes.Script("train", words, tmp_path / "log")
    for _ in range(600):
        if (tmp_path / "losses.txt").exists():
            break
        time.sleep(0.1)
    os.kill(script.process.pid, number)
    assert script.wait(60) == code and script.errors() == ["error: interrupted; what was written is kept"]
    assert checkpoint.read(tmp_path / "checkpoint.pt").epoch >= 1


def test_eval_only_touches_no_checkpoint(data, models, tmp_path):
    run_train(data, models, tmp_path, epochs=1)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    first = (tmp_path / "results" / "validation_epoch_1.json").read_bytes()
    (tmp_path / "results" / "validation_epoch_1.json").unlink()
    run_train(data, models, tmp_path, epochs=1, eval_only=True)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert (tmp_path / "results" / "validation_epoch_1.json").read_bytes() == first


def test_a_published_checkpoint_is_gone_on_from(data, models, tmp_path):
    qformer = tiny.tiny_qformer(num_heads=2)
    state = {f"qformer.{name}": tensor for name, tensor in qformer.state_dict().items()}
    state["text_model.lm_head.weight"] = torch.zeros(3)
    path = tmp_path / "checkpoint.pt"
    published = {"epoch": 1, "model_state_dict": state, "optimizer_state_dict": {}, "train_loss": 1.0}
    torch.save(published, path)
    run_train(data, models, tmp_path, epochs=2)
    assert checkpoint.read(path).epoch == 2
    assert (tmp_path / "losses.txt").read_text().startswith("Epoch 2:")


def test_a_loss_that_is_not_finite_stops_names_the_clips_and_keeps_the_checkpoint(data, models, tmp_path, monkeypatch):
    run_train(data, models, tmp_path, epochs=1)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(
        VideoCaptioner, "per_caption_nll", lambda self, *_: self.qformer.query_tokens.sum()[None] * float("nan")
    )
    with pytest.raises(UserError, match=r"not finite .* step 1, clips (\d+ ?)+;"):
        run_train(data, models, tmp_path, epochs=2)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_mistakes_are_one_line_with_exit_code_2_and_overwrite_nothing(data, models, tmp_path):
    run_train(data, models, tmp_path, epochs=1, save_every=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    cases = [
        ({"data": tmp_path / "nowhere"}, "no data set"),
        ({"num_queries": 5}, "another shape"),
        ({"llm": tmp_path / "no-model"}, "does not load"),
        ({"num_heads": 3}, "--num-heads"),
        ({"checkpoint": tmp_path / "other.pt", "eval_only": True}, "no checkpoint"),
    ]
    for changes, message in cases:
        with pytest.raises(UserError, match=message) as error:
            train.main(flags(**{"data": data, "models": models, "out": tmp_path, **changes}))
        assert "\n" not in str(error.value)
    script = processes.Script("train", flags(data, models, tmp_path, batch_size=0), tmp_path / "log")
    assert script.wait() == 2 and "not a whole number, 1 or more" in script.said()
    assert {path: path.read_bytes() for path in before} == before


def test_data_trouble_is_counted_named_or_refused(data, models, tmp_path, capsys):
    (data / "features" / "train" / "3.pt").unlink()
    with pytest.raises(UserError, match="1 of 10 train clips have no features .* first is 3"):
        run_train(data, models, tmp_path)
    path = data / "annotations" / "train_ready.json"
    records = json.loads(path.read_text())
    records[0]["label"] = ["", "  "]
    records[1]["label"] = ["word " * 400, records[1]["label"][0]]
    path.write_text(json.dumps(records))
    run_train(data, models, tmp_path, max_missing=20, epochs=1)
    said = capsys.readouterr().out
    assert "1 clips have no features" in said and "1 captions are longer than" in said
    features = torch.load(data / "features" / "train" / "4.pt", weights_only=True)
    features[2, 3] = float("nan")
    torch.save(features, data / "features" / "train" / "4.pt")
    with pytest.raises(UserError, match="4.pt holds NaN or Inf"):
        run_train(data, models, tmp_path, max_missing=20, epochs=2)
    (data / "features" / "train" / "4.pt").write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(UserError, match="4.pt"):
        run_train(data, models, tmp_path, max_missing=20, epochs=2)
    records.append(dict(records[0]))
    path.write_text(json.dumps(records))
    with pytest.raises(UserError, match="there twice"):
        run_train(data, models, tmp_path)


def test_a_cache_of_another_encoder_is_refused(data, models, tmp_path):
    run_train(data, models, tmp_path, epochs=1)
    path = data / "features" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "encoder": "another", "frames": 8}))
    with pytest.raises(UserError, match="other features"):
        run_train(data, models, tmp_path, epochs=2)


def test_place_within_an_epoch_is_not_read_with_other_batches(data, models, tmp_path, monkeypatch):
    run_until(3, data, models, tmp_path, monkeypatch)
    with pytest.raises(UserError, match="--batch-size at 2, now 3"):
        run_train(data, models, tmp_path, batch_size=3)


def test_settings_that_change_within_an_epoch_are_told(data, models, tmp_path, monkeypatch, capsys):
    run_until(3, data, models, tmp_path, monkeypatch)
    capsys.readouterr()
    run_train(data, models, tmp_path, lr=5e-4, schedule="cosine")
    notes = [line for line in capsys.readouterr().out.splitlines() if "until here" in line]
    assert notes == [
        "note: --lr was 0.001 until here, and is 0.0005 from here on",
        "note: --schedule was constant until here, and is cosine from here on",
    ]


def test_a_language_model_without_a_last_position_trains_on_all_captions(data, models, tmp_path, monkeypatch):
    monkeypatch.setattr(VideoCaptioner, "max_caption_tokens", None)
    run_train(data, models, tmp_path, epochs=1)
