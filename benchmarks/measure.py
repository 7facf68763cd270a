"""What the benchmarks share: alternating runs, memory, operations, tables that name their command, and model sizes.

The two sides of a comparison run in turns in one process, after a warm-up: what else the machine does then slows
both. A time is the median of its runs, with the least and the most beside it. Models of the published sizes are built
from their configs with made-up weights.
"""

import multiprocessing
import os
import platform
import re
import shlex
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.initialization import no_init_weights

from models import pretrained
from qformer import QFormer, VideoCaptioner
from runtime import cli, provenance
from runtime.files import UserError
from tests.reference import TextbookQFormer

SAMPLE = Path(__file__).parents[1] / "sample"
EOS = 0


def parser(description: str, runs: int | None = 5) -> cli.Parser:
    """A command line with what every benchmark takes; `runs`: how many, where the benchmark repeats itself."""
    found = cli.Parser(description.splitlines()[0])
    if runs is not None:
        found.add_argument("--runs", type=cli.count, default=runs, help="timed runs of each side")
    found.add_argument("--threads", type=cli.count, default=torch.get_num_threads(), help="threads of torch")
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


def report(script: str, title: str, header: Iterable[str], rows: Iterable[Iterable[Any]], notes: str = "") -> None:
    """Print a table, with the command that made it, the commit and the machine."""
    command = shlex.join(["python", "-m", f"benchmarks.{Path(script).stem}", *sys.argv[1:]])
    lines = [list(map(str, line)) for line in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    print(f"\n{title}\n{command}, commit {provenance.made_by()['commit']}\n{machine()}")
    if notes:
        print(notes)
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
    print(flush=True)


# ---- time ----


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


# ---- operations ----


def flops(prepare: Callable[[], Callable[[], Any]]) -> int:
    """Floating-point operations of what `prepare` returns, at any size: nothing is computed or kept in memory.

    Both run on tensors without data; attention is taken apart, since the counter knows no fused kernel of a CPU. A
    language model without numbers has no fingerprint.
    """
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        sdpa_kernel(SDPBackend.MATH),
        patch.object(pretrained, "fingerprint", lambda *_: ""),
        patch.object(QFormer, "to", lambda qformer, *_: qformer),  # tensors without data do not always move
    ):
        run = prepare()
        with FlopCounterMode(display=False) as counter:
            run()
    return counter.get_total_flops()


# ---- memory ----


def in_child(run: Callable[..., Any], *values: Any) -> Any:
    """What `run(*values)` returns in a process of its own, whose memory nothing else has touched."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run, *values).result()


def peak_memory(prepare: Callable[..., Callable[[], Any]], *values: Any, threads: int, times: int = 3) -> int:
    """Bytes that `prepare(*values)()` takes at its peak, above what is there when `prepare` returns.

    In a process of its own, `times` over: a first training step has the gradients and the optimizer's state to
    make, later ones have them already.
    """
    return in_child(_peak, prepare, values, threads, times)


def _peak(prepare: Callable[..., Callable[[], Any]], values: tuple, threads: int, times: int) -> int:
    torch.set_num_threads(threads)
    run = prepare(*values)
    try:
        before = kilobytes("status", "VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the highest water mark starts again from here
    except OSError:
        raise UserError("peak memory is read from /proc, as Linux has it") from None
    for _ in range(times):
        run()
    return 1024 * (kilobytes("status", "VmHWM") - before)


def kilobytes(file: str, field: str, pid: int | str = "self") -> int:
    """A size in /proc/<pid>/<file>, such as VmRSS in status."""
    for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    return 0


class Memory:
    """Looks `every` so many seconds, in a `with`, at the memory of this process and all that it started.

    `values`: bytes each time; pages that processes share count once.
    """

    def __init__(self, every: float = 0.2) -> None:
        self.every, self.values = every, []
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self.ended.wait(self.every):
            self.values.append(1024 * sum(map(self._kilobytes, tree(os.getpid()))))

    @staticmethod
    def _kilobytes(pid: int) -> int:
        try:
            return kilobytes("smaps_rollup", "Pss", pid)
        except OSError:
            return 0  # it has just ended

    def __enter__(self) -> "Memory":
        """Start."""
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.ended.set()
        self.thread.join()

    @property
    def early_and_late(self) -> tuple[float, float]:
        """The medians about a tenth of the way, and in the last tenth but for its very end."""
        part = max(1, len(self.values) // 20)
        return median(self.values[part : 3 * part] or [0]), median(self.values[-3 * part : -part] or [0])


def tree(pid: int) -> list[int]:
    """The ids of a process and of all that it started, and they started."""
    found = [pid]
    for known in found:
        try:
            for task in Path(f"/proc/{known}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
        except OSError:
            continue  # it has just ended
    return found


# ---- models ----


@dataclass(frozen=True)
class Size:
    """A language model, a Q-Former and a clip's features."""

    lm: dict[str, int]  # of Qwen2Config
    tokens: int  # N
    visual_dim: int  # D
    qformer: dict[str, int] = field(default_factory=dict)  # where it differs from the published one


