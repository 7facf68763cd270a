import random
import time

import pytest

from evaluation.ssv2 import Reading, TemplateReader, as_text, objects_found, template_key, words

TEMPLATES = [
    "Approaching [something] with your camera",
    "Failing to put [something] into [something] because [something] does not fit",
    "Holding [something]",
    "Holding [something] next to [something]",
    "Lifting up one end of [something] without letting it drop down",
    "Lifting up one end of [something], then letting it drop down",
    "Moving [part] of [something]",
    "Moving [something] and [something] away from each other",
    "Moving [something] away from [something]",
    "Moving [something] away from the camera",
    "Moving [something] up",
    "Moving [something] up and down",
    "Poking [something] so lightly that it doesn't or almost doesn't move",
    "Poking a hole into [some substance]",
    "Poking a hole into [something soft]",
    "Pretending to pour [something] out of [something], but [something] is empty",
    "Pretending to put [something] on a surface",
    "Pretending to put [something] onto [something]",
    "Pushing [something] so that it almost falls off but doesn't",
    "Pushing [something] so that it falls off the table",
    "Putting [number of] [something] onto [something]",
    "Putting [something similar to other things that are already on the table]",
    "Putting [something] and [something] on the table",
    "Putting [something] into [something]",
    "Putting [something] into [something] that is too small",
    "Putting [something] on [something]",
    "Putting [something] on a surface",
    "Putting [something] onto [something]",
    "Putting [something], [something] and [something] on the table",
    "Stacking [number of] [something]",
    "Taking [one of many similar things on the table]",
    "Taking [something] from [somewhere]",
    "Tipping [something] with [something in it] over, so [something in it] falls out",
    "Touching (without moving) [part] of [something]",
    "Turning the camera left while filming [something]",
    "Twisting (wringing) [something] wet until water comes out",
    "Twisting [something]",
    "[Something] falling like a feather or paper",
]

READINGS = {
    # Nested templates: the one with more words of its own.
    "pretending to put a cup on a surface": ("Pretending to put [something] on a surface", ["a cup"]),
    "putting a cup on a surface": ("Putting [something] on a surface", ["a cup"]),
    "putting a cup on a shelf": ("Putting [something] on [something]", ["a cup", "a shelf"]),
    "putting a shoe into a box": ("Putting [something] into [something]", ["a shoe", "a box"]),
    "putting a shoe into a box that is too small": (
        "Putting [something] into [something] that is too small",
        ["a shoe", "a box"],
    ),
    "moving a pen up": ("Moving [something] up", ["a pen"]),
    "moving a pen up and down": ("Moving [something] up and down", ["a pen"]),
    "moving cup away from box": ("Moving [something] away from [something]", ["cup", "box"]),
    "moving cup away from the camera": ("Moving [something] away from the camera", ["cup"]),
    "moving cup and box away from each other": (
        "Moving [something] and [something] away from each other",
        ["cup", "box"],
    ),
    "holding potato next to vicks vaporub bottle": (
        "Holding [something] next to [something]",
        ["potato", "vicks vaporub bottle"],
    ),
    "holding a next door key": ("Holding [something]", ["a next door key"]),
    "twisting (wringing) cloth wet until water comes out": (
        "Twisting (wringing) [something] wet until water comes out",
        ["cloth"],
    ),
    "twisting cloth": ("Twisting [something]", ["cloth"]),
    "pretending to pour water out of bottle, but bottle is empty": (
        "Pretending to pour [something] out of [something], but [something] is empty",
        ["water", "bottle", "bottle"],
    ),
    "tipping cup with coins over, so coins falls out": (
        "Tipping [something] with [something in it] over, so [something in it] falls out",
        ["cup", "coins", "coins"],
    ),
    "touching (without moving) lid of box": ("Touching (without moving) [part] of [something]", ["lid", "box"]),
    # Ambiguous: words of its own at the end beat a placeholder there.
    "moving piece of paper up": ("Moving [something] up", ["piece of paper"]),
    "moving lid of box": ("Moving [part] of [something]", ["lid", "box"]),
    # "[number of]" is for numbers.
    "putting two red cups onto tray": ("Putting [number of] [something] onto [something]", ["two", "red cups", "tray"]),
    "putting red cup onto tray": ("Putting [something] onto [something]", ["red cup", "tray"]),
    "stacking a couple of books": ("Stacking [number of] [something]", ["a couple of", "books"]),
    "stacking 3 red blocks": ("Stacking [number of] [something]", ["3", "red blocks"]),
    "stacking plastic cups": ("Stacking [number of] [something]", ["plastic", "cups"]),
    # A comma between placeholders is kept; two are not read as three.
    "putting red pen and cup on the table": ("Putting [something] and [something] on the table", ["red pen", "cup"]),
    "putting pen, red cup and box on the table": (
        "Putting [something], [something] and [something] on the table",
        ["pen", "red cup", "box"],
    ),
    # Templates that are nearly all placeholder catch what no other does.
    "putting one more pencil": (
        "Putting [something similar to other things that are already on the table]",
        ["one more pencil"],
    ),
    "taking pen from table": ("Taking [something] from [somewhere]", ["pen", "table"]),
    # Case, punctuation, spacing; placeholders keep their own spelling.
    "  HOLDING  a T-shirt.": ("Holding [something]", ["a T-shirt"]),
    "Poking Dad's hat so lightly that it doesn’t or almost doesnt move!": (
        "Poking [something] so lightly that it doesn't or almost doesn't move",
        ["Dad's hat"],
    ),
    "Leaf falling like a feather or paper": ("[Something] falling like a feather or paper", ["Leaf"]),
    "lifting up one end of table then letting it drop down": (
        "Lifting up one end of [something], then letting it drop down",
        ["table"],
    ),
    "moving something up": ("Moving [something] up", ["something"]),
    # Of two equal splits the shortest first placeholder.
    "holding cup next to box next to pen": ("Holding [something] next to [something]", ["cup", "box next to pen"]),
}


