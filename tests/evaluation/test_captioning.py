from collections import Counter

import pytest
import torch

import dataset
from evaluation import captioning
from features import cache
from runtime.distributed import DistributedContext
from runtime.files import UserError
from tests import tiny


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
