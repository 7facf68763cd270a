"""The frames that a player shows, of every kind of file: by their means as FFmpeg has them, or to the last bit."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests import videos
from video import container
from video import reader as frames
from video.reader import Transform, VideoError, frame_indices, probe, read_clip, read_frames


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def vp9(folder):
    return videos.write(folder / "vp9.webm", videos.moving(36, 426, 240))


@pytest.fixture(scope="module")
def open_groups(folder):
    """h264 whose groups of pictures are open: decoding that begins at a key frame may give wrong ones first."""
    options = {"bf": "3", "x264-params": "open-gop=1:keyint=20:min-keyint=20:scenecut=0"}
    return videos.write(folder / "open.mp4", videos.moving(100, 160, 120), "libx264", **options)


# ---- every kind of file: tests/data holds what FFmpeg shows of each ----

CASES = Path(__file__).parents[1] / "data"
EXPECTED = json.loads((CASES / "expected.json").read_text())


def quadrants(frame):
    height, width = (length // 2 for length in frame.shape[:2])
    quarters = frame[:height, :width], frame[:height, width:], frame[height:, :width], frame[height:, width:]
    return np.array([quarter.reshape(-1, 3).mean(0) for quarter in quarters])


@pytest.mark.parametrize("name", EXPECTED)
def test_the_frames_of_every_kind_of_file_are_those_that_are_shown(name, monkeypatch):
    expected, path = EXPECTED[name], CASES / name
    info = probe(path)
    assert (info.frames, info.width, info.height) == (expected["frames"], expected["width"], expected["height"])
    whole = read_frames(path, info.frames)
    assert whole.shape == (info.frames, info.height, info.width, 3)
    for number, means in expected["quadrant_means"].items():
        assert np.abs(quadrants(whole[int(number)]) - means).max() <= 3
    assert np.array_equal(read_frames(path, info.frames, 0.0), whole)
    expected_clip = Transform(32).apply(whole[frame_indices(len(whole), 5)])
    for small in (container.SMALL, 0):  # bytes: read once, its packets kept, and read twice
        monkeypatch.setattr(container, "SMALL", small)
        clip, warning, _ = read_clip(path, 5, Transform(32))
        assert warning is None and torch.equal(clip, expected_clip)
        assert probe(path) == info


def test_times_count_from_the_start_of_the_file_and_not_of_the_track():
    index = container.read_index(CASES / "delayed.mp4")
    assert (index.start, index.end) == (pytest.approx(2.5), pytest.approx(4.5))
    whole = read_frames(CASES / "delayed.mp4", 48)
    assert np.array_equal(read_frames(CASES / "delayed.mp4", 12, 3.0, 3.5), whole[12:24])


def test_windows_within_open_groups_of_pictures_are_exact():
    path = CASES / "opengop_x264.mp4"  # 25 frames a second
    straight = np.stack(videos.decoded_by_ffmpeg(path))
    for start in (1.0, 3.28, 5.0, 7.52, 10.96):
        first = round(start * 25)
        assert np.array_equal(read_frames(path, 26, start, start + 1.04), straight[first : first + 26]), start


ODD_NAMES = ["a: b.mp4", "#1 50%.mp4", "%d.mp4", 'it\'s "it".mp4', "two\nlines.mp4", "http:clip.mp4", "concat:x.mp4"]
ODD_NAMES += ["file:x.mp4", "-x.mp4", "pipe:", "a|b;c&d.mp4", "\N{SNOWMAN}.mp4", os.fsdecode(b"caf\xe9.mp4")]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems forbid such names")
@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_a_file_opens_whatever_it_is_called(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for source in ("vfr.mp4", "one.webm"):
        shutil.copy(CASES / source, tmp_path / name)
        assert np.array_equal(read_frames(name, 3), read_frames(CASES / source, 3))
        assert probe(tmp_path / name) == probe(CASES / source)


# ---- files that are cut off ----


@pytest.fixture(scope="module")
def cut_off(folder):
    """An MP4 whose index comes first, as for streaming, without its last third; and a WebM."""
    mp4 = videos.write(folder / "early.mp4", videos.moving(40), "libx264", bf="0", g="5")
    with av.open(str(mp4)) as source, av.open(str(folder / "m.mp4"), "w", options={"movflags": "faststart"}) as target:
        (track,) = source.streams.video
        copied = target.add_stream_from_template(track)
        for packet in source.demux(track):
            if packet.size:
                packet.stream = copied
                target.mux(packet)
    webm = videos.write(folder / "w.webm", videos.moving(40))
    made = {}
    for kind, path in (("mp4", folder / "m.mp4"), ("webm", webm)):
        made[kind] = path, np.stack(videos.decoded_by_ffmpeg(path))
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    return made


@pytest.mark.parametrize("kind", ["mp4", "webm"])
def test_a_file_that_is_cut_off_gives_what_is_left_and_a_warning(cut_off, kind):
    path, whole = cut_off[kind]
    clip, warning, _ = read_clip(path, 8, Transform(32))
    left = int(re.fullmatch(r"cut off: (\d+) of 40 frames could be decoded", warning)[1])
    assert 20 < left < 35
    assert torch.equal(clip, Transform(32).apply(whole[:left][frame_indices(left, 8)]))
    assert np.array_equal(read_frames(path, left), whole[:left])


# ---- sampling ----


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [
        (5, 5, [0, 1, 2, 3, 4]),
        (3, 8, [0, 0, 0, 0, 1, 1, 1, 2]),
        (1, 4, [0, 0, 0, 0]),
        (100, 4, [0, 33, 66, 99]),
        (48, 1, [0]),
    ],
)
def test_frames_are_sampled_uniformly_and_repeat_in_short_clips(total, count, expected):
    assert frame_indices(total, count).tolist() == expected
    assert frame_indices(total, count).dtype == np.int64


@pytest.mark.parametrize("number", range(3), ids=["1280x720", "640x272", "176x144"])
def test_real_h264_frames_equal_ffmpegs_to_the_last_bit(number):
    path = videos.real_videos()[number]
    wanted = frame_indices(videos.count_by_ffmpeg(path), 32)
    assert np.array_equal(read_frames(path, 32), videos.sampled_by_ffmpeg(path, wanted))


@pytest.mark.parametrize("count", [4, 32, 50])
def test_vp9_frames_equal_ffmpegs_also_where_they_repeat_or_are_far_apart(vp9, count):
    expected = np.stack(videos.decoded_by_ffmpeg(vp9))
    assert len(expected) == 36
    assert np.array_equal(read_frames(vp9, count), expected[frame_indices(36, count)])


def test_open_groups_of_pictures_do_not_confuse_the_frames(open_groups):
    expected = np.stack(videos.decoded_by_ffmpeg(open_groups))
    for count in (7, 32):
        assert np.array_equal(read_frames(open_groups, count), expected[frame_indices(100, count)])


@pytest.mark.parametrize("name", ["vp9", "open_groups"])
def test_a_windows_frames_are_those_shown_in_it(name, request):
    path = request.getfixturevalue(name)
    expected = np.stack(videos.decoded_by_ffmpeg(path))
    for start, end in ((0.0, 1.0), (0.5, 1.5), (1.1, 2.9), (2.0, None), (2.5, 99.0)):
        first = int(np.ceil(start * 12 - 1e-3))
        after = min(len(expected), int(np.ceil((end or 99) * 12 - 1e-3)))
        wanted = first + frame_indices(after - first, 6)
        assert np.array_equal(read_frames(path, 6, start, end), expected[wanted]), (start, end)


def test_a_window_between_two_frames_or_after_the_last_shows_the_frame_before(vp9):
    expected = np.stack(videos.decoded_by_ffmpeg(vp9))
    assert np.array_equal(read_frames(vp9, 2, 1.01, 1.02), expected[[12, 12]])
    assert np.array_equal(read_frames(vp9, 2, 500.0, 501.0), expected[[35, 35]])


def test_probe_tells_length_and_size(vp9):
    info = probe(vp9)
    assert (info.frames, info.width, info.height) == (36, 426, 240)
    assert info.fps == pytest.approx(12, rel=1e-3)  # WebM counts milliseconds
    assert info.duration == pytest.approx(3.0, abs=0.01)


# ---- what does not decode ----


def test_undecodable_files_are_told_apart(folder, vp9):
    (folder / "empty.webm").touch()
    (folder / "noise.webm").write_bytes(np.random.default_rng(0).bytes(5000))
    Image.new("RGB", (64, 48)).save(folder / "picture.mp4", "PNG")
    (folder / "text.mp4").write_text("<html>not found</html>")
    (folder / "cut.webm").write_bytes(vp9.read_bytes()[:200])
    videos.write_audio(folder / "audio.webm")
    reasons = {
        "empty.webm": "the file is empty",
        "noise.webm": "it does not open as a video",
        "text.mp4": "it is a text file, not a video",
        "picture.mp4": "it is a picture or a text, not a video",
        "cut.webm": "it does not open as a video",
        "audio.webm": "it holds no video stream",
        "none.webm": "there is no such file",
        ".": "it is a folder or a device, not a file",
    }
    for name, reason in reasons.items():
        for read in (lambda path: read_frames(path, 4), probe):
            with pytest.raises(VideoError, match=reason) as caught:
                read(folder / name)
            assert len(str(caught.value)) < 200
            assert str(folder) not in str(caught.value)
    with pytest.raises(VideoError, match="it is a URL: download"):
        read_frames("https://a.b/c.mp4", 4)


# ---- the transform ----


def test_the_whole_frame_is_squashed_antialiased_as_in_floats():
    frames = torch.from_numpy(videos.moving(5, 100, 60))
    squares = Transform(32).apply(frames)
    assert squares.shape == (5, 3, 32, 32)
    assert squares.dtype == torch.uint8
    assert squares.is_contiguous()
    smooth = F.interpolate(frames.permute(0, 3, 1, 2).float(), (32, 32), mode="bilinear", antialias=True)
    assert (squares.float() - smooth).abs().max() <= 1


@pytest.mark.parametrize(("width", "height"), [(100, 60), (60, 100), (64, 64)])
def test_crop_resizes_the_shortest_edge_and_takes_the_centre(width, height):
    frames = torch.from_numpy(videos.moving(3, width, height))
    squares = Transform(56, crop=True).apply(frames)  # shortest edge 64
    long = int(64 * max(width, height) / min(width, height))
    size = (64, long) if height <= width else (long, 64)
    resized = F.interpolate(frames.permute(0, 3, 1, 2), size, mode="bilinear", antialias=True)
    top, left = (size[0] - 56) // 2, (size[1] - 56) // 2
    assert torch.equal(squares, resized[..., top : top + 56, left : left + 56])


def test_crop_of_256_resizes_to_292():
    frames = torch.zeros(1, 292, 400, 3, dtype=torch.uint8)
    frames[:, 18:274, 72:328] = 200  # what is left of 400 x 292 after cropping 256 from the centre
    assert (Transform(256, crop=True).apply(frames) == 200).all()


def test_a_clip_resized_a_few_frames_at_a_time_is_the_same(vp9, monkeypatch):
    for crop in (False, True):
        transform = Transform(32, crop)
        expected = transform.apply(read_frames(vp9, 40))
        assert torch.equal(read_clip(vp9, 40, transform)[0], expected)
        monkeypatch.setattr(frames, "RESIZED_AT_ONCE", 3)
        assert torch.equal(read_clip(vp9, 40, transform)[0], expected)
