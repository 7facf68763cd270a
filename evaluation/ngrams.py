"""Captions in, scores out: n-gram scores as pycocoevalcap computes them, SSv2's own scores, bootstrap intervals.

Everything is scored by clip id and over the whole set. Captions are PTB-tokenized; where Java is missing or hangs
a plain rule takes its place, METEOR is left out, and the scores say so.
"""

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

from evaluation import java
from evaluation.ssv2 import TemplateReader, objects_found, template_key, words
from runtime.files import UserError

PTB = "PTB (pycocoevalcap)"
PLAIN = "plain words: lower case, no punctuation (not PTB)"
SAMPLES = 1000  # bootstrap resamples
CONFUSIONS = 20  # pairs of templates that are listed

_said: set[str] = set()  # notes that were printed


@dataclass(frozen=True)
class NgramScores:
    """`metrics` by name (METEOR None without Java), `intervals` [low, high] by name, `per_clip` by name and clip id.

    `tokenizer` names the tokenizer, `notes` says in words for the user what was left out and why.
    """

    metrics: dict[str, float | None]
    per_clip: dict[str, dict[str, float]]
    intervals: dict[str, list[float] | None]
    tokenizer: str
    notes: list[str]


def ngram_scores(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    meteor: bool = True,
    timeout: float = java.TIMEOUT,
    seed: int = 0,
    samples: int = SAMPLES,
) -> NgramScores:
    """BLEU-1..4, METEOR, ROUGE-L and CIDEr of one caption a clip against its references, all by clip id.

    The numbers are those of pycocoevalcap's COCOEvalCap (without SPICE); CIDEr's document frequencies are the
    references'. `timeout`: seconds that Java may be silent before it is ended. Intervals: 95 % of `samples`
    bootstrap resamples of the clips, for BLEU and METEOR from the clips' counts (they are not means over clips).
    Raises: UserError where there are no clips, or a clip has no prediction or no reference.
    """
    said, texts, tokenizer, notes = _tokenize(predictions, references, timeout)
    ids = list(references)
    counts, per_clip = _bleu_counts(said, texts), {}
    bleu = bleu_from_counts(counts.sum(0))
    metrics: dict[str, float | None] = {f"Bleu_{n + 1}": float(score) for n, score in enumerate(bleu)}
    metrics["METEOR"] = None
    columns, meteor_counts = [counts], np.zeros((len(ids), 0))
    if meteor and tokenizer == PTB:
        try:
            metrics["METEOR"], scores, meteor_counts = java.meteor(said, texts, timeout)
            per_clip["METEOR"] = dict(zip(ids, scores, strict=True))
        except java.JavaError as error:
            notes.append(f"{error}: METEOR is left out")
    rouge = [float(Rouge().calc_score([one], many)) for one, many in zip(said, texts, strict=True)]
    metrics["ROUGE_L"], per_clip["ROUGE_L"] = float(np.mean(rouge)), dict(zip(ids, rouge, strict=True))
    metrics["CIDEr"], cider = _cider(said, texts)
    per_clip["CIDEr"] = dict(zip(ids, cider, strict=True))
    if len(ids) == 1:
        notes.append("CIDEr weighs words by how few clips have them, so for one clip alone it is 0 by definition")

    # One set of resamples serves all scores.
    columns = np.column_stack([counts, rouge, cider, meteor_counts])
    sums = resampled_sums(columns, seed, samples)
    spread = {f"Bleu_{n + 1}": scores for n, scores in enumerate(bleu_from_counts(sums[:, :10]).T)}
    spread |= {"ROUGE_L": sums[:, 10] / len(ids), "CIDEr": sums[:, 11] / len(ids)}
    if metrics["METEOR"] is not None:
        spread["METEOR"] = java.meteor_from_counts(sums[:, 12:])
    intervals = {name: interval(spread[name]) if name in spread else None for name in metrics}
    return NgramScores(metrics, per_clip, intervals, tokenizer, notes)


def cider(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]], timeout: float = java.TIMEOUT
) -> float:
    """CIDEr alone, for the score after each epoch. What is amiss with Java is said once a process, on stderr.

    Raises: UserError as ngram_scores.
    """
    said, texts, _, notes = _tokenize(predictions, references, timeout)
    for note in notes:
        if note not in _said:
            print(f"note: {note}", file=sys.stderr, flush=True)
            _said.add(note)
    return _cider(said, texts)[0]


