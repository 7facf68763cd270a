"""The frozen language model: loading it, what it reads, and what it is asked to predict.

A row is [prefix | caption | pads]. The prefix (BOS, visual tokens, prompt) comes as embeddings; its last position
predicts the caption's first token, and the caption's last token predicts EOS. EOS is never an input, since nothing
follows it. Pads are on the right, where the causal mask hides them from all that counts: no other mask is needed.

Shapes: B clips, T texts, R rows (one a caption), P prefix positions, L tokens of the longest caption, V vocabulary,
C embedding width.
"""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from models import pretrained
from runtime.files import UserError
from runtime.progress import Progress

DEFAULT = "Qwen/Qwen2-1.5B"
PROMPT = "a video showing:"
IGNORED = -100  # the label that torch's cross entropy passes over
SCORED_NUMBERS = 64 * 2**20  # logits, keys and values at once when texts are scored: 256 MB in float32


def load(name: str, device: torch.device) -> tuple[nn.Module, Any]:
    """A decoder-only language model and its tokenizer, by hub name or local folder; bfloat16 on a GPU.

    Raises: UserError where there is no such model, or it cannot write behind embeddings.
    """
    name, role = pretrained.locate(name, "--llm"), ("the language model", "--llm")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokenizer = pretrained.load(AutoTokenizer.from_pretrained, name, *role)
    settings = {"dtype": dtype, "output_loading_info": True, "tqdm_class": Progress}
    lm, report = pretrained.load(AutoModelForCausalLM.from_pretrained, name, *role, **settings)
    if missing := report["missing_keys"]:  # transformers makes them up at random
        raise UserError(f"the language model {name!r} lacks {len(missing)} of its weights; download it again")
    lm = lm.to(device).eval()
    try:  # now, not after an epoch
        generate(lm, lm.get_input_embeddings().weight[None, :2], eos_id(tokenizer, lm), max_new_tokens=2, num_beams=1)
    except (ValueError, TypeError, AttributeError, IndexError, NotImplementedError):  # each model has its own way
        reason = f"{type(lm).__name__} does not generate from embeddings"
        raise UserError(f"the language model {name!r} cannot write captions ({reason}); choose another --llm") from None
    return lm, tokenizer


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The prompt's tokens, without the ones that a tokenizer adds by itself."""
    return tokenizer(prompt, add_special_tokens=False).input_ids


def caption_ids(tokenizer: Any, prompt: str, caption: str, space: bool = True) -> list[int]:
    """A caption's tokens as they follow the prompt, without EOS.

    With `space`, prompt and caption are tokenized as one text and the prompt's tokens cut off, so that the caption's
    first word gets the token it has in running text ("Ġmoving", "▁moving") whatever the tokenizer does at a text's
    start. Without, the caption is tokenized by itself, as the published code does.
    """
    caption = " ".join(caption.split())
    if not space:
        return prompt_ids(tokenizer, caption)
    before, whole = prompt_ids(tokenizer, prompt), prompt_ids(tokenizer, f"{prompt} {caption}")
    if whole[: len(before)] == before:
        return whole[len(before) :]
    return prompt_ids(tokenizer, f" {caption}")  # prompt and caption share a token


