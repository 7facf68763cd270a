"""The bridge that trains: a Q-Former, and the captioner that it makes of two frozen models.

Shapes: B clips, N patch tokens a clip, D their width, Q queries, C the language model's width, H heads,
P prefix positions, L caption tokens, V vocabulary, T texts.
"""

import contextlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig

from models import checkpoint
from models import language_model as language
from models.attention import AbsorbedCrossAttention, SelfAttention
from runtime.files import UserError

SCORED_LOGITS = 64 * 2**20  # logits made at once when texts are scored: 256 MB in float32


class Block(nn.Module):
    """Self-attention and cross-attention (each normed after its sum), then an MLP (normed before)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int, dropout: float, mlp_dropout: float) -> None:
        super().__init__()
        self.self_attn = SelfAttention(dim, num_heads, dropout, batch_first=True)
        self.cross_attn = AbsorbedCrossAttention(dim, num_heads, dropout, batch_first=True)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp_ratio * dim),
            nn.GELU(),
            nn.Dropout(mlp_dropout),
            nn.Linear(mlp_ratio * dim, dim),
            nn.Dropout(mlp_dropout),
        )

    def forward(self, x: Tensor, features: Tensor, projection: nn.Linear, mask: Tensor | None) -> Tensor:
        """(B, Q, C) or (1, Q, C) queries and (B, N, D) patch tokens to (B, Q, C)."""
        x = self.norm1(x + self.self_attn(x, len(features)))
        x = self.norm2(x + self.cross_attn(x, features, projection, mask))
        return x + self.mlp(self.norm3(x))


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
            raise ValueError(f"the width {dim} does not divide by {num_heads} heads")
        self.config = {
            "num_queries": num_queries,
            "dim": dim,
            "visual_dim": visual_dim,
            "num_heads": num_heads,
            "depth": depth,
            "mlp_ratio": mlp_ratio,
            "dropout": dropout,
            "mlp_dropout": mlp_dropout,
        }
        self.query_tokens = nn.Parameter(torch.randn(1, num_queries, dim) * 0.02)
        self.visual_proj = nn.Linear(visual_dim, dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio, dropout, mlp_dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, D) patch tokens, and a bool mask (B, N) where lengths differ, to (B, Q, C) visual tokens."""
        if not torch.is_autocast_enabled(features.device.type):
            features = features.to(self.query_tokens.dtype)  # as the cache keeps them they may be float16
        x = self.query_tokens  # (1, Q, C)
        for block in self.blocks:
            x = block(x, features, self.visual_proj, mask)  # (B, Q, C)
        return self.norm(x)


