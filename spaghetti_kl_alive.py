# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "numpy>=1.26", "matplotlib>=3.8", "seaborn>=0.13", "tyro>=0.9.2", "loguru>=0.7", "tabulate>=0.9",
# ]
# ///
"""How much steering does a language model take before it breaks, and does its KL stay within the calibrated budget?

Reads a finished sweep and writes two figures and their numbers, for a shell, a Makefile target or a notebook.

  kl_alive_spaghetti.png  one panel per steering strength alpha. Each thin line is one rollout: KL(steered || base)
                          against token, blue while the model can still answer, orange once it no longer can.
                          Above a panel: how many rollouts died, and their KL against its target, in nats.
                          Below it: the share that is still alive.
  kl_alive_dose.png       the methods compared: KL and share alive against alpha, and share alive against KL.
  kl_alive_summary.md     every number with its interval, a caption for the figure, and what was left out.
  kl_alive_rollouts.csv   one row per rollout.

A rollout is one generated text. At a few of its tokens, the fork points, an answer was forced: pmass is the
probability mass on true and false there. The rollout is dead from the first fork point whose pmass is below
--threshold. The budget is target_kl, which c_star was calibrated to; the target at alpha is alpha^2 * target_kl.

  python spaghetti_kl_alive.py --runs-root runs/sweep --rows method --formats png pdf
  sweep = read(Args(runs_root="runs/sweep")); figure = draw(sweep); paths = write(sweep)   # from Python

Each folder in --runs-root is a cell with calib.json, trajectory.json and pmass.json. --version prints the version.
Exit status: 0: all files written; 1: the data does not allow it; 2: wrong use; 130: interrupted.
"""

from __future__ import annotations

import contextlib
import csv
import gc
import io
import json
import logging
import math
import os
import re
import sys
import textwrap
import threading
import time
import uuid
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

try:
    import matplotlib
    import numpy as np
    import tyro
    from loguru import logger
    from matplotlib.axes import Axes
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties, findfont, get_font
    from matplotlib.gridspec import GridSpec
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.textpath import text_to_path
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
    from matplotlib.transforms import ScaledTranslation
    from tabulate import tabulate
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"ERROR: the package {error.name} is missing\nInstall it: {sys.executable} -m pip install {error.name}")

__version__ = "0.3.0"
CALIB_FILE, TRAJECTORY_FILE, PMASS_FILE = CELL_FILES = ("calib.json", "trajectory.json", "pmass.json")
FIGURE_STEM, DOSE_STEM = "kl_alive_spaghetti", "kl_alive_dose"
SUMMARY_FILE, ROLLOUTS_FILE = "kl_alive_summary.md", "kl_alive_rollouts.csv"
FIGURE_FORMATS = ("png", "pdf", "svg")
MIN_SCALE = 1e-8  # nats; a scale at or below it is no scale
MAX_KL = 1e6  # nats; log-probabilities do not reach that far, so KL beyond it is a broken measurement
MAX_TOKENS = 2**53  # no count of tokens is larger than this
ALLOWED_OVER = 0.05  # share of tokens: calibration puts the 95th percentile of KL at the target
RETRY_AFTER = 0.5  # seconds; by then a sweep has finished writing the file that it was writing

T = TypeVar("T")


@dataclass(frozen=True)
class Args:
    # the data
    runs_root: Annotated[str | Path, tyro.conf.arg(metavar="PATH")]
    """Folder of the sweep, with one sub-folder per cell. It may also be a cell itself."""
    model_contains: str = ""
    """Use only cells whose folder name or model contains this text. Default: all cells."""
    alphas: tuple[float, ...] = ()
    """Steering strengths to draw, as multiples of c_star, separated by spaces. Default: every alpha in the data."""
    window: int | None = None
    """Use at most this many tokens of each rollout. Default: the window in calib.json."""
    keep_duplicates: bool = False
    """Count exact copies of a rollout instead of leaving them out."""
    skip_bad_cells: bool = False
    """Leave out cells whose files are damaged, with a warning, instead of stopping."""
    # what counts as dead
    threshold: float = 0.8
    """A rollout is dead from the first fork point at which its probability mass is below this value, in (0, 1]."""
    metric: str = "pmass_eval"
    """Key in pmass.json that holds the probability mass: "pmass" or "pmass_<name>"."""
    # the KL
    normalize_kl: bool = True
    """Divide each rollout's KL by its own scale. Otherwise KL is drawn in nats, with its target."""
    calib_tokens: int = 20
    """How many of a rollout's first tokens make its scale, the 95th percentile of their KL."""
    calib_on: Literal["smoothed", "raw"] = "smoothed"
    """Take that percentile of the smoothed KL, or of the KL as recorded."""
    roll: int = 65
    """Smooth KL by a centred rolling mean of this many tokens. 1: no smoothing."""
    edges: Literal["pad", "shrink"] = "pad"
    """At the ends, repeat the first and last value (pad), or average only the tokens that exist (shrink)."""
    # the drawing
    rows: Literal["method", "model", "seed", "cell"] | None = None
    """Give each method, model, seed or cell its own row of panels. Default: all cells in one panel per alpha."""
    kl_log: bool = False
    """Draw KL on a logarithmic axis, linear below 0.1."""
    survival: bool = True
    """Draw the share alive and the numbers at risk under each panel."""
    dose: bool = True
    """Also draw the overview, kl_alive_dose."""
    ncols: int | None = None
    """Panels side by side, without --rows. Default: up to 6, in balanced rows."""
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

    @property
    def requested_alphas(self) -> list[float]:
        """Ascending; numbers that differ by rounding are one alpha, and -0.0 is 0."""
        requested: list[float] = []
        for alpha in sorted(self.alphas):
            if not any(math.isclose(alpha, a) for a in requested):
                requested.append(alpha + 0.0)
        return requested


class SweepError(Exception):
    """The figure cannot be made. The message names the file, the problem and the remedy."""

    exit_status = 1


class UsageError(SweepError):
    """A flag has a value that makes no sense."""

    exit_status = 2


