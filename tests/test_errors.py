"""Input that cannot be used, or is unusual: the exit status, the message, and nothing written, lost or miscounted."""

import json
import os
import re
from pathlib import Path

import pytest
import tyro
from sweeps import SMALL, Run, contents, edit, random_cell, run, table, write_cell

import spaghetti_kl_alive as ska

KL, MASS, LENGTHS = "per_prompt_per_t_kl", "pmass_eval", "gen_lens_eval"


@pytest.fixture
def sweep(tmp_path):
    for seed, name in enumerate(("a", "b")):
        random_cell(tmp_path / "sweep" / name, seed)
    return tmp_path / "sweep"


@pytest.fixture
def out(tmp_path):
    """An output folder that holds older files."""
    folder = tmp_path / "out"
    folder.mkdir()
    for name in (ska.TABLES, ska.ROLLOUTS, f"{ska.FIGURE}.png"):
        (folder / name).write_text(f"older {name}")
    return folder


def refused(out: Path, status: int, *argv: object) -> str:
    """What is said of input that must fail: from a shell and from Python the same, with nothing written or lost."""
    before = contents(out)
    result = run(*argv, "--out", out)
    assert (result.status, result.out) == (status, "")
    assert contents(out) == before
    new = out.parent / "new"
    with pytest.raises(ska.SweepError) as raised:
        ska.write(ska.read(tyro.cli(ska.Args, args=[str(arg) for arg in (*argv, "--out", new / "folder")])))
    assert not new.exists()
    assert (raised.value.status, isinstance(raised.value, ska.UsageError)) == (status, status == 2)
    error = result.err.split("ERROR: ")[1]
    assert error == f"{raised.value}\n"
    assert error.count("\n") <= 2
    assert "Traceback" not in result.err
    return error


def read(root: Path, **flags: object) -> ska.Sweep:
    return ska.read(ska.Args(runs_root=root, **flags))


def error_of(result: Run) -> str:
    assert result.status == 1
    return result.err.split("ERROR: ")[1].rstrip("\n")


def noted(sweep: ska.Sweep, *parts: str) -> str:
    """The one note of a sweep that holds all the parts."""
    (note,) = [note for note in sweep.notes if all(part in note for part in parts)]
    return note


def counts(sweep: ska.Sweep) -> list[int]:
    return [panel.n for panel in sweep.panels]


def ends(sweep: ska.Sweep) -> list[str]:
    return [r.fate.end for r in sweep.rollouts]


# ------------------------------------------------------------------------------------- no cell at all


