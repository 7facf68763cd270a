"""One process or many: what `torchrun` started, and how its processes share work.

Without torchrun there is one rank, and nothing here waits for anything.
"""

import atexit
import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.rendezvous import rendezvous

from runtime import files
from runtime.files import UserError

STARTING = timedelta(minutes=30)  # for all processes to come up
PATIENCE = timedelta(days=1)  # longer than any rank works alone; one that dies is noticed at once, without a time limit
HEARING = timedelta(seconds=5)  # for asking whether another rank has told the user of an error

# DDP drops its group while it holds Python's lock, and then, where its reference is the last, waits for the group's
# threads, which may want the lock (pytorch/pytorch#56297). These references go last, and while Python still runs.
_groups: list[distributed.ProcessGroup] = []
atexit.register(_groups.clear)


class Lost(UserError):
    """Another rank has ended: nothing can be done together any more."""


class Ranks:
    """This process among those that torchrun started."""

    def __init__(self) -> None:
        self.world, self.rank = _world(), int(os.environ.get("RANK", "0"))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
        if self.device.type == "cuda":
            if local >= (gpus := torch.cuda.device_count()):
                raise UserError(f"there are more processes than GPUs: give torchrun --nproc-per-node {gpus}")
            torch.cuda.set_device(self.device)
        if self.world > 1:
            self._join()

    def _join(self) -> None:
        # A process may start more than once, and must not read the addresses of its first group.
        store = distributed.PrefixStore(f"start {len(_groups)}", _store(STARTING))
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, store=store, rank=self.rank, world_size=self.world, timeout=PATIENCE)
        _groups.append(distributed.group.WORLD)

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

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, on every rank."""
        if self.world > 1:
            distributed.all_reduce(values)
        return values

    def copy_main(self, tensors: Iterable[Tensor]) -> None:
        """Give all ranks the main one's numbers."""
        if self.world > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, 0)

    def agree(self, value: Any, what: str) -> None:
        """Make sure that all ranks have the same. Raises: UserError, on all of them, where they have not."""
        if any(other != value for other in self.gather(value)):
            raise UserError(
                f"the processes do not have the same {what}: every machine needs the same --data and --checkpoint, "
                "and nothing may be written there while they start"
            )

    def close(self) -> None:
        """Leave the group; a rank that fails does not call this, so that the others learn of it."""
        if self.world > 1:
            distributed.destroy_process_group()


def start() -> Ranks:
    """Join the processes that torchrun started, if it did. Raises: UserError where there are more ranks than GPUs."""
    return Ranks()


@contextlib.contextmanager
def together(check: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Around work with the other ranks. Raises: Lost where one has ended, unless `check` knows why, and raises."""
    try:
        yield
    except RuntimeError as error:
        # gloo has no exception of its own: its errors begin with a place in its source.
        if _world() == 1 or not (isinstance(error, distributed.DistError) or "gloo" in str(error)):
            raise
        check()
        raise Lost("another process of this run has ended; without it the others cannot go on") from None


def run(main: Callable[[], Any]) -> None:
    """files.run for a script that torchrun may start many times: what all ranks have to complain of is told once."""

    def main_together() -> Any:
        with together():
            return main()

    files.run(main_together, tell=_tell_once)


def _tell_once(line: str, error: BaseException) -> None:
    if _world() == 1:
        files.tell(line, error)
        return
    # No rank may end before the line is printed: torchrun ends all the others as soon as one has ended.
    key = hashlib.sha256(line.encode("utf-8", "replace")).hexdigest()
    try:
        store = _store(HEARING)
        if isinstance(error, Lost) and store.check(["an error was told"]):
            return
        if store.add(f"{key} begun", 1) > 1:
            store.wait([f"{key} told"], HEARING)
            return
    except RuntimeError:  # the store has gone with the process that held it, or the other rank was too slow
        store = None
    files.tell(line, error)
    if store is not None:
        with contextlib.suppress(RuntimeError):
            store.set("an error was told", "")
            store.set(f"{key} told", "")


def _store(patience: timedelta) -> distributed.Store:
    """The place where ranks leave word for each other, which torchrun keeps."""
    store, _, _ = next(rendezvous("env://", timeout=patience))
    return store


def _world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
