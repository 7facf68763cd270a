import contextlib
import errno
import io
import json
import os
import random
import shutil
import signal
import threading
import time
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import preprocess_something_something_v2 as preprocess
from features import cache
from models.vjepa2 import VideoEncoder
from runtime import cli, files
from runtime.files import UserError
from tests import processes, videos
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
    spoil(data)
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


def cached(data):
    return list((data / "features").rglob("*.pt"))


def failures(data, split="train"):
    path = data / "features" / split / "failures.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---- what is written ----


def test_each_clip_is_cached_as_the_encoder_sees_it(data, tiny, capsys):
    assert preprocess.main(words(data, tiny)) == 0
    said = capsys.readouterr().out  # first of all how much it will be: 32 tokens of 24 numbers a clip
    assert said.startswith("train, validation: 0 clips cached, 15 to encode; 23.0kB to write\nencoded 15 clips into ")
    encoder = VideoEncoder(tiny, "cpu", frames=4)
    assert len(contents(data)) == 11 + 4 + 1 and len(cached(data)) == 15
    for path in cached(data):
        stored = torch.load(path, weights_only=True)
        expected = encoder.encode(read_clip(video(data, path.stem), 4, encoder.transform)[0][None])[0]
        assert stored.dtype == torch.float16 and path.parent.name[:2] == path.stem[:2]
        assert torch.allclose(stored.float(), expected, atol=2e-3)
    config = cache.read_config(data / "features")
    assert (config.encoder, config.frames, config.size, config.tokens, config.dim) == (str(tiny), 4, 32, 32, 24)


def test_int8_and_pool_are_stored_as_asked_for_and_an_mp4_is_accepted_beside_webm(data, tiny):
    video(data, "va1").unlink()
    videos.write(video(data, "va1").with_suffix(".mp4"), videos.moving(10), "libx264")
    preprocess.main(words(data, tiny, "--dtype", "int8", "--pool", 2, "--crop", "--splits", "validation"))
    packed = cache.load(data / "features" / "validation" / "va0.pt")
    assert packed.kind == "8x24 int8"
    config = cache.read_config(data / "features")
    assert (config.dtype, config.pool, config.tokens, config.crop) == ("int8", 2, 8, True)
    encoder = VideoEncoder.from_config(config.to_dict())
    features = encoder.encode(read_clip(video(data, "va0"), 4, encoder.transform)[0][None])
    expected = cache.dequantize(cache.quantize(features, "int8", 2, encoder.grid))
    assert torch.allclose(cache.dequantize(packed), expected, atol=0.05)
    assert {path.name for path in cached(data)} == {"va0.pt", "va1.pt", "va2.pt", "va3.pt"}


def test_a_second_run_makes_again_what_is_damaged_and_touches_nothing_else(data, tiny, capsys):
    preprocess.main(words(data, tiny))
    before, damaged = contents(data), data / "features" / "train" / "tr3.pt"
    times = {path: path.stat().st_mtime_ns for path in cached(data) if path != damaged}
    capsys.readouterr()
    preprocess.main(words(data, tiny))
    assert "15 clips cached, 0 to encode" in capsys.readouterr().out
    damaged.write_bytes(damaged.read_bytes()[:-10])
    preprocess.main(words(data, tiny))
    assert contents(data) == before
    assert times == {path: path.stat().st_mtime_ns for path in times}


# ---- what is refused ----


def test_features_of_another_kind_are_not_mixed_and_the_same_encoder_may_have_moved(data, tiny, tmp_path):
    preprocess.main(words(data, tiny, "--splits", "validation"))
    before, other = contents(data), videos.tiny_vjepa(tmp_path / "other", seed=1)
    for flags, said in (
        (["--frames", 8], "frames 4, not 8"),
        (["--crop"], "crop False, not True"),
        (["--dtype", "int8"], "dtype float16, not int8"),
        (["--pool", 2], "pool 1, not 2"),
        (["--encoder", other], "weights"),
    ):
        with pytest.raises(UserError, match=said):
            preprocess.main(words(data, tiny, *flags))
    assert contents(data) == before
    assert preprocess.main(words(data, shutil.copytree(tiny, tmp_path / "moved"))) == 0


