"""The program from outside: its command line, streams, files and packaging; and its use from Python."""

import errno
import io
import itertools
import pickle
import re
import shutil
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from unittest.mock import Mock

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image
from processes import ROOT, SCRIPT, python, shell
from sweeps import SMALL, Run, contents, random_cell, read, run, table

import spaghetti_kl_alive as ska

FIGURE, DOSE = f"{ska.FIGURE_STEM}.png", f"{ska.DOSE_STEM}.png"
TEXTS = {ska.SUMMARY_FILE, ska.ROLLOUTS_FILE}
FORMATS = ("pdf", "png", "svg")


def written(root, out, *flags):
    result = run("--runs-root", root, "--out", out, "--dpi", 20, *flags)
    assert result.status == 0, result.err
    return contents(out)


def test_the_call_of_existing_makefiles_still_works(sweep, tmp_path):
    words = """--window 512 --alphas 0.0 0.25 0.5 0.75 1.0 1.5 2.0 4.0 --threshold 0.8 --model-contains m
        --roll 301 --line-lw 0.4"""
    result = run("--runs-root", sweep, "--out", tmp_path / "o", *words.split())
    assert result.status == 0, result.err
    shown = {row["alpha"]: row["n"] for row in table(tmp_path / "o", 1)}
    assert len(shown) == 8 and shown.items() >= {"0": "12", "0.25": "0", "1": "12", "2": "12"}.items()


VALUES = {"window": 30, "threshold": 0.5, "roll": 7, "calib_tokens": 3, "ncols": 2, "dpi": 30, "line_lw": 2.0}
VALUES |= {"line_alpha": 0.1, "metric": "pmass_x", "model_contains": "m", "edges": "shrink", "rows": "cell"}
VALUES |= {"alphas": ("-1", "0.5"), "formats": ("svg", "pdf"), "palette": "Set2", "out": "~/o"}
VALUES |= {"kl_log": True, "keep_duplicates": True, "skip_bad_cells": True}
VALUES |= {"normalize_kl": False, "survival": False, "dose": False}


@pytest.mark.parametrize(("name", "value"), VALUES.items())
def test_a_flag_sets_what_it_is_named_after(monkeypatch, name, value):
    monkeypatch.setattr(ska, "check_out", Mock())
    monkeypatch.setattr(ska, "check_args", Mock())  # which imports seaborn for a palette
    monkeypatch.setattr(ska, "read", Mock(side_effect=ska.SweepError("that will do")))
    word, values = name.replace("_", "-"), value if isinstance(value, tuple) else [value]
    argv = {True: [f"--{word}"], False: [f"--no-{word}"]}.get(value, [f"--{word}", *values])
    assert run("--runs-root", "x", *argv).status == 1
    assert ska.read.call_args.args == (replace(ska.Args("x"), **{name: value}),)
    assert value != getattr(ska.Args("x"), name)


def test_help_names_every_flag():
    result = run("--help")
    assert (result.status, result.err) == (0, "") and result.out.startswith("usage: spaghetti_kl_alive")
    assert {"runs_root", *VALUES} == {field.name for field in fields(ska.Args)}
    assert [name for name in VALUES if f"--{name.replace('_', '-')}" not in result.out] == []


@pytest.mark.parametrize("out", [["--out", "~/o"], ["--out=~/o"]])
def test_a_tilde_is_the_home_in_both_paths(tiny, tmp_path, monkeypatch, out):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "r").symlink_to(tiny)
    assert run("--runs-root", "~/r", *out, *SMALL).status == 0
    assert contents(tmp_path / "o").keys() == TEXTS | {FIGURE}


def test_version_is_printed_whatever_else_is_asked_for():
    for argv in (["--version"], ["--runs-root", "nowhere", "--version"]):
        assert run(*argv) == Run(0, f"spaghetti_kl_alive {ska.__version__}\n", "")


def test_what_cannot_be_parsed_is_wrong_use(sweep):
    for argv in ([], ["--runs-root", sweep, "--window", "x"], ["--runs-root", sweep, "--no-such-flag"]):
        result = run(*argv)
        assert (result.status, result.out) == (2, "") and result.err


