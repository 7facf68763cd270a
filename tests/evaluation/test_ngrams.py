import shutil
import stat
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from evaluation import java
from evaluation import ngrams as metrics
from evaluation.ssv2 import TemplateReader
from runtime.files import UserError

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


@pytest.fixture
def no_java(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def fake_java(monkeypatch, tmp_path):
    """Puts a shell script on PATH in place of java; returns a function that says what it does."""

    def make(script: str):
        path = tmp_path / "bin" / "java"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")

    monkeypatch.setattr(java, "_unfit", {})
    monkeypatch.setattr(metrics, "_said", set())
    return make


def coco_eval_cap(predictions, references):
    """pycocoevalcap's own evaluation, without SPICE (it downloads models)."""
    import pycocoevalcap.eval as coco

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

    spice, coco.Spice = coco.Spice, NoSpice
    try:
        evaluation = coco.COCOEvalCap(Captions(references), Captions({k: [v] for k, v in predictions.items()}))
        evaluation.evaluate()
    finally:
        coco.Spice = spice
    return evaluation


@needs_java
def test_scores_equal_pycocoevalcaps_own_to_1e_9(monkeypatch):
    asked = []
    monkeypatch.setattr(java, "meteor", lambda *args, real=java.meteor: asked.append(real(*args)) or asked[0])
    with ThreadPoolExecutor() as pool:  # METEOR takes seconds to start
        theirs = pool.submit(coco_eval_cap, PREDICTIONS, REFERENCES)
        ours = metrics.ngram_scores(PREDICTIONS, REFERENCES)
        theirs = theirs.result()
    assert ours.tokenizer == metrics.PTB and ours.notes == []
    assert list(ours.metrics) == ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr"]
    for name, score in ours.metrics.items():
        assert score == pytest.approx(theirs.eval[name], abs=1e-9)
        low, high = ours.intervals[name]
        assert 0 <= low <= score <= high and low < high
    assert set(ours.per_clip) == {"METEOR", "ROUGE_L", "CIDEr"}
    for name, scores in ours.per_clip.items():
        for key, score in scores.items():
            assert score == pytest.approx(theirs.imgToEval[key][name], abs=1e-9)
    # METEOR's interval is made from counts: they must give METEOR's own scores, of each clip and of all.
    score, per_clip, counts = asked[0]
    assert per_clip[-3] == 1.0 and per_clip[4] == 0.0
    np.testing.assert_allclose(java.meteor_from_counts(counts), per_clip, atol=1e-12)
    assert java.meteor_from_counts(counts.sum(0)) == pytest.approx(score, abs=1e-12)


@needs_java
def test_no_caption_can_shift_the_lines_of_the_captions_after_it():
    captions = [text for hostile in HOSTILE for text in (hostile, "putting cup on table")]
    tokens = java.ptb(captions)
    assert len(tokens) == len(captions)
    assert set(tokens[1::2]) == {"putting cup on table"}
    predictions = dict(enumerate(captions))
    scores = metrics.ngram_scores(predictions, {key: [text] for key, text in predictions.items()}, meteor=False)
    assert [scores.per_clip["ROUGE_L"][key] for key in range(1, len(captions), 2)] == [1.0] * len(HOSTILE)


@needs_java
def test_ptb_keeps_a_line_for_each_caption_where_captions_are_empty():
    for captions in ([""], ["", ""], ["cup", "  "], ["", "cup"], ["cup", "\n", "pen", "..."]):
        assert java.ptb(captions) == [text.strip(" .\n") for text in captions]


@needs_java
def test_plain_tokens_are_ptbs_on_ordinary_captions():
    captions = [
        "Putting a t-shirt on 2 boxes, then 1/2 of it.",
        "poking pen so lightly that it doesn't or almost doesn't move",
        "it's dad's 3.5 inch disk; can't and cannot hold",
        'a "quoted" word: done!',
    ]
    assert [metrics.plain_tokens(caption) for caption in captions] == java.ptb(captions)


def test_without_java_it_says_so_once_and_scores_plain_words(no_java):
    scores = metrics.ngram_scores(PREDICTIONS, REFERENCES)
    assert scores.tokenizer == metrics.PLAIN
    assert scores.metrics["METEOR"] is None and scores.intervals["METEOR"] is None
    assert len(scores.notes) == 1 and "Java was not found" in scores.notes[0] and "METEOR" in scores.notes[0]
    gts = {key: [metrics.plain_tokens(text) for text in texts] for key, texts in REFERENCES.items()}
    res = {key: [metrics.plain_tokens(text)] for key, text in PREDICTIONS.items()}
    assert scores.metrics["CIDEr"] == pytest.approx(Cider().compute_score(gts, res)[0], abs=1e-9)
    assert scores.metrics["ROUGE_L"] == pytest.approx(Rouge().compute_score(gts, res)[0], abs=1e-9)
    bleu = Bleu(4).compute_score(gts, res, verbose=0)[0]
    assert [scores.metrics[f"Bleu_{n}"] for n in (1, 2, 3, 4)] == pytest.approx(bleu, abs=1e-9)


def test_a_hanging_java_is_ended_with_its_children_and_not_tried_again(fake_java, tmp_path):
    fake_java(f"sleep 1000 & echo $! > {tmp_path}/child; wait")
    start = time.monotonic()
    scores = metrics.ngram_scores(PREDICTIONS, REFERENCES, timeout=1.0)
    assert time.monotonic() - start < 10.0
    assert scores.tokenizer == metrics.PLAIN and scores.metrics["METEOR"] is None
    assert len(scores.notes) == 1 and "hung" in scores.notes[0]
    child = (tmp_path / "child").read_text().strip()
    state = subprocess.run(["ps", "-o", "stat=", "-p", child], capture_output=True, text=True).stdout
    assert state.strip() in ("", "Z", "Z+")
    start = time.monotonic()
    again = metrics.ngram_scores(PREDICTIONS, REFERENCES, timeout=1.0)
    assert time.monotonic() - start < 0.9
    assert again.metrics == scores.metrics


@pytest.mark.parametrize("script", ["exit 1", "echo one line", "exec yes", "exec /no/such/program", "kill -9 $$"])
def test_a_broken_java_costs_a_note_and_not_the_scores(fake_java, script):
    fake_java(script)
    scores = metrics.ngram_scores(PREDICTIONS, REFERENCES, timeout=5.0)
    assert scores.tokenizer == metrics.PLAIN and len(scores.notes) == 1 and scores.metrics["CIDEr"] > 0


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("sleep 1000", "hung"),
        ("exit 0", "ended early"),
        ("while read line; do echo word; done", "other than"),
        ("while read line; do echo 1.0; done", "other than"),
    ],
)
def test_where_only_meteor_hangs_or_fails_only_meteor_is_left_out(fake_java, monkeypatch, script, reason):
    fake_java(script)
    monkeypatch.setattr(java, "ptb", lambda captions, timeout: [metrics.plain_tokens(text) for text in captions])
    scores = metrics.ngram_scores(PREDICTIONS, REFERENCES, timeout=1.0)
    assert scores.tokenizer == metrics.PTB and scores.metrics["METEOR"] is None and scores.metrics["CIDEr"] > 0
    assert len(scores.notes) == 1 and reason in scores.notes[0] and "METEOR is left out" in scores.notes[0]


