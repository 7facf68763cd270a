"""The sample's world: what its clips show, how they are drawn, and how their captions are put in other words.

Coloured shapes move, and only their motion tells the action: where a time-reversed clip shows another action of
the list, the two actions share all their frames, in the other order. The words, colours and outlines are in world.json:

    motions     the limits between which a clip's seed draws its places, sizes and times
    shapes      the parts that one is drawn of: outline, which of its two colours, corners in units of its radius
    actions     SSv2's template: what someone does, in two forms, and what is done to the thing
    opposites   what a clip shows when it is played backwards, for the actions that have such an opposite
    sentences   other ways to say a caption: each clip gets some of each kind, so the label stays the most likely
"""

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, cycle, islice, permutations, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

WORLD = json.loads(Path(__file__).with_name("world.json").read_text(encoding="utf-8"))
COLOURS = {name: tuple(colour) for name, colour in WORLD["colours"].items()}
SHAPES = tuple(WORLD["shapes"])
ACTIONS: dict[str, dict[str, str]] = WORLD["actions"]
OPPOSITES: dict[str, str] = WORLD["opposites"]
FORWARDS = {backwards: forwards for forwards, backwards in OPPOSITES.items()}
WIDTH, HEIGHT = 112, 84
Thing = tuple[str, str]  # (colour, shape)
Point = tuple[float, float]  # (x, y) in units of the frame's height, from its middle, y downwards


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
        return self.template.replace("[something]", "{}").format(*self.placeholders)

    @property
    def length(self) -> int:
        """How many frames its file holds."""
        return random.Random(f"length {self.seed}").randint(30, 42)


def paraphrases(clip: Clip) -> list[str]:
    """Seven other ways to say a clip's caption, drawn by its seed."""
    rng = random.Random(f"paraphrases {clip.seed}")

    def say(text: str, article: str = "a", **words: str) -> str:
        things = (f"{article} {name}" for name in clip.placeholders)
        return text.format(**words, **dict(zip("ab", things, strict=False)))

    words = {"first": clip.placeholders[0], **{form: say(text) for form, text in ACTIONS[clip.template].items()}}
    texts = [f"{clip.caption.lower()} {ending}" for ending in rng.sample(WORLD["endings"], 2)]
    texts.append(say(ACTIONS[clip.template]["doing"], rng.choice(WORLD["articles"])))
    return texts + [say(sentence, **words) for sentence in rng.sample(WORLD["sentences"], 4)]


class Scene(NamedTuple):
    """What one moment of a clip shows."""

    things: list[tuple[Thing, float, float, float]]  # with x, y and radius, from back to front; the last one moves
    zoom: float
    hand: Point | None


def scene(clip: Clip, time: float) -> Scene:
    """What a clip shows at a time in [0, 1]; its seed draws the places, sizes and pace."""
    if clip.template in FORWARDS:
        return scene(replace(clip, template=FORWARDS[clip.template]), 1 - time)
    rng = random.Random(f"stage {clip.seed}")
    smooth, held = rng.random() < 0.4, rng.random() < 0.5
    drawn = {"start": rng.uniform(0, 0.2), "end": rng.uniform(0.8, 1), "zoom": rng.uniform(0.85, 1.15)}
    drawn |= {name: rng.uniform(*limits) for name, limits in WORLD["motions"][clip.template].items()}
    d, verb = SimpleNamespace(**drawn), clip.template.split()[0]
    done = _share(time, d.start, d.end, smooth)
    if verb == "Dropping":
        done = _share(time, d.start, d.start + 0.25, False) ** 2
    still, begin, finish = _places(clip.template, d)
    x, y = (a + (b - a) * done for a, b in zip(begin, finish, strict=True))
    one, *others = clip.things if verb != "Covering" else reversed(clip.things)
    things = [*((other, *still, d.other) for other in others), (one, x, y, d.radius)]
    if verb == "Approaching":
        return Scene(things, d.far * d.growth**done, None)
    hand = (x, y - d.radius) if held else None  # half of the clips show a hand on what moves
    if verb in ("Picking", "Pretending"):  # the hand comes, and goes with the thing or, pretending, without it
        hand = d.x, d.y - d.radius - d.height * (1 - _share(time, 0, d.touch, smooth) + done)
    return Scene(things, d.zoom, hand)


def _share(time: float, start: float, end: float, smooth: bool) -> float:
    """How much is done, from 0 to 1. It is symmetric: played backwards, it could be another clip's."""
    x = min(max((time - start) / (end - start), 0), 1)
    return x * x * (3 - 2 * x) if smooth else x


