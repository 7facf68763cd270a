"""The frozen video encoder, V-JEPA 2 (arXiv 2506.09985): sample frames, transform them, encode.

One sampler, one transform and one encoder, used by preprocessing, by inference and to train the sample's encoder.
transformers is imported where the encoder is loaded: worker processes that only decode start without it.

Letters: B clips, T frames, H and W pixels as they are in the file, S pixels as the encoder sees them, N patch
tokens a clip, D their width; the grid (T', H', W') has N = T' * H' * W' tokens.
"""

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cache import CacheConfig, Grid
from files import UserError

DEFAULT_ENCODER = "facebook/vjepa2-vitl-fpc64-256"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as V-JEPA 2 was trained with
MAX_PIXELS = 8192 * 4352  # a frame of 8K; a damaged header can claim far more
MAX_STRETCH = 32  # longest edge / shortest edge, with --crop: the resized frame grows with it
RESIZED_AT_ONCE = 64 << 20  # bytes of decoded frames that wait to be resized
ROWS_ON_CPU = 2048  # tokens in a batch: more make no matrix product faster, and the last batch longer


class VideoError(Exception):
    """A video that cannot be decoded; its text is the reason, without the file's name."""


class VideoInfo(NamedTuple):
    """What a video's index says."""

    frames: int
    fps: float
    duration: float  # seconds
    width: int
    height: int


