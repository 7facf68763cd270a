"""The bridge that trains: a Q-Former, and the captioner that it makes of two frozen models.

Shapes: B clips, N patch tokens a clip, D their width, Q queries, C the language model's width, H heads,
P prefix positions, T texts.
"""

import contextlib
import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import runtime.threads  # noqa: F401  how torch's threads wait
import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin, snapshot_download
from torch import Tensor, nn
from torch.nn import functional as F

from features import cache
from models import card, checkpoint, pretrained
from models import language_model as language
from models.video_files import CaptionsFiles
from runtime import cli
from runtime.files import UserError
from runtime.progress import Progress

Device = str | torch.device | None  # None: a GPU where there is one
Captions = Sequence[str] | Sequence[Sequence[str]]  # one a clip, or a list for each
Attended = tuple[Tensor, Tensor]  # (B, Q, C), and each head's weights of the patch tokens (B, HQ, N) before dropout


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

    def forward(self, x: Tensor, features: Tensor, projection: nn.Linear, mask: Tensor | None = None) -> Attended:
        """Attend from (B, Q, C), or (1, Q, C) while all clips have the same queries, to (B, N, D) -> (B, Q, C).

        `projection` is the visual one, D -> C, absorbed here; `mask`, bool (B, N), is True for real patch tokens.
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
        weights = p = scores.softmax(-1)
        total = 1.0
        if self.training and self.dropout > 0:
            p = F.dropout(p, self.dropout)
            total = self._heads_first(p.sum(-1, keepdim=True))  # (H, BQ, 1)
        value = F.linear(self._heads_first(p @ features), projection.weight) + total * projection.bias  # (H, BQ, C)
        value = value @ w_v.unflatten(0, (heads, width)).mT + total * b_v.unflatten(0, (heads, 1, width))
        return self.out_proj(value.unflatten(1, (len(features), -1)).permute(1, 2, 0, 3).flatten(2)), weights

    def _heads_first(self, x: Tensor) -> Tensor:
        """(B, HQ, ...) -> (H, BQ, ...): a weight's gradient is one product, not one for each clip and their sum."""
        return x.unflatten(1, (self.num_heads, -1)).transpose(0, 1).flatten(1, 2)


class Block(nn.Module):
    """Self-attention and cross-attention (each normed after its sum), then an MLP (normed before)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int, dropout: float, mlp_dropout: float) -> None:
        super().__init__()
        self.self_attn = SelfAttention(dim, num_heads, dropout, batch_first=True)
        self.cross_attn = AbsorbedCrossAttention(dim, num_heads, dropout, batch_first=True)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        wide, narrow = nn.Linear(dim, mlp_ratio * dim), nn.Linear(mlp_ratio * dim, dim)
        self.mlp = nn.Sequential(wide, nn.GELU(), nn.Dropout(mlp_dropout), narrow, nn.Dropout(mlp_dropout))

    def forward(self, x: Tensor, features: Tensor, projection: nn.Linear, mask: Tensor | None) -> Attended:
        """(B, Q, C) or (1, Q, C) queries and (B, N, D) patch tokens to (B, Q, C), and the weights."""
        x = self.norm1(x + self.self_attn(x, len(features)))
        read, weights = self.cross_attn(x, features, projection, mask)
        x = self.norm2(x + read)
        return x + self.mlp(self.norm3(x)), weights


class QFormer(nn.Module):
    """Learned queries that read a clip's patch tokens (BLIP-2, arXiv 2301.12597, section 3.1, in its published size).

    With the defaults: 39,453,696 parameters, named as in the published checkpoints.
    """

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
        if dim % num_heads:
            raise UserError(f"the width {dim} does not divide by {num_heads} heads; choose another --num-heads")
        self.config = {"num_queries": num_queries, "dim": dim, "visual_dim": visual_dim, "num_heads": num_heads}
        self.config |= {"depth": depth, "mlp_ratio": mlp_ratio, "dropout": dropout, "mlp_dropout": mlp_dropout}
        self.query_tokens = nn.Parameter(torch.randn(1, num_queries, dim) * 0.02)
        self.visual_proj = nn.Linear(visual_dim, dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio, dropout, mlp_dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, D) patch tokens, and a bool mask (B, N) where lengths differ, to (B, Q, C) visual tokens."""
        return self.norm(self._read(features, mask)[0])

    def attention(self, features: Tensor) -> Tensor:
        """The last block's weights of the patch tokens, their mean over heads: (B, N, D) to (B, Q, N)."""
        return self._read(features, None)[1].unflatten(1, (self.config["num_heads"], -1)).mean(1)

    def _read(self, features: Tensor, mask: Tensor | None) -> Attended:
        if not torch.is_autocast_enabled(features.device.type):
            features = features.to(self.query_tokens.dtype)  # the cache may hold float16
        x = self.query_tokens  # (1, Q, C)
        for block in self.blocks:
            x, weights = block(x, features, self.visual_proj, mask)  # (B, Q, C), (B, HQ, N)
        return x, weights


