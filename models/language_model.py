"""The language model's side: loading it, what it reads and what it is asked to predict (prompt, captions, end).

One clip's row is [prefix | caption 1 | caption 2 | ...]: all captions of a clip continue the one prefix (the
visual queries and the prompt) and none sees another. A caption's first token is predicted from the prefix's last
position, its EOS from its own last token; the EOS itself is never an input, since nothing follows it.

Shapes: B clips, L caption tokens in the longest row, S predicted tokens in the longest row, P prefix positions.
"""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from runtime.files import UserError

PROMPT = "a video showing:"
IGNORED = -100  # the label that torch's cross entropy passes over


class PackedCaptions(NamedTuple):
    """The captions of a batch as token ids, and what is to be predicted where."""

    input_ids: Tensor  # (B, L) caption tokens, rows padded on the right
    offsets: Tensor  # (B, L) a token's place in its caption; its position is P + this
    segments: Tensor  # (B, L) which of the row's captions a token belongs to; -1 for pads
    sources: Tensor  # (B, S) where a label is predicted: 0 the prefix's last position, 1 + i after token i
    labels: Tensor  # (B, S) caption tokens and EOS; -100 for pads
    captions: Tensor  # (B, S) which of the batch's captions, counted row by row, a label belongs to; 0 for pads

    def to(self, device: torch.device) -> "PackedCaptions":
        """The same on another device."""
        return PackedCaptions(*(tensor.to(device) for tensor in self))


def pack_captions(rows: list[list[list[int]]], eos_id: int, pad_id: int) -> PackedCaptions:
    """Pack the captions of each clip (rows of token ids without EOS) behind one prefix.

    Labels are masked by place, never by id: where pad and EOS are one token (Qwen2), EOS is still learnt.
    """
    columns: tuple[list[list[int]], ...] = ([], [], [], [], [], [])
    count = 0
    for row in rows:
        ids, offsets, segments, sources, labels, captions = ([] for _ in columns)
        for segment, caption in enumerate(row):
            sources += [0, *range(len(ids) + 1, len(ids) + len(caption) + 1)]
            labels += [*caption, eos_id]
            captions += [count] * (len(caption) + 1)
            ids += caption
            offsets += range(len(caption))
            segments += [segment] * len(caption)
            count += 1
        for column, values in zip(columns, (ids, offsets, segments, sources, labels, captions), strict=True):
            column.append(values)
    fills = (pad_id, 0, -1, 0, IGNORED, 0)
    return PackedCaptions(*(_pad(column, fill) for column, fill in zip(columns, fills, strict=True)))


def block_mask(segments: Tensor, prefix_length: int) -> Tensor:
    """Which columns a caption token may look at: the prefix, and its own caption up to itself.

    Args:
        segments: (B, L), -1 for pads. A pad sees the prefix only, so that no row is empty.
        prefix_length: P, in positions.

    Returns:
        bool (B, L, P + L), True where attention is allowed.
    """
    batch, length = segments.shape
    same = segments[:, :, None] == segments[:, None, :]  # (B, L, L)
    own = same & (segments >= 0)[:, :, None] & torch.ones_like(same).tril()
    prefix = torch.ones(batch, length, prefix_length, dtype=torch.bool, device=segments.device)
    return torch.cat([prefix, own], dim=2)  # (B, L, P + L)


def load(name: str, device: torch.device) -> tuple[nn.Module, Any]:
    """A decoder-only language model and its tokenizer, by hub name or local folder; bfloat16 on a GPU.

    Raises: UserError where there is no such model, or it is not a decoder-only language model.
    """
    logging.disable_progress_bar()  # the scripts draw their own
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        # A checkpoint names its language model: code that comes with a model is not run, nor is the user asked.
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        lm, loading = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
        if loading["missing_keys"]:  # transformers makes them up at random
            raise ValueError(f"its files lack {len(loading['missing_keys'])} weights")
    # Damaged folders fail in each library's own way (safetensors, tokenizers, JSON, shapes)
    except Exception as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"the language model {name!r} does not load ({reason}); give --llm a hub name or a local folder"
        ) from None
    return lm.to(device), tokenizer


