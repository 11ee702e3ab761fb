"""Input that cannot be used, or is unusual: the exit status, the message, and nothing written, lost or miscounted."""

import json
import os
import re
import shutil
import subprocess
import sys
from unittest.mock import Mock

import pytest
import tyro
from processes import shell
from sweeps import SMALL, contents, noted, random_cell, read, run, table, write_cell

import spaghetti_kl_alive as ska

KL, MASS, LENGTHS = "per_prompt_per_t_kl", "pmass_eval", "gen_lens_eval"
RETRY_AFTER = ska.RETRY_AFTER  # the real one: the other tests do not wait
NAN, INF, GONE = float("nan"), float("inf"), object()
FILES = {KL: ska.TRAJECTORY_FILE} | dict.fromkeys(("model", "method", "target_kl", "window"), ska.CALIB_FILE)


@pytest.fixture
def out(tmp_path):
    """An output folder that holds older files."""
    (tmp_path / "out").mkdir()
    for name in (ska.SUMMARY_FILE, ska.ROLLOUTS_FILE, f"{ska.FIGURE_STEM}.png"):
        (tmp_path / "out" / name).write_text("older")
    return tmp_path / "out"


def refused(out, status, *argv):
    """What is said of input that must fail: from a shell and from Python the same, with nothing written or lost."""
    before = contents(out)
    result = run(*argv, "--out", out)
    assert (result.status, result.out) == (status, "")
    assert contents(out) == before
    new = out.parent / "new"
    with pytest.raises(ska.SweepError) as raised:
        ska.write(ska.read(tyro.cli(ska.Args, args=[str(arg) for arg in (*argv, "--out", new / "folder")])))
    assert not new.exists()
    assert (raised.value.exit_status, isinstance(raised.value, ska.UsageError)) == (status, status == 2)
    error = result.err.split("ERROR: ")[1]
    assert error == f"{raised.value}\n"
    assert error.count("\n") <= 2
    return error


def change(cell, key, value):
    """Change one key of a cell, in the file that holds it. A function is given what is there; GONE removes it."""
    path = cell / FILES.get(key, ska.PMASS_FILE)
    content = json.loads(path.read_text())
    content[key] = value(content[key]) if callable(value) else value
    path.write_text(json.dumps({name: each for name, each in content.items() if each is not GONE}))


def at(alpha, value):
    """A change of what stands at one alpha."""
    return lambda lists: {key: each for key, each in (lists | {alpha: value}).items() if each is not GONE}


def counts(sweep):
    return [panel.n for panel in sweep.panels]


def names(sweep):
    return [cell.name for cell in sweep.cells]


def test_a_runs_root_without_cells_is_named_with_what_is_missing_and_where_cells_are(sweep, tmp_path, out):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("{}")
    for name in ("nowhere", "loop", "file"):
        error = refused(out, 1, "--runs-root", tmp_path / name)
        assert f"{tmp_path / name}: no such folder" in error and "--runs-root" in error
    random_cell(tmp_path / "empty" / "_hidden")
    error = refused(out, 1, "--runs-root", tmp_path / "empty")
    assert str(tmp_path / "empty") in error and all(name in error for name in ska.CELL_FILES)
    (tmp_path / "empty").rename(tmp_path / "_empty")
    assert f"2 cells in {sweep}: give --runs-root {sweep}" in refused(out, 1, "--runs-root", tmp_path)
    (sweep / "b" / ska.CALIB_FILE).unlink()
    assert f"1 cell in {sweep}: " in refused(out, 1, "--runs-root", tmp_path)


