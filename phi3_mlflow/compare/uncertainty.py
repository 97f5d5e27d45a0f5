"""How far the numbers of a few questions can be trusted: intervals, a test for "not worse". Knows no model."""

from collections.abc import Callable, Sequence
from math import ceil, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np

Statistic = Callable[..., Any]

CONFIDENCE = 0.95
_RESAMPLES = 2000
_BATCH = 2**20  # questions that are drawn at once
_Z = NormalDist().inv_cdf(CONFIDENCE)  # of one side


def interval(values: Sequence[Any], seed: int = 0, statistic: Statistic = np.mean) -> tuple[float, float]:
    """The percentile bootstrap's interval of 95 %, by resampling questions; it repeats with the seed.

    Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.

    Args:
        values: one for each question, or several in a tuple.
        seed: of the resampling.
        statistic: called with arrays (resamples, questions, ...) and `axis=1`.
    """
    low, high = np.quantile(_resampled(values, seed, statistic), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def upper(values: Sequence[Any], seed: int = 0, statistic: Statistic = np.mean) -> float:
    """The bootstrap's upper limit of one side, 95 %; see `interval`."""
    return float(np.quantile(_resampled(values, seed, statistic), CONFIDENCE))


def share_interval(hits: int, asked: int) -> tuple[float, float]:
    """The interval of 95 % for a share of yes and no, which has a width at 0 and 1 too.

    Wilson's score interval (Journal of the American Statistical Association 22, 1927, 209-212).
    """
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share, weight = hits / asked, z * z / asked
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * sqrt(share * (1 - share) / asked + weight / (4 * asked))
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))  # not beyond it by rounding


def ratio(values: Any, axis: int | None = None) -> Any:
    """All first values of pairs together by all second ones together: a statistic."""
    sums = np.asarray(values, float).sum(axis=-2 if axis is not None else 0)
    return sums[..., 0] / sums[..., 1]


def _resampled(values: Sequence[Any], seed: int, statistic: Statistic) -> np.ndarray:
    sample, generator = np.asarray(values, float), np.random.default_rng(seed)
    batch = max(1, _BATCH // len(sample))
    counts = [min(batch, _RESAMPLES - done) for done in range(0, _RESAMPLES, batch)]
    return np.concatenate(
        [statistic(sample[generator.integers(len(sample), size=(count, len(sample)))], axis=1) for count in counts]
    )


def not_worse(lost: int, won: int, asked: int, margin: float) -> float:
    """The p-value of the hypothesis that a candidate answers worse by the margin or more, question by question.

    Tango's score test for paired proportions (Statistics in Medicine 17, 1998, 891-908), which holds for few questions
    and for models that answer alike: where none differs, `asked` alone decides.

    Args:
        lost: questions that the reference answers rightly and the candidate does not.
        won: the other way round.
        asked: all questions.
        margin: between 0 and 1, exclusive.
    """
    a = 2 * asked
    b = -lost - won + (2 * asked - lost + won) * margin
    c = -won * margin * (1 - margin)
    share = (sqrt(b * b - 4 * a * c) - b) / (2 * a)
    spread = asked * (2 * share + margin * (1 - margin))
    return NormalDist().cdf((lost - won - asked * margin) / sqrt(spread))


def least_questions(margin: float) -> int:
    """How many questions it takes to show that models which answer alike are not worse by the margin."""
    return ceil(_Z**2 * (1 - margin) / margin)