def test_a_runs_root_that_is_missing_is_named(tmp_path, out):
    assert f"{tmp_path / 'nowhere'}: no such folder" in refused(out, 1, "--runs-root", tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to("loop")
    assert f"{tmp_path / 'loop'}: no such folder" in refused(out, 1, "--runs-root", tmp_path / "loop")
    (tmp_path / "file").write_text("{}")
    assert f"{tmp_path / 'file'}: no such folder" in refused(out, 1, "--runs-root", tmp_path / "file")


def test_a_runs_root_without_cells_is_named_with_what_a_cell_needs(tmp_path, out):
    (tmp_path / "empty" / "_hidden").mkdir(parents=True)
    error = refused(out, 1, "--runs-root", tmp_path / "empty")
    assert str(tmp_path / "empty") in error
    assert all(name in error for name in ska.FILES)


def test_a_filter_that_matches_no_cell_is_named_with_the_cells_there_are(sweep, out):
    error = refused(out, 1, "--runs-root", sweep, "--model-contains", "gpt")
    assert str(sweep) in error and "'gpt'" in error
    assert "`a`, `b`: neither folder name nor model, org/m, contains 'gpt'" in error


def test_of_very_many_cells_the_first_ones_and_a_count_are_named(tmp_path, out):
    cell = random_cell(tmp_path / "r" / "c100")
    for i in range(101, 140):
        (tmp_path / "r" / f"c{i}").symlink_to(cell)
    error = refused(out, 1, "--runs-root", tmp_path / "r", "--model-contains", "gpt")
    assert "`c100`" in error and "c139" not in error and "org/m" in error
    assert "and 28 more" in error


def test_a_runs_root_one_level_too_high_names_the_folder_that_holds_the_cells(sweep, tmp_path, out):
    (tmp_path / "another").mkdir()
    error = refused(out, 1, "--runs-root", tmp_path)
    assert f"2 cells are in {sweep}" in error
    assert f"--runs-root {sweep}" in error


# --------------------------------------------------------------------------------- cells left out


@pytest.mark.parametrize("name", ska.FILES)
def test_a_cell_that_lacks_a_file_is_left_out_and_listed(sweep, name):
    (sweep / "b" / name).unlink()
    held = read(sweep)
    noted(held, "`b`", f"{name} is missing")
    assert counts(held) == [6, 6, 6]
    assert [cell.name for cell in held.cells] == ["a"]


@pytest.mark.parametrize("calib", [{}, {"window": 99}, {"window": None}])
def test_a_cell_whose_pmass_was_not_measured_is_left_out_whatever_its_window(sweep, calib):
    edit(sweep / "b" / "pmass.json", lambda content: content.update(computed=False))
    edit(sweep / "b" / "calib.json", lambda content: content.update(calib))
    held = read(sweep)
    noted(held, "`b`", "pmass was not measured")
    assert (counts(held), held.window) == ([6, 6, 6], 40)


@pytest.mark.parametrize("change", [lambda lists: lists.clear(), lambda lists: lists.update({a: [] for a in lists})])
def test_a_cell_that_holds_no_rollouts_is_left_out_and_listed(sweep, change):
    edit(sweep / "b" / "trajectory.json", lambda content: change(content[KL]))
    edit(sweep / "b" / "pmass.json", lambda content: (change(content[MASS]), change(content[LENGTHS])))
    held = read(sweep)
    noted(held, "`b`", "no rollouts")
    assert counts(held) == [6, 6, 6]


def test_an_alpha_without_rollouts_is_left_out_and_listed(sweep):
    edit(sweep / "b" / "trajectory.json", lambda content: content[KL].update({"1.0": []}))
    edit(sweep / "b" / "pmass.json", lambda content: (content[MASS].update({"1.0": []}), content.pop(LENGTHS)))
    held = read(sweep)
    noted(held, "alpha 1 of `b`", "no rollouts")
    assert counts(held) == [12, 6, 12]


@pytest.mark.parametrize(("name", "key"), [("trajectory.json", KL), ("pmass.json", MASS), ("pmass.json", LENGTHS)])
def test_an_alpha_that_one_list_lacks_is_left_out_and_listed(sweep, name, key):
    edit(sweep / "b" / name, lambda content: content[key].pop("2.0"))
    held = read(sweep)
    noted(held, "alpha 2 of `b`", f"not in {name if key == KL else key}")
    assert counts(held) == [12, 12, 6]


def test_what_was_left_out_is_logged_once_and_listed_in_the_summary(sweep, out):
    (sweep / "b" / "pmass.json").unlink()
    result = run("--runs-root", sweep, "--out", out, *SMALL)
    assert result.status == 0
    notes = read(sweep).notes
    assert [line.removeprefix("WARNING: ") for line in result.err.splitlines() if "WARNING" in line] == notes
    lines = (out / ska.TABLES).read_text().splitlines()
    assert [note for note in notes if lines.count(f"- {note}") == 1] == notes
    assert result.err.count("pmass.json is missing") == 1


def test_where_nothing_is_left_the_error_says_once_why(sweep, out):
    for name in "ab":
        edit(sweep / name / "pmass.json", lambda content: content.update(computed=False))
    error = refused(out, 1, "--runs-root", sweep)
    assert str(sweep) in error
    assert "`a`, `b`" in error and error.count("not measured") == 1


def test_very_many_folders_that_are_no_cells_give_one_short_note(sweep):
    for i in range(300):
        (sweep / f"x{i:03}").mkdir()
    held = read(sweep)
    note = noted(held, "`x000`")
    assert "and 288 more" in note and "x299" not in note
    assert counts(held) == [12, 12, 12]


def test_hidden_folders_files_links_to_files_and_what_this_script_wrote_are_no_cells_and_not_noted(sweep):
    plain = read(sweep)
    for name in ("_old", ".cache"):
        random_cell(sweep / name, seed=5)
    (sweep / "log.txt").write_text("")
    (sweep / "log").symlink_to("log.txt")
    ska.write(read(sweep, out=sweep / "figures", dpi=20, survival=False))
    assert "figures" in {path.name for path in sweep.iterdir()}
    held = read(sweep, out=sweep.parent / "elsewhere")
    assert [cell.name for cell in held.cells] == ["a", "b"]
    assert held.notes == plain.notes


def test_links_to_cells_are_cells_and_a_link_to_nothing_is_left_out(tmp_path, sweep):
    (tmp_path / "links").mkdir()
    for name in ("a", "b", "gone"):
        (tmp_path / "links" / name).symlink_to(sweep / name)
    held = read(tmp_path / "links")
    assert counts(held) == counts(read(sweep)) == [12, 12, 12]
    noted(held, "`gone`", "missing")


def test_a_runs_root_may_itself_be_the_only_cell(sweep, monkeypatch):
    monkeypatch.chdir(sweep / "a")
    for root in (sweep / "a", Path(), "."):
        held = read(root)
        assert (counts(held), [cell.name for cell in held.cells]) == ([6, 6, 6], ["a"])


# ---------------------------------------------------------------------------------- damaged files


DAMAGE = {
    "not an object": ("trajectory.json", lambda c: [c], "of type list, not dict"),
    "no KL": ("trajectory.json", lambda c: {"kl": c[KL]}, f"the key '{KL}' is missing"),
    "KL a list": ("trajectory.json", lambda c: {KL: []}, "of type list, not dict"),
    "alpha a number": ("trajectory.json", lambda c: {KL: c[KL] | {"1.0": 3}}, "of type int, not list"),
    "rollout a number": ("trajectory.json", lambda c: {KL: c[KL] | {"1.0": [3.0]}}, "alpha 1, rollout 0"),
    "KL a word": ("trajectory.json", lambda c: {KL: c[KL] | {"1.0": [[1], ["3"]]}}, "alpha 1, rollout 1"),
    "KL nested": ("trajectory.json", lambda c: {KL: c[KL] | {"1.0": [[[1.0]]]}}, "alpha 1, rollout 0"),
    "KL ragged": ("trajectory.json", lambda c: {KL: c[KL] | {"1.0": [[1.0, [1.0]]]}}, "trajectory.json: "),
    "KL too large": ("trajectory.json", lambda c: {KL: c[KL] | {"1.0": [[10**400]]}}, "too large"),
    "alpha a word": ("trajectory.json", lambda c: {KL: c[KL] | {"high": []}}, "'high'"),
    "alpha not finite": ("trajectory.json", lambda c: {KL: c[KL] | {"inf": []}}, "'inf'"),
    "alpha twice": ("trajectory.json", lambda c: {KL: c[KL] | {"1": c[KL]["1.0"]}}, "'1'"),
    "N of KL": ("trajectory.json", lambda c: {KL: c[KL] | {"1.0": c[KL]["1.0"][:4]}}, "4 in trajectory.json, 6 in"),
    "N of pmass": ("pmass.json", lambda c: c | {MASS: c[MASS] | {"1.0": [[1] * 3] * 5}}, "5 in pmass_eval"),
    "N of lengths": ("pmass.json", lambda c: c | {LENGTHS: c[LENGTHS] | {"1.0": [1] * 7}}, "7 in gen_lens_eval"),
    "pmass ragged": ("pmass.json", lambda c: c | {MASS: c[MASS] | {"1.0": [[1]] * 6}}, "1 values for 3 fork_points"),
    "pmass above 1": ("pmass.json", lambda c: c | {MASS: c[MASS] | {"1.0": [[1, 1, 1.001]] * 6}}, "not in [0, 1]"),
    "pmass below 0": ("pmass.json", lambda c: c | {MASS: c[MASS] | {"1.0": [[1, -0.01, 1]] * 6}}, "not in [0, 1]"),
    "pmass infinite": ("pmass.json", lambda c: c | {MASS: c[MASS] | {"1.0": [[1, 1, 1e999]] * 6}}, "not in [0, 1]"),
    "pmass a word": ("pmass.json", lambda c: c | {MASS: c[MASS] | {"1.0": [["", 1, 1]] * 6}}, "pmass_eval at alpha 1"),
    "no forks": (
        "pmass.json",
        lambda c: {k: v for k, v in c.items() if k != "fork_points"},
        "'fork_points' is missing",
    ),
    "fork negative": ("pmass.json", lambda c: c | {"fork_points": [-1, 5, 20]}, "whole numbers >= 0"),
    "fork between": ("pmass.json", lambda c: c | {"fork_points": [0.5, 5, 20]}, "whole numbers >= 0"),
    "fork null": ("pmass.json", lambda c: c | {"fork_points": [None, 5, 20]}, "whole numbers >= 0"),
    "length negative": ("pmass.json", lambda c: c | {LENGTHS: {k: [-1] * 6 for k in c[MASS]}}, "whole numbers >= 0"),
    "length null": ("pmass.json", lambda c: c | {LENGTHS: {k: [None] * 6 for k in c[MASS]}}, "whole numbers >= 0"),
    "computed a word": ("pmass.json", lambda c: c | {"computed": "no"}, '"computed" is of type str, not bool'),
    "no model": ("calib.json", lambda c: {k: v for k, v in c.items() if k != "model"}, "the key 'model' is missing"),
    "model null": ("calib.json", lambda c: c | {"model": None}, '"model"'),
    "target 0": ("calib.json", lambda c: c | {"target_kl": 0}, '"target_kl" is 0'),
    "target null": ("calib.json", lambda c: c | {"target_kl": None}, '"target_kl" is None'),
    "target huge": ("calib.json", lambda c: c | {"target_kl": 10**400}, '"target_kl"'),
    "target NaN": ("calib.json", lambda c: c | {"target_kl": float("nan")}, '"target_kl" is nan'),
    "window 0": ("calib.json", lambda c: c | {"window": 0}, '"window" is 0'),
    "window a word": ("calib.json", lambda c: c | {"window": "512"}, '"window" is 512'),
    "window huge": ("calib.json", lambda c: c | {"window": 10**400}, '"window"'),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_an_error_or_its_cell_is_left_out_on_demand(sweep, case):
    name, change, message = DAMAGE[case]
    path = sweep / "a" / name
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ska.SweepError) as raised:
        read(sweep)
    error = str(raised.value)
    assert error.startswith(f"{sweep / 'a'}{os.sep}") and message in error
    assert "--skip-bad-cells" in error
    held = read(sweep, skip_bad_cells=True)
    assert message in noted(held, "`a`", ".json: ")
    assert counts(held) == [6, 6, 6]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON, or cut off"),
        (b'{"fork_points": [0, 1', "is the sweep still writing it?"),
        (b"\xff{}", "can't decode"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "limit"),
    ],
)
def test_a_file_that_is_not_json_is_an_error(sweep, out, content, message):
    (sweep / "a" / "pmass.json").write_bytes(content)
    error = refused(out, 1, "--runs-root", sweep)
    assert str(sweep / "a" / "pmass.json") in error and message in error


