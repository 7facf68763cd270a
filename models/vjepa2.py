"""The frozen video encoder, V-JEPA 2 (arXiv 2506.09985): squares of frames to patch tokens.

transformers is imported where the encoder is loaded: worker processes that only decode start without it.

Letters: B clips, T frames, S pixels each way, N patch tokens a clip, D their width; the grid (T', H', W') has
N = T' * H' * W' tokens.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from subprocess import SubprocessError
from typing import Any

import torch
from torch import Tensor

from features.cache import CacheConfig, Grid
from models import pretrained
from runtime.files import UserError
from runtime.progress import Progress
from video.reader import MEAN, STD, Transform

DEFAULT_ENCODER = "facebook/vjepa2-vitl-fpc64-256"
# In a batch: on a CPU more make no matrix product faster; on a GPU 16 clips of the default encoder.
TOKENS_ON_CPU, TOKENS_ON_GPU = 2048, 65536


class VideoEncoder:
    """A frozen V-JEPA 2: float16 on a GPU, float32 on a CPU, without its predictor."""

    def __init__(
        self,
        name: str | Path,
        device: torch.device | str = "cpu",
        frames: int = 32,
        crop: bool = False,
        transform: Transform | None = None,
    ) -> None:
        """Load `name`, of the hub or a local folder; `transform` replaces the one that its files describe.

        Raises: UserError where it does not load, is no V-JEPA 2, or does not fit `frames` or the size.
        """
        self.name, self.device = pretrained.locate(str(name), "--encoder"), torch.device(device)
        self.dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        model, described = _load(self.name, self.dtype, transform)
        self.frames, self.transform = frames, transform or replace(described, crop=crop)
        pixels, patch, tubelet = self.transform.size, model.config.patch_size, model.config.tubelet_size
        if frames % tubelet:
            raise UserError(f"--frames {frames} is not a multiple of {tubelet}, this encoder's tubelet")
        if pixels % patch:
            raise UserError(f"{pixels} pixels are not a multiple of {patch}, this encoder's patch")
        self.grid: Grid = (frames // tubelet, pixels // patch, pixels // patch)
        self.tokens, self.dim = math.prod(self.grid), model.config.hidden_size
        self.model = model.encoder.to(self.device).eval().requires_grad_(False)
        self.weights = pretrained.fingerprint(self.model, torch.float16)  # the same on a GPU and on a CPU
        # Smaller batches are padded to this size. A compiled encoder knows one shape; and a clip's features are bitwise
        # the same in any batch, although a CPU's rounding depends on a matrix product's number of rows.
        self._batch = 0
        self._forward = self._normalize_and_encode

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None, device: torch.device | str = "cpu") -> "VideoEncoder":
        """The encoder that made a cache, whose config says so. Raises: UserError where it does not, or is another."""
        made = CacheConfig.from_dict(config)
        transform = Transform(made.size, made.crop, made.mean, made.std)
        encoder = cls(made.encoder, device, made.frames, transform=transform)
        if encoder.dim != made.dim or (made.weights and made.weights != encoder.weights):
            raise UserError(f"the encoder {encoder.name} is not the one that made the features; give that --encoder")
        return encoder

    def cache_config(self, dtype: str = "float16", pool: int = 1) -> CacheConfig:
        """What features of this encoder are, kept as `dtype` after `pool`."""
        look = (self.transform.size, self.transform.crop, self.transform.mean, self.transform.std)
        size, tubelet = (self.tokens // pool**2, self.dim), self.frames // self.grid[0]
        return CacheConfig(self.name, self.frames, *look, dtype, pool, *size, self.weights, tubelet)

    @torch.no_grad()
    def encode(self, clips: Tensor) -> Tensor:
        """Patch tokens of clips: uint8 (B, T, 3, S, S) -> (B, N, D). Raises: UserError where the GPU is too small."""
        count = len(clips)
        clips = clips.to(self.device, non_blocking=True)
        if count < self._batch:
            clips = torch.cat([clips, clips[-1:].expand(self._batch - count, *clips.shape[1:])])
        try:
            return self._forward(clips)[:count]
        except torch.OutOfMemoryError:
            raise UserError(f"the GPU cannot hold {len(clips)} clips at once: lower --batch-size") from None

    def _normalize_and_encode(self, clips: Tensor) -> Tensor:
        look = torch.tensor([self.transform.mean, self.transform.std], device=self.device)  # (2, 3)
        mean, std = look.view(2, 3, 1, 1)
        return self.model(((clips.float() / 255 - mean) / std).to(self.dtype)).last_hidden_state

    def prepare(self, batch: int | None) -> int:
        """Make ready for many batches of one size (None: chosen here), and return it; on a GPU, compile."""
        on_gpu = self.device.type == "cuda"
        self._batch = batch or max(1, min(16, (TOKENS_ON_GPU if on_gpu else TOKENS_ON_CPU) // self.tokens))
        if on_gpu:
            eager, size = self._forward, self.transform.size
            try:
                self._forward = torch.compile(eager, dynamic=False)
                self.encode(torch.zeros(1, self.frames, 3, size, size, dtype=torch.uint8))
            except (RuntimeError, OSError, ImportError, SubprocessError):  # no C compiler, say: the same, but slower
                self._forward = eager
        return self._batch


def _load(name: str, dtype: torch.dtype, look: Transform | None) -> tuple[Any, Transform]:
    """The model for frames like `look`, and the transform that its files describe."""
    from transformers import AutoConfig, AutoModel

    role = ("the encoder", "--encoder")
    config = pretrained.load(AutoConfig.from_pretrained, name, *role)
    if config.model_type != "vjepa2":
        raise UserError(f"the encoder {name!r} does not load: it is a {config.model_type}, not a V-JEPA 2")
    look = look or _described_transform(name, config.crop_size)
    config.crop_size = look.size  # what the rotary positions are counted by
    settings = {"config": config, "dtype": dtype, "attn_implementation": "sdpa", "output_loading_info": True}
    model, report = pretrained.load(AutoModel.from_pretrained, name, *role, **settings, tqdm_class=Progress)
    if missing := [key for key in report["missing_keys"] if key.startswith("encoder.")]:
        raise UserError(f"the encoder {name!r} does not load: it lacks {len(missing)} of its weights")
    return model, look


def _described_transform(name: str, size: int) -> Transform:
    """Size, mean and std as the model's preprocessor file has them, or else `size` and ImageNet's."""
    from transformers.video_processing_utils import BaseVideoProcessor

    try:
        described, _ = BaseVideoProcessor.get_video_processor_dict(name)
    except OSError:  # there is no such file
        described = {}
    crop = described.get("crop_size", size)
    size = crop["height"] if isinstance(crop, dict) else crop
    return Transform(size, False, tuple(described.get("image_mean", MEAN)), tuple(described.get("image_std", STD)))
