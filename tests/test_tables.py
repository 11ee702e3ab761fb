"""Every number in the tables and in the list of rollouts, against slow loops over the files as they were recorded."""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles import Life, above, beta_product, jackknife, lifelines_survival, lives_of, panels_of, percentile
from sweeps import noted, read, table, write_cell

import spaghetti_kl_alive as ska

SHIPPED = Path(__file__).parent / "data" / "smollm2_w256"
PADS = {"edges": "pad", "calib_on": "smoothed", "normalize_kl": True}  # what makes scales by one token


# ------------------------------------------------------- what should be printed, by slow loops


def number(value: float, digits: int = 4) -> str:
    return "–" if math.isnan(value) else "∞" if math.isinf(value) else f"{value:.{digits}g}"


def alive_texts(lives: Sequence[Life]) -> dict[str, str]:
    ends = [life.end for life in lives]
    texts = {"n": str(len(lives))}
    texts |= {f"n_{end}": str(ends.count(end)) for end in ("died", "censored", "died_last", "alive")}
    texts |= {"n_recovered": str(sum(life.recovered for life in lives))}
    watched = [(life.followed_to, life.death is not None) for life in lives if life.forks]
    forks = sorted({s for life in lives for s, _ in life.forks})
    if not forks:
        return texts | dict.fromkeys(["S_end", "S_end_interval", "S_end_at", "median_survival"], "–")
    share = lifelines_survival(watched, forks)
    low, high = beta_product(watched, forks, len({(life.model, life.prompt) for life in lives}) / len(lives))
    texts |= {"S_end": f"{share[-1]:.3f}", "S_end_interval": f"[{low:.3f}, {high:.3f}]", "S_end_at": str(forks[-1])}
    before = [s for s, alive in zip(forks, share, strict=True) if alive > 0.5 + 1e-9]
    reached = forks[len(before)] if len(before) < len(forks) else None
    median = f"({before[-1]}, {reached}]" if before else f"[0, {reached}]" if reached else "0"
    return texts | {"median_survival": "–" if reached is None else median}


def kl_texts(lives: Sequence[Life]) -> dict[str, str]:
    """The row of the table, and what is made of it in words: verdict and sign."""
    prompts: dict[Any, list[bool]] = {}
    for life in lives:
        held = [above(kl, life.target) for kl in life.kl if not math.isnan(kl)]
        prompts[life.model, life.prompt] = prompts.get((life.model, life.prompt), []) + held
    pooled = [kl for life in lives for kl in life.kl if not math.isnan(kl)]
    targets = sorted({life.target for life in lives if life.alpha})
    over = [sum(held) for held in prompts.values() if held and targets]
    total = [len(held) for held in prompts.values() if held and targets]
    share, interval, p95 = sum(over) / sum(total) if total else math.nan, jackknife(over, total), percentile(pooled)
    low, high = interval or {0: (0, 0), 1: (1, 1)}.get(share, (0, 1))
    verdict = "open" if len(total) < 3 else "over" if low > 0.05 else "under" if high < 0.05 else "open"
    is_close = not any(above(abs(p95 - target), target / 4) for target in targets)
    scales = [life.scale for life in lives if not math.isnan(life.scale)]
    return {
        "target": ", ".join(number(target, 6) for target in targets) or "–",
        "kl_p95": number(p95),
        "over_target": f"{100 * share:.3g}%" if total else "–",
        "over_target_interval": f"[{100 * low:.3g}%, {100 * high:.3g}%]" if interval else "–",
        "kl_median": number(statistics.median(pooled) if pooled else math.nan),
        "scale": number(statistics.median(scales) if scales else math.nan),
        "tokens": f"{statistics.mean(life.n_tokens for life in lives):.1f}" if lives else "–",
        "no_scale": str(len(lives) - len(scales)),
        "verdict": verdict,
        "sign": "≈" if verdict == "open" and is_close and len(total) > 2 else "<>"[share > 0.05],
    }


