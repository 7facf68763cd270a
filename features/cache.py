"""The feature cache: one small file a clip (dataset.py reads them back in batches).

A clip's patch tokens (N, D) are kept as float16, bfloat16, or int8 with one scale a token, after an optional
mean over pool x pool patches of one time step. `features/config.json` says what made the cache, so that features
of two encoders, sizes or samplings are never mixed.

Letters: B clips, N tokens a clip, D their width; a grid (T', H', W') has N = T' * H' * W' tokens before pooling.
"""

import io
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

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

    def to_dict(self) -> dict[str, Any]:
        """As JSON and checkpoints hold it."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CacheConfig":
        """The inverse of `to_dict`. Raises: UserError where a field is missing or holds something else."""
        try:
            known = {f.name: values[f.name] for f in fields(cls) if f.name in values or f.name != "weights"}
            known["mean"], known["std"] = (tuple(float(x) for x in known[key]) for key in ("mean", "std"))
            config = cls(**known)
            counts = (config.frames, config.size, config.tokens, config.dim)
            good = all(type(count) is int and count > 0 for count in counts) and len(config.mean) == 3
            good = good and len(config.std) == 3 and config.dtype in DTYPES and config.pool in POOLS
        except (KeyError, TypeError, ValueError, OverflowError):
            good = False
        if not good:
            raise UserError("the description of the features (config.json) is damaged; make the cache again")
        return config

    def differences(self, other: "CacheConfig") -> str:
        """The fields in which two caches differ, as "dim 32, not 64; pool 1, not 2"; "" where they do not.

        The same weights may have two names.
        """
        known = bool(self.weights and other.weights)
        skip = {"encoder"} if known and self.weights == other.weights else set() if known else {"weights"}
        mine, theirs = asdict(self), asdict(other)
        both = [(key, mine[key], theirs[key]) for key in mine if key not in skip]
        return "; ".join(f"{key} {ours}, not {other}" for key, ours, other in both if ours != other)


def read_config(features: Path | str) -> CacheConfig | None:
    """What made the cache in the folder `features`; None where nothing says so (a published cache has no config)."""
    path = Path(features) / "config.json"
    if not path.exists():
        return None
    values = files.read_json(path, "the feature cache")
    try:
        return CacheConfig.from_dict(values)
    except UserError:
        raise UserError(f"the feature cache: {path} is damaged; delete {features} and preprocess again") from None


def check_config(features: Path | str, config: CacheConfig) -> bool:
    """Whether config.json is there already, and says the same.

    Raises: UserError where another configuration, or an unknown one, made what is in the folder.
    """
    found = read_config(features)
    if found is None and (unknown := next(Path(features).glob("*/*.pt"), None)) is not None:
        raise UserError(
            f"nothing says what made {unknown}: there is no {Path(features) / 'config.json'}; move the old features "
            "away, or give another --data"
        )
    if found is not None and (differences := found.differences(config)):
        raise UserError(
            f"{features} holds features of another kind ({differences}); preprocess with the same encoder and flags "
            "as before, or move the old features away"
        )
    return found is not None


def claim_config(features: Path | str, config: CacheConfig) -> None:
    """Write config.json where there is none. Raises: UserError as `check_config`."""
    if not check_config(features, config):
        files.write_json(Path(features) / "config.json", config.to_dict())
        check_config(features, config)  # two runs may have started at once: the last one to write is right


def check_same_features(
    made: Mapping[str, Any] | None, features: Path | str, checkpoint_path: Path | str, published: bool = False
) -> None:
    """Compare the features that a checkpoint learnt from (`made`, of its config; None: unknown) with a folder's.

    A `published` checkpoint does not say what made its features. Raises: UserError where they are of another kind.
    """
    found = read_config(features)
    if made is None or found is None or published:
        return
    if differences := CacheConfig.from_dict(made).differences(found):
        raise UserError(
            f"{checkpoint_path} was trained on other features than those in {features} ({differences}); preprocess "
            "with the same encoder and flags, or use the checkpoint that belongs to these features"
        )


class Packed(NamedTuple):
    """Features as they are stored: floats without scales, or int8 with one scale a token."""

    values: Tensor  # (N, D) or (B, N, D)
    scales: Tensor | None = None  # (N, 1) or (B, N, 1), float16


def check_pool(grid: Grid, pool: int) -> None:
    """Raises: UserError where `pool` x `pool` patches do not tile a time step of `grid`."""
    _, height, width = grid
    if height % pool or width % pool:
        raise UserError(f"--pool {pool} does not divide the {height} x {width} patches of this encoder; use --pool 1")


def quantize(features: Tensor, dtype: str, pool: int = 1, grid: Grid | None = None) -> Packed:
    """Pool features (N, D) or (B, N, D), and round them to `dtype`; `grid` (T', H', W') is needed where pool > 1.

    int8: x = round(x / s), s = max|x| / 127 over the token, s rounded to float16 before it divides, so that
    what is stored and what is multiplied back are one number. NaN and Inf stay so (`save` refuses them): looking for
    them here would make a GPU wait.
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

    Raises: ValueError, and writes nothing, where features are NaN, Inf, or were too large for what they are kept as.
    """
    # clone: a slice of a batch would take the whole batch's storage into the file
    packed = Packed(*(None if tensor is None else tensor.detach().cpu().clone() for tensor in packed))
    if not _is_finite(packed):
        raise ValueError("its features are NaN, Inf, or larger than the cache's dtype holds")
    files.save_tensors(path, packed.values if packed.scales is None else packed._asdict())


@lru_cache
def bytes_per_clip(config: CacheConfig) -> int:
    """The size of one clip's file."""
    packed = quantize(torch.zeros(config.tokens, config.dim), config.dtype)
    file = io.BytesIO()
    torch.save(packed.values if packed.scales is None else packed._asdict(), file)
    return file.tell()


def is_cached(path: Path | str, config: CacheConfig) -> bool:
    """Whether a whole file of the right size is there. Cheap: it looks at the file's length and its last bytes.

    The length may differ by a little from today's, since another version of torch may have written it.
    """
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 22))
            end = file.read(22)  # the record that ends a zip archive
            return abs(file.tell() - bytes_per_clip(config)) < 4096 and end.startswith(b"PK\x05\x06")
    except OSError:
        return False


