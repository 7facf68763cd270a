import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from models import checkpoint, pretrained
from models import language_model as language
from qformer import QFormer, VideoCaptioner
from runtime.files import UserError
from runtime.progress import Progress
from tests import reference, tiny


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


def written(path, llm, weights=None, **changes):
    """A checkpoint as this project wrote it before it knew fingerprints; `changes` to its config."""
    weights = weights or tiny.tiny_qformer()
    checkpoint.write(path, checkpoint.Checkpoint({**config(llm), **changes}, weights.state_dict(), epoch=3))
    return path


def features():
    return torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(5))


# ---- what comes back ----


def test_a_checkpoint_rebuilds_the_captioner_alone(llm, tmp_path):
    qformer = tiny.tiny_qformer(seed=3)
    captioner = VideoCaptioner.from_checkpoint(written(tmp_path / "checkpoint.pt", llm, qformer), device="cpu")
    expected = VideoCaptioner(tiny.tiny_lm(), tiny.tiny_tokenizer(), qformer)
    assert captioner.generate(features(), 8) == expected.generate(features(), 8)
    assert not captioner.training and captioner.epoch == 3 and captioner.config["features"]["frames"] == 4
    assert captioner.config["caption_space"] is True  # as checkpoints were trained that do not say


def published_file(path, qformer):
    """A checkpoint in the published format, by the published names; its frozen LM is passed over."""
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
    torch.save({"epoch": 7, "model_state_dict": state, "optimizer_state_dict": {}, "train_loss": 0.5}, path)
    return path


@torch.no_grad()
def test_losses_and_captions_of_a_published_checkpoint_are_the_published_methods(llm, tmp_path):
    """Computed here from the file by the reference Q-Former and transformers alone: prompt ids, then caption ids
    that were tokenized by themselves, then EOS."""
    captions = ["moving a red ball up", "covering a cup with paper and a spoon"]
    path = published_file(tmp_path / "published.pt", tiny.tiny_qformer(seed=3, num_heads=4))
    state = torch.load(path)["model_state_dict"]
    qformer = reference.TextbookQFormer(4, 32, 16, 4, dropout=0.0, mlp_dropout=0.0)
    qformer.load_state_dict({name.removeprefix("qformer."): value for name, value in state.items() if name[0] == "q"})
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(llm), AutoTokenizer.from_pretrained(llm)
    embed, visual = lm.get_input_embeddings(), qformer.eval()(features())
    prompt = tokenizer("a video showing:").input_ids
    losses, texts = [], []
    for row, caption in enumerate(captions):
        ids = [*tokenizer(caption).input_ids, tokenizer.eos_token_id]
        inputs = torch.cat([visual[row], embed(torch.tensor(prompt + ids))])[None]
        losses.append(F.cross_entropy(lm(inputs_embeds=inputs).logits[0, -len(ids) - 1 : -1], torch.tensor(ids)))
        made = []
        while len(made) < 8 and tokenizer.eos_token_id not in made:
            inputs = torch.cat([visual[row], embed(torch.tensor(prompt + made))])[None]
            made.append(lm(inputs_embeds=inputs).logits[0, -1].argmax().item())
        texts.append(" ".join(tokenizer.decode(made, skip_special_tokens=True).split()))
    captioner = VideoCaptioner.from_checkpoint(path, device="cpu", llm=str(llm))
    torch.testing.assert_close(captioner.per_caption_nll(features(), captions), torch.stack(losses), rtol=0, atol=1e-5)
    likely = captioner.log_likelihood(features(), captions)
    torch.testing.assert_close(likely.diagonal(), -torch.stack(losses), rtol=0, atol=1e-5)
    assert captioner.generate(features(), 8) == texts
    assert captioner.epoch == 7 and captioner.config["caption_space"] is False
    assert captioner.config["features"]["encoder"] == "facebook/vjepa2-vitl-fpc64-256"
    spaced = VideoCaptioner(tiny.tiny_lm(), tiny.tiny_tokenizer(), captioner.qformer)
    assert (spaced.per_caption_nll(features(), captions) - torch.stack(losses)).abs().max() > 0.01  # it matters