def steering_texts(panels: Mapping[float, Sequence[Life]]) -> dict[str, str]:
    """Where a row of panels breaks, and the deaths within and above the budget."""
    holds = breaks = ("–", "–", "–")
    for alpha, lives in panels.items():
        alive = alive_texts(lives)
        if alpha > 0 and alive["S_end"] != "–" and breaks[0] == "–":
            step = f"{alpha:g}", kl_texts(lives)["kl_p95"], f"{alive['S_end']} {alive['S_end_interval']}"
            holds, breaks = (holds, step) if float(alive["S_end"]) < 0.5 else (step, breaks)
    died: tuple[list[bool], list[bool]] = ([], [])
    for life in (life for alpha, lives in panels.items() if alpha > 0 for life in lives):
        if life.forks and not math.isnan(life.kl_p95_to_death):
            died[above(life.kl_p95_to_death, life.budget)].append(life.death is not None)
    names = [f"{end}_{what}" for end in ("holds", "breaks") for what in ("at", "kl_p95", "S_end")]
    counts = {
        f"died_{where}_budget": f"{sum(x)} of {len(x)}" for where, x in zip(("within", "above"), died, strict=True)
    }
    return dict(zip(names, [*holds, *breaks], strict=True)) | counts


def list_texts(life: Life) -> dict[str, str]:
    texts = {"cell": life.cell, "prompt": life.prompt, "alpha": f"{life.alpha:g}", "observed_tokens": life.n_tokens}
    texts |= {"end": life.end, "eos": int(life.eos), "death_token": "" if life.death is None else life.death}
    numbers = {"kl_p95_nats": life.kl_p95, "kl_p95_to_death_nats": life.kl_p95_to_death}
    numbers |= {"lowest_pmass": life.lowest_pmass, "scale_nats": life.scale}
    texts |= {"recovered": int(life.recovered)} | {name: number(x, 6).strip("–") for name, x in numbers.items()}
    return {name: str(text) for name, text in texts.items()} | {"copy_of": life.copy_of}


NOTED: dict[str, Callable[[Life, int], float]] = {
    "Deaths at alpha 0: the probe fails": lambda life, roll: life.alpha == 0 and life.death is not None,
    "shorter than --roll": lambda life, roll: len(life.recorded) < roll,
    "KL records that end before their rollout": lambda life, roll: life.record_cut,
    "only after the last observed token": lambda life, roll: (
        life.death is None and any(mass < life.threshold for _, mass in life.later_forks)
    ),
    "pmass was never measured": lambda life, roll: not life.forks,
    "KL is NaN, a gap": lambda life, roll: sum(map(math.isnan, life.kl)),
    "infinite or above 1e+06 nats, a gap": lambda life, roll: life.kl.count(math.inf),
    "negative KL": lambda life, roll: sum(kl < -1e-3 for kl in life.kl),
}


