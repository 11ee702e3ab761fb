# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy>=1.26", "matplotlib>=3.8", "tyro>=0.9", "loguru>=0.7", "tabulate>=0.9"]
# ///
"""Does a steered model stay within its calibrated KL budget, and is it still alive under it?

Reads a finished sweep and draws one panel per steering strength alpha. Each thin line is one rollout:
KL(steered || base) against token, in units of the rollout's own scale, the 95th percentile of its first
tokens. Below each panel stands the Kaplan-Meier survival S(token) with its 95 % band.

How to read it
  blue          the model can still answer: its probability mass on true/false was at or above the
                threshold at every fork point so far
  orange        it cannot, from the cross on; death is irreversible
  black tick    the rollout ended by itself (EOS); ended alive, it is right-censored
  black line    median over the rollouts still running (dotted: fewer than half of them are left)
  dashed line   the calibration scale (with --no-normalize-kl the budget, alpha^2 * target_kl)

How to run it
  python spaghetti_kl_alive.py --runs-root runs/sweep
  python spaghetti_kl_alive.py --runs-root runs/sweep --out figs/sweep --rows method --formats png pdf

Each folder in --runs-root is a cell with calib.json, trajectory.json and pmass.json. Written to --out:
kl_alive_spaghetti.png, the table kl_alive_summary.md, and kl_alive_rollouts.csv, a row per rollout.
Exit status: 0 all written; 1 the data cannot give them; 2 wrong use.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import json
import logging
import math
import os
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import tyro

if TYPE_CHECKING:  # matplotlib, loguru and tabulate are imported where they are used, so that --help answers at once
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILES = ("calib.json", "trajectory.json", "pmass.json")
FIGURE, TABLE, ROLLOUTS = "kl_alive_spaghetti", "kl_alive_summary.md", "kl_alive_rollouts.csv"
MIN_SCALE = 1e-8  # a scale at or below it is no scale
MAX_KL = 1e6  # nats; log-probabilities do not reach that far, so beyond it KL counts as not finite
Z95 = 1.959963984540054  # standard normal quantile of a two-sided 95 % interval


@dataclass(frozen=True)
class Args:
    runs_root: Path
    """Folder of the sweep: one sub-folder per cell, or itself one cell."""
    out: Path | None = None
    """Folder to write to. None: figs/<name of runs-root>_kl_alive."""
    window: int | None = None
    """Tokens of each rollout to use. None: the window in calib.json."""
    alphas: tuple[float, ...] = ()
    """Steering strengths to draw, in units of c_star, matched as numbers. None named: all that the data holds."""
    threshold: float = 0.8
    """Probability mass in (0, 1] below which, at a fork point, a rollout is dead from there on."""
    metric: str = "pmass_eval"
    """Key in pmass.json that holds the probability mass: "pmass" or "pmass_<name>"."""
    model_contains: str = ""
    """Use only cells whose folder name or model contains this text. Empty: all cells."""
    kl_log: bool = False
    """Logarithmic KL axis, linear below 0.1."""
    roll: int = 65
    """Length of the centred rolling mean, in tokens. 1: no smoothing."""
    edges: Literal["pad", "shrink"] = "pad"
    """Rolling mean at the ends: pad repeats the first and the last value, shrink averages what exists."""
    line_lw: float = 0.5
    """Width of a rollout's line, in points."""
    line_alpha: float | None = None
    """Opacity of a rollout's line, in (0, 1]. None: 8/n, between 0.2 and 0.7."""
    normalize_kl: bool = True
    """Divide each rollout's KL by its own scale; otherwise KL is drawn in nats."""
    calib_tokens: int = 20
    """Number of first tokens whose 95th percentile is the scale."""
    calib_on: Literal["smoothed", "raw"] = "smoothed"
    """Take the scale from the smoothed KL or from the KL as recorded."""
    rows: Literal["method", "model", "seed", "cell"] | None = None
    """Give each value its own row of panels, one column per alpha. None: pool all cells."""
    ncols: int = 4
    """Panels side by side before they wrap (without --rows)."""
    survival: bool = True
    """Draw the survival strip and the numbers at risk under each panel."""
    formats: tuple[Literal["png", "pdf", "svg"], ...] = ("png",)
    """File formats of the figure."""
    dpi: int = 160
    """Resolution of the PNG, in pixels per inch."""
    keep_duplicates: bool = False
    """Count exact copies of a rollout again instead of leaving them out."""
    skip_bad_cells: bool = False
    """Leave out cells with damaged files, with a warning, instead of stopping."""


# ---------------------------------------------------------------------------------------- the data


class SweepError(Exception):
    """The data cannot give the figure: which file, what is wrong, what to do (exit status 1)."""


class Damaged(SweepError):
    """One file of a cell cannot be used as it is; `reason` names the file without its folder."""

    def __init__(self, path: Path, reason: object) -> None:
        self.reason = f"{path.name}: {printable(reason)}"
        advice = "Repair or rerun that cell, or leave it out with --skip-bad-cells."
        super().__init__(f"{printable(path)}: {printable(reason)}\n{advice}")


class UsageError(Exception):
    """A flag's value makes no sense (exit status 2)."""


class NotUsable(Exception):
    """A cell has nothing to show and is left out, for this reason."""

    @property
    def reason(self) -> str:
        return str(self)


class Notes(list[str]):
    """What the reader of the table must know; each note is logged as it is taken."""

    def take(self, text: str, level: str = "WARNING") -> None:
        self.append(text)
        self.log(text, level)

    def log(self, text: str, level: str = "INFO") -> None:
        from loguru import logger

        logger.log(level, text)


@dataclass(frozen=True)
class Cell:
    """One run of the sweep, from its calib.json; `name` is the folder's, fit for print."""

    folder: Path
    name: str
    model: str
    method: str
    seed: object
    layer: object
    c_star: object
    target_kl: float  # nats
    window: int | None  # tokens; None where calib.json has none


@dataclass(frozen=True)
class Recorded:
    """What one cell recorded at one alpha, N rollouts with F fork points."""

    alpha: float
    kl: list[np.ndarray]  # N arrays (L_i,), nats per token
    pmass: np.ndarray  # (N, F), NaN where not measured
    forks: np.ndarray  # (F,), tokens
    gen_len: np.ndarray  # (N,), tokens generated