@pytest.mark.parametrize("caption", READINGS)
def test_a_caption_is_read_as_the_most_specific_template_with_its_placeholders(caption):
    assert TemplateReader(TEMPLATES).read(caption) == Reading(*READINGS[caption])


@pytest.mark.parametrize(
    "caption",
    ["", "...", "a man rides a horse", "holding", "moving up", "falling like a feather or paper", "turning the camera"],
)
def test_a_caption_that_fits_no_template_is_read_as_none(caption):
    assert TemplateReader(TEMPLATES).read(caption) == Reading(None, [])


def test_the_order_of_the_templates_does_not_matter():
    shuffled = random.Random(1).sample(TEMPLATES, len(TEMPLATES))
    one, other = TemplateReader(TEMPLATES), TemplateReader(shuffled)
    captions = [*READINGS, "poking a hole into butter", "holding pen next to box of tea on a surface"]
    assert [one.read(caption) for caption in captions] == [other.read(caption) for caption in captions]


def test_templates_without_brackets_read_the_same():
    bare = TemplateReader([as_text(template) for template in TEMPLATES])
    for caption, (template, placeholders) in READINGS.items():
        assert bare.read(caption) == Reading(as_text(template), placeholders)


def test_a_template_given_twice_is_kept_with_its_brackets():
    reader = TemplateReader(["Opening something", "Opening [something]", "opening something"])
    assert reader.read("opening door") == Reading("Opening [something]", ["door"])
    assert reader.known("OPENING something.") == "Opening [something]"
    assert reader.known("Closing [something]") is None


def test_the_expected_template_decides_only_between_equal_ones():
    reader = TemplateReader(TEMPLATES)
    for template in ("Poking a hole into [some substance]", "Poking a hole into [something soft]"):
        assert reader.read("poking a hole into butter", expected=template) == Reading(template, ["butter"])
    surface = reader.read("putting cup on a surface", expected="Putting [something] on [something]")
    assert surface.template == "Putting [something] on a surface"
    # other words of their own: what the caption says is read without knowing what it should say
    two = TemplateReader(["Pulling [something] from [something]", "Pulling [something] onto [something]"])
    for expected in (None, "Pulling [something] from [something]", "Pulling [something] onto [something]"):
        read = two.read("pulling paper from table onto floor", expected=expected)
        assert read == Reading("Pulling [something] from [something]", ["paper", "table onto floor"])


def test_every_template_is_read_back_from_its_own_text():
    reader = TemplateReader(TEMPLATES)
    assert [reader.read(as_text(template)).template for template in TEMPLATES] == TEMPLATES


@pytest.mark.parametrize("words_again", ["up", "and", "something on", "putting into", "away from", "[", "),("])
def test_hostile_captions_are_read_in_linear_time(words_again):
    reader = TemplateReader([*TEMPLATES, "Putting" + " [something] and" * 12 + " [something] on the table"])
    start = time.perf_counter()
    reader.read("putting a " + f"{words_again} " * 20_000 + "thing")
    assert time.perf_counter() - start < 2.0


def test_words_and_keys_ignore_case_punctuation_brackets_and_spacing():
    assert words("It  DOESN'T fit, (t-shirt)!") == ["it", "doesnt", "fit", "t", "shirt"]
    assert words("caf\u00e9") == words("cafe\u0301")
    assert template_key("Moving [something]  up.") == template_key("moving something up")


@pytest.mark.parametrize(
    ("wanted", "said", "expected"),
    [
        (["cup", "box"], ["cup", "table"], (1, 2)),
        (["cup", "box"], ["box", "cup"], (2, 2)),  # which place it stands in does not matter
        (["red cup"], ["cup"], (0, 1)),  # all words of it
        (["red cup"], ["cup red"], (0, 1)),  # in a row
        (["cup"], ["a red cup"], (1, 1)),
        (["a cup"], ["the cup"], (1, 1)),
        (["cup"], ["cupboard"], (0, 1)),  # whole words
        (["cup"], ["something"], (0, 1)),
        (["bottle", "bottle"], ["bottle", "pen"], (1, 2)),  # a word is found once
        (["cup", "red cup"], ["red cup", "cup"], (2, 2)),
        (["Cup", "???"], ["cup."], (1, 1)),  # no words, nothing to find
        (["cup"], [], (0, 1)),
    ],
)
def test_objects_are_found_as_whole_words_each_once(wanted, said, expected):
    assert objects_found(wanted, said) == expected
