"""Bad input: the exit status, the message, no traceback, and nothing written or lost."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from sweeps import edit, random_cell, run, table, write_cell

import spaghetti_kl_alive as ska


@pytest.fixture
def sweep(tmp_path):
    for seed, name in enumerate(("a", "b")):
        random_cell(tmp_path / "sweep" / name, seed)
    return tmp_path / "sweep"


@pytest.fixture
def out(tmp_path):
    """An output folder that holds an older figure and table."""
    folder = tmp_path / "out"
    folder.mkdir()
    for name in (ska.TABLE, ska.ROLLOUTS, f"{ska.FIGURE}.png"):
        (folder / name).write_text(f"older {name}")
    return folder


def refused(out: Path, status: int, *argv: object) -> str:
    """Run where it must fail, once over older output and once where there is none; the message."""
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    result = run(*argv, "--out", out)
    assert result.status == status, result.err
    assert "Traceback" not in result.err
    assert result.out == ""
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert run(*argv, "--out", out.parent / "new" / "folder").status == status
    assert not (out.parent / "new").exists()
    error = result.err[result.err.index("ERROR: ") :]
    assert error.count("\n") <= 2
    return error


def test_missing_runs_root_is_named(tmp_path, out):
    assert f"{tmp_path / 'nowhere'}: no such folder" in refused(out, 1, "--runs-root", tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to("loop")
    assert f"{tmp_path / 'loop'}: no such folder" in refused(out, 1, "--runs-root", tmp_path / "loop")


def test_empty_runs_root_is_named_with_what_a_cell_needs(tmp_path, out):
    (tmp_path / "empty" / "_hidden").mkdir(parents=True)
    error = refused(out, 1, "--runs-root", tmp_path / "empty")
    assert f"{tmp_path / 'empty'}: no cell with calib.json, trajectory.json, pmass.json" in error


def test_filter_that_matches_no_cell_lists_the_cells(sweep, out):
    error = refused(out, 1, "--runs-root", sweep, "--model-contains", "gpt")
    assert str(sweep) in error and "'gpt'" in error
    assert "a (org/m), b (org/m)" in error


def left_out(result, out: Path, note: str) -> None:
    """The run went on without something, and said so in the log and in the table."""
    assert result.status == 0, result.err
    assert "Traceback" not in result.err
    assert f"WARNING: {note}" in result.err
    assert note in (out / ska.TABLE).read_text()


@pytest.mark.parametrize("name", ska.FILES)
def test_cell_that_lacks_a_file_is_left_out_and_listed(sweep, out, name):
    (sweep / "b" / name).unlink()
    left_out(run("--runs-root", sweep, "--out", out), out, f"Left out `b`: {name} is missing")
    assert table(out)[0]["n"] == "6"


def test_cell_whose_pmass_was_not_measured_is_left_out_and_listed(sweep, out):
    edit(sweep / "b" / "pmass.json", lambda content: content.update(computed=False))
    left_out(run("--runs-root", sweep, "--out", out), out, "Left out `b`: pmass was not measured")


@pytest.mark.parametrize("name", ["trajectory.json", "pmass.json"])
def test_alpha_that_one_file_lacks_is_left_out_and_listed(sweep, out, name):
    def drop(content):
        key = "per_prompt_per_t_kl" if name == "trajectory.json" else "pmass_eval"
        del content[key]["2.0"]

    edit(sweep / "b" / name, drop)
    held = name if name == "trajectory.json" else "pmass_eval"
    left_out(run("--runs-root", sweep, "--out", out), out, f"Left out alpha 2 of `b`: not in {held}")
    assert [row["n"] for row in table(out)] == ["12", "12", "6"]


def test_without_gen_lens_a_rollout_is_as_long_as_its_kl(sweep, out):
    edit(sweep / "a" / "pmass.json", lambda content: content.pop("gen_lens_eval"))
    shutil.rmtree(sweep / "b")
    assert run("--runs-root", sweep, "--out", out).status == 0
    kl = json.loads((sweep / "a" / "trajectory.json").read_text())["per_prompt_per_t_kl"]["0.0"]
    assert table(out)[0]["n_censored"] == str(sum(len(row) < 40 for row in kl))


KL, MASS = "per_prompt_per_t_kl", "pmass_eval"
DAMAGE = {
    "not an object": ("trajectory.json", lambda c: [c], "its content is of type list, not dict"),
    "no KL": ("trajectory.json", lambda c: {"kl": c[KL]}, f'the key "{KL}" is missing'),
    "KL a list": ("trajectory.json", lambda c: {KL: []}, "is of type list, not dict"),
    "a rollout a number": (
        "trajectory.json",
        lambda c: {KL: c[KL] | {"1.0": [3.0]}},
        "alpha 1, rollout 0 is of type float",
    ),
    "a KL a string": (
        "trajectory.json",
        lambda c: {KL: c[KL] | {"1.0": [["3"]]}},
        "alpha 1, rollout 0[0] is of type str",
    ),
    "a KL null": ("trajectory.json", lambda c: {KL: c[KL] | {"1.0": [[1, None]]}}, "rollout 0[1] is of type NoneType"),
    "a KL too large": ("trajectory.json", lambda c: {KL: c[KL] | {"1.0": [[10**400]]}}, "too large"),
    "alpha a word": ("trajectory.json", lambda c: {KL: c[KL] | {"high": []}}, "'high', which is no steering strength"),
    "alpha twice": ("trajectory.json", lambda c: {KL: c[KL] | {"1": c[KL]["1.0"]}}, "holds alpha 1 twice"),
    "N differs": (
        "pmass.json",
        lambda c: c | {MASS: c[MASS] | {"1.0": [[1] * 3] * 5}},
        "6 in trajectory.json, 5 in pmass",
    ),
    "pmass ragged": (
        "pmass.json",
        lambda c: c | {MASS: c[MASS] | {"1.0": [[1]] * 6}},
        "do not match the 3 fork_points",
    ),
    "pmass infinite": ("pmass.json", lambda c: c | {MASS: c[MASS] | {"1.0": [[1, 1, 1e999]] * 6}}, "is infinite"),
    "no forks": (
        "pmass.json",
        lambda c: {k: v for k, v in c.items() if k != "fork_points"},
        '"fork_points" is missing',
    ),
    "fork negative": (
        "pmass.json",
        lambda c: c | {"fork_points": [-1, 5, 20]},
        "something else than whole numbers >= 0",
    ),
    "fork in between": ("pmass.json", lambda c: c | {"fork_points": [0.5, 5, 20]}, "something else than whole numbers"),
    "gen_len negative": (
        "pmass.json",
        lambda c: c | {"gen_lens_eval": {k: [-1] * 6 for k in c[MASS]}},
        "whole numbers >= 0",
    ),
    "gen_len too few": (
        "pmass.json",
        lambda c: c | {"gen_lens_eval": {k: [1] * 5 for k in c[MASS]}},
        "5 in gen_lens_eval",
    ),
    "computed a word": ("pmass.json", lambda c: c | {"computed": "no"}, '"computed" is of type str, not bool'),
    "no model": ("calib.json", lambda c: {k: v for k, v in c.items() if k != "model"}, 'the key "model" is missing'),
    "target 0": ("calib.json", lambda c: c | {"target_kl": 0}, '"target_kl" is 0.0'),
    "target huge": ("calib.json", lambda c: c | {"target_kl": 10**400}, "int too large to convert to float"),
    "window huge": ("calib.json", lambda c: c | {"window": 10**400}, "not a number of tokens"),
    "window 0": ("calib.json", lambda c: c | {"window": 0}, '"window" is 0'),
    "window a word": ("calib.json", lambda c: c | {"window": "512"}, '"window" is of type str, not int'),
    "seed a list": ("calib.json", lambda c: c | {"seed": [1]}, '"seed" is of type list'),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_file_is_an_error_or_skipped_on_demand(sweep, out, case):
    name, change, message = DAMAGE[case]
    path = sweep / "a" / name
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    error = refused(out, 1, "--runs-root", sweep)
    assert f"{path.parent}/" in error and message in error
    assert "--skip-bad-cells" in error
    result = run("--runs-root", sweep, "--out", out, "--skip-bad-cells")
    left_out(result, out, f"Left out `a`: {name}: ")
    assert [row["n"] for row in table(out)] == ["6"] * 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON, or cut off"),
        (b'{"fork_points": [0, 1', "is the sweep still writing it?"),
        (b'{"a": 1, "a": 2}', "the key 'a' stands twice in one object"),
        (b'\xff\xfe{"a": 1}', "not UTF-8 text"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "limit"),
    ],
)
def test_file_that_is_not_json_is_an_error(sweep, out, content, message):
    (sweep / "a" / "pmass.json").write_bytes(content)
    error = refused(out, 1, "--runs-root", sweep)
    assert str(sweep / "a" / "pmass.json") in error and message in error


def test_byte_order_mark_is_read_over(sweep, out):
    path = sweep / "a" / "calib.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert run("--runs-root", sweep, "--out", out).status == 0


def test_things_that_are_no_regular_file(sweep, out):
    path = sweep / "a" / "calib.json"
    path.unlink()
    path.mkdir()
    assert "calib.json: not a regular file" in refused(out, 1, "--runs-root", sweep)
    path.rmdir()
    os.mkfifo(path)
    assert "calib.json: not a regular file" in refused(out, 1, "--runs-root", sweep)
    path.unlink()
    path.symlink_to("calib.json")
    left_out(run("--runs-root", sweep, "--out", out), out, "Left out `a`: calib.json is a link to nothing")
    (sweep / "gone").symlink_to("nowhere")
    left_out(run("--runs-root", sweep, "--out", out), out, "Left out `gone`: trajectory.json is missing")


def test_cells_of_different_windows_need_one(sweep, out):
    edit(sweep / "b" / "calib.json", lambda content: content.update(window=30))
    error = refused(out, 1, "--runs-root", sweep)
    assert "a: 40, b: 30" in error and "--window" in error
    result = run("--runs-root", sweep, "--out", out, "--window", 35)
    left_out(result, out, "--window 35 is longer than the window of b")
    edit(sweep / "b" / "calib.json", lambda content: content.pop("window"))
    assert "b: None" in refused(out, 1, "--runs-root", sweep)


def test_alpha_found_nowhere_gets_a_warning_and_a_panel(sweep, out):
    left_out(run("--runs-root", sweep, "--out", out, "--alphas", 3, 1), out, "Asked for and in no cell: alpha 3")
    assert [(row["alpha"], row["n"]) for row in table(out)] == [("1", "12"), ("3", "0")]
    assert "In the data and not asked for: alpha 0, 2" in (out / ska.TABLE).read_text()


def test_alpha_in_only_one_of_the_files_of_every_cell_is_an_error(sweep, out):
    for name in ("a", "b"):
        edit(sweep / name / "pmass.json", lambda c: c[MASS].pop("2.0"))
    error = refused(out, 1, "--runs-root", sweep, "--alphas", 2)
    assert "Left out alpha 2 of `a`: not in pmass_eval" in error


def test_no_alpha_found_is_an_error_that_lists_those_in_the_data(sweep, out):
    assert "holds only alpha 0, 1, 2" in refused(out, 1, "--runs-root", sweep, "--alphas", 3)


def test_metric_that_the_files_lack_lists_those_they_have(sweep, out):
    error = refused(out, 1, "--runs-root", sweep, "--metric", "pmass_qa")
    assert "no pmass_qa; it has pmass_eval" in error
    edit(sweep / "a" / "pmass.json", lambda c: c.update(pmass={key: [] for key in c[MASS]}))
    shutil.rmtree(sweep / "b")
    assert "6 in trajectory.json, 0 in pmass, 6 in gen_lens_qa" in refused(
        out, 1, "--runs-root", sweep, "--metric", "pmass"
    )


def test_lengths_belong_to_the_metric(tmp_path, out):
    folder = write_cell(tmp_path / "r" / "a", {"1": [[1.0] * 40]}, {"1": [[1, 1, 1]]}, {"1": [40]})
    edit(
        folder / "pmass.json",
        lambda c: c.update(pmass=c[MASS], pmass_x=c[MASS], gen_lens_qa={"1": [7]}, gen_lens_x={"1": [9]}),
    )
    for metric, length in (("pmass_eval", "40"), ("pmass", "7"), ("pmass_x", "9")):
        assert run("--runs-root", tmp_path / "r", "--out", out, "--metric", metric).status == 0
        assert (out / ska.ROLLOUTS).read_text().splitlines()[1].split(",")[3] == length


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--threshold", 0), "--threshold must lie in (0, 1]"),
        (("--threshold", 1.01), "--threshold must lie in (0, 1]"),
        (("--threshold", "nan"), "--threshold must lie in (0, 1]"),
        (("--roll", 0), "--roll, in tokens, must be at least 1"),
        (("--calib-tokens", 0), "--calib-tokens must be at least 1"),
        (("--window", 0), "--window, in tokens, must be at least 1"),
        (("--ncols", 0), "--ncols must be at least 1"),
        (("--metric", "kl"), "--metric must be pmass or pmass_<name>"),
        (("--alphas", "inf"), "--alphas must be finite numbers"),
        (("--line-lw", 0), "--line-lw, in points, must be above 0"),
        (("--line-alpha", 2), "--line-alpha must lie in (0, 1]"),
        (("--dpi", 5), "--dpi must lie between 20 and 2400"),
    ],
)
def test_wrong_value_is_refused_before_any_file_is_read(tmp_path, out, flags, message):
    assert message in refused(out, 2, "--runs-root", tmp_path / "nowhere", *flags)


@pytest.mark.parametrize("flags", [(), ("--runs-root", "x", "--rows", "layer"), ("--runs-root", "x", "--roll", "long")])
def test_wrong_command_line_exits_with_2(flags):
    result = run(*flags)
    assert result.status == 2
    assert "Traceback" not in result.err + result.out


def test_out_that_is_or_lies_in_a_file_is_named(sweep, tmp_path):
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file", tmp_path / "file" / "deeper"):
        result = run("--runs-root", sweep, "--out", target)
        assert result.status == 1
        assert f"{target}: cannot be written, {tmp_path / 'file'} is not a folder" in result.err
    assert (tmp_path / "file").read_text() == "mine"


def test_folder_in_the_place_of_an_output_file_is_named_and_nothing_is_left_behind(sweep, tmp_path):
    (tmp_path / "o" / f"{ska.FIGURE}.png").mkdir(parents=True)
    (tmp_path / "o" / ska.TABLE).write_text("older")
    result = run("--runs-root", sweep, "--out", tmp_path / "o")
    assert result.status == 1
    assert f"{tmp_path / 'o'}: cannot be written ({ska.FIGURE}.png is a folder)" in result.err
    assert (tmp_path / "o" / ska.TABLE).read_text() == "older"
    assert len(list((tmp_path / "o").iterdir())) == 2


def test_not_finite_kl_is_counted_and_the_rollout_still_counts(sweep, out):
    def spoil(content):
        content[KL]["1.0"][0] = [float("nan")] * 40
        content[KL]["1.0"][1][0] = 10.0**9

    edit(sweep / "a" / "trajectory.json", spoil)
    lengths = json.loads((sweep / "a" / "pmass.json").read_text())["gen_lens_eval"]["1.0"]
    gaps = min(40, lengths[0]) + 1
    left_out(
        run("--runs-root", sweep, "--out", out), out, f"{gaps} observed tokens have KL that is not finite (gaps), in a"
    )
    assert [row["n"] for row in table(out)] == ["12"] * 3
    assert [row["no_scale"] for row in table(out)] == ["12", "1", "0"]


def test_rollout_never_measured_counts_as_alive_and_is_noted(sweep, out):
    edit(sweep / "a" / "pmass.json", lambda c: c[MASS].update({"2.0": [[float("nan")] * 3] * 6}))
    left_out(
        run("--runs-root", sweep, "--out", out), out, "6 rollouts have no pmass at any fork, and count as alive, in a"
    )


def test_negative_kl_is_noted(sweep, out):
    edit(sweep / "a" / "trajectory.json", lambda c: c[KL]["1.0"].__setitem__(0, [-3.0] + [1.0] * 39))
    left_out(run("--runs-root", sweep, "--out", out), out, "1 observed tokens have a negative KL, below the axis, in a")


def test_drop_at_the_fork_on_the_last_token_is_not_a_death_and_is_noted(tmp_path, out):
    write_cell(tmp_path / "r" / "a", {"1": [[1.0] * 20] * 2}, {"1": [[1, 1, 0.1]] * 2}, {"1": [20, 20]}, window=20)
    note = "First below the threshold at the fork on their last token, so not counted as died: 2 at alpha 1"
    left_out(run("--runs-root", tmp_path / "r", "--out", out), out, note)
    assert table(out)[0]["n_died"] == "0"


def test_copies_are_dropped_only_within_a_model_and_a_prompt(tmp_path, out):
    for name, model in (("a", "org/m"), ("b", "org/m"), ("c", "org/other")):
        random_cell(tmp_path / "r" / name, seed=0, model=model)
    edit(tmp_path / "r" / "b" / "trajectory.json", lambda c: c[KL]["1.0"][2].__setitem__(0, 0.123456789))
    result = run("--runs-root", tmp_path / "r", "--out", out)
    left_out(result, out, "17 of 18 rollouts of `b` (alpha 0, 1, 2) copy `a` exactly; left out")
    assert [row["n"] for row in table(out)] == ["12", "13", "12"]
    rows = [line.split(",") for line in (out / ska.ROLLOUTS).read_text().splitlines()]
    assert sum(row[-1] == "a" for row in rows) == 17
    result = run("--runs-root", tmp_path / "r", "--out", out, "--keep-duplicates")
    left_out(result, out, "17 of 18 rollouts of `b` (alpha 0, 1, 2) copy `a` exactly; kept (--keep-duplicates)")
    assert [row["n"] for row in table(out)] == ["18"] * 3


def test_rollouts_are_listed_with_what_identifies_their_line(tmp_path, out):
    kl = [[2.0, 4.0, 1.0], [1.0, 1.0, 3.0]]
    write_cell(tmp_path / "r" / "a", {"1": kl}, {"1": [[1, 0.1], [1, 1]]}, {"1": [40, 3]}, forks=[0, 1])
    assert run("--runs-root", tmp_path / "r", "--out", out, "--roll", 1, "--no-normalize-kl").status == 0
    header, *rows = [line.split(",") for line in (out / ska.ROLLOUTS).read_text().splitlines()]
    assert header == ska.CSV_COLUMNS
    assert rows == [
        ["a", "0", "1", "3", "1", "0", "1", "4", "4", "1", "1", ""],
        ["a", "1", "1", "3", "", "1", "1", "3", "3", "2", "3", ""],
    ]


def test_runs_root_may_be_the_only_cell_or_hold_links_to_cells(tmp_path, out):
    cell = random_cell(tmp_path / "elsewhere" / "a")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a").symlink_to(cell)
    random_cell(tmp_path / "links" / "_old", seed=1)
    tables = []
    for root in (cell, tmp_path / "links"):
        assert run("--runs-root", root, "--out", out).status == 0
        tables.append(table(out))
    assert tables[0] == tables[1]
    assert tables[0][0]["n"] == "6"


def test_alphas_are_drawn_in_numeric_order_and_matched_as_numbers(tmp_path, out):
    random_cell(tmp_path / "r" / "a", alphas=[10.0, -1.0, 2.0, 0.5])
    assert run("--runs-root", tmp_path / "r", "--out", out).status == 0
    assert [row["alpha"] for row in table(out)] == ["-1", "0.5", "2", "10"]
    assert run("--runs-root", tmp_path / "r", "--out", out, "--alphas", "10", "-1", "5e-1").status == 0
    assert [row["alpha"] for row in table(out)] == ["-1", "0.5", "10"]


def test_names_with_anything_in_them_survive_titles_and_table(tmp_path, out):
    names = ["a b", "quote'\"", "new\nline", "$x_1$", "pipe|pipe", "\\alpha", "ελ", os.fsdecode(b"raw\xff"), "模型"]
    for seed, name in enumerate(names):
        random_cell(tmp_path / "r" / name, seed, method=name.encode("utf-8", "replace").decode())
    for rows in ("cell", "method"):
        result = run("--runs-root", tmp_path / "r", "--out", out, "--rows", rows, "--formats", "png", "svg", "pdf")
        assert result.status == 0, result.err
        lines = [line for line in (out / ska.TABLE).read_text().splitlines() if line.startswith("|")]
        assert len(lines) == 2 + 3 * len(names)
        assert {line.replace("\\|", "").count("|") for line in lines} == {11}
    assert np.unique([len(line) for line in lines]).size <= 2
