"use strict";
// Captions, and what an address asks for, are other people's text: they enter the document through textContent only.
const $ = (id) => document.getElementById(id);
const clips = JSON.parse($("data").textContent);
const OUTCOMES = { exact: ["●", "exact"], template: ["◐", "same template"], wrong: ["○", "wrong"], failed: ["✕", "failed"], unscored: ["–", "not scored"] };
const CHANGES = { better: ["▲", "better"], same: ["=", "same"], worse: ["▼", "worse"] };
const NO_TEMPLATE = "no template";
const BATCH = 48;    // cards made at a time, as the end of the list comes near
const PLAYERS = 30;  // clips that play at once; browsers stop at some 40 to 75 players in a page
// read: the template read from the prediction, "" where none fits, null: any. Cards are made of shown[from] to shown[drawn - 1].
const state = { outcome: "", change: "", read: null, clip: "", shown: clips, from: 0, drawn: 0, playing: new Set() };

clips.forEach((clip, place) => {
  clip.place = place;
  clip.outcome = clip.error ? "failed" : clip.outcome in OUTCOMES ? clip.outcome : "unscored";
});

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// ---- one card ----

const bare = (word) => word.toLowerCase().replace(/[^\p{L}\p{N}]/gu, "");

function writePrediction(into, clip) {
  const known = new Set((clip.references || []).flatMap((text) => text.split(/\s+/)).map(bare));
  for (const part of (clip.prediction || "").split(/(\s+)/)) {
    const differs = known.size && bare(part) && !known.has(bare(part));
    into.append(differs ? element("u", "", part) : part);
  }
}

function makeCard(clip) {
  const card = $("card").content.firstElementChild.cloneNode(true);
  const part = (name) => card.querySelector("." + name);
  const tell = (name, text) => { part(name).lastChild ? part(name).lastChild.textContent = text : part(name).textContent = text; part(name).hidden = !text; };
  const [sign, word] = OUTCOMES[clip.outcome];
  card.clip = clip;
  part("badge").textContent = `${sign} ${word}`;
  part("badge").classList.add(clip.outcome);
  part("badge").hidden = clip.outcome === "unscored";
  if (clip.outcome !== "unscored") part("words").style.setProperty("--outcome", `var(--${clip.outcome})`);
  part("score").textContent = clip.score === null || clip.score === undefined ? "" : `score ${clip.score.toFixed(2)}`;
  const link = part("id").firstElementChild;
  link.textContent = clip.id;
  Object.assign(link, { href: viewAddress(clip.id), title: "A link to this clip in this view", tabIndex: -1 });  // a clip in focus has its link in the address
  link.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;  // in a tab or window of its own
    event.preventDefault();
    card.focus();
  });
  writePrediction(part("prediction"), clip);
  part("prediction-line").hidden = Boolean(clip.error) || Boolean(clip.segments);
  for (const [i, text] of (clip.references || []).entries()) {
    const line = element("p");
    if (i === 0) line.append(element("span", "says", clip.references.length > 1 ? "references" : "reference"));
    line.append(element("span", "reference", text));
    line.lastChild.dir = "auto";
    part("references").append(line);
  }
  if (clip.unseen) part("references").append(element("p", "says", `and ${clip.unseen} more`));
  part("references").hidden = !clip.references;
  tell("template-name", clip.template || "");
  tell("read-name", clip.read === undefined ? "" : clip.read || NO_TEMPLATE);
  tell("source", clip.source || "");
  tell("error", clip.error ? `No caption: ${clip.error}` : "");
  tell("warning", clip.warning || "");
  tell("change", clip.change ? CHANGES[clip.change].join(" ") : "");
  if (clip.change) part("change").classList.add(clip.change);
  tell("other-line", clip.other ?? (clip.change ? "the same caption" : ""));
  if (clip.change) part("other-line").firstChild.textContent = `the other run's, score ${clip.other_score.toFixed(2)}`;
  for (const [text, address] of clip.files || []) part("files").append(Object.assign(element("a", "", text), { href: address }), " ");
  part("files").hidden = !clip.files;
  card.setAttribute("aria-label", `Clip ${clip.id}` + (clip.outcome === "unscored" ? "" : `, ${word}`));
  addPictures(card);
  part("blank").textContent = card.pictures.size ? "" : "No video";
  if (card.pictures.size) addVideo(card);
  if (clip.segments) addTimeline(card);
  return card;
}

