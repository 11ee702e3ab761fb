"""Does any text of a figure touch another, leave the page, meet a dashed line, or run into the number beside it?

`python tests/tools/layout.py [PROCESSES [EVERY]]` lays out all combinations of COUNTS, WINDOWS, SCALES, ALPHAS, LAYOUTS
and STRIPS, and overviews of OVERVIEW_ALPHAS, FACETS and GROWTHS, prints what is wrong in which, and ends with their
number; EVERY takes only each so-manieth. A figure is drawn once and not saved, from rollouts of which only the longest
is as long as the window.
"""

from __future__ import annotations

import itertools
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(folder) for folder in Path(__file__).parents[1:3]]

import numpy as np
from loguru import logger
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from sweeps import read, write_cell

import spaghetti_kl_alive as ska

SHORT = ("mean_diff", "pca")
LONG = ("runs/2024-11-02_sweep-of-the-residual-stream/layer_17/mean_difference_of_prompts/ckpt-10000", "主成分 ✨ pca")
ALPHAS = (
    (1.0,),
    (0.0, 0.25),
    (-2.0, -1.0, 0.0),
    (-1.0, -0.5, 0.0, 0.5, 1.0),
    (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0),
    (-4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0),
    tuple(k / 4 for k in range(13)),
)
COUNTS = (1, 8, 24, 240, 2000)
WINDOWS = (100, 256, 999, 1000, 4096, 10240)
LAYOUTS: tuple[dict[str, Any], ...] = (
    {},
    {"ncols": 2},
    {"rows": "method", "facets": SHORT},
    {"rows": "method", "facets": LONG},
)
SCALES: tuple[dict[str, Any], ...] = tuple(
    {"kl_log": log, "normalize_kl": own} for log in (False, True) for own in (True, False)
)
STRIPS: tuple[dict[str, Any], ...] = ({}, {"survival": False})
OVERVIEW_ALPHAS = (*ALPHAS[2:], (0.0, 0.01, 0.0125), (0.001, 1000.0), (-64.0, 64.0))
FACETS = tuple(tuple(f"{name}{k}" for k in range(n)) for n in range(1, 13) for name in ("pca", f"{LONG[0]}-"))
GROWTHS = (0.0, 0.1, 2.0, 9.0)  # KL is alpha to this power
DPI = 160  # at which the texts are measured


def sweep_of(
    alphas: Sequence[float], n: int, window: int, facets: Sequence[str] = ("",), growth: float = 1.0, **flags: Any
) -> ska.Sweep:
    """A sweep of n rollouts of every fate per panel, of which one is as long as the window."""
    rng = np.random.default_rng(n)
    lengths = [window, *rng.choice([3, 12, 40], n - 1).tolist()]
    gen_len = {str(alpha): [length if i % 3 else window for i, length in enumerate(lengths)] for alpha in alphas}
    with tempfile.TemporaryDirectory() as folder:
        for k, facet in enumerate(facets):
            kl, pmass = {}, {}
            for alpha in alphas:
                size = 1.1**k * abs(alpha) ** growth if alpha else 0.0
                kl[str(alpha)] = [(size * rng.gamma(3, 0.5, length)).tolist() for length in lengths]
                pmass[str(alpha)] = rng.choice([1.0, 0.95, 0.5 if alpha else 1.0], (n, 4), p=[0.5, 0.3, 0.2]).tolist()
            about = {"method": facet or "pca", "model": facet or "org/m", "window": window}
            write_cell(Path(folder) / f"cell {k}", kl, pmass, gen_len, (0, 12, 35, window), **about)
        return read(folder, **flags)


def words(ax: Axes) -> list[str]:
    """The texts over and in a panel."""
    return [text.get_text() for text in ax.texts if text.get_text() not in ("", "vs target", "token\nat risk", "token")]


def kl_axes(figure: Figure) -> list[Axes]:
    """The panels without their strips, in reading order."""
    return [ax for ax in figure.axes if any(text.startswith("α = ") for text in words(ax))]


def grid_of(axes: Sequence[Axes]) -> list[list[Axes]]:
    """The axes row by row from the top, each from the left."""
    place = {ax: (-round(ax.get_position().y0, 6), ax.get_position().x0) for ax in axes}
    return [[*row] for _, row in itertools.groupby(sorted(axes, key=lambda ax: place[ax]), key=lambda ax: place[ax][0])]


def texts_of(figure: Figure) -> list[Text]:
    """Every text that the figure shows: page title and quiet line, legend, titles, tick labels."""
    texts = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for ax in figure.axes:
        texts += [child for child in ax.get_children() if isinstance(child, Text)]
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            texts += [axis.label, axis.offsetText]
            ticks = [tick for tick in axis.get_major_ticks() + axis.get_minor_ticks() if low <= tick.get_loc() <= high]
            texts += [label for tick in ticks for label in (tick.label1, tick.label2)]
    return [text for text in texts if text.get_visible() and text.get_text().strip()]


