"""What the benchmarks share: alternating runs, peak memory, FLOPs, and tables that name the machine and the command.

The two sides of a comparison run in turns in one process, after a warm-up: what else the machine does then slows
both. A time is the median of its runs, with the least and the most beside it.
"""

import argparse
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from runtime import cli as arguments
from runtime import provenance
from runtime.files import UserError


def parser(description: str, runs: int | None = 5) -> argparse.ArgumentParser:
    """A command line with what every benchmark takes; `runs`: how many, where the benchmark repeats itself."""
    found = arguments.Parser(description)
    if runs is not None:
        found.add_argument("--runs", type=arguments.count, default=runs, help="timed runs of each side")
    found.add_argument("--threads", type=arguments.count, default=torch.get_num_threads(), help="threads of torch")
    return found


def machine() -> str:
    """The processor, its cores, and what computes on them."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        pass  # not Linux
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # that we may use
    return f"{name}, {cores} cores, torch {torch.__version__} with {torch.get_num_threads()} threads, float32"


def times(sides: dict[str, Callable[[], Any]], runs: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each run of each side, in turns; the first `warmup` rounds do not count.

    Every other round goes backwards: a side that leaves much memory behind slows the one after it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warmup + runs):
        for name, run in list(sides.items())[:: -1 if number % 2 else 1]:
            begun = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begun)
    return {name: measured[warmup:] for name, measured in seconds.items()}


median = statistics.median


def paired(one: list[float], other: list[float]) -> float:
    """How many times `one` is `other`: the median over rounds, in each of which the machine was as fast for both."""
    return median(a / b for a, b in zip(one, other, strict=True))


def spread(values: list[float], digits: int = 2, scale: float = 1) -> str:
    """`median (least - most)`, of more than one value."""
    shown = [f"{scale * value:.{digits}f}" for value in (median(values), min(values), max(values))]
    return f"{shown[0]} ({shown[1]} - {shown[2]})" if len(values) > 1 else shown[0]


def flops(prepare: Callable[[], Callable[[], Any]]) -> int:
    """Floating-point operations of what `prepare` returns, at any size: nothing is computed or kept in memory.

    Both run on tensors without data; attention is taken apart, since the counter knows no fused kernel of a CPU.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH):
        run = prepare()
        with FlopCounterMode(display=False) as counter:
            run()
    return counter.get_total_flops()


def peak_memory(prepare: Callable[..., Callable[[], Any]], *values: Any, threads: int, times: int = 3) -> int:
    """Bytes that `prepare(*values)()` takes at its peak, above what is there when `prepare` returns.

    In a process of its own, `times` over: a first training step has the gradients and the optimizer's state to
    make, later ones have them already.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak, prepare, values, threads, times).result()


def _peak(prepare: Callable[..., Callable[[], Any]], values: tuple, threads: int, times: int) -> int:
    torch.set_num_threads(threads)
    run = prepare(*values)
    try:
        before = status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the highest water mark starts again from here
    except OSError:
        raise UserError("peak memory is read from /proc, as Linux has it") from None
    for _ in range(times):
        run()
    return status_bytes("VmHWM") - before


def status_bytes(field: str, pid: int | str = "self") -> int:
    """A size in /proc/<pid>/status, such as VmRSS."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    return 0


def resident_tree(pid: int) -> int:
    """Resident bytes of a process and all that it started; pages that they share count once for each."""
    total, waiting = 0, [pid]
    while waiting:
        pid = waiting.pop()
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
            total += status_bytes("VmRSS", pid)
        except OSError:
            continue  # it has just ended
    return total


class Sampler:
    """Calls `read` every `seconds` in a thread, in a `with`; `values` has what it returned, with the time."""

    def __init__(self, read: Callable[[], Any], seconds: float = 0.1) -> None:
        self.read, self.seconds, self.values = read, seconds, []
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self.ended.wait(self.seconds):
            self.values.append((time.perf_counter(), self.read()))

    def __enter__(self) -> "Sampler":
        """Start."""
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.ended.set()
        self.thread.join()


def report(script: str, title: str, header: Iterable[str], rows: Iterable[Iterable[Any]], notes: str = "") -> None:
    """Print a table, with the command that made it, the commit and the machine."""
    command = shlex.join(["python", f"benchmarks/{Path(script).name}", *sys.argv[1:]])
    lines = [list(map(str, line)) for line in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    print(f"\n{title}\n{command}, commit {provenance.made_by()['commit']}\n{machine()}")
    if notes:
        print(notes)
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
    print(flush=True)
