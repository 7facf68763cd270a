import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from models import language_model as language
from models import pretrained
from runtime.files import UserError
from tests import tiny
from tests.models import families

CPU = torch.device("cpu")


def test_inputs_and_labels_are_these_ids():
    """EOS is learnt although pads have its id: labels are masked by place."""
    ids, labels = language.build_inputs([[5, 6, 7], [8], []], eos_id=9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9], [9, 9, 9]]
    assert labels.tolist() == [[5, 6, 7, 9], [8, 9, -100, -100], [9, -100, -100, -100]]


def test_a_caption_that_holds_eos_itself_is_predicted_whole():
    ids, labels = language.build_inputs([[5, 9, 6], [7, 8]], eos_id=9)
    assert ids.tolist() == [[5, 9, 6], [7, 8, 9]]
    assert labels.tolist() == [[5, 9, 6, 9], [7, 8, 9, -100]]


def test_captions_without_a_token_have_their_eos_to_predict():
    ids, labels = language.build_inputs([[], []], eos_id=9)
    assert ids.shape == (2, 0) and ids.dtype == torch.long
    assert labels.tolist() == [[9], [9]]


def test_a_caption_is_tokenized_as_running_text_behind_the_prompt():
    tokenizer = tiny.tiny_tokenizer()
    ids = language.caption_ids(tokenizer, "a video showing:", "  moving a\nred ball up ")
    assert tokenizer.decode(ids) == " moving a red ball up"
    whole = tokenizer("a video showing: moving a red ball up").input_ids
    assert language.prompt_ids(tokenizer, "a video showing:") + ids == whole


def test_a_caption_of_the_published_code_is_tokenized_by_itself():
    tokenizer = tiny.tiny_tokenizer()
    ids = language.caption_ids(tokenizer, "a video showing:", " moving a  red ball up", space=False)
    assert ids == tokenizer("moving a red ball up").input_ids
    assert tokenizer.decode(ids) == "moving a red ball up"


def test_bos_tokens_are_those_that_the_tokenizer_adds():
    assert language.bos_ids(tiny.tiny_tokenizer()) == []
    tokenizer = tiny.tiny_tokenizer(bos="<s>")
    assert language.bos_ids(tokenizer) == [tokenizer.bos_token_id]


@pytest.mark.parametrize("kind, held", [("llama", 3 * 2 * 2 * 2 * 9 * 8), ("mamba", 0)])
def test_texts_are_scored_in_blocks_of_like_lengths_within_the_budget(monkeypatch, kind, held):
    """Of logits, and of keys and values: clips, layers, keys and values, heads, positions, width."""
    shapes, mean_nll = [], language.mean_nll
    monkeypatch.setattr(language, "mean_nll", lambda *given: shapes.append(tuple(given[3].shape)) or mean_nll(*given))
    ids, labels = language.build_inputs([[5, 6], [7], [7] * 4, [8], [5, 8]], eos_id=9)
    for budget, expected in (
        (2 * (3 * 384 * 5 + held), [(6, 2), (6, 3), (3, 5)]),
        (1, [(3, n) for n in (2, 2, 3, 3, 5)]),
    ):
        monkeypatch.setattr(language, "SCORED_NUMBERS", budget)
        language.log_likelihood(families.tiny_lm(kind), torch.zeros(3, 10, 32), ids, labels)
        assert shapes == expected
        shapes.clear()


# ---- loading ----


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "bloom"])
@pytest.mark.parametrize("tie", [True, False])
def test_a_language_model_in_a_folder_loads_whole(tmp_path, kind, tie):
    folder = tiny.save_lm(tmp_path / "lm", kind, tie=tie)
    lm, tokenizer = language.load(str(folder), CPU)
    for name, tensor in tiny.tiny_lm(kind, tie=tie).state_dict().items():
        assert torch.equal(lm.state_dict()[name], tensor)
    assert tokenizer.eos_token == tiny.EOS


def lack_a_weight(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up" not in name}, folder / "x")
    (folder / "x").replace(folder / "model.safetensors")


def run_code(folder):
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "new", "auto_map": names}))
    (folder / "code.py").write_text(f"import pathlib; pathlib.Path({str(folder / 'ran')!r}).mkdir()")


