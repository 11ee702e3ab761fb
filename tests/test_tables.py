"""Every number of the tables, of the list of rollouts and of the lines, against slow loops over the files."""

from __future__ import annotations

import csv
import io
import math
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles import Expected, Life, p95, survival_of
from sweeps import read, table, write_cell

import spaghetti_kl_alive as ska

SHIPPED = Path(__file__).parent / "data" / "smollm2_w256"
NAN, INF = math.nan, math.inf


# ------------------------------------------------------------------------------ any sweep
def csv_row(life: Life) -> dict[str, Any]:
    """What the list of rollouts should say of one; None where it says nothing."""
    numbers = {"kl_p95_nats": p95(life.kl), "lowest_pmass": min(life.masses, default=None)}
    numbers |= {"last_pmass": ([None, *life.masses])[-1], "scale_nats": life.scale}
    row = {"cell": life.cell, "prompt": life.prompt[1], "alpha": life.alpha, "observed_tokens": len(life.kl)}
    row |= {"end": life.end, "eos": int(life.eos), "death_token": life.death}
    row |= {"recovered": int("recovered" in life.fates)} | numbers
    return row | {"copy_of": life.original if life.original != life.cell else None}


def listed(sweep: ska.Sweep) -> list[dict[str, Any]]:
    """The rows of the list of rollouts, texts, numbers, and None where it says nothing."""
    rows = csv.DictReader(io.StringIO(ska.rollouts_csv(sweep)))
    words = ("cell", "end", "copy_of")
    return [{k: (x if k in words else float(x)) if x else None for k, x in row.items()} for row in rows]


def assert_alike(found: Mapping[str, Any], expected: Mapping[str, Any], rel: float = 1e-9) -> None:
    """Equal, in the same order, limits of intervals to 1e-4."""
    assert [*found] == [*expected]
    for name, value in expected.items():
        near = {"abs": 1e-4} if name.endswith(("_died_low", "_died_high")) else {"rel": rel}
        near = {"rel": 1e-3} if name.startswith("over_budget_") else near
        expected_value = pytest.approx(value, **near) if isinstance(value, float) else value
        assert found[name] == expected_value, name


def check(root: Path, **flags: Any) -> None:
    """Read a sweep and compare all that is computed of it with the definitions."""
    sweep, expected = read(root, **flags), Expected(root, **flags)
    found, by_definition = ska.tables(sweep), expected.tables()
    for name in ("steering", "compared", "panels", "kl", "threshold"):
        assert len(found[name]) == len(by_definition[name]), name
        for row, by_loop in zip(found[name], by_definition[name], strict=True):
            assert_alike(row, by_loop)
    for row, life, r in zip(listed(sweep), expected.lives, sweep.rollouts, strict=True):
        assert_alike(row, csv_row(life), rel=1e-5)
        assert r.alive.tolist() == [life.death is None or t < life.death for t in range(len(life.kl))]
        np.testing.assert_array_equal(r.kl, life.kl)
        np.testing.assert_allclose(r.line, life.line, rtol=1e-6)
    for panel, lives in zip(sweep.panels, expected.panels.values(), strict=True):
        assert panel.n_unmeasured == sum(not life.forks for life in lives)
        for point, by_loop in zip(zip(*panel.survival[:5], strict=True), survival_of(lives), strict=True):
            names = ("fork", "never_died", "never_died_low", "never_died_high", "above_now")
            assert_alike(dict(zip(names, point, strict=True)), dict(zip(names, by_loop, strict=True)))
    for row in found["panels"]:
        assert row["n"] == row["n_died"] + row["n_censored"] + row["n_alive"]


FORKS = [10, 0, 25, 3, 60, 40]  # not in order; many a rollout ends at one of them
LENGTHS = [0, 1, 3, 10, 25, 39, 40, 40, 40, 55]
KEYS = {0.0: ["0.0", "-0.0", "-2.2e-16"], 0.1: ["0.1", "0.10000000149011612"], 0.3: ["0.30000000000000004"]}
FLAGS: dict[str, Sequence[Any]] = {
    "rows": [None, "method", "model", "seed", "cell"],
    "threshold": [0.8, 0.8, 0.8, 0.75, 0.9, 1.0, 0.1],
    "window": [None, None, 10, 30, 60],
    "roll": [1, 4, 5, 30, 65],
    "edges": ["pad", "shrink"],
    "calib_tokens": [1, 5, 20, 100],
    "normalize_kl": [True, True, False],
    "keep_duplicates": [False, False, True],
    "alphas": [(), (), (0.0, 0.1, 1.0, 7.0)],
}
Record = tuple[list[float | None], list[float | None], int]  # KL, pmass, length


