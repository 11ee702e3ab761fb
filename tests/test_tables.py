"""Every number in the tables and in the list of rollouts, against slow loops over the files as they were recorded."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles import beta_product, lifelines_survival, smoothed
from sweeps import random_cell, run, table, write_cell

import spaghetti_kl_alive as ska

SHIPPED = Path(__file__).parent / "data" / "smollm2_w256"
ALIVE_COLUMNS = [
    *("n", "n_died", "n_censored", "n_died_last", "n_alive", "n_recovered"),
    *("S_end", "S_end_low", "S_end_high", "S_end_at", "median_survival"),
]
BUDGET_COLUMNS = [
    *("budget", "kl_p95", "kl_p95_head", "over_budget", "died_within", "kl_median", "scale", "no_scale"),
]
LIST_COLUMNS = [
    *("cell", "prompt", "alpha", "observed_tokens", "end", "eos", "death_token", "recovered", "kl_p95_nats"),
    *("budget_nats", "budget_kept", "scale_nats", "line_max", "line_max_token", "line_end", "copy_of"),
]


# --------------------------------------------------------------- the definitions, by slow loops


@dataclass(frozen=True)
class Flags:
    """The flags that change a number, with their defaults."""

    rows: str | None = None
    threshold: float = 0.8
    window: int | None = None
    roll: int = 65
    edges: str = "pad"
    calib_tokens: int = 20
    calib_on: str = "smoothed"
    normalize_kl: bool = True
    keep_duplicates: bool = False


@dataclass(frozen=True)
class Life:
    """One rollout, by the definitions."""

    cell: str
    row: str
    prompt: int
    alpha: float
    source: tuple[str, int]  # model and prompt
    identity: tuple  # equal where one rollout was recorded twice
    kl: list[float]  # nats, what was generated; NaN where not finite
    masses: list[tuple[int, float]]  # each measured fork and its pmass, ascending
    n_tokens: int
    cut: bool
    eos: bool
    ended: bool  # before the window did
    budget: float | None
    scale: float | None
    line: list[float]
    copy_of: str = ""

    @cached_property
    def observed(self) -> list[float]:
        return finite(self.kl[: self.n_tokens])

    @cached_property
    def kl_p95(self) -> float | None:
        return percentile(self.observed)

    def measured(self) -> list[tuple[int, float]]:
        return [(s, mass) for s, mass in self.masses if s <= self.n_tokens]

    def death(self, threshold: float) -> int | None:
        return next((s for s, mass in self.measured() if mass < threshold), None)

    def recovered(self, threshold: float) -> bool:
        death = self.death(threshold)
        return death is not None and any(s > death and mass >= threshold for s, mass in self.measured())

    def end(self, threshold: float) -> str:
        death = self.death(threshold)
        if death is not None:
            return "died" if death < self.n_tokens else "died_last"
        return "censored" if self.ended else "alive"

    def followed(self, threshold: float) -> int | None:
        """Up to which token it is in the risk set."""
        death = self.death(threshold)
        return death if death is not None or not self.measured() else self.measured()[-1][0]


def finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def percentile(values: Sequence[float]) -> float | None:
    return float(np.percentile(values, 95)) if len(values) else None


def above(kl: float, budget: float) -> bool:
    """Equal in single precision is not above."""
    return kl > budget and not math.isclose(kl, budget, rel_tol=1e-6)


def is_nan(value: float | None) -> bool:
    return value is None or math.isnan(value)


def nats(value: float | None) -> float:
    """As recorded, where it can be a KL."""
    return math.nan if is_nan(value) or abs(value) > 1e6 else float(value)


def by_number(lists: dict[str, Any]) -> dict[float, Any]:
    return {float(key): value for key, value in lists.items()}


def lives_of(root: Path, flags: Flags) -> list[Life]:
    """The rollouts of all cells, in the order of the cells' names and of the alphas."""
    lives: list[Life] = []
    for folder in sorted(root.glob("*/")):
        calib, trajectory, measured = (json.loads((folder / name).read_text()) for name in ska.FILES)
        window = calib["window"] if flags.window is None else flags.window
        row = "" if flags.rows is None else folder.name if flags.rows == "cell" else str(calib[flags.rows])
        curves = by_number(trajectory["per_prompt_per_t_kl"])
        masses = by_number(measured["pmass_eval"])
        forks = measured["fork_points"]
        lengths = by_number(measured["gen_lens_eval"]) if "gen_lens_eval" in measured else None
        for alpha in sorted(curves.keys() & masses.keys()):
            for i, recorded in enumerate(curves[alpha]):
                length = lengths[alpha][i] if lengths else len(recorded)
                n_tokens = min(len(recorded), length, window)
                kl = [nats(value) for value in recorded[:length]]
                smooth = smoothed(kl, flags.roll, flags.edges)
                scale = percentile(finite((kl if flags.calib_on == "raw" else smooth)[: flags.calib_tokens]))
                scale = scale if scale is not None and scale > 1e-8 else None
                unit = scale if flags.normalize_kl else 1
                seen = [(s, mass) for s, mass in zip(forks, masses[alpha][i], strict=True) if not is_nan(mass)]
                generated = ["NaN" if is_nan(value) else float(value) for value in recorded[:length]]
                lives.append(
                    Life(
                        cell=folder.name,
                        row=row,
                        prompt=i,
                        alpha=alpha,
                        source=(calib["model"], i),
                        identity=(row, alpha, calib["model"], i, length, str(generated), str(sorted(seen))),
                        kl=kl,
                        masses=sorted(seen),
                        n_tokens=n_tokens,
                        cut=len(recorded) < min(length, window),
                        eos=length < min(window, calib["window"]) and len(recorded) >= length,
                        ended=length < window or len(recorded) < min(length, window),
                        budget=alpha**2 * calib["target_kl"] if alpha else None,
                        scale=scale,
                        line=[value / unit for value in smooth[:n_tokens]] if unit else [],
                    )
                )
    first: dict[tuple, str] = {}
    for life in lives:
        first.setdefault(life.identity, life.cell)
    return [replace(x, copy_of="" if first[x.identity] == x.cell else first[x.identity]) for x in lives]


