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


NAMES = (  # of the table's scores: section of evaluation.json, group in the table, key, name
    ("grounding", "does it look?", "CIDEr", "CIDEr"),  # the real score stands beside those that it has to beat
    ("grounding", "does it look?", "CIDEr_shuffled", "CIDEr, features shuffled between clips"),
    ("grounding", "does it look?", "CIDEr_most_common", "CIDEr, the most common training caption"),
    ("grounding", "does it look?", "CIDEr_reversed", "CIDEr, clips played backwards"),
    ("grounding", "does it look?", "CIDEr_forwards", "CIDEr, the same clips forwards"),
    ("grounding", "does it look?", "reversal_flips", "reversed clips captioned with the opposite action"),
    ("ssv2", "SSv2", "exact_match", "exact match"),
    ("ssv2", "SSv2", "template_accuracy", "template accuracy"),
    ("ssv2", "SSv2", "object_accuracy", "object accuracy"),
    ("ssv2", "SSv2", "no_template", "captions that fit no template"),
    ("actions", "SSv2", "top1", "action by likelihood, top 1"),
    ("actions", "SSv2", "top5", "action by likelihood, top 5"),
)
OF_REVERSED = ("CIDEr_reversed", "CIDEr_forwards", "reversal_flips")


def table(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a score of evaluation.json: group, name, value, its 95 % interval (low, high; or None), note."""
    metrics, rows = {**result["metrics"], "intervals": result["intervals"]}, []

    def add(group: str, scores: dict[str, Any], key: str, name: str, note: str | None = None) -> None:
        low, high = scores["intervals"].get(key) or (None, None)
        rows.append({"group": group, "name": name, "value": scores[key], "low": low, "high": high, "note": note})

    for name, value in result["metrics"].items():
        # Scores of another tokenizer, or without METEOR, are not those of a paper: the table says so where they stand.
        note = f"of {result['tokenizer']}" if not rows and result["tokenizer"] != ngrams.PTB else None
        if name == "METEOR" and value is None:
            note = "; ".join(result["notes"]) or "left out"
        add("n-gram", metrics, name, name, note)
    for section, group, key, name in NAMES:
        scores = result.get(section, {})
        if key == "CIDEr" and scores:
            scores = metrics
        if key in scores:
            few = f"of {scores['reversed_clips']:,} clips whose action has an opposite" if key in OF_REVERSED else None
            add(group, scores, key, name, few)
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
