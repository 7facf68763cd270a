"""All scores of a split's captions together, as evaluation.json holds them and as the table shows them."""

from pathlib import Path
from typing import Any

from dataset import Layout, Record, read_templates
from evaluation import ngrams
from evaluation.bootstrap import Resampled, fractions
from evaluation.ssv2 import TemplateReader, score_clip, ssv2_scores, template_key
from runtime import files
from runtime.progress import Progress


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
        result, clips = {"clips": len(predictions), **self.ngrams(predictions, meteor)}, {}
        ciders, _ = result.pop("per_clip")["CIDEr"], result.pop("resampled")
        if self.reader is not None:
            result["ssv2"] = ssv2_scores(predictions, self.records, self.reader, self.seed)
            clips = result["ssv2"].pop("per_clip")
        result["predictions"] = [
            {
                "id": key,
                "prediction": predictions[key],
                "references": record["label"],
                "template": record.get("template"),
                "CIDEr": ciders[key],
                "outcome": clips[key]["outcome"] if clips else None,
                "read": clips[key]["read"] if clips else None,
            }
            for key, record in self.records.items()
        ]
        return result

    def ngrams(self, predictions: dict[str, str], meteor: bool) -> dict[str, Any]:
        """`ngrams.ngram_scores` of captions against these clips' references."""
        references = {clip_id: self.records[clip_id]["label"] for clip_id in predictions}
        with Progress(total=len(references), desc="scoring", unit="caption", leave=False) as bar:
            found = ngrams.ngram_scores(predictions, references, meteor, self.timeout, self.seed)
            bar.update(len(references))
        return found

    def grounding(self, captions: dict[str, dict[str, str]], pairs: dict[str, str]) -> Resampled:
        """CIDEr of captions by their name, and of the "reversed" clips' whether they tell the opposite (in `pairs`)."""
        flips = []
        for clip_id, caption in captions["reversed"].items() if self.reader else ():
            opposite = pairs[template_key(self.records[clip_id]["template"])]
            flips.append({"reversal_flips": (template_key(self.reader.read(caption).template) == opposite, 1)})
        found = fractions(flips, self.seed) if flips else Resampled({}, {})
        for name, said in captions.items():
            if said:
                some, key = self.ngrams(said, meteor=False)["resampled"], f"CIDEr_{name}"
                found.scores[key], found.resamples[key] = some.scores["CIDEr"], some.resamples["CIDEr"]
        return found


def action_scores(ranks: list[int], seed: int = 0) -> Resampled:
    """How often a clip's own template is the likeliest (rank 1) of all, and among the five likeliest."""
    return fractions([{"top1": (rank <= 1, 1), "top5": (rank <= 5, 1)} for rank in ranks], seed)


# Of each score: section of evaluation.json, group, key, name, note. CIDEr stands again beside those it has to beat.
TABLE = files.read_json(Path(__file__).with_name("table.json"), "the table of scores")


def table(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a score of evaluation.json: group, name, value, its 95 % interval (low, high; or None), note.

    With another run's to compare with: "difference", and its interval, "gain_low" and "gain_high"; or None.
    """
    metrics = {**result["metrics"], "intervals": result["intervals"]}
    # Scores of another tokenizer, or without METEOR, are not those of a paper: the table says so where they stand.
    notes = {"Bleu_1": f"of {result['tokenizer']}"} if result["tokenizer"] != ngrams.PTB else {}
    if metrics["METEOR"] is None:
        notes["METEOR"] = "; ".join(result["notes"]) or "left out"
    rows, compared = [], result.get("compared", {})
    for section, group, key, name, note in TABLE:
        scores = metrics if key in metrics else result.get(section, {})
        gains = compared.get("metrics" if key in metrics else section, {"intervals": {}})
        if section in result and key in scores:
            low, high = scores["intervals"].get(key) or (None, None)
            row = {"group": group, "name": name, "value": scores[key], "low": low, "high": high}
            low, high = gains["intervals"].get(key) or (None, None)
            row |= {"difference": gains.get(key), "gain_low": low, "gain_high": high}
            rows.append({**row, "note": note.format(**scores) if note else notes.get(key)})
    return rows


def outcomes(captions: dict[str, tuple[str, list[str]]], data: Path) -> dict[str, dict[str, Any]]:
    """For a page's colours, `score_clip` of captions with their references; nothing without labels.json."""
    try:
        reader = TemplateReader(read_templates(data))
    except files.UserError:  # the captions are as good, and have no colour
        return {}
    found = {}
    for clip_id, (caption, references) in captions.items():
        record = {"label": references, "template": reader.read(references[0]).template}
        found[clip_id] = score_clip(caption, record, reader)
    return found