def panels_of(lives: Sequence[Life], flags: Flags) -> dict[tuple[str, float], list[Life]]:
    """The rollouts of each panel, row by row; without copies."""
    rows = sorted({life.row for life in lives}, key=lambda row: int(row) if flags.rows == "seed" else row)
    alphas = sorted({life.alpha for life in lives})
    counted = [life for life in lives if flags.keep_duplicates or not life.copy_of]
    return {(row, a): [life for life in counted if (life.row, life.alpha) == (row, a)] for row in rows for a in alphas}


def alive_numbers(lives: Sequence[Life], threshold: float) -> dict[str, Any]:
    ends = [life.end(threshold) for life in lives]
    watched = [life for life in lives if life.measured()]
    ends_of = [(life.followed(threshold), life.death(threshold) is not None) for life in watched]
    forks = sorted({s for life in watched for s, _ in life.measured()})
    numbers: dict[str, Any] = {"n": len(lives)}
    numbers |= {f"n_{end}": ends.count(end) for end in ("died", "died_last", "censored", "alive")}
    numbers |= {"n_recovered": sum(life.recovered(threshold) for life in lives)}
    numbers |= dict.fromkeys(["S_end", "S_end_low", "S_end_high", "S_end_at", "median_survival"])
    if forks:
        share = lifelines_survival(ends_of, forks)
        low, high = beta_product(ends_of, forks, len({life.source for life in lives}) / len(lives))
        numbers |= {"S_end": share[-1], "S_end_low": low, "S_end_high": high, "S_end_at": forks[-1]}
        numbers["median_survival"] = next((t for t, s in zip(forks, share, strict=True) if s < 0.5 + 1e-9), None)
    return numbers


def budget_numbers(lives: Sequence[Life], alpha: float, flags: Flags) -> dict[str, Any]:
    pooled = [value for life in lives for value in life.observed]
    head = [value for life in lives for value in finite(life.kl[: min(flags.calib_tokens, life.n_tokens)])]
    scales = [life.scale for life in lives if life.scale is not None]
    over = died_within = None
    if alpha and lives:
        over = [above(value, life.budget) for life in lives for value in life.observed]
        within = [life for life in lives if life.kl_p95 is not None and not above(life.kl_p95, life.budget)]
        died_within = len([life for life in within if life.death(flags.threshold) is not None])
    return {
        "budget": sorted({life.budget for life in lives if life.budget is not None}),
        "kl_p95": percentile(pooled),
        "kl_p95_head": percentile(head),
        "over_budget": 100 * sum(over) / len(over) if over else None,
        "died_within": died_within,
        "kl_median": statistics.median(pooled) if pooled else None,
        "scale": statistics.median(scales) if scales else None,
        "no_scale": len(lives) - len(scales),
    }


def list_numbers(life: Life, threshold: float) -> dict[str, Any]:
    kept = None
    if life.budget is not None and life.kl_p95 is not None:
        kept = "over" if above(life.kl_p95, life.budget) else "within"
    drawn = finite(life.line)
    return {
        "cell": life.cell,
        "prompt": life.prompt,
        "alpha": life.alpha,
        "observed_tokens": life.n_tokens,
        "end": life.end(threshold),
        "eos": int(life.eos),
        "death_token": life.death(threshold),
        "recovered": int(life.recovered(threshold)),
        "kl_p95_nats": life.kl_p95,
        "budget_nats": life.budget,
        "budget_kept": kept,
        "scale_nats": life.scale,
        "line_max": max(drawn, default=None),
        "line_end": drawn[-1] if drawn else None,
        "copy_of": life.copy_of,
    }


NOTED = {
    "without steering": lambda life, flags: not life.alpha and life.death(flags.threshold) is not None,
    "shorter than --roll": lambda life, flags: flags.edges == "pad" and len(life.kl) < flags.roll,
    "cut short": lambda life, flags: life.cut,
    "after what was observed": lambda life, flags: (
        life.death(flags.threshold) is None and any(mass < flags.threshold for _, mass in life.masses)
    ),
    "without pmass": lambda life, flags: not life.measured(),
    "not finite": lambda life, flags: life.n_tokens - len(life.observed),
    "negative": lambda life, flags: len([value for value in life.observed if value < -1e-3]),
}


def noted_numbers(panels: dict[tuple[str, float], list[Life]], flags: Flags) -> dict[str, str]:
    """For each kind of warning, the panels that have such rollouts or tokens, and how many."""
    where: dict[str, list[str]] = {what: [] for what in [*NOTED, "More than half"]}
    for (row, alpha), lives in panels.items():
        name = f"{row} at alpha {alpha:g}" if row else f"alpha {alpha:g}"
        for what, count in NOTED.items():
            if k := sum(count(life, flags) for life in lives):
                where[what].append(f"{name}: {k}")
        deaths = sum(life.death(flags.threshold) is not None for life in lives)
        recovered = sum(life.recovered(flags.threshold) for life in lives)
        if 2 * recovered > deaths:
            where["More than half"].append(f"{name}: {recovered} of {deaths}")
    more = {what: [f"and {len(names) - 12} more"] * (len(names) > 12) for what, names in where.items()}
    return {what: ", ".join(names[:12] + more[what]) for what, names in where.items()}