def _qwen2(vocabulary: int, width: int, mlp: int, layers: int, heads: int, positions: int) -> dict[str, int]:
    sizes = {"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": heads, "num_key_value_heads": 2, "max_position_embeddings": positions}


SIZES = {  # real: Qwen/Qwen2-1.5B, and facebook/vjepa2-vitl-fpc64-256 at 32 frames
    "real": Size(_qwen2(151936, 1536, 8960, 28, 12, 131072), tokens=4096, visual_dim=1024),
    "small": Size(_qwen2(512, 64, 128, 2, 4, 1024), tokens=64, visual_dim=32, qformer={"num_queries": 8}),
}


class WordTokenizer:
    """A token for each word or mark, as many as Qwen2's tokenizer makes of plain English."""

    eos_token_id = pad_token_id = EOS

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        """As transformers' tokenizers are called; the ids have no meaning."""
        words = re.findall(r"\w+|[^\w\s]", text)
        return SimpleNamespace(input_ids=[1 + sum(word.encode()) % (self.vocabulary - 1) for word in words])

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        """As transformers' tokenizers are called."""
        return [" ".join(map(str, row)) for row in rows]


def lm_of(size: Size) -> nn.Module:
    """Qwen2 with made-up weights in float32; at real size 6 GB, in seconds (drawing them takes a minute)."""
    with no_init_weights():
        lm = Qwen2ForCausalLM(Qwen2Config(**size.lm, rope_theta=1e6, tie_word_embeddings=True, eos_token_id=EOS))
    numbers = 0.02 * torch.randn(1_000_003)  # a prime: no two rows of a matrix are alike
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1)  # norms; a bias of queries and keys moves their scores little
                continue
            for part in parameter.view(-1).split(len(numbers)):
                part.copy_(numbers[: len(part)])
    return lm


def qformers(size: Size, **changes: float) -> tuple[QFormer, TextbookQFormer]:
    """The product's Q-Former and the textbook's, with the same weights."""
    sizes = {"dim": size.lm["hidden_size"], "visual_dim": size.visual_dim, **size.qformer, **changes}
    torch.manual_seed(0)
    absorbed = QFormer(**sizes)
    textbook = TextbookQFormer(**sizes)
    textbook.load_state_dict(absorbed.state_dict())
    return absorbed, textbook


def captioner(size: Size) -> VideoCaptioner:
    """A captioner with made-up weights."""
    return VideoCaptioner(lm_of(size), WordTokenizer(size.lm["vocab_size"]), qformers(size)[0])


def features(size: Size, batch: int) -> Tensor:
    """(B, N, D), of the scale that V-JEPA 2's last norm gives."""
    return torch.randn(batch, size.tokens, size.visual_dim)


def captions(count: int, tokens: int) -> list[str]:
    """Captions of so many tokens each."""
    return [" ".join(f"word{number}x{place}" for place in range(tokens)) for number in range(count)]
