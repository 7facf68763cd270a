"""infer.py --attention: overlays beside the captions."""

import json
import re

import numpy as np
import pytest
import torch

import infer
from models import checkpoint
from models.vjepa2 import VideoEncoder
from qformer import VideoCaptioner
from runtime.files import UserError
from tests import tiny, videos
from video.reader import probe, read_frames


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of random weights, 4 queries, with the tiny models it was made with."""
    folder = tmp_path_factory.mktemp("trained")
    features = VideoEncoder(tiny.save_encoder(folder / "encoder"), frames=4).cache_config("float16", 1)
    qformer = tiny.tiny_qformer()
    for parameter in qformer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    config = {"llm": str(tiny.save_lm(folder / "lm")), "prompt": "a video showing:", "features": features.to_dict()}
    saved = checkpoint.Checkpoint({**config, "qformer": qformer.config}, qformer.state_dict())
    checkpoint.write(folder / "checkpoint.pt", saved)
    return folder / "checkpoint.pt"


def run(trained, results, *arguments, workers=0):
    words = ["--results", results, "--workers", workers, "--checkpoint", trained, "--max-new-tokens", 3, *arguments]
    code = infer.main([str(word) for word in words])
    return code, json.loads((results / "inference" / "results.json").read_text())["predictions"]


def test_overlays_of_the_mean_and_of_queries_lie_beside_the_captions(trained, tmp_path):
    paths = [
        videos.write(tmp_path / "in" / f"{name}.mp4", videos.moving(n, seed=n), "libx264")
        for name, n in (("a b", 14), ("c", 20), ("d", 9))
    ]
    code, rows = run(
        trained, tmp_path, "--video", tmp_path / "in", "--batch-size", 2, "--attention", 3, 0, 3, workers=1
    )
    assert code == 0
    for row, path in zip(rows, paths, strict=True):
        stem = path.stem.replace(" ", "_")
        names = {"attention": "attention", "query 3": "query-3", "query 0": "query-0"}
        assert row["overlays"] == {name: f"{stem}.{file}.webm" for name, file in names.items()}
        for file in row["overlays"].values():
            info, own = probe(tmp_path / "inference" / file), probe(path)
            assert (info.width, info.height, info.frames) == (own.width, own.height, own.frames)
            assert info.duration == pytest.approx(own.duration, abs=0.03)
    page = (tmp_path / "inference" / "index.html").read_text()
    assert rows and "prediction" in page


def test_what_is_drawn_is_the_attention_of_this_clip(trained, tmp_path):
    """The most coloured patch of the first time step is the one with the largest weight, for each clip of a batch."""
    clips = [np.full((8, 64, 64, 3), shade, np.uint8) for shade in (90, 160)]
    for index, clip in enumerate(clips):
        clip[:, 16 * index : 16 * index + 16, 32:48] = (250, 20, 20)
        videos.write(tmp_path / "in" / f"{index}.webm", clip)
    _, rows = run(trained, tmp_path, "--video", tmp_path / "in", "--attention", 2)
    captioner = VideoCaptioner.from_checkpoint(trained)
    for row in rows:
        frames = torch.from_numpy(read_frames(tmp_path / "in" / f"{row['id']}.webm", 4))
        weights = captioner.attention(captioner.encode(captioner.encoder.transform.apply(frames)[None]))[0]
        for name, expected in (("attention", weights.mean(0)), ("query 2", weights[2])):
            drawn = read_frames(tmp_path / "inference" / row["overlays"][name], 4)[0].astype(int)
            colour = np.ptp(drawn, axis=-1).reshape(4, 16, 4, 16)[:, 4:12, :, 4:12].mean((1, 3))  # (rows, columns)
            assert np.corrcoef(colour.ravel(), expected[0].numpy().ravel())[0, 1] > 0.8


def test_without_the_flag_nothing_is_drawn(trained, tmp_path):
    _, rows = run(trained, tmp_path, "--video", videos.write(tmp_path / "a.webm", videos.moving(8)))
    assert "overlays" not in rows[0] and not list((tmp_path / "inference").glob("*.webm"))


def test_a_video_that_cannot_be_decoded_and_one_whose_overlay_fails_keep_their_rows(
    trained, tmp_path, monkeypatch, capsys
):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bad.webm").write_bytes(b"no video" * 9)
    for name in ("good", "other"):
        videos.write(tmp_path / "in" / f"{name}.webm", videos.moving(8))
    read = infer.overlay.probe

    def probed(path):
        if "other" in str(path):
            raise infer.VideoError("gone")
        return read(path)

    monkeypatch.setattr(infer.overlay, "probe", probed)
    code, rows = run(trained, tmp_path, "--video", tmp_path / "in", "--attention")
    bad, good, other = rows
    assert code == 0 and bad["error"] and "overlays" not in bad and "overlays" not in other
    assert other["prediction"] is not None and good["overlays"] == {"attention": "good.attention.webm"}
    assert re.search("^other: no overlay: gone$", capsys.readouterr().out, re.MULTILINE)


def test_the_captions_are_on_the_disk_before_the_first_overlay(trained, tmp_path, monkeypatch):
    seen = []

    def draw(*_):
        seen.append(json.loads((tmp_path / "inference" / "results.json").read_text())["predictions"])
        raise OSError("the disk is full")

    monkeypatch.setattr(infer.overlay, "write_all", draw)
    with pytest.raises(OSError, match="full"):
        run(trained, tmp_path, "--video", videos.write(tmp_path / "a.webm", videos.moving(8)), "--attention")
    assert seen[0][0]["prediction"] is not None and (tmp_path / "inference" / "index.html").is_file()


def test_a_video_with_an_overlays_name_is_not_written_over(trained, tmp_path):
    for name in ("a", "a.attention", "a.query-1"):
        videos.write(tmp_path / "in" / f"{name}.webm", videos.moving(8, seed=len(name)))
    _, rows = run(trained, tmp_path, "--video", tmp_path / "in", "--attention", 1, "--copy-videos")
    written = [row["video"] for row in rows] + [file for row in rows for file in row["overlays"].values()]
    assert len({name.casefold() for name in written}) == 9
    for row, name in zip(rows, ("a.attention", "a.query-1", "a"), strict=True):
        assert (tmp_path / "inference" / row["video"]).read_bytes() == (tmp_path / "in" / f"{name}.webm").read_bytes()


def test_mistakes_are_one_line_before_the_work(trained, tmp_path, monkeypatch):
    video = videos.write(tmp_path / "a.webm", videos.moving(8))
    monkeypatch.setattr(VideoCaptioner, "caption_files", lambda *_, **__: pytest.fail("worked"))
    with pytest.raises(UserError, match="--attention 4: the Q-Former has 4 queries, 0 to 3"):
        run(trained, tmp_path, "--video", video, "--attention", 1, 4)
    for wrong in ("-1", "a.webm", "1.5"):
        with pytest.raises(UserError, match="attention"):
            infer.parse(["--attention", wrong])
    with pytest.raises(UserError, match="--attention .*--window"):
        infer.parse(["--attention", "--window", "2"])