# ------------------------------------------------------------------- what the script says of it


def said(sweep: ska.Sweep, folder: Path) -> list[list[dict[str, str]]]:
    """The three tables of the summary, as rows."""
    (folder / ska.TABLES).write_text(ska.summary_text(sweep), encoding="utf-8")
    return [table(folder, k) for k in range(3)]


def listed(sweep: ska.Sweep) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(ska.rollouts_csv(sweep.rollouts))))


def noted(sweep: ska.Sweep, what: str) -> str:
    """The panels, with their counts, that the note of that kind names."""
    found = [note for note in sweep.notes if what in note]
    assert len(found) <= 1
    return re.search(r" \(([^()]*)\)$", found[0])[1] if found else ""


def printed_on_terminal(sweep: ska.Sweep) -> list[dict[str, str]]:
    """The columns of the tables on the terminal, a panel each, under their title."""
    columns = []
    for block in ska.terminal_text(sweep).split("\n\n"):
        title, *lines = block.splitlines()
        names, *values = zip(*[re.split(r"  +", line.strip()) for line in lines], strict=True)
        columns += [{"title": title} | dict(zip(names, column, strict=True)) for column in values]
    return columns


def agrees(printed: str, value: float | None, digits: int, absent: str = "–") -> bool:
    """Whether the text is the number with so many significant digits at most, none of them wrong."""
    if value is None or printed == absent:
        return value is None and printed == absent
    unit = 10.0 ** (math.floor(math.log10(abs(value))) + 1 - digits) if value else 0
    single = 2e-7 * abs(value) + 1e-9  # KL is kept in single precision
    return abs(float(printed) - value) <= 0.5 * unit + single and printed == f"{float(printed):.{digits}g}"


def agrees_to_a_thousandth(printed: str, value: float | None, tolerance: float = 1e-9) -> bool:
    if value is None or printed == "–":
        return value is None and printed == "–"
    return re.fullmatch(r"[01]\.\d{3}", printed) and abs(float(printed) - value) <= 0.0005 + tolerance


def check(root: Path, flags: Flags, folder: Path) -> tuple[ska.Sweep, list[Life]]:
    """Read the sweep and compare all that is said of it with the definitions."""
    sweep = ska.read(ska.Args(runs_root=root, **vars(flags)))
    lives = lives_of(root, flags)
    panels = panels_of(lives, flags)
    tables = said(sweep, folder)
    labels = [
        {flags.rows: row, "alpha": f"{alpha:g}"} if flags.rows else {"alpha": f"{alpha:g}"} for row, alpha in panels
    ]
    levels = [f"{level / 100:g}" for level in levels_around(flags.threshold)]
    for rows, columns in zip(tables, (ALIVE_COLUMNS, BUDGET_COLUMNS, levels), strict=True):
        assert [{name: row[name] for name in labels[0]} for row in rows] == labels
        assert all(list(row) == [*labels[0], *columns] for row in rows)
    for ((_, alpha), members), row in zip(panels.items(), tables[0], strict=True):
        expected = alive_numbers(members, flags.threshold)
        assert expected["n"] == sum(expected[f"n_{end}"] for end in ("died", "died_last", "censored", "alive"))
        for name, value in expected.items():
            tolerance = {"S_end": 1e-9, "S_end_low": 1e-4, "S_end_high": 1e-4}.get(name)
            good = agrees_to_a_thousandth(row[name], value, tolerance) if tolerance else row[name] == whole(value)
            assert good, (alpha, name, row, expected)
    for ((_, alpha), members), row in zip(panels.items(), tables[1], strict=True):
        expected = budget_numbers(members, alpha, flags)
        budgets = expected.pop("budget")
        assert row["budget"].count(",") == max(0, len(budgets) - 1)
        assert all(map(agrees, row["budget"].split(", "), budgets or [None], [7] * len(budgets or [None])))
        assert row["over_budget"].endswith("%") == (expected["over_budget"] is not None)
        for name, value in expected.items():
            if name in ("died_within", "no_scale"):
                assert row[name] == whole(value), (alpha, name, row, expected)
            else:
                text = row[name].removesuffix("%")
                assert agrees(text, value, 3 if name == "over_budget" else 4), (alpha, name, row, expected)
    for members, row in zip(panels.values(), tables[2], strict=True):
        for name, level in zip(levels, levels_around(flags.threshold), strict=True):
            assert row[name] == str(sum(life.death(level / 100) is not None for life in members)), (name, row)
    rows = listed(sweep)
    for life, row in zip(lives, rows, strict=True):
        assert list(row) == LIST_COLUMNS
        expected = list_numbers(life, flags.threshold)
        for name, value in expected.items():
            if isinstance(value, float):
                assert agrees(row[name], value, 12 if name == "alpha" else 6, ""), (name, row, expected)
            else:
                assert row[name] == ("" if value is None else str(value)), (name, row, expected)
        assert bool(row["line_max_token"]) == bool(row["line_max"])
        if row["line_max_token"]:
            peak = life.line[int(row["line_max_token"])]
            assert math.isclose(peak, expected["line_max"], rel_tol=1e-6, abs_tol=1e-9)
    for what, where in noted_numbers(panels, flags).items():
        assert noted(sweep, what) == where, what
    titles = ["Is the model still alive?", "KL within the budget? (nats)"]
    for k, title in enumerate(titles):
        columns = [column for column in printed_on_terminal(sweep) if column["title"].startswith(title)]
        for row, column in zip(tables[k], columns, strict=True):
            name = f"  {flags.rows}: {row.pop(flags.rows)}" if flags.rows else ""
            assert column == {"title": f"{title}{name}"} | row
    return sweep, lives