def test_where_no_cell_can_be_used_the_error_says_why_once_for_each_reason(sweep, out):
    error = refused(out, 1, "--runs-root", sweep, "--model-contains", "gpt")
    assert str(sweep) in error and "`a`, `b`" in error and "'gpt' (--model-contains)" in error
    for name in "ab":
        change(sweep / name, "computed", False)
    (sweep / "c").mkdir()
    (sweep / "c" / ska.CALIB_FILE).write_text("[]")
    error = refused(out, 1, "--runs-root", sweep, "--skip-bad-cells")
    assert str(sweep) in error and error.count("not measured") == 1
    assert "`a`, `b`: pmass was not measured" in error and "`c`: calib.json: its content is of type list" in error


LEFT_OUT = [  # the keys that are changed, to what, or the file that is missing, and the reason
    *((name, f"{name} is missing") for name in ska.CELL_FILES),
    ({"computed": False}, "pmass was not measured"),
    ({"computed": False, "pmass_eval": {}, "window": 9}, "pmass was not measured"),
    ({KL: {}, MASS: {}, LENGTHS: {}}, "no rollouts"),
    ({KL: {"1.0": []}, MASS: {"1.0": []}, LENGTHS: GONE}, "no rollouts"),
    ({MASS: at("1.0", [])}, "pmass_eval was not measured"),
    ({"pmass": {"1.0": [[1]]}, MASS: at("1.0", [])}, "pmass_eval was not measured; pmass was"),
    ({"pmass": {"1.0": [[1]]}, "pmass_x": {"1.0": []}, MASS: GONE}, "pmass.json has no pmass_eval; it has pmass"),
]


@pytest.mark.parametrize(("changes", "reason"), LEFT_OUT)
def test_a_cell_that_has_nothing_to_show_is_left_out_and_listed_with_the_reason(sweep, out, changes, reason):
    if isinstance(changes, str):
        (sweep / "b" / changes).unlink()
    else:
        for key, value in ({KL: lambda c: {"1.0": c["1.0"]}, MASS: lambda c: {"1.0": c["1.0"]}} | changes).items():
            change(sweep / "b", key, value)
    held = read(sweep)
    assert noted(held, "Left out `b`: ", reason).split(" (")[0].endswith(reason)
    assert (counts(held), names(held), held.window) == ([6, 6, 6], ["a"], 40)
    shutil.rmtree(sweep / "a")
    shutil.copytree(sweep / "b", sweep / "a")
    assert reason in refused(out, 1, "--runs-root", sweep).split("`a`, `b`: ")[1]


@pytest.mark.parametrize("key", [KL, MASS, LENGTHS])
def test_an_alpha_that_one_list_lacks_is_left_out_and_listed(sweep, key):
    change(sweep / "b", key, at("2.0", GONE))
    assert noted(read(sweep), "alpha 2 of `b`: not in").endswith(f"not in {ska.TRAJECTORY_FILE if key == KL else key}")
    for empty in (KL, MASS, LENGTHS):
        change(sweep / "b", empty, at("1.0", []))
    noted(read(sweep), "alpha 1 of `b`: no rollouts")
    change(sweep / "b", LENGTHS, GONE)  # as in older runs, which is no reason
    held = read(sweep)
    assert counts(held) == ([12, 6, 12] if key == LENGTHS else [12, 6, 6])
    assert LENGTHS not in str(held.notes)


def test_what_is_no_cell_is_not_noted(sweep):
    plain = read(sweep)
    for name in ("_old", ".cache"):
        random_cell(sweep / name, 5)
    (sweep / "log.txt").write_text("")
    (sweep / "log").symlink_to("log.txt")
    (sweep / "plots").mkdir()
    (sweep / "plots" / "config.json").write_text("{}")
    held = read(sweep, out=sweep.parent / "elsewhere")
    assert (names(held), held.notes) == (["a", "b"], plain.notes)


def test_links_to_cells_are_cells_and_links_to_nothing_are_said_to_be_that(tmp_path, sweep):
    (tmp_path / "links").mkdir()
    for name in ("a", "b", "gone"):
        (tmp_path / "links" / name).symlink_to(sweep / name)
    held = read(tmp_path / "links")
    assert counts(held) == [12, 12, 12]
    noted(held, "Left out `gone`: a link to nothing")
    (sweep / "b" / ska.TRAJECTORY_FILE).unlink()
    (sweep / "b" / ska.TRAJECTORY_FILE).symlink_to("../.git/annex/objects/x")
    noted(read(sweep), "Left out `b`: trajectory.json is a link to nothing")


