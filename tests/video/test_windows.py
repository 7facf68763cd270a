"""Windows of long videos: the frames that reading each window by itself gives, and files that end their decoder."""

import os
import signal
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from video import subtitles as timeline
from video import windows as streaming
from video.reader import Transform, VideoError, probe, read_clip
from video.workers import Failure

LOOK = Transform(32)


def write_video(path: Path, frames: int = 96, codec: str = "libvpx-vp9", fps: int = 12, gap: int = 0) -> Path:
    """Frame i is grey of brightness 40 + i % 200; `gap` seconds without a frame in the middle."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.options = {"g": "30"}
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 40 + i % 200, np.uint8), format="rgb24")
            frame.pts = i + (gap * fps if i >= frames // 2 else 0)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def windows_of(path: Path, window: float, stride: float, count: int = 4) -> list[torch.Tensor | Failure]:
    index = streaming.read_index(path)
    spans = timeline.windows(index.duration, window, stride)
    return list(streaming.read_windows(path, index, spans, count, LOOK))


@pytest.mark.parametrize(("name", "codec"), [("a.webm", "libvpx-vp9"), ("a.mp4", "libx264"), ("a.avi", "mpeg4")])
@pytest.mark.parametrize(("window", "stride"), [(2.0, 2.0), (3.0, 0.7)])
def test_windows_hold_the_frames_that_reading_each_by_itself_gives(tmp_path, name, codec, window, stride):
    path = write_video(tmp_path / name, codec=codec)
    spans = timeline.windows(probe(path).duration, window, stride)
    found = windows_of(path, window, stride)
    assert len(found) == len(spans) > 3
    for frames, span in zip(found, spans, strict=True):
        assert torch.equal(frames, read_clip(path, 4, LOOK, *span))


def test_a_window_shows_its_own_frames_first_and_last_included(tmp_path):
    shown = [frames[:, 0, 16, 16].int() - 40 for frames in windows_of(write_video(tmp_path / "a.webm"), 1.0, 1.0)]
    for second, frames in enumerate(shown):
        expected = torch.tensor([0, 3, 7, 11]) + 12 * second
        assert (
            frames - expected
        ).abs().max() <= 3  # the codec's colours are not exact; a neighbouring window's are 9 off
    assert len(shown) == 8


def test_a_window_without_frames_shows_the_last_one_before_it(tmp_path):
    path = write_video(tmp_path / "a.webm", frames=24, gap=4)
    second, empty = windows_of(path, 1.0, 1.0)[0:4:3]
    assert torch.equal(empty, second[-1:].expand_as(empty))


def test_a_duration_counts_the_last_frame(tmp_path):
    assert streaming.read_index(write_video(tmp_path / "a.webm", frames=36)).duration == pytest.approx(3.0, abs=0.01)
    one = streaming.read_index(write_video(tmp_path / "one.webm", frames=1))
    assert (len(one.times), one.duration) == (1, 0.04)


def test_damage_in_the_middle_costs_the_windows_it_is_in(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", frames=480, codec="libx264")
    content = bytearray(whole.read_bytes())
    middle = len(content) // 3
    content[middle : middle + 400] = bytes(400)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(content)
    good, found = windows_of(whole, 2.0, 2.0), windows_of(path, 2.0, 2.0)
    assert len(good) == len(found) == 20
    same = [torch.equal(a, b) if isinstance(b, torch.Tensor) else False for a, b in zip(good, found, strict=True)]
    assert same[0] and same[-1]
    assert 10 <= sum(same) < 20


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty"), (b"text", "does not open as a video"), (bytes(5000), "does not open as a video")],
)
def test_what_is_no_video_is_refused_with_its_reason(tmp_path, content, reason):
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(VideoError, match=reason):
        streaming.read_index(tmp_path / "a.mp4")


def test_sound_alone_is_refused(tmp_path):
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(VideoError, match="no pictures"):
        streaming.read_index(tmp_path / "a.wav")


def test_files_come_window_by_window_and_failures_by_name(tmp_path):
    good = write_video(tmp_path / "good.webm")
    (tmp_path / "bad.webm").write_text("text")
    with streaming.WindowDecoder([("bad", tmp_path / "bad.webm"), ("good", good)], 4.0, 4.0, LOOK, 4) as decoder:
        (bad_key, bad), (good_key, spans), *frames = decoder
    assert bad_key == ("bad", None) and "does not open" in bad.reason
    assert good_key == ("good", None) and [start for start, _ in spans] == [0.0, 4.0]
    assert [key for key, _ in frames] == [("good", 0), ("good", 1)]
    for (_, clip), expected in zip(frames, windows_of(good, 4.0, 4.0), strict=True):
        assert torch.equal(clip, expected)


class Scripted:
    """Stands for the process that decodes: gives its answers, then hangs or dies."""

    def __init__(self, answers, code):
        self.answers, self.code, self.pipe, self.ended = iter(answers), code, self, False

    def send(self, order):
        pass

    def answer(self, timeout):
        try:
            return next(self.answers)
        except StopIteration:
            raise EOFError from None

    def exit_code(self):
        return self.code

    def end(self):
        self.ended = True


@pytest.mark.parametrize(
    ("code", "reason"),
    [(-signal.SIGSEGV, "ended the process"), (-signal.SIGALRM, "longer than 7 s"), (None, "longer than 7 s")],
)
def test_a_file_that_ends_its_decoder_fails_from_there_on_and_the_next_file_gets_a_new_one(monkeypatch, code, reason):
    spans = [(0.0, 1.0), (1.0, 2.0), (2.0, 3.0)]
    clip = np.zeros((4, 3, 32, 32), np.uint8)
    scripted = [Scripted([spans, clip], code), Scripted([spans[:1], clip, None], 0)]
    waiting = list(scripted)
    monkeypatch.setattr(streaming, "_Process", lambda: waiting.pop(0))
    with streaming.WindowDecoder([("a", "a"), ("b", "b")], 1.0, 1.0, LOOK, 4, timeout=7.0) as decoder:
        items = dict(decoder)
    assert list(items) == [("a", None), ("a", 0), ("a", 1), ("a", 2), ("b", None), ("b", 0)]
    assert all(isinstance(items[key], Failure) and reason in items[key].reason for key in (("a", 1), ("a", 2)))
    assert torch.equal(items["b", 0], torch.zeros(4, 3, 32, 32, dtype=torch.uint8))
    assert all(process.ended for process in scripted)


def test_a_decoder_that_is_killed_or_left_early_leaves_no_process(tmp_path):
    path = write_video(tmp_path / "a.webm", frames=240)
    with streaming.WindowDecoder([(0, path), (1, path)], 0.5, 0.5, LOOK, 4) as decoder:
        items = iter(decoder)
        next(items)
        (first,) = decoder.processes
        os.kill(first.process.pid, signal.SIGKILL)
        while not isinstance(item := next(items), tuple) or item[0] != (1, None):
            pass
        assert len(item[1]) == 40
        (second,) = decoder.processes
    start = time.monotonic()
    assert first.process.wait(5) is not None and second.process.wait(5) is not None
    assert time.monotonic() - start < 5