def whole(value: int | None) -> str:
    return "–" if value is None else str(value)


def levels_around(threshold: float) -> list[int]:
    """In hundredths."""
    return [level for level in (round(100 * threshold) + step for step in (-10, -5, 0, 5, 10)) if 0 < level <= 100]


# --------------------------------------------------------------------------------- any sweep


NASTY_FORKS = [0, 3, 10, 25, 40, 60]
PMASS = [0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.0, 1.0, 1.0, math.nan, None]


def nasty_rollout(rng: np.random.Generator, budget: float) -> tuple[list[float | None], list[float | None], int]:
    """KL, often equal to its budget or not finite, pmass, often equal to a threshold or missing, and the length."""
    length = int(rng.choice([0, 1, 3, 10, 25, 39, 40, 40, 55]))
    recorded = max(0, length + int(rng.choice([0, 0, 0, -1, -6])))
    kl = np.round(budget * rng.choice([0, 0.2, 0.5, 0.9, 1, 1, 1.5], recorded) * rng.choice([0.3, 0.6, 1]), 10).tolist()
    for t in range(recorded):
        if rng.random() < 0.06:
            kl[t] = [math.nan, None, math.inf, 2e6, -0.5, 40.0][rng.integers(6)]
    if recorded == length:
        kl += [[math.nan, None, 1000.0][rng.integers(3)]] * int(rng.choice([0, 0, 5]))
    pmass = [PMASS[k] for k in rng.integers(len(PMASS), size=len(NASTY_FORKS))]
    return kl, [None] * len(pmass) if rng.random() < 0.1 else pmass, length


def nasty_sweep(root: Path, rng: np.random.Generator) -> None:
    """A few cells: models, methods and seeds, budgets that differ, forks in any order, copies, records cut short."""
    alphas = sorted(rng.choice([-1.0, -0.3, 0.0, 0.3, 0.7, 1.0, 2.0], 3, replace=False).tolist())
    held: dict[str, Any] = {}
    for c in range(rng.integers(1, 6)):
        about = {"target_kl": [1.0, 0.5, 2.0][rng.integers(3)], "seed": [0, 2, 10][rng.integers(3)]}
        about |= {"model": f"org/{'ab'[rng.integers(2)]}", "method": ["mean_diff", "pca"][rng.integers(2)]}
        n = rng.integers(1, 7)
        rollouts = {
            a: [nasty_rollout(rng, (a * a or rng.choice([0, 0.01])) * about["target_kl"]) for _ in range(n)]
            for a in alphas
        }
        for a in alphas:
            if held and rng.random() < 0.4:  # the one before, again
                rollouts[a][: len(held[a])] = held[a][: len(rollouts[a])]
        held = rollouts
        absent = alphas[rng.integers(3)] if rng.random() < 0.3 else None  # the sweep is not done
        order = rng.permutation(len(NASTY_FORKS))
        kl, pmass, length = ({str(a): [row[k] for row in rollouts[a]] for a in alphas} for k in range(3))
        pmass = {str(a): [[row[k] for k in order] for row in pmass[str(a)]] for a in alphas if a != absent}
        forks = [NASTY_FORKS[k] for k in order]
        write_cell(root / f"cell{c}", kl, pmass, length if rng.random() < 0.8 else None, forks, **about)


def any_flags(rng: np.random.Generator) -> Flags:
    choices = {
        "rows": [None, None, "method", "model", "seed", "cell"],
        "threshold": [0.8, 0.8, 0.75, 0.95, 1.0, 0.1],
        "window": [None, None, 10, 25, 60],
        "roll": [1, 4, 5, 30, 65],
        "edges": ["pad", "shrink"],
        "calib_tokens": [1, 5, 20, 100],
        "calib_on": ["smoothed", "raw"],
        "normalize_kl": [True, True, False],
        "keep_duplicates": [False, True],
    }
    return Flags(**{name: values[rng.integers(len(values))] for name, values in choices.items()})


@pytest.mark.parametrize("seed", range(40))
def test_all_numbers_are_those_of_the_definitions_on_any_sweep(tmp_path, seed):
    rng = np.random.default_rng(seed)
    nasty_sweep(tmp_path / "sweep", rng)
    check(tmp_path / "sweep", any_flags(rng), tmp_path)


@pytest.mark.parametrize(
    "flags",
    [
        Flags(rows="method"),
        Flags(threshold=0.95, window=100, roll=5, edges="shrink", calib_on="raw", normalize_kl=False),
    ],
    ids=["per method", "pooled"],
)
def test_all_numbers_are_those_of_the_definitions_on_the_shipped_sweep(tmp_path, flags):
    check(SHIPPED, flags, tmp_path)


# ---------------------------------------------------------------------- one definition at a time


WELL = [1.0, 1.0, 1.0]  # pmass of a rollout that lives, at forks 0, 5 and 20
DIED, DIED_LAST, BACK = [1.0, 0.5, 0.5], [1.0, 1.0, 0.5], [1.0, 0.5, 0.9]
NATS = {"roll": 1, "calib_on": "raw"}


