"""The sweep that the project ships, and what the project's pages say of it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from sweeps import read, run

import spaghetti_kl_alive as ska

ROOT = Path(__file__).parents[1]
SWEEP = ROOT / "tests" / "data" / "smollm2_w256"
SHIPPED = ROOT / "figs" / "smollm2_w256_kl_alive"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROSE = " ".join(README.split())
ABOUT = " ".join((SWEEP / "README.md").read_text(encoding="utf-8").split())
METHODS = ("ablation", "mean_diff", "pca")


def recorded(method, name):
    return json.loads((SWEEP / f"SmolLM2-135M_{method}_s0_w256" / name).read_text(encoding="utf-8"))


def looping(method, alpha):
    """How many texts end in a loop: their last 100 characters repeat a phrase of at most 50."""
    ends = [text[-100:] for text in recorded(method, "texts.json")[alpha]]
    return sum(any(end[period:] == end[:-period] for period in range(1, 51)) for end in ends)


def test_the_first_command_gives_the_shipped_tables_byte_for_byte_and_its_uv_form_has_its_flags(tmp_path):
    command = next(
        line for line in README.splitlines() if line.startswith("python3 ") and "--runs-root" in line
    )
    by_uv = next(line for line in README.splitlines() if line.startswith("uv run spaghetti_kl_alive.py "))
    flags = shlex.split(command.split(".venv/bin/spaghetti-kl-alive ")[1])
    assert shlex.split(by_uv)[3:] == flags
    flags[flags.index("--runs-root") + 1] = SWEEP
    result = run(*flags, "--out", tmp_path)
    assert result.status == 0, result.err
    assert {path.name for path in SHIPPED.iterdir()} == {path.name for path in tmp_path.iterdir()}
    for name in (ska.SUMMARY_FILE, ska.ROLLOUTS_FILE):
        assert (tmp_path / name).read_bytes() == (SHIPPED / name).read_bytes()


def test_the_alphas_of_the_first_command_give_the_brackets_and_the_comparison_of_all():
    alphas = re.search(r"--alphas ([\d. ]+) --ncols", README)[1].split()
    some, all_of_them = (ska.tables(read(SWEEP, rows="method", alphas=held)) for held in (alphas, ()))
    assert some["compared"] == all_of_them["compared"] and len(some["compared"]) == 3
    brackets = [
        [(row["last_above_half"], row["first_below_half"]) for row in held["steering"]]
        for held in (some, all_of_them)
    ]
    assert brackets[0] == brackets[1]
    left_out = {row["alpha"] for row in all_of_them["panels"]} - {float(alpha) for alpha in alphas}
    assert all(row["n_died"] == 0 for row in all_of_them["panels"] if row["alpha"] in left_out)
    *first, last = [f"{alpha:g}" for alpha in sorted(left_out)]
    assert f"They leave out α = {', '.join(first)} and {last}, where nobody died" in PROSE


def test_what_the_readme_says_of_the_results_is_in_the_data():
    compared = {}
    for threshold in (0.8, 0.75):
        rows = ska.tables(read(SWEEP, rows="method", threshold=threshold))["compared"]
        compared |= {(threshold, row["a"], row["b"]): [*row.values()][2:] for row in rows}
    assert [compared[0.8, a, b] for a, b in (("ablation", "mean_diff"), ("mean_diff", "pca"))] == [
        [24, 0, 0]
    ] * 2
    assert "every one of the 24 prompts first died at a higher α" in PROSE
    later, earlier, alike = compared[0.75, "ablation", "mean_diff"]
    assert earlier == 0
    assert f"ablation leads mean_diff on {later} prompts, and {alike} are not told apart" in PROSE
    pmass = recorded("mean_diff", "pmass.json")
    masses, forks = np.array(pmass["pmass_eval"]["2.0"]), np.array(pmass["fork_points"])
    dead = masses < 0.8
    deaths = forks[dead[dead.any(axis=1)].argmax(axis=1)]
    assert f"{len(deaths)} of {len(masses)} died by token {deaths.max()}" in PROSE
    back = forks[np.flatnonzero(dead.any(axis=0)).max() + 1]
    assert f"all {len(masses)} are at or above 0.8 from token {back} on" in PROSE
    died = (np.array(recorded("ablation", "pmass.json")["pmass_eval"]["3.0"]) < 0.8).any(axis=1).sum()
    assert (
        f"{looping('ablation', '3.0')} of the 24 ablation texts at 3, where {died} died, end in a loop"
        in PROSE
    )


def test_the_readme_names_every_flag_and_only_those():
    flags = {f"--{name.replace('_', '-')}" for name in ska.Args.__dataclass_fields__} | {"--version"}
    named = set(
        re.findall(r"`(--[a-z-]+)", README[README.index("## Flags") : README.index("## What bad input")])
    )
    assert named - {"--no-normalize-kl", "--no-survival", "--no-dose"} == flags


@pytest.mark.parametrize("page", [ROOT / "README.md", SWEEP / "README.md"])
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []
    assert any("://" not in link for link in links)


def test_shipped_cells_hold_what_their_page_says():
    assert sum(path.stat().st_size for path in SWEEP.rglob("*") if path.is_file()) <= 6e6
    lowest = np.inf
    for method in METHODS:
        calib, trajectory, pmass = (recorded(method, name) for name in ska.CELL_FILES)
        assert (calib["target_kl"], calib["window"]) == (1.0, 256)
        assert f"{calib['c_star']:g} for `{method}`" in ABOUT
        for alpha, masses in pmass["pmass_eval"].items():
            assert np.shape(masses) == (24, len(pmass["fork_points"])) == (24, 13)
            assert [len(row) for row in trajectory["per_prompt_per_t_kl"][alpha]] == pmass["gen_lens_eval"][
                alpha
            ]
        lowest = min(lowest, np.nanmin(np.array(pmass["pmass_eval"]["0.0"])))
    assert lowest > 0.8  # the threshold was chosen where every unsteered fork is above it
    assert f"their lowest pmass at any fork point is {lowest:.2f}" in ABOUT
    counted = [looping("ablation", alpha) for alpha in ("2.0", "3.0")]
    assert "{} of the 24 ablation texts at 2 and {} of the 24 at 3 end in a loop".format(*counted) in ABOUT
