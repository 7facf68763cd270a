import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import time
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import preprocess_something_something_v2 as preprocess
from features import cache, writer
from models.vjepa2 import VideoEncoder
from runtime import cli
from runtime.files import UserError
from tests import processes, videos
from tests.fuzz import videos as fuzz_videos
from video.reader import read_clip

MODULE = "preprocess_something_something_v2"
# Beside what processes.py has asked for: seconds of processor time for each process that is started here.
forkserver._forkserver._preload_modules += [MODULE, "transformers.models.vjepa2.modeling_vjepa2"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return videos.tiny_vjepa(tmp_path_factory.mktemp("vjepa"))


@pytest.fixture(scope="module")
def filmed(tmp_path_factory):
    """11 clips to train on and 4 to validate."""
    data = tmp_path_factory.mktemp("filmed")
    videos.write_dataset(data, {"train": 11, "validation": 4})
    return data


@pytest.fixture
def data(filmed, tmp_path):
    return shutil.copytree(filmed, tmp_path / "data")


@pytest.fixture(scope="module")
def undisturbed(filmed, tiny, tmp_path_factory):
    """The features that one run makes, by path."""
    data = shutil.copytree(filmed, tmp_path_factory.mktemp("undisturbed") / "data")
    (data / "20bn-something-something-v2" / "tr4.webm").write_bytes(b"no video")
    assert preprocess.main(words(data, tiny)) == 0
    return contents(data)


def words(data, encoder, *more):
    return f"--data {data} --encoder {encoder} --frames 4 --batch-size 3 --workers 2".split() + list(map(str, more))


def contents(data):
    """Every file of the cache, hidden ones too, with its bytes."""
    folder = Path(data) / "features"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def video(data, clip):
    return data / "20bn-something-something-v2" / f"{clip}.webm"


def failures(data, split="train"):
    path = data / "features" / split / "failures.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---- what is written ----


def test_each_clip_is_cached_as_the_encoder_sees_it(data, tiny):
    assert preprocess.main(words(data, tiny)) == 0
    encoder = VideoEncoder(tiny, "cpu", frames=4)
    files_written = contents(data)
    assert len(files_written) == 11 + 4 + 1
    for split, ids in (("train", range(11)), ("validation", range(4))):
        for clip in (f"{split[:2]}{number}" for number in ids):
            stored = torch.load(data / "features" / split / f"{clip}.pt", weights_only=True)
            expected = encoder.encode(read_clip(video(data, clip), 4, encoder.transform)[0][None])[0]
            assert stored.dtype == torch.float16
            assert torch.allclose(stored.float(), expected, atol=2e-3)
    config = cache.read_config(data / "features")
    assert (config.encoder, config.frames, config.size, config.tokens, config.dim) == (str(tiny), 4, 32, 32, 24)


def test_int8_and_pool_are_stored_as_asked_for(data, tiny):
    preprocess.main(words(data, tiny, "--dtype", "int8", "--pool", 2, "--crop", "--splits", "validation"))
    packed = cache.load(data / "features" / "validation" / "va0.pt")
    assert packed.values.dtype == torch.int8
    assert packed.values.shape == (8, 24)
    config = cache.read_config(data / "features")
    assert (config.dtype, config.pool, config.tokens, config.crop) == ("int8", 2, 8, True)
    encoder = VideoEncoder.from_config(config.to_dict())
    features = encoder.encode(read_clip(video(data, "va0"), 4, encoder.transform)[0][None])
    expected = cache.dequantize(cache.quantize(features, "int8", 2, encoder.grid))
    assert torch.allclose(cache.dequantize(packed), expected, atol=0.05)
    assert not (data / "features" / "train").exists()


def test_it_says_beforehand_how_many_clips_and_bytes(data, tiny, capsys):
    preprocess.main(words(data, tiny))
    said = capsys.readouterr().out
    size = (data / "features" / "train" / "tr0.pt").stat().st_size
    assert f"15 clips (train, validation): 0 cached, 15 to encode; {size:,} bytes a clip" in said
    assert f"{15 * size / 1000:.1f}kB to write" in said


def test_a_second_run_encodes_nothing_and_touches_nothing(data, tiny, capsys):
    preprocess.main(words(data, tiny))
    before = {path: path.stat().st_mtime_ns for path in (data / "features").rglob("*.pt")}
    capsys.readouterr()
    preprocess.main(words(data, tiny))
    assert {path: path.stat().st_mtime_ns for path in (data / "features").rglob("*.pt")} == before
    assert "15 cached, 0 to encode" in capsys.readouterr().out


def test_a_truncated_feature_file_is_made_again_and_only_that_one(data, tiny):
    preprocess.main(words(data, tiny))
    before = contents(data)
    damaged = data / "features" / "train" / "tr3.pt"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    times = {path: path.stat().st_mtime_ns for path in (data / "features").rglob("*.pt") if path != damaged}
    preprocess.main(words(data, tiny))
    assert contents(data) == before
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_mp4_is_accepted_beside_webm(data, tiny):
    video(data, "va1").unlink()
    videos.write(video(data, "va1").with_suffix(".mp4"), videos.moving(10), "libx264")
    preprocess.main(words(data, tiny, "--splits", "validation"))
    assert (data / "features" / "validation" / "va1.pt").exists()


# ---- what is refused ----


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--frames", 8], "frames 4, not 8"),
        (["--crop"], "crop False, not True"),
        (["--dtype", "int8"], "dtype float16, not int8"),
        (["--pool", 2], "pool 1, not 2"),
        (["--encoder", "other"], "weights"),
    ],
)
def test_features_of_another_kind_are_not_mixed(data, tiny, tmp_path, flags, said):
    preprocess.main(words(data, tiny, "--splits", "validation"))
    before = contents(data)
    if flags[0] == "--encoder":
        flags = ["--encoder", videos.tiny_vjepa(tmp_path / "other", seed=1)]
    with pytest.raises(UserError, match=said):
        preprocess.main(words(data, tiny, *flags))
    assert contents(data) == before


