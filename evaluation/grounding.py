"""Does the captioner look at the video? The same checkpoint on features that lie, and captions without any.

A captioner that has only learnt the data set's language scores the same on another clip's features; one that sees
still frames only captions a clip played backwards as before.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import dataset
from evaluation.ssv2 import TemplateReader, template_key
from qformer import VideoCaptioner
from runtime import files


def opposites(data: Path) -> dict[str, str]:
    """Template keys by those of templates whose clips, played backwards, show them; both ways.

    From labels/opposites.json where the data set has one (the sample does), else SSv2's, beside this file.
    """
    path = dataset.Layout(data).labels_file("opposites.json") or Path(__file__).with_name("opposites.json")
    pairs = files.read_json(path, "the opposite actions")
    if not isinstance(pairs, dict) or not all(isinstance(other, str) for other in pairs.values()):
        raise files.UserError(f"the opposite actions: {path} does not map templates to templates")
    keys = {template_key(one): template_key(other) for one, other in pairs.items()}
    return {**{other: one for one, other in keys.items()}, **keys}


def most_common_caption(records: list[dataset.Record]) -> str:
    """What a captioner that sees nothing had best say: the commonest training label, of equal ones the first."""
    return Counter(sorted(record["label"][0] for record in records)).most_common(1)[0][0]


def reversed_captions(
    captioner: VideoCaptioner, videos: dict[str, Path], workers: Any, batch_size: int, **settings: int
) -> dict[str, str]:
    """Captions of clips that `workers` (video.workers.Workers) decode, played backwards; damaged ones are left out."""
    clips = workers.read_clips(videos.items(), captioner.encoder.transform, captioner.encoder.frames)
    # Frames are (T, 3, S, S): the last one comes first.
    backwards = (clip if clip.frames is None else clip._replace(frames=clip.frames.flip(0)) for clip in clips)
    captioned = captioner.caption_decoded(backwards, batch_size, **settings)
    return {clip.key: caption for clip, caption in captioned if caption is not None}


def flips(
    captions: dict[str, str], records: dict[str, dataset.Record], pairs: dict[str, str], reader: TemplateReader
) -> dict[str, float]:
    """For each reversed clip whose action has an opposite: 1 where the caption tells the opposite, else 0; by id."""
    actions = {clip_id: template_key(records[clip_id].get("template") or "") for clip_id in captions}
    return {
        clip_id: float(template_key(reader.read(captions[clip_id]).template or "") == pairs[action])
        for clip_id, action in actions.items()
        if action in pairs
    }