def cell_of(folder: Path, pmass: dict[str, list], kl: float = 0.1, tokens: int = 40, **about: object) -> Path:
    """A cell of rollouts of constant KL, with these pmass."""
    curves = {alpha: [tokens * [kl] for _ in rows] for alpha, rows in pmass.items()}
    return write_cell(folder, curves, pmass, {alpha: [tokens] * len(rows) for alpha, rows in pmass.items()}, **about)


def read_sweep(root: Path, **flags: object) -> ska.Sweep:
    return ska.read(ska.Args(runs_root=root, **flags))


def tables_of(root: Path, **flags: object) -> list[list[dict[str, str]]]:
    return said(read_sweep(root, **flags), root)


def column(rows: list[dict[str, str]], *names: str) -> list[tuple[str, ...]]:
    return [tuple(row[name] for name in names) for row in rows]


def test_how_rollouts_ended_adds_up_and_a_death_at_the_last_token_is_a_death(tmp_path):
    pmass = {"1.0": [WELL, DIED, BACK, DIED_LAST, WELL, WELL]}
    kl = {"1.0": [40 * [0.1], 40 * [0.1], 40 * [0.1], 20 * [0.1], 30 * [0.1], 39 * [0.1]]}
    write_cell(tmp_path / "cell", kl, pmass, {"1.0": [40, 40, 40, 20, 30, 40]})
    sweep = read_sweep(tmp_path)
    (row,), _, (deaths,) = said(sweep, tmp_path)
    assert row["n"] == "6"
    assert column([row], "n_died", "n_died_last", "n_censored", "n_alive", "n_recovered") == [("2", "1", "2", "1", "1")]
    assert row["S_end"] == "0.500"
    assert row["S_end_at"] == row["median_survival"] == "20"
    assert deaths["0.8"] == "3"
    ends = ["alive", "died", "died", "died_last", "censored", "censored"]
    assert [line["end"] for line in listed(sweep)] == ends
    assert [line["eos"] for line in listed(sweep)] == list("000110")
    assert [line["death_token"] for line in listed(sweep)] == ["", "5", "5", "20", "", ""]


def test_median_survival_is_the_first_fork_at_which_no_more_than_half_live(tmp_path):
    died = {"half": [DIED] * 3 + [WELL] * 3, "fewer": [DIED] * 2 + [WELL] * 3, "at once": [[0.5, 1, 1]] * 2 + [DIED]}
    for name, rows in died.items():
        cell_of(tmp_path / name, {"1.0": rows})
    alive, *_ = tables_of(tmp_path, rows="cell")
    assert column(alive, "cell", "median_survival") == [("at once", "0"), ("fewer", "–"), ("half", "5")]


def test_survival_ends_at_the_last_fork_that_anyone_was_measured_at(tmp_path):
    cell_of(tmp_path / "a", {"1.0": [[1.0, 1.0, math.nan], [1.0, math.nan, math.nan]]})
    cell_of(tmp_path / "b", {"1.0": [WELL, [1.0, math.nan, math.nan]]}, tokens=19)
    cell_of(tmp_path / "c", {"1.0": [WELL, [1.0, 0.5, math.nan]]}, tokens=20)
    alive, *_ = tables_of(tmp_path, rows="cell")
    assert column(alive, "S_end", "S_end_at") == [("1.000", "5"), ("1.000", "5"), ("0.500", "20")]


def test_what_nothing_was_measured_of_has_no_number(tmp_path):
    unmeasured = [math.nan, None, math.nan]
    write_cell(tmp_path / "cell", {"1.0": [40 * [math.nan]]}, {"1.0": [unmeasured]}, {"1.0": [40]})
    alive, budget, deaths = tables_of(tmp_path, alphas=(1.0, 3.0))
    nothing = dict.fromkeys(["S_end", "S_end_low", "S_end_high", "S_end_at", "median_survival"], "–")
    ends = {"n_died": "0", "n_died_last": "0", "n_censored": "0", "n_recovered": "0"}
    assert alive[0] == {"alpha": "1", "n": "1", "n_alive": "1"} | ends | nothing
    assert alive[1] == {"alpha": "3", "n": "0", "n_alive": "0"} | ends | nothing
    nothing = dict.fromkeys(["kl_p95", "kl_p95_head", "over_budget", "kl_median", "scale"], "–")
    assert budget[0] == {"alpha": "1", "budget": "1", "died_within": "0", "no_scale": "1"} | nothing
    assert budget[1] == {"alpha": "3", "budget": "–", "died_within": "–", "no_scale": "0"} | nothing
    assert [set(row.values()) for row in deaths] == [{"1", "0"}, {"3", "0"}]


def test_evidence_of_the_interval_is_prompts_and_not_rollouts(tmp_path):
    """Two methods on the same 4 prompts are 8 rollouts; of two models, the same index is not the same prompt."""
    for name, method, model in (("a", "mean_diff", "org/m"), ("b", "pca", "org/m"), ("c", "pca", "org/other")):
        kl = {"a": 0.1, "b": 0.2, "c": 0.3}[name]
        cell_of(tmp_path / name, {"1.0": [WELL] * 4}, kl=kl, method=method, model=model)
    lows = {}
    for names in ("a", "ab", "ac", "abc"):
        root = tmp_path / "of" / names
        root.mkdir(parents=True)
        for name in names:
            (root / name).symlink_to(tmp_path / name)
        (row,), *_ = tables_of(root)
        lows[names] = row["n"], row["S_end_low"]
    four, eight = (f"{0.025 ** (1 / prompts):.3f}" for prompts in (4, 8))
    assert lows == {"a": ("4", four), "ab": ("8", four), "ac": ("8", eight), "abc": ("12", eight)}


