"""The sample's world: what its clips show, how they are drawn, and how their captions are put in other words.

Coloured shapes move, and only their motion tells the action: where a time-reversed clip shows another action of
the list, the two actions share their starts, their ends and every frame between, in the other order. A single
frame does not name the action.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count, permutations

import numpy as np
from PIL import Image, ImageDraw

WIDTH, HEIGHT = 112, 84
COLOURS = {
    "red": (205, 30, 35),
    "green": (25, 145, 50),
    "blue": (35, 75, 215),
    "yellow": (240, 205, 25),
    "purple": (140, 45, 165),
    "black": (30, 30, 35),
}
MARKS = {"ball": (250, 250, 250), "box": (255, 140, 20), "cone": (255, 150, 200), "cup": (60, 215, 225)}
SHAPES = tuple(MARKS)
WALLS = ((214, 208, 198), (196, 206, 212), (205, 214, 200), (222, 214, 214), (188, 190, 200))
SKINS = ((236, 188, 150), (198, 140, 100), (150, 98, 66), (110, 70, 48))


# SSv2's template: what someone does, in two forms, and what is done to the thing; paraphrases are built of them.
ACTIONS = {
    "Approaching [something] with your camera": (
        "approaching {a} with a camera",
        "approaches {a} with a camera",
        "approached with a camera",
    ),
    "Covering [something] with [something]": ("covering {a} with {b}", "covers {a} with {b}", "covered with {b}"),
    "Dropping [something] onto [something]": ("dropping {a} onto {b}", "drops {a} onto {b}", "dropped onto {b}"),
    "Moving [something] away from [something]": (
        "moving {a} away from {b}",
        "moves {a} away from {b}",
        "moved away from {b}",
    ),
    "Moving [something] closer to [something]": (
        "moving {a} closer to {b}",
        "moves {a} closer to {b}",
        "moved closer to {b}",
    ),
    "Moving [something] down": ("moving {a} down", "moves {a} down", "moved down"),
    "Moving [something] up": ("moving {a} up", "moves {a} up", "moved up"),
    "Moving away from [something] with your camera": (
        "moving away from {a} with a camera",
        "moves away from {a} with a camera",
        "left behind by a camera moving away",
    ),
    "Picking [something] up": ("picking {a} up", "picks {a} up", "picked up"),
    "Pretending to pick [something] up": (
        "pretending to pick {a} up",
        "pretends to pick {a} up",
        "picked up, but only pretending",
    ),
    "Pushing [something] from left to right": (
        "pushing {a} from left to right",
        "pushes {a} from left to right",
        "pushed from left to right",
    ),
    "Pushing [something] from right to left": (
        "pushing {a} from right to left",
        "pushes {a} from right to left",
        "pushed from right to left",
    ),
}
# What a clip of the first shows when it is played backwards, and the other way round. Covering, dropping and picking
# up have no opposite among the templates here, and pretending to pick up is nearly its own.
OPPOSITES = {
    "Moving [something] up": "Moving [something] down",
    "Pushing [something] from left to right": "Pushing [something] from right to left",
    "Moving [something] closer to [something]": "Moving [something] away from [something]",
    "Approaching [something] with your camera": "Moving away from [something] with your camera",
}
# Other ways to say it. Each clip gets some of each kind, so that of all that is said of an action the label is the
# most likely, word by word: what a greedy decoder ends up with.
SENTENCES = (
    "someone {does}",
    "{a} is {done}",
    "the {first} is being {done}",
    "we see {a} being {done}",
    "here {a} gets {done}",
    "one person is {doing}",
    "you can watch {a} being {done}",
    "{first} being {done}",
    "this shows {a} being {done}",
    "person {doing}",
    "it is {a} that is {done}",
    "clip of {a} being {done}",
    "an unseen hand {does}",
    "they are {doing}",
    "in this clip {a} is {done}",
    "now {a} is {done}",
    "look at {a} being {done}",
    "for a moment {a} is {done}",
)
ENDINGS = ("once", "in this clip", "on the screen", "as we watch", "before a plain wall", "during this video", "for us")
ARTICLES = ("a", "the", "one", "some")
Thing = tuple[str, str]  # (colour, shape)


@dataclass(frozen=True)
class Clip:
    """What one clip shows; `seed` draws everything that its caption does not say."""

    template: str
    things: tuple[Thing, ...]
    seed: int = 0

    @property
    def placeholders(self) -> list[str]:
        """What fills the template's [something], in order."""
        return [" ".join(thing) for thing in self.things]

    @property
    def caption(self) -> str:
        """The template with its objects: `Moving red ball up`."""
        parts = self.template.split("[something]")
        return "".join(part + filler for part, filler in zip(parts, self.placeholders + [""], strict=True))


