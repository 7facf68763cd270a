"""Scripts in processes of their own, without the seconds that importing torch takes each time."""

import contextlib
import importlib
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

from torch import distributed

from runtime import cli

ROOT = Path(__file__).parents[1]

# Where there is a fork server, every script is a fork of a clean process that has imported all of it once. The last
# five are what the scripts' libraries import late: three seconds of processor time for each process.
PRELOADED = [
    "train",
    "evaluate",
    "transformers.models.qwen2.modeling_qwen2",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.nn.parallel.distributed",
    "matplotlib.backends.backend_agg",
]
forks = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
if forks.get_start_method() == "forkserver":
    forks.set_forkserver_preload(PRELOADED)


class Script:
    """`python <module>.py <words>`, running; what it prints on either stream goes to `log`."""

    def __init__(self, module: str, words: list, log: Path, patch=None, **environment) -> None:
        """`patch`: a function of this package that the process calls before it begins."""
        self.log = Path(log)
        environment = {**os.environ, **{name: str(value) for name, value in environment.items()}}
        self.process = forks.Process(target=_run, args=(module, list(map(str, words)), str(log), patch, environment))
        self.process.start()

    def wait(self, timeout: float = 120) -> int:
        """Its exit code (-9 where SIGKILL ended it)."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running after {timeout} s: {self.said()}"
        return self.process.exitcode

    def poll(self) -> int | None:
        """Its exit code, or None while it is running."""
        return self.process.exitcode

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def errors(self) -> list[str]:
        """The lines that tell of an error; a traceback counts as one."""
        return [line for line in self.said().splitlines() if line.startswith(("error:", "Traceback"))]


def _run(module: str, words: list[str], log: str, patch, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.argv = [f"{module}.py", *words]
    if patch is not None:
        patch()
    cli.run(importlib.import_module(module).main)


@contextlib.contextmanager
def torchrun(count: int, words: list, log: Path):
    """torchrun with `count` processes of one script, running, without Java; it and they are ended at the end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    with open(log, "w") as file:
        environment = {**os.environ, "PATH": "/nowhere"}
        run = subprocess.Popen([*command, *map(str, words)], cwd=ROOT, env=environment, stdout=file, stderr=file)
    try:
        yield run
    finally:
        run.terminate()  # killed at once, it would leave its processes behind
        run.wait(60)


class Ranks:
    """`count` processes of one script, started as torchrun starts them (but nothing ends the others when one ends)."""

    def __init__(self, count: int, module: str, words: list, folder: Path, patch=None, **environment) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.store = distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        environment |= {
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": self.store.port,
            "TORCHELASTIC_USE_AGENT_STORE": True,
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
        }
        self.scripts = [
            Script(module, words, folder / f"rank{rank}.log", patch, RANK=rank, LOCAL_RANK=rank, **environment)
            for rank in range(count)
        ]

    def wait(self, timeout: float = 120) -> list[int]:
        return [script.wait(timeout) for script in self.scripts]

    def errors(self) -> list[str]:
        return [line for script in self.scripts for line in script.errors()]
