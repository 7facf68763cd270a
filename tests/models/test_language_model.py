import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import language_model as language
from runtime.files import UserError
from tests import tiny


def test_eos_is_learnt_and_pads_are_not_where_pad_is_eos():
    packed = language.pack_captions([[[5, 6, 7]], [[8]]], eos_id=9, pad_id=9)
    assert packed.input_ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert packed.labels.tolist() == [[5, 6, 7, 9], [8, 9, -100, -100]]
    assert packed.sources.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
    assert packed.segments.tolist() == [[0, 0, 0], [0, -1, -1]]
    assert packed.captions.tolist() == [[0, 0, 0, 0], [1, 1, 0, 0]]


def test_captions_of_one_clip_all_start_at_the_prefix():
    packed = language.pack_captions([[[5, 6], [7]], [[8]]], eos_id=1, pad_id=0)
    assert packed.input_ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert packed.offsets.tolist() == [[0, 1, 0], [0, 0, 0]]
    assert packed.segments.tolist() == [[0, 0, 1], [0, -1, -1]]
    assert packed.sources.tolist() == [[0, 1, 2, 0, 3], [0, 1, 0, 0, 0]]
    assert packed.labels.tolist() == [[5, 6, 1, 7, 1], [8, 1, -100, -100, -100]]
    assert packed.captions.tolist() == [[0, 0, 0, 1, 1], [2, 2, 0, 0, 0]]


def test_a_caption_sees_the_prefix_and_itself_up_to_now():
    mask = language.block_mask(torch.tensor([[0, 0, 1, -1]]), prefix_length=2)
    assert mask.int().tolist() == [
        [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0], [1, 1, 0, 0, 0, 0]],
    ]


def test_a_caption_is_tokenized_as_running_text_behind_the_prompt():
    tokenizer = tiny.tiny_tokenizer()
    ids = language.caption_ids(tokenizer, "a video showing:", "  moving a\nred ball up ")
    assert tokenizer.decode(ids) == " moving a red ball up"
    whole = tokenizer("a video showing: moving a red ball up").input_ids
    assert language.prompt_ids(tokenizer, "a video showing:") + ids == whole


def test_leading_tokens_are_those_the_tokenizer_adds():
    assert language.leading_ids(tiny.tiny_tokenizer()) == []
    tokenizer = tiny.tiny_tokenizer(bos="<s>")
    assert language.leading_ids(tokenizer) == [tokenizer.bos_token_id]


def test_a_language_model_that_is_not_there_is_a_plain_error(tmp_path):
    with pytest.raises(UserError, match="does not load"):
        language.load(str(tmp_path), torch.device("cpu"))
    lm, tokenizer = language.load(str(tiny.save_lm(tmp_path / "lm")), torch.device("cpu"))
    assert lm.config.model_type == "qwen2" and tokenizer.eos_token == tiny.EOS


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "gpt2", "opt", "bloom"])
@pytest.mark.parametrize("tie", [True, False])
def test_a_language_model_in_a_folder_loads_whole(tmp_path, kind, tie):
    folder = tiny.save_lm(tmp_path / "lm", kind, tie=tie)
    lm, _ = language.load(str(folder), torch.device("cpu"))
    for name, tensor in tiny.tiny_lm(kind, tie=tie).state_dict().items():
        assert torch.equal(lm.state_dict()[name], tensor)


def lack_a_weight(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up" not in name}, folder / "x")
    (folder / "x").replace(folder / "model.safetensors")


def run_code(folder):
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "new", "auto_map": names}))
    (folder / "code.py").write_text(f"import pathlib; pathlib.Path({str(folder / 'ran')!r}).mkdir()")


@pytest.mark.parametrize(
    "damage",
    [
        lack_a_weight,
        run_code,
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 100),
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        lambda folder: (folder / "config.json").write_text("[1]"),
    ],
)
def test_a_language_model_that_is_damaged_or_brings_code_is_refused(tmp_path, damage):
    folder = tiny.save_lm(tmp_path / "lm")
    damage(folder)
    with pytest.raises(UserError, match="the language model .* does not load"):
        language.load(str(folder), torch.device("cpu"))
    assert not (folder / "ran").exists()
