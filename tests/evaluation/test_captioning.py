import pytest
import torch

import dataset
from evaluation import captioning as validation
from features import cache
from qformer import VideoCaptioner
from runtime.distributed import DistributedContext
from runtime.files import UserError
from tests import tiny


def test_a_shuffle_gives_no_clip_its_own_features():
    records = [{"id": str(clip)} for clip in range(7)]
    moved = validation.shuffled(records, seed=3)
    assert sorted(moved) == sorted(moved.values()) and all(clip != other for clip, other in moved.items())


def reader_of(data, batch_size, captioner=None):
    records = dataset.read_ready(data, "validation")
    folder = dataset.Layout(data).feature_folder("validation")
    return validation.SplitReader(captioner or tiny.tiny_captioner(), records, folder, batch_size, DistributedContext())


def test_the_loss_of_a_split_is_the_mean_over_clips_in_any_batches(tmp_path):
    data = tiny.make_dataset(tmp_path / "data")
    captioner = tiny.tiny_captioner()
    losses = []
    for record in dataset.read_ready(data, "validation"):
        features = torch.load(data / "features" / "validation" / f"{record['id']}.pt", weights_only=True)
        losses.append(captioner.loss(features[None].float(), record["label"][:1]).item())
    for batch_size in (1, 2, 64):
        assert reader_of(data, batch_size, captioner).loss() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_moved_features_are_those_of_the_other_clip(tmp_path):
    data = tiny.make_dataset(tmp_path / "data")
    reader = reader_of(data, 2)
    plain = dict(zip([r["id"] for r in reader.records], torch.cat([f for _, f in reader.batches("x")]), strict=True))
    moved = validation.shuffled(reader.records, seed=0)
    for part, features in reader.batches("x", moved):
        for record, row in zip(part, features, strict=True):
            assert torch.equal(row, plain[moved[record["id"]]])


def test_features_of_another_width_are_refused(tmp_path):
    packed = cache.Packed(torch.zeros(1, 6, 24, dtype=torch.float16), None)
    with pytest.raises(UserError, match="24 wide, the Q-Former reads 16"):
        validation.unpack_for(tiny.tiny_captioner(), packed, tmp_path)


def test_int8_features_reach_the_captioner_dequantized(tmp_path):
    captioner: VideoCaptioner = tiny.tiny_captioner()
    features = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    packed = cache.quantize(features, "int8")
    found = validation.unpack_for(captioner, packed, tmp_path)
    assert found.shape == (1, 6, 16) and found.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(found[0], features).min() > 0.9995


def test_the_gallery_points_at_the_videos_or_at_copies_of_them(tmp_path):
    layout = dataset.Layout(tmp_path / "data")
    layout.videos.mkdir(parents=True)
    (layout.videos / "1.webm").write_bytes(b"video")
    rows = [{"id": "1", "prediction": "x", "CIDEr": 2.0}, {"id": "2", "prediction": "y"}]
    page = tmp_path / "results" / "index.html"
    found = validation.gallery(rows, layout, page)
    assert found[0]["video"] == "../data/20bn-something-something-v2/1.webm" and found[0]["score"] == 2.0
    assert found[1]["video"] is None
    found = validation.gallery(rows, layout, page, tmp_path / "results" / "videos")
    assert found[0]["video"] == "videos/1.webm"
    assert (tmp_path / "results" / "videos" / "1.webm").read_bytes() == b"video"
