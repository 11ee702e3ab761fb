# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "numpy>=1.26", "matplotlib>=3.8", "seaborn>=0.13", "tyro>=0.9.2", "loguru>=0.7", "tabulate>=0.9",
# ]
# ///
"""How much steering does a language model take before it breaks, and what does it cost in KL?

Reads a finished sweep and writes two figures and their numbers, for a shell, a Makefile or a notebook.

  kl_alive_spaghetti.png  one panel per steering strength alpha. Each thin line is one rollout:
                          KL(steered || base) against token, orange once it has died. Below it: the share
                          that never died, and the share at or above the threshold at each token.
  kl_alive_dose.png       the overview: KL and the share that never died, against alpha.
  kl_alive_summary.md     every number with its interval, a caption for the figure, and what was left out.
  kl_alive_rollouts.csv   one row per rollout.

A rollout is one generated text. At a few of its tokens, the fork points, an answer was forced: pmass is the
probability mass on true and false there. A rollout died if its pmass was below --threshold at any fork point.
The budget is target_kl, the KL that c_star was calibrated to reach at alpha = 1.

  python spaghetti_kl_alive.py --runs-root runs/sweep --rows method --formats png pdf
  sweep = read(Args(runs_root="runs/sweep")); figure = draw(sweep); numbers = tables(sweep)   # from Python

Each folder in --runs-root is a cell with calib.json, trajectory.json and pmass.json; names that start with
_ or . are passed over. --version prints the version.
Exit status: 0: all files written; 1: it could not be done; 2: wrong use; 130: interrupted.
"""

from __future__ import annotations

import contextlib
import csv
import gc
import io
import itertools
import json
import math
import os
import re
import stat
import sys
import tempfile
import textwrap
import threading
import time
import uuid
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

AS_PROGRAM = __name__ == "__main__" or Path(sys.argv[0]).stem == "spaghetti-kl-alive"
if AS_PROGRAM:
    os.environ.pop("MPLBACKEND", None)  # a notebook sets it for its shell commands; here nothing is shown
INSTALL = "pip install numpy matplotlib seaborn tyro loguru tabulate"
try:
    import matplotlib
    import numpy as np
    import tyro
    from loguru import logger
    from matplotlib.axes import Axes
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, SymmetricalLogLocator
    from tabulate import tabulate
except ModuleNotFoundError as error:
    if not AS_PROGRAM:
        raise
    sys.exit(f"ERROR: the package {error.name} is missing\n{INSTALL}")

__version__ = "0.5.0"
CALIB_FILE, TRAJECTORY_FILE, PMASS_FILE = CELL_FILES = ("calib.json", "trajectory.json", "pmass.json")
FIGURE_STEM, DOSE_STEM = "kl_alive_spaghetti", "kl_alive_dose"
SUMMARY_FILE, ROLLOUTS_FILE = "kl_alive_summary.md", "kl_alive_rollouts.csv"
FORMATS = {"png", "pdf", "svg"}
MAX_KL = 1e6  # nats; log-probabilities do not reach that far, so KL beyond it is a broken measurement
MAX_ALPHA = 1e6  # no multiple of c_star is larger than this
MAX_TOKENS = 1e9  # no count of tokens is larger than this
NOT_REQUESTED = "not requested (--alphas)"  # why a cell's alpha is left out
logger.disable(__name__)  # as a library it logs nothing; main turns it on


