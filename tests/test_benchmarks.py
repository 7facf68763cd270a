"""Each benchmark runs in its small size and prints its table. What it measures is not asserted: machines differ."""

import os
import re
import shutil
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

import train
from benchmarks import (
    cost,
    data_path,
    demo,
    feature_cache,
    generation,
    long_run,
    long_video,
    measure,
    preprocess,
    qformer_attention,
    scoring,
    time_to_score,
    train_step,
)
from sample import __main__ as sample
from tests import tiny

TRAIN = "--num-queries 4 --num-heads 2 --epochs 1 --batch-size 4 --accumulate 1 --max-new-tokens 5"


class Here:
    """An executor without a process: starting one, with torch in it, takes seconds."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, run, *values):
        future = Future()
        future.set_result(run(*values))
        return future


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(measure, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(long_run, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(long_video, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(preprocess, "FRAMES", 6)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny dataset, language model and checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    tiny.save_lm(folder / "lm")
    data = tiny.make_dataset(folder / "data")
    out = ["--checkpoint", str(folder / "checkpoint.pt"), "--results", str(folder / "results")]
    train.main(["--data", str(data), "--llm", str(folder / "lm"), *TRAIN.split(), *out])
    return folder


def table(capsys):
    """The rows of the last table that was printed, by their first cell, and the lines above it."""
    lines = capsys.readouterr().out.rstrip().splitlines()
    start = max(n for n, line in enumerate(lines) if line.startswith("python benchmarks/"))
    assert re.search(r", commit \w+", lines[start]) and "cores, torch" in lines[start + 1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start + 2 :] if line[:1] == "|"]
    assert set(rows[1][0]) == {"-"} and {len(row) for row in rows} == {len(rows[0])}
    return rows[2:]


def test_the_qformer_and_the_textbook_agree(capsys):
    qformer_attention.main(["--size", "small", "--batch", "3", "--runs", "1"])
    rows = {row[0]: row for row in table(capsys)}
    errors = [float(row[3]) for name, row in rows.items() if "error" in name or "gradients" in name]
    assert len(errors) == 2 and max(errors) < 1e-5
    textbook, absorbed, gain = rows["GFLOP, dropout off"][1:4]
    assert gain == f"{float(textbook) / float(absorbed):.2f} x" or float(gain[:-2]) > 1


def test_flops_are_those_of_the_matrix_products():
    def prepare():
        one, other = torch.empty(1000, 30000), torch.empty(30000, 2000)
        return lambda: one @ other

    assert measure.flops(prepare) == 2 * 1000 * 30000 * 2000


def allocate(megabytes):
    kept = []
    return lambda: kept.append(torch.ones(megabytes, 2**18))


def test_peak_memory_is_what_was_taken_after_the_preparation():
    assert 2 * 60e6 < measure.peak_memory(allocate, 60, threads=1, times=2) < 2 * 80e6


def test_sides_alternate_there_and_back_and_warm_ups_do_not_count():
    calls = []
    seconds = measure.times({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, runs=2, warmup=1)
    assert calls == ["a", "b", "b", "a", "a", "b"] and [len(values) for values in seconds.values()] == [2, 2]
    assert measure.spread([3.0, 1.0, 2.0], 1) == "2.0 (1.0 - 3.0)"
    assert measure.paired([2.0, 40.0, 9.0], [1.0, 10.0, 3.0]) == 3.0


def test_a_training_step_of_each_side(capsys):
    train_step.main(["--size", "small", "--runs", "1", "--captions", "1", "3"])
    rows = {(row[0], row[1]): row[2:] for row in table(capsys)}
    assert set(rows) >= {(count, "peak MB above the weights") for count in "13"}
    textbook, product, _ = rows["1", "loss before, dropout off"]
    assert abs(float(textbook) - float(product)) < 1e-4
    textbook, product, _ = map(lambda cell: float(cell.rstrip(" x")), rows["1", "TFLOP of a batch of 8"])
    assert product < textbook


def test_captioning_in_batches_and_one_at_a_time(trained, capsys):
    words = ["--data", str(trained / "data"), "--checkpoint", str(trained / "checkpoint.pt")]
    generation.main([*words, "--runs", "1", "--max-new-tokens", "5", "--uncached", "2", "--batch-size", "3"])
    rows = {row[0]: row for row in table(capsys)}
    assert [rows[name][4] for name in ("no cache", "batches of 3")] == ["2 of 2", "5 of 5"]


def test_the_cache_in_files_and_cosines(tmp_path, capsys):
    feature_cache.main(["--size", "small", "--runs", "1", "--depth", "1", "--data", str(tmp_path)])
    rows = table(capsys)
    assert [row[0] for row in rows] == list(feature_cache.KINDS) and min(float(row[1]) for row in rows) > 0.999


def test_the_recipe_on_each_kind_of_features(trained, capsys, monkeypatch):
    monkeypatch.setattr(demo, "encoded", lambda data, folder, flags: Path(shutil.copytree(data, folder)))
    monkeypatch.setenv("PATH", os.devnull)  # without Java, which takes a second a call
    words = ["--data", str(trained / "data"), "--split", "validation", "--seeds", "0", "1"]
    feature_cache.main(["--score", *words, "--train", f"--llm {trained / 'lm'} {TRAIN}"])
    assert [len(row[4].split()) for row in table(capsys)] == [2, 2, 2]


def test_time_to_a_score_from_videos_on(trained, tmp_path, capsys):
    sample.render(tmp_path / "data", {"train": 4, "validation": 2, "test": 1}, seed=0, workers=1)
    encoder = preprocess.make_encoder(tmp_path / "encoder", hidden=16, layers=1, pixels=32, frames=2)
    words = ["--data", str(tmp_path / "data"), "--encode", f"--encoder {encoder} --frames 2 --workers 1"]
    words += ["--train", f"--llm {trained / 'lm'} {TRAIN}", "--seeds", "0", "--queries", "2", "--every", "1"]
    time_to_score.main([*words, "--score", "9"])
    rows = table(capsys)
    assert [row[:3] for row in rows] == [["2", "absorbed", "1"], ["2", "textbook", "1"], ["2", "absorbed", "14"]]
    assert all(row[5].startswith("not by 1 steps") for row in rows)


def test_the_recipe_is_the_makefiles():
    made = (Path(__file__).parents[1] / "Makefile").read_text()
    encode, flags = demo.recipe("--encoder .*").split(), demo.recipe("RECIPE := .*").split()
    assert encode[1] == str(demo.ROOT / "sample" / "vjepa2") and str(demo.ROOT / "sample" / "qwen2") in flags
    assert flags[flags.index("--lr") + 1] in made and "\\" not in flags


@pytest.mark.parametrize("size", ["small", "sample"])
def test_training_steps_from_disk_and_from_memory(size, trained, capsys):
    words = ["--data", str(trained / "data"), "--train", f"--llm {trained / 'lm'} {TRAIN}"]
    data_path.main(["--size", size, "--runs", "1", "--steps", "2", *words])
    assert len(table(capsys)) == 1


def test_preprocessing_and_its_limit(capsys):
    words = ["--clips", "3", "--runs", "1", "--workers", "1", "--batch-size", "2", "--hidden", "16", "--layers", "1"]
    preprocess.main([*words, "--pixels", "32", "--frames", "2"])
    assert len(table(capsys)) == 2


def test_what_the_whole_dataset_costs(capsys):
    cost.main(["--size", "small", "--captions", "1", "--epochs", "2", "--rate", "0.001"])
    first = table(capsys)
    cost.main(["--size", "small", "--captions", "1", "--epochs", "4", "--rate", "0.002"])
    second = table(capsys)
    assert len(first) == 2 and first[1][2] == second[1][2] != "0.0"  # twice the epochs at twice the rate


def test_memory_over_a_run(capsys):
    long_run.main(["--steps", "3"])
    assert [row[0] for row in table(capsys)] == ["training", "preprocessing"]


def test_memory_over_a_long_video(capsys):
    long_video.main(["--minutes", "0.1", "0.2", "--width", "64", "--height", "48"])
    assert [row[:2] for row in table(capsys)] == [["0.1 min", "2"], ["0.2 min", "5"]]


def test_scores_of_made_up_captions_of_which_some_are_right(capsys, monkeypatch):
    templates, predictions, records = scoring.made_up(300)
    found = scoring.metrics.ssv2_scores(predictions, records, scoring.TemplateReader(templates))
    assert len(set(templates)) == scoring.TEMPLATES and found["no_template"] == 0
    assert 0.25 < found["exact_match"] < 0.45 < found["template_accuracy"] < 0.8
    monkeypatch.setattr(scoring.metrics, "ngram_scores", lambda *_, **__: None)  # Java takes seconds
    scoring.main(["--clips", "20", "--runs", "1"])
    assert len(table(capsys)) == 3
