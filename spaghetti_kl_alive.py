# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "numpy>=1.26", "matplotlib>=3.8", "seaborn>=0.13", "tyro>=0.9.2", "loguru>=0.7", "tabulate>=0.9",
# ]
# ///
"""Does a steered model stay within its calibrated KL budget, and is it still alive under it?

Reads a finished sweep and draws one panel per steering strength alpha. Each thin line is one rollout:
KL(steered || base) against token, in units of the rollout's own scale, the 95th percentile of its first
tokens. The strip below is the share of rollouts that are still alive (Kaplan-Meier).

  blue          the model can still answer: its probability mass on true/false was at or above the
                threshold at every fork point so far
  orange        it cannot, from the cross on. "6 + 2 died": 2 on their last token. "3 back": died, but at
                or above the threshold again later, so perhaps noise of the probe
  black tick    the rollout ended by itself (EOS); ended alive, it is right-censored
  KL 1.7 <= 4   95th percentile of all the panel's KL, in nats, and its budget alpha^2 * target_kl
  black line    median over the rollouts still running (dotted: fewer than half of them are left)
  dashed line   the scale, 1 (with --no-normalize-kl the budget)

  python spaghetti_kl_alive.py --runs-root runs/sweep --rows method --formats png pdf
  sweep = read(Args(runs_root="runs/sweep")); figure = draw(sweep); paths = write(sweep)   # from Python

Each folder in --runs-root is a cell with calib.json, trajectory.json and pmass.json. Written to --out:
kl_alive_spaghetti.png, the tables kl_alive_summary.md, and kl_alive_rollouts.csv, a row per rollout.
--version prints the version. Exit status: 0 all written; 1 the data cannot give them; 2 wrong use;
130 interrupted.
"""

from __future__ import annotations

import sys

try:
    import contextlib
    import csv
    import gc
    import io
    import json
    import logging
    import math
    import os
    import shutil
    import tempfile
    import textwrap
    import threading
    import time
    import warnings
    from collections import Counter, defaultdict
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from dataclasses import dataclass, fields, replace
    from functools import cached_property
    from pathlib import Path
    from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

    import numpy as np
    import tyro
except KeyboardInterrupt:  # Ctrl-C while these load
    sys.exit(130)

if TYPE_CHECKING:  # matplotlib, loguru and tabulate are imported where they are used, so that --help answers at once
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import GridSpec

__version__ = "0.2.0"
FILES = ("calib.json", "trajectory.json", "pmass.json")
FIGURE, TABLES, ROLLOUTS = "kl_alive_spaghetti", "kl_alive_summary.md", "kl_alive_rollouts.csv"
FORMATS = ("png", "pdf", "svg")
MIN_SCALE = 1e-8  # a scale at or below it is no scale
MAX_TOKENS = 2**53  # beyond it no file means a number of tokens
MAX_KL = 1e6  # nats; log-probabilities do not reach that far, so beyond it KL counts as not finite


@dataclass(frozen=True)
class Args:
    runs_root: Annotated[str | Path, tyro.conf.arg(metavar="PATH")]
    """Folder of the sweep: one sub-folder per cell, or itself one cell."""
    out: Annotated[str | Path | None, tyro.conf.arg(metavar="PATH")] = None
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
    """Opacity of a rollout's line, in (0, 1]. None: 16/n, between 0.02 and 0.8."""
    normalize_kl: bool = True
    """Divide each rollout's KL by its own scale; otherwise KL is drawn in nats."""
    calib_tokens: int = 20
    """Number of first tokens whose 95th percentile is the scale."""
    calib_on: Literal["smoothed", "raw"] = "smoothed"
    """Take the scale from the smoothed KL or from the KL as recorded."""
    rows: Literal["method", "model", "seed", "cell"] | None = None
    """Give each value its own row of panels, one column per alpha. None: pool all cells."""
    ncols: int | None = None
    """Panels side by side before they wrap (without --rows). None: balanced rows of up to 6."""
    survival: bool = True
    """Draw the strip of those alive and the numbers at risk under each panel."""
    formats: tuple[Literal["png", "pdf", "svg"], ...] = ("png",)
    """File formats of the figure."""
    dpi: int = 160
    """Resolution of the PNG, in pixels per inch."""
    palette: str | None = None
    """Palette known to seaborn whose first two colours are alive and dead. None: blue and orange."""
    keep_duplicates: bool = False
    """Count exact copies of a rollout again instead of leaving them out."""
    skip_bad_cells: bool = False
    """Leave out cells with damaged files, with a warning, instead of stopping."""

    @property
    def asked(self) -> set[float]:
        """The alphas named; -0.0 is 0, as in the data."""
        return {alpha + 0.0 for alpha in self.alphas}


class SweepError(Exception):
    """The sweep cannot give the figure: which file, what is wrong, what to do."""

    status = 1


class UsageError(SweepError):
    """A flag's value makes no sense."""

    status = 2


def check_flags(args: Args) -> None:
    """Raise UsageError, before any file is read, where a flag's value makes no sense."""
    checks = {
        "--threshold must lie in (0, 1]": 0 < args.threshold <= 1,
        "--metric must be pmass or pmass_<name>": args.metric == "pmass" or args.metric.startswith("pmass_"),
        "--window, in tokens, must be at least 1": args.window is None or args.window >= 1,
        "--roll, in tokens, must be at least 1": args.roll >= 1,
        "--edges must be pad or shrink": args.edges in ("pad", "shrink"),
        "--calib-on must be smoothed or raw": args.calib_on in ("smoothed", "raw"),
        "--rows must be method, model, seed or cell": args.rows in (None, "method", "model", "seed", "cell"),
        "--calib-tokens must be at least 1": args.calib_tokens >= 1,
        "--ncols must be at least 1": args.ncols is None or args.ncols >= 1,
        "--alphas must be finite numbers": all(map(math.isfinite, args.alphas)),
        "--line-lw, in points, must be above 0": 0 < args.line_lw < math.inf,
        "--line-alpha must lie in (0, 1]": args.line_alpha is None or 0 < args.line_alpha <= 1,
        "--dpi must lie between 20 and 2400": 20 <= args.dpi <= 2400,
        "--formats must be of png, pdf and svg": len(args.formats) > 0 and {*args.formats} <= {*FORMATS},
    }
    wrong = [rule for rule, holds in checks.items() if not holds]
    if wrong:
        raise UsageError("; ".join(wrong))
    colours(args.palette)


# ---------------------------------------------------------------------------------------- the data


@dataclass(frozen=True)
class Cell:
    """One run of the sweep, from its calib.json; all text fit for print."""

    folder: Path
    name: str  # the folder's
    model: str
    method: str
    row: str  # of panels, by --rows; "" if all are pooled
    about: str  # model, method, seed, layer and coefficient in words
    target_kl: float  # nats
    window: int | None  # tokens; None where calib.json has none


class Fate(NamedTuple):
    """How a rollout ended, as its forks saw it."""

    end: Literal["died", "died_last", "censored", "alive"]  # died_last: dead first at the fork after its last token
    death: int | None  # token
    recovered: bool  # died, and was at or above the threshold at a later fork
    followed: int | None  # token of death or of the last fork with a measured pmass; None where there is none


@dataclass(frozen=True)
class Rollout:
    """One rollout, as observed for T tokens: to its own end, its record's or the window's."""

    cell: Cell
    prompt: int
    alpha: float
    kl: np.ndarray  # (T,) float32, nats; NaN where not finite
    generated: int  # tokens with a KL, those beyond the window too
    forks: np.ndarray  # (F,) tokens, ascending
    pmass: np.ndarray  # (F,), NaN where not measured
    cut: bool  # the KL record ends before the rollout and the window do
    eos: bool  # generation ended by itself before the window did, and its KL was recorded to the end
    fate: Fate
    scale: float  # the line's unit in nats; NaN if there is none
    line: np.ndarray  # (T,) float32 as drawn; (0,) if there is no scale
    recorded: int  # equal where KL, forks, pmass and gen_len are
    copy_of: str = ""  # the cell that recorded the same rollout first

    @property
    def budget(self) -> float:
        """Calibrated KL at this alpha, nats, in KL's precision: it grows with alpha squared. NaN without steering."""
        return float(np.float32(min(self.alpha * self.alpha * self.cell.target_kl, 1e38))) or math.nan

    @cached_property
    def kl_p95(self) -> float:
        """95th percentile of the observed KL, nats."""
        return p95(self.kl)


class Survival(NamedTuple):
    """Kaplan-Meier estimate at each fork that anyone was measured at, (k,) each; constant in between."""

    forks: np.ndarray  # tokens
    s: np.ndarray
    low: np.ndarray  # 95 % interval
    high: np.ndarray
    followed: np.ndarray  # (m,) tokens, up to which each measured rollout was in the risk set


