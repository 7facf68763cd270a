"""pycocoevalcap's two Java programs, the PTB tokenizer and METEOR, in a child process with a time limit.

pycocoevalcap waits for Java without a limit, and one hung JVM would hold a run of hours. The child is this file
(`python -m evaluation.coco`): it reads a task as JSON from stdin, and prints the answer as JSON on stdout.
"""

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TIMEOUT = 120.0  # seconds for Java; METEOR reads its tables for 7 s on a quiet machine
SECONDS_A_CAPTION = 0.01  # and this for each caption: METEOR was measured at 0.0006 s
# Numbers with a point and texts in UTF-8, whatever the user's locale: METEOR dies of a decimal comma.
JAVA_OPTIONS = "-Duser.language=en -Duser.country=US -Dfile.encoding=UTF-8"
# Characters at which Java may end a line (and then every later caption would meet another clip's references),
# other control characters (PTB drops them with a warning each) and halves of surrogate pairs (no UTF-8).
LINE_BREAKERS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
FIRST = "caption"  # a line whose tokens are known: a Java that prints nothing is not taken for one empty caption

_unfit: dict[str, float] = {}  # path of a java that hung or failed -> the longest time limit it was given


class JavaError(Exception):
    """Java is missing, hangs or fails; the message says which, in words for the user."""


def one_line(caption: str) -> str:
    """The caption as one line of text for a line-based program."""
    return LINE_BREAKERS.sub(" ", caption)


def tokenize(texts: Sequence[Sequence[str]], timeout: float = TIMEOUT) -> list[list[str]]:
    """PTB tokens of lists of captions, lower-cased, joined by spaces, without pycocoevalcap's list of punctuation.

    Raises: JavaError.
    """
    lines = [[one_line(text) for text in captions] for captions in texts]
    return _ask("tokenize", lines, timeout, sum(map(len, texts)))


def meteor(
    predictions: Sequence[str], references: Sequence[Sequence[str]], timeout: float = TIMEOUT
) -> tuple[float, list[float]]:
    """METEOR 1.5 of tokenized captions: of all clips together, and of each. Raises: JavaError."""
    plain = [[text.replace("|||", "") for text in texts] for texts in references]  # divides fields in its protocol
    score, scores = _ask("meteor", [predictions, plain], timeout, len(plain) + sum(map(len, plain)))
    return score, scores


def _ask(function: str, argument: Any, timeout: float, captions: int) -> Any:
    """What a function of the child answers. Raises: JavaError where Java is missing, fails or takes too long."""
    java = shutil.which("java")
    if java is None:
        raise JavaError("Java was not found")
    if timeout <= _unfit.get(java, 0.0):
        raise JavaError("Java hung or failed before in this run")
    options = " ".join(filter(None, [os.environ.get("JAVA_TOOL_OPTIONS"), JAVA_OPTIONS]))
    command = [sys.executable, "-m", "evaluation.coco", function]
    settings = {"cwd": Path(__file__).parents[1], "env": {**os.environ, "JAVA_TOOL_OPTIONS": options}}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        subprocess.Popen([*command, folder], **settings, **pipes, start_new_session=True) as process,
    ):
        try:
            answer, errors = process.communicate(json.dumps(argument).encode(), timeout + SECONDS_A_CAPTION * captions)
        except subprocess.TimeoutExpired:
            _unfit[java] = timeout
            raise JavaError(f"Java hung and was ended (time limit {timeout:g} s)") from None
        finally:
            _end(process)
    if process.returncode != 0:
        _unfit[java] = timeout
        last = errors.decode("utf-8", "replace").strip().split("\n")[-1]
        raise JavaError(f"Java failed ({last or f'exit code {process.returncode}'})")
    return json.loads(answer)


def _end(process: subprocess.Popen) -> None:
    """End the child together with its Java: they are a process group of their own, where a system has such."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(OSError):  # all of it has ended by itself
            os.killpg(process.pid, signal.SIGKILL)
    elif process.poll() is None:
        process.kill()


# ---- in the child ----


def _tokenize(texts: list[list[str]], folder: str) -> list[list[str]]:
    from pycocoevalcap.tokenizer import ptbtokenizer

    # The tokenizer writes a file beside its jar, in a folder that may be read-only: it gets a copy in a folder of ours.
    shutil.copy(Path(ptbtokenizer.__file__).parent / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR, folder)
    ptbtokenizer.__file__ = str(Path(folder) / "ptbtokenizer.py")
    # It pairs captions with Java's lines: one line more or less, and they would meet other clips' references.
    ptbtokenizer.zip = functools.partial(zip, strict=True)
    found = []
    for captions in texts:  # each in a file of its own, as pycocoevalcap has predictions and references
        given = {0: [{"caption": text} for text in [FIRST, *captions]]}
        first, *lines = ptbtokenizer.PTBTokenizer().tokenize(given)[0]
        if first != FIRST:
            raise ValueError(lines)
        found.append(lines)
    return found


def _meteor(captions: list, _folder: str) -> tuple[float, list[float]]:
    from pycocoevalcap.meteor.meteor import Meteor

    predictions, references = captions
    score, scores = Meteor().compute_score(dict(enumerate(references)), {i: [p] for i, p in enumerate(predictions)})
    if not all(0 <= one <= 1 for one in [score, *scores]):
        raise ValueError(score)
    return score, scores


def _main() -> None:
    function, folder = sys.argv[1:]
    try:
        print(json.dumps({"tokenize": _tokenize, "meteor": _meteor}[function](json.load(sys.stdin), folder)))
    except (OSError, ValueError) as error:  # a ValueError: other lines, or other words, than a program should print
        reason = error if isinstance(error, OSError) else f"it printed something other than its answer to '{function}'"
        print(reason, file=sys.stderr, flush=True)
        os._exit(1)  # Meteor's __del__ would wait for the lock that its compute_score has left locked


if __name__ == "__main__":
    _main()