function decoded(address) {  // a file's name may hold bytes that are no UTF-8
  try { return decodeURIComponent(address); } catch { return address; }
}

// The clip, and the same with what is drawn over it: one player shows one of them.
function addPictures(card) {
  const { video, overlays } = card.clip, group = card.querySelector(".pictures");
  card.pictures = new Map([...(video ? [["clip", video]] : []), ...(overlays || [])]);
  card.picture = usualPicture(card);
  group.hidden = card.pictures.size < 2;
  for (const name of card.pictures.keys()) {
    const button = Object.assign(element("button", "", name), { type: "button", value: name });
    button.setAttribute("aria-pressed", String(name === card.picture));
    button.addEventListener("click", () => show(card, name));
    group.append(button);
  }
}

function usualPicture(card) {
  const [first, ...others] = card.pictures.keys();
  return $("attention").checked ? others.find((name) => name === "attention") ?? others[0] ?? first : first;
}

function addVideo(card) {
  const video = element("video");
  Object.assign(video, { muted: true, loop: true, playsInline: true, preload: "metadata", controls: Boolean(card.clip.segments), defaultPlaybackRate: Number($("speed").value) });
  video.setAttribute("aria-label", `Clip ${card.clip.id}`);
  video.tabIndex = -1;
  const blank = card.querySelector(".blank");
  video.addEventListener("error", () => {
    if (!video.hasAttribute("src")) return;
    video.hidden = true;
    blank.textContent = `The video is not there or cannot be played: ${decoded(card.pictures.get(card.picture))}`;
  });
  if (card.clip.segments) video.addEventListener("pause", () => { card.held = card.onScreen && !card.pausing; card.pausing = false; });
  else video.addEventListener("click", () => toggle(card));
  if (card.clip.segments) {  // a page opened from disk may not read the .vtt beside it
    const track = video.addTextTrack("captions", "Captions", "en");
    const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");  // a cue's text may hold tags
    for (const { start, end, caption } of card.clip.segments) track.addCue(new VTTCue(start, end, escaped(caption)));
    track.mode = "showing";
  }
  card.video = video;
  card.querySelector(".screen").append(video);
}

// ---- the timeline of a long video ----

function clock(seconds) {
  const whole = Math.floor(seconds), two = (n) => String(n).padStart(2, "0");
  const hours = Math.floor(whole / 3600), minutes = Math.floor(whole / 60) % 60;
  return (hours ? `${hours}:${two(minutes)}` : minutes) + ":" + two(whole % 60);
}

function addTimeline(card) {
  const { segments } = card.clip;
  const bar = element("div", "timeline"), list = element("ol", "segments"), cursor = element("i");
  const pairs = segments.map((segment) => {
    const go = () => {
      if (!card.video) return;
      load(card);
      card.video.currentTime = segment.start;
      mark();
      play(card);
    };
    const block = element("span"), item = element("li"), button = element("button");
    block.title = `${clock(segment.start)} ${segment.caption}`;
    button.type = "button";
    button.append(element("time", "", `${clock(segment.start)} – ${clock(segment.end)}`), element("span", "", segment.caption));
    button.lastChild.dir = "auto";
    block.addEventListener("click", go);
    button.addEventListener("click", go);
    item.append(button);
    list.append(item);
    bar.append(block);
    return [block, button];
  });
  const length = () => Math.max(card.video?.duration || 0, ...segments.map((s) => s.end)) || 1;
  const place = () => pairs.forEach(([block], i) => {
    block.style.left = `${100 * segments[i].start / length()}%`;
    block.style.width = `${100 * (segments[i].end - segments[i].start) / length()}%`;
  });
  let current = -1;
  function mark() {
    const now = card.video ? card.video.currentTime : -1;
    cursor.style.left = `${100 * now / length()}%`;
    const next = segments.findLastIndex((s) => s.start <= now && now < s.end);
    if (next === current) return;
    for (const i of [current, next]) {
      pairs[i]?.forEach((e) => e.classList.toggle("now", i === next));
      if (i === next) pairs[i]?.[1].setAttribute("aria-current", "true");
      else pairs[i]?.[1].removeAttribute("aria-current");
    }
    current = next;
    const row = pairs[next]?.[1];  // scroll the list, never the page
    if (row && !list.contains(document.activeElement)) list.scrollTop = row.offsetTop - list.offsetTop - list.clientHeight / 3;
  }
  bar.setAttribute("aria-hidden", "true");  // the list says the same in buttons
  list.setAttribute("aria-label", "Captions by time");
  bar.append(cursor);
  place();
  card.classList.add("long");
  card.querySelector(".player").append(bar);
  card.append(list);
  card.video?.addEventListener("loadedmetadata", place);
  for (const event of ["timeupdate", "seeked"]) card.video?.addEventListener(event, mark);
}