def test_cider_is_ngram_scores_cider_and_speaks_of_java_once(no_java, monkeypatch, capfd):
    monkeypatch.setattr(metrics, "_said", set())
    score = metrics.cider(PREDICTIONS, REFERENCES)
    assert score == metrics.cider(PREDICTIONS, REFERENCES)
    assert score == pytest.approx(metrics.ngram_scores(PREDICTIONS, REFERENCES).metrics["CIDEr"], abs=1e-12)
    out, err = capfd.readouterr()
    assert out == "" and err.count("Java") == 1


def test_clips_are_scored_by_id_and_not_by_position(no_java):
    shuffled = dict(reversed(PREDICTIONS.items()))
    one, other = metrics.ngram_scores(PREDICTIONS, REFERENCES), metrics.ngram_scores(shuffled, REFERENCES)
    assert one == other


def test_clips_without_prediction_or_reference_are_refused(no_java):
    with pytest.raises(UserError, match="no clips"):
        metrics.ngram_scores({}, {})
    with pytest.raises(UserError, match="1 clips have references and no prediction, the first is 'b'"):
        metrics.ngram_scores({"a": "x"}, {"a": ["x"], "b": ["y"]})
    with pytest.raises(UserError, match="'b'"):
        metrics.ngram_scores({"a": "x", "b": "y"}, {"a": ["x"]})
    with pytest.raises(UserError, match="'a' has no list of references"):
        metrics.ngram_scores({"a": "x"}, {"a": []})


