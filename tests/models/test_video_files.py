import numpy as np
import pytest
import torch

from features import cache
from models.vjepa2 import VideoEncoder
from qformer import VideoCaptioner
from runtime.files import UserError
from tests import tiny, videos
from video.reader import read_clip
from video.subtitles import Segment
from video.workers import Decoded, VideoError


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    folder = tiny.save_encoder(tmp_path_factory.mktemp("vjepa"))
    made = VideoEncoder(folder, frames=4).cache_config("int8", 2).to_dict()
    made_by = {"llm": None, "features": made}
    return VideoCaptioner(tiny.tiny_lm(), tiny.tiny_tokenizer(), tiny.tiny_qformer(), config=made_by).eval()


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Three seconds each, dark, bright, one that changes in between, and one that is no video."""
    folder, frames = tmp_path_factory.mktemp("videos"), {}
    frames["dark"], frames["bright"] = (np.full((36, 48, 64, 3), level, np.uint8) for level in (40, 200))
    frames["both"] = np.concatenate([frames["dark"][:24], frames["bright"][:12]])
    paths = {name: videos.write(folder / f"{name}.webm", content) for name, content in frames.items()}
    paths["bad"] = folder / "bad.webm"
    paths["bad"].write_bytes(paths["dark"].read_bytes()[:100])
    return paths


def clip(bright):
    return torch.full((4, 3, 32, 32), bright, dtype=torch.uint8)


def told(captioner, *clips):
    return captioner.generate(captioner.encode(torch.stack(clips)), 6)


def whole(captioner, path):
    frames, *_ = read_clip(path, 4, captioner.encoder.transform)
    return told(captioner, frames)[0]


def test_frames_become_features_as_training_saw_them(captioner):
    """The encoder, then the cache's pooling and precision."""
    clips = torch.stack([clip(40), clip(200), clip(90)])
    grid, tokens = captioner.encoder.grid, captioner.encoder.encode(clips)
    expected = torch.cat([cache.dequantize(cache.quantize(x, "int8", 2, grid)) for x in tokens])
    assert torch.equal(captioner.encode(clips), expected) and expected.shape == (3, 8, 16)


def test_clips_are_captioned_in_their_order_and_failed_ones_pass(captioner, monkeypatch):
    sizes, generate = [], captioner.generate

    def counted(features, *settings):
        sizes.append(len(features))
        return generate(features, *settings)

    monkeypatch.setattr(captioner, "generate", counted)
    levels = (0, 40, 80, 120, 160)
    decoded = [Decoded("x", None, "no"), *(Decoded(level, clip(level)) for level in levels), Decoded("y", None, "no")]
    found = list(captioner.caption_decoded(iter(decoded), batch_size=2, max_new_tokens=6))
    assert sizes == [2, 2, 1]
    assert [item for item, _, _ in found] == decoded
    assert [caption for _, caption, _ in found] == [None, *told(captioner, *map(clip, levels)), None]
    bare, *features, last = [one for _, _, one in found]
    assert bare is last is None
    for level, one in zip(levels, features, strict=True):
        torch.testing.assert_close(one, captioner.encode(clip(level)[None])[0])


def test_captions_come_as_clips_are_decoded(captioner):
    taken = []
    decoded = (taken.append(i) or Decoded(i, clip(i)) for i in range(100))
    next(captioner.caption_decoded(decoded, batch_size=2, max_new_tokens=1))
    assert taken == [0, 1]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_fails_does_not_lose_the_others(captioner, paths, workers):
    names = ["dark", "bad", "bright"]
    found = captioner.caption([paths[name] for name in names], batch_size=2, max_new_tokens=6, workers=workers)
    assert isinstance(found[1], VideoError) and str(found[1])
    assert found[::2] == [whole(captioner, paths[name]) for name in names[::2]]


def test_one_file_may_be_given_alone_and_none_at_all(captioner, paths):
    assert captioner.caption(str(paths["dark"]), max_new_tokens=6) == [whole(captioner, paths["dark"])]
    assert captioner.caption([]) == []


def test_beams_and_length_are_those_asked_for(captioner, paths):
    frames, *_ = read_clip(paths["dark"], 4, captioner.encoder.transform)
    expected = captioner.generate(captioner.encode(frames[None]), 3, num_beams=4)
    assert captioner.caption(paths["dark"], max_new_tokens=3, num_beams=4) == expected


def test_long_files_are_captioned_in_windows(captioner, paths, monkeypatch):
    """Here a caption is how bright the first pixel is."""
    monkeypatch.setattr(captioner, "encode", lambda clips: clips)
    monkeypatch.setattr(captioner, "generate", lambda clips, *_: ["b" if c[0, 0, 0, 0] > 99 else "d" for c in clips])
    found = captioner.caption([paths[name] for name in ("both", "bad", "dark")], window=1.0)
    assert found == [[Segment(0.0, 2.0, "d"), Segment(2.0, 3.0, "b")], found[1], [Segment(0.0, 3.0, "d")]]
    assert isinstance(found[1], VideoError)
    halves = captioner.caption(paths["both"], window=1.0, stride=0.5)
    assert halves[0][0].caption == "d" and halves[0][-1] == Segment(halves[0][0].end, 3.0, "b")
    with pytest.raises(UserError, match="window"):
        captioner.caption(paths["both"], window=0.0)
