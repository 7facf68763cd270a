"""Captions for a whole split from its cached features, shared by training's validation and by evaluation.

Letters: B clips, N patch tokens a clip, D their width, T frames, S pixels.
"""

import math
import os
import random
from collections import ChainMap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataset import Record
from features import cache
from features.reader import feature_batches
from qformer import VideoCaptioner
from runtime.distributed import DistributedContext
from runtime.files import UserError
from runtime.progress import Progress


@dataclass
class SplitReader:
    """A split's features, shared among the processes, for a captioner; `check` is called before each batch."""

    captioner: VideoCaptioner
    records: list[Record]
    folder: Path  # of the split's features
    batch_size: int
    context: DistributedContext
    check: Callable[[], None] = lambda: None

    def each(
        self, function: Callable[[list[Record], Tensor], Iterable], desc: str, sources: dict[str, str] | None = None
    ) -> dict[str, Any]:
        """What `function` gives for each of its records and features (B, N, D), from all processes.

        By clip id, in the records' order, made under a progress bar; `sources` gives a clip another's features, by id.
        """
        mine, found = self.context.shard(self.records), {}
        parts = [mine[start : start + self.batch_size] for start in range(0, len(mine), self.batch_size)]
        ids = [[(sources or {}).get(record["id"], record["id"]) for record in part] for part in parts]
        loader = feature_batches(self.folder, ids, pin=self.captioner.device.type == "cuda")
        with Progress(total=len(mine), desc=desc, unit="clip", disable=not self.context.is_main, leave=False) as bar:
            for part, packed in zip(parts, loader, strict=True):
                self.check()
                values = function(part, dequantize_for(self.captioner, packed, self.folder))
                found.update(zip((record["id"] for record in part), values, strict=True))
                bar.update(len(part))
        merged = ChainMap(*self.context.gather(found))
        return {record["id"]: merged[record["id"]] for record in self.records}

    def captions(self, max_new_tokens: int, num_beams: int = 1, sources: dict | None = None) -> dict[str, str]:
        """Captions by clip id; `sources` as in `each`."""
        desc = "shuffled" if sources else "captions"
        return self.each(lambda _, x: self.captioner.generate(x, max_new_tokens, num_beams), desc, sources)

    @torch.no_grad()
    def loss_and_captions(self, max_new_tokens: int) -> tuple[float, dict[str, str]]:
        """The mean loss of each clip's first caption, in nats a token, and `captions`: features are read once."""

        def both(part: list[Record], features: Tensor) -> Iterable[tuple[float, str]]:
            losses = self.captioner.per_caption_nll(features, [record["label"][0] for record in part])
            return zip(losses.tolist(), self.captioner.generate(features, max_new_tokens), strict=True)

        self.captioner.eval()
        found = self.each(both, "validation")
        losses, captions = zip(*found.values(), strict=True)
        return math.fsum(losses) / len(losses), dict(zip(found, captions, strict=True))


def dequantize_for(captioner: VideoCaptioner, packed: cache.Packed, folder: Path) -> Tensor:
    """Features (B, N, D) on the captioner's device. Raises: UserError where the Q-Former reads another width."""
    given, read = packed.values.shape[-1], captioner.qformer.config["visual_dim"]
    if given != read:
        raise UserError(f"the features in {folder} are another encoder's: {given} wide, the Q-Former reads {read}")
    dtype = torch.bfloat16 if captioner.device.type == "cuda" else torch.float32
    return cache.dequantize(packed, captioner.device, dtype)


def shuffled(records: list[Record], seed: int) -> dict[str, str]:
    """Every clip mapped to another clip (a derangement), seeded: who looks at the video must now be wrong."""
    order = [record["id"] for record in records]
    random.Random(seed).shuffle(order)
    return dict(zip(order, order[1:] + order[:1], strict=True))


def reversed_captions(reader: SplitReader, videos: dict[str, Path], timeout: float, *settings: int) -> dict[str, str]:
    """Captions by id of clips played backwards: who sees still frames only captions them as before.

    Clips that cannot be decoded within `timeout` seconds each are left out; `settings` are those of `captions`.
    """
    from video.workers import Workers

    captioner, context = reader.captioner, reader.context
    mine = context.shard(list(videos.items()))
    with Workers(max(1, (os.cpu_count() or 1) // context.world_size), timeout) as workers:
        clips = workers.read_clips(mine, captioner.encoder.transform, captioner.encoder.frames)
        # Frames are (T, 3, S, S): the last one comes first.
        backwards = (clip if clip.frames is None else clip._replace(frames=clip.frames.flip(0)) for clip in clips)
        captioned = captioner.caption_decoded(backwards, reader.batch_size, *settings)
        bar = Progress(
            captioned, total=len(mine), desc="reversed", unit="clip", disable=not context.is_main, leave=False
        )
        found = ChainMap(*context.gather({clip.key: text for clip, text, _ in bar if text is not None}))
    return {clip_id: found[clip_id] for clip_id in videos if clip_id in found}