def test_a_runs_root_may_itself_be_the_only_cell_and_cells_below_it_are_named(sweep, monkeypatch):
    monkeypatch.chdir(sweep / "a")
    for root in (sweep / "a", "."):
        held = read(root)
        assert (counts(held), names(held), held.name) == ([6, 6, 6], ["a"], "a")
        assert "only cell" not in str(held.notes)
    for name in ("deeper", "z"):
        random_cell(sweep / "a" / name)
    held = read(sweep / "a")
    assert names(held) == ["a"]
    assert str(sweep / "a") in noted(held, "`deeper`, `z`", "only cell")


DAMAGE = [  # the key, what becomes of it, and what is said
    (KL, GONE, f"the key '{KL}' is missing"),
    (KL, [], f'"{KL}" is of type list, not dict'),
    (KL, at("1.0", 3), "at alpha 1.0 is of type int, not list"),
    (KL, at("1.0", [3.0]), "alpha 1, rollout 0 is of type float, not list"),
    (KL, at("1.0", [[1], ["3"]]), "alpha 1, rollout 1 is not a list of numbers"),
    (KL, at("1.0", [[1.0], [1.0, [1.0]]]), "alpha 1, rollout 1 is not a list of numbers"),
    (KL, at("1.0", [[1.0], [10**400]]), "alpha 1, rollout 1 holds a number that is too large"),
    (KL, lambda lists: lists | {"high": []}, "'high'"),
    (KL, lambda lists: lists | {"inf": []}, "'inf'"),
    (KL, lambda lists: lists | {"1.0000000000000002": lists["1.0"]}, "'1.0000000000000002'"),
    (MASS, at("1.0", [[1] * 3] * 5), "6 in trajectory.json, 5 in pmass_eval, 6 in gen_lens_eval"),
    (LENGTHS, at("1.0", [1] * 7), "6 in trajectory.json, 6 in pmass_eval, 7 in gen_lens_eval"),
    (MASS, at("1.0", [[1]] * 6), "1 values for 3 fork_points"),
    (MASS, at("1.0", [[1, 1, 1.001]] * 6), "not in [0, 1]: 1, 1, 1.001"),
    (MASS, at("1.0", [[1, -0.01, 1]] * 6), "not in [0, 1]: 1, -0.01, 1"),
    (MASS, at("1.0", [[1, 1, 1], ["", 1, 1]]), "pmass_eval at alpha 1, rollout 1, is not a list of numbers"),
    ("fork_points", GONE, "the key 'fork_points' is missing"),
    ("fork_points", [0.5, 5, 20], "whole numbers >= 0"),
    (LENGTHS, at("1.0", [-1] * 6), "gen_lens_eval at alpha 1 must hold only whole numbers >= 0"),
    (LENGTHS, at("1.0", [None] * 6), "gen_lens_eval at alpha 1 must hold only whole numbers >= 0"),
    ("computed", "no", '"computed" is of type str, not bool'),
    ("model", GONE, "the key 'model' is missing"),
    ("method", None, '"method" is of type NoneType, not str'),
    ("target_kl", "1.0", "\"target_kl\" is '1.0', not a number"),
    ("target_kl", 0, '"target_kl" is 0, not'),
    ("target_kl", NAN, '"target_kl" is nan, not'),
    ("target_kl", 10**400, '"target_kl" is 1000'),
    ("window", "512", "\"window\" is '512', not a number"),
    ("window", 40.5, '"window" is 40.5, not'),
    ("window", INF, '"window" is inf, not'),
]


