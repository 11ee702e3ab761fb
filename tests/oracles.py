"""Definitions written in the plainest way, or taken from a library, for the tests to compare with.

`lives_of(folder, **flags)` reads a sweep, or one cell, from its JSON files and gives a `Life` per rollout, with all
that is defined of one: how it ended, its KL, its scale and line, whose copy it is. The flags are those of `Args`:

    lives = lives_of(root, threshold=0.9, roll=5)              # all cells in the order of their names, alphas ascending
    lives = lives_of(root / "cell", alphas=[1.0])              # one cell, one alpha
    panels = panels_of(lives_of(root, rows="method"))          # {(facet, alpha): lives}, copies left out

A float that does not exist is NaN, a token that does not exist is None. An infinite KL is inf, and so is one above
1e6 nats. The files must be readable. scipy and lifelines take seconds to import, so each is imported where it is used.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Life:
    """One rollout, by the definitions."""

    cell: str
    facet: str  # what --rows tells apart; "" without it
    model: str
    prompt: int
    alpha: float
    recorded: list[float]  # nats, each generated token, also beyond the window
    kl: list[float]  # nats, the observed tokens: the first `n_tokens` of `recorded`
    forks: list[tuple[int, float]]  # the measured ones up to the end and their pmass, ascending
    later_forks: list[tuple[int, float]]  # the measured ones after it
    n_tokens: int
    record_cut: bool
    eos: bool
    ended: bool  # before the window did
    threshold: float
    budget: float  # nats, target_kl
    target: float  # nats, alpha**2 * target_kl
    scale: float  # nats
    line: list[float]  # what is drawn of the observed tokens; [] where there is no line
    identity: str | None  # equal for exact copies; None where there is nothing to compare
    copy_of: str = ""  # the cell that recorded it first

    def death_at(self, threshold: float) -> int | None:
        """The first fork below the threshold."""
        return next((s for s, mass in self.forks if mass < threshold), None)

    @property
    def death(self) -> int | None:
        return self.death_at(self.threshold)

    @property
    def end(self) -> str:
        if self.death is not None:
            return "died" if self.death < self.n_tokens else "died_last"
        return "censored" if self.ended else "alive"

    @property
    def recovered(self) -> bool:
        """Died, and at or above the threshold at the last measured fork."""
        return self.death is not None and self.forks[-1][1] >= self.threshold

    @property
    def followed_to(self) -> int | None:
        return self.death if self.death is not None or not self.forks else self.forks[-1][0]

    @property
    def kl_p95(self) -> float:
        return percentile(self.kl)

    @property
    def kl_p95_to_death(self) -> float:
        return self.kl_p95 if self.death is None else percentile(self.kl[: self.death + 1])

    @property
    def lowest_pmass(self) -> float:
        return min((mass for _, mass in self.forks), default=math.nan)


def lives_of(
    folder: Path,
    alphas: Sequence[float] = (),
    window: int | None = None,
    threshold: float = 0.8,
    metric: str = "pmass_eval",
    rows: str | None = None,
    roll: int = 65,
    edges: str = "pad",
    normalize_kl: bool = True,
    calib_tokens: int = 20,
    calib_on: str = "smoothed",
) -> list[Life]:
    """The rollouts of a cell, or of each cell in a folder, at the alphas that both of its files hold."""
    lives: list[Life] = []
    cells = [folder] if (folder / "calib.json").exists() else [path.parent for path in folder.glob("[!_.]*/calib.json")]
    for cell in sorted(cells, key=lambda cell: by_number(cell.name)):
        calib, trajectory, measured = (
            json.loads((cell / f"{name}.json").read_bytes()) for name in ("calib", "trajectory", "pmass")
        )
        if not measured.get("computed", True):
            continue
        facet = "" if rows is None else cell.name if rows == "cell" else str(calib[rows])
        own_window = calib.get("window")
        longest = own_window if window is None else window
        curves, masses = by_alpha(trajectory["per_prompt_per_t_kl"]), by_alpha(measured[metric])
        lengths_key = "gen_lens_qa" if metric == "pmass" else metric.replace("pmass_", "gen_lens_")
        if lengths_key in measured:
            lengths = by_alpha(measured[lengths_key])
        else:
            lengths = {a: [len(row) for row in kl] for a, kl in curves.items() if not alphas or a in alphas}
        for alpha in sorted(curves.keys() & masses.keys() & lengths.keys()):
            if alphas and alpha not in alphas:
                continue
            for i, (row, mass, g) in enumerate(zip(curves[alpha], masses[alpha], lengths[alpha], strict=True)):
                row, mass = ([math.nan if x is None else float(x) for x in held] for held in (row[: int(g)], mass))
                recorded, n_tokens = [nats(value) for value in row], int(min(len(row), longest))
                smooth = smoothed(recorded, roll, edges)
                scale = percentile(finite((recorded if calib_on == "raw" else smooth)[:calib_tokens]))
                scale = scale if scale > 1e-8 else math.nan
                has_line = bool(finite(recorded[:n_tokens])) and (not normalize_kl or (alpha != 0 and scale > 0))
                at_forks = sorted(zip(measured["fork_points"], mass, strict=True), key=lambda fork: fork[0])
                forks = [(int(s), value) for s, value in at_forks if not math.isnan(value)]
                says_something = bool(forks) if alpha == 0 else any(kl != 0 for kl in finite(row))
                lives.append(
                    Life(
                        cell=cell.name,
                        facet=facet,
                        model=calib["model"],
                        prompt=i,
                        alpha=alpha,
                        recorded=recorded,
                        kl=recorded[:n_tokens],
                        forks=[(s, m) for s, m in forks if s <= n_tokens],
                        later_forks=[(s, m) for s, m in forks if s > n_tokens],
                        n_tokens=n_tokens,
                        record_cut=len(row) < min(g, longest),
                        eos=g < min(longest, own_window or longest) and len(row) >= g,
                        ended=g < longest or len(row) < min(g, longest),
                        threshold=threshold,
                        budget=calib["target_kl"],
                        target=alpha**2 * calib["target_kl"] if alpha else math.nan,
                        scale=scale,
                        line=[kl / (scale if normalize_kl else 1) for kl in smooth[:n_tokens]] if has_line else [],
                        identity=str((calib["model"], i, alpha, g, row, at_forks)) if says_something else None,
                    )
                )
    first = {life.identity: life.cell for life in reversed(lives)} | {None: ""}
    is_copy = [first[life.identity] not in ("", life.cell) for life in lives]
    return [replace(x, copy_of=first[x.identity]) if again else x for x, again in zip(lives, is_copy, strict=True)]


def panels_of(lives: Sequence[Life], keep_duplicates: bool = False) -> dict[tuple[str, float], list[Life]]:
    """The rollouts of each panel, row by row, alphas ascending; of exact copies within a panel the first one."""
    facets = sorted({life.facet for life in lives}, key=by_number)
    panels: dict[tuple[str, float], list[Life]] = {
        (facet, alpha): [] for facet in facets for alpha in sorted({life.alpha for life in lives})
    }
    for life in lives:
        panel = panels[life.facet, life.alpha]
        if keep_duplicates or life.identity is None or all(life.identity != other.identity for other in panel):
            panel.append(life)
    return panels


def by_number(name: str) -> list[Any]:
    """A sorting key that puts run2 before run10."""
    parts = re.split(r"([0-9]+(?:\.[0-9]+)?)", name)
    return [float(part) if k % 2 else part for k, part in enumerate(parts)]


def by_alpha(lists: dict[Any, Any]) -> dict[float, Any]:
    """By the number that a key is, 0.30000000000000004 being 0.3 and -0.0 being 0."""
    return {float(f"{float(key):.9g}") + 0.0: values for key, values in lists.items()}


def nats(value: float) -> float:
    """As recorded; what is beyond 1e6 is infinite, and of that what is negative is no measurement."""
    return value if math.isnan(value) or abs(value) <= 1e6 else math.inf if value > 0 else math.nan


def finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def percentile(values: Iterable[float]) -> float:
    """The linearly interpolated 95th percentile of all that is not NaN; inf where one of its two neighbours is."""
    held = sorted(value for value in values if not math.isnan(value))
    if not held:
        return math.nan
    k, part = divmod(95 * (len(held) - 1), 100)
    return held[k] if part == 0 else held[k] + (held[k + 1] - held[k]) * part / 100 if held[k] < math.inf else math.inf


def above(kl: float, limit: float) -> bool:
    """Equal in single precision, in which KL is kept, is not above."""
    return kl > limit and not math.isclose(kl, limit, rel_tol=1e-6)


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


def jackknife(over: Sequence[int], total: Sequence[int]) -> tuple[float, float] | None:
    """95 % limits of a share from the counts of each prompt: log odds, with one prompt left out in turn."""
    from scipy import stats

    m = len(total)
    if m < 3:
        return None
    log_odds = []
    for left_out in [None, *range(m)]:
        kept = [i for i in range(m) if i != left_out]
        k, n = sum(over[i] for i in kept), sum(total[i] for i in kept)
        if k in (0, n):
            return None
        log_odds.append(math.log(k / (n - k)))
    middle, *others = log_odds
    mean = sum(others) / m
    half = stats.t.ppf(0.975, m - 1) * math.sqrt((m - 1) / m * sum((each - mean) ** 2 for each in others))
    return 1 / (1 + math.exp(half - middle)), 1 / (1 + math.exp(-half - middle))


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