@dataclass(frozen=True)
class Rollout:
    """One rollout as the figure and the table need it."""

    cell: Cell
    prompt: int
    alpha: float
    n_tokens: int  # observed length T
    death: int | None  # token of death, below T
    eos: bool  # generation ended before the window did
    late_drop: bool  # first below the threshold at the fork s = T, outside the drawn tokens
    unmeasured: bool  # no pmass at any fork within the observed tokens
    n_gaps: int  # observed tokens whose KL is not finite
    n_negative: int  # observed tokens whose KL is below zero by more than rounding
    kl_max: float  # nats, over the observed finite tokens; NaN if there are none
    scale: float  # the line's unit in nats; NaN if there is none
    line: np.ndarray = field(repr=False)  # (T,) float32 as drawn; (0,) if there is no scale
    fingerprint: bytes = field(repr=False)  # equal where KL, pmass, forks and gen_len are
    copy_of: str = ""  # the cell that recorded the same rollout first

    @property
    def censored(self) -> bool:
        return self.eos and self.death is None

    @property
    def duration(self) -> int:
        """Tokens at risk of death: up to death, or else up to the end of what was observed."""
        return self.n_tokens if self.death is None else self.death


@dataclass(frozen=True)
class Panel:
    """The rollouts of one alpha and, with --rows, of one method, model, seed or cell."""

    row: str  # which one; "" if all are pooled
    alpha: float
    rollouts: list[Rollout]

    @property
    def n(self) -> int:
        return len(self.rollouts)

    @property
    def n_died(self) -> int:
        return sum(r.death is not None for r in self.rollouts)

    @property
    def n_censored(self) -> int:
        return sum(r.censored for r in self.rollouts)

    @cached_property
    def lines(self) -> list[np.ndarray]:
        return [r.line for r in self.rollouts if np.isfinite(r.line).any()]

    @property
    def durations(self) -> np.ndarray:
        return np.array([r.duration for r in self.rollouts], dtype=int)

    def budgets(self) -> list[float]:
        """The calibrated KL at this alpha, in nats: a coefficient's KL grows with its square."""
        return sorted({self.alpha**2 * r.cell.target_kl for r in self.rollouts})

    def survival(self) -> Survival:
        return kaplan_meier(self.durations, np.array([r.death is not None for r in self.rollouts], dtype=bool))


# ----------------------------------------------------------------------------------------- loading


def printable(name: object) -> str:
    """The text with control characters and undecodable bytes spelled out, safe in a line of any output."""
    text = str(name).encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object as a dict, refusing the repeated keys that json.loads would silently overwrite."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError(f"the key {max(content, key=[key for key, _ in pairs].count)!r} stands twice in one object")
    return content


def require(path: Path) -> None:
    """Raise NotUsable if there is no such file."""
    if not path.exists():
        raise NotUsable(f"{path.name} is " + ("a link to nothing" if path.is_symlink() else "missing"))


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises NotUsable if there is no such file, ValueError if it is damaged."""
    require(path)
    if not path.is_file():  # a named pipe would hang
        raise ValueError("not a regular file")
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON, or cut off ({error}); is the sweep still writing it?") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error})") from None
    except RecursionError:
        raise ValueError("not a sweep's file: nested too deeply") from None
    return of_type(content, dict, "its content")


def of_type(value: object, kind: type | tuple[type, ...], what: str) -> object:
    """The value itself if it is of the JSON type asked for; ValueError otherwise."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"{what} is of type {type(value).__name__}, not {wanted}")
    return value


def key_of(content: dict, key: str, kind: type | tuple[type, ...]) -> object:
    """The value under a key, of the JSON type asked for; ValueError otherwise."""
    if key not in content:
        raise ValueError(f'the key "{key}" is missing')
    return of_type(content[key], kind, f'"{key}"')


def numbers(values: object, what: str) -> np.ndarray:
    """A JSON list of numbers as float64 (n,); ValueError otherwise, OverflowError beyond its range."""
    of_type(values, list, what)
    if not set(map(type, values)) <= {float, int}:
        i = next(i for i, value in enumerate(values) if type(value) not in (float, int))
        of_type(values[i], (float, int), f"{what}[{i}]")
    return np.array(values, dtype=float)


def whole_numbers(values: object, what: str) -> np.ndarray:
    """A JSON list of whole numbers >= 0 as int64 (n,); ValueError otherwise."""
    array = numbers(values, what)
    if not np.all((array >= 0) & (array < 2**53) & (array == np.floor(array))):
        raise ValueError(f"{what} holds something else than whole numbers >= 0")
    return array.astype(np.int64)


