"""Something-Something V2's own scores: captions read as its 174 action templates with their placeholders filled.

"Putting [something] on a surface" fits "putting a cup on a surface" with ["a cup"]. Often several templates fit
("Putting [something] on [something]"); the most specific one is taken: the one with the most words of its own.
Goyal et al. 2017, https://arxiv.org/abs/1706.04261 , made the dataset by filling such templates.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from evaluation.bootstrap import interval, resampled_sums
from runtime.files import UserError

WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
PLACEHOLDER = re.compile(r"\[[^\[\]]*\]")
# labels.json as published has no brackets: these are the placeholders of its 174 templates, longest first.
BARE_PLACEHOLDER = re.compile(
    r"\b(?:one of many similar things on the table|something similar to other things that are already on the table|"
    r"something that cannot actually stand upright|something else that cannot support it|"
    r"something that is not tearable|something in it|something unbendable|something soft|some substance|number of|"
    r"part|somewhere|something)\b",
    re.IGNORECASE,
)
COMMA = ","
NUMBERS = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty hundred dozen many some several few couple pair lot lots bunch "
    "number multiple plenty"
)
NUMBER_WORDS = frozenset(NUMBERS.split())
ARTICLES = frozenset({"a", "an", "the"})
CONFUSIONS = 20  # pairs of templates that are listed


class Reading(NamedTuple):
    """A caption read as a template; `template` is None and `placeholders` empty where none fits."""

    template: str | None
    placeholders: list[str]


def words(text: str) -> list[str]:
    """The words of a text for comparison: lower case, no punctuation, "doesn't" as one word "doesnt"."""
    return [_plain(match) for match in WORD.findall(unicodedata.normalize("NFKC", text))]


def _plain(word: str) -> str:
    return word.casefold().replace("'", "").replace("’", "")


def as_text(template: str) -> str:
    """The template as people read it: "Moving [something] up" -> "Moving something up"."""
    return template.replace("[", "").replace("]", "")


def template_key(template: str) -> str:
    """What is the same for a template with brackets, without them, and in another case or punctuation."""
    return " ".join(words(template))


class _Caption:
    """A caption's words, where they are in its text, and before which of them a comma stands."""

    def __init__(self, text: str):
        self.text = unicodedata.normalize("NFKC", text)
        found = list(WORD.finditer(self.text))
        self.words = [_plain(match.group()) for match in found]
        self.known = frozenset(self.words)
        self.spans = [match.span() for match in found]
        ends = [0, *(end for _, end in self.spans)]
        self.comma = [i > 0 and COMMA in self.text[ends[i] : start] for i, (start, _) in enumerate(self.spans)]

    def span(self, start: int, end: int) -> str:
        return self.text[self.spans[start][0] : self.spans[end - 1][1]]


@dataclass(frozen=True)
class _Template:
    """A template cut at its placeholders: literals[0] P literals[1] P ... literals[-1].

    A literal is a list of words. Between two placeholders it may be empty ("[number of] [something]") or one
    comma, the only punctuation that tells templates apart ("[something], [something] and [something]").
    """

    text: str
    literals: list[list[str]]
    counted: list[bool]  # placeholder i is "[number of]"
    own: frozenset[str]  # the words of all literals

    @classmethod
    def parse(cls, text: str) -> "_Template":
        pattern = PLACEHOLDER if PLACEHOLDER.search(text) else BARE_PLACEHOLDER
        gaps = pattern.split(text)
        literals = [words(gap) for gap in gaps]
        for i in range(1, len(literals) - 1):
            if not literals[i] and COMMA in gaps[i]:
                literals[i] = [COMMA]
        own = frozenset(word for literal in literals for word in literal if word != COMMA)
        return cls(text, literals, [template_key(name) == "number of" for name in pattern.findall(text)], own)

    def fit(self, caption: _Caption) -> list[tuple[int, int]] | None:
        """Where the placeholders are (word spans, one word or more each), or None.

        Each literal is looked for once, left to right, at its first place after a word for the placeholder
        before it, so the time is linear in the caption; the first placeholders are thus the shortest that fit.
        """
        literals, (first, last) = self.literals, (self.literals[0], self.literals[-1])
        if not self.own <= caption.known:
            return None
        if len(literals) == 1:
            return [] if caption.words == first else None
        stop = len(caption.words) - len(last)
        if caption.words[: len(first)] != first or (last and caption.words[max(stop, 0) :] != last):
            return None
        spans, at = [], len(first)
        for i, literal in enumerate(literals[1:-1]):
            begin = at + (_number_length(caption.words, at) if self.counted[i] else 1)
            found = _find(caption, literal, begin, stop)
            if found is None:
                return None
            spans.append((at, found))
            at = found + (0 if literal == [COMMA] else len(literal))
        return [*spans, (at, stop)] if stop > at else None