def noted_texts(panels: Mapping[tuple[str, float], Sequence[Life]], roll: int, flags: Mapping) -> dict[str, str]:
    """For each kind of note, the panels, or rows of them, that have such rollouts or tokens, and how many."""
    where: dict[str, list[str]] = {what: [] for what in [*NOTED, "More than half", "made by one token"]}
    for (facet, alpha), lives in panels.items():
        name = f"{facet} at alpha {alpha:g}" if facet else f"alpha {alpha:g}"
        for what, count in NOTED.items():
            k = sum(count(life, roll if flags["edges"] == "pad" else 0) for life in lives)
            where[what] += [f"{name}: {k}"] if k else []
        deaths, back = sum(life.death is not None for life in lives), sum(life.recovered for life in lives)
        where["More than half"] += [f"{name}: {back} of {deaths}"] if 2 * back > deaths else []
    for facet in dict.fromkeys(facet for facet, _ in panels):
        lives = [life for (other, _), held in panels.items() if other == facet for life in held]
        padded = [x for x in lives if len(x.recorded) >= roll > 1 and x.alpha and not math.isnan(x.scale)]
        first = [((roll // 2 + 1) / roll * life.kl[0], life.scale) for life in padded if math.isfinite(life.kl[0])]
        k = sum(of_first > scale / 2 for of_first, scale in first)
        if k and PADS.items() <= flags.items():
            row = f"{flags['rows']} {facet}: " if facet else ""
            where["made by one token"].append(f"{row}{k} of {len(padded)}")
    more = {what: [f"and {len(names) - 12} more"] * (len(names) > 12) for what, names in where.items()}
    return {what: ", ".join(names[:12] + more[what]) for what, names in where.items()}


def said(sweep: ska.Sweep, folder: Path) -> list[list[dict[str, str]]]:
    """The four tables of the summary, as rows."""
    (folder / ska.SUMMARY_FILE).write_text(ska.summary_text(sweep), encoding="utf-8")
    return [table(folder, k) for k in range(4)]


def column(rows: Sequence[dict[str, str]], *names: str) -> list[tuple[str, ...]]:
    return [tuple(row[name] for name in names) for row in rows]


def listed(sweep: ska.Sweep) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(ska.rollouts_csv(sweep))))


def where_noted(sweep: ska.Sweep, what: str) -> str:
    """The panels, with their counts, that the note of that kind names."""
    found = any(what in note for note in sweep.notes)
    return re.search(r" \(([^()]*)\)", noted(sweep, what))[1] if found else ""


def alike(printed: Mapping[str, str], expected: Mapping[str, str]) -> bool:
    """Whether the texts have the same names in the same order and are the same but for rounding in the last digit."""
    form = r"(?<![\w-])-?[0-9]+(?:\.[0-9]+)?(?:e[-+]?[0-9]+)?"
    words = [[(name, re.sub(form, "#", text)) for name, text in texts.items()] for texts in (printed, expected)]
    if words[0] != words[1]:
        return False
    ours, theirs = (re.findall(form, " ".join(texts.values())) for texts in (printed, expected))
    units = [10.0 ** Decimal(text).as_tuple().exponent if "." in text else 0 for text in theirs]
    pairs = zip(map(float, ours), map(float, theirs), units, strict=True)
    return all(abs(our - their) <= 1.1 * unit + 1.5e-3 * abs(their) for our, their, unit in pairs)


def check(root: Path, folder: Path, keep_duplicates: bool = False, **flags: Any) -> None:
    """Read the sweep and compare all that is said of it with the definitions."""
    flags = {"rows": None, "roll": 65, "threshold": 0.8} | PADS | flags
    sweep, lives = read(root, keep_duplicates=keep_duplicates, **flags), lives_of(root, **flags)
    panels, facets = panels_of(lives, keep_duplicates), {}
    around = (round(100 * flags["threshold"]) + step for step in (-10, -5, 0, 5, 10))
    levels = [level / 100 for level in around if 0 < level <= 100]
    steering, *of_panels = said(sweep, folder)
    for (facet, alpha), members, panel, *rows in zip(panels, panels.values(), sweep.panels, *of_panels, strict=True):
        name = {flags["rows"]: facet} if flags["rows"] else {}
        facets.setdefault(facet, (name, {}))[1][alpha] = members
        rows[1] |= {"verdict": panel.kl.verdict, "sign": panel.kl.sign}
        deaths = {f"{level:g}": str(sum(life.death_at(level) is not None for life in members)) for level in levels}
        for row, texts in zip(rows, (alive_texts(members), kl_texts(members), deaths), strict=True):
            texts = name | {"alpha": f"{alpha:g}"} | texts
            assert alike(row, texts), (row, texts)
    for row, (name, by_alpha) in zip(steering, facets.values(), strict=True):
        assert alike(row, name | steering_texts(by_alpha)), (row, steering_texts(by_alpha))
    for row, life in zip(listed(sweep), lives, strict=True):
        texts = {name: text.replace("inf", "∞") for name, text in row.items()}
        assert alike(texts, list_texts(life)), (texts, list_texts(life))
    for what, where in noted_texts(panels, flags["roll"], flags).items():
        assert where_noted(sweep, what) == where, what
    words = [part for panel in sweep.panels for line in ska.title_lines(panel, sweep.args, 1.0) for part in line]
    words += [ska.empty_reason(panel, sweep.args, 1.0) for panel in sweep.panels]
    words += [ska.summary_text(sweep), ska.terminal_text(sweep), re.sub(r"\binf\b", "", ska.rollouts_csv(sweep))]
    assert not re.search(r"\b(nan|inf|None)\b", "\n".join(words))


# --------------------------------------------------------------------------------- any sweep


NASTY_FORKS = [10, 0, 25, 3, 60, 40]
PMASS = [0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.0, 1.0, 1.0, math.nan, None]


def nasty_rollout(rng: np.random.Generator, target: float) -> tuple[list[float | None], list[float | None], int]:
    """KL, often equal to its target or not finite, pmass, often equal to a threshold or missing, and the length."""
    length = int(rng.choice([0, 1, 3, 10, 25, 39, 40, 40, 55]))
    recorded = max(0, length + int(rng.choice([0, 0, 0, -1, -6])))
    kl = np.round(target * rng.choice([0, 0.2, 0.5, 0.9, 1, 1, 1.5], recorded) * rng.choice([0.3, 0.6, 1]), 10).tolist()
    for t in range(recorded):
        if rng.random() < 0.06:
            kl[t] = [math.nan, None, math.inf, -math.inf, 2e6, -0.5, -5e-4, 40.0][rng.integers(8)]
    if recorded == length:
        kl += [[math.nan, None, 1000.0][rng.integers(3)]] * int(rng.choice([0, 0, 5]))
    pmass = [PMASS[k] for k in rng.integers(len(PMASS), size=len(NASTY_FORKS))]
    return kl, [None] * len(pmass) if rng.random() < 0.1 else pmass, length


def nasty_sweep(root: Path, rng: np.random.Generator) -> None:
    """Models, methods, seeds and targets that differ, copies, records cut short or hollow."""
    alphas = sorted(rng.choice([-1.0, -0.3, 0.0, 0.3, 0.7, 1.0, 2.0], 3, replace=False).tolist())
    hollow_alpha, held = alphas[rng.integers(3)] if rng.random() < 0.2 else None, {}
    for c in range(rng.integers(1, 6)):
        about = {"target_kl": [1.0, 0.5, 2.0][rng.integers(3)], "seed": [0, 2, 10][rng.integers(3)]}
        about |= {"model": f"org/{'ab'[rng.integers(2)]}", "method": ["mean_diff", "pca"][rng.integers(2)]}
        n, is_hollow, by = rng.integers(1, 7), rng.random() < 0.1, [math.nan, None, math.inf, 0.0][rng.integers(4)]
        rollouts: dict[float, list] = {}
        for a in alphas:
            target = (a * a or rng.choice([0, 0.01])) * about["target_kl"]
            rollouts[a] = [nasty_rollout(rng, target) for _ in range(n)]
            if held and rng.random() < 0.4:  # the one before, again
                rollouts[a][: len(held[a])] = held[a][:n]
            for i, (kl, pmass, length) in enumerate(rollouts[a]):
                if is_hollow or a == hollow_alpha or rng.random() < 0.1:
                    rollouts[a][i] = ([by] * len(kl), pmass, length)
        held = rollouts
        kl, pmass, length = ({str(a): [row[k] for row in rollouts[a]] for a in alphas} for k in range(3))
        if rng.random() < 0.3:  # the sweep is not done
            del pmass[str(alphas[rng.integers(3)])]
        write_cell(root / f"cell{c}", kl, pmass, length if rng.random() < 0.8 else None, NASTY_FORKS, **about)


FLAGS: dict[str, list[Any]] = {
    "rows": [None, None, "method", "model", "seed", "cell"],
    "threshold": [0.8, 0.8, 0.75, 0.95, 1.0, 0.1, 0.05],
    "window": [None, None, 10, 25, 60],
    "roll": [1, 4, 5, 30, 65],
    "edges": ["pad", "shrink"],
    "calib_tokens": [1, 5, 20, 100],
    "calib_on": ["smoothed", "raw"],
    "normalize_kl": [True, True, False],
    "keep_duplicates": [False, True],
}


@pytest.mark.parametrize("seed", range(40))
def test_all_that_is_printed_is_by_the_definitions_and_never_nan_on_any_sweep(tmp_path, seed):
    rng = np.random.default_rng(seed)
    nasty_sweep(tmp_path / "sweep", rng)
    check(tmp_path / "sweep", tmp_path, **{name: values[rng.integers(len(values))] for name, values in FLAGS.items()})


def test_all_that_is_printed_is_by_the_definitions_on_the_shipped_sweep(tmp_path):
    check(SHIPPED, tmp_path, rows="method")


# ---------------------------------------------------------------------- one definition at a time


WELL = [1.0, 1.0, 1.0]  # pmass of a rollout that lives, at forks 0, 5 and 20
DIED, DIED_LAST, BACK, UNKNOWN = [1.0, 0.5, 0.5], [1.0, 1.0, 0.5], [1.0, 0.5, 0.9], [None, None, None]


def cell_of(folder: Path, pmass: Mapping[str, list], kl: float = 0.1, tokens: int = 40, **about: object) -> Path:
    """A cell of rollouts of constant KL, with these pmass."""
    curves = {alpha: [tokens * [kl] for _ in rows] for alpha, rows in pmass.items()}
    return write_cell(folder, curves, pmass, {alpha: [tokens] * len(rows) for alpha, rows in pmass.items()}, **about)


BRACKETS = {
    "never falls": ({"1": [WELL], "2": [WELL]}, "2", "–"),
    "falls at the first": ({"1": [DIED], "2": [WELL]}, "–", "1"),
    "falls for the first time": ({"1": [WELL], "2": [DIED], "3": [WELL], "4": [DIED]}, "1", "2"),
    "a half is not below a half": ({"1": [WELL, DIED], "2": [WELL, DIED, DIED]}, "1", "2"),
    "alphas of 0 and below do not count": ({"-1": [DIED], "0": [DIED], "1": [WELL]}, "1", "–"),
    "nothing measured in between": ({"1": [WELL], "2": [UNKNOWN], "3": [DIED_LAST]}, "1", "3"),
    "numeric order": ({"9": [WELL], "10": [DIED]}, "9", "10"),
}


@pytest.mark.parametrize("case", BRACKETS)
def test_it_breaks_between_two_alphas(tmp_path, case):
    pmass, holds, breaks = BRACKETS[case]
    cell_of(tmp_path / "cell", pmass, tokens=20)
    (row,), alive, *_ = said(read(tmp_path), tmp_path)
    assert (row["holds_at"], row["breaks_at"]) == (holds, breaks)
    at_end = {r["alpha"]: f"{r['S_end']} {r['S_end_interval']}" for r in alive} | {"–": "–"}
    assert (row["holds_S_end"], row["breaks_S_end"]) == (at_end[holds], at_end[breaks])


def test_median_survival_is_between_the_forks_where_half_are_reached(tmp_path):
    late = [None, 0.5, 0.5]  # not measured at token 0
    died = {"half": [DIED, WELL], "fewer": [DIED, DIED, WELL, WELL, WELL], "at once": [[0.5, 1, 1]], "late": [late]}
    for name, rows in died.items():
        cell_of(tmp_path / name, {"1.0": rows})
    expected = [("at once", "0"), ("fewer", "–"), ("half", "(0, 5]"), ("late", "[0, 5]")]
    assert column(said(read(tmp_path, rows="cell"), tmp_path)[1], "cell", "median_survival") == expected


@pytest.mark.parametrize(
    ("flags", "what", "n"),
    [
        ({}, "left out", [4, 5]),
        ({"keep_duplicates": True}, "counted again", [8, 8]),
        ({"rows": "cell"}, "in different rows of panels, counted in each", [4, 4, 4, 4]),
    ],
)
def test_copies_are_dropped_within_a_panel_only_and_named_in_every_arrangement(tmp_path, flags, what, n):
    for name in ("a", "b"):
        cell_of(tmp_path / name, {"0.0": [WELL] * 4, "1.0": [WELL, WELL, BACK if name == "a" else DIED, WELL]})
    cell_of(tmp_path / "c", {"3.0": [WELL]}, model="org/other")
    sweep = read(tmp_path, alphas=(0, 1), **flags)
    assert [panel.n for panel in sweep.panels] == n
    assert what in noted(sweep, "opies", "`a`", "`b`: 7 of its 8 rollouts")
    assert [row["copy_of"] for row in listed(sweep)] == 8 * [""] + ["a", "a", "a", "a", "a", "a", "", "a"]
    four_prompts = f"[{0.025 ** (1 / 4):.3f}, 1.000]"  # also where each is counted twice
    assert said(sweep, tmp_path)[1][0]["S_end_interval"] == four_prompts


def test_of_many_copies_the_note_names_the_first_and_counts_the_others(tmp_path):
    for k in range(20):
        cell_of(tmp_path / f"run{k}", {"1.0": [WELL]}, seed=k)
    assert len(noted(read(tmp_path, rows="seed"), "opies", "`run1`", "`run2`", "and 17 more")) < 300


SPARSE = [("1.0", math.nan, WELL, 12), ("1.0", 0.0, WELL, 12), ("1.0", 0.1, UNKNOWN, 4)]


@pytest.mark.parametrize(("alpha", "kl", "pmass", "n"), [*SPARSE, ("0.0", 0.0, UNKNOWN, 12), ("0.0", 0.0, WELL, 4)])
def test_records_with_nothing_in_them_are_no_copies(tmp_path, alpha, kl, pmass, n):
    for seed in range(3):
        cell_of(tmp_path / f"s{seed}", {alpha: [pmass] * 4}, kl=kl, seed=seed)
    assert read(tmp_path).panels[0].n == n


@pytest.mark.parametrize("kl", [math.inf, 2e6])
def test_kl_without_end_is_above_every_target(tmp_path, kl):
    rows = [20 * [0.1] + 20 * [kl] for _ in range(4)]
    write_cell(tmp_path / "cell", {"1.0": rows, "2.0": rows}, {"1.0": [WELL] * 4, "2.0": [WELL] * 4})
    sweep = read(tmp_path)
    steering, _, of_kl, _ = said(sweep, tmp_path)
    assert column(steering, "holds_kl_p95", "died_within_budget", "died_above_budget") == [("∞", "0 of 0", "0 of 8")]
    assert column(of_kl, "kl_p95", "over_target") == 2 * [("∞", "50%")]
    assert {row["kl_p95_nats"] for row in listed(sweep)} == {"inf"}
    assert [ska.target_text(panel.kl) for panel in sweep.panels] == ["KL ∞ > 1", "KL ∞ > 4"]
    assert ska.terminal_text(sweep).count("∞") == 3


def test_an_alpha_that_a_cell_lacks_is_named_with_the_cell(tmp_path):
    cell_of(tmp_path / "a", {"0.5": [WELL], "1.0": [WELL], "2.0": [WELL], "3.0": [WELL]})
    cell_of(tmp_path / "b", {"0.5": [WELL], "1.0": [WELL]}, kl=0.2)
    cell_of(tmp_path / "c", {"0.5": [WELL]}, kl=0.3)
    assert "0.5" not in noted(read(tmp_path), "alpha 1: not in `c`", "alpha 2, 3: not in `b`, `c`")
    assert not any("not in" in note for note in read(tmp_path, alphas=(0.5,)).notes if "requested" not in note)


def test_scales_made_by_one_token_are_counted_in_each_row(tmp_path):
    """With a roll of 5, padding gives the first token 3/5 of the first mean; an infinite one makes nothing."""
    loud, even, endless = [9.0] + 39 * [0.1], [0.05] + 39 * [0.1], [math.inf, 9.0] + 38 * [0.1]
    for method, rows in (("mean_diff", [loud, loud, even]), ("pca", [even, endless, loud])):
        write_cell(tmp_path / method, {"1.0": rows}, {"1.0": [WELL] * 3}, method=method)
    where = where_noted(read(tmp_path, rows="method", roll=5), "made by one token")
    assert where == "method mean_diff: 2 of 3, method pca: 1 of 3"


def test_notes_say_where_nothing_is_smoothed_and_list_a_dozen_panels_at_most(tmp_path):
    cell_of(tmp_path / "cell", {f"{alpha}.0": [WELL] for alpha in range(1, 15)})
    flags = {"normalize_kl": False}
    assert read(tmp_path, roll=40, **flags).notes == read(tmp_path, roll=41, edges="shrink").notes == []
    note = noted(read(tmp_path, roll=41, **flags), "--roll 41", "nothing is smoothed")
    assert note.endswith("alpha 11: 1, alpha 12: 1, and 2 more)")
    cell_of(tmp_path / "short", {"1.0": [WELL]}, tokens=39)
    noted(read(tmp_path, roll=40, **flags), "shorter than --roll 40, not smoothed (alpha 1: 1)")


def test_the_summary_ends_with_a_caption_the_cells_the_notes_and_the_settings(tmp_path):
    cell_of(tmp_path / "cell", {"0.0": [DIED]}, c_star=2.5, layer=7, seed=3, method="a|b")
    sweep = read(tmp_path, threshold=0.75, rows="method")
    text = ska.summary_text(sweep)
    text, notes = text.split("\n\n## Notes\n\n")
    assert text.endswith(f"## Caption\n\n{ska.caption(sweep)}")
    used, *others, settings = notes.splitlines()
    assert used == "- Cells used: `cell` (org/m, a|b, seed 3, layer 7, c_star 2.5)"
    assert others == [f"- {note}" for note in sweep.notes]
    assert "threshold 0.75" in settings and "window 40" in settings
    assert said(sweep, tmp_path)[0][0]["method"] == "a\\|b"  # and is one cell of the table


ALWAYS = [
    *("orange", "cross", "tick is EOS", "black line", "dotted", "hollow", "recovered", "at the end", "cut"),
    *("α²", "> or <", "bold", "≈"),
]
STRIP, OWN, PAD = ["Kaplan-Meier", "pointwise", "dots", "at risk"], ["own 95th percentile"], ["pale"]


@pytest.mark.parametrize(
    ("flags", "there", "not_there"),
    [
        ({}, STRIP + OWN + PAD, ["and method"]),
        ({"survival": False, "edges": "shrink", "rows": "method"}, [*OWN, "and method"], STRIP + PAD),
        ({"normalize_kl": False, "roll": 1}, [*STRIP, "in nats"], OWN + PAD),
    ],
)
def test_the_caption_names_every_mark_that_is_on_the_figure_and_no_other(tiny, flags, there, not_there):
    text = ska.caption(read(tiny, **flags))
    assert [word for word in ALWAYS + there if word not in text] == []
    assert [word for word in not_there if word in text] == []


def test_the_terminal_shows_the_first_table_and_a_line_per_panel_within_80_columns(tmp_path):
    sweep = read(SHIPPED, rows="method")
    sweep = replace(sweep, panels=[replace(panel, facet=panel.facet.ljust(16, "x")) for panel in sweep.panels])
    steering, alive, of_kl, _ = said(sweep, tmp_path)
    blocks = [block.splitlines() for block in ska.terminal_text(sweep).split("\n\n")]
    assert max(map(len, blocks[0] + blocks[1])) <= 80
    first, panels = ([re.split("  +", line.strip()) for line in block] for block in blocks)
    assert panels[0] == ["method", "alpha", "n", "died", "recovered", "S_end", "kl_p95", "target"]
    expected = [[text for name, text in row.items() if "S_end" not in name] for row in steering]
    for one, other in zip(alive, of_kl, strict=True):
        counts = [one["n"], str(int(one["n_died"]) + int(one["n_died_last"])), one["n_recovered"]]
        kl = ["<1e-8" if one["alpha"] == "0" else other["kl_p95"], other["target"]]
        expected.append([one["method"], one["alpha"], *counts, f"{one['S_end']} {one['S_end_interval']}", *kl])
    for printed, texts in zip(first[2:] + panels[1:], expected, strict=True):
        assert alike(dict(enumerate(texts)), dict(enumerate(printed))), (printed, texts)
