"""How fast, and in how much memory: the script as a whole process against a floor, in one run.

The floor is a process that imports the same packages, reads the same files with json.loads, and saves a
figure with the same axes, labels and size and no lines. Prints medians of wall time, CPU time and peak
memory, their ratio to the floor, and the growth when tokens, rollouts or cells double.

    python tests/bench.py                             # small, large and growth
    python tests/bench.py --sizes 9x5x8x512 --no-growth --repeat 5
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SCRIPT = Path(__file__).parents[1] / "spaghetti_kl_alive.py"
FORKS = 14
FLOOR = """
import json, sys
from pathlib import Path
import spaghetti_kl_alive as ska, numpy, tyro, loguru, tabulate
from matplotlib.collections import LineCollection
tyro.cli(ska.Args, args=["--runs-root", sys.argv[1]])
cells, alphas, tokens = Path(sys.argv[1]), json.loads(sys.argv[3]), int(sys.argv[4])
for path in sorted(cells.glob("*/*.json")):
    json.loads(path.read_text(encoding="utf-8"))
look = ska.Look(tokens, 0.8, True, 20, False, 0.5, None, True, None)
panels = [ska.Panel("", alpha, []) for alpha in alphas]
ska.x_limit = lambda panel, window: window
ska.why_no_line = lambda panel: ""
with ska.styled():
    figure = ska.draw_figure([panels[i : i + 4] for i in range(0, len(panels), 4)], look)
    Path(sys.argv[2], "floor.png").write_bytes(ska.rendered(figure, "png", 160))
"""


def write_sweep(root: Path, cells: int, alphas: list[float], rollouts: int, tokens: int) -> None:
    """A sweep in the on-disk format of real ones: json.dumps with indent=2."""
    rng = np.random.default_rng(0)
    forks = sorted({0, *(round(float(s)) for s in np.geomspace(1, tokens, FORKS - 1))})
    for c in range(cells):
        cell = root / f"cell_{c}"
        cell.mkdir(parents=True)
        kl, pmass, lengths = {}, {}, {}
        for alpha in alphas:
            shape = np.r_[5.0, np.ones(tokens - 1)] * (0.02 + alpha**2)
            kl[str(alpha)] = (rng.gamma(0.5, 0.5, (rollouts, tokens)) * shape).tolist()
            pmass[str(alpha)] = (1 - 0.15 * alpha * rng.random((rollouts, len(forks)))).tolist()
            lengths[str(alpha)] = np.where(rng.random(rollouts) < 0.2, tokens // 2, tokens).tolist()
        about = {
            "c_star": 2.0,
            "target_kl": 1.0,
            "window": tokens,
            "method": f"m{c % 3}",
            "model": "org/m",
            "seed": c,
            "layer": 9,
        }
        measured = {"fork_points": forks, "pmass_eval": pmass, "gen_lens_eval": lengths, "computed": True}
        for name, content in (("calib", about), ("trajectory", {"per_prompt_per_t_kl": kl}), ("pmass", measured)):
            (cell / f"{name}.json").write_text(json.dumps(content, indent=2), encoding="utf-8")


def measured(argv: list[object]) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak MB of one process."""
    start = time.perf_counter()
    process = subprocess.Popen(
        list(map(str, argv)), cwd=SCRIPT.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"exit status {process.returncode}: {argv}")
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def compare(size: tuple[int, int, int, int], repeat: int) -> dict[str, list[float]]:
    """Medians over `repeat` runs, script and floor in turn, after one of each to warm the disk cache."""
    cells, n_alphas, rollouts, tokens = size
    alphas = np.linspace(0, 4, n_alphas).tolist()
    with tempfile.TemporaryDirectory() as folder:
        root, out = Path(folder) / "sweep", Path(folder) / "out"
        # in a process of its own: a child's peak memory counts from that of the process that starts it
        writer = multiprocessing.get_context("spawn").Process(
            target=write_sweep, args=(root, cells, alphas, rollouts, tokens)
        )
        writer.start()
        writer.join()
        out.mkdir()
        runs = {
            "script": [sys.executable, SCRIPT, "--runs-root", root, "--out", out],
            "floor": [sys.executable, "-c", FLOOR, root, out, json.dumps(alphas), tokens],
        }
        samples = {name: [] for name in runs}
        for turn in range(repeat + 1):
            for name, argv in runs.items():
                sample = measured(argv)
                if turn:
                    samples[name].append(sample)
    return {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in samples.items()}


def report(size: tuple[int, int, int, int], result: dict[str, list[float]]) -> None:
    for name, (wall, cpu, peak) in result.items():
        print(f"{'x'.join(map(str, size)):>16} {name:>7} {wall:7.2f} s wall {cpu:7.2f} s CPU {peak:7.0f} MB peak")
    ratio = [ours / floor for ours, floor in zip(result["script"], result["floor"], strict=True)]
    print(f"{'':>16} {'ratio':>7} {ratio[0]:7.2f}        {ratio[1]:7.2f}       {ratio[2]:7.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", nargs="*", default=["9x5x8x512", "9x8x24x4096"], help="cells x alphas x rollouts x tokens"
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--growth", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    for text in args.sizes:
        size = tuple(map(int, text.split("x")))
        report(size, compare(size, args.repeat))
    walls = sorted(measured([sys.executable, SCRIPT, "--help"])[0] for _ in range(args.repeat))
    print(f"--help: {statistics.median(walls):.2f} s")
    if args.growth:
        base = (9, 8, 12, 4096)
        before = compare(base, args.repeat)
        report(base, before)
        for axis, what in ((3, "tokens"), (2, "rollouts"), (0, "cells")):
            size = tuple(2 * n if i == axis else n for i, n in enumerate(base))
            after = compare(size, args.repeat)
            report(size, after)
            seconds = after["script"][0] / before["script"][0]
            per_value = (after["script"][2] - before["script"][2]) * 2**20 / np.prod(base)
            print(
                f"  twice the {what}: {seconds:.2f} times the wall time, {per_value:.1f} bytes more per added KL value"
            )


if __name__ == "__main__":
    main()
