"""What happens before torch is loaded, whichever door it comes in by: OpenMP's threads, and a script's first line."""

import ast
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ["train", "evaluate", "infer", "preprocess_something_something_v2", "prepare_annotations"]
DOORS = [*SCRIPTS, "qformer", "sample/__main__"]


@pytest.mark.parametrize("door", DOORS)
def test_it_is_the_first_import_behind_the_standard_library(door):
    body = ast.parse((ROOT / f"{door}.py").read_text(encoding="utf-8")).body
    names = [node.names[0].name if isinstance(node, ast.Import) else node.module for node in imports(body)]
    assert next(name for name in names if name.split(".")[0] not in sys.stdlib_module_names) == "runtime.threads"


def imports(body):
    return [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]


def spins(**environment):
    """What GNU's OpenMP says, as it is loaded, of the environment that it found."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_WAIT", "GOMP_", "KMP_"))}
    command = [sys.executable, "-c", "import runtime.threads, torch"]
    environment = {**plain, "OMP_DISPLAY_ENV": "verbose", **environment}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", run.stderr))


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings GNU's OpenMP on Linux only")
def test_threads_of_torch_spin_for_microseconds_unless_the_user_says_otherwise():
    assert spins() == {"1000"}
    assert spins(GOMP_SPINCOUNT="77") == {"77"}
    assert spins(OMP_WAIT_POLICY="passive") == {"0"}


@pytest.mark.parametrize("words", [[f"{script}.py"] for script in SCRIPTS] + [["-m", "sample", "render"]])
def test_a_script_says_at_once_that_it_runs(words):
    began = time.monotonic()
    command = [sys.executable, *words, "--data", "/nowhere"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as script:
        first = script.stdout.readline()
        took = time.monotonic() - began
        script.kill()
    assert first == b"loading torch ...\n" and took < 3


@pytest.mark.parametrize(
    "command, rank", [(["-c", "import qformer"], "0"), (["prepare_annotations.py", "--help"], "1")]
)
def test_a_program_of_others_and_another_rank_say_nothing(command, rank):
    environment = {**os.environ, "RANK": rank}
    run = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
