"""Does the captioner look at the video? The same checkpoint on features that lie, and captions without any.

A captioner that has only learnt the language of a data set scores the same on another clip's features; one that sees
still frames only captions a clip played backwards as before.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import dataset
from evaluation.ssv2 import TemplateReader, template_key
from qformer import VideoCaptioner
from runtime import files
from video.workers import Decoded, Workers

# SSv2's own templates whose time-reversed clip shows the other (both ways). A data set may bring its own list.
OPPOSITES = [
    ("Moving [something] up", "Moving [something] down"),
    ("Moving [something] closer to [something]", "Moving [something] away from [something]"),
    ("Moving [something] towards the camera", "Moving [something] away from the camera"),
    (
        "Moving [something] and [something] closer to each other",
        "Moving [something] and [something] away from each other",
    ),
    ("Pulling [something] from left to right", "Pulling [something] from right to left"),
    ("Pushing [something] from left to right", "Pushing [something] from right to left"),
    ("Turning the camera left while filming [something]", "Turning the camera right while filming [something]"),
    ("Turning the camera upwards while filming [something]", "Turning the camera downwards while filming [something]"),
    ("Approaching [something] with your camera", "Moving away from [something] with your camera"),
    ("Opening [something]", "Closing [something]"),
    ("Folding [something]", "Unfolding [something]"),
    ("Covering [something] with [something]", "Uncovering [something]"),
    ("Putting [something] into [something]", "Taking [something] out of [something]"),
]


def opposites(data: Path) -> dict[str, str]:
    """Each template that has one, mapped to the template that its time-reversed clip shows, both as template keys.

    From labels/opposites.json where the data set has one (the sample does), else SSv2's.
    """
    path = dataset.Layout(data).labels_file("opposites.json")
    pairs = files.read_json(path, "the opposite actions") if path else dict(OPPOSITES)
    if not isinstance(pairs, dict) or not all(isinstance(other, str) for other in pairs.values()):
        raise files.UserError(f"the opposite actions: {path} does not map templates to templates")
    keys = {template_key(one): template_key(other) for one, other in pairs.items()}
    return {**{other: one for one, other in keys.items()}, **keys}


def most_common_caption(records: list[dataset.Record]) -> str:
    """The caption that a captioner which sees nothing had best say: the commonest training label."""
    counts = Counter(record["label"][0] for record in records)
    return min(counts, key=lambda caption: (-counts[caption], caption))


def reversed_captions(
    captioner: VideoCaptioner,
    videos: dict[str, Path],
    batch_size: int,
    max_new_tokens: int,
    num_beams: int,
    timeout: float,
) -> dict[str, str]:
    """Captions of clips played backwards, by id; a video that cannot be decoded in `timeout` seconds is left out."""

    def backwards(clips: Iterable[Decoded]) -> Iterator[Decoded]:
        for clip in clips:
            yield clip if clip.frames is None else clip._replace(frames=clip.frames.flip(0))  # (T, 3, S, S)

    encoder = captioner.encoder
    with Workers(os.cpu_count() or 1, timeout) as workers:
        clips = workers.read_clips(videos.items(), encoder.transform, encoder.frames)
        captioned = captioner.caption_decoded(backwards(clips), batch_size, max_new_tokens, num_beams)
        return {clip.key: caption for clip, caption in captioned if caption is not None}


def flips(
    captions: dict[str, str], records: list[dataset.Record], pairs: dict[str, str], reader: TemplateReader
) -> dict[str, float]:
    """For each reversed clip whose action has an opposite: 1 where the caption tells the opposite, else 0."""
    known = {record["id"]: template_key(record.get("template") or "") for record in records}
    return {
        clip_id: float(template_key(reader.read(caption).template or "") == pairs[known[clip_id]])
        for clip_id, caption in captions.items()
        if known.get(clip_id) in pairs
    }