def test_copies_count_once_and_kept_they_add_rollouts_but_no_evidence(tmp_path):
    for name in ("a", "b"):
        cell_of(tmp_path / name, {"0.0": [WELL] * 4, "1.0": [WELL, WELL, BACK if name == "a" else DIED, WELL]})
    sweep, kept = read_sweep(tmp_path), read_sweep(tmp_path, keep_duplicates=True)
    dropped_rows, kept_rows = (said(each, tmp_path)[0] for each in (sweep, kept))
    low = f"{0.025 ** (1 / 4):.3f}"
    assert column(dropped_rows, "n", "n_died") == [("4", "0"), ("5", "2")]
    assert column(kept_rows, "n", "n_died") == [("8", "0"), ("8", "2")]
    assert dropped_rows[0]["S_end_low"] == kept_rows[0]["S_end_low"] == low
    for each, what in ((sweep, "left out"), (kept, r"kept \(--keep-duplicates\)")):
        note = rf"Exact copies of rollouts, {what}: 7 of 8 of `b` \(those of `a` again, alpha 0, 1\)"
        assert any(re.fullmatch(note, found) for found in each.notes), each.notes
        assert [row["copy_of"] for row in listed(each)] == 8 * [""] + ["a", "a", "a", "a", "a", "a", "", "a"]


def test_every_budget_that_differs_is_listed_and_each_token_held_to_its_own_cells(tmp_path):
    for name, kl, target in (("a", 0.4, 2.0), ("b", 0.41, 1.0), ("c", 0.42, 1.0)):
        cell_of(tmp_path / name, {"-1.0": [WELL], "0.5": [WELL]}, kl=kl, target_kl=target)
    sweep = read_sweep(tmp_path)
    _, budget, _ = said(sweep, tmp_path)
    assert column(budget, "alpha", "budget", "over_budget") == [("-1", "1, 2", "0%"), ("0.5", "0.25, 0.5", "66.7%")]
    kept = column(listed(sweep), "alpha", "budget_nats", "budget_kept")
    assert kept[:2] == [("-1", "2", "within"), ("0.5", "0.5", "within")]
    assert kept[2:] == 2 * [("-1", "1", "within"), ("0.5", "0.25", "over")]


def test_kl_at_its_budget_is_within_it(tmp_path):
    """0.7 times 0.7 is a little less than 0.49 in double precision."""
    cell_of(tmp_path / "cell", {"0.7": [DIED, WELL]}, kl=0.49)
    sweep = read_sweep(tmp_path)
    (row,) = said(sweep, tmp_path)[1]
    assert (row["budget"], row["kl_p95"], row["over_budget"], row["died_within"]) == ("0.49", "0.49", "0%", "1")
    assert [line["budget_kept"] for line in listed(sweep)] == ["within", "within"]


def test_died_within_counts_all_deaths_of_rollouts_whose_own_95th_percentile_is_within(tmp_path):
    rows = [DIED, BACK, DIED_LAST, WELL, DIED, DIED]
    few, many = [5.0] + 39 * [0.1], 3 * [5.0] + 37 * [0.1]  # 2.5 % and 7.5 % of the tokens are above
    kl = [few, few, 20 * [0.1], few, many, 40 * [math.nan]]
    write_cell(tmp_path / "cell", {"1.0": kl}, {"1.0": rows}, {"1.0": [40, 40, 20, 40, 40, 40]})
    (row,) = tables_of(tmp_path)[1]
    assert row["died_within"] == "3"
    assert row["over_budget"] == f"{100 * 6 / 180:.3g}%"


@pytest.mark.parametrize(("loud", "share", "is_over"), [(50, "5%", False), (51, "5.1%", True), (0, "0%", False)])
def test_a_panel_is_over_its_budget_where_more_than_5_percent_of_the_tokens_are(tmp_path, loud, share, is_over):
    kl = loud * [1.1] + (1000 - loud) * [0.1]
    write_cell(tmp_path / "cell", {"1.0": [kl]}, {"1.0": [WELL]}, {"1.0": [1000]}, window=1000)
    sweep = read_sweep(tmp_path)
    assert said(sweep, tmp_path)[1][0]["over_budget"] == share
    assert sweep.panels[0].is_over == is_over


def test_the_unsteered_control_has_no_budget(tmp_path):
    cell_of(tmp_path / "cell", {"0.0": [DIED]})
    sweep = read_sweep(tmp_path)
    _, (row,), _ = said(sweep, tmp_path)
    assert column([row], "budget", "over_budget", "died_within", "kl_p95") == [("–", "–", "–", "0.1")]
    assert column(listed(sweep), "budget_nats", "budget_kept") == [("", "")]
    assert not sweep.panels[0].is_over


def test_percentiles_and_median_are_pooled_over_tokens_and_the_scale_over_rollouts(tmp_path):
    kl = [30 * [1.0] + 10 * [3.0], 10 * [7.0], 5 * [0.0]]
    write_cell(tmp_path / "cell", {"2.0": kl}, {"2.0": [WELL] * 3}, {"2.0": [40, 10, 5]})
    (row,) = tables_of(tmp_path, calib_tokens=4, **NATS)[1]
    assert column([row], "kl_p95", "kl_p95_head", "kl_median") == [("7", "7", "1")]
    assert column([row], "scale", "no_scale") == [("4", "1")]  # of 1 and 7