def paraphrases(clip: Clip) -> list[str]:
    """Seven other ways to say a clip's caption, drawn by its seed."""
    rng = random.Random(f"paraphrases {clip.seed}")

    def named(article: str) -> dict[str, str]:
        return dict(zip("ab", (f"{article} {name}" for name in clip.placeholders), strict=False))

    forms = dict(zip(("doing", "does", "done"), (f.format(**named("a")) for f in ACTIONS[clip.template]), strict=True))
    said = [f"{clip.caption.lower()} {ending}" for ending in rng.sample(ENDINGS, 2)]
    said.append(ACTIONS[clip.template][0].format(**named(rng.choice(ARTICLES))))
    for text in rng.sample(SENTENCES, 4):
        said.append(text.format(first=clip.placeholders[0], **named("a"), **forms))
    return said


# --- what a clip shows ---------------------------------------------------------------------------------------------
# Places are in units of the frame's height, from its middle, y downwards. A scene is what one moment shows:
# (zoom, [(thing, x, y, radius)...] from back to front, (x, y) of the hand or None).

Scene = tuple[float, list[tuple[Thing, float, float, float]], tuple[float, float] | None]
Draw = Callable[[float, float], float]  # a number between two, from the clip's seed
Pace = Callable[[float, float, float], float]


def stage(clip: Clip) -> Callable[[float], Scene]:
    """Draw one clip's places, sizes and pace by its seed; returns time in [0, 1] -> the scene at that time."""
    for forwards, backwards in OPPOSITES.items():
        if clip.template == backwards:
            scene_at = stage(replace(clip, template=forwards))
            return lambda time: scene_at(1 - time)
    rng = random.Random(f"stage {clip.seed}")
    draw, smooth, held = rng.uniform, rng.random() < 0.4, rng.random() < 0.5
    start, end, zoom = draw(0, 0.2), draw(0.8, 1), draw(0.85, 1.15)

    def pace(time: float, start: float = start, end: float = end) -> float:
        """How much is done, from 0 to 1. It is symmetric: played backwards, it could be another clip's."""
        x = min(max((time - start) / (end - start), 0), 1)
        return x * x * (3 - 2 * x) if smooth else x

    if clip.template == "Approaching [something] with your camera":
        return _approach(clip.things[0], draw, pace)
    if clip.template.endswith("pick [something] up") or clip.template.startswith("Picking"):
        return _pick(clip.things[0], draw, pace, zoom, lifts=clip.template.startswith("Picking"))
    things_at = {
        "Moving [something] up": _rise,
        "Pushing [something] from left to right": _push,
        "Moving [something] closer to [something]": _come_closer,
        "Dropping [something] onto [something]": _drop,
        "Covering [something] with [something]": _cover,
    }[clip.template](clip.things, draw, pace)

    def scene(time: float) -> Scene:
        *others, (thing, x, y, radius) = things_at(time)  # the last one moves, and half of the clips show a hand on it
        return zoom, [*others, (thing, x, y, radius)], (x, y - radius) if held else None

    return scene


def _approach(thing: Thing, draw: Draw, pace: Pace) -> Callable[[float], Scene]:
    x, y, radius, far, growth = draw(-0.11, 0.11), draw(-0.06, 0.06), draw(0.155, 0.19), draw(0.7, 0.95), draw(1.6, 2.1)
    return lambda time: (far * growth ** pace(time), [(thing, x, y, radius)], None)


