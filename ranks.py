"""One process or many: what `torchrun` started, and how its processes share work.

Without torchrun there is one rank, and nothing here waits for anything.
"""

import os
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from files import UserError

PATIENCE = timedelta(minutes=30)  # longer than any rank works alone (scoring with METEOR)


class Ranks:
    """This process among those that torchrun started."""

    def __init__(self) -> None:
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
        if self.device.type == "cuda":
            if local >= (gpus := torch.cuda.device_count()):
                raise UserError(f"rank {self.rank} has no GPU of its own: give torchrun --nproc-per-node {gpus}")
            torch.cuda.set_device(self.device)
        if self.world > 1:
            distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=PATIENCE)

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that prints, saves and draws the bar."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print once, not once a rank."""
        if self.is_main:
            print(text, flush=True)

    def share(self, items: list) -> list:
        """This rank's part: every item is in exactly one rank's part."""
        return items[self.rank :: self.world]

    def gather(self, value: Any) -> list:
        """All ranks' values, in the ranks' order, on every rank."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        distributed.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Wait until all ranks are here."""
        if self.world > 1:
            distributed.barrier()

    def close(self) -> None:
        """Leave the group; a rank that fails does not call this, so that the others learn of it."""
        if self.world > 1:
            distributed.destroy_process_group()


def start() -> Ranks:
    """Join the processes that torchrun started, if it did. Raises: UserError where there are more ranks than GPUs."""
    return Ranks()
