from typing import Any, NamedTuple

import pytest
import torch

from features import cache
from models.vjepa2 import VideoEncoder
from qformer import VideoCaptioner
from tests import tiny
from video import windows, workers
from video.subtitles import Segment
from video.workers import Failure


class Decoded(NamedTuple):
    key: Any
    frames: torch.Tensor | None
    error: str | None = None
    warning: str | None = None
    start: float | None = None
    end: float | None = None
    index: int = 0
    total: int = 1


def fake_batches(decoded, size):
    """Lists in which `size` have frames."""
    batch = []
    for clip in decoded:
        batch.append(clip)
        if sum(clip.frames is not None for clip in batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


class FakeWorkers:
    """Of a world in which a file's frames are all as bright as its name says, and "bad" files do not decode."""

    def __init__(self, count, timeout):
        self.count = count

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def read_clips(self, paths, transform, frames):
        for key, path in paths:
            yield Decoded(key, None, "it is damaged") if path == "bad" else Decoded(key, clip(int(path), frames))


def fake_windows(pool, paths, transform, frames, window, stride):
    for key, path in paths:
        if path == "bad":
            yield Decoded(key, None, "it is damaged")
            continue
        for i in range(3):
            start = i * stride
            given = {"start": start, "end": start + window, "index": i, "total": 3}
            broken = path == "worse" or (path == "gap" and i == 1)
            frames_of = None if broken else clip(int(path) if path.isdigit() else 9, frames)
            yield Decoded(key, frames_of, "a hole" if broken else None, None, **given)


def clip(bright, frames=4):
    return torch.full((frames, 3, 32, 32), bright, dtype=torch.uint8)


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    folder = tiny.save_encoder(tmp_path_factory.mktemp("vjepa"))
    made = VideoEncoder(folder, frames=4).cache_config("int8", 2).to_dict()
    made_by = {"llm": None, "features": made}
    return VideoCaptioner(tiny.tiny_lm(), tiny.tiny_tokenizer(), tiny.tiny_qformer(), config=made_by).eval()


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    monkeypatch.setattr(workers, "batches", fake_batches, raising=False)
    monkeypatch.setattr(workers, "Workers", FakeWorkers, raising=False)
    monkeypatch.setattr(windows, "read_windows", fake_windows)


def test_frames_become_features_as_training_saw_them(captioner):
    """The encoder, then the cache's pooling and precision."""
    clips = torch.stack([clip(40), clip(200), clip(90)])
    tokens = captioner.encoder.encode(clips)
    expected = torch.cat([cache.unpack(cache.pack(x, "int8", 2, captioner.encoder.grid)) for x in tokens])
    assert torch.equal(captioner.encode(clips), expected) and expected.shape == (3, 8, 16)


def told(captioner, *brights):
    return captioner.generate(captioner.encode(torch.stack([clip(bright) for bright in brights])), 6)


def test_clips_are_captioned_in_their_order_and_failed_ones_pass(captioner, monkeypatch):
    sizes, generate = [], captioner.generate
    monkeypatch.setattr(
        captioner, "generate", lambda features, *more: sizes.append(len(features)) or generate(features, *more)
    )
    decoded = [Decoded("x", None, "no"), *(Decoded(i, clip(40 * i)) for i in range(5)), Decoded("y", None, "no")]
    found = list(captioner.caption_decoded(iter(decoded), batch_size=2, max_new_tokens=6))
    assert [item for item, _ in found] == decoded
    assert [caption for _, caption in found] == [None, *told(captioner, 0, 40, 80, 120, 160), None]
    assert sizes[:3] == [2, 2, 1]


def test_captions_come_as_clips_are_decoded(captioner):
    taken = []
    decoded = (taken.append(i) or Decoded(i, clip(i)) for i in range(100))
    next(captioner.caption_decoded(decoded, batch_size=2, max_new_tokens=1))
    assert taken == [0, 1]


def test_a_file_that_fails_does_not_lose_the_others(captioner):
    found = captioner.caption(["40", "bad", "200"], batch_size=2, max_new_tokens=6)
    assert found == [told(captioner, 40)[0], Failure("it is damaged"), told(captioner, 200)[0]]
    assert captioner.caption("40", max_new_tokens=6) == told(captioner, 40)
    assert captioner.caption([]) == []


def test_beams_and_length_are_those_asked_for(captioner):
    beams = captioner.generate(captioner.encode(clip(40)[None]), 3, num_beams=4)
    assert captioner.caption("40", max_new_tokens=3, num_beams=4) == beams


def test_long_files_are_captioned_in_windows(captioner):
    found = captioner.caption(["40", "bad", "gap", "worse"], max_new_tokens=6, window=2.0)
    text = told(captioner, 40)[0]
    assert found[0] == [Segment(0.0, 6.0, text)]
    assert found[1:] == [Failure("it is damaged"), found[2], Failure("a hole")]
    assert [(part.start, part.end) for part in found[2]] == [(0.0, 2.0), (4.0, 6.0)]