// ---- playing: only what is on screen is loaded ----

function load(card) {
  if (!card.video || card.video.hasAttribute("src")) return;
  card.video.src = card.pictures.get(card.picture);
  if (card.left) card.video.currentTime = card.left;
}

// The frame that is shown stays in sight, behind the player, until the other picture is there: nothing flickers.
function holdFrame({ video }) {
  const still = Object.assign(element("canvas"), { width: video.videoWidth, height: video.videoHeight });
  if (!still.width || video.readyState < 2) return;
  still.getContext("2d").drawImage(video, 0, 0);
  video.before(still);
  for (const event of ["seeked", "loadeddata", "error"]) video.addEventListener(event, () => still.remove(), { once: true });
}

// Another picture of the same moment: time, speed and whether it plays stay.
function show(card, name) {
  if (name === card.picture) return;
  const { video } = card, playing = !video.paused, loaded = video.hasAttribute("src");
  if (loaded && !video.error) card.left = video.currentTime;
  card.picture = name;
  for (const button of card.querySelector(".pictures").children) button.setAttribute("aria-pressed", String(button.value === name));
  video.hidden = false;
  card.querySelector(".blank").textContent = "";
  if (!loaded) return;
  holdFrame(card);
  video.removeAttribute("src");
  load(card);
  if (playing) play(card);
}

function unload(card) {
  state.playing.delete(card);
  if (!card.video || !card.video.hasAttribute("src") || card.video.error) return;
  card.left = card.video.currentTime;
  card.video.removeAttribute("src");
  card.video.load();
}

function play(card) {
  if (!card.video || card.video.hidden) return;
  load(card);
  state.playing.add(card);
  card.video.play().catch(() => state.playing.delete(card));  // taken off screen meanwhile, or not playable
}

function pause(card) {
  state.playing.delete(card);
  if (!card.video || card.video.paused) return;
  card.pausing = true;  // not by the player's own button
  card.video.pause();
}

function toggle(card) {
  if (!card.video) return;
  card.held = !card.video.paused;  // paused by hand: it does not start again by itself
  card.held ? pause(card) : play(card);
}

const near = new IntersectionObserver((seen) => {
  for (const { target, isIntersecting } of seen) isIntersecting ? load(target) : unload(target);
}, { rootMargin: "150px" });
const onScreen = new IntersectionObserver((seen) => {
  for (const { target, isIntersecting } of seen) {
    target.onScreen = isIntersecting;
    if (!isIntersecting) pause(target);
    else if ($("autoplay").checked && !target.held && state.playing.size < PLAYERS) play(target);
  }
}, { threshold: 0.35 });

const cardOf = (event) => event.target.closest?.(".card");
$("cards").addEventListener("pointerover", (event) => { const card = cardOf(event); if (card && !card.held && !card.clip.segments) play(card); });
$("cards").addEventListener("focusin", (event) => { const card = cardOf(event); if (card && !card.held && event.target === card) play(card); });
for (const event of ["pointerout", "focusout"]) {
  $("cards").addEventListener(event, (e) => {
    const card = cardOf(e);
    if (card && !card.contains(e.relatedTarget) && !$("autoplay").checked && !card.clip.segments) pause(card);
  });
}
$("cards").addEventListener("focusin", (event) => {
  if (!event.target.matches(".card") || state.clip === event.target.clip.id) return;
  state.clip = event.target.clip.id;
  writeView();
});
$("autoplay").checked = !matchMedia("(prefers-reduced-motion: reduce)").matches;
$("autoplay").addEventListener("change", () => {
  for (const card of $("cards").children) {
    card.held = false;
    if (card.onScreen && $("autoplay").checked && state.playing.size < PLAYERS) play(card);
    else pause(card);
  }
});

