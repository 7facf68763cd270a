"""Where a captioner looked, drawn over clips: at the right place and time, of the clip's shape and length."""

import av
import numpy as np
import pytest
import torch

from tests import videos
from video import overlay
from video.reader import Transform, VideoError, probe, read_frames
from video.workers import Workers

WHOLE = Transform(64)


def grey_clip(path, count=24, width=64, height=48, shade=128, fps=12):
    return videos.write(path, np.full((count, height, width, 3), shade, np.uint8), fps=fps)


def one_patch(shape, *places):
    weights = np.zeros(shape, np.float32)
    for place in places:
        weights[place] = 1 / len(places)
    return weights


def draw(folder, clip, weights, transform=WHOLE, frames=None):
    drawn = overlay.write(clip, folder / "it", {"attention": weights}, transform, frames or 2 * len(weights))
    assert drawn == {"attention": "it.attention.webm"}
    return folder / "it.attention.webm"


def colourful(path, count):
    """Where a video's frames are not grey: bool (count, H, W)."""
    pixels = read_frames(path, count).astype(int)
    return pixels.max(-1) - pixels.min(-1) > 60


def middle(mask):
    rows, columns = np.nonzero(mask)
    return (rows.mean() + 0.5) / mask.shape[0], (columns.mean() + 0.5) / mask.shape[1]


def test_what_was_looked_at_is_coloured_at_its_place_and_time(tmp_path):
    clip = grey_clip(tmp_path / "clip.webm")
    weights = one_patch((4, 4, 4), (0, 0, 3), (3, 2, 1))
    seen = colourful(draw(tmp_path, clip, weights), 24)
    assert middle(seen[0]) == pytest.approx((1 / 8, 7 / 8), abs=0.06)
    assert middle(seen[-1]) == pytest.approx((5 / 8, 3 / 8), abs=0.06)
    # Of 8 frames sampled from 24, the tubelets are frames 0 and 3, 6 and 9, 13 and 16, 19 and 23.
    coloured = [bool(one.any()) for one in seen]
    assert all(coloured[:5]) and not any(coloured[5:18]) and all(coloured[19:])


@pytest.mark.parametrize(("width", "height"), [(160, 48), (48, 160), (75, 53)])
def test_an_overlay_has_its_clips_shape_and_length_and_the_whole_frame_is_squashed(tmp_path, width, height):
    clip = grey_clip(tmp_path / "clip.webm", 31, width, height, fps=10)
    path = draw(tmp_path, clip, one_patch((2, 4, 4), (0, 3, 3), (1, 3, 3)))
    info, own = probe(path), probe(clip)
    assert (info.width, info.height, info.frames) == (own.width, own.height, own.frames) == (width, height, 31)
    assert info.duration == pytest.approx(own.duration, abs=0.02)
    rows, columns = middle(colourful(path, 3)[1])
    assert (rows, columns) == pytest.approx((7 / 8, 7 / 8), abs=0.08)
    with av.open(str(path)) as container:
        assert "vp9" in container.streams.video[0].codec.name


@pytest.mark.parametrize(("width", "height"), [(160, 80), (80, 160)])
def test_with_a_crop_only_what_the_encoder_saw_is_under_the_grid(tmp_path, width, height):
    """A clip of random blocks: where the transform's own crop comes from, there is the grid."""
    transform = Transform(56, crop=True)
    edge = 80 * 56 / 64  # of the frame's pixels, around its middle
    top, left, bottom, right = transform.seen(height, width)
    assert (bottom - top, right - left) == pytest.approx((edge, edge))
    assert (top + bottom, left + right) == pytest.approx((height, width))
    clip = grey_clip(tmp_path / "clip.webm", 8, width, height, shade=200)
    path = draw(tmp_path, clip, np.full((2, 2, 2), 1 / 8, np.float32), transform)
    seen = colourful(path, 1)[0]
    inside = np.zeros_like(seen)
    inside[round(top) : round(bottom), round(left) : round(right)] = True
    assert (seen == inside).mean() > 0.97
    outside = read_frames(path, 1)[0][~inside].mean()
    assert 0.15 * 200 < outside < 0.35 * 200  # dark, and still to be seen