@pytest.mark.parametrize(("key", "value", "message"), DAMAGE)
def test_a_damaged_file_is_an_error_or_its_cell_is_left_out_on_demand(sweep, key, value, message):
    change(sweep / "b", key, value)
    with pytest.raises(ska.SweepError) as raised:
        read(sweep)
    error = str(raised.value)
    name = FILES.get(key, ska.PMASS_FILE)
    assert error.startswith(f"{sweep / 'b' / name}: ")
    assert message in error and "--skip-bad-cells" in error
    assert error.count("\n") == 1 and len(error) < 400
    held = read(sweep, skip_bad_cells=True)
    assert message in noted(held, f"Left out `b`: {name}: ")
    assert counts(held) == [6, 6, 6]


CALIB = '{"c_star": 1, "target_kl": 1, "window": 40, "method": "é", "model": "m"}'
BYTES = [
    (b" \n", "empty, or cut off"),
    (CALIB[:-9].encode(), "not JSON, or cut off"),
    (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
        "Git LFS pointer, not the file itself: run git lfs pull",
    ),
    (2 * CALIB.encode(), "more than one JSON document"),
    (b"\n<!DOCTYPE html>\n<html>404</html>", "HTML"),
    (CALIB.encode("latin-1"), "save it as UTF-8"),
    (b"[" * 200_000, "nested too deeply"),
    ("mkdir", "not a regular file"),
    ("mkfifo", "not a regular file"),
    ("ln -s calib.json", "ymbolic link"),
]


@pytest.mark.parametrize(("content", "message"), BYTES)
def test_a_file_that_does_not_parse_is_an_error_that_says_what_it_is(sweep, out, content, message):
    path = sweep / "a" / ska.CALIB_FILE
    path.unlink()
    if isinstance(content, str):
        subprocess.run([*content.split(), path], check=True)
    else:
        path.write_bytes(content)
    error = refused(out, 1, "--runs-root", sweep)
    assert error.startswith(f"{path}: ") and message in error and "--skip-bad-cells" in error
    assert ("still writing" in error) == message.endswith("cut off")
    assert message in noted(read(sweep, skip_bad_cells=True), "Left out `a`: calib.json: ")


def test_a_cut_off_file_that_is_seconds_old_is_waited_for_once(sweep, monkeypatch):
    monkeypatch.setattr(ska, "RETRY_AFTER", RETRY_AFTER)
    path, waited = sweep / "b" / ska.TRAJECTORY_FILE, []
    whole = becomes = path.read_text()

    def sleep(seconds):  # meanwhile the sweep goes on writing
        waited.append(seconds)
        path.write_text(becomes)

    monkeypatch.setattr(ska.time, "sleep", sleep)
    for content in (whole[:-9], ""):
        path.write_text(content)
        assert counts(read(sweep)) == [12, 12, 12]
    assert waited == [RETRY_AFTER] * 2 and 0.3 <= RETRY_AFTER <= 1
    for becomes, age, n_waits in ((whole[:-5], 0, 1), (whole[:-5], 60, 0), ("<html>", 0, 0)):  # cut for good; not cut
        waited.clear()
        path.write_text(becomes)
        os.utime(path, (path.stat().st_mtime - age,) * 2)
        with pytest.raises(ska.SweepError, match=ska.TRAJECTORY_FILE):
            read(sweep)
        assert len(waited) == n_waits


@pytest.mark.parametrize("kind", [KeyError, TypeError, ValueError, OverflowError])
def test_an_error_of_the_script_itself_is_never_blamed_on_the_data(sweep, out, monkeypatch, kind):
    monkeypatch.setattr(ska, "rolling_mean", Mock(side_effect=kind("pmass")))
    for skip_bad_cells in (False, True):
        with pytest.raises(kind, match="pmass"):
            read(sweep, skip_bad_cells=skip_bad_cells)
    with pytest.raises(kind, match="pmass"):
        run("--runs-root", sweep, "--out", out)


