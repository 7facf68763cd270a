import hashlib
import json
import shutil

import pytest
import torch
from transformers import AutoModel, VideoMAEConfig, VJEPA2Config, VJEPA2ForVideoClassification

from features import cache
from models.vjepa2 import VideoEncoder
from runtime.files import UserError
from runtime.signals import Interrupted
from tests import tiny
from video import reader as frames
from video.reader import Transform


@pytest.fixture(scope="module")
def vjepa(tmp_path_factory):
    return tiny.save_encoder(tmp_path_factory.mktemp("vjepa"), dim=24)


def test_features_are_those_of_transformers_vision_encoder(vjepa):
    encoder = VideoEncoder(vjepa, "cpu", frames=4)
    clips = torch.randint(0, 256, (3, 4, 3, 32, 32), dtype=torch.uint8)
    mean, std = torch.tensor(frames.MEAN).view(3, 1, 1), torch.tensor(frames.STD).view(3, 1, 1)
    model = AutoModel.from_pretrained(vjepa).eval()
    with torch.no_grad():
        expected = model.get_vision_features((clips.float() / 255 - mean) / std)
    features = encoder.encode(clips)
    assert torch.allclose(features, expected, atol=1e-6)
    assert features.shape == (3, encoder.tokens, encoder.dim) == (3, 32, 24)
    assert encoder.grid == (2, 4, 4)


def test_the_encoder_is_frozen(vjepa):
    encoder = VideoEncoder(vjepa, "cpu", frames=4)
    assert not encoder.model.training
    assert not any(weight.requires_grad for weight in encoder.model.parameters())
    assert not encoder.encode(torch.zeros(1, 4, 3, 32, 32, dtype=torch.uint8)).requires_grad


def test_a_clips_features_are_bitwise_the_same_in_any_batch(vjepa):
    encoder = VideoEncoder(vjepa, "cpu", frames=4)
    clips = torch.randint(0, 256, (6, 4, 3, 32, 32), dtype=torch.uint8)
    assert encoder.prepare(6) == 6
    together = encoder.encode(clips)
    for order in ([5], [3, 1], [2, 4, 0, 1, 5]):
        assert torch.equal(encoder.encode(clips[order]).half(), together[order].half())