def odd_record(rng: random.Random, alpha: float, target_kl: float) -> Record:
    """KL with gaps or equal to the budget, pmass equal to a threshold or missing; cut short, or padded."""
    length = rng.choice(LENGTHS)
    kl: list[float | None] = [target_kl * rng.choice([1, rng.expovariate(1)]) for _ in range(length)]
    for t in range(length):
        if rng.random() < 0.06:
            kl[t] = rng.choice([NAN, None, INF, -INF, 2e6, -2e6, 1e6, -0.5])
    if rng.random() < 0.08:
        kl[:30] = len(kl[:30]) * [rng.choice([NAN, None, 0.0, INF, 1e-9])]
    kl = kl[: -rng.choice([1, 6])] if rng.random() < 0.1 else kl + rng.choice([0, 0, 5]) * [NAN, None, 9.0]
    low = [0.6, 0.75, 0.79] if rng.random() < 0.04 + 0.3 * abs(alpha) else []
    pmass = [rng.choice([*low, 0.8, 0.85, 0.9, 1.0, 1.0, 1.0, NAN, None]) for _ in FORKS]
    return kl, rng.choice([pmass] * 9 + [[None] * len(FORKS)]), length


def odd_sweep(root: Path, rng: random.Random, windows: Sequence[int]) -> None:
    """Cells that differ in all there is, lack alphas or lengths, or repeat each other."""
    alphas = [1.0, *rng.sample([-2.0, -1.0, -0.1, 0.0, 0.1, 0.3, 2.0, 10.0], 4)]
    seen: dict[Any, Record] = {}
    for c in range(rng.randint(2, 7)):
        about = {"model": rng.choice(["org/a", "org/b", "lab/b"]), "method": rng.choice(["pca", "mean_diff"])}
        about |= {"seed": rng.choice([0, 2, 10]), "target_kl": rng.choice([0.5, 1, 2])}
        n, repeats, rollouts = rng.choice([5, 5, 5, 7]), rng.choice([0, 0, 0.4, 1]), dict[str, list[Record]]()
        for alpha in alphas:
            key = rng.choice(KEYS.get(alpha, [str(alpha)]))
            if alpha == 1 or rng.random() < 0.9:
                rollouts[key] = [odd_record(rng, alpha, about["target_kl"]) for _ in range(n)]
                for i in range(n):
                    before = seen.setdefault((alpha, i), rollouts[key][i])
                    rollouts[key][i] = before if rng.random() < repeats else rollouts[key][i]
        kl, pmass, length = ({key: [r[k] for r in held] for key, held in rollouts.items()} for k in range(3))
        if rng.random() < 0.1:
            key = rng.choice([*pmass])
            pmass[key] = [[None] * len(FORKS)] * n
        if rng.random() < 0.2:  # the sweep was stopped between two files
            pmass[max(pmass)] = []
        lengths = length if rng.random() < 0.8 else None
        write_cell(root / f"cell{c}", kl, pmass, lengths, FORKS, window=rng.choice(windows), **about)


@pytest.mark.parametrize("seed", range(25))
def test_all_numbers_of_an_odd_sweep_are_those_of_the_definitions(tmp_path, seed):
    rng = random.Random(seed)
    flags = {name: rng.choice(values) for name, values in FLAGS.items()}
    odd_sweep(tmp_path, rng, [20, 40, 70] if flags["window"] else [40])
    check(tmp_path, **flags)


# ---------------------------------------------------------------------------- the shipped sweep
ARRANGEMENTS: list[dict[str, Any]] = [
    {"rows": "method"},
    {"rows": "method", "threshold": 0.9, "window": 100, "edges": "shrink", "roll": 8},
    {"rows": "cell", "threshold": 0.75, "normalize_kl": False, "roll": 1, "alphas": (0.0, 2.0, 3.0)},
    {"alphas": (0.0, 2.0, 5.0)},
    {"alphas": (0.0, 2.0), "keep_duplicates": True},
]