def load(path: Path | str) -> Packed:
    """One clip's features, mmap'd; a published bare (1, N, D) comes back as (N, D).

    Raises: UserError where the file is missing, damaged, of another kind, or holds NaN or Inf.
    """
    if not Path(path).exists():  # who asks for it has seen it in the folder
        raise files.Vanished(f"features: there is no file {path} any more; preprocess that clip again")
    stored = files.load_tensors(path, "features", mmap=True)
    values, scales = (stored.get("values"), stored.get("scales")) if isinstance(stored, dict) else (stored, None)
    if isinstance(values, Tensor) and values.ndim == 3 and len(values) == 1:
        values = values[0]
    if not _is_clip(values, scales):
        raise UserError(f"features: {path} does not hold one clip's features (N, D); preprocess it again")
    packed = Packed(values.detach(), scales)
    if not _is_finite(packed):
        raise UserError(f"features: {path} holds NaN or Inf; delete it and preprocess it again")
    return packed


def _is_clip(values: Any, scales: Any) -> bool:
    """Whether these are the parts of one clip: dense, of a dtype that the cache knows, and of shapes that fit."""
    if not isinstance(values, Tensor) or values.ndim != 2 or values.numel() == 0:
        return False
    if values.layout != torch.strided or values.device.type != "cpu":  # "meta" has no numbers
        return False
    if values.dtype != torch.int8:
        return scales is None and values.dtype in (torch.float16, torch.bfloat16, torch.float32)
    return isinstance(scales, Tensor) and scales.dtype == torch.float16 and scales.shape == (len(values), 1)


def _is_finite(packed: Packed) -> bool:
    """Whether there is no NaN or Inf. The extremes tell, NaN too: 15 times faster than torch.isfinite(all of them)."""
    return all(map(math.isfinite, torch.aminmax(packed.values if packed.scales is None else packed.scales)))
