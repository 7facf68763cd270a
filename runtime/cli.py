"""The command line, and numbers on it that are checked where they are read."""

import argparse
import math
from typing import NoReturn

from runtime.files import UserError


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults behind the flags that have one: "(default: None)" says nothing."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or action.default is False:
            return action.help
        if isinstance(action.default, list | tuple):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are told like all others: in one line, once, with exit code 2."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=_Help)

    def error(self, message: str) -> NoReturn:
        """Raises: UserError."""
        raise UserError(f"{message}; see python {self.prog} --help")


def count(text: str) -> int:
    """A whole number, 1 or more."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def amount(text: str) -> float:
    """A number, 0 or more."""
    if not 0 <= (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return value


def positive(text: str) -> float:
    """A number above 0."""
    if (value := amount(text)) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not more than 0")
    return value


def probability(text: str) -> float:
    """A number from 0 to below 1."""
    if (value := amount(text)) >= 1:
        raise argparse.ArgumentTypeError(f"{text} is not below 1")
    return value