def box_of(text: Text) -> Bbox:
    """A text's box in pixels, with its badge."""
    patch = text.get_bbox_patch()
    return Bbox.union([text.get_window_extent(), *([patch.get_window_extent()] if patch else [])])


def faults_of(figure: Figure) -> list[str]:
    """What is wrong with the texts of a figure, in words."""
    figure.set_dpi(DPI)
    figure.draw_without_rendering()
    texts = texts_of(figure)
    names = [text.get_text().replace("\n", "/") for text in texts]
    boxes = np.array([box_of(text).extents for text in texts])
    lines = np.array([text.get_window_extent().height / (1 + text.get_text().count("\n")) for text in texts])
    numbers = np.array([bool(re.search(r"\d|–", name)) for name in names])
    x0, y0, x1, y1 = boxes.T
    page = figure.bbox
    outside = (x0 < 0) | (y0 < 0) | (x1 > page.x1) | (y1 > page.y1)
    found = [f"leaves the page: {names[i]!r}" for i in np.flatnonzero(outside)]
    across = np.maximum(x0[:, None], x0) - np.minimum(x1[:, None], x1)  # the gap between two, below 0 if they overlap
    along = np.maximum(y0[:, None], y0) - np.minimum(y1[:, None], y1)
    later = np.triu(np.ones_like(across, dtype=bool), 1)
    for i, j in np.argwhere(later & (np.maximum(across, along) < -0.5)):
        found.append(f"overlap: {names[i]!r} and {names[j]!r}")
    close = (along < -0.5) & (across >= -0.5) & (across < np.minimum(lines[:, None], lines) / 3)
    for i, j in np.argwhere(later & close & numbers & numbers[:, None]):
        found.append(f"{across[i, j] / lines[i]:.2f} of their height apart: {names[i]!r} and {names[j]!r}")
    for ax in figure.axes:
        frame = ax.bbox
        inside = (frame.x0 < x1 - 1) & (frame.x1 > x0 + 1) & (frame.y0 < y1 - 1) & (frame.y1 > y0 + 1)
        whole = (x0 >= frame.x0 - 1) & (y0 >= frame.y0 - 1) & (x1 <= frame.x1 + 1) & (y1 <= frame.y1 + 1)
        found += [f"on an axes' edge: {names[i]!r}" for i in np.flatnonzero(inside & ~whole)]
        for line in ax.lines:
            y = (
                line.get_transform().transform(line.get_xydata())[:, 1]
                if line.get_linestyle() == "--"
                else np.array([])
            )
            crossed = inside & np.any((y0 < y[:, None]) & (y[:, None] < y1), axis=0)
            found += [f"on a dashed line: {names[i]!r}" for i in np.flatnonzero(crossed)]
    return found


def faults(alphas: Sequence[float], n: int, window: int, overview: bool = False, **flags: Any) -> list[str]:
    """What is wrong with the texts of the figure, or of the overview, of such a sweep."""
    sweep = sweep_of(alphas, n, window, **flags)
    return faults_of(ska.draw_dose(sweep) if overview else ska.draw(sweep))


def check(job: tuple[Sequence[float], int, int, dict[str, Any]]) -> list[str]:
    """The faults of one figure, with what it is of."""
    alphas, n, window, flags = job
    return [
        f"alphas {alphas}, n {n}, window {window}, {flags}: {fault}" for fault in faults(alphas, n, window, **flags)
    ]


def main(processes: int = 2, every: int = 1) -> int:
    logger.remove()
    started = time.monotonic()
    of_panels = itertools.product(COUNTS, WINDOWS, SCALES, ALPHAS, LAYOUTS, STRIPS)
    jobs = [(alphas, n, window, scale | layout | strip) for n, window, scale, alphas, layout, strip in of_panels]
    of_overviews = itertools.product(OVERVIEW_ALPHAS, FACETS, GROWTHS)
    for alphas, facets, growth in of_overviews:
        jobs.append((alphas, 8, 100, {"overview": True, "rows": "method", "facets": facets, "growth": growth}))
    jobs = jobs[::every]
    n_faulty, kinds = 0, Counter[str]()
    with ProcessPoolExecutor(processes) as pool:
        for wrong in pool.map(check, jobs, chunksize=8):
            n_faulty += bool(wrong)
            kinds.update(re.sub(r".*\}: [\d.]*|: .*", "", fault).strip() for fault in wrong)
            print("".join(f"{fault}\n" for fault in wrong[:3]), end="", flush=True)
    minutes = (time.monotonic() - started) / 60
    print(f"{len(jobs)} figures in {minutes:.0f} minutes, {n_faulty} with faults: {dict(kinds) or 'none'}")
    return bool(kinds)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:3])))
