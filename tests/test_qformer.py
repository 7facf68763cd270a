import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import GenerationConfig

from models import language_model as language
from qformer import VideoCaptioner
from runtime.files import UserError
from tests import reference, tiny
from tests.models import families

BATCH = [
    [tiny.CAPTIONS[0], tiny.CAPTIONS[2], tiny.CAPTIONS[5]],
    [tiny.CAPTIONS[1]],
    [tiny.CAPTIONS[3], tiny.CAPTIONS[4]],
]
KINDS = [*families.ATTENTION, *families.RECURRENT]


def some_features(batch=3, tokens=6, width=16):
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=KINDS)
def captioner(request):
    return family(request.param)


def family(kind):
    return VideoCaptioner(families.tiny_lm(kind), tiny.tiny_tokenizer(), tiny.tiny_qformer()).eval()


def alone(captioner, features, caption):
    """The loss of one caption of one clip, (1, N, D), by a plain forward pass that makes all logits."""
    ids = captioner.caption_ids(caption)
    prefix = captioner.prefix(features)
    inputs = torch.cat([prefix, captioner.lm.get_input_embeddings()(torch.tensor([ids]))], dim=1)
    logits = captioner.lm(inputs_embeds=inputs).logits[0, prefix.shape[1] - 1 :]
    return F.cross_entropy(logits, torch.tensor([*ids, captioner.eos_id]))