def _find(caption: _Caption, literal: list[str], begin: int, stop: int) -> int | None:
    if not literal:
        return begin if begin < stop else None
    if literal == [COMMA]:
        return next((i for i in range(begin, stop) if caption.comma[i]), None)
    for i in range(begin, stop - len(literal) + 1):
        if caption.words[i] == literal[0] and caption.words[i : i + len(literal)] == literal:
            return i
    return None


def _is_number(word: str) -> bool:
    return word in NUMBER_WORDS or word.isdecimal()


def _number_length(caption: Sequence[str], at: int) -> int:
    """How many words from `at` on are a number ("two", "a few", "a couple of"); 1 where none is."""
    begin = end = at + (caption[at : at + 1] != [] and caption[at] in ARTICLES)
    while end < len(caption) and _is_number(caption[end]):
        end += 1
    return end - at + (caption[end : end + 1] == ["of"]) if end > begin else 1


class TemplateReader:
    """Reads captions as templates, given with brackets or as labels.json has them, without.

    The most specific template that fits is taken. In order:
    1. the template that the caption is, word for word ("moving something up");
    2. the most words of its own (not its placeholders'; the comma of "[something], [something] and" is one);
    3. "[number of]" filled by a number, then no "[number of]", then one filled by something else;
    4. one that ends in words of its own ("moving piece of paper up": "Moving [something] up", not "[part] of");
    5. the shortest first placeholder, then second, ...;
    6. the expected template, where the caller has one: what still fits two equally well, such as "Poking a hole
       into [something soft]" and "... [some substance]", has the same words and cannot be told apart by them;
    7. the alphabet, so that no order of input matters.
    """

    def __init__(self, templates: Iterable[str]):
        self._known: dict[str, _Template] = {}
        for text in templates:
            key = template_key(text)
            # The same template with brackets says more than without: its placeholders are not guessed.
            if key and (key not in self._known or ("[" in text and "[" not in self._known[key].text)):
                self._known[key] = _Template.parse(text)
        self._by_first_word: dict[str, list[tuple[str, _Template]]] = {}
        for key, template in sorted(self._known.items()):
            first = template.literals[0][0] if template.literals[0] else ""
            self._by_first_word.setdefault(first, []).append((key, template))

    def known(self, template: str) -> str | None:
        """This template as the reader has it, whatever brackets, case or punctuation it is given with."""
        found = self._known.get(template_key(template))
        return found.text if found else None

    def read(self, caption: str, expected: str | None = None) -> Reading:
        """The most specific template that fits `caption`, and its placeholders' texts, in order."""
        parsed = _Caption(caption)
        if not parsed.words:
            return Reading(None, [])
        whole, wanted = " ".join(parsed.words), template_key(expected or "")
        best: tuple | None = None
        for key, template in (*self._by_first_word.get(parsed.words[0], ()), *self._by_first_word.get("", ())):
            spans = template.fit(parsed)
            if spans is None:
                continue
            rank = (
                key != whole,
                -sum(map(len, template.literals)),
                -_number_rank(template, parsed, spans),
                not template.literals[-1],
                [end - start for start, end in spans],
                key != wanted,
                key,
            )
            if best is None or rank < best[0]:
                best = (rank, template, spans)
        if best is None:
            return Reading(None, [])
        return Reading(best[1].text, [parsed.span(start, end) for start, end in best[2]])


def _number_rank(template: _Template, caption: _Caption, spans: list[tuple[int, int]]) -> int:
    ranks = [
        1 if any(map(_is_number, caption.words[start:end])) else -1
        for (start, end), counted in zip(spans, template.counted, strict=True)
        if counted
    ]
    return min(ranks, default=0)