def test_sets_without_a_word_and_of_one_clip_score_zero_instead_of_failing(no_java):
    empty = metrics.ngram_scores({"a": "", "b": "..."}, {"a": ["!"], "b": ["?"]})
    assert empty.metrics["CIDEr"] == 0.0
    assert all(np.isfinite(score) for score in empty.metrics.values() if score is not None)
    one = metrics.ngram_scores({"a": "red cup"}, {"a": ["red cup"]})
    assert one.metrics["CIDEr"] == 0.0 and any("one clip alone" in note for note in one.notes)


def test_bootstrap_gives_the_binomial_interval_of_a_fraction():
    values = np.array([1.0] * 300 + [0.0] * 700)
    low, high = metrics.bootstrap(values, seed=3, samples=4000)
    spread = 1.96 * np.sqrt(0.3 * 0.7 / 1000)  # 0.0284
    assert low == pytest.approx(0.3 - spread, abs=0.003) and high == pytest.approx(0.3 + spread, abs=0.003)


def test_bootstrap_is_seeded_and_keeps_to_the_values():
    values = np.random.default_rng(0).normal(size=200)
    assert metrics.bootstrap(values, seed=1) == metrics.bootstrap(values, seed=1) != metrics.bootstrap(values, seed=2)
    assert metrics.bootstrap([2.0]) == (2.0, 2.0)
    with pytest.raises(ValueError, match="no values"):
        metrics.bootstrap([])


def test_bleu_of_a_resample_is_bleu_of_the_clips_in_it(no_java):
    scores = metrics.ngram_scores(PREDICTIONS, REFERENCES, samples=1, seed=5)
    ids, drawn = list(REFERENCES), np.random.default_rng(5).integers(0, len(REFERENCES), len(REFERENCES))
    gts = {n: [metrics.plain_tokens(text) for text in REFERENCES[ids[i]]] for n, i in enumerate(drawn)}
    res = {n: [metrics.plain_tokens(PREDICTIONS[ids[i]])] for n, i in enumerate(drawn)}
    expected = Bleu(4).compute_score(gts, res, verbose=0)[0]
    # Of one resample both ends of the interval are its score.
    assert [scores.intervals[f"Bleu_{n}"] for n in (1, 2, 3, 4)] == [pytest.approx([e, e], abs=1e-12) for e in expected]
    rouge = np.mean([scores.per_clip["ROUGE_L"][ids[i]] for i in drawn])
    assert scores.intervals["ROUGE_L"] == pytest.approx([rouge, rouge], abs=1e-12)


ON, ONTO, UP = "Putting [something] on a surface", "Putting [something] onto [something]", "Moving [something] up"
SOFT, SUBSTANCE = "Poking a hole into [something soft]", "Poking a hole into [some substance]"
RECORDS = {
    "a": {"label": ["putting red cup on a surface"], "template": ON, "placeholders": ["red cup"]},
    "b": {"label": ["putting pen onto box"], "template": ONTO, "placeholders": ["pen", "box"]},
    "c": {"label": ["putting pen onto box"], "template": ONTO, "placeholders": ["pen", "box"]},
    "d": {"label": ["moving cup up", "a cup goes up"], "template": UP, "placeholders": ["cup"]},
    "e": {"label": "moving cup up", "template": UP, "placeholders": ["cup"]},
    "f": {"label": ["poking a hole into bread"], "template": SOFT, "placeholders": ["bread"]},
    "g": {"label": ["moving up cup on a surface"], "template": UP, "placeholders": None},
    "h": {"label": ["a cat"]},
}
SAID = {
    "a": "Putting  red cup on a surface.",  # exact: case, spacing and punctuation aside
    "b": "putting pen onto table",  # the template, and one object of two
    "c": "putting pen and box on a surface",  # another template, both objects
    "d": "a cup goes up",  # exact by its second reference
    "e": "a thing goes up, a cup",  # no template; the object is in the caption
    "f": "poking a hole into butter",  # fits two templates alike
    "g": "moving up cup on a surface",  # exact, though its text fits no template of the reader
    "h": "a dog",
}


