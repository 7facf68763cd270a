import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests import videos
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
    """h264 whose groups of pictures are open: decord's own random access gives wrong frames of it."""
    options = {"bf": "3", "x264-params": "open-gop=1:keyint=20:min-keyint=20:scenecut=0"}
    return videos.write(folder / "open.mp4", videos.moving(100, 160, 120), "libx264", **options)


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
    assert info.fps == pytest.approx(12)
    assert info.duration == pytest.approx(3.0, abs=0.01)


# ---- what does not decode ----


def test_undecodable_files_are_told_apart(folder, vp9):
    (folder / "empty.webm").touch()
    (folder / "noise.webm").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "text.mp4").write_text("<html>not found</html>")
    (folder / "cut.webm").write_bytes(vp9.read_bytes()[:200])
    videos.write_audio(folder / "audio.webm")
    reasons = {
        "empty.webm": "the file is empty",
        "noise.webm": "it does not open as a video",
        "text.mp4": "it does not open as a video",
        "cut.webm": "it does not open as a video",
        "audio.webm": "no video stream",
        "none.webm": "there is no such file",
        ".": "it is not a file",
    }
    for name, reason in reasons.items():
        for read in (lambda path: read_frames(path, 4), probe):
            with pytest.raises(VideoError, match=reason) as caught:
                read(folder / name)
            assert len(str(caught.value)) < 200
            assert str(folder) not in str(caught.value)


def test_a_clip_cut_in_the_middle_gives_frames_or_a_reason(folder, vp9):
    whole = vp9.read_bytes()
    for share in (0.2, 0.5, 0.8, 0.99):
        path = folder / "half.webm"
        path.write_bytes(whole[: int(len(whole) * share)])
        try:
            assert read_frames(path, 8).shape == (8, 240, 426, 3)
        except VideoError as error:
            assert str(error)


def test_a_frame_larger_than_8k_is_refused(vp9, monkeypatch):
    monkeypatch.setattr(frames, "MAX_PIXELS", 426 * 240 - 1)
    with pytest.raises(VideoError, match="a frame of 426x240 is too large"):
        read_frames(vp9, 4)


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


def test_long_thin_frames_are_not_cropped():
    with pytest.raises(VideoError, match="too long and thin"):
        Transform(32, crop=True).apply(np.zeros((1, 10, 400, 3), np.uint8))


def test_a_clip_resized_a_few_frames_at_a_time_is_the_same(vp9, monkeypatch):
    for crop in (False, True):
        transform = Transform(32, crop)
        expected = transform.apply(read_frames(vp9, 40))
        assert torch.equal(read_clip(vp9, 40, transform), expected)
        monkeypatch.setattr(frames, "RESIZED_AT_ONCE", 3 * 426 * 240 * 3)
        assert torch.equal(read_clip(vp9, 40, transform), expected)
