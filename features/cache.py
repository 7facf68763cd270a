"""The feature cache: one small file a clip (reader.py reads them back in batches).

A clip's patch tokens (N, D) are kept as float16, bfloat16, or int8 with one scale a token, after an optional mean over
pool x pool patches of one time step. `features/config.json` says what made them, so that two kinds are never mixed.

Letters: B clips, N tokens a clip, D their width; a grid (T', H', W') has N = T' * H' * W' tokens before pooling.
"""

import math
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from runtime import files
from runtime.files import UserError

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
POOLS = (1, 2, 4)
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class CacheConfig:
    """Everything that decides what a cached feature is; it travels in config.json and in checkpoints."""

    encoder: str  # hub name or local folder
    frames: int  # sampled uniformly over the clip
    size: int  # pixels, of the square that the encoder sees
    crop: bool  # shortest edge and centre crop, or the whole frame squashed to the square
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    dtype: str
    pool: int
    tokens: int  # N, after pooling
    dim: int  # D
    weights: str = ""  # fingerprint of the encoder's weights: a folder can change under its name, or move
    tubelet: int = 2  # frames that a token stands for; 2 in all published V-JEPA 2

    @property
    def grid(self) -> Grid:
        """(T', H', W') of the N tokens, after pooling. Raises: UserError where they are no grid of squares."""
        steps = self.frames // self.tubelet
        side = math.isqrt(self.tokens // steps)
        if steps * side**2 != self.tokens:
            raise UserError(f"{self.tokens} patch tokens of {self.frames} frames are no grid: their places are unknown")
        return steps, side, side

    def to_dict(self) -> dict[str, Any]:
        """As JSON and checkpoints hold it."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None, source: Path | str = "the checkpoint") -> Self:
        """The inverse of `to_dict`; old ones have no `weights`. Raises: UserError where `source` lacks the rest."""
        if values is None:
            reason = "there was no features/config.json, as beside features of your own"
            advice = "evaluate.py captions such features, but a video cannot be made into them"
            raise UserError(f"{source} does not say what made its features: {reason}; {advice}")
        try:
            known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
            return cls(**known | {key: tuple(known[key]) for key in ("mean", "std")})
        except (LookupError, TypeError):
            raise UserError(f"what {source} says of its features is damaged; make it again or use another") from None

    def differences(self, other: "CacheConfig") -> str:
        """The fields in which two caches differ, as "dim 32, not 64; pool 1, not 2"; "" where they do not."""
        mine, theirs = asdict(self), asdict(other)
        if not self.weights or not other.weights:
            del mine["weights"]
        elif self.weights == other.weights:
            del mine["encoder"]  # the same weights may have two names
        return "; ".join(f"{key} {value}, not {theirs[key]}" for key, value in mine.items() if value != theirs[key])


def read_config(features: Path | str) -> CacheConfig | None:
    """What made the cache in the folder `features`; None where nothing says so (a published cache has no config)."""
    path = Path(features) / "config.json"
    return CacheConfig.from_dict(files.read_json(path, "the feature cache"), path) if path.exists() else None


def check_config(features: Path | str, config: CacheConfig) -> bool:
    """Whether config.json is there already. Raises: UserError where the folder's features are of another kind."""
    found = read_config(features)
    if found is None and any(Path(features).glob("*/*.pt")):
        reason = f"nothing says what made the features in {features}: there is no config.json"
        raise UserError(f"{reason}; your own need no preprocessing, and others are to be moved away")
    if found is not None and (differences := found.differences(config)):
        raise UserError(f"{features} holds features of another kind ({differences}): use the same flags as before")
    return found is not None


def check_same_features(
    made: Mapping[str, Any] | None, features: Path | str, checkpoint_path: Path | str, published: bool = False
) -> None:
    """Raises: UserError where a folder's features are not of the kind (`made`) that a checkpoint learnt from.

    Whatever is unknown passes: a `published` checkpoint, or cache, does not say what made its features.
    """
    found = read_config(features)
    known = made is not None and found is not None and not published
    if known and (differences := CacheConfig.from_dict(made).differences(found)):
        raise UserError(
            f"{checkpoint_path} was trained on other features than those in {features} ({differences}); preprocess "
            "with the same encoder and flags, or use the checkpoint that belongs to these features"
        )


class Packed(NamedTuple):
    """Features as they are stored: floats without scales, or int8 with one scale a token."""

    values: Tensor  # (N, D) or (B, N, D)
    scales: Tensor | None = None  # (N, 1) or (B, N, 1), float16

    @property
    def kind(self) -> str:
        """Shape and dtype, as "4096x1024 float16"."""
        return f"{'x'.join(map(str, self.values.shape))} {str(self.values.dtype).removeprefix('torch.')}"

    def is_finite(self) -> bool:
        """Whether there is no NaN or Inf. The extremes tell, NaN too, 15 times faster than torch.isfinite."""
        extremes = [number for part in self if part is not None for number in torch.aminmax(part)]
        return all(map(math.isfinite, extremes))


def quantize(features: Tensor, dtype: str, pool: int = 1, grid: Grid | None = None) -> Packed:
    """Pool features (N, D) or (B, N, D), and round them to `dtype`; `grid` (T', H', W') is needed where pool > 1.

    int8: round(x / s), s = max|x| / 127 over the token, rounded to float16 before it divides, as it is multiplied back.
    NaN and Inf stay so (`save` refuses them): looking for them here would make a GPU wait.
    """
    if pool > 1:
        steps, height, width = grid
        features = features.unflatten(-2, (steps, height // pool, pool, width // pool, pool))
        features = features.float().mean(dim=(-4, -2)).flatten(-4, -2)  # (..., N, D)
    if dtype != "int8":
        return Packed(features.to(DTYPES[dtype]))
    features = features.float()
    scales = (features.abs().amax(-1, keepdim=True) / 127).half()  # (..., N, 1)
    # A token of zeros, or one below what float16 can tell from zero, divides by 1 and stays zero.
    divisor = torch.where(scales == 0, 1, scales.float())
    return Packed((features / divisor).round().clamp(-127, 127).to(torch.int8), scales)


def dequantize(packed: Packed, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, N, D) in `dtype` on `device`; what crosses to the device is the small stored form."""
    values = packed.values.to(device, non_blocking=True).to(dtype)
    if packed.scales is not None:
        values = values * packed.scales.to(device, non_blocking=True).to(dtype)
    return values if values.ndim == 3 else values.unsqueeze(0)


def save(path: Path | str, packed: Packed) -> None:
    """Write one clip's features (N, D): a bare tensor, or {"values", "scales"} for int8.

    Raises: ValueError, and writes nothing, where any is NaN, Inf or too large.
    """
    # clone: a slice of a batch would take the whole batch's storage into the file
    packed = Packed(*(None if part is None else part.detach().cpu().clone() for part in packed))
    if not packed.is_finite():
        raise ValueError("its features are NaN, Inf, or larger than the cache's dtype holds")
    files.save_tensors(path, packed.values if packed.scales is None else packed._asdict())


def bytes_per_clip(config: CacheConfig) -> int:
    """The size of one clip's features, without the two kilobytes at most that torch adds to a file."""
    scale = torch.float16.itemsize if config.dtype == "int8" else 0
    return config.tokens * (config.dim * DTYPES[config.dtype].itemsize + scale)


def is_cached(path: Path | str, config: CacheConfig) -> bool:
    """Whether a whole file of the right size is there; it is not read. A zip file that was cut off is none."""
    return zipfile.is_zipfile(path) and 0 < Path(path).stat().st_size - bytes_per_clip(config) < 4096


def load(path: Path | str) -> Packed:
    """One clip's features, mmap'd; a published bare (1, N, D) comes back as (N, D).

    Raises: UserError where the file is damaged, of another kind, or holds NaN or Inf; OSError where it is gone.
    """
    stored = files.load_tensors(path, "features", mmap=True)
    values, scales = (stored.get("values"), stored.get("scales")) if isinstance(stored, dict) else (stored, None)
    try:
        values = values.detach().squeeze(0) if values.ndim == 3 else values.detach()
        fits = scales.shape == (len(values), 1) if values.dtype == torch.int8 else scales is None
        is_clip = values.ndim == 2 and fits
        is_finite = Packed(values, scales).is_finite()
    except (AttributeError, TypeError, RuntimeError):  # it is no tensor, or none that has a length or a largest number
        is_clip = False
    if not is_clip:
        raise UserError(f"features: {path} does not hold one clip's features (N, D); make it again")
    if not is_finite:
        raise UserError(f"features: {path} holds NaN or Inf; delete it and make it again")
    return Packed(values, scales)