@dataclass(frozen=True)
class Panel:
    """The rollouts of one alpha and, with --rows, of one method, model, seed or cell."""

    row: str  # which one; "" if all are pooled
    alpha: float
    label: str  # the alpha, for print
    rollouts: list[Rollout]
    calib_tokens: int

    @property
    def name(self) -> str:
        return f"{self.row} at alpha {self.label}" if self.row else f"alpha {self.label}"

    @property
    def n(self) -> int:
        return len(self.rollouts)

    @cached_property
    def drawn(self) -> list[Rollout]:
        """Those that have a line."""
        return [r for r in self.rollouts if np.isfinite(r.line).any()]

    @property
    def ends(self) -> Counter[str]:
        """How many died, died_last, were censored, are alive; of those dead, how many recovered."""
        return Counter([r.fate.end for r in self.rollouts] + ["recovered" for r in self.rollouts if r.fate.recovered])

    @property
    def n_deaths(self) -> int:
        return self.ends["died"] + self.ends["died_last"]

    @cached_property
    def survival(self) -> Survival:
        """Of the rollouts that were measured; its evidence is prompts, as rollouts of one are not independent."""
        measured = [r for r in self.rollouts if r.fate.followed is not None]
        seen = [r.forks[np.isfinite(r.pmass) & (r.forks <= len(r.kl))] for r in measured]
        forks = np.unique(np.concatenate(seen or [np.empty(0, dtype=int)]))
        followed = np.array([r.fate.followed for r in measured], dtype=int)
        died = np.array([r.fate.death is not None for r in measured], dtype=bool)
        prompts = {(r.cell.model, r.prompt) for r in self.rollouts}
        return kaplan_meier(followed, died, forks, len(prompts) / max(1, self.n))

    @property
    def budgets(self) -> list[float]:
        """Each cell's budget, ascending, nats; none at alpha 0."""
        return sorted({r.budget for r in self.rollouts if not math.isnan(r.budget)})

    @cached_property
    def budget(self) -> dict[str, float]:
        """The observed KL, pooled, against the budget: a row of that table, in nats; NaN where there is none.

        `over_budget` is the share of finite tokens above their own cell's budget, `scale` the median of the
        rollouts' scales (what 1 on a normalised axis is worth).
        """
        pooled = np.concatenate([r.kl[np.isfinite(r.kl)] for r in self.rollouts] or [np.empty(0)])
        head = np.concatenate([r.kl[: self.calib_tokens] for r in self.rollouts] or [np.empty(0)])
        scales = [r.scale for r in self.rollouts if math.isfinite(r.scale)]
        over = sum(int((r.kl > r.budget).sum()) for r in self.rollouts)
        within = sum(r.fate.death is not None and r.kl_p95 <= r.budget for r in self.rollouts)
        return {
            "kl_p95": p95(pooled),
            "kl_p95_head": p95(head),
            "over_budget": over / len(pooled) if self.budgets and len(pooled) else math.nan,
            "died_within": within if self.budgets else math.nan,
            "kl_median": float(np.median(pooled)) if len(pooled) else math.nan,
            "scale": float(np.median(scales)) if scales else math.nan,
            "no_scale": self.n - len(scales),
        }

    @property
    def is_over(self) -> bool:
        """Whether more than 5 % of the tokens are above their budget."""
        return self.budget["over_budget"] > 0.05


@dataclass(frozen=True)
class Sweep:
    """What was read, ready to be drawn and written."""

    args: Args
    name: str  # of runs_root, for print
    window: int  # tokens
    cells: list[Cell]  # those used
    rollouts: list[Rollout]  # all that were read, copies included
    panels: list[Panel]  # row by row, alphas ascending
    notes: list[str]  # what was left out, and what is unusual

    def settings(self) -> str:
        """What gives the same output from the same data: the version, and the flags as they took effect."""
        flags = {f.name: getattr(self.args, f.name) for f in fields(Args) if f.name not in ("runs_root", "out")}
        shown = ", ".join(f"{name} {value}" for name, value in (flags | {"window": self.window}).items())
        return printable(f"spaghetti_kl_alive {__version__}: {shown}")


# --------------------------------------------------------------------------------------------- read


class CellError(Exception):
    """A cell that cannot be used. `path`: its damaged file; None where it merely has nothing to show."""

    def __init__(self, reason: str, path: Path | None = None) -> None:
        super().__init__(printable(reason))
        self.path = path


def printable(name: object) -> str:
    """The text with control characters and undecodable bytes spelled out, safe in a line of any output."""
    text = str(name).encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def several(things: Iterable[object], at_most: int = 12) -> str:
    """The things, cut to the first ones and a count where there are many."""
    names = [f"{thing:.12g}" if isinstance(thing, float) else str(thing) for thing in things]
    return ", ".join(names[:at_most] + [f"and {len(names) - at_most} more"] * (len(names) > at_most))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[dict[str, Any]]:
    """The object in a JSON file. What is wrong with it, there or in the block, is a CellError that names the file."""
    try:
        if path.exists() and not path.is_file():  # a named pipe would hang
            raise ValueError("not a regular file")
        yield of_type(json.loads(path.read_bytes().decode("utf-8-sig")), dict, "its content")
    except FileNotFoundError:
        raise CellError(f"{path.name} is missing") from None
    except (KeyError, RecursionError, ValueError, TypeError, OverflowError, OSError) as error:
        known = {
            KeyError: f"the key {error} is missing",
            RecursionError: "nested too deeply",
            json.JSONDecodeError: f"not JSON, or cut off ({error}); is the sweep still writing it?",
        }
        what = known.get(type(error), getattr(error, "strerror", None) or error)
        raise CellError(f"{path.name}: {what}", path) from None


def of_type(value: Any, kind: type, what: str) -> Any:
    """The value itself if it is of the JSON type asked for; ValueError otherwise."""
    if not isinstance(value, kind):
        raise ValueError(f"{what} is of type {type(value).__name__}, not {kind.__name__}")
    return value


def numbers(values: Any, what: str, whole: bool = False) -> np.ndarray:
    """A JSON list of numbers as float64 (n,), null being NaN; of `whole` ones >= 0 as int64. ValueError otherwise."""
    array = np.array(of_type(values, list, what))
    if array.dtype == object and {*map(type, values)} <= {int, float, type(None)}:
        array = np.array(values, dtype=float)
    if array.ndim != 1 or array.dtype.kind not in "fiu":
        raise ValueError(f"{what} is no list of numbers")
    if whole and not np.all((array >= 0) & (array < MAX_TOKENS) & (array == np.floor(array))):
        raise ValueError(f"{what} holds something else than whole numbers >= 0")
    return array.astype(int if whole else float, copy=False)


def by_alpha(content: dict[str, Any], key: str) -> dict[float, Any]:
    """The lists under a key, taken out of it, by steering strength. ValueError where keys are no or the same number."""
    lists: dict[float, Any] = {}
    for name, value in of_type(content.pop(key), dict, f'"{key}"').items():
        alpha = float(name) + 0.0  # -0.0 is 0
        if alpha in lists or not math.isfinite(alpha):
            raise ValueError(f'"{key}" has the key {name!r}, twice or no steering strength')
        lists[alpha] = of_type(value, list, f'"{key}" at alpha {name}')
    return lists


def read_calib(folder: Path, args: Args) -> Cell:
    """The cell of a folder. Raises CellError, also where --model-contains leaves it out."""
    with opened(folder / FILES[0]) as calib:
        target, window = calib["target_kl"], calib.get("window")
        if type(target) not in (int, float) or not 0 < target < MAX_KL:
            raise ValueError(f'"target_kl" is {str(target)[:40]}, not a number of nats above 0')
        if window is not None and not (type(window) is int and 0 < window < MAX_TOKENS):
            raise ValueError(f'"window" is {str(window)[:40]}, not a number of tokens')
        about = {"cell": printable(folder.name)}
        about |= {key: printable(of_type(calib[key], str, f'"{key}"')) for key in ("model", "method")}
        about |= {key: printable(calib.get(key))[:40] for key in ("seed", "layer", "c_star")}
    name, model, method, seed, layer, c_star = about.values()
    if args.model_contains not in name and args.model_contains not in model:
        raise CellError(f"neither folder name nor model, {model}, contains {args.model_contains!r} (--model-contains)")
    row = about[args.rows] if args.rows else ""
    words = f"{model}, {method}, seed {seed}, layer {layer}, c_star {c_star}"
    return Cell(folder, name, model, method, row, words, float(target), window)


