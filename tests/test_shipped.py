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
ABOUT = " ".join((SWEEP / "README.md").read_text().split())
CELLS = sorted(path.parent for path in SWEEP.glob("*/calib.json"))


# ---------------------------------------------------------------------------------------- the README


def test_the_first_command_gives_the_shipped_tables_byte_for_byte_and_its_uv_form_has_its_flags(tmp_path):
    command = next(line for line in README.splitlines() if line.startswith("python3 ") and "--runs-root" in line)
    by_uv = next(line for line in README.splitlines() if line.startswith("uv run spaghetti_kl_alive.py "))
    flags = shlex.split(command.split(".venv/bin/spaghetti-kl-alive ")[1])
    assert shlex.split(by_uv)[3:] == flags
    flags[flags.index("--runs-root") + 1] = SWEEP
    result = run(*flags, "--out", tmp_path)
    assert result.status == 0, result.err
    assert {path.name for path in SHIPPED.iterdir()} == {path.name for path in tmp_path.iterdir()}
    for name in (ska.SUMMARY_FILE, ska.ROLLOUTS_FILE):
        assert (tmp_path / name).read_bytes() == (SHIPPED / name).read_bytes()


@pytest.fixture(scope="module")
def held():
    """The summary's numbers: of its first table by method, and their sums; of the others by method and alpha."""
    rows = {row["method"]: row for row in table(SHIPPED)} | {"sums": {}}
    for column in ("died_within_budget", "died_above_budget"):
        died, size = np.sum([[int(k) for k in row[column].split(" of ")] for row in table(SHIPPED)], axis=0)
        rows["sums"][column] = f"{died} of {size}"
    for row in (row for k in (1, 2, 3) for row in table(SHIPPED, k)):
        rows.setdefault(f"{row['method']} alpha {row['alpha']}", {}).update(row)
    return rows


def forms(number: str) -> set[str]:
    """How prose may write a number: as it is, or to two digits and more; a share in percent, too; no number as none."""
    value, unit = float(number.strip("%")), "%" * number.endswith("%")
    rounded = {f"{value:.{digits}g}{unit}" for digits in range(2, 7)}
    percent = {f"{100 * value:.{digits}g}%" for digits in range(2, 7) if not unit}
    return {number} | rounded | percent | ({"none"} if value == 0 else set())


def test_numbers_in_the_readme_are_those_of_the_summary(held):
    """Those in its comment, in lines such as "pca alpha 1: <column> <value>, <column> <value>" or "pca: ..."."""
    block = re.search(r"<!-- numbers, checked by tests/test_shipped.py\n(.*?)-->", README, re.DOTALL)[1]
    claims = [
        (name, column, value)
        for name, values in (line.split(": ") for line in block.splitlines())
        for column, value in re.findall(r"(?:^|, )([A-Za-z]\w*) (.+?)(?=, [A-Za-z]|$)", values)
    ]
    assert len(claims) >= 5
    assert [claim for claim in claims if held[claim[0]].get(claim[1]) != claim[2]] == []
    prose = " ".join(re.sub(r"(?ms)<!--.*?-->|```.*?```|^\|[^\n]*", "", README).split())
    words = {*re.findall(r"none|\d+(?:\.\d+)?%?", prose)}
    for claim in claims:
        said = [forms(number) & words for number in re.findall(r"\d+(?:\.\d+)?%?", claim[2])]
        assert claim[2] in prose if " of " in claim[2] else all(said), claim


def test_rows_of_tables_in_the_readme_are_rows_of_the_summary():
    def rows(text: str) -> list[list[str]]:
        lines = re.findall(r"(?m)^\| +(?:method|ablation|mean_diff|pca) \|.*", text)
        return [[cell.strip() for cell in line.split("|")] for line in lines]

    summary = rows((SHIPPED / ska.SUMMARY_FILE).read_text())
    assert len(rows(README)) >= 2
    assert [row for row in rows(README) if row not in summary] == []


@pytest.mark.parametrize("page", [ROOT / "README.md", SWEEP / "README.md"])
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).is_file()] == []
    assert any("://" not in link for link in links)


# ----------------------------------------------------------------------------------- the shipped sweep


def test_shipped_cells_hold_what_a_sweep_records_and_are_small():
    assert sum(path.stat().st_size for path in SWEEP.rglob("*") if path.is_file()) <= 6e6
    assert len(CELLS) == 3
    lowest = np.inf
    for cell in CELLS:
        calib, trajectory, pmass = (json.loads((cell / name).read_text()) for name in ska.CELL_FILES)
        assert (calib["target_kl"], calib["window"], calib["calib_tokens"]) == (1.0, 256, 256)
        assert f"{calib['c_star']:g} for `{calib['method']}`" in ABOUT
        assert " ".join(pmass["pmass_eval"]) == "0.0 0.25 0.5 0.75 1.0 1.5 1.6 1.9 2.0 3.0 4.0"
        for alpha, masses in pmass["pmass_eval"].items():
            assert np.shape(masses) == (len(pmass["prompts"]), len(pmass["fork_points"])) == (24, 13)
            assert [len(row) for row in trajectory["per_prompt_per_t_kl"][alpha]] == pmass["gen_lens_eval"][alpha]
        assert max(max(row) for row in trajectory["per_prompt_per_t_kl"]["0.0"]) < 1e-8
        lowest = min(lowest, np.nanmin(np.array(pmass["pmass_eval"]["0.0"])))
    assert lowest > 0.8  # the threshold was chosen where every unsteered fork is above it
    assert f"their lowest pmass at any fork point is {lowest:.2f}" in ABOUT


def test_the_scales_page_holds_what_its_command_prints():
    assert scales.scale_table(SWEEP) in (SWEEP / "SCALES.md").read_text()


def test_what_the_sweeps_page_says_of_the_texts_is_in_the_texts(held):
    def texts(method: str, alpha: str) -> list[str]:
        return json.loads((SWEEP / f"SmolLM2-135M_{method}_s0_w256" / "texts.json").read_text())[alpha]

    for method, alpha in (("mean_diff", "2.0"), ("pca", "2.0"), ("ablation", "2.0"), ("pca", "0.0")):
        share = np.median([len(set(text.split())) / len(text.split()) for text in texts(method, alpha)])
        assert f"{share:.2f} ({method}, {float(alpha):g})" in ABOUT
    ends = [text[-100:] for text in texts("ablation", "2.0")]
    looping = sum(any(end[period:] == end[:-period] for period in range(1, 41)) for end in ends)
    assert f"{looping} of the 24 ablation texts at 2 end in a loop, and none of them died" in ABOUT
    assert held["ablation alpha 2"]["S_end"] == "1.000"