def test_the_head_ends_with_the_window_and_the_scale_does_not(tmp_path):
    kl = [2 * [1.0] + 38 * [3.0]]
    write_cell(tmp_path / "cell", {"2.0": kl}, {"2.0": [WELL]}, {"2.0": [40]})
    (row,) = tables_of(tmp_path, window=2, **NATS)[1]
    assert column([row], "kl_p95", "kl_p95_head", "scale") == [("1", "1", "3")]


@pytest.mark.parametrize(
    ("threshold", "levels"),
    [
        (0.8, {"0.7": 1, "0.75": 2, "0.8": 3, "0.85": 4, "0.9": 5}),
        (0.95, {"0.85": 4, "0.9": 5, "0.95": 6, "1": 7}),
        (1.0, {"0.9": 5, "0.95": 6, "1": 7}),
        (0.1, {"0.05": 0, "0.1": 0, "0.15": 0, "0.2": 0}),
        (0.05, {"0.05": 0, "0.1": 0, "0.15": 0}),
    ],
)
def test_deaths_are_counted_at_the_threshold_and_around_it_where_that_is_a_threshold(tmp_path, threshold, levels):
    """At each level lies a pmass that is not below it; the highest is of a death at the last token."""
    masses = [0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0]
    rows = [[1.0, mass, 1.0] if mass < 0.95 else [1.0, 1.0, mass] for mass in masses]
    cell_of(tmp_path / "cell", {"1.0": rows}, tokens=20)
    (row,) = tables_of(tmp_path, threshold=threshold)[2]
    assert row == {"alpha": "1"} | {level: str(deaths) for level, deaths in levels.items()}


def test_deaths_without_steering_are_noted_with_their_row(tmp_path):
    cell_of(tmp_path / "a", {"0.0": [WELL, DIED, DIED_LAST], "1.0": [DIED] * 3}, tokens=20)
    cell_of(tmp_path / "b", {"0.0": [WELL], "1.0": [DIED]}, method="pca")
    assert noted(read_sweep(tmp_path, rows="method"), "without steering") == "mean_diff at alpha 0: 2"
    assert noted(read_sweep(tmp_path), "without steering") == "alpha 0: 2"
    assert noted(read_sweep(tmp_path, threshold=0.4), "without steering") == ""


def test_recovery_is_noted_where_more_than_half_of_the_dead_came_back(tmp_path):
    cell_of(tmp_path / "a", {"1.0": [BACK, DIED, WELL], "2.0": [BACK, BACK, DIED]})
    cell_of(tmp_path / "b", {"1.0": [BACK, WELL, WELL], "2.0": [DIED, WELL]}, kl=0.2, method="pca")
    sweep = read_sweep(tmp_path, rows="method")
    assert noted(sweep, "More than half of the deaths") == "mean_diff at alpha 2: 2 of 3, pca at alpha 1: 1 of 1"
    assert noted(read_sweep(tmp_path, rows="method", threshold=0.5), "More than half of the deaths") == ""


def test_rollouts_shorter_than_the_roll_are_noted_by_what_was_generated(tmp_path):
    lengths = {"1.0": [4, 5, 40], "2.0": [4, 4, 5]}
    kl = {alpha: [45 * [0.1] for _ in held] for alpha, held in lengths.items()}
    write_cell(tmp_path / "cell", kl, {alpha: [WELL] * 3 for alpha in lengths}, lengths)
    assert noted(read_sweep(tmp_path, roll=5), "shorter than --roll 5") == "alpha 1: 1, alpha 2: 2"
    assert noted(read_sweep(tmp_path, roll=5, window=3), "shorter than --roll 5") == "alpha 1: 1, alpha 2: 2"
    assert noted(read_sweep(tmp_path, roll=4), "shorter than --roll") == ""
    assert noted(read_sweep(tmp_path, roll=5, edges="shrink"), "shorter than --roll") == ""


def test_it_is_noted_where_all_rollouts_are_shorter_than_the_roll(tmp_path):
    cell_of(tmp_path / "cell", {"1.0": [WELL, WELL], "2.0": [WELL]})
    (note,) = [note for note in read_sweep(tmp_path, roll=41).notes if "--roll 41" in note]
    assert "nothing is smoothed" in note
    assert not any("nothing is smoothed" in note for note in read_sweep(tmp_path, roll=40).notes)


def test_records_that_end_before_their_rollout_and_its_window_are_noted(tmp_path):
    kl = {"1.0": [29 * [0.1], 30 * [0.1], 39 * [0.1], 40 * [0.1], 45 * [0.1]], "2.0": [[]]}
    pmass = {"1.0": [WELL] * 5, "2.0": [WELL]}
    write_cell(tmp_path / "cell", kl, pmass, {"1.0": [30, 30, 50, 50, 50], "2.0": [1]})
    sweep = read_sweep(tmp_path)
    assert noted(sweep, "KL records cut short") == "alpha 1: 2, alpha 2: 1"
    assert column(listed(sweep), "end", "eos")[:2] == [("censored", "0"), ("censored", "1")]
    assert noted(read_sweep(tmp_path, window=29), "KL records cut short") == "alpha 2: 1"


def test_drops_after_what_was_observed_are_noted_and_are_no_deaths(tmp_path):
    kl = {"1.0": [19 * [0.1], 20 * [0.1], 19 * [0.1], 19 * [0.1]]}
    write_cell(tmp_path / "cell", kl, {"1.0": [DIED_LAST, DIED_LAST, DIED, WELL]}, {"1.0": [19, 20, 19, 19]})
    sweep = read_sweep(tmp_path)
    assert noted(sweep, "after what was observed") == "alpha 1: 1"
    assert [row["end"] for row in listed(sweep)] == ["censored", "died_last", "died", "censored"]