@dataclass(frozen=True)
class Transform:
    """Frames as they were filmed to squares of `size` pixels, still uint8: `VideoEncoder` normalizes on its device.

    Without `crop` the whole frame is squashed to the square; with it, V-JEPA 2's own evaluation transform: the
    shortest edge to size * 256 / 224 (292 for 256), then the centre.
    """

    size: int
    crop: bool = False
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD

    def apply(self, frames: np.ndarray | Tensor) -> Tensor:
        """uint8 (T, H, W, 3) to uint8 (T, 3, S, S). Antialiased bilinear on uint8, 13 times faster than on floats.

        Raises: VideoError for frames too long and thin to crop.
        """
        frames = torch.as_tensor(frames).permute(0, 3, 1, 2)  # (T, 3, H, W), in channels-last memory as decoded
        if not self.crop:
            return _resize(frames, self.size, self.size)
        height, width = frames.shape[-2:]
        if max(height, width) > MAX_STRETCH * min(height, width):
            raise VideoError(f"a frame of {width}x{height} is too long and thin to crop")
        edge = int(self.size * 256 / 224)
        short, long = min(height, width), int(edge * max(height, width) / min(height, width))
        frames = _resize(frames, edge, long) if short == height else _resize(frames, long, edge)
        top, left = ((length - self.size) // 2 for length in frames.shape[-2:])
        return frames[..., top : top + self.size, left : left + self.size].contiguous()


def _resize(frames: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(frames, (height, width), mode="bilinear", antialias=True).contiguous()


def frame_indices(total: int, count: int) -> np.ndarray:
    """`count` frames uniformly over `total`, first and last included; frames repeat where there are fewer. (count,)"""
    return np.linspace(0, total - 1, count).astype(np.int64)


# ---- decoding ----


def read_frames(path: Path | str, count: int, start: float | None = None, end: float | None = None) -> np.ndarray:
    """`count` frames of a video, or of its window [start, end) in seconds: uint8 RGB (count, H, W, 3).

    Equal to FFmpeg's frames to the last bit. Raises: VideoError for anything that cannot be decoded.
    """
    unique, repeats = _sample(path, count, start, end)
    try:
        return np.stack(list(unique))[repeats]
    except ValueError:
        raise VideoError("its frames change size") from None


def read_clip(
    path: Path | str, count: int, transform: Transform, start: float | None = None, end: float | None = None
) -> Tensor:
    """`read_frames` and `transform` in one, a few frames at a time: uint8 (count, 3, S, S), in bounded memory."""
    unique, repeats = _sample(path, count, start, end)
    squares, waiting = [], []
    try:
        for frame in unique:
            waiting.append(frame)
            if len(waiting) * frame.nbytes >= RESIZED_AT_ONCE:
                squares.append(transform.apply(np.stack(waiting)))
                waiting = []
        if waiting:
            squares.append(transform.apply(np.stack(waiting)))
    except ValueError:
        raise VideoError("its frames change size") from None
    return torch.cat(squares)[torch.from_numpy(repeats)]


def probe(path: Path | str) -> VideoInfo:
    """A video's length and size, from its index and first frame. Raises: VideoError."""
    reader = _open(path)
    times, fps = _times(reader)
    height, width, _ = next(_in_order(reader, [0])).shape
    return VideoInfo(len(times), fps, float(times[-1]) + 1 / fps, width, height)


def _sample(
    path: Path | str, count: int, start: float | None, end: float | None
) -> tuple[Iterator[np.ndarray], np.ndarray]:
    """The distinct frames (H, W, 3) to be read, in order, and which of them each of `count` samples is."""
    reader = _open(path)
    first, after = 0, len(reader)
    if start is not None or end is not None:
        times, _ = _times(reader)
        first = int(np.searchsorted(times, start or 0.0))
        after = len(times) if end is None else int(np.searchsorted(times, end))
        if after <= first:  # a window between two frames shows the one before it
            first = max(0, min(first, len(times)) - 1)
            after = first + 1
    wanted, repeats = np.unique(first + frame_indices(after - first, count), return_inverse=True)
    return _in_order(reader, wanted.tolist()), repeats


def _open(path: Path | str) -> Any:
    """A decord reader with the frames of `path`."""
    from decord import VideoReader, logging

    logging.set_level(logging.QUIET)  # damaged files: FFmpeg would tell the terminal, we name the clip
    os.environ.setdefault("DECORD_EOF_RETRY_MAX", "256")  # its 10240 tries are minutes on a truncated file
    path = Path(path)
    try:
        if not path.is_file():
            raise VideoError("there is no such file" if not path.exists() else "it is not a file")
        if path.stat().st_size == 0:
            raise VideoError("the file is empty")
        # One thread: with more, decord 0.6.0 fails on VP9 ("Error sending packet"). Processes run side by side.
        reader = VideoReader(str(path), num_threads=1)
        frames = len(reader)
    except OSError as error:
        raise VideoError(f"the file cannot be read ({error.strerror})") from None
    except VideoError:
        raise
    except Exception as error:
        raise VideoError(f"it does not open as a video{_reason(error)}") from None
    if frames == 0:
        raise VideoError("it holds no frames")
    return reader


def _in_order(reader: Any, wanted: list[int]) -> Iterator[np.ndarray]:
    """The frames of ascending indices `wanted`, decoding all up to the last one.

    decord's own random access (get_batch, skip_frames) gives other frames than asked for in h264 with open groups
    of pictures, and broken ones; decoding in order never did.
    """
    at = -1
    for index in wanted:
        try:
            while at < index:
                frame = reader.next()
                at += 1
                if at == 0 and frame.shape[0] * frame.shape[1] > MAX_PIXELS:
                    raise VideoError(f"a frame of {frame.shape[1]}x{frame.shape[0]} is too large")
            yield frame.asnumpy()
        except VideoError:
            raise
        except MemoryError:
            raise VideoError("it needs more memory than decoding may use") from None
        except Exception as error:
            raise VideoError(f"frame {at + 1} of {len(reader)} cannot be decoded{_reason(error)}") from None


def _times(reader: Any) -> tuple[np.ndarray, float]:
    """When each frame is shown, seconds from the first (frames,), and frames a second."""
    try:
        times = np.asarray(reader.get_frame_timestamp(range(len(reader))), dtype=np.float64)[:, 0]
        fps = float(reader.get_avg_fps())
    except Exception as error:
        raise VideoError(f"its frames have no times{_reason(error)}") from None
    times = np.maximum.accumulate(times - times[0])
    if not np.isfinite(times).all() or times[-1] > 3600 * len(times):
        raise VideoError("its frames have impossible times")
    if not 0 < fps < 1e4:
        fps = (len(times) - 1) / times[-1] if times[-1] > 0 else 25.0
    return times, fps


_SAID_BY_DECORD = {  # parts of its messages, which hold addresses, times and file names beside
    "st_nb": "no video stream that this decoder knows",
    "Failed to measure": "its length cannot be told",
    "avcodec_open2": "its codec does not start",
    "getting stream info": "its streams are damaged",
}


def _reason(error: Exception) -> str:
    """What is known about an error of decord, the same words each time: " (...)" or ""."""
    return next((f" ({words})" for part, words in _SAID_BY_DECORD.items() if part in str(error)), "")


# ---- encoding ----


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
