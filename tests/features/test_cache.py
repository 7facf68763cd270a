import json
import os
import pickle

import pytest
import torch

from features import cache
from features.cache import CacheConfig, Packed, dequantize, quantize
from features.reader import feature_batches
from runtime.files import UserError
from tests.tiny import fill_cache, tokens

CONFIG = CacheConfig("some/encoder", 32, 256, False, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), "float16", 1, 16, 8)


# ---- rounding and pooling ----


@pytest.mark.parametrize(
    ("dtype", "pool", "limit"),
    [("float16", 1, 8.40e6), ("bfloat16", 1, 8.40e6), ("int8", 1, 4.21e6), ("int8", 2, 1.06e6), ("int8", 4, 0.27e6)],
)
def test_a_full_size_clip_takes_the_promised_bytes(tmp_path, dtype, pool, limit):
    cache.save(tmp_path / "a.pt", quantize(tokens(4096, 1024), dtype, pool, (16, 16, 16)))
    size = (tmp_path / "a.pt").stat().st_size
    config = CacheConfig("e", 32, 256, False, (0, 0, 0), (1, 1, 1), dtype, pool, 4096 // pool**2, 1024)
    assert size <= limit
    assert 0 < size - cache.bytes_per_clip(config) < 2048


def test_int8_keeps_each_tokens_direction():
    features = tokens(512, 1024) * torch.logspace(-2, 3, 512)[:, None]
    back = dequantize(quantize(features, "int8"))[0]
    assert torch.cosine_similarity(features, back, dim=-1).min() > 0.9999
    assert ((back - features).abs() <= 0.51 * features.abs().amax(-1, keepdim=True) / 127 * 1.001).all()


def test_int8_divides_by_the_scale_that_is_stored():
    features = torch.tensor([[1.0, -3.0, 127 * 0.1234567]])
    packed = quantize(features, "int8")
    assert packed.scales.dtype == torch.float16
    assert torch.equal(packed.values.float(), (features / packed.scales.float()).round())


def test_int8_of_zeros_and_of_the_largest_token():
    features = torch.stack([torch.zeros(8), torch.full((8,), 65000.0 * 127), torch.full((8,), -1e-9)])
    back = dequantize(quantize(features, "int8"))[0]
    assert torch.equal(back[0], torch.zeros(8))
    assert torch.allclose(back[1], features[1], rtol=1e-3)
    assert torch.equal(back[2], torch.zeros(8))


def test_pool_is_the_mean_over_neighbouring_patches_of_one_time_step():
    grid, dim = (2, 4, 4), 3
    features = tokens(32, dim)
    pooled = dequantize(quantize(features, "bfloat16", 2, grid))[0]
    volume = features.view(2, 4, 4, dim)
    for step in range(2):
        for row in range(2):
            for column in range(2):
                patches = volume[step, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(4, dim)
                expected = patches.mean(0).bfloat16().float()
                assert torch.equal(pooled[step * 4 + row * 2 + column], expected)


def test_a_batch_is_rounded_as_its_clips_are():
    features = tokens(3, 16, 8)
    whole = quantize(features, "int8", 2, (1, 4, 4))
    for row in range(3):
        one = quantize(features[row], "int8", 2, (1, 4, 4))
        assert torch.equal(whole.values[row], one.values)
        assert torch.equal(whole.scales[row], one.scales)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_features_that_are_not_numbers_are_not_saved(tmp_path, dtype, bad):
    features = tokens(16, 8)
    features[3, 5] = bad
    if dtype == "bfloat16" and bad == 3e38:
        cache.save(tmp_path / "a.pt", quantize(features, dtype))  # bfloat16 reaches that far
        return
    with pytest.raises(ValueError, match="NaN, Inf, or larger"):
        cache.save(tmp_path / "a.pt", quantize(features, dtype))
    assert list(tmp_path.iterdir()) == []


def test_saving_a_clip_of_a_batch_writes_that_clip_alone(tmp_path):
    batch = quantize(tokens(50, 16, 8), "int8")
    cache.save(tmp_path / "a.pt", Packed(batch.values[7], batch.scales[7]))
    assert (tmp_path / "a.pt").stat().st_size < 4000
    assert torch.equal(cache.load(tmp_path / "a.pt").values, batch.values[7])


# ---- loading ----


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_what_is_saved_is_loaded(tmp_path, dtype):
    clip = fill_cache(tmp_path, 1, dtype)["0"]
    again = cache.load(tmp_path / "0.pt")
    assert all(a is b or torch.equal(a, b) for a, b in zip(again, clip, strict=True))


def test_a_published_tensor_with_a_batch_of_one_loads(tmp_path):
    published = tokens(1, 16, 8).half()
    torch.save(published, tmp_path / "a.pt")
    assert torch.equal(cache.load(tmp_path / "a.pt").values, published[0])
    batch, *_ = feature_batches(tmp_path, [["a", "a"]], workers=0)
    assert torch.equal(batch.values, published.expand(2, -1, -1))


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(8),
        torch.zeros(2, 16, 8),
        torch.zeros(0, 8),
        {"scales": torch.zeros(16, 1)},
        {"values": torch.zeros(16, 8, dtype=torch.int8), "scales": torch.zeros(3, 1, dtype=torch.float16)},
        {"values": torch.zeros(16, 8, dtype=torch.int8), "scales": [1.0]},
        [torch.zeros(16, 8)],
        "text",
        torch.zeros(16, 8).to_sparse(),
    ],
    ids=range(9),
)
def test_a_file_of_another_kind_is_refused(tmp_path, value):
    torch.save(value, tmp_path / "a.pt")
    with pytest.raises(UserError, match="a.pt"):
        cache.load(tmp_path / "a.pt")


