"""The child process with pycocoevalcap's Java: what a missing, hanging, failing or babbling Java costs."""

import os
import shutil
import stat
import subprocess
import time

import pytest

from evaluation import coco, ngrams

REFERENCES = {str(i): [f"putting cup {i} on table", "a cup"] for i in range(9)}
PREDICTIONS = {str(i): f"putting cup {i} on the table" for i in range(9)}

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="Java is not installed: nothing to compare with")


@pytest.fixture
def fake_java(monkeypatch, tmp_path):
    """Puts a shell script on PATH in place of java; returns a function that says what it does."""

    def make(script):
        path = tmp_path / "bin" / "java"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")

    monkeypatch.setattr(coco, "_unfit", set())
    return make


@needs_java
def test_there_is_a_line_for_each_caption_where_captions_are_empty():
    lists = [[""], ["", ""], ["cup", "  "], ["", "cup"], ["cup", " ", "pen", "..."]]
    assert coco.tokenize(lists, 60) == [[text.strip(" .") for text in captions] for captions in lists]


def test_a_hanging_java_is_ended_with_its_children_and_not_tried_again(fake_java, tmp_path):
    fake_java(f"sleep 1000 & echo $! > {tmp_path}/child; wait")
    scores = ngrams.ngram_scores(PREDICTIONS, REFERENCES, timeout=1.0)
    assert (
        scores["tokenizer"] == ngrams.PLAIN and scores["metrics"]["METEOR"] is None and scores["metrics"]["CIDEr"] > 0
    )
    assert len(scores["notes"]) == 1 and "hung" in scores["notes"][0]
    child = (tmp_path / "child").read_text().strip()
    state = subprocess.run(["ps", "-o", "stat=", "-p", child], capture_output=True, text=True).stdout
    assert state.strip() in ("", "Z", "Z+")
    start = time.monotonic()
    again = ngrams.ngram_scores(PREDICTIONS, REFERENCES, timeout=1.0)
    assert time.monotonic() - start < 0.9 and again["metrics"] == scores["metrics"]


def test_where_there_are_no_process_groups_the_time_limit_holds(fake_java, monkeypatch):
    monkeypatch.delattr(os, "killpg")
    fake_java("exec sleep 3")
    start = time.monotonic()
    with pytest.raises(coco.JavaError, match="hung"):
        coco.tokenize([["a cup"]], timeout=0.5)
    assert time.monotonic() - start < 2.5


@pytest.mark.parametrize("script", ["exit 1", "echo one line", "exec /no/such/program", "kill -9 $$", "seq 1000"])
def test_a_broken_java_costs_a_note_and_not_the_scores(fake_java, script):
    fake_java(script)
    for count in (1, 9):  # of one caption alone, nothing at all could be the tokens
        chosen = list(PREDICTIONS)[:count]
        given = {key: PREDICTIONS[key] for key in chosen}, {key: REFERENCES[key][:1] for key in chosen}
        coco._unfit.clear()
        scores = ngrams.ngram_scores(*given, timeout=20.0)
        assert scores["tokenizer"] == ngrams.PLAIN and "Java failed (" in scores["notes"][0]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exec sleep 1000", "hung"),
        ("exit 0", "failed"),
        ("while read line; do echo word; done", "other than"),
        ("while read line; do echo NaN; echo NaN; done", "other than"),
    ],
)
def test_where_only_meteor_hangs_or_fails_only_meteor_is_left_out(fake_java, monkeypatch, script, reason):
    fake_java(script)
    monkeypatch.setattr(coco, "tokenize", lambda texts, timeout: texts)
    scores = ngrams.ngram_scores(PREDICTIONS, REFERENCES, timeout=1.0)
    assert scores["tokenizer"] == ngrams.PTB and scores["metrics"]["METEOR"] is None and scores["metrics"]["CIDEr"] > 0
    assert len(scores["notes"]) == 1 and reason in scores["notes"][0] and "METEOR is left out" in scores["notes"][0]


def test_the_users_own_options_for_java_are_kept_before_ours(fake_java, monkeypatch, tmp_path):
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Xss4m")
    fake_java(f"echo $JAVA_TOOL_OPTIONS > {tmp_path}/options")
    with pytest.raises(coco.JavaError):
        coco.tokenize([["a cup"]], timeout=20.0)
    options = (tmp_path / "options").read_text().split()
    assert options[0] == "-Xss4m" and "-Duser.language=en" in options
