"""The Makefile's recipes, as make would run them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not shutil.which("make") or not (ROOT / ".git").exists(), reason="no make, or no git")


def places(target):
    """Where a target's commands read and write."""
    made = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return re.findall(r"--(data|checkpoint|results) (\S+)", made.replace("\\\n", " "))


def is_ignored(path):
    return subprocess.run(["git", "check-ignore", "-q", f"{path}/x"], cwd=ROOT).returncode == 0


def test_the_demo_leaves_nothing_that_git_sees():
    found = places("demo")
    assert {flag for flag, _ in found} == {"data", "checkpoint", "results"}
    assert [path for _, path in found if not is_ignored(path)] == []


def test_the_committed_results_are_made_by_a_target_of_their_own():
    assert places("results").count(("results", "results/sample")) == 2 and not is_ignored("results/sample")


def test_clean_removes_what_the_demo_made():
    gone = subprocess.run(["make", "-n", "clean"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert all(any(path.startswith(word) for word in gone[2:]) for _, path in places("demo"))
