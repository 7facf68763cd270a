"""Many videos to frames in worker processes, which a damaged video may hang or kill without ending the run.

Each worker decodes and resizes one clip at a time into memory that it shares with the parent. A clip that takes too
long, or that takes its worker with it, is named with its reason, and a new worker goes on with the rest.

nursery.py starts the workers.
"""

import contextlib
import mmap
import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from runtime.files import UserError
from video.nursery import FILE, SLOTS, Nursery
from video.reader import Transform

TRIES = 3  # workers that end before they are up, one after another, until it is called an error
GRACE = 5.0  # seconds past the time limit after which the parent ends a worker that could not end itself


class Failure(NamedTuple):
    """A clip that could not be decoded, and why."""

    reason: str


class _Job(NamedTuple):
    key: Any
    path: str
    start: float | None = None  # seconds; None: the whole clip
    end: float | None = None


@dataclass
class _Worker:
    pipe: Connection
    memory: mmap.mmap
    pid: int | None = None  # it says so itself, once it is up
    jobs: deque[tuple[int, _Job]] = field(default_factory=deque)  # (slot, job), the first one being decoded
    since: float = 0.0  # when the first one was begun, or later

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


class ClipDecoder:
    """Iterate over (key, frames) as clips are finished, in no fixed order.

    Frames are uint8 (T, 3, S, S), or a Failure. A thread hands out jobs and collects clips, at most `ahead` of them
    more than were taken, so that whoever encodes finds them ready. Use it in a `with`, which ends the workers.
    """

    def __init__(
        self,
        paths: Iterable[tuple],
        transform: Transform,
        frames: int,
        workers: int | None = None,
        timeout: float = 60.0,
        ahead: int = 16,
        nursery: Nursery | None = None,
    ) -> None:
        """Decode `paths`, each (key, path) or (key, path, start, end) with seconds.

        They are asked for one at a time, as workers come free. `timeout`: seconds that one clip may take. `nursery`:
        one that was started before, while other things load.
        """
        self.jobs = iter(paths)
        self.transform, self.frames, self.timeout = transform, frames, timeout
        self.shape = (frames, 3, transform.size, transform.size)
        self.bytes = int(np.prod(self.shape))
        self.count = workers or os.cpu_count() or 1
        self.out: queue.Queue = queue.Queue(maxsize=ahead)
        self.closing = threading.Event()
        self.workers: list[_Worker] = []
        self.again: deque[_Job] = deque()  # waited in a worker that died over another clip
        self.stillborn = 0
        self.nursery, self.own_nursery = nursery, nursery is None
        self.thread = threading.Thread(target=self._run, name="decoding", daemon=True)

    def __enter__(self) -> "ClipDecoder":
        """Start the workers, so that they come up while the caller loads its encoder."""
        if self.thread.ident is None:
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the workers, whatever they are at."""
        self.closing.set()
        self.thread.join()

    def __iter__(self) -> Iterator[tuple[Any, Tensor | Failure]]:
        """Each clip once. Raises what reading the jobs raised, and UserError where no worker starts."""
        with self:
            while (item := self.out.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item

    # ---- the thread that hands out jobs and collects clips ----

    def _run(self) -> None:
        end: BaseException | None = None
        try:
            while not self.closing.is_set() and self._serve():
                pass
        except BaseException as error:
            end = error
        finally:
            for worker in self.workers:
                self._stop(worker)
            if self.nursery and self.own_nursery:
                self.nursery.close()
            self._put(end)

    def _put(self, item: Any) -> None:
        while not self.closing.is_set():
            with contextlib.suppress(queue.Full):
                return self.out.put(item, timeout=0.1)

    def _serve(self) -> bool:
        """One round; False when all is done."""
        self._hand_out()
        busy = {worker.pipe: worker for worker in self.workers if worker.jobs}
        for pipe in wait(list(busy), timeout=0.2) if busy else ():
            self._collect(busy.pop(pipe))
        for worker in busy.values():
            if worker.pid and time.monotonic() - worker.since > self.timeout + GRACE:
                worker.kill()  # the nursery tells its pipe: a later round collects it
        return bool(self.again) or any(worker.jobs for worker in self.workers)

    def _hand_out(self) -> None:
        """Give every worker something to do, the idle ones first; start workers while there are jobs for them."""
        for depth in range(SLOTS):
            for number in range(self.count):
                if number < len(self.workers) and len(self.workers[number].jobs) > depth:
                    continue
                job = self._next_job()
                if job is None:
                    return
                if number == len(self.workers):
                    self.workers.append(self._start())
                worker = self.workers[number]
                slot = next(slot for slot in range(SLOTS) if slot not in {used for used, _ in worker.jobs})
                if not worker.jobs:
                    worker.since = time.monotonic()
                worker.jobs.append((slot, job))
                with contextlib.suppress(OSError):  # it has ended: collecting says so
                    worker.pipe.send((slot, *job[1:]))

    def _next_job(self) -> _Job | None:
        if self.again:
            return self.again.popleft()
        job = next(self.jobs, None)
        return None if job is None else _Job(job[0], os.path.abspath(job[1]), *job[2:])

    def _collect(self, worker: _Worker) -> None:
        """Take what a worker says: its pid, a finished clip, or (from the nursery) that it ended."""
        try:
            what, value = worker.pipe.recv()
        except (EOFError, OSError):  # the nursery itself is gone
            what, value = "ended", None
        if what == "pid":
            worker.pid, worker.since, self.stillborn = value, time.monotonic(), 0
        elif what == "ended":
            self._replace(worker, value)
        else:
            slot, job = worker.jobs.popleft()
            worker.since = time.monotonic()
            self._put((job.key, Failure(value) if what == "failed" else self._copy(worker, slot)))

    def _copy(self, worker: _Worker, slot: int) -> Tensor:
        clip = torch.empty(self.shape, dtype=torch.uint8)
        shared = np.frombuffer(worker.memory, np.uint8, self.bytes, slot * self.bytes)
        np.copyto(clip.numpy(), shared.reshape(self.shape))  # without the interpreter's lock
        return clip

    def _replace(self, worker: _Worker, code: int | None) -> None:
        """A worker that ended over a clip: start another, name the clip, keep what waited behind it."""
        worker.pipe.close()
        self.workers[self.workers.index(worker)] = self._start()
        if worker.pid is None:  # no clip is to blame
            self.again.extend(job for _, job in worker.jobs)
            self.stillborn += 1
            if self.stillborn > TRIES:
                raise UserError(f"the processes that decode do not start: see what python {FILE} says")
            return
        _, job = worker.jobs.popleft()
        self.again.extend(waiting for _, waiting in worker.jobs)
        late = code == -signal.SIGALRM or time.monotonic() - worker.since > self.timeout + GRACE
        reason = f"decoding took longer than {self.timeout:g} s" if late else "decoding it ended the worker process"
        self._put((job.key, Failure(reason)))

    def _start(self) -> _Worker:
        if self.nursery is None or not self.nursery.is_alive():
            self.nursery, self.own_nursery = Nursery(), True
        size = SLOTS * self.bytes
        with _anonymous_file(size) as file:
            ours, theirs = Pipe()
            worker = _Worker(ours, mmap.mmap(file.fileno(), size))
            order = {"transform": asdict(self.transform), "frames": self.frames, "timeout": self.timeout, "size": size}
            self.nursery.fork(order, theirs, file.fileno())
            theirs.close()
        return worker

    @staticmethod
    def _stop(worker: _Worker) -> None:
        if worker.pid and worker.jobs:
            worker.kill()
        worker.pipe.close()  # an idle worker ends with it


def _anonymous_file(size: int) -> Any:
    """A file in memory without a name. Not /dev/shm, which containers keep small."""
    file = os.fdopen(os.memfd_create("frames"), "r+b") if hasattr(os, "memfd_create") else TemporaryFile()  # noqa: SIM115
    os.truncate(file.fileno(), size)
    return file
