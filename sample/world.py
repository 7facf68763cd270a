"""The sample's world: what its clips show, how they are drawn, and how their captions are put in other words.

Coloured shapes move, and only their motion tells the action: where a time-reversed clip shows another action of
the list, the two actions share their starts, their ends and every frame between, in the other order. A single
frame does not name the action. The words, colours and outlines are in world.json:

    motions     the limits between which a clip's seed draws its places, sizes and times
    shapes      the parts that one is drawn of: outline, which of its two colours, corners in units of its radius
    actions     SSv2's template: what someone does, in two forms, and what is done to the thing
    opposites   what a clip shows when it is played backwards. Covering, dropping and picking up have no opposite
                among these templates, and pretending to pick up is nearly its own
    sentences   other ways to say a caption. Each clip gets some of each kind, so that of all captions of an action
                the label is the most likely, word by word: what a greedy decoder ends up with
"""

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count, cycle, islice, permutations, product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

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
Things = tuple[Thing, ...]


@dataclass(frozen=True)
class Clip:
    """What one clip shows; `seed` draws everything that its caption does not say."""

    template: str
    things: Things
    seed: int = 0

    @property
    def placeholders(self) -> list[str]:
        """What fills the template's [something], in order."""
        return [" ".join(thing) for thing in self.things]

    @property
    def caption(self) -> str:
        """The template with its objects: `Moving red ball up`."""
        return self.template.replace("[something]", "{}").format(*self.placeholders)


def paraphrases(clip: Clip) -> list[str]:
    """Seven other ways to say a clip's caption, drawn by its seed."""
    rng = random.Random(f"paraphrases {clip.seed}")

    def named(article: str) -> dict[str, str]:
        return dict(zip("ab", (f"{article} {name}" for name in clip.placeholders), strict=False))

    forms = {form: text.format(**named("a")) for form, text in ACTIONS[clip.template].items()}
    texts = [f"{clip.caption.lower()} {ending}" for ending in rng.sample(WORLD["endings"], 2)]
    texts.append(ACTIONS[clip.template]["doing"].format(**named(rng.choice(WORLD["articles"]))))
    words = {"first": clip.placeholders[0], **named("a"), **forms}
    return texts + [sentence.format(**words) for sentence in rng.sample(WORLD["sentences"], 4)]


# Places are in units of the frame's height, from its middle, y downwards.
Placed = tuple[Thing, float, float, float]  # with x, y and radius
Pace = Callable[..., float]  # time to how much is done by then; `start` and `end` where they are not the clip's


class Scene(NamedTuple):
    """What one moment of a clip shows."""

    things: list[Placed]  # from back to front; the last one moves
    zoom: float | None = None
    hand: tuple[float, float] | None = None


def stage(clip: Clip) -> Callable[[float], Scene]:
    """Draw one clip's places, sizes and pace by its seed; returns time in [0, 1] -> the scene at that time."""
    if clip.template in FORWARDS:
        forwards = stage(replace(clip, template=FORWARDS[clip.template]))
        return lambda time: forwards(1 - time)
    rng = random.Random(f"stage {clip.seed}")
    smooth, held = rng.random() < 0.4, rng.random() < 0.5
    start, end, zoom = rng.uniform(0, 0.2), rng.uniform(0.8, 1), rng.uniform(0.85, 1.15)
    drawn = {name: rng.uniform(*limits) for name, limits in WORLD["motions"][clip.template].items()}

    def pace(time: float, start: float = start, end: float = end) -> float:
        """How much is done, from 0 to 1. It is symmetric: played backwards, it could be another clip's."""
        x = min(max((time - start) / (end - start), 0), 1)
        return x * x * (3 - 2 * x) if smooth else x

    def scene_at(time: float) -> Scene:
        scene = MOTIONS[clip.template](clip, SimpleNamespace(**drawn), pace, time)
        if scene.zoom:  # the camera moves
            return scene
        _, x, y, radius = scene.things[-1]
        hand = scene.hand or ((x, y - radius) if held else None)  # half of the clips show a hand on what moves
        return Scene(scene.things, zoom, hand)

    return scene_at


def _approach(clip: Clip, d: SimpleNamespace, pace: Pace, time: float) -> Scene:
    return Scene([(clip.things[0], d.x, d.y, d.radius)], zoom=d.far * d.growth ** pace(time))


def _pick(clip: Clip, d: SimpleNamespace, pace: Pace, time: float) -> Scene:
    """The hand comes, and goes with the thing or, pretending, without it."""
    above = d.height * (1 - pace(time, 0, d.touch) + pace(time, d.leave, 1))
    lifted = above if clip.template.startswith("Picking") and time > d.leave else 0
    return Scene([(clip.things[0], d.x, d.y - lifted, d.radius)], hand=(d.x, d.y - d.radius - above))


def _slide(clip: Clip, d: SimpleNamespace, pace: Pace, time: float) -> Scene:
    right, down = (d.drift, -d.half) if clip.template.endswith("up") else (d.half, d.drift)
    begin, finish = (d.x - right, d.y - down), (d.x + right, d.y + down)
    return Scene([(clip.things[0], *_between(begin, finish, pace(time)), d.radius)])


def _between(begin: tuple[float, float], finish: tuple[float, float], share: float) -> tuple[float, float]:
    return begin[0] + (finish[0] - begin[0]) * share, begin[1] + (finish[1] - begin[1]) * share


