"""Cached features in batches, read ahead by torch's DataLoader.

Letters: B clips, N tokens a clip, D their width.
"""

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader, default_collate

from features import cache
from features.cache import Packed
from runtime.files import UserError


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
    first = Path(folder) / f"{id_batches[0][0]}.pt"
    loader = DataLoader(
        id_batches,
        batch_size=None,  # an item is a batch already
        collate_fn=partial(_read, first, _kind(cache.load(first))),
        num_workers=min(workers, len(id_batches)),
        pin_memory=pin,
        generator=torch.Generator(),  # without one it would draw from the generator that dropout draws from
        worker_init_fn=_leave_signals_to_the_parent,
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch


def _read(first: Path, kind: str, ids: list[str]) -> Packed | Exception:
    """A batch of clips like `first` (B, N, D); an error is returned: raised, it would become a worker's traceback."""
    clips = []
    try:
        for path in (first.parent / f"{clip_id}.pt" for clip_id in ids):
            clips.append(cache.load(path))
            if (found := _kind(clips[-1])) != kind:
                both = f"{first} is {kind}, {path} is {found}"
                raise UserError(f"two kinds of features in one cache: {both}; preprocess the odd one again")
    except (UserError, OSError) as error:
        return error
    return Packed(*(None if part[0] is None else default_collate(part) for part in zip(*clips, strict=True)))


def _kind(clip: Packed) -> str:
    return f"{'x'.join(map(str, clip.values.shape))} {str(clip.values.dtype).removeprefix('torch.')}"


def _leave_signals_to_the_parent(_worker: int) -> None:
    """Terminals and torchrun signal whole process groups: only the parent is to stop, once it has saved."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where there are no process groups