def test_an_error_names_the_file_at_fault(sweep, out):
    for name in ska.FILES:
        path = sweep / "b" / name
        whole = path.read_text()
        path.write_text(whole[:50])
        assert f"{path}: " in refused(out, 1, "--runs-root", sweep)
        path.write_text(whole)


def test_a_damaged_cell_that_the_filter_leaves_out_stops_nothing(sweep):
    edit(sweep / "b" / "calib.json", lambda content: content.update(model="org/other"))
    (sweep / "b" / "trajectory.json").write_text("")
    held = read(sweep, model_contains="org/m")
    assert counts(held) == [6, 6, 6]
    noted(held, "`b`", "'org/m'")


def test_the_filter_looks_for_its_text_in_folder_names_and_models(sweep):
    edit(sweep / "b" / "calib.json", lambda content: content.update(model="org/other"))
    for text, names in (("", ["a", "b"]), ("org/", ["a", "b"]), ("other", ["b"]), ("a", ["a"])):
        held = read(sweep, model_contains=text)
        assert [cell.name for cell in held.cells] == names
        assert any(repr(text) in note for note in held.notes) == (len(names) < 2)


def test_things_that_are_no_regular_file(sweep, out):
    path = sweep / "a" / "calib.json"
    path.unlink()
    path.mkdir()
    assert f"{path}: not a regular file" in refused(out, 1, "--runs-root", sweep)
    path.rmdir()
    os.mkfifo(path)
    assert f"{path}: not a regular file" in refused(out, 1, "--runs-root", sweep)
    path.unlink()
    path.symlink_to("calib.json")
    assert "calib.json" in noted(read(sweep, skip_bad_cells=True), "`a`")