def _pick(thing: Thing, draw: Draw, pace: Pace, zoom: float, lifts: bool) -> Callable[[float], Scene]:
    x, y, radius, height = draw(-0.22, 0.22), draw(0.05, 0.25), draw(0.155, 0.19), draw(0.28, 0.4)
    touch, leave = draw(0.32, 0.42), draw(0.5, 0.6)

    def scene(time: float) -> Scene:  # the hand comes, and goes with the thing or without it
        above = height * (1 - pace(time, 0, touch) + pace(time, leave, 1))
        lifted = above if lifts and time > leave else 0
        return zoom, [(thing, x, y - lifted, radius)], (x, y - radius - above)

    return scene


def _between(begin: tuple[float, float], finish: tuple[float, float], share: float) -> tuple[float, float]:
    return begin[0] + (finish[0] - begin[0]) * share, begin[1] + (finish[1] - begin[1]) * share


def _rise(things: tuple[Thing, ...], draw: Draw, pace: Pace) -> Callable[[float], list]:
    x, y, radius = draw(-0.22, 0.22), draw(-0.12, 0.12), draw(0.155, 0.19)
    half, drift = draw(0.13, 0.22), draw(-0.05, 0.05)
    begin, finish = (x - drift, y + half), (x + drift, y - half)
    return lambda time: [(things[0], *_between(begin, finish, pace(time)), radius)]


def _push(things: tuple[Thing, ...], draw: Draw, pace: Pace) -> Callable[[float], list]:
    x, y, radius = draw(-0.22, 0.22), draw(-0.12, 0.12), draw(0.155, 0.19)
    half, drift = draw(0.16, 0.28), draw(-0.05, 0.05)
    begin, finish = (x - half, y - drift), (x + half, y + drift)
    return lambda time: [(things[0], *_between(begin, finish, pace(time)), radius)]


def _come_closer(things: tuple[Thing, ...], draw: Draw, pace: Pace) -> Callable[[float], list]:
    radius, other = draw(0.155, 0.19), draw(0.155, 0.195)
    angle = math.radians(draw(-30, 30)) + (math.pi if draw(-1, 1) < 0 else 0)
    along, across = math.cos(angle), math.sin(angle)
    near, far = (radius + other) * draw(0.95, 1.1), draw(0.62, 0.8)
    x = draw(-0.08, 0.08) - along * (near + far) / 4
    y = draw(-0.06, 0.06) - across * (near + far) / 4

    def things_at(time: float) -> list:
        away = far + (near - far) * pace(time)
        return [(things[1], x, y, other), (things[0], x + along * away, y + across * away, radius)]

    return things_at


def _drop(things: tuple[Thing, ...], draw: Draw, pace: Pace) -> Callable[[float], list]:
    radius, other, x = draw(0.155, 0.19), draw(0.155, 0.195), draw(-0.22, 0.22)
    let_go, top, floor = draw(0.2, 0.45), draw(-0.34, -0.26), draw(0.2, 0.28)
    fall = floor - 0.9 * (radius + other) - top

    def things_at(time: float) -> list:
        u = min(max((time - let_go) / 0.25, 0), 1)
        return [(things[1], x, floor, other), (things[0], x, top + fall * u * u, radius)]

    return things_at


def _cover(things: tuple[Thing, ...], draw: Draw, pace: Pace) -> Callable[[float], list]:
    small, big = draw(0.13, 0.16), draw(0.175, 0.195)
    place, angle, far = (draw(-0.1, 0.1), draw(0, 0.15)), draw(0, math.pi), draw(0.5, 0.75)
    begin = place[0] + far * math.cos(angle), place[1] - 0.7 * far * math.sin(angle)
    return lambda time: [(things[0], *place, small), (things[1], *_between(begin, place, pace(time)), big)]


