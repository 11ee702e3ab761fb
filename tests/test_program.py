"""The program from outside: its command line, its files, its packaging, its Makefile target."""

from __future__ import annotations

import ast
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image
from processes import OUTPUTS, ROOT, SCRIPT, shell
from sweeps import SMALL, Run, contents, random_cell, read, run, table

import spaghetti_kl_alive as ska

README = (ROOT / "README.md").read_text()
STEMS = (ska.FIGURE_STEM, ska.DOSE_STEM)


def figures(*stems: str) -> set[str]:
    return {f"{stem}.{ending}" for stem in stems for ending in ska.FIGURE_FORMATS}


# -------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("alphas", "flags", "expected"),
    [
        ((0, 1, 2), ("--formats", "pdf", "png", "svg"), figures(*STEMS)),
        ((0, 1, 2), ("--formats", "pdf", "png", "svg", "--no-dose"), figures(ska.FIGURE_STEM)),
        ((0, 1), (), {f"{ska.FIGURE_STEM}.png"}),
    ],
)
def test_the_last_line_printed_names_the_files_written(sweep, tmp_path, monkeypatch, alphas, flags, expected):
    monkeypatch.chdir(tmp_path)
    result = run("--runs-root", sweep, *SMALL, "--alphas", *alphas, *flags)
    assert result.status == 0, result.err
    wrote, *paths = map(Path, result.out.splitlines()[-1].split())
    assert str(wrote) == "wrote" and {*paths} == {*Path("figs/sweep_kl_alive").iterdir()}
    assert {path.name for path in paths} == {ska.SUMMARY_FILE, ska.ROLLOUTS_FILE} | expected
    starts = {(path.suffix, path.read_bytes()[:4]) for path in paths if path.name in expected}
    assert starts <= {(".pdf", b"%PDF"), (".png", b"\x89PNG"), (".svg", b"<?xm")}
    assert f"INFO: 2 cells, {12 * len(alphas)} rollouts: a, b\n" in result.err


def test_the_call_of_existing_makefiles_still_works(sweep, tmp_path):
    call = (
        "--window 512 --alphas 0.0 0.25 0.5 0.75 1.0 1.5 2.0 4.0 --threshold 0.8 "
        "--model-contains m --roll 301 --line-lw 0.4 --runs-root"
    )
    result = run(*shlex.split(call), sweep, "--out", tmp_path / "o", *SMALL)
    assert result.status == 0, result.err
    assert len(table(tmp_path / "o", 1)) == 8


def flags() -> dict[str, str]:
    """The flags in the script's source, and their help texts."""
    body = next(node for node in ast.parse(SCRIPT.read_text()).body if getattr(node, "name", "") == "Args").body
    names = [f"--{node.target.id.replace('_', '-')}" for node in body if isinstance(node, ast.AnnAssign)]
    return dict(zip(names, [node.value.value for node in body if isinstance(node, ast.Expr)], strict=True))


def test_help_says_what_the_program_does_and_explains_every_flag():
    result = run("--help")
    assert (result.status, result.err) == (0, "")
    words = re.sub(r"[\s│]+", "", result.out)
    assert result.out.startswith("usage: spaghetti_kl_alive")
    for text in (ska.__doc__, "--version", *flags(), *flags().values()):
        assert re.sub(r"\s+", "", text) in words


def test_the_readme_names_every_flag():
    assert [flag for flag in flags() if not re.search(f"`--(no-)?{flag[2:]}\\b", README)] == []


def test_version_is_printed_whatever_else_is_asked_for():
    for argv in (["--version"], ["--runs-root", "nowhere", "--version"]):
        assert run(*argv) == Run(0, f"spaghetti_kl_alive {ska.__version__}\n", "")


@pytest.mark.parametrize("step", [0, 1])
def test_a_line_every_few_seconds_says_how_far_a_long_run_is(tmp_path, tiny, monkeypatch, step):
    (tmp_path / "r").mkdir()
    for i in range(9):
        (tmp_path / "r" / f"c{i}").symlink_to(tiny / "a")
    seconds = itertools.count(0, step)  # each look at the clock takes so long
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    result = run("--runs-root", tmp_path / "r", "--out", tmp_path / "o", "--rows", "cell", *SMALL)
    assert result.status == 0, result.err
    said = re.findall(r"^INFO: (.*) (\d+) of 9$", result.err, re.MULTILINE)
    assert next(seconds) / 8 <= len(said) <= next(seconds) / 3
    for what in ("reading cell", "drawing panel") if step else ():
        done = [int(k) for name, k in said if name == what]
        assert done == sorted({*done}) and len(done) >= 2