# ----------------------------------------------------------------------------- what real sweeps hold


def test_a_byte_order_mark_is_read_over(sweep):
    path = sweep / "a" / "calib.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert counts(read(sweep)) == [12, 12, 12]


def test_null_means_nan_in_kl_and_in_pmass(tmp_path):
    sweeps = []
    for name, missing in (("null", None), ("nan", float("nan"))):
        rows = [[missing, 3.0, 2.0, 1.0], [missing] * 4]
        masses = [[0.9, missing, 0.1], [missing] * 3]
        write_cell(tmp_path / name / "a", {"1": rows}, {"1": masses}, {"1": [40, 4]}, forks=[0, 1, 3])
        sweeps.append(read(tmp_path / name))
    null, nan = sweeps
    assert ends(null) == ends(nan) == ["died", "censored"]
    assert [r.fate.death for r in null.rollouts] == [3, None]  # a fork that was not measured kills nobody
    assert null.notes == nan.notes
    assert "alpha 1: 5" in noted(null, "not finite")
    assert null.rollouts[0].kl.tolist()[1:] == [3, 2, 1]


def test_pmass_may_be_above_one_by_what_single_precision_leaves(tmp_path):
    write_cell(tmp_path / "r" / "a", {"1": [[1.0] * 40]}, {"1": [[1.000001, 1, 1]]})
    assert ends(read(tmp_path / "r")) == ["alive"]


def test_without_gen_lens_a_rollout_is_as_long_as_its_kl(tmp_path):
    write_cell(tmp_path / "r" / "a", {"1": [[1.0] * 40, [1.0] * 39, [1.0] * 50]}, {"1": [[1, 1, 1]] * 3})
    held = read(tmp_path / "r")
    assert [len(r.kl) for r in held.rollouts] == [40, 39, 40]
    assert ends(held) == ["alive", "censored", "alive"]


def test_every_rollout_is_of_one_kind_also_where_its_kl_record_is_a_token_short(tmp_path, out):
    kl = {"1": [[1.0] * 39, [1.0] * 40, [1.0] * 20, [1.0] * 19, [1.0] * 39, [1.0] * 20]}
    pmass = {"1": [[1, 1, 1]] * 4 + [[1, 0, 1], [1, 1, 0]]}
    write_cell(tmp_path / "r" / "a", kl, pmass, {"1": [40, 40, 20, 20, 40, 20]})
    assert ends(read(tmp_path / "r")) == ["censored", "alive", "censored", "censored", "died", "died_last"]
    result = run("--runs-root", tmp_path / "r", "--out", out, *SMALL)
    assert result.status == 0
    (row,) = table(out)
    kinds = ("n_died", "n_died_last", "n_censored", "n_alive")
    assert {kind: row[kind] for kind in kinds} == {"n_died": "1", "n_died_last": "1", "n_censored": "3", "n_alive": "1"}
    assert row["n"] == "6"
    assert "alpha 1: 3" in noted(read(tmp_path / "r"), "KL records cut short")


def test_lengths_belong_to_the_metric(tmp_path):
    folder = write_cell(tmp_path / "r" / "a", {"1": [[1.0] * 40]}, {"1": [[1, 1, 1]]}, {"1": [40]})
    more = {"gen_lens_qa": {"1": [7]}, "gen_lens_x": {"1": [9]}}
    edit(folder / "pmass.json", lambda c: c.update(pmass=c[MASS], pmass_x=c[MASS], pmass_y=c[MASS], **more))
    for metric, length in (("pmass_eval", 40), ("pmass", 7), ("pmass_x", 9), ("pmass_y", 40)):
        assert [len(r.kl) for r in read(tmp_path / "r", metric=metric).rollouts] == [length]


