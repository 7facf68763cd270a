"""Clips decoded in worker processes: as in this one, in order, and what a clip costs that a worker dies of."""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from tests import videos
from video import workers
from video.reader import Transform, read_clip
from video.workers import Decoded, VideoError, Workers, batches

LOOK = Transform(32)
DIED = "decoding it ended the worker process"
WITH_FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="what only POSIX has")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Videos of different content and length, two that are none among them."""
    folder = tmp_path_factory.mktemp("clips")
    paths = {str(i): videos.write(folder / f"{i}.webm", videos.moving(30 - 5 * i, seed=i)) for i in range(5)}
    paths["text"] = folder / "text.mp4"
    paths["text"].write_text("no video")
    return dict(sorted(paths.items(), reverse=True)) | {"none": folder / "none.webm"}


@pytest.fixture(scope="module")
def two():
    """Started once: each start takes seconds."""
    with Workers(2, timeout=20.0) as running:
        yield running


def expect_clips(decoded, clips):
    decoded = list(decoded)
    assert [clip.key for clip in decoded] == list(clips)
    for clip in decoded:
        if clip.key in ("text", "none"):
            assert clip.frames is None and clip.error
        else:
            frames, _, seconds = read_clip(clips[clip.key], 8, LOOK)
            assert torch.equal(clip.frames, frames) and clip == Decoded(clip.key, clip.frames, end=seconds)
    assert dict((clip.key, clip.error) for clip in decoded)["none"] == "there is no such file"


def test_clips_come_in_the_order_asked_for_and_as_decoded_in_this_process(two, clips):
    expect_clips(two.read_clips(clips.items(), LOOK, 8), clips)


def test_no_workers_decode_in_this_process(clips, monkeypatch):
    monkeypatch.setattr(workers.pebble, "ProcessPool", None)
    with Workers(0) as none:
        expect_clips(none.read_clips(clips.items(), LOOK, 8), clips)


def test_workers_that_are_spawned_decode_the_same(clips, monkeypatch):
    monkeypatch.setattr(workers, "_context", lambda: multiprocessing.get_context("spawn"))
    with Workers(1) as spawned:
        expect_clips(spawned.read_clips(clips.items(), LOOK, 8), clips)


def test_paths_are_those_of_the_working_directory(two, clips, monkeypatch):
    monkeypatch.chdir(clips["0"].parent)
    (found,) = two.read_clips([(0, "0.webm")], LOOK, 8)
    assert torch.equal(found.frames, read_clip(clips["0"], 8, LOOK)[0])


def test_paths_are_asked_for_only_as_they_are_needed(two, clips):
    asked = []
    paths = ((asked.append(i) or i, clips["4"]) for i in range(500))
    for taken, _ in enumerate(two.read_clips(paths, LOOK, 2), 1):
        assert len(asked) <= taken + workers.AHEAD
        if taken == 40:
            break
    assert len(asked) <= 40 + workers.AHEAD


def test_what_the_list_of_paths_raises_reaches_the_reader(two, clips):
    def paths():
        yield "a", clips["0"]
        raise KeyError("labels")

    with pytest.raises(KeyError, match="labels"):
        list(two.read_clips(paths(), LOOK, 8))
    assert list(two.read_clips([], LOOK, 8)) == []


def test_a_frames_tensor_stays_when_its_worker_has_gone_on(two, clips):
    taken = [(clip, clip.frames.clone()) for clip in two.read_clips([(i, clips["0"]) for i in range(40)], LOOK, 8)]
    assert all(torch.equal(clip.frames, copy) for clip, copy in taken)


# ---- what ends a worker ----


def too_much_memory():
    return torch.zeros(8 << 30, dtype=torch.uint8)


def crash():
    ctypes.string_at(0)


@WITH_FORKS
@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (partial(os._exit, 3), DIED),
        (partial(signal.raise_signal, signal.SIGKILL if hasattr(signal, "SIGKILL") else 9), DIED),
        (crash, DIED),
        (too_much_memory, "memory"),  # torch's own error; it is not everywhere that memory is limited
        (partial(int, "x"), "unexpected ValueError: invalid literal for int() with base 10: 'x'"),
    ],
    ids=["it exits", "it is killed", "it crashes", "it asks for 8 GB", "a bug of ours"],
)
def test_a_call_that_ends_its_worker_costs_itself_alone(two, call, reason):
    found = dict(two.run([(0, partial(abs, -1), 1), (1, call, 1), *((i, partial(abs, -i), 1) for i in range(2, 8))]))
    assert isinstance(found[1], VideoError) and reason in str(found[1])
    assert [found[i] for i in (0, *range(2, 8))] == [1, *range(2, 8)]


@WITH_FORKS
def test_a_clip_that_hangs_costs_itself_alone(clips):
    calls = [("slow", partial(time.sleep, 60), 1), ("longer", partial(time.sleep, 1.5), 3)]
    with Workers(1, timeout=1.0) as one:
        (key, error), *others = one.run([*calls, *((i, partial(abs, i), 1) for i in range(3))])
    assert (key, str(error)) == ("slow", "decoding took longer than 1 s")
    assert others == [("longer", None), (0, 0), (1, 1), (2, 2)]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_leaving_early_ends_the_workers():
    with Workers(1) as one:
        _, pid = next(one.run([(0, os.getpid, 1), *((i, partial(time.sleep, 60), 1) for i in range(5))]))
        assert is_running(pid)
    wait_until(lambda: not is_running(pid), 5)


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_a_parent_that_is_killed_leaves_no_worker(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, time\nfrom functools import partial\nfrom video.workers import Workers\n"
        "if __name__ == '__main__':\n    with Workers(1) as one:\n"
        "        calls = [(0, os.getpid, 1), (1, partial(time.sleep, 60), 1)]\n"
        "        for _, pid in one.run(calls):\n            print(pid, flush=True)\n"
    )
    root = Path(__file__).parents[2]
    parent = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(root)}
    )
    pid = int(parent.stdout.readline())
    assert is_running(pid)
    parent.kill()
    parent.wait(10)
    wait_until(lambda: not is_running(pid))


# ---- batches ----


def test_batches_hold_as_many_clips_with_frames_and_failed_ones_travel_along():
    good = torch.zeros(1)
    decoded = [Decoded(i, None if i in (0, 3, 7) else good, "bad" if i in (0, 3, 7) else None) for i in range(8)]
    assert [[clip.key for clip in batch] for batch in batches(decoded, 2)] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert list(batches([], 2)) == []


def test_a_batch_is_given_before_the_next_clip_is_asked_for():
    asked = []
    next(batches((asked.append(i) or Decoded(i, torch.zeros(1)) for i in range(9)), 3))
    assert asked == [0, 1, 2]