def by_alpha(content: dict, key: str) -> dict[float, object]:
    """The lists under a key, by steering strength; ValueError where keys are no numbers or the same number."""
    lists = {}
    for name, value in key_of(content, key, dict).items():
        try:
            alpha = float(name)
        except ValueError:
            alpha = math.nan
        if not math.isfinite(alpha):
            raise ValueError(f'"{key}" has the key {name!r}, which is no steering strength')
        if alpha in lists:
            raise ValueError(f'"{key}" holds alpha {alpha:g} twice, under keys that are the same number')
        lists[alpha] = value
    return lists


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn what is wrong inside a file into an error that names the file and what to do."""
    try:
        yield
    except (ValueError, OverflowError, OSError) as error:
        raise Damaged(path, getattr(error, "strerror", None) or error) from None


def read_calib(folder: Path) -> Cell:
    """The cell of a folder. Raises NotUsable if one of the three files is not there, SweepError if damaged."""
    for name in FILES[1:]:
        with naming(folder / name):
            require(folder / name)
    with naming(folder / FILES[0]):
        calib = read_json(folder / FILES[0])
        target = float(key_of(calib, "target_kl", (float, int)))
        if not 0 < target < MAX_KL:
            raise ValueError(f'"target_kl" is {target}, not a number of nats above 0')
        window = calib.get("window")
        if window is not None and not 1 <= of_type(window, int, '"window"') < 2**53:
            raise ValueError(f'"window" is {window}, not a number of tokens')
        for key in ("seed", "layer", "c_star"):
            of_type(calib.setdefault(key), (int, float, str, type(None)), f'"{key}"')
        return Cell(
            folder=folder,
            name=printable(folder.resolve().name if folder.name in ("", "..") else folder.name),
            model=printable(key_of(calib, "model", str)),
            method=printable(key_of(calib, "method", str)),
            seed=calib["seed"],
            layer=calib["layer"],
            c_star=calib["c_star"],
            target_kl=target,
            window=window,
        )


def read_records(cell: Cell, metric: str, wanted: Sequence[float], notes: Notes) -> tuple[list[Recorded], set[float]]:
    """What a cell recorded at the wanted alphas (all, if none is named), and all alphas in its files.

    An alpha that one of the files lacks is left out and noted. Raises NotUsable if pmass was not
    measured, Damaged if a file cannot be read or the files disagree on the number of rollouts.
    """
    trajectory, measured = cell.folder / FILES[1], cell.folder / FILES[2]
    lengths = "gen_lens_" + (metric.removeprefix("pmass").removeprefix("_") or "qa")
    with naming(measured):
        content = read_json(measured)
        if not of_type(content.get("computed", True), bool, '"computed"'):
            raise NotUsable('pmass was not measured ("computed" is false)')
        if metric not in content:
            held = ", ".join(sorted(key for key in content if key.startswith("pmass")))
            raise NotUsable(f"pmass.json has no {metric}; it has {held or 'no pmass at all'}")
        forks = whole_numbers(key_of(content, "fork_points", list), '"fork_points"')
        sources = {metric: by_alpha(content, metric)}
        if lengths in content:
            sources[lengths] = by_alpha(content, lengths)
    with naming(trajectory):
        sources["trajectory.json"] = kl = by_alpha(read_json(trajectory), "per_prompt_per_t_kl")
    alphas = kl.keys() | sources[metric].keys()
    records = []
    for alpha in sorted(alphas & set(wanted) if wanted else alphas):
        absent = [name for name, held in sources.items() if alpha not in held]
        if absent:
            notes.take(f"Left out alpha {alpha:g} of `{cell.name}`: not in {' and '.join(absent)}")
            continue
        at = f"alpha {alpha:g}"
        with naming(trajectory):
            rows = of_type(kl[alpha], list, at)
            curves = [numbers(row, f"{at}, rollout {i}") for i, row in enumerate(rows)]
        with naming(measured):
            table = of_type(sources[metric][alpha], list, f"{metric} at {at}")
            ends = sources[lengths][alpha] if lengths in sources else [len(curve) for curve in curves]
            ends = whole_numbers(ends, f"{lengths} at {at}")
            if not len(curves) == len(table) == len(ends):
                counts = f"{len(curves)} in trajectory.json, {len(table)} in {metric}, {len(ends)} in {lengths}"
                raise ValueError(f"the number of rollouts at {at} differs: {counts}")
            masses = [numbers(row, f"{metric} at {at}, rollout {i}") for i, row in enumerate(table)]
            if any(len(row) != len(forks) for row in masses):
                raise ValueError(f"{metric} at {at} has rows that do not match the {len(forks)} fork_points")
            pmass = np.array(masses).reshape(len(masses), len(forks))
            if np.isinf(pmass).any():
                raise ValueError(f"{metric} at {at} is infinite somewhere, which no probability mass is")
        records.append(Recorded(alpha, curves, pmass, forks, ends))
    return records, alphas


def find_cells(root: Path, model_contains: str, skip_bad: bool, notes: Notes) -> list[Cell]:
    """The cells of a sweep, by folder name, that the filter lets through; what is left out is noted."""
    try:
        if not root.is_dir():
            raise SweepError(f"{printable(root)}: no such folder; --runs-root must name the folder of the cells")
        entries = [root]
        if not all((root / name).is_file() for name in FILES):
            entries = [entry for entry in sorted(root.iterdir()) if entry.is_dir() or entry.is_symlink()]
    except OSError as error:
        raise SweepError(f"{printable(root)}: {error.strerror}; --runs-root must be readable") from None
    cells, others = [], []
    for folder in entries:
        if folder != root and folder.name.startswith(("_", ".")):
            continue
        with leaving_out(printable(folder.name), skip_bad, notes):
            cell = read_calib(folder)
            (cells if model_contains in cell.name or model_contains in cell.model else others).append(cell)
    there = ", ".join(f"{cell.name} ({cell.model})" for cell in others)
    where = printable(root)
    if not cells and others:
        raise SweepError(f"{where}: no folder name or model contains {model_contains!r}\nThe cells are: {there}")
    if not cells:
        raise SweepError(f"{where}: no cell with {', '.join(FILES)}\n{'; '.join(notes)}")
    if others:
        notes.take(f"Left out, neither folder name nor model contains {model_contains!r}: {there}", "INFO")
    return cells


@contextlib.contextmanager
def leaving_out(name: str, skip_bad: bool, notes: Notes) -> Iterator[None]:
    """Go on without a cell that is not usable or, if allowed, damaged; note why."""
    try:
        yield
    except (NotUsable, Damaged) as error:
        if isinstance(error, Damaged) and not skip_bad:
            raise
        notes.take(f"Left out `{name}`: {error.reason}")


def common_window(cells: Sequence[Cell], asked: int | None, notes: Notes) -> int:
    """The window to draw, in tokens. Raises SweepError if the cells have none or not the same."""
    recorded = {cell.name: cell.window for cell in cells}
    each = ", ".join(f"{name}: {window}" for name, window in recorded.items())
    if asked is None:
        if None in recorded.values() or len(set(recorded.values())) > 1:
            raise SweepError(f"calib.json: the cells have no window in common; choose one with --window\n{each}")
        return cells[0].window
    shorter = [name for name, window in recorded.items() if window is not None and window < asked]
    if shorter:
        notes.take(
            f"--window {asked} is longer than the window of {', '.join(shorter)}: rollouts cut off there count as EOS"
        )
    return asked


def read_rollouts(
    cells: Sequence[Cell],
    metric: str,
    wanted: Sequence[float],
    skip_bad: bool,
    observed: Callable[[Cell, Recorded], list[Rollout]],
    notes: Notes,
) -> tuple[list[Rollout], list[float]]:
    """All rollouts of the cells at the wanted alphas, and the alphas to draw; what is left out is noted."""
    rollouts, held, found = [], set(), set()
    for cell in cells:
        with leaving_out(cell.name, skip_bad, notes):
            records, alphas = read_records(cell, metric, wanted, notes)
            held |= alphas
            if wanted and not alphas & set(wanted):
                raise NotUsable(f"holds only alpha {listed(alphas)}")
            for recorded in records:
                found.add(recorded.alpha)
                rollouts += observed(cell, recorded)
    if not found:
        raise SweepError(f"Nothing to draw, no cell has what was asked for\n{'; '.join(notes)}")
    if set(wanted) - held:
        notes.take(f"Asked for and in no cell: alpha {listed(set(wanted) - held)}")
    if wanted and held - set(wanted):
        notes.take(f"In the data and not asked for: alpha {listed(held - set(wanted))}", "INFO")
    return rollouts, sorted(found | set(wanted))


def listed(alphas: Iterable[float]) -> str:
    """The alphas in numeric order, for print."""
    return ", ".join(f"{alpha:g}" for alpha in sorted(alphas))


# --------------------------------------------------------------------------------------- the maths


def alive_mask(pmass: np.ndarray, forks: np.ndarray, threshold: float, n_tokens: int) -> np.ndarray:
    """Whether the model could still answer, at each token.

    Dead at t if pmass (F,) was below the threshold at any fork (F,) s <= t; NaN is no measurement.
    Returns bool (n_tokens,), true up to death and false from there on.
    """
    return np.arange(n_tokens) < forks[pmass < threshold].min(initial=n_tokens)


def window_sum(values: np.ndarray, width: int) -> np.ndarray:
    """Sums of `width` neighbours: (n,) -> (n - width + 1,).

    Adds blocks of doubling length. A running total would be shorter, but would carry the rounding
    error of a large KL into every later token.
    """
    total, start, block = np.zeros(len(values) - width + 1), 0, values
    for size in (2**bit for bit in range(width.bit_length())):
        if size > 1:
            block = block[: -(size // 2)] + block[size // 2 :]
        if width & size:
            total += block[start : start + len(total)]
            start += size
    return total


def rolling_mean(kl: np.ndarray, roll: int, edges: Literal["pad", "shrink"]) -> np.ndarray:
    """Centred rolling mean of `roll` tokens, (L,) -> (L,), NaN where a window holds nothing finite.

    "pad" repeats the end values roll // 2 times and leaves KL shorter than `roll` as it is; "shrink"
    averages over the tokens that exist. Values that are not finite are left out of the means.
    """
    finite = np.isfinite(kl)
    if roll == 1 or len(kl) == 0 or (edges == "pad" and len(kl) < roll):
        return np.where(finite, kl, np.nan)
    mode = {"mode": "edge"} if edges == "pad" else {}  # shrink pads with zeros that do not count
    total = window_sum(np.pad(np.where(finite, kl, 0.0), roll // 2, **mode), roll)
    if edges == "pad" and finite.all():
        return total[: len(kl)] / roll
    count = window_sum(np.pad(finite.astype(float), roll // 2, **mode), roll)
    return np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)[: len(kl)]


def p95(head: np.ndarray) -> float:
    """numpy's linearly interpolated 95th percentile of the finite values; NaN if there are none."""
    head = np.sort(head[np.isfinite(head)])  # np.percentile itself takes ten times as long on twenty values
    return float(np.interp(0.95 * (len(head) - 1), np.arange(len(head)), head)) if len(head) else math.nan


