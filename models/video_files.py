"""From video files to captions: what a captioner does with the encoder that made its features.

Letters: B clips or windows, T frames, S pixels each way, N patch tokens a clip, D their width.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from features import cache
from runtime.files import UserError


@dataclass
class VideoCaptions:
    """A video file and, as captioning goes on, what came of it."""

    path: Path
    error: str | None = None  # why there is no caption at all
    decoded: list[Any] = field(default_factory=list)  # video.workers.Decoded: the clip or its windows, no frames
    captions: list[str | None] = field(default_factory=list)  # one for each of these
    maps: dict[str, Any] = field(default_factory=dict)  # where it looked, where that is asked: overlay.named

    @property
    def is_windowed(self) -> bool:
        """Whether it is captioned in windows."""
        return bool(self.decoded) and self.decoded[0].start is not None

    @property
    def is_done(self) -> bool:
        """Whether nothing more comes of it."""
        return self.error is not None or bool(self.decoded and len(self.decoded) == self.decoded[-1].total)

    @property
    def segments(self) -> list[Any]:
        """The captions of a windowed video, merged: video.subtitles.Segment."""
        from video import subtitles

        windows = [(part.start, part.end) for part in self.decoded]
        return subtitles.segments(windows, self.captions) if self.is_windowed else []

    @property
    def prediction(self) -> str | None:
        """The file's caption; a windowed video has one where all its windows say the same."""
        captions = [part.caption for part in self.segments] if self.is_windowed else self.captions
        return captions[0] if len(captions) == 1 and not self.error else None

    @property
    def warning(self) -> str | None:
        """What its captions leave out, such as the end of a file that is cut off."""
        return next((part.warning for part in self.decoded if part.warning), None)

    def add(self, part: Any, caption: str | None) -> None:
        """Note what became of the clip, or of its next window."""
        self.decoded.append(part._replace(frames=None))
        self.captions.append(caption)
        if self.is_done and all(caption is None for caption in self.captions):
            self.error = self.decoded[0].error


class CaptionsFiles:
    """The part of `VideoCaptioner` that reads videos; decoders and V-JEPA 2 are imported here, training needs none."""

    @cached_property
    def encoder(self) -> Any:
        """The frozen V-JEPA 2 that made the features this Q-Former was trained on; loaded when first asked for."""
        from models.vjepa2 import VideoEncoder

        return VideoEncoder.from_config(self.config["features"], self.device)

    def check_queries(self, queries: Sequence[int], flag: str) -> None:
        """Raises: UserError where the Q-Former has no such queries, which count from 0."""
        count = self.qformer.config["num_queries"]
        if queries and max(queries) >= count:
            raise UserError(f"{flag} {max(queries)}: the Q-Former has {count} queries, 0 to {count - 1}")

    @torch.no_grad()
    def encode(self, clips: Tensor) -> Tensor:
        """Frames to features as training saw them, cache precision included: uint8 (B, T, 3, S, S) -> (B, N, D)."""
        made = cache.CacheConfig.from_dict(self.config["features"])
        tokens = self.encoder.encode(clips)  # (B, N, D)
        packed = [cache.quantize(clip, made.dtype, made.pool, self.encoder.grid) for clip in tokens]
        return torch.cat([cache.dequantize(clip, self.device) for clip in packed])

    def caption_decoded(
        self, decoded: Iterable[Any], batch_size: int = 8, max_new_tokens: int = 50, num_beams: int = 1
    ) -> Iterator[tuple[Any, str | None, Tensor | None]]:
        """Each clip or window (video.workers.Decoded), caption and features (N, D), in order; None without frames."""
        from video.workers import batches

        for batch in batches(decoded, batch_size):
            clips = [clip.frames for clip in batch if clip.frames is not None]
            features = self.encode(torch.stack(clips)) if clips else ()
            found = zip(self.generate(features, max_new_tokens, num_beams) if clips else (), features, strict=True)
            yield from [(clip, *((None, None) if clip.frames is None else next(found))) for clip in batch]

    def caption_files(
        self,
        videos: Sequence[VideoCaptions],
        workers: Any,
        window: float | None = None,
        stride: float | None = None,
        queries: Sequence[int] | None = None,
        **settings: int,
    ) -> Iterator[VideoCaptions]:
        """Decode in `workers` (video.workers.Workers) and caption, in order; a video comes with each part it got.

        Seconds: `window`, `stride` (default: the window); without a window a file gets one caption, and its `maps` with
        `queries`: of the mean over all queries, and of each of these. `settings` as `caption_decoded`.
        """
        from video import overlay

        paths = [(video, video.path) for video in videos if not video.error]
        decoded = workers.read_clips(paths, self.encoder.transform, self.encoder.frames, window, stride)
        for part, caption, features in self.caption_decoded(decoded, **settings):
            part.key.add(part, caption)
            if queries is not None and features is not None:
                part.key.maps = overlay.named(self.attention(features[None])[0], queries)
            yield part.key

    def caption(
        self,
        paths: str | Path | Sequence[str | Path],
        window: float | None = None,
        stride: float | None = None,
        workers: int = 0,
        **settings: int,
    ) -> list[Any]:
        """Caption video files, one or several, as a whole or in windows of `window` seconds, one each `stride` seconds.

        `workers`: processes that decode; 0: this one. `settings`: batch_size, max_new_tokens, num_beams.
        Returns each file's caption (with `window` its subtitles.Segments), or a container.VideoError, the reason.
        """
        from video.workers import VideoError, Workers

        videos = [VideoCaptions(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
        with Workers(workers) as pool:
            for _ in self.caption_files(videos, pool, window, stride, **settings):
                pass
        found = [video.prediction if window is None else video.segments for video in videos]
        return [VideoError(video.error) if video.error else it for video, it in zip(videos, found, strict=True)]