def test_the_same_encoder_moved_elsewhere_goes_on(data, tiny, tmp_path):
    preprocess.main(words(data, tiny, "--splits", "validation"))
    assert preprocess.main(words(data, shutil.copytree(tiny, tmp_path / "moved"))) == 0


def test_a_disk_that_cannot_hold_them_is_refused_before_anything_is_written(data, tiny, monkeypatch):
    monkeypatch.setattr(preprocess.shutil, "disk_usage", lambda folder: SimpleNamespace(free=14 * 4096 + 100))
    with pytest.raises(UserError, match=r"57.4kB free, the features need .*kB"):
        preprocess.main(words(data, tiny))
    assert contents(data) == {}
    preprocess.main(words(data, tiny, "--splits", "validation"))  # four of them fit


def test_no_data_no_labels_and_no_videos_are_told(data, tiny, tmp_path):
    with pytest.raises(UserError, match="there is no dataset"):
        preprocess.main(words(tmp_path / "nowhere", tiny))
    with pytest.raises(UserError, match="test.json"):
        preprocess.main(words(data, tiny, "--splits", "test"))
    shutil.rmtree(data / "20bn-something-something-v2")
    with pytest.raises(UserError, match="there is no video of any clip in"):
        preprocess.main(words(data, tiny))
    assert contents(data) == {}


@pytest.mark.parametrize(
    "flags",
    [["--splits", "training"], ["--pool", "3"], ["--frames", "0"], ["--clip-timeout", "-1"], ["--workers", "x"]],
)
def test_bad_flags_end_with_code_2(data, tiny, flags):
    with pytest.raises(UserError, match=f"argument .*{flags[0]}: ") as error:
        preprocess.main(words(data, tiny, *flags))
    assert error.value.code == 2


def test_a_pool_that_does_not_fit_is_refused(data, tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "odd")
    (folder / "preprocessor_config.json").write_text('{"crop_size": 24}')  # 3 x 3 patches
    with pytest.raises(UserError, match="--pool 2 does not divide the 3 x 3 patches"):
        preprocess.main(words(data, folder, "--pool", 2))
    assert contents(data) == {}


# ---- what fails ----


def test_videos_that_do_not_decode_are_named_and_the_run_goes_on(data, tiny, capsys):
    video(data, "tr1").write_bytes(b"")
    video(data, "tr7").write_bytes(video(data, "tr7").read_bytes()[:150])
    videos.write_audio(video(data, "va2"))
    good = video(data, "tr1").read_bytes
    assert preprocess.main(words(data, tiny)) == 0
    assert [row["id"] for row in failures(data)] == ["tr1", "tr7"]
    assert failures(data)[0]["reason"] == "the file is empty"
    assert [row["id"] for row in failures(data, "validation")] == ["va2"]
    assert len(contents(data)) == 15 - 3 + 2 + 1
    said = capsys.readouterr().out
    assert "encoded 12 clips" in said
    assert "3 clips failed" in said
    assert "train/tr1: the file is empty" in said
    assert good() == b""


