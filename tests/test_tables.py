"""Every number of the tables, the list of rollouts and the lines, against slow loops over the recorded files."""

from __future__ import annotations

import csv
import io
import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles import Expected, Life, p95, survival_of
from sweeps import noted, read, table, write_cell

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


def check(root: Path, **flags: Any) -> ska.Sweep:
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
    return sweep


FORKS = [10, 0, 25, 3, 60, 40]  # not in order; many a rollout ends at one of them
LENGTHS = [0, 1, 3, 10, 25, 39, 40, 40, 40, 55]
KEYS = {0.0: ["0.0", "-0.0", "-2.2e-16"], 0.1: ["0.1", "0.10000000149011612"], 0.3: ["0.30000000000000004"]}
FLAGS: dict[str, Sequence[Any]] = {
    "rows": [None, "method", "model", "seed", "cell"],
    "threshold": [0.8, 0.8, 0.75, 0.9, 1.0, 0.1],
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
        kl = [rng.choice([NAN, None, 0.0, INF, 1e-9])] * length
    kl = kl[: -rng.choice([1, 6])] if rng.random() < 0.1 else kl + rng.choice([0, 0, 5]) * [NAN, None, 9.0]
    low = [0.6, 0.75, 0.79] if rng.random() < 0.1 + 0.2 * abs(alpha) else [0.8, 0.85, 1.0]
    pmass = [rng.choice([*low, 0.8, 0.85, 0.9, 0.95, 1.0, 1.0, NAN, None]) for _ in FORKS]
    return kl, rng.choice([pmass] * 9 + [[None] * len(FORKS)]), length


def odd_sweep(root: Path, rng: random.Random, windows: Sequence[int]) -> None:
    """Cells that differ in all there is, lack alphas or lengths, or repeat each other."""
    alphas = [1.0, *rng.sample([-2.0, -1.0, -0.1, 0.0, 0.1, 0.3, 2.0, 10.0], 4)]
    seen: dict[Any, Record] = {}
    for c in range(rng.randint(2, 7)):
        about = {"model": rng.choice(["org/a", "org/b", "lab/b"]), "method": rng.choice(["pca", "mean_diff"])}
        about |= {"seed": rng.choice([0, 2, 10]), "target_kl": rng.choice([0.5, 1, 2])}
        n, repeats, rollouts = rng.randint(3, 7), rng.choice([0, 0, 0.4, 1]), dict[str, list[Record]]()
        for alpha in alphas:
            key = rng.choice(KEYS.get(alpha, [str(alpha)]))
            if alpha == 1 or rng.random() < 0.9:
                rollouts[key] = [odd_record(rng, alpha, about["target_kl"]) for _ in range(n)]
                for i in range(n):
                    before = seen.setdefault((about["model"], alpha, i), rollouts[key][i])
                    rollouts[key][i] = before if rng.random() < repeats else rollouts[key][i]
        kl, pmass, length = ({key: [r[k] for r in held] for key, held in rollouts.items()} for k in range(3))
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