def read_rollouts(cell: Cell, args: Args) -> tuple[list[Rollout], dict[str, str]]:
    """A cell's rollouts at the alphas asked for (all if none is), and what is left out of it and why.

    Raises CellError where the cell cannot be used, or where its files disagree on the number of rollouts.
    """
    metric, lengths = args.metric, "gen_lens_" + (args.metric.removeprefix("pmass").removeprefix("_") or "qa")
    rollouts: list[Rollout] = []
    with opened(cell.folder / FILES[2]) as measured:
        if not of_type(measured.get("computed", True), bool, '"computed"'):
            raise CellError('pmass was not measured ("computed" is false)')
        if metric not in measured:
            others = several(sorted(key for key in measured if key.startswith("pmass")))
            raise CellError(f"pmass.json has no {metric}; it has {others or 'no pmass at all'}")
        forks = numbers(measured["fork_points"], '"fork_points"', whole=True)
        lists = {key: by_alpha(measured, key) for key in (metric, lengths) if key in measured}
        with opened(cell.folder / FILES[1]) as trajectory:
            kl = by_alpha(trajectory, "per_prompt_per_t_kl")
            held = kl.keys() | lists[metric].keys()
            wanted = args.asked or held
            lists[FILES[1]] = {
                alpha: [numbers(row, f"alpha {alpha:g}, rollout {i}") for i, row in enumerate(kl.pop(alpha))]
                for alpha in sorted(kl.keys() & wanted)
            }
        if not held & wanted:
            raise CellError(f"holds only alpha {several(sorted(held))}" if held else "holds no rollouts")
        left_out = {f"alpha {alpha:.12g}": "in the data, but not asked for" for alpha in sorted(held - wanted)}
        for alpha in sorted(held & wanted):
            at, absent = f"alpha {alpha:.12g}", [name for name, there in lists.items() if alpha not in there]
            if absent or not any(there[alpha] for there in lists.values()):
                left_out[f"{at} of `{cell.name}`"] = f"not in {' and '.join(absent)}" if absent else "no rollouts"
                continue
            rows, masses = lists[FILES[1]][alpha], lists[metric][alpha]
            ends = lists[lengths][alpha] if lengths in lists else [len(row) for row in rows]
            ends = numbers(ends, f"{lengths} at {at}", whole=True).tolist()
            if not len(rows) == len(masses) == len(ends):
                each = f"{len(rows)} in {FILES[1]}, {len(masses)} in {metric}, {len(ends)} in {lengths}"
                raise ValueError(f"the number of rollouts at {at} differs: {each}")
            lists_of_each = enumerate(zip(rows, ends, masses, strict=True))
            rollouts += [rollout_of(cell, i, alpha, *row, forks, args) for i, row in lists_of_each]
    return rollouts, left_out


def rollout_of(
    cell: Cell, prompt: int, alpha: float, kl: np.ndarray, gen_len: int, masses: Any, forks: np.ndarray, args: Args
) -> Rollout:
    """A rollout from its lists in the files: KL (L,) in nats, its length, pmass and forks (F,). Raises ValueError."""
    at = f"{args.metric} at alpha {alpha:g}, rollout {prompt},"
    pmass = numbers(masses, at)
    if len(pmass) != len(forks):
        raise ValueError(f"{at} has {len(pmass)} values for {len(forks)} fork_points")
    if ((pmass < 0) | (pmass > 1 + 1e-5)).any():  # a softmax in single precision sums to 1 only nearly
        raise ValueError(f"{at} is not in [0, 1]: {pmass}")
    window = args.window or cell.window or MAX_TOKENS
    full = min(gen_len, window)
    kl = kl[:gen_len]  # what stands behind it is padding
    n_tokens = min(len(kl), full)
    order = np.argsort(forks, kind="stable")
    forks, pmass = forks[order], pmass[order]
    recorded = hash((gen_len, kl.tobytes(), forks.tobytes(), pmass.tobytes()))
    kl = np.where(np.abs(kl) <= MAX_KL, kl, np.nan)
    smooth = rolling_mean(kl, args.roll, args.edges)
    scale = p95((smooth if args.calib_on == "smoothed" else kl)[: args.calib_tokens])
    scale = scale if scale > MIN_SCALE else math.nan
    unit = scale if args.normalize_kl else 1.0
    return Rollout(
        cell=cell,
        prompt=prompt,
        alpha=alpha,
        kl=kl[:n_tokens].astype(np.float32),
        generated=len(kl),
        forks=forks,
        pmass=pmass,
        cut=n_tokens < full,
        eos=gen_len < min(window, cell.window or window) and n_tokens == full,
        fate=fate(pmass, forks, n_tokens, args.threshold, ended=gen_len < window or n_tokens < full),
        scale=scale,
        line=(smooth[: n_tokens if math.isfinite(unit) else 0] / unit).astype(np.float32),
        recorded=recorded,
    )


def cell_folders(root: Path, out: Path) -> list[Path]:
    """The folders that are to be cells: `root` itself, or all in it but hidden ones and what this script wrote."""
    if all((root / name).is_file() for name in FILES):
        return [root.resolve() if root.name in ("", "..") else root]
    folders = []
    for folder in sorted(root.iterdir()):
        if folder.name.startswith(("_", ".")) or (folder.exists() and not folder.is_dir()):
            continue
        is_cell = not os.access(folder, os.X_OK) or (folder / FILES[0]).exists()  # closed, or a link to nothing
        if is_cell or not ((folder / TABLES).exists() or out.resolve().is_relative_to(folder.resolve())):
            folders.append(folder)
    return folders


def read_cells(root: Path, args: Args, say: Callable[[str], None]) -> tuple[list[Rollout], list[str]]:
    """The rollouts of all cells that can be used, and what was left out. Raises SweepError where nothing remains."""
    rollouts: list[Rollout] = []
    left_out: dict[str, list[str]] = defaultdict(list)  # what, by why
    folders = cell_folders(root, out_folder(args))
    for i, folder in enumerate(folders):
        name = printable(folder.name)
        say(f"reading cell {i + 1} of {len(folders)}: {name}")
        try:
            held, absent = read_rollouts(read_calib(folder, args), args)
        except CellError as error:
            if error.path and not args.skip_bad_cells:
                advice = "Repair or rerun that cell, or leave it out with --skip-bad-cells."
                raise SweepError(f"{printable(folder)}{os.sep}{error}\n{advice}") from None
            held, absent = [], {f"`{name}`": str(error)}
        rollouts += held
        for what, why in absent.items():
            left_out[why].append(what)
    notes = [f"Left out {several(dict.fromkeys(things))}: {why}" for why, things in left_out.items()]
    if not rollouts:
        inside = Counter(path.parents[1] for path in root.glob(f"*/*/{FILES[0]}")).most_common(1)
        hint = [f"{n} cells are in {printable(path)}: give --runs-root {printable(path)}" for path, n in inside]
        why = "; ".join(hint + notes) or f"no folder with {', '.join(FILES)}"
        raise SweepError(f"{printable(root)}: nothing to draw, no cell can be used\n{why}")
    return rollouts, notes


def read(args: Args, say: Callable[[str], None] = lambda _: None) -> Sweep:
    """Read a sweep's cells and arrange their rollouts in panels.

    `say` is told in words how far it is. Raises UsageError where a flag's value makes no sense, SweepError
    where the data cannot give a figure; what is left out or unusual is in the notes of what it returns.
    """
    check_flags(args)
    root = Path(args.runs_root)
    try:
        if not root.is_dir():
            raise SweepError(f"{printable(root)}: no such folder; --runs-root must name the folder of the cells")
        rollouts, notes = read_cells(root, args, say)
        name = printable(root.name or root.resolve().name)
    except OSError as error:
        named = printable(error.filename or root)
        raise SweepError(f"{named}: cannot be read ({error.strerror}); --runs-root must be readable") from None
    cells = list(dict.fromkeys(r.cell for r in rollouts))
    window = common_window(cells, args.window, notes)
    rollouts = mark_copies(rollouts, args, notes)
    panels = arranged(rollouts, args, notes)
    return Sweep(args, name, window, cells, rollouts, panels, notes + findings(panels, args))


def common_window(cells: Sequence[Cell], asked: int | None, notes: list[str]) -> int:
    """The window to draw, in tokens, from the cells' own. Raises SweepError if they have none or not the same."""
    window = asked or cells[0].window
    if window is None or (not asked and {cell.window for cell in cells} != {window}):
        each = several(f"{cell.name}: {cell.window}" for cell in cells)
        raise SweepError(f"calib.json: the cells have no window in common; choose one with --window\n{each}")
    shorter = [f"`{cell.name}`" for cell in cells if cell.window is not None and cell.window < window]
    if shorter:
        what = f"--window {window} is longer than the window of {several(shorter)}"
        notes.append(f"{what}: a rollout that reaches it is cut there, and censored")
    return window


def mark_copies(rollouts: Sequence[Rollout], args: Args, notes: list[str]) -> list[Rollout]:
    """Mark, and note, exact copies of a rollout in other cells of the same model and panel.

    Greedy decoding ignores the seed, and at alpha 0 all methods share the base's rollout: counted again
    they would narrow the survival band for nothing.
    """
    first: dict[tuple[Any, ...], Cell] = {}
    marked, copies, total = [], defaultdict(list), Counter(r.cell.name for r in rollouts)
    for r in rollouts:
        original = first.setdefault((r.cell.row, r.alpha, r.cell.model, r.prompt, r.recorded), r.cell)
        if original is not r.cell:
            copies[r.cell.name, original.name].append(r.alpha)
            r = replace(r, copy_of=original.name)
        marked.append(r)
    each = []
    for (name, original_name), alphas in copies.items():
        where = "" if len(alphas) == total[name] else f", alpha {several(sorted({*alphas}))}"
        each.append(f"{len(alphas)} of {total[name]} of `{name}` (those of `{original_name}` again{where})")
    if each:
        what = "kept (--keep-duplicates)" if args.keep_duplicates else "left out"
        notes.append(f"Exact copies of rollouts, {what}: {several(each)}")
    return marked


