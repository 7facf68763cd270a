"""Each benchmark runs in its small size and prints its table. What it measures is not asserted: machines differ."""

import re
import shutil
from pathlib import Path

import pytest
import torch

import train
from benchmarks import feature_cache, gpu, measure, preprocessing, scoring, time_to_score, train_step
from tests import processes, tiny

TRAIN = "--num-queries 4 --num-heads 2 --epochs 1 --batch-size 4 --accumulate 1 --max-new-tokens 5 --workers 0"


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Starting a process, with torch in it, takes seconds."""
    monkeypatch.setattr(measure, "in_child", lambda run, *values: run(*values))
    monkeypatch.setattr(preprocessing, "FRAMES", 6)
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


def tables(capsys):
    """The rows of each table that was printed, below a command that makes it and the machine's name."""
    lines, found = capsys.readouterr().out.splitlines(), []
    for start in (number for number, line in enumerate(lines) if line.startswith("python -m benchmarks.")):
        assert re.search(r", commit \w+", lines[start]) and "cores, torch" in lines[start + 1]
        rows = []
        for line in lines[start + 2 :]:
            if line[:1] != "|":
                break
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        assert set(rows[1][0]) == {"-"} and {len(row) for row in rows} == {len(rows[0])}
        found.append(rows[2:])
    return found


def test_the_q_former_and_the_reference_agree(capsys):
    train_step.main(["--only", "qformer", "--size", "small", "--batch", "3", "--runs", "1"])
    rows = {row[0]: row for row in tables(capsys)[0]}
    errors = [float(row[3]) for name, row in rows.items() if "error" in name or "gradients" in name]
    assert len(errors) == 2 and max(errors) < 1e-5
    reference, absorbed, gain = rows["GFLOP, dropout off"][1:4]
    assert float(gain[:-2]) > 1 and float(reference) > float(absorbed)


def test_operations_are_those_of_the_matrix_products():
    def prepare():
        one, other = torch.empty(1000, 30000), torch.empty(30000, 2000)
        return lambda: one @ other

    assert measure.flops(prepare) == 2 * 1000 * 30000 * 2000


def allocate(megabytes):
    kept = []
    return lambda: kept.append(torch.ones(megabytes, 2**18))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc, as Linux has it")
def test_peak_memory_is_what_was_taken_after_the_preparation():
    assert 2 * 60e6 < measure.peak_memory(allocate, 60, threads=1, times=2) < 2 * 80e6


