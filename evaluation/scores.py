"""All scores of a split's captions together, as evaluation.json holds them and as the table shows them."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dataset
from evaluation import coco, grounding, ngrams
from evaluation.bootstrap import bootstrap
from evaluation.ssv2 import TemplateReader, ssv2_scores
from runtime.files import UserError


class Scorer:
    """Scores of captions against a split's references, each with its 95 % interval.

    Whatever it needs from the dataset it reads when it is made: before an hour of captioning, not after.
    Raises: UserError where labels.json is there and is not what it should be.
    """

    def __init__(
        self, records: list[dataset.Record], layout: dataset.Layout, timeout: float = coco.TIMEOUT, seed: int = 0
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
        ngram = self._ngram(predictions, meteor)
        result = {"clips": len(predictions), "tokenizer": ngram.tokenizer, "notes": ngram.notes}
        result |= {"metrics": ngram.metrics, "intervals": dict(ngram.intervals)}
        per_clip = {}
        if self.reader is not None:
            by_id = {record["id"]: record for record in self.records}
            result["ssv2"] = ssv2_scores(predictions, by_id, self.reader, seed=self.seed)
            per_clip = result["ssv2"].pop("per_clip")
        result["predictions"] = [
            {
                "id": record["id"],
                "prediction": predictions[record["id"]],
                "references": record["label"],
                "template": record.get("template"),
                "CIDEr": ngram.per_clip["CIDEr"][record["id"]],
                "outcome": per_clip.get(record["id"], {}).get("outcome"),
            }
            for record in self.records
        ]
        return result

    def _ngram(self, predictions: dict[str, str], meteor: bool = False) -> ngrams.NgramScores:
        references = {clip_id: self.references[clip_id] for clip_id in predictions}
        return ngrams.ngram_scores(predictions, references, meteor=meteor, timeout=self.timeout, seed=self.seed)

    def accuracies(self, actions: dict[str, dict[str, float]]) -> dict[str, Any]:
        """Top-1 and top-5 with their intervals."""
        found: dict[str, Any] = {"intervals": {}}
        for name in ("top1", "top5"):
            self._mean(found, name, [clip[name] for clip in actions.values()])
        return found

    def _mean(self, found: dict[str, Any], name: str, values: list[float]) -> None:
        found[name] = math.fsum(values) / len(values)
        found["intervals"][name] = list(bootstrap(values, seed=self.seed))

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
        found: dict[str, Any] = {"most_common_caption": common, "reversed_clips": len(backwards), "intervals": {}}
        # The reversed clips are some of all: their score stands beside the same clips' forwards.
        rows = {"shuffled": shuffled, "most_common": dict.fromkeys(self.references, common), "reversed": backwards}
        rows["forwards"] = {clip_id: predictions[clip_id] for clip_id in backwards}
        for name, captions in rows.items():
            if captions:
                ngram = self._ngram(captions)
                found[f"CIDEr_{name}"] = ngram.metrics["CIDEr"]
                found["intervals"][f"CIDEr_{name}"] = list(ngram.intervals["CIDEr"])
        if backwards and self.reader is not None:
            flipped = list(grounding.flips(backwards, self.records, pairs, self.reader).values())
            self._mean(found, "reversal_flips", flipped)
        return found


REVERSED = ("CIDEr_reversed", "CIDEr_forwards", "reversal_flips")
TABLE = [  # section of evaluation.json, score in it, the group of the table that it stands in, how the table names it
    ("grounding", "CIDEr_shuffled", "does it look?", "CIDEr, features shuffled between clips"),
    ("grounding", "CIDEr_most_common", "does it look?", "CIDEr, the most common training caption"),
    ("grounding", "CIDEr_reversed", "does it look?", "CIDEr, clips played backwards"),
    ("grounding", "CIDEr_forwards", "does it look?", "CIDEr, the same clips forwards"),
    ("grounding", "reversal_flips", "does it look?", "reversed clips captioned with the opposite action"),
    ("ssv2", "exact_match", "SSv2", "exact match"),
    ("ssv2", "template_accuracy", "SSv2", "template accuracy"),
    ("ssv2", "object_accuracy", "SSv2", "object accuracy"),
    ("ssv2", "no_template", "SSv2", "captions that fit no template"),
    ("actions", "top1", "SSv2", "action by likelihood, top 1"),
    ("actions", "top5", "SSv2", "action by likelihood, top 5"),
]


def table(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a score of evaluation.json: group, name, value, its 95 % interval (low, high; or None), note."""

    def add(group: str, name: str, section: dict[str, Any], key: str, note: str | None = None) -> None:
        low, high = section.get("intervals", {}).get(key) or (None, None)
        rows.append({"group": group, "name": name, "value": section[key], "low": low, "high": high, "note": note})

    rows: list[dict[str, Any]] = []
    ngram = {**result["metrics"], "intervals": result["intervals"]}
    for name, value in result["metrics"].items():
        # Scores of another tokenizer, or without METEOR, are not those of a paper: the table says so where they stand.
        missing = name == "METEOR" and value is None
        add("n-gram", name, ngram, name, ("; ".join(result["notes"]) or "left out") if missing else None)
    if result["tokenizer"] != ngrams.PTB:
        rows[0]["note"] = f"of {result['tokenizer']}"
    if result.get("grounding"):  # the real score beside those that it has to beat
        add("does it look?", "CIDEr", ngram, "CIDEr")
    for section, key, group, name in TABLE:
        scores = result.get(section, {})
        if key in scores:
            few = f"of {scores.get('reversed_clips'):,} clips whose action has an opposite" if key in REVERSED else None
            add(group, name, scores, key, few)
    return rows


def lines(rows: list[dict[str, Any]], notes: list[str]) -> Iterator[str]:
    """The table as text, for a terminal; `notes` were printed above it already."""
    width = max(len(row["name"]) for row in rows)
    for group, members in itertools.groupby(rows, key=lambda row: row["group"]):
        yield group
        for row in members:
            interval = "" if row["low"] is None else f"  [{row['low']:.4f}, {row['high']:.4f}]"
            value = "none" if row["value"] is None else f"{row['value']:.4f}"
            note = f"  ({row['note']})" if row["note"] and row["note"] not in notes else ""
            yield f"  {row['name']:<{width}}  {value:>8}{interval}{note}"


def outcomes(captions: dict[str, tuple[str, list[str]]], data: Path) -> dict[str, dict[str, str | None]]:
    """How captions relate to their references, for a page's colours: template and outcome by id.

    captions: a caption and its references by clip id; data: the dataset's folder. Nothing without labels.json.
    """
    if not captions:
        return {}
    try:
        reader = TemplateReader(dataset.read_templates(data))
    except UserError:  # the captions are as good, and have no colour
        return {}
    records = {
        key: {"label": references, "template": reader.read(references[0]).template}
        for key, (_, references) in captions.items()
    }
    found = ssv2_scores({key: caption for key, (caption, _) in captions.items()}, records, reader)["per_clip"]
    return {key: {"template": records[key]["template"], "outcome": clip["outcome"]} for key, clip in found.items()}
