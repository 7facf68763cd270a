import numpy as np
import pytest

from evaluation.bootstrap import bootstrap


def test_bootstrap_gives_the_binomial_interval_of_a_fraction():
    values = np.array([1.0] * 300 + [0.0] * 700)
    low, high = bootstrap(values, seed=3, samples=4000)
    spread = 1.96 * np.sqrt(0.3 * 0.7 / 1000)  # 0.0284
    assert low == pytest.approx(0.3 - spread, abs=0.003) and high == pytest.approx(0.3 + spread, abs=0.003)


def test_bootstrap_is_seeded_and_keeps_to_the_values():
    values = np.random.default_rng(0).normal(size=200)
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1) != bootstrap(values, seed=2)
    assert bootstrap([2.0]) == [2.0, 2.0]