def arranged(rollouts: Sequence[Rollout], args: Args, notes: list[str]) -> list[Panel]:
    """The panels, row by row; within a row one for each alpha that was found or asked for."""
    found = {r.alpha for r in rollouts}
    alphas = sorted(found | args.asked)
    if args.asked - found:
        notes.append(f"Asked for and in no cell: alpha {several(sorted(args.asked - found))}")
    enough = next(d for d in range(6, 18) if len({f"{alpha:.{d}g}" for alpha in alphas}) == len(alphas))
    held = defaultdict(list)
    for r in rollouts:
        if args.keep_duplicates or not r.copy_of:
            held[r.cell.row, r.alpha].append(r)
    rows = sorted({row for row, _ in held}, key=lambda row: (len(row) if args.rows == "seed" else 0, row))
    return [Panel(row, a, f"{a:.{enough}g}", held[row, a], args.calib_tokens) for row in rows for a in alphas]


def findings(panels: Sequence[Panel], args: Args) -> list[str]:
    """What the panels pool, and what in their rollouts is not as it should be, with the panels and counts."""
    notes = []
    for kind in ("model", "method"):
        held = [{getattr(r.cell, kind) for r in panel.rollouts} for panel in panels]
        if max(map(len, held)) > 1:
            pooled = sorted(set().union(*held))
            notes.append(f"{len(pooled)} {kind}s pooled: {several(pooled)} (--rows {kind} separates them)")
    back = [f"{p.name}: {p.ends['recovered']} of {p.n_deaths}" for p in panels if p.ends["recovered"] > p.n_deaths / 2]
    if back:
        what = "More than half of the deaths were above the threshold again later, perhaps noise of the probe"
        notes.append(f"{what} ({several(back)})")
    low, short = args.threshold, args.roll if args.edges == "pad" else 0
    some = any(r.generated >= short for panel in panels for r in panel.rollouts)
    unsmoothed = f"Rollouts shorter than --roll {short}, {'not smoothed' if some else 'all: nothing is smoothed'}"
    unusual: dict[str, Callable[[Rollout], Any]] = {
        "Deaths without steering, the probe fails on the base model": lambda r: not r.alpha and "died" in r.fate.end,
        unsmoothed: lambda r: r.generated < short,
        "KL records cut short of their rollout, censored there": lambda r: r.cut,
        "Below the threshold only after what was observed, no death": lambda r: (
            "died" not in r.fate.end and (r.pmass < low).any()
        ),
        "Rollouts without pmass at any fork, in no risk set": lambda r: r.fate.followed is None,
        "Observed tokens whose KL is not finite, gaps": lambda r: (~np.isfinite(r.kl)).sum(),
        "Observed tokens with a negative KL, below the axis": lambda r: (r.kl < -1e-3).sum(),
    }
    for what, count in unusual.items():
        where = [f"{panel.name}: {k}" for panel in panels if (k := sum(map(count, panel.rollouts)))]
        notes += [f"{what} ({several(where)})"] if where else []
    return notes


# --------------------------------------------------------------------------------------- the maths


def alive_mask(pmass: np.ndarray, forks: np.ndarray, threshold: float, n_tokens: int) -> np.ndarray:
    """Whether the model could still answer, at each token.

    Dead at t if pmass (F,) was below the threshold at any fork (F,) s <= t; NaN is no measurement.
    Returns bool (n_tokens,), true up to death and false from there on.
    """
    first: int = forks[pmass < threshold].min(initial=n_tokens)
    return np.arange(n_tokens) < first


def fate(pmass: np.ndarray, forks: np.ndarray, n_tokens: int, threshold: float, ended: bool) -> Fate:
    """How a rollout of n_tokens observed tokens ended, from pmass (F,) at the forks (F,) s <= n_tokens.

    `ended`: by EOS, or its record does, before the window. The fork at n_tokens is after the last token.
    """
    death = int(alive_mask(pmass, forks, threshold, n_tokens + 1).sum())
    seen = np.isfinite(pmass) & (forks <= n_tokens)
    if death <= n_tokens:
        recovered = bool((seen & (forks > death) & (pmass >= threshold)).any())
        return Fate("died" if death < n_tokens else "died_last", death, recovered, death)
    followed = int(forks[seen].max()) if seen.any() else None
    return Fate("censored" if ended else "alive", None, False, followed)