def objects_found(wanted: Sequence[str], given: Sequence[str]) -> tuple[int, int]:
    """How many of the placeholders `wanted` are among the words of the placeholders `given`: (found, of how many).

    A placeholder of several words is found only as all of them in a row; "a", "an" and "the" before it do not
    matter, nor which placeholder it stands in. A word that has been found is not found again. Placeholders
    without any word do not count.
    """
    pools = [words(text) for text in given]
    names = [_without_article(words(text)) for text in wanted]
    names = sorted((name for name in names if name), key=len, reverse=True)  # "red cup" before "cup" takes its word
    return sum(_take(name, pools) for name in names), len(names)


def _without_article(name: list[str]) -> list[str]:
    return name[1:] if len(name) > 1 and name[0] in ARTICLES else name


def _take(name: list[str], pools: list[list[str]]) -> bool:
    # A pool that is just this name is used before a longer one that also holds it.
    for pool in sorted(pools, key=lambda pool: _without_article(pool) != name):
        for i in range(len(pool) - len(name) + 1):
            if pool[i : i + len(name)] == name:
                pool[i : i + len(name)] = [""] * len(name)
                return True
    return False


def ssv2_scores(
    predictions: Mapping[str, str],
    records: Mapping[str, Mapping[str, Any]],
    reader: TemplateReader,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores from the captions' text alone that n-grams cannot give: is the action right, are the objects?

    A clip's record has "label" (a text or a list), "template" and "placeholders" (or None).
    - exact_match: the words are those of a reference (case, punctuation and spacing aside);
    - template_accuracy: the caption, read as a template (TemplateReader), is the clip's; an exact match is right
      by definition, since some labels' texts fit another template better than their own;
    - no_template: captions that fit none of the templates;
    - object_accuracy: of all placeholders of the references, those found in the prediction's placeholders, or
      in the whole caption where no template fits (`objects_found`).
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
        per_clip[key], row, true = _score_clip(caption, records[key], reader, shown)
        if true:
            groups[true].append(len(rows))
            confused[true, per_clip[key]["read_template"]] += not per_clip[key]["template"]
        rows.append(row)
    table = np.array(rows, dtype=np.float64)
    pairs = sorted(confused.items(), key=lambda pair: (-pair[1], pair[0][0], pair[0][1] or ""))
    return {
        **_fractions(table, seed),
        "per_template": {true: _fractions(table[groups[true]], seed) for true in sorted(groups)},
        "confused": [[true, read, count] for (true, read), count in pairs[:CONFUSIONS] if count],
        "per_clip": per_clip,
    }


def _score_clip(
    caption: str, record: Mapping[str, Any], reader: TemplateReader, shown: Mapping[str, str]
) -> tuple[dict[str, Any], list[float], str | None]:
    """One clip's scores, its row of counts for `_fractions`, and its true template as it is shown."""
    labels = record.get("label") or []
    labels = [labels] if isinstance(labels, str) else labels
    true = shown[template_key(record["template"])] if record.get("template") else None
    # A text without words, such as "...", is compared as it is.
    exact = any((words(caption) or caption.strip()) == (words(label) or label.strip()) for label in labels)
    reading = reader.read(caption, expected=true)
    read = shown.get(template_key(reading.template), reading.template) if reading.template else None
    right = true is not None and (exact or read == true)
    found, count = objects_found(record.get("placeholders") or [], reading.placeholders or [caption])
    found = count if exact else found
    clip = {
        "exact": exact,
        "template": right if true else None,
        "objects": found / count if count else None,
        "read_template": true if right else read,
        "outcome": "exact" if exact else "template" if right else "wrong" if true else None,
    }
    return clip, [1.0, exact, true is not None, right, reading.template is None and not exact, found, count], true


def _fractions(table: np.ndarray, seed: int) -> dict[str, Any]:
    """Fractions and their intervals from rows [1, exact, has a template, template right, fits none, found, objects]."""
    sums, resampled = table.sum(0), resampled_sums(table, seed)
    parts = {"exact_match": (1, 0), "template_accuracy": (3, 2), "no_template": (4, 0), "object_accuracy": (5, 6)}
    scores: dict[str, Any] = {"clips": len(table)}
    intervals = {}
    for name, (top, bottom) in parts.items():
        scores[name] = float(sums[top] / sums[bottom]) if sums[bottom] else None
        usable = resampled[resampled[:, bottom] > 0]  # a resample may by chance hold no clip with objects
        intervals[name] = interval(usable[:, top] / usable[:, bottom]) if sums[bottom] else None
    return {**scores, "intervals": intervals}
