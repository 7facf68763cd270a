"""Many processes: the same results as one, every clip once, and an end with a reason when one of them dies."""

import importlib
import json
import os
import shutil
import signal
import sys
import time

import pytest
import torch

import train
from models import checkpoint
from runtime.distributed import DistributedContext
from runtime.files import UserError
from tests import processes, tiny, videos


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny.save_lm(tmp_path_factory.mktemp("models") / "lm")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """10 clips to train on in batches of 4, and 5 to validate: neither 2 nor 3 ranks divide them."""
    return tiny.make_dataset(tmp_path_factory.mktemp("ranks") / "data")


def flags(data, models, out, *more):
    words = f"--data {data} --llm {models} --checkpoint {out}/checkpoint.pt --results {out}/results --num-queries 4"
    words += " --num-heads 2 --epochs 2 --batch-size 4 --accumulate 2 --captions-per-clip 2 --eval-batch-size 2"
    words += " --lr 1e-3 --dropout 0 --mlp-dropout 0 --max-new-tokens 5"
    return [*words.split(), *map(str, more)]


def evaluation(data, out):
    words = f"--data {data} --checkpoint {out}/checkpoint.pt --results {out}/evaluated --batch-size 2"
    words += " --max-new-tokens 5 --no-meteor --actions --grounding"
    return words.split()


def without_java():
    os.environ["PATH"] = "/nowhere"


@pytest.fixture(scope="module")
def trained(data, models, tmp_path_factory):
    """A checkpoint of one epoch."""
    out = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "/nowhere")  # without Java, which takes a second a call
        train.main(flags(data, models, out, "--epochs", 1))
    return out


@pytest.fixture(scope="module")
def filmed(tmp_path_factory):
    """The same clips without features, but with videos and an encoder for them."""
    root = tmp_path_factory.mktemp("filmed")
    data = tiny.make_dataset(root / "data", features=False)
    for clip in range(1, 16):
        videos.write(data / "20bn-something-something-v2" / f"{clip}.webm", videos.moving(6, seed=clip))
    videos.tiny_vjepa(root / "encoder")
    return root


def everything(filmed, models, out):
    """The words of all three scripts for a copy of the videos."""
    data = shutil.copytree(filmed / "data", out / "data")
    preprocessing = f"--data {data} --encoder {filmed}/encoder --frames 4 --workers 1".split()
    return [
        ("preprocess_something_something_v2", preprocessing),
        ("train", flags(data, models, out)),
        ("evaluate", evaluation(data, out)),
    ]


@pytest.fixture(scope="module")
def alone(filmed, models, tmp_path_factory):
    """What one process makes of it."""
    out = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "/nowhere")
        for script, words in everything(filmed, models, out):
            assert not importlib.import_module(script).main(words)
    return out


def history(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)["progress"]["history"]


def result(out):
    found = json.loads((out / "evaluated" / "evaluation.json").read_text())
    del found["recipe"]["trained_by"]  # another command, as in "made_by"
    return {key: value for key, value in found.items() if key not in ("checkpoint", "made_by")}


@pytest.fixture(scope="module", params=[3])
def by_many(request, filmed, models, tmp_path_factory):
    """The same, made by several processes; and what they printed."""
    out = tmp_path_factory.mktemp("by_many")
    said = ""
    for script, words in everything(filmed, models, out):
        run = processes.Ranks(request.param, script, words, out / f"logs-{script}", without_java)
        assert run.wait() == [0] * request.param, run.errors()
        said += "".join(rank.said() for rank in run.scripts)
    return out, said


def test_many_processes_give_what_one_gives(alone, by_many):
    """The same features, losses and scores, and captions of all clips once."""
    out, said = by_many
    cached = [{path.name: path.read_bytes() for path in place.glob("data/features/*/*")} for place in (out, alone)]
    assert cached[0] == cached[1] and len(cached[0]) == 15
    for ours, theirs in zip(history(out), history(alone), strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], abs=1e-5)
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], abs=1e-5)
    for name in ("validation_epoch_1.json", "validation_epoch_2.json"):
        ours, theirs = (json.loads((place / "results" / name).read_text())["predictions"] for place in (out, alone))
        assert ours == theirs and list(ours) == ["11", "12", "13", "14", "15"]
    assert result(out) == result(alone)
    for line in ("15 to encode", "curves:", "BLEU-4"):  # one rank prints
        assert said.count(line) == 1
    assert "error:" not in said