def test_a_disk_that_cannot_hold_them_is_refused_before_anything_is_written(data, tiny, monkeypatch):
    monkeypatch.setattr(preprocess.shutil, "disk_usage", lambda folder: SimpleNamespace(free=14 * 4096 + 100))
    with pytest.raises(UserError, match=r"57.4kB free, the features need 23.0kB"):
        preprocess.main(words(data, tiny))
    assert contents(data) == {}
    preprocess.main(words(data, tiny, "--splits", "validation"))  # four of them fit


def test_no_labels_and_no_videos_are_told(data, tiny):
    with pytest.raises(UserError, match="test.json"):
        preprocess.main(words(data, tiny, "--splits", "test"))
    shutil.rmtree(data / "20bn-something-something-v2")
    with pytest.raises(UserError, match="there is no video of any clip in"):
        preprocess.main(words(data, tiny))
    assert contents(data) == {}


@pytest.mark.parametrize("flags", ["--splits training", "--pool 3", "--frames 0", "--clip-timeout -1", "--workers x"])
def test_bad_flags_end_with_code_2(data, tiny, flags):
    with pytest.raises(UserError, match=f"argument .*{flags.split()[0]}: "):
        preprocess.main(words(data, tiny, *flags.split()))


def test_a_pool_that_does_not_fit_is_refused(data, tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "odd")
    (folder / "preprocessor_config.json").write_text('{"crop_size": 24}')  # 3 x 3 patches
    with pytest.raises(UserError, match="--pool 2 does not divide the 3 x 3 patches"):
        preprocess.main(words(data, folder, "--pool", 2))
    assert contents(data) == {}


# ---- what fails ----


def test_videos_that_do_not_decode_are_named_and_those_that_are_mended_tried_again(data, tiny, capsys):
    whole = video(data, "tr1").read_bytes()
    video(data, "tr1").write_bytes(b"")
    video(data, "tr7").write_bytes(video(data, "tr7").read_bytes()[:150])
    videos.write_audio(video(data, "va2"))
    assert preprocess.main(words(data, tiny)) == 0
    assert [row["id"] for row in failures(data)] == ["tr1", "tr7"]
    assert failures(data)[0]["reason"] == "the file is empty"
    assert [row["id"] for row in failures(data, "validation")] == ["va2"]
    assert len(contents(data)) == 15 - 3 + 2 + 1
    said = capsys.readouterr().out
    assert "encoded 12 clips" in said
    assert "2 clips of train failed" in said and "1 clips of validation failed" in said
    assert "  tr1: the file is empty" in said
    assert video(data, "tr1").read_bytes() == b""
    for clip in ("tr1", "tr7"):
        video(data, clip).write_bytes(whole)
    preprocess.main(words(data, tiny))
    assert not (data / "features" / "train" / "failures.jsonl").exists() and len(cached(data)) == 14
    assert [row["id"] for row in failures(data, "validation")] == ["va2"]


def test_clips_without_a_video_are_named_all_others_done_and_the_exit_code_is_2(data, tiny):
    video(data, "tr1").unlink()
    video(data, "va0").unlink()
    with pytest.raises(UserError, match="2 clips of Something-Something V2 have no video in .*<id>.webm"):
        preprocess.main(words(data, tiny))
    assert failures(data) == [{"id": "tr1", "reason": "there is no video"}]
    assert failures(data, "validation") == [{"id": "va0", "reason": "there is no video"}]
    assert len(cached(data)) == 13


def test_features_too_large_for_float16_fail_their_clips_and_bfloat16_holds_them(data, tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "large")
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layernorm.weight"] = weights["encoder.layernorm.weight"] * 1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert preprocess.main(words(data, folder, "--splits", "validation")) == 0
    reason = "its features are NaN, Inf, or larger than the cache's dtype holds"
    assert failures(data, "validation") == [{"id": f"va{i}", "reason": reason} for i in range(4)]
    assert cached(data) == []
    shutil.rmtree(data / "features")
    preprocess.main(words(data, folder, "--splits", "validation", "--dtype", "bfloat16"))
    assert failures(data, "validation") == []
    assert cache.load(data / "features" / "validation" / "va0.pt").values.abs().max() > 65504


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
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "No space left on device" in error
    assert len(cached(data)) in range(5, 6 + preprocess.WRITERS)  # each thread may have begun one
    monkeypatch.setattr(cache, "save", real)
    assert preprocess.main(words(data, tiny)) == 0
    assert len(cached(data)) == 15


