import json
from types import SimpleNamespace

import pytest
import torch

from evaluation import grounding
from evaluation.ssv2 import TemplateReader
from models.video_files import CaptionsFiles
from runtime.files import UserError
from tests import tiny
from video.workers import Decoded


class EchoCaptioner(CaptionsFiles):
    """Captions a clip by the brightness of its first and last frame: what a reversed clip must swap."""

    encoder = SimpleNamespace(frames=4, transform=None)

    def encode(self, clips):
        assert len(clips) <= 2
        return clips

    def generate(self, clips, max_new_tokens, num_beams):
        assert (max_new_tokens, num_beams) == (5, 3)
        return [f"{int(clip[0].max())} to {int(clip[-1].max())}" for clip in clips]


class EchoWorkers:
    """Gives clips whose frames become brighter, and one that cannot be decoded."""

    def read_clips(self, paths, transform, frames):
        for clip_id, path in paths:
            clip = torch.stack([torch.full((3, 2, 2), 10 * i + int(clip_id)) for i in range(frames)])
            yield Decoded(clip_id, None, "no frames") if path is None else Decoded(clip_id, clip)


def test_clips_are_played_backwards_in_batches_in_order_and_damaged_ones_left_out():
    videos = {"4": "a", "2": None, "3": "b", "1": "c"}
    settings = {"batch_size": 2, "max_new_tokens": 5, "num_beams": 3}
    found = grounding.reversed_captions(EchoCaptioner(), videos, EchoWorkers(), **settings)
    assert list(found.items()) == [("4", "34 to 4"), ("3", "33 to 3"), ("1", "31 to 1")]


def test_a_flip_counts_only_where_the_action_has_an_opposite(tmp_path):
    reader = TemplateReader(list(tiny.TEMPLATES))
    records = {
        "1": {"template": "Moving [something] up"},
        "2": {"template": "Moving [something] up"},
        "3": {"template": "Covering [something] with [something]"},
        "4": {"template": "Moving [something] down"},
    }
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "opposites.json").write_text(
        json.dumps({"Moving [something] up": "Moving [something] down"})
    )
    pairs = grounding.opposites(tmp_path)
    captions = {"1": "moving a cup down", "2": "moving a cup up", "3": "moving a cup down", "4": "moving it up"}
    assert grounding.flips(captions, records, pairs, reader) == {"1": 1.0, "2": 0.0, "4": 1.0}


def test_ssv2s_own_opposites_go_both_ways(tmp_path):
    pairs = grounding.opposites(tmp_path)
    assert pairs["moving something up"] == "moving something down"
    assert all(pairs[pairs[key]] == key for key in pairs)
    (tmp_path / "opposites.json").write_text("[1]")
    with pytest.raises(UserError, match="opposite actions"):
        grounding.opposites(tmp_path)


def test_the_most_common_caption_is_the_label_not_a_paraphrase():
    records = [{"label": ["b", "x"]}, {"label": ["a", "x"]}, {"label": ["b", "x"]}, {"label": ["a"]}]
    assert grounding.most_common_caption(records) == "a"
