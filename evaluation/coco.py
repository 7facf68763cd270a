"""pycocoevalcap's two Java programs, the PTB tokenizer and METEOR, in a child process with a time limit.

pycocoevalcap waits for Java without one, and a hung JVM would hold a run of hours. The child is this file again
(`python -m evaluation.coco FUNCTION`): its input comes as JSON on stdin, its answer goes as JSON to stdout.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SECONDS_A_CAPTION = 0.01  # beyond the time limit: METEOR was measured at 0.0006 s a caption
# Numbers with a point and texts in UTF-8, whatever the user's locale: METEOR dies of a decimal comma.
OPTIONS = "-Duser.language=en -Duser.country=US -Dfile.encoding=UTF-8"
KNOWN = "known"  # its tokens stand around those of the captions: a line more or less would shift these

_unfit: set[str] = set()  # paths of a java that hung or failed: not tried again


class JavaError(Exception):
    """Java is missing, hangs or fails; the message says which, in words for the user."""


def tokenize(texts: list[list[str]], timeout: float) -> list[list[str]]:
    """PTB tokens, joined by spaces, of lists of captions of one line each. Raises: JavaError."""
    return _ask("tokenize", texts, timeout, sum(map(len, texts)))


def meteor(predictions: list[str], references: list[list[str]], timeout: float) -> tuple[float, list[float]]:
    """METEOR 1.5 of tokenized captions: of all clips together, and of each. Raises: JavaError."""
    return tuple(_ask("meteor", [predictions, references], timeout, len(predictions) + sum(map(len, references))))


def _ask(function: str, argument: list, timeout: float, captions: int) -> Any:
    """The child's answer. Raises: JavaError where Java is missing, fails, or takes too long for so many captions."""
    java = shutil.which("java")
    if java is None:
        raise JavaError("Java was not found")
    if java in _unfit:
        raise JavaError("Java hung or failed before in this run")
    _unfit.add(java)  # until it has answered
    env = {**os.environ, "JAVA_TOOL_OPTIONS": f"{os.environ.get('JAVA_TOOL_OPTIONS', '')} {OPTIONS}"}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    settings = {"env": env, "cwd": Path(__file__).parents[1], "start_new_session": True, **pipes}
    with subprocess.Popen([sys.executable, "-m", "evaluation.coco", function], **settings) as process:
        try:
            answer, errors = process.communicate(json.dumps(argument).encode(), timeout + SECONDS_A_CAPTION * captions)
        except subprocess.TimeoutExpired:
            raise JavaError(f"Java hung and was ended (time limit {timeout:g} s)") from None
        finally:
            _end(process)
    if process.returncode != 0:
        last = errors.decode("utf-8", "replace").strip().split("\n")[-1] or f"exit code {process.returncode}"
        raise JavaError(f"Java failed ({last})")
    _unfit.remove(java)
    return json.loads(answer)


def _end(process: subprocess.Popen) -> None:
    """End the child together with its Java: the process group of its session, or on Windows its tree of processes."""
    with contextlib.suppress(OSError):  # all of it has ended by itself
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True)
    process.kill()


# From here on, what the child does.
def _tokenize(*texts: list[str]) -> list[list[str]]:
    from pycocoevalcap.tokenizer import ptbtokenizer

    found, jar = [], Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    with tempfile.TemporaryDirectory() as folder:
        # The tokenizer writes a file beside itself, where it may not be allowed to: it gets a folder of ours.
        ptbtokenizer.__file__, ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR = f"{folder}/ptbtokenizer.py", str(jar)
        for captions in texts:  # each in a file of its own, as pycocoevalcap has predictions and references
            given = {0: [{"caption": text} for text in [KNOWN, *captions, KNOWN]]}
            first, *lines, last = ptbtokenizer.PTBTokenizer().tokenize(given)[0]
            if (first, last) != (KNOWN, KNOWN):
                raise ValueError(last)
            found.append(lines)
    return found


def _meteor(predictions: list[str], references: list[list[str]]) -> tuple[float, list[float]]:
    from pycocoevalcap.meteor.meteor import Meteor

    return Meteor().compute_score(dict(enumerate(references)), {i: [text] for i, text in enumerate(predictions)})


if __name__ == "__main__":
    try:
        answer = {"tokenize": _tokenize, "meteor": _meteor}[sys.argv[1]](*json.load(sys.stdin))
        print(json.dumps(answer, allow_nan=False))
    except (OSError, ValueError) as error:  # ValueError: other lines or words than the program should print
        reason = error if isinstance(error, OSError) else "it printed something other than tokens or scores"
        print(reason, file=sys.stderr, flush=True)
        os._exit(1)  # Meteor's __del__ would wait for the lock that its compute_score has left locked
