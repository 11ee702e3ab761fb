"""What is to be found in a sweep: the definitions as plain loops over its JSON files, and from scipy.

`Expected(root, rows="method")`, with flags as those of Args, has the `lives` (one per rollout, cell by cell,
alphas ascending), the `panels` (facet and alpha to lives), and the `tables()`, None where there is no number.
KL that was not measured is NaN, KL above 1e6 nats is inf.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from statistics import median, pvariance
from typing import Any

from scipy import stats

Row = dict[str, Any]
FLAGS: Row = {"rows": None, "alphas": (), "window": None, "threshold": 0.8, "keep_duplicates": False}
FLAGS |= {"roll": 65, "edges": "pad", "calib_tokens": 20, "normalize_kl": True}


class Life:
    """One rollout, by the definitions; `forks` are all its fork points with their pmass, ascending."""

    def __init__(self, calib: Row, i: int, alpha: float, raw: list, g: int, forks: list, flags: Row) -> None:
        window = flags["window"] or calib["window"]
        kl = [math.nan if x < -1e6 else math.inf if x > 1e6 else x for x in raw[:g]]
        self.cell = self.original = calib["cell"]  # the original is the cell that recorded it first
        self.prompt, self.alpha = (calib["model"], i), alpha
        self.facet = str(calib[flags["rows"]]) if flags["rows"] else ""
        self.target_kl, self.threshold = calib["target_kl"], flags["threshold"]
        self.kl = kl[: min(len(raw), g, window)]
        self.forks = [(s, mass) for s, mass in forks if s <= len(self.kl) and not math.isnan(mass)]
        self.masses = [mass for _, mass in self.forks]
        self.death = next((s for s, mass in self.forks if mass < flags["threshold"]), None)
        self.above_at_end = bool(self.forks) and self.masses[-1] >= flags["threshold"]
        is_cut, is_short = len(raw) < min(g, window), g < min(window, calib["window"])
        self.end = "died" if self.death is not None else "censored" if is_cut or is_short else "alive"
        self.eos = is_short and not is_cut
        is_last, is_back = self.death == len(self.kl), self.death is not None and self.above_at_end
        self.fates = [self.end, *["last"] * is_last, *["recovered"] * is_back]
        smooth = smoothed(tuple(kl), flags["roll"], flags["edges"])
        scale = p95(smooth[: flags["calib_tokens"]])
        self.scale = scale if scale is not None and scale > 1e-8 else None
        unit = 1 if not flags["normalize_kl"] else self.scale if alpha else None
        has_line = unit is not None and any(map(math.isfinite, self.kl))
        self.line = [x / (unit or 1) for x in smooth[: len(self.kl)]] if has_line else []
        held = [x for x in raw[:g] if x != 0] if alpha else [mass for _, mass in forks]
        is_told = any(map(math.isfinite, held))  # else it is nobody's copy
        self.identity = str((self.prompt, alpha, g, raw[:g], forks) if is_told else (self.cell, i, alpha))


class Expected:
    def __init__(self, root: Path, **given: Any) -> None:
        self.flags = flags = FLAGS | given
        self.lives, recorded_by = (lives := list[Life]()), dict[str, str]()
        for cell in sorted((path.parent.name for path in root.glob("*/calib.json")), key=by_number):
            read = {path.stem: json.loads(path.read_bytes()) for path in (root / cell).glob("*.json")}
            calib, probe = read["calib"] | {"cell": cell}, read["pmass"]
            kl, masses = by_alpha(read["trajectory"]["per_prompt_per_t_kl"]), by_alpha(probe["pmass_eval"])
            lengths = by_alpha(probe.get("gen_lens_eval") or {})
            for alpha in sorted(kl.keys() & masses.keys() & set(flags["alphas"] or kl)):
                for i, (curve, row) in enumerate(zip(kl[alpha], masses[alpha], strict=True)):
                    raw, row = ([math.nan if x is None else float(x) for x in xs] for xs in (curve, row))
                    last = max((t for t, x in enumerate(raw) if not math.isnan(x)), default=-1)
                    g = lengths[alpha][i] if lengths else last + 1
                    forks = sorted(zip(probe["fork_points"], row, strict=True))
                    lives.append(Life(calib, i, alpha, raw, g, forks, flags))
                    lives[-1].original = recorded_by.setdefault(lives[-1].identity, cell)
        originals = {life.facet for life in lives if life.alpha and life.original == life.cell}
        repeated = {life.facet for life in lives if life.alpha} - originals
        shown = [life for life in lives if flags["keep_duplicates"] or life.facet not in repeated]
        short = {life.facet: life.facet.split("/")[-1] for life in shown}
        names = short if len({*short.values()}) == len(short) else {name: name for name in short}
        self.facets = sorted(names.values(), key=by_number)
        alphas = sorted({life.alpha for life in shown} | {*flags["alphas"]})
        self.panels: dict[Any, list[Life]] = {(facet, alpha): [] for facet in self.facets for alpha in alphas}
        for life in shown:
            panel = self.panels[names[life.facet], life.alpha]
            if flags["keep_duplicates"] or life.identity not in [x.identity for x in panel]:
                panel.append(life)

    def tables(self) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = defaultdict(list)
        rows = self.flags["rows"]
        label: Row = {facet: {rows: facet} if rows else {} for facet in self.facets}
        for (facet, alpha), lives in self.panels.items():
            threshold = deaths_around(lives, self.flags["threshold"])
            for name, row in {"panels": fates(lives), "kl": cost(lives), "threshold": threshold}.items():
                found[name].append(label[facet] | {"alpha": alpha} | row)
        have_both = len({alpha > 0 for (_, alpha), lives in self.panels.items() if alpha and lives}) > 1
        for k, a in enumerate(self.facets):
            for sign in "+-":
                of_sign, arm = {"sign": sign} if have_both else {}, self.arm(a, sign)
                found["steering"] += [label[a] | of_sign | bracket(arm)] if arm else []
                for b in self.facets[k + 1 :]:
                    counts = self.compared(a, b, sign)
                    is_told = sum(counts.values()) >= 3 and len(self.facets) <= 6
                    found["compared"] += [{"a": a, "b": b} | of_sign | counts] if is_told else []
        return found

    def arm(self, facet: str, sign: str) -> dict[float, list[Life]]:
        panels = {alpha: lives for (f, alpha), lives in self.panels.items() if f == facet and alpha and lives}
        return {alpha: panels[alpha] for alpha in sorted(panels, key=abs) if (alpha > 0) == (sign == "+")}

    def compared(self, a: str, b: str, sign: str) -> Row:
        arms = self.arm(a, sign), self.arm(b, sign)
        alphas = [alpha for alpha in arms[0] if alpha in arms[1]]
        controls = self.panels.get((a, 0.0), []) + self.panels.get((b, 0.0), [])
        prompts = {x.prompt for x in self.lives} - {x.prompt for x in controls if x.end == "died"}
        later = {"a_later": 0, "b_later": 0, "not_told_apart": 0}
        for prompt in prompts:
            first, counts = [], []
            for arm in arms:
                died = [[x.end == "died" for x in arm[at] if x.prompt == prompt and x.forks] for at in alphas]
                counts.append([len(of_alpha) for of_alpha in died])
                first.append([*map(any, died), True].index(True))
            if alphas and counts[0] == counts[1] and 0 not in counts[0]:
                order = (first[0] > first[1]) - (first[0] < first[1])
                later[{1: "a_later", -1: "b_later", 0: "not_told_apart"}[order]] += 1
        return later


def by_alpha(lists: Row) -> dict[float, Any]:
    """By the value of the key to 6 significant digits."""
    return {float(f"{float(k):.6g}") * (abs(float(k)) > 1e-9) + 0.0: lists[k] for k in lists if lists[k]}


def by_number(name: str) -> list[Any]:
    return [float(part) if k % 2 else part for k, part in enumerate(re.split(r"([0-9]+(?:\.[0-9]+)?)", name))]


def p95(values: Iterable[float]) -> float | None:
    """Linear between two neighbours, of all that is not NaN; infinite where a neighbour is."""
    held = sorted(value for value in values if not math.isnan(value))
    k, part = divmod(95 * (len(held) - 1), 100)
    if not held or part == 0 or math.isinf(held[k]):
        return held[k] if held else None
    return held[k] + (held[k + 1] - held[k]) * part / 100


@cache
def smoothed(kl: tuple[float, ...], roll: int, edges: str) -> list[float]:
    """The centred rolling mean of what is finite, token by token."""
    roll = 1 if edges == "pad" and len(kl) < roll else roll
    first, last = (kl[:1], kl[-1:]) if edges == "pad" else ((math.nan,), (math.nan,))
    padded = [x if math.isfinite(x) else None for x in roll // 2 * first + kl + roll // 2 * last]
    windows = [padded[t : t + roll] for t in range(len(kl))]
    finite = [[x for x in window if x is not None] for window in windows]
    return [math.fsum(values) / len(values) if values else math.nan for values in finite]


def survival(followed: Sequence[tuple[int, bool]], forks: Sequence[int], weight: float) -> list[list[float]]:
    """By fork: the Kaplan-Meier share and its limits, from the token each was followed to, and dead there."""
    share, betas, curve = Fraction(1), [], []
    for fork in forks:
        deaths = sum(died and token == fork for token, died in followed)
        left = sum(token >= fork for token, _ in followed) - deaths
        if deaths:
            share *= Fraction(left, left + deaths)
            betas.append((weight * left + 1, weight * deaths))
        low = product_limit(0.025, [*betas, (weight * left, 1)]) if left else 0.0
        curve.append([float(share), low, product_limit(0.975, betas)])
    return curve


def product_limit(q: float, betas: Sequence[tuple[float, float]]) -> float:
    """The quantile of a product of beta variables, taken for the beta variable of its first two moments."""
    mean = math.prod(a / (a + b) for a, b in betas)
    variance = math.prod(a * (a + 1) / (a + b) / (a + b + 1) for a, b in betas) - mean**2
    size = mean * (1 - mean) / variance - 1 if betas else 0
    return float(stats.beta.ppf(q, mean * size, (1 - mean) * size)) if betas else 1.0


def survival_of(lives: Sequence[Life]) -> list[list[float]]:
    """By fork: its token, the share that never died, its limits, and the share above the threshold now."""
    measured = [x for x in lives if x.forks]
    forks = sorted({fork for x in measured for fork, _ in x.forks})
    followed = [(x.forks[-1][0] if x.death is None else x.death, x.death is not None) for x in measured]
    curve = survival(followed, forks, len({x.prompt for x in measured}) / max(1, len(measured)))
    now = [[mass >= x.threshold for x in measured for s, mass in x.forks if s == fork] for fork in forks]
    return [[fork, *point, sum(at) / len(at)] for fork, point, at in zip(forks, curve, now, strict=True)]


def fates(lives: Sequence[Life]) -> Row:
    counts = Counter(fate for x in lives for fate in x.fates)
    row: Row = {"n": len(lives), "n_died": counts["died"], "n_died_last": counts["last"]}
    row |= {f"n_{fate}": counts[fate] for fate in ("recovered", "censored", "alive")}
    at_end = [x.above_at_end for x in lives if x.forks]
    share, low, high = survival_of(lives)[-1][1:4] if at_end else 3 * [None]
    row |= {"never_died": share, "never_died_low": low, "never_died_high": high}
    return row | {"above_at_end": sum(at_end) / len(at_end) if at_end else None}


def cost(lives: Sequence[Life]) -> Row:
    kl, scales = [kl for x in lives for kl in x.kl if not math.isnan(kl)], [x.scale for x in lives if x.scale]
    over: dict[Any, list[bool]] = defaultdict(list)
    for x in lives:
        over[x.prompt] += [kl > x.target_kl for kl in x.kl if not math.isnan(kl)]
    low, high = jackknife([(sum(held), len(held)) for held in over.values() if held]) or (None, None)
    share = sum(map(sum, over.values())) / len(kl) if kl else None
    row: Row = {"kl_p95": p95(kl), "kl_median": median(kl) if kl else None, "over_budget": share}
    row |= {"over_budget_low": low, "over_budget_high": high, "scale": median(scales) if scales else None}
    return row | {"tokens": sum(len(x.kl) for x in lives) / len(lives) if lives else None}


def jackknife(counts: Sequence[tuple[int, int]]) -> tuple[float, float] | None:
    """The limits of a share, from counts by prompt: its log odds, with one prompt left out in turn."""
    m, over, total = len(counts), sum(k for k, _ in counts), sum(n for _, n in counts)
    shares = {i: Fraction(over - k, total - n) for i, (k, n) in enumerate(counts) if m >= 3}
    if len({*shares.values()}) < 2 or {0, 1} & {*shares.values()}:
        return None
    middle, *others = (math.log(share / (1 - share)) for share in (Fraction(over, total), *shares.values()))
    half = stats.t.ppf(0.975, m - 1) * math.sqrt((m - 1) * pvariance(others))
    return 1 / (1 + math.exp(half - middle)), 1 / (1 + math.exp(-half - middle))


def bracket(arm: dict[float, list[Life]]) -> Row:
    """The last alpha before the share that never died first ends below a half, and the first one below."""
    measured = {alpha: fates(lives) for alpha, lives in arm.items() if any(x.forks for x in lives)}
    alphas = [None, *measured]
    is_below = [row["never_died"] < 0.5 for row in measured.values()]
    k = [*is_below, True].index(True)
    row: Row = {}
    for end, half, alpha in (("last", "above", alphas[k]), ("first", "below", [*alphas, None][k + 1])):
        row[f"{end}_{half}_half"] = alpha
        for name in ("never_died", "never_died_low", "never_died_high", "above_at_end"):
            row[f"{end}_{name}"] = None if alpha is None else measured[alpha][name]
    return row


def deaths_around(lives: Sequence[Life], threshold: float) -> Row:
    levels = [threshold if step == 0 else round(threshold + step, 9) for step in (-0.1, -0.05, 0, 0.05, 0.1)]
    return {f"{x:g}": sum(min(life.masses, default=1) < x for life in lives) for x in levels if 0 < x <= 1}
