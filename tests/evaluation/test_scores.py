"""The scores together: what evaluation.json holds of captions, and the table of them."""

import json

import pytest

import dataset
from evaluation import ngrams, scores
from evaluation.scores import Scorer
from tests import tiny


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Records of a validation split and the layout of their dataset."""
    data = tiny.make_dataset(tmp_path_factory.mktemp("world") / "data", features=False)
    return dataset.read_ready(data, "validation"), dataset.Layout(data)


pytestmark = pytest.mark.usefixtures("without_java")


def right(records):
    return {record["id"]: record["label"][0] for record in records}


def test_right_captions_have_full_scores_and_each_clip_its_outcome(world):
    records, layout = world
    result = Scorer(records, layout).scores(right(records), meteor=False)
    assert result["ssv2"]["exact_match"] == result["ssv2"]["template_accuracy"] == 1.0
    assert [row["outcome"] for row in result["predictions"]] == ["exact"] * 5
    assert [row["read"] for row in result["predictions"]] == [record["template"] for record in records]
    assert [row["template"] for row in result["predictions"]] == [record["template"] for record in records]
    alone = ngrams.ngram_scores(right(records), {record["id"]: record["label"] for record in records})
    assert result["metrics"] == alone["metrics"] and result["intervals"] == alone["intervals"]
    assert json.loads(json.dumps(result)) == result


def test_without_labels_json_there_are_no_ssv2_scores_and_no_outcomes(world, tmp_path):
    records, _ = world
    result = Scorer(records, dataset.Layout(tmp_path)).scores(right(records))
    assert "ssv2" not in result and {row["outcome"] for row in result["predictions"]} == {None}


def test_reversed_clips_are_scored_beside_the_same_clips_forwards(world):
    records, layout = world
    predictions = right(records)
    moved = [record["id"] for record in records if record["template"] == "Moving [something] up"]
    backwards = {clip_id: "moving a red ball down" for clip_id in moved}
    pairs = {"moving something up": "moving something down"}
    scorer = Scorer(records, layout)
    forwards = {key: predictions[key] for key in moved}
    found = scorer.grounding({"shuffled": None, "reversed": backwards, "forwards": forwards}, pairs).summary()
    references = {record["id"]: record["label"] for record in records}
    few = {clip_id: references[clip_id] for clip_id in moved}
    for name, captions in (("reversed", backwards), ("forwards", forwards)):
        assert found[f"CIDEr_{name}"] == ngrams.ngram_scores(captions, few)["metrics"]["CIDEr"]
    assert found["reversal_flips"] == 1.0 and "CIDEr_shuffled" not in found
    half = {**backwards, moved[0]: "moving a red ball up"}  # as if it were not reversed
    flips = scorer.grounding({"reversed": half}, pairs).scores["reversal_flips"]
    assert flips == 1 - 1 / len(moved)
    found = scorer.grounding({"most_common": predictions, "reversed": backwards, "forwards": forwards}, pairs).summary()
    rows = scores.table({**scorer.scores(predictions), "grounding": {**found, "reversed_clips": len(moved)}})
    notes = {row["name"]: row["note"] for row in rows}
    assert notes["CIDEr, the same clips forwards"] == f"of {len(moved)} clips whose action has an opposite"
    assert notes["CIDEr, the most common training caption"] is None


def test_the_table_says_where_a_score_is_missing_or_of_another_tokenizer(world):
    records, layout = world
    rows = scores.table(Scorer(records, layout).scores(right(records)))
    notes = {row["name"]: row["note"] for row in rows}
    assert "Java was not found" in notes["METEOR"] and ngrams.PLAIN in notes["BLEU-1"] and notes["CIDEr"] is None
    java = {"tokenizer": ngrams.PTB, "notes": [], "metrics": {"Bleu_1": 0.5, "METEOR": None}, "intervals": {}}
    assert [row["note"] for row in scores.table(java)] == [None, "left out"]


def test_each_caption_of_a_page_has_its_outcome_where_the_templates_are_at_hand(world, tmp_path):
    _, layout = world
    label = ["moving a red ball up"]
    captions = {"a": ("moving a red ball up", label), "b": ("moving a cup up", label), "c": ("a cat", label)}
    found = scores.outcomes(captions, layout.data)
    assert {key: clip["outcome"] for key, clip in found.items()} == {"a": "exact", "b": "template", "c": "wrong"}
    assert {clip["template"] for clip in found.values()} == {"Moving [something] up"}
    assert scores.outcomes(captions, tmp_path) == scores.outcomes({}, layout.data) == {}
