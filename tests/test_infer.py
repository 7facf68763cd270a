"""Captioning of videos: which are taken, what is written for them, and what happens to those that cannot be."""

import errno
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import infer
from features.cache import CacheConfig
from models import checkpoint
from models.video_files import CaptionsFiles
from models.vjepa2 import VideoEncoder
from qformer import VideoCaptioner
from runtime.files import UserError
from runtime.signals import Interrupted
from tests import videos
from tests.tiny import TEMPLATES, save_encoder, save_lm, tiny_qformer

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "grey": (128, 128, 128)}


def write_video(path: Path, colours: str, seconds: float = 1.0, fps: int = 12) -> Path:
    """A video that shows each of `colours` for `seconds`, 64x48."""
    shades = np.array([COLOURS[colour] for colour in colours.split()], np.uint8)  # (colours, 3)
    frames = np.repeat(shades, round(seconds * fps), axis=0)[:, None, None]
    return videos.write(path, np.broadcast_to(frames, (len(frames), 48, 64, 3)), fps=fps)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with checkpoint.pt, of random weights, and the tiny encoder and language model it was made with."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    save_encoder(folder / "encoder")
    save_lm(folder / "lm")
    features: CacheConfig = VideoEncoder(folder / "encoder", frames=4).cache_config("float16", 1)
    qformer = tiny_qformer()
    config = {"llm": str(folder / "lm"), "prompt": "a video showing:", "features": features.to_dict()}
    saved = checkpoint.Checkpoint({**config, "qformer": qformer.config}, qformer.state_dict())
    checkpoint.write(folder / "checkpoint.pt", saved)
    return folder


class Namer(CaptionsFiles):
    """A captioner that names the colour of the frames: what the real one would learn at its best."""

    def __init__(self, trained: Path):
        self.encoder = VideoEncoder(trained / "encoder", frames=4)
        self.config, self.epoch, self.recipe = {"llm": "none", "features": {"encoder": "none"}}, 7, {"lr": 0.002}

    def encode(self, clips: torch.Tensor) -> torch.Tensor:
        return clips.float().mean(dim=(1, 3, 4))  # (B, 3)

    def generate(self, features: torch.Tensor, max_new_tokens: int, num_beams: int) -> list[str]:
        known = torch.tensor(list(COLOURS.values())).float()  # (4, 3)
        return [f"showing {list(COLOURS)[(known - one).square().sum(1).argmin()]}" for one in features]


@pytest.fixture
def namer(trained, monkeypatch):
    made = Namer(trained)
    monkeypatch.setattr(infer.VideoCaptioner, "from_checkpoint", lambda *_: made)
    return made


def run(results: Path, *arguments: object) -> tuple[int, dict]:
    code = infer.main(["--results", str(results), "--workers", "0", *map(str, arguments)])
    return code, json.loads((results / "inference" / "results.json").read_text())


def test_a_checkpoint_captions_videos_as_its_own_caption_method_does(trained, tmp_path):
    paths = [write_video(tmp_path / "in" / f"{colour}.webm", colour) for colour in ("red", "blue", "green")]
    saved = trained / "checkpoint.pt"
    code, results = run(tmp_path, "--checkpoint", saved, "--video", tmp_path / "in", "--batch-size", 2)
    captioner = VideoCaptioner.from_checkpoint(saved)
    found = {row["source"]: row["prediction"] for row in results["predictions"]}
    assert found == dict(zip(map(str, paths), captioner.caption(paths), strict=True))
    assert results["encoder"] == str(trained / "encoder")


def test_models_that_moved_are_named_on_the_command_line(trained, tmp_path, monkeypatch):
    moved = Path(shutil.copytree(trained, tmp_path / "moved"))
    saved = checkpoint.read(moved / "checkpoint.pt")
    saved.config["llm"] = saved.config["features"]["encoder"] = str(tmp_path / "gone")
    checkpoint.write(moved / "checkpoint.pt", saved)
    video = write_video(tmp_path / "red.webm", "red")
    with pytest.raises(UserError, match="gone"):
        run(tmp_path, "--checkpoint", moved / "checkpoint.pt", "--video", video)
    monkeypatch.chdir(moved)
    here = ["--llm", moved / "lm", "--encoder", moved / "encoder"]
    code, results = run(tmp_path, "--checkpoint", moved / "checkpoint.pt", "--video", video, *here)
    assert (code, results["llm"], results["encoder"]) == (0, "lm", "encoder")  # below the working directory


