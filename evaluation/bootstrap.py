"""Bootstrap intervals over clips (Efron 1979): how much a score owes to the clips that happen to be in the split."""

from dataclasses import dataclass
from typing import Any

import numpy as np

SAMPLES = 1000  # resamples
MIDDLE = (0.025, 0.975)  # of their scores: the ends of a 95 % interval


@dataclass(eq=False)
class Resampled:
    """Scores of some clips by name, and their values (SAMPLES,) over resamples of these clips.

    A score is None where there is nothing to count; its resamples are None where it has no interval.
    """

    scores: dict[str, float | None]
    resamples: dict[str, np.ndarray | None]

    def __sub__(self, other: "Resampled") -> "Resampled":
        """The paired bootstrap (Efron and Tibshirani 1993, chapter 8): differences, each resample's within itself.

        Both are to be of the same clips in the same order and of one seed: then one seed's resamples hold the same
        clips in both, and what makes a clip hard for both cancels. Scores that only one has are left out.
        """
        names = [name for name, score in self.scores.items() if None not in (score, other.scores.get(name))]
        pairs = {name: (self.resamples.get(name), other.resamples.get(name)) for name in names}
        scores = {name: self.scores[name] - other.scores[name] for name in names}
        return Resampled(scores, {k: None if a is None or b is None else a - b for k, (a, b) in pairs.items()})

    def summary(self) -> dict[str, Any]:
        """The scores, and as "intervals" their 95 % percentile intervals [low, high]."""
        ends = {k: None if x is None else np.nanquantile(x, MIDDLE).tolist() for k, x in self.resamples.items()}
        return {**self.scores, "intervals": ends}


def resampled_sums(columns: np.ndarray, seed: int = 0) -> np.ndarray:
    """Sums (SAMPLES, k) of columns (clips, k) over as many clips, drawn with replacement."""
    clips, random, sums = len(columns), np.random.default_rng(seed), []
    for _ in range(0, SAMPLES, 50):  # 50 x 24,777 weights are 10 MB
        weights = [np.bincount(random.integers(0, clips, clips), minlength=clips) for _ in range(50)]
        sums.append(np.array(weights, dtype=np.float64) @ columns)
    return np.concatenate(sums)


def fractions(clips: list[dict[str, tuple[int, int]]], seed: int = 0) -> Resampled:
    """Scores that are shares, from each clip's (count, of how many) by score; None where there is nothing to count."""
    table = np.array([list(clip.values()) for clip in clips], dtype=np.float64)  # (clips, scores, 2)
    sums, resampled = table.sum(0), resampled_sums(table.reshape(len(clips), -1), seed)
    scores, resamples = {}, {}
    for i, name in enumerate(clips[0]):
        counts, ofs = resampled[:, 2 * i : 2 * i + 2].T
        # A resample may by chance hold no clip with objects.
        shares = np.divide(counts, ofs, where=ofs > 0, out=np.full_like(ofs, np.nan))
        scores[name] = float(sums[i, 0] / sums[i, 1]) if sums[i, 1] else None
        resamples[name] = shares if sums[i, 1] else None
    return Resampled(scores, resamples)
