import argparse
import errno

import pytest
import torch

from runtime import cli
from runtime.files import UserError
from runtime.signals import Interrupted


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (cli.count, {"1": 1, "64": 64}, ["0", "-1", "1.5", "x", ""]),
        (cli.amount, {"0": 0.0, "2.5": 2.5}, ["-0.1", "nan", "inf", "x"]),
        (cli.positive, {"1e-5": 1e-5}, ["0", "-1", "nan", "inf"]),
        (cli.probability, {"0": 0.0, "0.99": 0.99}, ["1", "-0.1", "nan"]),
    ],
)
def test_numbers_are_checked_where_they_are_read(kind, good, bad):
    assert {text: kind(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not a (whole )?number"):
            kind(text)


def made_parser() -> cli.Parser:
    parser = cli.Parser("What it does.", prog="it.py")
    data = parser.add_argument_group("data")
    data.add_argument("--size", type=cli.count, default=3, help="in pixels")
    data.add_argument("--splits", nargs="+", default=["train", "validation"], help="which")
    parser.add_argument("--llm", help="where it is")
    parser.add_argument("--gif", action="store_true", help="draw")
    parser.add_argument("--num-beams", type=cli.count, default=1, help="beams")
    return parser


def test_help_has_groups_and_names_the_defaults_that_say_something(capsys):
    with pytest.raises(SystemExit) as stopped:
        made_parser().parse_args(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "in pixels (default: 3)" in text and "which (default: ['train', 'validation'])" in text
    assert "None" not in text and "False" not in text
    assert text.index("--llm LLM ") < text.index("\ndata:\n") < text.index("in pixels")


@pytest.mark.parametrize(
    "words, line",
    [
        (["--size", "0"], "argument --size: '0' is not a whole number, 1 or more"),
        (["--num_beams", "3"], "there is no --num_beams: did you mean --num-beams?"),
        (["--nun-beams=3"], "there is no --nun-beams=3: did you mean --num-beams?"),
        (["--zzz"], "there is no --zzz"),
        (["--llm"], "argument --llm: expected one argument"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_with_code_2(capsys, words, line):
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: made_parser().parse_args(words))
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: {line}; see python it.py --help\n"


def test_the_device_is_the_gpu_where_there_is_one_and_can_be_named(monkeypatch):
    parser = cli.Parser("What it does.")
    parser.add_argument("--device", help=cli.DEVICE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert cli.device(parser.parse_args([]).device) == cli.device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:1", "mps", "gpu", "cuda:x", "meta", "cpu:1"):
        with pytest.raises(UserError, match=f"--device {name}: .*there is cpu$"):
            cli.device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert cli.device(None) == torch.device("cuda")
    assert [cli.device(name) for name in ("cuda:1", "mps")] == [torch.device("cuda:1"), torch.device("mps")]
    with pytest.raises(UserError, match="--device cuda:2: .*there is cpu, cuda, cuda:0, cuda:1, mps$"):
        cli.device("cuda:2")


GOOD = "; everything written before is still good"


@pytest.mark.parametrize(
    "raised, code, line",
    [
        (UserError("give\nthis"), 2, "give this"),
        (OSError(errno.ENOSPC, "No space left on device", "x.pt"), 1, f"No space left on device: x.pt{GOOD}"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 1, "Permission denied: out; mend that, or"),
        (FileExistsError(errno.EEXIST, "File exists", "out"), 1, "File exists: out; mend that, or name another place"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), 1, "No such file or directory: x"),
        (KeyboardInterrupt(), 130, "interrupted; what was written is kept"),
        (Interrupted(15), 143, "interrupted; what was written is kept"),
        (MemoryError(), 1, f"memory is not enough; use smaller batches{GOOD}"),
        (torch.OutOfMemoryError("CUDA"), 1, f"the GPU's memory is not enough; use smaller batches{GOOD}"),
    ],
)
def test_errors_are_one_line_with_their_code(capsys, raised, code, line):
    def main():
        raise raised

    with pytest.raises(SystemExit) as stopped:
        cli.run(main)
    error = capsys.readouterr().err
    assert stopped.value.code == code and error.startswith(f"error: {line}") and error.count("\n") == 1
    assert ("still good" in error) == ("still good" in line)


def test_memory_that_the_cpu_does_not_have_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: torch.empty(10**15))
    assert stopped.value.code == 1 and capsys.readouterr().err.startswith("error: memory is not enough")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), NotImplementedError("another"), KeyError("a third")])
def test_a_bug_keeps_its_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        cli.run(main)


@pytest.mark.parametrize("result, code", [(None, 0), (0, 0), (1, 1)])
def test_mains_result_is_the_exit_code(result, code):
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: result)
    assert stopped.value.code == code


def test_a_stream_that_lacks_a_letter_gets_its_escape(tmp_path, monkeypatch):
    with open(tmp_path / "out", "w", encoding="cp1252") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        with pytest.raises(SystemExit):
            cli.run(lambda: print("caf\xe9 \u4e2d"))
    assert (tmp_path / "out").read_text("cp1252") == "caf\xe9 \\u4e2d\n"