def test_a_mended_video_is_tried_again_and_leaves_no_failure(data, tiny):
    whole = video(data, "tr1").read_bytes()
    video(data, "tr1").write_bytes(b"")
    preprocess.main(words(data, tiny))
    assert [row["id"] for row in failures(data)] == ["tr1"]
    video(data, "tr1").write_bytes(whole)
    preprocess.main(words(data, tiny))
    assert failures(data) == []
    assert not (data / "features" / "train" / "failures.jsonl").exists()
    assert (data / "features" / "train" / "tr1.pt").exists()


def test_clips_without_a_video_are_named_all_others_done_and_the_exit_code_is_2(data, tiny):
    video(data, "tr1").unlink()
    video(data, "va0").unlink()
    with pytest.raises(UserError, match=r"2 clips of the labels have no video \(the first: tr1 of train\)"):
        preprocess.main(words(data, tiny))
    assert failures(data) == [{"id": "tr1", "reason": "there is no video"}]
    assert failures(data, "validation") == [{"id": "va0", "reason": "there is no video"}]
    assert len(list((data / "features").rglob("*.pt"))) == 13


def test_features_too_large_for_float16_fail_their_clips_and_bfloat16_holds_them(data, tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "large")
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layernorm.weight"] = weights["encoder.layernorm.weight"] * 1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert preprocess.main(words(data, folder, "--splits", "validation")) == 0
    reason = "its features are NaN, Inf, or larger than the cache's dtype holds"
    assert failures(data, "validation") == [{"id": f"va{i}", "reason": reason} for i in range(4)]
    assert list((data / "features").rglob("*.pt")) == []
    shutil.rmtree(data / "features")
    preprocess.main(words(data, folder, "--splits", "validation", "--dtype", "bfloat16"))
    assert failures(data, "validation") == []
    assert cache.load(data / "features" / "validation" / "va0.pt").values.abs().max() > 65504


def test_damaged_videos_are_each_cached_or_named(tmp_path):
    outcomes = fuzz_videos.fuzz(tmp_path, count=60, seed=5)
    assert len(outcomes) == 60
    assert 5 < list(outcomes.values()).count(None) < 55  # it is no test if all are alike


# ---- a disk that fails ----


def test_a_disk_that_fills_up_ends_the_run_with_one_line_and_code_1(data, tiny, monkeypatch, capsys):
    saved, real = [], cache.save

    def save(path, packed):
        if len(saved) >= 5:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, packed)
        saved.append(path)

    monkeypatch.setattr(cache, "save", save)
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: preprocess.main(words(data, tiny)))
    assert stopped.value.code == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(error) == 1
    assert "No space left on device" in error[0]
    assert len(list((data / "features").rglob("*.pt"))) in range(
        5, 6 + writer.THREADS
    )  # each thread may have begun one
    monkeypatch.setattr(cache, "save", real)
    assert preprocess.main(words(data, tiny)) == 0
    assert len(list((data / "features").rglob("*.pt"))) == 15


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", place]).returncode:
        pytest.skip("needs the right to mount")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_real_disk_that_fills_up_or_is_read_only(filmed, tiny, small_disk, monkeypatch, capsys):
    data = shutil.copytree(filmed, small_disk / "data")
    plan = preprocess.make_plan

    def then_others_fill_it(*arguments):
        planned = plan(*arguments)
        with contextlib.suppress(OSError), open(small_disk / "others", "wb", buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(small_disk).free - 6 * 4096)
        return planned

    monkeypatch.setattr(preprocess, "make_plan", then_others_fill_it)
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: preprocess.main(words(data, tiny)))
    assert stopped.value.code == 1
    assert "No space left on device" in capsys.readouterr().err
    kept = list((data / "features").rglob("*.pt"))
    assert 0 < len(kept) < 15
    assert not list((data / "features").rglob("*.tmp"))
    for path in kept:
        cache.load(path)
    monkeypatch.setattr(preprocess, "make_plan", plan)
    (small_disk / "others").unlink()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: preprocess.main(words(data, tiny)))
    assert stopped.value.code == 1
    assert "Read-only file system" in capsys.readouterr().err
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    assert preprocess.main(words(data, tiny)) == 0
    assert len(list((data / "features").rglob("*.pt"))) == 15


# ---- interruptions and other runs ----


def slowly():
    """Saves are slow, so that there is something to interrupt."""
    real = cache.save

    def save(path, packed):
        time.sleep(0.05)
        real(path, packed)

    cache.save = save


