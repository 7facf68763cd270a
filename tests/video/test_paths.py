"""Which files are taken for videos, and what is written for them is called."""

import re
from pathlib import Path

import pytest

from runtime.files import UserError
from video import paths


def test_folders_give_their_videos_once_and_in_order_without_earlier_copies(tmp_path):
    for name in (
        "b.webm",
        "a.MP4",
        "deep/c.mov",
        "d.ts",
        "e.M2TS",
        "f.mts",
        "g.gif",
        "results/inference/copy.gif",
        ".hidden.webm",
        "notes.txt",
        "results/inference/copy.webm",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    copies = tmp_path / "results" / "inference"
    found = paths.find([tmp_path / "notes.txt", tmp_path, tmp_path / "b.webm"], copies)
    assert [str(path.relative_to(tmp_path)) for path in found] == [
        *("notes.txt", "a.MP4", "b.webm", "d.ts", "e.M2TS", "f.mts", "g.gif", "deep/c.mov")
    ]
    assert paths.find([copies], copies) == [copies / "copy.gif", copies / "copy.webm"]


@pytest.mark.parametrize(
    ("name", "reason"), [("gone.mp4", "there is no such file"), ("empty", "no video in this folder")]
)
def test_paths_that_hold_no_video_are_refused(tmp_path, name, reason):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / name}") + ".*" + reason):
        paths.find([tmp_path / name], tmp_path / "out")


def test_a_link_to_a_folder_is_followed_once(tmp_path):
    disk = tmp_path / "disk"
    (disk / "deep").mkdir(parents=True)
    (disk / "deep" / "a.mp4").touch()
    (tmp_path / "videos").mkdir()
    try:
        (tmp_path / "videos" / "linked").symlink_to(disk, target_is_directory=True)
        (disk / "circle").symlink_to(tmp_path / "videos", target_is_directory=True)
        (disk / "a link").symlink_to(disk / "deep", target_is_directory=True)
    except OSError:
        pytest.skip("no links on this system")
    found, places = paths.match(["a", "linked/deep/a.mp4"], tmp_path / "videos", tmp_path / "data")
    assert places == ["linked/deep/a.mp4"] and set(found.values()) == set(places)


def test_names_of_outputs_never_meet_and_never_leave_their_folder(tmp_path):
    out = tmp_path / "inference"
    names = [
        "x/a.webm",
        "y/a.mp4",
        "z/A.mov",
        "x/results.mp4",
        "..",
        "x/.webm",
        "x/é ü.webm",
        "x/" + "ж" * 200 + ".mkv",
    ]
    names += ["x/film.json", "inference/a-2.webm"]
    given = paths.output_names([tmp_path / name for name in names], out)
    assert given[:4] == ["a.webm", "a-3.mp4", "A-4.mov", "results-2.mp4"]
    assert given[6] == "é_ü.webm"
    assert given[-2:] == ["film.video", "a-2.webm"]  # no file of ours is called .video; one in the folder stays
    assert all(re.fullmatch(r"[\w][\w.-]*", name) and len(name.encode()) < 140 for name in given)
    assert len({Path(name).stem.casefold() for name in given}) == len(given)


@pytest.mark.parametrize("address", ["https://a.b/c.mp4", "rtsp://camera/1", "file:///a.mp4"])
def test_a_url_is_told_as_one_unless_a_file_is_called_like_it(tmp_path, monkeypatch, address):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r":/.*: it is a URL: download the video and name the file$"):
        paths.find([Path(address)], tmp_path / "out")
    if not address.startswith("file"):  # pathlib leaves it absolute
        Path(address).parent.mkdir(parents=True)
        Path(address).touch()
        assert paths.find([Path(address)], tmp_path / "out") == [Path(address)]


def test_a_name_with_a_colon_is_no_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("http:clip.mp4", "concat:x.mp4", "a: b.mp4"):
        Path(name).touch()
        assert paths.find([Path(name)], tmp_path / "out") == [Path(name)]
