"""Does any text of the figure touch another, leave the page, or run together with the number beside it?

`python tests/layout.py [PROCESSES [EVERY]]` lays out every combination of ALPHAS, COUNTS, WINDOWS, LAYOUTS, SCALES and
STRIPS, prints what is wrong in which, and ends with their number; EVERY takes only each so-manieth of ALPHAS x COUNTS x
WINDOWS. Each figure is drawn once and not saved, from rollouts of which only the longest is as long as the window.
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
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from sweeps import write_cell

import spaghetti_kl_alive as ska

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
LAYOUTS: tuple[dict[str, Any], ...] = ({}, {"ncols": 2}, {"rows": "method"})
SCALES: tuple[dict[str, Any], ...] = (
    {},
    {"kl_log": True},
    {"normalize_kl": False},
    {"kl_log": True, "normalize_kl": False},
)
STRIPS: tuple[dict[str, Any], ...] = ({}, {"survival": False})
DPI = 160  # at which the texts are measured


@cache
def rollouts_of(n: int, window: int, method: str, normalize_kl: bool) -> dict[bool, list[ska.Rollout]]:
    """n rollouts of every fate with and without steering, of which one is as long as the window."""
    rng = np.random.default_rng(n)
    lengths = [window, *rng.choice([3, 12, 70], n - 1).tolist()]
    kl = {"0": [[0.0] * length for length in lengths]}
    kl["1"] = [np.round(rng.gamma(3, 0.3 if method == "pca" else 2, length), 4).tolist() for length in lengths]
    pmass = {"0": [[1.0] * 4] * n, "1": rng.choice([1.0, 0.95, 0.5], (n, 4), p=[0.5, 0.3, 0.2]).tolist()}
    gen_len = [length if i % 3 else window for i, length in enumerate(lengths)]
    with tempfile.TemporaryDirectory() as folder:
        cell = Path(folder) / method
        forks = (0, 12, 60, window)
        write_cell(cell, kl, pmass, dict.fromkeys(kl, gen_len), forks, method=method, window=window)
        rollouts = ska.read(ska.Args(runs_root=cell, normalize_kl=normalize_kl)).rollouts
    return {steered: [r for r in rollouts if (r.alpha != 0) == steered] for steered in (False, True)}


@cache
def panel_of(alpha: float, n: int, window: int, row: str, normalize_kl: bool) -> ska.Panel:
    """A panel of these rollouts, said to be of this alpha; the start of a line stands for all of it."""
    held = rollouts_of(n, window, row or "mean_diff", normalize_kl)[alpha != 0]
    return ska.Panel(row, alpha, f"{alpha:g}", [replace(r, alpha=alpha, line=r.line[:70]) for r in held], 20)


def sweep_of(alphas: Sequence[float], n: int, window: int, **flags: Any) -> ska.Sweep:
    """A sweep of panels of n rollouts, two rows of them where rows are asked for."""
    args = ska.Args(runs_root="runs/sweep", **flags)
    rows = ["mean_diff", "pca"] if args.rows else [""]
    panels = [panel_of(alpha, n, window, row, args.normalize_kl) for row in rows for alpha in alphas]
    rollouts = [r for panel in panels for r in panel.rollouts]
    cells = list({r.cell.name: r.cell for r in rollouts}.values())
    return ska.Sweep(args, "sweep", window, cells, rollouts, panels, [])


def grid_of(axes: Sequence[Axes]) -> list[list[Axes]]:
    """The axes row by row from the top, each from the left."""
    places = {ax: ax.get_position() for ax in axes}
    heights = sorted({round(place.y0, 6) for place in places.values()}, reverse=True)
    rows = [[ax for ax, place in places.items() if round(place.y0, 6) == height] for height in heights]
    return [sorted(row, key=lambda ax: places[ax].x0) for row in rows]


def texts_of(figure: Figure) -> list[Text]:
    """Every text that the figure shows, tick labels, header and legend included."""
    texts = [*figure.texts, *(text for held in figure.legends for text in held.get_texts())]
    for ax in figure.axes:
        texts += [*ax.texts, ax.title]
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
    found = [f"leaves the page: {names[i]!r}" for i in np.flatnonzero((x0 < 0) | (y0 < 0))]
    found += [f"leaves the page: {names[i]!r}" for i in np.flatnonzero((x1 > page.x1) | (y1 > page.y1))]
    across = np.maximum(x0[:, None], x0) - np.minimum(x1[:, None], x1)  # the gap between two, below 0 if they overlap
    along = np.maximum(y0[:, None], y0) - np.minimum(y1[:, None], y1)
    later = np.triu(np.ones_like(across, dtype=bool), 1)
    for i, j in np.argwhere(later & (np.maximum(across, along) < -0.5)):
        found.append(f"overlap: {names[i]!r} and {names[j]!r}")
    close = (along < -0.5) & (across >= -0.5) & (across < np.minimum(lines[:, None], lines) / 3)
    for i, j in np.argwhere(later & close & numbers & numbers[:, None]):
        found.append(f"{across[i, j] / lines[i]:.2f} of their height apart: {names[i]!r} and {names[j]!r}")
    for ax in figure.axes:
        inside = ax.bbox.x0 < x1 - 1, ax.bbox.x1 > x0 + 1, ax.bbox.y0 < y1 - 1, ax.bbox.y1 > y0 + 1
        for i in np.flatnonzero(np.all(inside, axis=0)):
            if box_within(boxes[i], ax.bbox) is False:
                found.append(f"on an axes' edge: {names[i]!r}")
    return found


def box_within(box: np.ndarray, outer: Bbox) -> bool:
    x0, y0, x1, y1 = box
    return bool(x0 >= outer.x0 - 1 and y0 >= outer.y0 - 1 and x1 <= outer.x1 + 1 and y1 <= outer.y1 + 1)


def faults(alphas: Sequence[float], n: int, window: int, **flags: Any) -> list[str]:
    """What is wrong with the texts of the figure of such a sweep."""
    return faults_of(ska.draw(sweep_of(alphas, n, window, **flags)))


def check(alphas: Sequence[float], n: int, window: int) -> dict[str, list[str]]:
    """The faults of all figures of these panels, by what the figure is of."""
    found = {}
    for parts in itertools.product(LAYOUTS, SCALES, STRIPS):
        flags = {name: value for part in parts for name, value in part.items()}
        name = f"{len(alphas)} alphas, n {n}, window {window}, {flags}"
        found[name] = faults(alphas, n, window, **flags)
    panel_of.cache_clear()
    rollouts_of.cache_clear()
    return found


def main(processes: int = 2, every: int = 1) -> int:
    started = time.monotonic()
    jobs = list(itertools.product(ALPHAS, COUNTS, WINDOWS))[::every]
    total, kinds = 0, Counter[str]()
    with ProcessPoolExecutor(processes) as pool:
        for found in pool.map(check, *zip(*jobs, strict=True)):
            total += len(found)
            for name, wrong in found.items():
                kinds.update({fault.split(":")[0].split(" ")[-1] for fault in wrong})
                print("".join(f"{name}: {fault}\n" for fault in wrong[:3]), end="", flush=True)
    print(f"{total} figures in {(time.monotonic() - started) / 60:.0f} minutes; with faults: {dict(kinds) or 'none'}")
    return bool(kinds)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:3])))
