"""From video files to captions: what a captioner does with the encoder that made its features.

Letters: B clips or windows, T frames, S pixels each way, N patch tokens a clip, D their width.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from features import cache


class CaptionsFiles:
    """The part of `VideoCaptioner` that reads videos; decoders and V-JEPA 2 are imported here, training needs none."""

    _encoder: Any = None

    @property
    def encoder(self) -> Any:
        """The frozen V-JEPA 2 that made the features this Q-Former was trained on; loaded when first asked for."""
        if self._encoder is None:
            from models.vjepa2 import VideoEncoder

            self._encoder = VideoEncoder.from_config(self.config["features"], self.device)
        return self._encoder

    @torch.no_grad()
    def encode(self, clips: Tensor) -> Tensor:
        """Frames to features as training saw them, cache precision included: uint8 (B, T, 3, S, S) -> (B, N, D)."""
        made = cache.CacheConfig.from_dict(self.config["features"])
        tokens = self.encoder.encode(clips)  # (B, N, D)
        packed = [cache.quantize(clip, made.dtype, made.pool, self.encoder.grid) for clip in tokens]
        return torch.cat([cache.dequantize(clip, self.device) for clip in packed])

    def caption_decoded(
        self, decoded: Iterable[Any], batch_size: int = 8, max_new_tokens: int = 50, num_beams: int = 1
    ) -> Iterator[tuple[Any, str | None]]:
        """Each clip or window (video.workers.Decoded) with its caption, in order; None for one without frames."""
        from video.workers import batches

        for batch in batches(decoded, batch_size):
            frames = [clip.frames for clip in batch if clip.frames is not None]
            features = self.encode(torch.stack(frames)) if frames else None
            captions = iter(() if features is None else self.generate(features, max_new_tokens, num_beams))
            yield from [(clip, None if clip.frames is None else next(captions)) for clip in batch]

    def caption(
        self,
        paths: str | Path | Sequence[str | Path],
        batch_size: int = 8,
        max_new_tokens: int = 50,
        num_beams: int = 1,
        window: float | None = None,
        stride: float | None = None,
        workers: int = 0,
    ) -> list[Any]:
        """Caption video files, one or several, `batch_size` clips or windows at once.

        With `window`, files are captioned in windows of so many seconds, one each `stride` seconds (default: the
        window). `workers`: processes that decode; 0: this one.

        Returns:
            For each file its caption (with `window` its subtitles.Segments), or a workers.Failure with the reason.
        """
        from video import windows
        from video.workers import Workers

        paths = list(enumerate([paths] if isinstance(paths, str | Path) else paths))
        look = (self.encoder.transform, self.encoder.frames)
        found: list[list[Any]] = [[] for _ in paths]
        if window is not None:
            stride = window if stride is None else stride
            windows.check_window(window, stride)
        with Workers(workers, timeout=60.0) as pool:
            if window is None:
                decoded = pool.read_clips(paths, *look)
            else:
                decoded = windows.read_windows(pool, paths, *look, window, stride)
            for clip, text in self.caption_decoded(decoded, batch_size, max_new_tokens, num_beams):
                found[clip.key].append((clip._replace(frames=None), text))
        return [_of_one_file(parts, window is not None) for parts in found]


def _of_one_file(parts: list[tuple[Any, str | None]], windowed: bool) -> Any:
    """A file's caption, or its segments, or why it has none, from its clip, or its windows in order."""
    from video.subtitles import segments
    from video.workers import Failure

    captions = [caption for _, caption in parts]
    if all(caption is None for caption in captions):
        return Failure(parts[0][0].error)
    return segments([(clip.start, clip.end) for clip, _ in parts], captions) if windowed else captions[0]
