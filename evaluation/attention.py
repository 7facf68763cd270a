"""Where a captioner looked in a split's clips: scored against the objects' places, and drawn over some clips.

labels/boxes.json has the places where they are known, for some clips or all: the sample's are the bounding boxes of
what a caption names (a ball fills 79 % of its own), without the hand; Something-Else's of SSv2 can be written so:

    {"<id>": {"width": 112, "height": 84, "frames": [[[left, top, right, bottom], ...], ...]}}

The video's size, and the objects' boxes in each of its frames, in pixels from the top left corner.

Letters: B clips; the grid (T', H', W') of patch tokens; T frames that the encoder saw, S pixels each way.
"""

import os
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dataset import Layout, Record
from evaluation.bootstrap import fractions
from evaluation.captioning import SplitReader, shuffled
from features.cache import CacheConfig
from runtime import files
from video import overlay
from video.reader import Transform, frame_indices
from video.workers import Workers

Boxes = tuple[float, float, list[np.ndarray]]  # a video's width and height; (objects, 4) for each frame


def read_boxes(layout: Layout) -> dict[str, Boxes]:
    """By clip id; {} where there is no boxes.json. Raises: UserError where it is of another form."""
    if (path := layout.labels_file("boxes.json")) is None:
        return {}
    content, found, clip_id = files.read_json(path, "the objects' boxes"), {}, None
    try:
        for clip_id, clip in content.items():
            frames = [np.array(boxes, np.float64).reshape(len(boxes), 4) for boxes in clip["frames"]]
            found[clip_id] = float(clip["width"]), float(clip["height"]), frames
            if not frames or min(found[clip_id][:2]) <= 0:
                raise ValueError
    except (LookupError, TypeError, ValueError, AttributeError):
        form = "width, height and frames of boxes [left, top, right, bottom]"
        raise files.UserError(f"the objects' boxes: {path}: clip {clip_id!r:.80} is not {form}; mend it") from None
    return found


def coverage(boxes: Boxes, made: CacheConfig) -> np.ndarray:
    """The share of each patch's pixels, as the encoder saw them, with their middle in any box: (T', H', W')."""
    width, height, frames = boxes
    top, left, bottom, right = Transform(made.size, made.crop).seen(height, width)
    middles = (np.arange(made.size) + 0.5) / made.size
    y, x = top + middles * (bottom - top), left + middles * (right - left)  # (S,) in the video's pixels
    covered = np.zeros((made.frames, made.size, made.size), bool)
    for picture, number in zip(covered, frame_indices(len(frames), made.frames), strict=True):
        for x1, y1, x2, y2 in frames[number]:
            picture |= ((y1 <= y) & (y < y2))[:, None] & ((x1 <= x) & (x < x2))
    steps, rows, columns = made.grid
    patches = (steps, made.frames // steps, rows, made.size // rows, columns, made.size // columns)
    return covered.reshape(patches).mean((1, 3, 5))


class Attention:
    """A captioner's attention in a split's clips. Raises: UserError as `read_boxes`, or without a grid."""

    def __init__(self, reader: SplitReader, layout: Layout, count: int, seed: int, queries: Sequence[int] = ()) -> None:
        """Overlays, also of each of `queries`, are for `count` at most of the clips with a video, drawn at random."""
        reader.captioner.check_queries(queries, "--queries")
        if reader.captioner.config["features"] is None:
            raise files.UserError("--attention: nothing says of which patches these features are; leave it out")
        self.reader, self.seed, self.queries, boxes = reader, seed, queries, read_boxes(layout)
        self.made = CacheConfig.from_dict(reader.captioner.config["features"])
        known = [record for record in reader.records if record["id"] in boxes]
        self.boxes, self.others = {record["id"]: boxes[record["id"]] for record in known}, shuffled(known, seed)
        videos = sorted((record["id"], path) for record in reader.records if (path := layout.video(record["id"])))
        self.videos = dict(random.Random(seed).sample(videos, min(count, len(videos))))
        patches, scored = " x ".join(map(str, self.made.grid)), f"scored in {len(known):,} clips (labels/boxes.json)"
        reader.context.print_main(f"attention to {patches} patches: {scored}, drawn over {len(self.videos):,}")

    def look(self) -> dict[str, tuple[overlay.Maps, dict]]:
        """By clip id: what is drawn of it, and `shares`, what is scored. All processes take part."""
        records = [r for r in self.reader.records if r["id"] in self.boxes or r["id"] in self.videos]

        def read(part: list[Record], features: Tensor) -> list[Any]:
            pairs = zip((record["id"] for record in part), self.reader.captioner.attention(features).cpu(), strict=True)
            drawn, of = self.videos, self.queries
            return [(overlay.named(one, of) if i in drawn else {}, self.shares(i, one.numpy())) for i, one in pairs]

        self.looked = replace(self.reader, records=records).each(read, "attention")
        return self.looked

    def shares(self, clip_id: str, attention: np.ndarray) -> dict[str, tuple[float, float]]:
        """What `fractions` makes scores of, from a clip's attention (Q, T', H', W'); {} where no boxes are known.

        on_objects: the share of all queries' attention that is on objects, each patch's by how much of it they cover;
        "query 3": the same of one. area: the objects' share of the picture, which even attention has on them; ratio:
        on_objects to it. on_others: the share where another clip's objects are, as of who always looks at the middle.
        """
        if clip_id not in self.boxes:
            return {}
        own, others = (coverage(self.boxes[i], self.made) for i in (clip_id, self.others[clip_id]))
        mean, area = attention.mean(0), float(own.mean())
        on, on_others = float((mean * own).sum()), float((mean * others).sum())
        found = {"on_objects": (on, 1), "area": (area, 1), "ratio": (on, area), "on_others": (on_others, 1)}
        return found | {f"query {i}": (float((one * own).sum()), 1) for i, one in enumerate(attention)}

    def scores(self, looked: dict[str, Any]) -> dict[str, Any]:
        """`shares` of all clips together, with their intervals; {} where no objects' places are known."""
        clips = [shares for _, shares in looked.values() if shares]
        return {"clips": len(clips), **fractions(clips, self.seed).summary()} if clips else {}

    def draw(self, results: Path, timeout: float, rows: list[dict[str, Any]]) -> None:
        """Write RESULTS/attention/<id>.attention.webm, and into the clips' rows where that is."""
        clips = {clip_id: (path, self.looked[clip_id][0]) for clip_id, path in self.videos.items()}
        how = (results / "attention", Transform(self.made.size, self.made.crop), self.made.frames)
        with Workers(min(os.cpu_count() or 1, len(clips)), timeout) as workers:
            drawn = dict(overlay.write_all(workers, clips, *how))
        for row in rows:
            if row["id"] in drawn:
                row["overlays"] = {name: f"attention/{file}" for name, file in drawn[row["id"]].items()}
