import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from models import checkpoint
from qformer import QFormer, VideoCaptioner
from runtime.files import UserError
from tests import tiny


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return tiny.save_lm(tmp_path_factory.mktemp("models") / "lm")


def config(llm, **changes):
    return {
        "llm": str(llm),
        "prompt": "a video showing:",
        "features": tiny.features_config().to_dict(),
        "qformer": {**tiny.tiny_qformer().config, **changes},
    }


def features():
    return torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(5))


def test_a_checkpoint_rebuilds_the_captioner_alone(llm, tmp_path):
    qformer = tiny.tiny_qformer(seed=3)
    path = tmp_path / "checkpoint.pt"
    checkpoint.write(path, checkpoint.Checkpoint(config(llm), qformer.state_dict(), epoch=3))
    captioner = VideoCaptioner.from_checkpoint(path, device="cpu")
    expected = VideoCaptioner(tiny.tiny_lm(), tiny.tiny_tokenizer(), qformer)
    assert captioner.generate(features(), 8) == expected.generate(features(), 8)
    assert not captioner.training and captioner.config["features"]["frames"] == 4


def test_a_published_checkpoint_loads_and_gives_the_same_captions(llm, tmp_path):
    """The published format, written with the published names; its frozen LM is passed over."""
    qformer = tiny.tiny_qformer(seed=3, num_heads=4)
    names = {
        "qformer.query_tokens": qformer.query_tokens,
        "qformer.visual_proj.weight": qformer.visual_proj.weight,
        "qformer.visual_proj.bias": qformer.visual_proj.bias,
        "qformer.norm.weight": qformer.norm.weight,
        "qformer.norm.bias": qformer.norm.bias,
    }
    block = qformer.blocks[0]
    for kind, attention in (("self_attn", block.self_attn), ("cross_attn", block.cross_attn)):
        for name in ("in_proj_weight", "in_proj_bias"):
            names[f"qformer.blocks.0.{kind}.{name}"] = getattr(attention, name)
        for name in ("weight", "bias"):
            names[f"qformer.blocks.0.{kind}.out_proj.{name}"] = getattr(attention.out_proj, name)
    for name in ("weight", "bias"):
        for norm in ("norm1", "norm2", "norm3"):
            names[f"qformer.blocks.0.{norm}.{name}"] = getattr(getattr(block, norm), name)
        for layer in (0, 3):
            names[f"qformer.blocks.0.mlp.{layer}.{name}"] = getattr(block.mlp[layer], name)
    state = {name: parameter.detach() for name, parameter in names.items()}
    state["text_model.model.embed_tokens.weight"] = torch.randn(384, 32)
    published = {"epoch": 7, "model_state_dict": state, "optimizer_state_dict": {}, "train_loss": 0.5}
    torch.save(published, tmp_path / "published.pt")
    captioner = VideoCaptioner.from_checkpoint(tmp_path / "published.pt", device="cpu", llm=str(llm))
    expected = VideoCaptioner(tiny.tiny_lm(), tiny.tiny_tokenizer(), qformer)
    assert captioner.generate(features(), 8) == expected.generate(features(), 8)
    assert checkpoint.read(tmp_path / "published.pt").epoch == 7
    assert captioner.config["features"]["encoder"] == "facebook/vjepa2-vitl-fpc64-256"


def test_a_captioner_travels_as_a_folder_with_the_qformer_only(llm, tmp_path):
    lm, tokenizer = tiny.tiny_lm(), tiny.tiny_tokenizer()
    captioner = VideoCaptioner(lm, tokenizer, tiny.tiny_qformer(seed=2), config=config(llm))
    captioner.save_pretrained(tmp_path / "folder")
    assert {path.name for path in (tmp_path / "folder").iterdir()} >= {"config.json", "model.safetensors"}
    size = (tmp_path / "folder" / "model.safetensors").stat().st_size
    assert size < 5 * sum(p.numel() for p in captioner.qformer.parameters())
    for read_back in (
        VideoCaptioner.from_pretrained(tmp_path / "folder", device="cpu"),
        VideoCaptioner.from_checkpoint(tmp_path / "folder", device="cpu"),
    ):
        assert read_back.generate(features(), 8) == captioner.generate(features(), 8)
        assert read_back.config["features"] == captioner.config["features"]
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["llm"] == str(llm)


def test_a_captioner_is_pushed_to_a_hub_and_loaded_by_its_name(llm, tmp_path, monkeypatch):
    hub = tmp_path / "hub"  # stands for the network: what is uploaded is kept, what is asked for is copied

    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id, folder_path, **_):
            shutil.copytree(folder_path, hub / repo_id)
            return "pushed"

    def snapshot(name, allow_patterns, **_):
        assert set(allow_patterns) == {"config.json", "model.safetensors"}  # no code is fetched
        return str(hub / name)

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    monkeypatch.setattr(
        "huggingface_hub.hub_mixin.hf_hub_download", lambda repo_id, filename, **_: hub / repo_id / filename
    )
    monkeypatch.setattr(checkpoint, "snapshot_download", snapshot)
    lm, tokenizer = tiny.tiny_lm(), tiny.tiny_tokenizer()
    captioner = VideoCaptioner(lm, tokenizer, tiny.tiny_qformer(seed=2), config=config(llm))
    assert captioner.push_to_hub("someone/captioner") == "pushed"
    assert {"config.json", "model.safetensors"} <= {path.name for path in (hub / "someone/captioner").iterdir()}
    read_back = VideoCaptioner.from_pretrained("someone/captioner", device="cpu")
    assert read_back.generate(features(), 8) == captioner.generate(features(), 8)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda saved: [1, 2], "no model_state_dict"),
        (lambda saved: {**saved, "model_state_dict": {"a": torch.ones(1)}, "config": None}, "holds no Q-Former"),
        (lambda saved: {**saved, "config": {"llm": 3}}, "damaged"),
        (lambda saved: {**saved, "epoch": "x"}, "damaged"),
        (lambda saved: {**saved, "config": {**saved["config"], "qformer": {"num_queries": 10**15}}}, "num_queries"),
    ],
)
def test_other_files_are_refused_in_one_line(llm, tmp_path, change, message):
    path = tmp_path / "checkpoint.pt"
    checkpoint.write(path, checkpoint.Checkpoint(config(llm), tiny.tiny_qformer().state_dict()))
    torch.save(change(torch.load(path, weights_only=True)), path)
    with pytest.raises(UserError, match=message):
        checkpoint.read(path)


