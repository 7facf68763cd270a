"""What `torchrun` started, and how its processes share work. Without it there is one rank, which waits for nothing."""

import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn

from runtime import cli
from runtime.files import UserError

PATIENCE = timedelta(days=1)  # longer than any rank works alone; one that dies is noticed without a time limit


class Lost(UserError):
    """Another rank has ended: nothing can be done together any more."""

    code = 1


class DistributedContext:
    """This process among those that torchrun started: its rank, its device, and what all of them do together."""

    def __init__(self, device: str | None = None) -> None:
        """Join the others. `device`: as --device. Raises: UserError where there are more ranks than GPUs."""
        self.world_size, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        self.is_main = self.rank == 0  # it prints, saves and draws the bar
        self.device = cli.device(device)
        if self.device.type == "cuda":
            self.device = cli.device(f"cuda:{os.environ.get('LOCAL_RANK', self.device.index or 0)}")
            torch.cuda.set_device(self.device)
        if self.world_size > 1:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            distributed.init_process_group(backend, timeout=PATIENCE)

    def print_main(self, text: str) -> None:
        """Print once, not once a rank."""
        if self.is_main:
            print(text, flush=True)

    def shard(self, items: list) -> list:
        """This rank's part: every item is in exactly one rank's part."""
        return items[self.rank :: self.world_size]

    def gather(self, value: Any) -> list:
        """All ranks' values, in the ranks' order, on every rank. Raises: Lost."""
        values = [value] * self.world_size
        self._together(distributed.all_gather_object, values, value)
        return values

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place, on every rank. Raises: Lost."""
        self._together(distributed.all_reduce, tensor)
        return tensor

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """All ranks' gradients together, in place, as one process would have them. Raises: Lost."""
        for parameter in parameters if self.world_size > 1 else ():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            self.all_reduce(parameter.grad)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give all ranks the main one's numbers, in place. Raises: Lost."""
        for tensor in tensors:
            self._together(distributed.broadcast, tensor, 0)

    def check_equal(self, value: Any, what: str) -> None:
        """Make sure that all ranks have the same value. Raises: UserError, on all of them, where they have not."""
        if any(other != value for other in self.gather(value)):
            raise UserError(f"the processes do not have the same {what}: give all the same --data and --checkpoint")

    def close(self) -> None:
        """Leave the group. A rank that fails does not call this: its connections break, and the others notice."""
        if self.world_size > 1:
            distributed.destroy_process_group()

    def _together(self, operation: Callable, *arguments: Any) -> None:
        if self.world_size == 1:
            return
        try:
            operation(*arguments)
        except RuntimeError as error:  # DistError of NCCL, and gloo's errors, which have no class of their own
            raise Lost(f"another process of this run has ended, and the others cannot go on ({error!s:.200})") from None
