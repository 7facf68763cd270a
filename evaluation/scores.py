"""All scores of a split's captions together, as evaluation.json holds them and as the table shows them."""

import math
from pathlib import Path
from typing import Any

from dataset import Layout, Record, read_templates
from evaluation import grounding, ngrams
from evaluation.bootstrap import bootstrap
from evaluation.ssv2 import TemplateReader, score_clip, ssv2_scores
from runtime import files


class Scorer:
    """Scores of captions against a split's references, with their 95 % intervals.

    Whatever it needs from the dataset it reads when it is made: before an hour of captioning, not after.
    Raises: UserError where labels.json is there and is not what it should be.
    """

    def __init__(self, records: list[Record], layout: Layout, timeout: float = ngrams.TIMEOUT, seed: int = 0) -> None:
        self.records, self.timeout, self.seed = {record["id"]: record for record in records}, timeout, seed
        self.reader = None
        if layout.labels_file("labels.json"):
            # labels.json has no brackets; the records' templates say where the placeholders are.
            written = [record["template"] for record in records if record.get("template")]
            self.reader = TemplateReader([*read_templates(layout.data), *written])

    def scores(self, predictions: dict[str, str], meteor: bool = True) -> dict[str, Any]:
        """The n-gram scores, SSv2's own, and each clip's: all of evaluation.json that comes from captions alone."""
        found = self._ngram(predictions, meteor)
        result = {"clips": len(predictions), "tokenizer": found.tokenizer, "notes": found.notes}
        result |= {"metrics": found.metrics, "intervals": found.intervals}
        clips = {}
        if self.reader is not None:
            result["ssv2"] = ssv2_scores(predictions, self.records, self.reader, seed=self.seed)
            clips = result["ssv2"].pop("per_clip")
        result["predictions"] = [
            {
                "id": key,
                "prediction": predictions[key],
                "references": record["label"],
                "template": record.get("template"),
                "CIDEr": found.per_clip["CIDEr"][key],
                "outcome": clips[key]["outcome"] if clips else None,
            }
            for key, record in self.records.items()
        ]
        return result

    def _ngram(self, predictions: dict[str, str], meteor: bool) -> ngrams.NgramScores:
        references = {clip_id: self.records[clip_id]["label"] for clip_id in predictions}
        return ngrams.ngram_scores(predictions, references, meteor=meteor, timeout=self.timeout, seed=self.seed)

    def means(self, per_clip: dict[str, list[float]]) -> dict[str, Any]:
        """The mean of each score's values, and in "intervals" its interval."""
        means = {name: math.fsum(values) / len(values) for name, values in per_clip.items()}
        return {**means, "intervals": {name: bootstrap(values, self.seed) for name, values in per_clip.items()}}

    def grounding(self, captions: dict[str, dict[str, str] | None], pairs: dict[str, str]) -> dict[str, Any]:
        """CIDEr of captions by their name, and of the "reversed" clips' whether they tell the opposite (in `pairs`)."""
        flips = grounding.flips(captions["reversed"], self.records, pairs, self.reader) if self.reader else {}
        found = self.means({"reversal_flips": list(flips.values())} if flips else {})
        for name, said in captions.items():
            if said:
                ngram = self._ngram(said, meteor=False)
                found[f"CIDEr_{name}"] = ngram.metrics["CIDEr"]
                found["intervals"][f"CIDEr_{name}"] = ngram.intervals["CIDEr"]
        return found


# Of the table's scores: section of evaluation.json, group, key, name. CIDEr stands again beside those it has to beat.
NAMES = files.read_json(Path(__file__).with_name("table.json"), "the names of scores")
OF_REVERSED = ("CIDEr_reversed", "CIDEr_forwards", "reversal_flips")


def table(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a score of evaluation.json: group, name, value, its 95 % interval (low, high; or None), note."""
    overall = {**result["metrics"], "intervals": result["intervals"]}
    few = f"of {result.get('grounding', {}).get('reversed_clips', 0):,} clips whose action has an opposite"
    notes = dict.fromkeys(OF_REVERSED, few)
    # Scores of another tokenizer, or without METEOR, are not those of a paper: the table says so where they stand.
    if result["tokenizer"] != ngrams.PTB:
        notes["Bleu_1"] = f"of {result['tokenizer']}"
    if result["metrics"]["METEOR"] is None:
        notes["METEOR"] = "; ".join(result["notes"]) or "left out"
    rows = []
    for section, group, key, name in [*(("metrics", "n-gram", key, key) for key in result["metrics"]), *NAMES]:
        scores = overall if key in overall else result.get(section, {})
        if section in result and key in scores:
            low, high = scores["intervals"].get(key) or (None, None)
            rows.append({"group": group, "name": name, "value": scores[key], "low": low, "high": high})
            rows[-1]["note"] = notes.get(key)
    return rows


def outcomes(captions: dict[str, tuple[str, list[str]]], data: Path) -> dict[str, dict[str, str | None]]:
    """Template and outcome, for a page's colours, of captions and their references; nothing without labels.json."""
    try:
        reader = TemplateReader(read_templates(data))
    except files.UserError:  # the captions are as good, and have no colour
        return {}
    found = {}
    for clip_id, (caption, references) in captions.items():
        record = {"label": references, "template": reader.read(references[0]).template}
        found[clip_id] = {"template": record["template"], "outcome": score_clip(caption, record, reader)["outcome"]}
    return found
