"""Something-Something V2's own scores: captions read as its 174 action templates with their placeholders filled.

"Putting [something] on a surface" fits "putting a cup on a surface" with ["a cup"]. Often several templates fit
("Putting [something] on [something]"); the most specific one is taken: the one with the most words of its own.
Goyal et al. 2017, https://arxiv.org/abs/1706.04261 , made the dataset by filling such templates.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dataset import Layout, Record
from evaluation.bootstrap import fractions
from runtime import files

WORD = re.compile(r"([^\W_]+(?:['’][^\W_]+)*)")
PLACEHOLDER = re.compile(r"\[[^\[\]]*\]")
WORDS = files.read_json(Path(__file__).with_name("words.json"), "the words of templates")
# labels.json as published has no brackets: these are the placeholders of its 174 templates, longest first.
BARE_PLACEHOLDER = re.compile(rf"\b(?:{'|'.join(WORDS['placeholders'])})\b", re.IGNORECASE)
ARTICLE = re.compile("^(?:a|an|the) ")
# Patterns of words, each with the space after it, and with the comma before that where there is one.
ANY_WORD = "[^ ]++ "
NUMBER_WORD = rf"(?:{'|'.join(WORDS['numbers'])}|\d+),? "
NUMBER = f"(?:(?:a|an|the),? )?(?:{NUMBER_WORD})+(?:of,? )?"  # "two", "a few", "a couple of"


class Reading(NamedTuple):
    """A caption read as a template; `template` is None and `placeholders` empty where none fits."""

    template: str | None
    placeholders: list[str]


def template_key(text: str | None) -> str:
    """The words of a text for comparison: no case, punctuation or brackets, "doesn't" as one word "doesnt"."""
    words = WORD.findall(unicodedata.normalize("NFKC", text or ""))
    return re.sub("['’]", "", " ".join(words).casefold())


def as_text(template: str) -> str:
    """The template as people read it: "Moving [something] up" -> "Moving something up"."""
    return template.replace("[", "").replace("]", "")


def opposites(layout: Layout) -> dict[str, str]:
    """Template keys by those of templates whose clips, played backwards, show them; both ways.

    From labels/opposites.json where the data set has one (the sample does), else SSv2's, beside this file.
    """
    path = layout.labels_file("opposites.json") or Path(__file__).with_name("opposites.json")
    pairs = files.read_json(path, "the opposite actions")
    if not isinstance(pairs, dict) or not all(isinstance(other, str) for other in pairs.values()):
        raise files.UserError(f"the opposite actions: {path} does not map templates to templates")
    keys = {template_key(one): template_key(other) for one, other in pairs.items()}
    return {**{other: one for one, other in keys.items()}, **keys}


class _Template:
    """A template as a pattern: each placeholder is a group of one word or more, the shortest that fits."""

    def __init__(self, text: str) -> None:
        self.text, self.key = text, template_key(text)
        holes = PLACEHOLDER if PLACEHOLDER.search(text) else BARE_PLACEHOLDER
        literals = [_literal(gap) for gap in holes.split(text.rstrip(" ,."))]
        self.own = sum(literal.count(" ") for literal in literals)  # words of its own; the comma is one
        self.ends_open = literals[-1] == ""  # in a placeholder
        self.counted = [template_key(name) == "number of" for name in holes.findall(text)]
        literals[-1] += "$"
        pattern = literals[0]
        for counted, after in zip(self.counted, literals[1:], strict=True):
            least = f"(?>{NUMBER}|{ANY_WORD})" if counted else ANY_WORD
            # (?>...) never looks for a second place of what it has found, so the time is linear in the caption.
            pattern += f"(?>({least}(?:{ANY_WORD})*?){after})"
        self.fit = re.compile(pattern).match

    def rank(self, fit: re.Match, whole: str, expected: str) -> tuple:
        """The smaller, the better this template fits: see TemplateReader."""
        groups = zip(fit.groups(), self.counted, strict=True)
        numbers = [re.search(f"(?<![^ ]){NUMBER_WORD}", group) is not None for group, counted in groups if counted]
        number_rank = 0 if not numbers else -1 if all(numbers) else 1
        lengths = [group.count(" ") for group in fit.groups()]
        return self.key != whole, -self.own, number_rank, self.ends_open, lengths, self.key != expected, self.key


def _literal(gap: str) -> str:
    """What stands between two placeholders: words, or one comma, or nothing."""
    words = template_key(gap).split()
    return "".join(f"{word},? " for word in words) or ("(?<=, )" if "," in gap else "")


class TemplateReader:
    """Reads captions as templates, given with brackets or as labels.json has them, without.

    The most specific template that fits is taken. In order:
    1. the template that the caption is, word for word ("moving something up");
    2. the most words of its own (not its placeholders'; the comma of "[something], [something] and" is one);
    3. "[number of]" filled by a number, then no "[number of]", then one filled by something else;
    4. one that ends in words of its own ("moving piece of paper up": "Moving [something] up", not "[part] of");
    5. the shortest first placeholder, then second, ...;
    6. the expected template, where the caller has one: those of "[something soft]" and "[some substance]" read alike;
    7. the alphabet, so that no order of input matters.
    """

    def __init__(self, templates: Iterable[str]) -> None:
        self._known: dict[str, _Template] = {}
        # The same template with brackets says more than without: its placeholders are not guessed.
        for text in sorted(templates, key=lambda text: "[" not in text):
            if (key := template_key(text)) and key not in self._known:
                self._known[key] = _Template(text)

    def read(self, caption: str, expected: str | None = None) -> Reading:
        """The most specific template that fits `caption`, and its placeholders' texts, in order."""
        parts = WORD.split(unicodedata.normalize("NFKC", caption))  # gap, word, gap, word, ..., gap
        gaps = [", " if "," in gap else " " for gap in parts[2::2]]
        plain = "".join(template_key(word) + gap for word, gap in zip(parts[1::2], gaps, strict=True))
        fits = [(template, fit) for template in self._known.values() if (fit := template.fit(plain))]
        if not fits:
            return Reading(None, [])
        whole, wanted = template_key(caption), template_key(expected)
        template, fit = min(fits, key=lambda one: one[0].rank(one[1], whole, wanted))
        # A word of a template ends in a space: counted, they lead back to the caption as it was written.
        places = [[plain.count(" ", 0, place) for place in fit.span(i + 1)] for i in range(len(template.counted))]
        return Reading(template.text, ["".join(parts[2 * first + 1 : 2 * end]) for first, end in places])


def objects_found(wanted: Sequence[str], given: Sequence[str]) -> tuple[int, int]:
    """How many of the placeholders `wanted` are among the words of the placeholders `given`: (found, of how many).

    Several words are found only as all of them in a row; "a", "an" and "the" before them do not matter, nor which
    placeholder they stand in. A word that has been found is not found again. What has no words does not count.
    """
    pools = [f" {template_key(text)} " for text in given]
    names = [ARTICLE.sub("", key) for key in map(template_key, wanted) if key]
    names.sort(key=lambda name: -name.count(" "))  # "red cup" before "cup" takes its word
    found = 0
    for name in names:
        # A pool that is just this name is used before a longer one that also holds it.
        if held := [pool for pool in pools if f" {name} " in pool]:
            pool = min(held, key=lambda pool: ARTICLE.sub("", pool.strip()) != name)
            pools[pools.index(pool)] = pool.replace(f" {name} ", " | ", 1)
            found += 1
    return found, len(names)


def ssv2_scores(predictions: dict[str, str], records: dict[str, Record], reader: TemplateReader, seed: int = 0) -> dict:
    """Scores from the captions' text alone that n-grams cannot give: is the action right, are the objects?

    A clip's record has "label" (texts), "template" and "placeholders" (or None).
    - exact_match: the words are those of a reference (case, punctuation and spacing aside);
    - template_accuracy: the template read from the caption is the clip's (an exact match is right by definition);
    - no_template: captions that fit none of the templates;
    - object_accuracy: the clip's placeholders that are found in the caption's, or in all of it where no template fits.
    All are `bootstrap.fractions`; "per_template" holds the same by template, "confused" the 20 most frequent
    [true, read template or None, count].
    """
    per_clip = {key: score_clip(caption, records[key], reader) for key, caption in predictions.items()}
    by_template = defaultdict(list)
    for clip in per_clip.values():
        by_template[clip["template"] or ""].append(clip["counts"])
    wrong = [(clip["template"], clip["read"]) for clip in per_clip.values() if clip["outcome"] == "wrong"]
    confused = Counter(sorted(wrong, key=lambda pair: (pair[0], pair[1] or "")))  # of equal counts, by the alphabet
    return {
        "clips": len(per_clip),
        **fractions([clip["counts"] for clip in per_clip.values()], seed).summary(),
        "per_template": {
            true: {"clips": len(some), **fractions(some, seed).summary()}
            for true, some in sorted(by_template.items())
            if true
        },
        "confused": [[true, read, count] for (true, read), count in confused.most_common(20)],
        "per_clip": per_clip,
    }


def score_clip(caption: str, record: Record, reader: TemplateReader) -> dict[str, Any]:
    """One clip's template and the one that was read, its outcome, and for each score (count, of how many)."""
    true = record.get("template") or None
    # A text without words, such as "...", is compared as it is.
    said, *references = [template_key(text) or text.strip() for text in (caption, *record["label"])]
    exact = said in references
    reading = reader.read(caption, expected=true)
    right = true is not None and (exact or template_key(reading.template) == template_key(true))
    found, objects = objects_found(record.get("placeholders") or [], reading.placeholders or [caption])
    return {
        "template": true,
        "read": true if right else reading.template,
        "outcome": "exact" if exact else "template" if right else "wrong" if true else None,
        "counts": {
            "exact_match": (exact, 1),
            "template_accuracy": (right, true is not None),
            "no_template": (reading.template is None and not exact, 1),
            "object_accuracy": (objects if exact else found, objects),
        },
    }