def check_args(args: Args) -> None:
    """Raise UsageError where a flag has a value that makes no sense, before any file is read."""
    out_suffix = Path(args.out or "").suffix.lower()
    rules = {
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
        "--formats must be png, pdf or svg": len(args.formats) > 0 and {*args.formats} <= {*FIGURE_FORMATS},
        f"--out must name a folder, not a {out_suffix} file": out_suffix.lstrip(".") not in FIGURE_FORMATS,
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise UsageError("; ".join(broken))
    palette_colours(args.palette)


# ---------------------------------------------------------------------------------------- the data
@dataclass(frozen=True, eq=False)
class Cell:
    """One run of the sweep: one model, steered by one method, with one seed. Its strings are already escaped."""

    folder: Path
    name: str  # of the folder
    model: str
    method: str
    seed: str
    description: str
    target_kl: float  # nats; the calibrated budget
    window: int | None  # tokens; None where calib.json has none

    def facet(self, rows: str | None) -> str:
        """Which row of panels the cell belongs to; "" where all cells are pooled."""
        return {"method": self.method, "model": self.model, "seed": self.seed, "cell": self.name}.get(rows or "", "")


class Fate(NamedTuple):
    """How a rollout ended, as seen at its fork points."""

    end: Literal["died", "died_last", "censored", "alive"]  # died_last: at the fork after its last token
    death: int | None  # token
    recovered: bool  # died, but was at or above the threshold at its last measured fork
    followed_to: int | None  # token of its death, else of its last measured fork; None where it has none


@dataclass(frozen=True, eq=False)
class Rollout:
    """One rollout, as far as it was observed: T tokens, up to its end, its record's end or the window's end."""

    args: Args = field(repr=False)
    cell: Cell = field(repr=False)
    prompt_index: int
    alpha: float
    generated_kl: np.ndarray = field(repr=False)  # (n_kl,) float32, nats; NaN: not measured, inf: above MAX_KL
    n_tokens: int  # T
    forks: np.ndarray = field(repr=False)  # (F,) tokens, ascending
    pmass: np.ndarray = field(repr=False)  # (F,), NaN where not measured
    record_cut: bool  # the KL record ends before the rollout and the window do
    eos: bool  # the rollout ended by itself before the window did, and its KL was recorded to the end
    fate: Fate
    scale: float  # nats; NaN if there is none
    identity: tuple[Any, ...] | None = field(repr=False)  # equal for exact copies; None if nothing can be compared
    copy_of: str = ""  # name of the cell that recorded the same rollout first

    @property
    def kl(self) -> np.ndarray:
        """The observed KL, (T,)."""
        return self.generated_kl[: self.n_tokens]

    @property
    def n_kl(self) -> int:
        return len(self.generated_kl)

    @cached_property
    def has_line(self) -> bool:
        is_scaled = not self.args.normalize_kl or (self.alpha != 0 and math.isfinite(self.scale))
        return is_scaled and bool(np.isfinite(self.kl).any())

    @property
    def line(self) -> np.ndarray:
        """What is drawn, (T,) float32, NaN in gaps; (0,) if there is no line.

        Computed anew each time: the lines of a large sweep would double its memory.
        """
        smoothed = rolling_mean(self.generated_kl, self.args.roll, self.args.edges) if self.has_line else np.empty(0)
        return (smoothed[: self.n_tokens] / (self.scale if self.args.normalize_kl else 1)).astype(np.float32)

    @property
    def prompt(self) -> tuple[str, int]:
        """What is independent of other rollouts: the same index is another prompt for another model."""
        return self.cell.model, self.prompt_index

    @property
    def target(self) -> float:
        """alpha^2 * target_kl, the KL to expect if it grew as it does at small alpha; nats, NaN at alpha 0."""
        return float32(self.alpha * self.alpha * self.cell.target_kl) if self.alpha else math.nan

    @cached_property
    def kl_p95(self) -> float:
        """95th percentile of the observed KL, nats."""
        return p95(self.kl)

    @cached_property
    def kl_p95_to_death(self) -> float:
        """95th percentile of the KL up to and including the token of death, nats; without a death, of all."""
        return self.kl_p95 if self.fate.death is None else p95(self.kl[: self.fate.death + 1])

    @property
    def lowest_pmass(self) -> float:
        """Lowest pmass at the forks that count; NaN where none was measured."""
        return float(np.fmin.reduce(self.pmass[self.forks <= len(self.kl)], initial=math.nan))


class Survival(NamedTuple):
    """Kaplan-Meier estimate at each measured fork, (k,) each; constant in between."""

    forks: np.ndarray  # tokens
    s: np.ndarray
    low: np.ndarray  # 95% interval
    high: np.ndarray
    followed_to: np.ndarray  # (m,) tokens up to which each measured rollout is in the risk set


class KlSummary(NamedTuple):
    """The recorded KL of a panel's rollouts against its target; nats, pooled over all observed tokens."""

    targets: list[float]  # each that occurs, ascending; none at alpha 0
    p95: float
    median: float
    largest: float  # of the finite values
    over_target: float  # share of tokens above their own cell's target; NaN without a target
    interval: tuple[float, float] | None  # 95% interval of that share
    n_prompts: int
    scale: float  # median of the rollouts' scales: what 1 on a normalised axis is worth
    no_scale: int  # rollouts without one
    tokens: float  # mean observed tokens of a rollout

    @property
    def verdict(self) -> Literal["over", "under", "open"]:
        """Whether more than 5% of the tokens are above their target, as far as the evidence of prompts tells."""
        if self.n_prompts < 3:
            return "open"
        is_certain = self.over_target in (0, 1)  # where there is no interval
        low, high = self.interval or ((self.over_target, self.over_target) if is_certain else (0, 1))
        return "over" if low > ALLOWED_OVER else "under" if high < ALLOWED_OVER else "open"

    @property
    def sign(self) -> Literal[">", "<", "≈"]:
        """How the KL compares with its target: "≈" where the evidence leaves it open and the two are close."""
        is_close = all(abs(self.p95 - target) <= target / 4 for target in self.targets)
        if self.n_prompts >= 3 and self.verdict == "open" and is_close:
            return "≈"
        return ">" if self.over_target > ALLOWED_OVER else "<"


@dataclass(frozen=True, eq=False)
class Panel:
    """The rollouts of one alpha and, with --rows, of one method, model, seed or cell."""

    facet: str  # which one; "" if all are pooled
    alpha: float
    alpha_text: str
    rollouts: list[Rollout]

    def __repr__(self) -> str:
        return f"<Panel {self.name}: n {self.n}, {self.n_deaths} died>"

    @property
    def name(self) -> str:
        return f"{self.facet} at alpha {self.alpha_text}" if self.facet else f"alpha {self.alpha_text}"

    @property
    def n(self) -> int:
        return len(self.rollouts)

    @cached_property
    def with_line(self) -> list[Rollout]:
        return [r for r in self.rollouts if r.has_line]

    @cached_property
    def counts(self) -> Counter[str]:
        """How many rollouts died, died_last, were censored, are alive."""
        return Counter(r.fate.end for r in self.rollouts)

    @property
    def n_deaths(self) -> int:
        return self.counts["died"] + self.counts["died_last"]

    @property
    def n_recovered(self) -> int:
        return sum(r.fate.recovered for r in self.rollouts)

    @property
    def n_unmeasured(self) -> int:
        return sum(r.fate.followed_to is None for r in self.rollouts)

    @cached_property
    def survival(self) -> Survival:
        """Of the measured rollouts. Its interval counts prompts, as rollouts of one prompt are not independent."""
        measured = [r for r in self.rollouts if r.fate.followed_to is not None]
        at_forks = [r.forks[np.isfinite(r.pmass) & (r.forks <= len(r.kl))] for r in measured]
        forks = np.unique(np.concatenate(at_forks or [np.empty(0, dtype=int)]))
        followed_to = np.array([r.fate.followed_to for r in measured], dtype=int)
        died = np.array([r.fate.death is not None for r in measured], dtype=bool)
        return kaplan_meier(followed_to, died, forks, len({r.prompt for r in self.rollouts}) / max(1, self.n))

    @property
    def s_end(self) -> tuple[float, float, float] | None:
        """Share alive at the last measured fork, and its 95% interval; None where nothing was measured."""
        curve = self.survival
        return (float(curve.s[-1]), float(curve.low[-1]), float(curve.high[-1])) if len(curve.forks) else None

    @property
    def has_log_kl(self) -> bool:
        """Whether its KL can stand on a logarithmic axis."""
        return 0 < self.kl.p95 < math.inf

    @cached_property
    def kl(self) -> KlSummary:
        """NaN is left out."""
        pooled = np.concatenate([r.kl[~np.isnan(r.kl)] for r in self.rollouts] or [np.empty(0)])
        over, total = Counter[tuple[str, int]](), Counter[tuple[str, int]]()
        for r in self.rollouts:
            over[r.prompt] += int((r.kl > r.target).sum())
            total[r.prompt] += int((~np.isnan(r.kl)).sum())
        targets = sorted({r.target for r in self.rollouts if r.alpha})
        prompts = [prompt for prompt, n_tokens in total.items() if n_tokens and targets]
        counts = (np.array([each[prompt] for prompt in prompts]) for each in (over, total))
        scales = [r.scale for r in self.rollouts if math.isfinite(r.scale)]
        return KlSummary(
            targets=targets,
            p95=p95(pooled),
            median=float(np.median(pooled)) if len(pooled) else math.nan,
            largest=float(np.max(pooled, initial=-math.inf, where=np.isfinite(pooled))),
            over_target=over.total() / total.total() if prompts else math.nan,
            interval=share_interval(*counts),
            n_prompts=len(prompts),
            scale=float(np.median(scales)) if scales else math.nan,
            no_scale=self.n - len(scales),
            tokens=float(np.mean([len(r.kl) for r in self.rollouts])) if self.rollouts else math.nan,
        )


@dataclass(frozen=True, eq=False)
class Sweep:
    """What was read, ready to be drawn and written."""

    args: Args
    name: str  # of runs_root
    window: int  # tokens
    cells: list[Cell]  # those used
    rollouts: list[Rollout]  # all that were read, copies included
    panels: list[Panel]  # facet by facet, alphas ascending
    notes: list[str]  # what was left out, and what is unusual

    def __repr__(self) -> str:
        sizes = {"cell": len(self.cells), "rollout": len(self.rollouts), "panel": len(self.panels)}
        counts = (plural(size, noun) for noun, size in (sizes | {"note": len(self.notes)}).items())
        return f"<Sweep {self.name}: {', '.join(counts)}>"

    @cached_property
    def facets(self) -> dict[str, list[Panel]]:
        """The panels of each row of panels."""
        facets = dict.fromkeys(panel.facet for panel in self.panels)
        return {facet: [panel for panel in self.panels if panel.facet == facet] for facet in facets}

    @property
    def has_dose(self) -> bool:
        """Whether there are enough steered alphas for the overview."""
        return len({panel.alpha for panel in self.panels if panel.alpha and panel.rollouts}) >= 2

    @property
    def settings_text(self) -> str:
        """What gives the same output from the same data: the version, and the flags as they took effect."""
        flags = {f.name: getattr(self.args, f.name) for f in fields(Args) if f.name not in ("runs_root", "out")}
        texts = (f"{name} {setting_text(value)}" for name, value in (flags | {"window": self.window}).items())
        return escaped(f"spaghetti_kl_alive {__version__}: {', '.join(texts)}")


# ---------------------------------------------------------------------------------- words for print
def escaped(text: object) -> str:
    """The text, safe in one line of any output: in quotes and spelled out where it holds control characters."""
    return str(text) if str(text).isprintable() else repr(str(text))


def setting_text(value: Any) -> str:
    """A flag's value, or one from calib.json: "–" where there is none."""
    if isinstance(value, tuple):
        value = " ".join(map(str, value))
    return "–" if value in (None, "") or value != value else escaped(value)


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def join_first(things: Iterable[object], at_most: int = 12, separator: str = ", ") -> str:
    """The things in one line; of very many the first ones and a count."""
    texts = [f"{thing:.12g}" if isinstance(thing, float) else str(thing) for thing in things]
    return separator.join(texts[:at_most] + [f"and {len(texts) - at_most} more"] * (len(texts) > at_most))


def significant(value: float, digits: int) -> str:
    """The number with at most `digits` <= 6 significant digits; "∞" and "–" for inf and NaN."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "∞"
    return f"{float(f'{value:.{digits}g}'):g}"


def natural_order(text: str) -> tuple[list[Any], str]:
    """A sorting key: run2 before run10."""
    parts = re.split(r"([0-9]+(?:\.[0-9]+)?)", text)
    return [float(part) if i % 2 else part for i, part in enumerate(parts)], text


def track(items: Sequence[T], what: str) -> Iterator[T]:
    """The items; every few seconds a line in the log says how many of them are done."""
    told = time.monotonic()
    for k, item in enumerate(items, 1):
        if time.monotonic() > told + 2:
            logger.info(f"{what} {k} of {len(items)}")
            told = time.monotonic()
        yield item


# --------------------------------------------------------------------------------------------- read
class DamageError(Exception):
    """The content of a file is not what a sweep writes."""


class CellError(Exception):
    """A cell that cannot be used. `path` is its damaged file, None where it merely has nothing to show."""

    def __init__(self, reason: str, path: Path | None = None) -> None:
        super().__init__(escaped(reason))
        self.path = path


@contextlib.contextmanager
def json_file(path: Path) -> Iterator[dict[str, Any]]:
    """The object in a JSON file. Turns a DamageError, here or in the block, into a CellError that names the file."""
    try:
        yield expect(parse_json(path), dict, "its content")
    except DamageError as damage:
        raise CellError(f"{path.name}: {damage}", path) from None


def parse_json(path: Path, retry: bool = True) -> Any:
    """The content of a JSON file. Raises DamageError, and CellError where there is no file."""
    try:
        if path.exists() and not path.is_file():  # a named pipe would hang
            raise DamageError("not a regular file")
        raw = path.read_bytes()
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        raise CellError(f"{path.name} is {'a link to nothing' if path.is_symlink() else 'missing'}") from None
    except OSError as error:
        raise DamageError(error.strerror) from None
    try:
        text = raw.decode(json.detect_encoding(raw))
        del raw  # a large file is not held twice while it is parsed
        return json.loads(text)
    except RecursionError:
        raise DamageError("nested too deeply") from None
    except UnicodeDecodeError:
        raise DamageError("its text is not Unicode: save it as UTF-8") from None
    except ValueError as error:
        problem = json_problem(text, error)
        if not (retry and RETRY_AFTER and "cut off" in problem and 0 <= age < 5):
            raise DamageError(problem) from None
    time.sleep(RETRY_AFTER)  # the sweep may have been writing it at this moment
    return parse_json(path, retry=False)


def json_problem(text: str, error: ValueError) -> str:
    """What is wrong with a file that does not parse, and what to do."""
    if text.startswith("version https://git-lfs"):
        return "a Git LFS pointer, not the file itself: run git lfs pull"
    if text.lstrip().startswith("<"):
        return "HTML or XML, not JSON"
    if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
        return f"more than one JSON document (the second one starts in line {error.lineno})"
    found = "not JSON" if text.strip() else "empty"
    return f"{found}, or cut off ({error}); is the sweep still writing it?"


def expect(value: Any, kind: type, what: str) -> Any:
    """The value, if it is of this JSON type. Raises DamageError."""
    if not isinstance(value, kind):
        raise DamageError(f"{what} is of type {type(value).__name__}, not {kind.__name__}")
    return value


def value_of(content: dict[str, Any], key: str) -> Any:
    """The value under a key that must be there. Raises DamageError."""
    if key not in content:
        raise DamageError(f"the key {key!r} is missing")
    return content[key]


def number_array(values: Any, what: str) -> np.ndarray:
    """A JSON list of numbers as float64 (n,), null being NaN. Raises DamageError."""
    if not {*map(type, expect(values, list, what))} <= {float, int, type(None)}:
        raise DamageError(f"{what} is not a list of numbers")
    try:
        return np.array(values, dtype=float)
    except OverflowError:
        raise DamageError(f"{what} holds a number that is too large") from None


def count_array(values: Any, what: str) -> np.ndarray:
    """A JSON list of whole numbers >= 0 as int64 (n,). Raises DamageError."""
    array = number_array(values, what)
    if not np.all((array >= 0) & (array < MAX_TOKENS) & (array == np.floor(array))):
        raise DamageError(f"{what} must hold only whole numbers >= 0")
    return array.astype(int)


def pmass_array(values: Any, n_forks: int, what: str) -> np.ndarray:
    """The pmass of one rollout at each fork point (F,). Raises DamageError."""
    pmass = number_array(values, what)
    if len(pmass) != n_forks:
        raise DamageError(f"{what} has {len(pmass)} values for {n_forks} fork_points")
    if ((pmass < 0) | (pmass > 1 + 1e-5)).any():  # a softmax in single precision sums to 1 only nearly
        raise DamageError(f"{what} is not in [0, 1]: {join_first(pmass.tolist(), 4)}")
    return pmass


def take_by_alpha(content: dict[str, Any], key: str, args: Args, known: list[float]) -> dict[float, list[Any]]:
    """The lists under a key, taken out of `content`, by requested steering strength. Raises DamageError.

    A number within 1e-9, relative, of one of the `known` alphas is that alpha; new ones are added to them.
    """
    lists: dict[float, list[Any]] = {}
    for name, values in expect(value_of(content, key), dict, f'"{key}"').items():
        try:
            number = float(name) + 0.0  # -0.0 is 0
        except ValueError:
            number = math.nan
        alpha = next((a for a in known if math.isclose(a, number)), number)
        if alpha in lists or not math.isfinite(alpha):
            raise DamageError(f'"{key}" has the key {name!r}, which is no number or there twice')
        lists[alpha] = expect(values, list, f'"{key}" at alpha {name}')
        known += [] if alpha in known else [alpha]
    del content[key]
    return {alpha: values for alpha, values in lists.items() if not args.alphas or alpha in args.requested_alphas}


def load_calib(folder: Path) -> Cell:
    """The cell of a folder. Raises CellError."""
    with json_file(folder / CALIB_FILE) as content:
        target_kl: Any = value_of(content, "target_kl")
        window: Any = content.get("window")
        if type(target_kl) not in (int, float) or not 0 < target_kl < MAX_KL:
            raise DamageError(f'"target_kl" is {repr(target_kl)[:40]}, not a number of nats above 0')
        is_count = type(window) in (int, float) and 0 < window < MAX_TOKENS and window == int(window)
        if window is not None and not is_count:
            raise DamageError(f'"window" is {repr(window)[:40]}, not a number of tokens')
        model, method = (escaped(expect(value_of(content, key), str, f'"{key}"')) for key in ("model", "method"))
        seed, layer, c_star = (setting_text(content.get(key))[:40] for key in ("seed", "layer", "c_star"))
    description = f"{model}, {method}, seed {seed}, layer {layer}, c_star {c_star}"
    window = None if window is None else int(window)
    return Cell(folder, escaped(folder.name), model, method, seed, description, float(target_kl), window)


def load_trajectory(folder: Path, args: Args, known: list[float]) -> dict[float, list[np.ndarray]]:
    """KL in nats of each rollout (L,), at each requested alpha. Raises CellError."""
    kl: dict[float, list[np.ndarray]] = {}
    with json_file(folder / TRAJECTORY_FILE) as content:
        lists = take_by_alpha(content, "per_prompt_per_t_kl", args, known)
        for alpha in [*lists]:
            values = lists.pop(alpha)  # popped, as all lists and all arrays at once would fill the memory
            kl[alpha] = [number_array(row, f"alpha {alpha:.12g}, rollout {i}") for i, row in enumerate(values)]
    return kl


class PmassRecord(NamedTuple):
    """What pmass.json holds at the requested alphas."""

    forks: np.ndarray  # (F,) tokens, ascending
    pmass: dict[float, list[np.ndarray]]  # (F,) of each rollout, NaN where not measured
    gen_lens: dict[float, np.ndarray] | None  # (N,) tokens; None where there are none
    lengths_key: str  # under which they stand
    other_metrics: list[str]  # keys that hold values, too


def load_pmass(folder: Path, args: Args, known: list[float]) -> PmassRecord:
    """The probability mass at the fork points. Raises CellError, also where it was not measured."""
    metric = args.metric
    lengths_key = "gen_lens_" + (metric.removeprefix("pmass").removeprefix("_") or "qa")
    with json_file(folder / PMASS_FILE) as content:
        if not expect(content.get("computed", True), bool, '"computed"'):
            raise CellError('pmass was not measured ("computed" is false)')
        measured = {key for key, lists in content.items() if isinstance(lists, dict) and any(lists.values())}
        others = sorted(key for key in measured if key.startswith("pmass") and key != metric)
        if metric not in content:
            raise CellError(f"{PMASS_FILE} has no {metric}; it has {join_first(others) or 'no pmass at all'}")
        forks = count_array(value_of(content, "fork_points"), '"fork_points"')
        order = np.argsort(forks, kind="stable")
        pmass: dict[float, list[np.ndarray]] = {}
        for alpha, rows in take_by_alpha(content, metric, args, known).items():
            what = f"{metric} at alpha {alpha:.12g}, rollout"
            pmass[alpha] = [pmass_array(row, len(forks), f"{what} {i},")[order] for i, row in enumerate(rows)]
        gen_lens: dict[float, np.ndarray] | None = None
        if lengths_key in content:
            what, lengths = f"{lengths_key} at alpha", take_by_alpha(content, lengths_key, args, known)
            gen_lens = {alpha: count_array(values, f"{what} {alpha:.12g}") for alpha, values in lengths.items()}
    return PmassRecord(forks[order], pmass, gen_lens, lengths_key, others)


def load_rollouts(cell: Cell, args: Args, known: list[float]) -> tuple[list[Rollout], dict[float, str]]:
    """A cell's rollouts at the requested alphas, and why there are none at its other alphas. Raises CellError."""
    record = load_pmass(cell.folder, args, known)
    kl = load_trajectory(cell.folder, args, known)
    sources: dict[str, Mapping[float, Any]] = {TRAJECTORY_FILE: kl, args.metric: record.pmass}
    if record.gen_lens is not None:
        sources[record.lengths_key] = record.gen_lens
    rollouts, missing = [], {}
    for alpha in sorted(kl.keys() | record.pmass.keys()):
        sizes = {source: len(lists[alpha]) for source, lists in sources.items() if alpha in lists}
        if len(sizes) < len(sources):
            missing[alpha] = f"not in {' and '.join(source for source in sources if source not in sizes)}"
        elif not any(sizes.values()):
            missing[alpha] = "no rollouts"
        elif sizes[args.metric] == 0:
            others = f"; {join_first(record.other_metrics)} was (--metric)" if record.other_metrics else ""
            missing[alpha] = f"{args.metric} was not measured{others}"
        elif len({*sizes.values()}) > 1:
            counted = ", ".join(f"{size} in {source}" for source, size in sizes.items())
            what = f"the number of rollouts at alpha {alpha:.12g} differs: {counted}"
            raise CellError(f"{PMASS_FILE}: {what}", cell.folder / PMASS_FILE)
        else:
            gen_lens = record.gen_lens[alpha].tolist() if record.gen_lens else map(len, kl[alpha])
            of_each = zip(kl[alpha], gen_lens, record.pmass[alpha], strict=True)
            rollouts += [make_rollout(cell, i, alpha, *lists, record.forks, args) for i, lists in enumerate(of_each)]
    if not rollouts:
        nothing = "has none of the requested alphas" if args.alphas else "holds no rollouts"
        raise CellError("; ".join(dict.fromkeys(missing.values())) or nothing)
    return rollouts, missing


def make_rollout(
    cell: Cell, index: int, alpha: float, kl: np.ndarray, gen_len: int, pmass: np.ndarray, forks: np.ndarray, args: Args
) -> Rollout:
    """A rollout from its KL (L,) in nats as recorded, its generated length, and its pmass (F,) at the forks (F,)."""
    window = args.window or cell.window or MAX_TOKENS
    kl = kl[:gen_len]  # what stands behind it is padding
    n_expected = min(gen_len, window)
    n_tokens = min(len(kl), n_expected)
    can_compare = bool(np.any(np.isfinite(pmass) if alpha == 0 else np.isfinite(kl) & (kl != 0)))
    fingerprint = hash((gen_len, kl.tobytes(), forks.tobytes(), pmass.tobytes()))
    kl = np.where(kl > MAX_KL, np.inf, np.where(kl < -MAX_KL, np.nan, kl))
    smoothed = rolling_mean(kl, args.roll, args.edges)
    head = (smoothed if args.calib_on == "smoothed" else kl)[: args.calib_tokens]
    scale = p95(head[np.isfinite(head)])
    return Rollout(
        args=args,
        cell=cell,
        prompt_index=index,
        alpha=alpha,
        generated_kl=kl.astype(np.float32),
        n_tokens=n_tokens,
        forks=forks,
        pmass=pmass,
        record_cut=n_tokens < n_expected,
        eos=gen_len < min(window, cell.window or window) and n_tokens == n_expected,
        fate=fate_of(pmass, forks, n_tokens, args.threshold, ended=gen_len < window or n_tokens < n_expected),
        scale=scale if scale > MIN_SCALE else math.nan,
        identity=(cell.model, alpha, index, fingerprint) if can_compare else None,
    )


def cell_folders(root: Path) -> list[Path]:
    """The folders in `root` that hold one of a cell's files, or that cannot be looked into."""
    folders = []
    for folder in root.iterdir():
        is_closed = folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK)
        if folder.name.startswith(("_", ".")) or (folder.exists() and not folder.is_dir()):
            continue
        if is_closed or not folder.exists() or any(os.path.lexists(folder / name) for name in CELL_FILES):
            folders.append(folder)
    return sorted(folders, key=lambda folder: natural_order(folder.name))