@pytest.mark.parametrize("flags", ARRANGEMENTS, ids=str)
def test_all_numbers_of_the_shipped_sweep_are_those_of_the_definitions(flags):
    check(SHIPPED, **flags)


@pytest.mark.parametrize(("threshold", "counts"), [(0.8, (24, 0, 0)), (0.75, (21, 0, 3))])
def test_the_methods_of_the_shipped_sweep_break_one_after_the_other(threshold, counts):
    found = ska.tables(read(SHIPPED, rows="method", threshold=threshold))
    first, *others = [tuple(row.values()) for row in found["compared"]]
    assert first == ("ablation", "mean_diff", *counts)
    assert others == [("ablation", "pca", 24, 0, 0), ("mean_diff", "pca", 24, 0, 0)]
    brackets = [(row["method"], row["last_above_half"], row["first_below_half"]) for row in found["steering"]]
    if threshold == 0.8:
        assert brackets == [("ablation", 3, 4), ("mean_diff", 1.9, 2), ("pca", 1.5, 1.6)]


# ------------------------------------------------------------------------------ how it is given
def text_of(column: str, value: Any) -> str:
    """How the summary prints a number."""
    if not isinstance(value, float):
        return "–" if value is None else str(value)
    if column.endswith(("never_died", "above_at_end")):
        return f"{value:.3f}"
    forms = {"over_budget": ".1%", "tokens": ".1f", "alpha": ".6g"}
    forms |= {"last_above_half": ".6g", "first_below_half": ".6g"}
    return f"{value:{forms[column]}}" if column in forms else f"{float(f'{value:.4g}'):g}".replace("inf", "∞")


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_summary_prints_the_numbers_of_the_tables_with_intervals_in_brackets(tmp_path, seed):
    odd_sweep(tmp_path, random.Random(seed), [40])
    sweep = read(tmp_path, rows="method", alphas=(-0.1, 0, 0.1, 0.3, 1, 2, 7))
    (tmp_path / ska.SUMMARY_FILE).write_text(ska.summary_text(sweep), encoding="utf-8")
    found = ska.tables(sweep)
    shown = [found[name] for name in ("steering", "compared", "panels", "kl", "threshold") if found[name]]
    for k, rows in enumerate(shown):
        for printed, row in zip(table(tmp_path, k), rows, strict=True):
            assert [*printed] == [name for name in row if not name.endswith(("_low", "_high"))]
            for name, text in printed.items():
                limits = [text_of(name, row.get(f"{name}_{end}")) for end in ("low", "high")]
                interval = "" if limits == ["–", "–"] else " [{}, {}]".format(*limits)
                assert text == text_of(name, row[name]) + interval
    assert re.search(r"\b(nan|inf|None)\b", ska.summary_text(sweep)) is None


def test_tables_hold_plain_numbers_texts_and_none(tmp_path):
    odd_sweep(tmp_path, random.Random(1), [40])
    for root in (tmp_path, SHIPPED):
        for rows in ska.tables(read(root, rows="method")).values():
            assert {type(value) for row in rows for value in row.values()} <= {int, float, str, type(None)}


# ---------------------------------------------------------------------- one definition at a time
WELL, UNKNOWN = [1.0, 1.0, 1.0], [None, None, None]  # pmass at forks 0, 5 and 20
DIED, BACK = [1.0, 0.5, 0.5], [1.0, 0.5, 0.9]


def cell_of(folder: Path, pmass: Mapping[str, list], kl: float = 0.1, **about: Any) -> Path:
    """A cell of rollouts of 40 tokens, the window, of constant KL, with these pmass."""
    curves = {alpha: [40 * [kl] for _ in rows] for alpha, rows in pmass.items()}
    lengths = {alpha: [40 for _ in rows] for alpha, rows in pmass.items()}
    return write_cell(folder, curves, pmass, lengths, **about)