def bos_ids(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before every text by itself (Llama's BOS; nothing for Qwen2)."""
    plain, marked = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    return marked[: marked.index(plain[0])]


def eos_id(tokenizer: Any, lm: nn.Module) -> int:
    """The token that ends a caption: the tokenizer's EOS, or else the model's own. Raises: UserError without one."""
    for source in (tokenizer, lm.config, lm.generation_config):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return found[0] if isinstance(found, list) else found
    raise UserError("the language model has no EOS token: set eos_token in its tokenizer's configuration")


def build_inputs(captions: list[list[int]], eos_id: int) -> tuple[Tensor, Tensor]:
    """What the language model reads behind the prefix, and what it is to predict.

    Labels are masked by place, never by id, so that EOS is learnt although pads have its id too. That id is one
    that the model has an embedding for, which an added pad token's need not be.

    Returns:
        Token ids (R, L), and labels (R, L + 1): each caption's tokens and EOS. Label j is predicted at position
        P - 1 + j.
    """
    longest = max(map(len, captions), default=0)
    ids = [caption + [eos_id] * (longest - len(caption)) for caption in captions]
    labels = [[*caption, eos_id] + [IGNORED] * (longest - len(caption)) for caption in captions]
    shape = (len(captions), longest)
    return torch.tensor(ids, dtype=torch.long).view(shape), torch.tensor(labels, dtype=torch.long)


def mean_nll(lm: nn.Module, prefix: Tensor, ids: Tensor, labels: Tensor, cache: Any = None) -> Tensor:
    """Each row's mean negative log-likelihood over its labels: (R, P, C), (R, L) and (R, L + 1) -> (R,).

    `cache`: keys and values of what stands before `prefix`, where the model has read that.
    """
    inputs = torch.cat([prefix, lm.get_input_embeddings()(ids)], dim=1)  # (R, P + L, C)
    kept = torch.arange(prefix.shape[1] - 1, inputs.shape[1], device=inputs.device)
    if cache is None and set(getattr(lm.config, "layer_types", None) or ()) == {"full_attention"}:
        cache = DynamicCache()  # without one transformers asks the GPU, and waits, whether rows hold several texts
    arguments = {"inputs_embeds": inputs, "use_cache": cache is not None, "past_key_values": cache}
    if "logits_to_keep" in inspect.signature(lm.forward).parameters:
        # Positions that are picked by index stand together in memory, so that the head is one matrix product.
        logits = lm(**arguments, logits_to_keep=kept).logits
    else:
        logits = lm(**arguments).logits[:, kept]
    nll = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return nll.view(labels.shape).sum(dim=1) / (labels != IGNORED).sum(dim=1)


@torch.no_grad()
def log_likelihood(lm: nn.Module, prefix: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    """The mean log-likelihood of every text behind every prefix: (B, P, C), (T, L) and (T, L + 1) -> (B, T).

    All but a prefix's last position is read once where the model's key-value cache can be copied.
    """
    clips, vocabulary = len(prefix), lm.get_input_embeddings().num_embeddings
    cache = _key_value_cache(lm, prefix[:, :-1])
    cached = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) if cache else 0
    read_anew = prefix[:, -1:] if cache else prefix
    size = max(1, SCORED_NUMBERS // (clips * vocabulary * labels.shape[1] + cached))
    lengths = (labels != IGNORED).sum(dim=1)
    found = torch.empty(clips, len(ids), device=prefix.device)
    for block in lengths.argsort(stable=True).split(size):  # texts of like lengths
        longest = int(lengths[block].max())
        rows = [x[block].repeat(clips, 1) for x in (ids[:, : longest - 1], labels[:, :longest])]
        copied = copy.deepcopy(cache)
        if copied:
            copied.batch_repeat_interleave(len(block))
        nll = mean_nll(lm, read_anew.repeat_interleave(len(block), dim=0), *rows, copied)
        found[:, block] = -nll.unflatten(0, (clips, len(block)))
    return found


def _key_value_cache(lm: nn.Module, inputs: Tensor) -> DynamicCache | None:
    """Keys and values of embeddings (B, P, C); None where a model's cache holds anything else (recurrent state)."""
    cache = lm.base_model(inputs_embeds=inputs, use_cache=True).get("past_key_values")
    plain = isinstance(cache, DynamicCache) and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and layer.get_seq_length() == inputs.shape[1]
        for layer in cache.layers
    )
    return cache if plain else None


def generate(lm: nn.Module, prefix: Tensor, eos_id: int, max_new_tokens: int, num_beams: int) -> list[list[int]]:
    """Token ids behind each prefix (B, P, C), without EOS: greedy, or beam search, never sampled."""
    settings = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": False}
    # What it is not told generate() takes from here, where folders of instruct models ask for sampling and more.
    lm.generation_config = GenerationConfig(**settings, eos_token_id=eos_id, pad_token_id=eos_id)
    mask = torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device)
    tokens = lm.generate(inputs_embeds=prefix, attention_mask=mask).tolist()
    return [row[: row.index(eos_id)] if eos_id in row else row for row in tokens]
