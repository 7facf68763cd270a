"""The short version of `python -m tests.fuzz` for .pt, .safetensors, JSON and CSV files, and for videos."""

import os
import time

from tests.fuzz import __main__ as fuzz
from tests.fuzz import cases, videos


def test_damaged_files_are_used_or_refused_in_one_line():
    outcomes = list(cases.fuzz(range(1, 31), seed=0))
    assert [outcome for outcome in outcomes if outcome.end not in cases.GOOD] == []
    assert len(outcomes) == 30 and {outcome.target for outcome in outcomes} == set(cases.TARGETS)
    assert 5 < sum(outcome.end == "used" for outcome in outcomes) < 25  # it is no test if all are alike


def test_damaged_videos_are_cached_or_named(tmp_path):
    reasons = list(videos.fuzz(tmp_path, count=30, seed=1).values())
    assert 3 < reasons.count(None) < 27  # it is no test if all are alike


def one_case(number, place):
    if number == 1:
        time.sleep(60)
    if number == 2:
        os._exit(3)
    return cases.Outcome(number, "it", "used", "")


def test_a_case_that_hangs_or_kills_its_process_is_counted_as_that(tmp_path):
    outcomes = list(cases.run_cases(one_case, range(4), 1.0, tmp_path))
    assert [outcome.end for outcome in outcomes] == ["used", "hang", "died (3)", "used"]
    assert fuzz.table(outcomes).splitlines()[-1].split() == ["all", "4", "2", "0", "1", "1"]


def test_what_is_no_good_end_is_told_apart():
    assert cases.judged(0, "fine") == ("used", "")
    assert cases.judged(2, "x\nerror: bad file\n") == ("refused", "error: bad file")
    ends = [(0, "error: a"), (2, ""), (2, "error: a\nerror: b"), (3, "error: a"), (-11, "")]
    assert [cases.judged(*end)[0] for end in ends] == ["odd end"] * 5
    assert cases.judged(1, "Traceback (most recent call last)")[0] == "traceback"
    assert cases.judged(1, "error: memory is not enough")[0] == "memory"