def drawn_line(
    kl: np.ndarray,
    roll: int,
    edges: Literal["pad", "shrink"],
    normalize: bool,
    calib_tokens: int,
    calib_on: Literal["smoothed", "raw"],
) -> tuple[np.ndarray, float]:
    """The KL (L,) as it is drawn, and its scale in nats: (L,) and a float.

    Without a usable scale the line is (0,) and the scale NaN; without normalisation the scale is 1.
    """
    smooth = rolling_mean(kl, roll, edges)
    if not normalize:
        return smooth, 1.0
    scale = p95((kl if calib_on == "raw" else smooth)[:calib_tokens])
    return (smooth / scale, scale) if scale > MIN_SCALE else (smooth[:0], math.nan)


@dataclass(frozen=True)
class Survival:
    """Kaplan-Meier estimate at t = 0 and at each death, (k,) each; constant in between."""

    t: np.ndarray
    s: np.ndarray
    low: np.ndarray
    high: np.ndarray


def kaplan_meier(duration: np.ndarray, died: np.ndarray) -> Survival:
    """Survival of right-censored rollouts with its 95 % log-log Greenwood interval.

    duration (n,) in tokens, died bool (n,). Whoever is censored at a token is still at risk there.
    Where S is 1 or 0 the interval is that point, as the log-log transform defines none.
    Source: Kalbfleisch and Prentice, The Statistical Analysis of Failure Time Data (2002), 1.4.
    """
    t, deaths = np.unique(duration[died], return_counts=True)
    risk = at_risk(duration, t)
    s = np.cumprod(1 - deaths / risk)
    inner = s > 0  # only the last can be 0
    spread = Z95 * np.sqrt(np.cumsum(deaths[inner] / (risk[inner] * (risk[inner] - deaths[inner]))))
    spread = np.exp(spread / -np.log(s[inner]))
    low, high = np.zeros_like(s), np.zeros_like(s)
    low[inner], high[inner] = s[inner] ** spread, s[inner] ** (1 / spread)
    return Survival(np.r_[0, t], np.r_[1.0, s], np.r_[1.0, low], np.r_[1.0, high])


def at_risk(duration: np.ndarray, t: np.ndarray) -> np.ndarray:
    """How many of the durations (n,) reach the tokens t (k,): alive and running just before each. (k,)"""
    return (duration[:, None] >= t).sum(axis=0)