# ------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize(
    ("root", "name"), [("latest", "latest"), ("latest/", "latest"), ("runs/x/..", "runs"), (".", "here"), ("..", "up")]
)
def test_files_go_to_a_folder_named_as_the_sweeps_was_given(tmp_path, monkeypatch, root, name):
    (tmp_path / "up" / "here" / "runs" / "x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "up" / "here")
    Path("latest").symlink_to("runs")
    assert ska.out_folder(ska.Args(root)) == Path("figs") / f"{name}_kl_alive"


def test_settings_and_version_stand_in_the_figures_own_metadata_and_no_date(tmp_path):
    random_cell(tmp_path / "r" / "模<&", alphas=[1.0, 2.0], n=2)
    flags = ("--threshold", 0.85, "--roll", 7, "--model-contains", "模<&", "--formats", *ska.FIGURE_FORMATS)
    result = run("--runs-root", tmp_path / "r", "--out", tmp_path / "o", *SMALL, *flags)
    assert result.status == 0, result.err
    for stem in STEMS:
        path = tmp_path / "o" / stem
        with Image.open(path.with_suffix(".png")) as image:
            held = {"png": " ".join(map(str, [*image.info, *image.info.values()]))}
        pdf = path.with_suffix(".pdf").read_bytes().replace(b"\\", b"")
        held["pdf"] = pdf.replace(b"\0", b"").decode("latin-1")  # text that is not Latin has two bytes a letter
        svg = ElementTree.parse(path.with_suffix(".svg"))
        (metadata,) = svg.iter("{http://www.w3.org/2000/svg}metadata")
        held["svg"] = " ".join([*metadata.itertext(), *(element.tag.split("}")[1] for element in metadata.iter())])
        for text in held.values():
            assert f"spaghetti_kl_alive {ska.__version__}" in text
            for setting in (r"threshold\W{1,2}0\.85\b", r"roll\W{1,2}7\b", r"window\W{1,2}40\b", r"survival\W{1,2}Fal"):
                assert re.search(setting, text)
            assert not re.search("date|time", text, re.IGNORECASE)
        assert "模<&" in held["png"] and "模<&" in held["svg"]


def test_from_python_and_from_a_hostile_shell_the_same_bytes_are_written(sweep, tmp_path):
    args = ska.Args(str(sweep), out=str(tmp_path / "plain"), formats=ska.FIGURE_FORMATS, dpi=40)
    plain = {path.name: path.read_bytes() for path in ska.write(ska.read(args))}
    assert plain == contents(tmp_path / "plain")
    for cell in ("b", "a"):
        shutil.copytree(sweep / cell, tmp_path / "elsewhere" / "sweep" / cell)
    (tmp_path / "home").mkdir(mode=0o500)
    rc = tmp_path / "matplotlibrc"
    rc.write_text("text.usetex: True\nfont.size: 30\nsavefig.dpi: 50\nsavefig.bbox: tight\nbackend: TkAgg\nnone: 1\n")
    environment = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "MPLCONFIGDIR", "LANG")}
    environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "MPLBACKEND": "QtAgg"}
    environment |= {"HOME": str(tmp_path / "home"), "MATPLOTLIBRC": str(rc)}
    environment |= {"PYTHONHASHSEED": "123", "TZ": "Asia/Tokyo"}
    flags = ("--out", tmp_path / "hostile", "--formats", *ska.FIGURE_FORMATS, "--dpi", 40)
    result = shell("--runs-root", tmp_path / "elsewhere" / "sweep", *flags, env=environment, cwd="/")
    assert result.returncode == 0, result.stderr
    hostile = contents(tmp_path / "hostile")
    assert plain.keys() == hostile.keys() == {ska.SUMMARY_FILE, ska.ROLLOUTS_FILE} | figures(*STEMS)
    assert [name for name in plain if plain[name] != hostile[name]] == []


