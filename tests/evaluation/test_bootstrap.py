import numpy as np
import pytest

from evaluation import bootstrap


def test_a_fraction_has_the_binomial_interval(monkeypatch):
    monkeypatch.setattr(bootstrap, "SAMPLES", 4000)
    found = bootstrap.fractions([{"right": (i < 300, 1)} for i in range(1000)], seed=3)
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


def test_a_fraction_of_nothing_is_none_and_resamples_without_any_are_passed_over():
    found = bootstrap.fractions([{"none": (0, 0), "one": (2, 2)}, {"none": (0, 0), "one": (0, 0)}])
    assert found == {"none": None, "one": 1.0, "intervals": {"none": None, "one": [1.0, 1.0]}}