def running_median(lines: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Median over the lines that have a value at each token, and how many do: both (longest,)."""
    table = np.full((max(map(len, lines)), len(lines)), np.nan, dtype=np.float32)
    for column, line in enumerate(lines):
        table[: len(line), column] = line
    table.sort(axis=1)  # NaN goes last
    count = np.isfinite(table).sum(axis=1)
    middle = np.maximum(np.stack([count - 1, count]) // 2, 0).T  # the same element twice where count is odd
    return np.take_along_axis(table, middle, axis=1).mean(axis=1, dtype=float), count


def observe(
    cell: Cell,
    recorded: Recorded,
    window: int,
    threshold: float,
    curve: Callable[[np.ndarray], tuple[np.ndarray, float]],
) -> list[Rollout]:
    """The rollouts of one cell at one alpha; `curve` turns KL (L,) into the drawn line and its scale."""
    rollouts = []
    columns = zip(recorded.kl, recorded.pmass, recorded.gen_len.tolist(), strict=True)
    for prompt, (kl, pmass, gen_len) in enumerate(columns):
        n_tokens = min(len(kl), gen_len, window)
        alive = alive_mask(pmass, recorded.forks, threshold, n_tokens)
        died = not alive.all()
        fingerprint = hashlib.blake2b(repr((gen_len, len(kl))).encode(), digest_size=16)
        for array in (recorded.forks, pmass, kl):
            fingerprint.update(array.tobytes())
        kl = np.where(np.abs(kl) <= MAX_KL, kl, np.nan)
        observed = kl[:n_tokens][np.isfinite(kl[:n_tokens])]
        line, scale = curve(kl)
        rollouts.append(
            Rollout(
                cell=cell,
                prompt=prompt,
                alpha=recorded.alpha,
                n_tokens=n_tokens,
                death=int(alive.sum()) if died else None,
                eos=gen_len < window,
                late_drop=not died and bool((pmass[recorded.forks == n_tokens] < threshold).any()),
                unmeasured=not np.isfinite(pmass[recorded.forks < n_tokens]).any(),
                n_gaps=n_tokens - len(observed),
                n_negative=int((observed < -1e-3).sum()),
                kl_max=float(observed.max()) if len(observed) else math.nan,
                scale=scale,
                line=line[:n_tokens].astype(np.float32),
                fingerprint=fingerprint.digest(),
            )
        )
    return rollouts


def mark_copies(rollouts: Iterable[Rollout], row_of: Callable[[Cell], str]) -> list[Rollout]:
    """Mark exact copies of a rollout in other cells of the same model and the same panel.

    Greedy decoding ignores the seed, and at alpha 0 all methods share the base's rollout: counted again
    they would narrow the survival band for nothing.
    """
    first: dict[tuple, Rollout] = {}
    marked = []
    for r in rollouts:
        key = (row_of(r.cell), r.alpha, r.cell.model, r.prompt, r.fingerprint)
        original = first.setdefault(key, r)
        marked.append(r if original is r else replace(r, copy_of=original.cell.name))
    return marked


# -------------------------------------------------------------------------------------- the panels

ALIVE, DEAD, INK, BAND = "#0067A5", "#E8890C", "#111111", "#C9CDD2"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 7,
    "axes.labelsize": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlepad": 3,
    "axes.titlesize": 7,
    "legend.fontsize": 7,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.pad": 2,
    "ytick.major.pad": 2,
    "text.parse_math": False,  # names may hold a $
    "pdf.fonttype": 42,
    "svg.hashsalt": "spaghetti_kl_alive",  # the same input gives the same bytes
}
REFERENCE = {"color": INK, "linewidth": 0.7, "linestyle": (0, (4, 2))}
EOS_MARK = {"marker": "|", "color": INK, "markersize": 5, "markeredgewidth": 0.8, "linestyle": "none"}
DEATH_MARK = {"marker": "x", "color": "#7A3E00", "markersize": 3.2, "markeredgewidth": 0.8, "linestyle": "none"}
MAX_VERTICES = 1024  # of a line; a panel is a few hundred pixels wide


@dataclass(frozen=True)
class Look:
    """What the flags say about the drawing."""

    window: int  # tokens
    threshold: float
    normalize_kl: bool
    calib_tokens: int
    kl_log: bool
    line_lw: float  # points
    line_alpha: float | None
    survival: bool
    rows: str | None  # what each row of panels has in common


def thinned(first: int, line: np.ndarray) -> np.ndarray:
    """Vertices (k, 2) of a stretch of line that starts at token `first`, with k about MAX_VERTICES at most.

    Of each block of neighbouring tokens the least and the greatest stay, at their own tokens, so that
    at a block per pixel or finer the drawn ink is the same.
    """
    width = -(-2 * len(line) // MAX_VERTICES)
    keep = np.ones(len(line), dtype=bool)
    if width > 2 and np.isfinite(line).all():
        blocks = line[: len(line) // width * width].reshape(-1, width)
        start = np.arange(0, blocks.size, width)
        keep[1 : blocks.size] = False
        keep[start + blocks.argmin(axis=1)] = keep[start + blocks.argmax(axis=1)] = keep[-1] = True
    token = np.flatnonzero(keep)
    return np.stack([token + float(first), line[token]], axis=1)


def stretches(rollouts: Iterable[Rollout]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The polylines, alive and dead: at most one of each per rollout, sharing the vertex at death."""
    alive, dead = [], []
    for r in rollouts:
        if r.death is None:
            alive.append(thinned(0, r.line))
        else:
            if r.death > 0:
                alive.append(thinned(0, r.line[: r.death + 1]))
            dead.append(thinned(r.death, r.line[r.death :]))
    return [part for part in alive if len(part)], [part for part in dead if len(part)]


def y_limit(panels: Iterable[Panel]) -> float:
    """Upper limit shared by all panels: 1.4 times the 99th percentile of the drawn values >= 0."""
    lines = [line for panel in panels for line in panel.lines]
    drawn, n = np.empty(sum(map(len, lines)), dtype=np.float32), 0
    for line in lines:
        valid = line[line >= 0]  # NaN is not
        drawn[n : n + len(valid)] = valid
        n += len(valid)
    return max(1e-3, 1.4 * float(np.percentile(drawn[:n], 99, overwrite_input=True))) if n else 1.1


def x_limit(panel: Panel, window: int) -> float:
    """Right end of a panel's token axis: the longest rollout and a little room, 20 tokens, the window."""
    return min(window, max(20.0, 1.02 * max((r.n_tokens for r in panel.rollouts), default=0)))


def value_near(line: np.ndarray, t: int) -> float:
    """The line's value at token t or, inside a gap, at the nearest token that has one; NaN if none has."""
    finite = np.flatnonzero(np.isfinite(line))
    return float(line[finite[np.abs(finite - t).argmin()]]) if len(finite) else math.nan


def why_no_line(panel: Panel) -> str:
    """In words, why a panel shows no line; "" if it shows one."""
    if panel.lines:
        return ""
    if not panel.rollouts:
        return f"no rollouts at α = {panel.alpha:g}"
    if all(r.n_tokens == 0 for r in panel.rollouts):
        return "rollouts of 0 tokens"
    if all(r.n_gaps == r.n_tokens for r in panel.rollouts):
        return "no finite KL"
    largest = max(r.kl_max for r in panel.rollouts if r.n_gaps < r.n_tokens)
    if largest > MIN_SCALE:
        return "no scale"
    return "KL = 0: no scale" if largest == 0 else "KL ≤ 1e-8: no scale"


def draw_panel(ax: Axes, panel: Panel, top: float, look: Look) -> None:
    """Draw one panel's rollouts, their median and the reference; `top` is the KL axis's limit."""
    from matplotlib.collections import LineCollection

    drawn = [r for r in panel.rollouts if len(r.line)]
    alive, dead = stretches(drawn)
    opacity = look.line_alpha or min(0.7, max(0.2, 8 / max(1, panel.n)))
    for parts, colour, zorder in ((dead, DEAD, 2), (alive, ALIVE, 3)):
        style = {"colors": colour, "linewidths": look.line_lw, "alpha": opacity, "zorder": zorder}
        ax.add_collection(LineCollection(parts, joinstyle="bevel", **style), autolim=False)  # round joins cost a third
    ends = [(r.n_tokens - 1, value_near(r.line, r.n_tokens - 1)) for r in drawn if r.eos]
    deaths = [(r.death, value_near(r.line, r.death)) for r in drawn if r.death is not None]
    for points, mark in ((ends, EOS_MARK), (deaths, DEATH_MARK)):
        if points:  # one above the limit stands on it
            x, y = np.array(points, dtype=float).T
            ax.plot(x, np.minimum(y, top), clip_on=False, zorder=5, **mark)
    if panel.lines:
        median, count = running_median(panel.lines)
        few = 2 * count < panel.n
        for other, style in ((few, "-"), (~few, ":")):
            ax.plot(np.where(other, np.nan, median), color=INK, linewidth=1.1, linestyle=style, zorder=4)
    references = [1.0] if look.normalize_kl else panel.budgets()
    for level in references:
        ax.axhline(level, zorder=3.5, **REFERENCE)
    notes = [f"reference {level:.3g} off-scale ↑" for level in references if level > top]
    if 0 < len(panel.lines) < panel.n:
        notes.append(f"{panel.n - len(panel.lines)} of {panel.n} without a line")
    ax.text(0.98, 0.98, "\n".join(notes), transform=ax.transAxes, ha="right", va="top", size=6, zorder=6)
    ax.text(0.5, 0.6, why_no_line(panel), transform=ax.transAxes, ha="center", va="center", size=6.5, style="italic")


def draw_survival(ax: Axes, panel: Panel, ticks: Sequence[int]) -> None:
    """Draw S(t) with its band, and under each tick its token and the number still at risk there.

    Band and numbers at risk as Morris et al. (2019), BMJ Open 9:e030215 (KMunicate), ask of such curves.
    """
    if panel.rollouts:
        curve = panel.survival()
        t = np.r_[curve.t, max(r.n_tokens for r in panel.rollouts)]
        low, s, high = (np.r_[values, values[-1]] for values in (curve.low, curve.s, curve.high))
        ax.fill_between(t, low, high, step="post", color=BAND, linewidth=0, zorder=1)
        ax.step(t, s, where="post", color=INK, linewidth=0.9, zorder=2, clip_on=False)
    ax.set_ylim(-0.03, 1.03)
    ax.set_yticks([0, 1])
    ax.set_xticks(ticks, labels=[f"{t}\n{k}" for t, k in zip(ticks, at_risk(panel.durations, ticks), strict=True)])


def token_ticks(right: float, at_most: int) -> list[int]:
    """A few round tokens from 0 to the right end of the axis."""
    step = next(step for step in (m * 10**e for e in range(9) for m in (1, 2, 5)) if right / step < at_most)
    return list(range(0, int(right) + 1, step))


def draw_figure(rows: Sequence[Sequence[Panel]], look: Look) -> Figure:
    """The whole figure: rows of panels, each with its survival strip, under one legend.

    Sizes are inches on paper and text is 6 to 7 points, so that four columns fit a page's text width.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    n_cols = max(map(len, rows))
    width = max(3.4, 1.7 * n_cols + 0.4) if n_cols <= 4 else 7.2 + 0.6 * (n_cols - 4)
    legend_rows = 3 if width < 3.6 else 2 if width < 6 else 1
    left, gap, legend = 0.52, 0.12, 0.1 + 0.15 * legend_rows
    column = (width - left - 0.02) / n_cols
    above = 0.5 if look.rows else 0.32
    main, space, strip, below = 1.25, 0.08, 0.36, 0.38
    if not look.survival:
        space, strip, below = 0, 0, 0.3
    row_height = above + main + space + strip + below
    height = legend + len(rows) * row_height
    figure = Figure(figsize=(width, height))
    top = y_limit(panel for row in rows for panel in row)

    scale = f"p95 of the first {look.calib_tokens} tokens" if look.normalize_kl else "budget α² · target KL"
    handles = [
        Line2D([], [], color=ALIVE, linewidth=1.8, label=f"alive (pmass ≥ {look.threshold:g})"),
        Line2D([], [], color=DEAD, linewidth=1.8, label="dead"),
        Line2D([], [], label="death", **DEATH_MARK),
        Line2D([], [], label="EOS", **EOS_MARK),
        Line2D([], [], color=INK, linewidth=1.1, label="median (dotted: < half left)"),
        Line2D([], [], label=scale, **REFERENCE),
    ]
    figure.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, 1 - 0.04 / height),
        ncols=-(-len(handles) // legend_rows),
        frameon=False,
        borderaxespad=0,
        columnspacing=1.2,
        handlelength=1.5,
        handletextpad=0.5,
        labelspacing=0.3,
    )

    def axes_at(j: int, y: float, h: float) -> Axes:
        return figure.add_axes(((left + j * column) / width, y / height, (column - gap) / width, h / height))

    for i, row in enumerate(rows):
        bottom = height - legend - i * row_height - above - main
        for j, panel in enumerate(row):
            right = x_limit(panel, look.window)
            ticks = token_ticks(right, 3 if column < 1.3 else 4)
            ax = lowest = axes_at(j, bottom, main)
            draw_panel(ax, panel, top, look)
            if look.kl_log:
                ax.set_yscale("symlog", linthresh=0.1)
                ax.yaxis.set_major_formatter(lambda kl, _: f"{kl:g}" if kl >= 0 else "")
            ax.set(xlim=(0, right), ylim=(-0.02 * (min(0.1, top) if look.kl_log else top), top))
            ax.annotate(f"α = {panel.alpha:g}", (0, 1), (0, 12), "axes fraction", "offset points", weight="bold")
            ax.annotate(f"n = {panel.n}", (1, 1), (0, 12), "axes fraction", "offset points", ha="right")
            ax.set_title(f"{panel.n_died} died, {panel.n_censored} censored", loc="left")
            if look.survival:
                ax.set_xticks(ticks, labels=[])
                lowest = axes_at(j, bottom - space - strip, strip)
                lowest.set_xlim(0, right)
                draw_survival(lowest, panel, ticks)
            else:
                ax.set_xticks(ticks)
            if j > 0:
                ax.tick_params(labelleft=False)
                lowest.tick_params(labelleft=False)
                continue
            label_x = -(left - 0.14) / (column - gap)
            ax.set_ylabel(f"KL / p95(KL[:{look.calib_tokens}])" if look.normalize_kl else "KL (nats)")
            ax.yaxis.set_label_coords(label_x, 0.5)
            words = "token\nat risk" if look.survival else "token"
            lowest.annotate(words, (0, 0), (-9, -4.6), "axes fraction", "offset points", ha="right", va="top", size=6.5)
            if look.survival:
                lowest.set_ylabel("S")
                lowest.yaxis.set_label_coords(label_x, 0.5)
            if look.rows:
                name = f"{look.rows}: {panel.row}"
                ax.annotate(name, (0, 1), (-27, 26), "axes fraction", "offset points", weight="bold")
    return figure


# ------------------------------------------------------------------------------ the table, the files


def summary_rows(panels: Iterable[Panel], look: Look) -> list[dict[str, str]]:
    """The table's rows, one per panel, as printed."""
    rows = []
    for panel in panels:
        curve = panel.survival()
        deaths = [r.death for r in panel.rollouts if r.death is not None]
        s, low, high = curve.s[-1], curve.low[-1], curve.high[-1]
        rows.append(
            {
                "alpha": f"{panel.alpha:g}",
                "n": str(panel.n),
                "n_died": str(panel.n_died),
                "n_censored": str(panel.n_censored),
                "S_end": f"{s:.3f}" if panel.n else "–",
                "S_end_95ci": f"[{low:.3f}, {high:.3f}]" if 0 < s < 1 else "–",
                "median_death": f"{np.median(deaths):g}" if deaths else "none",
                "at_risk_end": str(at_risk(panel.durations, [look.window])[0]),
                "no_scale": str(sum(math.isnan(r.scale) for r in panel.rollouts)),
            }
        )
    return rows


def summary_text(title: str, panels: Sequence[Panel], look: Look, notes: Iterable[str]) -> str:
    """The markdown summary: a pipe table with a row per panel, its columns explained, and the notes."""
    from tabulate import tabulate

    rows = summary_rows(panels, look)
    if look.rows:
        rows = [{look.rows: p.row.replace("|", "\\|")} | row for p, row in zip(panels, rows, strict=True)]
    table = tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True, stralign="right")
    return f"""# KL(steered || base) and survival: {title}

{table}

`n` = `n_died` + `n_censored` (ended by EOS, alive) + alive at the end of the window. `S_end`: Kaplan-Meier
survival at the end, with its 95 % log-log Greenwood interval (none is defined where S is 1 or 0).
`median_death`: token, over the rollouts that died. `at_risk_end`: alive and still running at the end of the
window. `no_scale`: rollouts whose KL has no scale; they have no line, but count everywhere else.

## Notes

{chr(10).join(f"- {note}" for note in notes)}
"""


