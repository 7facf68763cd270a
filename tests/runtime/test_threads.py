"""How long OpenMP's threads spin is decided before torch loads it, whichever door torch comes in by."""

import os
import re
import subprocess
import sys

import pytest

DOORS = ["train", "evaluate", "infer", "preprocess_something_something_v2", "qformer", "sample.__main__"]


def spins(door, **environment):
    """What GNU's OpenMP says, as it is loaded, of the environment that it found."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_WAIT", "GOMP_", "KMP_"))}
    environment = {**plain, "OMP_DISPLAY_ENV": "verbose", **environment}
    run = subprocess.run([sys.executable, "-c", f"import {door}"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", run.stderr))


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="torch brings GNU's OpenMP on Linux only")


@pytest.mark.parametrize("door", DOORS)
def test_threads_of_torch_do_not_spin_for_long(door):
    assert spins(door) == {"1000"}


def test_what_the_user_set_stays():
    assert spins("qformer", GOMP_SPINCOUNT="77") == {"77"}
    assert spins("qformer", OMP_WAIT_POLICY="passive") == {"0"}
