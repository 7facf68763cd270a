"""Captions for a whole split from its cached features, shared by training's validation and by evaluation.

Letters: B clips, N patch tokens a clip, D their width.
"""

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dataset import Record
from features import cache
from features.reader import feature_batches
from qformer import VideoCaptioner
from runtime.distributed import DistributedContext
from runtime.files import UserError


class SplitReader:
    """This process's part of a split, in batches on the captioner's device; `check` is called before each batch."""

    def __init__(
        self,
        captioner: VideoCaptioner,
        records: list[Record],
        folder: Path,
        batch_size: int,
        context: DistributedContext,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """`folder`: of the split's features."""
        self.captioner, self.records, self.folder = captioner, records, folder
        self.context, self.check = context, check
        mine = context.shard(records)
        self.parts = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]

    def batches(self, desc: str, sources: dict[str, str] | None = None) -> Iterator[tuple[list[Record], Tensor]]:
        """Records and their features (B, N, D), under a progress bar; `sources` gives a clip another's, by id."""
        ids = [[(sources or {}).get(record["id"], record["id"]) for record in part] for part in self.parts]
        loader = feature_batches(self.folder, ids, pin=self.captioner.device.type == "cuda")
        clips = sum(map(len, self.parts))
        with tqdm(total=clips, desc=desc, unit="clip", disable=not self.context.is_main, leave=False) as bar:
            for part, packed in zip(self.parts, loader, strict=True):
                self.check()
                yield part, dequantize_for(self.captioner, packed, self.folder)
                bar.update(len(part))

    def captions(
        self,
        max_new_tokens: int,
        num_beams: int = 1,
        desc: str = "captions",
        sources: dict[str, str] | None = None,
    ) -> dict[str, str]:
        """All processes' captions by clip id, in the records' order; `sources` as in `batches`."""
        found = {}
        for part, features in self.batches(desc, sources):
            texts = self.captioner.generate(features, max_new_tokens, num_beams)
            found.update(zip((record["id"] for record in part), texts, strict=True))
        return self.gathered(found)

    @torch.no_grad()
    def loss_and_captions(self, max_new_tokens: int) -> tuple[float, dict[str, str]]:
        """The mean over clips of the loss of each one's first caption, in nats a token, and captions as `captions`.

        Each clip's features, 8.4 MB at full size, are read once for both.
        """
        self.captioner.eval()
        found = {}
        for part, features in self.batches("validation"):
            losses = self.captioner.per_caption_nll(features, [record["label"][0] for record in part])
            texts = self.captioner.generate(features, max_new_tokens)
            found.update(zip((record["id"] for record in part), zip(losses.tolist(), texts, strict=True), strict=True))
        found = self.gathered(found)
        loss = math.fsum(loss for loss, _ in found.values()) / len(found)
        return loss, {clip_id: text for clip_id, (_, text) in found.items()}

    def gathered(self, found: dict[str, Any]) -> dict[str, Any]:
        """What all processes found by clip id, in the records' order."""
        merged = {clip_id: value for part in self.context.gather(found) for clip_id, value in part.items()}
        return {record["id"]: merged[record["id"]] for record in self.records}


def dequantize_for(captioner: VideoCaptioner, packed: cache.Packed, folder: Path) -> Tensor:
    """Features (B, N, D) on the captioner's device. Raises: UserError where the Q-Former reads another width."""
    width = captioner.qformer.config["visual_dim"]
    if packed.values.shape[-1] != width:
        raise UserError(
            f"the features in {folder} are {packed.values.shape[-1]} wide, the Q-Former reads {width}; "
            "this checkpoint belongs to another encoder's features"
        )
    on_gpu = captioner.device.type == "cuda"
    return cache.dequantize(packed, captioner.device, torch.bfloat16 if on_gpu else torch.float32)


def shuffled(records: list[Record], seed: int) -> dict[str, str]:
    """Every clip mapped to another clip (a derangement), seeded: who looks at the video must now be wrong."""
    order = [record["id"] for record in records]
    random.Random(seed).shuffle(order)
    return dict(zip(order, order[1:] + order[:1], strict=True))