@contextlib.contextmanager
def last_mlp_for(lm: nn.Module, kept: int) -> Iterator[None]:
    """Within it, the last layer's MLP runs for the last `kept` positions only: nothing reads what it gives for others.

    Its keys and values come before it, and logits are made of the kept positions: of 80 positions with 13 kept this
    is a fortieth of Qwen2-1.5B's work, forwards and backwards. Language models without a gated MLP run as they are.
    """
    layers = max((m for m in lm.modules() if isinstance(m, nn.ModuleList) and len(m)), key=len, default=[None])
    mlp = getattr(layers[-1], "mlp", None)
    projections = (getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    if not all(isinstance(projection, nn.Linear) for projection in projections) or "forward" in vars(mlp):
        yield
        return
    whole = mlp.forward

    def last(x: Tensor) -> Tensor:  # (B, P + L, C)
        return F.pad(whole(x[:, -kept:].contiguous()), (0, 0, x.shape[1] - kept, 0))

    mlp.forward = last
    try:
        yield
    finally:
        del mlp.forward


def as_one_matrix(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Before a language model's head: the positions that logits are wanted for, (B, L, C), copied to stand together.

    They are a slice of all positions, and torch multiplies what is no whole matrix clip by clip, each time by the
    whole vocabulary: on a CPU at Qwen2-1.5B's size twice the time for 8 clips of 13 positions, five times for 64 of 1.
    """
    return (inputs[0].contiguous(), *inputs[1:])


def activations_made_again() -> AbstractContextManager:
    """Within it, the backward pass of a gated MLP makes silu(gate) again instead of keeping it.

    A frozen language model keeps little but its MLPs' gate, silu(gate) and up: this is a quarter of the memory of a
    training step, for a cheap function. The same numbers, bit for bit.
    """

    def pack(tensor: Tensor) -> Any:
        made_by = tensor.grad_fn
        return made_by if type(made_by).__name__ == "SiluBackward0" else tensor  # it keeps its input anyway

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else F.silu(kept._saved_self)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The prompt's tokens, without the ones that a tokenizer adds by itself."""
    return tokenizer(prompt, add_special_tokens=False).input_ids


def caption_ids(tokenizer: Any, prompt: str, caption: str) -> list[int]:
    """A caption's tokens as they follow the prompt, without EOS.

    Prompt and caption are tokenized as one text and the prompt's tokens cut off, so that the caption's first word
    gets the token it has in running text ("Ġmoving", "▁moving") whatever the tokenizer does at a text's start.
    """
    before = prompt_ids(tokenizer, prompt)
    caption = " ".join(caption.split())
    whole = tokenizer(f"{prompt} {caption}", add_special_tokens=False).input_ids
    if whole[: len(before)] == before:
        return whole[len(before) :]
    return tokenizer(f" {caption}", add_special_tokens=False).input_ids  # prompt and caption share a token


def leading_ids(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before every text by itself (Llama's BOS; nothing for Qwen2)."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    marked = tokenizer("a").input_ids
    for start in range(len(marked)):
        if marked[start : start + len(plain)] == plain:
            return marked[:start]
    return []


def eos_id(tokenizer: Any, lm: nn.Module) -> int:
    """The token that ends a caption: the tokenizer's EOS, or else the model's own.

    Raises: ValueError where neither names one.
    """
    configs = (lm.config, getattr(lm, "generation_config", None))
    for found in (tokenizer.eos_token_id, *(getattr(config, "eos_token_id", None) for config in configs)):
        if isinstance(found, list):
            found = found[0] if found else None
        if found is not None:
            return found
    raise ValueError("the language model has no EOS token: set eos_token in its tokenizer's configuration")


def _pad(rows: list[list[int]], fill: int) -> Tensor:
    width = max((len(row) for row in rows), default=0)
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=torch.long).reshape(-1, width)