def test_how_captions_follow_the_prompt_travels_with_the_checkpoint(llm, tmp_path):
    path = written(tmp_path / "checkpoint.pt", llm, caption_space=False)
    captioner = VideoCaptioner.from_checkpoint(path, device="cpu")
    assert captioner.caption_ids("moving") == captioner.tokenizer("moving").input_ids
    captioner.save_pretrained(tmp_path / "folder")
    again = VideoCaptioner.from_pretrained(tmp_path / "folder", device="cpu")
    assert again.caption_ids("moving") == captioner.caption_ids("moving")


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
        assert read_back.config == captioner.config
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

    def snapshot(name, allow_patterns, revision, tqdm_class):
        assert tqdm_class is Progress  # its lines tell how far the download is
        assert set(allow_patterns) == {"config.json", "model.safetensors"}  # no code is fetched
        assert revision == "main"
        return str(hub / name)

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    monkeypatch.setattr("qformer.snapshot_download", snapshot)
    lm, tokenizer = tiny.tiny_lm(), tiny.tiny_tokenizer()
    captioner = VideoCaptioner(lm, tokenizer, tiny.tiny_qformer(seed=2), config=config(llm))
    assert captioner.push_to_hub("someone/captioner") == "pushed"
    pushed = {path.name for path in (hub / "someone/captioner").iterdir()}
    assert pushed == {"config.json", "model.safetensors", "README.md"}
    assert (hub / "someone/captioner/README.md").read_text() == str(captioner.generate_model_card())
    read_back = VideoCaptioner.from_pretrained("someone/captioner", device="cpu", revision="main")
    assert read_back.generate(features(), 8) == captioner.generate(features(), 8)


@pytest.mark.parametrize("wrong", [{"torch_dtype": "float16"}, {"prompt": "x"}, {"config": {}}, {"num_beams": 2}])
def test_from_pretrained_refuses_keywords_that_it_does_not_know(llm, tmp_path, wrong):
    VideoCaptioner(tiny.tiny_lm(), tiny.tiny_tokenizer(), tiny.tiny_qformer(), config=config(llm)).save_pretrained(
        tmp_path
    )
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{next(iter(wrong))}'"):
        VideoCaptioner.from_pretrained(tmp_path, **wrong)


# ---- which language model ----


def test_another_language_model_of_the_same_width_is_refused(llm, tmp_path):
    captioner = VideoCaptioner(tiny.tiny_lm(), tiny.tiny_tokenizer(), tiny.tiny_qformer(), config=config(llm))
    path = tmp_path / "checkpoint.pt"
    checkpoint.write(path, checkpoint.Checkpoint(captioner.config, captioner.qformer.state_dict()))
    other = tiny.save_lm(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=f"{other} is not the language model that {path} was trained with"):
        VideoCaptioner.from_checkpoint(path, device="cpu", llm=str(other))
    elsewhere = VideoCaptioner(tiny.tiny_lm(seed=1), tiny.tiny_tokenizer(), tiny.tiny_qformer())
    with pytest.raises(UserError, match="is not the language model that"):
        elsewhere.restore(checkpoint.read(path), path)  # as train.py asks
    copy = shutil.copytree(llm, tmp_path / "copy")
    again = VideoCaptioner.from_checkpoint(path, device="cpu", llm=str(copy))
    assert again.config["llm"] == str(copy)


def test_a_checkpoint_that_does_not_know_its_language_model_passes_with_one_note(llm, tmp_path, capfd, monkeypatch):
    path = written(tmp_path / "checkpoint.pt", llm)
    capfd.readouterr()
    captioner = VideoCaptioner.from_checkpoint(path, device="cpu")
    note = f"note: {path} does not say which language model it was trained with: {llm} is taken for it\n"
    assert capfd.readouterr() == ("", f"loading {llm}\n{note}")
    assert captioner.config["llm_weights"] == pretrained.fingerprint(
        captioner.lm, torch.bfloat16
    )  # from now on it says so
    monkeypatch.setenv("RANK", "1")  # of torchrun: another process has said it
    VideoCaptioner.from_checkpoint(path, device="cpu")
    assert capfd.readouterr() == ("", "")


def test_local_models_are_found_again_from_any_working_directory(llm, tmp_path, monkeypatch):
    monkeypatch.chdir(llm.parent)
    lm, tokenizer = language.load("lm", torch.device("cpu"))
    assert VideoCaptioner(lm, tokenizer, tiny.tiny_qformer()).config["llm"] == str(llm)
    assert pretrained.locate("Qwen/Qwen2-1.5B", "--llm") == "Qwen/Qwen2-1.5B"
    path = written(tmp_path / "run" / "checkpoint.pt", "lm")  # an old checkpoint, with the name as it was given
    assert VideoCaptioner.from_checkpoint(path, device="cpu").config["llm"] == str(llm)


@pytest.mark.parametrize("name", ["/gone/lm", "./lm", "../models/lm", "models/tiny/lm"])
def test_a_language_model_that_is_gone_is_told_at_once(tmp_path, monkeypatch, name):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: pytest.fail("a hub was asked"))
    path = written(tmp_path / "checkpoint.pt", name)
    with pytest.raises(UserError, match=f"{name} does not load: there is no such folder; say with --llm where"):
        VideoCaptioner.from_checkpoint(path, device="cpu")