def test_a_metric_that_the_files_lack_lists_those_they_have(sweep, out):
    for name in "ab":
        edit(sweep / name / "pmass.json", lambda c: c.update(pmass=c[MASS], pmass_x=c[MASS]))
    error = refused(out, 1, "--runs-root", sweep, "--metric", "pmass_qa")
    assert "no pmass_qa" in error and "pmass, pmass_eval, pmass_x" in error


def test_a_metric_that_one_cell_lacks_leaves_that_cell_out(sweep):
    edit(sweep / "a" / "pmass.json", lambda c: c.update(pmass_x=c[MASS]))
    held = read(sweep, metric="pmass_x")
    assert [cell.name for cell in held.cells] == ["a"]
    noted(held, "`b`", "no pmass_x", "it has pmass_eval")


def test_cells_of_different_windows_need_one(sweep, out):
    edit(sweep / "b" / "calib.json", lambda content: content.update(window=30))
    error = refused(out, 1, "--runs-root", sweep)
    assert "a: 40, b: 30" in error and "--window" in error
    held = read(sweep, window=35)
    assert held.window == 35
    noted(held, "--window 35 is longer than the window of `b`")
    assert read(sweep, window=30).notes == read(sweep, window=30, skip_bad_cells=True).notes
    assert not any("--window" in note for note in read(sweep, window=30).notes)
    edit(sweep / "b" / "calib.json", lambda content: content.pop("window"))
    assert "b: None" in refused(out, 1, "--runs-root", sweep)
    assert counts(read(sweep, window=30)) == [12, 12, 12]


def test_an_alpha_found_nowhere_gets_a_warning_and_a_panel(sweep):
    held = read(sweep, alphas=(3, 1))
    assert [(panel.alpha, panel.n) for panel in held.panels] == [(1, 12), (3, 0)]
    noted(held, "alpha 3", "in no cell")
    noted(held, "alpha 0, alpha 2", "not asked for")


def test_where_every_cell_lacks_the_alpha_in_one_of_its_files_the_error_says_in_which(sweep, out):
    edit(sweep / "a" / "pmass.json", lambda content: content[MASS].pop("2.0"))
    edit(sweep / "b" / "trajectory.json", lambda content: content[KL].pop("2.0"))
    error = refused(out, 1, "--runs-root", sweep, "--alphas", 2)
    assert "alpha 2 of `a`: not in pmass_eval" in error
    assert "alpha 2 of `b`: not in trajectory.json" in error


def test_where_no_alpha_is_found_the_error_lists_those_in_the_data(sweep, out):
    error = refused(out, 1, "--runs-root", sweep, "--alphas", 3)
    assert "alpha 0, 1, 2" in error and "`a`, `b`" in error


def test_alphas_come_in_numeric_order_and_are_matched_as_numbers(tmp_path):
    random_cell(tmp_path / "r" / "a", alphas=[10.0, -1.0, 2.0, 0.5])
    assert [panel.alpha for panel in read(tmp_path / "r").panels] == [-1, 0.5, 2, 10]
    assert [panel.alpha for panel in read(tmp_path / "r", alphas=(10, -1, 5e-1)).panels] == [-1, 0.5, 10]
    assert [panel.alpha for panel in read(tmp_path / "r", alphas=(2, 2.0)).panels] == [2]


def test_minus_zero_is_zero(tmp_path):
    random_cell(tmp_path / "r" / "a", alphas=[-0.0, 1.0])
    random_cell(tmp_path / "r" / "b", seed=1, alphas=[0.0])
    for alphas in ((), (-0.0, 1)):
        assert [(panel.label, panel.n) for panel in read(tmp_path / "r", alphas=alphas).panels] == [("0", 12), ("1", 6)]
    random_cell(tmp_path / "steered" / "a", alphas=[1.0])
    assert [panel.label for panel in read(tmp_path / "steered", alphas=(-0.0, 1)).panels] == ["0", "1"]


def test_alphas_that_print_alike_are_told_apart_wherever_they_are_named(tmp_path, out):
    close = (0.1234567, 0.12345671)
    random_cell(tmp_path / "r" / "a", alphas=close)
    random_cell(tmp_path / "r" / "b", alphas=close, seed=1)
    for alpha in close:
        edit(tmp_path / "r" / "b" / "trajectory.json", lambda content, key=str(alpha): content[KL].pop(key))
    random_cell(tmp_path / "r" / "c", alphas=close[:1], seed=2)
    result = run("--runs-root", tmp_path / "r", "--out", out, *SMALL, "--alphas", *close, 0.12345672)
    assert result.status == 0
    assert [row["alpha"] for row in table(out)] == ["0.1234567", "0.12345671", "0.12345672"]
    listed = {line.split(",")[2] for line in (out / ska.ROLLOUTS).read_text().splitlines()[1:]}
    assert listed == {"0.1234567", "0.12345671"}
    log = result.err + (out / ska.TABLES).read_text()
    assert log.count("alpha 0.12345672") >= 2
    assert "alpha 0.123457" not in log and "alpha 0.123457" not in result.out
    assert "alpha 0.12345671: 6" in noted(read(tmp_path / "r"), "shorter than --roll")