@torch.no_grad()
def test_losses_are_those_of_a_plain_forward_pass_of_each_caption(captioner):
    """However many captions a clip has, of whatever lengths, in models with state from token to token too."""
    features = some_features()
    found = captioner.per_caption_nll(features, BATCH)
    expected = torch.stack(
        [alone(captioner, features[row : row + 1], text) for row, texts in enumerate(BATCH) for text in texts]
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(captioner.loss(features, BATCH), expected.mean(), rtol=0, atol=1e-5)
    weighted = captioner.loss(features, BATCH, weights=[0.5, 0, 0, 0, 0, 2])
    torch.testing.assert_close(weighted, 0.5 * expected[0] + 2 * expected[5], rtol=0, atol=1e-5)


@torch.no_grad()
def test_log_likelihoods_are_those_of_each_text_alone(captioner, monkeypatch):
    features = some_features(2)
    monkeypatch.setattr(language, "SCORED_NUMBERS", 25_000)  # several blocks, some of several texts
    found = captioner.log_likelihood(features, tiny.CAPTIONS)
    expected = [[-alone(captioner, features[row : row + 1], text) for text in tiny.CAPTIONS] for row in range(2)]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_is_read_once_where_there_is_a_key_value_cache(kind):
    captioner, read = family(kind), []

    def note(_module, _inputs, given):
        if not any(given["inputs_embeds"] is seen for seen in read):  # the head's model hands them to the one below
            read.append(given["inputs_embeds"])

    for module in (captioner.lm, captioner.lm.base_model):
        module.register_forward_pre_hook(note, with_kwargs=True)
    captioner.log_likelihood(some_features(), tiny.CAPTIONS)
    longest = max(len(captioner.caption_ids(text)) for text in tiny.CAPTIONS)
    before = captioner.prefix_length - 1
    assert [inputs.shape[1] for inputs in read] == [before, longest + 1 + (before if kind in families.RECURRENT else 0)]


@torch.no_grad()
def test_greedy_captions_are_a_naive_loops(captioner):
    """And the same in any batch."""
    features = some_features()
    together = captioner.generate(features, max_new_tokens=8)
    assert together[1:] == captioner.generate(features[1:], max_new_tokens=8)
    ids = []
    for _ in range(8):  # without a cache: the whole row again for each token
        written = captioner.lm.get_input_embeddings()(torch.tensor([ids], dtype=torch.long))
        inputs = torch.cat([captioner.prefix(features[:1]), written], dim=1)
        ids.append(captioner.lm(inputs_embeds=inputs).logits[0, -1].argmax().item())
        if ids[-1] == captioner.eos_id:
            break
    assert together[0] == " ".join(captioner.tokenizer.decode(ids, skip_special_tokens=True).split())


@torch.no_grad()
def test_beams_are_transformers_own(captioner):
    features = some_features(2)
    settings = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    ends = {"eos_token_id": captioner.eos_id, "pad_token_id": captioner.eos_id}
    prefix = captioner.prefix(features)
    rows = captioner.lm.generate(inputs_embeds=prefix, generation_config=GenerationConfig(**settings, **ends))
    expected = [" ".join(text.split()) for text in captioner.tokenizer.batch_decode(rows, skip_special_tokens=True)]
    assert captioner.generate(features, max_new_tokens=6, num_beams=3) == expected


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_loss_equals_the_textbook_for_captions_of_equal_length(kind):
    captioner = family(kind)
    other = reference.TextbookQFormer(4, 32, 16, 4, dropout=0.0, mlp_dropout=0.0)
    other.load_state_dict(captioner.qformer.state_dict())
    captions = [tiny.CAPTIONS[0], "moving a red pen on"]
    ids = [captioner.caption_ids(caption) for caption in captions]
    length = min(map(len, ids))
    captions = [captioner.tokenizer.decode(row[:length]).strip() for row in ids]
    ids = [captioner.caption_ids(caption) for caption in captions]
    assert len(ids[0]) == len(ids[1])
    features = some_features(2)
    loss = captioner.loss(features, captions)
    arguments = (captioner.prompt_ids, ids, captioner.eos_id, captioner.eos_id)
    expected = reference.textbook_loss(captioner.lm, other, features, *arguments)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


# ---- what is made of them ----


def test_a_clip_goes_through_the_qformer_once_however_many_captions_it_has():
    captioner, seen = tiny.tiny_captioner(), []
    captioner.qformer.register_forward_hook(lambda _, __, output: seen.append(tuple(output.shape)))
    captioner.loss(some_features(), BATCH).backward()
    assert seen == [(3, 4, 32)]
    assert all(parameter.grad is not None for parameter in captioner.qformer.parameters())


def test_logits_are_made_of_caption_positions_only_in_one_matrix_product():
    captioner = tiny.tiny_captioner()
    with torch.profiler.profile(record_shapes=True) as profile:
        captioner.loss(some_features(), tiny.CAPTIONS[:3])
    wide = [event.input_shapes for event in profile.events() if event.name in ("aten::mm", "aten::bmm")]
    heads = [shapes for shapes in wide if 384 in shapes[1]]
    positions = 1 + max(len(captioner.caption_ids(caption)) for caption in tiny.CAPTIONS[:3])
    assert heads == [[[3 * positions, 32], [32, 384]]]


SPOILED = {
    "do_sample": True,
    "temperature": 2.0,
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 7,
    "min_length": 20,
    "forced_bos_token_id": 9,
    "forced_eos_token_id": 0,
    "suppress_tokens": list(range(1, 300)),
    "bad_words_ids": [[5], [6]],
    "num_return_sequences": 2,
    "num_beams": 2,
    "return_dict_in_generate": True,
    "output_scores": True,
    "stop_strings": ["a"],
    "max_length": 3,
    "cache_implementation": "static",
    "prompt_lookup_num_tokens": 2,
    "length_penalty": -3.0,
    "eos_token_id": [7, 8],
}


@pytest.mark.parametrize("beams", [1, 3])
def test_the_folders_generation_config_changes_nothing(beams):
    plain = tiny.tiny_captioner()
    expected = plain.generate(some_features(), 8, num_beams=beams)
    lm = tiny.tiny_lm()
    for key, value in SPOILED.items():
        setattr(lm.generation_config, key, value)
    spoiled = VideoCaptioner(lm, tiny.tiny_tokenizer(), tiny.tiny_qformer())
    assert spoiled.generate(some_features(), 8, num_beams=beams) == expected
    assert any(expected)


def test_nothing_behind_eos_is_told():
    """Also where the tokenizer does not know that the model's EOS is special."""
    captioner = tiny.tiny_captioner()
    captioner.tokenizer.eos_token = captioner.tokenizer.pad_token = None
    word = captioner.caption_ids("ball")[0]
    captioner.eos_id = word

    def generate(**_):
        return torch.tensor([[word, 5, 6], [5, word, 6]])

    captioner.lm.generate = generate
    assert captioner.generate(some_features(2)) == ["", captioner.tokenizer.decode([5]).strip()]


def test_generation_does_not_run_past_the_positions_of_the_language_model():
    lm = tiny.tiny_lm("gpt2", positions=16)
    captioner = VideoCaptioner(lm, tiny.tiny_tokenizer(), tiny.tiny_qformer())
    assert captioner.max_caption_tokens == 16 - captioner.prefix_length
    assert len(captioner.generate(some_features(), max_new_tokens=50)) == 3


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_captions_longer_than_the_positions_of_the_language_model_are_cut_off(kind):
    """Validation's and the templates': training leaves such captions out, and says so."""
    captioner = family(kind)
    long, longer = "a ball " * 300, "a ball " * 400
    losses = [captioner.per_caption_nll(some_features(1), [text]) for text in (long, longer)]
    assert torch.equal(*losses)
    assert captioner.log_likelihood(some_features(), [long, "a ball"]).isfinite().all()


def test_texts_without_a_token_are_scored_by_their_eos():
    captioner = tiny.tiny_captioner()
    features = some_features()
    expected = -captioner.per_caption_nll(features, [""] * 3)
    torch.testing.assert_close(captioner.log_likelihood(features, [""])[:, 0], expected)
    assert captioner.log_likelihood(features, ["", "a ball"]).isfinite().all()


def test_frozen_means_frozen():
    captioner = tiny.tiny_captioner(dropout=0.1)
    before = copy.deepcopy(captioner.lm.state_dict())
    optimizer = torch.optim.AdamW([p for p in captioner.parameters() if p.requires_grad], lr=0.1)
    captioner.train()
    assert not captioner.lm.training and captioner.qformer.training
    for _ in range(3):
        captioner.loss(some_features(), tiny.CAPTIONS[:3]).backward()
        optimizer.step()
    assert all(parameter.grad is None for parameter in captioner.lm.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in captioner.lm.state_dict().items())
    assert {p for group in optimizer.param_groups for p in group["params"]} == set(captioner.qformer.parameters())
    captioner.generate(some_features(), 2)
    captioner.log_likelihood(some_features(), ["a ball"])
    assert captioner.qformer.training  # both are made in eval mode, and leave training as it was


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("tokens", [{}, {"pad": None}, {"pad": "<pad>"}, {"eos": "</s>", "pad": "</s>", "bos": "<s>"}])
def test_eos_is_predicted_whatever_the_tokenizers_habits(tie, tokens):
    tokenizer = tiny.tiny_tokenizer(**tokens)
    captioner = VideoCaptioner(tiny.tiny_lm(tie=tie), tokenizer, tiny.tiny_qformer())
    assert captioner.eos_id == tokenizer.eos_token_id
    assert captioner.bos_ids == ([tokenizer.bos_token_id] if "bos" in tokens else [])
    assert captioner.prefix_length == captioner.prefix(some_features()).shape[1]
    features = some_features(1)
    expected = alone(captioner, features, "moving a red ball up")
    torch.testing.assert_close(captioner.loss(features, ["moving a red ball up"]), expected)


def test_a_pad_token_that_the_embeddings_have_no_row_for_is_never_read():
    tokenizer = tiny.tiny_tokenizer()
    expected = tiny.tiny_captioner()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens([f"[{number}]" for number in range(100)])
    tokenizer.pad_token = "[99]"
    captioner = VideoCaptioner(tiny.tiny_lm(), tokenizer, tiny.tiny_qformer())
    assert tokenizer.pad_token_id >= captioner.lm.get_input_embeddings().num_embeddings
    features, captions = some_features(), tiny.CAPTIONS[:3]
    assert torch.equal(captioner.per_caption_nll(features, captions), expected.per_caption_nll(features, captions))
    assert captioner.generate(features, 8) == expected.generate(features, 8)


def test_an_eos_that_only_the_model_names_is_found():
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.eos_token = None
    lm = tiny.tiny_lm()
    with pytest.raises(UserError, match="no EOS"):
        language.eos_id(tokenizer, lm)
    lm.config.eos_token_id = [7, 8]
    assert language.eos_id(tokenizer, lm) == 7


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="64 wide, the language model's embeddings 32"):
        VideoCaptioner(tiny.tiny_lm(), tiny.tiny_tokenizer(), tiny.tiny_qformer(dim=64))