def read_cells(root: Path, args: Args) -> tuple[list[Rollout], dict[str, list[str]]]:
    """The rollouts of all usable cells, and what was left out, by reason. Raises SweepError where nothing remains."""
    rollouts: list[Rollout] = []
    left_out: dict[str, list[str]] = defaultdict(list)
    known, alike = args.requested_alphas, Counter[str]()  # alphas met so far; cells whose names print alike
    folders = cell_folders(root)
    if all((root / name).is_file() for name in CELL_FILES):
        if folders:
            reason = f"{escaped(root)} itself holds the three files, so it is the only cell"
            left_out[reason] = [f"`{escaped(folder.name)}`" for folder in folders]
        folders = [root.resolve() if root.name in ("", "..") else root]
    for folder in track(folders, "reading cell"):
        name = f"`{escaped(folder.name)}`"
        try:
            if not folder.exists():
                raise CellError("a link to nothing")
            cell = load_calib(folder)
            alike[cell.name] += 1
            if alike[cell.name] > 1:
                cell = replace(cell, name=f"{cell.name} ({alike[cell.name]})")
            if args.model_contains not in cell.name and args.model_contains not in cell.model:
                left_out[f"not in its name or model: {args.model_contains!r} (--model-contains)"].append(name)
                continue
            of_cell, missing = load_rollouts(cell, args, known)
        except CellError as error:
            if error.path and not args.skip_bad_cells:
                advice = "Repair or rerun that cell, or leave it out with --skip-bad-cells."
                problem = str(error).removeprefix(error.path.name)
                raise SweepError(f"{escaped(error.path)}{problem}\n{advice}") from None
            left_out[str(error)].append(name)
            continue
        rollouts += of_cell
        for alpha, reason in missing.items():
            left_out[reason].append(f"alpha {alpha:.12g} of {name}")
    unrequested = sorted({*known} - {*args.requested_alphas}) if args.alphas else []
    if unrequested:
        left_out["in the data, but not requested"] = [f"alpha {join_first(unrequested)}"]
    if not rollouts:
        raise SweepError(f"{escaped(root)}: nothing to draw, no cell can be used\n{why_nothing(root, left_out)}")
    return rollouts, left_out


def name_of(root: Path) -> str:
    """The name of runs_root as it was given: of a link, not of its target."""
    return root.name if root.name not in ("", "..") else root.resolve().name


def why_nothing(root: Path, left_out: Mapping[str, Sequence[str]]) -> str:
    """Why no cell can be used, and where there are cells."""
    deeper = Counter(path.parents[1] for path in root.glob(f"*/*/{CALIB_FILE}")).most_common(1)
    hints = [f"{plural(n, 'cell')} in {escaped(path)}: give --runs-root {escaped(path)}" for path, n in deeper]
    hints += [f"{join_first(things)}: {reason}" for reason, things in left_out.items()]
    return "; ".join(hints) or f"no folder in it holds {', '.join(CELL_FILES)}"


def read(args: Args) -> Sweep:
    """Read a sweep's cells and arrange their rollouts in panels. Raises SweepError, for a flag's value UsageError."""
    check_args(args)
    root = Path(args.runs_root)
    try:
        if not root.is_dir():
            raise SweepError(f"{escaped(root)}: no such folder; --runs-root must name the folder of the cells")
        rollouts, left_out = read_cells(root, args)
        name = escaped(name_of(root))
    except OSError as error:
        named = escaped(error.filename or root)
        raise SweepError(f"{named}: cannot be read ({error.strerror}); --runs-root must be readable") from None
    cells = list(dict.fromkeys(r.cell for r in rollouts))
    window = args.window or cells[0].window
    if window is None or (not args.window and {cell.window for cell in cells} != {window}):
        each = join_first(f"{escaped(cell.folder / CALIB_FILE)}: {cell.window or 'no window'}" for cell in cells)
        raise SweepError(f"the cells have no window in common; choose one with --window\n{each}")
    rollouts = mark_copies(rollouts)
    sweep = Sweep(args, name, window, cells, rollouts, make_panels(rollouts, args), [])
    return replace(sweep, notes=notes_of(sweep, left_out))


