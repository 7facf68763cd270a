import json
import shutil

import pytest
import torch
from transformers import AutoModel

from features import cache
from models.vjepa2 import VideoEncoder
from runtime.files import UserError
from tests import filming
from video import reader as frames
from video.reader import Transform


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return filming.tiny_vjepa(tmp_path_factory.mktemp("vjepa"))


def test_features_are_those_of_transformers_vision_encoder(tiny):
    encoder = VideoEncoder(tiny, "cpu", frames=4)
    clips = torch.randint(0, 256, (3, 4, 3, 32, 32), dtype=torch.uint8)
    mean, std = torch.tensor(frames.MEAN).view(3, 1, 1), torch.tensor(frames.STD).view(3, 1, 1)
    model = AutoModel.from_pretrained(tiny).eval()
    with torch.no_grad():
        expected = model.get_vision_features((clips.float() / 255 - mean) / std)
    features = encoder.encode(clips)
    assert torch.allclose(features, expected, atol=1e-6)
    assert features.shape == (3, encoder.tokens, encoder.dim) == (3, 32, 24)
    assert encoder.grid == (2, 4, 4)


def test_the_encoder_is_frozen(tiny):
    encoder = VideoEncoder(tiny, "cpu", frames=4)
    assert not encoder.model.training
    assert not any(weight.requires_grad for weight in encoder.model.parameters())
    assert not encoder.encode(torch.zeros(1, 4, 3, 32, 32, dtype=torch.uint8)).requires_grad


def test_a_clips_features_do_not_depend_on_the_clips_beside_it(tiny):
    encoder = VideoEncoder(tiny, "cpu", frames=4)
    clips = torch.randint(0, 256, (6, 4, 3, 32, 32), dtype=torch.uint8)
    assert encoder.prepare(6) == 6
    together = encoder.encode(clips)
    for order in ([5], [3, 1], [2, 4, 0, 1, 5]):
        assert torch.equal(encoder.encode(clips[order]).half(), together[order].half())


def test_the_checkpoints_own_preprocessor_file_is_followed(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "vjepa")
    described = {"crop_size": {"height": 48, "width": 48}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (folder / "preprocessor_config.json").write_text(json.dumps(described))
    encoder = VideoEncoder(folder, "cpu", frames=4, crop=True)
    assert encoder.transform == Transform(48, True, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert encoder.grid == (2, 6, 6)
    assert encoder.model.config.crop_size == 48  # rotary positions count rows of 6 patches


def test_an_encoder_is_rebuilt_from_what_the_cache_says(tiny, tmp_path):
    encoder = VideoEncoder(tiny, "cpu", frames=6, crop=True, size=48)
    config = encoder.cache_config("int8", 2)
    assert (config.tokens, config.dim, config.pool, config.size) == (27, 24, 2, 48)
    again = VideoEncoder.from_config(config.to_dict(), "cpu")
    clips = torch.randint(0, 256, (2, 6, 3, 48, 48), dtype=torch.uint8)
    assert torch.equal(again.encode(clips), encoder.encode(clips))
    assert again.transform == encoder.transform
    moved = shutil.copytree(tiny, tmp_path / "moved")
    assert VideoEncoder.from_config(config, "cpu", moved).cache_config("int8", 2).differences(config) == []


def test_another_encoder_under_the_same_name_is_noticed(tiny, tmp_path):
    config = VideoEncoder(tiny, "cpu", frames=4).cache_config()
    other = filming.tiny_vjepa(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="is not the one that made the features"):
        VideoEncoder.from_config(config, "cpu", other)
    assert config.differences(VideoEncoder(other, "cpu", frames=4).cache_config())


@pytest.mark.parametrize(("frames", "size", "said"), [(5, None, "multiple of 2"), (4, 36, "multiple of 8")])
def test_frames_and_sizes_that_do_not_fit_are_refused(tiny, frames, size, said):
    with pytest.raises(UserError, match=said):
        VideoEncoder(tiny, "cpu", frames=frames, size=size)


def test_what_is_not_a_vjepa_is_refused_in_one_line(tiny, tmp_path):
    other, damaged, weightless = (shutil.copytree(tiny, tmp_path / name) for name in ("other", "damaged", "weightless"))
    (other / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    weights = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (weightless / "model.safetensors").unlink()
    partial = shutil.copytree(tiny, tmp_path / "partial")
    config = json.loads((partial / "config.json").read_text())
    (partial / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    for folder in (other, damaged, weightless, partial, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="does not load") as caught:
            VideoEncoder(folder, "cpu", frames=4)
        assert "\n" not in str(caught.value)
        assert folder.name in str(caught.value)


def test_float16_features_stay_close_through_the_cache(tiny):
    encoder = VideoEncoder(tiny, "cpu", frames=4)
    features = encoder.encode(torch.randint(0, 256, (4, 4, 3, 32, 32), dtype=torch.uint8))
    for dtype, bound in (("float16", 0.999999), ("bfloat16", 0.9999), ("int8", 0.9995)):
        back = cache.dequantize(cache.quantize(features, dtype))
        assert torch.cosine_similarity(back, features, dim=-1).min() > bound
