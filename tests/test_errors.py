"""Input that cannot be used, or is unusual: what is said, and that nothing is written, lost or miscounted."""

import gzip
import json
import os
import pickle
import re
import shutil

import pytest
import tyro
from sweeps import SMALL, contents, noted, random_cell, read, run, write_cell

import spaghetti_kl_alive as ska

CALIB, TRAJECTORY, PMASS = ska.CELL_FILES
KL, MASS, LENGTHS = LISTS = ("per_prompt_per_t_kl", "pmass_eval", "gen_lens_eval")
FILES = {KL: TRAJECTORY} | dict.fromkeys(("model", "method", "seed", "layer", "target_kl", "window"), CALIB)
NAN, INF, GONE = float("nan"), float("inf"), object()


@pytest.fixture
def out(tmp_path):
    """An output folder that holds older files."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ska.SUMMARY_FILE).write_text("older")
    return tmp_path / "out"


def refused(out, status, *argv):
    """What is said of input that must fail: by the program and from Python the same, with nothing written."""
    before = contents(out)
    result = run(*argv, "--out", out)
    assert (result.status, result.out, contents(out)) == (status, "", before)
    with pytest.raises(ska.SweepError) as raised:
        ska.draw(ska.read(tyro.cli(ska.Args, args=[str(arg) for arg in argv])))
    assert isinstance(raised.value, ska.UsageError) == (status == 2)
    error = result.err.split("ERROR: ")[1]
    assert error == f"{raised.value}\n" and error.count("\n") <= 2
    return error


def change(cell, key, value):
    """Change a key in the file of a cell that holds it. A function is given what is there; GONE drops it."""
    path = cell / FILES.get(key, PMASS)
    content = json.loads(path.read_text())
    content[key] = value(content[key]) if callable(value) else value
    path.write_text(json.dumps({name: each for name, each in content.items() if each is not GONE}))


def at(alpha, value):
    """A change of what stands at one alpha."""
    return lambda lists: {key: each for key, each in (lists | {alpha: value}).items() if each is not GONE}


def held(sweep):
    """The cells of a sweep, and how many rollouts its panels show."""
    return [cell.name for cell in sweep.cells], [len(panel.rollouts) for panel in sweep.panels]


@pytest.mark.parametrize(("name", "said"), [("link", "no such"), ("none", "no such"), ("file", "its folder")])
def test_a_runs_root_that_is_no_folder_is_named_with_what_it_is(tmp_path, out, name, said):
    (tmp_path / "link").symlink_to("nothing")
    (tmp_path / "file").write_text("{}")
    error = refused(out, 1, "--runs-root", tmp_path / name)
    assert error.startswith(f"{tmp_path / name}: ") and said in error and "--runs-root" in error


def test_where_no_cell_can_be_used_the_reasons_and_the_folders_of_cells_are_named(sweep, tmp_path, out):
    random_cell(tmp_path / "empty" / "_hidden")
    random_cell(tmp_path / "empty" / ".hidden" / "a")
    error = refused(out, 1, "--runs-root", tmp_path / "empty")
    assert str(tmp_path / "empty") in error and ", ".join(ska.CELL_FILES) in error and "hidden" not in error
    (tmp_path / "empty").rename(tmp_path / "_empty")
    assert re.search(f"2.* in {sweep}\\b", refused(out, 1, "--runs-root", tmp_path))
    (sweep / "a" / CALIB).write_text("[]")
    shutil.copytree(sweep / "b", sweep / "c")
    error = refused(out, 1, "--runs-root", sweep, "--skip-bad-cells", "--model-contains", "gpt")
    assert f"`a`: {CALIB}: " in error and "`b`, `c`: " in error
    assert error.count("'gpt' (--model-contains)") == 1


def test_a_filter_looks_in_folder_names_and_models(sweep):
    change(sweep / "b", "model", "org/other")
    for text, matching in (("", ["a", "b"]), ("org/", ["a", "b"]), ("other", ["b"]), ("a", ["a"])):
        assert held(read(sweep, model_contains=text))[0] == matching
    (sweep / "b" / TRAJECTORY).write_text("damaged, but left out")
    noted(read(sweep, model_contains="org/m"), "Left out `b`: ", "'org/m'", "--model-contains")


LEFT_OUT = [  # the keys that are changed and to what, or the file that is missing; and the reason
    *((name, "is missing") for name in ska.CELL_FILES),
    ({"computed": False}, '"computed" is not true'),
    *(({KL: lists}, f"no rollouts in {TRAJECTORY}") for lists in ({}, {"1.0": []})),
    ({LENGTHS: {"1.0": []}}, "no rollouts in gen_lens"),
    ({MASS: {"1.0": []}}, "pmass_eval was not measured"),
    ({MASS: GONE, "pmass": {"1.0": [[1]]}}, "pmass_eval was not measured; --metric may be pmass"),
    ({MASS: GONE, "pmass_y": {"1": [[1]]}, "pmass_x": {"1": [[1]]}}, "--metric may be pmass_y, pmass_x"),
]


@pytest.mark.parametrize(("changes", "reason"), LEFT_OUT)
def test_a_cell_that_has_nothing_to_show_is_left_out_and_listed_with_the_reason(sweep, out, changes, reason):
    if isinstance(changes, str):
        (sweep / "b" / changes).unlink()
    else:
        for key, value in (dict.fromkeys(LISTS, lambda lists: {"1.0": lists["1.0"]}) | changes).items():
            change(sweep / "b", key, value)
    assert reason in noted(read(sweep), "Left out `b`: ")
    assert held(read(sweep)) == (["a"], [6, 6, 6])
    shutil.rmtree(sweep / "a")
    assert reason in refused(out, 1, "--runs-root", sweep)


@pytest.mark.parametrize(("key", "source"), [(KL, TRAJECTORY), (MASS, MASS), (LENGTHS, "gen_lens")])
def test_an_alpha_that_one_list_lacks_is_left_out_there_and_listed(sweep, key, source):
    change(sweep / "b", key, at("2.0", GONE))
    noted(read(sweep), f"Left out alpha 2 of `b`: no rollouts in {source}")
    assert held(read(sweep)) == (["a", "b"], [12, 12, 6])


def test_links_to_cells_are_cells_and_hidden_deeper_and_empty_folders_are_not(sweep, tmp_path, out):
    for name in ("_hidden", ".hidden", "deep/x", "deep/y", "deep/_hidden", "empty/er"):
        shutil.copytree(sweep / "a", sweep / name)
    shutil.rmtree(sweep / "empty" / "er")
    (sweep / "link").symlink_to((sweep / "b").rename(tmp_path / "elsewhere"))
    (sweep / "gone").symlink_to("nothing")
    (sweep / "log.txt").write_text("")
    assert held(read(sweep)) == (["a", "link"], [12, 12, 12])
    noted(read(sweep), "`gone`", "missing")
    noted(read(sweep), "Left out 2 ", f"in {sweep / 'deep'}")
    assert "hidden" not in str(read(sweep).notes)
    said = run("--runs-root", sweep, "--out", out, *SMALL, "--no-dose").err
    assert re.findall("^(INFO: .*) hold none of .*$", said, re.MULTILINE) == ["INFO: 2 folders"]
    assert held(read(sweep / "a")) == (["a"], [6, 6, 6])  # which is a cell itself


NOT_NUMBERS = ([3.0], [["3"]], [[True]], [[1.0, [1.0]]], [{"0": 1.0}])
DAMAGE = [  # the key, what becomes of it, and what is said
    *((KL, value, f"'{KL}' is missing") for value in (GONE, None)),
    *((key, [[1, 1, 1]], "not a dict") for key in LISTS),
    *((KL, at("1.0", value), "at alpha 1.0 is not a list") for value in (3, None, {})),
    *((KL, at("1.0", value), "alpha 1, rollout 0 is not a list of numbers") for value in NOT_NUMBERS),
    (KL, at("1.0", [[1.0], [10**400]]), "too large"),
    *((KL, at(key, []), repr(key)) for key in ("0_5", "1_0", "1.0x", "nan", "inf", "", " 1", "1e9", "1")),
    *((key, at("1.0000001", []), "'1.0000001'") for key in LISTS),  # there is "1.0" already
    (MASS, at("1.0", [[1] * 3] * 5), "alpha 1 differs: 6 in trajectory.json, 5 in pmass_eval, 6 in gen_lens"),
    (LENGTHS, at("1.0", [1] * 7), "alpha 1 differs: 6 in trajectory.json, 6 in pmass_eval, 7 in gen_lens"),
    (MASS, at("1.0", [[1, 1, 1], [1]]), "alpha 1, rollout 1, has 1 values, 3 fork_points"),
    *((MASS, at("1.0", [[1, x, 1]]), "is not in [0, 1]") for x in (1.001, -0.01)),
    *(("fork_points", x, "'fork_points'") for x in (GONE, [0.5, 5, 20], [-1, 5, 20], [0, None, 20])),
    *((LENGTHS, at("1.0", [x] * 6), "gen_lens_eval at alpha 1") for x in (-1, 1.5, NAN, None, "6")),
    *((key, value, "'model' and 'method'") for key in ("model", "method") for value in (GONE, None, 3)),
    *(("target_kl", value, "'target_kl' is") for value in (GONE, "1.0", True, 0, -1, NAN, INF, 10**400)),
    *(("window", value, "'window' is") for value in (GONE, "512", True, 0, 40.5, NAN, INF)),
]


@pytest.mark.parametrize(("key", "value", "said"), DAMAGE)
def test_damage_in_a_file_is_an_error_or_its_cell_is_left_out_on_demand(sweep, out, key, value, said):
    change(sweep / "b", key, value)
    name = FILES.get(key, PMASS)
    error = refused(out, 1, "--runs-root", sweep)
    assert error.startswith(f"{sweep / 'b' / name}: ") and said in error and "--skip-bad-cells" in error
    assert said in noted(read(sweep, skip_bad_cells=True), f"Left out `b`: {name}: ")


CUT_OFF = [b'{"1": [[0.1, 0.', b"<html>", b"[" * 200_000]
BINARY = [gzip.compress(b"{}", mtime=0), b"PK\x03\x04\x14\0\x80", pickle.dumps({})]
NO_JSON = [  # what a file becomes, and what it is said to be
    *((content, "empty") for content in (b"", b" \n")),
    *((content, "not JSON, or cut off") for content in CUT_OFF),
    *((content, "not JSON but binary; is it compressed?") for content in BINARY),
    *((content, "not dict") for content in (b"[1, 2]", b"null")),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "git lfs pull"),
    *((make, "not a regular file") for make in (os.mkdir, os.mkfifo)),
]


@pytest.mark.parametrize("name", ska.CELL_FILES)
@pytest.mark.parametrize(("content", "said"), NO_JSON)
def test_a_file_that_is_no_json_object_is_an_error_that_says_what_it_is(sweep, out, name, content, said):
    path = sweep / "a" / name
    path.unlink()
    content(path) if callable(content) else path.write_bytes(content)
    error = refused(out, 1, "--runs-root", sweep)
    assert error.startswith(f"{path}: ") and said in error and "--skip-bad-cells" in error
    assert said in noted(read(sweep, skip_bad_cells=True), f"Left out `a`: {name}: ")


def test_one_key_twice_is_damage_though_json_allows_it(sweep, out):
    path = sweep / "a" / TRAJECTORY
    path.write_text(path.read_text().replace('"2.0"', '"1.0"'))
    assert "'1.0'" in refused(out, 1, "--runs-root", sweep)


LENGTHS_OF = [(MASS, {}, 24), ("pmass", {}, 7), ("pmass_x", {}, 9), ("pmass_y", {}, 25)]
LENGTHS_OF += [(MASS, {LENGTHS: lengths}, 25) for lengths in (GONE, None, {})]


@pytest.mark.parametrize(("metric", "changes", "length"), LENGTHS_OF)
def test_lengths_are_those_of_the_metric_or_else_end_with_the_kl(tmp_path, metric, changes, length):
    kl = {"1": [[1.0] * 20 + [NAN] + [1.0] * 4 + [None, NAN]]}
    cell = write_cell(tmp_path / "r" / "a", kl, {}, {"1": [24]})
    masses = {metric: {"1": [[1.000001, 1, 1]]}}  # single precision sums to 1 only nearly
    for key, value in (masses | changes | {"gen_lens_qa": {"1": [7]}, "gen_lens_x": {"1": [9]}}).items():
        change(cell, key, value)
    assert [len(r.kl) for r in read(tmp_path / "r", metric=metric).rollouts] == [length]


def test_cells_of_different_windows_need_one(sweep, out):
    change(sweep / "b", "window", 30)
    error = refused(out, 1, "--runs-root", sweep)
    assert f"{sweep / 'a' / CALIB}: 40, {sweep / 'b' / CALIB}: 30" in error and "--window" in error
    assert read(sweep, model_contains="a").window == 40  # only the cells that are used must agree
    assert read(sweep, window=35).window == 35


def test_an_alpha_is_its_keys_value_to_six_digits_in_numeric_order(tmp_path):
    random_cell(tmp_path / "r" / "a", alphas=[10.0, -1.0, 0.1 + 0.2, -2.2e-16, 0.10000000149])
    random_cell(tmp_path / "r" / "b", 1, alphas=[0.0, 0.3, 0.300001, 0.1])
    shown = [(panel.alpha, len(panel.rollouts)) for panel in read(tmp_path / "r").panels]
    assert shown == [(-1, 6), (0, 12), (0.1, 12), (0.3, 12), (0.300001, 6), (10, 6)]


def test_an_alpha_found_nowhere_gets_a_warning_and_a_panel_or_is_an_error(sweep, out):
    some = read(sweep, alphas=(3, 1))
    assert [panel.alpha for panel in some.panels] == [1, 3] and held(some) == (["a", "b"], [12, 0])
    assert noted(some, "alpha 3: ") and noted(some, "alpha 0", "alpha 2", "--alphas")
    error = refused(out, 1, "--runs-root", sweep, "--alphas", 3)
    assert str(sweep) in error and "--alphas" in error and re.search("0, .*1, .*2", error)  # what is there


WRONG = [
    *((f"--threshold {value}", "--threshold must lie in (0, 1]") for value in ("0", "1.01", "nan")),
    ("--metric kl", "--metric must be pmass or pmass_<name>"),
    *((f"--{name} 0", f"--{name}") for name in ("window", "roll", "calib-tokens", "ncols")),
    *((f"--alphas 1 {word}", "--alphas must be plain numbers") for word in ("0_5", "inf", "nan", "1,2", "x")),
    *((f"--line-lw {value}", "--line-lw") for value in ("0", "inf")),
    *((f"--line-alpha {value}", "--line-alpha must lie in (0, 1]") for value in ("0", "2")),
    *((f"--dpi {value}", "--dpi must lie between") for value in ("5", "9999")),
    ("--formats", "--formats must be png, pdf or svg"),
    ("--palette nosuch", "'nosuch' is not a seaborn palette; try "),
]


@pytest.mark.parametrize(("flags", "said"), WRONG)
def test_a_wrong_value_is_refused_before_any_file_is_read(tmp_path, out, flags, said):
    assert said in refused(out, 2, "--runs-root", tmp_path / "nowhere", *flags.split())


WORDS = ("edges=wrap", "rows=layer", "formats=gif", "out=", "out=x.png", "out=x/figure.PDF", "out=f.svg")


@pytest.mark.parametrize("word", WORDS)
def test_a_word_that_a_flag_does_not_take_is_wrong_use(tmp_path, word):
    name, value = word.split("=")
    for argv in ([f"--{word}"], [f"--{name}", value]):
        result = run("--runs-root", tmp_path / "nowhere", *argv)
        assert (result.status, result.out) == (2, "") and f"--{name}" in result.err
    with pytest.raises(ska.UsageError, match=f"--{name}.* must"):
        read(tmp_path / "nowhere", **{name: (value,) if name == "formats" else value})


@pytest.mark.parametrize(
    ("n_alphas", "flags"), [(160, "--dpi 20 --ncols 1"), (160, "--dpi 550 --ncols 3"), (36, "--dpi 2400")]
)
def test_a_figure_that_is_too_large_says_its_size_and_what_makes_it_smaller(tmp_path, out, n_alphas, flags):
    alphas = [str(k) for k in range(n_alphas)]
    write_cell(tmp_path / "r" / "a", {a: [[1.0]] for a in alphas}, {a: [[1, 1, 1]] for a in alphas})
    error = refused(out, 1, "--runs-root", tmp_path / "r", *flags.split())
    assert re.search(r"\d+ x \d+ pixels", error) and "--alphas" in error and "--dpi" in error


def test_an_out_that_cannot_be_a_folder_is_named_before_anything_is_read(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nothing")
    for out in ("file", "file/deeper/still", "link", "link/deeper"):
        result = run("--runs-root", tmp_path / "nowhere", "--out", tmp_path / out)
        assert result.status == 1 and result.err.count("\n") == 1
        assert result.err.startswith(f"ERROR: {tmp_path / out[:4]}: ") and "--out" in result.err


def lines(seed, n_tokens=80):
    """KL that rises, so that no first token makes its scale; the last of the three has reached EOS."""
    rising = [[0.1 + 0.1 * i + 0.3 * seed + 0.01 * t for t in range(n_tokens)] for i in range(3)]
    return [*rising[:2], rising[2][:70] + [NAN] * 10]


@pytest.fixture
def clean(tmp_path):
    """Two cells of three rollouts at alpha 0 and 1, with nothing unusual in them."""
    for seed, name in enumerate("ab"):
        kl = {"0.0": [[0.008 + seed / 1000] * 80] * 3, "1.0": lines(seed)}
        pmass, lengths = {key: [[0.9] * 3] * 3 for key in kl}, {key: [80, 80, 70] for key in kl}
        write_cell(tmp_path / "clean" / name, kl, pmass, lengths, [0, 40, 80], window=80, seed=seed)
    return tmp_path / "clean"


def kl_from(*values):  # at the start of the second cell's first rollout at alpha 1
    return {KL: at("1.0", [[*values, *lines(1)[0][len(values) :]], *lines(1)[1:]])}


NOTES = [  # what is changed in the second cell, and the parts of the one note that comes of it
    ({"method": "pca"}, "2 methods pooled", "--rows method", "mean_diff, pca"),
    ({"model": "org/n"}, "2 models pooled", "--rows model", "org/m, org/n"),
    ({"seed": 0, "layer": 20}, "share model, method and seed (layers 3, 20): --rows cell", "`a`, `b`"),
    ({MASS: at("0.0", [[0.9, 0.5, 0.5], [0.9] * 3, [0.9] * 3])}, "Deaths at alpha 0", "(alpha 0: 1)"),
    ({KL: at("0.0", [[0.0101] * 80] * 3)}, "alpha 0 above 1% of the budget", "(alpha 0: 3)"),
    ({MASS: at("1.0", [[0.5, 0.9, 0.9]] * 2 + [[0.9] * 3])}, "that died recovered", "(alpha 1: 2)"),
    ({LENGTHS: at("1.0", [80, 80, 50])}, "Not smoothed", "--roll 65", "(alpha 1: 1)"),
    ({KL: at("1.0", lines(1, 75))}, "Records that end before EOS", "(alpha 1: 2)"),
    (kl_from(9), "first token", "17% of all", "--edges", "(alpha 1: 1)"),
    ({MASS: at("1.0", [[NAN] * 3, [None] * 3, [0.9] * 3])}, "never measured", "(alpha 1: 2)"),
    (kl_from(0.4, NAN, None), "Tokens whose KL is NaN", "(alpha 1: 2)"),
    (kl_from(0.4, INF, 1.1e6, 2e6), "Tokens whose KL is above 1e+06 nats", "(alpha 1: 3)"),
    (kl_from(0.4, -0.5, -1e-6), "Tokens whose KL is negative", "(alpha 1: 1)"),
    (dict.fromkeys(LISTS, at("1.0", GONE)), "Not every cell holds every alpha", "alpha 1: not in `b`"),
]


@pytest.mark.parametrize("case", NOTES)
def test_what_is_unusual_is_noted_once_with_where_and_how_often(clean, case):
    assert read(clean).notes == []
    changes, *parts = case
    for key, value in changes.items():
        change(clean / "b", key, value)
    assert read(clean).notes == [noted(read(clean), *parts)]


def test_notes_are_warnings_of_the_program_and_stand_in_the_summary(clean, out):
    change(clean / "b", MASS, at("1.0", [[NAN] * 3] * 3))
    (shutil.copytree(clean / "a", clean / "bad") / PMASS).write_text("{")
    notes = read(clean, rows="cell", skip_bad_cells=True).notes
    assert f"Left out `bad`: {PMASS}: not JSON" in notes[0] and "(cell b at alpha 1: 3)" in notes[1]
    result = run("--runs-root", clean, "--out", out, *SMALL, "--rows", "cell", "--skip-bad-cells")
    assert result.err.startswith(f"WARNING: {notes[0]}\nWARNING: {notes[1]}\nINFO: ")
    assert f"\n- {notes[0]}\n- {notes[1]}\n" in (out / ska.SUMMARY_FILE).read_text()


@pytest.fixture
def greedy(clean):
    """Three seeds of the same rollouts, as greedy decoding ignores the seed."""
    shutil.rmtree(clean / "b")
    for seed in (1, 2):
        change(shutil.copytree(clean / "a", clean / f"s{seed}"), "seed", seed)
    return clean


def test_rows_that_only_repeat_another_are_left_out_with_one_warning(greedy):
    change(greedy / "s1", MASS, at("0.0", [[0.91] * 3] * 3))  # a control of its own is no row of its own
    one = read(greedy, rows="seed")
    note = noted(one, "only repeat another seed", "--keep-duplicates", "(1, 2)")
    assert ([*one.facets], one.notes) == (["0"], [note])
    assert [*read(greedy, rows="seed", keep_duplicates=True).facets] == ["0", "1", "2"]
    change(greedy / "s2", KL, at("1.0", lines(2)))  # then its control alone is a copy
    assert [*read(greedy, rows="seed").facets] == ["0", "2"]


def test_copies_count_once_in_a_panel_but_on_demand_each_time(greedy):
    once, each = read(greedy), read(greedy, keep_duplicates=True)
    assert (held(once)[1], held(each)[1]) == ([3, 3], [9, 9])
    assert "counted once" in noted(once, "Exact copies", "(`s1`: 6, `s2`: 6)")
    assert "counted once" not in noted(each, "Exact copies", "(`s1`: 6, `s2`: 6)")
    assert [r.copy_of for r in each.rollouts] == [r.copy_of for r in once.rollouts] == [""] * 6 + ["a"] * 12


NO_COPIES = [  # of two cells of six rollouts, how many are none
    ("model", "org/other", 6),
    (KL, at("1.0", [lines(0)[1], lines(0)[0], lines(0)[2]]), 2),  # the first two have changed places
    (KL, at("1.0", [[0.0] * 80, [NAN] * 80, [INF] * 80]), 6),  # there is nothing to compare
    (MASS, at("1.0", [[0.9] * 3, [0.9] * 3, [0.9, 0.9, 0.91]]), 1),
    (LENGTHS, at("1.0", [81, 80, 70]), 1),
]


@pytest.mark.parametrize(("key", "value", "n_not"), NO_COPIES)
def test_a_rollout_of_another_model_prompt_kl_pmass_or_length_is_no_copy(greedy, key, value, n_not):
    for name in ("s1", "s2"):
        change(greedy / name, key, value)
    assert [r.copy_of for r in read(greedy).rollouts if r.cell.name != "a"].count("") == n_not
