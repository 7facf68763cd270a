"""The CUDA path, on a machine that has one: in a process that sees the GPU, which all other tests do not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def test_what_runs_on_a_gpu_agrees_with_the_cpu():
    seen = {**os.environ, "CUDA_VISIBLE_DEVICES": os.environ["GPUS_FOR_TESTS"]}
    asked = [sys.executable, "-c", "import torch; raise SystemExit(not torch.cuda.is_available())"]
    if torch.version.cuda is None or subprocess.run(asked, env=seen).returncode:
        pytest.skip("there is no GPU that this torch can use")
    command = [sys.executable, "-m", "pytest", "--noconftest", "--numprocesses", "0", str(HERE / "on_gpu.py")]
    run = subprocess.run(command, env=seen, cwd=HERE.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