def _tokenize(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]], timeout: float
) -> tuple[list[str], list[list[str]], str, list[str]]:
    """Tokens joined by spaces, in the order of `references`: predictions, references, the tokenizer's name, notes."""
    ids = list(references)
    if not ids:
        raise UserError("no clips to score: the references are empty")
    if missing := [key for key in ids if key not in predictions]:
        raise UserError(f"{len(missing)} clips have references and no prediction, the first is {missing[0]!r}")
    if len(predictions) != len(ids):
        extra = next(key for key in predictions if key not in references)
        raise UserError(f"{len(predictions) - len(ids)} clips have a prediction and no reference, one is {extra!r}")
    if empty := [key for key in ids if not references[key] or isinstance(references[key], str)]:
        raise UserError(f"clip {empty[0]!r} has no list of references to score against")
    captions = [predictions[key] for key in ids]
    texts = [text for key in ids for text in references[key]]
    name, notes = PTB, []
    try:
        # Two runs as pycocoevalcap has them: what stands at the end of one file does not touch the other.
        texts, captions = java.ptb(texts, timeout), java.ptb(captions, timeout)
    except java.JavaError as error:
        name = PLAIN
        texts, captions = [plain_tokens(text) for text in texts], [plain_tokens(text) for text in captions]
        notes.append(f"{error}: captions are cut into {PLAIN}, and METEOR is left out; compare with no PTB scores")
    rest = iter(texts)
    return captions, [[next(rest) for _ in references[key]] for key in ids], name, notes


def plain_tokens(caption: str) -> str:
    """Tokens near PTB's, without Java: lower case, contractions cut ("does n't"), punctuation dropped."""
    text = java.one_line(caption).lower().replace("’", "'")
    text = re.sub(r"\bcannot\b", "can not", text)
    text = re.sub(r"(?<=\w)n't\b", " n't", text)
    text = re.sub(r"(?<=\w)('(?:s|re|ve|ll|d|m))\b", r" \1", text)
    tokens = re.findall(r"'(?:s|re|ve|ll|d|m)\b|n't\b|\w+(?:[-/.,:&]\w+)*|[^\w\s\"()\[\]{}]", text)
    return " ".join(token for token in tokens if token not in PUNCTUATIONS)


def _cider(said: list[str], texts: list[list[str]]) -> tuple[float, list[float]]:
    if not any(text.split() for many in texts for text in many):  # pycocoevalcap takes the maximum of no counts
        return 0.0, [0.0] * len(said)
    score, scores = Cider().compute_score(dict(enumerate(texts)), {i: [one] for i, one in enumerate(said)})
    return float(score), [float(one) for one in scores]


def _bleu_counts(said: list[str], texts: list[list[str]]) -> np.ndarray:
    """What BLEU adds up over clips, (clips, 10): 4 counts of matched n-grams, 4 of n-grams said, both lengths."""
    scorer, rows = BleuScorer(n=4), []
    for one, many in zip(said, texts, strict=True):
        scorer += (one, many)
    for clip in scorer.ctest:
        length = clip["testlen"]
        closest = min((abs(reference - length), reference) for reference in clip["reflen"])[1]
        rows.append([*clip["correct"], *clip["guess"], length, closest])
    return np.array(rows, dtype=np.float64)


def bleu_from_counts(sums: np.ndarray) -> np.ndarray:
    """BLEU-1..4 of summed counts (..., 10) -> (..., 4), with pycocoevalcap's constants against division by zero."""
    precision = (sums[..., :4] + 1e-15) / (sums[..., 4:8] + 1e-9)
    scores = np.cumprod(precision, axis=-1) ** (1.0 / np.arange(1, 5))
    ratio = (sums[..., 8] + 1e-15) / (sums[..., 9] + 1e-9)
    return scores * np.exp(np.minimum(0.0, 1.0 - 1.0 / ratio))[..., None]


def resampled_sums(columns: np.ndarray, seed: int = 0, samples: int = SAMPLES) -> np.ndarray:
    """Bootstrap: sums (samples, k) of columns (clips, k) over as many clips, drawn with replacement."""
    clips, random = len(columns), np.random.default_rng(seed)
    sums = np.empty((samples, columns.shape[1]))
    for start in range(0, samples, 50):  # 50 x 24,777 weights are 10 MB
        rows = range(start, min(start + 50, samples))
        weights = np.stack([np.bincount(random.integers(0, clips, clips), minlength=clips) for _ in rows])
        sums[rows.start : rows.stop] = weights.astype(np.float64) @ columns
    return sums


def interval(scores: np.ndarray) -> list[float]:
    """The middle 95 % of resampled scores."""
    low, high = np.quantile(scores, [0.025, 0.975])
    return [float(low), float(high)]


