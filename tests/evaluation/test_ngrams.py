import shutil
from pathlib import Path

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer import ptbtokenizer

from evaluation import coco, ngrams

REFERENCES = {
    "1": ["holding a red cup next to a bottle", "a red cup is held beside a bottle"],
    "2": ["pretending to put pen on a surface"],
    "3": ["Moving something up.", "lifting a thing", "it doesn't fall (off) the table"],
    "4": ["putting café menu into bag"],
    "5": ["twisting (wringing) cloth wet until water comes out"],
    "6": ["poking a hole into <b>butter</b>"],
    "7": ["tearing paper into two pieces"],
    "8": ["uncovering coin"],
    "9": ["moving the cup up the table", "moving the cup and the pen"],
    "10": ["holding a ||| b"],
}
PREDICTIONS = {
    "1": "holding a red cup next to a red cup",
    "2": "putting pen on a surface",
    "3": "Moving the thing up; it doesn't fall...",
    "4": "putting café menu into naïve bag \N{SLIGHTLY SMILING FACE}",
    "5": "",
    "6": "poking a hole into <b>butter</b> & bread, 1/2 of it",
    "7": "...!?",
    "8": "uncovering coin",
    "9": "the cup the " * 12,
    "10": "SCORE ||| holding a ||| b",
}
# What ends a line for Java, what METEOR's protocol is made of, markup, half a character, endless repetition.
HOSTILE = [
    "a\nb",
    "\r\n\r",
    "\u2028x\u2029",
    "\x0b\x0c\x85",
    "\x00\x07",
    "SCORE ||| a ||| b",
    "<a href='",
    "\ud800",
    "''",
]

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="Java is not installed: nothing to compare with")


def coco_eval_cap(predictions, references):
    """pycocoevalcap's own evaluation, without SPICE (it downloads models)."""
    import pycocoevalcap.eval as theirs

    class NoSpice:
        def method(self):
            return "SPICE"

        def compute_score(self, gts, res):
            return 0.0, [0.0] * len(gts)

    class Captions:
        def __init__(self, captions):
            self.imgToAnns = {key: [{"caption": text} for text in texts] for key, texts in captions.items()}

        def getImgIds(self):  # noqa: N802 - pycocotools' name
            return list(self.imgToAnns)

    spice, theirs.Spice = theirs.Spice, NoSpice
    try:
        evaluation = theirs.COCOEvalCap(Captions(references), Captions({k: [v] for k, v in predictions.items()}))
        evaluation.evaluate()
    finally:
        theirs.Spice = spice
    return evaluation


@needs_java
def test_scores_equal_pycocoevalcaps_own_to_1e_9_whatever_the_locale_and_write_nothing_beside_its_jars(monkeypatch):
    theirs = coco_eval_cap(PREDICTIONS, REFERENCES)
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE -Dfile.encoding=US-ASCII")
    jars = [Path(ptbtokenizer.__file__).parent, Path(ptbtokenizer.__file__).parents[1] / "meteor"]
    before = [jar.stat().st_mtime_ns for jar in jars]
    ours = ngrams.ngram_scores(PREDICTIONS, REFERENCES)
    assert [jar.stat().st_mtime_ns for jar in jars] == before
    assert ours["tokenizer"] == ngrams.PTB and ours["notes"] == []
    assert list(ours["metrics"]) == ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr"]
    for name, score in ours["metrics"].items():
        assert score == pytest.approx(theirs.eval[name], abs=1e-9)
    assert ours["intervals"].pop("METEOR") is None
    for name, (low, high) in ours["intervals"].items():
        assert 0 <= low <= ours["metrics"][name] <= high and low < high
    assert set(ours["per_clip"]) == {"METEOR", "ROUGE_L", "CIDEr"}
    for name, scores in ours["per_clip"].items():
        for key, score in scores.items():
            assert score == pytest.approx(theirs.imgToEval[key][name], abs=1e-9)
    assert ours["per_clip"]["METEOR"]["8"] == 1.0 and ours["per_clip"]["METEOR"]["5"] == 0.0


@needs_java
def test_no_caption_can_shift_the_lines_of_the_captions_after_it():
    captions = [text for hostile in HOSTILE for text in (hostile, "putting cup on table")]
    predictions = dict(enumerate(captions))
    scores = ngrams.ngram_scores(predictions, {key: [text] for key, text in predictions.items()}, meteor=False)
    assert scores["tokenizer"] == ngrams.PTB
    assert [scores["per_clip"]["ROUGE_L"][key] for key in range(1, len(captions), 2)] == [1.0] * len(HOSTILE)


