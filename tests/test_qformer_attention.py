"""The Q-Former alone, against the textbook's (tests/reference.py)."""

import pytest
import torch
from torch.nn import functional as F

from features import cache
from qformer import QFormer
from runtime.files import UserError
from tests import reference, tiny
from tests.test_qformer import some_features


def pair(dropout=0.0, **sizes):
    torch.manual_seed(0)
    absorbed = QFormer(**sizes, dropout=dropout, mlp_dropout=dropout)
    for parameter in absorbed.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # biases that matter
    other = reference.TextbookQFormer(**sizes, dropout=dropout, mlp_dropout=dropout)
    other.load_state_dict(absorbed.state_dict())
    return absorbed, other


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
    absorbed, textbook = pair(num_queries=5, dim=24, visual_dim=16, num_heads=3, depth=depth)
    features = some_features()
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[0, 4:] = mask[2, 1:] = False
    mask = mask if masked else None
    outputs = [model(features, mask) for model in (absorbed, textbook)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    for output in outputs:
        output.square().sum().backward()
    for (name, one), other in zip(absorbed.named_parameters(), textbook.parameters(), strict=True):
        scale = other.grad.norm() + 1e-6
        # A key bias moves all scores of a query alike: its gradient is zero but for rounding.
        assert (one.grad - other.grad).norm() / scale < 1e-5 or other.grad.norm() < 1e-4, name


def test_the_sums_that_dropout_changes_are_kept():
    """With attention dropout, sum(p) is not 1: the biases' share must follow it, as in the textbook."""
    absorbed, textbook = pair(dropout=0.5, num_queries=3, dim=8, visual_dim=4, num_heads=2)
    x, features = torch.randn(2, 3, 8), some_features(2, 5, 4)
    kept = torch.bernoulli(torch.full((2, 6, 5), 0.5)) * 2  # what dropout multiplies p by
    cross, plain = absorbed.blocks[0].cross_attn, textbook.blocks[0].cross_attn
    visual = absorbed.visual_proj(features)
    q, k, v = F._in_projection_packed(x, visual, visual, plain.in_proj_weight, plain.in_proj_bias)
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v))
    p = (q @ k.mT / 2).softmax(-1) * kept.unflatten(1, (2, 3))
    expected = plain.out_proj((p @ v).transpose(1, 2).flatten(2))
    drop = F.dropout
    try:
        F.dropout = lambda p, *_: p * kept
        found, _ = cross(x, features, absorbed.visual_proj)
    finally:
        F.dropout = drop
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


# ---- where it looks ----


def textbook_weights(textbook, features):
    """What nn.MultiheadAttention gives as its weights (need_weights, the mean over heads) in the last block."""
    kept = []
    textbook.blocks[-1].cross_attn.register_forward_hook(lambda _module, _given, result: kept.append(result[1]))
    textbook.eval()(features)
    return kept[0]  # (B, Q, N)


@pytest.mark.parametrize("depth", [1, 2])
def test_attention_is_what_the_textbook_gives_as_its_weights(depth):
    absorbed, textbook = pair(0.5, num_queries=5, dim=24, visual_dim=16, num_heads=3, depth=depth)
    features = 4 * some_features(3, 32, 16)  # so that some patches matter more than others
    found, expected = absorbed.eval().attention(features), textbook_weights(textbook, features)
    assert found.shape == (3, 5, 32) and expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def looking(config, training=False, **sizes):
    """A captioner whose checkpoint says `config` of its features, and the textbook's Q-Former of the same weights."""
    captioner = tiny.tiny_captioner(dropout=0.5, **sizes)
    for parameter in captioner.qformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    captioner.config["features"] = config and config.to_dict()
    textbook = reference.TextbookQFormer(**{**captioner.qformer.config, "dropout": 0.5})
    textbook.load_state_dict(captioner.qformer.state_dict())
    return captioner.train(training), textbook


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("pool", [1, 2])
def test_the_captioners_attention_is_a_grid_that_sums_to_one_in_eval_mode(dtype, pool):
    made = cache.CacheConfig("e", 6, 64, False, (0,) * 3, (1,) * 3, dtype, pool, 3 * 16 // pool**2, 16)
    captioner, textbook = looking(made, training=True, depth=2)
    stored = cache.quantize(some_features(2, 48, 16), dtype, pool, (3, 4, 4))
    features = cache.dequantize(stored)
    found = captioner.attention(features)
    assert found.shape == (2, 4, 3, 4 // pool, 4 // pool) and not found.requires_grad
    torch.testing.assert_close(found.sum((2, 3, 4)), torch.ones(2, 4))
    torch.testing.assert_close(found.flatten(2), textbook_weights(textbook, features), rtol=0, atol=1e-6)
    assert captioner.qformer.training  # as it was


def test_of_what_tubelets_the_patches_are_the_config_knows():
    made = cache.CacheConfig("e", 12, 64, False, (0,) * 3, (1,) * 3, "float16", 1, 4 * 9, 16, tubelet=3)
    assert made.grid == (4, 3, 3) and cache.CacheConfig.from_dict(made.to_dict()).grid == (4, 3, 3)
    older = {key: value for key, value in made.to_dict().items() if key != "tubelet"}  # V-JEPA 2's own
    assert cache.CacheConfig.from_dict({**older, "tokens": 6 * 4}).grid == (6, 2, 2)
    published = {**older, "frames": 32, "tokens": 4096}
    assert cache.CacheConfig.from_dict(published).grid == (16, 16, 16)


def test_patches_without_known_places_are_refused_with_what_is_missing():
    captioner, textbook = looking(None)
    features = some_features(2, 12, 16)
    with pytest.raises(UserError, match="does not say what made its features: .*config.json"):
        captioner.attention(features)
    named = captioner.attention(features, grid=(3, 2, 2))  # who brings features may know
    torch.testing.assert_close(named.flatten(2), textbook_weights(textbook, features), rtol=0, atol=1e-6)
    with pytest.raises(UserError, match=r"12 patch tokens .* \(3, 3, 3\)"):
        captioner.attention(features, grid=(3, 3, 3))
    captioner.config["features"] = tiny.features_config(tokens=6).to_dict()  # 3 for each of 2 steps
    with pytest.raises(UserError, match="6 patch tokens of 4 frames are no grid"):
        captioner.attention(features)
