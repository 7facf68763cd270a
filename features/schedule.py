"""What each optimizer step of a run reads, and its learning rate: functions of the run and the place in it alone."""

import math
from dataclasses import dataclass

import dataset


@dataclass
class Step:
    """What one optimizer step reads: micro-batches of (clip id, its captions)."""

    batches: list[list[tuple[str, list[str]]]]

    @property
    def captions(self) -> int:
        """How many captions the step learns from, each counting the same."""
        return sum(len(captions) for batch in self.batches for _, captions in batch)

    @property
    def ids(self) -> list[str]:
        """The clips of the step."""
        return [clip_id for batch in self.batches for clip_id, _ in batch]


def plan_epoch(
    records: list[dataset.Record], batch_size: int, accumulate: int, captions_per_clip: int, seed: int, epoch: int
) -> list[Step]:
    """An epoch's optimizer steps, the same in every process, so that any number of them can resume anywhere."""
    by_id = {record["id"]: record for record in records}
    order = dataset.epoch_order(list(by_id), seed, epoch)
    drawn = [(i, dataset.draw_captions(by_id[i], captions_per_clip, seed, epoch)) for i in order]
    batches = [drawn[start : start + batch_size] for start in range(0, len(drawn), batch_size)]
    return [Step(batches[start : start + accumulate]) for start in range(0, len(batches), accumulate)]


def rate_at(step: int, total: int, highest: float, schedule: str, warmup: float) -> float:
    """The learning rate of an optimizer step (from 0) of `total`."""
    rising = round(warmup * total)
    if step < rising:
        return highest * (step + 1) / rising
    if schedule == "constant":
        return highest
    done = (step - rising) / max(1, total - rising)
    return highest * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