function showPictures() {
  for (const card of $("cards").children) if (card.video) show(card, usualPicture(card));
}

function setSpeed() {
  const speed = Number($("speed").value);
  for (const { video } of $("cards").children) if (video) video.playbackRate = video.defaultPlaybackRate = speed;
}

// ---- search, filters, sorting ----

function haystack(clip) {
  clip.haystack ??= [clip.id, clip.prediction, clip.other, clip.template, clip.source, clip.error, clip.warning, ...(clip.references || []), ...(clip.segments || []).map((s) => s.caption)]
    .filter(Boolean).join("\n").toLowerCase();
  return clip.haystack;
}

// Clips without the number come last in both directions; equal ones keep the file's order.
const has = (key) => (clip) => typeof clip[key] === "number";
const by = (key, sign) => (a, b) => has(key)(b) - has(key)(a) || (has(key)(a) ? sign * (a[key] - b[key]) : 0) || a.place - b.place;
const ORDERS = {
  low: by("score", 1), high: by("score", -1), lost: by("gain", 1), gained: by("gain", -1),
  seen: (a, b) => Boolean(b.overlays) - Boolean(a.overlays) || a.place - b.place,
  id: (a, b) => a.id.localeCompare(b.id, "en", { numeric: true }),
};

// Draws the list anew; returns the place in it of the clip that the address names, or -1.
function update() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const template = $("template").value, { outcome, change, read } = state;
  state.shown = clips.filter((clip) => (!outcome || clip.outcome === outcome) && (!change || clip.change === change)
    && (!template || clip.template === template) && (read === null || clip.read === read)
    && words.every((word) => haystack(clip).includes(word)));
  if ($("sort").value) state.shown.sort(ORDERS[$("sort").value]);
  for (const card of $("cards").children) {
    near.unobserve(card);
    onScreen.unobserve(card);
    unload(card);
  }
  $("cards").replaceChildren();
  const asked = state.clip ? state.shown.findIndex((clip) => clip.id === state.clip) : -1;
  state.from = state.drawn = asked < 0 ? 0 : asked - asked % BATCH;
  more();
  markEarlier();
  const all = clips.length.toLocaleString("en"), some = state.shown.length.toLocaleString("en");
  $("count").textContent = state.shown.length === clips.length ? `${all} ${clips.length === 1 ? "clip" : "clips"}` : `${some} of ${all} clips`;
  $("none").hidden = state.shown.length > 0 || clips.length === 0;
  for (const [id, value] of [["outcomes", outcome], ["changes", change]]) {
    for (const chip of $(id).children) chip.setAttribute("aria-pressed", String(chip.value === value));
  }
  $("read").hidden = read === null;
  $("read").textContent = `read as: ${read || NO_TEMPLATE} ✕`;
  return asked;
}

function changed() {  // by the user, who then looks at the list from its beginning
  state.clip = "";
  update();
  writeView();
}

function watch(cards) {
  for (const card of cards) {
    near.observe(card);
    onScreen.observe(card);
  }
}

function more() {
  const next = state.shown.slice(state.drawn, state.drawn + BATCH).map(makeCard);
  if (state.drawn === state.from && next.length) next[0].tabIndex = 0;  // one stop for Tab; j, k and arrows go on from there
  state.drawn += next.length;
  $("cards").append(...next);
  watch(next);
  endSeen.unobserve($("end"));  // observed anew: it may still be in sight
  if (state.drawn < state.shown.length) endSeen.observe($("end"));
}
const endSeen = new IntersectionObserver((seen) => { if (seen.at(-1).isIntersecting) more(); }, { rootMargin: "1200px" });

// A shared clip may stand far down the list: cards before its batch are made on demand. Returns how many.
function earlier() {
  const from = Math.max(0, state.from - BATCH), before = state.shown.slice(from, state.from).map(makeCard);
  state.from = from;
  $("cards").prepend(...before);
  watch(before);
  markEarlier();
  return before.length;
}

