"""Bootstrap intervals over clips (Efron 1979): how much a score owes to the clips that happen to be in the split."""

from typing import Any

import numpy as np

SAMPLES = 1000  # resamples
MIDDLE = (0.025, 0.975)  # of their scores: the ends of a 95 % interval


def resampled_sums(columns: np.ndarray, seed: int = 0) -> np.ndarray:
    """Sums (SAMPLES, k) of columns (clips, k) over as many clips, drawn with replacement."""
    clips, random, sums = len(columns), np.random.default_rng(seed), []
    for _ in range(0, SAMPLES, 50):  # 50 x 24,777 weights are 10 MB
        weights = [np.bincount(random.integers(0, clips, clips), minlength=clips) for _ in range(50)]
        sums.append(np.array(weights, dtype=np.float64) @ columns)
    return np.concatenate(sums)


def fractions(clips: list[dict[str, tuple[int, int]]], seed: int = 0) -> dict[str, Any]:
    """Scores that are shares, from each clip's (count, of how many) by score; None where there is nothing to count.

    "intervals" holds their 95 % percentile intervals [low, high] over resamples of the clips.
    """
    table = np.array([list(clip.values()) for clip in clips], dtype=np.float64)  # (clips, scores, 2)
    sums, resampled = table.sum(0), resampled_sums(table.reshape(len(clips), -1), seed)
    scores, intervals = {}, {}
    for i, name in enumerate(clips[0]):
        counts, ofs = resampled[:, 2 * i : 2 * i + 2].T
        usable = ofs > 0  # a resample may by chance hold no clip with objects
        scores[name] = float(sums[i, 0] / sums[i, 1]) if sums[i, 1] else None
        intervals[name] = np.quantile(counts[usable] / ofs[usable], MIDDLE).tolist() if sums[i, 1] else None
    return {**scores, "intervals": intervals}