def test_a_filter_looks_in_folder_names_and_models_and_what_it_leaves_out_may_be_damaged(sweep):
    change(sweep / "b", "model", "org/other")
    for text, matching in (("", ["a", "b"]), ("org/", ["a", "b"]), ("other", ["b"]), ("a", ["a"])):
        held = read(sweep, model_contains=text)
        assert names(held) == matching
        assert any(repr(text) in note for note in held.notes) == (len(matching) == 1)
    noted(read(sweep), "2 models pooled: org/m, org/other (--rows model ")
    assert "pooled" not in str(read(sweep, rows="model").notes)
    (sweep / "b" / ska.TRAJECTORY_FILE).write_text("")
    noted(read(sweep, model_contains="org/m"), "Left out `b`: ", "'org/m'")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_files_in_any_unicode_encoding_are_read(sweep, encoding):
    for name in ska.CELL_FILES:
        path = sweep / "a" / name
        path.write_text(path.read_text().replace("mean_diff", "Méthode"), encoding=encoding)
    held = read(sweep)
    assert counts(held) == [12, 12, 12]
    noted(held, "2 methods pooled: Méthode, mean_diff (--rows method ")


def test_lengths_belong_to_the_metric_and_are_those_of_the_kl_where_there_are_none(tmp_path):
    # pmass may be above one by what single precision leaves
    masses = {"1": [[1.000001, 1, 1]]}
    write_cell(tmp_path / "r" / "a", {"1": [[1.0] * 50]}, masses, {"1": [30]})
    of_others = dict.fromkeys(("pmass", "pmass_x", "pmass_y"), masses)
    for key, value in (of_others | {"gen_lens_qa": {"1": [7]}, "gen_lens_x": {"1": [9]}}).items():
        change(tmp_path / "r" / "a", key, value)
    for metric, length in (("pmass_eval", 30), ("pmass", 7), ("pmass_x", 9), ("pmass_y", 40)):
        assert [len(r.kl) for r in read(tmp_path / "r", metric=metric).rollouts] == [length]


def test_cells_of_different_windows_need_one(sweep, out):
    change(sweep / "b", "window", 30)
    paths = [sweep / name / ska.CALIB_FILE for name in "ab"]
    error = refused(out, 1, "--runs-root", sweep)
    assert f"{paths[0]}: 40, {paths[1]}: 30" in error and "--window" in error
    noted(read(sweep, window=35), "--window 35 is longer than the window of `b`")
    assert "--window" not in str(read(sweep, window=30).notes)
    assert counts(read(sweep, model_contains="a")) == [6, 6, 6]  # only the cells that are used must agree
    for name in "ab":
        change(sweep / name, "window", GONE)
    assert f"{paths[0]}: no window, {paths[1]}: no window" in refused(out, 1, "--runs-root", sweep)
    assert read(sweep, window=30).window == 30
    for name in "ab":
        change(sweep / name, "window", 40.0)
    assert "window 40," in read(sweep).settings_text  # a whole number, however it was written


def test_an_alpha_found_nowhere_gets_a_warning_and_a_panel_or_is_an_error(sweep, out):
    held = read(sweep, alphas=(3, 1))
    assert [(panel.alpha, panel.n) for panel in held.panels] == [(1, 12), (3, 0)]
    noted(held, "Requested but in no cell: alpha 3")
    noted(held, "Left out alpha 0, 2: ", "not requested")
    error = refused(out, 1, "--runs-root", sweep, "--alphas", 3)
    assert "`a`, `b`" in error and "0, 1, 2" in error
    change(sweep / "a", MASS, at("2.0", GONE))
    change(sweep / "b", KL, at("2.0", GONE))
    assert "`a`: not in pmass_eval; `b`: not in trajectory.json" in refused(out, 1, "--runs-root", sweep, "--alphas", 2)