CSV_COLUMNS = ["cell", "prompt", "alpha", "observed_tokens", "death_token", "censored", "scale_nats", "kl_max_nats"]
CSV_COLUMNS += ["line_max", "line_max_token", "line_end", "left_out_as_copy_of"]


def rollouts_csv(rollouts: Iterable[Rollout]) -> str:
    """A row per rollout that was read: where it is from, what became of it, and where to find its line."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for r in rollouts:
        drawn = r.line[np.isfinite(r.line)]
        peak = int(np.nanargmax(r.line)) if len(drawn) else None  # csv writes None as an empty field
        place = (r.line[peak], peak, drawn[-1]) if len(drawn) else (math.nan, None, math.nan)
        row = [r.cell.name, r.prompt, r.alpha, r.n_tokens, r.death, int(r.censored), r.scale, r.kl_max, *place]
        fields = [("" if math.isnan(v) else f"{v:.6g}") if isinstance(v, (float, np.floating)) else v for v in row]
        writer.writerow([*fields, r.copy_of])
    return text.getvalue()


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """matplotlib as this script wants it, whatever backend, matplotlibrc and home folder the user has."""
    os.environ["MPLBACKEND"] = "agg"
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def rendered(figure: Figure, file_format: str, dpi: int) -> bytes:
    """The figure as a file's content, without dates."""
    undated = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}
    content = io.BytesIO()
    figure.savefig(content, format=file_format, dpi=dpi, metadata=undated[file_format])
    return content.getvalue()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs from writing into the folder meanwhile, where the file system knows locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_files(out: Path, contents: dict[str, bytes]) -> None:
    """Write all files or none: each beside its target, then renamed onto it. Raises OSError."""
    out.mkdir(parents=True, exist_ok=True)
    for name in contents:
        if (out / name).is_dir():
            raise IsADirectoryError(errno.EISDIR, f"{name} is a folder")
    with locked(out):
        for stale in out.glob(".kl_alive_*.part"):  # of a run that was killed
            stale.unlink(missing_ok=True)
        parts = {name: out / f".{name}.{os.getpid()}.part" for name in contents}
        try:
            for name, part in parts.items():
                part.write_bytes(contents[name])
            for name, part in parts.items():
                part.replace(out / name)
        finally:
            for part in parts.values():
                part.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------ the program


