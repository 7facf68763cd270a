"""The house: what stands where, who may import whom, how long anything may be, and what an install brings."""

import ast
import fnmatch
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from runtime import cli

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SCRIPTS = {"preprocess_something_something_v2", "prepare_annotations", "train", "evaluate", "infer"}
PACKAGES = {"models", "video", "features", "evaluation", "runtime", "sample"}
BELOW = {"runtime", "video", "features", "models", "qformer", "dataset"}
MAY_IMPORT = {
    "runtime": {"runtime"},
    "video": {"runtime", "video"},
    "features": {"runtime", "features"},
    "models": {"runtime", "video", "features", "models"},
    "qformer": BELOW - {"dataset"},
    "dataset": BELOW - {"qformer"},
    "evaluation": BELOW | {"evaluation"},
    "sample": BELOW | {"evaluation", "sample"},
    **dict.fromkeys(SCRIPTS, BELOW | {"evaluation"}),
}


def tracked():
    """The paths that git knows, or those that lie here where this is no repository."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        names = listed.stdout.rstrip("\0").split("\0")
        return [name for name in names if (ROOT / name).exists()]
    found = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    skipped = {"data", "build", "__pycache__", ".venv", ".git"}
    return [path.as_posix() for path in found if not skipped & set(path.parts)]


FILES = tracked()
CODE = [name for name in FILES if name.endswith(".py")]
PRODUCT = [name for name in CODE if not name.startswith(("tests/", "benchmarks/"))]


def lines(name):
    return len((ROOT / name).read_text(encoding="utf-8").splitlines())


def functions(name):
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def imported(name):
    """The first parts of all that a file imports, at its top and within its functions."""
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports by dots"
            yield node.module.split(".")[0]


# ---- layout and sizes ----


def test_the_root_holds_the_scripts_the_q_former_the_dataset_and_folders_named_after_the_stations():
    assert {name.removesuffix(".py") for name in CODE if "/" not in name} == SCRIPTS | {"qformer", "dataset"}
    folders = {name.split("/")[0] for name in FILES if "/" in name}
    assert folders == PACKAGES | {"tests", "benchmarks", "docs", "results", ".ci"}


def test_the_product_has_6160_lines_or_fewer_and_no_file_more_than_350():
    assert sum(map(lines, PRODUCT)) <= 6160
    assert [f"{name}: {lines(name)}" for name in CODE if lines(name) > 350] == []


def test_nine_functions_in_ten_have_25_lines_or_fewer():
    long = [node.end_lineno - node.lineno + 1 for name in PRODUCT for node in functions(name)]
    assert sum(length <= 25 for length in long) >= 0.9 * len(long)


def test_an_init_is_empty_or_one_docstring():
    for name in CODE:
        if name.endswith("__init__.py"):
            body = ast.parse((ROOT / name).read_text(encoding="utf-8")).body
            assert all(isinstance(part, ast.Expr) for part in body) and len(body) <= 1, name


def test_there_are_six_benchmarks_at_most_and_none_touches_the_path_of_imports():
    benchmarks = {name for name in CODE if name.startswith("benchmarks/")}
    assert len(benchmarks - {"benchmarks/__init__.py", "benchmarks/measure.py"}) <= 6
    assert [name for name in benchmarks if "sys.path" in (ROOT / name).read_text(encoding="utf-8")] == []


# ---- imports ----


def test_who_may_import_whom():
    ours = set(MAY_IMPORT) | {"tests", "benchmarks"}
    wrong = []
    for name in PRODUCT:
        allowed = MAY_IMPORT[name.removesuffix(".py").split("/")[0]]
        wrong += [f"{name} imports {other}" for other in sorted(set(imported(name)) & ours - allowed)]
    assert wrong == []


def test_training_loads_no_decoder_no_java_and_no_page():
    unwanted = ["av", "pebble", "matplotlib", "evaluation.report", "evaluation.coco"]
    code = f"import sys, train; sys.exit(' '.join(name for name in {unwanted} if name in sys.modules) or None)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


# ---- what an install brings ----


def test_an_install_brings_every_module_and_what_lies_beside_them():
    setup = PROJECT["tool"]["setuptools"]
    assert set(setup["py-modules"]) == {name.removesuffix(".py") for name in PRODUCT if "/" not in name}
    assert set(setup["packages"]) == {name.split("/")[0] for name in PRODUCT if "/" in name} == PACKAGES
    for name in FILES:
        package, _, rest = name.partition("/")
        if package in PACKAGES and not name.endswith(".py"):
            assert any(fnmatch.fnmatch(rest, pattern) for pattern in setup["package-data"][package]), name


def test_every_dependency_has_its_exact_version():
    wanted = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["test"]]
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in pinned)  # names and versions, no addresses
    exact = {line.split("==")[0].lower().replace("_", "-") for line in pinned}
    names = {re.match(r"[\w.-]+", entry)[0].lower().replace("_", "-") for entry in wanted if "!=" not in entry}
    assert names <= exact


# ---- what a visitor reads ----


def test_the_readme_has_1200_words_or_fewer_and_a_text_for_each_picture():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.split()) <= 1200
    pictures = re.findall(r"!\[([^]]*)\]\(|<img[^>]* alt=\"([^\"]*)\"|<img", readme)
    assert pictures and all(any(texts) for texts in pictures)


def slug(heading):
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("name", sorted(name for name in FILES if name.endswith(".md")))
def test_links_between_documents_lead_somewhere(name):
    text, wrong = (ROOT / name).read_text(encoding="utf-8"), []
    for link in re.findall(r"\]\(([^)]+)\)|(?:src|srcset)=\"([^\"]+)\"", text):
        address, _, anchor = "".join(link).partition("#")
        target = (ROOT / name).parent / address if address else ROOT / name
        if address.startswith("https:"):
            continue
        headings = (
            re.findall(r"(?m)^#+ (.*)", target.read_text(encoding="utf-8")) if anchor and target.is_file() else []
        )
        if not target.exists() or (anchor and anchor not in map(slug, headings)):
            wrong.append("".join(link))
    assert wrong == []


# ---- flags ----


class Parsed(Exception):
    """Raised in the place of reading a command line; holds the parser."""


def parser_of(script, monkeypatch):
    def stop(parser, *_):
        raise Parsed(parser)

    monkeypatch.setattr(cli.Parser, "parse_args", stop)
    with pytest.raises(Parsed) as parsed:
        importlib.import_module(script).main([])
    return parsed.value.args[0]


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_every_flag_is_described_and_those_of_long_scripts_stand_in_groups(script, monkeypatch):
    parser = parser_of(script, monkeypatch)
    flags = [action for action in parser._actions if action.dest != "help"]
    assert flags and all(action.help for action in flags)
    if len(flags) > 12:
        grouped = {action for group in parser._action_groups[2:] for action in group._group_actions}
        assert [action.dest for action in flags if action not in grouped] == []
    assert len(parser.format_help()) > 300


def test_every_flag_of_readme_documents_and_makefile_exists():
    documents = ["README.md", "Makefile", *(name for name in FILES if name.startswith("docs/"))]
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in documents)
    sources = "".join((ROOT / name).read_text(encoding="utf-8") for name in CODE)
    others = {"--help", "--nproc-per-node", "--disable-pip-version-check", "--quiet", "--constraint", "--editable"}
    others |= {"--check", "--no-cache", "--extra"}
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z](?![\w-])", text)) - others:
        assert f'"{flag}"' in sources, flag
