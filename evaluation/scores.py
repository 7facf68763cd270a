"""All scores of a split's captions together, as evaluation.json holds them and as the table shows them."""

import math
from pathlib import Path
from typing import Any

import dataset
from evaluation import coco, grounding, report
from evaluation import ngrams as metrics
from evaluation.bootstrap import bootstrap
from evaluation.ssv2 import TemplateReader, ssv2_scores
from runtime import files
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
        result = {
            "clips": len(predictions),
            "tokenizer": ngram.tokenizer,
            "notes": ngram.notes,
            "metrics": ngram.metrics,
            "intervals": dict(ngram.intervals),
        }
        per_clip = {}
        if self.reader is not None:
            by_id = {record["id"]: record for record in self.records}
            ssv2 = ssv2_scores(predictions, by_id, self.reader, seed=self.seed)
            per_clip = ssv2.pop("per_clip")
            result["ssv2"] = ssv2
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

    def _ngram(self, predictions: dict[str, str], meteor: bool) -> metrics.NgramScores:
        references = {clip_id: self.references[clip_id] for clip_id in predictions}
        return metrics.ngram_scores(predictions, references, meteor=meteor, timeout=self.timeout, seed=self.seed)

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
        found: dict[str, Any] = {"intervals": {}}
        # The reversed clips are some of all: their score stands beside the same clips' forwards.
        forwards = {clip_id: predictions[clip_id] for clip_id in backwards}
        rows = {
            "shuffled": shuffled,
            "most_common": dict.fromkeys(self.references, common),
            "reversed": backwards,
            "forwards": forwards,
        }
        for name, captions in rows.items():
            if captions:
                ngram = self._ngram(captions, meteor=False)
                found[f"CIDEr_{name}"] = ngram.metrics["CIDEr"]
                found["intervals"][f"CIDEr_{name}"] = list(ngram.intervals["CIDEr"])
        found["most_common_caption"] = common
        found["reversed_clips"] = len(backwards)
        if backwards and self.reader is not None:
            flipped = list(grounding.flips(backwards, self.records, pairs, self.reader).values())
            self._mean(found, "reversal_flips", flipped)
        return found


TABLE = {  # section of evaluation.json: (group, {score: how the table names it})
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

    rows = [row("n-gram", name, value, result["intervals"].get(name)) for name, value in result["metrics"].items()]
    # Scores of another tokenizer, or without METEOR, are not those of a paper: the table says so where they stand.
    for place in rows:
        if place["name"] == "METEOR" and place["value"] is None:
            place["note"] = "; ".join(result["notes"]) or "left out"
    if result["tokenizer"] != metrics.PTB:
        rows[0]["note"] = f"of {result['tokenizer']}"
    for section, (group, names) in TABLE.items():
        scores = result.get(section, {})
        if section == "grounding" and scores:  # the real score beside those that it has to beat
            rows.append(row(group, "CIDEr", result["metrics"]["CIDEr"], result["intervals"]["CIDEr"]))
        few = f"of {scores.get('reversed_clips', 0):,} clips whose action has an opposite"
        for key, said in names.items():
            if key in scores:
                note = few if key in OF_REVERSED else None
                rows.append(row(group, said, scores[key], scores.get("intervals", {}).get(key), note))
    return rows


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


def gallery(
    predictions: list[dict[str, Any]], layout: dataset.Layout, page: Path, copies: Path | None = None
) -> list[dict[str, Any]]:
    """The page's clips, from the "predictions" of evaluation.json: with the video as the page finds it.

    `copies` is a folder to copy the videos into, so that page and videos can be moved together.
    """
    rows = []
    for row in predictions:
        video = layout.video(row["id"])
        if video and copies:
            files.copy(video, copies / video.name)
            video = copies / video.name
        rows.append({**row, "score": row.get("CIDEr"), "video": report.relative(video, page) if video else None})
    return rows
