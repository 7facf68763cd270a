"""The embedded sample: a small world in Something-Something V2's layout, and two tiny frozen models.

    python sample.py render --data data/sample      clips, labels, paraphrases
    python sample.py models --data data/sample      the two tiny models in sample/, trained again from scratch

Coloured shapes move, and only their motion tells the action: where a time-reversed clip shows another action of
the list, the two actions share their starts, their ends and every frame between, in the other order. A single
frame does not name the action. The world tests the bridge between the two models, not vision.
"""

import argparse
import math
import os
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import count, permutations
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

import files
from files import UserError

FPS = 12
WIDTH, HEIGHT = 112, 84
COLOURS = {
    "red": (205, 30, 35),
    "green": (25, 145, 50),
    "blue": (35, 75, 215),
    "yellow": (240, 205, 25),
    "purple": (140, 45, 165),
    "black": (30, 30, 35),
}
SHAPES = ("ball", "box", "cone", "cup")
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
# No two begin alike, and each clip gets a few: of all captions of an action, the label is the most frequent.
PARAPHRASES = (
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


def paraphrases(clip: Clip, number: int = 7) -> list[str]:
    """`number` other ways to say a clip's caption, drawn by its seed."""
    names = dict(zip("ab", (f"a {name}" for name in clip.placeholders), strict=False))
    forms = dict(zip(("doing", "does", "done"), (f.format(**names) for f in ACTIONS[clip.template]), strict=True))
    chosen = random.Random(f"paraphrases {clip.seed}").sample(PARAPHRASES, number)
    return [text.format(first=clip.placeholders[0], **names, **forms) for text in chosen]


# --- what a clip shows ---------------------------------------------------------------------------------------------
# Places are in units of the frame's height, from its middle, y downwards. A moment's scene is
# (zoom, [(thing, x, y, radius)...] from back to front, (x, y) of the hand or None).


def stage(clip: Clip) -> Callable[[float], tuple]:
    """Draw one clip's places, sizes and pace; returns time in [0, 1] -> the scene at that time."""
    rng = random.Random(f"stage {clip.seed}")
    between = rng.uniform
    # The waits before and after have one distribution and the pace is symmetric: reversed in time, it is the same.
    start, end = between(0, 0.2), 1 - between(0, 0.2)
    power = rng.choice((1, 1, 2))

    def pace(time: float, start: float = start, end: float = end) -> float:
        x = min(max((time - start) / (end - start), 0), 1)
        return x if power == 1 else x * x * (3 - 2 * x)

    forwards = clip.template not in OPPOSITES.values()  # the others are the same motion backwards
    radius, zoom, held = between(0.135, 0.17), between(0.85, 1.15), rng.random() < 0.5
    x, y = between(-0.22, 0.22), between(-0.12, 0.12)
    a = clip.things[0]
    b, other = (clip.things[1], between(0.135, 0.18)) if len(clip.things) > 1 else (None, 0)
    side = rng.choice((-1, 1))

    def path(begin: tuple, finish: tuple) -> Callable[[float], tuple]:  # a thing's way from one place to another
        return lambda u: (begin[0] + (finish[0] - begin[0]) * u, begin[1] + (finish[1] - begin[1]) * u)

    def grip(x: float, y: float, radius: float) -> tuple | None:
        return (x, y - 0.7 * radius) if held else None

    if clip.template in ("Moving [something] up", "Moving [something] down"):
        half, drift = between(0.13, 0.22), between(-0.05, 0.05)
        way = path((x - drift, y + half), (x + drift, y - half))
    elif clip.template.startswith("Pushing"):
        half, drift = between(0.16, 0.28), between(-0.05, 0.05)
        way = path((x - half, y - drift), (x + half, y + drift))
    elif clip.template.endswith("camera"):
        grown = between(1.6, 2.1)
        small = between(0.7, 0.95)

        def scene(time: float) -> tuple:
            u = pace(time) if forwards else 1 - pace(time)
            # Equal factors in equal times, as when a camera closes in at a steady pace for what it sees.
            return small * grown**u, [(a, x / 2, y / 2, radius)], None

        return scene
    elif clip.template in ("Moving [something] closer to [something]", "Moving [something] away from [something]"):
        angle = math.radians(between(-30, 30))
        near, far = (radius + other) * between(0.95, 1.1), between(0.62, 0.8)
        dx, dy = side * math.cos(angle), math.sin(angle)
        mid = between(-0.08, 0.08) - dx * (near + far) / 4, y / 2 - dy * (near + far) / 4
        way = path((mid[0] + dx * far, mid[1] + dy * far), (mid[0] + dx * near, mid[1] + dy * near))

        def scene(time: float) -> tuple:
            ax, ay = way(pace(time) if forwards else 1 - pace(time))
            return zoom, [(b, *mid, other), (a, ax, ay, radius)], grip(ax, ay, radius)

        return scene
    elif clip.template.startswith("Dropping"):
        let_go, floor = between(0.2, 0.45), between(0.2, 0.28)
        top, bottom = between(-0.34, -0.26), floor - 0.9 * (radius + other)

        def scene(time: float) -> tuple:
            u = min(max((time - let_go) / 0.25, 0), 1)
            things = [(b, x, floor, other), (a, x, top + (bottom - top) * u * u, radius)]
            return zoom, things, grip(x, top, radius)

        return scene
    elif clip.template.startswith("Covering"):
        angle, far = math.radians(between(0, 180)), between(0.5, 0.75)
        small, big = 0.85 * radius, max(other, 0.16)
        place = between(-0.1, 0.1), between(0.0, 0.15)
        way = path((place[0] + far * math.cos(angle), place[1] - 0.7 * far * math.sin(angle)), place)

        def scene(time: float) -> tuple:
            bx, by = way(pace(time))
            return zoom, [(a, *place, small), (b, bx, by, big)], grip(bx, by, big)

        return scene
    else:  # picking up, or pretending to: the hand comes, and goes with the thing or without
        floor, height = between(0.05, 0.25), between(0.28, 0.4)
        touch, leave = between(0.32, 0.42), between(0.5, 0.6)
        lifts = clip.template.startswith("Picking")

        def scene(time: float) -> tuple:
            rise = height * (1 - pace(time, 0, touch) + pace(time, leave, 1))
            lifted = rise if lifts and time > leave else 0
            return zoom, [(a, x, floor - lifted, radius)], (x, floor - 0.7 * radius - rise)

        return scene

    def scene(time: float) -> tuple:
        ax, ay = way(pace(time) if forwards else 1 - pace(time))
        return zoom, [(a, ax, ay, radius)], grip(ax, ay, radius)

    return scene


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
    """One thing with a mark of its own: at a few pixels, outlines alone are hard to tell apart."""
    white = (250, 250, 250)
    if shape == "ball":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        draw.ellipse((x - 0.35 * r, y - 0.35 * r, x + 0.35 * r, y + 0.35 * r), fill=white)
    elif shape == "box":
        draw.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill=colour)
        draw.rectangle((x - 0.9 * r, y - 0.2 * r, x + 0.9 * r, y + 0.2 * r), fill=white)
        draw.rectangle((x - 0.2 * r, y - 0.9 * r, x + 0.2 * r, y + 0.9 * r), fill=white)
    elif shape == "cone":
        draw.polygon(((x, y - r), (x + r, y + 0.9 * r), (x - r, y + 0.9 * r)), fill=colour)
        draw.rectangle((x - 0.9 * r, y + 0.5 * r, x + 0.9 * r, y + 0.9 * r), fill=white)
    else:  # a cup: a handle on one side and a white rim
        draw.ellipse((x, y - 0.6 * r, x + 1.15 * r, y + 0.5 * r), outline=colour, width=max(round(0.25 * r), 1))
        draw.rectangle((x - 0.8 * r, y - 0.9 * r, x + 0.55 * r, y + 0.9 * r), fill=colour)
        draw.rectangle((x - 0.8 * r, y - 0.9 * r, x + 0.55 * r, y - 0.5 * r), fill=white)