def check_flags(args: Args) -> None:
    """Raise UsageError, before any file is read, where a flag's value makes no sense."""
    checks = {
        "--threshold must lie in (0, 1]": 0 < args.threshold <= 1,
        "--metric must be pmass or pmass_<name>": args.metric == "pmass" or args.metric.startswith("pmass_"),
        "--window, in tokens, must be at least 1": args.window is None or args.window >= 1,
        "--roll, in tokens, must be at least 1": args.roll >= 1,
        "--calib-tokens must be at least 1": args.calib_tokens >= 1,
        "--ncols must be at least 1": args.ncols >= 1,
        "--alphas must be finite numbers": all(map(math.isfinite, args.alphas)),
        "--line-lw, in points, must be above 0": 0 < args.line_lw < math.inf,
        "--line-alpha must lie in (0, 1]": args.line_alpha is None or 0 < args.line_alpha <= 1,
        "--dpi must lie between 20 and 2400": 20 <= args.dpi <= 2400,
        "--formats must name at least one format": len(args.formats) > 0,
    }
    wrong = [rule for rule, holds in checks.items() if not holds]
    if wrong:
        raise UsageError("; ".join(wrong))


def check_out(out: Path) -> None:
    """Raise SweepError where `out` can be no folder to write to; creates nothing."""
    nearest = next(folder for folder in (out, *out.absolute().parents) if os.path.lexists(folder))
    if not nearest.is_dir():
        raise SweepError(f"{printable(out)}: cannot be written, {printable(nearest)} is not a folder; choose --out")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise SweepError(f"{printable(out)}: cannot be written, no permission in {printable(nearest)}; choose --out")


