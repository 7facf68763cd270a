"""The windows of a long video, the segments made of their captions, and the exact text of both subtitle formats."""

import pytest

from runtime.files import UserError
from video import subtitles
from video.subtitles import Segment, check_window, windows


def test_windows_cover_the_video_edge_to_edge():
    assert windows(9.0, 3.0, 3.0) == [(0.0, 3.0), (3.0, 6.0), (6.0, 9.0)]


def test_a_rest_of_half_a_stride_is_a_window_of_its_own_and_a_smaller_one_joins_the_last():
    assert windows(7.5, 3.0, 3.0) == [(0.0, 3.0), (3.0, 6.0), (6.0, 7.5)]
    assert windows(7.4, 3.0, 3.0) == [(0.0, 3.0), (3.0, 7.4)]


def test_windows_overlap_where_the_stride_is_shorter():
    assert windows(6.0, 3.0, 1.5) == [(0.0, 3.0), (1.5, 4.5), (3.0, 6.0)]
    assert windows(6.8, 3.0, 1.5) == [(0.0, 3.0), (1.5, 4.5), (3.0, 6.0), (4.5, 6.8)]
    assert windows(6.7, 3.0, 1.5) == [(0.0, 3.0), (1.5, 4.5), (3.0, 6.7)]


def test_a_video_shorter_than_a_window_is_one_window():
    assert windows(1.25, 3.0, 3.0) == [(0.0, 1.25)]


def test_a_duration_a_hair_under_whole_windows_is_whole_windows():
    spans = windows(0.3 - 1e-12, 0.1, 0.1)  # 0.1 + 0.2 is not 0.3 in floating point
    assert len(spans) == 3
    assert spans[-1][1] == 0.3 - 1e-12


@pytest.mark.parametrize("duration", [0.5, 3.0, 59.97, 1201.3, 7200.0])
@pytest.mark.parametrize(("window", "stride"), [(3.0, 3.0), (4.0, 1.0), (2.5, 0.7)])
def test_no_instant_is_left_out_and_no_window_is_longer_than_it_should_be(duration, window, stride):
    spans = windows(duration, window, stride)
    assert spans[0][0] == 0.0
    assert spans[-1][1] == duration
    for (start, end), (next_start, next_end) in zip(spans, spans[1:], strict=False):
        assert start < next_start <= end < next_end
    assert all(end - start < window + stride / 2 for start, end in spans)


@pytest.mark.parametrize(
    ("window", "stride", "named"),
    [
        (0.0, 1.0, "--window"),
        (float("nan"), 1.0, "--window"),
        (float("inf"), 1.0, "--window"),
        (2.0, -1.0, "--stride"),
        (2.0, float("nan"), "--stride"),
        (2.0, 2.5, "at most the window"),
    ],
)
def test_lengths_that_cannot_cover_a_video_are_refused(window, stride, named):
    with pytest.raises(UserError, match=named):
        check_window(window, stride)


def test_repeats_in_a_row_become_one_segment_and_a_return_is_a_new_one():
    spans = [(0.0, 2.0), (2.0, 4.0), (4.0, 6.0), (6.0, 8.0)]
    assert subtitles.segments(spans, ["a cup", "A\n\ncup", "a pen", "a\n\ncup"]) == [
        Segment(0.0, 4.0, "a cup"),
        Segment(4.0, 6.0, "a pen"),
        Segment(6.0, 8.0, "a cup"),
    ]


def test_overlapping_windows_meet_in_the_middle_of_their_overlap():
    spans = windows(8.0, 4.0, 2.0)  # (0, 4) (2, 6) (4, 8)
    assert subtitles.segments(spans, ["a", "b", "c"]) == [
        Segment(0.0, 3.0, "a"),
        Segment(3.0, 5.0, "b"),
        Segment(5.0, 8.0, "c"),
    ]


@pytest.mark.parametrize(("window", "stride"), [(3.0, 3.0), (3.0, 1.0), (3.0, 0.7), (1 / 3, 1 / 7)])
def test_segments_are_ordered_without_overlap_or_gap(window, stride):
    spans = windows(23.4, window, stride)
    parts = subtitles.segments(spans, [f"caption {i}" for i in range(len(spans))])
    assert len(parts) == len(spans)
    assert (parts[0].start, parts[-1].end) == (0.0, 23.4)
    assert all(one.start < one.end == other.start for one, other in zip(parts, parts[1:], strict=False))


def test_a_window_without_a_caption_leaves_a_gap_that_repeats_do_not_bridge():
    spans = [(0.0, 2.0), (2.0, 4.0), (4.0, 6.0), (6.0, 8.0)]
    assert subtitles.segments(spans, ["a", None, "a", " "]) == [Segment(0.0, 2.0, "a"), Segment(4.0, 6.0, "a")]


HOSTILE = Segment(3661.0015, 359999.9996, "a < b & c 00:00:01.000 ---> <b>end")


def test_srt_is_exact():
    assert subtitles.srt([Segment(0.0, 2.5, "moving a cup up"), HOSTILE]) == (
        "1\n00:00:00,000 --> 00:00:02,500\nmoving a cup up\n"
        "\n"
        "2\n01:01:01,002 --> 100:00:00,000\na < b & c 00:00:01.000 -> <b>end\n"
    )


def test_vtt_is_exact():
    assert subtitles.vtt([Segment(0.0, 2.5, "moving a cup up"), HOSTILE]) == (
        "WEBVTT\n"
        "\n"
        "00:00:00.000 --> 00:00:02.500\nmoving a cup up\n"
        "\n"
        "01:01:01.002 --> 100:00:00.000\na &lt; b &amp; c 00:00:01.000 ---&gt; &lt;b&gt;end\n"
    )


def test_no_segments_make_an_empty_srt_and_a_vtt_that_still_opens():
    assert subtitles.srt([]) == ""
    assert subtitles.vtt([]) == "WEBVTT\n"
