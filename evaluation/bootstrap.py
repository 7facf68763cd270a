"""Bootstrap intervals over clips (Efron 1979): how much a score owes to the clips that happen to be in the split."""

import numpy as np

SAMPLES = 1000  # resamples


def resampled_sums(columns: np.ndarray, seed: int = 0, samples: int = SAMPLES) -> np.ndarray:
    """Sums (samples, k) of columns (clips, k) over as many clips, drawn with replacement."""
    clips, random = len(columns), np.random.default_rng(seed)
    sums = []
    for start in range(0, samples, 50):  # 50 x 24,777 weights are 10 MB
        rows = range(start, min(start + 50, samples))
        weights = np.stack([np.bincount(random.integers(0, clips, clips), minlength=clips) for _ in rows])
        sums.append(weights.astype(np.float64) @ columns)
    return np.concatenate(sums)


def interval(scores: np.ndarray) -> list[float]:
    """The middle 95 % of resampled scores: [low, high]."""
    return np.quantile(scores, [0.025, 0.975]).tolist()


def bootstrap(values: list[float] | np.ndarray, seed: int = 0, samples: int = SAMPLES) -> list[float]:
    """95 % percentile interval [low, high] of the mean of `values` (clips,), resampled over clips, seeded."""
    columns = np.asarray(values, dtype=np.float64)[:, None]
    return interval(resampled_sums(columns, seed, samples)[:, 0] / len(columns))