def note_copies(rollouts: Sequence[Rollout], kept: bool, notes: Notes) -> None:
    """Name the cells that recorded another cell's rollouts again."""
    contents, copied = defaultdict(set), defaultdict(list)
    for r in rollouts:
        contents[r.cell.name].add((r.cell.model, r.alpha, r.prompt, r.fingerprint))
        if r.copy_of:
            copied[r.cell.name].append(r)
    for name, copies in copied.items():
        all_of_it = len(copies) == len(contents[name])
        twin = next((other for other, held in contents.items() if contents[name] <= held), name)
        if all_of_it and twin != name:
            text = f"`{name}` is an exact copy of `{twin}` ({len(copies)} rollouts)"
        else:
            originals = ", ".join(f"`{other}`" for other in sorted({r.copy_of for r in copies}))
            at = listed({r.alpha for r in copies})
            text = f"{len(copies)} of {len(contents[name])} rollouts of `{name}` (alpha {at}) copy {originals} exactly"
        notes.take(text + ("; kept (--keep-duplicates)" if kept else "; left out"))


def note_findings(panels: Sequence[Panel], notes: Notes) -> None:
    """Note what the panels pool, and what in their rollouts is not as it should be."""
    for kind in ("model", "method"):
        held = [{getattr(r.cell, kind) for r in panel.rollouts} for panel in panels]
        if max(map(len, held)) > 1:
            pooled = sorted(set().union(*held))
            notes.take(f"{len(pooled)} {kind}s pooled: {', '.join(pooled)} (--rows {kind} separates them)", "INFO")
    rollouts = [r for panel in panels for r in panel.rollouts]
    late = Counter(r.alpha for r in rollouts if r.late_drop)
    if late:
        where = ", ".join(f"{n} at alpha {alpha:g}" for alpha, n in sorted(late.items()))
        notes.take(f"First below the threshold at the fork on their last token, so not counted as died: {where}")
    for what, counts in (
        ("observed tokens have KL that is not finite (gaps)", [r.n_gaps for r in rollouts]),
        ("observed tokens have a negative KL, below the axis", [r.n_negative for r in rollouts]),
        ("rollouts have no pmass at any fork, and count as alive", [int(r.unmeasured) for r in rollouts]),
    ):
        if any(counts):
            cells = sorted({r.cell.name for r, count in zip(rollouts, counts, strict=True) if count})
            notes.take(f"{sum(counts)} {what}, in {', '.join(cells)}")


def row_of(cell: Cell, by: str | None) -> str:
    """The row of panels that a cell belongs to, for print; "" if all are pooled."""
    return "" if by is None else printable(getattr(cell, "name" if by == "cell" else by))


def arrange(rollouts: Sequence[Rollout], alphas: Sequence[float], by: str | None, ncols: int) -> list[list[Panel]]:
    """The panels as they stand on the page: a row per value of `by`, or wrapped after `ncols`."""
    grouped = defaultdict(list)
    for r in rollouts:
        grouped[row_of(r.cell, by), r.alpha].append(r)
    values = sorted({row for row, _ in grouped}, key=lambda value: (len(value) if by == "seed" else 0, value)) or [""]
    rows = [[Panel(value, alpha, grouped[value, alpha]) for alpha in alphas] for value in values]
    return rows if by else [rows[0][i : i + ncols] for i in range(0, len(alphas), ncols)]


def settings(args: Args, window: int) -> str:
    """The flags that change the numbers or the lines, in words."""
    scale = (
        f"p95 of the first {args.calib_tokens} tokens ({args.calib_on})" if args.normalize_kl else "none, KL in nats"
    )
    return (
        f"Settings: window {window} tokens; alive while {args.metric} ≥ {args.threshold:g}; "
        f"rolling mean of {args.roll} tokens ({args.edges}); scale: {scale}"
    )


def run(args: Args) -> list[Path]:
    """Read the sweep, draw it, and write the figure, the table and the list of rollouts."""
    check_flags(args)
    root, notes = args.runs_root, Notes()
    name = Path(os.path.realpath(root)).name
    out = args.out or Path("figs") / f"{name}_kl_alive"
    check_out(out)

    cells = find_cells(root, args.model_contains, args.skip_bad_cells, notes)
    window = common_window(cells, args.window, notes)
    curve = partial(drawn_line, roll=args.roll, edges=args.edges, normalize=args.normalize_kl)
    curve = partial(curve, calib_tokens=args.calib_tokens, calib_on=args.calib_on)
    observed = partial(observe, window=window, threshold=args.threshold, curve=curve)
    rollouts, alphas = read_rollouts(cells, args.metric, args.alphas, args.skip_bad_cells, observed, notes)
    used = list(dict.fromkeys(r.cell for r in rollouts))
    notes.log(f"{len(used)} cells, {len(rollouts)} rollouts: {', '.join(cell.name for cell in used)}")
    rollouts = mark_copies(rollouts, partial(row_of, by=args.rows))
    note_copies(rollouts, args.keep_duplicates, notes)
    if args.keep_duplicates:
        rollouts = [replace(r, copy_of="") for r in rollouts]
    rows = arrange([r for r in rollouts if not r.copy_of], alphas, args.rows, args.ncols)
    panels = [panel for row in rows for panel in row]
    note_findings(panels, notes)

    look = Look(**{key.name: getattr(args, key.name) for key in fields(Look)} | {"window": window})
    about = [f"`{c.name}` ({c.model}, {c.method}, seed {c.seed}, layer {c.layer}, c_star {c.c_star})" for c in used]
    notes = [f"Cells used: {'; '.join(about)}", *notes, settings(args, window)]
    contents = {
        TABLE: summary_text(printable(name), panels, look, notes).encode(),
        ROLLOUTS: rollouts_csv(rollouts).encode(),
    }
    with styled():
        figure = draw_figure(rows, look)
        for file_format in sorted(set(args.formats)):
            contents[f"{FIGURE}.{file_format}"] = rendered(figure, file_format, args.dpi)
    try:
        write_files(out, contents)
    except OSError as error:
        reason = f"cannot be written ({error.strerror}); older files there are as they were"
        raise SweepError(f"{printable(out)}: {reason}") from None
    return [out / name for name in contents]


def main(argv: Sequence[str] | None = None) -> int:
    """Run from a shell; returns the exit status."""
    args = tyro.cli(Args, args=argv, description=__doc__, prog="spaghetti_kl_alive")
    from loguru import logger

    logger.remove()
    logger.add(sys.stderr, format="{level}: {message}")
    status = 0
    try:
        written = run(args)
        with contextlib.suppress(BrokenPipeError):
            print("wrote", *map(printable, written))
    except (SweepError, UsageError) as error:
        logger.error(str(error))
        status = 2 if isinstance(error, UsageError) else 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:  # nobody reads it; without this, Python complains again as it exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return status


if __name__ == "__main__":
    sys.exit(main())
