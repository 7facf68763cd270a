import contextlib
import copy

import numpy as np
import pytest
import torch

from benchmarks import textbook
from features import cache
from models import checkpoint
from models import language_model as language
from models.vjepa2 import VideoEncoder
from qformer import QFormer, VideoCaptioner
from sample import __main__ as sample
from tests import tiny
from video.reader import read_frames

KINDS = ["qwen2", "qwen3", "llama", "gpt2", "opt", "bloom"]
BATCH = [
    [tiny.CAPTIONS[0], tiny.CAPTIONS[2], tiny.CAPTIONS[5]],
    [tiny.CAPTIONS[1]],
    [tiny.CAPTIONS[3], tiny.CAPTIONS[4]],
]


def some_features(batch=3, tokens=6, width=16):
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(1))


def pair(dropout=0.0, **sizes):
    torch.manual_seed(0)
    absorbed = QFormer(**sizes, dropout=dropout, mlp_dropout=dropout)
    for parameter in absorbed.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # biases that matter
    reference = textbook.TextbookQFormer(**sizes, dropout=dropout, mlp_dropout=dropout)
    reference.load_state_dict(absorbed.state_dict())
    return absorbed, reference


def test_full_size_has_the_published_number_of_parameters_and_names():
    with torch.device("meta"):
        qformer = QFormer()
    assert sum(parameter.numel() for parameter in qformer.parameters()) == 39_453_696
    attention = ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
    names = ["query_tokens", "visual_proj.weight", "visual_proj.bias", "norm.weight", "norm.bias"]
    names += [f"blocks.0.{kind}_attn.{name}" for kind in ("self", "cross") for name in attention]
    names += [f"blocks.0.{part}.{end}" for part in ("norm1", "norm2", "norm3") for end in ("weight", "bias")]
    names += [f"blocks.0.mlp.{layer}.{end}" for layer in (0, 3) for end in ("weight", "bias")]
    assert sorted(qformer.state_dict()) == sorted(names)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_absorbed_attention_equals_the_textbook_in_outputs_and_all_gradients(depth, masked):
    absorbed, reference = pair(num_queries=5, dim=24, visual_dim=16, num_heads=3, depth=depth)
    features = some_features()
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[0, 4:] = mask[2, 1:] = False
    mask = mask if masked else None
    outputs = [model(features, mask) for model in (absorbed, reference)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    for output in outputs:
        output.square().sum().backward()
    for (name, one), other in zip(absorbed.named_parameters(), reference.parameters(), strict=True):
        scale = other.grad.norm() + 1e-6
        # A key bias moves all scores of a query alike: its gradient is zero but for rounding.
        assert (one.grad - other.grad).norm() / scale < 1e-5 or other.grad.norm() < 1e-4, name


def test_the_sums_that_dropout_changes_are_kept():
    """With attention dropout, sum(p) is not 1: the biases' share must follow it, as in the textbook."""
    absorbed, reference = pair(dropout=0.5, num_queries=3, dim=8, visual_dim=4, num_heads=2)
    x, features = torch.randn(2, 3, 8), some_features(2, 5, 4)
    kept = torch.bernoulli(torch.full((2, 6, 5), 0.5)) * 2  # what dropout multiplies p by
    cross, plain = absorbed.blocks[0].cross_attn, reference.blocks[0].cross_attn
    visual = absorbed.visual_proj(features)
    q, k, v = torch.nn.functional._in_projection_packed(x, visual, visual, plain.in_proj_weight, plain.in_proj_bias)
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v))
    p = (q @ k.mT / 2).softmax(-1) * kept.unflatten(1, (2, 3))
    expected = plain.out_proj((p @ v).transpose(1, 2).flatten(2))
    drop = torch.nn.functional.dropout
    try:
        torch.nn.functional.dropout = lambda p, *_: p * kept
        found = cross(x, features, absorbed.visual_proj)
    finally:
        torch.nn.functional.dropout = drop
    torch.testing.assert_close(found, expected)


def test_dropout_differs_between_clips_and_ends_in_eval_mode():
    qformer = tiny.tiny_qformer(dropout=0.5)
    features = some_features(1).expand(2, -1, -1)
    one, other = qformer.train()(features)
    assert not torch.allclose(one, other)
    one, other = qformer.eval()(features)
    assert torch.equal(one, other)


def test_bfloat16_autocast_stays_close_to_float32():
    qformer = tiny.tiny_qformer()
    features = some_features()
    with torch.autocast("cpu", torch.bfloat16):
        rough = qformer(features.half())
    torch.testing.assert_close(rough.float(), qformer(features), rtol=0.05, atol=0.05)


