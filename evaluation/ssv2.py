"""Reading a caption as one of Something-Something V2's 174 action templates with its placeholders filled.

"Putting [something] on a surface" fits "putting a cup on a surface" with ["a cup"]. Often several templates fit
("Putting [something] on [something]"); the most specific one is taken: the one with the most words of its own.
Goyal et al. 2017, https://arxiv.org/abs/1706.04261 , made the dataset by filling such templates.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
PLACEHOLDER = re.compile(r"\[[^\[\]]*\]")
# labels.json as published has no brackets: these are the placeholders of its 174 templates, longest first.
BARE_PLACEHOLDER = re.compile(
    r"\b(one of many similar things on the table|something similar to other things that are already on the table|"
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
    """A caption's words, where they are in its text, and after which of them a comma stands."""

    def __init__(self, text: str):
        self.text = unicodedata.normalize("NFKC", text)
        found = list(WORD.finditer(self.text))
        self.words = [_plain(match.group()) for match in found]
        self.known = frozenset(self.words)
        self.starts = [match.start() for match in found]
        self.ends = [match.end() for match in found]
        # comma[i]: a comma between word i - 1 and word i
        self.comma = [False] + [
            COMMA in self.text[end:start] for end, start in zip(self.ends, self.starts[1:], strict=False)
        ]

    def span(self, start: int, end: int) -> str:
        return self.text[self.starts[start] : self.ends[end - 1]]


@dataclass(frozen=True)
class _Template:
    """A template cut at its placeholders: literals[0] P literals[1] P ... literals[-1].

    A literal is a list of words. Between two placeholders it may be empty ("[number of] [something]") or one
    comma, the only punctuation that tells templates apart ("[something], [something] and [something]").
    """

    text: str
    literals: list[list[str]]
    counted: list[bool]  # placeholder i is "[number of]"
    own: frozenset[str] = field(default_factory=frozenset)

    @classmethod
    def parse(cls, text: str) -> "_Template":
        pattern = PLACEHOLDER if PLACEHOLDER.search(text) else BARE_PLACEHOLDER
        names = [match.group().strip("[]") for match in pattern.finditer(text)]
        gaps = [text[a:b] for a, b in _between(pattern, text)]
        literals = [words(gap) for gap in gaps]
        for i in range(1, len(literals) - 1):
            if not literals[i] and COMMA in gaps[i]:
                literals[i] = [COMMA]
        own = frozenset(word for literal in literals for word in literal if word != COMMA)
        return cls(text, literals, [template_key(name) == "number of" for name in names], own)

    def fit(self, caption: _Caption) -> list[tuple[int, int]] | None:
        """Where the placeholders are (word spans, one word or more each), or None.

        Each literal is looked for once, left to right, at its first place after a word for the placeholder
        before it, so the time is linear in the caption; the first placeholders are thus the shortest that fit.
        """
        said, literals = caption.words, self.literals
        if not self.own <= caption.known:
            return None
        first, last = literals[0], literals[-1]
        if len(literals) == 1:
            return [] if said == first else None
        stop = len(said) - len(last)
        if said[: len(first)] != first or (last and said[max(stop, 0) :] != last):
            return None
        spans, at = [], len(first)
        for i, literal in enumerate(literals[1:-1]):
            begin = at + (_number_length(said, at) if self.counted[i] else 1)
            found = _find(caption, literal, begin, stop)
            if found is None:
                return None
            spans.append((at, found))
            at = found + (0 if literal == [COMMA] else len(literal))
        return [*spans, (at, stop)] if stop > at else None


def _between(pattern: re.Pattern[str], text: str) -> list[tuple[int, int]]:
    edges = [0] + [edge for match in pattern.finditer(text) for edge in match.span()] + [len(text)]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _find(caption: _Caption, literal: list[str], begin: int, stop: int) -> int | None:
    if not literal:
        return begin if begin < stop else None
    if literal == [COMMA]:
        return next((i for i in range(begin, stop) if caption.comma[i]), None)
    for i in range(begin, stop - len(literal) + 1):
        if caption.words[i] == literal[0] and caption.words[i : i + len(literal)] == literal:
            return i
    return None


def _number_length(said: Sequence[str], at: int) -> int:
    """How many words from `at` on say a number ("two", "a few", "a couple of"); 1 where none does."""
    end = at + (said[at : at + 1] != [] and said[at] in ARTICLES)
    begin = end
    while end < len(said) and (said[end] in NUMBER_WORDS or said[end].isdecimal()):
        end += 1
    if end == begin:
        return 1
    return end - at + (said[end : end + 1] == ["of"])


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
        said = _Caption(caption)
        if not said.words:
            return Reading(None, [])
        whole, wanted = " ".join(said.words), template_key(expected or "")
        best: tuple | None = None
        for key, template in (*self._by_first_word.get(said.words[0], ()), *self._by_first_word.get("", ())):
            spans = template.fit(said)
            if spans is None:
                continue
            rank = (
                key != whole,
                -sum(map(len, template.literals)),
                -_number_rank(template, said, spans),
                not template.literals[-1],
                [end - start for start, end in spans],
                key != wanted,
                key,
            )
            if best is None or rank < best[0]:
                best = (rank, template, spans)
        if best is None:
            return Reading(None, [])
        return Reading(best[1].text, [said.span(start, end) for start, end in best[2]])


def _number_rank(template: _Template, said: _Caption, spans: list[tuple[int, int]]) -> int:
    ranks = [
        1 if any(word in NUMBER_WORDS or word.isdecimal() for word in said.words[start:end]) else -1
        for (start, end), counted in zip(spans, template.counted, strict=True)
        if counted
    ]
    return min(ranks, default=0)


def objects_found(wanted: Sequence[str], said: Sequence[str]) -> tuple[int, int]:
    """How many of the placeholders `wanted` are among the words of the placeholders `said`: (found, of how many).

    A placeholder of several words is found only as all of them in a row; "a", "an" and "the" before it do not
    matter, nor which placeholder it stands in. A word that has been found is not found again. Placeholders
    without any word do not count.
    """
    pools = [words(text) for text in said]
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