class VideoCaptioner(
    nn.Module, PyTorchModelHubMixin, library_name="vjepa2-video-captioning", tags=["video-captioning"]
):
    """A frozen language model that reads a Q-Former's visual tokens and writes captions (BLIP-2, second stage).

    Args:
        lm: any decoder-only language model of transformers; it is frozen here, and stays in eval mode.
        tokenizer: the language model's.
        qformer: the only part that trains; its `dim` is the language model's embedding width.
        prompt: the words between the visual tokens and the caption.
        config: where the models came from: "llm" (a name or folder) and "features" (what made the features).
    """

    def __init__(
        self, lm: nn.Module, tokenizer: Any, qformer: QFormer, prompt: str = language.PROMPT, config: dict | None = None
    ) -> None:
        super().__init__()
        self.lm = lm.eval().requires_grad_(False)
        self.tokenizer, self.qformer, self.prompt = tokenizer, qformer, prompt
        self.config = {"llm": None, "features": None, **(config or {}), "prompt": prompt, "qformer": qformer.config}
        self.eos_id = language.eos_id(tokenizer, lm)
        self.pad_id = self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.lead = language.leading_ids(tokenizer)
        self.text = language.prompt_ids(tokenizer, prompt)
        width = lm.get_input_embeddings().embedding_dim
        if qformer.config["dim"] != width:
            raise ValueError(f"the Q-Former is {qformer.config['dim']} wide, the language model's embeddings {width}")
        if (head := lm.get_output_embeddings()) is not None:
            head.register_forward_pre_hook(language.as_one_matrix)
        # A shared prefix needs positions that can restart; ALiBi and recurrent models have none to set.
        takes_positions = "position_ids" in inspect.signature(lm.forward).parameters
        self.shares_prefix = takes_positions and not getattr(lm.config, "alibi", False)
        self.epoch, self.history = 0, []  # of the training that made its checkpoint
        self._encoder = None

    @property
    def device(self) -> torch.device:
        """Where the Q-Former is."""
        return self.qformer.query_tokens.device

    @property
    def prefix_length(self) -> int:
        """P, in positions: leading tokens, visual tokens, prompt."""
        return len(self.lead) + self.qformer.config["num_queries"] + len(self.text)

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

    def caption_ids(self, caption: str) -> list[int]:
        """A caption's token ids as the language model reads them behind the prompt, without EOS."""
        return language.caption_ids(self.tokenizer, self.prompt, caption)

    def _ids_that_fit(self, caption: str) -> list[int]:
        """Its token ids, cut off where the language model has no more positions."""
        return self.caption_ids(caption)[: self.max_caption_tokens]

    def _autocast(self) -> contextlib.AbstractContextManager:
        on_gpu = self.device.type == "cuda"
        return torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext()

    def _embed(self, ids: list[int], batch: int) -> Tensor:
        embedded = self.lm.get_input_embeddings()(torch.tensor(ids, dtype=torch.long, device=self.device))
        return embedded.expand(batch, -1, -1)

    def prefix(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """[leading tokens | visual tokens | prompt] as embeddings: (B, N, D) -> (B, P, C)."""
        visual = self.qformer(features, mask)  # (B, Q, C)
        text = self._embed(self.text, len(visual))
        return torch.cat([self._embed(self.lead, len(visual)), visual.to(text.dtype), text], dim=1)

    def loss(
        self,
        features: Tensor,
        captions: Sequence[str] | Sequence[Sequence[str]],
        weights: Sequence[float] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """How badly the language model predicts the captions, in nats a token.

        Args:
            features: (B, N, D).
            captions: one caption a clip, or a list of captions for each clip.
            weights: one for each caption, in order; default 1 / (number of captions), the mean.
            mask: bool (B, N), True for real patch tokens.

        Returns:
            A scalar: the mean over captions of each caption's mean over its tokens and EOS.
        """
        nll = self.losses(features, captions, mask)
        if weights is None:
            return nll.mean()
        return (nll * torch.tensor(weights, device=nll.device)).sum()

    forward = loss  # so that DistributedDataParallel can wrap the captioner

    def losses(
        self, features: Tensor, captions: Sequence[str] | Sequence[Sequence[str]], mask: Tensor | None = None
    ) -> Tensor:
        """Each caption's own loss, in the captions' order: (all captions,); arguments as `loss`."""
        rows = [[row] if isinstance(row, str) else row for row in captions]
        ids = [[self._ids_that_fit(caption) for caption in row] for row in rows]
        with self._autocast():
            return self._caption_nll(self.prefix(features, mask), ids)

    def _caption_nll(self, prefix: Tensor, rows: list[list[list[int]]]) -> Tensor:
        """Each caption's mean negative log-likelihood: B rows of token ids -> (all captions,)."""
        if not self.shares_prefix and any(len(row) > 1 for row in rows):
            prefix = prefix.repeat_interleave(torch.tensor([len(row) for row in rows], device=prefix.device), dim=0)
            rows = [[caption] for row in rows for caption in row]
        packed = language.pack_captions(rows, self.eos_id, self.pad_id).to(prefix.device)
        inputs = torch.cat([prefix, self.lm.get_input_embeddings()(packed.input_ids)], dim=1)  # (B, P + L, C)
        # Nothing that counts comes after a pad on the right: one caption a row needs no mask but the causal one.
        extra = self._block_arguments(packed, prefix) if any(len(row) > 1 for row in rows) else {}
        kept = packed.input_ids.shape[1] + 1
        with language.activations_made_again(), language.last_mlp_for(self.lm, kept):
            logits = self.lm(inputs_embeds=inputs, use_cache=False, logits_to_keep=kept, **extra).logits
        return _mean_nll(logits[:, -kept:], packed, sum(map(len, rows)))  # logits: (B, L + 1, V)

    def _block_arguments(
        self, packed: language.PackedCaptions, prefix: Tensor, cached: bool = False
    ) -> dict[str, Tensor]:
        """Mask and positions of captions that share a prefix; with `cached`, for the caption tokens alone."""
        length = prefix.shape[1]
        allowed = language.block_mask(packed.segments, length)  # (B, L, P + L)
        positions = length + packed.offsets  # (B, L)
        if not cached:
            before = torch.arange(length, device=prefix.device)
            causal = F.pad((before[:, None] >= before).expand(len(allowed), -1, -1), (0, allowed.shape[1]))
            allowed = torch.cat([causal, allowed], dim=1)  # (B, P + L, P + L)
            positions = torch.cat([before.expand(len(positions), -1), positions], dim=1)
        mask = allowed[:, None]  # (B, 1, positions, columns)
        if self.lm.config._attn_implementation != "sdpa":  # the others add the mask: they cannot read bools
            mask = torch.zeros_like(mask, dtype=prefix.dtype).masked_fill(~mask, torch.finfo(prefix.dtype).min)
        return {"attention_mask": mask, "position_ids": positions}

    @torch.no_grad()
    def generate(self, features: Tensor, max_new_tokens: int = 50, num_beams: int = 1) -> list[str]:
        """Caption clips without sampling: greedy, or beam search; (B, N, D) -> B captions.

        The language model reads a clip's prefix once, then one token at a time; it stops when all captions ended.
        """
        room = self.max_caption_tokens
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens if room is None else min(max_new_tokens, room),
            num_beams=num_beams,
            do_sample=False,
            eos_token_id=self.eos_id,
            pad_token_id=self.pad_id,
        )
        with self._in_eval(), self._autocast():
            prefix = self.prefix(features)
            seen = torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device)
            tokens = self.lm.generate(inputs_embeds=prefix, attention_mask=seen, generation_config=settings)
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    @torch.no_grad()
    def score(self, features: Tensor, texts: Sequence[str]) -> Tensor:
        """How likely each text is as each clip's caption: (B, N, D) and T texts -> (B, T).

        Mean log-likelihood, in nats a token, of a text's tokens and EOS. A clip's prefix is read once; the texts
        follow in blocks over its key-value cache.
        """
        ids = [self._ids_that_fit(text) for text in texts]
        with self._in_eval(), self._autocast():
            prefix = self.prefix(features)
            if not self.shares_prefix:
                nll = [self._caption_nll(prefix, [[text]] * len(prefix)) for text in ids]
                return -torch.stack(nll, dim=1)
            first = self.lm(inputs_embeds=prefix, use_cache=True, logits_to_keep=1)
            nll = [self._cached_nll(prefix, first, block) for block in self._blocks(ids, len(prefix))]
        return -torch.cat(nll, dim=1)

    def _blocks(self, ids: list[list[int]], batch: int) -> list[list[list[int]]]:
        """Split texts into blocks whose logits fit the budget."""
        room = max(1, SCORED_LOGITS // (batch * self.lm.config.vocab_size))
        blocks, used = [[]], 0
        for text in ids:
            if blocks[-1] and used + len(text) > room:
                blocks.append([])
                used = 0
            blocks[-1].append(text)
            used += len(text)
        return blocks

    def _cached_nll(self, prefix: Tensor, first: Any, block: list[list[int]]) -> Tensor:
        """Mean negative log-likelihood (B, T) of texts behind a prefix that is already in the cache."""
        packed = language.pack_captions([block], self.eos_id, self.pad_id).to(prefix.device)
        packed = language.PackedCaptions(*(tensor.expand(len(prefix), -1) for tensor in packed))
        extra = self._block_arguments(packed, prefix, cached=True)
        inputs = self.lm.get_input_embeddings()(packed.input_ids)  # (B, L, C)
        cache = first.past_key_values
        logits = self.lm(inputs_embeds=inputs, past_key_values=cache, use_cache=True, **extra).logits  # (B, L, V)
        cache.crop(-inputs.shape[1])
        logits = torch.cat([first.logits[:, -1:], logits], dim=1)
        rows = torch.arange(len(prefix), device=prefix.device)[:, None] * len(block)
        packed = packed._replace(captions=packed.captions + rows)
        return _mean_nll(logits, packed, len(prefix) * len(block)).unflatten(0, (len(prefix), len(block)))

    @contextlib.contextmanager
    def _in_eval(self):
        was_training = self.qformer.training
        self.qformer.eval()
        try:
            yield
        finally:
            self.qformer.train(was_training)

    @property
    def encoder(self) -> Any:
        """The frozen V-JEPA 2 that made the features this Q-Former was trained on; loaded when first asked for."""
        if self._encoder is None:
            from models.vjepa2 import VideoEncoder  # decord and V-JEPA 2 are only needed where videos are

            self._encoder = VideoEncoder.from_config(self.config["features"], self.device)
        return self._encoder

    @torch.no_grad()
    def encode(self, clips: Tensor) -> Tensor:
        """Frames to features as training saw them, cache precision included: uint8 (B, F, 3, S, S) -> (B, N, D)."""
        from features import cache

        made = cache.CacheConfig.from_dict(self.config["features"])
        tokens = self.encoder.encode(clips)  # (B, N, D)
        packed = [cache.quantize(clip, made.dtype, made.pool, self.encoder.grid) for clip in tokens]
        return torch.cat([cache.dequantize(clip, self.device) for clip in packed])

    def caption(
        self, paths: str | Path | Sequence[str | Path], batch_size: int = 8, max_new_tokens: int = 50
    ) -> list[str]:
        """Caption video files, one or several. Raises frames.VideoError, naming the one that cannot be decoded."""
        from video.reader import VideoError, read_clip

        def read(path: str | Path) -> Tensor:
            try:
                return read_clip(path, self.encoder.frames, self.encoder.transform)  # (T, 3, S, S)
            except VideoError as error:
                raise VideoError(f"{path}: {error}") from None

        paths = [paths] if isinstance(paths, str | Path) else list(paths)
        captions = []
        for start in range(0, len(paths), batch_size):
            clips = torch.stack([read(path) for path in paths[start : start + batch_size]])
            captions += self.generate(self.encode(clips), max_new_tokens)
        return captions

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        llm: str | None = None,
        encoder: str | None = None,
    ) -> "VideoCaptioner":
        """Rebuild a captioner from a checkpoint file, or from a folder that `save_pretrained` wrote.

        `llm` and `encoder` replace the names that the checkpoint holds, for models that were moved.
        Raises: files.UserError where the checkpoint or the language model does not load, or they do not fit.
        """
        saved = checkpoint.read(path)
        config = {**saved.config, "llm": llm or saved.config["llm"]}
        if encoder and config["features"]:
            config["features"] = {**config["features"], "encoder": encoder}
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        lm, tokenizer = language.load(config["llm"], device)
        try:
            qformer = QFormer(**config["qformer"])
            captioner = cls(lm, tokenizer, qformer, config["prompt"], config)
        except (ValueError, TypeError) as error:  # TypeError: a prompt that is no text for a tokenizer
            raise UserError(f"{path} does not fit the language model {config['llm']}: {error}") from None
        if captioner.max_caption_tokens is not None and captioner.max_caption_tokens < 1:
            raise UserError(f"{path} does not fit the language model {config['llm']}: it has too few positions")
        checkpoint.load_weights(qformer, saved.weights, path)
        qformer.to(device)
        captioner.epoch, captioner.history = saved.epoch, saved.progress.get("history", [])
        return captioner.eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        checkpoint.write_folder(save_directory, self.config, self.qformer)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **arguments: Any) -> "VideoCaptioner":
        replaced = {key: arguments.pop(key, None) for key in ("device", "llm", "encoder")}
        return cls.from_checkpoint(checkpoint.fetch_folder(model_id, **arguments), **replaced)


def _mean_nll(logits: Tensor, packed: language.PackedCaptions, count: int) -> Tensor:
    """Mean negative log-likelihood of each of `count` captions: logits (B, L + 1, V) -> (count,)."""
    wanted = packed.labels != language.IGNORED
    if count == len(logits):  # one caption a row: labels and logits lie side by side, and no logit is copied
        logits, labels, caption = logits.flatten(0, 1), packed.labels.flatten(), packed.captions.flatten()
    else:
        row, column = wanted.nonzero(as_tuple=True)
        logits = logits[row, packed.sources[row, column]]  # (predicted tokens, V)
        labels, caption = packed.labels[row, column], packed.captions[row, column]
    nll = F.cross_entropy(logits.float(), labels, ignore_index=language.IGNORED, reduction="none")
    total = torch.zeros(count, device=nll.device).index_add(0, caption, nll)
    return total / torch.bincount(packed.captions[wanted], minlength=count)