def test_an_alpha_beyond_the_square_of_any_number_is_drawn(tmp_path, out):
    alphas = ("-1e200", "1", "1e200")
    write_cell(tmp_path / "r" / "a", {a: [[0.5] * 40] for a in alphas}, {a: [[1, 0, 1]] for a in alphas})
    result = run("--runs-root", tmp_path / "r", "--out", out, "--dpi", 20)
    assert (result.status, "Traceback" in result.err) == (0, False)
    assert [row["alpha"] for row in table(out)] == ["-1e+200", "1", "1e+200"]
    assert [row["over_budget"] for row in table(out, 1)] == ["0%"] * 3
    assert [row["died_within"] for row in table(out, 1)] == ["1"] * 3


# ------------------------------------------------------------------------------------- wrong use


WRONG = [
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
]


@pytest.mark.parametrize(("flags", "message"), WRONG)
def test_a_wrong_value_is_refused_before_any_file_is_read(tmp_path, out, flags, message):
    assert message in refused(out, 2, "--runs-root", tmp_path / "nowhere", *flags)


def test_all_wrong_values_are_named_at_once(tmp_path, out):
    error = refused(out, 2, "--runs-root", tmp_path / "nowhere", "--roll", 0, "--ncols", 0)
    assert "--roll" in error and "--ncols" in error


def test_a_palette_that_nobody_knows_is_refused_with_some_that_are_known(tmp_path, out):
    import seaborn

    error = refused(out, 2, "--runs-root", tmp_path / "nowhere", "--palette", "no such palette")
    assert "'no such palette'" in error
    known = {*seaborn.palettes.SEABORN_PALETTES, "Set1", "Set2", "Dark2", "Paired", "husl", "hls"}
    assert len(known & {*re.findall(r"\w+", error)}) >= 3


@pytest.mark.parametrize(
    "flags",
    [(), ("--runs-root", "x", "--rows", "layer"), ("--runs-root", "x", "--roll", "long"), ("--runs-root", "x", "--no")],
)
def test_a_command_line_that_makes_no_sense_exits_with_2(flags):
    result = run(*flags)
    assert (result.status, result.out) == (2, "")
    assert "Traceback" not in result.err


@pytest.mark.parametrize("flags", [{"edges": "wrap"}, {"calib_on": "all"}, {"rows": "layer"}, {"formats": ("gif",)}])
def test_a_word_that_a_flag_does_not_know_is_refused_from_python_too(sweep, flags):
    with pytest.raises(ska.UsageError, match="--" + next(iter(flags)).replace("_", "-")):
        read(sweep, **flags)


def test_a_figure_larger_than_a_png_can_hold_is_refused_with_its_size_and_what_makes_it_smaller(tmp_path, out):
    alphas = [str(k) for k in range(180)]
    write_cell(tmp_path / "r" / "a", {a: [[1.0]] for a in alphas}, {a: [[1, 1, 1]] for a in alphas})
    held = read(tmp_path / "r", dpi=2400, out=out)
    before = contents(out)
    with pytest.raises(ska.SweepError) as raised:
        ska.write(held, lambda how_far: pytest.fail(f"drawing has begun: {how_far}"))
    text = str(raised.value)
    assert (raised.value.status, contents(out)) == (1, before)
    width, height = map(int, re.search(r"(\d+) x (\d+) pixels", text).groups())
    assert 2400 * 6 < width < 2400 * 12 and height > 2400 * 180 / 6
    assert "--alphas" in text and "--dpi" in text


# ------------------------------------------------------------------------------------- the output


def test_an_out_that_is_or_lies_in_a_file_is_named(sweep, tmp_path):
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file", tmp_path / "file" / "deeper"):
        error = error_of(run("--runs-root", sweep, "--out", target, *SMALL))
        assert str(target) in error and "--out" in error
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_in_the_place_of_an_output_file_is_named_and_nothing_is_left_behind(sweep, tmp_path):
    (tmp_path / "o" / f"{ska.FIGURE}.png").mkdir(parents=True)
    (tmp_path / "o" / ska.TABLES).write_text("older")
    error = error_of(run("--runs-root", sweep, "--out", tmp_path / "o", *SMALL))
    assert str(tmp_path / "o") in error and f"{ska.FIGURE}.png is a folder" in error
    assert (tmp_path / "o" / ska.TABLES).read_text() == "older"
    assert len(list((tmp_path / "o").iterdir())) == 2


# -------------------------------------------------------------------------------------- the notes


def test_kl_that_is_not_finite_is_counted_and_its_rollout_still_counts(tmp_path):
    kl = [[float("nan")] * 40, [10.0**9, *[1.0] * 39], [float("-inf"), *[1.0] * 45], [1.0] * 40]
    write_cell(tmp_path / "r" / "a", {"1": kl}, {"1": [[1, 1, 1]] * 4})
    held = read(tmp_path / "r")
    assert "alpha 1: 42" in noted(held, "not finite")
    assert (counts(held), held.panels[0].budget["no_scale"]) == ([4], 1)


def test_kl_that_is_negative_is_counted(tmp_path):
    write_cell(tmp_path / "r" / "a", {"1": [[-3.0, -1e-6, *[1.0] * 38]]}, {"1": [[1, 1, 1]]})
    assert "alpha 1: 1" in noted(read(tmp_path / "r"), "negative KL")


