"""Tiny models and data sets for the tests, all built from configs: nothing is downloaded."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    VJEPA2Config,
    VJEPA2Model,
)

from features import cache
from qformer import QFormer, VideoCaptioner

CAPTIONS = [
    "moving a red ball up",
    "moving a red ball down",
    "covering a cup with paper",
    "picking a spoon up",
    "dropping a pen onto a book",
    "pretending to pick a spoon up",
]
TEMPLATES = {
    "Moving [something] up": "0",
    "Moving [something] down": "1",
    "Covering [something] with [something]": "2",
    "Picking [something] up": "3",
    "Dropping [something] onto [something]": "4",
    "Pretending to pick [something] up": "5",
}
EOS = "<|endoftext|>"


def tiny_tokenizer(pad: str | None = EOS, eos: str = EOS, bos: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE as Qwen2's and GPT-2's; with `bos`, it puts that before every text as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = list(dict.fromkeys(token for token in (eos, pad, bos) if token))
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["a video showing: " + caption for caption in CAPTIONS], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    names = {"eos_token": eos, "pad_token": pad, "bos_token": bos}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{name: token for name, token in names.items() if token}
    )


def tiny_lm(kind: str = "qwen2", tie: bool = True, seed: int = 0, positions: int = 256) -> torch.nn.Module:
    """A random decoder-only language model of 32 dimensions and 2 layers."""
    sizes = {"vocab_size": 384, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": tie}
    rotary = {**common, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": positions}
    config = {
        "qwen2": lambda: Qwen2Config(**sizes, **rotary),
        "qwen3": lambda: Qwen3Config(**sizes, **rotary, head_dim=8),
        "llama": lambda: LlamaConfig(**sizes, **rotary),
        "gpt2": lambda: GPT2Config(**sizes, n_embd=32, n_layer=2, n_head=4, n_positions=positions),
        "opt": lambda: OPTConfig(
            **sizes, **common, ffn_dim=64, max_position_embeddings=positions, word_embed_proj_dim=32
        ),
        "bloom": lambda: BloomConfig(**sizes, hidden_size=32, n_layer=2, n_head=4),
    }[kind]()
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # random models of the default range predict all tokens alike
        for parameter in lm.parameters():
            parameter.mul_(4) if parameter.dim() > 1 else None
    return lm


def tiny_qformer(seed: int = 0, dropout: float = 0.0, **changes) -> QFormer:
    """4 queries, 32 wide, for features of 16."""
    torch.manual_seed(seed)
    sizes = {"num_queries": 4, "dim": 32, "visual_dim": 16, "num_heads": 4, "depth": 1, **changes}
    return QFormer(**sizes, dropout=dropout, mlp_dropout=dropout)


def tiny_captioner(kind: str = "qwen2", **changes) -> VideoCaptioner:
    return VideoCaptioner(tiny_lm(kind), tiny_tokenizer(), tiny_qformer(**changes))


def save_lm(folder: Path, kind: str = "qwen2", **changes) -> Path:
    """A language model and its tokenizer as a local folder, the form that --llm takes."""
    tiny_lm(kind, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_encoder(folder: Path, seed: int = 0, dim: int = 16) -> Path:
    """A random V-JEPA 2 as a local folder: 2 layers, 32 x 32 pixels, patches of 8, 4 x 4 tokens for 2 of 4 frames."""
    torch.manual_seed(seed)
    sizes = {"crop_size": 32, "patch_size": 8, "tubelet_size": 2, "frames_per_clip": 4}
    layers = {"hidden_size": dim, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    predictor = {"pred_hidden_size": 12, "pred_num_hidden_layers": 1, "pred_num_attention_heads": 2}
    VJEPA2Model(VJEPA2Config(**sizes, **layers, **predictor, pred_num_mask_tokens=1)).save_pretrained(folder)
    return folder


def features_config(encoder: str = "tiny-encoder", tokens: int = 6, dim: int = 16) -> cache.CacheConfig:
    return cache.CacheConfig(
        encoder=encoder,
        frames=4,
        size=32,
        crop=False,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        dtype="float16",
        pool=1,
        tokens=tokens,
        dim=dim,
    )


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fill_cache(
    folder: Path, count: int, dtype: str = "float16", shape: tuple[int, int] = (16, 8)
) -> dict[str, cache.Packed]:
    """Features of clips "0", "1", ... in `folder`."""
    clips = {str(i): cache.quantize(tokens(*shape, seed=i), dtype) for i in range(count)}
    for name, clip in clips.items():
        cache.save(folder / f"{name}.pt", clip)
    return clips


def make_dataset(data: Path, train: int = 10, validation: int = 5, features: bool = True, seed: int = 0) -> Path:
    """A prepared dataset with random features: labels, caption lists and cache, without videos."""
    (data / "labels").mkdir(parents=True)
    (data / "annotations").mkdir()
    (data / "labels" / "labels.json").write_text(json.dumps(TEMPLATES))
    templates = list(TEMPLATES)
    objects = [["a red ball"], ["a red ball"], ["a cup", "paper"], ["a spoon"], ["a pen", "a book"], ["a spoon"]]
    generator = torch.Generator().manual_seed(seed)
    first = 1
    for split, name, count in (("train", "train", train), ("validation", "val", validation)):
        records, labels = [], []
        for clip in range(first, first + count):
            kind = clip % len(CAPTIONS)
            texts = [CAPTIONS[kind], CAPTIONS[kind] + " slowly", "someone " + CAPTIONS[kind]]
            known = {"template": templates[kind], "placeholders": objects[kind]}
            records.append({"id": str(clip), "label": texts if split == "train" else texts[:1], **known})
            labels.append({"id": str(clip), "label": texts[0], **known})
            if features:
                values = torch.randn(6, 16, generator=generator).half()
                cache.save(data / "features" / split / f"{clip}.pt", cache.Packed(values, None))
        first += count
        (data / "annotations" / f"{name}_ready.json").write_text(json.dumps(records))
        (data / "labels" / f"{split}.json").write_text(json.dumps(labels))
    if features:
        (data / "features" / "config.json").write_text(json.dumps(features_config().to_dict()))
    return data
