"""The results page in headless Chromium, opened from disk as a user opens it."""

import re

import numpy as np
import pytest

from evaluation import report
from tests.evaluation.conftest import CHROMIUM, HOSTILE, OUTCOMES, SAID, TEMPLATES

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install -e .[test]")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")


def ids(page):
    return page.locator("#cards .id").all_text_contents()


def outcomes_shown(page):
    return set(page.locator("#cards .badge").all_text_contents())


def choose(page, outcome):
    page.locator(f"#outcomes button.{outcome}").click()


# ---- clips play ----


def test_clips_on_screen_play_and_those_far_away_are_not_loaded(visit):
    page = visit()
    page.locator("#gallery").scroll_into_view_if_needed()
    page.evaluate("document.getElementById('gallery').scrollIntoView()")
    first = "document.querySelectorAll('#cards video')[0]"
    page.wait_for_function(f"{first}.currentTime > 0.2 && !{first}.paused")
    assert page.evaluate(f"[{first}.muted, {first}.loop, {first}.playsInline, {first}.videoWidth]") == [
        True,
        True,
        True,
        112,
    ]
    loaded = page.evaluate("[...document.querySelectorAll('#cards video')].map((v) => v.hasAttribute('src'))")
    assert loaded[0] and not loaded[-1] and sum(loaded) < 24
    page.locator("#cards .card").nth(40).scroll_into_view_if_needed()
    page.wait_for_function(f"!{first}.hasAttribute('src')")
    page.wait_for_function("document.querySelectorAll('#cards video')[40].currentTime > 0.1")


def test_with_reduced_motion_a_clip_plays_only_under_the_pointer(visit):
    page = visit(reduced_motion="reduce")
    page.evaluate("document.getElementById('gallery').scrollIntoView()")
    page.wait_for_function("document.querySelectorAll('#cards video')[1].readyState >= 2")
    assert not page.locator("#autoplay").is_checked()
    assert page.evaluate("[...document.querySelectorAll('#cards video')].every((v) => v.paused)")
    page.locator("#cards .card").nth(1).hover()
    page.wait_for_function("document.querySelectorAll('#cards video')[1].currentTime > 0.1")
    page.locator("#gallery").hover()
    page.wait_for_function("document.querySelectorAll('#cards video')[1].paused")


# ---- captions are text ----


def test_html_in_captions_is_shown_as_text(visit):
    page = visit()
    shown = HOSTILE.replace("\u202e", "\N{REPLACEMENT CHARACTER}")
    card = page.locator("#cards .card").nth(1)
    assert card.locator(".prediction").text_content() == shown
    assert card.locator(".reference").text_content() == shown
    assert card.locator("img, script").count() == 0 and page.title() == "Gallery"


def test_words_that_no_reference_has_are_marked(visit):
    page = visit()
    assert page.locator("#cards .card").first.locator(".prediction u").all_text_contents() == [
        "caption",
        "of",
        "colour0",
    ]


# ---- search, filters, sorting ----


def test_search_finds_all_words_in_any_order_and_says_how_many(visit):
    page = visit()
    assert page.text_content("#count") == "120 clips"
    page.fill("#search", "COLOUR3 caption")
    assert ids(page) == [str(1000 + i) for i in range(120) if i % 4 == 3 and i != 1]
    assert page.text_content("#count") == "30 of 120 clips"
    page.fill("#search", "1042")
    assert ids(page) == ["1042"]
    page.fill("#search", "nothing of this")
    assert ids(page) == [] and page.locator("#none").is_visible()
    page.click("#reset")
    assert page.text_content("#count") == "120 clips" and page.input_value("#search") == ""


def test_filters_by_outcome_and_template_narrow_together(visit):
    page = visit()
    assert page.locator("#outcomes button").all_text_contents() == [
        "all 120",
        "● exact 48",
        "◐ same template 48",
        "○ wrong 24",
    ]
    choose(page, "wrong")
    assert ids(page) == [str(1000 + i) for i in range(120) if i % 5 == 2] and outcomes_shown(page) == {"○ wrong"}
    page.select_option("#template", TEMPLATES[1])
    assert ids(page) == [str(1000 + i) for i in range(120) if i % 5 == 2 and i % 3 == 1]
    assert page.locator("#outcomes button[aria-pressed=true]").all_text_contents() == ["○ wrong 24"]
    assert set(page.locator("#cards .template-name").all_text_contents()) == {TEMPLATES[1]}


def test_sorting_by_score_puts_clips_without_one_last(visit):
    page = visit()
    scores = {str(1000 + i): (i * 37 % 120) / 40 for i in range(120) if i != 7}
    for choice, sign in (("low", 1), ("high", -1)):
        page.select_option("#sort", choice)
        page.evaluate("while (state.drawn < state.shown.length) more()")
        assert ids(page) == [*sorted(scores, key=lambda i, sign=sign: sign * scores[i]), "1007"]
    page.select_option("#sort", "")
    assert ids(page)[:3] == ["1000", "1001", "1002"]


