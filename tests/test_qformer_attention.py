"""The Q-Former alone, against the textbook's (tests/reference.py)."""

import pytest
import torch
from torch.nn import functional as F

from qformer import QFormer
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
        found = cross(x, features, absorbed.visual_proj)
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