def mark_copies(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The rollouts; those that another cell of the same model recorded before are marked with its name.

    Greedy decoding ignores the seed, and at alpha 0 all methods share the rollouts of the base model: counted
    again, they would narrow the intervals for nothing.
    """
    first_seen: dict[tuple[Any, ...], str] = {}
    marked = []
    for r in rollouts:
        original = first_seen.setdefault(r.identity, r.cell.name) if r.identity else r.cell.name
        marked.append(r if original == r.cell.name else replace(r, copy_of=original))
    return marked


def make_panels(rollouts: Sequence[Rollout], args: Args) -> list[Panel]:
    """The panels, facet by facet: one for each alpha that was found or requested."""
    alphas = sorted({r.alpha for r in rollouts} | {*args.requested_alphas})
    digits = next(d for d in range(6, 18) if len({f"{alpha:.{d}g}" for alpha in alphas}) == len(alphas))
    members: dict[tuple[str, float], dict[Any, Rollout]] = defaultdict(dict)
    for r in rollouts:  # of exact copies in one panel, the first one
        key = id(r) if args.keep_duplicates or not r.identity else r.identity
        members[r.cell.facet(args.rows), r.alpha].setdefault(key, r)
    panels = []
    for facet in sorted({facet for facet, _ in members}, key=natural_order):
        panels += [Panel(facet, a, f"{a:.{digits}g}", [*members[facet, a].values()]) for a in alphas]
    return panels


# -------------------------------------------------------------------------------- notes for the reader
def notes_of(sweep: Sweep, left_out: Mapping[str, Sequence[str]]) -> list[str]:
    """What was left out, what is pooled, and what in the data is not as it should be; one line each."""
    notes = [f"Left out {join_first(dict.fromkeys(things))}: {reason}" for reason, things in left_out.items()]
    found = {(r.alpha, r.cell.name) for r in sweep.rollouts}
    named = {thing for things in left_out.values() for thing in things}
    alpha_texts = {panel.alpha: panel.alpha_text for panel in sweep.panels}
    nowhere = [text for alpha, text in alpha_texts.items() if alpha not in {alpha for alpha, _ in found}]
    lacking = defaultdict(list)  # the alphas, by the cells that lack them: what is pooled changes there
    for alpha, text in alpha_texts.items():
        names = [f"`{c.name}`" for c in sweep.cells if (alpha, c.name) not in found]
        names = [name for name in names if f"alpha {alpha:.12g} of {name}" not in named]
        if names and text not in nowhere:
            lacking[join_first(names, 6)].append(text)
    groups = [f"alpha {join_first(texts)}: not in {names}" for names, texts in lacking.items()]
    shorter = [f"`{cell.name}`" for cell in sweep.cells if cell.window is not None and cell.window < sweep.window]
    what = f"--window {sweep.window} is longer than the window of {join_first(shorter)}"
    notes += [f"Requested but in no cell: alpha {join_first(nowhere)}"] if nowhere else []
    notes += [f"Not every cell holds every alpha: {join_first(groups, 4, '; ')}"] if groups else []
    notes += [f"{what}: a rollout that reaches its own window is cut there, and censored"] if shorter else []
    no_kl = [panel.name for panel in sweep.panels if panel.alpha and panel.rollouts and not panel.has_log_kl]
    if no_kl and sweep.args.dose and sweep.has_dose:
        notes.append(f"Not on the KL axes of the overview, as it is 0, infinite or not measured: {join_first(no_kl)}")
    for kind in ("model", "method"):
        pooled = [{getattr(r.cell, kind) for r in panel.rollouts} for panel in sweep.panels]
        if max(map(len, pooled)) > 1:
            of_kind: list[str] = sorted(set().union(*pooled), key=natural_order)
            notes.append(f"{len(of_kind)} {kind}s pooled: {join_first(of_kind)} (--rows {kind} separates them)")
    return notes + copy_notes(sweep) + panel_notes(sweep)


def copy_notes(sweep: Sweep) -> list[str]:
    """Exact copies, those within a panel and those in other rows of panels."""
    facet_of = {cell.name: cell.facet(sweep.args.rows) for cell in sweep.cells}
    in_panels = {id(r) for panel in sweep.panels for r in panel.rollouts}
    pairs: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
    for r in sweep.rollouts:
        if r.copy_of:
            same = facet_of[r.copy_of] == facet_of[r.cell.name]
            what = "counted again (--keep-duplicates)" if same else "in different rows of panels, counted in each"
            what = what if id(r) in in_panels else "left out (--keep-duplicates counts them)"
            pairs[what][r.cell.name, r.copy_of] += 1
    size = Counter(r.cell.name for r in sweep.rollouts)
    notes = []
    for what, counts in pairs.items():
        each = (f"`{cell}`: {k} of its {plural(size[cell], 'rollout')} duplicate those of `{original}`"
                for (cell, original), k in counts.items())  # fmt: skip
        notes.append(f"Exact copies, {what}: {join_first(each, 2, '; ')}")
    return notes


def panel_notes(sweep: Sweep) -> list[str]:
    """What is unusual in the rollouts, with the panels and how many."""
    args, panels = sweep.args, sweep.panels
    hollow = [f"{p.name}: {p.n_recovered} of {p.n_deaths}" for p in panels if badge_of(p) == "hollow"]
    what = "More than half of the dead rollouts are back above the threshold at their last fork"
    notes = [f"{what} ({join_first(hollow)})"] if hollow else []
    n_needed = args.roll if args.edges == "pad" else 0
    some_smoothed = any(r.n_kl >= n_needed for panel in panels for r in panel.rollouts)
    extent = "not smoothed" if some_smoothed else "which are all: nothing is smoothed"
    late = "Below the threshold only after the last observed token, which is no death"
    infinite = f"Tokens whose KL is infinite or above {MAX_KL:g} nats, a gap in the line, but above every target"
    control = "Deaths at alpha 0: the probe fails on the unsteered model"
    unusual: dict[str, Callable[[Rollout], Any]] = {
        control: lambda r: r.alpha == 0 and r.fate.death is not None,
        f"Rollouts shorter than --roll {n_needed}, {extent}": lambda r: r.n_kl < n_needed,
        "KL records that end before their rollout does, censored there": lambda r: r.record_cut,
        late: lambda r: r.fate.death is None and (r.pmass < args.threshold).any(),
        "Rollouts whose pmass was never measured, so in no risk set": lambda r: r.fate.followed_to is None,
        "Tokens whose KL is NaN, a gap in the line": lambda r: np.isnan(r.kl).sum(),
        infinite: lambda r: np.isposinf(r.kl).sum(),
        "Tokens with a negative KL, below the axis": lambda r: (r.kl < -1e-3).sum(),
    }
    for what, count in unusual.items():
        where = [f"{panel.name}: {k}" for panel in panels if (k := sum(map(count, panel.rollouts)))]
        notes += [f"{what} ({join_first(where)})"] if where else []
    shares = []
    for facet, of_facet in sweep.facets.items():
        scaled = [r for p in of_facet if p.alpha for r in p.rollouts if math.isfinite(r.scale)]
        padded = [r for r in scaled if args.edges == "pad" and args.roll <= r.n_kl]
        first_weight = (args.roll // 2 + 1) / args.roll  # of the first token, in the first value of the rolling mean
        by_one = sum(r.scale / 2 < first_weight * r.kl[0] < math.inf for r in padded)
        if by_one and args.normalize_kl and args.calib_on == "smoothed" and args.roll > 1:
            shares.append(f"{args.rows} {facet}: " * bool(facet) + f"{by_one} of {len(padded)}")
    what = "Scales made by one token, the first, which padding repeats"
    return notes + ([f"{what} ({join_first(shares)}): --edges shrink avoids it"] if shares else [])


# --------------------------------------------------------------------------------------- the maths
def float32(value: float) -> float:
    """The number, rounded as KL is stored, so that equal numbers compare as equal."""
    return float(np.float32(min(value, 1e38)))


def alive_mask(pmass: np.ndarray, forks: np.ndarray, threshold: float, n_tokens: int) -> np.ndarray:
    """Whether the model could still answer, at each token.

    Dead at t if pmass (F,) was below the threshold at any fork (F,) s <= t; NaN is no measurement.
    Returns bool (n_tokens,), true up to death and false from there on. For use from Python: the figures need only
    the token of death, which is in a rollout's fate.
    """
    return np.arange(n_tokens) < forks[pmass < threshold].min(initial=n_tokens)


def fate_of(pmass: np.ndarray, forks: np.ndarray, n_tokens: int, threshold: float, ended: bool) -> Fate:
    """How a rollout of n_tokens observed tokens ended, from pmass (F,) at the ascending forks (F,) s <= n_tokens.

    The fork at n_tokens comes after the last token. `ended`: the rollout or its record ends before the window.
    """
    measured = np.isfinite(pmass) & (forks <= n_tokens)
    forks, pmass = forks[measured], pmass[measured]
    below = forks[pmass < threshold]
    if len(below):
        death = int(below[0])
        recovered = bool(pmass[-1] >= threshold and forks[-1] > death)
        return Fate("died" if death < n_tokens else "died_last", death, recovered, death)
    return Fate("censored" if ended else "alive", None, False, int(forks[-1]) if len(forks) else None)


def rolling_mean(kl: np.ndarray, roll: int, edges: Literal["pad", "shrink"]) -> np.ndarray:
    """Centred rolling mean of `roll` tokens, (L,) -> (L,), NaN where a window holds nothing finite.

    "pad" repeats the end values roll // 2 times and leaves KL shorter than `roll` as it is; "shrink"
    averages over the tokens that exist. Values that are not finite are left out of the means.
    """
    finite = np.isfinite(kl)
    if roll == 1 or len(kl) == 0 or (edges == "pad" and len(kl) < roll):
        return np.where(finite, kl, np.nan)
    roll = min(roll, 2 * len(kl) + 1)  # a longer window holds no more

    def sums(values: np.ndarray) -> np.ndarray:
        padded = np.pad(values, roll // 2, mode="edge" if edges == "pad" else "constant")
        return np.convolve(padded, np.ones(roll), mode="valid")[: len(kl)]

    total = sums(np.where(finite, kl, 0.0))
    if edges == "pad" and finite.all():
        return total / roll
    n_finite = np.round(sums(finite.astype(float)))
    return np.divide(total, n_finite, out=np.full(len(kl), np.nan), where=n_finite > 0)


def p95(values: np.ndarray) -> float:
    """numpy's linearly interpolated 95th percentile, NaN left out; NaN if nothing remains, inf where it is reached."""
    values = np.sort(values[~np.isnan(values)])
    return interpolated(values, len(values), 0.95)


def interpolated(greatest: np.ndarray, n: int, q: float) -> float:
    """The q-quantile of n sorted values, of which `greatest` holds at least the last ones that it takes."""
    if n == 0:
        return math.nan
    place = q * (n - 1)
    below, above = (float(greatest[rank - n]) for rank in (math.floor(place), math.ceil(place)))
    return above if math.isinf(above) else below + (above - below) * (place - math.floor(place))


def p99_of_lines(panels: Sequence[Panel]) -> float:
    """99th percentile of all values >= 0 of the panels' lines; NaN if there are none.

    Of the values so far only the greatest 1% are kept: all those of a large sweep would fill the memory.
    """
    most = 2 + sum(r.n_tokens for panel in panels for r in panel.rollouts) // 100
    greatest, n = np.empty(0, dtype=np.float32), 0
    for panel in panels:
        values = np.concatenate([greatest[:0], *(r.line for r in panel.with_line)])
        values = values[values >= 0]
        n += len(values)
        greatest = np.sort(np.r_[greatest, values])[-most:]
    return interpolated(greatest, n, 0.99)


def share_interval(over: np.ndarray, total: np.ndarray) -> tuple[float, float] | None:
    """95% interval of a share of tokens, from the counts (m,) of m prompts; None for m < 3 or where a share is 0 or 1.

    Tokens of one prompt are not independent, so the evidence is prompts: delete-one jackknife of the log odds with
    Student's t, m - 1 degrees of freedom (Efron and Tibshirani 1993, An Introduction to the Bootstrap, ch. 11).
    """
    m = len(over)
    if m < 3:
        return None
    shares = np.r_[over.sum() / total.sum(), (over.sum() - over) / (total.sum() - total)]
    if shares.min() <= 0 or shares.max() >= 1:
        return None
    middle, *left_out = np.log(shares / (1 - shares))
    half = t_quantile(m - 1) * math.sqrt((m - 1) * np.var(left_out))
    low, high = (1 / (1 + math.exp(min(700, -limit))) for limit in (middle - half, middle + half))
    return low, high


def t_quantile(df: int) -> float:
    """The 97.5% quantile of Student's t: t**2 / (df + t**2) has the distribution Beta(1/2, df/2)."""
    b = beta_quantile(0.95, 0.5, df / 2)
    return math.sqrt(df * b / (1 - b))


def kaplan_meier(followed_to: np.ndarray, died: np.ndarray, forks: np.ndarray, weight: float = 1.0) -> Survival:
    """Survival at the forks (k,) and its pointwise 95% interval.

    followed_to (m,) in tokens, died bool (m,); whoever is censored at a token is still at risk there. `weight`
    is how much of an independent observation each one is; it widens the interval and leaves S as it is.
    The interval is the beta product confidence procedure, by two moments: Fay, Brittain, Proschan (2013),
    Biostatistics 14:723. It is defined everywhere, and without censoring it is Clopper and Pearson's.
    """
    n_at_risk = count_at_risk(followed_to, forks)
    deaths = (followed_to[died][:, None] == forks).sum(axis=0)
    s = np.cumprod(1 - deaths / np.maximum(n_at_risk, 1))
    low, high = np.zeros(len(forks)), np.ones(len(forks))
    mean = square = 1.0  # moments of the product of one Beta(left + 1, deaths) per fork
    for k, (risk, left) in enumerate(zip(weight * n_at_risk, weight * (n_at_risk - deaths), strict=True)):
        mean *= (left + 1) / (risk + 1)
        square *= (left + 1) * (left + 2) / ((risk + 1) * (risk + 2))
        low[k] = quantile_by_moments(0.025, mean * left / (left + 1), square * left / (left + 2))  # times Beta(left, 1)
        high[k] = quantile_by_moments(0.975, mean, square)
    return Survival(forks, s, low, high, followed_to)


def quantile_by_moments(q: float, mean: float, square: float) -> float:
    """The q-quantile of the beta distribution with these first two moments; a mean of 0 or 1 is that point itself."""
    variance = square - mean * mean
    if variance <= 1e-15 or mean <= 0:
        return mean
    size = mean * (1 - mean) / variance - 1
    return beta_quantile(q, mean * size, (1 - mean) * size)


@lru_cache(maxsize=4096)
def beta_quantile(q: float, a: float, b: float) -> float:
    """The q-quantile of Beta(a, b), to 1e-4, by summing its density over a grid in log odds."""
    log_odds = math.log(a / b) + math.sqrt(1 / a + 1 / b) * np.linspace(-20, 20, 4001)
    log_density = a * log_odds - (a + b) * np.logaddexp(0, log_odds)
    density = np.exp(log_density - log_density.max())
    running = np.cumsum(density) - density / 2  # the trapezoid rule
    return float(1 / (1 + np.exp(-np.interp(q * density.sum(), running, log_odds))))


def count_at_risk(followed_to: np.ndarray, tokens: np.ndarray | Sequence[int]) -> np.ndarray:
    """How many rollouts are still at risk at each of the tokens (k,), given how far each one was followed (m,). (k,)"""
    return np.asarray((followed_to[:, None] >= np.asarray(tokens)).sum(axis=0))


def median_line(lines: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Median over the lines that have a value at each token, and how many do: both (longest,)."""
    table = np.full((max(map(len, lines)), len(lines)), np.nan, dtype=np.float32)
    for column, line in enumerate(lines):
        table[: len(line), column] = line
    table.sort(axis=1)  # NaN goes last
    n_lines = np.isfinite(table).sum(axis=1)
    middle = np.maximum(np.stack([n_lines - 1, n_lines]) // 2, 0).T  # the same element twice where n_lines is odd
    return np.take_along_axis(table, middle, axis=1).mean(axis=1, dtype=float), n_lines


def bracket_of(panels: Sequence[Panel]) -> tuple[Panel | None, Panel | None]:
    """Where the model breaks: the last panel before the share alive first ends below one half, and the first after it.

    Of the steered alphas above 0, ascending. None where it never holds, or never breaks.
    """
    holds = None
    for panel in panels:
        if panel.alpha > 0 and panel.s_end:
            if panel.s_end[0] < 0.5 - 1e-9:
                return holds, panel
            holds = panel
    return holds, None


def deaths_by_budget(panels: Sequence[Panel]) -> dict[str, tuple[int, int]]:
    """(died, all) of the steered rollouts whose own KL up to death is "within" their budget, and of those "above" it.

    A rollout's KL is its 95th percentile. Rollouts without any measured KL or pmass are in neither.
    """
    died: dict[str, list[bool]] = {"within": [], "above": []}
    for r in (r for panel in panels if panel.alpha > 0 for r in panel.rollouts):
        if r.fate.followed_to is not None and not math.isnan(r.kl_p95_to_death):
            is_within = r.kl_p95_to_death <= float32(r.cell.target_kl)
            died["within" if is_within else "above"].append(r.fate.death is not None)
    return {group: (sum(each), len(each)) for group, each in died.items()}


# --------------------------------------------------------------------------------------------- draw

Colour = tuple[float, float, float]
ALIVE_COLOUR, DEAD_COLOUR, INK = "#0067A5", "#E8890C", "#111111"
QUIET_COLOUR, UNMEASURED_COLOUR, INTERVAL_COLOUR, PADDED_COLOUR = "#5C6370", "#8A8F98", "#6B7178", "#EDEEF0"
FACET_COLOURS = ("#111111", "#7B2D8E", "#45B08C", "#C2185B", "#6B4A2B", "#9A9A00", "#5A6FD6", "#B0B0B0")
FACET_MARKERS = "os^vDP"
FONT = "DejaVu Sans"
STYLE: dict[str, Any] = {
    "font.family": FONT,
    "font.size": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # names may hold a $
    "pdf.fonttype": 42,
    "svg.hashsalt": "spaghetti_kl_alive",  # the same input gives the same bytes
}
TICK_STYLE = {"labelsize": 6.5, "major.size": 2.5, "major.width": 0.6, "major.pad": 2}
STYLE |= {f"{axis}tick.{key}": size for axis in "xy" for key, size in TICK_STYLE.items()}
LEGEND_STYLE: dict[str, Any] = {"loc": "upper left", "frameon": False, "borderaxespad": 0, "borderpad": 0}
LEGEND_STYLE |= {"labelspacing": 0.35, "columnspacing": 1.2, "handlelength": 1.8, "handletextpad": 0.5}
TITLE_STYLE: dict[str, Any] = {"size": 8, "weight": "bold", "color": INK}
STRONG_STYLE: dict[str, Any] = {"size": 7.2, "weight": "bold", "color": INK}
QUIET_STYLE: dict[str, Any] = {"size": 6, "color": QUIET_COLOUR}
TARGET_STYLE: dict[str, Any] = {"color": INK, "linewidth": 0.8, "linestyle": (0, (4, 2))}
SCALE_STYLE = TARGET_STYLE | {"color": QUIET_COLOUR, "linestyle": (0, (2, 2))}
EOS_STYLE: dict[str, Any] = {"marker": "|", "color": INK, "markersize": 5, "markeredgewidth": 0.8, "linestyle": "none"}
DEATH_STYLE: dict[str, Any] = {"marker": "x", "markersize": 3.4, "markeredgewidth": 0.9, "linestyle": "none"}
MEDIAN_STYLE: dict[str, Any] = {"color": INK, "linewidth": 1.1}
SHARE_STYLE: dict[str, Any] = {"color": INK, "linewidth": 0.8, "marker": "o", "markersize": 1.7, "markeredgewidth": 0}
MAX_VERTICES = 1024  # of a line; a panel is a few hundred pixels wide
# lengths in inches on paper
COLUMN_WIDTH, PAGE_WIDTH, DOSE_HEIGHT = 3.3, 6.8, 2.2
TEXT_LINE, PAGE_MARGIN, LEFT_MARGIN, COLUMN_GAP, TITLE_GAP = 0.145, 0.06, 0.53, 0.11, 0.06
KL_HEIGHT, STRIP_GAP, STRIP_HEIGHT, TICKS_HEIGHT, FACET_GAP = 1.25, 0.07, 0.4, 0.37, 0.1
X_MARGIN = 0.04  # of the token axis, free at both ends
STYLE_LOCK = threading.RLock()  # matplotlib's rcParams belong to the process: one figure at a time


@contextlib.contextmanager
def own_style() -> Iterator[None]:
    """Use this script's rcParams, whatever the user's matplotlibrc, and restore them on exit."""
    with STYLE_LOCK, matplotlib.rc_context():
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


def palette_colours(palette: str | None) -> tuple[Colour, Colour]:
    """The colours of alive and dead, RGB in [0, 1]. Raises UsageError for a palette that seaborn does not know."""
    if palette is None:
        return to_rgb(ALIVE_COLOUR), to_rgb(DEAD_COLOUR)
    try:
        with warnings.catch_warnings():  # what seaborn imports sets filters of its own
            import seaborn
    except ImportError as error:
        raise SweepError(f"--palette: {error}\nInstall it: {sys.executable} -m pip install seaborn") from None
    try:
        alive, dead = seaborn.color_palette(palette, 2)
    except Exception:  # a palette's name is a small language of its own, and its errors are of many kinds
        known = "deep, muted, colorblind, Set2, Dark2 or husl"
        raise UsageError(f"--palette {palette!r} is not a seaborn palette; try {known}") from None
    return to_rgb(alive), to_rgb(dead)


def death_style(dead_colour: Colour) -> dict[str, Any]:
    """A cross darker than the lines of the dead, to stand out from them."""
    return DEATH_STYLE | {"color": [c / 2 for c in dead_colour]}


# -------------------------------------------------------- draw: words, before they are text on axes
def target_text(kl: KlSummary) -> str:
    """A panel's KL against its target in nats: "KL 1.7 < 4", with as many digits as the printed numbers need for that.

    Where the cells' targets differ, or no rounding agrees with the sign, the share of tokens above: "7.1% over 1, 2".
    """
    share = f"{100 * kl.over_target:.3g}% over {join_first((significant(target, 3) for target in kl.targets), 3)}"
    if len(kl.targets) != 1:
        return share
    for digits in (2, 3, 4, 5, 6):
        ours, target = float(f"{kl.p95:.{digits}g}"), float(f"{kl.targets[0]:.{max(4, digits)}g}")
        agrees = {"<": ours < target, ">": ours > target, "≈": ours != target or digits == 6}
        if agrees[kl.sign]:
            return f"KL {significant(ours, 6)} {kl.sign} {significant(target, 6)}"
    return share


def title_lines(panel: Panel, args: Args, top: float = math.inf) -> list[tuple[str, str]]:
    """The words over a panel whose KL axis ends at `top`, in lines of two columns.

    Strength and deaths; size and what became of them; KL against its target; what the dashed line is worth.
    """
    if not panel.rollouts:
        return [(f"α = {panel.alpha_text}", ""), ("n = 0", "")]
    all_unmeasured = panel.n_unmeasured == panel.n
    censored = [r.eos for r in panel.rollouts if r.fate.end == "censored"]
    fates = {
        "not measured": 0 if all_unmeasured else panel.n_unmeasured,
        "recovered": panel.n_recovered,
        "at the end": panel.counts["died_last"],
        "EOS": sum(censored),
        "cut": len(censored) - sum(censored),
    }
    kl_text = "KL not measured" if math.isnan(panel.kl.p95) else target_text(panel.kl)
    n_no_line = panel.n - len(panel.with_line)
    off_scale = [significant(level, 3) for level in reference_levels(panel, args) if level > top]
    unit = f"1 = {significant(panel.kl.scale, 2)} nats" if args.normalize_kl and panel.with_line else ""
    if off_scale:
        unit = f"{unit or 'target ' + join_first(off_scale, 2)}: off-scale"
    last_line = (f"{n_no_line} not drawn" if 0 < n_no_line < panel.n else "", unit)
    return [
        (f"α = {panel.alpha_text}", "not measured" if all_unmeasured else f"{panel.n_deaths} died"),
        (f"n = {panel.n}", next((f"{count} {what}" for what, count in fates.items() if count), "")),
        (kl_text if panel.alpha else "unsteered", ""),
    ] + ([last_line] if any(last_line) else [])


def reference_levels(panel: Panel, args: Args) -> list[float]:
    """Heights of the dashed lines."""
    return ([1.0] if panel.with_line else []) if args.normalize_kl else panel.kl.targets


def badge_of(panel: Panel) -> Literal["", "filled", "hollow"]:
    """How the deaths stand out: hollow where more than half of the dead recovered."""
    return "" if not panel.n_deaths else "hollow" if 2 * panel.n_recovered > panel.n_deaths else "filled"


def empty_reason(panel: Panel, args: Args, top: float) -> str:
    """In words, why a panel shows no line; "" if it shows one."""
    lines = [r.line for r in panel.with_line]
    largest = panel.kl.largest
    reasons = {
        "no rollouts\nat this α": not panel.rollouts,
        "no KL measured": math.isnan(panel.kl.p95),
        f"KL above\n{MAX_KL:g} nats": math.isinf(largest),
        "KL = 0": not lines and largest == 0,
        f"KL at most\n{significant(largest, 2)} nats": not lines and (panel.alpha == 0 or largest <= MIN_SCALE),
        f"no KL in the first\n{plural(args.calib_tokens, 'token')}: no scale": not lines,
        "rollouts of 1 token": all(len(line) < 2 for line in lines),
        "all lines are\nabove the axis": all(np.nanmin(line) > top for line in lines),
        "all KL is below 0": all(np.nanmax(line) < 0 for line in lines),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def short_names(names: Iterable[str]) -> dict[str, str]:
    """The last part of each path-like name, or the whole names where two would read alike.

    Letters that the figure's font lacks are spelled out: drawn as boxes, different names would look the same.
    """
    letters = get_font(findfont(FONT)).get_charmap()
    whole = {name: "".join(c if ord(c) in letters else f"<U+{ord(c):04X}>" for c in name) for name in names}
    last = {name: text.rstrip("/").rpartition("/")[2] or text for name, text in whole.items()}
    return last if len({*last.values()}) == len(last) else whole


def names_text(cells: Sequence[Cell], kind: Literal["model", "method"]) -> str:
    """The models or methods of the cells: "mean_diff", "2 methods pooled: mean_diff, pca"."""
    names = short_names(dict.fromkeys(getattr(cell, kind) for cell in cells))
    return (f"{len(names)} {kind}s pooled: " if len(names) > 1 else "") + join_first(names.values(), 4)


def page_title(sweep: Sweep) -> str:
    model = names_text(sweep.cells, "model") if len({cell.model for cell in sweep.cells}) == 1 else ""
    change = "orange" if sweep.args.palette is None else "the colour changes"
    what = f"KL(steered\u00a0||\u00a0base) per token; {change} once the model can no longer answer"
    return f"{model}: {what}" if model else what


def quiet_line(sweep: Sweep) -> str:
    """What holds for all panels."""
    args, cells = sweep.args, sweep.cells
    is_smoothed = args.roll > 1 and any(r.n_kl >= args.roll or args.edges == "shrink" for r in sweep.rollouts)
    mean = f"mean of {args.roll} tokens, " + ("ends padded" if args.edges == "pad" else "fewer at the ends")
    many_models = len({cell.model for cell in cells}) > 1
    parts = [
        names_text(cells, "model") if many_models and args.rows not in ("model", "cell") else "",
        names_text(cells, "method") if args.rows not in ("method", "cell") else "",
        f"window {sweep.window} tokens",
        mean if is_smoothed else "not smoothed",
        f"alive while {args.metric}\u00a0≥\u00a0{args.threshold:g}",
    ]
    return "\u00a0· ".join(part for part in parts if part)


def facet_titles(sweep: Sweep) -> dict[str, str]:
    """What stands over each row of panels; also, whether it only repeats the steered rollouts of an earlier row."""
    titles: dict[str, str] = {}
    earlier: list[tuple[str, set[Any]]] = []
    for facet, name in short_names(sweep.facets).items():
        titles[facet] = title = f"seed {name}" if sweep.args.rows == "seed" else name
        steered = {r.identity for panel in sweep.facets[facet] if panel.alpha for r in panel.rollouts}
        original = next((row for row in earlier if steered and None not in steered and steered <= row[1]), None)
        if original:
            part = "" if steered == original[1] else "some of "
            titles[facet] += f": {part}the rollouts of {original[0]} again"
        earlier.append((title, steered))
    return titles


def target_label(cells: Sequence[Cell]) -> str:
    """What the dashed target is: "target: α² · 1 nat"."""
    budgets = {significant(cell.target_kl, 3) for cell in cells}
    budget = budgets.pop() if len(budgets) == 1 else ""
    return f"target: α² · {budget} nat{'' if budget == '1' else 's'}" if budget else "target: α² · budget"


# ----------------------------------------------------------------------- draw: the page, in numbers
def text_width(text: str, size: float = 7, weight: str = "normal", **_: Any) -> float:
    """The width of a line of text in inches."""
    font = FontProperties(family=FONT, size=size, weight=weight)
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] / 72


def wrapped(text: str, width: float, style: Mapping[str, Any]) -> list[str]:
    """The text in lines no wider than so many inches, as even as they can be."""

    def lines_of(letters: int) -> list[str]:
        return textwrap.wrap(text, max(1, letters), break_on_hyphens=False) or [""]

    letters = len(text)
    while letters > 1 and 1.05 * max(text_width(line, **style) for line in lines_of(letters)) > width:  # hinting widens
        letters = min(letters - 1, int(letters * 0.97))
    while letters > 1 and len(lines_of(letters - 1)) == len(lines_of(letters)):
        letters -= 1
    return lines_of(letters)


class View(NamedTuple):
    """The axes that panels share."""

    longest: int  # tokens
    token_ticks: list[int]
    bottom: float  # KL; slightly below zero, so that a mark at zero is whole
    top: float  # KL
    n_title_lines: int


def view_of(panels: Sequence[Panel], args: Args) -> View:
    """Axes that fit these panels. KL ends at 1.4 times the 99th percentile of what is drawn, without the control."""
    steered = [panel for panel in panels if panel.alpha] or panels
    p99 = p99_of_lines(steered)
    top = 1.1 if math.isnan(p99) else max(1e-3, 1.4 * p99)
    if args.kl_log and not args.normalize_kl:
        top = max([top, *(1.3 * target for panel in panels for target in panel.kl.targets)])
    longest = max([20, *(len(r.kl) for panel in panels for r in panel.rollouts)])
    n_ticks = 3 if longest < 1000 else 2  # as many as have room in the narrowest panel
    ticks = MaxNLocator(n_ticks, steps=[1, 2, 2.5, 5, 10], integer=True).tick_values(0, longest)
    bottom = -0.03 * (min(0.1, top) if args.kl_log else top)
    n_title_lines = max(len(title_lines(panel, args, top)) for panel in panels)
    return View(longest, [int(tick) for tick in ticks if tick <= longest], bottom, top, n_title_lines)


def columns_of(sweep: Sweep, view: View) -> tuple[int, float]:
    """How many panels stand side by side, and how many inches wide each is, for the words over it to have room."""
    args, n_alphas = sweep.args, len({panel.alpha for panel in sweep.panels})
    balanced = n_alphas if n_alphas <= 6 else min((6, 5, 4, 3), key=lambda columns: -n_alphas % columns)
    n_columns = n_alphas if args.rows else min(n_alphas, args.ncols or balanced)
    paper, n_abreast = (COLUMN_WIDTH, n_columns) if n_columns <= 2 else (PAGE_WIDTH, max(4, n_columns))
    panel_width = (paper - LEFT_MARGIN - PAGE_MARGIN + COLUMN_GAP) / n_abreast - COLUMN_GAP
    for panel in sweep.panels:
        for i, (left, right) in enumerate(title_lines(panel, args, view.top)):
            left_style, right_style = title_styles(panel, i, to_rgb(DEAD_COLOUR))
            both = text_width(left, **left_style) + text_width(right, **right_style)
            panel_width = max(panel_width, both + TITLE_GAP * (1 + ("bbox" in right_style)))
    return n_columns, panel_width


def check_size(width: float, height: float, args: Args) -> None:
    """Raise SweepError where a page of so many inches is larger than its file format holds."""
    pixels = math.ceil(width * args.dpi), math.ceil(height * args.dpi)
    is_large_png = "png" in args.formats and (max(pixels) >= 2**16 or math.prod(pixels) > 4e8)
    if is_large_png or ("pdf" in args.formats and max(width, height) > 200):
        size = f"{pixels[0]} x {pixels[1]} pixels, {width:.0f} x {height:.0f} inches"
        png_limit = "a PNG may have here (65535 pixels a side, 400 million in all)"
        limit = png_limit if is_large_png else "a PDF page can hold (200 inches a side)"
        fewer = "fewer cells (--model-contains)" if args.rows else "another --ncols"
        ways = f"fewer --alphas, {fewer} or {'a lower --dpi' if is_large_png else '--no-survival'}"
        raise SweepError(f"the figure would be {size}, more than {limit}\nUse {ways}.")


def legend_handles(sweep: Sweep) -> dict[str, Any]:
    """What the legend shows, by its words; what belongs together in one entry."""
    args = sweep.args
    alive_colour, dead_colour = palette_colours(args.palette)
    cross, reference = death_style(dead_colour), SCALE_STYLE if args.normalize_kl else TARGET_STYLE
    dead = cross | {"color": dead_colour, "markeredgecolor": cross["color"], "linestyle": "-", "linewidth": 1.8}
    handles: dict[str, Any] = {
        "alive": {"color": alive_colour, "linewidth": 1.8},
        "dead, from the cross on": dead,
        "ended by itself (EOS)": EOS_STYLE,
        "median (dotted: < half left)": MEDIAN_STYLE,
        f"own p95 (first {args.calib_tokens} tokens)" if args.normalize_kl else target_label(sweep.cells): reference,
    }
    handles = {label: Line2D([], [], **style) for label, style in handles.items()}
    if any(padded_spans(panel, args) for panel in sweep.panels):
        handles["padded ends, unreliable"] = Patch(facecolor=PADDED_COLOUR)
    if args.survival:
        interval = Patch(facecolor=INTERVAL_COLOUR, alpha=0.4)
        handles["share alive, 95% interval"] = (interval, Line2D([], [], **SHARE_STYLE))
    return handles


def blank_figure(sweep: Sweep, view: View) -> tuple[Figure, GridSpec, list[list[str]]]:
    """The page with its title, quiet line and legend; the grid for its panels; the lines over each row of panels."""
    args = sweep.args
    n_columns, panel_width = columns_of(sweep, view)
    width = LEFT_MARGIN + n_columns * (panel_width + COLUMN_GAP) - COLUMN_GAP + PAGE_MARGIN
    room, quiet_style = width - 2 * PAGE_MARGIN, QUIET_STYLE | {"size": 6.5}
    head = [(line, 1.25, TITLE_STYLE) for line in wrapped(page_title(sweep), room, TITLE_STYLE)]
    head += [(line, 1.0, quiet_style) for line in wrapped(quiet_line(sweep), room, quiet_style)]
    handles, legend_columns = legend_handles(sweep), max(1, int(width / 1.62))
    n_lines = sum(spacing for _, spacing, _ in head) + 0.95 * -(-len(handles) // legend_columns)
    texts = facet_titles(sweep).values() if args.rows else [""] * -(-len(sweep.panels) // n_columns)
    titles = [wrapped(text, room, TITLE_STYLE) if text else [] for text in texts]
    below = [STRIP_GAP, STRIP_HEIGHT, TICKS_HEIGHT] if args.survival else [0, 0, TICKS_HEIGHT - TEXT_LINE]
    row_heights: list[float] = []  # for each row of panels its titles, KL, gap, strip, tick labels
    for lines in titles:
        row_heights += [FACET_GAP + (view.n_title_lines + 0.2 + 1.15 * len(lines)) * TEXT_LINE, KL_HEIGHT, *below]
    height = 2 * PAGE_MARGIN + n_lines * TEXT_LINE + sum(row_heights)
    check_size(width, height, args)
    figure = SelfShowingFigure(figsize=(width, height), dpi=args.dpi)
    y = height - PAGE_MARGIN
    for line, spacing, style in head:
        y -= spacing * TEXT_LINE
        figure.text(PAGE_MARGIN, y + 0.25 * TEXT_LINE, line, transform=figure.dpi_scale_trans, **style)
    corner = (PAGE_MARGIN / width, (y - 0.3 * TEXT_LINE) / height)
    figure.legend([*handles.values()], [*handles], bbox_to_anchor=corner, ncols=legend_columns, **LEGEND_STYLE)
    sides = {"left": LEFT_MARGIN / width, "right": 1 - PAGE_MARGIN / width, "top": sum(row_heights) / height}
    gaps = {"bottom": 0, "hspace": 0, "wspace": COLUMN_GAP / panel_width}
    grid = figure.add_gridspec(len(row_heights), n_columns, height_ratios=row_heights, **sides, **gaps)
    return figure, grid, titles


# ---------------------------------------------------------------------------------- draw: one panel
def drawing_order(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The rollouts, each fate spread evenly, so that overlapping lines show the true share of each colour."""
    size, seen = Counter(r.fate.end for r in rollouts), Counter[str]()
    places = []
    for i, r in enumerate(rollouts):
        places.append(((seen[r.fate.end] + 0.5) / size[r.fate.end], i))
        seen[r.fate.end] += 1
    return [rollouts[i] for _, i in sorted(places)]


def decimated(first: int, line: np.ndarray) -> np.ndarray:
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


def padded_spans(panel: Panel, args: Args) -> list[tuple[int, int]]:
    """From and to which token the rolling mean of the longest rollout holds repeated values, at both ends."""
    smoothed = [(r.n_tokens, r.n_kl) for r in panel.with_line if r.n_kl >= args.roll]
    if args.edges != "pad" or args.roll == 1 or not smoothed:
        return []
    end, n_kl = max(smoothed)
    spans = [(0, min(args.roll // 2, end)), (max(0, n_kl - args.roll // 2), end)]
    return [(start, stop) for start, stop in spans if start < stop]


def title_styles(panel: Panel, line: int, dead_colour: Colour) -> tuple[dict[str, Any], dict[str, Any]]:
    """How the two columns of a title line look: deaths are a badge, a clear excess over the target is bold."""
    left = STRONG_STYLE if line == 0 or (line == 2 and panel.kl.verdict == "over") else QUIET_STYLE
    badge = badge_of(panel) if line == 0 else ""
    if not badge:
        return left, QUIET_STYLE
    on_dead = INK if np.dot(dead_colour, (0.3, 0.6, 0.1)) > 0.45 else "white"
    face, ink = (dead_colour, on_dead) if badge == "filled" else ("white", INK)
    box = {"boxstyle": "square,pad=0.2", "facecolor": face, "edgecolor": dead_colour, "linewidth": 1}
    return left, STRONG_STYLE | {"color": ink, "bbox": box}


def draw_title(ax: Axes, panel: Panel, args: Args, view: View) -> None:
    """The words over a panel."""
    _, dead_colour = palette_colours(args.palette)
    for i, (left, right) in enumerate(title_lines(panel, args, view.top)):
        left_style, right_style = title_styles(panel, i, dead_colour)
        y, inset = 72 * TEXT_LINE * (view.n_title_lines - 0.6 - i), -1.8 if "bbox" in right_style else 0
        ax.annotate(left, (0, 1), (0, y), "axes fraction", "offset points", **left_style)
        ax.annotate(right, (1, 1), (inset, y), "axes fraction", "offset points", ha="right", **right_style)


def draw_lines(ax: Axes, lines: Sequence[tuple[Rollout, np.ndarray]], args: Args, opacity: float) -> None:
    """Each rollout as an alive and a dead polyline; over them their median, dotted where fewer than half are left."""
    alive_colour, dead_colour = palette_colours(args.palette)
    polylines, colours = [], []
    for r, line in lines:
        death = len(line) if r.fate.death is None else r.fate.death
        before = to_rgb(UNMEASURED_COLOUR) if r.fate.followed_to is None else alive_colour
        for start, stop, colour in ((0, death + 1 if death else 0, before), (death, len(line), dead_colour)):
            if start < min(stop, len(line)):  # the two share the vertex of death
                polylines.append(decimated(start, line[start:stop]))
                colours.append(colour)
    style: dict[str, Any] = {"linewidths": args.line_lw, "alpha": opacity, "zorder": 2}
    collection = LineCollection(polylines, colors=colours, joinstyle="bevel", **style)  # round joins cost a third
    ax.add_collection(collection, autolim=False)
    if len(lines) >= 3:
        median, n_lines = median_line([line for _, line in lines])
        few = 2 * n_lines < len(lines)
        for hidden, dash in ((few, "-"), (~few, ":")):
            ax.plot(np.where(hidden, np.nan, median), linestyle=dash, zorder=4, **MEDIAN_STYLE)


def draw_marks(ax: Axes, lines: Sequence[tuple[Rollout, np.ndarray]], args: Args) -> None:
    """A cross where a rollout died, a tick where it reached EOS; the more of them, the smaller and fainter."""
    _, dead_colour = palette_colours(args.palette)
    eos = [(line, len(line) - 1) for r, line in lines if r.eos]
    deaths = [(line, min(r.fate.death, len(line) - 1)) for r, line in lines if r.fate.death is not None]
    shrink = min(1.0, math.sqrt(32 / max(1, len(eos) + len(deaths))))
    lowest, highest = (ax.transAxes - ax.transData).transform([(0, 0.03), (0, 0.97)])[:, 1]
    for points, style in ((eos, EOS_STYLE), (deaths, death_style(dead_colour))):
        finite = [np.flatnonzero(np.isfinite(line)) for line, _ in points]  # inside a gap, at the nearest value
        y = [line[k[np.abs(k - t).argmin()]] for (line, t), k in zip(points, finite, strict=True)]
        look = style | {"markersize": style["markersize"] * max(0.4, shrink), "alpha": max(0.3, shrink)}
        ax.plot([t for _, t in points], np.clip(y, lowest, highest), zorder=5, **look)


def draw_panel(ax: Axes, panel: Panel, args: Args, view: View | None = None) -> None:
    """Draw one panel's KL into axes: lines, median, marks, dashed reference, and the words above.

    `view`: the axes that it shares with other panels; by default those that fit this panel. For a figure of your own:

        figure, (ax, strip) = plt.subplots(2, gridspec_kw={"height_ratios": (3, 1), "top": 0.75})
        draw_panel(ax, sweep.panels[3], sweep.args)
        draw_strip(strip, sweep.panels[3], sweep.args)
    """
    with own_style():
        view = view or view_of([panel], args)
        ax.set_xlim(-X_MARGIN * view.longest, (1 + X_MARGIN) * view.longest)
        ax.set_xticks(view.token_ticks, [str(token) for token in view.token_ticks])
        decades = [0.0, *(10.0**k for k in range(-1, 40) if 10.0**k <= view.top)]
        if args.kl_log:
            ax.set_yscale("symlog", linthresh=0.1)
        is_wide = args.kl_log and len(decades) > 1
        ax.yaxis.set_major_locator(FixedLocator(decades) if is_wide else MaxNLocator(5, steps=[1, 2, 5, 10]))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(lambda kl, _: f"{kl:g}")
        ax.set_ylim(view.bottom, view.top)
        draw_title(ax, panel, args, view)
        if panel.with_line:
            for start, stop in padded_spans(panel, args):
                ax.axvspan(start, stop, color=PADDED_COLOUR, linewidth=0, zorder=0.5)
            lines = [(r, r.line) for r in drawing_order(panel.with_line)]
            draw_lines(ax, lines, args, args.line_alpha or min(0.8, max(0.02, 16 / panel.n)))
            draw_marks(ax, lines, args)
        for level in reference_levels(panel, args):
            if level <= view.top:
                ax.axhline(level, zorder=3.5, **(SCALE_STYLE if args.normalize_kl else TARGET_STYLE))
        reason = empty_reason(panel, args, view.top)
        centred: dict[str, Any] = {"ha": "center", "va": "center", "style": "italic", "zorder": 6}
        ax.text(0.5, 0.5, reason, transform=ax.transAxes, **centred, **QUIET_STYLE)


def draw_strip(ax: Axes, panel: Panel, args: Args, view: View | None = None) -> None:
    """Draw the share alive into axes: light colours below and above it, its interval, a dot at each fork, at risk.

    Between two forks the interval runs from the next one's lower limit to the previous one's upper limit, as death is
    seen only at forks. Interval and numbers at risk as KMunicate asks: Morris et al. (2019), BMJ Open 9:e030215.
    """
    with own_style():
        view = view or view_of([panel], args)
        alive_colour, dead_colour = palette_colours(args.palette)
        curve = panel.survival
        last = curve.forks.max(initial=-1)
        n_at_risk = count_at_risk(curve.followed_to, view.token_ticks)
        labels = [f"{t}\n{k if t <= last else '–'}" for t, k in zip(view.token_ticks, n_at_risk, strict=True)]
        ax.set(ylim=(-0.2, 1.12), yticks=[0, 1])
        ax.set_xlim(-X_MARGIN * view.longest, (1 + X_MARGIN) * view.longest)
        ax.set_xticks(view.token_ticks, labels)
        if len(curve.forks):
            t, s = np.r_[0, curve.forks], np.r_[1, curve.s]
            low, high = np.r_[curve.low, curve.low[-1:]], np.r_[1, curve.high]
            areas: list[tuple[Any, Any, Any, float]] = [(0, s, alive_colour, 0.28), (s, 1, dead_colour, 0.28)]
            for below, above, colour, opacity in [*areas, (low, high, INTERVAL_COLOUR, 0.4)]:
                ax.fill_between(t, below, above, step="post", color=colour, alpha=opacity, linewidth=0)
            steps: dict[str, Any] = {"drawstyle": "steps-post", "markevery": slice(1, None), "clip_on": False}
            ax.plot(t, s, zorder=3, **steps, **SHARE_STYLE)


def draw_row_labels(ax: Axes, strip: Axes, args: Args, view: View, titles: Sequence[str]) -> None:
    """What stands left of a row of panels, and over it; `strip` are its lowest axes."""
    left = ScaledTranslation(0.14 - LEFT_MARGIN, 0, ax.figure.dpi_scale_trans)
    labels = [(ax, "KL / own p95" if args.normalize_kl else "KL (nats)")] + [(strip, "alive")] * args.survival
    for axes, label in labels:
        axes.set_ylabel(label)
        axes.yaxis.set_label_coords(0, 0.5, transform=axes.transAxes + left)
    at_left = -72 * (LEFT_MARGIN - PAGE_MARGIN)
    style: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    words = "token\nat risk" if args.survival else "token"
    strip.annotate(words, (0, 0), (-9, -4.6), ha="right", va="top", size=6.5, **style)
    y = 72 * TEXT_LINE * (view.n_title_lines - 2.6)
    ax.annotate("vs target", (0, 1), (at_left, y), **style, **QUIET_STYLE)
    for i, line in enumerate(reversed(titles)):
        y = 72 * TEXT_LINE * (view.n_title_lines + 0.6 + 1.15 * i)
        ax.annotate(line, (0, 1), (at_left, y), **style, **STRONG_STYLE | {"size": 8})


def draw(sweep: Sweep) -> Figure:
    """The figure of a sweep, as large as on paper. Raises SweepError where that is more than its file formats hold."""
    args = sweep.args
    with own_style():
        view = view_of(sweep.panels, args)
        figure, grid, titles = blank_figure(sweep, view)
        for k, panel in track([*enumerate(sweep.panels)], "drawing panel"):
            row, column = divmod(k, grid.ncols)
            ax = strip = figure.add_subplot(grid[5 * row + 1, column])
            draw_panel(ax, panel, args, view)
            if args.survival:
                strip = figure.add_subplot(grid[5 * row + 3, column])
                draw_strip(strip, panel, args, view)
            ax.tick_params(labelleft=column == 0, labelbottom=not args.survival)
            strip.tick_params(labelleft=column == 0)
            first, *_, last = strip.get_xticklabels()  # the outermost lean inwards
            first.set_horizontalalignment("left" if panel.n > 99 else "center")
            last.set_horizontalalignment("right" if view.token_ticks[-1] > 0.9 * view.longest else "center")
            if column == 0:
                draw_row_labels(ax, strip, args, view, titles[row])
    return figure


# ------------------------------------------------------------------------------- draw: the overview
def draw_dose(sweep: Sweep) -> Figure:
    """The overview: KL against alpha, share alive at the end against alpha and against KL; a line per row of panels."""
    if not sweep.has_dose:
        raise SweepError(f"{sweep.name}: the overview needs at least two steered alphas")
    args, titles = sweep.args, facet_titles(sweep)
    many = len(titles) > len(FACET_MARKERS)
    kinds = f"{args.rows}, {len(titles)} of them" if many else args.rows
    models = {cell.model for cell in sweep.cells}
    subject = names_text(sweep.cells, "model") if len(models) == 1 else f"{len(models)} models"
    words = f"{subject}: how much steering before it breaks{f', by {kinds}' if args.rows else ''}"
    with own_style():
        looks = facet_looks([*titles], args)
        shown = {titles[facet]: look for facet, look in looks.items()} if args.rows and not many else {}
        shown |= {f"one {args.rows}": next(iter(looks.values()))} if many else {}
        labels = ["\n".join(wrapped(label, PAGE_WIDTH - 0.8, {})) for label in shown] + [target_label(sweep.cells)]
        handles = [Line2D([], [], **look) for look in [*shown.values(), TARGET_STYLE]]
        widest = max(text_width(line) for label in labels for line in label.split("\n")) + 0.42
        n_columns = max(1, min(len(labels), int((PAGE_WIDTH - 2 * PAGE_MARGIN) / widest)))
        title = wrapped(words, PAGE_WIDTH - 2 * PAGE_MARGIN, TITLE_STYLE)
        legend_lines = sum(label.count("\n") for label in labels) + -(-len(labels) // n_columns)
        height = DOSE_HEIGHT + TEXT_LINE * (legend_lines - 1 + 1.25 * (len(title) - 1))
        figure = SelfShowingFigure(figsize=(PAGE_WIDTH, height), dpi=args.dpi)
        for i, line in enumerate(title):
            y = height - PAGE_MARGIN - (1 + 1.25 * i) * TEXT_LINE
            figure.text(PAGE_MARGIN, y, line, transform=figure.dpi_scale_trans, **TITLE_STYLE)
        corner = (PAGE_MARGIN / PAGE_WIDTH, 1 - (PAGE_MARGIN + 1.35 * len(title) * TEXT_LINE) / height)
        figure.legend(handles, labels, bbox_to_anchor=corner, ncols=n_columns, **LEGEND_STYLE)
        sides = {"left": 0.64 / PAGE_WIDTH, "right": 1 - 0.2 / PAGE_WIDTH, "wspace": 0.3}
        axes = figure.subplots(1, 3, gridspec_kw=sides | {"bottom": 0.36 / height, "top": 1.5 / height})
        draw_dose_lines(axes, sweep.facets, looks)
    return figure


def facet_looks(facets: Sequence[str], args: Args) -> dict[str, dict[str, Any]]:
    """Colour and marker of each facet, in none of the colours of alive and dead; many are thin and grey."""
    if len(facets) > len(FACET_MARKERS):
        return {facet: {"color": QUIET_COLOUR, "linewidth": 0.5, "alpha": 0.7} for facet in facets}
    taken = np.array(palette_colours(args.palette))
    free = [colour for colour in FACET_COLOURS if np.abs(taken - to_rgb(colour)).sum(axis=1).min() > 0.3]
    style: dict[str, Any] = {"linewidth": 1.1, "markersize": 4, "markeredgewidth": 0.5, "markeredgecolor": "white"}
    each = zip(facets, [*free, *FACET_COLOURS], FACET_MARKERS, strict=False)
    return {facet: style | {"color": colour, "marker": marker} for facet, colour, marker in each}


def draw_dose_lines(axes: Sequence[Axes], facets: Mapping[str, list[Panel]], looks: Mapping[str, Any]) -> None:
    """The three axes of the overview. Alphas of different sign are not joined where there is no KL between them."""
    kl_ax, alive_ax, tradeoff_ax = axes
    for i, (facet, panels) in enumerate(facets.items()):
        look = looks[facet]
        shift = (i - (len(looks) - 1) / 2) / 30 if "marker" in look else 0  # inches, so that intervals can be seen
        beside = ScaledTranslation(shift, 0, kl_ax.figure.dpi_scale_trans)
        bars: dict[str, Any] = {"color": look["color"], "linewidth": 0.8, "alpha": 0.6, "zorder": 2}
        for sign in (-1, 1):
            measured = np.array([(p.alpha, *p.s_end) for p in panels if p.s_end and p.alpha * sign > 0])
            alpha, share, low, high = measured.reshape(-1, 4).T
            alive_ax.plot(alpha, share, transform=alive_ax.transData + beside, zorder=3, **look)
            if "marker" in look:
                alive_ax.vlines(alpha, low, high, transform=alive_ax.transData + beside, **bars)
            steered = [p for p in panels if p.alpha * sign > 0 and p.has_log_kl]
            kl_ax.plot([p.alpha for p in steered], [p.kl.p95 for p in steered], zorder=3, **look)
            points = [(p.kl.p95, p.s_end[0]) for p in steered if p.s_end]
            tradeoff_ax.plot(*np.reshape(points, (-1, 2)).T, clip_on=False, zorder=3, **look)
            sizes = [abs(p.alpha) for p in steered]
            for target_kl in {r.cell.target_kl for p in steered for r in p.rollouts}:
                between = np.geomspace(min(sizes), max(sizes), 50).tolist()
                targets = [float32(alpha * alpha * target_kl) for alpha in between]
                kl_ax.plot([sign * alpha for alpha in between], targets, zorder=2, **TARGET_STYLE)
    alphas = [panel.alpha for panels in facets.values() for panel in panels if panel.alpha]
    room = 0.1 * (max(alphas) - min(alphas))
    for ax in (kl_ax, alive_ax):
        ax.set(xlabel="steering strength α", xlim=(min(alphas) - room, max(alphas) + room))
        ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        ax.xaxis.set_major_formatter(lambda alpha, _: f"{alpha:g}")
    kl_ax.set(ylabel="p95 of KL (nats)")
    tradeoff_ax.set(xlabel="p95 of KL (nats)")
    if any(p.has_log_kl for panels in facets.values() for p in panels if p.alpha):
        kl_ax.set_yscale("log")
        tradeoff_ax.set_xscale("log")
        for axis in (kl_ax.yaxis, tradeoff_ax.xaxis):
            axis.set_major_locator(FixedLocator(log_ticks(*axis.get_view_interval())))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(lambda kl, _: f"{kl:g}")
    for ax in (alive_ax, tradeoff_ax):
        ax.set(ylabel="share that never died", ylim=(-0.1, 1.1))
        ax.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
        ax.axhline(0.5, color=QUIET_COLOUR, linewidth=0.5, linestyle=":", zorder=1)
    has_bars = len(facets) <= len(FACET_MARKERS)
    titles = ("KL against its target", f"Survival{', 95% interval' * has_bars}", "Survival at equal KL")
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title, loc="left", size=7, weight="bold", pad=4)


def log_ticks(low: float, high: float) -> list[float]:
    """Two to four round numbers on a logarithmic axis; its middle where there is no round one."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), np.arange(1, 10, 0.1)):
        ticks = [round(step * 10.0**k, 12) for k in decades for step in steps if low <= step * 10.0**k <= high]
        if len(ticks) >= 3:
            break
    most = 4 if all(len(f"{tick:g}") <= 5 for tick in ticks) else 2  # as many as have room side by side
    return ticks[:: -(-len(ticks) // most)] if ticks else [float(f"{math.sqrt(low * high):.4g}")]


# -------------------------------------------------------------------------------------------- write

EXPLANATIONS = {
    "How much steering does it take?": """\
Of the alphas above 0, ascending: `holds_at` is the last one before the share alive at the end, `S_end`, first falls
below 0.5, `breaks_at` the first one at which it has; each with its `kl_p95` in nats, and `S_end` with its 95% interval.
"–": it falls at the first alpha, or at none. `died_within_budget`: how many died of the rollouts whose own 95th
percentile of KL, up to their death, is at most the budget `target_kl`; `died_above_budget`: of the others. Rollouts
without any measured KL or pmass are in neither.""",
    "Is the model still alive?": """\
A rollout is dead from the first fork point at which its pmass is below the threshold. `n` = `n_died` + `n_died_last`
(dead at the fork point after the last token) + `n_censored` (alive at EOS, or where the record ends) + `n_alive` (at
the end of the window). `n_recovered`: dead, but at or above the threshold at the last measured fork point; such deaths
depend on the threshold. `S_end`: Kaplan-Meier share alive at the last measured fork point, token `S_end_at`, with its
95% interval (beta product confidence procedure; the evidence is prompts, not rollouts). EOS counts as censoring that is
independent of death; where many rollouts end early, the lower limit rests on the few still running. `median_survival`:
the fork points between which S reaches 0.5.""",
    "Does the KL follow its target?": """\
In nats, of the recorded KL of all observed tokens of all rollouts. `target`: alpha² · `target_kl`. Only alpha = 1 was
calibrated; KL grows more slowly than alpha² at large alpha, so being below the target there says nothing of safety.
`kl_p95`: 95th percentile; c_star was searched for it to meet the target at alpha = 1, on other prompts. `over_target`:
share of tokens above their own cell's target, 5% where KL meets it, with its 95% interval (delete-one jackknife over
prompts). `kl_median`: median. `scale`: median of the rollouts' scales, what 1 on a normalised axis is worth. `tokens`:
mean observed tokens of a rollout; KL falls along a rollout, so percentiles of rollouts of different length do not
compare. `no_scale`: rollouts without a scale; they have no normalised line, but count in everything else.""",
    "How much hangs on the threshold?": """\
Deaths (`n_died` + `n_died_last`) at the threshold, and at 0.05 and 0.1 below and above it.""",
}


def interval_text(limits: Sequence[float] | None, number: str) -> str:
    """Limits of an interval, each formatted like `number`: "[0.098, 0.467]"."""
    return f"[{', '.join(number.format(limit) for limit in limits)}]" if limits else "–"


def share_alive_text(panel: Panel, number: str) -> str:
    """The share alive at the end, with its interval."""
    return f"{number.format(panel.s_end[0])} {interval_text(panel.s_end[1:], number)}" if panel.s_end else "–"


def steering_row(panels: Sequence[Panel]) -> dict[str, str]:
    """How much steering does it take? A facet's row of that table."""
    row = {}
    for name, panel in zip(("holds", "breaks"), bracket_of(panels), strict=True):
        row[f"{name}_at"] = panel.alpha_text if panel else "–"
        row[f"{name}_kl_p95"] = significant(panel.kl.p95, 4) if panel else "–"
        row[f"{name}_S_end"] = share_alive_text(panel, "{:.3f}") if panel else "–"
    counts = deaths_by_budget(panels)
    return row | {f"died_{group}_budget": f"{died} of {size}" for group, (died, size) in counts.items()}


def alive_row(panel: Panel) -> dict[str, str]:
    """Is the model still alive? A panel's row of that table."""
    ends = {f"n_{end}": str(panel.counts[end]) for end in ("died", "censored", "died_last", "alive")}
    curve, s_end = panel.survival, panel.s_end
    return {"n": str(panel.n), **ends, "n_recovered": str(panel.n_recovered)} | {
        "S_end": f"{s_end[0]:.3f}" if s_end else "–",
        "S_end_interval": interval_text(s_end and s_end[1:], "{:.3f}"),
        "S_end_at": str(curve.forks[-1]) if s_end else "–",
        "median_survival": median_survival(curve),
    }


def median_survival(curve: Survival) -> str:
    """The interval between forks in which S reaches 0.5, to rounding: "(304, 512]"."""
    reached = curve.forks[curve.s <= 0.5 + 1e-9]
    before = curve.forks[curve.s > 0.5 + 1e-9]
    if len(reached) == 0:
        return "–"
    if len(before) == 0:
        return f"[0, {reached[0]}]" if reached[0] else "0"
    return f"({before[-1]}, {reached[0]}]"


def kl_row(panel: Panel) -> dict[str, str]:
    """Does the KL follow its target? A panel's row of that table."""
    kl = panel.kl
    interval = kl.interval and [100 * limit for limit in kl.interval]
    return {
        "target": ", ".join(significant(target, 6) for target in kl.targets) or "–",
        "kl_p95": significant(kl.p95, 4),
        "over_target": "–" if math.isnan(kl.over_target) else f"{100 * kl.over_target:.3g}%",
        "over_target_interval": interval_text(interval, "{:.3g}%"),
        "kl_median": significant(kl.median, 4),
        "scale": significant(kl.scale, 4),
        "tokens": "–" if math.isnan(kl.tokens) else f"{kl.tokens:.1f}",
        "no_scale": str(kl.no_scale),
    }


def threshold_row(panel: Panel, threshold: float) -> dict[str, str]:
    """How much hangs on the threshold? A panel's row of that table."""
    levels = [round(threshold + step, 10) for step in (-0.1, -0.05, 0, 0.05, 0.1)]
    lowest = [r.lowest_pmass for r in panel.rollouts]
    return {f"{level:g}": str(sum(pmass < level for pmass in lowest)) for level in levels if 0 < level <= 1}


def caption(sweep: Sweep) -> str:
    """What to paste under the figure: every mark and word on it."""
    args = sweep.args
    smoothed = f"a mean over {args.roll} tokens" if args.roll > 1 else "not smoothed"
    if args.edges == "pad" and args.roll > 1:
        smoothed += " (at the pale ends it repeats the first and the last one)"
    facets, dead = f" and {args.rows}" if args.rows else "", "orange" if args.palette is None else "recoloured"
    own = f"in units of its own 95th percentile over the first {args.calib_tokens} tokens (dashed; what 1 is worth"
    unit = f"{own} stands above each panel)" if args.normalize_kl else "in nats (dashed: the target, α² · budget)"
    strips = """ Below each panel: the Kaplan-Meier share alive at the fork points (dots), its pointwise 95% interval
        (beta product, counted in prompts), and the number of rollouts still at risk."""
    text = f"""KL(steered || base) at each token of n rollouts per steering strength α{facets}. A line is one rollout,
        {smoothed}, {unit}; it is {dead} from the cross on, the first fork point at which {args.metric} was below
        {args.threshold:g}. A tick is EOS, the black line the median of the lines left, dotted where fewer than half
        are. Above each panel: how many rollouts died (hollow box: more than half of them recovered, that is, were at or
        above the threshold at their last fork point; at the end: died after the last token; cut: the record ends
        early), and the 95th percentile of the panel's KL in nats against α² · budget: > or < by whether more than 5% of
        the tokens are above it, bold where that is clear, ≈ where its 95% interval (jackknife over prompts) leaves it
        open.{strips if args.survival else ""}"""
    return " ".join(text.split())


def summary_text(sweep: Sweep) -> str:
    """The markdown summary: four pipe tables with what their columns mean, a caption, and the notes."""
    args = sweep.args
    panel_rows = (alive_row, kl_row, lambda panel: threshold_row(panel, args.threshold))
    tables = [[(facet, steering_row(panels)) for facet, panels in sweep.facets.items()]]
    tables += [[(p.facet, {"alpha": p.alpha_text} | row_of(p)) for p in sweep.panels] for row_of in panel_rows]
    sections = [f"# KL(steered || base) and survival: {sweep.name}"]
    for (title, explanation), rows in zip(EXPLANATIONS.items(), tables, strict=True):
        named = [({args.rows: facet.replace("|", "\\|")} if args.rows else {}) | row for facet, row in rows]
        table = tabulate(named, headers="keys", tablefmt="pipe", disable_numparse=True, stralign="right")
        sections.append(f"## {title}\n\n{table}\n\n{explanation}")
    cells = join_first(f"`{cell.name}` ({cell.description})" for cell in sweep.cells)
    notes = [f"Cells used: {cells}", *sweep.notes, f"Settings: {sweep.settings_text}"]
    sections += [f"## Caption\n\n{caption(sweep)}", "## Notes\n\n" + "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join(sections) + "\n"


def terminal_text(sweep: Sweep) -> str:
    """The first table, narrower, and a line per panel, for a terminal of 80 columns."""
    columns = ("holds_at", "holds_kl_p95", "breaks_at", "breaks_kl_p95", "died_within_budget", "died_above_budget")
    steering = [[sweep.args.rows, "holds_at", "nats", "breaks_at", "nats", "died_within", "died_above"]]
    lines = [[sweep.args.rows, "alpha", "n", "died", "recovered", "S_end", "kl_p95", "target"]]
    for facet, panels in sweep.facets.items():
        row = steering_row(panels)
        steering.append([facet, *(row[column] for column in columns)])
        for p in panels:
            kl = "<1e-8" if 0 < p.kl.p95 < 1e-8 else significant(p.kl.p95, 3)
            targets = ", ".join(significant(target, 3) for target in p.kl.targets) or "–"
            counts = [str(count) for count in (p.n, p.n_deaths, p.n_recovered)]
            lines.append([facet, p.alpha_text, *counts, share_alive_text(p, "{:.2f}"), kl, targets])
    style: dict[str, Any] = {"tablefmt": "plain", "disable_numparse": True, "stralign": "right"}
    tables = ([row[0 if sweep.args.rows else 1 :] for row in rows] for rows in (steering, lines))
    first, second = (tabulate(rows, **style) for rows in tables)
    return f"How much steering does it take?\n{first}\n\n{second}"


def rollouts_csv(sweep: Sweep) -> str:
    """A row per rollout that was read, copies included."""
    alpha_texts = {panel.alpha: panel.alpha_text for panel in sweep.panels}
    rows: list[dict[str, Any]] = []
    for r in sweep.rollouts:
        row = {"cell": r.cell.name, "prompt": r.prompt_index, "alpha": alpha_texts[r.alpha]}
        row |= {"observed_tokens": len(r.kl), "end": r.fate.end, "eos": int(r.eos), "death_token": r.fate.death}
        numbers = {"kl_p95_nats": r.kl_p95, "kl_p95_to_death_nats": r.kl_p95_to_death}
        numbers |= {"lowest_pmass": r.lowest_pmass, "scale_nats": r.scale}
        texts = {name: "" if math.isnan(number) else f"{number:.6g}" for name, number in numbers.items()}
        rows.append(row | {"recovered": int(r.fate.recovered)} | texts | {"copy_of": r.copy_of})
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def out_folder(args: Args) -> Path:
    """The folder to write to, by default named as the sweep's was given: as a link, not as its target."""
    return Path("figs") / f"{name_of(Path(args.runs_root))}_kl_alive" if args.out is None else Path(args.out)


def check_out(out: Path) -> None:
    """Raise SweepError where nothing can be written to the output folder, before any work is done."""
    nearest = next((folder for folder in (out, *out.parents) if os.path.lexists(folder)), Path())
    possible = [out / name for name in (SUMMARY_FILE, ROLLOUTS_FILE, *figure_names(FIGURE_FORMATS))]
    problems = {
        f"{escaped(nearest)} is a link to nothing": not nearest.exists(),
        f"{escaped(nearest)} is a file, not a folder": not nearest.is_dir(),
        f"{escaped(nearest)} cannot be written to (Permission denied)": not os.access(nearest, os.W_OK | os.X_OK),
        **{f"{escaped(path)} is a folder in the place of an output file": path.is_dir() for path in possible},
    }
    problem = next((text for text, holds in problems.items() if holds), "")
    if problem:
        raise SweepError(f"{problem}; choose another --out")


def figure_names(formats: Iterable[str]) -> list[str]:
    return [f"{stem}.{file_format}" for stem in (FIGURE_STEM, DOSE_STEM) for file_format in sorted({*formats})]


def write_files(out: Path, contents: Mapping[str, bytes]) -> None:
    """Write all files, each beside its target, then rename them onto their targets. Raises OSError."""
    out.mkdir(parents=True, exist_ok=True)
    parts = {name: out / f".{name}.{uuid.uuid4().hex}.part" for name in contents}
    try:
        for name, content in contents.items():
            parts[name].write_bytes(content)
        for name, part in parts.items():
            part.replace(out / name)
    finally:
        for part in parts.values():
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def write(sweep: Sweep) -> list[Path]:
    """Draw and write a sweep's figures, tables and rollouts, whole or not at all: their paths. Raises SweepError."""
    args, settings, made_by = sweep.args, sweep.settings_text, f"spaghetti_kl_alive {__version__}"
    out = out_folder(args)
    check_out(out)
    metadata: dict[str, Any] = {
        "png": {"Software": made_by, "Description": settings},
        "pdf": {"Creator": made_by, "Subject": settings, "CreationDate": None},
        "svg": {"Creator": made_by, "Description": settings, "Date": None},
    }
    contents = {SUMMARY_FILE: summary_text(sweep).encode(), ROLLOUTS_FILE: rollouts_csv(sweep).encode()}
    figures = {FIGURE_STEM: draw(sweep)} | ({DOSE_STEM: draw_dose(sweep)} if args.dose and sweep.has_dose else {})
    for name in track([*figure_names(args.formats)], "saving figure"):
        stem, file_format = name.split(".")
        if stem in figures:
            content = io.BytesIO()
            with own_style():
                figures[stem].savefig(content, format=file_format, metadata=metadata[file_format])
            contents[name] = content.getvalue()
    try:
        write_files(out, contents)
    except OSError as error:
        raise SweepError(f"{escaped(out)}: cannot be written ({error.strerror}); choose another --out") from None
    return [out / name for name in contents]


# ------------------------------------------------------------------------------------ the program
def parsed_args(argv: Sequence[str]) -> Args:
    """The flags of a command line. Raises UsageError, or tyro's SystemExit."""
    for flag in ("--alphas", "--formats"):
        values = re.search(rf"{flag}[ =](.*?)(?: --|$)", " ".join(argv))
        if values and "," in values[1]:
            spaced = " ".join(values[1].replace(",", " ").split())
            raise UsageError(f"{flag} takes values separated by spaces: {flag} {spaced}")
    try:
        return tyro.cli(Args, args=argv, description=__doc__, prog="spaghetti_kl_alive")
    except OSError:  # stdout or stderr, where it prints its help or what is wrong, is closed or full
        raise SystemExit(0 if {"-h", "--help"} & {*argv} else 2) from None


def run(argv: Sequence[str]) -> str:
    """Parse, read, log the notes, write; returns what stdout is to hold. Raises SweepError or tyro's SystemExit."""
    if "--version" in argv:
        return f"spaghetti_kl_alive {__version__}"
    args = parsed_args(argv)
    check_args(args)
    check_out(out_folder(args))
    sweep = read(args)
    for note in sweep.notes:
        logger.warning(note)
    names = join_first(cell.name for cell in sweep.cells)
    logger.info(f"{plural(len(sweep.cells), 'cell')}, {plural(len(sweep.rollouts), 'rollout')}: {names}")
    paths = write(sweep)
    for stale in (out_folder(args) / name for name in figure_names(FIGURE_FORMATS)):
        if stale not in paths and stale.exists():
            logger.warning(f"{escaped(stale)} is left over from an earlier run; this run did not write it")
    return f"{terminal_text(sweep)}\n\nwrote {' '.join(map(escaped, paths))}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run from a shell; returns the exit status. Sets what belongs to the process; read, draw and write do not."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115  # it was closed
        setattr(sys, name, stream)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not Unicode
    if argv is None:
        gc.disable()  # in a process that ends soon, collections are a tenth of the time
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    exit_status, message = 0, ""
    try:
        logger.remove()
        logger.add(sys.stderr, format="{level}: {message}")
        text = run(sys.argv[1:] if argv is None else argv)
        with contextlib.suppress(OSError):  # nobody reads stdout, or it is full: the files are written
            print(text)
    except SweepError as error:
        exit_status, message = error.exit_status, str(error)
    except MemoryError:
        ways = "fewer --alphas, fewer cells (--model-contains) or a lower --dpi"
        exit_status, message = 1, f"too little memory\nUse {ways}."
    except OSError as error:
        exit_status, message = 1, f"{error.filename or 'the working folder'}: {error.strerror}"
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
