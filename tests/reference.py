"""The method as a textbook writes it down: the reference that the product is compared with, for results and speed.

Keys and values of all patch tokens are made, logits at all positions, one caption a pass. Written from the method's
description (BLIP-2, arXiv 2301.12597), with the published parameter names so that weights are interchangeable.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TextbookBlock(nn.Module):
    """Post-norm self- and cross-attention of nn.MultiheadAttention, pre-norm MLP."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int, dropout: float, mlp_dropout: float) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True)
        self.cross_attn = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        hidden = dim * mlp_ratio
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(mlp_dropout), nn.Linear(hidden, dim), nn.Dropout(mlp_dropout)
        )

    def forward(self, x: Tensor, visual: Tensor, mask: Tensor | None) -> Tensor:
        """(B, Q, C) queries, (B, N, C) projected patch tokens -> (B, Q, C)."""
        x = self.norm1(x + self.self_attn(x, x, x)[0])
        padding = None if mask is None else ~mask
        x = self.norm2(x + self.cross_attn(x, visual, visual, key_padding_mask=padding)[0])
        return x + self.mlp(self.norm3(x))


class TextbookQFormer(nn.Module):
    """The Q-Former with every projection made."""

    def __init__(
        self,
        num_queries: int = 64,
        dim: int = 1536,
        visual_dim: int = 1024,
        num_heads: int = 4,
        depth: int = 1,
        mlp_ratio: int = 4,
        dropout: float = 0.1,
        mlp_dropout: float = 0.3,
    ) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.randn(1, num_queries, dim) * 0.02)
        self.visual_proj = nn.Linear(visual_dim, dim)
        sizes = (dim, num_heads, mlp_ratio, dropout, mlp_dropout)
        self.blocks = nn.ModuleList(TextbookBlock(*sizes) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, Q, C)."""
        visual = self.visual_proj(features)  # (B, N, C)
        x = self.query_tokens.expand(len(features), -1, -1)
        for block in self.blocks:
            x = block(x, visual, mask)
        return self.norm(x)


def textbook_inputs(prompt: list[int], captions: list[list[int]], eos: int, pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and labels of [prompt | caption | EOS | pads]: three (B, T) tensors."""
    rows = [prompt + caption + [eos] for caption in captions]
    length = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : len(prompt)] = -100
    return ids, mask, labels


def textbook_loss(
    lm: nn.Module,
    qformer: nn.Module,
    features: Tensor,
    prompt: list[int],
    captions: list[list[int]],
    eos: int,
    pad: int,
) -> Tensor:
    """Mean over all caption tokens of a batch, one caption a clip, logits made at every position."""
    visual = qformer(features)  # (B, Q, C)
    ids, mask, labels = (part.to(features.device) for part in textbook_inputs(prompt, captions, eos, pad))
    text = lm.get_input_embeddings()(ids)
    inputs = torch.cat([visual.to(text.dtype), text], dim=1)  # (B, Q + T, C)
    mask = torch.cat([mask.new_ones(visual.shape[:2]), mask], dim=1)
    logits = lm(inputs_embeds=inputs, attention_mask=mask, use_cache=False).logits  # (B, Q + T, V)
    predicted = logits[:, visual.shape[1] - 1 : -1]  # the position before each label
    return F.cross_entropy(predicted.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)


def textbook_step(
    optimizer: torch.optim.Optimizer,
    batches: list[list[tuple[str, list[str]]]],
    read: Callable[[list[str]], Tensor],
    loss: Callable[[Tensor, list[str]], Tensor],
) -> float:
    """An optimizer step over micro-batches of (clip id, its captions), as the published code takes it; its loss.

    A batch's features are read when it is due, in this process; each clip has one caption; each batch counts the same.
    """
    optimizer.zero_grad()
    total = 0.0
    for batch in batches:
        part = loss(read([clip_id for clip_id, _ in batch]), [captions[0] for _, captions in batch]) / len(batches)
        part.backward()
        total += part.item()
    optimizer.step()
    return total


def textbook_read(folder: Path, clip_ids: list[str], device: torch.device | str = "cpu") -> Tensor:
    """Features (B, N, D) in float32, from the published cache's bare float16 tensors."""
    clips = [torch.load(folder / f"{clip_id}.pt", weights_only=True) for clip_id in clip_ids]
    return torch.stack(clips).to(device).float()