def render_clip(clip: Clip, width: int = WIDTH, height: int = HEIGHT, frames: int = 36) -> np.ndarray:
    """Draw one clip: uint8 (frames, height, width, 3)."""
    scene_at = stage(clip)
    rng = random.Random(f"room {clip.seed}")
    wall, skin = rng.choice(WALLS), rng.choice(SKINS)
    # Faint marks on the wall: without them a camera that comes closer would be a thing that grows.
    marks = [(rng.uniform(-1.1, 1.1), rng.uniform(-0.9, 0.9), rng.uniform(0.05, 0.12)) for _ in range(8)]
    shade = tuple(value - 22 for value in wall)
    out = np.empty((frames, height, width, 3), np.uint8)
    for index in range(frames):
        image = Image.new("RGB", (2 * width, 2 * height), wall)  # twice the size, then reduced: smooth edges
        draw = ImageDraw.Draw(image)
        zoom, things, hand = scene_at(index / max(frames - 1, 1))
        scale = 2 * height * zoom

        def at(x: float, y: float, scale: float = scale) -> tuple[float, float]:
            return width + x * scale, height + y * scale

        for x, y, size in marks:
            draw.rectangle((*at(x - size, y - size / 3), *at(x + size, y + size / 3)), fill=shade)
        for (colour, shape), x, y, radius in things:
            _draw_thing(draw, COLOURS[colour], shape, *at(x, y), radius * scale)
        if hand is not None:
            (x, y), reach = at(*hand), 0.065 * scale
            draw.line((x + 2 * reach, -reach, x, y), fill=skin, width=max(round(1.2 * reach), 1))
            draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=skin)
        out[index] = np.asarray(image.reduce(2))
    return out


def _draw_thing(draw: ImageDraw.ImageDraw, colour: tuple, shape: str, x: float, y: float, r: float) -> None:
    """One thing with a mark of its own: at a few pixels, outlines alone cannot be told apart."""
    mark = MARKS[shape]
    if shape == "ball":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        draw.ellipse((x - 0.45 * r, y - 0.45 * r, x + 0.45 * r, y + 0.45 * r), fill=mark)
    elif shape == "box":
        draw.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill=colour)
        draw.rectangle((x - 0.25 * r, y - 0.9 * r, x + 0.25 * r, y + 0.9 * r), fill=mark)
    elif shape == "cone":
        draw.polygon(((x, y - r), (x + r, y + 0.9 * r), (x - r, y + 0.9 * r)), fill=colour)
        draw.rectangle((x - 0.95 * r, y + 0.45 * r, x + 0.95 * r, y + 0.9 * r), fill=mark)
    else:  # a cup: a handle on one side and a rim
        draw.ellipse((x, y - 0.6 * r, x + 1.15 * r, y + 0.5 * r), outline=colour, width=max(round(0.25 * r), 1))
        draw.rectangle((x - 0.8 * r, y - 0.9 * r, x + 0.55 * r, y + 0.9 * r), fill=colour)
        draw.rectangle((x - 0.8 * r, y - 0.9 * r, x + 0.55 * r, y - 0.45 * r), fill=mark)


def choose_clips(counts: dict[str, int], seed: int) -> dict[str, dict[str, Clip]]:
    """The clips of each split by their ids: actions in turn, and for each action its own things for each split.

    Of the 24 things, an action shows 16 in training, 4 in validation and 4 in the test: what a split asks for is
    an action with things that training never showed in it, though it showed all of them in other actions.
    """
    rng = random.Random(f"clips {seed}")
    colours = list(COLOURS)
    rng.shuffle(colours)
    seeds = iter(rng.sample(range(10**9), sum(counts.values())))
    ids = count(1)
    clips = {}
    for split, number in counts.items():
        pools = []
        for turn, template in enumerate(ACTIONS):
            held = {
                "validation": {(colours[(turn + i) % 6], shape) for i, shape in enumerate(SHAPES)},
                "test": {(colours[(turn + i + 3) % 6], shape) for i, shape in enumerate(SHAPES)},
            }
            everything = {(colour, shape) for colour in COLOURS for shape in SHAPES}
            held["train"] = everything - held["validation"] - held["test"]
            pool = list(permutations(sorted(held[split]), template.count("[something]")))
            rng.shuffle(pool)
            pools.append((template, pool))
        chosen = []
        for index in range(number):
            template, pool = pools[index % len(pools)]
            chosen.append(Clip(template, pool[index // len(pools) % len(pool)], next(seeds)))
        rng.shuffle(chosen)
        clips[split] = {str(next(ids)): clip for clip in chosen}
    return clips
