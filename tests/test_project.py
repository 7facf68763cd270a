import re
import tomllib
from pathlib import Path

import pytest

from tests import processes

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SCRIPTS = ["preprocess_something_something_v2", "prepare_annotations", "train", "evaluate", "infer", "sample"]


def test_an_install_brings_every_module():
    modules = sorted(path.stem for path in ROOT.glob("*.py"))
    assert sorted(PROJECT["tool"]["setuptools"]["py-modules"]) == modules


def test_every_dependency_has_its_exact_version():
    wanted = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["test"]]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)  # names and versions, no addresses
    exact = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    names = {re.match(r"[\w.-]+", entry)[0].lower().replace("_", "-") for entry in wanted if "!=" not in entry}
    assert names <= exact


@pytest.mark.parametrize("script", SCRIPTS)
def test_modules_do_not_import_scripts_and_scripts_not_each_other(script):
    for path in ROOT.glob("*.py"):
        assert not re.search(rf"^\s*(import|from) {script}\b", path.read_text(), re.M), path.name


def test_every_flag_of_the_readme_exists():
    text = (ROOT / "README.md").read_text() + (ROOT / "Makefile").read_text()
    sources = "".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")])
    others = {
        "--help",
        "--nproc-per-node",
        "--disable-pip-version-check",
        "--quiet",
        "--constraint",
        "--editable",
        "--check",
        "--no-cache",
    }
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z](?![\w-])", text)) - others:
        assert f'"{flag}"' in sources, flag


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_for_strangers(script, tmp_path):
    run = processes.Script(script, ["--help"], tmp_path / "log")
    assert run.wait() == 0 and "usage" in run.said() and len(run.said()) > 300
