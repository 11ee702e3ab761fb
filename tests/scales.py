"""What the three conventions for a rollout's scale do to a sweep, as a markdown table.

python tests/scales.py tests/data/smollm2_w256
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np
from loguru import logger
from tabulate import tabulate

import spaghetti_kl_alive as ska

CONVENTIONS = {
    "pad, smoothed": ("pad", "smoothed"),
    "shrink, smoothed": ("shrink", "smoothed"),
    "pad, raw": ("pad", "raw"),
}


def scale_table(root: Path, alpha: float = 1.0) -> str:
    """Median scale (nats) and median drawn ratio over all tokens, per method and convention, at one alpha."""
    notes = ska.Notes()
    cells = ska.find_cells(root, "", False, notes)
    window = ska.common_window(cells, None, notes)
    rows = []
    for name, (edges, calib_on) in CONVENTIONS.items():
        curve = partial(ska.drawn_line, roll=65, edges=edges, normalize=True, calib_tokens=20, calib_on=calib_on)
        observed = partial(ska.observe, window=window, threshold=0.8, curve=curve)
        rollouts, _ = ska.read_rollouts(cells, "pmass_eval", [alpha], False, observed, notes)
        marked = ska.mark_copies(rollouts, lambda cell: cell.method)
        for method in sorted({cell.method for cell in cells}):
            mine = [r for r in marked if r.cell.method == method and not r.copy_of]
            scale = np.nanmedian([r.scale for r in mine])
            ratio = np.nanmedian(np.concatenate([r.line for r in mine]))
            rows.append(
                {
                    "method": method,
                    "scale": name,
                    "median scale (nats)": f"{scale:.2f}",
                    "median KL / scale": f"{ratio:.2f}",
                }
            )
    rows.sort(key=lambda row: row["method"])
    return tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True)


if __name__ == "__main__":
    logger.remove()
    print(scale_table(Path(sys.argv[1])))
