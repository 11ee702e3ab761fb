"""The sweep that the project ships, and what the project says of it."""

import csv
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import scales
from sweeps import drawn, run, table

import spaghetti_kl_alive as ska

ROOT = Path(__file__).parents[1]
SWEEP = ROOT / "tests" / "data" / "smollm2_w256"
SHIPPED = ROOT / "figs" / "smollm2_w256_kl_alive"
README = (ROOT / "README.md").read_text()


def test_first_command_of_the_readme_gives_the_shipped_tables_byte_for_byte(tmp_path):
    command = next(line for line in README.splitlines() if line.startswith("python3 ") and "--runs-root" in line)
    flags = shlex.split(command.split(".venv/bin/spaghetti-kl-alive ")[1])
    flags[flags.index("--runs-root") + 1] = SWEEP
    result = run(*flags, "--out", tmp_path)
    assert result.status == 0, result.err
    assert sorted(path.name for path in SHIPPED.iterdir()) == sorted(path.name for path in tmp_path.iterdir())
    for name in (ska.TABLE, ska.ROLLOUTS):
        assert (tmp_path / name).read_bytes() == (SHIPPED / name).read_bytes()


@pytest.mark.parametrize("cell", sorted(SWEEP.glob("*/")), ids=lambda cell: cell.name)
def test_shipped_cells_hold_what_a_sweep_records(cell):
    calib, trajectory, pmass = (json.loads((cell / name).read_text()) for name in ska.FILES)
    assert calib["target_kl"] == 1.0 and calib["window"] == 256
    assert list(pmass["pmass_eval"]) == ["0.0", "0.25", "0.5", "0.75", "1.0", "1.5", "2.0", "4.0"]
    assert len(pmass["prompts"]) == 24
    for alpha, masses in pmass["pmass_eval"].items():
        kl, lengths = trajectory["per_prompt_per_t_kl"][alpha], pmass["gen_lens_eval"][alpha]
        assert np.shape(masses) == (24, len(pmass["fork_points"]))
        assert [len(row) for row in kl] == lengths
    assert max(max(row) for row in trajectory["per_prompt_per_t_kl"]["0.0"]) < 1e-8


def test_threshold_was_chosen_where_every_unsteered_fork_is_above_it():
    for cell in SWEEP.glob("*/"):
        masses = json.loads((cell / "pmass.json").read_text())["pmass_eval"]["0.0"]
        assert np.nanmin(np.array(masses)) > 0.8


def test_scale_table_of_the_readme_is_what_its_command_prints():
    assert scales.scale_table(SWEEP) in README


def test_what_the_readme_says_of_the_figure_is_in_the_table():
    rows = {(row["method"], row["alpha"]): row for row in table(SHIPPED)}
    quoted = re.findall(r"(\d+) of 24\s+(\w+)\s+rollouts\s+died at\s+α = ([\d.]*\d)", README)
    assert quoted
    for died, method, alpha in quoted:
        assert rows[method, alpha]["n_died"] == died
        assert rows[method, alpha]["n"] == "24"


def test_unsmoothed_lines_of_the_figure_are_as_many_as_the_readme_says():
    with (SHIPPED / ska.ROLLOUTS).open(newline="") as file:
        short = [row for row in csv.DictReader(file) if int(row["observed_tokens"]) < 65 and row["scale_nats"]]
    assert f"the {len(short)} steered rollouts that ended before token 65" in README


def test_median_line_stays_below_the_multiple_of_its_scale_that_the_readme_names(tmp_path, monkeypatch):
    _, rows, _ = drawn(monkeypatch, "--runs-root", SWEEP, "--out", tmp_path, "--rows", "method")
    highest = max(np.nanmax(ska.running_median(p.lines)[0]) for row in rows for p in row if p.lines)
    assert 1.1 < highest < 1.2
    assert "the median line stays below 1.2 of" in README


def test_what_the_readme_says_of_the_texts_is_in_the_texts():
    def distinct(method: str, alpha: str) -> str:
        texts = json.loads((SWEEP / f"SmolLM2-135M_{method}_s0_w256" / "texts.json").read_text())[alpha]
        return f"{np.median([len(set(text.split())) / len(text.split()) for text in texts]):.2f}"

    words = " ".join(README.split())
    shares = [f"{distinct(method, '2.0')} ({method})" for method in ("mean_diff", "pca", "ablation")]
    assert f"{shares[0]}, {shares[1]} and {shares[2]}, unsteered it is {distinct('pca', '0.0')}" in words
    texts = json.loads((SWEEP / "SmolLM2-135M_ablation_s0_w256" / "texts.json").read_text())["4.0"]
    ends = [text[-100:] for text in texts]
    looping = sum(any(end[period:] == end[:-period] for period in range(1, 41)) for end in ends)
    assert re.search(rf"{looping} of\s+those 24 texts end in a loop", README)
