import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from video.nursery import SLOTS, Nursery

from runtime.files import UserError
from tests import videos
from video import workers as decoding
from video.reader import Transform, read_clip
from video.workers import ClipDecoder, Failure

TRANSFORM = Transform(32)


@pytest.fixture(scope="module", params=["forked", "started anew"])
def nursery(request):
    if request.param == "forked":
        nursery = Nursery()
    else:
        with ThreadPoolExecutor() as thread:
            nursery = thread.submit(Nursery).result()
    assert isinstance(nursery.process, subprocess.Popen) == (request.param != "forked")
    yield nursery
    nursery.close()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Twelve videos of different content."""
    folder = tmp_path_factory.mktemp("clips")
    return {str(i): videos.write(folder / f"{i}.webm", videos.moving(10, seed=i)) for i in range(12)}


@pytest.fixture(scope="module")
def slow():
    """A video that takes about a second to decode: 5 seconds of 1280x720."""
    return videos.real_videos()[0]


def decode(paths, nursery, workers=2, **options):
    with ClipDecoder(paths, TRANSFORM, 8, workers, nursery=nursery, **options) as decoder:
        decoded = list(decoder)
    assert len({key for key, _ in decoded}) == len(decoded)  # nothing twice
    return dict(decoded)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


@pytest.mark.parametrize("workers", [1, 3])
def test_every_clip_comes_once_and_as_decoded_in_this_process(clips, nursery, workers):
    decoded = decode(clips.items(), nursery, workers)
    assert decoded.keys() == clips.keys()
    for key, path in clips.items():
        assert torch.equal(decoded[key], read_clip(path, 8, TRANSFORM))


def test_a_clip_keeps_its_frames_after_its_worker_has_gone_on(clips, nursery):
    copies = []
    with ClipDecoder(list(clips.items()) * 3, TRANSFORM, 8, 2, nursery=nursery, ahead=1) as decoder:
        for key, clip in decoder:
            copies.append((key, clip, clip.clone()))
    assert len(copies) == 36
    assert all(torch.equal(clip, copy) for _, clip, copy in copies)


def test_windows_of_a_video_are_decoded_each_by_its_times(slow, nursery):
    decoded = decode([(0, slow, 0.0, 1.0), (1, slow, 3.0, 4.5), (2, slow)], nursery)
    for key, window in enumerate([(0.0, 1.0), (3.0, 4.5), ()]):
        assert torch.equal(decoded[key], read_clip(slow, 8, TRANSFORM, *window))


def test_bad_videos_are_named_and_the_others_decoded(clips, nursery, tmp_path):
    (tmp_path / "empty.webm").touch()
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(4000))
    videos.write_audio(tmp_path / "audio.webm")
    bad = {path.name: path for path in tmp_path.iterdir()} | {"none.webm": tmp_path / "none.webm"}
    decoded = decode([*clips.items(), *bad.items(), *((f"{k} again", p) for k, p in clips.items())], nursery)
    assert {key for key, clip in decoded.items() if isinstance(clip, Failure)} == set(bad)
    assert len(decoded) == 2 * len(clips) + 4
    assert decoded["empty.webm"].reason == "the file is empty"
    assert "no video stream" in decoded["audio.webm"].reason


def test_jobs_are_asked_for_only_as_they_are_needed(clips, nursery):
    asked = []

    def paths():
        for number in range(500):
            asked.append(number)
            yield number, clips["0"]

    with ClipDecoder(paths(), TRANSFORM, 8, 2, nursery=nursery, ahead=3) as decoder:
        for taken, _ in enumerate(decoder, 1):
            # three ready, one in the hands of the thread, two workers with two each, one being handed out
            assert len(asked) <= taken + 3 + 1 + 2 * SLOTS + 1
            if taken == 40:
                break
    assert len(asked) < 60


def test_what_the_list_of_jobs_raises_reaches_the_reader(clips, nursery):
    def paths():
        yield "a", clips["0"]
        raise KeyError("labels")

    with pytest.raises(KeyError, match="labels"):
        decode(paths(), nursery)


def test_no_jobs_end_at_once(nursery):
    assert decode([], nursery) == {}


def test_a_clip_that_takes_too_long_is_named_and_its_worker_replaced(clips, slow, nursery):
    paths = [("slow", slow), *clips.items(), ("slow too", slow)]
    decoded = decode(paths, nursery, timeout=0.25)
    assert {key for key, clip in decoded.items() if isinstance(clip, Failure)} == {"slow", "slow too"}
    assert decoded["slow"].reason == "decoding took longer than 0.25 s"
    assert len(decoded) == len(clips) + 2


def test_a_stopped_worker_that_no_alarm_reaches_is_ended_by_the_parent(clips, slow, nursery, monkeypatch):
    monkeypatch.setattr(decoding, "GRACE", 0.2)
    with ClipDecoder([("slow", slow), *clips.items()], TRANSFORM, 8, 1, timeout=0.5, nursery=nursery) as decoder:
        wait_until(lambda: decoder.workers and decoder.workers[0].pid)
        os.kill(decoder.workers[0].pid, signal.SIGSTOP)
        decoded = dict(decoder)
    assert decoded["slow"].reason == "decoding took longer than 0.5 s"
    assert not any(isinstance(decoded[key], Failure) for key in clips)


def test_a_worker_that_dies_costs_its_clip_and_no_other(clips, slow, nursery):
    with ClipDecoder([("slow", slow), *clips.items()], TRANSFORM, 8, 1, nursery=nursery) as decoder:
        wait_until(lambda: decoder.workers and decoder.workers[0].pid)
        os.kill(decoder.workers[0].pid, signal.SIGKILL)
        decoded = dict(decoder)
    assert decoded["slow"].reason == "decoding it ended the worker process"
    assert len(decoded) == len(clips) + 1
    assert not any(isinstance(decoded[key], Failure) for key in clips)


def test_the_nursery_may_die_too(clips, slow):
    with ClipDecoder([("slow", slow), *clips.items()], TRANSFORM, 8, 1) as decoder:
        wait_until(lambda: decoder.workers and decoder.workers[0].pid)
        first = decoder.nursery
        first.process.kill()
        decoded = dict(decoder)
        assert decoder.nursery is not first
    assert isinstance(decoded["slow"], Failure)
    assert not any(isinstance(decoded[key], Failure) for key in clips)
    assert not decoder.nursery.is_alive()


def test_workers_that_never_start_are_an_error_and_not_the_clips_fault(clips, monkeypatch, tmp_path):
    broken = tmp_path / "nursery.py"
    broken.write_text("raise SystemExit(1)")
    monkeypatch.setattr("nursery.FILE", str(broken))
    with pytest.raises(UserError, match="do not start"):
        decode(clips.items(), None)  # the decoder's own thread starts this nursery: not by forking


def test_leaving_early_ends_the_workers(slow, nursery):
    with ClipDecoder([(i, slow) for i in range(50)], TRANSFORM, 8, 2, nursery=nursery) as decoder:
        next(iter(decoder))
        pids = [worker.pid for worker in decoder.workers]
    assert len(pids) == 2
    wait_until(lambda: not any(map(is_running, pids)), seconds=5)
    assert nursery.is_alive()


def test_a_frame_that_claims_gigapixels_is_contained(nursery, clips, tmp_path):
    path = videos.write(tmp_path / "huge.avi", videos.moving(6, 64, 64), "mjpeg", pixels="yuvj420p")
    content = bytearray(path.read_bytes())
    at = 0
    while (at := content.find(b"\xff\xc0\x00\x11\x08", at)) >= 0:  # start of frame: height and width follow
        content[at + 5 : at + 9] = (65000).to_bytes(2, "big") * 2
        at += 1
    path.write_bytes(content)
    decoded = decode([("huge", path), ("good", clips["0"])], nursery, workers=1)
    assert isinstance(decoded["huge"], Failure)
    assert torch.equal(decoded["good"], read_clip(clips["0"], 8, TRANSFORM))
