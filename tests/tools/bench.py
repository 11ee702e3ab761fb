"""How much processor time and memory the script takes, as a whole process on made-up sweeps.

It is compared with a process that only reads the same files with json.loads and, with --against, with another
revision of the script. Runs are interleaved; printed are the least and the median of the processor time, the
peak memory, and the ratios of the script's time to the others'.

    python tests/tools/bench.py                                          # cells x alphas x rollouts x tokens
    python tests/tools/bench.py 9x5x8x512 90x8x24x512 --against HEAD~1 --repeat 9
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

SCRIPT = Path(__file__).parents[2] / "spaghetti_kl_alive.py"
FORKS = 14
SIZES = ["9x5x8x512", "9x8x24x4096", "90x8x24x512"]
ONLY_JSON = """
import json, sys
from pathlib import Path
for path in sorted(Path(sys.argv[1]).glob("*/*.json")):
    json.loads(path.read_bytes())
"""


def write_sweep(root: Path, cells: int, n_alphas: int, rollouts: int, tokens: int) -> None:
    """A sweep in the on-disk format of real ones."""
    sys.path[:0] = [str(folder) for folder in Path(__file__).parents[1:3]]
    from sweeps import write_cell  # here: the process that starts the programs is to stay small

    rng = np.random.default_rng(0)
    forks = sorted({0, *(round(float(s)) for s in np.geomspace(1, tokens, FORKS - 1))})
    for c in range(cells):
        kl, pmass, lengths = {}, {}, {}
        for alpha in np.linspace(0, 4, n_alphas).tolist():
            shape = np.r_[5.0, np.ones(tokens - 1)] * (0.02 + alpha**2)
            kl[str(alpha)] = (rng.gamma(0.5, 0.5, (rollouts, tokens)) * shape).tolist()
            pmass[str(alpha)] = (1 - 0.15 * alpha * rng.random((rollouts, len(forks)))).tolist()
            lengths[str(alpha)] = np.where(rng.random(rollouts) < 0.2, tokens // 2, tokens).tolist()
        write_cell(root / f"cell_{c}", kl, pmass, lengths, forks, window=tokens, method=f"m{c % 3}", seed=c)


def measured(argv: Sequence[object]) -> tuple[float, float]:
    """Seconds of processor time and peak MB of one process."""
    null = subprocess.DEVNULL
    process = subprocess.Popen([*map(str, argv)], cwd=SCRIPT.parent, stdout=null, stderr=null)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"exit status {process.returncode}: {argv}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def report(programs: Mapping[str, Sequence[object]], repeat: int) -> None:
    """Run the programs in turn, after once each to warm the disk's cache; the first one is the script."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    peaks = dict.fromkeys(programs, 0.0)
    for turn in range(repeat + 1):
        for name, argv in programs.items():
            time, peak = measured(argv)
            peaks[name] = max(peaks[name], peak)
            seconds[name] += [time] if turn else []
    ours = seconds["script"]
    for name, held in seconds.items():
        least, middle = min(held), statistics.median(held)
        print(
            f"{name:>12}: least {least:6.2f} s, median {middle:6.2f} s, at most {peaks[name]:4.0f} MB", end=""
        )
        print(f"; the script takes {min(ours) / least:.2f} and {statistics.median(ours) / middle:.2f} of it")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sizes", nargs="*", default=SIZES, help="cells x alphas x rollouts x tokens")
    parser.add_argument("--against", metavar="REVISION", help="a revision of this repository")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            root, out = Path(folder) / "sweep", Path(folder) / "out"
            # in a process of its own: a child's peak memory counts from that of the process that starts it
            job = (root, *map(int, size.split("x")))
            writer = multiprocessing.get_context("spawn").Process(target=write_sweep, args=job)
            writer.start()
            writer.join()
            flags = ["--runs-root", root, "--out", out]
            programs: dict[str, Sequence[object]] = {"script": [sys.executable, SCRIPT, *flags]}
            programs["json.loads"] = [sys.executable, "-c", ONLY_JSON, root]
            if args.against:
                other = Path(folder) / "other.py"
                shown = ["git", "show", f"{args.against}:{SCRIPT.name}"]
                other.write_bytes(
                    subprocess.run(shown, cwd=SCRIPT.parent, capture_output=True, check=True).stdout
                )
                programs[args.against] = [sys.executable, other, *flags]
            print(size)
            report(programs, args.repeat)


if __name__ == "__main__":
    main()