def write_video(path: Path | str, frames: np.ndarray, fps: int = FPS) -> None:
    """Write uint8 (T, H, W, 3) as VP9 in WebM, which is what SSv2's clips are."""

    def encode(file: object) -> None:
        with av.open(file, "w", format="webm") as container:
            stream = container.add_stream("libvpx-vp9", rate=fps)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            stream.options = {"deadline": "realtime", "cpu-used": "8", "crf": "32", "b": "0"}
            stream.thread_count = 1  # processes are what fills the cores here
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())

    files.write_atomic(path, encode)


# --- the splits ----------------------------------------------------------------------------------------------------


def choose_clips(counts: dict[str, int], seed: int) -> dict[str, list[Clip]]:
    """Clips of each split: actions in turn, and for each action its own things for each split.

    Of the 24 things, an action shows 16 in training, 4 in validation and 4 in the test: what a split asks for is
    an action with things that training never showed in it, though it showed all of them in other actions.
    """
    rng = random.Random(f"clips {seed}")
    colours = list(COLOURS)
    rng.shuffle(colours)
    seeds = iter(rng.sample(range(10**9), sum(counts.values())))
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
        clips[split] = chosen
    return clips


def render(data: Path, counts: dict[str, int], seed: int, workers: int | None = None) -> None:
    """Write clips, labels and paraphrases under `data`, as SSv2 lays them out; `counts`: clips of each split.

    Raises: UserError where `data` holds anything that this very call would not write.
    """
    marker, settings = data / "sample.json", {"version": 1, "seed": seed, **counts}
    if not marker.exists() and data.exists() and any(data.iterdir()):
        raise UserError(f"{data} already holds other files; name an empty folder with --data")
    if marker.exists() and files.read_json(marker, "the sample's settings") != settings:
        raise UserError(f"{data} holds a sample of other settings ({marker}); delete it, or name another with --data")
    files.write_json(marker, settings)

    numbers = count(1)
    splits = {
        split: {str(next(numbers)): clip for clip in clips} for split, clips in choose_clips(counts, seed).items()
    }
    write_labels(data, splits)
    jobs = [(data / f"20bn-something-something-v2/{i}.webm", clip) for s in splits.values() for i, clip in s.items()]
    with ProcessPoolExecutor(workers) as pool:
        rendered = pool.map(_render_file, jobs, chunksize=8)
        size = sum(tqdm(rendered, total=len(jobs), unit="clip", desc="rendering"))
    print(f"{data}: " + ", ".join(f"{n} {split}" for split, n in counts.items()) + f" clips, {size / 1e6:.1f} MB")


