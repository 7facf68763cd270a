"""The Q-Former's two attentions: textbook results, without the work that a textbook does for them.

Shapes: B clips, N patch tokens a clip, D their width, Q queries, C the language model's width, H heads.
"""

from torch import Tensor, nn
from torch.nn import functional as F


class SelfAttention(nn.MultiheadAttention):
    """Self-attention of queries that all clips share until dropout makes them each clip's own: projected once."""

    def forward(self, x: Tensor, batch: int) -> Tensor:
        """(B, Q, C), or (1, Q, C) while all clips have the same queries -> (B, Q, C), or the same in eval mode."""
        projected = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = projected.permute(2, 0, 3, 1, 4)  # each (1 or B, H, Q, C/H)
        p = (q * self.head_dim**-0.5 @ k.mT).softmax(-1)  # (1 or B, H, Q, Q)
        if self.training and self.dropout > 0:
            p = F.dropout(p.expand(batch, -1, -1, -1), self.dropout)
        return self.out_proj((p @ v).transpose(1, 2).flatten(2))


class AbsorbedCrossAttention(nn.MultiheadAttention):
    """Cross-attention from queries to patch tokens that never projects the patch tokens.

    The textbook form makes keys K = W_k(W_p x + b_p) + b_k and values of all N tokens, two (N, C) matrices a clip.
    Both are linear in x, so the weights move to the other side: the scores are (q W_k W_p) x plus a constant for
    each query, which softmax drops, and the output is W_v(W_p sum(p x) + sum(p) b_p) + sum(p) b_v. Dropout on the
    attention makes sum(p) differ from 1: it is kept. Parameters and their names are nn.MultiheadAttention's.
    """

    def forward(self, x: Tensor, features: Tensor, projection: nn.Linear, mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: (B, Q, C), or (1, Q, C) while all clips still have the same queries.
            features: (B, N, D).
            projection: the visual projection D -> C, absorbed here.
            mask: bool (B, N), True for real tokens, where a batch mixes lengths.

        Returns:
            (B, Q, C).
        """
        heads, width = self.num_heads, self.head_dim
        w_q, w_k, w_v = self.in_proj_weight.unflatten(0, (3, self.embed_dim))
        b_q, _, b_v = self.in_proj_bias.unflatten(0, (3, self.embed_dim))
        q = F.linear(x, w_q, b_q).unflatten(-1, (heads, width)) * width**-0.5  # (B, Q, H, C/H)
        q = q.permute(2, 0, 1, 3).flatten(1, 2) @ w_k.unflatten(0, (heads, width))  # (H, BQ, C)
        q = (q @ projection.weight).unflatten(1, x.shape[:2]).transpose(0, 1).flatten(1, 2)  # (B, HQ, D)
        scores = q.expand(len(features), -1, -1) @ features.mT  # (B, HQ, N)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], float("-inf"))
        p, total = scores.softmax(-1), 1.0
        if self.training and self.dropout > 0:
            p = F.dropout(p, self.dropout)
            total = self._heads_first(p.sum(-1, keepdim=True))  # (H, BQ, 1)
        value = F.linear(self._heads_first(p @ features), projection.weight) + total * projection.bias  # (H, BQ, C)
        value = value @ w_v.unflatten(0, (heads, width)).mT + total * b_v.unflatten(0, (heads, 1, width))
        return self.out_proj(value.unflatten(1, (len(features), -1)).permute(1, 2, 0, 3).flatten(2))

    def _heads_first(self, x: Tensor) -> Tensor:
        """(B, HQ, ...) -> (H, BQ, ...): a weight's gradient is one product, not one for each clip and their sum."""
        return x.unflatten(1, (self.num_heads, -1)).transpose(0, 1).flatten(1, 2)
