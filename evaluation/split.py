"""Captions for a whole split from its cached features, shared by training's validation and by evaluation."""

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dataset import Layout, Record, feature_batches
from evaluation import report
from features import cache
from qformer import VideoCaptioner
from runtime import files
from runtime.distributed import DistributedContext
from runtime.files import UserError


class SplitReader:
    """A rank's share of a split, in batches on the captioner's device; `check` is called before each batch."""

    def __init__(
        self,
        captioner: VideoCaptioner,
        records: list[Record],
        folder: Path,
        batch_size: int,
        ranks: DistributedContext,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.captioner, self.folder, self.records, self.ranks, self.check = captioner, folder, records, ranks, check
        mine = ranks.shard(records)
        self.parts = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]

    def batches(self, said: str, moved: dict[str, str] | None = None) -> Iterator[tuple[list[Record], Tensor]]:
        """Records and their features (B, N, D); `moved` gives a clip another's features (by id)."""
        sources = [[(moved or {}).get(record["id"], record["id"]) for record in part] for part in self.parts]
        loader = feature_batches(self.folder, sources, pin=self.captioner.device.type == "cuda")
        clips = sum(map(len, self.parts))
        with tqdm(total=clips, desc=said, unit="clip", disable=not self.ranks.is_main, leave=False) as bar:
            for part, packed in zip(self.parts, loader, strict=True):
                self.check()
                yield part, unpack_for(self.captioner, packed, self.folder)
                bar.update(len(part))

    def captions(
        self, max_new_tokens: int, num_beams: int = 1, said: str = "captions", moved: dict[str, str] | None = None
    ) -> dict[str, str]:
        """All ranks' captions by clip id, in the records' order."""
        found = {}
        for part, features in self.batches(said, moved):
            texts = self.captioner.generate(features, max_new_tokens, num_beams)
            found.update(zip((record["id"] for record in part), texts, strict=True))
        return self.gathered(found)

    @torch.no_grad()
    def loss(self) -> float:
        """The mean over clips of the loss of each one's first caption, in nats a token."""
        self.captioner.eval()
        found = {}
        for part, features in self.batches("validation loss"):
            losses = self.captioner.losses(features, [record["label"][0] for record in part])
            found.update(zip((record["id"] for record in part), losses.tolist(), strict=True))
        losses = self.gathered(found)
        return math.fsum(losses.values()) / len(losses)

    def gathered(self, found: dict[str, Any]) -> dict[str, Any]:
        """What all ranks found by clip id, in the records' order."""
        merged = {clip_id: value for part in self.ranks.gather(found) for clip_id, value in part.items()}
        return {record["id"]: merged[record["id"]] for record in self.records}


def unpack_for(captioner: VideoCaptioner, packed: cache.Packed, folder: Path) -> Tensor:
    """Features (B, N, D) on the captioner's device, dequantized there."""
    wanted = captioner.qformer.config["visual_dim"]
    if packed.values.shape[-1] != wanted:
        raise UserError(
            f"the features in {folder} are {packed.values.shape[-1]} wide, the Q-Former reads {wanted}; "
            "this checkpoint belongs to another encoder's features"
        )
    on_gpu = captioner.device.type == "cuda"
    return cache.dequantize(packed, captioner.device, torch.bfloat16 if on_gpu else torch.float32)


def shuffled(records: list[Record], seed: int) -> dict[str, str]:
    """Every clip mapped to another clip (a derangement), seeded: who looks at the video must now be wrong."""
    order = [record["id"] for record in records]
    random.Random(seed).shuffle(order)
    return dict(zip(order, order[1:] + order[:1], strict=True))


def gallery(
    predictions: list[dict[str, Any]], layout: Layout, page: Path, copies: Path | None = None
) -> list[dict[str, Any]]:
    """The page's clips, from the "predictions" of evaluation.json: with the video as the page finds it.

    `copies` is a folder to copy the videos into, so that page and videos can be moved together.
    """
    rows = []
    for row in predictions:
        video = layout.video(row["id"])
        if video and copies:
            files.copy(video, copies / video.name)
            video = copies / video.name
        rows.append({**row, "score": row.get("CIDEr"), "video": report.relative(video, page) if video else None})
    return rows