def spoil(data):
    video(data, "tr4").write_bytes(b"no video")


def left_over(marker):
    """Processes that hold `marker` in their environment."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if marker.encode() in (place / "environ").read_bytes():
                found.append(place.name)
    return found


def test_killed_at_random_moments_and_run_again_gives_the_same_files(data, tiny, undisturbed, tmp_path):
    spoil(data)
    moments = random.Random(3)
    partial = []
    for number in range(3):
        mark = f"killed-{os.getpid()}-{number}"
        script = processes.Script(MODULE, words(data, tiny), tmp_path / "log", slowly, MARK=mark)
        have = len(contents(data))
        end = time.monotonic() + 60
        while len(contents(data)) <= have + moments.randrange(3):
            assert time.monotonic() < end, script.said()
            assert script.process.exitcode is None, script.said()
            time.sleep(moments.uniform(0.001, 0.03))
        script.process.kill()
        assert script.wait() == -signal.SIGKILL
        end = time.monotonic() + 10
        while left_over(mark):
            assert time.monotonic() < end, "its workers live on"
            time.sleep(0.02)
        partial.append(len(list((data / "features").rglob("*.pt"))))
    assert partial == sorted(partial)
    assert partial[-1] < 14
    assert processes.Script(MODULE, words(data, tiny), tmp_path / "log").wait() == 0
    assert contents(data) == undisturbed


def test_what_a_killed_run_had_not_finished_is_gone_at_once_whatever_it_was_writing(data, tiny, undisturbed):
    spoil(data)
    (data / "features" / "train").mkdir(parents=True)
    for name in (".config.json.a.tmp", "train/.tr0.pt.b.tmp", "train/.failures.jsonl.c.tmp"):
        (data / "features" / name).write_text("half")
    assert processes.Script(MODULE, words(data, tiny), data / "log").wait() == 0
    assert contents(data) == undisturbed


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_it_at_once_with_whole_files_only(data, tiny, tmp_path, number, code):
    spoil(data)
    script = processes.Script(MODULE, words(data, tiny), tmp_path / "log", slowly, MARK=f"signal-{os.getpid()}")
    end = time.monotonic() + 60
    while len(contents(data)) < 3:
        assert time.monotonic() < end, script.said()
        time.sleep(0.01)
    os.kill(script.process.pid, number)
    began = time.monotonic()
    assert script.wait() == code, script.said()
    assert time.monotonic() - began < 5
    assert "the same command goes on from there" in script.said()
    assert "Traceback" not in script.said()
    assert 2 < len(contents(data)) < 16
    assert not list((data / "features").rglob("*.tmp"))
    for path in (data / "features").rglob("*.pt"):
        cache.load(path)
    end = time.monotonic() + 10
    while left_over(f"signal-{os.getpid()}"):  # the process that workers fork from notices a little later
        assert time.monotonic() < end, "its workers live on"
        time.sleep(0.02)


def log_saves():
    real = cache.save

    def save(path, packed):
        real(path, packed)
        with open(os.environ["SAVED"], "a") as file:
            file.write(f"{path}\n")

    cache.save = save


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_share_the_clips_and_write_what_one_process_writes(data, tiny, undisturbed, tmp_path, count):
    spoil(data)
    saved = tmp_path / "saved"
    group = processes.Ranks(count, MODULE, words(data, tiny), tmp_path / "ranks", log_saves, SAVED=saved)
    assert group.wait() == [0] * count, [script.said() for script in group.scripts]
    names = saved.read_text().split()
    assert len(names) == len(set(names)) == 14  # no clip twice
    assert contents(data) == undisturbed
    said = [script.said() for script in group.scripts]
    assert "15 to encode" in said[0]
    assert "1 clips failed" in said[0]
    assert all(not text.strip() for text in said[1:])


def test_ranks_tell_a_mistake_and_do_not_hang(data, tiny, tmp_path):
    group = processes.Ranks(2, MODULE, words(data, tmp_path / "no-encoder"), tmp_path / "ranks")
    assert group.wait() == [2, 2]
    assert len(group.errors()) == 2 and all("no-encoder" in line for line in group.errors())


def test_two_runs_that_meet_in_one_folder_harm_nothing(data, tiny, undisturbed, tmp_path):
    spoil(data)
    runs = [processes.Script(MODULE, words(data, tiny), tmp_path / f"log{i}", slowly) for i in range(2)]
    assert [run.wait() for run in runs] == [0, 0], [run.said() for run in runs]
    assert contents(data) == undisturbed
