"""pycocoevalcap's two Java programs, the PTB tokenizer and METEOR, under a time limit.

The jars and their command lines are pycocoevalcap's own, so that the numbers are too. Its wrappers wait for
Java without a limit, and one hung JVM would hold a run of hours: here each program is driven by a watchdog
that ends its whole process group.
"""

import contextlib
import os
import queue
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pycocoevalcap.meteor.meteor as coco_meteor
import pycocoevalcap.tokenizer.ptbtokenizer as coco_ptb

TIMEOUT = 120.0  # seconds without a word from Java; METEOR reads its tables for 7 s on a quiet machine
SECONDS_A_LINE = 0.1  # a caption takes milliseconds: what is slower than this does not end

# Characters at which Java may end a line (and then every later caption would meet another clip's references),
# other control characters (PTB drops them with a warning each) and halves of surrogate pairs (no UTF-8).
LINE_BREAKERS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

_unfit: dict[str, float] = {}  # path of a java that hung or failed -> the longest time limit it was given


class JavaError(Exception):
    """Java is missing, hangs or fails; the message says which, in words for the user."""


def one_line(caption: str) -> str:
    """The caption as one line of text for a line-based program."""
    return LINE_BREAKERS.sub(" ", caption)


class Program:
    """A Java program in its own process group, fed and read by threads so that no pipe can block the caller.

    `lines` is how many lines of input it gets; it may print at most `answers` lines. Raises JavaError when Java
    is missing, and from `read` when it stays silent for `timeout` seconds or takes very long in all.
    """

    def __init__(self, arguments: Sequence[str], timeout: float, lines: int, answers: int, cwd: str | None = None):
        self.java = shutil.which("java")
        if self.java is None:
            raise JavaError("Java was not found")
        if timeout <= _unfit.get(self.java, 0.0):
            raise JavaError("Java hung or failed before in this run")
        self.timeout = timeout
        self.deadline = time.monotonic() + timeout + SECONDS_A_LINE * lines
        try:
            self.process = subprocess.Popen(
                [self.java, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=cwd,
                start_new_session=True,
            )
        except OSError as error:
            raise JavaError(f"Java could not be started ({error.strerror})") from None
        self.lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.threads = [threading.Thread(target=self._collect, args=(answers,), daemon=True)]
        self.threads[0].start()

    def _collect(self, answers: int) -> None:
        with contextlib.suppress(OSError, ValueError):
            for line in islice(iter(lambda: self.process.stdout.readline(1 << 20), b""), answers):
                self.lines.put(line)
        self.lines.put(None)

    def send(self, lines: Iterable[str]) -> None:
        """Write lines to Java's input, in the background: it may answer before it has read them all."""
        data = "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")

        def write() -> None:
            with contextlib.suppress(OSError, ValueError):  # Java ended: `read` says so
                self.process.stdin.write(data)
                self.process.stdin.flush()

        self.threads.append(threading.Thread(target=write, daemon=True))
        self.threads[-1].start()

    def read(self) -> bytes | None:
        """The next line Java prints, with its line end; None after the last."""
        wait = min(self.timeout, self.deadline - time.monotonic())
        try:
            return self.lines.get(timeout=max(wait, 0.0))
        except queue.Empty:
            raise self.failed(f"Java hung and was ended (time limit {self.timeout:g} s)") from None

    def end(self) -> None:
        """Wait for Java to end by itself, and well."""
        try:
            code = self.process.wait(self.timeout)
        except subprocess.TimeoutExpired:
            raise self.failed(f"Java hung and was ended (time limit {self.timeout:g} s)") from None
        if code != 0:
            raise self.failed(f"Java failed (exit code {code})")

    def failed(self, reason: str) -> JavaError:
        """The error for `reason`; this Java is not tried again in this process with the same time limit."""
        _unfit[self.java] = max(self.timeout, _unfit.get(self.java, 0.0))
        return JavaError(reason)

    def __enter__(self) -> "Program":
        """The running program."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the whole process group: where `java` is a wrapper script, its child too."""
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for thread in self.threads:
            thread.join(1.0)
        # A child that left the group may hold a pipe, and closing one that a thread waits on would wait too.
        if not any(thread.is_alive() for thread in self.threads):
            for pipe in (self.process.stdin, self.process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()


def ptb(captions: Sequence[str], timeout: float = TIMEOUT) -> list[str]:
    """PTB tokens of each caption, lower-cased, joined by spaces, without pycocoevalcap's list of punctuation.

    All captions go into one file in the order given, as pycocoevalcap's do. Raises: JavaError.
    """
    jar = Path(coco_ptb.__file__).parent / coco_ptb.STANFORD_CORENLP_3_4_1_JAR
    with tempfile.TemporaryDirectory() as folder:  # pycocoevalcap writes among its own files, which may be read-only
        path = Path(folder) / "captions.txt"
        path.write_bytes("\n".join(map(one_line, captions)).encode("utf-8", "replace"))
        name = "edu.stanford.nlp.process.PTBTokenizer"
        arguments = ["-cp", str(jar), name, "-preserveLines", "-lowerCase", str(path)]
        printed: list[bytes] = []
        with Program(arguments, timeout, len(captions), len(captions) + 1) as java:
            while (line := java.read()) is not None:
                printed.append(line)
            lines = b"".join(printed).split(b"\n")
            if len(lines) <= len(captions):  # more lines, and it may never end
                java.end()
            # One line more or less and captions would be scored against other clips' references.
            if len(lines) != len(captions):
                raise java.failed(f"Java's tokenizer gave {len(lines)} lines for {len(captions)} captions")
    kept = (line.decode("utf-8", "replace").rstrip().split(" ") for line in lines)
    return [" ".join(token for token in tokens if token not in coco_ptb.PUNCTUATIONS) for tokens in kept]


def meteor(
    predictions: Sequence[str], references: Sequence[Sequence[str]], timeout: float = TIMEOUT
) -> tuple[float, list[float], np.ndarray]:
    """METEOR 1.5 of tokenized captions: the score of all, each clip's, and the counts they come from (clips, 23).

    The counts are those that METEOR adds up for the score of all: `meteor_from_counts(counts.sum(0))`.
    Raises: JavaError.
    """
    # "|||" separates fields in METEOR's protocol; the replacements are pycocoevalcap's.
    asked = []
    for said, texts in zip(predictions, references, strict=True):
        fields = [text.replace("|||", "") for text in [*texts, said]]
        asked.append(" ||| ".join(["SCORE", *fields[:-1], fields[-1].replace("  ", " ")]))
    folder = Path(coco_meteor.__file__).parent
    arguments = ["-jar", "-Xmx2G", coco_meteor.METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm"]
    with Program(arguments, timeout, len(asked), 2 * len(asked) + 2, str(folder)) as java:

        def numbers(count: int) -> list[list[float]]:
            rows = []
            for _ in range(count):
                line = java.read()
                try:
                    rows.append([float(word) for word in line.split()])
                except (AttributeError, ValueError):
                    what = "ended early" if line is None else "printed something other than a score"
                    raise java.failed(f"METEOR's Java {what}") from None
            return rows

        java.send(asked)
        counts = numbers(len(asked))
        if any(len(row) != 23 for row in counts):
            raise java.failed("METEOR's Java printed something other than its counts")
        java.send(["EVAL ||| " + " ||| ".join(" ".join(map(str, row)) for row in counts)])
        scores = [row[0] if row else 0.0 for row in numbers(len(asked) + 1)]
    counts = np.array(counts)
    # METEOR forgives the one chunk of a clip where every word is matched before it adds up the clips' chunks.
    perfect = (counts[:, 0] == counts[:, 21]) & (counts[:, 1] == counts[:, 22]) & (counts[:, 20] == 1)
    counts[perfect, 20] = 0.0
    return scores[-1], scores[:-1], counts


def meteor_from_counts(counts: np.ndarray) -> np.ndarray:
    """METEOR 1.5 from (summed) counts (..., 23) -> (...), with the parameters of its English task.

    Denkowski and Lavie 2014, https://aclanthology.org/W14-3348 : content and function words weighted by delta,
    matches by kind (exact, stem, synonym, paraphrase), and a penalty for matches that lie in many chunks.
    """
    alpha, beta, gamma, delta = 0.85, 0.2, 0.6, 0.75
    kinds = np.array([1.0, 0.6, 0.8, 0.6])
    tested, referred, tested_function, referred_function = np.moveaxis(counts[..., :4], -1, 0)
    matches = counts[..., 4:20].reshape(*counts.shape[:-1], 4, 4)  # (..., kind, test/reference content/function)
    chunks, tested_words, referred_words = np.moveaxis(counts[..., 20:], -1, 0)

    def share(content: np.ndarray, function: np.ndarray, words: np.ndarray, functions: np.ndarray) -> np.ndarray:
        found = ((delta * content + (1 - delta) * function) * kinds).sum(-1)
        return found / np.maximum(delta * (words - functions) + (1 - delta) * functions, 1e-300)

    precision = share(matches[..., 0], matches[..., 2], tested, tested_function)
    recall = share(matches[..., 1], matches[..., 3], referred, referred_function)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = 1.0 / ((1 - alpha) / precision + alpha / recall)
        fragments = chunks / ((tested_words + referred_words) / 2)
    penalty = gamma * np.nan_to_num(fragments) ** beta
    return np.where((precision > 0) & (recall > 0), mean * (1 - penalty), 0.0)