BRACKETS = {
    "it never falls": ({"1": [WELL], "2": [WELL]}, 2, None),
    "it falls at the first": ({"1": [DIED], "2": [WELL]}, None, 1),
    "the first fall counts": ({"1": [WELL], "2": [DIED], "3": [WELL], "4": [DIED]}, 1, 2),
    "a half is not below a half": ({"1": [WELL, DIED], "2": [WELL, DIED, DIED]}, 1, 2),
    "the unsteered panel does not count": ({"0": [DIED], "1": [WELL], "2": [DIED]}, 1, 2),
    "what was not measured does not count": ({"1": [WELL], "2": [UNKNOWN], "3": [DIED]}, 1, 3),
    "by value, not by text": ({"10": [DIED], "9": [WELL]}, 9, 10),
    "by size": ({"-4": [DIED], "-2": [DIED], "-1": [WELL], "0": [WELL]}, -1, -2),
}


@pytest.mark.parametrize("case", BRACKETS)
def test_it_breaks_between_two_alphas(tmp_path, case):
    pmass, last, first = BRACKETS[case]
    cell_of(tmp_path / "cell", pmass)
    found = ska.tables(read(tmp_path))
    (row,) = found["steering"]
    assert (row["last_above_half"], row["first_below_half"]) == (last, first)
    by_alpha = {panel["alpha"]: panel for panel in found["panels"]} | {None: {}}
    for end, alpha in (("last", last), ("first", first)):
        for name in ("never_died", "never_died_low", "never_died_high", "above_at_end"):
            assert row[f"{end}_{name}"] == by_alpha[alpha].get(name)


def compared(root: Path, **cells: Mapping[str, list]) -> list[tuple[int, ...]]:
    """Of each two rows: a_later, b_later and not_told_apart; a cell's first letter is its method."""
    for k, (name, pmass) in enumerate(cells.items()):
        cell_of(root / name, pmass, kl=0.1 * (k + 1), method=name[0], seed=k)
    rows = ska.tables(read(root, rows="method"))["compared"]
    return [tuple(row[name] for name in ("a_later", "b_later", "not_told_apart")) for row in rows]


@pytest.mark.parametrize("sign", ["", "-"])
def test_rows_are_compared_by_the_size_of_alpha_at_which_a_prompt_first_died(tmp_path, sign):
    a = {"1": [WELL, DIED, WELL, WELL, WELL, DIED], "2": [WELL, DIED, DIED, WELL, WELL, WELL]}
    b = {"1": [DIED, WELL, WELL, WELL, WELL, BACK], "2": [DIED, DIED, DIED, WELL, DIED, WELL]}
    a, b = ({sign + key: pmass for key, pmass in cell.items()} for cell in (a, b))
    assert compared(tmp_path, a=a, b=b) == [(2, 1, 3)]


def test_rows_are_compared_at_the_alphas_that_both_have(tmp_path):
    a, b = {"1": 3 * [WELL], "2": 3 * [DIED], "4": 3 * [WELL]}, {"1": 3 * [WELL], "3": 3 * [DIED]}
    assert compared(tmp_path, a=a, b=b | {"4": [DIED, DIED, WELL]}) == [(2, 0, 1)]


def test_a_prompt_that_died_unsteered_in_either_row_is_not_compared(tmp_path):
    a = {"0": [DIED, WELL, WELL, WELL, WELL], "1": 5 * [WELL]}
    b = {"0": [WELL, BACK, WELL, WELL, WELL], "1": 5 * [DIED]}
    assert compared(tmp_path, a=a, b=b) == [(3, 0, 0)]


def test_a_prompt_with_unequal_numbers_of_measured_rollouts_at_an_alpha_is_not_compared(tmp_path):
    """Prompts 3 and 4: two against one; at alpha 1 two against one, at alpha 2 one against two."""
    none = 3 * [UNKNOWN]
    a, a2 = {"1": 5 * [WELL], "2": 5 * [WELL]}, {"1": [*none, WELL, WELL], "2": [*none, WELL, UNKNOWN]}
    b, b2 = {"1": 5 * [WELL], "2": 5 * [DIED]}, {"1": 5 * [UNKNOWN], "2": [*none, UNKNOWN, DIED]}
    assert compared(tmp_path, a=a, a2=a2, b=b, b2=b2) == [(3, 0, 0)]


