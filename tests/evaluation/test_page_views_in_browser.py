"""What a page is asked and what it answers, in headless Chromium: links, shared views, two runs, pictures, speed."""

import re
from urllib.parse import quote

import pytest

from evaluation import report
from tests.evaluation.conftest import CHANGES, CHROMIUM, HOSTILE, TEMPLATES

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install -e .[test]")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")

CARD = "document.querySelectorAll('#cards .card')"
MISSING = "ERR_FILE_NOT_FOUND"  # a clip's or an overlay's file that is not there, on purpose


def ids(page):
    return page.locator("#cards .id").all_text_contents()


def view_of(page, *parts):
    """The address of the view, which a page writes a moment after the last change. It must hold `parts`."""
    page.wait_for_function("location.href.endsWith(viewAddress(state.clip))")
    address = page.evaluate("location.hash")
    assert all(part in address for part in parts), address
    return address


# ---- links ----


def test_pages_reach_each_other_by_clicks(visit, folder):
    results = folder / "results #1"
    for place in ("training/index.html", "index.html", "inference/index.html"):
        report.write_page(results / place, place.split("/")[0], [{"id": "1", "prediction": "x"}])
        report.link_pages(results)
    page = visit("long.html", may_fail=MISSING)
    page.goto((results / "index.html").as_uri())
    for name, title in (("Inference", "inference"), ("Training", "training"), ("Evaluation", "index.html")):
        page.click(f"nav.pages a:text-is('{name}')")
        page.wait_for_selector("#cards .card")
        assert page.title() == title
        assert page.locator("nav.pages a[aria-current=page]").all_text_contents() == [name]
        assert page.locator("nav.pages a").count() == 3


def test_a_page_links_to_its_files_and_says_how_its_checkpoint_was_made(visit):
    page = visit("compared.html", may_fail=MISSING)
    assert page.locator(".links a").evaluate_all("all => all.map((a) => a.getAttribute('href'))") == ["evaluation.json"]
    assert page.locator("nav.pages a").count() == 0  # its neighbours are not there
    page.click("#recipe summary")
    told = dict(zip(*(page.locator(f"#recipe {tag}").all_text_contents() for tag in ("dt", "dd")), strict=True))
    assert told["data"].strip() == "sample" and told["training"].split() == ["lr", "0.002", "epochs", "11"]
    page = visit("long.html", may_fail=MISSING)
    link = page.locator(".card .files a")
    assert link.count() == 1 and link.get_attribute("href") == "long%20%231.srt"
    assert link.text_content() == "long #1.srt"


def test_own_videos_show_where_they_lie_as_text(visit):
    page = visit(may_fail=MISSING)
    card = page.locator("#cards .card").nth(4)
    assert card.locator(".source").text_content() == HOSTILE.replace("\u202e", "\N{REPLACEMENT CHARACTER}")
    assert card.locator("img, script").count() == 0 and page.title() == "Gallery"
    assert page.locator("#cards .card").nth(5).locator(".source").text_content() == "holiday/ä #1.mov"
    assert page.locator("#cards .card").nth(6).locator(".source").is_hidden()


# ---- views that are shared ----


def test_a_view_is_in_the_address_and_opens_again_from_there(visit):
    page = visit(may_fail=MISSING)
    page.fill("#search", "caption colour1 & #")
    page.fill("#search", "caption colour1")
    page.select_option("#template", TEMPLATES[1])
    page.select_option("#sort", "high")
    page.click("#outcomes button.template")
    page.select_option("#speed", "0.5")
    shown = ids(page)
    assert len(shown) == 3
    page.locator("#cards .id a").nth(2).click()
    address = view_of(page, "outcome=template", "sort=high", "speed=0.5", f"clip={shown[2]}")
    other = visit(f"index.html{address}", may_fail=MISSING)
    assert ids(other) == shown
    assert other.evaluate("document.activeElement.clip.id") == shown[2]
    fields = [other.input_value(f"#{name}") for name in ("search", "template", "sort", "speed")]
    assert fields == ["caption colour1", TEMPLATES[1], "high", "0.5"]
    other.wait_for_function(f"{CARD}[2].video.readyState >= 1")
    assert other.evaluate(f"{CARD}[2].video.playbackRate") == 0.5
    other.click("#outcomes button[value='']")
    other.fill("#search", "")
    other.wait_for_function("!location.hash.includes('outcome') && !location.hash.includes('clip')")


def test_back_leaves_the_page_and_a_changed_address_is_followed(visit):
    page = visit(may_fail=MISSING)
    before = page.evaluate("history.length")
    page.fill("#search", "colour3")
    page.click("#outcomes button.wrong")
    view_of(page, "q=colour3", "outcome=wrong")
    assert page.evaluate("history.length") == before
    page.evaluate("location.hash = '#outcome=exact&sort=id'")
    page.wait_for_function("document.getElementById('count').textContent === '48 of 120 clips'")
    assert page.input_value("#search") == "" and page.input_value("#sort") == "id"
    page.evaluate("location.hash = ''")
    page.wait_for_function("document.getElementById('count').textContent === '120 clips'")