def test_an_encoder_that_is_gone_is_told_when_it_is_needed(llm, tmp_path):
    made = tiny.features_config(tokens=32).to_dict()
    path = written(tmp_path / "run" / "c.pt", llm, features={**made, "encoder": "/gone/vjepa"})
    captioner = VideoCaptioner.from_checkpoint(path, device="cpu")  # cached features are captioned without it
    with pytest.raises(UserError, match="/gone/vjepa does not load: there is no such folder; say with --encoder"):
        captioner.encoder  # noqa: B018
    moved = tiny.save_encoder(tmp_path / "vjepa")
    assert VideoCaptioner.from_checkpoint(path, device="cpu", encoder=str(moved)).encoder.tokens == 32


# ---- what does not come back ----


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda saved: [1, 2], "holds no Q-Former"),
        (lambda saved: {**saved, "model_state_dict": {"a": torch.ones(1)}, "config": None}, "holds no Q-Former"),
        (lambda saved: {**saved, "config": {"llm": 3}}, "damaged"),
        (lambda saved: {**saved, "epoch": "x"}, "damaged"),
        (lambda saved: {**saved, "progress": [1]}, "damaged"),
    ],
)
def test_other_files_are_refused_in_one_line(llm, tmp_path, change, message):
    path = written(tmp_path / "checkpoint.pt", llm)
    torch.save(change(torch.load(path, weights_only=True)), path)
    with pytest.raises(UserError, match=message) as caught:
        checkpoint.read(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_cut_off_or_not_there_is_refused_in_one_line(llm, tmp_path):
    path = written(tmp_path / "checkpoint.pt", llm)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match=f"{path} is damaged"):
        checkpoint.read(path)
    with pytest.raises(UserError, match="there is no file .*gone.pt"):
        checkpoint.read(tmp_path / "gone.pt")
    VideoCaptioner(tiny.tiny_lm(), tiny.tiny_tokenizer(), tiny.tiny_qformer(), config=config(llm)).save_pretrained(
        tmp_path / "folder"
    )
    weights = tmp_path / "folder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    with pytest.raises(UserError, match=f"{weights} is not there, or damaged"):
        checkpoint.read(tmp_path / "folder")
    weights.unlink()
    with pytest.raises(UserError, match=f"{weights} is not there"):
        checkpoint.read(tmp_path / "folder")


def test_weights_of_another_shape_are_refused_by_name():
    with pytest.raises(UserError, match=r"another shape: size mismatch for query_tokens.*\[1, 4, 32\].*\[1, 5, 32\]"):
        checkpoint.load_weights(tiny.tiny_qformer(num_queries=5), tiny.tiny_qformer().state_dict(), "x.pt")
    broken = tiny.tiny_qformer().state_dict()
    broken["norm.weight"] = broken["norm.weight"] * float("nan")
    with pytest.raises(UserError, match="not finite .norm.weight"):
        checkpoint.load_weights(tiny.tiny_qformer(), broken, "x.pt")


def test_a_checkpoint_that_does_not_fit_its_language_model_is_refused(llm, tmp_path):
    wide = tiny.tiny_qformer(dim=64)
    for path, message in (
        (written(tmp_path / "a.pt", llm, qformer=config(llm, num_heads=5)["qformer"]), "heads"),
        (written(tmp_path / "c.pt", llm, prompt="x " * 300), "positions"),
        (written(tmp_path / "d.pt", llm, wide, qformer=wide.config), "64 wide, the language model's embeddings 32"),
    ):
        with pytest.raises(UserError, match=message):
            VideoCaptioner.from_checkpoint(path, device="cpu")


@pytest.mark.parametrize("fused", [False, True])
def test_adamws_averages_go_on_and_its_settings_are_this_runs(fused):
    """Also those of a fused AdamW, in which older checkpoints were trained."""

    def optimizer_of(qformer: QFormer, fused=False):
        optimizer = torch.optim.AdamW(qformer.parameters(), fused=fused)
        qformer(features()).sum().backward()
        optimizer.step()
        return optimizer

    one, other = optimizer_of(tiny.tiny_qformer(), fused), optimizer_of(tiny.tiny_qformer(num_queries=5))
    fresh = torch.optim.AdamW(tiny.tiny_qformer().parameters(), weight_decay=0.5)
    assert checkpoint.load_optimizer(fresh, one.state_dict())
    for ours, theirs in zip(fresh.state.values(), one.state.values(), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    assert fresh.param_groups[0]["weight_decay"] == 0.5  # the flag of this run, not of the one before
    nan = one.state_dict()
    nan["state"] = {**nan["state"], 1: {**nan["state"][1], "exp_avg": nan["state"][1]["exp_avg"] * float("nan")}}
    others = ({}, None, {"param_groups": 1}, {"state": {0: {}}, "param_groups": [{"params": [0]}]})
    for state in (other.state_dict(), nan, *others):
        assert not checkpoint.load_optimizer(fresh, state)
