import pytest

from features import schedule


def test_the_schedules():
    rates = [schedule.rate_at(step, 10, 1.0, "cosine", 0.2) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[6] == pytest.approx(0.5) and rates[9] < 0.05
    assert {schedule.rate_at(step, 10, 1.0, "constant", 0.0) for step in range(10)} == {1.0}


def test_an_epochs_plan_holds_every_clip_once_and_distinct_captions():
    records = [{"id": str(clip), "label": [f"{clip} {n}" for n in range(clip % 4 + 1)]} for clip in range(21)]
    steps = schedule.plan_epoch(records, batch_size=4, accumulate=3, captions_per_clip=3, seed=0, epoch=0)
    assert sorted(clip_id for step in steps for clip_id in step.ids) == sorted(record["id"] for record in records)
    assert [len(step.batches) for step in steps] == [3, 3]
    drawn = {clip_id: captions for step in steps for batch in step.batches for clip_id, captions in batch}
    for clip_id, captions in drawn.items():
        assert len(set(captions)) == len(captions) == min(3, int(clip_id) % 4 + 1)
    again = schedule.plan_epoch(records, 4, 3, 3, seed=0, epoch=1)
    assert [step.ids for step in again] != [step.ids for step in steps]
