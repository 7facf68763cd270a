import argparse

import pytest

from runtime import cli as arguments
from runtime.files import UserError


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (arguments.count, {"1": 1, "64": 64}, ["0", "-1", "1.5", "x", ""]),
        (arguments.amount, {"0": 0.0, "2.5": 2.5}, ["-0.1", "nan", "inf", "x"]),
        (arguments.positive, {"1e-5": 1e-5}, ["0", "-1", "nan", "inf"]),
        (arguments.probability, {"0": 0.0, "0.99": 0.99}, ["1", "-0.1", "nan"]),
    ],
)
def test_numbers_are_checked_where_they_are_read(kind, good, bad):
    assert {text: kind(text) for text in good} == good
    for text in bad:
        with pytest.raises((argparse.ArgumentTypeError, ValueError)):
            kind(text)


def test_help_names_the_defaults_that_say_something(capsys):
    parser = arguments.Parser("What it does.")
    parser.add_argument("--size", type=arguments.count, default=3, help="in pixels")
    parser.add_argument("--splits", nargs="+", default=["train", "validation"], help="which")
    parser.add_argument("--llm", help="where it is")
    parser.add_argument("--gif", action="store_true", help="draw")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    said = capsys.readouterr().out
    assert "in pixels (default: 3)" in said and "which (default: train validation)" in said
    assert "None" not in said and "False" not in said


def test_a_mistake_on_the_command_line_is_told_in_one_line():
    parser = arguments.Parser("What it does.")
    parser.add_argument("--size", type=arguments.count)
    for words, told in ((["--size", "0"], "argument --size: 0 is not 1 or more"), (["--sise", "1"], "--sise")):
        with pytest.raises(UserError, match=f"{told}.*; see python .* --help$") as error:
            parser.parse_args(words)
        assert "\n" not in str(error.value)