function markEarlier() {
  $("earlier").hidden = state.from === 0;
  $("earlier").textContent = `Earlier clips (${state.from.toLocaleString("en")})`;
}

function counted(key) {
  const counts = new Map();
  for (const clip of clips) if (clip[key]) counts.set(clip[key], (counts.get(clip[key]) || 0) + 1);
  return counts;
}

function addChips(id, key, every, words, counts) {
  for (const [value, [sign, word]] of Object.entries({ "": ["", every], ...words })) {
    if (value && !counts.has(value)) continue;
    const chip = element("button", value, value ? `${sign} ${word} ${counts.get(value).toLocaleString("en")}` : every);
    Object.assign(chip, { type: "button", value });
    chip.addEventListener("click", () => { state[key] = value; changed(); });
    $(id).append(chip);
  }
}

function addFilters() {
  const outcomes = counted("outcome"), changes = counted("change");
  const templates = [...counted("template")].sort((a, b) => a[0].localeCompare(b[0], "en"));
  if (outcomes.size > 1 || !outcomes.has("unscored")) addChips("outcomes", "outcome", `all ${clips.length.toLocaleString("en")}`, OUTCOMES, outcomes);
  if (changes.size) addChips("changes", "change", "any change", CHANGES, changes);
  for (const [name, count] of templates) $("template").append(Object.assign(element("option", "", `${name} (${count.toLocaleString("en")})`), { value: name }));
  $("template").hidden = templates.length === 0;
  const usable = { low: clips.some(has("score")), high: clips.some(has("score")), lost: changes.size, gained: changes.size, seen: clips.some((clip) => clip.overlays) };
  for (const option of [...$("sort").options]) if (option.value in usable && !usable[option.value]) option.remove();
  $("by-template").hidden = templates.length < 2 || !["exact", "template", "wrong"].some((name) => outcomes.has(name));
  $("attention-label").hidden = $("attention-key").hidden = !clips.some((clip) => clip.overlays);
}

function only(template, read = null) {  // the clips that a row of a table counts
  Object.assign(state, { outcome: "", change: "", read });
  $("search").value = "";
  $("template").value = template;
  changed();
  $("gallery").scrollIntoView();
}

$("by-template").addEventListener("toggle", () => {
  const body = $("by-template").querySelector("tbody");
  if (body.children.length) return;
  const rows = new Map();
  for (const clip of clips) if (clip.template) {
    if (!rows.has(clip.template)) rows.set(clip.template, { name: clip.template, total: 0, exact: 0, template: 0, wrong: 0 });
    const row = rows.get(clip.template);
    row.total += 1;
    if (clip.outcome in row) row[clip.outcome] += 1;
  }
  const right = (row) => (row.exact + row.template) / row.total;
  const worst = (a, b) => a.exact / a.total - b.exact / b.total || right(a) - right(b) || b.total - a.total;
  for (const row of [...rows.values()].sort(worst)) {
    const line = element("tr"), first = element("td"), button = element("button", "", row.name), mix = element("td"), bar = element("div", "mix");
    button.type = "button";
    button.addEventListener("click", () => only(row.name));
    for (const outcome of ["exact", "template", "wrong"]) if (row[outcome]) {
      const piece = element("i", outcome);
      piece.style.flex = String(row[outcome]);
      bar.append(piece);
    }
    bar.title = `exact ${row.exact}, same template ${row.template}, wrong ${row.wrong}`;
    bar.setAttribute("role", "img");
    bar.setAttribute("aria-label", bar.title);
    first.append(button);
    mix.append(bar);
    const shares = [row.exact / row.total, right(row)].map((share) => `${Math.round(100 * share)} %`);
    line.append(first, mix, ...[...shares, row.total.toLocaleString("en")].map((text) => element("td", "value", text)));
    body.append(line);
  }
});

