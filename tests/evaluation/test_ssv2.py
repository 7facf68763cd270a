import json
import random
import time

import pytest

from dataset import Layout
from evaluation.ssv2 import Reading, TemplateReader, as_text, objects_found, opposites, ssv2_scores, template_key
from runtime.files import UserError

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


def test_keys_ignore_case_punctuation_brackets_and_spacing():
    assert template_key("It  DOESN'T fit, (t-shirt)!") == "it doesnt fit t shirt"
    assert template_key("caf\u00e9") == template_key("cafe\u0301")
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


def test_ssv2s_own_opposites_go_both_ways(tmp_path):
    pairs = opposites(Layout(tmp_path))
    assert pairs["moving something up"] == "moving something down"
    assert all(pairs[pairs[key]] == key for key in pairs)
    own = {"Opening [something]": "Closing [something]"}
    (tmp_path / "opposites.json").write_text(json.dumps(own))
    assert opposites(Layout(tmp_path)) == {
        "opening something": "closing something",
        "closing something": "opening something",
    }
    (tmp_path / "opposites.json").write_text("[1]")
    with pytest.raises(UserError, match="opposite actions"):
        opposites(Layout(tmp_path))


# ---- scores ----

ON, ONTO, UP = "Putting [something] on a surface", "Putting [something] onto [something]", "Moving [something] up"
SOFT, SUBSTANCE = "Poking a hole into [something soft]", "Poking a hole into [some substance]"
RECORDS = {
    "a": {"label": ["putting red cup on a surface"], "template": ON, "placeholders": ["red cup"]},
    "b": {"label": ["putting pen onto box"], "template": ONTO, "placeholders": ["pen", "box"]},
    "c": {"label": ["putting pen onto box"], "template": ONTO, "placeholders": ["pen", "box"]},
    "d": {"label": ["moving cup up", "a cup goes up"], "template": UP, "placeholders": ["cup"]},
    "e": {"label": ["moving cup up"], "template": UP, "placeholders": ["cup"]},
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
    scores = ssv2_scores(SAID, RECORDS, TemplateReader([ON, ONTO, UP, SOFT, SUBSTANCE]))
    assert scores["clips"] == 8
    assert scores["exact_match"] == 3 / 8  # a, d, g
    assert scores["template_accuracy"] == 5 / 7  # a, b, d, f, g of the seven with a template
    assert scores["no_template"] == 2 / 8  # e, h
    assert scores["object_accuracy"] == 6 / 8  # a 1/1, b 1/2, c 2/2, d 1/1, e 1/1, f 0/1
    outcomes = ["exact", "template", "wrong", "exact", "wrong", "template", "exact", None]
    assert [scores["per_clip"][key]["outcome"] for key in SAID] == outcomes
    objects = [scores["per_clip"][key]["counts"]["object_accuracy"] for key in SAID]
    assert objects == [(1, 1), (1, 2), (2, 2), (1, 1), (1, 1), (0, 1), (0, 0), (0, 0)]
    assert scores["per_clip"]["c"]["read"] == ON and scores["per_clip"]["h"]["template"] is None
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
    written = [record["template"] for record in RECORDS.values() if "template" in record]
    bare = TemplateReader([*map(as_text, (ON, ONTO, UP, SOFT, SUBSTANCE)), *written])
    assert ssv2_scores(SAID, RECORDS, bare) == ssv2_scores(SAID, RECORDS, reader)


def test_confused_pairs_are_the_most_frequent_first_and_at_most_twenty():
    templates = [f"Turning [something] {number}" for number in "abcdefghijklmnopqrstuvwxyz"]
    records = {str(i): {"label": ["x"], "template": text, "placeholders": ["p"]} for i, text in enumerate(templates)}
    records |= {f"{key}+": record for key, record in list(records.items())[5:7]}
    said = {key: "turning p a" for key in records}
    confused = ssv2_scores(said, records, TemplateReader(templates))["confused"]
    assert len(confused) == 20 and [count for *_, count in confused[:3]] == [2, 2, 1]
    assert confused[0] == [templates[5], templates[0], 2]


def test_scores_without_templates_or_objects_are_none_and_not_zero():
    scores = ssv2_scores({"h": "a cat"}, RECORDS, TemplateReader([]))
    assert scores["exact_match"] == 1.0 and scores["no_template"] == 0.0
    assert scores["template_accuracy"] is None and scores["intervals"]["template_accuracy"] is None
    assert scores["object_accuracy"] is None and scores["confused"] == [] and scores["per_template"] == {}
