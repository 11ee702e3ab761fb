"""What the three conventions for a rollout's scale do to a sweep, as a markdown table.

PYTHONPATH=. python tests/tools/scales.py tests/data/smollm2_w256
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from tabulate import tabulate

import spaghetti_kl_alive as ska


def scale_table(root: Path, alpha: float = 1.0) -> str:
    """Median scale (nats) and median drawn ratio over all tokens, per method and convention, at one alpha."""
    conventions = (
        ska.Args(root, alphas=(alpha,), rows="method"),
        ska.Args(root, alphas=(alpha,), rows="method", edges="shrink"),
        ska.Args(root, alphas=(alpha,), rows="method", calib_on="raw"),
    )
    rows = []
    for args in conventions:
        for panel in ska.read(args).panels:
            row = {"method": panel.facet, "scale": f"{args.edges}, {args.calib_on}"}
            row["median scale (nats)"] = f"{panel.kl.scale:.2f}"
            row["median KL / scale"] = f"{np.nanmedian(np.concatenate([r.line for r in panel.with_line])):.2f}"
            rows.append(row)
    rows.sort(key=lambda row: row["method"])
    return tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True)


if __name__ == "__main__":
    print(scale_table(Path(sys.argv[1])))
