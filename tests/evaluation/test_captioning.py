import pytest
import torch

import dataset
from evaluation import captioning
from features import cache
from qformer import VideoCaptioner
from runtime.distributed import DistributedContext
from runtime.files import UserError
from tests import tiny


def test_a_shuffle_gives_no_clip_its_own_features():
    records = [{"id": str(clip)} for clip in range(7)]
    sources = captioning.shuffled(records, seed=3)
    assert sorted(sources) == sorted(sources.values()) and all(clip != other for clip, other in sources.items())


def reader_of(data, batch_size, captioner=None):
    records = dataset.read_ready(data, "validation")
    folder = dataset.Layout(data).feature_folder("validation")
    return captioning.SplitReader(captioner or tiny.tiny_captioner(), records, folder, batch_size, DistributedContext())


def test_loss_and_captions_of_a_split_come_from_one_read_in_any_batches(tmp_path, monkeypatch):
    data = tiny.make_dataset(tmp_path / "data")
    captioner = tiny.tiny_captioner()
    losses, captions = [], {}
    for record in dataset.read_ready(data, "validation"):
        features = torch.load(data / "features" / "validation" / f"{record['id']}.pt", weights_only=True)[None].float()
        losses.append(captioner.loss(features, record["label"][:1]).item())
        captions[record["id"]] = captioner.generate(features, 5)[0]
    reads, plain = [], captioning.feature_batches
    monkeypatch.setattr(
        captioning, "feature_batches", lambda *given, **more: reads.append(given) or plain(*given, **more)
    )
    for batch_size in (1, 2, 64):
        loss, found = reader_of(data, batch_size, captioner).loss_and_captions(5)
        assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-5) and found == captions
    assert len(reads) == 3


def test_a_clip_may_have_the_features_of_another(tmp_path):
    data = tiny.make_dataset(tmp_path / "data")
    reader = reader_of(data, 2)
    plain = dict(zip([r["id"] for r in reader.records], torch.cat([f for _, f in reader.batches("x")]), strict=True))
    sources = captioning.shuffled(reader.records, seed=0)
    for part, features in reader.batches("x", sources):
        for record, row in zip(part, features, strict=True):
            assert torch.equal(row, plain[sources[record["id"]]])


def test_features_of_another_width_are_refused(tmp_path):
    packed = cache.Packed(torch.zeros(1, 6, 24, dtype=torch.float16), None)
    with pytest.raises(UserError, match="24 wide, the Q-Former reads 16"):
        captioning.to_device(tiny.tiny_captioner(), packed, tmp_path)


def test_int8_features_reach_the_captioner_dequantized(tmp_path):
    captioner: VideoCaptioner = tiny.tiny_captioner()
    features = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    packed = cache.quantize(features, "int8")
    found = captioning.to_device(captioner, packed, tmp_path)
    assert found.shape == (1, 6, 16) and found.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(found[0], features).min() > 0.9995


def test_the_gallery_points_at_the_videos_or_at_copies_of_them(tmp_path):
    layout = dataset.Layout(tmp_path / "data")
    layout.videos.mkdir(parents=True)
    (layout.videos / "1.webm").write_bytes(b"video")
    rows = [{"id": "1", "prediction": "x", "CIDEr": 2.0}, {"id": "2", "prediction": "y"}]
    page = tmp_path / "results" / "index.html"
    found = captioning.gallery(rows, layout, page)
    assert found[0]["video"] == "../data/20bn-something-something-v2/1.webm" and found[0]["score"] == 2.0
    assert found[1]["video"] is None
    found = captioning.gallery(rows, layout, page, tmp_path / "results" / "videos")
    assert found[0]["video"] == "videos/1.webm"
    assert (tmp_path / "results" / "videos" / "1.webm").read_bytes() == b"video"