def _places(template: str, d: SimpleNamespace) -> tuple[Point, Point, Point]:
    """Where the thing that stays is, and where the one that moves starts and ends."""
    still = d.x, d.y
    match template:
        case "Covering [something] with [something]":
            return still, (d.x + d.far * math.cos(d.angle), d.y - 0.7 * d.far * math.sin(d.angle)), still
        case "Dropping [something] onto [something]":
            return still, (d.x, d.top), (d.x, d.y - 0.9 * (d.radius + d.other))
        case "Moving [something] closer to [something]":  # the middle of their places is about (x, y)
            angle = math.radians(d.angle) + (math.pi if d.side < 0 else 0)
            along, across, near = math.cos(angle), math.sin(angle), (d.radius + d.other) * d.near
            x, y = d.x - along * (near + d.far) / 4, d.y - across * (near + d.far) / 4
            return (x, y), (x + along * d.far, y + across * d.far), (x + along * near, y + across * near)
        case "Moving [something] up":
            return still, (d.x - d.drift, d.y + d.half), (d.x + d.drift, d.y - d.half)
        case "Picking [something] up":
            return still, still, (d.x, d.y - d.height)
        case "Pushing [something] from left to right":
            return still, (d.x - d.half, d.y - d.drift), (d.x + d.half, d.y + d.drift)
    return still, still, still


def render_clip(clip: Clip, width: int = WIDTH, height: int = HEIGHT, frames: int | list[float] = 36) -> np.ndarray:
    """Draw one clip of so many frames, or only those of these times in [0, 1]: uint8 (frames, height, width, 3)."""
    times = [index / max(frames - 1, 1) for index in range(frames)] if isinstance(frames, int) else frames
    rng = random.Random(f"room {clip.seed}")
    wall, skin = tuple(rng.choice(WORLD["walls"])), tuple(rng.choice(WORLD["skins"]))
    # Faint marks on the wall: without them a camera that comes closer would be a thing that grows.
    marks = [(rng.uniform(-1.1, 1.1), rng.uniform(-0.9, 0.9), rng.uniform(0.05, 0.12)) for _ in range(8)]
    out = np.empty((len(times), height, width, 3), np.uint8)
    for index, time in enumerate(times):
        image = Image.new("RGB", (2 * width, 2 * height), wall)  # twice the size, then reduced: smooth edges
        _draw_scene(ImageDraw.Draw(image), scene(clip, time), marks, wall, skin)
        out[index] = np.asarray(image.reduce(2))
    return out


def _draw_scene(draw: ImageDraw.ImageDraw, shown: Scene, marks: list, wall: tuple, skin: tuple) -> None:
    width, height = draw.im.size
    scale = height * shown.zoom

    def at(x: float, y: float) -> Point:
        return width // 2 + x * scale, height // 2 + y * scale

    for x, y, size in marks:
        corners = *at(x - size, y - size / 3), *at(x + size, y + size / 3)
        draw.rectangle(corners, fill=tuple(value - 22 for value in wall))
    for thing, x, y, radius in shown.things:
        _draw_thing(draw, thing, at(x, y), radius * scale)
    if shown.hand is not None:
        (x, y), reach = at(*shown.hand), 0.065 * scale
        draw.line((x + 2 * reach, -reach, x, y), fill=skin, width=max(round(1.2 * reach), 1))
        draw.circle((x, y), reach, fill=skin)


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, middle: Point, radius: float) -> None:
    """One thing with a mark of its own: at a few pixels, outlines alone cannot be told apart."""
    colour, shape = COLOURS[thing[0]], WORLD["shapes"][thing[1]]
    for outline, which, corners in shape["parts"]:
        places = [middle[i % 2] + corner * radius for i, corner in enumerate(corners)]
        fill = colour if which == "colour" else tuple(shape["mark"])
        if outline == "ring":  # a cup's handle
            draw.ellipse(places, outline=fill, width=max(round(0.25 * radius), 1))
        else:
            getattr(draw, outline)(places, fill=fill)


def boxes(clip: Clip) -> dict[str, Any]:
    """The bounding boxes of a clip's things, without the hand, in the form of labels/boxes.json."""
    frames = []
    for index in range(clip.length):
        shown, found = scene(clip, index / (clip.length - 1)), []
        for (_, shape), x, y, radius in shown.things:
            corners = np.concatenate([np.reshape(places, (-1, 2)) for *_, places in WORLD["shapes"][shape]["parts"]])
            ends = np.stack([corners.min(0), corners.max(0)]) * radius + (x, y)  # (2, 2) in units of the height
            pixels = ends * HEIGHT * shown.zoom + (WIDTH / 2, HEIGHT / 2)
            found.append(pixels.clip(0, (WIDTH, HEIGHT)).round(1).ravel().tolist())
        frames.append(found)
    return {"width": WIDTH, "height": HEIGHT, "frames": frames}


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
        pools = [(template, _pool(template, split, colours, rng)) for template in ACTIONS]
        chosen = [Clip(template, next(pool), next(seeds)) for template, pool in islice(cycle(pools), number)]
        rng.shuffle(chosen)
        clips[split] = {str(next(ids)): clip for clip in chosen}
    return clips


def _pool(template: str, split: str, colours: list[str], rng: random.Random) -> Iterator[tuple[Thing, ...]]:
    """What fills one action's placeholders in one split, in random order, again and again."""
    turn = list(ACTIONS).index(template)
    things = [
        (colours[(turn + i + step) % 6], shape)
        for step, (i, shape) in product(range(6), enumerate(SHAPES))
        if {0: "validation", 3: "test"}.get(step, "train") == split
    ]
    pool = list(permutations(sorted(things), template.count("[something]")))
    rng.shuffle(pool)
    return cycle(pool)