def test_ssv2_scores_are_those_counted_by_hand():
    scores = metrics.ssv2_scores(SAID, RECORDS, TemplateReader([ON, ONTO, UP, SOFT, SUBSTANCE]))
    assert scores["clips"] == 8
    assert scores["exact_match"] == 3 / 8  # a, d, g
    assert scores["template_accuracy"] == 5 / 7  # a, b, d, f, g of the seven with a template
    assert scores["no_template"] == 2 / 8  # e, h
    assert scores["object_accuracy"] == 6 / 8  # a 1/1, b 1/2, c 2/2, d 1/1, e 1/1, f 0/1
    outcomes = ["exact", "template", "wrong", "exact", "wrong", "template", "exact", None]
    assert [scores["per_clip"][key]["outcome"] for key in SAID] == outcomes
    assert [scores["per_clip"][key]["objects"] for key in SAID] == [1.0, 0.5, 1.0, 1.0, 1.0, 0.0, None, None]
    assert scores["per_clip"]["c"]["read_template"] == ON and scores["per_clip"]["h"]["template"] is None
    assert scores["confused"] == [[UP, None, 1], [ONTO, ON, 1]]
    assert list(scores["per_template"]) == sorted([ON, ONTO, UP, SOFT])
    onto = scores["per_template"][ONTO]
    assert (onto["clips"], onto["exact_match"], onto["template_accuracy"], onto["object_accuracy"]) == (
        2,
        0.0,
        0.5,
        0.75,
    )
    for name, (low, high) in scores["intervals"].items():
        assert 0 <= low <= scores[name] <= high <= 1 and low < high


def test_labels_json_without_brackets_scores_the_same():
    reader = TemplateReader([ON, ONTO, UP, SOFT, SUBSTANCE])
    bare = TemplateReader([text.replace("[", "").replace("]", "") for text in (ON, ONTO, UP, SOFT, SUBSTANCE)])
    assert metrics.ssv2_scores(SAID, RECORDS, bare) == metrics.ssv2_scores(SAID, RECORDS, reader)


def test_confused_pairs_are_the_most_frequent_first_and_at_most_twenty():
    templates = [f"Turning [something] {number}" for number in "abcdefghijklmnopqrstuvwxyz"]
    records = {str(i): {"label": "x", "template": text, "placeholders": ["p"]} for i, text in enumerate(templates)}
    records |= {f"{key}+": record for key, record in list(records.items())[5:7]}
    said = {key: "turning p a" for key in records}
    confused = metrics.ssv2_scores(said, records, TemplateReader(templates))["confused"]
    assert len(confused) == 20 and [count for *_, count in confused[:3]] == [2, 2, 1]
    assert confused[0] == [templates[5], templates[0], 2]


def test_scores_without_templates_or_objects_are_none_and_not_zero():
    scores = metrics.ssv2_scores({"h": "a cat"}, RECORDS, TemplateReader([]))
    assert scores["exact_match"] == 1.0 and scores["no_template"] == 0.0
    assert scores["template_accuracy"] is None and scores["intervals"]["template_accuracy"] is None
    assert scores["object_accuracy"] is None and scores["confused"] == [] and scores["per_template"] == {}
    with pytest.raises(UserError, match="no annotation"):
        metrics.ssv2_scores({"z": "a cat"}, RECORDS, TemplateReader([]))