def test_alphas_are_matched_as_numbers_in_numeric_order_and_but_for_rounding(tmp_path):
    rounded = 0.1 + 0.2
    random_cell(tmp_path / "r" / "a", alphas=[10.0, -1.0, rounded, -0.0])
    random_cell(tmp_path / "r" / "b", 1, alphas=[0.0, 0.3, 0.3000001])
    within = random_cell(tmp_path / "r" / "c", 2, alphas=[0.3])  # its files disagree
    change(within, MASS, lambda lists: {str(rounded): lists["0.3"]})
    expected = {"-1": 6, "0": 12, "0.3": 18, "0.3000001": 6, "10": 6}
    for alphas in ((), (10, rounded), (-1, 0.3, -0.0), (0.3, rounded)):
        held = read(tmp_path / "r", alphas=alphas)
        shown = {panel.alpha_text: panel.n for panel in held.panels}
        assert list(shown.items()) == [(a, n) for a, n in expected.items() if not alphas or float(a) in {*alphas, 0.3}]
        assert "in no cell" not in str(held.notes)
        assert {line.split(",")[2] for line in ska.rollouts_csv(held).splitlines()[1:]} == shown.keys()
        (tmp_path / ska.SUMMARY_FILE).write_text(ska.summary_text(held), encoding="utf-8")
        assert {row["alpha"]: int(row["n"]) for row in table(tmp_path, 1)} == shown


@pytest.mark.filterwarnings("error")
def test_alphas_beyond_the_square_of_any_number_and_kl_without_a_logarithm_are_drawn(tmp_path, out):
    alphas = ("-1e200", "1e-200", "1", "1e200")
    write_cell(tmp_path / "r" / "a", {a: [[0.5] * 40] for a in alphas}, {a: [[1, 0, 1]] for a in alphas})
    assert run("--runs-root", tmp_path / "r", "--out", out, "--dpi", 20).status == 0
    assert [row["alpha"] for row in table(out, 1)] == ["-1e+200", "1e-200", "1", "1e+200"]
    assert [row["over_target"] for row in table(out, 2)] == ["0%", "100%", "0%", "0%"]
    assert table(out)[0]["died_within_budget"] == "3 of 3"
    for kl in (0, -1, INF, NAN):
        write_cell(tmp_path / "r" / "a", {a: [[kl] * 40] for a in "12"}, {a: [[1, 0, 1]] for a in "12"})
        assert ska.draw_dose(read(tmp_path / "r", dpi=20)).axes