@needs_java
def test_plain_tokens_are_ptbs_on_ordinary_captions():
    captions = [
        "Putting a t-shirt on 2 boxes, then 1/2 of it.",
        "poking pen so lightly that it doesn't or almost doesn't move",
        "it's dad's 3.5 inch disk; can't and cannot hold",
        'a "quoted" word: done!',
        "",
    ]
    assert [list(map(ngrams.plain_tokens, captions))] == coco.tokenize([captions], 60)


def test_without_java_it_says_so_once_and_scores_plain_words(without_java):
    scores = ngrams.ngram_scores(PREDICTIONS, REFERENCES)
    assert scores["tokenizer"] == ngrams.PLAIN
    assert scores["metrics"]["METEOR"] is None and scores["intervals"]["METEOR"] is None
    assert len(scores["notes"]) == 1 and "Java was not found" in scores["notes"][0] and "METEOR" in scores["notes"][0]
    gts = {key: [ngrams.plain_tokens(text) for text in texts] for key, texts in REFERENCES.items()}
    res = {key: [ngrams.plain_tokens(text)] for key, text in PREDICTIONS.items()}
    assert scores["metrics"]["CIDEr"] == pytest.approx(Cider().compute_score(gts, res)[0], abs=1e-9)
    assert scores["metrics"]["ROUGE_L"] == pytest.approx(Rouge().compute_score(gts, res)[0], abs=1e-9)
    bleu = Bleu(4).compute_score(gts, res, verbose=0)[0]
    assert [scores["metrics"][f"Bleu_{n}"] for n in (1, 2, 3, 4)] == pytest.approx(bleu, abs=1e-9)


def test_cider_is_ngram_scores_cider_and_speaks_of_java(without_java, capfd):
    score = ngrams.cider(PREDICTIONS, REFERENCES)
    assert score == pytest.approx(ngrams.ngram_scores(PREDICTIONS, REFERENCES)["metrics"]["CIDEr"], abs=1e-12)
    out, err = capfd.readouterr()
    assert out == "" and err.count("Java") == 1


def test_clips_are_scored_by_id_and_not_by_position(without_java):
    shuffled = dict(reversed(PREDICTIONS.items()))
    one, other = ngrams.ngram_scores(PREDICTIONS, REFERENCES), ngrams.ngram_scores(shuffled, REFERENCES)
    parts = ("metrics", "intervals", "per_clip")
    assert [one[part] for part in parts] == [other[part] for part in parts]


def test_captions_without_a_word_and_one_clip_alone_score_zero_instead_of_failing(without_java):
    empty = ngrams.ngram_scores({"a": "", "b": "..."}, {"a": ["a cup"], "b": ["?"]})
    assert empty["metrics"]["CIDEr"] == 0.0
    assert all(np.isfinite(score) for score in empty["metrics"].values() if score is not None)
    one = ngrams.ngram_scores({"a": "red cup"}, {"a": ["red cup"]})
    assert one["metrics"]["CIDEr"] == 0.0 and one["metrics"]["ROUGE_L"] == 1.0  # in one of one clips, no word is rare


def test_bleu_of_a_resample_is_bleu_of_the_clips_in_it(without_java, monkeypatch):
    draw = ngrams.resampled_sums
    monkeypatch.setattr(ngrams, "resampled_sums", lambda columns, seed: draw(columns, seed)[:1])
    scores = ngrams.ngram_scores(PREDICTIONS, REFERENCES, seed=5)
    ids, drawn = list(REFERENCES), np.random.default_rng(5).integers(0, len(REFERENCES), len(REFERENCES))
    gts = {n: [ngrams.plain_tokens(text) for text in REFERENCES[ids[i]]] for n, i in enumerate(drawn)}
    res = {n: [ngrams.plain_tokens(PREDICTIONS[ids[i]])] for n, i in enumerate(drawn)}
    expected = Bleu(4).compute_score(gts, res, verbose=0)[0]
    # Of one resample both ends of the interval are its score.
    assert [scores["intervals"][f"Bleu_{n}"] for n in (1, 2, 3, 4)] == [
        pytest.approx([e, e], abs=1e-12) for e in expected
    ]
    rouge = np.mean([scores["per_clip"]["ROUGE_L"][ids[i]] for i in drawn])
    assert scores["intervals"]["ROUGE_L"] == pytest.approx([rouge, rouge], abs=1e-12)