def test_a_crops_place_is_where_its_pixels_come_from():
    """Where all of the part that is seen is white, and nothing else, the encoder sees white alone."""
    for width, height in ((100, 61), (61, 100), (64, 64)):
        transform = Transform(56, crop=True)
        top, left, bottom, right = transform.seen(height, width)
        frames = np.zeros((1, height, width, 3), np.uint8)
        frames[:, round(top) : round(bottom), round(left) : round(right)] = 255
        assert transform.apply(frames).float().mean() > 250
        frames = 255 - frames
        assert transform.apply(frames).float().mean() < 8


def test_the_picture_stays_visible_and_only_attention_has_colour(tmp_path):
    frames = videos.moving(8)  # of all colours
    clip = videos.write(tmp_path / "clip.webm", frames, crf="10")
    weights = one_patch((2, 2, 2), (0, 0, 0), (1, 0, 0))
    drawn, own = read_frames(draw(tmp_path, clip, weights), 8), read_frames(clip, 8)
    corner = (slice(None), slice(30, None), slice(40, None))  # far from the patch
    grey = own[corner] @ np.array([0.299, 0.587, 0.114])
    assert np.abs(drawn[corner].mean(-1) - overlay.DIM * grey).mean() < 8
    assert np.ptp(drawn[corner].astype(int), axis=-1).mean() < 12


def test_weights_are_compared_over_the_whole_clip(tmp_path):
    weights = one_patch((2, 2, 2), (0, 0, 0))
    weights[1, 0, 0] = 0.2
    clip = grey_clip(tmp_path / "clip.webm", 8)
    first, *_, last = read_frames(draw(tmp_path, clip, weights), 8)[:, 4, 4].astype(int)
    assert np.ptp(first) > 150 > 2 * np.ptp(last) > 20


@pytest.mark.parametrize("count", [1, 3])
def test_a_clip_of_fewer_frames_than_time_steps_shows_all_of_them(tmp_path, count):
    clip = grey_clip(tmp_path / "clip.webm", count)
    weights = one_patch((4, 1, 4), *((step, 0, step) for step in range(4)))
    path = draw(tmp_path, clip, weights)
    assert probe(path).duration == pytest.approx(probe(clip).duration, abs=0.02)
    columns = [middle(one)[1] for one in colourful(path, 4)]
    assert columns == pytest.approx([1 / 8, 3 / 8, 5 / 8, 7 / 8], abs=0.1)


def test_long_and_large_videos_are_thinned_out_and_reduced(tmp_path, monkeypatch):
    monkeypatch.setattr(overlay, "MOST", 10)
    monkeypatch.setattr(overlay, "LONGEST", 80)
    clip = grey_clip(tmp_path / "clip.webm", 60, 160, 90)
    info = probe(draw(tmp_path, clip, one_patch((2, 2, 2), (0, 0, 0))))
    assert (info.frames, info.width, info.height) == (10, 80, 45)
    assert info.duration == pytest.approx(5, abs=0.02)


def test_maps_are_the_mean_and_the_queries_that_are_asked_for():
    attention = torch.arange(5.0)[:, None, None, None].expand(5, 2, 3, 3)
    maps = overlay.named(attention, [4, 0])
    assert {name: one[0, 0, 0] for name, one in maps.items()} == {"attention": 2, "query 4": 4, "query 0": 0}
    assert list(overlay.named(attention)) == ["attention"]


@pytest.mark.parametrize("count", [0, 1])
def test_a_video_that_cannot_be_decoded_costs_its_own_overlay(tmp_path, capsys, count):
    (tmp_path / "bad.webm").write_bytes(b"no video" * 9)
    weights = {"attention": one_patch((2, 2, 2), (0, 0, 0)), "query 1": one_patch((2, 2, 2), (1, 1, 1))}
    clips = {"bad": (tmp_path / "bad.webm", weights), "good": (grey_clip(tmp_path / "good.webm", 8), weights)}
    with Workers(count) as workers:
        drawn = dict(overlay.write_all(workers, clips, tmp_path / "out", WHOLE, 4))
    assert drawn == {"good": {"attention": "good.attention.webm", "query 1": "good.query-1.webm"}}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(drawn["good"].values())
    assert "bad: no overlay: it " in capsys.readouterr().out
    with pytest.raises(VideoError):
        overlay.write(tmp_path / "bad.webm", tmp_path / "it", weights, WHOLE, 4)
    assert not list(tmp_path.glob("it*"))
