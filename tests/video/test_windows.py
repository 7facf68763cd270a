"""Windows of long videos: their frames are those that reading each by itself gives, whatever the file."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import videos
from video import workers as module
from video.reader import Transform, read_clip, read_frames
from video.workers import Workers

LOOK = Transform(32)
CASES = Path(__file__).parents[1] / "data"
NAMES = list(json.loads((CASES / "expected.json").read_text()))


@pytest.fixture(scope="module")
def here():
    with Workers(0) as none:
        yield none


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """Twelve seconds at 12 frames a second, with a key frame every two."""
    return videos.write(tmp_path_factory.mktemp("long") / "long.mp4", videos.moving(144), "libx264", g="24")


@pytest.mark.parametrize("name", NAMES)
def test_one_window_over_the_whole_of_any_file_is_its_clip(here, name):
    (found,) = here.read_clips([("a", CASES / name)], LOOK, 5, 1e6, 1e6)
    assert (found.key, found.error, found.warning, found.total) == ("a", None, None, 1)
    assert torch.equal(found.frames, read_clip(CASES / name, 5, LOOK)[0])
    assert found.start == (2.5 if name == "delayed.mp4" else 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_windows_of_any_file_hold_the_frames_of_their_spans(here, name):
    found = list(here.read_clips([("a", CASES / name)], LOOK, 4, 0.7, 0.35))
    assert {part.total for part in found} == {len(found)}
    for part in found[:: max(1, len(found) // 4)]:
        assert torch.equal(part.frames, LOOK.apply(read_frames(CASES / name, 4, part.start, part.end)))


def test_windows_within_open_groups_of_pictures_equal_decoding_from_the_start(here, monkeypatch):
    monkeypatch.setattr(module, "RUN_SECONDS", 1.0)  # each window seeks by itself
    path = CASES / "opengop_x264.mp4"  # 12 seconds, 25 frames each
    straight = LOOK.apply(np.stack(videos.decoded_by_ffmpeg(path)))
    found = list(here.read_clips([(0, path)], LOOK, 25, 1.0, 1.0))
    assert len(found) == 12
    for number, part in enumerate(found):
        assert torch.equal(part.frames, straight[25 * number : 25 * number + 25]), number


@pytest.mark.parametrize(("window", "stride"), [(2.0, 2.0), (3.0, 0.7)])
def test_runs_of_windows_in_workers_give_what_one_process_gives(here, long, monkeypatch, window, stride, tmp_path):
    (tmp_path / "text.mp4").write_text("text")
    paths = [("a", long), ("bad", tmp_path / "text.mp4"), ("b", str(CASES / "vfr.mp4"))]
    expected = list(here.read_clips(paths, LOOK, 4, window, stride))
    monkeypatch.setattr(module, "RUN_SECONDS", 4.0)
    with Workers(2) as two:
        found = list(two.read_clips(paths, LOOK, 4, window, stride))
    assert [part._replace(frames=None) for part in found] == [part._replace(frames=None) for part in expected]
    bad = next(part for part in found if part.key == "bad")
    assert bad == ("bad", None, "it is a text file, not a video", None, None, None, 1)
    assert all(torch.equal(a.frames, b.frames) for a, b in zip(found, expected, strict=True) if a is not bad)


def test_a_window_without_frames_shows_the_last_one_before_it(here, tmp_path):
    path = videos.write(tmp_path / "slow.webm", videos.moving(4), fps=1)
    found = list(here.read_clips([(0, path)], LOOK, 4, 0.5, 0.5))
    assert len(found) == 8
    for even, odd in zip(found[::2], found[1::2], strict=True):
        assert torch.equal(odd.frames, even.frames[-1:].expand_as(odd.frames))


def test_damage_in_the_middle_costs_the_windows_it_is_in(here, long, tmp_path):
    content = bytearray(long.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 300] = bytes(300)
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(content)
    good, found = (list(here.read_clips([(0, path)], LOOK, 4, 2.0, 2.0)) for path in (long, damaged))
    assert len(good) == len(found) == 6
    same = [b.frames is not None and torch.equal(a.frames, b.frames) for a, b in zip(good, found, strict=True)]
    assert same[:2] == [True, True] and same[-1] and not all(same)


def test_windows_that_a_cut_off_file_has_left_carry_the_warning(here, tmp_path):
    whole = videos.write(tmp_path / "a.webm", videos.moving(60))
    content = whole.read_bytes()
    expected = list(here.read_clips([(0, whole)], LOOK, 4, 1.0, 1.0))
    whole.write_bytes(content[: len(content) * 2 // 3])
    found = list(here.read_clips([(0, whole)], LOOK, 4, 1.0, 1.0))
    assert 3 <= len(found) < 5
    assert all(
        part.warning.startswith("cut off: ") and part.warning.endswith("of 60 frames could be decoded")
        for part in found
    )
    assert all(torch.equal(a.frames, b.frames) for a, b in zip(found[:2], expected, strict=False))


def sleep_over_the_second_run(path, index, spans, frames, transform):
    return time.sleep(60 if spans[0][0] == 4 else 0) or ([torch.zeros(1)] * len(spans), None, spans)


def test_a_run_that_takes_too_long_names_its_windows_and_no_others(long, monkeypatch):
    monkeypatch.setattr(module, "RUN_SECONDS", 4.0)
    monkeypatch.setattr(module, "_read", sleep_over_the_second_run)
    with Workers(1, timeout=1.0) as one:
        found = list(one.read_clips([(0, long)], LOOK, 4, 2.0, 2.0))
    assert [part.error for part in found] == [None, None, *["decoding took longer than 2 s"] * 2, None, None]
    assert [part.start for part in found] == [0, 2, 4, 6, 8, 10]


def test_runs_are_asked_for_only_as_their_windows_are_taken(long, monkeypatch):
    monkeypatch.setattr(module, "RUN_BYTES", 1)  # every window is a call of its own
    asked, run = [], Workers.run

    def noted(self, calls, *ahead):
        return run(self, (asked.append(call[0]) or call for call in calls), *ahead)

    monkeypatch.setattr(Workers, "run", noted)
    with Workers(1) as one:
        for taken, _ in enumerate(one.read_clips([(0, long)], LOOK, 4, 0.5, 0.5), 1):
            assert len(asked) <= 1 + taken + 2  # the first is for the index
    assert len(asked) == 25