def test_cells_in_any_order_of_the_listing_give_the_same_bytes(sweep, monkeypatch):
    def texts() -> tuple[str, str]:
        whole = read(sweep)
        return ska.summary_text(whole), ska.rollouts_csv(whole)

    plain, listing, listed = texts(), Path.iterdir, []

    def backwards(path: Path):
        listed.append(path)
        return iter(sorted(listing(path), reverse=True))

    monkeypatch.setattr(Path, "iterdir", backwards)
    assert texts() == plain
    assert sweep in listed


@pytest.mark.parametrize("place", ["figures", ""])
def test_an_output_inside_the_sweep_gives_the_same_bytes_the_second_time(sweep, place):
    written = []
    for _ in range(2):
        result = run("--runs-root", sweep, "--out", sweep / place, *SMALL, "--no-dose")
        assert result.status == 0, result.err
        written.append([(sweep / place / name).read_bytes() for name in sorted(OUTPUTS)])
    assert written[0] == written[1]


# -------------------------------------------------------------------------------------- packaging


def test_script_metadata_and_pyproject_declare_the_same():
    source = SCRIPT.read_text()
    block = re.search(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$", source)["content"]
    inline = tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert sorted(inline["dependencies"]) == sorted(project["dependencies"])
    assert inline["requires-python"] == project["requires-python"]
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    declared = {re.split("[<>=]", requirement)[0] for requirement in inline["dependencies"]}
    assert imported - set(sys.stdlib_module_names) == declared


def test_the_installed_command_answers():
    command = Path(sys.executable).parent / "spaghetti-kl-alive"
    result = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == run("--version").out


def test_a_copy_of_the_single_file_runs_with_uv(tiny, tmp_path):
    shutil.copy(SCRIPT, tmp_path)
    argv = [Path(sys.executable).parent / "uv", "run", SCRIPT.name, "--runs-root", tiny, "--out", "o"]
    environment = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"} | {"UV_SYSTEM_CERTS": "1"}
    result = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, env=environment)
    if "Failed to fetch" in result.stderr:
        pytest.skip(f"uv cannot fetch the packages: {result.stderr}")
    assert result.returncode == 0, result.stderr
    assert {path.name for path in (tmp_path / "o").iterdir()} == OUTPUTS


def test_the_makefile_recipe_redraws_when_anything_changed_and_fails_when_nothing_can_be_drawn(sweep, tmp_path):
    project = tmp_path / "project"  # as the README's set-up leaves it, and no bare python on the path
    shutil.copytree(sweep, project / "runs")
    (project / "Makefile").write_text(re.search(r"```make\n(.*?)```", README, re.DOTALL)[1])
    shutil.copy(SCRIPT, project)
    commands = {".venv/bin/python": "", ".venv/bin/spaghetti-kl-alive": SCRIPT.name, "path/python": "-c 'exit(127)'"}
    for name, script in commands.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {script} "$@"\n')
        (project / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{project / 'path'}:{os.environ['PATH']}"}

    def make(*flags: str) -> int:
        return subprocess.run(["make", *flags], capture_output=True, cwd=project, env=environment).returncode

    def settle(figure: Path | None = None) -> None:
        """Let all that is there be old, and the outputs a little younger."""
        for path in [project, *project.rglob("*")]:
            young = figure and (path == figure.parent or path in figure.parent.iterdir())
            os.utime(path, times=(1e9 + 1000 * bool(young),) * 2)

    settle()
    assert make() == 0
    (figure,) = project.rglob(f"{ska.FIGURE_STEM}.png")
    settle(figure)
    assert (make(), figure.stat().st_mtime, make("-q")) == (0, 1e9 + 1000, 0)
    os.utime(project / SCRIPT.name)
    assert make("-q") == 1
    settle(figure)
    trajectory = project / "runs" / "a" / "trajectory.json"
    whole = trajectory.read_text()
    trajectory.write_text(whole[:1000])
    os.utime(trajectory, (1e9 + 2000,) * 2)  # not so fresh that it is read again half a second later
    assert make() not in (0, 127)
    assert (make("-q"), figure.stat().st_mtime) == (1, 1e9 + 1000)
    trajectory.write_text(whole)
    assert (make(), make("-q")) == (0, 0)
    assert figure.stat().st_mtime > 1e9 + 1000
    settle(figure)
    shutil.rmtree(project / "runs" / "b")
    assert (make(), make("-q")) == (0, 0)
    assert {row["n"] for row in table(figure.parent, 1)} == {"6"}
