"""The frozen video encoder, V-JEPA 2 (arXiv 2506.09985): squares of frames to patch tokens.

transformers is imported where the encoder is loaded: worker processes that only decode start without it.

Letters: B clips, T frames, S pixels each way, N patch tokens a clip, D their width; the grid (T', H', W') has
N = T' * H' * W' tokens.
"""

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from features.cache import CacheConfig, Grid
from models import pretrained
from runtime import files
from runtime.files import UserError
from video.reader import MEAN, STD, Transform

DEFAULT_ENCODER = "facebook/vjepa2-vitl-fpc64-256"
TOKENS_ON_CPU = 2048  # in a batch: more make no matrix product faster, and the last batch longer
# torch.compile on a machine or a Python that it does not support, or without a C compiler: RuntimeError is the base of
# torch._dynamo's and torch._inductor's own.
NOT_COMPILED = (RuntimeError, OSError, ImportError, subprocess.SubprocessError)


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
        """Load `name`, of the hub or a local folder; `transform` replaces the one that its files describe.

        Raises: UserError where it does not load, is no V-JEPA 2, or does not fit `frames` or `size`.
        """
        self.name, self.device, self.frames = pretrained.keep(str(name)), torch.device(device), frames
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
        # Through float16, so that an encoder is the same one on a GPU and on a CPU.
        self.weights = pretrained.fingerprint(self.model, torch.float16)
        self._batch = 0  # smaller batches are padded to this size
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
                f"the encoder {encoder.name} is not the one that made the features; name that one with --encoder"
            )
        return encoder

    def cache_config(self, dtype: str = "float16", pool: int = 1) -> CacheConfig:
        """What features of this encoder are, kept as `dtype` after `pool`."""
        look = (self.transform.size, self.transform.crop, self.transform.mean, self.transform.std)
        return CacheConfig(self.name, self.frames, *look, dtype, pool, self.tokens // pool**2, self.dim, self.weights)

    @torch.no_grad()
    def encode(self, clips: Tensor) -> Tensor:
        """Patch tokens of clips: uint8 (B, T, 3, S, S) -> (B, N, D) on the encoder's device.

        Raises: UserError where a GPU cannot hold that many.
        """
        count = len(clips)
        clips = clips.to(self.device, non_blocking=True)
        if count < self._batch:
            clips = torch.cat([clips, clips[-1:].expand(self._batch - count, *clips.shape[1:])])
        try:
            return self._forward(clips)[:count]
        except torch.OutOfMemoryError:
            raise UserError(f"the GPU cannot hold {len(clips)} clips at once: lower --batch-size") from None

    def _normalize_and_encode(self, clips: Tensor) -> Tensor:
        mean = torch.tensor(self.transform.mean, device=self.device).view(3, 1, 1)
        std = torch.tensor(self.transform.std, device=self.device).view(3, 1, 1)
        pixels = ((clips.float() / 255 - mean) / std).to(self.dtype)
        return self.model(pixels).last_hidden_state

    def prepare(self, batch: int | None) -> int:
        """Make ready for many batches of one size (None: chosen here), and return it; on a GPU, compile."""
        if self.device.type != "cuda":
            batch = batch or max(1, min(16, TOKENS_ON_CPU // self.tokens))
            # How a matrix product rounds depends on its number of rows, where they are few. Smaller batches are padded
            # to this size, so that a clip's features are bitwise the same in any batch: a run that was stopped and
            # resumed writes the files that it would have written. With many tokens padding would take time, and the
            # rounding does not depend on the batch.
            self._batch = batch if self.tokens < 1024 else 0
            return batch
        batch = batch or self._largest_batch()
        eager = self._forward
        try:
            self._forward = torch.compile(eager, dynamic=False)
            self._batch = batch  # the compiled encoder knows one shape
            self.encode(torch.zeros(batch, self.frames, 3, self.transform.size, self.transform.size, dtype=torch.uint8))
        except NOT_COMPILED:  # slower, the same features
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

    name = pretrained.check_name(pretrained.find(name), "--encoder")
    with pretrained.loading("the encoder", name, "--encoder"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if config.model_type != "vjepa2":
        raise UserError(f"the encoder {name!r} does not load: it is a {config.model_type}, not a V-JEPA 2")
    described = _described_transform(name, config)
    if size is not None:
        described = Transform(size, False, described.mean, described.std)
    config.crop_size = described.size  # what the rotary positions are counted by
    with pretrained.loading("the encoder", name, "--encoder"):
        loaded = AutoModel.from_pretrained(
            name, config=config, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
        )
    model, report = loaded
    if missing := [key for key in report["missing_keys"] if key.startswith("encoder.")]:
        raise UserError(f"the encoder {name!r} does not load: it lacks {len(missing)} of its weights")
    return model, described


def _described_transform(name: str, config: Any) -> Transform:
    """Size, mean and std as the model's preprocessor file has them; the model's crop and ImageNet's else."""
    from transformers.utils import cached_file

    causes = ("missing_entries", "gated_repo", "connection_errors")
    optional = {f"_raise_exceptions_for_{cause}": False for cause in causes}
    described: dict[str, Any] = {}
    try:
        for file in ("preprocessor_config.json", "video_preprocessor_config.json"):
            if path := cached_file(name, file, **optional):
                described.update(files.read_json(path, "the encoder"))
        crop = described.get("crop_size") or config.crop_size
        size = int(crop["height"] if isinstance(crop, dict) else crop)
        mean, std = (
            tuple(map(float, described.get(key) or usual)) for key, usual in (("image_mean", MEAN), ("image_std", STD))
        )
    except (KeyError, TypeError, ValueError):
        raise UserError(f"the encoder: the preprocessor's file in {name} is damaged; download it again") from None
    return Transform(size, False, mean, std)