def test_torchrun_that_is_asked_to_end_saves_a_checkpoint(data, models, tmp_path):
    words = ["train.py", *flags(data, models, tmp_path, "--epochs", 10**6, "--save-every", 10**6, "--workers", 0)]
    with processes.torchrun(2, words, tmp_path / "log") as run:
        wait_for(tmp_path / "losses.txt", run)
        os.kill(run.pid, signal.SIGTERM)
        assert run.wait(60) != 0
    said = (tmp_path / "log").read_text()
    assert said.count("the same command goes on from") == 1
    saved = checkpoint.read(tmp_path / "checkpoint.pt")
    assert saved.epoch >= 1 and len(saved.progress["history"]) == saved.epoch


def wait_for(path, process, seconds=240):
    for _ in range(seconds * 10):
        if path.exists():
            return
        assert process.poll() is None, f"it ended with {process.poll()}"
        time.sleep(0.1)
    raise AssertionError(f"{path} did not come")


def test_a_rank_that_is_killed_ends_the_others_with_its_reason_and_a_checkpoint(data, models, tmp_path):
    words = flags(data, models, tmp_path, "--epochs", 100000, "--save-every", 100000)
    run = processes.Ranks(3, "train", words, tmp_path / "logs", without_java)
    wait_for(tmp_path / "losses.txt", run.scripts[0])
    run.scripts[1].process.kill()
    assert run.wait(60) == [1, -signal.SIGKILL, 1]
    assert len(run.errors()) == 2 and all("another process of this run has ended" in line for line in run.errors())
    assert checkpoint.read(tmp_path / "checkpoint.pt").epoch >= 1


@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_an_error_that_only_one_rank_has_is_told_and_ends_the_others(models, trained, tmp_path, script):
    data = tiny.make_dataset(tmp_path / "data")
    (data / "features" / "validation" / "12.pt").write_bytes(b"PK damaged")  # rank 1 of 2 reads it
    words = flags(data, models, tmp_path) if script == "train" else evaluation(data, trained)
    run = processes.Ranks(2, script, words, tmp_path / "logs", without_java)
    assert run.wait(60) == [1, 2]
    (line,) = run.scripts[1].errors()
    assert "12.pt is damaged" in line
    (line,) = run.scripts[0].errors()
    assert "another process of this run has ended" in line


def test_a_mistake_that_all_ranks_make_ends_all_of_them(data, models, tmp_path):
    run = processes.Ranks(3, "train", flags(data, models, tmp_path, "--num-heads", "3"), tmp_path / "logs")
    assert run.wait(60) == [2, 2, 2]
    assert all("choose another --num-heads" in line for line in run.errors())


def test_ranks_that_start_from_different_states_are_refused(data, models, trained, tmp_path):
    """As on two machines, of which one has the checkpoint: they would average gradients of different weights."""
    words = flags(data, models, tmp_path, "--checkpoint", "%s/checkpoint.pt")
    run = processes.Ranks(2, "train", words, tmp_path / "logs", first_has_a_checkpoint, TRAINED=trained, EMPTY=tmp_path)
    assert run.wait(60) == [2, 2]
    line, _ = run.errors()
    assert "the processes do not have the same clips and checkpoint" in line


def first_has_a_checkpoint():
    folder = os.environ["TRAINED"] if os.environ["RANK"] == "0" else os.environ["EMPTY"]
    sys.argv = [word.replace("%s", folder) for word in sys.argv]


def test_every_item_is_in_one_ranks_shard():
    items = list(range(7))
    shards = []
    for rank in range(3):
        context = DistributedContext()
        context.world_size, context.rank = 3, rank
        shards += context.shard(items)
    assert sorted(shards) == items


def test_more_processes_than_gpus_are_refused_in_words(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="--device cuda:1: there is no such device here; there is cpu, cuda, cuda:0"):
        DistributedContext()