class VideoCaptioner(
    nn.Module, CaptionsFiles, PyTorchModelHubMixin, library_name="vjepa2-video-captioning", tags=["video-captioning"]
):
    """A frozen language model that reads a Q-Former's visual tokens and writes captions (BLIP-2, second stage).

    Args:
        lm: any decoder-only language model of transformers; it is frozen here, and stays in eval mode.
        tokenizer: the language model's.
        qformer: the only part that trains; its `dim` is the language model's embedding width.
        prompt: the words between the visual tokens and the caption.
        config: where the models came from ("llm", "features"), and whether captions follow the prompt with a space
            ("caption_space"; not in published checkpoints). Checkpoints keep it.
    """

    def __init__(
        self, lm: nn.Module, tokenizer: Any, qformer: QFormer, prompt: str = language.PROMPT, config: dict | None = None
    ) -> None:
        super().__init__()
        self.lm, self.tokenizer, self.prompt = lm.eval().requires_grad_(False), tokenizer, prompt
        self.qformer = qformer.to(lm.device)
        self.config = {"llm": lm.name_or_path, "features": None, "caption_space": True, **(config or {})}
        self.config |= {"prompt": prompt, "qformer": qformer.config}
        self.config["llm_weights"] = pretrained.fingerprint(lm, torch.bfloat16)  # the same on a GPU and on a CPU
        self.eos_id = language.eos_id(tokenizer, lm)
        self.bos_ids, self.prompt_ids = language.bos_ids(tokenizer), language.prompt_ids(tokenizer, prompt)
        self.epoch, self.history, self.recipe = 0, [], {}  # of the training that made its checkpoint
        dim, width = qformer.config["dim"], lm.get_input_embeddings().embedding_dim
        if dim != width:
            raise UserError(f"the Q-Former is {dim} wide, the language model's embeddings {width}: use another --llm")
        if (room := self.max_caption_tokens) is not None and room < 1:
            reason = f"has too few positions: {self.prefix_length} stand before a caption"
            raise UserError(f"the language model {reason}; use fewer --num-queries, or another --llm")

    @property
    def device(self) -> torch.device:
        """Where the Q-Former is."""
        return self.qformer.query_tokens.device

    @property
    def prefix_length(self) -> int:
        """P, in positions: BOS, visual tokens, prompt."""
        return len(self.bos_ids) + self.qformer.config["num_queries"] + len(self.prompt_ids)

    @property
    def max_caption_tokens(self) -> int | None:
        """The longest caption that the language model has positions for, in tokens; None where there is no limit."""
        positions = getattr(self.lm.config, "max_position_embeddings", None)
        return None if positions is None else positions - self.prefix_length

    def train(self, mode: bool = True) -> "VideoCaptioner":
        """Set the Q-Former's mode; the language model stays in eval mode."""
        super().train(mode)
        self.lm.eval()
        return self

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda")

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        was_training = self.qformer.training
        self.qformer.eval()
        with torch.no_grad(), self._autocast():
            try:
                yield
            finally:
                self.qformer.train(was_training)

    def caption_ids(self, caption: str) -> list[int]:
        """A caption's token ids as the language model reads them behind the prompt, without EOS."""
        return language.caption_ids(self.tokenizer, self.prompt, caption, self.config["caption_space"])

    def _build_inputs(self, captions: Iterable[str]) -> tuple[Tensor, Tensor]:
        """`language_model.build_inputs`; captions are cut off where there are no more positions."""
        ids = [self.caption_ids(caption)[: self.max_caption_tokens] for caption in captions]
        inputs, labels = language.build_inputs(ids, self.eos_id)
        return self._send(inputs), self._send(labels)

    def _send(self, values: Any) -> Tensor:
        """Numbers on the device; this process does not wait until they are there."""
        return torch.as_tensor(values).to(self.device, non_blocking=True)

    def prefix(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """[BOS | visual tokens | prompt] as embeddings: (B, N, D) -> (B, P, C)."""
        visual = self.qformer(features, mask)  # (B, Q, C)
        ids = torch.tensor(self.bos_ids + self.prompt_ids, dtype=torch.long)
        text = self.lm.get_input_embeddings()(self._send(ids)).expand(len(visual), -1, -1)
        bos, prompt = text.tensor_split([len(self.bos_ids)], dim=1)
        return torch.cat([bos, visual.to(text.dtype), prompt], dim=1)

    def loss(
        self, features: Tensor, captions: Captions, weights: Sequence[float] | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The mean over captions of each caption's mean loss over its tokens and EOS, in nats a token: a scalar.

        `features`: (B, N, D); `captions`: one a clip, or a list for each; `weights`: one for each caption, in order
        (default: the mean); `mask`: bool (B, N), True for real patch tokens.
        """
        nll = self.per_caption_nll(features, captions, mask)
        return nll.mean() if weights is None else (nll * self._send(weights)).sum()

    def per_caption_nll(self, features: Tensor, captions: Captions, mask: Tensor | None = None) -> Tensor:
        """Each caption's own loss, in the captions' order: (all captions,); arguments as `loss`.

        A clip goes through the Q-Former once, however many captions it has.
        """
        rows = [[row] if isinstance(row, str) else row for row in captions]
        ids, labels = self._build_inputs(caption for row in rows for caption in row)
        with self._autocast():
            counts = self._send([len(row) for row in rows])
            prefix = self.prefix(features, mask).repeat_interleave(counts, dim=0, output_size=len(ids))
            return language.mean_nll(self.lm, prefix, ids, labels)

    def log_likelihood(self, features: Tensor, texts: Sequence[str]) -> Tensor:
        """How likely each text is as each clip's caption: (B, N, D) and T texts -> (B, T).

        The mean over a text's tokens and EOS of their log-likelihoods, in nats.
        """
        with self._inference():
            return language.log_likelihood(self.lm, self.prefix(features), *self._build_inputs(texts))

    def generate(self, features: Tensor, max_new_tokens: int = 50, num_beams: int = 1) -> list[str]:
        """Caption clips without sampling: greedy, or beam search; (B, N, D) -> B captions.

        The language model reads a clip's prefix once, then one token at a time; it stops when all captions ended.
        """
        most = min(max_new_tokens, self.max_caption_tokens or max_new_tokens)
        with self._inference():
            rows = language.generate(self.lm, self.prefix(features), self.eos_id, most, num_beams)
        return [" ".join(text.split()) for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]

    def attention(self, features: Tensor, grid: cache.Grid | None = None) -> Tensor:
        """Where each query looks in eval mode: (B, N, D) -> (B, Q, T', H', W'), a sum of 1 over a clip's patches.

        The last block's cross-attention, its mean over heads. `grid` (T', H', W'): the checkpoint's, unless given.
        Raises: files.UserError where the checkpoint knows none, or N tokens are of another.
        """
        grid = grid or cache.CacheConfig.from_dict(self.config["features"]).grid
        if math.prod(grid) != features.shape[1]:
            raise UserError(
                f"attention: {features.shape[1]} patch tokens a clip are no grid of {grid}; preprocess again"
            )
        with self._inference():
            return self.qformer.attention(features).unflatten(-1, grid)

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, device: Device = None, llm: str | None = None, encoder: str | None = None
    ) -> "VideoCaptioner":
        """Rebuild a captioner from a checkpoint file, or from a folder that `save_pretrained` wrote.

        `llm` and `encoder` replace the names that the checkpoint holds, for models that were moved.
        Raises: files.UserError where the checkpoint or the language model does not load, or they do not fit.
        """
        saved = checkpoint.read(path)
        if encoder and saved.config["features"]:
            saved.config["features"]["encoder"] = encoder
        device = torch.device(device or cli.device(None))
        lm, tokenizer = language.load(llm or saved.config["llm"], device)
        config = {**saved.config, "llm": lm.name_or_path}
        captioner = cls(lm, tokenizer, QFormer(**config["qformer"]), config["prompt"], config)
        captioner.restore(saved, path)
        return captioner.eval()

    def restore(self, saved: checkpoint.Checkpoint, path: str | Path) -> None:
        """Take over the weights, and the course of the training, that were read from `path`.

        Raises: files.UserError where they belong to another language model, are of another shape, or not finite.
        """
        llm, trained_with = self.config["llm"], saved.config.get("llm_weights")
        if trained_with and trained_with != self.config["llm_weights"]:
            raise UserError(f"{llm} is not the language model that {path} was trained with; give that one with --llm")
        if not trained_with:
            why = "does not say which language model it was trained with"
            pretrained.tell(f"note: {path} {why}: {llm} is taken for it")
        checkpoint.load_weights(self.qformer, saved.weights, path)
        self.epoch, self.history = saved.epoch, saved.progress.get("history", [])
        self.recipe = saved.progress.get("run", {})  # the flags of train.py

    def _save_pretrained(self, save_directory: Path) -> None:
        training = {"epoch": self.epoch, "history": self.history, "run": self.recipe}
        checkpoint.write_folder(save_directory, self.config | {"training": training}, self.qformer)

    def generate_model_card(self, *_: Any, **settings: Any) -> ModelCard:
        """The README.md that `save_pretrained` and `push_to_hub` write; `settings`: their `model_card_kwargs`."""
        return card.model_card(self, **settings)

    @classmethod
    def from_pretrained(cls, name: str | Path, **arguments: Any) -> "VideoCaptioner":
        """`from_checkpoint` for a folder of `save_pretrained`, or its name on the hub.

        Arguments: device, llm, encoder, and those of huggingface_hub.snapshot_download (revision, cache_dir, ...).
        Raises: TypeError for others.
        """
        models = {key: arguments.pop(key, None) for key in ("device", "llm", "encoder")}
        arguments["allow_patterns"] = ["config.json", "model.safetensors"]  # no code is fetched
        arguments.setdefault("tqdm_class", Progress)
        inspect.signature(snapshot_download).bind(name, **arguments)
        return cls.from_checkpoint(name if Path(name).exists() else snapshot_download(name, **arguments), **models)