WRONG = [
    (("--threshold", 0), "--threshold must lie in (0, 1]"),
    (("--threshold", 1.01), "--threshold must lie in (0, 1]"),
    (("--threshold", "nan"), "--threshold must lie in (0, 1]"),
    (("--calib-tokens", 0), "--calib-tokens must be at least 1"),
    (("--window", 0), "--window, in tokens, must be at least 1"),
    (("--metric", "kl"), "--metric must be pmass or pmass_<name>"),
    (("--alphas", "inf"), "--alphas must be finite numbers"),
    (("--line-lw", 0), "--line-lw, in points, must be above 0"),
    (("--line-alpha", 2), "--line-alpha must lie in (0, 1]"),
    (("--dpi", 5), "--dpi must lie between 20 and 2400"),
    (("--roll", 0, "--ncols", 0), "--roll, in tokens, must be at least 1; --ncols must be at least 1"),
    (("--palette", "no such"), "'no such' is not a seaborn palette; try"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG)
def test_a_wrong_value_is_refused_before_any_file_is_read(tmp_path, out, flags, message):
    assert message in refused(out, 2, "--runs-root", tmp_path / "nowhere", *flags)


WORDS = [
    (("--edges", "wrap"), {"edges": "wrap"}, "--edges"),
    (("--calib-on", "all"), {"calib_on": "all"}, "--calib-on"),
    (("--rows", "layer"), {"rows": "layer"}, "--rows"),
    (("--formats", "gif"), {"formats": ("gif",)}, "--formats"),
    *((("--out", name), {"out": name}, "--out must name a folder") for name in ("figure.png", "x/figure.PDF", "f.svg")),
    (("--alphas", "0,1,2"), {}, "--alphas 0 1 2\n"),
    (("--alphas", "0,", "-1,", "2"), {}, "--alphas 0 -1 2\n"),
    (("--alphas=0,1",), {}, "--alphas 0 1\n"),
    (("--alphas", "0", "1,2", "--roll", "3"), {}, "--alphas 0 1 2\n"),
    (("--formats", "png", "pdf,svg"), {}, "--formats png pdf svg\n"),
]


@pytest.mark.parametrize(("flags", "args", "said"), WORDS)
def test_words_that_a_flag_does_not_take_are_wrong_use_and_commas_get_the_right_form(tmp_path, flags, args, said):
    result = run("--runs-root", tmp_path / "nowhere", *flags)
    assert (result.status, result.out, run().status) == (2, "", 2)
    assert said in result.err and (args or (result.err.startswith("ERROR: ") and result.err.count("\n") <= 2))
    if args:
        with pytest.raises(ska.UsageError, match=f"^{said}"):
            read(tmp_path / "nowhere", **args)


LARGE = [
    (("--dpi", 2400), ("65535 pixels", "--alphas", "--ncols", "--dpi"), "--model-contains"),
    (("--dpi", 500, "--rows", "cell"), ("65535 pixels", "--alphas", "--model-contains", "--dpi"), "--ncols"),
    (("--formats", "pdf", "--ncols", 1), ("200 inches", "--alphas", "--ncols"), "--dpi"),
]


@pytest.mark.parametrize(("flags", "advice", "useless"), LARGE)
def test_a_figure_larger_than_its_format_can_hold_says_what_makes_it_smaller(tmp_path, out, flags, advice, useless):
    alphas = [str(k) for k in range(160)]
    write_cell(tmp_path / "r" / "a", {a: [[1.0]] for a in alphas}, {a: [[1, 1, 1]] for a in alphas})
    error = refused(out, 1, "--runs-root", tmp_path / "r", *flags)
    size = [int(number) for number in re.search(r"(\d+) x (\d+) pixels", error).groups()]
    assert max(size) > (2**16 if "--dpi" in flags else 200 * 160)
    assert all(word in error for word in advice) and useless not in error


def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it(tmp_path, sweep, out, monkeypatch):
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "tyro.py").write_text("raise ModuleNotFoundError(name='tyro')\n")
    result = shell("--help", env=os.environ | {"PYTHONPATH": str(tmp_path / "fake")})
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"ERROR: the package tyro is missing\nInstall it: {sys.executable} -m pip install tyro\n"
    monkeypatch.setitem(sys.modules, "seaborn", None)  # importing it is an error
    error = refused(out, 1, "--runs-root", sweep, "--palette", "Set2")
    assert "--palette" in error and f"{sys.executable} -m pip install seaborn" in error
    assert run("--runs-root", sweep, "--out", out, *SMALL).status == 0  # only a palette needs it


def test_an_out_that_cannot_be_used_is_named_before_anything_is_read_or_drawn(sweep, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "folder" / f"{ska.FIGURE_STEM}.png").mkdir(parents=True)
    wrong = {"file": "a file, not", "link": "a link to nothing", f"folder/{ska.FIGURE_STEM}.png": "a folder in"}
    monkeypatch.setattr(ska, "draw", lambda *_: pytest.fail("drawing has begun"))
    for out in ("file", "file/deeper/still", "link", "link/deeper", "folder"):
        with pytest.raises(ska.SweepError) as raised:
            ska.write(read(sweep, out=tmp_path / out))
        result = run("--runs-root", tmp_path / "nowhere", "--out", tmp_path / out)
        assert (result.status, result.err) == (1, f"ERROR: {raised.value}\n")
        (said,) = [f"{tmp_path / name} is {what}" for name, what in wrong.items() if name[:4] == out[:4]]
        assert said in result.err and "--out" in result.err
    assert contents(tmp_path / "folder") == {f"{ska.FIGURE_STEM}.png": b""}
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "nowhere").exists()


