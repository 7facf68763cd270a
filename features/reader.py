"""Cached features in batches, read ahead by torch's DataLoader.

Letters: B clips, N tokens a clip, D their width.
"""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from features import cache
from features.cache import Packed
from runtime.files import UserError


class FeatureDataset(Dataset):
    """A split's cached features by clip id; all clips must be of one shape and dtype, the first one's.

    An error is a clip's value here, not raised: a DataLoader would wrap it into its worker's traceback.
    """

    def __init__(self, folder: Path, first_id: str) -> None:
        self.folder, self.first = folder, folder / f"{first_id}.pt"
        self.kind = cache.load(self.first).kind

    def __getitem__(self, clip_id: str) -> Packed | Exception:
        """One clip (N, D)."""
        path = self.folder / f"{clip_id}.pt"
        try:
            clip = cache.load(path)
        except (UserError, OSError) as error:
            return error
        if clip.kind == self.kind:
            return clip
        both = f"{self.first} is {self.kind}, {path} is {clip.kind}"
        return UserError(f"two kinds of features in one cache: {both}; make the odd one again")


def _collate(clips: list[Packed | Exception]) -> Packed | Exception:
    """Clips (N, D) to a batch (B, N, D), or the first error among them."""
    if error := next((clip for clip in clips if isinstance(clip, Exception)), None):
        return error
    return Packed(*(None if part[0] is None else default_collate(list(part)) for part in zip(*clips, strict=True)))


def feature_batches(
    folder: Path | str, id_batches: list[list[str]], workers: int | None = None, pin: bool = False
) -> Iterator[Packed]:
    """Batches (B, N, D) of a split's `folder`, in the order of `id_batches`: the clip ids of each.

    `workers` processes read, each at most two batches ahead; 0: this one reads, when a batch is due; None: 2 for a GPU,
    which is not to wait, 0 where the CPU computes, which would lose its cores to them. `pin`: into page-locked memory,
    for non-blocking copies to a GPU.
    Raises, when the batch is due: UserError naming a file that is damaged or not like the first; OSError for one gone.
    """
    if not id_batches:
        return
    if workers is None:
        workers = 2 if pin else 0
    loader = DataLoader(
        FeatureDataset(Path(folder), id_batches[0][0]),
        batch_sampler=id_batches,
        collate_fn=_collate,
        num_workers=min(workers, len(id_batches)),
        pin_memory=pin,
        generator=torch.Generator(),  # without one it would draw from the generator that dropout draws from
        worker_init_fn=_leave_signals_to_the_parent,
        # Under a fork server, a worker would not notice that this process was killed.
        multiprocessing_context="fork" if workers and sys.platform == "linux" and hasattr(os, "fork") else None,
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch


def _leave_signals_to_the_parent(_worker: int) -> None:
    """Signals go to whole process groups: a worker that ended by one would be an error in the parent as it saves."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where there are no process groups