# ---- interruptions and other runs ----


def slowly():
    """Files are written one after another and slowly: most signals come while one is half done."""
    real, one_at_a_time = files.write_atomic, threading.Lock()

    def write_atomic(path, write):
        def halves(file):
            write(content := io.BytesIO())
            with one_at_a_time:
                file.write(content.getvalue()[:99])
                file.flush()
                time.sleep(0.03)
            file.write(content.getvalue()[99:])

        real(path, halves)

    files.write_atomic = write_atomic


def spoil(data):
    video(data, "tr4").write_bytes(b"no video")


def wait_until(condition, script, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, script.said()
        time.sleep(0.01)


def left_over(marker):
    """Processes that hold `marker` in their environment."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if marker.encode() in (place / "environ").read_bytes():
                found.append(place.name)
    return found


def unfinished(data):
    return set((data / "features").rglob(".*.tmp"))


def test_killed_or_stopped_at_random_moments_and_run_again_gives_the_same_files(tiny, tmp_path):
    data = tmp_path / "data"
    videos.write_dataset(data, {"train": 36})
    spoil(data)
    whole = shutil.copytree(data, tmp_path / "whole")
    assert preprocess.main(words(whole, tiny, "--splits", "train")) == 0
    moments = random.Random(3)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        mark, enough = f"{number.name}-{os.getpid()}", len(cached(data)) + moments.randrange(1, 4)
        script = processes.Script(MODULE, words(data, tiny, "--splits", "train"), tmp_path / "log", slowly, MARK=mark)
        wait_until(lambda: len(cached(data)) >= enough, script)  # noqa: B023  it is waited for here
        time.sleep(moments.uniform(0, 0.05))
        before, began = unfinished(data), time.monotonic()
        os.kill(script.process.pid, number)
        assert script.wait() == (-number if number == signal.SIGKILL else 128 + number), script.said()
        if number == signal.SIGTERM:
            assert time.monotonic() - began < 5
            assert "what was written is kept" in script.said() and "Traceback" not in script.said()
            assert unfinished(data) <= before
        wait_until(lambda: not left_over(mark), script, 10)  # noqa: B023  its workers do not live on
        assert all(map(cache.load, cached(data)))
    assert len(cached(data)) < 35
    for path in unfinished(data):
        os.utime(path, (0, 0))  # a minute later they are known to be nobody's
    assert preprocess.main(words(data, tiny, "--splits", "train")) == 0
    assert contents(data) == contents(whole)


def test_what_a_killed_run_had_not_finished_is_removed_and_what_grows_is_not(data, tiny, undisturbed):
    spoil(data)
    (data / "features" / "train").mkdir(parents=True)
    for name in (".config.json.a.tmp", "train/.tr0.pt.b.tmp", "train/.failures.jsonl.c.tmp", "train/.tr1.pt.d.tmp"):
        (data / "features" / name).write_text("half")
        os.utime(data / "features" / name, None if "tr1" in name else (0, 0))
    assert preprocess.main(words(data, tiny)) == 0
    assert contents(data) == undisturbed | {"train/.tr1.pt.d.tmp": b"half"}


def test_ranks_share_the_clips_and_write_what_one_process_writes(data, tiny, undisturbed, tmp_path):
    spoil(data)
    group = processes.Ranks(2, MODULE, words(data, tiny), tmp_path / "ranks")
    assert group.wait() == [0, 0], [script.said() for script in group.scripts]
    assert contents(data) == undisturbed
    first, second = (script.said() for script in group.scripts)
    assert "15 to encode" in first and "encoded 14 clips" in first and "1 clips of train failed" in first
    assert not second.strip()


def test_two_runs_that_meet_in_one_folder_harm_nothing(data, tiny, undisturbed, tmp_path):
    spoil(data)
    other = processes.Script(MODULE, words(data, tiny), tmp_path / "log", slowly)
    wait_until(lambda: cached(data) and unfinished(data), other)  # this one begins while the other one writes
    assert preprocess.main(words(data, tiny)) == 0
    assert other.wait() == 0, other.said()
    assert contents(data) == undisturbed