def test_kl_that_is_not_finite_or_negative_and_missing_pmass_are_noted(tmp_path):
    kl = [[math.nan, None, math.inf, 2e6, -0.002, -0.0009] + 34 * [0.1], 40 * [-0.5]]
    write_cell(tmp_path / "cell", {"1.0": kl}, {"1.0": [[None, None, None], WELL]}, {"1.0": [40, 30]})
    sweep = read_sweep(tmp_path)
    assert noted(sweep, "KL is not finite") == "alpha 1: 4"
    assert noted(sweep, "negative KL") == "alpha 1: 31"
    assert noted(sweep, "without pmass") == "alpha 1: 1"


def test_a_sweep_with_nothing_unusual_has_no_note(tmp_path):
    cell_of(tmp_path / "cell", {"0.0": [WELL], "1.0": [WELL, DIED]}, tokens=65, window=65)
    assert read_sweep(tmp_path).notes == []


@pytest.mark.parametrize(("n", "more"), [(12, []), (14, ["and 2 more"])])
def test_a_note_lists_a_dozen_panels_and_counts_the_others(tmp_path, n, more):
    cell_of(tmp_path / "cell", {f"{alpha}.0": [WELL] for alpha in range(1, n + 1)}, tokens=4)
    first = [f"alpha {alpha}: 1" for alpha in range(1, 13)]
    assert noted(read_sweep(tmp_path, roll=5), "shorter than --roll") == ", ".join(first + more)


def test_the_alphas_of_copies_are_noted_in_numeric_order(tmp_path):
    alphas = {"-1.0": [WELL], "0.0": [WELL], "0.5": [WELL], "2.0": [WELL], "10.0": [WELL]}
    cell_of(tmp_path / "a", alphas)
    cell_of(tmp_path / "b", alphas | {"2.0": [DIED]})
    assert any("(those of `a` again, alpha -1, 0, 0.5, 10)" in note for note in read_sweep(tmp_path).notes)


def test_notes_and_settings_stand_under_the_tables(tmp_path):
    cell_of(tmp_path / "cell", {"0.0": [DIED]}, c_star=2.5, layer=7, seed=3)
    sweep = read_sweep(tmp_path, threshold=0.75, calib_tokens=7)
    text = ska.summary_text(sweep)
    notes = text.split("## Notes\n\n")[1].splitlines()
    assert notes == [
        "- Cells used: `cell` (org/m, mean_diff, seed 3, layer 7, c_star 2.5)",
        *(f"- {note}" for note in sweep.notes),
        f"- Settings: {sweep.settings()}",
    ]
    assert "threshold 0.75" in notes[-1] and "window 40" in notes[-1]
    assert "`pmass_eval` is below 0.75" in text and "the first 7 of each" in text


def test_alphas_that_print_alike_get_the_digits_that_tell_them_apart(tmp_path):
    cell_of(tmp_path / "cell", {"1.0000001": [DIED], "1.0": [WELL]})
    sweep = read_sweep(tmp_path)
    alive, *_ = said(sweep, tmp_path)
    assert column(alive, "alpha", "n_died") == [("1", "0"), ("1.0000001", "1")]
    assert column(listed(sweep), "alpha", "end") == [("1", "alive"), ("1.0000001", "died")]


def test_a_row_whose_name_holds_a_pipe_stays_one_cell_of_the_table(tmp_path):
    cell_of(tmp_path / "cell", {"1.0": [WELL]}, method="a|b")
    (row,), *_ = tables_of(tmp_path, rows="method")
    assert row["method"] == "a\\|b"
    assert printed_on_terminal(read_sweep(tmp_path, rows="method"))[0]["title"].endswith("method: a|b")


@pytest.mark.parametrize("flags", [{}, {"rows": "method"}], ids=["pooled", "per method"])
def test_the_tables_on_the_terminal_fit_in_80_columns(flags):
    assert max(map(len, ska.terminal_text(read_sweep(SHIPPED, **flags)).splitlines())) <= 80


def test_ten_alphas_stand_in_tables_below_each_other_with_the_numbers_of_the_file(tmp_path):
    random_cell(tmp_path / "cell", alphas=(-2.0, -1.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0))
    sweep = read_sweep(tmp_path)
    assert max(map(len, ska.terminal_text(sweep).splitlines())) <= 80
    alive, budget, _ = said(sweep, tmp_path)
    columns = [{name: text for name, text in held.items() if name != "title"} for held in printed_on_terminal(sweep)]
    assert columns == [*alive, *budget]


def test_the_program_writes_these_tables_prints_two_and_logs_the_notes(tmp_path):
    cell_of(tmp_path / "sweep" / "cell", {"0.0": [DIED]})
    sweep = read_sweep(tmp_path / "sweep", dpi=20, survival=False)
    out = tmp_path / "out"
    done = run("--runs-root", tmp_path / "sweep", "--out", out, "--dpi", 20, "--no-survival")
    assert done.status == 0
    assert (out / ska.TABLES).read_text(encoding="utf-8") == ska.summary_text(sweep)
    assert (out / ska.ROLLOUTS).read_text(encoding="utf-8") == ska.rollouts_csv(sweep.rollouts)
    assert done.out.startswith(ska.terminal_text(sweep) + "\n")
    assert len(sweep.notes) == 2  # of the death, and of the roll
    for note in sweep.notes:
        assert f"WARNING: {note}\n" in done.err
