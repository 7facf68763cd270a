"""Cached features in batches, read ahead by torch's DataLoader.

Letters: B clips, N tokens a clip, D their width.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from features import cache
from features.cache import Packed
from runtime.files import UserError


class FeatureDataset(Dataset):
    """A split's cached features by lists of clip ids; all clips must be of one shape and dtype, the first one's.

    An error is a batch's value here, not raised: a DataLoader would wrap it into its worker's traceback.
    """

    def __init__(self, folder: Path, first_id: str) -> None:
        self.folder, self.first = folder, folder / f"{first_id}.pt"
        self.kind = _kind(cache.load(self.first))

    def __getitem__(self, ids: list[str]) -> Packed | Exception:
        """A batch (B, N, D), or the first error in it."""
        try:
            clips = [self._load(self.folder / f"{clip_id}.pt") for clip_id in ids]
        except (UserError, OSError) as error:
            return error
        return Packed(*(None if part[0] is None else default_collate(part) for part in zip(*clips, strict=True)))

    def _load(self, path: Path) -> Packed:
        clip = cache.load(path)
        if (kind := _kind(clip)) != self.kind:
            both = f"{self.first} is {self.kind}, {path} is {kind}"
            raise UserError(f"two kinds of features in one cache: {both}; preprocess the odd one again")
        return clip


def _kind(clip: Packed) -> str:
    return f"{'x'.join(map(str, clip.values.shape))} {str(clip.values.dtype).removeprefix('torch.')}"


def feature_batches(
    folder: Path | str, id_batches: list[list[str]], workers: int = 2, pin: bool = False
) -> Iterator[Packed]:
    """Batches (B, N, D) of a split's cached features, by the clip ids of each, in the order asked for.

    `workers` processes read, each at most two batches ahead (0: this one reads, when a batch is due). `pin`: into
    page-locked memory, for non-blocking copies to a GPU.
    Raises, when the batch is due: UserError naming the file that is missing, damaged, or not like the first.
    """
    if not id_batches:
        return
    loader = DataLoader(
        FeatureDataset(Path(folder), id_batches[0][0]),
        batch_size=None,  # what the sampler gives is a batch already
        sampler=id_batches,
        num_workers=min(workers, len(id_batches)),
        pin_memory=pin,
        generator=torch.Generator(),  # without one it would draw from the generator that dropout draws from
        worker_init_fn=_leave_signals_to_the_parent,
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch


def _leave_signals_to_the_parent(_worker: int) -> None:
    """Terminals and torchrun signal whole process groups: only the parent is to stop, once it has saved."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where there are no process groups
