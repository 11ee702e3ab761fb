"""Small sweeps on disk, and runs of the program on them, for all tests."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import spaghetti_kl_alive as ska

FORKS = [0, 5, 20]
SMALL = ("--dpi", 20, "--no-survival")  # where the picture does not matter


def write_cell(
    folder: Path,
    kl: Mapping[str, Sequence[Sequence[float]]],
    pmass: Mapping[str, Sequence[Sequence[float]]],
    gen_len: Mapping[str, Sequence[int]] | None = None,
    forks: Sequence[int] = FORKS,
    **calib: Any,
) -> Path:
    """Write one cell as a sweep does; keyword arguments replace what calib.json holds."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"model": "org/m", "method": "mean_diff", "seed": 0, "layer": 3}
    about |= {"c_star": 2.0, "target_kl": 1.0, "window": 40}
    files: dict[str, dict[str, Any]] = {
        "calib.json": about | calib,
        "trajectory.json": {"per_prompt_per_t_kl": kl},
        "pmass.json": {"fork_points": list(forks), "pmass_eval": pmass, "computed": True},
    }
    if gen_len is not None:
        files["pmass.json"]["gen_lens_eval"] = gen_len
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2))
    return folder


def random_cell(
    folder: Path, draw: int = 0, alphas: Sequence[float] = (0.0, 1.0, 2.0), n: int = 6, **calib: Any
) -> Path:
    """A cell of random rollouts, the same ones in each draw: KL 0 at alpha 0, deaths and EOS elsewhere."""
    rng = np.random.default_rng(draw)
    kl, pmass, gen_len = {}, {}, {}
    for alpha in alphas:
        key = str(alpha)
        gen_len[key] = rng.choice([40, 40, 30, 3], n).tolist()
        kl[key] = [(alpha**2 * rng.gamma(2, 0.2, g)).tolist() for g in gen_len[key]]
        pmass[key] = np.clip(1 - (0.02 + 0.25 * abs(alpha)) * rng.random((n, len(FORKS))), 0, 1).tolist()
    return write_cell(folder, kl, pmass, gen_len, **calib)


@dataclass(frozen=True)
class Run:
    status: int
    out: str
    err: str


def run(*argv: object) -> Run:
    """The program in this process: exit status and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status: Any = ska.main([str(arg) for arg in argv])
        except SystemExit as stop:
            status = stop.code
    return Run(status, out.getvalue(), err.getvalue())


def contents(folder: Path) -> dict[str, bytes]:
    """What the files of a folder hold; of the folders in it, nothing."""
    return {path.name: path.read_bytes() if path.is_file() else b"" for path in folder.iterdir()}


def read(folder: Path | str, **flags: Any) -> ska.Sweep:
    return ska.read(ska.Args(runs_root=folder, **flags))


def drawn(folder: Path, **flags: Any) -> tuple[Figure, ska.Sweep]:
    """The figure of the sweep in the folder, and the sweep that it shows."""
    sweep = read(folder, **flags)
    return ska.draw(sweep), sweep


def noted(sweep: ska.Sweep, *parts: str) -> str:
    """The one note of a sweep that holds all the parts, a single line."""
    (note,) = [note for note in sweep.notes if all(part in note for part in parts)]
    assert "\n" not in note
    return note


def table(folder: Path, k: int = 0) -> list[dict[str, str]]:
    """The k-th pipe table of the summary in the folder, as a list of rows.

    How much steering; the rows compared, if there are some to compare; did it break; KL; the threshold.
    """
    text = (folder / ska.SUMMARY_FILE).read_text(encoding="utf-8")
    lines = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)[k].splitlines()
    header, _, *rows = [[word.strip() for word in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]