@pytest.mark.parametrize("window", [[], ["--window", 1]])
def test_videos_that_cannot_be_decoded_are_named_with_a_reason_and_the_run_goes_on(namer, tmp_path, capsys, window):
    good = write_video(tmp_path / "in" / "good.webm", "red")
    bad = {"empty": b"", "text": b"not a video\n", "noise": np.random.default_rng(0).bytes(4000)}
    bad["cut"] = good.read_bytes()[:400]
    for name, content in bad.items():
        (tmp_path / "in" / f"{name}.mp4").write_bytes(content)
    code, results = run(tmp_path, "--video", tmp_path / "in", *window)
    assert (code, results["clips"], results["failed"]) == (0, 5, 4)
    rows = {row["id"]: row for row in results["predictions"]}
    assert (rows["good"]["prediction"], rows["good"]["error"]) == ("showing red", None)
    for name in bad:
        assert rows[name]["error"] and rows[name]["prediction"] is None and rows[name]["video"] is None
        assert not list((tmp_path / "inference").glob(f"{name}.*"))
    assert rows["empty"]["error"] == "the file is empty"
    printed = capsys.readouterr().out
    assert "empty: failed: the file is empty" in printed and "1 of 5 videos captioned" in printed
    code, results = run(tmp_path, "--video", tmp_path / "in" / "text.mp4", *window)
    assert (code, results["failed"]) == (1, 1)  # none is captioned
    assert (tmp_path / "inference" / "index.html").is_file()


def test_the_page_links_to_the_videos_where_they_are(namer, tmp_path):
    video = write_video(tmp_path / "in" / "a #1?.webm", "red")
    _, results = run(tmp_path, "--video", video)
    (row,) = results["predictions"]
    assert (row["id"], row["video"], row["source"]) == ("a__1_", "../in/a #1?.webm", str(video))
    page = (tmp_path / "inference" / "index.html").read_text()
    assert "../in/a%20%231%3F.webm" in page
    assert sorted(path.name for path in (tmp_path / "inference").iterdir()) == ["index.html", "results.json"]


def test_copies_are_whole_and_the_page_plays_them(namer, tmp_path):
    one = write_video(tmp_path / "one" / 'a "b" #1?<i>.webm', "red")
    other = write_video(tmp_path / "two" / 'a "b" #1?<i>.webm', "blue")
    _, results = run(tmp_path, "--video", one, other, "--copy-videos")
    copies = [row["video"] for row in results["predictions"]]
    assert copies == ["a__b___1__i_.webm", "a__b___1__i_-2.webm"]
    assert [(tmp_path / "inference" / name).read_bytes() for name in copies] == [one.read_bytes(), other.read_bytes()]
    assert [row["prediction"] for row in results["predictions"]] == ["showing red", "showing blue"]
    page = (tmp_path / "inference" / "index.html").read_text()
    assert all(name in page for name in copies)
    assert "<i>.webm" not in page


def test_a_video_that_is_cut_off_is_captioned_with_a_warning(namer, tmp_path, capsys):
    video = write_video(tmp_path / "cut.webm", "red green", seconds=3)
    video.write_bytes(video.read_bytes()[:-60])
    code, results = run(tmp_path, "--video", video)
    (row,) = results["predictions"]
    assert (code, row["error"]) == (0, None) and row["prediction"]
    assert re.fullmatch(r"cut off: \d+ of 72 frames could be decoded", row["warning"])
    assert f"cut: {row['warning']}\n" in capsys.readouterr().out
    assert row["warning"] in (tmp_path / "inference" / "index.html").read_text()


def test_a_long_video_in_one_caption_is_told_how_to_get_more(namer, tmp_path, capsys):
    long = write_video(tmp_path / "in" / "holiday.webm", "red", seconds=31, fps=1)
    write_video(tmp_path / "in" / "short.webm", "red", seconds=29, fps=1)
    run(tmp_path, "--video", tmp_path / "in")
    told = [line for line in capsys.readouterr().out.splitlines() if "--window" in line]
    assert told == ["holiday: 31 s; --window 4 captions it in parts"]
    run(tmp_path, "--video", long, "--window", 4)
    assert "--window" not in capsys.readouterr().out


