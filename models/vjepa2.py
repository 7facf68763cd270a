"""The frozen video encoder, V-JEPA 2 (arXiv 2506.09985): squares of frames to patch tokens.

transformers is imported where the encoder is loaded: worker processes that only decode start without it.

Letters: B clips, T frames, S pixels each way, N patch tokens a clip, D their width; the grid (T', H', W') has
N = T' * H' * W' tokens.
"""

import hashlib
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from features.cache import CacheConfig, Grid
from runtime.files import UserError
from video.reader import MEAN, STD, Transform

DEFAULT_ENCODER = "facebook/vjepa2-vitl-fpc64-256"
ROWS_ON_CPU = 2048  # tokens in a batch: more make no matrix product faster, and the last batch longer


class Stopped(Exception):
    """Another thread has no use any more for what was being encoded."""


class VideoEncoder:
    """A frozen V-JEPA 2: float16 on a GPU, float32 on a CPU, without its predictor."""

    def __init__(
        self,
        name: str | Path,
        device: torch.device | str = "cpu",
        frames: int = 32,
        crop: bool = False,
        size: int | None = None,
        transform: Transform | None = None,
    ) -> None:
        """Load `name`, on the hub or a local folder; `transform` replaces the one that its files describe.

        Raises: UserError where it does not load, is no V-JEPA 2, or does not fit `frames` or `size`.
        """
        self.name, self.device, self.frames = str(name), torch.device(device), frames
        self.dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        model, described = _load(self.name, self.dtype, size if transform is None else transform.size)
        self.transform = transform or Transform(described.size, crop, described.mean, described.std)
        config = model.config
        patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]
        if frames % config.tubelet_size:
            raise UserError(f"--frames {frames} is not a multiple of {config.tubelet_size}, this encoder's tubelet")
        if self.transform.size % patch:
            raise UserError(f"{self.transform.size} pixels are not a multiple of {patch}, this encoder's patch")
        side = self.transform.size // patch
        self.grid: Grid = (frames // config.tubelet_size, side, side)
        self.tokens, self.dim = self.grid[0] * side * side, config.hidden_size
        self.model = model.encoder.to(self.device).eval().requires_grad_(False)
        self.weights = _fingerprint(self.model)
        self.stop = threading.Event()  # set: ends what `encode` is at, between two layers, with Stopped
        if self.device.type != "cuda":  # a GPU is quick; and a hook would break up what it compiles
            for layer in self.model.layer:
                layer.register_forward_pre_hook(self._check_stop)
        self._batch = 0  # smaller batches are filled up to this one
        self._forward = self._normalize_and_encode

    @classmethod
    def from_config(
        cls, config: CacheConfig | Mapping[str, Any], device: torch.device | str = "cpu", name: str | Path | None = None
    ) -> "VideoEncoder":
        """The encoder that made a cache; `name` where it lies elsewhere by now.

        Raises: UserError where the encoder of that name has other weights than the cache was made with.
        """
        if not isinstance(config, CacheConfig):
            config = CacheConfig.from_dict(config)
        transform = Transform(config.size, config.crop, config.mean, config.std)
        encoder = cls(name or config.encoder, device, config.frames, transform=transform)
        if encoder.dim != config.dim or (config.weights and config.weights != encoder.weights):
            raise UserError(
                f"the encoder {encoder.name} is not the one that made the features; give its own with --encoder"
            )
        return encoder

    def cache_config(self, dtype: str = "float16", pool: int = 1) -> CacheConfig:
        """What features of this encoder are, kept as `dtype` after `pool`."""
        look = self.transform
        tokens = self.tokens // pool**2
        return CacheConfig(
            self.name,
            self.frames,
            look.size,
            look.crop,
            look.mean,
            look.std,
            dtype,
            pool,
            tokens,
            self.dim,
            self.weights,
        )

    @torch.no_grad()
    def encode(self, clips: Tensor) -> Tensor:
        """Patch tokens of clips: uint8 (B, T, 3, S, S) -> (B, N, D) on the encoder's device.

        Raises: UserError where a GPU cannot hold that many; Stopped where `stop` was set meanwhile.
        """
        count = len(clips)
        clips = clips.to(self.device, non_blocking=True)
        if count < self._batch:
            clips = torch.cat([clips, clips[-1:].expand(self._batch - count, *clips.shape[1:])])
        try:
            return self._forward(clips)[:count]
        except torch.OutOfMemoryError:
            raise UserError(
                f"the GPU has not the memory to encode {len(clips)} clips at once: lower --batch-size"
            ) from None

    def _check_stop(self, *_: object) -> None:
        if self.stop.is_set():
            raise Stopped

    def _normalize_and_encode(self, clips: Tensor) -> Tensor:
        mean = torch.tensor(self.transform.mean, device=self.device).view(3, 1, 1)
        std = torch.tensor(self.transform.std, device=self.device).view(3, 1, 1)
        pixels = ((clips.float() / 255 - mean) / std).to(self.dtype)
        return self.model(pixels).last_hidden_state

    def prepare(self, batch: int | None) -> int:
        """Make ready for many batches of one size: compile on a GPU. None: what fills it; few on a CPU."""
        if self.device.type != "cuda":
            batch = batch or max(1, min(16, ROWS_ON_CPU // self.tokens))
            # With few rows a matrix product's rounding depends on how many there are. Filled up, a clip's features do
            # not depend on which clips it meets, in a resumed run say; with many tokens the time would be felt.
            self._batch = batch if self.tokens < 1024 else 0
            return batch
        batch = batch or self._largest_batch()
        eager = self._forward
        try:
            self._forward = torch.compile(eager, dynamic=False)
            self._batch = batch  # the compiled encoder knows one shape
            self.encode(torch.zeros(batch, self.frames, 3, self.transform.size, self.transform.size, dtype=torch.uint8))
        except UserError:
            raise
        except Exception:  # a machine without a C compiler: slower, the same features
            self._forward, self._batch = eager, 0
        return batch

    def _largest_batch(self, most: int = 32) -> int:
        """By the memory that two clips take; past `most` a larger batch has nothing left to fill."""
        size = self.transform.size
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self.encode(torch.zeros(2, self.frames, 3, size, size, dtype=torch.uint8))
        clip = (torch.cuda.max_memory_allocated(self.device) - before) / 2
        free, _ = torch.cuda.mem_get_info(self.device)
        return max(1, min(most, int(0.8 * free / clip)))


def _load(name: str, dtype: torch.dtype, size: int | None) -> tuple[Any, Transform]:
    """The model, and the transform that its files describe."""
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # one line for each file of weights, however small
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        described = _described_transform(name, config)
        if config.model_type != "vjepa2":
            raise ValueError(f"it is a {config.model_type}, not a V-JEPA 2")
        if size is not None:
            described = Transform(size, False, described.mean, described.std)
        config.crop_size = described.size  # what the rotary positions are counted by
        model, loading = AutoModel.from_pretrained(
            name, config=config, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
        )
        missing = [key for key in loading["missing_keys"] if key.startswith("encoder.")]
        if missing:
            raise ValueError(f"{len(missing)} of its weights are missing, {missing[0]} first")
    # Damaged folders fail in each library's own way (safetensors, JSON, strict configs, shapes)
    except Exception as error:
        if isinstance(error, MemoryError):
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"the encoder {name!r} does not load ({reason}); give a hub name or a local folder") from None
    finally:
        logging.enable_progress_bar()
    return model, described


def _described_transform(name: str, config: Any) -> Transform:
    """Size, mean and std as the checkpoint's preprocessor file has them; the model's crop and ImageNet's else."""
    from transformers.utils import cached_file

    described: dict[str, Any] = {}
    for file in ("preprocessor_config.json", "video_preprocessor_config.json"):
        path = cached_file(
            name,
            file,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if path:
            described |= json.loads(Path(path).read_text(encoding="utf-8"))
    crop = described.get("crop_size") or config.crop_size
    size = int(crop["height"] if isinstance(crop, dict) else crop)
    mean, std = (
        tuple(map(float, described.get(key) or usual)) for key, usual in (("image_mean", MEAN), ("image_std", STD))
    )
    return Transform(size, False, mean, std)


def _fingerprint(model: torch.nn.Module) -> str:
    """A name for the weights, whatever folder they are in: 16 hex digits of a hash of some numbers of each tensor.

    In float16, so that an encoder is the same one on a GPU and on a CPU.
    """
    parts = [
        p.detach().flatten()[:: max(1, p.numel() // 256)][:256].half() for _, p in sorted(model.named_parameters())
    ]
    return hashlib.sha256(torch.cat(parts).cpu().numpy().tobytes()).hexdigest()[:16]