def test_what_an_address_holds_is_text_and_never_html_and_unknown_values_are_passed_over(visit):
    keys = ("q", "read", "clip", "template", "sort", "outcome", "change", "speed", "__proto__")
    address = "&".join(f"{key}={quote(HOSTILE)}" for key in keys)
    page = visit("long.html", may_fail=MISSING)
    page.goto(page.url + "#" + address)
    page.wait_for_function("!document.getElementById('read').hidden")
    assert page.title() == "Long" and page.locator("img").count() == 0
    assert page.text_content("#read").startswith("read as: <img src=x onerror")
    assert page.input_value("#sort") == "" and page.input_value("#speed") == "1" and page.input_value("#template") == ""
    assert page.input_value("#search") == HOSTILE and page.locator("#none").is_visible()
    page.click("#reset")
    assert len(ids(page)) == 4
    for broken in ("#%", "#clip", "#clip=%E0%A4%A", "#=&&=", "#attention=1&outcome=constructor&change=toString"):
        page.evaluate("hash => { location.hash = hash; }", broken)
        page.wait_for_function("hash => location.hash.length <= 1 || state.shown.length === 4", arg=broken)


def test_a_shared_clip_far_down_is_in_sight_and_the_clips_before_it_can_be_reached(visit):
    page = visit("index.html#sort=low&clip=1070", may_fail=MISSING, reduced_motion="reduce")
    box = "document.activeElement.getBoundingClientRect()"
    in_sight = f"{box}.top >= 0 && {box}.bottom <= innerHeight"
    page.wait_for_function(f"document.activeElement.clip?.id === '1070' && {in_sight}")
    place = page.evaluate("state.shown.findIndex((clip) => clip.id === '1070')")
    drawn = page.evaluate("[state.from, state.drawn]")
    assert drawn[0] == place - place % 48 and drawn[0] <= place < drawn[1]
    assert drawn[0] == 48 and page.text_content("#earlier") == "Earlier clips (48)"
    page.evaluate("focusCard(0)")
    page.keyboard.press("k")  # the card before is made when it is asked for
    assert page.evaluate("document.activeElement.clip.id") == page.evaluate("state.shown[47].id")
    assert page.locator("#earlier").is_hidden()
    assert page.evaluate(f"[...{CARD}].every((card, i) => card.clip === state.shown[i])")


# ---- templates ----


def test_a_row_of_the_confusion_table_shows_its_clips(visit):
    page = visit(may_fail=MISSING)
    page.click("#by-confusion summary")
    rows = page.locator("#confused tbody tr")
    expected = [
        [str(1000 + i) for i in range(120) if i % 5 == 2 and i % 3 == 1 and i % 2 == 0],
        [str(1000 + i) for i in range(120) if i % 5 == 2 and i % 3 == 0 and i % 2 == 1],
    ]
    page.fill("#search", "1042")  # a row stands for its clips alone
    for row, clips in enumerate(expected):
        rows.nth(row).locator("button").focus()
        page.keyboard.press("Enter")
        assert len(clips) == 4 == int(rows.nth(row).locator(".value").text_content())
        assert ids(page) == clips
        assert page.input_value("#template") == TEMPLATES[1 - row]
    assert page.text_content("#read") == "read as: no template ✕"
    assert set(page.locator("#cards .read-name").all_text_contents()) == {"read asno template"}
    address = view_of(page, "read=", "template=")
    assert ids(visit(f"index.html{address}", may_fail=MISSING)) == expected[1]
    page.click("#read")
    assert page.text_content("#count") == "40 of 120 clips" and page.locator("#read").is_hidden()


def test_templates_stand_worst_first(visit, folder):
    counts = {"good": (5, 0, 0), "bad": (0, 1, 3), "half": (2, 1, 1), "worst": (0, 0, 2), "also half": (2, 2, 0)}
    clips = [
        {"id": f"{name} {outcome} {i}", "prediction": "x", "template": name, "outcome": outcome}
        for name, many in counts.items()
        for outcome, count in zip(("exact", "template", "wrong"), many, strict=True)
        for i in range(count)
    ]
    report.write_page(folder / "templates.html", "Templates", clips)
    page = visit("templates.html")
    page.click("#by-template summary")
    page.locator("#by-template tbody button").first.wait_for()
    names = page.locator("#by-template tbody button").all_text_contents()
    assert names == ["worst", "bad", "half", "also half", "good"]
    shares = page.locator("#by-template tbody tr").nth(2).locator(".value").all_text_contents()
    assert shares == ["50 %", "75 %", "4"]


