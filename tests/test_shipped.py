"""The sweep that the project ships, and what the project says of it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import scales
from sweeps import run, table

import spaghetti_kl_alive as ska

ROOT = Path(__file__).parents[1]
SWEEP = ROOT / "tests" / "data" / "smollm2_w256"
SHIPPED = ROOT / "figs" / "smollm2_w256_kl_alive"
README = (ROOT / "README.md").read_text()
ABOUT = (SWEEP / "README.md").read_text()
CELLS = sorted(path.parent for path in SWEEP.glob("*/calib.json"))
ALPHAS = ["0.0", "0.25", "0.5", "0.75", "1.0", "1.5", "1.6", "1.9", "2.0", "3.0", "4.0"]


def first_command() -> list[str]:
    """The flags of the README's first command."""
    command = next(line for line in README.splitlines() if line.startswith("python3 ") and "--runs-root" in line)
    return shlex.split(command.split(".venv/bin/spaghetti-kl-alive ")[1])


@pytest.fixture(scope="module")
def rows():
    """The numbers of all three tables of the shipped figure, by method and alpha."""
    tables = [{(row["method"], row["alpha"]): row for row in table(SHIPPED, k)} for k in range(3)]
    return {key: tables[0][key] | tables[1][key] | tables[2][key] for key in tables[0]}


def test_the_first_command_gives_the_shipped_tables_byte_for_byte(tmp_path):
    flags = first_command()
    flags[flags.index("--runs-root") + 1] = SWEEP
    result = run(*flags, "--out", tmp_path)
    assert result.status == 0, result.err
    assert sorted(path.name for path in SHIPPED.iterdir()) == sorted(path.name for path in tmp_path.iterdir())
    for name in (ska.TABLES, ska.ROLLOUTS):
        assert (tmp_path / name).read_bytes() == (SHIPPED / name).read_bytes()


def test_the_uv_form_of_the_first_command_has_its_flags():
    command = next(line for line in README.splitlines() if line.startswith("uv run spaghetti_kl_alive.py "))
    assert shlex.split(command)[3:] == first_command()


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_shipped_cells_hold_what_a_sweep_records(cell):
    calib, trajectory, pmass = (json.loads((cell / name).read_text()) for name in ska.FILES)
    assert (calib["target_kl"], calib["window"], calib["calib_tokens"]) == (1.0, 256, 256)
    assert f"{calib['c_star']:g} for `{calib['method']}`" in " ".join(ABOUT.split())
    assert list(pmass["pmass_eval"]) == ALPHAS
    assert len(pmass["prompts"]) == 24
    for alpha, masses in pmass["pmass_eval"].items():
        kl, lengths = trajectory["per_prompt_per_t_kl"][alpha], pmass["gen_lens_eval"][alpha]
        assert np.shape(masses) == (24, len(pmass["fork_points"]))
        assert [len(row) for row in kl] == lengths
    assert max(max(row) for row in trajectory["per_prompt_per_t_kl"]["0.0"]) < 1e-8


def test_the_shipped_sweep_has_its_three_methods_and_is_small():
    assert len(CELLS) == 3
    assert sum(path.stat().st_size for path in SWEEP.rglob("*") if path.is_file()) <= 6e6


def test_the_threshold_was_chosen_where_every_unsteered_fork_is_above_it():
    lowest = min(
        np.nanmin(np.array(json.loads((cell / "pmass.json").read_text())["pmass_eval"]["0.0"])) for cell in CELLS
    )
    assert lowest > 0.8
    assert f"their lowest pmass at any fork point is {lowest:.2f}" in " ".join(ABOUT.split())


def test_the_scales_page_holds_what_its_command_prints():
    assert scales.scale_table(SWEEP) in (SWEEP / "SCALES.md").read_text()


def test_rows_of_tables_in_the_readme_are_rows_of_the_summary():
    quoted = [line for line in README.splitlines() if re.match(r"\| +(ablation|mean_diff|pca) \|", line)]
    assert len(quoted) == 12
    summary = (SHIPPED / ska.TABLES).read_text().splitlines()

    def cells(line: str) -> list[str]:
        return [cell.strip() for cell in line.strip("|").split("|")]

    held = [cells(line) for line in summary]
    assert [line for line in quoted if cells(line) not in held] == []


def test_deaths_in_the_readme_are_those_of_the_summary_with_how_many_recovered(rows):
    """Deaths are never named without how many recovered, nor without the threshold."""
    words = " ".join(README.split())
    pattern = r"(\d+) of 24 (\w+) rollouts died at α = ([\d.]*\d) \((\d+) were back"
    quoted = re.findall(pattern, words)
    assert len(quoted) >= 2
    for died, method, alpha, back in quoted:
        row = rows[method, alpha]
        assert (row["n"], row["n_recovered"]) == ("24", back)
        assert int(row["n_died"]) + int(row["n_died_last"]) == int(died)
    assert len(re.findall(r"\d+ of 24 \w+ rollouts died", words)) == len(quoted)
    assert "threshold of 0.8" in words


def test_budgets_in_the_readme_are_those_of_the_summary(rows):
    quoted = re.findall(r"KL ([\d.]*\d) ([>≤]) ([\d.]*\d) for (\w+) at α = ([\d.]*\d)", " ".join(README.split()))
    assert len(quoted) >= 2
    for kl, sign, budget, method, alpha in quoted:
        row = rows[method, alpha]
        assert float(kl) == float(f"{float(row['kl_p95']):.2g}")
        assert float(budget) == float(row["budget"])
        assert sign == (">" if float(row["over_budget"].rstrip("%")) > 5 else "≤")


def test_deaths_within_the_budget_in_the_readme_are_those_of_the_summary(rows):
    words = " ".join(README.split())
    (within, died) = re.search(
        r"(\d+) of the (\d+) deaths in this figure are of rollouts within their budget", words
    ).groups()
    held = [row for row in rows.values() if row["died_within"] != "–"]
    assert int(within) == sum(int(row["died_within"]) for row in held)
    assert int(died) == sum(int(row["n_died"]) + int(row["n_died_last"]) for row in held)


def test_what_the_sweeps_page_says_of_the_texts_is_in_the_texts(rows):
    def texts(method: str, alpha: str) -> list[str]:
        return json.loads((SWEEP / f"SmolLM2-135M_{method}_s0_w256" / "texts.json").read_text())[alpha]

    words = " ".join(ABOUT.split())
    for method, alpha in (("mean_diff", "2.0"), ("pca", "2.0"), ("ablation", "2.0"), ("pca", "0.0")):
        share = np.median([len(set(text.split())) / len(text.split()) for text in texts(method, alpha)])
        assert f"{share:.2f} ({method}, {float(alpha):g})" in words
    ends = [text[-100:] for text in texts("ablation", "2.0")]
    looping = sum(any(end[period:] == end[:-period] for period in range(1, 41)) for end in ends)
    assert f"{looping} of the 24 ablation texts at 2 end in a loop, and none of them died" in words
    assert rows["ablation", "2"]["S_end"] == "1.000"
