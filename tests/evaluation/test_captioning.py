from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import dataset
from evaluation import captioning
from features import cache
from models.video_files import CaptionsFiles
from runtime.distributed import DistributedContext
from runtime.files import UserError
from tests import tiny
from video import workers


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.make_dataset(tmp_path_factory.mktemp("data") / "data")


def reader_of(data, batch_size, captioner=None, **more):
    records = dataset.read_ready(data, "validation")
    folder = dataset.Layout(data).features / "validation"
    captioner = captioner or tiny.tiny_captioner()
    return captioning.SplitReader(captioner, records, folder, batch_size, DistributedContext("cpu"), **more)


def test_loss_and_captions_are_each_clips_own_in_any_batches(data):
    captioner = tiny.tiny_captioner(dropout=0.5).train()  # and there is no dropout in them
    losses, captions = [], {}
    for record in dataset.read_ready(data, "validation"):
        features = torch.load(data / "features" / "validation" / f"{record['id']}.pt", weights_only=True)[None].float()
        captions[record["id"]] = captioner.generate(features, 5)[0]
        losses.append(captioner.eval().loss(features, record["label"][:1]).item())
    for batch_size in (1, 2, 64):
        loss, found = reader_of(data, batch_size, captioner).loss_and_captions(max_new_tokens=5)
        assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert found == captions and list(found) == list(captions)
    assert reader_of(data, 2, captioner).captions(5) == captions


def test_validation_reads_each_clips_features_once(data, monkeypatch):
    read, batches = Counter(), captioning.feature_batches
    monkeypatch.setattr(
        captioning, "feature_batches", lambda folder, ids, **more: read.update(sum(ids, [])) or batches(folder, ids, 0)
    )
    reader_of(data, 2).loss_and_captions(max_new_tokens=3)
    assert read == Counter(record["id"] for record in dataset.read_ready(data, "validation"))


def test_an_interrupt_is_noticed_before_each_batch(data):
    checks = []
    reader_of(data, 2, check=lambda: checks.append(1)).captions(1)
    assert len(checks) == 3


def test_a_shuffle_gives_each_clip_the_features_of_another(data):
    reader = reader_of(data, 2)
    own = reader.each(lambda _, features: list(features), "x")
    sources = captioning.shuffled(reader.records, seed=3)
    assert sorted(sources) == sorted(sources.values()) and all(clip != other for clip, other in sources.items())
    assert sources == captioning.shuffled(reader.records, seed=3) != captioning.shuffled(reader.records, seed=4)
    given = reader.each(lambda _, features: list(features), "x", sources)
    assert list(given) == list(own) and all(torch.equal(given[clip], own[sources[clip]]) for clip in given)


def test_features_of_another_width_are_refused(tmp_path):
    packed = cache.Packed(torch.zeros(1, 6, 24, dtype=torch.float16), None)
    with pytest.raises(UserError, match="24 wide, the Q-Former reads 16"):
        captioning.dequantize_for(tiny.tiny_captioner(), packed, tmp_path)


def test_int8_features_reach_the_captioner_dequantized(tmp_path):
    features = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    found = captioning.dequantize_for(tiny.tiny_captioner(), cache.quantize(features, "int8"), tmp_path)
    assert found.shape == (1, 6, 16) and found.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(found[0], features).min() > 0.9995


# ---- clips played backwards ----


class EchoCaptioner(CaptionsFiles):
    """Captions a clip by the brightness of its first and last frame: what a reversed clip must swap."""

    encoder = SimpleNamespace(frames=4, transform=None)

    def encode(self, clips):
        assert len(clips) <= 2
        return clips

    def generate(self, clips, max_new_tokens, num_beams):
        assert (max_new_tokens, num_beams) == (5, 3)
        return [f"{int(clip[0].max())} to {int(clip[-1].max())}" for clip in clips]


class EchoWorkers(workers.Workers):
    """Gives clips whose frames become brighter, and one that cannot be decoded."""

    def __enter__(self):
        assert self.count >= 1 and self.timeout == 9.0
        return self

    def read_clips(self, paths, transform, frames):
        for clip_id, path in paths:
            clip = torch.stack([torch.full((3, 2, 2), 10 * i + int(clip_id)) for i in range(frames)])
            yield workers.Decoded(clip_id, None, "no frames") if path is None else workers.Decoded(clip_id, clip)


def test_clips_are_played_backwards_in_batches_in_order_and_damaged_ones_left_out(data, monkeypatch):
    monkeypatch.setattr(workers, "Workers", EchoWorkers)
    videos = {"4": "a", "2": None, "3": "b", "1": "c"}
    reader = reader_of(data, 2, EchoCaptioner())
    found = captioning.reversed_captions(reader, videos, 9.0, 5, 3)
    assert list(found.items()) == [("4", "34 to 4"), ("3", "33 to 3"), ("1", "31 to 1")]