def test_a_run_touches_nothing_of_the_users_and_warns_of_its_notes_and_of_stale_figures(sweep, out):
    part = f".{ska.SUMMARY_FILE}.0123456789abcdef0123456789abcdef.part"
    for name in (".kl_alive_mine", part):
        (out / name).mkdir()
        (out / name / "thesis.tex").write_text("mine")
        os.utime(out / name, (0, 0))
    figures = {f"{stem}.{end}" for stem in (ska.FIGURE_STEM, ska.DOSE_STEM) for end in ska.FIGURE_FORMATS}
    for name in figures:
        (out / name).write_text("older")
    (sweep / "b" / ska.PMASS_FILE).unlink()
    before = contents(out)
    result = run("--runs-root", sweep, "--out", out, *SMALL, "--no-dose", "--formats", "pdf")
    assert result.status == 0
    written = {f"{ska.FIGURE_STEM}.pdf", ska.SUMMARY_FILE, ska.ROLLOUTS_FILE}
    after = contents(out)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == written
    assert [(out / name / "thesis.tex").read_text() for name in (".kl_alive_mine", part)] == ["mine"] * 2
    warned = re.findall("^WARNING: (.*)", result.err, re.MULTILINE)
    assert [note for note in warned if "earlier run" not in note] == read(sweep).notes
    stale = {note.split(" is left over")[0] for note in warned if "earlier run" in note}
    assert stale == {f"{out / name}" for name in figures - written}
    assert "INFO: 1 cell, 18 rollouts: a\n" in result.err


def test_a_rollout_of_another_model_prompt_or_length_is_no_copy(tmp_path):
    rows, pmass = [[1.0] * 30, [2.0] * 30, [3.0] * 30], {"1": [[1, 1, 1]] * 3}
    write_cell(tmp_path / "r" / "a", {"1": rows}, pmass, {"1": [30] * 3})
    write_cell(tmp_path / "r" / "b", {"1": [rows[1], rows[0], rows[2]]}, pmass, {"1": [30, 30, 31]})
    write_cell(tmp_path / "r" / "c", {"1": rows}, pmass, {"1": [30] * 3}, model="org/other")
    assert counts(read(tmp_path / "r")) == [9]
    change(tmp_path / "r" / "b", LENGTHS, {"1": [30] * 3})
    held = read(tmp_path / "r")
    assert (counts(held), [(r.prompt_index, r.copy_of) for r in held.rollouts if r.copy_of]) == ([8], [(2, "a")])


def test_names_with_anything_in_them_are_rows_of_their_own_in_numeric_order(tmp_path, out):
    odd = ["run10", "run2", "a b", "it's", "new\nline", "'new\\nline'", "$x_1$", "pipe|pipe", "\\alpha", "ελ", "模型"]
    for seed, name in enumerate([*odd, os.fsdecode(b"raw\xff")]):
        random_cell(tmp_path / "r" / name, seed, alphas=[1.0], method=name.encode("utf-8", "replace").decode())
    flags = ("--rows", "cell", "--formats", "svg", "pdf", "--no-survival")
    result = run("--runs-root", tmp_path / "r", "--out", out, *flags)
    assert result.status == 0, result.err
    assert {line.split(": ")[0] for line in result.err.splitlines()} == {"INFO", "WARNING"}
    for k in range(4):
        rows = [row["cell"] for row in table(out, k)]
        assert len({*rows}) == 12 and rows.index("run2") + 1 == rows.index("run10") and "pipe\\|pipe" in rows
    assert {row["n"] for row in table(out, 1)} == {"6"}
    assert len({*ska.facet_titles(read(tmp_path / "r", rows="cell")).values()}) == 12
