"""Disks that fill up, folders that cannot be written and files that vanish, for real: one line, and nothing is lost."""

import contextlib
import os
import resource
import shutil
import subprocess

import pytest
import torch

import evaluate
import prepare_annotations
import preprocess_something_something_v2 as preprocess
import train
from dataset import Layout
from features import cache
from models import checkpoint
from runtime import cli, files
from tests import tiny, videos


class Disk:
    """A small file system of its own where that may be mounted, else a folder and a limit on the size of files."""

    def __init__(self, place, mounted):
        self.place, self.mounted = place, mounted

    @contextlib.contextmanager
    def full(self, leave):
        """Only `leave` bytes are free, or fit into a file."""
        if self.mounted:
            others = self.place / "others"
            with open(others, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(self.place).free - leave)
            yield "No space left on device"
            others.unlink()
        else:
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            # pytest writes what is printed into a file, too
            resource.setrlimit(resource.RLIMIT_FSIZE, (max(leave, 16384), before[1]))
            yield "File too large"
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    @contextlib.contextmanager
    def read_only(self):
        """Nothing can be written. (Root may write into folders whose permissions say otherwise.)"""
        if self.mounted:
            subprocess.run(["mount", "-o", "remount,ro", self.place], check=True)
            yield "Read-only file system"
            subprocess.run(["mount", "-o", "remount,rw", self.place], check=True)
        elif os.geteuid():
            folders = [self.place, *(path for path in self.place.rglob("*") if path.is_dir())]
            for folder in folders:
                folder.chmod(0o555)
            yield "Permission denied"
            for folder in folders:
                folder.chmod(0o755)
        else:
            pytest.skip("root, but not allowed to mount")


@pytest.fixture
def disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    asked = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(place)]
    mounted = os.geteuid() == 0 and bool(shutil.which("mount"))
    mounted = mounted and subprocess.run(asked, capture_output=True).returncode == 0
    yield Disk(place, mounted)
    if mounted:
        subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny.save_lm(tmp_path_factory.mktemp("models") / "lm")


@pytest.fixture(autouse=True)
def no_java(monkeypatch):
    """Which takes a second a call."""
    monkeypatch.setattr(train.ngrams, "cider", lambda *_: 0.0)
    found = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, *more: None if name == "java" else found(name, *more))


