"""Captions in, n-gram scores out, as pycocoevalcap computes them: BLEU, METEOR, ROUGE-L and CIDEr.

Captions are PTB-tokenized; without Java a plain rule takes its place, METEOR is left out, and the scores say so.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from evaluation.bootstrap import Resampled, resampled_sums

Captions = Mapping[str, str]  # by clip id
References = Mapping[str, Sequence[str]]
BLEU = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4")
PTB = "PTB (pycocoevalcap)"
PLAIN = "plain words: lower case, no punctuation (not PTB)"
TIMEOUT = 120.0  # seconds for Java; METEOR reads its tables for 7 s on a quiet machine
# Characters at which Java may end a line (and then every later caption would meet another clip's references),
# other control characters (PTB drops them with a warning each) and halves of surrogate pairs (no UTF-8).
LINE_BREAKERS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def ngram_scores(
    predictions: Captions, references: References, meteor: bool = True, timeout: float = TIMEOUT, seed: int = 0
) -> dict[str, Any]:
    """BLEU-1..4, METEOR, ROUGE-L and CIDEr of one caption a clip against its references, as COCOEvalCap has them.

    CIDEr's document frequencies are the references'. `timeout`: seconds that Java may take, beside 0.01 s a caption.
    Intervals: 95 % of bootstrap resamples of the clips, for BLEU from their counts (it is no mean of clips).

    Returns "tokenizer"; "notes" for the user, of what was left out and why; "metrics" by name, METEOR None without
    Java; their "intervals" [low, high], None for METEOR, which is no mean of clips; "per_clip" scores by name and id;
    "resampled", the metrics over the resamples.
    """
    from evaluation import coco  # training, which scores without METEOR, is far from Java until an epoch ends

    captions, texts, tokenizer, notes = _tokenize(predictions, references, timeout)
    counts, cider = _bleu_counts(captions, texts), _cider(captions, texts)
    rouge = [float(Rouge().calc_score([one], many)) for one, many in zip(captions, texts, strict=True)]
    metrics = dict(zip(BLEU, _bleu(counts.sum(0)).tolist(), strict=True))
    metrics |= {"METEOR": None, "ROUGE_L": float(np.mean(rouge)), "CIDEr": float(np.mean(cider))}
    per_clip = {"ROUGE_L": rouge, "CIDEr": cider}
    if meteor and tokenizer == PTB:
        try:
            metrics["METEOR"], per_clip["METEOR"] = coco.meteor(captions, texts, timeout)
        except coco.JavaError as error:
            notes.append(f"{error}: METEOR is left out")
    sums = resampled_sums(np.column_stack([counts, rouge, cider]), seed)  # the same resamples for all scores
    columns = np.column_stack([_bleu(sums[:, :10]), sums[:, 10:] / len(captions)]).T
    resampled = Resampled(metrics, {"METEOR": None, **dict(zip((*BLEU, "ROUGE_L", "CIDEr"), columns, strict=True))})
    return {
        "tokenizer": tokenizer,
        "notes": notes,
        "metrics": metrics,
        "intervals": resampled.summary()["intervals"],
        "per_clip": {name: dict(zip(references, scores, strict=True)) for name, scores in per_clip.items()},
        "resampled": resampled,
    }


def cider(predictions: Captions, references: References) -> float:
    """CIDEr alone, for the score after each epoch. What is amiss with Java is printed on stderr."""
    captions, texts, _, notes = _tokenize(predictions, references, TIMEOUT)
    for note in notes:
        print(f"note: {note}", file=sys.stderr, flush=True)
    return float(np.mean(_cider(captions, texts)))


def _tokenize(predictions: Captions, references: References, timeout: float) -> tuple[list, list, str, list]:
    """Tokens joined by spaces, in the order of `references`: predictions, references, the tokenizer's name, notes."""
    from evaluation import coco

    captions = [LINE_BREAKERS.sub(" ", predictions[key]) for key in references]
    texts = [LINE_BREAKERS.sub(" ", text) for many in references.values() for text in many]
    name, notes = PTB, []
    try:
        texts, captions = coco.tokenize([texts, captions], timeout)
    except coco.JavaError as error:
        name, texts, captions = PLAIN, list(map(plain_tokens, texts)), list(map(plain_tokens, captions))
        notes.append(f"{error}: captions are cut into {PLAIN}, and METEOR is left out; compare with no PTB scores")
    rest = iter(texts)
    return captions, [[next(rest) for _ in many] for many in references.values()], name, notes


def plain_tokens(caption: str) -> str:
    """Tokens near PTB's, without Java: lower case, contractions cut ("does n't"), punctuation dropped."""
    text = caption.lower().replace("’", "'")
    text = re.sub(r"\bcannot\b", "can not", text)
    text = re.sub(r"(?<=\w)(?=n't\b|'(?:s|re|ve|ll|d|m)\b)", " ", text)
    return " ".join(re.findall(r"'(?:s|re|ve|ll|d|m)\b|n't\b|\w+(?:[-/.,:&]\w+)*|[^\w\s\"'`.?!,:;()\[\]{}-]", text))


def _cider(captions: list[str], texts: list[list[str]]) -> list[float]:
    return Cider().compute_score(dict(enumerate(texts)), {i: [one] for i, one in enumerate(captions)})[1].tolist()


def _bleu_counts(captions: list[str], texts: list[list[str]]) -> np.ndarray:
    """What BLEU adds up over clips, (clips, 10): 4 counts of matched n-grams, 4 of n-grams said, both lengths."""
    cooked = [cook_test(one, cook_refs(many), "closest") for one, many in zip(captions, texts, strict=True)]
    rows = [[*said["correct"], *said["guess"], said["testlen"], said["reflen"]] for said in cooked]
    return np.array(rows, dtype=np.float64)


def _bleu(sums: np.ndarray) -> np.ndarray:
    """BLEU-1..4 of summed counts (..., 10) -> (..., 4), with pycocoevalcap's constants against division by zero."""
    precision = (sums[..., :4] + 1e-15) / (sums[..., 4:8] + 1e-9)
    scores = np.cumprod(precision, axis=-1) ** (1.0 / np.arange(1, 5))
    ratio = (sums[..., 8] + 1e-15) / (sums[..., 9] + 1e-9)
    return scores * np.exp(np.minimum(0.0, 1.0 - 1.0 / ratio))[..., None]
