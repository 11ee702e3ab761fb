"""The program from outside: its command line, its files, its packaging, its Makefile target."""

from __future__ import annotations

import ast
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
from processes import OUTPUTS, ROOT, SCRIPT, Fork, shell
from sweeps import SMALL, Run, contents, random_cell, run, table

import spaghetti_kl_alive as ska

README = (ROOT / "README.md").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


# -------------------------------------------------------------------------------- the command line


def test_the_last_line_printed_names_the_files_written(sweep, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("--runs-root", sweep, "--formats", "pdf", "png", "svg", *SMALL)
    assert result.status == 0, result.err
    wrote, *names = result.out.splitlines()[-1].split()
    assert wrote == "wrote"
    assert {Path(name) for name in names} == {*Path("figs/sweep_kl_alive").iterdir()}
    assert {Path(name).name for name in names} == OUTPUTS | {f"{ska.FIGURE}.pdf", f"{ska.FIGURE}.svg"}
    starts = {path.suffix: path.read_bytes()[:4] for path in map(Path, names)}
    assert (starts[".pdf"], starts[".png"], starts[".svg"]) == (b"%PDF", b"\x89PNG", b"<?xm")
    assert "INFO: 2 cells, 12 rollouts: a, b\n" in result.err


def test_the_call_of_existing_makefiles_still_works(sweep, tmp_path):
    call = (
        "--window 512 --alphas 0.0 0.25 0.5 0.75 1.0 1.5 2.0 4.0 --threshold 0.8 "
        "--model-contains m --roll 301 --line-lw 0.4 --runs-root"
    )
    result = run(*shlex.split(call), sweep, "--out", tmp_path / "o", *SMALL)
    assert result.status == 0, result.err
    assert len(table(tmp_path / "o")) == 8


def flags() -> dict[str, str]:
    """The flags in the script's source, and their help texts."""
    body = next(node for node in ast.parse(SCRIPT.read_text()).body if getattr(node, "name", "") == "Args").body
    names = [f"--{node.target.id.replace('_', '-')}" for node in body if isinstance(node, ast.AnnAssign)]
    return dict(zip(names, [node.value.value for node in body if isinstance(node, ast.Expr)], strict=True))


def test_help_is_complete_and_imports_nothing_that_draws():
    probe = (
        "import sys, spaghetti_kl_alive as s; status = s.main(['--help'])\n"
        "print(status, sorted({'matplotlib', 'seaborn', 'pandas', 'tabulate'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT, check=True)
    *text, imported = result.stdout.strip().split("\n")
    assert imported == "0 []"
    text = "\n".join(text)
    words = re.sub(r"[\s│]+", "", text)
    assert re.sub(r"\s+", "", ska.__doc__) in words
    assert "--version" in text
    for flag, described in flags().items():
        assert flag in text
        assert re.sub(r"\s+", "", described) in words


def test_the_readme_names_every_flag():
    assert [flag for flag in flags() if f"`{flag}" not in README] == []


def test_version_is_printed_whatever_else_is_asked_for():
    for argv in (["--version"], ["--runs-root", "nowhere", "--version"]):
        assert run(*argv) == Run(0, f"spaghetti_kl_alive {ska.__version__}\n", "")


def blocks_of(text: str) -> list[list[list[str]]]:
    """The tables on a terminal: blocks of lines, each a name and its values."""
    blocks = [block.splitlines()[1:] for block in text.strip().split("\n\n")]
    return [[re.split(r" {2,}", line.strip()) for line in block] for block in blocks]


def test_the_first_two_tables_are_printed_and_eight_alphas_fit_80_columns(tmp_path):
    alphas = [-1.0, 0.0, 0.25, 0.5, 0.75, 1.5, 2.0, 16.0]
    random_cell(tmp_path / "r" / "a", alphas=alphas, n=120)
    result = run("--runs-root", tmp_path / "r", "--out", tmp_path / "o", *SMALL)
    tables = result.out[: result.out.rindex("wrote")]
    assert max(map(len, tables.splitlines())) <= 80
    for k, block in enumerate(blocks_of(tables)):
        rows = table(tmp_path / "o", k)
        assert [line[0] for line in block] == list(rows[0])
        for name, *values in block:
            assert values == [row[name] for row in rows]
    assert k == 1


def test_tables_of_budgets_that_differ_and_of_many_alphas_fit_80_columns_too(tmp_path):
    alphas = [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25]
    for seed, target in enumerate((1.0, 0.7, 0.35)):
        random_cell(tmp_path / "r" / f"c{seed}", seed, alphas=alphas, n=2, target_kl=target, method=f"m{seed}")
    for rows in (None, "method"):
        text = ska.terminal_text(ska.read(ska.Args(tmp_path / "r", rows=rows)))
        headers = [line for block in blocks_of(text) for line in block if line[0] == "alpha"]
        shown = [alpha for _, *values in headers for alpha in values]
        assert shown == [f"{alpha:g}" for alpha in alphas] * (6 if rows else 2)
        assert max(map(len, text.splitlines())) <= 80


def test_a_line_every_few_seconds_says_how_far_a_long_run_is(tmp_path, tiny, monkeypatch):
    (tmp_path / "r").mkdir()
    for i in range(9):
        (tmp_path / "r" / f"c{i}").symlink_to(tiny / "a")
    seconds = 0.0

    def clock() -> float:
        nonlocal seconds
        seconds += 1
        return seconds

    monkeypatch.setattr(time, "monotonic", clock)
    monkeypatch.setattr(time, "perf_counter", clock)
    result = run("--runs-root", tmp_path / "r", "--out", tmp_path / "o", "--rows", "cell", *SMALL)
    assert result.status == 0, result.err
    said = re.findall(r"^INFO: (.*?)(\d+) of (\d+)", result.err, re.MULTILINE)
    assert seconds / 8 <= len(said) <= seconds / 3
    parts = {what: [(int(i), int(n)) for w, i, n in said if w == what] for what, _, _ in said}
    assert len(parts) == 2  # reading and drawing
    for steps in parts.values():
        assert steps == sorted(set(steps)) and {n for _, n in steps} == {9}


# ------------------------------------------------------------------------------------------ files


def test_files_are_written_to_a_folder_named_as_the_sweeps_was_given(tiny, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("latest").symlink_to(tiny)
    for root, name in (("latest", "latest"), ("latest/", "latest"), (tiny, "sweep"), (f"{tiny}/a/..", "sweep")):
        assert run("--runs-root", root, *SMALL).status == 0
        assert {path.name for path in Path("figs").iterdir()} == {f"{name}_kl_alive"}
        shutil.rmtree("figs")
    monkeypatch.chdir(tiny)
    assert run("--runs-root", ".", *SMALL).status == 0
    assert {path.name for path in Path("figs").iterdir()} == {"sweep_kl_alive"}
    shutil.rmtree("figs")


def test_from_python_the_same_files_are_written_and_paths_may_be_text(tiny, tmp_path):
    shelled = ("--runs-root", tiny, "--out", tmp_path / "shell", *SMALL, "--threshold", 0.9)
    assert run(*shelled).status == 0
    args = ska.Args(runs_root=str(tiny), out=str(tmp_path / "o"), threshold=0.9, dpi=20, survival=False)
    paths = ska.write(ska.read(args))
    assert {path.parent for path in paths} == {tmp_path / "o"}
    assert {path.name: path.read_bytes() for path in paths} == contents(tmp_path / "o") == contents(tmp_path / "shell")


def test_settings_and_version_stand_in_the_figures_own_metadata_and_no_date(tmp_path):
    random_cell(tmp_path / "r" / "模<&", alphas=[1.0])
    flags = ("--threshold", 0.85, "--roll", 7, "--model-contains", "模<&", "--formats", *ska.FORMATS)
    result = run("--runs-root", tmp_path / "r", "--out", tmp_path / "o", *SMALL, *flags)
    assert result.status == 0, result.err
    figures = {ending: tmp_path / "o" / f"{ska.FIGURE}.{ending}" for ending in ska.FORMATS}
    with Image.open(figures["png"]) as image:
        held = {"png": " ".join(map(str, image.info.values()))}
    pdf = figures["pdf"].read_bytes().replace(b"\\", b"")
    held["pdf"] = pdf.replace(b"\0", b"").decode("latin-1")  # text that is not Latin stands there in two bytes a letter
    svg = ElementTree.parse(figures["svg"])
    (metadata,) = svg.iter("{http://www.w3.org/2000/svg}metadata")
    held["svg"] = " ".join(metadata.itertext())
    for text in held.values():
        assert f"spaghetti_kl_alive {ska.__version__}" in text
        for setting in (r"threshold\W{1,2}0\.85\b", r"roll\W{1,2}7\b", r"window\W{1,2}40\b", r"survival\W{1,2}False"):
            assert re.search(setting, text)
    assert "模<&" in held["png"] and "模<&" in held["svg"]
    assert "Date" not in held["pdf"]
    assert not any("date" in element.tag for element in metadata.iter())


def test_hostile_surroundings_change_no_byte(sweep, tmp_path):
    flags = ("--formats", *ska.FORMATS)
    assert run("--runs-root", sweep, "--out", tmp_path / "plain", *flags).status == 0
    other = tmp_path / "elsewhere" / "sweep"
    for cell in sorted(sweep.iterdir(), reverse=True):
        shutil.copytree(cell, other / cell.name)
    (tmp_path / "home").mkdir(mode=0o500)
    rc = tmp_path / "matplotlibrc"
    rc.write_text(
        "text.usetex: True\nfont.size: 30\nsavefig.dpi: 40\nsavefig.bbox: tight\nbackend: TkAgg\nno.such.key: 1\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MPLCONFIGDIR", "LANG")}
    environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "MPLBACKEND": "QtAgg"}
    environment |= {"HOME": str(tmp_path / "home"), "MATPLOTLIBRC": str(rc)}
    environment |= {"PYTHONHASHSEED": "123", "TZ": "Asia/Tokyo"}
    result = shell("--runs-root", other, "--out", tmp_path / "hostile", *flags, env=environment, cwd="/")
    assert result.returncode == 0, result.stderr
    plain, hostile = contents(tmp_path / "plain"), contents(tmp_path / "hostile")
    assert plain.keys() == hostile.keys() and len(plain) == 5
    assert [name for name in plain if plain[name] != hostile[name]] == []
    assert [line for line in result.stderr.splitlines() if not line.startswith(("INFO: ", "WARNING: "))] == []


def test_cells_in_any_order_of_the_listing_give_the_same_bytes(sweep, tmp_path, monkeypatch):
    assert run("--runs-root", sweep, "--out", tmp_path / "o", *SMALL).status == 0
    plain = contents(tmp_path / "o")
    listing, listed = Path.iterdir, []

    def backwards(path: Path):
        listed.append(path)
        return iter(sorted(listing(path), reverse=True))

    monkeypatch.setattr(Path, "iterdir", backwards)
    assert run("--runs-root", sweep, "--out", tmp_path / "p", *SMALL).status == 0
    assert sweep in listed
    monkeypatch.undo()
    assert contents(tmp_path / "p") == plain


@pytest.mark.parametrize("place", ["figures", "deep/er", ""])
def test_an_output_inside_the_sweep_gives_the_same_bytes_the_second_time(sweep, place):
    written = []
    for _ in range(2):
        result = run("--runs-root", sweep, "--out", sweep / place, *SMALL)
        assert result.status == 0, result.err
        written.append([(sweep / place / name).read_bytes() for name in sorted(OUTPUTS)])
    assert written[0] == written[1]


def test_seaborn_is_imported_for_a_palette_only(tiny, tmp_path):
    def without_seaborn() -> None:
        sys.modules["seaborn"] = None  # importing it is an error

    argv = ("--runs-root", tiny, "--out", tmp_path / "o", *SMALL)
    assert Fork(tmp_path / "plain", *argv, first=without_seaborn).wait().status == 0
    result = Fork(tmp_path / "palette", *argv, "--palette", "deep", first=without_seaborn).wait()
    assert result.status == 1
    assert "seaborn" in result.err and "Traceback" not in result.err


# -------------------------------------------------------------------------------------- packaging


def test_script_metadata_and_pyproject_declare_the_same():
    source = SCRIPT.read_text()
    block = re.search(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$", source)["content"]
    inline = tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))
    project = PYPROJECT["project"]
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
    uv = Path(sys.executable).parent / "uv"
    argv = [uv, "run", SCRIPT.name, "--runs-root", tiny, "--out", "o"]
    environment = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"} | {"UV_SYSTEM_CERTS": "1"}
    result = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in (tmp_path / "o").iterdir()} == OUTPUTS