def test_scores_have_axes_with_ciders_own(visit):
    page = visit("compared.html", may_fail=MISSING)
    texts = "all => all.map((ticks) => [...ticks.children].map((tick) => tick.textContent))"
    ticks = page.locator("#scores .ticks").evaluate_all(texts)
    assert ticks == [["0", "0.75", "1.5"], ["0", "0.5", "1"]]
    # A tick stands over the place of its value: BLEU-4 is 0.5.
    middle = "(e) => { const { left, width } = e.getBoundingClientRect(); return left + width / 2; }"
    tick = page.locator("#scores .ticks").nth(1).locator("span").nth(1).evaluate(middle)
    assert abs(page.locator("#scores .whisker b").nth(1).evaluate(middle) - tick) < 3


# ---- two runs side by side ----


def test_clips_of_two_runs_are_filtered_by_better_same_and_worse_and_show_both_captions(visit):
    page = visit("compared.html", may_fail=MISSING)
    chips = page.locator("#changes button")
    assert chips.all_text_contents() == ["any change", "▲ better 33", "= same 34", "▼ worse 33"]
    for name in CHANGES:
        page.click(f"#changes button.{name}")
        wanted = [str(1000 + i) for i in range(100) if CHANGES[i % 3] == name]
        page.evaluate("while (state.drawn < state.shown.length) more()")
        assert ids(page) == wanted
    assert chips.nth(3).get_attribute("aria-pressed") == "true"
    first = page.locator("#cards .card").first
    assert first.locator(".prediction").text_content() == "caption 2 of colour2"
    assert first.locator(".other").text_content() == "other 2"
    assert first.locator(".other-line .says").text_content() == "the other run's, score 1.87"
    assert first.locator(".change").text_content() == "▼ worse"
    page.click("#outcomes button.exact")  # both groups narrow together
    assert ids(page) == [str(1000 + i) for i in range(100) if i % 3 == 2 and i % 5 % 3 == 0]
    page.click("#outcomes button[value='']")
    page.select_option("#sort", "lost")
    assert ids(page)[0] == "1098"
    page.click("#changes button.same")
    assert set(page.locator("#cards .other").all_text_contents()) == {"the same caption"}
    assert view_of(page, "change=same", "sort=lost")


def test_the_other_runs_caption_is_text_and_clips_that_it_lacks_have_none(visit):
    page = visit("compared.html#clip=1119", may_fail=MISSING)
    page.wait_for_function("document.activeElement.clip?.id === '1119'")
    last = page.locator("#cards .card:focus")
    assert last.locator(".other-line").is_hidden() and last.locator(".change").is_hidden()
    page.fill("#search", "1001")
    shown = HOSTILE.replace("\u202e", "\N{REPLACEMENT CHARACTER}")
    card = page.locator("#cards .card").first
    assert card.locator(".prediction").text_content() == shown and card.locator("img").count() == 0
    page.fill("#search", "other 4")  # a search finds the other's words as well
    assert "1004" in ids(page)


def test_differences_stand_in_the_table_with_their_intervals_and_clear_ones_are_bold(visit):
    page = visit("compared.html", may_fail=MISSING)
    gains = page.locator("#scores td.gain")
    assert [" ".join(text.split()) for text in gains.all_text_contents()] == [
        "−0.250 [−0.500, −0.010]",
        "−0.250 [−0.500, +0.200]",
        "+0.100",
    ]
    weights = gains.evaluate_all("all => all.map((e) => Number(getComputedStyle(e).fontWeight))")
    assert weights[0] > 600 and weights[1] == weights[2] == 400
    assert page.locator(".compared").text_content().startswith("Compared with old.pt, epoch 3, on the 100 clips")
    plain = visit(may_fail=MISSING)
    assert plain.locator("td.gain, .compared, #changes button").count() == 0
    assert not [text for text in plain.locator("#sort option").all_text_contents() if "Change" in text]


# ---- pictures and speed ----


def test_a_card_switches_between_clip_and_overlays_at_the_same_moment(visit):
    page = visit("index.html#speed=0.25", may_fail=MISSING, reduced_motion="reduce")
    card, video = page.locator("#cards .card").first, f"{CARD}[0].video"
    buttons = card.locator(".pictures button")
    assert buttons.all_text_contents() == ["clip", "attention", "query 3"]
    page.evaluate("document.getElementById('gallery').scrollIntoView()")
    page.wait_for_function(f"{video}.readyState >= 2")
    page.evaluate(f"{video}.currentTime = 1.25")
    for name in ("attention", "query 3", "clip"):
        buttons.filter(has_text=re.compile(f"^{name}$")).press("Enter")
        page.wait_for_function(f"{video}.readyState >= 2 && !{video}.seeking")
        file = quote("a%b.webm" if name == "clip" else f"a%b.{name}.webm")
        assert page.evaluate(f"{video}.src").endswith(file)
        found = page.evaluate(f"[{video}.paused, {video}.playbackRate, {video}.videoWidth]")
        assert found == [True, 0.25, 112] and abs(page.evaluate(f"{video}.currentTime") - 1.25) < 0.01
        assert card.locator(".pictures button[aria-pressed=true]").all_text_contents() == [name]
        page.wait_for_function("!document.querySelector('canvas')")  # of the picture before, while this one loads