@dataclass(frozen=True)
class Args:
    # the data
    runs_root: Annotated[str | Path, tyro.conf.arg(metavar="PATH")]
    """Folder of the sweep, with one sub-folder per cell. It may also be a cell itself."""
    model_contains: str = ""
    """Use only cells whose folder name or model contains this text. Default: all cells."""
    alphas: Annotated[tuple[str | float, ...], tyro.conf.arg(metavar="[ALPHA ...]")] = ()
    """Steering strengths to draw, multiples of c_star, separated by spaces. Default: every alpha there is."""
    window: int | None = None
    """Draw and count at most this many tokens of each rollout. Default: the window in calib.json."""
    keep_duplicates: bool = False
    """Count exact copies of a rollout, and show rows that only repeat others, instead of leaving them out."""
    skip_bad_cells: bool = False
    """Leave out cells whose files are damaged, with a warning, instead of stopping."""
    # what counts as dead
    threshold: float = 0.8
    """A rollout died if its probability mass was below this value at any fork point, in (0, 1]."""
    metric: str = "pmass_eval"
    """Key in pmass.json that holds the probability mass: "pmass" or "pmass_<name>"."""
    # the KL
    normalize_kl: bool = True
    """Divide each rollout's KL by its own scale. Otherwise KL is drawn in nats."""
    calib_tokens: int = 20
    """How many of a rollout's first tokens make its scale, the 95th percentile of their smoothed KL."""
    roll: int = 65
    """Smooth KL by a centred rolling mean of this many tokens. 1: no smoothing."""
    edges: Literal["pad", "shrink"] = "pad"
    """At the ends, repeat the first and last value (pad), or average only the tokens there are (shrink)."""
    # the drawing
    rows: Literal["method", "model", "seed", "cell"] | None = None
    """Give each method, model, seed or cell its own row of panels. Default: one panel per alpha for all."""
    kl_log: bool = False
    """Draw KL on a logarithmic axis, linear below 0.1."""
    survival: bool = True
    """Draw the share that never died and the numbers at risk under each panel."""
    dose: bool = True
    """Also draw the overview, kl_alive_dose."""
    ncols: int | None = None
    """Panels side by side. Default: up to 6, in balanced lines."""
    line_lw: float = 0.5
    """Width of a rollout's line, in points."""
    line_alpha: float | None = None
    """Opacity of a rollout's line, in (0, 1]. Default: 16 / n, but at least 0.02 and at most 0.8."""
    palette: str | None = None
    """A palette that seaborn knows: its first two colours mean alive and dead. Default: blue and orange."""
    # the output
    out: Annotated[str | Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Folder to write to. Default: figs/<name of runs-root>_kl_alive."""
    formats: tuple[Literal["png", "pdf", "svg"], ...] = ("png",)
    """File formats of the figures, separated by spaces."""
    dpi: int = 160
    """Resolution of the PNG, in pixels per inch."""

    @cached_property
    def requested_alphas(self) -> list[float]:
        """Ascending, each once; NaN for what is no number."""
        return sorted({alpha_of(alpha) for alpha in np.atleast_1d(self.alphas).tolist()})

    def wants(self, alpha: float) -> bool:
        """Whether the alpha is to be drawn; all are, where none is requested."""
        return not self.requested_alphas or alpha in self.requested_alphas

    @property
    def root(self) -> Path:
        """The folder of the sweep, named as it was given: a link by its own name, not by its target's."""
        return Path(os.path.abspath(os.path.expanduser(self.runs_root)))  # resolve follows it

    @property
    def out_folder(self) -> Path:
        default = Path("figs") / f"{self.root.name}_kl_alive"
        return default if self.out is None else Path(os.path.expanduser(self.out))


class SweepError(Exception):
    """The figure cannot be made. The message names the file, the problem and the remedy."""

    exit_status = 1


class UsageError(SweepError):
    """A flag has a value that makes no sense."""

    exit_status = 2


def alpha_of(key: object) -> float:
    """A steering strength to 6 significant digits, as rounding must not make two of it; NaN if no number."""
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", str(key)):
        return math.nan  # float() would take 0_5 for 5
    alpha = float(f"{float(str(key)):.6g}")
    return 0.0 if abs(alpha) < 1e-9 else alpha


def check_args(args: Args) -> None:
    """Raise UsageError where a flag has a value that makes no sense, before any file is read."""
    counts = [count for count in (args.window, args.roll, args.calib_tokens, args.ncols) if count is not None]
    rules = {
        "--threshold must lie in (0, 1]": 0 < args.threshold <= 1,
        "--edges must be pad or shrink": args.edges in ("pad", "shrink"),
        "--rows must be method, model, seed or cell": args.rows in (None, "method", "model", "seed", "cell"),
        "--metric must be pmass or pmass_<name>": args.metric.split("_")[0] == "pmass",
        "--window, --roll, --calib-tokens and --ncols must be at least 1": min(counts) >= 1,
        "--alphas must be plain numbers, as in --alphas 0.5 1 2": np.isfinite(args.requested_alphas).all(),
        "--line-lw, in points, must be above 0": 0 < args.line_lw < math.inf,
        "--line-alpha must lie in (0, 1]": args.line_alpha is None or 0 < args.line_alpha <= 1,
        "--dpi must lie between 20 and 2400": 20 <= args.dpi <= 2400,
        "--formats must be png, pdf or svg": args.formats and {*args.formats} <= FORMATS,
        "--runs-root and --out must not be empty": "" not in (args.runs_root, args.out),
        "--out must name a folder, not a figure": args.out_folder.suffix.lower()[1:] not in FORMATS,
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise UsageError("; ".join(broken))
    palette_colours(args.palette)


# -------------------------------------------------------------------------------------------- the data
Array = np.ndarray
Row = dict[str, Any]  # of a table: column to number
Prompt = tuple[str, int]  # model and index: the same index is another prompt for another model
Record = tuple[Array, int | None, Array]  # of a rollout: KL (L,), length (None in older runs), pmass (F,)


class Estimate(NamedTuple):
    """A number and its 95% interval, each NaN where there is none."""

    x: float = math.nan
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of the sweep: one model, steered by one method, with one seed."""

    folder: Path
    name: str  # of the folder
    model: str
    method: str
    seed: str
    layer: str
    c_star: str
    target_kl: float  # nats; the calibrated budget
    window: int  # tokens

    def facet(self, rows: str | None) -> str:
        """Which row of panels the cell belongs to; "" where all cells are pooled."""
        facets = {"method": self.method, "model": self.model, "seed": self.seed, "cell": self.name}
        return facets[rows] if rows else ""


@dataclass(frozen=True, eq=False, repr=False)  # its repr would fill the screen
class Rollout:
    """One generated text, as far as it was observed: T tokens, to its end, its record's or the window's."""

    cell: Cell
    prompt: Prompt
    alpha: float
    kl: Array  # (T,) nats; NaN: not measured, inf: above MAX_KL
    line: Array  # (T,) float32, what is drawn, NaN in gaps; (0,) if there is no line
    is_padded: Array  # (T,) bool: padding made the line's value
    scale: float  # nats, what 1 on the line is worth; NaN if there is none
    has_one_token_scale: bool  # the first token, which padding repeats, makes more than half of it
    is_smoothed: bool
    alive: Array  # (T,) bool
    forks: Array  # (F,) tokens, ascending: the fork points up to T whose pmass was measured
    pmass: Array  # (F,)
    above: Array  # (F,) bool: pmass was at or above the threshold
    death: int | None  # token of the first fork that was below it
    end: Literal["died", "censored", "alive"]
    recovered: bool  # died, but was at or above the threshold at its last fork
    eos: bool  # it ended by itself before the window did, and its KL was recorded to the end
    kl_p95: float  # nats; 95th percentile of kl
    identity: tuple[Any, ...] | None  # equal for exact copies; None if nothing can be compared
    copy_of: str = ""  # name of the cell that recorded the same rollout first

    @property
    def is_measured(self) -> bool:
        return len(self.forks) > 0

    @property
    def is_cut(self) -> bool:
        """Censored where its record ends, before the text does."""
        return self.end == "censored" and not self.eos


class Survival(NamedTuple):
    """Shares of the measured rollouts at each fork, (k,) each."""

    forks: Array  # tokens
    never_died: Array  # Kaplan-Meier; constant between forks
    low: Array  # its 95% interval
    high: Array
    above_now: Array  # of those measured at the fork: pmass at or above the threshold
    followed_to: Array  # (m,) tokens up to which each measured rollout is in the risk set


@dataclass(frozen=True, eq=False, repr=False)
class Panel:
    """The rollouts of one alpha and, with --rows, of one method, model, seed or cell, and their numbers."""

    facet: str  # which one; "" if all are pooled
    alpha: float
    rollouts: list[Rollout]
    survival: Survival
    fates: Row  # its row in the table "panels", without facet and alpha
    cost: Row  # the same in the table "kl"
    longest: int  # tokens; where the token axis of all panels ends
    top: float  # where the KL axis of all panels ends

    @property
    def n_unmeasured(self) -> int:
        """Rollouts without a measured fork."""
        return sum(not r.is_measured for r in self.rollouts)

    @property
    def differs_at_end(self) -> bool:
        """Whether the share above the threshold at the end is another than the share that never died."""
        return abs(self.fates["above_at_end"] - self.fates["never_died"].x) > 0.01

    @property
    def mostly_recovered(self) -> bool:
        return 2 * self.fates["n_recovered"] > self.fates["n_died"]


@dataclass(frozen=True, eq=False, repr=False)
class Sweep:
    """What was read, ready to be drawn and written."""

    args: Args
    name: str  # of runs_root
    window: int  # tokens
    cells: list[Cell]  # those used
    rollouts: list[Rollout]  # all that were read, copies included
    panels: list[Panel]  # facet by facet, alphas ascending
    notes: list[str]  # what was left out, and what is unusual

    @cached_property
    def facets(self) -> dict[str, list[Panel]]:
        """The panels of each row of panels."""
        facets: dict[str, list[Panel]] = defaultdict(list)
        for panel in self.panels:
            facets[panel.facet].append(panel)
        return facets

    @cached_property
    def arms(self) -> dict[tuple[str, str], list[Panel]]:
        """The steered panels of each facet and sign of alpha, ascending in size; "" if all have one sign."""
        steered = sorted((p for p in self.panels if p.alpha and p.rollouts), key=lambda p: abs(p.alpha))
        has_signs = len({panel.alpha > 0 for panel in steered}) > 1
        arms: dict[tuple[str, str], list[Panel]] = {}
        for facet in self.facets:
            for sign in ("+", "-"):
                arm = [p for p in steered if p.facet == facet and (p.alpha > 0) == (sign == "+")]
                if arm:
                    arms[facet, sign if has_signs else ""] = arm
        return arms

    @property
    def steered_alphas(self) -> list[float]:
        return sorted({panel.alpha for arm in self.arms.values() for panel in arm})

    @cached_property
    def one_token_share(self) -> float:
        """The share of the scales that are made by one token."""
        scaled = [r for panel in self.panels for r in panel.rollouts if r.alpha and not math.isnan(r.scale)]
        return sum(r.has_one_token_scale for r in scaled) / max(1, len(scaled))

    @property
    def settings_text(self) -> str:
        """What gives the same output from the same data: the version, and the flags as they took effect."""
        alphas = tuple(f"{alpha:.6g}" for alpha in self.args.requested_alphas)
        flags = asdict(self.args) | {"window": self.window, "alphas": alphas}
        del flags["runs_root"], flags["out"]
        texts = [f"{name} {setting_text(value)}" for name, value in flags.items()]
        return f"spaghetti_kl_alive {__version__}: {', '.join(texts)}"


# --------------------------------------------------------------------------------------- words for print
def escaped(text: object) -> str:
    """The text, safe in one line of any output: spelled out where it holds control characters."""
    return str(text) if str(text).isprintable() else repr(str(text))


def setting_text(value: Any) -> str:
    """A flag's value, or one from calib.json: "–" where there is none."""
    if isinstance(value, tuple):
        value = " ".join(map(str, value))
    return "–" if value in (None, "") or value != value else escaped(value)


def join_first(things: Iterable[object], at_most: int = 12) -> str:
    """The things in one line; of very many the first ones and a count."""
    texts = [f"{thing:.6g}" if isinstance(thing, float) else str(thing) for thing in things]
    more = [f"and {len(texts) - at_most} more"] if len(texts) > at_most else []
    return ", ".join(texts[:at_most] + more)


def significant(value: float, digits: int) -> str:
    """The number with at most `digits` <= 6 significant digits; "∞" and "–" for inf and NaN."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "∞"
    return f"{float(f'{value:.{digits}g}'):g}"


def natural_order(text: str) -> tuple[list[Any], str]:
    """A sorting key: run2 before run10."""
    parts = re.split(r"([0-9]+(?:\.[0-9]+)?)", text)
    return [float(part) if i % 2 else part for i, part in enumerate(parts)], text


def short_names(names: Iterable[str]) -> dict[str, str]:
    """The last part of each path-like name, or the whole names where two would read alike."""
    short = {}
    for name in names:
        model = re.sub(r".*models--.*?--([^/]+)/snapshots/.*", r"\1", name)  # of a hub's cache
        short[name] = model.rstrip("/").rpartition("/")[2]
    return short if len({*short.values()}) == len(short) else {name: name for name in short}


# ------------------------------------------------------------------------------------ read: one cell
class CellError(Exception):
    """A cell that cannot be used, and why."""


class DamageError(CellError):
    """A cell that cannot be used as one of its files does not hold what a sweep writes."""


def check(holds: Any, damage: str) -> None:
    """Raise DamageError where something in a file is not as it must be."""
    if not holds:
        raise DamageError(damage)


@contextlib.contextmanager
def json_file(path: Path) -> Iterator[dict[str, Any]]:
    """The object in a JSON file. Damage that is found in it, here or in the block, gets the file's name."""
    try:
        yield parse_json(path)
    except (DamageError, OverflowError) as damage:  # no float holds a number of hundreds of digits
        raise DamageError(f"{path.name}: {damage}") from None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which Python alone would keep the last of two equal keys."""
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    check(not twice, f"a key is there twice: {join_first(map(repr, twice), 4)}")
    return dict(pairs)


def parse_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CellError where there is no file, else DamageError."""
    raw = b""
    try:
        check(stat.S_ISREG(path.stat().st_mode), "not a regular file")  # a named pipe would hang
        raw = path.read_bytes()
        content = json.loads(raw, object_pairs_hook=unique_keys)
    except FileNotFoundError:
        raise CellError(f"{path.name} is missing") from None
    except OSError as error:
        raise DamageError(error.strerror) from None
    except UnicodeDecodeError:
        raise DamageError("not JSON but binary; is it compressed?") from None
    except (ValueError, RecursionError) as error:
        if raw.startswith(b"version https://git-lfs"):
            raise DamageError("a Git LFS pointer, not the file itself: run git lfs pull") from None
        found = "not JSON" if raw.strip() else "empty"
        raise DamageError(f"{found}, or cut off ({error}); is the sweep still writing it?") from None
    check(isinstance(content, dict), f"its content is of type {type(content).__name__}, not dict")
    return content


def number_array(values: Any, what: str, highest: float | None = None) -> Array:
    """A JSON list of numbers as float64 (n,), null being NaN, in [0, highest]. Raises DamageError."""
    is_numbers = isinstance(values, list) and {*map(type, values)} <= {float, int, type(None)}
    check(is_numbers, f"{what} is not a list of numbers")
    array = np.array(values, dtype=float)
    if highest is not None:
        is_outside = (array < 0) | (array > highest)
        outside = join_first(array[is_outside].tolist(), 4)
        check(not outside, f"{what} is not in [0, {highest:.4g}]: {outside}")
    return array


def count_array(values: Any, what: str) -> Array:
    """A JSON list of whole numbers >= 0 as int64 (n,). Raises DamageError."""
    array = number_array(values, what, MAX_TOKENS)
    check((array == np.floor(array)).all(), f"{what} must hold only whole numbers >= 0")
    return array.astype(int)


def by_alpha(content: dict[str, Any], key: str) -> dict[float, list[Any]]:
    """The lists under a key, by steering strength. Raises DamageError."""
    lists: dict[float, list[Any]] = {}
    check(isinstance(content.get(key), dict), f"{key!r} is missing, or not a dict")
    for name, values in content[key].items():
        alpha = alpha_of(name)
        is_new = abs(alpha) < MAX_ALPHA and alpha not in lists
        check(is_new, f"{key!r} has the key {name!r}, which is no number, or there twice")
        check(isinstance(values, list), f"{key!r} at alpha {name} is not a list")
        lists[alpha] = values
    return lists


def load_calib(folder: Path, args: Args) -> Cell:
    """The cell of a folder. Raises CellError, also where --model-contains leaves it out."""
    with json_file(folder / CALIB_FILE) as content:
        target_kl: Any = content.get("target_kl")
        window: Any = content.get("window", args.window)
        is_nats = type(target_kl) in (int, float) and 0 < target_kl < MAX_KL
        is_count = type(window) in (int, float) and 1 <= window < MAX_TOKENS and window % 1 == 0
        check(is_nats, f"'target_kl' is {repr(target_kl)[:40]}, not a number of nats above 0")
        check(is_count, f"'window' is {repr(window)[:40]}, not a number of tokens")
        model: Any = content.get("model")
        method: Any = content.get("method")
        check(isinstance(model, str) and isinstance(method, str), "'model' and 'method' must be texts")
        seed, layer, c_star = (setting_text(content.get(key))[:40] for key in ("seed", "layer", "c_star"))
    name = escaped(folder.name)
    if args.model_contains not in name and args.model_contains not in model:
        raise CellError(f"not in its name or model: {args.model_contains!r} (--model-contains)")
    return Cell(
        folder, name, escaped(model), escaped(method), seed, layer, c_star, float(target_kl), int(window)
    )


def load_trajectory(folder: Path, args: Args) -> dict[float, list[Array]]:
    """KL in nats of each rollout (L,), at each requested alpha. Raises CellError."""
    kl: dict[float, list[Array]] = {}
    with json_file(folder / TRAJECTORY_FILE) as content:
        for alpha, rows in by_alpha(content, "per_prompt_per_t_kl").items():
            if args.wants(alpha):
                kl[alpha] = [
                    number_array(row, f"alpha {alpha:.6g}, rollout {i}") for i, row in enumerate(rows)
                ]
    return kl


def load_pmass(folder: Path, args: Args) -> tuple[Array, dict[float, list[Array]], dict[float, Array]]:
    """The fork points (F,), ascending; by alpha, pmass (F,) of each rollout, and the lengths (N,) in tokens.

    There are no lengths in older runs. Raises CellError, also where pmass was not measured.
    """
    metric = args.metric
    lengths_key = "gen_lens_" + (metric.removeprefix("pmass").removeprefix("_") or "qa")
    with json_file(folder / PMASS_FILE) as content:
        if content.get("computed", True) is not True:
            raise CellError(f'pmass was not measured ({PMASS_FILE}: "computed" is not true)')
        empty = [key for key, lists in content.items() if isinstance(lists, dict) and not any(lists.values())]
        if metric not in content or metric in empty:
            others = join_first(key for key in content if key.startswith("pmass") and key not in empty)
            raise CellError(f"{metric} was not measured" + (f"; --metric may be {others}" if others else ""))
        forks = count_array(content.get("fork_points"), "'fork_points'")
        order = np.argsort(forks, kind="stable")
        pmass: dict[float, list[Array]] = defaultdict(list)
        for alpha, rows in by_alpha(content, metric).items():
            for i, row in enumerate(rows):
                what = f"{metric} at alpha {alpha:.6g}, rollout {i},"
                masses = number_array(row, what, 1 + 1e-5)  # single precision sums to 1 only nearly
                check(len(masses) == len(forks), f"{what} has {len(masses)} values, {len(forks)} fork_points")
                pmass[alpha].append(masses[order])
        lengths = by_alpha(content, lengths_key) if content.get(lengths_key) is not None else {}
        gen_lens = {a: count_array(lengths[a], f"{lengths_key} at alpha {a:.6g}") for a in lengths}
    return forks[order], pmass, gen_lens


def load_rollouts(cell: Cell, args: Args) -> tuple[list[Rollout], dict[float, str]]:
    """A cell's rollouts, and why it has none at its other alphas. Raises CellError."""
    forks, pmass, gen_lens = load_pmass(cell.folder, args)
    kl = load_trajectory(cell.folder, args)
    sources: dict[str, Mapping[float, Any]] = {TRAJECTORY_FILE: kl, args.metric: pmass}
    if gen_lens:
        sources["gen_lens"] = gen_lens
    rollouts: list[Rollout] = []
    missing: dict[float, str] = {}
    for alpha in sorted(kl.keys() | pmass.keys()):
        sizes = {source: len(lists.get(alpha, ())) for source, lists in sources.items()}
        if not args.wants(alpha):
            missing[alpha] = NOT_REQUESTED
        elif 0 in sizes.values():
            empty = [source for source, size in sizes.items() if size == 0]
            missing[alpha] = f"no rollouts in {' and '.join(empty)}"
        elif len({*sizes.values()}) > 1:
            counted = ", ".join(f"{size} in {source}" for source, size in sizes.items())
            raise DamageError(f"{PMASS_FILE}: the number of rollouts at alpha {alpha:.6g} differs: {counted}")
        else:
            lengths = gen_lens[alpha].tolist() if gen_lens else [None] * len(kl[alpha])
            for i, record in enumerate(zip(kl[alpha], lengths, pmass[alpha], strict=True)):
                rollouts.append(make_rollout(cell, i, alpha, record, forks, args))
    if not rollouts:
        reasons = "; ".join(dict.fromkeys(missing.values())) or "no rollouts"
        raise CellError(reasons + (f": alpha {join_first(missing)}" if missing else ""))
    return rollouts, missing


def make_rollout(cell: Cell, index: int, alpha: float, record: Record, forks: Array, args: Args) -> Rollout:
    """From what was recorded: KL in nats, the tokens generated, and pmass (F,) at the forks (F,)."""
    kl, length, pmass = record
    if length is None:
        length = int(np.flatnonzero(~np.isnan(kl)).max(initial=-1)) + 1
    kl = kl[:length]  # what stands behind it is padding
    can_compare = np.any(np.isfinite(pmass) if alpha == 0 else np.isfinite(kl) & (kl != 0))
    fingerprint = hash((length, kl.tobytes(), forks.tobytes(), pmass.tobytes()))
    window = args.window or cell.window
    n_tokens = min(len(kl), window)
    is_cut = n_tokens < min(length, window)
    is_short = length < min(window, cell.window)
    is_measured = np.isfinite(pmass) & (forks <= n_tokens)
    forks, pmass = forks[is_measured], pmass[is_measured]
    alive = alive_mask(pmass, forks, args.threshold, n_tokens + 1)  # the last fork may follow the last token
    death = None if alive.all() else int(alive.argmin())
    above = pmass >= args.threshold
    kl = np.where(kl > MAX_KL, np.inf, np.where(kl < -MAX_KL, np.nan, kl))
    line, scale = line_of(kl, alpha, args)
    is_smoothed = args.edges == "shrink" or len(kl) >= args.roll
    half = args.roll // 2 if args.edges == "pad" and is_smoothed else 0
    is_padded = np.ones(len(kl), dtype=bool)
    is_padded[half : len(kl) - half] = False
    observed = kl[:n_tokens]
    return Rollout(
        cell=cell,
        prompt=(cell.model, index),
        alpha=alpha,
        kl=observed,
        line=line[:n_tokens] if np.isfinite(observed).any() else line[:0],
        is_padded=is_padded[:n_tokens],
        scale=scale,
        has_one_token_scale=half > 0 and bool(scale / 2 < (half + 1) / args.roll * kl[0] < math.inf),
        is_smoothed=is_smoothed,
        alive=alive[:n_tokens],
        forks=forks,
        pmass=pmass,
        above=above,
        death=death,
        end="died" if death is not None else "censored" if is_cut or is_short else "alive",
        recovered=death is not None and bool(above[-1]),
        eos=is_short and not is_cut,
        kl_p95=p95(observed),
        identity=(cell.model, alpha, index, fingerprint) if can_compare else None,
    )


def line_of(kl: Array, alpha: float, args: Args) -> tuple[Array, float]:
    """What is drawn of KL (L,) in nats, (L,) or (0,), and the rollout's scale in nats."""
    smoothed = rolling_mean(kl, args.roll, args.edges)
    scale = p95(smoothed[: args.calib_tokens])
    scale = scale if scale > 1e-8 else math.nan  # what is smaller is noise
    if args.normalize_kl and (alpha == 0 or math.isnan(scale)):
        smoothed = smoothed[:0]  # the noise of the control, blown up, would be the wildest of all
    unit = scale if args.normalize_kl else 1.0
    return (smoothed / unit).astype(np.float32), scale


# ----------------------------------------------------------------------------------- read: the sweep
def read(args: Args) -> Sweep:
    """Read a sweep's cells and arrange their rollouts in panels. Raises SweepError, and OSError."""
    check_args(args)
    root = args.root
    if not root.is_dir():
        problem = "is a file; give its folder" if root.exists() else "no such folder"
        raise SweepError(f"{escaped(root)}: {problem}; --runs-root must name the folder of the cells")
    rollouts, left_out = read_cells(root, args)
    rollouts = mark_copies(rollouts)
    repeated = [] if args.keep_duplicates else repeated_facets(rollouts, args)
    shown = [r for r in rollouts if r.cell.facet(args.rows) not in repeated]
    cells = list(dict.fromkeys(r.cell for r in shown))
    if not args.window and len({cell.window for cell in cells}) > 1:
        each = join_first(f"{escaped(cell.folder / CALIB_FILE)}: {cell.window}" for cell in cells)
        raise SweepError(f"the cells have no window in common; choose one with --window\n{each}")
    window = args.window or cells[0].window
    sweep = Sweep(args, escaped(root.name), window, cells, rollouts, make_panels(shown, args), [])
    return replace(sweep, notes=notes_of(sweep, left_out, repeated))


def read_cells(root: Path, args: Args) -> tuple[list[Rollout], dict[str, list[str]]]:
    """The rollouts of all usable cells, and what was left out, by reason. Raises SweepError if none are."""
    rollouts: list[Rollout] = []
    left_out: dict[str, list[str]] = defaultdict(list)
    folders = cell_folders(root)
    last_said = time.monotonic()
    for i, folder in enumerate(folders):
        if time.monotonic() > last_said + 3:
            logger.info(f"read {i} of {len(folders)} cells")
            last_said = time.monotonic()
        name = f"`{escaped(folder.name)}`"
        try:
            of_cell, missing = load_rollouts(load_calib(folder, args), args)
        except CellError as error:
            if isinstance(error, DamageError) and not args.skip_bad_cells:
                advice = "Repair or rerun that cell, or leave it out with --skip-bad-cells."
                raise SweepError(f"{escaped(folder)}{os.sep}{escaped(error)}\n{advice}") from None
            left_out[escaped(error)].append(name)
        else:
            rollouts += of_cell
            for alpha, reason in missing.items():
                of_cell_name = "" if reason == NOT_REQUESTED else f" of {name}"
                left_out[reason].append(f"alpha {alpha:.6g}{of_cell_name}")
    depth = 1 if folders == [root] else 2  # a level below the cells
    deeper = Counter(path.parent.parent for path in sorted(root.glob("[!_.]*/" * depth + CALIB_FILE)))
    for place, count in deeper.items():
        left_out["cells that lie deeper; give that folder as --runs-root"].append(
            f"{count} in {escaped(place)}"
        )
    if not rollouts:
        reasons = [f"{join_first(things)}: {reason}" for reason, things in left_out.items()]
        reasons = reasons or [f"no folder in it holds {', '.join(CELL_FILES)}"]
        raise SweepError(f"{escaped(root)}: nothing to draw, no cell can be used\n{'; '.join(reasons)}")
    return rollouts, left_out


def cell_folders(root: Path) -> list[Path]:
    """`root` if it is a cell, else the folders in it that hold one of a cell's files, or that are closed."""
    if all((root / name).is_file() for name in CELL_FILES):
        return [root]
    visible = [path for path in root.iterdir() if not path.name.startswith(("_", "."))]
    folders = [path for path in visible if not path.is_file()]
    closed = {path for path in folders if not os.access(path, os.R_OK | os.X_OK)}  # or links to nothing
    with_file = {path for path in folders if any(os.path.lexists(path / name) for name in CELL_FILES)}
    cells = closed | with_file
    if len(cells) < len(folders):
        logger.info(f"{len(folders) - len(cells)} folders hold none of {', '.join(CELL_FILES)}: no cells")
    return sorted(cells, key=lambda folder: natural_order(folder.name))


def mark_copies(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The rollouts; those that another cell of the same model recorded before are marked with its name.

    Greedy decoding ignores the seed, and at alpha 0 all methods share the base model's rollouts:
    counted again, they would narrow the intervals for nothing.
    """
    first_seen: dict[Any, str] = {}
    marked = []
    for r in rollouts:
        original = first_seen.setdefault(r.identity, r.cell.name) if r.identity else r.cell.name
        marked.append(r if original == r.cell.name else replace(r, copy_of=original))
    return marked


def repeated_facets(rollouts: Sequence[Rollout], args: Args) -> list[str]:
    """The facets that have steered rollouts, but only exact copies of those of other facets."""
    steered = dict.fromkeys(r.cell.facet(args.rows) for r in rollouts if r.alpha)
    with_originals = {r.cell.facet(args.rows) for r in rollouts if r.alpha and not r.copy_of}
    return [facet for facet in steered if facet not in with_originals]


def make_panels(rollouts: Sequence[Rollout], args: Args) -> list[Panel]:
    """The panels, facet by facet: one for each alpha that was found or requested."""
    names = short_names(r.cell.facet(args.rows) for r in rollouts)
    members: dict[tuple[str, float], dict[Any, Rollout]] = defaultdict(dict)
    for r in rollouts:  # of exact copies in one panel, the first one
        key = id(r) if args.keep_duplicates or not r.identity else r.identity
        members[names[r.cell.facet(args.rows)], r.alpha].setdefault(key, r)
    alphas = sorted({r.alpha for r in rollouts} | {*args.requested_alphas})
    longest = max(20, *(len(r.kl) for r in rollouts))
    top = kl_top([r for panel in members.values() for r in panel.values()], args)
    panels = []
    for facet in sorted(names.values(), key=natural_order):
        for alpha in alphas:
            held = [*members[facet, alpha].values()]
            survival, cost = survival_of(held), cost_of(held)
            panels.append(Panel(facet, alpha, held, survival, fates_of(held, survival), cost, longest, top))
    return panels


def survival_of(rollouts: Sequence[Rollout]) -> Survival:
    """Of the measured rollouts. Its interval counts prompts: rollouts of one are not independent."""
    measured = [r for r in rollouts if r.is_measured]
    none = np.empty(0, dtype=int)
    at = np.concatenate([none, *(r.forks for r in measured)])
    above = np.concatenate([none, *(r.above for r in measured)])
    forks = np.unique(at)
    above_now = np.array([above[at == fork].mean() for fork in forks])
    died = np.array([r.death is not None for r in measured], dtype=bool)
    followed_to = np.array([r.forks[-1] if r.death is None else r.death for r in measured], dtype=int)
    weight = len({r.prompt for r in measured}) / max(1, len(measured))
    return Survival(forks, *kaplan_meier(followed_to, died, forks, weight), above_now, followed_to)


def fates_of(rollouts: Sequence[Rollout], survival: Survival) -> Row:
    """How the rollouts ended: counts and shares, NaN where there is none."""
    ends = Counter(r.end for r in rollouts)
    above_at_end = [r.above[-1] for r in rollouts if r.is_measured]
    at_end = [float(curve[-1]) for curve in (survival.never_died, survival.low, survival.high) if len(curve)]
    return {
        "n": len(rollouts),
        "n_died": ends["died"],
        "n_died_last": sum(r.death is not None and r.death >= len(r.kl) for r in rollouts),
        "n_recovered": sum(r.recovered for r in rollouts),
        "n_censored": ends["censored"],
        "n_alive": ends["alive"],
        "never_died": Estimate(*at_end),
        "above_at_end": float(np.mean(above_at_end)) if above_at_end else math.nan,
    }


def cost_of(rollouts: Sequence[Rollout]) -> Row:
    """KL in nats of all observed tokens, NaN where there is none."""
    kl = np.concatenate([np.empty(0), *(r.kl[~np.isnan(r.kl)] for r in rollouts)])
    scales = [r.scale for r in rollouts if not math.isnan(r.scale)]
    counts: dict[Prompt, Array] = defaultdict(lambda: np.zeros(2))
    for r in rollouts:
        counts[r.prompt] += (r.kl > r.cell.target_kl).sum(), (~np.isnan(r.kl)).sum()
    over, total = np.array([tokens for tokens in counts.values() if tokens[1]]).reshape(-1, 2).T
    return {
        "kl_p95": p95(kl),
        "kl_median": float(np.median(kl)) if len(kl) else math.nan,
        "over_budget": share_of_tokens(over, total),
        "scale": float(np.median(scales)) if scales else math.nan,
        "tokens": float(np.mean([len(r.kl) for r in rollouts])) if rollouts else math.nan,
    }


def kl_top(rollouts: Sequence[Rollout], args: Args) -> float:
    """Where the KL axis ends: 1.4 times the 99th percentile of what is drawn, without the control."""
    steered = [r for r in rollouts if r.alpha] or rollouts
    drawn = np.concatenate([r.line for r in steered])
    drawn = drawn[drawn >= 0]
    top = max(1e-3, 1.4 * float(np.percentile(drawn, 99, overwrite_input=True))) if len(drawn) else 1.1
    if args.kl_log and not args.normalize_kl:
        top = max(top, 1.3 * max(r.alpha**2 * r.cell.target_kl for r in rollouts))
    return top


# ------------------------------------------------------------------------------- notes for the reader
def notes_of(sweep: Sweep, left_out: Mapping[str, Sequence[str]], repeated: Sequence[str]) -> list[str]:
    """What was left out, what is pooled, and what in the data is unusual: one line each, with where it is."""
    args, where = sweep.args, pooled_in(sweep)
    where[f"Rows left out as they only repeat another {args.rows}, see --keep-duplicates"] += repeated
    copies = Counter(r.cell for r in sweep.rollouts if r.copy_of)
    counted = "" if args.keep_duplicates else ", counted once in a panel"
    where[f"Exact copies of rollouts in other cells{counted}"] += [
        f"`{cell.name}`: {n}" for cell, n in copies.items() if cell.facet(args.rows) not in repeated
    ]
    held = {(r.alpha, r.cell.name) for r in sweep.rollouts}
    for alpha in sorted({panel.alpha for panel in sweep.panels}):
        names = [f"`{cell.name}`" for cell in sweep.cells if (alpha, cell.name) not in held]
        lacking = "in no cell" if len(names) == len(sweep.cells) else f"not in {join_first(names, 6)}"
        where["Not every cell holds every alpha"] += [f"alpha {alpha:.6g}: {lacking}"] if names else []
    for panel in sweep.panels:
        of_facet = f"{args.rows} {panel.facet} at " if args.rows else ""
        for what, count in unusual_in(panel, sweep).items():
            where[what] += [f"{of_facet}alpha {panel.alpha:.6g}: {count}"] if count else []
    notes = [f"Left out {join_first(dict.fromkeys(things))}: {reason}" for reason, things in left_out.items()]
    return notes + [f"{what} ({join_first(places, 6)})" for what, places in where.items() if places]


def pooled_in(sweep: Sweep) -> dict[str, list[str]]:
    """Which cells share a panel that a reader may want to see apart."""
    pooled: dict[str, list[str]] = defaultdict(list)
    for kind in ("model", "method"):
        groups = [{getattr(r.cell, kind) for r in panel.rollouts} for panel in sweep.panels]
        if max(map(len, groups)) > 1:
            of_kind = sorted(set().union(*groups), key=natural_order)
            pooled[f"{len(of_kind)} {kind}s pooled, which --rows {kind} separates"] = of_kind
    alike: dict[Any, list[Cell]] = defaultdict(list)
    for cell in dict.fromkeys(r.cell for panel in sweep.panels for r in panel.rollouts):
        alike[cell.facet(sweep.args.rows), cell.model, cell.method, cell.seed].append(cell)
    for cells in alike.values():
        if len(cells) > 1:
            layers = join_first(dict.fromkeys(cell.layer for cell in cells))
            what = f"{len(cells)} cells share model, method and seed (layers {layers}): --rows cell separates"
            pooled[f"{what} them"] += [f"`{cell.name}`" for cell in cells]
    return pooled


def unusual_in(panel: Panel, sweep: Sweep) -> dict[str, int]:
    """How many of a panel's rollouts or tokens are not as they should be, by what is unusual."""
    args, rollouts, fates, is_control = sweep.args, panel.rollouts, panel.fates, panel.alpha == 0
    kl = np.concatenate([np.empty(0), *(r.kl for r in rollouts)])
    over_one_percent = [r for r in rollouts if is_control and r.kl_p95 > 0.01 * r.cell.target_kl]
    one_token = [r for r in rollouts if args.normalize_kl and not is_control and r.has_one_token_scale]
    share = f"{sweep.one_token_share:.0%} of all"
    return {
        "Deaths at alpha 0: the probe fails on the unsteered model": fates["n_died"] * is_control,
        "KL at alpha 0 above 1% of the budget, so alpha 0 is not unsteered": len(over_one_percent),
        "Most of those that died recovered": fates["n_recovered"] * panel.mostly_recovered,
        f"Not smoothed, as shorter than --roll {args.roll}": sum(not r.is_smoothed for r in rollouts),
        "Records that end before EOS, censored there": sum(r.is_cut for r in rollouts),
        f"Scales made mostly by the first token, {share}: see --edges shrink": len(one_token),
        "Rollouts whose pmass was never measured, so not in the shares": panel.n_unmeasured,
        "Tokens whose KL is NaN, so not measured": int(np.isnan(kl).sum()),
        f"Tokens whose KL is above {MAX_KL:g} nats, so not drawn": int(np.isposinf(kl).sum()),
        "Tokens whose KL is negative, so below the axis": int((kl < -1e-3).sum()),
    }


# ----------------------------------------------------------------------------------------- the maths
def alive_mask(pmass: Array, forks: Array, threshold: float, n_tokens: int) -> Array:
    """Whether the model could still answer, at each token, bool (n_tokens,).

    Dead at t if pmass (F,) was below the threshold at any fork (F,) s <= t; NaN is no measurement.
    """
    return np.arange(n_tokens) < forks[pmass < threshold].min(initial=n_tokens)


def rolling_mean(kl: Array, roll: int, edges: Literal["pad", "shrink"]) -> Array:
    """Centred rolling mean of `roll` tokens, (L,) -> (L,), NaN where a window holds nothing finite.

    "pad" repeats the end values roll // 2 times and leaves KL shorter than `roll` as it is; "shrink"
    averages over the tokens that exist. Values that are not finite are left out of the means.
    """
    if len(kl) == 0 or (edges == "pad" and len(kl) < roll):
        return np.where(np.isfinite(kl), kl, np.nan)
    roll = min(roll, 2 * len(kl) + 1)  # a longer window holds no more
    first, last = (kl[0], kl[-1]) if edges == "pad" else (np.nan, np.nan)
    padded = np.concatenate([np.full(roll // 2, first), kl, np.full(roll // 2, last)])
    finite = np.isfinite(padded)
    total = np.convolve(np.where(finite, padded, 0.0), np.ones(roll), mode="valid")[: len(kl)]
    n_finite = np.convolve(finite, np.ones(roll), mode="valid")[: len(kl)]
    return np.divide(total, n_finite, out=np.full(len(kl), np.nan), where=n_finite > 0)


def p95(kl: Array) -> float:
    """numpy's linear 95th percentile, NaN left out; NaN if nothing remains, inf where it is above MAX_KL."""
    values = np.minimum(kl[~np.isnan(kl)], 1e300)  # inf would make it NaN
    if len(values) == 0:
        return math.nan
    place = 0.95 * (len(values) - 1)
    below, above = math.floor(place), math.ceil(place)
    values.partition((below, above))  # np.percentile takes ten times as long on a short line
    result = float(values[below] + (place - below) * (values[above] - values[below]))
    return math.inf if result > MAX_KL else result


def share_of_tokens(over: Array, total: Array) -> Estimate:
    """A share of tokens and its 95% interval, from counts (m,) by prompt.

    Tokens of one prompt are not independent, so the evidence is prompts: delete-one jackknife of the log
    odds with Student's t (Efron, Tibshirani 1993, An Introduction to the Bootstrap, ch. 11). No interval
    for m < 3, where a share is 0 or 1, or where all shares without one prompt are equal.
    """
    m = len(over)
    share = float(over.sum() / total.sum()) if m else math.nan
    without_one = (over.sum() - over) / (total.sum() - total) if m >= 3 else np.zeros(1)
    if without_one.min() <= 0 or without_one.max() >= 1 or np.ptp(without_one) < 1e-12:
        return Estimate(share)
    middle, *each = (math.log(part / (1 - part)) for part in (share, *without_one))
    b = beta_quantile(0.95, 0.5, (m - 1) / 2)  # of t² / (m - 1 + t²) where t is Student's
    half = math.sqrt((m - 1) * b / (1 - b)) * math.sqrt((m - 1) * np.var(each))
    low, high = (1 / (1 + math.exp(min(700, -limit))) for limit in (middle - half, middle + half))
    return Estimate(share, low, high)


def kaplan_meier(followed_to: Array, died: Array, forks: Array, weight: float) -> tuple[Array, Array, Array]:
    """The share that never died, at the forks (k,), and its pointwise 95% interval.

    followed_to (m,) in tokens, died bool (m,); one that is censored at a token is still at risk there.
    `weight` is how much of an independent observation each one is: it widens the interval, not the share.
    The interval is the beta product confidence procedure, by two moments: Fay, Brittain, Proschan (2013),
    Biostatistics 14:723. It is defined everywhere, and without censoring it is Clopper and Pearson's.
    """
    n_at_risk = (followed_to[:, None] >= forks).sum(axis=0)
    deaths = (followed_to[died][:, None] == forks).sum(axis=0)
    share = np.cumprod(1 - deaths / np.maximum(n_at_risk, 1))
    low, high = np.zeros(len(forks)), np.ones(len(forks))
    mean = square = 1.0  # moments of the product of one Beta(stay + 1, deaths) per fork
    for k, (risk, stay) in enumerate(zip(weight * n_at_risk, weight * (n_at_risk - deaths), strict=True)):
        mean *= (stay + 1) / (risk + 1)
        square *= (stay + 1) * (stay + 2) / ((risk + 1) * (risk + 2))
        # the lower limit: times one more Beta(stay, 1)
        low[k] = quantile_by_moments(0.025, mean * stay / (stay + 1), square * stay / (stay + 2))
        high[k] = quantile_by_moments(0.975, mean, square)
    return share, low, high


def quantile_by_moments(q: float, mean: float, square: float) -> float:
    """The q-quantile of the beta distribution of these moments; a mean of 0 or 1 is that point itself."""
    variance = square - mean * mean
    if variance <= 1e-15 or mean <= 0:
        return mean
    size = mean * (1 - mean) / variance - 1
    return beta_quantile(q, mean * size, (1 - mean) * size)


@lru_cache(maxsize=4096)
def beta_quantile(q: float, a: float, b: float) -> float:
    """The q-quantile of Beta(a, b), to 1e-4, by summing its density over a grid in log odds."""
    grid = math.log(a / b) + math.sqrt(1 / a + 1 / b) * np.linspace(-20, 20, 4001)
    log_density = a * grid - (a + b) * np.logaddexp(0, grid)
    density = np.exp(log_density - log_density.max())
    running = np.cumsum(density) - density / 2  # the trapezoid rule
    return float(1 / (1 + np.exp(-np.interp(q * density.sum(), running, grid))))


def median_line(rollouts: Sequence[Rollout]) -> tuple[Array, Array]:
    """Median of the lines left at each token, (longest,), and how many have a value that is not padding's."""
    lines = np.full((len(rollouts), max(len(r.line) for r in rollouts)), np.nan, dtype=np.float32)
    n_unpadded = np.zeros(lines.shape[1], dtype=int)
    for line, r in zip(lines, rollouts, strict=True):
        line[: len(r.line)] = r.line
        n_unpadded[: len(r.line)] += np.isfinite(r.line) & ~r.is_padded
    lines.sort(axis=0)  # NaN goes last
    n_lines = np.isfinite(lines).sum(axis=0)
    tokens = np.arange(len(n_lines))
    return (lines[(n_lines - 1) // 2, tokens] + lines[n_lines // 2, tokens]) / 2, n_unpadded


def first_deaths(arm: Sequence[Panel]) -> dict[Prompt, tuple[float, list[int]]]:
    """Of each prompt that was measured in all panels of the arm: two things.

    The size of alpha at which one of its rollouts first died (inf: none did), and how many were measured.
    """
    counts = [Counter(r.prompt for r in panel.rollouts if r.is_measured) for panel in arm]
    first: dict[Prompt, float] = {}
    for panel in arm:
        for r in panel.rollouts:
            if r.death is not None:
                first.setdefault(r.prompt, abs(panel.alpha))
    in_all = set.intersection(*map(set, counts)) if counts else set()
    return {prompt: (first.get(prompt, math.inf), [count[prompt] for count in counts]) for prompt in in_all}


# ----------------------------------------------------------------------- draw: colours, styles, lengths
ALIVE_COLOUR, DEAD_COLOUR, INK = "#0067A5", "#E8890C", "#111111"
QUIET_COLOUR, UNMEASURED_COLOUR, INTERVAL_COLOUR = "#5C6370", "#8A8F98", "#6B7178"
FAINT = 0.3  # of a line's opacity, where padding made its value
RECOVERED_OPACITY, INTERVAL_OPACITY = 0.16, 0.32  # of areas in the strip
FACET_COLOURS = ("#111111", "#7B2D8E", "#45B08C", "#C2185B", "#6B4A2B", "#9A9A00", "#B0B0B0")
FACET_MARKERS = "os^vDP"
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelpad": 2,
    "text.parse_math": False,  # names may hold a $
    "pdf.fonttype": 42,
    "svg.hashsalt": "spaghetti_kl_alive",  # the same input gives the same bytes
    "lines.markeredgewidth": 0.5,
}
TICK_STYLE = {"labelsize": 6.5, "major.size": 2.5, "major.width": 0.6, "major.pad": 2}
STYLE |= {f"{axis}tick.{key}": size for axis in "xy" for key, size in TICK_STYLE.items()}
LEGEND_STYLE: dict[str, Any] = {"loc": "upper left", "frameon": False, "borderaxespad": 0, "borderpad": 0}
LEGEND_STYLE |= {"labelspacing": 0.35, "columnspacing": 1.2, "handlelength": 1.8, "handletextpad": 0.5}
BOLD_STYLE: dict[str, Any] = {"size": 7.6, "weight": "bold", "color": INK}
QUIET_STYLE: dict[str, Any] = {"size": 6.2, "color": QUIET_COLOUR}
TARGET_STYLE: dict[str, Any] = {"color": INK, "linewidth": 0.8, "linestyle": (0, (4, 2))}
SCALE_STYLE = TARGET_STYLE | {"color": QUIET_COLOUR, "linestyle": (0, (2, 2))}
EOS_STYLE: dict[str, Any] = {"marker": "|", "color": INK, "markersize": 5, "markeredgewidth": 0.8}
DEATH_STYLE: dict[str, Any] = {"marker": "x", "color": "#744506", "markersize": 3.4, "markeredgewidth": 0.9}
MEDIAN_STYLE: dict[str, Any] = {"color": INK, "linewidth": 1.1}
SHARE_STYLE: dict[str, Any] = {"color": INK, "linewidth": 0.9, "drawstyle": "steps-post"}
OPEN_STYLE: dict[str, Any] = {"linestyle": ":", "linewidth": 0.8, "markerfacecolor": "white"}
NOW_STYLE = OPEN_STYLE | {"color": INK, "marker": "o", "markersize": 2.4, "drawstyle": "steps-post"}
END_STYLE = OPEN_STYLE | {"color": QUIET_COLOUR, "marker": "o", "markersize": 4}
FACET_STYLE: dict[str, Any] = {"linewidth": 1.1, "markersize": 4, "markeredgecolor": "white"}
OFFSET: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
MAX_VERTICES, MANY = 640, 250  # of a line, two a pixel of a panel in a row of six; of many lines half
MAX_ABREAST = 6  # panels side by side
# lengths in inches on paper
COLUMN_WIDTH, PAGE_WIDTH, PAGE_MARGIN, LEFT_MARGIN, COLUMN_GAP = 3.3, 6.8, 0.06, 0.53, 0.11
TEXT_LINE = 0.145  # height of a line
LETTER, LEGEND_LETTER, BOLD_LETTER = 0.047, 0.055, 0.066  # mean widths of a letter
KL_HEIGHT, STRIP_GAP, STRIP_HEIGHT, TICKS_HEIGHT, LINE_GAP, DOSE_HEIGHT = 1.25, 0.07, 0.4, 0.2, 0.06, 1.75
STYLE_LOCK = threading.RLock()  # matplotlib's rcParams belong to the process: one figure at a time


@contextlib.contextmanager
def own_style() -> Iterator[None]:
    """Use this script's rcParams, whatever the user's matplotlibrc, and restore them on exit."""
    with STYLE_LOCK:
        if matplotlib.rcParams["svg.hashsalt"] == STYLE["svg.hashsalt"]:  # entered already
            yield
            return
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(STYLE)  # type: ignore[arg-type]  # its keys are literals
            yield


class SelfShowingFigure(Figure):
    """A figure that a notebook shows as the last value of a cell."""

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        with own_style():
            self.savefig(content, format="png")
        return content.getvalue()


@lru_cache
def palette_colours(palette: str | None) -> list[tuple[float, float, float]]:
    """The colours of alive and dead, RGB in [0, 1]. Raises UsageError for a palette seaborn does not know."""
    if palette is None:
        return [to_rgb(ALIVE_COLOUR), to_rgb(DEAD_COLOUR)]
    try:
        with warnings.catch_warnings():  # what seaborn imports sets filters of its own
            import seaborn
        return [to_rgb(colour) for colour in seaborn.color_palette(palette, 2)]
    except ImportError as error:
        raise SweepError(f"seaborn cannot be imported: {error}\n{INSTALL}") from None
    except Exception:  # a palette's name is a small language of its own, and its errors are of many kinds
        raise UsageError(f"--palette {palette!r} is not a seaborn palette; try deep, muted or Set2") from None


# --------------------------------------------------------------------------------- draw: words on a page
def panel_words(panel: Panel) -> list[tuple[str, str]]:
    """The words over a panel: strength and deaths; size, and what else became of the rollouts."""
    n, n_unmeasured = panel.fates["n"], panel.n_unmeasured
    is_measured = n_unmeasured < n or n == 0
    counts = {
        "not measured": n_unmeasured * is_measured,
        "recovered": panel.fates["n_recovered"],
        "EOS": sum(r.eos for r in panel.rollouts),
        "cut": sum(r.is_cut for r in panel.rollouts),
    }
    fate = next((f"{count} {what}" for what, count in counts.items() if count), "")
    died = f"{panel.fates['n_died']} died" if is_measured else "not measured"
    return [(f"α = {panel.alpha:.6g}", died), (f"n = {n}", fate)]


def empty_reason(panel: Panel) -> str:
    """In words, why a panel shows no line; "" if it shows one."""
    if any(len(r.line) for r in panel.rollouts):
        return ""
    if not panel.rollouts:
        return "no rollouts"
    if not any(np.isfinite(r.kl).any() for r in panel.rollouts):
        return "KL not measured"
    if panel.alpha == 0:
        largest = max(np.nanmax(r.kl, initial=0.0) for r in panel.rollouts)
        return f"unsteered:\nKL at most\n{significant(largest, 2)} nats"
    return "no scale"


def subject(sweep: Sweep) -> str:
    return join_first(short_names(cell.model for cell in sweep.cells).values(), 2)


def smoothing_words(sweep: Sweep) -> str:
    args, smallest_n = sweep.args, min(panel.fates["n"] for panel in sweep.panels)
    faint = ", faint where padded" if args.edges == "pad" and smallest_n <= MANY else ""
    return f"mean of {args.roll} tokens{faint}" if args.roll > 1 else "not smoothed"


def page_words(sweep: Sweep) -> tuple[str, str]:
    """The title, and a quiet line with what holds for all panels."""
    args = sweep.args
    change = "orange" if args.palette is None else "recoloured"
    once = f"{change} once {args.metric} fell below {args.threshold:g}"
    quiet = [f"{args.metric}: probability of true or false", smoothing_words(sweep)]
    if args.rows not in ("method", "cell"):
        methods = join_first(short_names(cell.method for cell in sweep.cells).values(), 4)
        is_pooled = any(len({r.cell.method for r in panel.rollouts}) > 1 for panel in sweep.panels)
        quiet.insert(0, f"pooled: {methods}" if is_pooled else methods)
    if any(panel.mostly_recovered for panel in sweep.panels):
        quiet.append("hollow box: most that died recovered")
    return f"{subject(sweep)}: KL(steered || base) per token, {once}", "; ".join(quiet)


def target_label(sweep: Sweep) -> str:
    return f"α² · {join_first(sorted({cell.target_kl for cell in sweep.cells}), 3)} nat"


def legend_handles(sweep: Sweep) -> dict[str, Any]:
    """What the legend shows, by its words: the marks that occur."""
    args = sweep.args
    panels = [[r for r in panel.rollouts if len(r.line)] for panel in sweep.panels]
    drawn = [r for panel in panels for r in panel]
    alive_colour, dead_colour = palette_colours(args.palette)
    cross = DEATH_STYLE | {"color": dead_colour, "markeredgecolor": DEATH_STYLE["color"], "linewidth": 1.8}
    at_least = f"≥ {args.threshold:g}"
    handles: dict[str, Any] = {}
    if any(r.is_measured and r.death != 0 for r in drawn):
        handles[f"alive: {at_least} so far"] = Line2D([], [], color=alive_colour, linewidth=1.8)
    if any(r.death is not None for r in drawn):
        handles[f"died (×): fell below {args.threshold:g}"] = Line2D([], [], **cross)
    if any(r.eos for r in drawn):
        handles["ended by itself (EOS)"] = Line2D([], [], linestyle="none", **EOS_STYLE)
    if max(map(len, panels)) >= 3:
        handles["median (dotted: few or faint lines)"] = Line2D([], [], **MEDIAN_STYLE)
    if args.normalize_kl and drawn:
        one = f"1 = p95 of a line's first {args.calib_tokens} tokens"
        one += " (mostly the first)" if sweep.one_token_share > 0.5 else ""
        handles[one] = Line2D([], [], **SCALE_STYLE)
    if not args.normalize_kl and any(r.alpha for r in drawn):
        handles[f"target: {target_label(sweep)}"] = Line2D([], [], **TARGET_STYLE)
    if args.survival and any(len(panel.survival.forks) for panel in sweep.panels):
        interval = Patch(facecolor=INTERVAL_COLOUR, alpha=INTERVAL_OPACITY)
        handles["share that never died (95% interval)"] = (interval, Line2D([], [], **SHARE_STYLE))
        recovered = Patch(facecolor=dead_colour, alpha=RECOVERED_OPACITY)
        handles[f"share {at_least} at that token"] = (recovered, Line2D([], [], **NOW_STYLE))
    return handles


# ------------------------------------------------------------------------------------- draw: the page
def new_page(width: float, body: float, title: str, subtitle: str, handles: dict, args: Args) -> Figure:
    """A figure with a title, a quiet line and a legend above `body` inches of room. Lengths in inches."""
    room = width - 2 * PAGE_MARGIN
    lines = [(line, 1.25, BOLD_STYLE) for line in textwrap.wrap(title, int(room / BOLD_LETTER))]
    lines += [(line, 1.0, QUIET_STYLE) for line in textwrap.wrap(subtitle, int(room / LETTER))]
    n_columns = legend_columns([*handles], room)
    n_lines = sum(spacing for _, spacing, _ in lines) - (-len(handles) // n_columns)
    height = body + TEXT_LINE * n_lines + 2 * PAGE_MARGIN
    largest = max(width, height)
    if largest > 200 or largest * args.dpi >= 2**16 or width * height * args.dpi**2 > 4e8:
        size = f"{width * args.dpi:.0f} x {height * args.dpi:.0f} pixels, {width:.0f} x {height:.0f} inches"
        raise SweepError(f"the figure would be {size}\nUse fewer --alphas, fewer cells or a lower --dpi.")
    figure = SelfShowingFigure(figsize=(width, height), dpi=args.dpi)
    y = height - PAGE_MARGIN
    for line, spacing, style in lines:
        y -= spacing * TEXT_LINE
        figure.text(PAGE_MARGIN / width, (y + 0.03) / height, line, **style)
    corner = (PAGE_MARGIN / width, (y - 0.05) / height)
    figure.legend([*handles.values()], [*handles], bbox_to_anchor=corner, ncols=n_columns, **LEGEND_STYLE)
    return figure


def legend_columns(labels: Sequence[str], room: float) -> int:
    """As many columns as the labels have room for, in inches; matplotlib fills them one after the other."""
    for n_columns in range(len(labels), 1, -1):
        columns = np.array_split(np.array(labels), n_columns)
        if sum(0.35 + LEGEND_LETTER * max(map(len, column)) for column in columns) <= room:
            return n_columns
    return 1


def axes_at(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """New axes, in inches from the lower left corner of the page."""
    page_width, page_height = figure.get_size_inches()
    return figure.add_axes(
        (left / page_width, bottom / page_height, width / page_width, height / page_height)
    )


def lines_of_panels(sweep: Sweep) -> list[tuple[str, list[Panel]]]:
    """The panels, line by line of the page; over the first line of a facet stands its name."""
    lines = []
    for facet, panels in sweep.facets.items():
        n_lines = -(-len(panels) // MAX_ABREAST)
        n_columns = sweep.args.ncols or -(-len(panels) // n_lines)
        title = f"seed {facet}" if sweep.args.rows == "seed" else facet
        for start in range(0, len(panels), n_columns):
            lines.append(("" if start else title, panels[start : start + n_columns]))
    return lines


def panel_width(sweep: Sweep, n_columns: int) -> float:
    """In inches: a share of a column's or a page's width on paper, or more where its words want it."""
    paper, n_abreast = (COLUMN_WIDTH, n_columns) if n_columns <= 2 else (PAGE_WIDTH, max(4, n_columns))
    width = (paper - LEFT_MARGIN - PAGE_MARGIN + COLUMN_GAP) / n_abreast - COLUMN_GAP
    for panel in sweep.panels:
        first, second = panel_words(panel)
        width = max(width, BOLD_LETTER * len(" ".join(first)), LETTER * len("  ".join(second)))
    return width


def draw(sweep: Sweep) -> Figure:
    """The figure of a sweep, as large as on paper. Raises SweepError where no file could hold it."""
    args, lines = sweep.args, lines_of_panels(sweep)
    n_columns = max(len(panels) for _, panels in lines)
    width = panel_width(sweep, n_columns)
    page_width = LEFT_MARGIN + n_columns * (width + COLUMN_GAP) - COLUMN_GAP + PAGE_MARGIN
    kl_height = KL_HEIGHT * {1: 2.1, 2: 1.4}.get(n_columns, 1)
    strip_height = STRIP_HEIGHT + STRIP_GAP if args.survival else 0
    ticks_height = TICKS_HEIGHT + TEXT_LINE * args.survival
    line_height = LINE_GAP + 2.3 * TEXT_LINE + kl_height + strip_height + ticks_height
    titles = [textwrap.fill(title, int((page_width - 2 * PAGE_MARGIN) / BOLD_LETTER)) for title, _ in lines]
    heights = [line_height + 1.25 * TEXT_LINE * len(title.splitlines()) for title in titles]
    with own_style():
        figure = new_page(page_width, sum(heights), *page_words(sweep), legend_handles(sweep), args)
        bottom = PAGE_MARGIN + sum(heights) + ticks_height
        for title, height, (_, panels) in zip(titles, heights, lines, strict=True):
            bottom -= height
            for column, panel in enumerate(panels):
                left = LEFT_MARGIN + column * (width + COLUMN_GAP)
                ax = lowest = axes_at(figure, left, bottom + strip_height, width, kl_height)
                draw_panel(ax, panel, args)
                if args.survival:
                    lowest = axes_at(figure, left, bottom, width, STRIP_HEIGHT)
                    draw_strip(lowest, panel, args)
                label_outside(ax, lowest, title, column == 0, page_width)
    return figure


def label_outside(ax: Axes, lowest: Axes, title: str, is_first: bool, page_width: float) -> None:
    """Label only the first panel of a line; `lowest` are the axes of its strip, or its own."""
    left = PAGE_MARGIN - LEFT_MARGIN
    for axes in (ax, lowest):
        axes.set_xlabel("")
        axes.tick_params(labelbottom=axes is lowest, labelleft=is_first)
        axes.yaxis.set_label_coords(left / (axes.get_position().width * page_width), 0.5)
        axes.yaxis.label.set(verticalalignment="top", visible=is_first)
    if is_first:
        words = "token" if ax is lowest else "token\nat risk"
        lowest.annotate(words, (0, 0), (-9, -4.6), ha="right", va="top", size=6.5, **OFFSET)
        ax.annotate(title, (0, 1), (72 * left, 72 * 2.6 * TEXT_LINE), va="bottom", **OFFSET, **BOLD_STYLE)


# ---------------------------------------------------------------------------------- draw: one panel
def drawing_order(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The rollouts, each fate spread evenly, so that overlapping lines show the true share of each colour."""
    fates: dict[str, list[Rollout]] = defaultdict(list)
    for r in rollouts:
        fates[r.end].append(r)
    places = [((i + 0.5) / len(fate), r) for fate in fates.values() for i, r in enumerate(fate)]
    return [r for _, r in sorted(places, key=lambda place: place[0])]


def decimated(first: int, line: Array, n_vertices: int) -> Array:
    """Vertices (k, 2) of a stretch of line that starts at token `first`, with k about n_vertices at most.

    Of each block of neighbouring tokens the least and the greatest stay: at a block per pixel the same ink.
    A line with gaps stays as it is.
    """
    width = -(-2 * len(line) // n_vertices)
    keep = np.ones(len(line), dtype=bool)
    if width > 2 and np.isfinite(line).all():
        blocks = line[: len(line) // width * width].reshape(-1, width)
        start = np.arange(0, blocks.size, width)
        keep[1 : blocks.size] = False
        keep[start + blocks.argmin(axis=1)] = keep[start + blocks.argmax(axis=1)] = keep[-1] = True
    token = np.flatnonzero(keep)
    return np.stack([token + float(first), line[token]], axis=1)


def set_token_axis(ax: Axes, panel: Panel, at_risk: bool = False) -> None:
    """The token axis that all panels share, with room for marks at both ends, and the numbers at risk."""
    n_ticks = 3 if panel.longest < 1000 else 2  # as many as have room in the narrowest panel
    ticks = MaxNLocator(n_ticks, steps=[1, 2, 2.5, 5, 10], integer=True).tick_values(0, panel.longest)
    tokens = [int(tick) for tick in ticks if tick <= panel.longest]
    labels = [str(token) for token in tokens]
    if at_risk:
        last, followed_to = panel.survival.forks.max(initial=-1), panel.survival.followed_to
        n_at_risk = [(followed_to >= token).sum() if token <= last else "–" for token in tokens]
        labels = [f"{token}\n{n}" for token, n in zip(tokens, n_at_risk, strict=True)]
    ax.set(xlim=(-0.04 * panel.longest, 1.04 * panel.longest), xlabel="token")
    ax.set_xticks(tokens, labels)
    if tokens[-1] > 0.9 * panel.longest:  # it leans inwards
        ax.get_xticklabels()[-1].set_horizontalalignment("right")


def set_kl_axis(ax: Axes, panel: Panel, args: Args) -> None:
    """The KL axis that all panels share."""
    is_log = args.kl_log and panel.top > 0.1  # below that it is linear anyway
    ax.set_ylabel(f"KL / own first {args.calib_tokens}" if args.normalize_kl else "KL (nats)")
    if is_log:
        ax.set_yscale("symlog", linthresh=0.1)
        subs = (1, 2, 5) if panel.top < 1 else (1, 3) if panel.top < 10 else (1,)
        ax.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=0.1, subs=subs))
    else:
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_ylim(-0.03 * (0.1 if is_log else panel.top), panel.top)


def draw_words(ax: Axes, panel: Panel, args: Args) -> None:
    """The words over a panel. Deaths are a badge, hollow where more than half of the dead recovered."""
    _, dead_colour = palette_colours(args.palette)
    (alpha, died), (n, fate) = panel_words(panel)
    badge: dict[str, Any] = QUIET_STYLE
    if panel.fates["n_died"]:
        face = "white" if panel.mostly_recovered else dead_colour
        on_face = INK if np.dot(to_rgb(face), (0.3, 0.6, 0.1)) > 0.45 else "white"
        box = {"boxstyle": "square,pad=0.2", "facecolor": face, "edgecolor": dead_colour, "linewidth": 1}
        badge = BOLD_STYLE | {"color": on_face, "bbox": box}
    first, second = 72 * 1.4 * TEXT_LINE, 72 * 0.4 * TEXT_LINE
    ax.annotate(alpha, (0, 1), (0, first), **OFFSET, **BOLD_STYLE)
    ax.annotate(died, (1, 1), (-1.8 * bool(panel.fates["n_died"]), first), ha="right", **OFFSET, **badge)
    ax.annotate(n, (0, 1), (0, second), **OFFSET, **QUIET_STYLE)
    ax.annotate(fate, (1, 1), (0, second), ha="right", **OFFSET, **QUIET_STYLE)


def draw_lines(ax: Axes, rollouts: Sequence[Rollout], args: Args) -> None:
    """Each rollout in stretches of one look: alive, dead or not measured, and faint where padding made it."""
    alive_colour, dead_colour = palette_colours(args.palette)
    opacity = args.line_alpha or min(0.8, max(0.02, 16 / len(rollouts)))
    is_crowded = len(rollouts) > MANY  # there nobody can see what is faint
    n_vertices = MAX_VERTICES // 2 if is_crowded else MAX_VERTICES
    polylines, colours = [], []
    for r in rollouts:
        is_faint = r.is_padded & (not is_crowded)
        changes = np.flatnonzero(np.diff(2 * r.alive + is_faint)) + 1
        for start, stop in itertools.pairwise([0, *changes.tolist(), len(r.line)]):
            colour = alive_colour if r.alive[start] else dead_colour
            colour = colour if r.is_measured else to_rgb(UNMEASURED_COLOUR)
            stretch = r.line[start : stop + 1]  # neighbours share a vertex
            if len(stretch) > 1:
                polylines.append(decimated(start, stretch, n_vertices))
                colours.append((*colour, opacity * (FAINT if is_faint[start] else 1)))
    collection = LineCollection(polylines, colors=np.array(colours), linewidths=args.line_lw, zorder=2)
    collection.set_joinstyle("bevel")  # round ones take a third longer
    ax.add_collection(collection, autolim=False)


def draw_median(ax: Axes, rollouts: Sequence[Rollout]) -> None:
    """The median of the lines left, dotted where fewer than half of all have a value without padding."""
    if len(rollouts) >= 3:
        median, n_unpadded = median_line(rollouts)
        few = 2 * n_unpadded < len(rollouts)
        ax.plot(np.where(few, np.nan, median), zorder=4, **MEDIAN_STYLE)
        ax.plot(np.where(few, median, np.nan), linestyle=":", zorder=4, **MEDIAN_STYLE)


def draw_marks(ax: Axes, rollouts: Sequence[Rollout]) -> None:
    """A cross where a rollout died, a tick where it reached EOS; the more, the smaller and fainter."""
    eos = [(r.line, len(r.line) - 1) for r in rollouts if r.eos]
    deaths = [(r.line, min(r.death, len(r.line) - 1)) for r in rollouts if r.death is not None]
    shrink = min(1.0, math.sqrt(32 / max(1, len(eos) + len(deaths))))
    lowest, highest = (ax.transAxes - ax.transData).transform([(0, 0.03), (0, 0.97)])[:, 1]
    for marks, style in ((eos, EOS_STYLE), (deaths, DEATH_STYLE)):
        heights = []
        for line, token in marks:
            finite = np.flatnonzero(np.isfinite(line))  # in a gap, the nearest value
            heights.append(line[finite[np.abs(finite - token).argmin()]])
        look = style | {"markersize": style["markersize"] * max(0.4, shrink), "alpha": max(0.3, shrink)}
        inside = np.clip(heights, lowest, highest)
        ax.plot([token for _, token in marks], inside, linestyle="none", zorder=5, **look)


def draw_reference(ax: Axes, panel: Panel, args: Args) -> None:
    """The dashed lines: the rollouts' own scale, or the targets; at the right end, what that is in nats."""
    levels, words, style = [1.0], f"1 ≈ {significant(panel.cost['scale'], 2)} nats", SCALE_STYLE
    if not args.normalize_kl:
        levels = sorted({panel.alpha**2 * r.cell.target_kl for r in panel.rollouts})
        style = TARGET_STYLE
        words = f"target {join_first((significant(target, 3) for target in levels), 3)}"
    for level in levels:
        if level <= panel.top:
            ax.axhline(level, zorder=3.5, **style)
    height = (ax.transData - ax.transAxes).transform((0, min(panel.top, levels[-1])))[1]
    words += ": off-scale" if levels[-1] > panel.top else ""
    side, offset = ("top", -2) if height > 0.85 else ("bottom", 2)  # above the line, if there is room
    halo = [withStroke(linewidth=2.6, foreground="white", alpha=0.9)]
    look: dict[str, Any] = QUIET_STYLE | {"color": INK, "path_effects": halo, "zorder": 6}
    ax.annotate(words, (1, height), (-1, offset), ha="right", va=side, **look, **OFFSET)


def draw_panel(ax: Axes, panel: Panel, args: Args) -> None:
    """Draw one panel's KL into axes: lines, median, marks, dashed reference, and the words above."""
    with own_style():
        set_token_axis(ax, panel)
        set_kl_axis(ax, panel, args)
        draw_words(ax, panel, args)
        rollouts = drawing_order([r for r in panel.rollouts if len(r.line)])
        if rollouts:
            draw_lines(ax, rollouts, args)
            draw_median(ax, rollouts)
            draw_marks(ax, rollouts)
        if rollouts and panel.alpha:
            draw_reference(ax, panel, args)
        style: dict[str, Any] = {"ha": "center", "va": "center", "style": "italic", "zorder": 6}
        ax.text(0.5, 0.5, empty_reason(panel), transform=ax.transAxes, **style, **QUIET_STYLE)


def draw_strip(ax: Axes, panel: Panel, args: Args) -> None:
    """Draw into axes the share that never died, the share above the threshold now, and the numbers at risk.

    Between two forks the interval runs from the next one's lower to the previous one's upper limit, as
    death is seen only at forks. As KMunicate asks: Morris et al. (2019), BMJ Open 9:e030215.
    """
    with own_style():
        alive_colour, dead_colour = palette_colours(args.palette)
        curve = panel.survival
        set_token_axis(ax, panel, at_risk=True)
        ax.set(ylim=(-0.2, 1.2), yticks=[0, 1], ylabel="share", xlabel="token, number at risk")
        if len(curve.forks):
            t, share = np.r_[0, curve.forks], np.r_[1, curve.never_died]
            low, high = np.r_[curve.low, curve.low[-1:]], np.r_[1, curve.high]
            not_below = np.maximum(share, np.r_[1, curve.above_now])
            style: dict[str, Any] = {"step": "post", "linewidth": 0}
            ax.fill_between(t, 0, share, color=alive_colour, alpha=0.2, **style)
            ax.fill_between(t, share, not_below, color=dead_colour, alpha=RECOVERED_OPACITY, **style)
            ax.fill_between(t, not_below, 1, color=dead_colour, alpha=0.62, **style)
            ax.fill_between(t, low, high, color=INTERVAL_COLOUR, alpha=INTERVAL_OPACITY, **style)
            ax.plot(t, share, clip_on=False, zorder=3, **SHARE_STYLE)
            ax.plot(curve.forks, curve.above_now, clip_on=False, zorder=4, **NOW_STYLE)


# --------------------------------------------------------------------------------- draw: the overview
def draw_dose(sweep: Sweep) -> Figure:
    """The overview: KL, and the share that never died, against alpha; a line per row of panels."""
    if len(sweep.steered_alphas) < 2:
        raise SweepError(f"{sweep.name}: the overview needs at least two steered alphas")
    args, by = sweep.args, f", by {sweep.args.rows}" if sweep.args.rows else ""
    looks = {}
    for i, facet in enumerate(dict.fromkeys(facet for facet, _ in sweep.arms)):
        colour, marker = FACET_COLOURS[i % len(FACET_COLOURS)], FACET_MARKERS[i % len(FACET_MARKERS)]
        looks[facet] = FACET_STYLE | {"color": colour, "marker": marker}
    title = f"{subject(sweep)}: how much steering before it breaks{by}"
    shown = {f"seed {facet}" if args.rows == "seed" else facet: look for facet, look in looks.items() if by}
    if any(panel.differs_at_end for arm in sweep.arms.values() for panel in arm):
        shown[f"open: {args.metric} ≥ {args.threshold:g} at the end"] = END_STYLE
    shown[f"{target_label(sweep)}, as for small steps"] = TARGET_STYLE
    with own_style():
        handles = {label: Line2D([], [], **look) for label, look in shown.items()}
        figure = new_page(PAGE_WIDTH, DOSE_HEIGHT, title, "", handles, args)
        kl_ax, share_ax = (axes_at(figure, left, 0.36, 2.6, 1.14) for left in (0.64, 4.0))
        draw_kl_by_alpha(kl_ax, sweep, looks)
        draw_share_by_alpha(share_ax, sweep, looks)
    return figure


def set_alpha_axis(ax: Axes, sweep: Sweep, title: str) -> None:
    alphas = sweep.steered_alphas
    room = 0.1 * np.ptp(alphas)
    ax.set(xlabel="steering strength α", xlim=(alphas[0] - room, alphas[-1] + room))
    ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_title(title, loc="left", size=7, weight="bold", pad=4)


def draw_kl_by_alpha(ax: Axes, sweep: Sweep, looks: Mapping[str, dict[str, Any]]) -> None:
    """p95 of KL against alpha, a line per row of panels and sign; dashed, what small steps would give."""
    set_alpha_axis(ax, sweep, "What it costs in KL")
    ax.set_ylabel("p95 of all KL (nats, log)")
    ax.set_yscale("log")
    for (facet, _), arm in sweep.arms.items():
        kl = [panel.cost["kl_p95"] for panel in arm]
        drawn = [value if 0 < value < math.inf else math.nan for value in kl]
        ax.plot([panel.alpha for panel in arm], drawn, zorder=3, **looks[facet])
    for sign in (-1, 1):
        sizes = [abs(alpha) for alpha in sweep.steered_alphas if alpha * sign > 0]
        between = sign * np.linspace(min(sizes), max(sizes), 200) if sizes else np.empty(0)
        for target_kl in {cell.target_kl for cell in sweep.cells}:
            ax.plot(between, between**2 * target_kl, zorder=2, **TARGET_STYLE)
    bottom, top = ax.get_ylim()
    by_decades = LogLocator(subs=(1, 3) if top < 1e3 * bottom else (1,), numticks=4)
    ax.yaxis.set_major_locator(by_decades if top > 20 * bottom else MaxNLocator(3))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter("{x:g}")


def draw_share_by_alpha(ax: Axes, sweep: Sweep, looks: Mapping[str, dict[str, Any]]) -> None:
    """The share that never died against alpha with its interval, and dotted the share above at the end."""
    set_alpha_axis(ax, sweep, "Share that never died, 95% interval")
    ax.set(ylabel="share of rollouts", ylim=(-0.1, 1.1))
    ax.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    ax.axhline(0.5, color=QUIET_COLOUR, linewidth=0.5, linestyle=":", zorder=1)
    shift = min(0.1 * np.diff(sweep.steered_alphas).min(), 0.008 * np.ptp(sweep.steered_alphas))
    shifts = shift * np.linspace(-1, 1, len(looks)) if len(looks) > 1 else [0.0]
    shift_of = dict(zip(looks, shifts, strict=True))
    for (facet, _), arm in sweep.arms.items():
        look = looks[facet]
        alpha = np.array([panel.alpha for panel in arm]) + shift_of[facet]
        share, low, high = np.array([panel.fates["never_died"] for panel in arm]).T
        at_end = np.array([panel.fates["above_at_end"] for panel in arm])
        open_look = look | OPEN_STYLE | {"markeredgecolor": look["color"], "markersize": 5.6}
        differs = np.flatnonzero([panel.differs_at_end for panel in arm])  # else the filled marker says it
        ax.plot(alpha, at_end, zorder=2.5, markevery=differs.tolist(), **open_look)
        ax.plot(alpha, share, zorder=3, **look)
        ax.vlines(alpha, low, high, look["color"], linewidth=0.8, alpha=0.6, zorder=2)


# ------------------------------------------------------------------------------------ write: the tables
MAX_COMPARED = 6  # rows of panels; of more there are too many pairs to read


def tables(sweep: Sweep) -> dict[str, list[Row]]:
    """Every number of the summary, for pandas: lists of dicts of plain numbers, None where there is none.

    "steering": where each row of panels breaks; "compared": those rows in pairs; "panels", "kl" and
    "threshold": a row for each panel. What has a 95% interval has columns x, x_low and x_high.
    """
    plain: dict[str, list[Row]] = defaultdict(list)
    for table, rows in table_rows(sweep).items():
        for row in rows:
            columns: Row = {}
            for name, value in row.items():
                is_estimate = isinstance(value, Estimate)
                columns[name] = value.x if is_estimate else value
                columns |= {f"{name}_low": value.low, f"{name}_high": value.high} if is_estimate else {}
            plain[table].append({name: None if value != value else value for name, value in columns.items()})
    return plain


def table_rows(sweep: Sweep) -> dict[str, list[Row]]:
    """The tables; a number that has an interval is an Estimate, and NaN where there is none."""
    rows = sweep.args.rows
    found: dict[str, list[Row]] = {"steering": [], "compared": [], "panels": [], "kl": [], "threshold": []}
    for (facet, sign), arm in sweep.arms.items():
        label: Row = ({rows: facet} if rows else {}) | ({"sign": sign} if sign else {})
        found["steering"].append(label | steering_row(arm))
    for (a, sign), (b, other_sign) in itertools.combinations(sweep.arms, 2):
        if sign == other_sign and len(sweep.facets) <= MAX_COMPARED:
            counts = compared_row(sweep, a, b, sign)
            if sum(counts.values()) >= 3:
                found["compared"].append({"a": a, "b": b} | ({"sign": sign} if sign else {}) | counts)
    for panel in sweep.panels:
        label = ({rows: panel.facet} if rows else {}) | {"alpha": panel.alpha}
        found["panels"].append(label | panel.fates)
        found["kl"].append(label | panel.cost)
        found["threshold"].append(label | threshold_row(panel, sweep.args.threshold))
    return found


def steering_row(arm: Sequence[Panel]) -> Row:
    """The last panel before the share that never died first ends below one half, and the first one below."""
    last = first = None
    for panel in arm:
        share = panel.fates["never_died"].x
        if share < 0.5 - 1e-9:
            first = panel
            break
        last = last if math.isnan(share) else panel
    return {
        "last_above_half": last.alpha if last else None,
        "last_never_died": last.fates["never_died"] if last else Estimate(),
        "last_above_at_end": last.fates["above_at_end"] if last else None,
        "first_below_half": first.alpha if first else None,
        "first_never_died": first.fates["never_died"] if first else Estimate(),
        "first_above_at_end": first.fates["above_at_end"] if first else None,
    }


def compared_row(sweep: Sweep, a: str, b: str, sign: str) -> Row:
    """How many prompts first died at a higher alpha in a, and in b; without those that died unsteered."""
    arm_a, arm_b = sweep.arms[a, sign], sweep.arms[b, sign]
    shared = {panel.alpha for panel in arm_a} & {panel.alpha for panel in arm_b}
    first_a, first_b = (first_deaths([p for p in arm if p.alpha in shared]) for arm in (arm_a, arm_b))
    controls = [panel for panel in sweep.facets[a] + sweep.facets[b] if panel.alpha == 0]
    died_unsteered = {r.prompt for panel in controls for r in panel.rollouts if r.death is not None}
    counts = {"a_later": 0, "b_later": 0, "not_told_apart": 0}
    for prompt in (first_a.keys() & first_b.keys()) - died_unsteered:
        (alpha_a, n_a), (alpha_b, n_b) = first_a[prompt], first_b[prompt]
        if n_a == n_b:  # with more rollouts there are more chances to die
            counts["a_later"] += alpha_a > alpha_b
            counts["b_later"] += alpha_a < alpha_b
            counts["not_told_apart"] += alpha_a == alpha_b
    return counts


def threshold_row(panel: Panel, threshold: float) -> Row:
    """How many would have died at thresholds around the one that was chosen."""
    levels = sorted([threshold, *(round(threshold + step, 9) for step in (-0.1, -0.05, 0.05, 0.1))])
    lowest = [float(r.pmass.min(initial=math.inf)) for r in panel.rollouts]
    return {f"{level:g}": sum(pmass < level for pmass in lowest) for level in levels if 0 < level <= 1}


SHARES = ("never_died", "above_at_end")
NUMBER_FORMATS = {f"{at}{share}": "{:.3f}" for at in ("", "last_", "first_") for share in SHARES}
NUMBER_FORMATS |= dict.fromkeys(("alpha", "last_above_half", "first_below_half"), "{:.6g}")
NUMBER_FORMATS |= {"over_budget": "{:.1%}", "tokens": "{:.1f}"}


def number_text(column: str, value: Any) -> str:
    """A number of a table, with its interval in brackets; where no format is set, 4 significant digits."""
    if isinstance(value, Estimate):
        share, low, high = (number_text(column, number) for number in value)
        return share if math.isnan(value.low) else f"{share} [{low}, {high}]"
    if isinstance(value, float):
        has_format = column in NUMBER_FORMATS and math.isfinite(value)
        return NUMBER_FORMATS[column].format(value) if has_format else significant(value, 4)
    return "–" if value is None else str(value).replace("|", "\\|")


def table_text(rows: Sequence[Row], tablefmt: str) -> str:
    """The rows in markdown ("pipe"), or narrower for a terminal ("plain")."""
    texts = [{column: number_text(column, value) for column, value in row.items()} for row in rows]
    if tablefmt == "plain":
        texts = [{column.replace("_", "\n"): text for column, text in row.items()} for row in texts]
    return tabulate(texts, headers="keys", tablefmt=tablefmt, disable_numparse=True, stralign="right")


SECTIONS = {
    "steering": """\
## How much steering does it take?

`last_above_half` is the last alpha, ascending in size, before the share that never died first ends below 0.5,
`first_below_half` the first at which it has ("–": none); each with that share, its 95% interval, and the
share at or above the threshold at the last fork point. What lies between two alphas was not run.""",
    "compared": """\
How many prompts first died at a higher alpha in a, in b, and how many are not told apart (at the same alpha,
or in neither); over the alphas and prompts that both have, without those that died unsteered. A prompt died
where any of its rollouts did.""",
    "panels": """\
## Did the model break?

A rollout died if its pmass was below the threshold at any fork point. `n` = `n_died` + `n_censored` (by EOS,
or its record ends) + `n_alive` (to the end of the window). `n_died_last`: died only at the fork point after
the last token. `n_recovered`: died, but was at or above the threshold at the last fork point. `never_died`:
Kaplan-Meier share, in which EOS is censoring, and its 95% interval (beta product confidence procedure; the
evidence is prompts). `above_at_end`: share at or above the threshold at the last fork point. Both shares are
of those whose pmass was measured; the others count in `n_censored` or `n_alive`.""",
    "kl": """\
## What did it cost in KL?

In nats, of the recorded KL of all observed tokens. `over_budget`: share of tokens above their own cell's
`target_kl`, about 5% at alpha = 1 by calibration, with its 95% interval (delete-one jackknife over prompts).
`scale`: median of the rollouts' scales, what 1 on a normalised axis is worth. `tokens`: mean observed
tokens; KL falls along a rollout, so percentiles of rollouts of different length do not compare.""",
    "threshold": "## How many would have died at another threshold?",
}


def caption(sweep: Sweep) -> str:
    """Sentences to paste under the figure."""
    args = sweep.args
    unit = f"units of its own 95th percentile over the first {args.calib_tokens} tokens"
    text = f"""KL(steered || base) per token of n rollouts at each steering strength α, in
        {unit if args.normalize_kl else "nats"} ({smoothing_words(sweep)}). A rollout died (cross) at
        the first fork point with {args.metric} below {args.threshold:g}; a tick is EOS, the black line
        the median, a hollow box says that most of those that died recovered."""
    if args.survival:
        text += """ Below: the Kaplan-Meier share that never died with its 95% interval, dotted the share at
            or above the threshold at that token, and the number at risk."""
    return " ".join(text.split())


def summary_text(sweep: Sweep) -> str:
    """The markdown summary: pipe tables with what their columns mean, a caption, and the notes."""
    sections = [f"# KL(steered || base) and survival: {sweep.name}"]
    for name, rows in table_rows(sweep).items():
        if name == "compared" and not rows:
            why = f"that takes 3 prompts at the same alphas in both, and at most {MAX_COMPARED} rows"
            sections += [f"No rows of panels are compared: {why}."] if sweep.args.rows else []
        else:
            sections += [SECTIONS[name], table_text(rows, "pipe") or "No alpha is steered."]
    details = "`{0.name}` ({0.model}, {0.method}, seed {0.seed}, layer {0.layer}, c_star {0.c_star})"
    cells = join_first(details.format(cell) for cell in sweep.cells)
    notes = [f"Cells used: {cells}", *sweep.notes, f"Settings: {sweep.settings_text}"]
    sections += ["## Caption", caption(sweep), "## Notes", "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join(sections) + "\n"


def terminal_text(sweep: Sweep) -> str:
    """The first tables and a line per panel, with the columns that have room on a terminal."""
    too_wide = {"last_above_at_end", "first_above_at_end", "n_died_last", "n_recovered", "n_censored"}
    too_wide |= {"n_alive", "kl_median", "over_budget", "scale", "tokens"}
    found = table_rows(sweep)
    panels = [row | kl for row, kl in zip(found["panels"], found["kl"], strict=True)]
    blocks = ["How much steering does it take?"]
    for rows in (found["steering"], found["compared"], panels):
        narrow = [{name: row[name] for name in row if name not in too_wide} for row in rows]
        blocks += [table_text(narrow, "plain")] if rows else []
    return "\n\n".join(blocks)


def rollouts_csv(sweep: Sweep) -> str:
    """A row per rollout that was read, copies included."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ["cell", "prompt", "alpha", "observed_tokens", "end", "eos", "death_token", "recovered"]
    writer.writerow([*columns, "kl_p95_nats", "lowest_pmass", "last_pmass", "scale_nats", "copy_of"])
    for r in sweep.rollouts:
        lowest, last = (r.pmass.min(), r.pmass[-1]) if r.is_measured else (math.nan, math.nan)
        numbers = ["" if math.isnan(x) else f"{x:.6g}" for x in (r.kl_p95, lowest, last, r.scale)]
        facts = [r.cell.name, r.prompt[1], f"{r.alpha:.6g}", len(r.kl), r.end, int(r.eos)]
        writer.writerow([*facts, r.death, int(r.recovered), *numbers, r.copy_of])
    return text.getvalue()


# ------------------------------------------------------------------------------------ write: the files
def check_out(out: Path) -> None:
    """Raise SweepError where nothing can be written to the output folder, before any work is done."""
    nearest = next((folder for folder in (out, *out.parents) if os.path.lexists(folder)), Path())
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise SweepError(f"{escaped(nearest)}: {error.strerror}; choose another --out") from None


def write_files(out: Path, contents: Mapping[str, bytes]) -> None:
    """Write all files, each beside its target or what that links to, then rename them. Raises SweepError."""
    target = out
    parts: list[tuple[Path, Path]] = []  # target, and the file beside it
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            target = Path(os.path.realpath(out / name))
            part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
            parts.append((target, part))
            part.write_bytes(content)
        for target, part in parts:  # the error names the one at which it stopped
            part.replace(target)
    except OSError as error:
        raise SweepError(f"{escaped(target)}: {error.strerror}") from None
    finally:
        for _, part in parts:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def write(sweep: Sweep) -> list[Path]:
    """Draw and write all files, each of them whole: their paths. Raises SweepError."""
    args, settings, made_by = sweep.args, sweep.settings_text, f"spaghetti_kl_alive {__version__}"
    metadata: dict[str, Any] = {
        "png": {"Software": made_by, "Description": settings},
        "pdf": {"Creator": made_by, "Subject": settings, "CreationDate": None},
        "svg": {"Creator": made_by, "Description": settings, "Date": None},
    }
    faster: dict[str, Any] = {"png": {"pil_kwargs": {"compress_level": 3}}}  # and no larger
    contents = {SUMMARY_FILE: summary_text(sweep).encode(), ROLLOUTS_FILE: rollouts_csv(sweep).encode()}
    figures = {FIGURE_STEM: draw(sweep)}
    if args.dose and len(sweep.steered_alphas) >= 2:
        figures[DOSE_STEM] = draw_dose(sweep)
    for stem, figure in figures.items():
        for file_format in sorted({*args.formats}):
            content = io.BytesIO()
            with own_style():
                figure.savefig(
                    content, format=file_format, metadata=metadata[file_format], **faster.get(file_format, {})
                )
            contents[f"{stem}.{file_format}"] = content.getvalue()
    write_files(args.out_folder, contents)
    return [args.out_folder / name for name in contents]


# ---------------------------------------------------------------------------------------- the program
def run(argv: Sequence[str]) -> str:
    """Parse, read, log the notes, write; returns what stdout is to hold."""
    if "--version" in argv:
        return f"spaghetti_kl_alive {__version__}"
    args = tyro.cli(Args, args=argv, description=__doc__, prog="spaghetti_kl_alive")
    check_out(args.out_folder)
    sweep = read(args)
    for note in sweep.notes:
        logger.warning(note)
    names = join_first(cell.name for cell in sweep.cells)
    logger.info(f"read {len(sweep.rollouts)} rollouts of {names}")
    paths = write(sweep)
    return f"{terminal_text(sweep)}\n\nwrote {' '.join(map(escaped, paths))}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run from a shell; returns the exit status. What belongs to the process is set here."""
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115  # it was closed
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not Unicode
    if argv is None:
        gc.freeze()  # what was imported stays, so that collections need not look at it
    warnings.filterwarnings("ignore", message="Glyph")  # a box on the figure says that the font lacks it
    logger.enable(__name__)
    logger.remove()
    logger.add(sys.stderr, format="{level}: {message}")
    exit_status, message = 0, ""
    try:
        text = run(sys.argv[1:] if argv is None else argv)
        with contextlib.suppress(OSError):  # nobody reads stdout, or it is full: the files are written
            print(text)
    except SweepError as error:
        exit_status, message = error.exit_status, str(error)
    except MemoryError:
        exit_status, message = 1, "too little memory\nUse fewer --alphas, fewer cells or a lower --dpi."
    except BrokenPipeError:  # nobody reads what --help prints
        pass
    except OSError as error:
        exit_status, message = 1, f"{escaped(error.filename or 'the output')}: {error.strerror}"
    except KeyboardInterrupt:
        exit_status, message = 130, "interrupted"
    except SystemExit as stop:  # tyro's, after --help or wrong use
        exit_status = int(stop.code or 0)
    with contextlib.suppress(OSError):
        print(f"ERROR: {message}\n" if message else "", end="", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # without this, Python complains again as it exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return exit_status


if __name__ == "__main__":
    sys.exit(main())
