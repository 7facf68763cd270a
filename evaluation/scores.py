"""All scores of a split's captions together, as evaluation.json holds them and as the table shows them."""

import math
from pathlib import Path
from typing import Any

import dataset
from evaluation import grounding, ngrams
from evaluation.bootstrap import bootstrap
from evaluation.ssv2 import TemplateReader, ssv2_scores
from runtime.files import UserError


class Scorer:
    """Scores of captions against a split's references, with their 95 % intervals.

    Whatever it needs from the dataset it reads when it is made: before an hour of captioning, not after.
    Raises: UserError where labels.json is there and is not what it should be.
    """

    def __init__(
        self, records: list[dataset.Record], layout: dataset.Layout, timeout: float = ngrams.TIMEOUT, seed: int = 0
    ) -> None:
        self.records, self.timeout, self.seed = records, timeout, seed
        self.references = {record["id"]: record["label"] for record in records}
        self.reader = None
        if layout.labels_file("labels.json"):
            # labels.json has no brackets; the records' templates say where the placeholders are.
            written = [record["template"] for record in records if record.get("template")]
            self.reader = TemplateReader([*dataset.read_templates(layout.data), *written])

    def scores(self, predictions: dict[str, str], meteor: bool = True) -> dict[str, Any]:
        """The n-gram scores, SSv2's own, and each clip's: all of evaluation.json that comes from captions alone."""
        found = self._ngram(predictions, meteor)
        result = {"clips": len(predictions), "tokenizer": found.tokenizer, "notes": found.notes}
        result |= {"metrics": found.metrics, "intervals": dict(found.intervals)}
        outcomes = {}
        if self.reader is not None:
            by_id = {record["id"]: record for record in self.records}
            result["ssv2"] = ssv2_scores(predictions, by_id, self.reader, seed=self.seed)
            outcomes = {key: clip["outcome"] for key, clip in result["ssv2"].pop("per_clip").items()}
        result["predictions"] = [
            {
                "id": (key := record["id"]),
                "prediction": predictions[key],
                "references": record["label"],
                "template": record.get("template"),
                "CIDEr": found.per_clip["CIDEr"][key],
                "outcome": outcomes.get(key),
            }
            for record in self.records
        ]
        return result

    def _ngram(self, predictions: dict[str, str], meteor: bool) -> ngrams.NgramScores:
        references = {clip_id: self.references[clip_id] for clip_id in predictions}
        return ngrams.ngram_scores(predictions, references, meteor=meteor, timeout=self.timeout, seed=self.seed)

    def means(self, per_clip: dict[str, list[float]]) -> dict[str, Any]:
        """The mean of each score's values, and in "intervals" its interval."""
        intervals = {name: list(bootstrap(values, seed=self.seed)) for name, values in per_clip.items()}
        return {**{name: math.fsum(values) / len(values) for name, values in per_clip.items()}, "intervals": intervals}

    def grounding(
        self,
        predictions: dict[str, str],
        shuffled: dict[str, str] | None,
        common: str,
        backwards: dict[str, str],
        pairs: dict[str, str],
    ) -> dict[str, Any]:
        """What the scores are when the captioner is lied to, or does not look.

        shuffled: captions of other clips' features; common: the caption that needs no clip; backwards: captions
        of reversed clips, of those alone whose action has an opposite in `pairs` (grounding.opposites).
        """
        flips = list(grounding.flips(backwards, self.records, pairs, self.reader).values()) if self.reader else []
        found = self.means({"reversal_flips": flips} if flips else {})
        # The reversed clips are some of all: their score stands beside the same clips' forwards.
        forwards = {clip_id: predictions[clip_id] for clip_id in backwards}
        most_common = dict.fromkeys(self.references, common)
        rows = {"shuffled": shuffled, "most_common": most_common, "reversed": backwards, "forwards": forwards}
        for name, captions in rows.items():
            if captions:
                ngram = self._ngram(captions, meteor=False)
                found[f"CIDEr_{name}"] = ngram.metrics["CIDEr"]
                found["intervals"][f"CIDEr_{name}"] = ngram.intervals["CIDEr"]
        return {**found, "most_common_caption": common, "reversed_clips": len(backwards)}


NAMES = {  # section of evaluation.json: (the table's group, {score: how the table names it})
    "grounding": (
        "does it look?",
        {
            "CIDEr_shuffled": "CIDEr, features shuffled between clips",
            "CIDEr_most_common": "CIDEr, the most common training caption",
            "CIDEr_reversed": "CIDEr, clips played backwards",
            "CIDEr_forwards": "CIDEr, the same clips forwards",
            "reversal_flips": "reversed clips captioned with the opposite action",
        },
    ),
    "ssv2": (
        "SSv2",
        {
            "exact_match": "exact match",
            "template_accuracy": "template accuracy",
            "object_accuracy": "object accuracy",
            "no_template": "captions that fit no template",
        },
    ),
    "actions": ("SSv2", {"top1": "action by likelihood, top 1", "top5": "action by likelihood, top 5"}),
}
OF_REVERSED = ("CIDEr_reversed", "CIDEr_forwards", "reversal_flips")


def table(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a score of evaluation.json: group, name, value, its 95 % interval (low, high; or None), note."""

    def row(group: str, name: str, value: Any, interval: Any, note: str | None = None) -> dict[str, Any]:
        low, high = interval or (None, None)
        return {"group": group, "name": name, "value": value, "low": low, "high": high, "note": note}

    metrics, intervals = result["metrics"], result["intervals"]
    rows = [row("n-gram", name, value, intervals.get(name)) for name, value in metrics.items()]
    # Scores of another tokenizer, or without METEOR, are not those of a paper: the table says so where they stand.
    for line in rows:
        if line["name"] == "METEOR" and line["value"] is None:
            line["note"] = "; ".join(result["notes"]) or "left out"
    if result["tokenizer"] != ngrams.PTB:
        rows[0]["note"] = f"of {result['tokenizer']}"
    for section, (group, names) in NAMES.items():
        scores = result.get(section, {})
        if section == "grounding" and scores:  # the real score beside those that it has to beat
            rows.append(row(group, "CIDEr", metrics["CIDEr"], intervals["CIDEr"]))
        for key, name in names.items():
            if key in scores:
                few = (
                    f"of {scores['reversed_clips']:,} clips whose action has an opposite"
                    if key in OF_REVERSED
                    else None
                )
                rows.append(row(group, name, scores[key], scores["intervals"].get(key), few))
    return rows


def outcomes(captions: dict[str, tuple[str, list[str]]], data: Path) -> dict[str, dict[str, str | None]]:
    """How captions relate to their references, for a page's colours: template and outcome by id.

    captions: a caption and its references by clip id; data: the dataset's folder. Nothing without labels.json.
    """
    try:
        reader = TemplateReader(dataset.read_templates(data))
    except UserError:  # the captions are as good, and have no colour
        return {}
    if not captions:
        return {}
    records = {
        key: {"label": texts, "template": reader.read(texts[0]).template} for key, (_, texts) in captions.items()
    }
    found = ssv2_scores({key: caption for key, (caption, _) in captions.items()}, records, reader)["per_clip"]
    return {key: {"template": records[key]["template"], "outcome": clip["outcome"]} for key, clip in found.items()}