for (const button of document.querySelectorAll("#confused button")) {
  button.addEventListener("click", () => only(button.dataset.meant, button.dataset.read));
}
$("search").addEventListener("input", changed);
for (const id of ["template", "sort"]) $(id).addEventListener("change", changed);
$("read").addEventListener("click", () => { state.read = null; changed(); });
$("earlier").addEventListener("click", earlier);
$("reset").addEventListener("click", () => {
  Object.assign(state, { outcome: "", change: "", read: null });
  $("search").value = $("template").value = "";
  changed();
  $("search").focus();
});
$("speed").addEventListener("change", () => { setSpeed(); writeView(); });
$("attention").addEventListener("change", () => { showPictures(); writeView(); });

// ---- the view in the address: a link shares what one sees ----

function viewAddress(clip) {
  const view = new URLSearchParams();
  const put = (key, value, usual) => { if (value !== usual) view.set(key, value); };
  put("q", $("search").value.trim(), "");
  for (const id of ["template", "sort"]) put(id, $(id).value, "");
  for (const key of ["outcome", "change"]) put(key, state[key], "");
  put("read", state.read, null);
  put("speed", $("speed").value, "1");
  put("attention", Number($("attention").checked), 0);
  put("clip", clip, "");
  return String(view) ? `#${view}` : location.href.split("#")[0];
}

let writing = 0;
function writeView() {
  clearTimeout(writing);  // Safari allows a hundred changes in half a minute
  writing = setTimeout(() => history.replaceState(null, "", viewAddress(state.clip)), 200);
}

function readView() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const known = (key, choices, usual) => [...choices].some(({ value }) => value === asked.get(key)) ? asked.get(key) : usual;
  clearTimeout(writing);
  $("search").value = asked.get("q") ?? "";
  for (const [id, usual] of [["template", ""], ["sort", ""], ["speed", "1"]]) $(id).value = known(id, $(id).options, usual);
  state.outcome = known("outcome", $("outcomes").children, "");
  state.change = known("change", $("changes").children, "");
  state.read = asked.get("read");
  state.clip = asked.get("clip") ?? "";
  $("attention").checked = asked.get("attention") === "1" && !$("attention-label").hidden;
  const place = update();
  if (place >= 0) focusCard(place - state.from, "center");
  else if (location.hash) $("gallery").scrollIntoView();
}
addEventListener("hashchange", readView);

// ---- keyboard ----

function focusCard(index, block = "nearest") {
  while (index < 0 && state.from > 0) index += earlier();
  const all = $("cards").children;
  while (index >= all.length && state.drawn < state.shown.length) more();
  const card = all[Math.max(0, Math.min(index, all.length - 1))];
  if (!card) return;
  $("cards").querySelector('.card[tabindex="0"]')?.setAttribute("tabindex", "-1");
  card.tabIndex = 0;
  card.focus({ preventScroll: true });
  card.scrollIntoView({ block });
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const at = event.target instanceof Element ? event.target : document.body;
  const typing = at.closest("input:not([type=checkbox]), select, textarea");
  if (event.key === "Escape" && at === $("search")) $("search").blur();
  if (event.key === "Enter" && at === $("search")) { focusCard(0); event.preventDefault(); }
  if (typing) return;
  if (event.key === "/") { $("search").focus(); $("search").select(); event.preventDefault(); return; }
  const card = at.closest(".card"), all = [...$("cards").children], here = all.indexOf(card);
  const across = getComputedStyle($("cards")).gridTemplateColumns.split(" ").length;
  const moves = { j: 1, k: -1, ...(card === at && { ArrowRight: 1, ArrowLeft: -1, ArrowDown: across, ArrowUp: -across }) };
  if (event.key in moves) { focusCard(here < 0 ? 0 : here + moves[event.key]); event.preventDefault(); }
  if (event.key === "<" || event.key === ">") {
    const step = event.key === "<" ? -1 : 1, { length } = $("speed").options;
    $("speed").selectedIndex = Math.max(0, Math.min(length - 1, $("speed").selectedIndex + step));
    $("speed").dispatchEvent(new Event("change"));
  }
  if (event.key === "a" && card?.video) {
    const names = [...card.pictures.keys()];
    show(card, names[(names.indexOf(card.picture) + 1) % names.length]);
  }
  if (card && card === at && (event.key === "Enter" || event.key === " ")) { toggle(card); event.preventDefault(); }
});

if (matchMedia("(max-width: 700px)").matches) $("numbers")?.removeAttribute("open");  // the clips come first
addFilters();
readView();