def test_the_checkpoints_own_preprocessor_file_is_followed(vjepa, tmp_path):
    folder = shutil.copytree(vjepa, tmp_path / "vjepa")
    described = {"crop_size": {"height": 48, "width": 48}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (folder / "preprocessor_config.json").write_text(json.dumps(described))
    encoder = VideoEncoder(folder, "cpu", frames=4, crop=True)
    assert encoder.transform == Transform(48, True, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert encoder.grid == (2, 6, 6)
    assert encoder.model.config.crop_size == 48  # rotary positions count rows of 6 patches


def test_an_encoder_is_rebuilt_from_what_the_cache_says(vjepa, tmp_path):
    encoder = VideoEncoder(vjepa, "cpu", frames=6, transform=Transform(48, crop=True))
    config = encoder.cache_config("int8", 2)
    assert (config.tokens, config.dim, config.pool, config.size) == (27, 24, 2, 48)
    again = VideoEncoder.from_config(config.to_dict(), "cpu")
    clips = torch.randint(0, 256, (2, 6, 3, 48, 48), dtype=torch.uint8)
    assert torch.equal(again.encode(clips), encoder.encode(clips))
    assert again.transform == encoder.transform
    moved = shutil.copytree(vjepa, tmp_path / "moved")
    assert (
        not VideoEncoder.from_config({**config.to_dict(), "encoder": str(moved)})
        .cache_config("int8", 2)
        .differences(config)
    )


def test_another_encoder_under_the_same_name_is_noticed(vjepa, tmp_path):
    config = VideoEncoder(vjepa, "cpu", frames=4).cache_config()
    other = tiny.save_encoder(tmp_path / "other", seed=1, dim=24)
    with pytest.raises(UserError, match="is not the one that made the features"):
        VideoEncoder.from_config({**config.to_dict(), "encoder": str(other)})
    with pytest.raises(UserError, match="does not say what made its features"):
        VideoEncoder.from_config(None)
    assert config.differences(VideoEncoder(other, "cpu", frames=4).cache_config())


@pytest.mark.parametrize(("frames", "size", "said"), [(5, None, "multiple of 2"), (4, 36, "multiple of 8")])
def test_frames_and_sizes_that_do_not_fit_are_refused(vjepa, frames, size, said):
    with pytest.raises(UserError, match=said):
        VideoEncoder(vjepa, "cpu", frames=frames, transform=size and Transform(size))


@pytest.mark.parametrize("damage", ["cut off", "without weights", "one layer more"])
def test_a_damaged_encoder_is_refused_in_one_line(vjepa, tmp_path, damage):
    folder = shutil.copytree(vjepa, tmp_path / "damaged")
    weights, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    if damage == "cut off":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif damage == "without weights":
        weights.unlink()
    else:
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match="the encoder.*does not load") as caught:
        VideoEncoder(folder, "cpu", frames=4)
    assert "\n" not in str(caught.value) and folder.name in str(caught.value)


def test_a_folder_of_another_model_is_told_as_what_it_is(tmp_path):
    tiny.save_lm(tmp_path / "qwen2")
    VideoMAEConfig().save_pretrained(tmp_path / "videomae")
    for kind in ("qwen2", "videomae"):
        with pytest.raises(UserError, match=f"it is a {kind}, not a V-JEPA 2"):
            VideoEncoder(tmp_path / kind, "cpu", frames=4)


def test_an_encoder_that_is_gone_is_told_as_such(tmp_path):
    with pytest.raises(UserError, match="nowhere does not load: there is no such folder; say with --encoder"):
        VideoEncoder(tmp_path / "nowhere", "cpu", frames=4)


@pytest.mark.parametrize("error", [Interrupted(15), MemoryError(), KeyboardInterrupt()])
def test_a_stop_while_the_encoder_loads_is_not_told_as_damage(vjepa, monkeypatch, error):
    def stop(*_, **__):
        raise error

    monkeypatch.setattr(AutoModel, "from_pretrained", stop)
    with pytest.raises(type(error)):
        VideoEncoder(vjepa, "cpu", frames=4)


def test_an_encoder_with_a_classifiers_head_loads_without_a_warning(vjepa, tmp_path, capfd):
    config = VJEPA2Config.from_pretrained(vjepa, num_labels=3, num_pooler_layers=1)
    classifier = VJEPA2ForVideoClassification(config)
    classifier.vjepa2.load_state_dict(AutoModel.from_pretrained(vjepa).state_dict())
    classifier.save_pretrained(tmp_path / "classifier")
    capfd.readouterr()
    found = VideoEncoder(tmp_path / "classifier", "cpu", frames=4)
    assert capfd.readouterr() == ("", f"loading {tmp_path / 'classifier'}\n")
    assert found.weights == VideoEncoder(vjepa, "cpu", frames=4).weights


def test_the_name_of_a_local_encoder_is_found_again_from_any_working_directory(vjepa, monkeypatch):
    monkeypatch.chdir(vjepa.parent)
    assert VideoEncoder(vjepa.name, "cpu", frames=4).cache_config().encoder == str(vjepa)


def test_weights_are_known_by_the_fingerprint_that_older_caches_carry(vjepa):
    encoder = VideoEncoder(vjepa, "cpu", frames=4)
    numbers = b"".join(
        p.flatten()[:: max(1, p.numel() // 256)][:256].half().numpy().tobytes()
        for _, p in sorted(encoder.model.named_parameters())
    )
    assert encoder.weights == hashlib.sha256(numbers).hexdigest()[:16]


@pytest.mark.parametrize("error", [RuntimeError("no C compiler"), torch._dynamo.exc.InternalTorchDynamoError("x")])
def test_an_encoder_that_cannot_be_compiled_runs_as_it_is(vjepa, monkeypatch, error):
    encoder = VideoEncoder(vjepa, "cpu", frames=4)
    encode = encoder._forward

    def compile(*_, **__):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(encoder, "device", torch.device("cuda"))
        patched.setattr(torch, "compile", compile)
        assert encoder.prepare(3) == 3
    assert encoder._forward == encode
    with monkeypatch.context() as patched:
        patched.setattr(encoder, "device", torch.device("cuda"))
        patched.setattr(torch, "compile", lambda *_, **__: 1 / 0)  # a bug is none of these
        with pytest.raises(ZeroDivisionError):
            encoder.prepare(3)


def test_float16_features_stay_close_through_the_cache(vjepa):
    encoder = VideoEncoder(vjepa, "cpu", frames=4)
    features = encoder.encode(torch.randint(0, 256, (4, 4, 3, 32, 32), dtype=torch.uint8))
    for dtype, bound in (("float16", 0.999999), ("bfloat16", 0.9999), ("int8", 0.9995)):
        back = cache.dequantize(cache.quantize(features, dtype))
        assert torch.cosine_similarity(back, features, dim=-1).min() > bound