def test_weights_of_another_shape_are_refused_by_name():
    with pytest.raises(UserError, match=r"query_tokens is \(1, 4, 32\), wanted \(1, 5, 32\)"):
        checkpoint.load_weights(tiny.tiny_qformer(num_queries=5), tiny.tiny_qformer().state_dict(), "x.pt")
    broken = tiny.tiny_qformer().state_dict()
    broken["norm.weight"] = broken["norm.weight"] * float("nan")
    with pytest.raises(UserError, match="not finite .norm.weight"):
        checkpoint.load_weights(tiny.tiny_qformer(), broken, "x.pt")


def test_an_optimizer_state_of_other_parameters_or_of_no_numbers_does_not_fit():
    def optimizer_of(qformer: QFormer):
        optimizer = torch.optim.AdamW(qformer.parameters())
        qformer(features()).sum().backward()
        optimizer.step()
        return optimizer

    one, other = optimizer_of(tiny.tiny_qformer()), optimizer_of(tiny.tiny_qformer(num_queries=5))
    fresh = torch.optim.AdamW(tiny.tiny_qformer().parameters(), weight_decay=0.5)
    assert checkpoint.load_optimizer(fresh, one.state_dict())
    for ours, theirs in zip(fresh.state.values(), one.state.values(), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    assert fresh.param_groups[0]["weight_decay"] == 0.5  # the flag of this run, not of the one before
    broken = one.state_dict()
    broken["state"][0]["exp_avg_sq"] = -broken["state"][0]["exp_avg_sq"] - 1
    nan = one.state_dict()
    nan["state"] = {**nan["state"], 1: {**nan["state"][1], "exp_avg": nan["state"][1]["exp_avg"] * float("nan")}}
    for state in (other.state_dict(), {}, None, {"param_groups": 1}, {"state": {}, "param_groups": [{"params": [0]}]}):
        assert not checkpoint.load_optimizer(fresh, state)
    assert not checkpoint.load_optimizer(fresh, broken) and not checkpoint.load_optimizer(fresh, nan)


def test_weights_that_claim_more_than_they_hold_are_refused_before_they_are_built(llm, tmp_path):
    """A tensor with strides of 0 can claim any size; so can a config."""
    path = tmp_path / "checkpoint.pt"
    checkpoint.write(path, checkpoint.Checkpoint(config(llm), tiny.tiny_qformer().state_dict()))
    saved = torch.load(path, weights_only=True)
    saved["model_state_dict"]["qformer.query_tokens"] = torch.zeros(1).expand(1, 60000, 60000)
    torch.save({**saved, "config": {**saved["config"], "qformer": {}}}, path)
    with pytest.raises(UserError, match="'query_tokens' is not a tensor of numbers"):
        checkpoint.read(path)
    checkpoint.write(path, checkpoint.Checkpoint(config(llm, mlp_ratio=64), tiny.tiny_qformer().state_dict()))
    with pytest.raises(UserError, match="mlp_ratio is 64, its weights' 4"):
        checkpoint.read(path)


@pytest.mark.parametrize(
    "progress",
    [
        {"history": 3},
        {"history": [{"epoch": 1}]},
        {"history": [{"epoch": 1, "train_loss": float("nan"), "val_loss": 1.0, "CIDEr": 0.0}]},
        {"step": 3},
        {"step": "3", "total": 1.0, "captions": 4, "run": {}},
        {"step": 3, "total": 1.0, "captions": 0, "run": {}},
        [],
        "x",
    ],
)
def test_a_place_that_no_run_was_at_is_refused(llm, tmp_path, progress):
    path = tmp_path / "checkpoint.pt"
    checkpoint.write(path, checkpoint.Checkpoint(config(llm), tiny.tiny_qformer().state_dict()))
    torch.save({**torch.load(path, weights_only=True), "progress": progress or [1]}, path)
    with pytest.raises(UserError, match="damaged"):
        checkpoint.read(path)


def test_a_checkpoint_that_does_not_fit_its_language_model_is_refused(llm, tmp_path):
    path = tmp_path / "checkpoint.pt"
    for changed, message in ((config(llm, num_heads=5), "heads"), ({**config(llm), "prompt": "x " * 300}, "positions")):
        checkpoint.write(path, checkpoint.Checkpoint(changed, tiny.tiny_qformer().state_dict()))
        with pytest.raises(UserError, match=message):
            VideoCaptioner.from_checkpoint(path, device="cpu")