def test_features_as_the_cache_keeps_them_need_no_conversion():
    captioner = tiny.tiny_captioner()
    for dtype in (torch.float16, torch.bfloat16):
        kept = some_features().to(dtype)
        assert torch.equal(captioner.qformer(kept), captioner.qformer(kept.float()))
        assert captioner.generate(kept, 5) == captioner.generate(kept.float(), 5)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_equals_the_textbook_for_captions_of_equal_length(kind):
    captioner = tiny.tiny_captioner(kind)
    reference = textbook.TextbookQFormer(4, 32, 16, 4, dropout=0.0, mlp_dropout=0.0)
    reference.load_state_dict(captioner.qformer.state_dict())
    captions = [tiny.CAPTIONS[0], "moving a red pen on"]
    ids = [captioner.caption_ids(caption) for caption in captions]
    length = min(map(len, ids))
    captions = [captioner.tokenizer.decode(row[:length]).strip() for row in ids]
    ids = [captioner.caption_ids(caption) for caption in captions]
    assert len(ids[0]) == len(ids[1])
    features = some_features(2)
    loss = captioner.loss(features, captions)
    arguments = (captioner.text, ids, captioner.eos_id, captioner.pad_id)
    expected = textbook.textbook_loss(captioner.lm, reference, features, *arguments)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_captions_that_share_a_prefix_score_as_each_alone(kind):
    captioner = tiny.tiny_captioner(kind)
    features = some_features()
    ids = [[captioner.caption_ids(caption) for caption in row] for row in BATCH]
    together = captioner._caption_nll(captioner.prefix(features), ids)
    alone = [
        captioner.loss(features[row : row + 1], [caption]) for row, captions in enumerate(BATCH) for caption in captions
    ]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(captioner.loss(features, BATCH), torch.stack(alone).mean(), rtol=1e-5, atol=1e-5)
    weighted = captioner.loss(features, BATCH, weights=[0.5, 0, 0, 0, 0, 2])
    torch.testing.assert_close(weighted, 0.5 * alone[0] + 2 * alone[5], rtol=1e-5, atol=1e-5)


