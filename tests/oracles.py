"""Definitions written in the plainest way, or taken from a library, for the tests to compare with.

scipy and lifelines take seconds to import, so that each is imported where it is used.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence


def smoothed(kl: Sequence[float], roll: int, edges: str) -> list[float]:
    """The rolling mean by its definition, a token at a time."""
    kl = list(kl)
    if edges == "pad":
        if len(kl) < roll:
            return [value if math.isfinite(value) else math.nan for value in kl]
        kl = kl[:1] * (roll // 2) + kl + kl[-1:] * (roll // 2)
        windows = [kl[t : t + roll] for t in range(len(kl) - 2 * (roll // 2))]
    else:
        windows = [kl[max(0, t - roll // 2) : max(0, t - roll // 2 + roll)] for t in range(len(kl))]
    finite = [[value for value in window if math.isfinite(value)] for window in windows]
    return [math.fsum(values) / len(values) if values else math.nan for values in finite]


def lifelines_survival(lives: Sequence[tuple[int, bool]], forks: Sequence[int]) -> list[float]:
    """Kaplan-Meier at the forks, of rollouts each followed to a token and dead there or not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lifelines import KaplanMeierFitter

        fitter = KaplanMeierFitter().fit(*zip(*lives, strict=True), timeline=list(forks))
    return fitter.survival_function_.iloc[:, 0].tolist()


def beta_product(lives: Sequence[tuple[int, bool]], forks: Sequence[int], weight: float) -> tuple[float, float]:
    """95 % limits of the survival at the last fork: the product of beta variables by two moments, a fork at a time."""
    from scipy import stats

    mean = square = 1.0
    for fork in forks:
        risk = weight * sum(t >= fork for t, _ in lives)
        deaths = weight * sum(dead and t == fork for t, dead in lives)
        if deaths:
            factor = stats.beta(risk - deaths + 1, deaths)
            mean, square = mean * factor.mean(), square * (factor.var() + factor.mean() ** 2)
    if risk == deaths:  # nobody is left, so S may be 0 from here on
        return 0.0, limit(0.975, mean, square)
    last = stats.beta(risk - deaths, 1)
    return limit(0.025, mean * last.mean(), square * (last.var() + last.mean() ** 2)), limit(0.975, mean, square)


def limit(q: float, mean: float, square: float) -> float:
    """The quantile of the beta distribution with these first two moments."""
    from scipy import stats

    variance = square - mean**2
    if variance < 1e-15:
        return mean
    size = mean * (1 - mean) / variance - 1
    return float(stats.beta.ppf(q, mean * size, (1 - mean) * size))