def test_a_template_chosen_in_its_table_filters_the_gallery(visit):
    page = visit()
    page.click("#by-template summary")
    row = page.locator("#by-template tbody tr").nth(1)
    row.locator("td.value").first.wait_for()  # the table is made when it is opened
    assert row.locator("td.value").all_text_contents() == ["40 %", "80 %", "40"]
    assert row.locator(".mix").get_attribute("aria-label") == "exact 16, same template 16, wrong 8"
    row.locator("button").click()
    assert page.text_content("#count") == "40 of 120 clips" and page.input_value("#template") == TEMPLATES[1]


# ---- keyboard ----


def test_the_page_is_used_by_keyboard_alone(visit):
    page = visit()
    page.keyboard.press("/")
    page.keyboard.type("colour")
    assert page.text_content("#count") == "119 of 120 clips"  # "/" itself was not typed; j and k are letters here
    page.keyboard.type("j")
    assert page.text_content("#count") == "0 of 120 clips"
    page.keyboard.press("Backspace")
    page.keyboard.press("Enter")
    focused = "document.activeElement.querySelector('.id').textContent"
    assert page.evaluate(focused) == "1000"
    moves = [("j", "1002"), ("ArrowRight", "1003"), ("k", "1002"), ("ArrowLeft", "1000"), ("ArrowDown", "1005")]
    for key, arrived in [*moves, ("ArrowUp", "1000"), ("k", "1000")]:  # 1001 has no such word; four cards a row
        page.keyboard.press(key)
        assert page.evaluate(focused) == arrived
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    video = "document.activeElement.querySelector('video')"
    page.wait_for_function(f"{video}.currentTime > 0.1")
    page.keyboard.press("Enter")
    assert page.evaluate(f"{video}.paused")
    page.keyboard.press(" ")
    page.wait_for_function(f"!{video}.paused")


def test_j_goes_on_past_the_cards_made_so_far(visit):
    page = visit()
    page.evaluate("focusCard(state.drawn - 1)")
    before = page.evaluate("document.activeElement.clip.place")
    page.keyboard.press("j")
    assert page.evaluate("document.activeElement.clip.place") == before + 1
    box = page.evaluate(
        "(({ top, bottom }) => [top >= 0, bottom <= innerHeight])(document.activeElement.getBoundingClientRect())"
    )
    assert box == [True, True]


# ---- long videos, failures ----


def test_the_player_has_the_captions_as_a_track(visit):
    page = visit("long.html", may_fail="ERR_FILE_NOT_FOUND")
    track = "document.querySelector('video[controls]').textTracks[0]"
    page.wait_for_function(f"{track}.cues?.length === 3")
    assert page.evaluate(f"[...{track}.cues].map((c) => [c.startTime, c.endTime])") == [[0, 1], [1, 2], [2, 3]]
    texts = page.evaluate(f"[...{track}.cues].map((c) => c.getCueAsHTML().textContent)")
    assert texts == list(SAID)  # as the viewer reads them: no tag was one, no arrow ended a cue
    assert page.evaluate(f"[{track}.kind, {track}.mode]") == ["captions", "showing"]


def test_the_timeline_seeks_and_marks_the_caption_of_the_moment(visit):
    page = visit("long.html", may_fail="ERR_FILE_NOT_FOUND", reduced_motion="reduce")
    assert page.locator(".segments button").all_text_contents() == [
        "0:00 – 0:01moving a square --> & left",
        "0:01 – 0:02second <b>caption</b>",
        "0:02 – 0:03third",
    ]
    widths = page.evaluate("[...document.querySelectorAll('.timeline span')].map((e) => parseFloat(e.style.width))")
    page.wait_for_function("document.querySelector('video').readyState >= 2")
    assert all(20 < width < 34 for width in widths)
    page.evaluate("document.querySelector('video').play = () => Promise.resolve()")  # stand still where it was put
    page.locator(".timeline span").nth(2).click()
    page.wait_for_function("document.querySelector('.segments .now')?.textContent.endsWith('third')")
    assert page.evaluate("document.querySelector('video').currentTime") == 2
    page.locator(".segments button").nth(1).click()
    page.wait_for_function("document.querySelector('.segments .now')?.textContent.includes('second')")
    assert page.locator(".timeline .now").count() == page.locator(".segments .now").count() == 1


def test_failed_clips_warnings_and_missing_videos_say_so(visit):
    page = visit("long.html", may_fail="ERR_FILE_NOT_FOUND")
    failed, gone = page.locator("#cards .card").nth(1), page.locator("#cards .card").nth(2)
    assert failed.locator(".badge").text_content() == "✕ failed" and failed.locator(".prediction-line").is_hidden()
    assert failed.locator(".error").text_content() == "No caption: no frames could be decoded"
    assert failed.locator(".blank").text_content() == "No video"
    cut = page.locator("#cards .card").nth(3)
    assert cut.locator(".prediction").text_content() == "moving up" and cut.locator(".warning").is_visible()
    assert cut.locator(".warning").text_content() == "cut off: 29 of 33 frames could be decoded"
    assert cut.locator(".error").is_hidden() and failed.locator(".warning").is_hidden()
    gone.scroll_into_view_if_needed()
    page.wait_for_function("document.querySelectorAll('.blank')[2].textContent.includes('gone.webm')")
    assert gone.locator("video").is_hidden()


