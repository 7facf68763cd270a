import pytest
import torch

import language
import tiny
from files import UserError


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