def test_rollouts_that_were_never_measured_are_counted(tmp_path):
    nan = float("nan")
    write_cell(tmp_path / "r" / "a", {"1": [[1.0] * 40] * 3}, {"1": [[nan] * 3, [nan, nan, 1], [nan] * 3]})
    held = read(tmp_path / "r")
    assert "alpha 1: 2" in noted(held, "without pmass")
    assert ends(held) == ["alive"] * 3


def test_deaths_without_steering_are_a_warning_about_the_probe(tmp_path):
    pmass = {"0": [[1, 0.1, 1], [1, 1, 1], [1, 1, 0.1]], "1": [[0.1, 1, 1]] * 3}
    write_cell(tmp_path / "r" / "a", {a: [[1.0] * 20] * 3 for a in pmass}, pmass, window=20)
    note = noted(read(tmp_path / "r"), "without steering")
    assert "alpha 0: 2" in note and "alpha 1" not in note


def test_panels_where_more_than_half_of_the_deaths_recovered_are_a_warning(tmp_path):
    pmass = {"1": [[1, 0.1, 1], [1, 0.1, 0.1]], "2": [[1, 0.1, 1], [0.1, 1, 0.1], [0.1, 0.1, 0.1]]}
    write_cell(tmp_path / "r" / "a", {a: [[1.0] * 40] * len(rows) for a, rows in pmass.items()}, pmass)
    note = noted(read(tmp_path / "r"), "above the threshold again")
    assert "alpha 2: 2 of 3" in note and "alpha 1" not in note


def test_kl_records_cut_short_and_drops_seen_after_their_end_are_counted(tmp_path):
    pmass = {"1": [[1, 1, 0.1], [1, 1, 0.1], [1, 0.1, 0.1], [1, 1, 1]]}
    write_cell(tmp_path / "r" / "a", {"1": [[1.0] * 12] * 4}, pmass, {"1": [40, 12, 40, 30]})
    held = read(tmp_path / "r")
    assert ends(held) == ["censored", "censored", "died", "censored"]
    assert "alpha 1: 3" in noted(held, "KL records cut short")
    assert "alpha 1: 2" in noted(held, "after what was observed")


def test_rollouts_shorter_than_the_rolling_mean_are_counted(tmp_path):
    write_cell(tmp_path / "r" / "a", {"1": [[1.0] * 40, [1.0] * 9]}, {"1": [[1, 1, 1]] * 2})
    note = noted(read(tmp_path / "r", roll=10), "--roll 10")
    assert "alpha 1: 1" in note and "nothing is smoothed" not in note
    assert not any("--roll" in note for note in read(tmp_path / "r", roll=9).notes)
    assert not any("--roll" in note for note in read(tmp_path / "r", roll=10, edges="shrink").notes)


def test_a_rolling_mean_longer_than_the_window_is_said_to_smooth_nothing(tmp_path):
    write_cell(tmp_path / "r" / "a", {"1": [[1.0] * 40, [1.0] * 9]}, {"1": [[1, 1, 1]] * 2})
    noted(read(tmp_path / "r", roll=41), "--roll 41", "nothing is smoothed")
    assert not any("nothing is smoothed" in note for note in read(tmp_path / "r", roll=1).notes)


@pytest.mark.parametrize("kind", ["method", "model"])
def test_what_is_pooled_is_noted_with_the_flag_that_separates_it(sweep, kind):
    edit(sweep / "b" / "calib.json", lambda content: content.update({kind: "another"}))
    noted(read(sweep), "another", f"--rows {kind}", "pooled")
    assert not any("pooled" in note for note in read(sweep, rows=kind).notes)


def test_notes_name_the_row_that_they_are_about(tmp_path):
    nan = float("nan")
    kl = {"0": [[1.0] * 20] * 2, "1": [[nan] * 9, [-1.0] * 12]}
    late = {"0": [[1, 0.1, 0.9], [1, 1, 1]], "1": [[nan] * 3, [1, 1, 0.1]]}
    well = {"0": [[1, 1, 1]] * 2, "1": [[1, 1, 1]] * 2}
    for name, pmass in (("pca", late), ("mean", well)):
        rows = kl if name == "pca" else {a: [[1.0] * 40] * 2 for a in kl}
        write_cell(tmp_path / name, rows, pmass, {a: [40, 12 if name == "pca" else 40] for a in kl}, method=name)
    held = read(tmp_path, rows="method", roll=15)
    about = [note for note in held.notes if "alpha 0: " in note or "alpha 1: " in note]
    assert len(about) == 8
    for note in about:
        assert note.count("alpha ") == note.count("pca at alpha ") > 0


def test_long_lists_in_notes_are_cut_to_the_first_ones_and_a_count(tmp_path):
    alphas = [str(k) for k in range(1, 31)]
    write_cell(tmp_path / "r" / "a", {a: [[1.0]] for a in alphas}, {a: [[1, 1, 1]] for a in alphas})
    note = noted(read(tmp_path / "r"), "--roll 65")
    assert "alpha 12: 1" in note and "alpha 13: 1" not in note
    assert "and 18 more" in note


# ------------------------------------------------------------------------------------------ copies