def ended(main, words, capsys):
    """The exit code and the one line of an error, as the shell gets them."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: main(words))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    return stopped.value.code, errors[0]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "others"}


def training(data, models, out, epochs):
    words = f"--data {data} --llm {models} --checkpoint {out}/checkpoint.pt --results {out}/results --num-queries 4"
    words += f" --num-heads 2 --epochs {epochs} --batch-size 2 --accumulate 2 --lr 1e-3 --max-new-tokens 5"
    return [*words.split(), "--save-every", "1"]


def state(out):
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    return {name: tensor.numpy().tobytes() for name, tensor in saved["model_state_dict"].items()}, saved["progress"]


def test_training_on_a_disk_that_fills_up_loses_nothing(models, disk, tmp_path, capsys):
    data, out = tiny.make_dataset(tmp_path / "data"), disk.place / "run"
    train.main(training(data, models, tmp_path / "whole", 2))
    train.main(training(data, models, out, 1))
    before = contents(out)
    for leave in (0, 4096, 65536):  # nothing, less than a tensor, less than a checkpoint
        with disk.full(leave) as reason:
            code, line = ended(train.main, training(data, models, out, 2), capsys)
        assert code == 1 and reason in line and "checkpoint.pt" in line
        assert contents(out) == before
    train.main(training(data, models, out, 2))  # there is room again
    assert state(out) == state(tmp_path / "whole")


def test_what_cannot_be_written_is_found_before_the_work(models, disk, tmp_path, capsys, monkeypatch):
    data, out = tiny.make_dataset(tmp_path / "data"), disk.place / "run"
    train.main(training(data, models, out, 1))
    evaluation = f"--data {data} --checkpoint {out}/checkpoint.pt --results {out}/evaluated --no-meteor".split()
    before = contents(out)

    def work(*_):
        raise AssertionError("it began")

    monkeypatch.setattr(train, "train", work)
    monkeypatch.setattr(evaluate, "evaluate", work)
    with disk.read_only() as reason:
        for main, words in ((train.main, training(data, models, out, 2)), (evaluate.main, evaluation)):
            code, line = ended(main, words, capsys)
            assert code == 1 and reason in line and str(out) in line
    (tmp_path / "file").write_text("in the way")
    for main, flag in ((train.main, "--checkpoint"), (train.main, "--results"), (evaluate.main, "--results")):
        words = training(data, models, out, 2) if main is train.main else evaluation
        place = tmp_path / "file" / "x.pt" if flag == "--checkpoint" else tmp_path / "file"
        code, line = ended(main, [*words, flag, str(place)], capsys)
        assert code == 1 and str(tmp_path / "file") in line
    code, line = ended(train.main, [*training(data, models, out, 2), "--checkpoint", str(tmp_path)], capsys)
    assert code == 2 and "is a folder" in line
    assert contents(out) == before


def test_evaluation_on_a_disk_that_fills_up_leaves_the_last_one_whole(models, disk, tmp_path, capsys):
    data, out = tiny.make_dataset(tmp_path / "data"), disk.place / "evaluated"
    train.main(training(data, models, tmp_path, 1))
    words = (
        f"--data {data} --checkpoint {tmp_path}/checkpoint.pt --results {out} --no-meteor --max-new-tokens 5".split()
    )
    assert evaluate.main(words) == 0
    before = contents(out)
    for leave in (0, 8192):  # nothing, and less than the page
        with disk.full(leave) as reason:
            code, line = ended(evaluate.main, [*words, "--max-new-tokens", "7"], capsys)
        assert code == 1 and reason in line and str(out) in line
        after = contents(out)
        assert after.keys() == before.keys() and after[out / "index.html"] == before[out / "index.html"]
        files.read_json(out / "evaluation.json", "it")


def test_preparing_on_a_disk_that_fills_up_or_is_read_only_leaves_what_was_there(disk, tmp_path, capsys):
    data = tiny.make_dataset(disk.place / "data", train=100)
    words = ["--data", str(data)]
    prepare_annotations.main(words)
    (data / "ssv2_paraphrase.json").write_text('{"1": ["%s"]}' % ("a word " * 200))
    before = contents(data)
    for spoilt in (disk.full(4096), disk.read_only()):
        with spoilt as reason:
            code, line = ended(prepare_annotations.main, words, capsys)
        assert code == 1 and reason in line and "train_ready.json" in line
        assert contents(data) == before
    prepare_annotations.main(words)
    assert contents(data) != before


def test_preprocessing_on_a_disk_that_fills_up_or_is_read_only_goes_on_later(disk, tmp_path, capsys, monkeypatch):
    if not disk.mounted:
        pytest.skip("features are smaller than the limit on a file's size")
    data, plan = disk.place / "data", preprocess.make_plan
    videos.write_dataset(data, {"train": 15})
    words = f"--data {data} --encoder {videos.tiny_vjepa(tmp_path / 'encoder')} --splits train --frames 4 --workers 1"

    with contextlib.ExitStack() as others:

        def then_others_fill_it(*arguments):
            planned = plan(*arguments)
            others.enter_context(disk.full(6 * 4096))
            return planned

        monkeypatch.setattr(preprocess, "make_plan", then_others_fill_it)
        code, error = ended(preprocess.main, words.split(), capsys)
    monkeypatch.setattr(preprocess, "make_plan", plan)
    assert code == 1 and "No space left on device" in error
    kept = list(data.rglob("*.pt"))
    assert 0 < len(kept) < 15 and not list(data.rglob(".*.tmp"))
    for path in kept:
        cache.load(path)
    with disk.read_only() as reason:
        code, error = ended(preprocess.main, words.split(), capsys)
    assert code == 1 and reason in error
    assert preprocess.main(words.split()) == 0
    assert len(list(data.rglob("*.pt"))) == 15


@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_a_file_that_vanishes_ends_the_run_with_one_line_and_code_1(models, tmp_path, capsys, monkeypatch, script):
    data = tiny.make_dataset(tmp_path / "data")
    train.main(training(data, models, tmp_path, 1))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    gone = Layout(data).features / ("train/4.pt" if script == "train" else "validation/14.pt")
    words = training(data, models, tmp_path, 2)
    if script == "evaluate":
        words = f"--data {data} --checkpoint {tmp_path}/checkpoint.pt --results {tmp_path}/out --batch-size 1".split()
    main = {"train": train.main, "evaluate": evaluate.main}[script]
    place = (train, "train_epoch") if script == "train" else (evaluate, "evaluate")
    begin = getattr(*place)

    def begin_without(*arguments):
        gone.unlink()
        return begin(*arguments)

    monkeypatch.setattr(*place, begin_without)
    code, line = ended(main, words, capsys)
    assert code == 1 and f"No such file or directory: {gone}; it is gone" in line
    assert checkpoint.read(tmp_path / "checkpoint.pt").epoch == 1
    if script == "evaluate":
        assert (tmp_path / "checkpoint.pt").read_bytes() == before and not (
            tmp_path / "out" / "evaluation.json"
        ).exists()
    assert not list(tmp_path.rglob(".*.tmp"))