def set_config(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


@pytest.mark.parametrize(
    "damage",
    [
        lack_a_weight,
        run_code,
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 100),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        lambda folder: (folder / "tokenizer.json").write_text('{"added_tokens": [], "version": []}'),
        lambda folder: (folder / "tokenizer_config.json").write_text("null"),
        lambda folder: (folder / "config.json").write_text("[1]"),
        set_config(hidden_act="x"),
        set_config(hidden_size=48),
        set_config(num_key_value_heads=0),
        set_config(rms_norm_eps="x"),
    ],
)
def test_a_language_model_that_is_damaged_or_brings_code_is_refused_in_one_line(tmp_path, damage):
    folder = tiny.save_lm(tmp_path / "lm")
    damage(folder)
    with pytest.raises(UserError, match=r"the language model .* (does not load|lacks 1 of its weights)") as caught:
        language.load(str(folder), CPU)
    assert "\n" not in str(caught.value) and not (folder / "ran").exists()


def test_a_bug_of_ours_is_not_told_as_damage(tmp_path, monkeypatch):
    folder = tiny.save_lm(tmp_path / "lm")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: None)
    with pytest.raises(TypeError):
        language.load(str(folder), CPU)


def test_an_adapter_is_told_as_one(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen2-1.5B"}')
    with pytest.raises(UserError, match="this is an adapter: merge it into its base model first"):
        language.load(str(tmp_path), CPU)


@pytest.mark.parametrize(
    "name",
    [
        "/no/where",
        "./no-where",
        "../lm",
        "~/no-where",
        "a/b/c",
        "models/",
        "C:\\models\\lm",
        "C:/lm",
    ],
)
def test_a_path_that_is_gone_is_told_as_such_and_asked_of_no_hub(tmp_path, monkeypatch, name):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: pytest.fail("a hub was asked"))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UserError, match="does not load: there is no such folder; say with --llm where the model is"):
        language.load(name, CPU)


def test_a_file_is_no_model_folder(tmp_path):
    (tmp_path / "lm.gguf").write_text("x")
    with pytest.raises(UserError, match="there is no such folder"):
        language.load(str(tmp_path / "lm.gguf"), CPU)


def test_names_that_a_hub_may_have_are_asked_of_it():
    for name in ("gpt2", "Qwen/Qwen2-1.5B", "some.one/a.b-c_d"):
        assert pretrained.locate(name, "--llm") == name
    with pytest.raises(UserError, match="'someone/no-such-model' does not load"):  # tests are offline
        language.load("someone/no-such-model", CPU)


@pytest.mark.parametrize("kind", families.REFUSED)
def test_models_that_do_not_write_behind_embeddings_are_refused_when_they_are_loaded(tmp_path, kind):
    families.tiny_lm(kind).save_pretrained(tmp_path)
    tiny.tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot write captions .* does not generate from embeddings"):
        language.load(str(tmp_path), CPU)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3_5_text", "mamba"])
def test_the_check_of_a_model_leaves_it_as_it_was(tmp_path, kind):
    lm = families.tiny_lm(kind)
    lm.generation_config.eos_token_id = 0  # and the token that the check may write
    lm.save_pretrained(tmp_path)
    tiny.tiny_tokenizer().save_pretrained(tmp_path)
    loaded, _ = language.load(str(tmp_path), CPU)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in lm.state_dict().items())


def test_loading_says_what_it_loads_and_nothing_else(tmp_path, capfd):
    folder = tiny.save_lm(tmp_path / "lm")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "score.weight": torch.ones(3, 32)}, folder / "model.safetensors", {"format": "pt"})
    capfd.readouterr()
    language.load(str(folder), CPU)
    assert capfd.readouterr() == ("", f"loading {folder}\n")


# ---- which model it is ----


def fingerprint(lm):
    return pretrained.fingerprint(lm, torch.bfloat16)


def test_a_fingerprint_is_the_same_in_bfloat16_and_another_for_other_weights(tmp_path):
    folder = tiny.save_lm(tmp_path / "lm")
    found = {
        fingerprint(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert found == {fingerprint(tiny.tiny_lm())} and len(found.pop()) == 16
    assert fingerprint(tiny.tiny_lm(seed=1)) != fingerprint(tiny.tiny_lm())
    tuned = tiny.tiny_lm()
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight.mul_(1.05)
    assert fingerprint(tuned) != fingerprint(tiny.tiny_lm())