def test_exact_copies_are_dropped_only_within_a_model_and_a_prompt(tmp_path):
    for name, model in (("a", "org/m"), ("b", "org/m"), ("c", "org/other")):
        random_cell(tmp_path / "r" / name, seed=0, model=model)
    edit(tmp_path / "r" / "b" / "trajectory.json", lambda c: c[KL]["1.0"][2].__setitem__(0, 0.123456789))
    edit(tmp_path / "r" / "b" / "pmass.json", lambda c: c[MASS]["2.0"][1].__setitem__(2, 0.987654321))
    held = read(tmp_path / "r")
    assert counts(held) == [12, 13, 13]
    assert [r.cell.name for r in held.rollouts if r.copy_of] == ["b"] * 16
    assert {r.copy_of for r in held.rollouts} == {"", "a"}
    noted(held, "16 of 18 of `b`", "`a`", "left out")
    kept = read(tmp_path / "r", keep_duplicates=True)
    assert counts(kept) == [18, 18, 18]
    noted(kept, "16 of 18 of `b`", "`a`", "--keep-duplicates")


def test_a_copy_at_another_prompt_or_of_another_length_is_none(tmp_path):
    rows = [[1.0] * 30, [2.0] * 30, [3.0] * 30]
    pmass = {"1": [[1, 1, 1]] * 3}
    write_cell(tmp_path / "r" / "a", {"1": rows}, pmass, {"1": [30, 30, 30]})
    write_cell(tmp_path / "r" / "b", {"1": [rows[1], rows[0], rows[2]]}, pmass, {"1": [30, 30, 31]})
    assert counts(read(tmp_path / "r")) == [6]
    edit(tmp_path / "r" / "b" / "pmass.json", lambda c: c[LENGTHS].update({"1": [30, 30, 30]}))
    assert counts(read(tmp_path / "r")) == [5]


def test_copies_are_looked_for_within_a_panel(tmp_path):
    for name in "ab":
        random_cell(tmp_path / name, seed=0, method=name, alphas=[0.0, 1.0])
    assert counts(read(tmp_path)) == [6, 6]
    assert counts(read(tmp_path, rows="method")) == [6, 6, 6, 6]  # every method keeps its own control
    assert not any("opies" in note for note in read(tmp_path, rows="method").notes)


# ------------------------------------------------------------------------------------- the outputs


def test_rollouts_are_listed_with_what_identifies_their_line(tmp_path, out):
    kl = [[2.0, 4.0, 1.0], [1.0, 1.0, 3.0]]
    write_cell(tmp_path / "r" / "a", {"1": kl}, {"1": [[1, 0.1], [1, 1]]}, {"1": [40, 3]}, forks=[0, 1])
    write_cell(tmp_path / "r" / "b", {"1": kl[:1]}, {"1": [[1, 0.1]]}, {"1": [40]}, forks=[0, 1])
    assert run("--runs-root", tmp_path / "r", "--out", out, "--roll", 1, "--no-normalize-kl", *SMALL).status == 0
    header, *rows = [line.split(",") for line in (out / ska.ROLLOUTS).read_text().splitlines()]
    first, second, copy = (dict(zip(header, row, strict=True)) for row in rows)
    about = ("cell", "prompt", "alpha", "observed_tokens", "end", "death_token", "copy_of")
    assert [first[key] for key in about] == ["a", "0", "1", "3", "died", "1", ""]
    assert [second[key] for key in about] == ["a", "1", "1", "3", "censored", "", ""]
    assert [copy[key] for key in about] == ["b", "0", "1", "3", "died", "1", "a"]
    line = ("line_max", "line_max_token", "line_end")
    assert [first[key] for key in line] == ["4", "1", "1"]
    assert [second[key] for key in line] == ["3", "2", "3"]


def test_a_figure_of_an_earlier_run_in_another_format_is_named_in_a_warning(sweep, out):
    for ending in ska.FORMATS:
        (out / f"{ska.FIGURE}.{ending}").write_text("older")
    result = run("--runs-root", sweep, "--out", out, *SMALL, "--formats", "pdf")
    assert result.status == 0
    warned = [line for line in result.err.splitlines() if str(out) in line]
    assert all(line.startswith("WARNING: ") and "earlier run" in line for line in warned)
    named = {ending for ending in ska.FORMATS if f"{out / ska.FIGURE}.{ending}" in "".join(warned)}
    assert named == {"png", "svg"}


def test_names_with_anything_in_them_survive_titles_and_tables(tmp_path, out):
    names = ["a b", "quote'\"", "new\nline", "$x_1$", "pipe|pipe", "\\alpha", "ελ", os.fsdecode(b"raw\xff"), "模型"]
    for seed, name in enumerate(names):
        random_cell(tmp_path / "r" / name, seed, alphas=[1.0], method=name.encode("utf-8", "replace").decode())
    result = run("--runs-root", tmp_path / "r", "--out", out, *SMALL, "--rows", "method", "--formats", "svg", "pdf")
    assert result.status == 0, result.err
    assert {line.split(": ")[0] for line in result.err.splitlines()} == {"INFO", "WARNING"}
    for k in range(3):
        assert [row["alpha"] for row in table(out, k)] == ["1"] * len(names)
    assert {row["n"] for row in table(out)} == {"6"}
    assert "pipe\\|pipe" in {row["method"] for row in table(out)}
