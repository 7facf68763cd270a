"""What is measured: the published sizes, built from their configs with made-up weights, and a small one to try out."""

import re
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.initialization import no_init_weights

from qformer import QFormer, VideoCaptioner
from tests.reference import TextbookQFormer

EOS = 0


@dataclass(frozen=True)
class Size:
    """A language model, a Q-Former and a clip's features."""

    lm: dict[str, int]  # of Qwen2Config
    tokens: int  # N
    visual_dim: int  # D
    qformer: dict[str, int] = field(default_factory=dict)  # where it differs from the published one


SIZES = {
    "real": Size(  # Qwen/Qwen2-1.5B and facebook/vjepa2-vitl-fpc64-256 at 32 frames
        lm={
            "vocab_size": 151936,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "max_position_embeddings": 131072,
        },
        tokens=4096,
        visual_dim=1024,
    ),
    "small": Size(
        lm={
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
        },
        tokens=64,
        visual_dim=32,
        qformer={"num_queries": 8},
    ),
}


class WordTokenizer:
    """A token for each word or mark, as many as Qwen2's tokenizer makes of plain English."""

    eos_token_id = pad_token_id = EOS

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        """As transformers' tokenizers are called; the ids have no meaning."""
        words = re.findall(r"\w+|[^\w\s]", text)
        return SimpleNamespace(input_ids=[1 + sum(word.encode()) % (self.vocabulary - 1) for word in words])

    def batch_decode(self, rows: Tensor, skip_special_tokens: bool = True) -> list[str]:
        """Words without meaning, too."""
        return [" ".join(f"word{token}" for token in row if token != EOS) for row in rows.tolist()]


def language_model(size: Size) -> nn.Module:
    """Qwen2 with made-up weights in float32; at real size 6 GB, in seconds (drawing them takes a minute)."""
    with no_init_weights():
        lm = Qwen2ForCausalLM(Qwen2Config(**size.lm, rope_theta=1e6, tie_word_embeddings=True, eos_token_id=EOS))
    numbers = 0.02 * torch.randn(1_000_003)  # a prime: no two rows of a matrix are alike
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1)  # norms; a bias of queries and keys moves their scores little
                continue
            flat = parameter.view(-1)
            for start in range(0, len(flat), len(numbers)):
                part = flat[start : start + len(numbers)]
                part.copy_(numbers[: len(part)])
    return lm


def qformers(size: Size, **changes: float) -> tuple[QFormer, TextbookQFormer]:
    """The product's Q-Former and the textbook's, with the same weights."""
    sizes = {"dim": size.lm["hidden_size"], "visual_dim": size.visual_dim, **size.qformer, **changes}
    torch.manual_seed(0)
    absorbed = QFormer(**sizes)
    textbook = TextbookQFormer(**sizes)
    textbook.load_state_dict(absorbed.state_dict())
    return absorbed, textbook


def captioner(size: Size) -> VideoCaptioner:
    """A captioner with made-up weights."""
    qformer, _ = qformers(size)
    return VideoCaptioner(language_model(size), WordTokenizer(size.lm["vocab_size"]), qformer)


def features(size: Size, batch: int) -> Tensor:
    """(B, N, D), of the scale that V-JEPA 2's last norm gives."""
    return torch.randn(batch, size.tokens, size.visual_dim)


def captions(count: int, tokens: int) -> list[str]:
    """Captions of so many tokens each."""
    return [" ".join(f"word{number}x{place}" for place in range(tokens)) for number in range(count)]
