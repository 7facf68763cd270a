"""The short version of benchmarks/fuzz.py for .pt, JSON and CSV files; the videos' is in test_preprocess_*.py."""

import os
import time

from benchmarks import fuzz
from tests import processes  # noqa: F401  (what the fuzzed processes are forks of)


def test_damaged_files_are_used_or_refused_in_one_line():
    outcomes = fuzz.fuzz(videos=0, cases=range(1, 41), seed=0)
    assert [outcome for outcome in outcomes if outcome.end not in fuzz.GOOD] == []
    assert len(outcomes) == 40 and {outcome.target for outcome in outcomes} == set(fuzz.TARGETS)
    assert 5 < sum(outcome.end == "used" for outcome in outcomes) < 35  # it is no test if all are alike


def worker(pipe, *_):
    while (number := pipe.recv()) is not None:
        if number == 1:
            time.sleep(60)
        if number == 2:
            os._exit(3)
        pipe.send(fuzz.Outcome(number, "it", "used", ""))


def test_a_case_that_hangs_or_kills_its_process_is_counted_as_that(tmp_path):
    outcomes = list(fuzz.in_processes(worker, range(4), 0, tmp_path, tmp_path, 2.0))
    assert [outcome.end for outcome in outcomes] == ["used", "hang", "died (3)", "used"]
    assert fuzz.table(outcomes).splitlines()[-1].split() == ["all", "4", "2", "0", "1", "1"]


def test_what_is_no_good_end_is_told_apart():
    assert fuzz.judged(0, "fine") == ("used", "")
    assert fuzz.judged(2, "x\nerror: bad file\n") == ("refused", "error: bad file")
    ends = [(0, "error: a"), (2, ""), (2, "error: a\nerror: b"), (3, "error: a"), (-11, "")]
    assert [fuzz.judged(*end)[0] for end in ends] == ["odd end"] * 5
    assert fuzz.judged(1, "Traceback (most recent call last)")[0] == "traceback"
    assert fuzz.judged(1, "error: memory is not enough")[0] == "memory"
