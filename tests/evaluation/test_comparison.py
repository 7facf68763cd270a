"""Two runs side by side: the differences are those of the same clips, and their intervals are paired."""

import json
import random

import numpy as np
import pytest

import dataset
from evaluation import bootstrap, comparison, ngrams, scores
from runtime.files import UserError
from tests import tiny

pytestmark = pytest.mark.usefixtures("without_java")

PAIRS = {"moving something up": "moving something down", "moving something down": "moving something up"}
OPPOSITE = {"moving a red ball up": "moving a red ball down", "moving a red ball down": "moving a red ball up"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A scorer of 60 clips with their records."""
    data = tiny.make_dataset(tmp_path_factory.mktemp("world") / "data", train=6, validation=60, features=False)
    records = dataset.read_ready(data, "validation")
    return scores.Scorer(records, dataset.Layout(data), seed=3), records


def run_of(world, right, seed, whole=True):
    """What evaluation.json holds of captions of which about a share `right` is."""
    scorer, records = world
    chosen = random.Random(seed)
    said = {r["id"]: r["label"][0] if chosen.random() < right else chosen.choice(tiny.CAPTIONS) for r in records}
    result = {"split": "validation", **scorer.scores(said, meteor=False), "checkpoint": f"{seed}.pt", "epoch": seed}
    result["made_by"] = {"command": "python evaluate.py", "commit": "abc"}
    if whole:
        moving = {key: OPPOSITE[text] for key, text in said.items() if text in OPPOSITE and is_moving(scorer, key)}
        shuffled = dict(zip(said, [*list(said.values())[1:], "a cup"], strict=True))
        lies = {"shuffled": shuffled, "most_common": dict.fromkeys(said, tiny.CAPTIONS[0]), "reversed": moving}
        lies["forwards"] = {key: said[key] for key in moving}
        ranks = {key: chosen.randint(1, 6) for key in said}
        result["actions"] = scores.action_scores(list(ranks.values()), scorer.seed).summary()
        counts = {"most_common_caption": tiny.CAPTIONS[0], "reversed_clips": len(moving)}
        result["grounding"] = scorer.grounding(lies, PAIRS).summary() | counts
        for row in result["predictions"]:
            row |= {"rank": ranks[row["id"]], "shuffled": shuffled[row["id"]]}
            row["attention"] = {"on_objects": (chosen.random(), 1), "area": (0.1, 1)} if int(row["id"]) % 2 else None
            row |= {"reversed": moving[row["id"]]} if row["id"] in moving else {}
    return json.loads(json.dumps(result))


def is_moving(scorer, key):
    return scorer.records[key]["template"].startswith("Moving")


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """A good run and a worse one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")
        return run_of(world, 0.7, 1), run_of(world, 0.4, 2)


def compared(world, ours, theirs, tmp_path):
    """`compare` of a run with one that is read from a file; and our predictions by id."""
    scorer, records = world
    (tmp_path / "other").mkdir(exist_ok=True)
    path = tmp_path / "other" / "evaluation.json"
    path.write_text(json.dumps(theirs))
    other = comparison.read(path, "validation", records, tmp_path / "evaluation.json")
    ours = json.loads(json.dumps(ours))
    found = comparison.compare(ours, other, scorer, PAIRS)
    assert json.loads(json.dumps(found)) == found
    return found, {row["id"]: row for row in ours["predictions"]}


def test_differences_are_those_of_the_scores_and_intervals_those_of_paired_resamples(world, runs, tmp_path):
    ours, theirs = runs
    found, rows = compared(world, ours, theirs, tmp_path)
    for section in ("ssv2", "actions"):
        for name in set(found[section]) - {"intervals"}:
            assert found[section][name] == pytest.approx(ours[section][name] - theirs[section][name], abs=1e-12)
    for name in ("Bleu_1", "Bleu_4", "ROUGE_L", "CIDEr"):
        assert found["metrics"][name] == pytest.approx(ours["metrics"][name] - theirs["metrics"][name], abs=1e-12)
    both = [[row["CIDEr"] for row in run["predictions"]] for run in runs]
    draws = np.random.default_rng(3)
    drawn = [draws.integers(0, 60, 60) for _ in range(bootstrap.SAMPLES)]
    gains = [np.mean(np.array(both[0])[d]) - np.mean(np.array(both[1])[d]) for d in drawn]
    low, high = found["metrics"]["intervals"]["CIDEr"]
    assert (low, high) == pytest.approx(np.quantile(gains, (0.025, 0.975)), abs=1e-9)
    unpaired = sum((run["intervals"]["CIDEr"][1] - run["intervals"]["CIDEr"][0]) ** 2 for run in runs) ** 0.5
    assert high - low < unpaired
    assert {key: rows[key]["compared"]["prediction"] for key in rows} == {
        row["id"]: row["prediction"] for row in theirs["predictions"]
    }


def test_bleus_interval_is_of_the_corpus_scores_of_each_resample(world, runs, tmp_path, monkeypatch):
    draw = bootstrap.resampled_sums
    monkeypatch.setattr(ngrams, "resampled_sums", lambda columns, seed: draw(columns, seed)[:1])
    found, _ = compared(world, *runs, tmp_path)
    drawn = np.random.default_rng(3).integers(0, 60, 60)
    bleu = []
    for run in runs:
        rows = [run["predictions"][i] for i in drawn]
        said = {str(n): row["prediction"] for n, row in enumerate(rows)}
        again = ngrams.ngram_scores(said, {str(n): row["references"] for n, row in enumerate(rows)})
        bleu.append(again["metrics"]["Bleu_4"])
    assert found["metrics"]["intervals"]["Bleu_4"] == pytest.approx([bleu[0] - bleu[1]] * 2, abs=1e-12)


def test_grounding_is_compared_on_the_reversed_clips_of_both(world, runs, tmp_path):
    ours, theirs = runs
    found, _ = compared(world, ours, theirs, tmp_path)
    sides = [{row["id"]: row for row in run["predictions"]} for run in runs]
    shared = [key for key in sides[0] if "reversed" in sides[0][key] and "reversed" in sides[1][key]]
    assert 3 < len(shared) < sum("reversed" in row for row in sides[0].values())
    references = {key: sides[0][key]["references"] for key in shared}
    for name, field in (("CIDEr_reversed", "reversed"), ("CIDEr_forwards", "prediction")):
        one, two = (
            ngrams.ngram_scores({key: side[key][field] for key in shared}, references)["metrics"]["CIDEr"]
            for side in sides
        )
        assert found["grounding"][name] == pytest.approx(one - two, abs=1e-12)
    gain = ours["grounding"]["CIDEr_shuffled"] - theirs["grounding"]["CIDEr_shuffled"]
    assert found["grounding"]["CIDEr_shuffled"] == pytest.approx(gain, abs=1e-12)
    assert found["grounding"]["CIDEr_most_common"] == 0.0
    flips = [scores.template_key(sides[0][key]["reversed"]) for key in shared]
    assert found["grounding"]["reversal_flips"] == 0.0 and flips  # both runs' captions of these turn around


def test_attention_is_compared_where_both_know_the_objects_places(world, runs, tmp_path):
    found, rows = compared(world, *runs, tmp_path)
    on = [[row["attention"]["on_objects"][0] for row in run["predictions"] if row["attention"]] for run in runs]
    assert len(on[0]) == 30
    assert found["attention"]["on_objects"] == pytest.approx(np.mean(on[0]) - np.mean(on[1]))
    low, high = found["attention"]["intervals"]["on_objects"]
    assert low < found["attention"]["on_objects"] < high and found["attention"]["area"] == 0.0


def test_a_run_is_the_same_as_itself_and_has_no_difference_anywhere(world, runs, tmp_path):
    found, rows = compared(world, runs[0], runs[0], tmp_path)
    assert (found["clips"], found["better"], found["same"], found["worse"]) == (60, 0, 60, 0)
    for section in ("metrics", "ssv2", "actions", "grounding", "attention"):
        intervals = found[section].pop("intervals")
        assert found[section] and set(found[section].values()) == {0.0}
        assert all(ends in (None, [0.0, 0.0]) for ends in intervals.values())
    assert {row["compared"]["change"] for row in rows.values()} == {"same"}


def test_clips_are_better_worse_or_the_same_by_their_cider(world, runs, tmp_path):
    found, rows = compared(world, *runs, tmp_path)
    theirs = {row["id"]: row["CIDEr"] for row in runs[1]["predictions"]}
    for key, row in rows.items():
        gain = row["CIDEr"] - theirs[key]
        assert row["compared"]["difference"] == pytest.approx(gain, abs=1e-9)
        assert row["compared"]["change"] == ("same" if abs(gain) < 0.005 else "better" if gain > 0 else "worse")
    assert found["better"] > found["worse"] > 0 and found["better"] + found["same"] + found["worse"] == 60


def test_what_an_older_run_does_not_hold_is_left_out_and_the_rest_compared(world, runs, tmp_path):
    older = json.loads(json.dumps(runs[1]))
    rows = [{key: row[key] for key in ("id", "prediction", "references")} for row in older["predictions"]]
    older = {"split": older["split"], "predictions": rows, "metrics": {"CIDEr": 1.0, "METEOR": 0.3}}
    found, _ = compared(world, runs[0], older, tmp_path)
    whole, _ = compared(world, *runs, tmp_path)
    assert found["metrics"] == whole["metrics"] and found["ssv2"] == whole["ssv2"]
    assert "actions" not in found and "grounding" not in found and "METEOR" not in found["metrics"]
    table = {row["name"]: row for row in scores.table({**runs[0], "compared": found})}
    assert table["CIDEr"]["difference"] == found["metrics"]["CIDEr"]
    assert table["action by likelihood, top 1"]["difference"] is None


def test_the_clips_that_both_have_are_compared_as_if_there_were_no_others(world, runs, tmp_path):
    scorer, records = world
    another = {"id": "x", "prediction": "x", "references": []}
    theirs = {**runs[1], "predictions": [*runs[1]["predictions"][20:], another]}
    found, rows = compared(world, runs[0], theirs, tmp_path)
    assert found["clips"] == 40 and sum("compared" in row for row in rows.values()) == 40
    few = scores.Scorer(records[20:], dataset.Layout(tmp_path), seed=3)
    alone = [
        few.scores({row["id"]: row["prediction"] for row in run["predictions"][20:]}, meteor=False)["metrics"]["CIDEr"]
        for run in runs
    ]
    assert found["metrics"]["CIDEr"] == pytest.approx(alone[0] - alone[1], abs=1e-12)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda run: run.update(split="test"), "is of the 'test' split, this run of 'validation': give --split"),
        (lambda run: run["predictions"][7].update(references=["another"]), "other references for 1 of 60 .*run that"),
        (lambda run: run.update(predictions=[]), "has no clip of this run's"),
        (lambda run: run.update(predictions={"1": "x"}), "is no evaluation.json"),
        (lambda run: run["predictions"][3].update(prediction=None), "is no evaluation.json"),
        (lambda run: run.pop("split"), "is no evaluation.json"),
    ],
)
def test_what_cannot_be_compared_is_told_in_one_line(world, runs, tmp_path, change, error):
    run = json.loads(json.dumps(runs[1]))
    change(run)
    (tmp_path / "evaluation.json").write_text(json.dumps(run))
    with pytest.raises(UserError, match=error) as told:
        comparison.read(tmp_path, "validation", world[1], tmp_path / "new" / "evaluation.json")
    assert "\n" not in str(told.value)


def test_a_list_a_missing_file_and_the_file_that_will_be_written_are_told(world, runs, tmp_path):
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "evaluation.json").write_text(json.dumps(runs[1]))
    own = tmp_path / "evaluation.json"
    for path, error in ((tmp_path / "list.json", "no evaluation.json"), (tmp_path / "none", "there is no file")):
        with pytest.raises(UserError, match=error):
            comparison.read(path, "validation", world[1], own)
    with pytest.raises(UserError, match="the file that this run writes"):
        comparison.read(tmp_path, "validation", world[1], own)
