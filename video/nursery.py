"""Processes that decode, forked by a nursery: one that has imported torch and decord once and has no threads.

So a worker starts in milliseconds, also when the parent is busy with many threads, and does not import its main
script. A damaged video may hang or kill a worker: nothing else ends with it.
"""

import contextlib
import ctypes
import json
import mmap
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from video.reader import Transform, VideoError, read_clip

FILE = os.path.abspath(__file__)  # run as a script where forking is not safe
SLOTS = 2  # clips a worker may have in hand: one being decoded, one that waits, so that it never idles
WORKER_MEMORY = 4 << 30  # bytes a worker may take beyond what it starts with: a damaged header can ask for any size


class Nursery:
    """The parent's handle on the process that forks workers."""

    def __init__(self) -> None:
        """Start it: at once by forking this process, or in a second or two where that is not safe.

        A fork has this thread alone: any other may have held something that it waits for. From the main thread it is
        what torch's own DataLoader does, with the same care: the child uses no GPU and one core.
        """
        self.socket, theirs = socket.socketpair()
        with theirs:
            if sys.platform == "linux" and threading.current_thread() is threading.main_thread():
                fork = multiprocessing.get_context("fork")
                self.process = fork.Process(target=_forked, args=(self.socket, theirs), daemon=True)
                self.process.start()
            else:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "video.nursery", str(theirs.fileno())],
                    cwd=os.path.dirname(os.path.dirname(FILE)),
                    env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                    pass_fds=[theirs.fileno()],
                )

    def is_alive(self) -> bool:
        """Whether it can still fork."""
        return self.process.poll() is None if isinstance(self.process, subprocess.Popen) else self.process.is_alive()

    def fork(self, order: dict[str, Any], pipe: Connection, memory: int) -> None:
        """Ask for a worker. One message, one worker: the socket keeps what comes before the nursery is up."""
        line = json.dumps(order).encode().ljust(_ORDER)
        with contextlib.suppress(OSError):  # it has died: the worker's pipe says so
            socket.send_fds(self.socket, [line], [pipe.fileno(), memory])

    def close(self) -> None:
        """End it and its workers."""
        self.socket.close()
        self.process.kill()  # its workers end with it
        self.process.wait() if isinstance(self.process, subprocess.Popen) else self.process.join()


_ORDER = 1024  # bytes of one order, padded


def _forked(others_end: socket.socket, parent: socket.socket) -> None:
    others_end.close()  # or the end of the parent would not be noticed
    _nurse(parent)


def _nurse(parent: socket.socket) -> None:
    """Fork a worker for each order; tell a worker's pipe when it has ended."""
    pipes: dict[int, Connection] = {}

    def reap(*_: Any) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                with contextlib.suppress(OSError), pipes.pop(ended[0]) as pipe:
                    pipe.send(("ended", os.waitstatus_to_exitcode(ended[1])))

    import decord  # noqa: F401  once, before forking

    # FFmpeg and decord write to the terminal about every damaged byte; the clip is named instead
    for stream in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    with contextlib.suppress(OSError):
        os.setsid()  # Ctrl-C is the parent's to answer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, reap)
    torch.set_num_threads(1)
    with contextlib.suppress(OSError):
        while True:
            order, handles, _, _ = socket.recv_fds(parent, _ORDER, 2, socket.MSG_WAITALL)
            if len(handles) < 2:
                return  # the parent has ended
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
            pipe, memory = Connection(handles[0]), handles[1]
            pid = os.fork()
            if pid == 0:
                try:
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
                    _work(pipe, memory, json.loads(order))
                finally:
                    os._exit(0)
            pipes[pid] = pipe
            os.close(memory)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})


def end_with_parent() -> None:
    """Linux: be killed when the parent ends, even over a clip that hangs. Elsewhere the alarm has to do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _work(pipe: Connection, memory: int, order: dict[str, Any]) -> None:
    """A worker: decode what the pipe asks for, until it closes."""
    end_with_parent()
    limit_memory()
    transform = Transform(**order["transform"])
    frames, timeout = order["frames"], order["timeout"]
    shared = np.frombuffer(mmap.mmap(memory, order["size"]), np.uint8).reshape(SLOTS, -1)
    with contextlib.suppress(EOFError, OSError):
        pipe.send(("pid", os.getpid()))
        while True:
            slot, path, start, end = pipe.recv()
            # Not handled, so the kernel ends the process on time, wherever in whoever's code it hangs.
            signal.setitimer(signal.ITIMER_REAL, timeout)
            try:
                clip = read_clip(path, frames, transform, start, end)
                shared[slot] = clip.numpy().reshape(-1)
                said = ("clip", None)
            except VideoError as error:
                said = ("failed", str(error))
            except MemoryError:
                said = ("failed", "it needs more memory than decoding may use")
            except Exception as error:
                said = ("failed", f"it cannot be decoded ({type(error).__name__})")
            signal.setitimer(signal.ITIMER_REAL, 0)
            pipe.send(said)


def limit_memory() -> None:
    """Linux: let this process ask for WORKER_MEMORY more than it has, and leave no core file when it dies of it."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        return  # not Linux: what a header claims is limited by frames.MAX_PIXELS alone
    limit = pages * resource.getpagesize() + WORKER_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as _parent:
        _nurse(_parent)
