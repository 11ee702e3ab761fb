"""How fast, and in how much memory: the script as a whole process, against another revision of it and a floor.

The floor is a process that imports the same packages, reads the same files with json.loads, and saves two figures of
empty axes, as many and as large as the script's. Runs are interleaved; printed are minimum and median of the wall
time, the peak memory, and the ratios to the script's own.

    python tests/tools/bench.py                              # a sweep of 9 cells x 8 alphas x 24 rollouts x 4096 tokens
    python tests/tools/bench.py --size 9x5x8x512 --repeat 9
    python tests/tools/bench.py --against HEAD --repeat 9    # the sweep in this project, and a revision of the script
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

SCRIPT = Path(__file__).parents[2] / "spaghetti_kl_alive.py"
SHIPPED = Path(__file__).parents[1] / "data" / "smollm2_w256"
FORKS = 14
FLOOR = """
import json, sys
from pathlib import Path
import spaghetti_kl_alive as ska, numpy, tyro, loguru, tabulate
from matplotlib.figure import Figure
args = tyro.cli(ska.Args, args=["--runs-root", sys.argv[1], "--out", sys.argv[2]])
for path in sorted(Path(args.runs_root).glob("*/*.json")):
    json.loads(path.read_bytes())
for name, size, shape in (("spaghetti", (6.8, 4.5), (2, int(sys.argv[3]))), ("dose", (6.8, 2.2), (1, 3))):
    figure = Figure(size)
    figure.subplots(*shape)
    figure.savefig(Path(args.out, f"{name}.png"), dpi=args.dpi)
"""


def write_sweep(root: Path, cells: int, alphas: Sequence[float], rollouts: int, tokens: int) -> None:
    """A sweep in the on-disk format of real ones."""
    sys.path[:0] = [str(folder) for folder in Path(__file__).parents[1:3]]
    from sweeps import write_cell  # here: the process that starts the programs is to stay small

    rng = np.random.default_rng(0)
    forks = sorted({0, *(round(float(s)) for s in np.geomspace(1, tokens, FORKS - 1))})
    for c in range(cells):
        kl, pmass, lengths = {}, {}, {}
        for alpha in alphas:
            shape = np.r_[5.0, np.ones(tokens - 1)] * (0.02 + alpha**2)
            kl[str(alpha)] = (rng.gamma(0.5, 0.5, (rollouts, tokens)) * shape).tolist()
            pmass[str(alpha)] = (1 - 0.15 * alpha * rng.random((rollouts, len(forks)))).tolist()
            lengths[str(alpha)] = np.where(rng.random(rollouts) < 0.2, tokens // 2, tokens).tolist()
        write_cell(root / f"cell_{c}", kl, pmass, lengths, forks, window=tokens, method=f"m{c % 3}", seed=c)


def measured(argv: Sequence[object]) -> tuple[float, float]:
    """Wall seconds and peak MB of one process."""
    start = time.perf_counter()
    null = subprocess.DEVNULL
    process = subprocess.Popen([*map(str, argv)], cwd=SCRIPT.parent, stdout=null, stderr=null)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"exit status {process.returncode}: {argv}")
    return wall, usage.ru_maxrss / 1024


def report(programs: Mapping[str, Sequence[object]], repeat: int) -> None:
    """Run the programs in turn, after once each to warm the disk's cache, and print how they compare to the first."""
    walls: dict[str, list[float]] = {name: [] for name in programs}
    peaks = dict.fromkeys(programs, 0.0)
    for turn in range(repeat + 1):
        for name, argv in programs.items():
            wall, peak = measured(argv)
            peaks[name] = max(peaks[name], peak)
            walls[name] += [wall] if turn else []
    ours = next(iter(walls.values()))
    for name, held in walls.items():
        least, middle = min(held), statistics.median(held)
        print(f"{name:>10}: least {least:6.2f} s, median {middle:6.2f} s, at most {peaks[name]:4.0f} MB", end="")
        print(f"; the script takes {min(ours) / least:.2f} and {statistics.median(ours) / middle:.2f} of it")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="9x8x24x4096", help="cells x alphas x rollouts x tokens of a made-up sweep")
    parser.add_argument("--against", metavar="REVISION", help="a revision of this repository, on the shipped sweep")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root, out = Path(folder) / "sweep", Path(folder) / "out"
        out.mkdir()
        if args.against:
            other = Path(folder) / "other.py"
            shown = ["git", "show", f"{args.against}:{SCRIPT.name}"]
            other.write_bytes(subprocess.run(shown, cwd=SCRIPT.parent, capture_output=True, check=True).stdout)
            flags = ["--runs-root", SHIPPED, "--rows", "method", "--out", out]
            report(
                {"script": [sys.executable, SCRIPT, *flags], args.against: [sys.executable, other, *flags]}, args.repeat
            )
            return
        cells, n_alphas, rollouts, tokens = map(int, args.size.split("x"))
        alphas = np.linspace(0, 4, n_alphas).tolist()
        # in a process of its own: a child's peak memory counts from that of the process that starts it
        job = (root, cells, alphas, rollouts, tokens)
        writer = multiprocessing.get_context("spawn").Process(target=write_sweep, args=job)
        writer.start()
        writer.join()
        floor = [sys.executable, "-c", FLOOR, root, out, n_alphas]
        report({"script": [sys.executable, SCRIPT, "--runs-root", root, "--out", out], "floor": floor}, args.repeat)


if __name__ == "__main__":
    main()