def test_a_truncated_or_missing_file_is_refused(tmp_path):
    fill_cache(tmp_path, 1)
    whole = (tmp_path / "0.pt").read_bytes()
    for length in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        with pytest.raises(UserError, match="cut.pt"):
            cache.load(tmp_path / "cut.pt")
    with pytest.raises(FileNotFoundError):
        cache.load(tmp_path / "none.pt")


class Dangerous:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_a_file_that_would_run_code_is_refused_and_nothing_ran(tmp_path):
    marker = tmp_path / "ran"
    torch.save(Dangerous(str(marker)), tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Dangerous(str(marker))))
    fill_cache(tmp_path, 1)
    for name in ("zip", "plain"):
        with pytest.raises(UserError, match=f"{name}.pt"):
            list(feature_batches(tmp_path, [["0", name]], workers=0))
    assert not marker.exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_a_file_with_nan_or_inf_is_named(tmp_path, dtype, bad):
    features = tokens(16, 8).to(dtype)
    torch.save(features, tmp_path / "good.pt")
    features[9, 2] = bad
    torch.save(features, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="bad.pt holds NaN or Inf"):
        cache.load(tmp_path / "bad.pt")
    with pytest.raises(UserError, match="bad.pt holds NaN or Inf"):
        list(feature_batches(tmp_path, [["good", "bad", "good"]], workers=0))


def test_the_largest_finite_numbers_are_not_taken_for_inf(tmp_path):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        limit = torch.finfo(dtype).max
        torch.save(torch.tensor([[limit, -limit, 0.0, -0.0, torch.finfo(dtype).tiny]], dtype=dtype), tmp_path / "a.pt")
        assert cache.load(tmp_path / "a.pt").values[0, 1] == -limit


def test_dequantize_on_the_device_gives_the_dtype_asked_for():
    features = tokens(2, 16, 8)
    for dtype in cache.DTYPES:
        packed = quantize(features, dtype)
        assert dequantize(packed).dtype == torch.float32
        assert dequantize(packed, dtype=torch.bfloat16).dtype == torch.bfloat16
        assert torch.allclose(dequantize(packed), features, atol=0.05)


# ---- config.json ----


def test_a_config_survives_json():
    assert CacheConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG


@pytest.mark.parametrize(
    "content", [[], {"encoder": "x"}, CONFIG.to_dict() | {"mean": None}, {**CONFIG.to_dict(), "dim": ...}]
)
def test_a_damaged_config_is_refused_and_named(tmp_path, content):
    if isinstance(content, dict):
        content = {key: value for key, value in content.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="config.json says of its features is damaged"):
        cache.read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict())[:-10])
    with pytest.raises(UserError, match="config.json is not valid JSON"):
        cache.read_config(tmp_path)


def test_features_of_another_kind_are_refused_with_the_difference(tmp_path):
    assert not cache.check_config(tmp_path, CONFIG)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    assert cache.check_config(tmp_path, CONFIG)
    for name, value, said in (("frames", 16, "frames 32, not 16"), ("crop", True, "crop False, not True")):
        other = CacheConfig.from_dict(CONFIG.to_dict() | {name: value})
        with pytest.raises(UserError, match=said):
            cache.check_config(tmp_path, other)
        with pytest.raises(UserError, match=f"c.pt was trained on other features .*{name}"):
            cache.check_same_features(other.to_dict(), tmp_path, "c.pt")
        cache.check_same_features(other.to_dict(), tmp_path, "c.pt", published=True)
    cache.check_same_features(None, tmp_path, "c.pt")
    cache.check_same_features(other.to_dict(), tmp_path / "without a config", "c.pt")


def test_the_same_weights_under_another_name_are_the_same_encoder():
    here = CacheConfig.from_dict(CONFIG.to_dict() | {"encoder": "here", "weights": "abc"})
    moved = CacheConfig.from_dict(CONFIG.to_dict() | {"encoder": "/moved/there", "weights": "abc"})
    other = CacheConfig.from_dict(CONFIG.to_dict() | {"encoder": "here", "weights": "def"})
    assert here.differences(moved) == ""
    assert here.differences(other) == "weights abc, not def"


def test_features_that_nobody_described_are_not_added_to(tmp_path):
    fill_cache(tmp_path / "train", 1)
    with pytest.raises(UserError, match="nothing says what made"):
        cache.check_config(tmp_path, CONFIG)


def test_whether_a_clip_is_cached(tmp_path):
    fill_cache(tmp_path, 1)
    path = tmp_path / "0.pt"
    assert cache.is_cached(path, CONFIG)
    assert not cache.is_cached(tmp_path / "1.pt", CONFIG)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:100], b"", b"\0" * len(whole)):
        path.write_bytes(damaged)
        assert not cache.is_cached(path, CONFIG)
    big = CacheConfig.from_dict(CONFIG.to_dict() | {"tokens": 4096})
    path.write_bytes(whole)
    assert not cache.is_cached(path, big)