# ---- layout ----


@pytest.mark.parametrize("name", ["index.html", "long.html"])
def test_a_narrow_screen_needs_no_sideways_scrolling(visit, name):
    page = visit(name, may_fail="ERR_FILE_NOT_FOUND", viewport={"width": 390, "height": 844}, has_touch=True)
    for details in page.locator("details:visible summary").all():
        details.click()
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    right = "!e.closest('.scroll') && e.getBoundingClientRect().right > 391"
    too_wide = f"[...document.querySelectorAll('body *')].filter((e) => {right}).map((e) => e.outerHTML.slice(0, 80))"
    assert page.evaluate(too_wide) == []


def luminance(colour):
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    return np.dot(
        [0.2126, 0.7152, 0.0722], [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    )


def contrast(page, selector, ground):
    """Of the first such element's text against the colour behind another."""
    ink = luminance(page.evaluate(f"getComputedStyle(document.querySelector('{selector}')).color"))
    ground = luminance(page.evaluate(f"getComputedStyle(document.querySelector('{ground}')).backgroundColor"))
    return (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_two_runs_and_links_say_can_be_read(visit, scheme):
    page = visit("compared.html", may_fail="ERR_FILE_NOT_FOUND", color_scheme=scheme)
    on_cards = (".change.better", ".change.same", ".change.worse", ".other", ".source", ".read-name", ".id a")
    grounds = {**dict.fromkeys(on_cards, ".card"), ".links a": "body", ".compared": "body", ".ticks": ".panel"}
    grounds |= {"#recipe dt": "body", "#scores .interval": ".panel", "#confused button": "body"}
    low = {part: contrast(page, part, ground) for part, ground in grounds.items()}
    assert {part: ratio for part, ratio in low.items() if ratio < 4.5} == {}


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_colours_follow_the_system_and_can_be_read(visit, scheme, dark):
    page = visit(color_scheme=scheme)
    assert (luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) < 0.1) == dark
    # The curves' texts are in --dim as .says is, and their lines in colours of the same kind: see test_report.py.
    assert page.evaluate("getComputedStyle(document.querySelector('.curves text')).fill") == page.evaluate(
        "getComputedStyle(document.querySelector('#cards .says')).color"
    )
    for part in (".badge.exact", ".badge.template", ".badge.wrong", ".prediction", ".says", ".template-name", ".score"):
        assert contrast(page, f"#cards {part}", ".card") >= 4.5, f"{part} cannot be read in {scheme}"


@pytest.mark.parametrize("name", ["index.html", "compared.html", "long.html"])
def test_everything_that_can_be_worked_has_a_name(visit, name):
    page = visit(name, may_fail="ERR_FILE_NOT_FOUND")
    worked = "[...document.querySelectorAll('button:not([hidden]), a, input, select, video, svg, .card')]"
    named = "e.getAttribute('aria-label') || e.textContent.trim() || e.closest('label')?.textContent.trim()"
    nameless = page.evaluate(f"{worked}.filter((e) => !({named})).map((e) => e.outerHTML.slice(0, 80))")
    assert nameless == []


# ---- size ----


def test_a_page_of_a_whole_validation_split_stays_small_and_makes_cards_only_as_needed(visit, folder):
    clips = (
        {
            "id": str(100000 + i),
            "prediction": f"pretending to put something number {i} behind a wooden box",
            "references": [f"pretending to put a bottle of water number {i} behind a box"],
            "video": f"../../data/something-something-v2/20bn-something-something-v2/{100000 + i}.webm",
            "template": f"Pretending to put [something] behind [something] in way {i % 174}",
            "outcome": OUTCOMES[i % 3],
            "score": i % 997 / 300,
        }
        for i in range(24777)
    )
    report.write_page(folder / "whole.html", "Whole", clips)
    assert (folder / "whole.html").stat().st_size < 20_000_000
    page = visit("whole.html", may_fail="ERR_FILE_NOT_FOUND")
    assert page.locator("#cards .card").count() < 200
    page.fill("#search", "number 24776 ")
    assert ids(page) == ["124776"] and page.text_content("#count") == "1 of 24,777 clips"
    assert page.locator("#template option").count() == 175


def test_clips_with_overlays_come_first_where_asked_and_where_there_are_any(visit, folder):
    overlays = {"overlays": {"attention": "none.webm"}}
    clips = [{"id": name, "prediction": "x", **(overlays if name in "24" else {})} for name in "12345"]
    report.write_page(folder / "seen.html", "Seen", clips)
    page = visit("seen.html", may_fail="ERR_FILE_NOT_FOUND")
    page.select_option("#sort", "seen")
    assert page.locator("#cards .id").all_text_contents() == ["2", "4", "1", "3", "5"]
    assert visit("long.html", may_fail="ERR_FILE_NOT_FOUND").locator("#sort option[value=seen]").count() == 0