def test_a_playing_clip_plays_on_in_the_other_picture(visit):
    page = visit("index.html#speed=0.25", may_fail=MISSING, reduced_motion="reduce")
    video = f"{CARD}[0].video"
    page.evaluate("document.getElementById('gallery').scrollIntoView()")
    page.evaluate("focusCard(0)")
    page.wait_for_function(f"{video}.currentTime > 0.2 && !{video}.paused")
    before = page.evaluate(f"{video}.currentTime")
    page.keyboard.press("a")
    page.wait_for_function(f"!{video}.paused && {video}.readyState >= 3 && {video}.src.includes('attention')")
    after = page.evaluate(f"{video}.currentTime")
    assert before <= after < before + 1 and page.evaluate(f"{video}.playbackRate") == 0.25
    page.wait_for_function(f"{video}.currentTime > {after}")


def test_one_switch_shows_attention_on_all_cards_that_have_it(visit):
    page = visit(may_fail=MISSING, reduced_motion="reduce")
    page.check("#attention")
    pictures = f"[...{CARD}].slice(0, 5).map((card) => card.picture)"
    assert page.evaluate(pictures) == ["attention", "attention", "query 3", "gone", "clip"]
    page.evaluate("document.getElementById('gallery').scrollIntoView()")
    page.wait_for_function(f"{CARD}[3].querySelector('.blank').textContent.includes('a%b.gone.webm')")
    page.fill("#search", "caption")  # cards that are made later show it as well
    assert page.evaluate(f"{CARD}[0].picture") == "attention"
    address = view_of(page, "attention=1")
    assert visit(f"index.html{address}", may_fail=MISSING).evaluate(f"{CARD}[0].picture") == "attention"
    page.uncheck("#attention")
    page.wait_for_function(f"{CARD}[2].video.readyState >= 2 && !{CARD}[2].video.hidden")  # 1001 is not found: 1003
    assert set(page.evaluate(f"[...{CARD}].map((card) => card.picture)")) == {"clip"}
    assert visit("long.html", may_fail=MISSING).locator("#attention-label").is_hidden()


def test_speed_is_chosen_once_for_all_clips_and_by_keys(visit):
    page = visit(may_fail=MISSING)
    speed = f"{CARD}[0].video.playbackRate"
    page.select_option("#speed", "2")
    assert page.evaluate(speed) == 2
    page.evaluate("document.activeElement.blur()")
    for key, expected in (("<", 1), ("<", 0.5), ("<", 0.25), ("<", 0.25), (">", 0.5)):
        page.keyboard.press(key)
        assert page.evaluate(speed) == expected == float(page.input_value("#speed"))
    page.fill("#search", "colour")
    page.evaluate("document.getElementById('gallery').scrollIntoView()")
    page.wait_for_function(f"{CARD}[0].video.readyState >= 2")
    assert page.evaluate(speed) == 0.5  # of a new card, with its clip loaded


# ---- on a phone ----


def test_on_a_phone_the_clips_come_before_the_tables_which_are_one_tap_away(visit):
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True}
    page = visit("compared.html", may_fail=MISSING, **phone)
    assert page.locator("#scores").is_hidden() and page.locator("#search").is_visible()
    assert page.evaluate("document.querySelector('#cards .card').getBoundingClientRect().top") < 1.2 * 844
    page.tap("#numbers summary")
    assert page.locator("#scores").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert visit(may_fail=MISSING).locator("#scores").is_visible()


@pytest.mark.parametrize("name", ["compared.html", "long.html"])
def test_what_is_tapped_is_large_enough_for_a_finger(visit, name):
    page = visit(name, may_fail=MISSING, viewport={"width": 390, "height": 844}, has_touch=True)
    for details in page.locator("details:visible summary").all():
        details.click()
    page.evaluate("document.querySelector('.card').scrollIntoView()")
    tapped = "button, select, summary, input[type=search], label.tick, .links a, .files a, nav a"
    seen = f"[...document.querySelectorAll('{tapped}')].filter((e) => e.offsetParent)"
    small = f"{seen}.filter((e) => e.getBoundingClientRect().height < 35.5).map((e) => e.outerHTML.slice(0, 80))"
    assert page.evaluate(f"{seen}.length") > 5 and page.evaluate(small) == []