def _come_closer(clip: Clip, d: SimpleNamespace, pace: Pace, time: float) -> Scene:
    angle = math.radians(d.angle) + (math.pi if d.side < 0 else 0)
    along, across = math.cos(angle), math.sin(angle)
    near = (d.radius + d.other) * d.near
    x, y = d.x - along * (near + d.far) / 4, d.y - across * (near + d.far) / 4
    away = d.far + (near - d.far) * pace(time)
    one, other = clip.things
    return Scene([(other, x, y, d.other), (one, x + along * away, y + across * away, d.radius)])


def _drop(clip: Clip, d: SimpleNamespace, _pace: Pace, time: float) -> Scene:
    u = min(max((time - d.let_go) / 0.25, 0), 1)
    fall = d.floor - 0.9 * (d.radius + d.other) - d.top
    one, other = clip.things
    return Scene([(other, d.x, d.floor, d.other), (one, d.x, d.top + fall * u * u, d.radius)])


def _cover(clip: Clip, d: SimpleNamespace, pace: Pace, time: float) -> Scene:
    begin = d.x + d.far * math.cos(d.angle), d.y - 0.7 * d.far * math.sin(d.angle)
    one, other = clip.things
    return Scene([(one, d.x, d.y, d.small), (other, *_between(begin, (d.x, d.y), pace(time)), d.big)])


MOTIONS = {
    "Approaching [something] with your camera": _approach,
    "Covering [something] with [something]": _cover,
    "Dropping [something] onto [something]": _drop,
    "Moving [something] closer to [something]": _come_closer,
    "Moving [something] up": _slide,
    "Picking [something] up": _pick,
    "Pretending to pick [something] up": _pick,
    "Pushing [something] from left to right": _slide,
}


def render_clip(clip: Clip, width: int = WIDTH, height: int = HEIGHT, frames: int = 36) -> np.ndarray:
    """Draw one clip: uint8 (frames, height, width, 3)."""
    scene_at = stage(clip)
    rng = random.Random(f"room {clip.seed}")
    wall, skin = tuple(rng.choice(WORLD["walls"])), tuple(rng.choice(WORLD["skins"]))
    # Faint marks on the wall: without them a camera that comes closer would be a thing that grows.
    marks = [(rng.uniform(-1.1, 1.1), rng.uniform(-0.9, 0.9), rng.uniform(0.05, 0.12)) for _ in range(8)]
    out = np.empty((frames, height, width, 3), np.uint8)
    for index in range(frames):
        image = Image.new("RGB", (2 * width, 2 * height), wall)  # twice the size, then reduced: smooth edges
        _draw_scene(ImageDraw.Draw(image), scene_at(index / max(frames - 1, 1)), marks, wall, skin)
        out[index] = np.asarray(image.reduce(2))
    return out


def _draw_scene(draw: ImageDraw.ImageDraw, scene: Scene, marks: list, wall: tuple, skin: tuple) -> None:
    things, zoom, hand = scene
    width, height = draw.im.size
    scale = height * zoom

    def at(x: float, y: float) -> tuple[float, float]:
        return width // 2 + x * scale, height // 2 + y * scale

    for x, y, size in marks:
        corners = *at(x - size, y - size / 3), *at(x + size, y + size / 3)
        draw.rectangle(corners, fill=tuple(value - 22 for value in wall))
    for (colour, shape), x, y, radius in things:
        _draw_thing(draw, colour, shape, *at(x, y), radius * scale)
    if hand is not None:
        (x, y), reach = at(*hand), 0.065 * scale
        draw.line((x + 2 * reach, -reach, x, y), fill=skin, width=max(round(1.2 * reach), 1))
        draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=skin)


def _draw_thing(draw: ImageDraw.ImageDraw, colour: str, shape: str, x: float, y: float, radius: float) -> None:
    """One thing with a mark of its own: at a few pixels, outlines alone cannot be told apart."""
    colours = {"colour": COLOURS[colour], "mark": tuple(WORLD["shapes"][shape]["mark"])}
    for outline, which, corners in WORLD["shapes"][shape]["parts"]:
        places = [(x, y)[i % 2] + corner * radius for i, corner in enumerate(corners)]
        if outline == "ring":  # a cup's handle
            draw.ellipse(places, outline=colours[which], width=max(round(0.25 * radius), 1))
        else:
            getattr(draw, outline)(places, fill=colours[which])


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
        pools = [(template, _pool(template, turn, split, colours, rng)) for turn, template in enumerate(ACTIONS)]
        chosen = [Clip(template, next(pool), next(seeds)) for template, pool in islice(cycle(pools), number)]
        rng.shuffle(chosen)
        clips[split] = {str(next(ids)): clip for clip in chosen}
    return clips


def _pool(template: str, turn: int, split: str, colours: list[str], rng: random.Random) -> Iterator[Things]:
    """What fills one action's placeholders in one split, in random order, again and again."""
    held = {
        name: {(colours[(turn + i + first) % 6], shape) for i, shape in enumerate(SHAPES)}
        for name, first in (("validation", 0), ("test", 3))
    }
    held["train"] = set(product(COLOURS, SHAPES)) - held["validation"] - held["test"]
    pool = list(permutations(sorted(held[split]), template.count("[something]")))
    rng.shuffle(pool)
    return cycle(pool)
