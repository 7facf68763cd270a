import numpy as np
import pytest

from evaluation import bootstrap


def test_a_fraction_has_the_binomial_interval(monkeypatch):
    monkeypatch.setattr(bootstrap, "SAMPLES", 4000)
    found = bootstrap.fractions([{"right": (i < 300, 1)} for i in range(1000)], seed=3).summary()
    spread = 1.96 * np.sqrt(0.3 * 0.7 / 1000)  # 0.0284
    low, high = found["intervals"]["right"]
    assert found["right"] == 0.3
    assert low == pytest.approx(0.3 - spread, abs=0.003) and high == pytest.approx(0.3 + spread, abs=0.003)


def test_resamples_are_seeded_and_draw_clips_whole():
    values = np.random.default_rng(0).integers(0, 9, (200, 1))
    columns = np.hstack([values, 2 * values, np.ones_like(values)])
    one, again, other = (bootstrap.resampled_sums(columns, seed) for seed in (1, 1, 2))
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert one.shape == (bootstrap.SAMPLES, 3)
    assert np.array_equal(one[:, 1], 2 * one[:, 0]) and (one[:, 2] == 200).all()


def test_a_paired_difference_is_the_resamples_own_and_of_what_both_have():
    random = np.random.default_rng(1)
    right = [random.random(400) < share for share in (0.6, 0.5)]
    right[1][:300] = right[0][:300]  # both runs are right on mostly the same clips
    one, two = ([{"right": (int(r), 1), "odd": (int(r), i % 2)} for i, r in enumerate(clips)] for clips in right)
    two = [{"right": clip["right"]} for clip in two]
    left, other = (bootstrap.fractions(clips, seed=7) for clips in (one, two))
    found = (left - other).summary()
    draws = np.random.default_rng(7)
    drawn = [draws.integers(0, 400, 400) for _ in range(bootstrap.SAMPLES)]
    ends = np.quantile([right[0][d].mean() - right[1][d].mean() for d in drawn], (0.025, 0.975))
    assert found["intervals"]["right"] == pytest.approx(ends, abs=1e-12)
    assert found["right"] == pytest.approx(right[0].mean() - right[1].mean()) and "odd" not in found
    (a, b), (c, d) = left.summary()["intervals"]["right"], other.summary()["intervals"]["right"]
    low, high = found["intervals"]["right"]
    assert high - low < 0.75 * ((b - a) ** 2 + (d - c) ** 2) ** 0.5  # what two independent runs' difference would have
    same = (left - left).summary()
    assert same == {"right": 0.0, "odd": 0.0, "intervals": {"right": [0.0, 0.0], "odd": [0.0, 0.0]}}


def test_a_fraction_of_nothing_is_none_and_resamples_without_any_are_passed_over():
    found = bootstrap.fractions([{"none": (0, 0), "one": (2, 2)}, {"none": (0, 0), "one": (0, 0)}]).summary()
    assert found == {"none": None, "one": 1.0, "intervals": {"none": None, "one": [1.0, 1.0]}}