def test_logits_of_a_batch_are_one_product():
    """The kept positions are a slice; multiplied clip by clip they would read the whole vocabulary for each clip."""
    captioner = tiny.tiny_captioner()
    with torch.profiler.profile(record_shapes=True) as profile:
        captioner.loss(some_features(), tiny.CAPTIONS[:3]).backward()
        captioner.generate(some_features(), max_new_tokens=2)
    wide = [event for event in profile.events() if event.name == "aten::bmm"]
    assert not [event for event in wide if 384 in (shape[-1] for shape in event.input_shapes if shape)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_mlp_is_spared_the_positions_that_have_no_logits(kind, monkeypatch):
    """Of a gated MLP; the others are as they were. Losses and gradients stay."""
    found, seen = [], []
    for spared in (True, False):
        captioner = tiny.tiny_captioner(kind)
        gates = [layer for name, layer in captioner.lm.named_modules() if name.endswith("mlp.gate_proj")]
        for gate in gates:
            gate.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
        if not spared:
            monkeypatch.setattr(language, "last_mlp_for", lambda *_: contextlib.nullcontext())
        losses = captioner.losses(some_features(), BATCH)
        losses.sum().backward()
        found.append([losses, *(parameter.grad for parameter in captioner.qformer.parameters())])
        assert not any("forward" in vars(module) for module in captioner.lm.modules())
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    length = max(sum(len(captioner.caption_ids(caption)) for caption in row) for row in BATCH)
    whole = captioner.prefix_length + length
    assert seen == ([whole, length + 1, whole, whole] if kind in ("qwen2", "qwen3", "llama") else [])


def test_activations_that_are_made_again_change_no_gradient(monkeypatch):
    made, gradients = [], []
    silu = torch.nn.functional.silu
    monkeypatch.setattr(language.F, "silu", lambda x: made.append(x.shape) or silu(x))
    for again in (language.activations_made_again, contextlib.nullcontext):
        monkeypatch.setattr(language, "activations_made_again", again)
        captioner = tiny.tiny_captioner()
        made.clear()  # from here on, what the backward pass makes
        loss = captioner.loss(some_features(), BATCH)
        forward = len(made)
        loss.backward()
        gradients.append([parameter.grad for parameter in captioner.qformer.parameters()])
        assert len(made) - forward == (2 if again is not contextlib.nullcontext else 0)  # one for each layer
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_score_agrees_with_each_text_apart(kind, monkeypatch):
    monkeypatch.setattr("qformer.SCORED_LOGITS", 3 * 384 * 14)  # several blocks of texts
    captioner = tiny.tiny_captioner(kind)
    features = some_features()
    scores = captioner.score(features, tiny.CAPTIONS)
    assert scores.shape == (3, len(tiny.CAPTIONS))
    for column, text in enumerate(tiny.CAPTIONS):
        for row in range(3):
            expected = -captioner.loss(features[row : row + 1], [text])
            torch.testing.assert_close(scores[row, column], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_greedy_and_the_same_in_any_batch(kind):
    captioner = tiny.tiny_captioner(kind)
    features = some_features()
    together = captioner.generate(features, max_new_tokens=8)
    assert together == [captioner.generate(features[row : row + 1], max_new_tokens=8)[0] for row in range(3)]
    ids = []
    for _ in range(8):  # without a cache: the whole row again for each token
        inputs = torch.cat([captioner.prefix(features[:1]), captioner._embed(ids, 1)], dim=1)
        ids.append(captioner.lm(inputs_embeds=inputs).logits[0, -1].argmax().item())
        if ids[-1] == captioner.eos_id:
            break
    assert together[0] == " ".join(captioner.tokenizer.decode(ids, skip_special_tokens=True).split())


def test_beam_search_finds_captions_at_least_as_likely_as_greedy():
    captioner = tiny.tiny_captioner()
    features = some_features()
    assert len(captioner.generate(features, max_new_tokens=6, num_beams=3)) == 3


def test_generation_does_not_run_past_the_positions_of_the_language_model():
    lm = tiny.tiny_lm("gpt2", positions=16)
    captioner = VideoCaptioner(lm, tiny.tiny_tokenizer(), tiny.tiny_qformer())
    assert captioner.max_caption_tokens == 16 - captioner.prefix_length
    assert len(captioner.generate(some_features(), max_new_tokens=50)) == 3


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_captions_longer_than_the_positions_of_the_language_model_are_cut_off(kind):
    """Validation's and the templates': training leaves such captions out, and says so."""
    captioner = tiny.tiny_captioner(kind)
    long, longer = "a ball " * 300, "a ball " * 400
    assert torch.equal(captioner.losses(some_features(1), [long]), captioner.losses(some_features(1), [longer]))
    assert captioner.score(some_features(), [long, "a ball"]).isfinite().all()


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


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("tokens", [{}, {"pad": None}, {"pad": "<pad>"}, {"eos": "</s>", "pad": "</s>", "bos": "<s>"}])
def test_eos_is_predicted_whatever_the_tokenizers_habits(tie, tokens):
    tokenizer = tiny.tiny_tokenizer(**tokens)
    captioner = VideoCaptioner(tiny.tiny_lm(tie=tie), tokenizer, tiny.tiny_qformer())
    assert captioner.eos_id == tokenizer.eos_token_id
    assert captioner.lead == ([tokenizer.bos_token_id] if "bos" in tokens else [])
    assert captioner.prefix_length == captioner.prefix(some_features()).shape[1]
    features = some_features(1)
    ids = captioner.caption_ids("moving a red ball up")
    inputs = torch.cat([captioner.prefix(features), captioner._embed(ids, 1)], dim=1)
    logits = captioner.lm(inputs_embeds=inputs).logits[0, captioner.prefix_length - 1 :]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([*ids, tokenizer.eos_token_id]))
    torch.testing.assert_close(captioner.loss(features, ["moving a red ball up"]), expected)


def test_an_eos_that_only_the_model_names_is_found():
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.eos_token = None
    lm = tiny.tiny_lm()
    with pytest.raises(ValueError, match="no EOS"):
        language.eos_id(tokenizer, lm)
    lm.config.eos_token_id = [7, 8]
    assert language.eos_id(tokenizer, lm) == 7


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="64 wide, the language model's embeddings 32"):
        VideoCaptioner(tiny.tiny_lm(), tiny.tiny_tokenizer(), tiny.tiny_qformer(dim=64))


def test_videos_are_captioned_by_what_the_checkpoint_says_made_its_features(tmp_path):
    """encode = the encoder, then the cache's pooling and precision; caption = that, then generate."""
    encoder = VideoEncoder(tiny.save_encoder(tmp_path / "encoder"), frames=4)
    made = encoder.cache_config("int8", 2).to_dict()
    captioner = tiny.tiny_captioner()
    checkpoint.write(
        tmp_path / "checkpoint.pt",
        checkpoint.Checkpoint(
            {**captioner.config, "llm": str(tiny.save_lm(tmp_path / "lm")), "features": made},
            captioner.qformer.state_dict(),
        ),
    )
    captioner = VideoCaptioner.from_checkpoint(tmp_path / "checkpoint.pt", device="cpu")
    paths = []
    for name, bright in (("a", 40), ("b", 200), ("c", 90)):
        paths.append(tmp_path / f"{name}.webm")
        sample.write_video(paths[-1], np.full((6, 48, 64, 3), bright, np.uint8), fps=12)
    clips = torch.stack([encoder.transform.apply(read_frames(path, 4)) for path in paths])
    expected = torch.cat([cache.dequantize(cache.quantize(x, "int8", 2, encoder.grid)) for x in encoder.encode(clips)])
    assert torch.equal(captioner.encode(clips), expected) and expected.shape == (3, 2, 16)
    assert captioner.caption(paths, batch_size=2, max_new_tokens=6) == captioner.generate(expected, 6)