def bootstrap(values: Sequence[float] | np.ndarray, seed: int = 0, samples: int = SAMPLES) -> tuple[float, float]:
    """95 % percentile interval (low, high) of the mean of `values` (clips,), resampled over clips, seeded.

    Efron 1979. Raises: ValueError for no values.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0:
        raise ValueError("no values to resample")
    low, high = interval(resampled_sums(values[:, None], seed, samples)[:, 0] / len(values))
    return low, high


def ssv2_scores(
    predictions: Mapping[str, str],
    records: Mapping[str, Mapping[str, Any]],
    reader: TemplateReader,
    seed: int = 0,
    samples: int = SAMPLES,
) -> dict[str, Any]:
    """Scores from the captions' text alone that n-grams cannot give: is the action right, are the objects?

    A clip's record has "label" (a text or a list), "template" and "placeholders" (or None).
    - exact_match: the words are those of a reference (case, punctuation and spacing aside);
    - template_accuracy: the caption, read as a template (TemplateReader), is the clip's; an exact match is right
      by definition, since some labels' texts fit another template better than their own;
    - no_template: captions that fit none of the templates;
    - object_accuracy: of all placeholders of the references, those found in the prediction's placeholders, or
      in the whole caption where no template fits (`templates.objects_found`).
    All are fractions; None where no clip has what they need. "intervals" holds 95 % bootstrap intervals of them,
    "per_template" the same by template, "confused" the most frequent [true, read template or None, count].
    Raises: UserError where there are no clips, or a prediction's clip has no record.
    """
    if not predictions:
        raise UserError("no clips to score: there are no predictions")
    if missing := [key for key in predictions if key not in records]:
        raise UserError(f"{len(missing)} predictions have no annotation, the first is {missing[0]!r}")
    # Templates are shown as the annotations write them: labels.json may have the same without brackets.
    shown = {template_key(r["template"]): r["template"] for r in records.values() if r.get("template")}
    per_clip, rows, groups, confused = {}, [], defaultdict(list), Counter()
    for key, caption in predictions.items():
        clip, row, true = _score_clip(caption, records[key], reader, shown)
        per_clip[key] = clip
        if true:
            groups[true].append(len(rows))
            if not clip["template"]:
                confused[true, clip["read_template"]] += 1
        rows.append(row)
    table = np.array(rows, dtype=np.float64)
    scores = _fractions(table, seed, samples)
    pairs = sorted(confused.items(), key=lambda pair: (-pair[1], pair[0][0], pair[0][1] or ""))
    return {
        **scores,
        "per_template": {true: _fractions(table[groups[true]], seed, samples) for true in sorted(groups)},
        "confused": [[true, read, count] for (true, read), count in pairs[:CONFUSIONS]],
        "per_clip": per_clip,
    }


def _score_clip(
    caption: str, record: Mapping[str, Any], reader: TemplateReader, shown: Mapping[str, str]
) -> tuple[dict[str, Any], list[float], str | None]:
    """One clip's scores, its row of counts for `_fractions`, and its true template as it is shown."""
    labels = record.get("label") or []
    labels = [labels] if isinstance(labels, str) else labels
    wanted = record.get("placeholders")
    true = record.get("template") or None
    true = shown[template_key(true)] if true else None
    exact = any(
        caption.strip() == label.strip() or (words(label) and words(caption) == words(label)) for label in labels
    )
    reading = reader.read(caption, expected=true)
    read = shown.get(template_key(reading.template), reading.template) if reading.template else None
    right = true is not None and (exact or read == true)
    found, count = objects_found(wanted, reading.placeholders or [caption]) if wanted else (0, 0)
    found = count if exact else found
    clip = {
        "exact": bool(exact),
        "template": right if true else None,
        "objects": found / count if count else None,
        "read_template": true if right else read,
        "outcome": "exact" if exact else "template" if right else "wrong" if true else None,
    }
    return clip, [1.0, exact, true is not None, right, reading.template is None and not exact, found, count], true


def _fractions(table: np.ndarray, seed: int, samples: int) -> dict[str, Any]:
    """Fractions and their intervals from rows [1, exact, has a template, template right, fits none, found, objects]."""
    sums, resampled = table.sum(0), resampled_sums(table, seed, samples)
    parts = {"exact_match": (1, 0), "template_accuracy": (3, 2), "no_template": (4, 0), "object_accuracy": (5, 6)}
    scores: dict[str, Any] = {"clips": len(table)}
    intervals = {}
    for name, (top, bottom) in parts.items():
        scores[name] = float(sums[top] / sums[bottom]) if sums[bottom] else None
        usable = resampled[resampled[:, bottom] > 0]  # a resample may by chance hold no clip with objects
        intervals[name] = interval(usable[:, top] / usable[:, bottom]) if sums[bottom] else None
    return {**scores, "intervals": intervals}