def rolling_mean(kl: np.ndarray, roll: int, edges: Literal["pad", "shrink"]) -> np.ndarray:
    """Centred rolling mean of `roll` tokens, (L,) -> (L,), NaN where a window holds nothing finite.

    "pad" repeats the end values roll // 2 times and leaves KL shorter than `roll` as it is; "shrink"
    averages over the tokens that exist. Values that are not finite are left out of the means.
    """
    finite = np.isfinite(kl)
    if roll == 1 or len(kl) == 0 or (edges == "pad" and len(kl) < roll):
        return np.where(finite, kl, np.nan)

    roll = min(roll, 2 * len(kl) + 1)  # a longer window holds no more

    def sums(values: np.ndarray) -> np.ndarray:  # from a running total: exact to 1e-6 nats below MAX_KL
        first, last = (values[0], values[-1]) if edges == "pad" else (0.0, 0.0)
        ends = np.full(roll // 2, first), np.full(roll // 2, last)
        total: np.ndarray = np.concatenate([[0.0], ends[0], values, ends[1]]).cumsum()
        return (total[roll:] - total[:-roll])[: len(values)]

    total = sums(np.where(finite, kl, 0.0))
    if edges == "pad" and finite.all():
        return total / roll
    count = np.round(sums(finite.astype(float)))
    return np.divide(total, count, out=np.full(len(kl), np.nan), where=count > 0)


def p95(values: np.ndarray) -> float:
    """numpy's linearly interpolated 95th percentile of the finite values; NaN if there are none."""
    values = np.sort(values[np.isfinite(values)])  # np.percentile itself takes ten times as long on twenty values
    return float(np.interp(0.95 * (len(values) - 1), np.arange(len(values)), values)) if len(values) else math.nan


def kaplan_meier(followed: np.ndarray, died: np.ndarray, forks: np.ndarray, weight: float = 1.0) -> Survival:
    """Survival at the forks (k,) and its 95 % interval.

    followed (m,) in tokens, died bool (m,); whoever is censored at a token is still at risk there. `weight`
    is how much of an independent observation each is; it widens the interval and leaves S as it is.

    The interval is the beta product confidence procedure, by two moments: Fay, Brittain, Proschan (2013),
    Biostatistics 14:723. It is defined everywhere, and without censoring it is Clopper and Pearson's.
    """
    risk = at_risk(followed, forks)
    deaths = (followed[died][:, None] == forks).sum(axis=0)
    s = np.cumprod(1 - deaths / np.maximum(risk, 1))
    risk, left = weight * risk, weight * (risk - deaths)
    mean = np.cumprod((left + 1) / (risk + 1))  # of a product of Beta(left + 1, deaths)
    square = np.cumprod((left + 1) * (left + 2) / ((risk + 1) * (risk + 2)))
    high = beta_quantile(0.975, mean, square)
    low = beta_quantile(0.025, mean * left / (left + 1), square * left / (left + 2))  # times Beta(left, 1)
    return Survival(forks, s, low, high, followed)


def beta_quantile(q: float, mean: np.ndarray, square: np.ndarray) -> np.ndarray:
    """The q-quantile of the beta distributions with these first two moments, (k,) each; 95 % limits to 1e-4.

    By summing the density over a grid in log-odds. A mean of 0 or 1 is that point itself.
    """
    result = np.array(mean, dtype=float)
    variance = square - mean * mean
    spread = np.flatnonzero((variance > 1e-15) & (mean > 0))
    if len(spread) == 0:
        return result
    pairs, inverse = np.unique(np.stack([mean, square], axis=1)[spread], axis=0, return_inverse=True)
    m, variance = pairs[:, :1], pairs[:, 1:] - pairs[:, :1] ** 2
    both = m * (1 - m) / variance - 1
    a, b = m * both, (1 - m) * both
    odds = np.log(a / b) + np.sqrt(1 / a + 1 / b) * np.linspace(-20, 20, 4001)
    density = a * odds - both * np.logaddexp(0, odds)
    total = np.cumsum(np.exp(density - density.max(axis=1, keepdims=True)), axis=1)
    total -= np.diff(total, axis=1, prepend=0) / 2  # the trapezoid rule
    at = [np.interp(q * row[-1], row, x) for row, x in zip(total, odds, strict=True)]
    result[spread] = 1 / (1 + np.exp(-np.array(at)))[inverse.ravel()]
    return result


def at_risk(followed: np.ndarray, t: np.ndarray | Sequence[int]) -> np.ndarray:
    """How many of the rollouts followed up to (m,) tokens are so to the tokens t (k,) or later. (k,)"""
    return np.asarray((followed[:, None] >= np.asarray(t)).sum(axis=0))


def running_median(lines: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Median over the lines that have a value at each token, and how many do: both (longest,)."""
    table = np.full((max(map(len, lines)), len(lines)), np.nan, dtype=np.float32)
    for column, line in enumerate(lines):
        table[: len(line), column] = line
    table.sort(axis=1)  # NaN goes last
    count = np.isfinite(table).sum(axis=1)
    middle = np.maximum(np.stack([count - 1, count]) // 2, 0).T  # the same element twice where count is odd
    return np.take_along_axis(table, middle, axis=1).mean(axis=1, dtype=float), count


# --------------------------------------------------------------------------------------------- draw

Colour = tuple[float, float, float]
ALIVE, DEAD, INK, BAND, PADDED = "#0067A5", "#E8890C", "#111111", "#7F858C", "#EDEEF0"
TICKS = {"labelsize": 6.5, "major.size": 2.5, "major.width": 0.6, "major.pad": 2}
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 7,
    "axes.labelsize": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 7,
    **{f"{axis}tick.{key}": size for axis in "xy" for key, size in TICKS.items()},
    "text.parse_math": False,  # names may hold a $
    "pdf.fonttype": 42,
    "svg.hashsalt": "spaghetti_kl_alive",  # the same input gives the same bytes
}
LEGEND: dict[str, Any] = {"loc": "upper left", "frameon": False, "borderaxespad": 0, "borderpad": 0}
LEGEND |= {"labelspacing": 0.35, "columnspacing": 1.2, "handlelength": 1.5, "handletextpad": 0.5}
REFERENCE: dict[str, Any] = {"color": INK, "linewidth": 0.7, "linestyle": (0, (4, 2))}
EOS_MARK: dict[str, Any] = {"marker": "|", "color": INK, "markersize": 5, "markeredgewidth": 0.8, "linestyle": "none"}
DEATH_MARK: dict[str, Any] = {"marker": "x", "markersize": 3.4, "markeredgewidth": 0.9, "linestyle": "none"}
MEDIAN: dict[str, Any] = {"color": INK, "linewidth": 1.1}
SHARE: dict[str, Any] = {"color": INK, "linewidth": 0.8, "marker": "o", "markersize": 1.7, "markeredgewidth": 0}
MAX_VERTICES = 1024  # of a line; a panel is a few hundred pixels wide
# Lengths in inches on paper, text in points
LINE, EDGE, LEFT, GAP = 0.145, 0.06, 0.57, 0.12  # a line of text; free at the page's edge, left of and between columns
MAIN, SPACE, STRIP = 1.25, 0.07, 0.36  # heights of a panel's KL, of what separates it from its strip, and of that
ROOM = 0.025  # of the token axis, free at both ends
LOCK = threading.RLock()  # matplotlib's rcParams are the process's: one figure at a time


def colours(palette: str | None) -> tuple[Colour, Colour]:
    """The colours of alive and dead, RGB in [0, 1]. Raises UsageError for a palette that seaborn does not know."""
    from matplotlib.colors import to_rgb

    if palette is None:
        return to_rgb(ALIVE), to_rgb(DEAD)
    with warnings.catch_warnings():  # what it imports sets filters of its own
        import seaborn
    try:
        alive, dead = seaborn.color_palette(palette, 2)
    except Exception:  # a palette's name is a small language of its own, and its errors are of many kinds
        known = "deep, muted, colorblind, Set2, Dark2, husl"
        raise UsageError(f"--palette {palette!r} is none that seaborn knows; {known} are some") from None
    return to_rgb(alive), to_rgb(dead)


def death_mark(dead: Colour) -> dict[str, Any]:
    """The look of a cross: darker than the lines of the dead, to stand out from them."""
    return DEATH_MARK | {"color": [c / 2 for c in dead]}


def digits(value: float, n: int) -> str:
    """The number with n <= 6 significant digits at most, and no exponent where a reader needs none."""
    return f"{float(f'{value:.{n}g}'):g}"


def panel_words(panel: Panel) -> list[tuple[str, str, str]]:
    """The three title lines over a panel: strength, deaths, KL against the budget.

    Each is the text on its left, that text's badge ("dead", "back", "over" or none), and the text on its right.
    """
    lines = [(f"α = {panel.label}", "", f"n = {panel.n}")]
    if not panel.rollouts:
        return lines
    last, back, censored = panel.ends["died_last"], panel.ends["recovered"], panel.ends["censored"]
    deaths = f"{panel.ends['died']}{f' + {last}' if last else ''} died{f', {back} back' if back else ''}"
    badge = "" if not panel.n_deaths else "back" if 2 * back > panel.n_deaths else "dead"
    eos = sum(r.eos for r in panel.rollouts if r.fate.end == "censored")
    ended = [f"{k} {what}" for k, what in ((eos, "EOS"), (censored - eos, "cut")) if k]
    no_line = f"{panel.n - len(panel.drawn)} no line" if 0 < len(panel.drawn) < panel.n else ""
    kl = (budget_words(panel), "over" if panel.is_over else "") if panel.alpha else ("unsteered control", "")
    return [*lines, (deaths, badge, ", ".join(ended)), (*kl, no_line)]


def budget_words(panel: Panel) -> str:
    """The panel's KL against its budget, in nats: "KL 1.7 ≤ 4", with the digits it takes to be true as printed.

    Where cells' budgets differ, or the percentile is on the other side of the budget than the share of tokens
    over it is of 5 %, the share: "7.1% over 1, 2".
    """
    value, over = panel.budget["kl_p95"], panel.budget["over_budget"]
    for n in (2, 3, 4, 5, 6) if len(panel.budgets) == 1 else ():
        ours, limit = digits(value, n), digits(panel.budgets[0], max(n, 3))
        if ours != limit and (float(ours) > float(limit)) == panel.is_over:
            return f"KL {ours} {'>' if panel.is_over else '≤'} {limit}"
    return "KL –" if math.isnan(over) else f"{100 * over:.3g}% over {several([digits(b, 3) for b in panel.budgets], 3)}"


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


def why_no_line(panel: Panel, top: float) -> str:
    """In words, why a panel shows no line; "" if it shows one."""
    lines = [r.line for r in panel.drawn]
    reasons = {
        f"no rollouts at α = {panel.label}": not panel.rollouts,
        "no finite KL": not any(np.isfinite(r.kl).any() for r in panel.rollouts),
        "KL ≤ 1e-8: no line": not lines
        and all(np.nanmax(np.abs(r.kl), initial=0) <= MIN_SCALE for r in panel.rollouts),
        f"no KL in the first\n{panel.calib_tokens} tokens: no scale": not lines,
        "rollouts of 1 token": all(len(line) < 2 for line in lines),
        "all lines above the axis": all(np.nanmin(line) > top for line in lines),
        "all KL below 0": all(np.nanmax(line) < 0 for line in lines),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def padded_spans(panel: Panel, args: Args) -> list[tuple[int, int]]:
    """The tokens at both ends of the longest rollout whose rolling mean holds repeated values."""
    smoothed = [(len(r.line), r.generated) for r in panel.rollouts if r.generated >= args.roll and len(r.line)]
    if args.edges != "pad" or args.roll == 1 or not smoothed:
        return []
    end, generated = max(smoothed)
    spans = [(0, min(args.roll // 2, end)), (max(0, generated - args.roll // 2), end)]
    return [(start, stop) for start, stop in spans if start < stop]


def text_width(text: str, size: float = 7, bold: bool = False) -> float:
    """The width of a line of text in inches."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family="DejaVu Sans", size=size, weight="bold" if bold else "normal")
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] / 72


def header_text(sweep: Sweep) -> str:
    """What holds for all panels, and what the words over them mean."""
    args, pieces = sweep.args, []
    for kind in ("model", "method"):
        names = list(dict.fromkeys(getattr(cell, kind) for cell in sweep.cells))
        pooled = f"{kind}s pooled: " if len(names) > 1 and args.rows != "cell" else ""
        pieces += [pooled + several(names, 4)] if args.rows != kind else []
    smoothed = args.roll > 1 and any(r.generated >= args.roll or args.edges == "shrink" for r in sweep.rollouts)
    mean = f"mean of {args.roll} tokens, " + ("ends padded" if args.edges == "pad" else "fewer at the ends")
    pieces += [f"window {sweep.window} tokens", mean if smoothed else "not smoothed"]
    sides = "KL a ≤ b or a > b".replace(" ", "\N{NO-BREAK SPACE}")
    pieces.append(f"{sides}: 95th percentile of a panel's KL, and its budget α² · target KL, in nats")
    words = " ".join(" ".join(line) for panel in sweep.panels for line in panel_words(panel))
    meanings = {
        "% over ": "c% over b: share of tokens above it",
        " + ": "a + b died: b of them on their last token",
        " back": "back: died, but above the threshold again later",
        " cut": "cut: its record ends early",
    }
    return " · ".join(pieces + [meaning for sign, meaning in meanings.items() if sign in words])


def token_ticks(longest: int, axis: float, widest: float) -> tuple[list[int], float]:
    """3 to 6 round tokens for an axis of so many inches, and the inches that it takes for labels of `widest` inches."""
    from matplotlib.ticker import MaxNLocator

    for most in (5, 4, 3, 2):
        spaced = MaxNLocator(most, steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=3).tick_values(0, longest)
        ticks = [int(t) for t in spaced if t <= longest]
        half = [max(widest, text_width(str(t), 6.5)) / 2 for t in ticks]
        half[0], half[-1] = 2 * half[0], 2 * half[-1]  # the outermost lean inwards
        need = (0.06 + max(np.add(half[:-1], half[1:]))) * longest / ticks[1] * (1 + 2 * ROOM)
        if need <= axis:
            break
    return ticks, need


class Page(NamedTuple):
    """What the panels share."""

    args: Args
    alive: Colour
    dead: Colour
    column: float  # width of a panel, inches
    longest: int  # tokens
    ticks: list[int]  # tokens
    bottom: float  # KL, slightly below zero, so that a mark at zero is whole
    top: float  # KL


def blank_page(sweep: Sweep) -> tuple[Page, Figure, GridSpec]:
    """A page as wide as a sweep's words and numbers need, with header and legend, and the grid for its panels.

    A row of panels has five rows in the grid: title, KL, space, strip, labels. Without --rows up to 6 panels stand side
    by side, else what leaves the fewest empty places. Raises SweepError where a file format cannot hold the page.
    """
    from matplotlib.figure import Figure

    args, panels, n = sweep.args, sweep.panels, len({panel.alpha for panel in sweep.panels})
    balanced = n if n <= 6 else min((6, 5, 4, 3), key=lambda columns: -n % columns)
    n_columns = n if args.rows else min(n, args.ncols or balanced)
    n_rows = -(-len(panels) // n_columns)
    paper, share = (3.3, n_columns) if n_columns <= 2 else (6.8, max(4, n_columns))  # a column of a paper, or its page
    words = {line for panel in panels for line in panel_words(panel)}
    title = max(text_width(left, bold=True) + text_width(right) + 0.14 for left, _, right in words)
    column = max(title, (paper - LEFT - EDGE + GAP) / share - GAP)
    longest = max([20, *(len(r.kl) for panel in panels for r in panel.rollouts)])
    ticks, need = token_ticks(longest, column, text_width(str(max(p.n for p in panels)), 6.5) * args.survival)
    column = max(column, need)
    width = LEFT + n_columns * (column + GAP) - GAP + EDGE
    text = header_text(sweep)
    letters = int(0.92 * len(text) * (width - 2 * EDGE) / text_width(text))
    header = textwrap.wrap(text, letters, break_on_hyphens=False)
    alive, dead = colours(args.palette)
    handles = legend_handles(args, alive, dead, any(padded_spans(panel, args) for panel in panels))
    legend_columns = max(1, int(width / 1.62))
    head = 2 * EDGE + (len(header) + 0.9 * -(-len(handles) // legend_columns)) * LINE
    heights = [(5.1 if args.rows else 3.6) * LINE, MAIN, *([SPACE, STRIP, 0.36] if args.survival else [0, 0, 0.26])]
    height = head + n_rows * sum(heights)
    check_size(width, height, args)

    page = Page(args, alive, dead, column, longest, ticks, *kl_limits(panels, args.kl_log))
    figure = Figure(figsize=(width, height))
    for i, line in enumerate(header):
        figure.text(EDGE, height - EDGE - (i + 0.8) * LINE, line, transform=figure.dpi_scale_trans)
    corner = (EDGE / width, 1 - (1.5 * EDGE + len(header) * LINE) / height)
    figure.legend(handles=handles, bbox_to_anchor=corner, ncols=legend_columns, **LEGEND)
    grid = figure.add_gridspec(5 * n_rows, n_columns, height_ratios=heights * n_rows, hspace=0)
    sides = {"left": LEFT / width, "right": 1 - EDGE / width, "top": 1 - head / height, "bottom": 0}
    grid.update(wspace=GAP / column, **sides)
    return page, figure, grid


def kl_limits(panels: Sequence[Panel], kl_log: bool) -> tuple[float, float]:
    """Limits of the KL axis: 1.4 times the 99th percentile of the drawn values >= 0, without those of the control."""
    steered = [panel for panel in panels if panel.alpha] or panels
    drawn = np.concatenate([r.line[r.line >= 0] for panel in steered for r in panel.rollouts] or [np.empty(0)])
    top = max(1e-3, 1.4 * float(np.percentile(drawn, 99, overwrite_input=True))) if len(drawn) else 1.1
    return -0.03 * (min(0.1, top) if kl_log else top), top


def check_size(width: float, height: float, args: Args) -> None:
    """Raise SweepError where a page of this size in inches is larger than its file format holds."""
    pixels = [math.ceil(side * args.dpi) for side in (width, height)]
    limits = {
        "png": ("a PNG can hold (65535 a side, 400 million in all)", max(pixels) < 2**16 and math.prod(pixels) <= 4e8),
        "pdf": ("a PDF page can hold (200 inches a side)", max(width, height) <= 200),
    }
    for name, (limit, fits) in limits.items():
        if name in args.formats and not fits:
            size = f"{pixels[0]} x {pixels[1]} pixels, {width:.0f} x {height:.0f} inches"
            advice = "use fewer --alphas, --no-survival, another --ncols, fewer --rows or a lower --dpi"
            raise SweepError(f"the figure would be {size}, more than {limit}\n{advice}")


def legend_handles(args: Args, alive: Colour, dead: Colour, padded: bool) -> list[Any]:
    """What the legend shows."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    lines: dict[str, dict[str, Any]] = {
        f"alive (pmass ≥ {args.threshold:g})": {"color": alive, "linewidth": 1.8},
        "dead": {"color": dead, "linewidth": 1.8},
        "death": death_mark(dead),
        "EOS": EOS_MARK,
        "median (dotted: < half left)": MEDIAN,
        f"p95 of the first {args.calib_tokens} tokens" if args.normalize_kl else "budget": REFERENCE,
    }
    areas: dict[str, dict[str, Any]] = {}
    if args.survival:
        lines["share alive, at forks"] = SHARE
        areas["its 95 % interval"] = {"facecolor": BAND, "alpha": 0.45}
    if padded:
        areas["ends padded (early too)"] = {"facecolor": PADDED}
    handles = [Line2D([], [], label=label, **look) for label, look in lines.items()]
    return handles + [Patch(label=label, **look) for label, look in areas.items()]


def draw_title(ax: Axes, panel: Panel, page: Page) -> None:
    """The three lines over a panel."""
    on_dead = INK if np.dot(page.dead, (0.3, 0.6, 0.1)) > 0.45 else "white"
    boxes = {"dead": (page.dead, page.dead, on_dead), "back": ("white", page.dead, INK), "over": (INK, INK, "white")}
    for i, (left, badge, right) in enumerate(panel_words(panel)):
        y = 72 * LINE * (2.3 - i)
        look: dict[str, Any] = {"weight": "bold" if badge or i == 0 else "normal"}
        if badge:
            face, edge, ink = boxes[badge]
            look |= {"color": ink, "bbox": {"boxstyle": "square,pad=0.14", "fc": face, "ec": edge, "lw": 0.8}}
        ax.annotate(left, (0, 1), (1.5 * bool(badge), y), "axes fraction", "offset points", **look)
        ax.annotate(right, (1, 1), (0, y), "axes fraction", "offset points", ha="right")


def draw_lines(ax: Axes, panel: Panel, page: Page) -> None:
    """Each rollout as an alive and a dead polyline, in an order that has nothing to do with how it ended.

    Over them the median over the lines that run at a token, dotted where fewer than half of all lines do.
    """
    from matplotlib.collections import LineCollection

    parts, shades = [], []
    for i in np.random.default_rng(0).permutation(panel.n):
        line, death = panel.rollouts[i].line, panel.rollouts[i].fate.death
        cut = len(line) if death is None else death
        for start, stop, shade in ((0, cut + 1 if cut else 0, page.alive), (cut, len(line), page.dead)):
            if start < min(stop, len(line)):  # the two share the vertex of death
                parts.append(thinned(start, line[start:stop]))
                shades.append(shade)
    opacity = page.args.line_alpha or min(0.8, max(0.02, 16 / panel.n))
    style: dict[str, Any] = {"linewidths": page.args.line_lw, "alpha": opacity, "zorder": 2}
    lines = LineCollection(parts, colors=shades, joinstyle="bevel", **style)  # round joins cost a third
    ax.add_collection(lines, autolim=False)
    if len(panel.drawn) >= 3:
        median, count = running_median([r.line for r in panel.drawn])
        few = 2 * count < len(panel.drawn)
        for other, dash in ((few, "-"), (~few, ":")):
            ax.plot(np.where(other, np.nan, median), linestyle=dash, zorder=4, **MEDIAN)


def draw_marks(ax: Axes, panel: Panel, page: Page) -> None:
    """A cross where a rollout died, a tick where it reached EOS; the more of them, the smaller and fainter."""
    ends = [(r.line, len(r.line) - 1) for r in panel.drawn if r.eos]
    deaths = [(r.line, min(r.fate.death, len(r.line) - 1)) for r in panel.drawn if r.fate.death is not None]
    share = min(1.0, math.sqrt(32 / max(1, len(ends) + len(deaths))))
    edges = (ax.transAxes - ax.transData).transform([(0, 0.03), (0, 0.97)])[:, 1]
    for points, mark in ((ends, EOS_MARK), (deaths, death_mark(page.dead))):
        finite = [np.flatnonzero(np.isfinite(line)) for line, _ in points]  # inside a gap, at the nearest value
        y = [line[k[np.abs(k - t).argmin()]] for (line, t), k in zip(points, finite, strict=True)]
        look = mark | {"markersize": mark["markersize"] * max(0.4, share), "alpha": max(0.3, share)}
        ax.plot([t for _, t in points], np.clip(y, *edges), zorder=5, **look)  # one beyond the axis stands at its edge


def draw_reference(ax: Axes, panel: Panel, page: Page) -> None:
    """The dashed line at what the panel's KL is measured against, and what it is worth."""
    levels = [1.0] if page.args.normalize_kl else panel.budgets
    words = f"1 = {digits(panel.budget['scale'], 2)} nats" if page.args.normalize_kl else ""
    off = [digits(level, 3) for level in levels if level > page.top]
    if off:
        words = f"{words or f'budget {several(off, 3)}'}: off-scale ↑"
    for level in levels:
        if level <= page.top:
            ax.axhline(level, zorder=3.5, **REFERENCE)
    y = (ax.transData - ax.transAxes).transform((0, max(levels, default=0)))[1]
    y, side = (y + 0.01, "bottom") if y < 0.86 and not off else (0.98, "top")
    look: dict[str, Any] = {
        "bbox": {"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.75},
        "size": 6,
    }
    ax.text(0.99, y, words, transform=ax.transAxes, ha="right", va=side, zorder=6, **look)


def draw_panel(ax: Axes, panel: Panel, page: Page) -> None:
    """One panel's KL. What a panel shows is added here."""
    from matplotlib.ticker import MaxNLocator

    if page.args.kl_log:
        ax.set_yscale("symlog", linthresh=0.1)
    else:
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_formatter(lambda kl, _: f"{kl:g}")
    ax.set_ylim(page.bottom, page.top)
    draw_title(ax, panel, page)
    if panel.drawn:
        for start, stop in padded_spans(panel, page.args):
            ax.axvspan(start, stop, color=PADDED, linewidth=0, zorder=0.5)
        draw_lines(ax, panel, page)
        draw_marks(ax, panel, page)
        draw_reference(ax, panel, page)
    reason = why_no_line(panel, page.top)
    ax.text(0.5, 0.55, reason, transform=ax.transAxes, ha="center", va="center", size=6.5, style="italic", zorder=6)


def draw_strip(ax: Axes, panel: Panel, page: Page) -> None:
    """Share alive, light colours below and above, with its interval and a dot at each fork.

    Between two forks the interval runs from the next one's lower limit to the previous one's upper limit, as
    death is seen only at forks. Band and numbers at risk as KMunicate asks: Morris et al. (2019), BMJ Open 9:e030215.
    """
    ax.set(ylim=(-0.06, 1.06), yticks=[0, 1])
    curve = panel.survival
    t, s = np.r_[0, curve.forks], np.r_[1, curve.s]
    low, high = np.r_[curve.low, curve.low[-1:]], np.r_[1, curve.high]
    if len(curve.forks):
        for below, above, colour, opacity in (
            (0, s, page.alive, 0.28),
            (s, 1, page.dead, 0.28),
            (low, high, BAND, 0.45),
        ):
            ax.fill_between(t, below, above, step="post", color=colour, alpha=opacity, linewidth=0)
        ax.plot(t, s, drawstyle="steps-post", markevery=slice(1, None), clip_on=False, zorder=3, **SHARE)


def draw_labels(ax: Axes, lowest: Axes, panel: Panel, page: Page, first: bool) -> None:
    """Round tokens under a panel, with how many are at risk there, and left of a row's `first` panel what they are."""
    args, labels = page.args, [str(t) for t in page.ticks]
    if args.survival:
        last = panel.survival.forks.max(initial=-1)
        risk = at_risk(panel.survival.followed, page.ticks)
        labels = [f"{t}\n{k if t <= last else '–'}" for t, k in zip(page.ticks, risk, strict=True)]
    for axes in {ax, lowest}:
        axes.set_xlim(-ROOM * page.longest, (1 + ROOM) * page.longest)
        axes.set_xticks(page.ticks)
        axes.tick_params(labelleft=first, labelbottom=axes is lowest)
        axes.yaxis.set_label_coords((0.17 - LEFT) / page.column, 0.5)
    texts = lowest.set_xticklabels(labels)
    texts[0].set_horizontalalignment("left")  # the outermost lean inwards
    if page.longest - page.ticks[-1] < 0.1 * page.longest:
        texts[-1].set_horizontalalignment("right")
    if first:
        lowest.set_ylabel("alive")
        ax.set_ylabel(f"KL / p95(KL[:{args.calib_tokens}])" if args.normalize_kl else "KL (nats)")
        words = "token\nat risk" if args.survival else "token"
        lowest.annotate(words, (0, 0), (-9, -4.6), "axes fraction", "offset points", ha="right", va="top", size=6.5)
    if first and args.rows:
        place = (72 * (EDGE - LEFT), 72 * LINE * 3.6)
        ax.annotate(f"{args.rows}: {panel.row}", (0, 1), place, "axes fraction", "offset points", weight="bold", size=8)


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """matplotlib as this script wants it, whatever the user's matplotlibrc; as it was on leaving."""
    import matplotlib

    with LOCK, matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)  # type: ignore[arg-type]  # its keys are literals
        yield


def draw(sweep: Sweep, say: Callable[[str], None] = lambda _: None) -> Figure:
    """The figure of a sweep: rows of panels, each with its strip, under a header and a legend; sizes as on paper.

    `say` is told in words how far it is. Raises SweepError where it would be larger than its formats hold.
    """
    with styled():
        page, figure, grid = blank_page(sweep)
        for k, panel in enumerate(sweep.panels):
            say(f"drawing panel {k + 1} of {len(sweep.panels)}")
            i, j = divmod(k, grid.ncols)
            ax = lowest = figure.add_subplot(grid[5 * i + 1, j])
            draw_panel(ax, panel, page)
            if sweep.args.survival:
                lowest = figure.add_subplot(grid[5 * i + 3, j])
                draw_strip(lowest, panel, page)
            draw_labels(ax, lowest, panel, page, first=j == 0)
    return figure


# -------------------------------------------------------------------------------------------- write


def alive_row(panel: Panel) -> dict[str, str]:
    """Is the model still alive? A panel's row of that table, as printed."""
    names = ("n_died", "n_censored", "n_died_last", "n_alive", "n_recovered")
    row = {"n": str(panel.n)} | {name: str(panel.ends[name.removeprefix("n_")]) for name in names}
    forks, s, low, high, _ = panel.survival
    halved = forks[s <= 0.5 + 1e-9]
    ends = {"S_end": s, "S_end_low": low, "S_end_high": high}
    row |= {name: f"{values[-1]:.3f}" if len(forks) else "–" for name, values in ends.items()}
    at, half = (str(where[k]) if len(where) else "–" for where, k in ((forks, -1), (halved, 0)))
    return row | {"S_end_at": at, "median_survival": half}


def budget_row(panel: Panel) -> dict[str, str]:
    """Does the KL stay within the budget? A panel's row of that table, as printed."""
    row = {"budget": ", ".join(f"{budget:.7g}" for budget in panel.budgets) or "–"}
    for name, value in panel.budget.items():
        text = str(value) if isinstance(value, int) else digits(value, 4)
        row[name] = "–" if math.isnan(value) else f"{100 * value:.3g}%" if name == "over_budget" else text
    return row


def threshold_row(panel: Panel, threshold: float) -> dict[str, str]:
    """How many deaths there are, last token included, at the threshold and around it; as printed."""
    lowest = [np.fmin.reduce(r.pmass[r.forks <= len(r.kl)], initial=1.0) for r in panel.rollouts]  # but for NaN
    levels = [round(threshold + step, 10) for step in (-0.1, -0.05, 0, 0.05, 0.1)]
    return {f"{level:g}": str(sum(low < level for low in lowest)) for level in levels if 0 < level <= 1}


def summary_text(sweep: Sweep) -> str:
    """The markdown summary: three pipe tables with a row per panel, their columns explained, and the notes."""
    from tabulate import tabulate

    args = sweep.args

    def pipe(row_of: Callable[[Panel], dict[str, str]]) -> str:
        names = [{args.rows: p.row.replace("|", "\\|")} if args.rows else {} for p in sweep.panels]
        rows = [name | {"alpha": p.label} | row_of(p) for name, p in zip(names, sweep.panels, strict=True)]
        return tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True, stralign="right")

    cells = several(f"`{cell.name}` ({cell.about})" for cell in sweep.cells)
    notes = [f"Cells used: {cells}", *sweep.notes, f"Settings: {sweep.settings()}"]
    return f"""# KL(steered || base) and survival: {sweep.name}

## Is the model still alive?

{pipe(alive_row)}

A rollout is dead from the first fork on at which `{args.metric}` is below {args.threshold:g}.
`n` = `n_died` + `n_died_last` (at the fork after their last token) + `n_censored` (alive at EOS, or where their
record ends) + `n_alive` (at the end of the window). `n_recovered`: of those that died, how many were at or above
the threshold again at a later fork; so many deaths may be noise of the probe. `S_end`: Kaplan-Meier survival at
the last fork measured, token `S_end_at`; `S_end_low` to `S_end_high` is its 95 % beta product confidence interval,
whose evidence is prompts. `median_survival`: first token at which S ≤ 0.5.

## Does the KL stay within the budget?

{pipe(budget_row)}

In nats, of the KL as recorded. `budget`: alpha² · target_kl. `kl_p95`: 95th percentile over all observed tokens of
all rollouts; `kl_p95_head`: over the first {args.calib_tokens} of each. `over_budget`: share of tokens above their
cell's budget; a panel is over where it exceeds 5 %. `died_within`: deaths (last token included) of rollouts whose own
95th percentile is within the budget. `kl_median`: over all tokens. `scale`: median of the rollouts' scales, what 1 on
the normalised axis is worth. `no_scale`: rollouts without one; normalised they have no line, but count elsewhere.

## How much hangs on the threshold?

{pipe(lambda panel: threshold_row(panel, args.threshold))}

Deaths (`n_died` + `n_died_last`) at the threshold and around it.

## Notes

{chr(10).join(f"- {note}" for note in notes)}
"""


def terminal_text(sweep: Sweep) -> str:
    """The first two tables for a terminal of 80 columns: a column per alpha, up to 8 side by side where they fit."""
    from tabulate import tabulate

    blocks = []
    for title, row_of in (("Is the model still alive?", alive_row), ("KL within the budget? (nats)", budget_row)):
        for row in dict.fromkeys(panel.row for panel in sweep.panels):
            held = [{"alpha": p.label} | row_of(p) for p in sweep.panels if p.row == row]
            while held:
                for k in range(8, 0, -1):
                    table = [[name, *(cells[name] for cells in held[:k])] for name in held[0]]
                    text = tabulate(table, tablefmt="plain", disable_numparse=True, stralign="right")
                    if text.index("\n") <= 80:
                        break
                blocks.append(f"{title}{f'  {sweep.args.rows}: {row}' if row else ''}\n{text}")
                held = held[k:]
    return "\n\n".join(blocks)


def rollouts_csv(rollouts: Sequence[Rollout]) -> str:
    """A row per rollout that was read, copies included: what became of it, and where to find its line."""
    rows = []
    for r in rollouts:
        drawn = np.flatnonzero(np.isfinite(r.line))
        peak = int(np.nanargmax(r.line)) if len(drawn) else None  # csv writes None as an empty field
        row: dict[str, Any] = {
            "cell": r.cell.name,
            "prompt": r.prompt,
            "alpha": f"{r.alpha:.12g}",
            "observed_tokens": len(r.kl),
            "end": r.fate.end,
            "eos": int(r.eos),
            "death_token": r.fate.death,
            "recovered": int(r.fate.recovered),
            "kl_p95_nats": r.kl_p95,
            "budget_nats": r.budget,
            "budget_kept": "" if math.isnan(r.budget + r.kl_p95) else "over" if r.kl_p95 > r.budget else "within",
            "scale_nats": r.scale,
            "line_max": math.nan if peak is None else float(r.line[peak]),
            "line_max_token": peak,
            "line_end": float(r.line[drawn[-1]]) if len(drawn) else math.nan,
            "copy_of": r.copy_of,
        }
        floats = {name: "" if math.isnan(v) else f"{v:.6g}" for name, v in row.items() if isinstance(v, float)}
        rows.append(row | floats)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def out_folder(args: Args) -> Path:
    """The folder to write to, by default named as the sweep's was given: as a link, not as its target."""
    root = Path(args.runs_root)
    name = root.name if root.name not in ("", "..") else root.resolve().name
    return Path("figs") / f"{name}_kl_alive" if args.out is None else Path(args.out)


def write_files(out: Path, contents: Mapping[str, bytes]) -> None:
    """Write all files, each beside its target, then rename them onto their targets. Raises OSError."""
    out.mkdir(parents=True, exist_ok=True)
    for name in contents:
        if (out / name).is_dir():
            raise IsADirectoryError(21, f"{name} is a folder")
    for stale in out.glob(".kl_alive_*"):  # of a run that was killed; one that runs needs its own for a moment
        with contextlib.suppress(OSError):
            if time.time() - stale.stat().st_mtime > 60:
                shutil.rmtree(stale)
    with tempfile.TemporaryDirectory(prefix=".kl_alive_", dir=out, ignore_cleanup_errors=True) as parts:
        for name, content in contents.items():
            Path(parts, name).write_bytes(content)
        for name in contents:
            Path(parts, name).replace(out / name)


def write(sweep: Sweep, say: Callable[[str], None] = lambda _: None) -> list[Path]:
    """Draw a sweep, and write its figure, tables and list of rollouts, each whole or not at all. Returns their paths.

    `say` is told in words how far it is. Raises SweepError where they cannot be drawn or written.
    """
    args, settings, made_by = sweep.args, sweep.settings(), f"spaghetti_kl_alive {__version__}"
    metadata: dict[str, Any] = {
        "png": {"Software": made_by, "Description": settings},
        "pdf": {"Creator": made_by, "Subject": settings, "CreationDate": None},
        "svg": {"Creator": made_by, "Description": settings, "Date": None},
    }
    contents = {TABLES: summary_text(sweep).encode(), ROLLOUTS: rollouts_csv(sweep.rollouts).encode()}
    with styled():
        figure = draw(sweep, say)
        for file_format in sorted(set(args.formats)):
            say(f"saving the {file_format}")
            content = io.BytesIO()
            figure.savefig(content, format=file_format, dpi=args.dpi, metadata=metadata[file_format])
            contents[f"{FIGURE}.{file_format}"] = content.getvalue()
    out = out_folder(args)
    try:
        write_files(out, contents)
    except OSError as error:
        raise SweepError(f"{printable(out)}: cannot be written ({error.strerror}); choose --out") from None
    return [out / name for name in contents]


# ------------------------------------------------------------------------------------ the program


def run(argv: Sequence[str]) -> str:
    """Parse, read, log the notes, write; returns what stdout is to hold. Raises SweepError or tyro's SystemExit."""
    from loguru import logger

    if "--version" in argv:
        return f"spaghetti_kl_alive {__version__}"
    try:
        args = tyro.cli(Args, args=argv, description=__doc__, prog="spaghetti_kl_alive")
    except OSError:  # nobody reads its help, or what it says of wrong use
        raise SystemExit(0 if {"-h", "--help"} & {*argv} else 2) from None
    told = time.monotonic()

    def say(how_far: str) -> None:
        nonlocal told
        if time.monotonic() > told + 3:
            logger.info(how_far)
            told = time.monotonic()

    sweep = read(args, say)
    for note in sweep.notes:
        logger.warning(note)
    logger.info(f"{len(sweep.cells)} cells, {len(sweep.rollouts)} rollouts: {several(c.name for c in sweep.cells)}")
    for path in (out_folder(args) / f"{FIGURE}.{old}" for old in FORMATS if old not in args.formats):
        if path.exists():
            logger.warning(f"{printable(path)} is of an earlier run, not of this one (--formats)")
    written = write(sweep, say)
    return f"{terminal_text(sweep)}\n\nwrote {' '.join(map(printable, written))}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run from a shell; returns the exit status. It sets what is the process's own; read, draw, write set nothing."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115  # it was closed
        setattr(sys, name, stream)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not Unicode
    if argv is None:
        gc.disable()  # in a process that ends soon, collections are a tenth of the time
    os.environ["MPLBACKEND"] = "agg"
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "Glyph .* missing from")
    status, error = 0, ""
    try:
        from loguru import logger

        logger.remove()
        logger.add(sys.stderr, format="{level}: {message}")
        text = run(sys.argv[1:] if argv is None else argv)
        with contextlib.suppress(OSError):  # nobody reads stdout, or it is full: the files are written
            print(text)
    except SweepError as wrong:
        status, error = wrong.status, str(wrong)
    except (MemoryError, ImportError) as wrong:
        advice = "use fewer --alphas, fewer cells (--model-contains), a lower --dpi"
        status, error = 1, f"too little memory, or a package is missing: {str(wrong) or 'MemoryError'}\n{advice}"
    except OSError as wrong:
        status, error = 1, f"{wrong.filename or 'the working folder'}: {wrong.strerror}"
    except KeyboardInterrupt:
        status, error = 130, "interrupted"
    except SystemExit as stop:  # tyro's, after --help or wrong use
        status = int(stop.code or 0)
    with contextlib.suppress(OSError):
        print(f"ERROR: {error}\n" if error else "", end="", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # without this, Python complains again as it exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return status


if __name__ == "__main__":
    sys.exit(main())