def _render_file(job: tuple[Path, Clip]) -> int:
    path, clip = job
    frames = random.Random(f"length {clip.seed}").randint(30, 42)
    write_video(path, render_clip(clip, frames=frames))
    return path.stat().st_size


def write_labels(data: Path, splits: dict[str, dict[str, Clip]]) -> None:
    """Write SSv2's label files, the paraphrases, and `opposites.json`, which SSv2 does not have."""
    labels = data / "labels"
    for split in ("train", "validation"):
        records = [
            {"id": i, "label": clip.caption.lower(), "template": clip.template, "placeholders": clip.placeholders}
            for i, clip in splits[split].items()
        ]
        files.write_json(labels / f"{split}.json", records)
    files.write_json(labels / "test.json", [{"id": i} for i in splits["test"]])
    files.write_text(labels / "test-answers.csv", "".join(f"{i};{c.caption}\n" for i, c in splits["test"].items()))
    files.write_json(labels / "labels.json", {template: str(i) for i, template in enumerate(sorted(ACTIONS))})
    files.write_json(labels / "opposites.json", OPPOSITES | {b: a for a, b in OPPOSITES.items()})
    said = {i: [text.lower() for text in paraphrases(clip)] for i, clip in splits["train"].items()}
    files.write_json(data / "ssv2_paraphrase.json", said)


def main(argv: list[str] | None = None) -> None:
    """Run `render` or `models`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("render", help="write the clips and their labels")
    two = commands.add_parser("models", help="train the two tiny models from scratch")
    for command in (one, two):
        command.add_argument("--data", type=Path, default=Path("data/sample"), help="folder of the sample's data")
        command.add_argument("--seed", type=int, default=0, help="start of all random choices")
    for split, clips in (("train", 1800), ("validation", 300), ("test", 300)):
        one.add_argument(f"--{split}", type=int, default=clips, help=f"clips in the {split} split")
    one.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that draw and encode")
    two.add_argument("--out", type=Path, default=Path("sample"), help="folder for the models: OUT/vjepa2, OUT/qwen2")
    two.add_argument("--only", choices=("vjepa2", "qwen2"), help="train one of the two")
    args = parser.parse_args(argv)

    if args.command == "render":
        counts = {split: getattr(args, split) for split in ("train", "validation", "test")}
        if min(counts.values()) < 0 or args.workers < 1:
            raise UserError("clips cannot be fewer than 0, nor --workers fewer than 1")
        render(args.data, counts, args.seed, args.workers)
    else:
        import sample_models  # here, since it takes seconds and the clips do not need it

        if args.only != "qwen2":
            sample_models.train_encoder(args.data, args.out / "vjepa2", args.seed)
        if args.only != "vjepa2":
            sample_models.train_lm(args.data, args.out / "qwen2", args.seed)


if __name__ == "__main__":
    files.run(main)