def test_captions_are_on_the_screen_and_on_the_disk_as_they_are_made(namer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(infer, "SAVE_EVERY", 0.0)
    seen, name = [], namer.generate

    def generate(*arguments):
        path = tmp_path / "inference" / "results.json"
        rows = json.loads(path.read_text())["predictions"] if path.exists() else []
        seen.append((sum(row["prediction"] is not None for row in rows), capsys.readouterr().out))
        return name(*arguments)

    monkeypatch.setattr(namer, "generate", generate)
    for colour in ("a red", "b green", "c blue"):
        write_video(tmp_path / "in" / f"{colour}.webm", colour.split()[1])
    run(tmp_path, "--video", tmp_path / "in", "--batch-size", 1)
    assert seen == [(0, ""), (1, "a_red: showing red\n"), (2, "b_green: showing green\n")]


@pytest.mark.parametrize(("number", "window"), [(signal.SIGINT, []), (signal.SIGTERM, ["--window", 1])])
def test_an_interrupt_keeps_what_is_captioned(namer, tmp_path, monkeypatch, capsys, number, window):
    before, name, calls = signal.getsignal(number), namer.generate, []

    def generate(*arguments):
        calls.append(arguments)
        if len(calls) == 6:
            signal.raise_signal(number)
        return name(*arguments)

    monkeypatch.setattr(namer, "generate", generate)
    for i in range(7):
        write_video(tmp_path / "in" / f"{i}.webm", "red blue")
    with pytest.raises(Interrupted) as stopped:
        run(tmp_path, "--video", tmp_path / "in", "--batch-size", 1, *window)
    assert (stopped.value.code, signal.getsignal(number)) == (128 + number, before)
    folder = tmp_path / "inference"
    results = json.loads((folder / "results.json").read_text())
    captioned = sum(row["prediction"] is not None or "segments" in row for row in results["predictions"])
    if window:  # two each: the third video is captioned by half
        assert captioned == 3
        assert (folder / "1.srt").read_text().count("showing") == 2
        assert (folder / "2.srt").read_text().count("showing") == 1
    else:
        assert captioned == 5
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"{2 if window else 5} of 7 videos captioned; see {folder / 'index.html'}"


def test_a_disk_that_copies_fill_has_the_captions(namer, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(infer.files, "copy", full)
    video = write_video(tmp_path / "red.webm", "red", seconds=2)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, "--video", video, "--window", 1, "--copy-videos")
    folder = tmp_path / "inference"
    assert json.loads((folder / "results.json").read_text())["predictions"][0]["prediction"] == "showing red"
    assert {path.suffix for path in folder.glob("red.*")} == {".srt", ".vtt", ".json"}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' names are all Unicode")
def test_a_file_name_that_is_no_utf8_is_captioned(namer, tmp_path):
    video = write_video(tmp_path / "red.webm", "red")
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.webm"))
    video.rename(odd)
    code, results = run(tmp_path, "--video", odd, "--window", 1)
    (row,) = results["predictions"]
    assert (code, row["id"], row["prediction"]) == (0, "caf_", "showing red")
    assert "../caf%E9.webm" in (tmp_path / "inference" / "index.html").read_text()
    assert row["source"] == f"{tmp_path}/caf\N{REPLACEMENT CHARACTER}.webm"


def test_a_gif_of_each_clip_shows_it_under_a_megabyte(namer, tmp_path, monkeypatch):
    video = write_video(tmp_path / "red.webm", "red", seconds=2)
    run(tmp_path, "--video", video, "--gif")
    path = tmp_path / "inference" / "red.gif"
    with Image.open(path) as picture:
        assert 1900 <= sum(frame.info["duration"] for frame in ImageSequence.Iterator(picture)) <= 2100  # milliseconds
        red, green, blue = np.asarray(picture.convert("RGB"))[20, 160]
    assert red > 150 > 80 > max(green, blue)
    assert path.stat().st_size <= 1_000_000
    run(tmp_path, "--video", path, "--gif", "--copy-videos")
    names = {"red.gif", "red.captioned.gif", "index.html", "results.json"}
    assert {file.name for file in path.parent.iterdir()} == names  # a GIF's own copy is not drawn over
    rates, fast = [], write_video(tmp_path / "fast.webm", "red", seconds=0.5, fps=60)
    monkeypatch.setattr(infer.gif, "write_gif", lambda path, frames, caption, fps, **_: rates.append(fps))
    run(tmp_path, "--video", fast, "--gif")
    assert rates and rates[0] <= 50  # browsers slow down a frame of less than 20 ms


def test_two_clips_in_a_row_give_two_captions_at_the_right_times(namer, tmp_path, capsys):
    video = write_video(tmp_path / "both.webm", "red blue", seconds=3)
    code, results = run(tmp_path, "--video", video, "--window", 1, "--batch-size", 4)
    folder = tmp_path / "inference"
    assert code == 0
    assert capsys.readouterr().out.startswith("both: 0.0 s: showing red\nboth: 3.0 s: showing blue\n1 of 1 videos")
    spans = [(0.0, 3.0, "showing red"), (3.0, 6.0, "showing blue")]
    expected = [{"start": start, "end": end, "caption": caption} for start, end, caption in spans]
    (row,) = results["predictions"]
    assert (row["segments"], row["prediction"]) == (expected, None)
    assert (folder / "both.srt").read_text() == (
        "1\n00:00:00,000 --> 00:00:03,000\nshowing red\n\n2\n00:00:03,000 --> 00:00:06,000\nshowing blue\n"
    )
    assert (folder / "both.vtt").read_text() == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:03.000\nshowing red\n\n00:00:03.000 --> 00:00:06.000\nshowing blue\n"
    )
    timeline = json.loads((folder / "both.json").read_text())
    assert timeline["segments"] == expected
    assert [window["caption"] for window in timeline["windows"]] == ["showing red"] * 3 + ["showing blue"] * 3
    assert "showing blue" in (folder / "index.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--stride", "1"], "--window"),
        (["--window", "1", "--stride", "2"], "cannot cover a video"),
        (["--window", "0"], "--window"),
        (["--window", "1", "--gif"], "--gif"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(arguments, named):
    with pytest.raises(UserError, match=named):
        infer.parse(arguments)


@pytest.fixture
def dataset_folder(tmp_path) -> Path:
    data = tmp_path / "data"
    (data / "labels").mkdir(parents=True)
    (data / "labels" / "test.json").write_text(json.dumps([{"id": str(i)} for i in range(1, 9)]))
    (data / "labels" / "labels.json").write_text(json.dumps(TEMPLATES))
    answers = [f"{i};Moving something {'up' if i % 2 else 'down'}" for i in range(1, 9)]
    (data / "labels" / "test-answers.csv").write_text("\n".join(answers) + "\n")
    one = write_video(data / "20bn-something-something-v2" / "1.webm", "red")
    for i in range(2, 9):
        shutil.copy(one, one.with_name(f"{i}.webm"))
    return data


def test_test_clips_are_drawn_by_the_seed_and_shown_with_their_answers(namer, dataset_folder, tmp_path):
    drawn = {}
    for seed in (0, 0, 1):
        _, results = run(tmp_path, "--data", dataset_folder, "--num-samples", 3, "--seed", seed)
        rows = results["predictions"]
        ids = [row["id"] for row in rows]
        assert drawn.setdefault(seed, ids) == ids
        assert [row["references"] for row in rows] == [
            [f"Moving something {'up' if int(i) % 2 else 'down'}"] for i in ids
        ]
        assert [Path(row["video"]).name for row in rows] == [f"{i}.webm" for i in ids]
    assert drawn[0] != drawn[1]
    more = [clip.id for clip in infer.choose_test_clips(dataset_folder, 5, 0)]
    assert more[:3] == drawn[0]
    assert len(infer.choose_test_clips(dataset_folder, 100, 0)) == 8
    (dataset_folder / "labels" / "test-answers.csv").unlink()
    code, results = run(tmp_path, "--data", dataset_folder, "--num-samples", 2)
    assert (code, [row["references"] for row in results["predictions"]]) == (0, [[], []])


def test_a_test_clip_without_a_video_is_reported_and_a_dataset_without_any_refused(namer, dataset_folder, tmp_path):
    folder = dataset_folder / "20bn-something-something-v2"
    (folder / "3.webm").unlink()
    _, results = run(tmp_path, "--data", dataset_folder, "--num-samples", 8)
    assert {row["id"]: row["error"] for row in results["predictions"] if row["error"]} == {"3": "there is no such file"}
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="no video"):
        infer.choose_test_clips(dataset_folder, 8, 0)


def test_a_video_in_the_results_folder_is_not_written_over(namer, tmp_path):
    mine = write_video(tmp_path / "inference" / "a.webm", "blue")
    before = mine.read_bytes()
    other = write_video(tmp_path / "in" / "a.webm", "red")
    _, results = run(tmp_path, "--video", other, mine, "--copy-videos")
    assert [row["video"] for row in results["predictions"]] == ["a-2.webm", "a.webm"]
    assert mine.read_bytes() == before
