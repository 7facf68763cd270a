import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from runtime.progress import Progress, duration

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        if thread.name != "tqdm_monitor":
            thread.join(5)
            assert not thread.is_alive(), thread


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (245, "4 min 5 s"),
        (39240, "10 h 54 min"),
        (4e6, "1,111 h 6 min"),
    ],
)
def test_durations_are_written_as_one_reads_them(seconds, text):
    assert duration(seconds) == text


def test_a_line_says_what_is_done_of_all_how_fast_and_how_long_it_still_takes(capsys):
    with Progress(total=193690, desc="encoding", unit="clip") as bar:
        bar.update(1200)
        bar.set_postfix(loss="3.100", refresh=False)
        bar.start_t -= 245
        bar._tell()
    now, last = capsys.readouterr().err.splitlines()
    assert now == "encoding: 1,200 of 193,690 clips (0.6 %), 4.9 clips/s, 10 h 55 min left, loss=3.100"
    assert last == "encoding: 1,200 of 193,690 clips (0.6 %), 4.9 clips/s, 4 min 5 s in all, loss=3.100"


@pytest.mark.parametrize(
    "settings, done, seconds, line",
    [
        (
            {"total": 100, "initial": 40, "unit": "step"},
            10,
            20,
            "x: 50 of 100 steps (50.0 %), 2.0 s/step, 1 min 40 s left",
        ),
        ({"unit": "clip"}, 30, 10, "x: 30 clips, 3.0 clips/s, 10 s so far"),
        ({"total": 7, "unit": "clip"}, 0, 90, "x: 0 of 7 clips (0.0 %), 1 min 30 s so far"),
        ({"total": 0, "unit": "clip"}, 0, 3, "x: 0 of 0 clips, 3 s so far"),
        (
            {"total": 3.1e9, "unit": "B", "unit_scale": True, "name": "hub"},
            1.24e9,
            124,
            "x: 1.24GB of 3.10GB (40.0 %), 10.0MB/s, 3 min 6 s left",
        ),
    ],
)
def test_lines_of_other_work(capsys, settings, done, seconds, line):
    with Progress(desc="x", **settings) as bar:
        bar.update(done)
        bar.start_t -= seconds
        bar._tell()
    assert capsys.readouterr().err.splitlines()[0] == line


def test_lines_come_while_one_step_takes_longer_than_the_interval_and_end_with_it(capsys, monkeypatch):
    monkeypatch.setattr(Progress, "interval", 0.05)
    with Progress(total=1, desc="slow", unit="step"):
        time.sleep(0.4)
    time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert 3 <= len(lines) <= 9 and all(line.startswith("slow: 0 of 1 steps") for line in lines)
    assert lines[-1].endswith("in all") and not any(line.endswith("in all") for line in lines[:-1])


def test_an_iterable_counts_what_is_done_with_and_ends_on_an_exception(capsys):
    for item in (bar := Progress("abc", "letters", unit="letter")):
        assert bar.n == "abc".index(item)
    with pytest.raises(ZeroDivisionError):
        for item in Progress("abc", "letters", unit="letter"):
            1 // (item != "b")
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("letters: 3 of 3 letters (100.0 %), ") and second.startswith(
        "letters: 1 of 3 letters (33.3 %), "
    )


def test_a_rank_that_is_not_the_main_one_says_nothing(capsys, monkeypatch):
    monkeypatch.setattr(Progress, "interval", 0.01)
    with Progress(total=3, desc="x", unit="clip", disable=True) as bar:
        time.sleep(0.1)
        bar.update()
    assert capsys.readouterr().err == ""


def test_a_log_that_cannot_be_written_does_not_end_the_work(monkeypatch):
    class Full:
        def isatty(self):
            return False

        def write(self, _):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    for _ in Progress(range(3), "x", unit="clip"):
        pass


SCRIPT = """
import time
from runtime.progress import Progress
Progress.interval = 0.05
with Progress(total=5, desc="encoding", unit="clip") as bar:
    for i in range(5):
        time.sleep(0.06)
        bar.update()
        Progress.write(f"clip {i}")
"""


def test_a_log_has_no_carriage_return_and_what_is_written_between_stays():
    run = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, timeout=60)
    assert run.returncode == 0 and b"\r" not in run.stderr + run.stdout
    assert run.stdout.decode().split() == " ".join(f"clip {i}" for i in range(5)).split()
    assert all(re.match(r"encoding: \d of 5 clips", line) for line in run.stderr.decode().splitlines())


def test_a_terminal_gets_tqdms_bar():
    termios = pytest.importorskip("termios")
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with subprocess.Popen([sys.executable, "-c", SCRIPT], cwd=ROOT, stdout=theirs, stderr=theirs) as run:
        os.close(theirs)
        said = b""
        with open(ours, "rb", buffering=0) as terminal:
            try:
                while part := terminal.read(4096):
                    said += part
            except OSError:  # the other end is closed
                pass
    assert run.returncode == 0 and b"\rencoding: 100%|" in said and b"clip 4" in said and b"in all" not in said