def test_fewer_than_three_prompts_or_more_than_six_rows_are_not_compared(tmp_path):
    six = {name: {"1": 3 * [WELL]} for name in "abcdef"}
    assert len(compared(tmp_path / "six", **six)) == 15
    assert compared(tmp_path / "seven", **six, g={"1": 3 * [WELL]}) == []
    assert compared(tmp_path / "few", a={"1": 2 * [WELL]}, b={"1": 3 * [WELL]}) == []
    for name in ("seven", "few"):
        text = ska.summary_text(read(tmp_path / name, rows="method"))
        assert "compared: " in text and "a_later" not in text


ENDS = {  # tokens of KL, length, pmass: end, whether by EOS, died only at the last fork
    "whole": ((40, 40, WELL), ("alive", False, 0)),
    "EOS": ((20, 20, WELL), ("censored", True, 0)),
    "cut": ((39, 40, WELL), ("censored", False, 0)),
    "died, EOS": ((30, 30, DIED), ("died", True, 0)),
    "died after the last token": ((20, 20, [1.0, 1.0, 0.5]), ("died", True, 1)),
    "died later than it ended": ((19, 19, [1.0, 1.0, 0.5]), ("censored", True, 0)),
    "no token": ((0, 0, DIED), ("censored", True, 0)),
}


@pytest.mark.parametrize("case", ENDS)
def test_a_rollout_dies_is_censored_or_lives(tmp_path, case):
    (tokens, length, pmass), (end, eos, n_died_last) = ENDS[case]
    write_cell(tmp_path / "cell", {"1": [tokens * [0.1]]}, {"1": [pmass]}, {"1": [length]})
    (row,), (panel,) = listed(read(tmp_path)), ska.tables(read(tmp_path))["panels"]
    assert (row["end"], bool(row["eos"]), panel["n_died_last"]) == (end, eos, n_died_last)
    assert panel[f"n_{end}"] == panel["n"] == 1


def test_alphas_are_told_apart_by_six_digits(tmp_path):
    cell_of(tmp_path / "a", {"-2.2e-16": [WELL], "0.10000000149011612": [WELL], "1.00001": [WELL]})
    cell_of(tmp_path / "b", {"0.0": [WELL], "0.1": [WELL], "1.0": [WELL]}, kl=0.2)
    panels = ska.tables(read(tmp_path))["panels"]
    assert [(row["alpha"], row["n"]) for row in panels] == [(0, 2), (0.1, 2), (1, 1), (1.00001, 1)]
    assert [panel.alpha for panel in read(tmp_path, alphas=("0.10000000149",)).panels] == [0.1]


def test_a_threshold_of_many_digits_gives_one_count_in_both_tables(tmp_path):
    cell_of(tmp_path / "cell", {"1": [[1.0, 0.83333333332, 1.0], [1.0, 0.83333333334, 1.0]]})
    found = ska.tables(read(tmp_path, threshold=0.833333333333))
    assert found["panels"][0]["n_died"] == found["threshold"][0]["0.833333"] == 1


def test_a_share_of_tokens_that_is_the_same_without_any_prompt_has_no_interval(tmp_path):
    write_cell(tmp_path / "cell", {"1": 4 * [10 * [2.0] + 30 * [0.1]]}, {"1": 4 * [WELL]})
    (row,) = ska.tables(read(tmp_path))["kl"]
    assert (row["over_budget"], row["over_budget_low"], row["over_budget_high"]) == (0.25, None, None)


def test_a_row_that_only_repeats_the_steered_rollouts_of_another_is_left_out_unless_copies_count(tmp_path):
    for seed, name in enumerate("abc"):
        pmass = {"0": [[0.9, 0.9, 0.9 + seed / 100]], "1": [BACK]}
        cell_of(tmp_path / name, pmass, kl=0.1 + (name == "c"), seed=seed)
    for keep_duplicates, seeds in ((False, ["0", "2"]), (True, ["0", "1", "2"])):
        rows = ska.tables(read(tmp_path, rows="seed", keep_duplicates=keep_duplicates))["steering"]
        assert [row["seed"] for row in rows] == seeds