@pytest.fixture
def project(tmp_path, sweep):
    """A folder as the README leaves it after its set-up: script, recipe, sweep, and no bare python on the path."""
    folder = tmp_path / "project"
    shutil.copytree(sweep, folder / "runs")
    (folder / "Makefile").write_text(re.search(r"```make\n(.*?)```", README, re.DOTALL)[1])
    shutil.copy(SCRIPT, folder)
    commands = {
        ".venv/bin/python": f'exec "{sys.executable}" "$@"',
        ".venv/bin/spaghetti-kl-alive": f'exec "{sys.executable}" "{folder / SCRIPT.name}" "$@"',
        "path/python": "exit 127",
    }
    for name, command in commands.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"#!/bin/sh\n{command}\n")
        (folder / name).chmod(0o755)
    return folder


def test_the_makefile_recipe_redraws_when_anything_changed_and_fails_when_nothing_can_be_drawn(project):
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
    (figure,) = project.rglob(f"{ska.FIGURE}.png")
    settle(figure)
    assert (make(), figure.stat().st_mtime, make("-q")) == (0, 1e9 + 1000, 0)

    os.utime(project / SCRIPT.name)
    assert make("-q") == 1
    settle(figure)
    assert make("-q") == 0

    trajectory = project / "runs" / "a" / "trajectory.json"
    whole = trajectory.read_text()
    trajectory.write_text(whole[:1000])
    assert make() not in (0, 127)
    assert (make("-q"), figure.stat().st_mtime) == (1, 1e9 + 1000)
    trajectory.write_text(whole)
    assert (make(), make("-q")) == (0, 0)
    assert figure.stat().st_mtime > 1e9 + 1000

    settle(figure)
    shutil.rmtree(project / "runs" / "b")
    assert (make(), make("-q")) == (0, 0)
    assert {row["n"] for row in table(figure.parent)} == {"6"}