def test_the_home_of_a_user_that_does_not_exist_is_no_traceback(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("--runs-root", "~no-user/x", "--out", "o")
    assert result.status == 1 and "~no-user/x: no such folder" in result.err
    assert run("--runs-root", tiny, "--out", "~no-user/x", *SMALL).status in (0, 1, 2)


FILES = [
    ((), {FIGURE, DOSE}),
    (("--alphas", "0", "1"), {FIGURE}),
    (("--no-dose", "--formats", *FORMATS), {f"{ska.FIGURE_STEM}.{ending}" for ending in FORMATS}),
]


@pytest.mark.parametrize(("flags", "figures"), FILES)
def test_the_last_line_printed_names_the_files_written(sweep, tmp_path, monkeypatch, flags, figures):
    monkeypatch.chdir(tmp_path)
    result = run("--runs-root", sweep, *SMALL, *flags)
    assert result.status == 0, result.err
    wrote, *paths = map(Path, result.out.splitlines()[-1].split())
    assert str(wrote) == "wrote" and {*paths} == {*Path("figs/sweep_kl_alive").iterdir()}
    assert {path.name for path in paths} == TEXTS | figures
    starts = {(path.suffix, path.read_bytes()[:4]) for path in paths if path.name in figures}
    assert starts <= {(".pdf", b"%PDF"), (".png", b"\x89PNG"), (".svg", b"<?xm")}


def test_the_tables_have_room_in_80_columns_with_names_of_16_characters(tmp_path):
    for seed, name in enumerate(("directional_abla", "mean_difference_")):
        random_cell(tmp_path / "r" / name, seed, alphas=[0.0, 0.125, 1.0, 4.0], method=name)
    result = run("--runs-root", tmp_path / "r", "--out", tmp_path / "o", *SMALL, "--rows", "method")
    *lines, last = result.out.splitlines()
    assert last.startswith("wrote ") and max(map(len, lines)) <= 80
    shown = [{*words} for words in map(str.split, lines) if "directional_abla" in words]
    assert len(shown) == 6 and {"mean_difference_"} < shown[1]  # table 1, the comparison, and four panels
    first = next(line for line in lines if "directional_abla" in line)
    assert len(re.findall(r"[01]\.\d{3} \[[01]\.\d{3}, [01]\.\d{3}\]", first)) == 2  # at both ends


@pytest.mark.parametrize("step", [0, 1])
def test_a_run_of_more_than_three_seconds_says_how_far_it_is(tmp_path, tiny, monkeypatch, step):
    (tmp_path / "r").mkdir()
    for i in range(9):
        (tmp_path / "r" / f"c{i}").symlink_to(tiny / "a")
    seconds = itertools.count(0, step)  # each look at the clock takes so long
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    result = run("--runs-root", tmp_path / "r", "--out", tmp_path / "o", *SMALL)
    said = re.findall(r"^INFO: .*\b(\d+) of 9\b", result.err, re.MULTILINE)
    assert result.status == 0 and said == sorted({*said}) and (len(said) >= 2) == bool(step)


def test_the_csv_has_a_row_per_rollout(sweep):
    header, *rows = ska.rollouts_csv(read(sweep)).splitlines()
    assert header == "cell,prompt,alpha,observed_tokens,end,eos,death_token,recovered,kl_p95_nats," + (
        "lowest_pmass,last_pmass,scale_nats,copy_of"
    )
    assert len(rows) == 36 and rows[0].startswith("a,0,0,") and {row.count(",") for row in rows} == {12}


LINES = ('"$@" >/dev/full', '"$@" 2>/dev/full', '"$@" >&- 2>&-', '"$@" | true; exit ${PIPESTATUS[0]}')
LINES += ('MPLBACKEND=module://matplotlib_inline.backend_inline "$@"',)  # as a notebook sets it


@pytest.mark.parametrize("line", LINES)
def test_streams_that_take_nothing_and_a_foreign_backend_do_no_harm(tiny, tmp_path, line):
    result = shell(line, "--runs-root", tiny, "--out", tmp_path / "o", *SMALL)
    assert result.returncode == 0 and contents(tmp_path / "o").keys() == TEXTS | {FIGURE}
    assert re.sub("(WARNING|INFO): .*\n", "", result.stderr) == ""


def test_the_first_line_of_help_may_be_all_that_is_read():
    result = shell('"$@" --help | head -1; exit ${PIPESTATUS[0]}')
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: spaghetti_kl_alive") and result.stdout.count("\n") == 1


def test_a_copy_of_the_file_anywhere_writes_the_same_bytes_in_any_environment(tiny, tmp_path):
    plain = written(tiny, tmp_path / "plain", "--formats", *FORMATS)
    shutil.copy(SCRIPT, tmp_path / "here.py")
    (tmp_path / "rc").write_text("text.usetex: True\nfont.size: 30\nsavefig.dpi: 50\nsavefig.bbox: tight\n")
    environment = {"MPLBACKEND": "nonsense", "MATPLOTLIBRC": str(tmp_path / "rc"), "LC_ALL": "C"}
    environment |= {"PYTHONHASHSEED": "1", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "TZ": "Asia/Tokyo"}
    words = ("-OO", "here.py", "--runs-root", tiny, "--out", "o", "--dpi", 20, "--formats", *FORMATS)
    result = python(*words, cwd=tmp_path, **environment)
    assert result.returncode == 0, result.stderr
    other = contents(tmp_path / "o")
    assert other.keys() == plain.keys() and len(other) == 5
    assert [name for name in plain if plain[name] != other[name]] == []


def test_settings_and_version_stand_in_the_figures_metadata_and_no_date(sweep, tmp_path):
    flags = ("--threshold", 0.85, "--roll", 7, "--no-survival", "--alphas", 1, 2, "--formats", *FORMATS)
    files = written(sweep, tmp_path / "o", *flags)
    assert not re.search(b"CreationDate|dc:date|Creation Time", b"".join(files.values()))
    for stem in (ska.FIGURE_STEM, ska.DOSE_STEM):
        with Image.open(io.BytesIO(files[f"{stem}.png"])) as image:
            png = str(image.info)
        svg = files[f"{stem}.svg"].decode().split("<metadata>")[1].split("</metadata>")[0]
        pdf = files[f"{stem}.pdf"].replace(b"\\", b"").replace(b"\0", b"")  # it has two bytes a letter
        for text in (png, svg, pdf.decode("latin-1")):
            held = (
                f"spaghetti_kl_alive {ska.__version__}",
                "threshold 0.85",
                "roll 7",
                "window 40",
                "survival False",
            )
            assert [words for words in held if words not in text] == []


def test_a_link_stays_a_link_and_what_it_points_to_is_replaced(tiny, tmp_path):
    folder, real = tmp_path / "folder", tmp_path / "real"
    folder.mkdir()
    real.mkdir()
    (real / "figure.png").write_text("older")
    (folder / FIGURE).symlink_to("../real/figure.png")
    (folder / ska.SUMMARY_FILE).symlink_to("../real/new.md")
    (tmp_path / "out").symlink_to("folder")
    files = written(tiny, tmp_path / "out")
    assert {path.name for path in folder.iterdir() if path.is_symlink()} == {FIGURE, ska.SUMMARY_FILE}
    assert contents(real) == {"figure.png": files[FIGURE], "new.md": files[ska.SUMMARY_FILE]}
    assert (tmp_path / "out").is_symlink() and files[FIGURE] != b"older"


@pytest.fixture
def older(tmp_path):
    """A folder with the files of an earlier run."""
    (tmp_path / "out").mkdir()
    for name in (*TEXTS, FIGURE):
        (tmp_path / "out" / name).write_text("older")
    return tmp_path / "out"


FULL, READ_ONLY = OSError(errno.ENOSPC, "No space left"), OSError(errno.EROFS, "Read-only file system")
DENIED, BUSY = PermissionError(errno.EACCES, "Permission denied"), OSError(errno.EBUSY, "Device busy")
FAILING = [  # the function, how often it works before it fails, how it fails, and what is said
    (ska.tempfile, "TemporaryFile", 0, READ_ONLY, "Read-only file system"),
    (Path, "write_bytes", 0, FULL, "No space left"),
    (Path, "write_bytes", 2, FULL, "No space left"),
    (Path, "replace", 1, DENIED, "Permission denied"),
    (Path, "replace", 1, BUSY, "Device busy"),
    (Path, "replace", 1, KeyboardInterrupt(), "interrupted"),
    (ska.Figure, "savefig", 0, KeyboardInterrupt(), "interrupted"),
    (ska, "draw", 0, MemoryError(), "--alphas"),
    (ska, "read", 0, MemoryError(), "--dpi"),
]


@pytest.mark.parametrize(("owner", "name", "works", "error", "said"), FAILING)
def test_what_fails_is_named_and_only_whole_files_are_left(
    tiny, older, monkeypatch, owner, name, works, error, said
):
    real, targets = getattr(owner, name), []

    def failing(*args, **kwargs):
        targets.append(args and args[-1])
        if len(targets) > works:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    result = run("--runs-root", tiny, "--out", older, *SMALL)
    monkeypatch.undo()
    assert (result.status, result.out) == (130 if said == "interrupted" else 1, "")
    message = result.err.split("ERROR: ")[1]
    assert said in message and message.count("\n") <= 2
    if isinstance(error, OSError):
        assert str(targets[-1] if name == "replace" else older) in message
    held = contents(older)
    assert held.keys() == TEXTS | {FIGURE}
    assert sum(content != b"older" for content in held.values()) == (works if name == "replace" else 0)


@pytest.mark.parametrize("kind", [KeyError, TypeError, ValueError])
def test_an_error_of_the_script_itself_is_never_blamed_on_the_data(tiny, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(ska, "rolling_mean", Mock(side_effect=kind("pmass")))
    for skip_bad_cells in (False, True):
        with pytest.raises(kind, match="pmass"):
            read(tiny, skip_bad_cells=skip_bad_cells)
    with pytest.raises(kind, match="pmass"):
        run("--runs-root", tiny, "--out", tmp_path / "o")


LIBRARY = """
import sys
import matplotlib
from loguru import logger
def settings():
    return {key: dict.__getitem__(matplotlib.rcParams, key) for key in matplotlib.rcParams}
said, before = [], settings()
logger.remove()
logger.add(said.append)
import spaghetti_kl_alive as ska
ska.write(ska.read(ska.Args(sys.argv[1], out=sys.argv[2], dpi=20)))
assert said == [], said
assert settings() == before
assert not {"matplotlib.pyplot", "seaborn"} & {*sys.modules}
"""


def test_as_a_library_it_logs_nothing_and_changes_and_imports_nothing_for_others(sweep, tmp_path):
    (sweep / "no cell").mkdir()
    result = python("-c", LIBRARY, sweep, tmp_path / "o", PYTHONPATH=str(ROOT))
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_figures_are_drawn_in_threads_as_in_one(tiny, tmp_path):
    before = {key: dict.__getitem__(mpl.rcParams, key) for key in mpl.rcParams}

    def files(k):
        ska.write(read(tiny, dpi=20, formats=("svg",), out=tmp_path / str(k)))
        return contents(tmp_path / str(k))

    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(files, range(4))] == [files(4)] * 4
    assert {key: dict.__getitem__(mpl.rcParams, key) for key in mpl.rcParams} == before


@pytest.mark.parametrize("function", ["draw", "draw_dose"])
def test_figures_show_themselves_in_a_notebook_and_pickle(sweep, function):
    figure = getattr(ska, function)(read(sweep, dpi=20))
    png = figure._repr_png_()
    assert png.startswith(b"\x89PNG") and pickle.loads(pickle.dumps(figure))._repr_png_() == png


def test_alphas_may_be_an_array_or_one_number(sweep):
    for alphas, expected in ((np.linspace(0, 2, 3), [0, 1, 2]), (1.0, [1]), ([2, "1"], [1, 2])):
        assert [panel.alpha for panel in read(sweep, alphas=alphas).panels] == expected
        assert ska.summary_text(read(sweep, alphas=alphas))


def test_script_metadata_and_pyproject_declare_the_same_and_the_message_installs_it(tmp_path):
    block = re.search(r"(?m)^# /// script$\n((?:^# .*\n)+)^# ///$", SCRIPT.read_text())[1]
    inline = tomllib.loads(re.sub("(?m)^# ", "", block))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert sorted(inline["dependencies"]) == sorted(project["dependencies"])
    assert inline["requires-python"] == project["requires-python"]
    (tmp_path / "tabulate.py").write_text("raise ModuleNotFoundError(name='tabulate')\n")
    result = python(SCRIPT, "--help", PYTHONPATH=str(tmp_path))
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 2)
    says, command = result.stderr.splitlines()
    assert "tabulate" in says and "pip install " in command
    packages = {re.split("[<>=]", requirement)[0] for requirement in project["dependencies"]}
    assert {*command.split("pip install ")[1].split()} == packages and len(packages) == 6