def test_sides_alternate_there_and_back_and_warm_ups_do_not_count():
    calls = []
    seconds = measure.times({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, runs=2, warmup=1)
    assert calls == ["a", "b", "b", "a", "a", "b"] and [len(values) for values in seconds.values()] == [2, 2]
    assert measure.spread([3.0, 1.0, 2.0], 1) == "2.0 (1.0 - 3.0)"
    assert measure.paired([2.0, 40.0, 9.0], [1.0, 10.0, 3.0]) == 3.0


def test_a_training_step_of_each_side_what_the_dataset_costs_and_a_long_run(capsys):
    words = "--only memory flops times cost long --size small --runs 1 --captions 1 3 --steps 3 --rate 0.001"
    train_step.main(words.split())
    steps, cost, long = tables(capsys)
    rows = {(row[0], row[1]): row[2:] for row in steps}
    assert set(rows) >= {(count, "peak MB above the weights") for count in "13"}
    reference, product, _ = rows["1", "loss before, dropout off"]
    assert abs(float(reference) - float(product)) < 1e-4
    reference, product, _ = map(lambda cell: float(cell.rstrip(" x")), rows["1", "TFLOP of a batch of 8"])
    assert product < reference
    assert len(cost) == 3 and all(float(row[2]) > 0 for row in cost)
    assert len(long) == 1


def test_the_cache_in_files_and_cosines(tmp_path, capsys):
    feature_cache.main(["--size", "small", "--runs", "1", "--depth", "1", "--data", str(tmp_path)])
    sizes, cosines = tables(capsys)
    assert [row[0] for row in sizes] == [row[0] for row in cosines] == list(feature_cache.KINDS)
    assert min(float(row[1]) for row in cosines) > 0.999


def test_the_recipe_on_each_kind_of_features(trained, capsys, monkeypatch, without_java):
    monkeypatch.setattr(feature_cache, "encoded", lambda data, folder, flags: Path(shutil.copytree(data, folder)))
    words = ["--data", str(trained / "data"), "--split", "validation", "--seeds", "0", "1"]
    feature_cache.main(["--score", *words, "--train", f"--llm {trained / 'lm'} {TRAIN}"])
    assert [len(row[4].split()) for row in tables(capsys)[0]] == [2, 2, 2]


def test_time_to_a_score_of_both_sides_and_of_both_recipes(trained, capsys, without_java):
    words = ["--data", str(trained / "data"), "--train", f"--llm {trained / 'lm'} {TRAIN} --epochs 2", "--every", "2"]
    words += ["--seeds", "0", "--scores", "0", "99", "--size", "small", "--published-epochs", "1"]
    time_to_score.main([*words, "--only", "score", "recipe"])
    scores, parts, recipes = tables(capsys)
    names = ["seconds to CIDEr 0", "epochs to CIDEr 0", "seconds to CIDEr 99", "epochs to CIDEr 99"]
    assert [row[0] for row in scores[:-1]] == names and scores[-1][0].startswith("TFLOP")
    assert all(float(cell.rstrip(" x")) > 0 for row in scores[:2] for cell in row[1:])
    assert all("not reached" in row[1] and "not reached" in row[2] and row[3] == "" for row in scores[2:4])
    reference, ours = (sum(float(row[side]) for row in parts[:-1]) for side in (1, 2))
    assert {row[0] for row in parts} >= {"reading features", "Q-Former, forward", "Q-Former, backward", "AdamW", "all"}
    assert abs(reference - float(parts[-1][1])) < 0.1 and abs(ours - float(parts[-1][2])) < 0.1  # the parts are all
    assert [row[0] for row in recipes] == ["the sample's", "the published"] and " in " in recipes[0][2]


def test_both_sides_learn_the_same_from_the_same(trained, without_java):
    """Without dropout, and with a clip a pass, whose mean over tokens is the caption's: the same weights."""
    flags = f"--llm {trained / 'lm'} {TRAIN} --dropout 0 --mlp-dropout 0 --batch-size 1 --lr 1e-3"
    both = time_to_score.trained([*time_to_score.SIDES], trained / "data", flags, 0, 4, [])
    clocks = [clock for clock, _ in both.values()]
    assert [copy.step for copy in clocks[0].copies] == [copy.step for copy in clocks[1].copies] == [4, 8, 10]
    for name, value in clocks[0].copies[-1].weights.items():
        torch.testing.assert_close(clocks[1].copies[-1].weights[name], value, rtol=0, atol=2e-4, msg=name)


def test_a_busy_machine_alone_and_beside(trained, capsys, monkeypatch, without_java):
    # Starting anew takes seconds.
    monkeypatch.setattr(time_to_score, "get_context", lambda _: processes.forks)
    words = ["--data", str(trained / "data"), "--train", f"--llm {trained / 'lm'} {TRAIN}", "--minutes", "0.03"]
    time_to_score.main([*words, "--only", "busy", "--runs", "1"])
    (rows,) = tables(capsys)
    assert len(rows) == 5 and all(float(row[1]) > 0 and float(row[3]) > 0 for row in rows)
    assert [bool(row[2]) for row in rows] == [False, True, False, True, True]


def test_the_recipe_is_the_makefiles():
    encode, flags = feature_cache.recipe("--encoder .*").split(), feature_cache.recipe("RECIPE := .*").split()
    assert encode[1] == str(measure.SAMPLE / "vjepa2") and str(measure.SAMPLE / "qwen2") in flags
    made = (measure.SAMPLE.parent / "Makefile").read_text()
    assert flags[flags.index("--epochs") + 1] in made and "\\" not in flags


def test_preprocessing_its_limit_and_a_long_run(capsys):
    words = "--clips 3 --runs 1 --workers 1 --batch-size 2 --hidden 16 --layers 1 --pixels 32 --frames 2"
    preprocessing.main(words.split())
    preprocessing.main(["--long", "3"])
    limits, long = tables(capsys)
    assert len(limits) == 2 and len(long) == 1


def test_time_and_memory_of_a_long_video(capsys):
    preprocessing.main(["--minutes", "0.1", "0.2", "--width", "64", "--height", "48"])
    assert [row[:2] for row in tables(capsys)[0]] == [["0.1 min", "2"], ["0.2 min", "5"]]


def test_every_row_of_the_gpus_table_on_the_cpu(capsys):
    words = "--size small --device cpu --clips 2 --encode-batch 2 --steps 2 --batch 2 --accumulate 2 --runs 1"
    gpu.main([*words.split(), "--eval-batch", "2"])
    (rows,) = tables(capsys)
    names = {
        "encoding, eager, batch 2": "clips/s",
        "encoding, compiled, batch 2": "does not compile",
        "preprocessing 2 files, models loaded and compiled, ": "of encoding alone",
        "training step 2 x 2": gpu.NO_CUDA,
        "... the reference's": "x as fast",
        "... the frozen LM alone": "ours takes",
        "... reading its features alone, 2 workers, page cache": "of the step's",
        "... the GPU idle": gpu.NO_CUDA,
        "... host syncs a step": "numbers read",
        "training step 2 x 2 within 12 GB": gpu.NO_CUDA,
        "validation: captions of 12 tokens, batch 2": "captions/s",
        "--actions, 174 templates": "clips/s",
    }
    for row, (name, says) in zip(rows, names.items(), strict=True):
        assert row[0].startswith(name) and says in row[1]


def test_numbers_that_python_reads_are_counted():
    def run():
        float(torch.ones(()) + 1)
        bool(torch.ones(3).all())
        torch.ones(2).sum()

    assert gpu.syncs(run, torch.device("cpu")) == {"numbers read": 2}


def test_a_pass_of_training_reads_no_number_so_that_a_gpu_is_not_waited_for():
    captioner = tiny.tiny_captioner(dropout=0.1).train()
    assert captioner.lm.config.layer_types  # as Qwen2 has them

    def run():
        captioner.loss(
            torch.randn(2, 6, 16), [["moving a cup"], ["pushing a pen", "a pen"]], [0.5, 0.25, 0.25]
        ).backward()

    assert gpu.syncs(run, torch.device("cpu")) == {"numbers read": 0}


def test_scores_and_page_of_made_up_captions_of_which_some_are_right(capsys, monkeypatch):
    templates, predictions, records = scoring.made_up(300)
    found = scoring.ssv2.ssv2_scores(predictions, records, scoring.ssv2.TemplateReader(templates))
    assert len(set(templates)) == scoring.TEMPLATES and found["no_template"] == 0
    assert 0.25 < found["exact_match"] < 0.45 < found["template_accuracy"] < 0.8
    monkeypatch.setattr(scoring.ngrams, "ngram_scores", lambda *_, **__: None)  # Java takes seconds
    monkeypatch.setattr(scoring, "opened", lambda *_: ([], []))  # so does a browser
    scoring.main(["--clips", "20", "--runs", "1"])
    assert len(tables(capsys)[0]) == 4
