import json

import pytest
import torch

from evaluation import grounding
from evaluation.ssv2 import TemplateReader
from runtime.files import UserError
from tests import tiny


class EchoCaptioner:
    """Captions a clip by the brightness of its first and last frame: what a reversed clip must swap."""

    class encoder:  # noqa: N801
        frames = 4

        class transform:  # noqa: N801
            pass

    def encode(self, clips):
        return clips

    def generate(self, clips, *_):
        return [f"{int(clip[0].max())} to {int(clip[-1].max())}" for clip in clips]


def test_clips_are_played_backwards_in_batches_and_damaged_ones_left_out(monkeypatch):
    from video.workers import Failure

    class Decoder:
        def __init__(self, jobs, *_, **__):
            self.jobs = jobs

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def __iter__(self):
            for clip_id, path in self.jobs:
                if path is None:
                    yield clip_id, Failure("no frames")
                else:
                    yield clip_id, torch.stack([torch.full((3, 2, 2), 10 * i + int(clip_id)) for i in range(4)])

    monkeypatch.setattr(grounding, "ClipDecoder", Decoder)
    checks = []
    videos = {"1": "a", "2": None, "3": "b", "4": "c"}
    found = grounding.reversed_captions(EchoCaptioner(), videos, 2, 5, 1, 9.0, lambda: checks.append(1))
    assert found == {"1": "31 to 1", "3": "33 to 3", "4": "34 to 4"} and len(checks) == 4


def test_a_flip_counts_only_where_the_action_has_an_opposite(tmp_path):
    reader = TemplateReader(list(tiny.TEMPLATES))
    records = [
        {"id": "1", "template": "Moving [something] up"},
        {"id": "2", "template": "Moving [something] up"},
        {"id": "3", "template": "Covering [something] with [something]"},
        {"id": "4", "template": "Moving [something] down"},
    ]
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
