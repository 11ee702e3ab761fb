"""The program from outside: its command line, its packaging, its Makefile target, and how it is disturbed."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import loguru  # noqa: F401  # forks of this process shall find it imported
import matplotlib.backends.backend_agg
import matplotlib.figure
import pytest
import tabulate  # noqa: F401
from PIL import Image
from sweeps import Run, random_cell, run, table, write_cell

import spaghetti_kl_alive as ska

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "spaghetti_kl_alive.py"
README = (ROOT / "README.md").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
OUTPUTS = {ska.TABLES, ska.ROLLOUTS, f"{ska.FIGURE}.png"}
SMALL = ("--dpi", 20, "--no-survival")  # where the picture does not matter


def shell(*argv: object, **options: object) -> subprocess.CompletedProcess:
    """The script in a new process."""
    return subprocess.run([sys.executable, SCRIPT, *map(str, argv)], capture_output=True, text=True, **options)


class Fork:
    """The program in a fork of this process, which has imported everything; its streams go to files.

    `first` is called in the fork before.
    """

    def __init__(self, log: Path, *argv: object, first: Callable[[], object] = lambda: None) -> None:
        self.logs = [log.with_suffix(".stdout"), log.with_suffix(".stderr")]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # numpy's threads are idle
            self.pid = os.fork()
        if self.pid:
            return
        status = 99
        try:
            for fd, path in enumerate(self.logs, 1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
            sys.stdout, sys.stderr = (os.fdopen(fd, "w", closefd=False) for fd in (1, 2))
            first()
            status = ska.main([str(arg) for arg in argv])
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)

    def wait(self) -> Run:
        """Exit status, below zero if a signal ended it, and what it printed."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return Run(status, *(path.read_text() for path in self.logs))


def whenever(event: str, name: str, act: Callable[[], object]) -> Callable[[], None]:
    """For a fork: do something before each "open", "os.rename" or the like of a file with that in its path."""

    def first() -> None:
        busy = []

        def hook(seen: str, args: tuple) -> None:
            if seen == event and not busy and any(name in os.fsdecode(a) for a in args if isinstance(a, str | Path)):
                busy.append(True)
                act()
                busy.clear()

        sys.addaudithook(hook)

    return first


def send(number: signal.Signals) -> Callable[..., None]:
    return lambda *_, **__: os.kill(os.getpid(), number)


def contents(folder: Path) -> dict[str, bytes]:
    """What the files of a folder hold; of the folders in it, nothing."""
    return {path.name: path.read_bytes() if path.is_file() else b"" for path in folder.iterdir()}


@pytest.fixture
def sweep(tmp_path):
    """Two cells of one alpha."""
    for seed, name in enumerate(("a", "b")):
        random_cell(tmp_path / "sweep" / name, seed, alphas=[1.0], method=name)
    return tmp_path / "sweep"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """One cell of one alpha."""
    root = tmp_path_factory.mktemp("tiny") / "sweep"
    random_cell(root / "a", alphas=[1.0])
    return root


@pytest.fixture(scope="module")
def versions(tiny):
    """What runs at two thresholds write, by threshold; no file is the same in both."""
    held = {}
    for threshold in (0.8, 0.9):
        out = tiny.parent / str(threshold)
        assert run("--runs-root", tiny, "--out", out, *SMALL, "--threshold", threshold).status == 0
        held[threshold] = contents(out)
        assert held[threshold].keys() == OUTPUTS
    assert all(held[0.8][name] != held[0.9][name] for name in OUTPUTS)
    return held


@pytest.fixture
def older(tmp_path, versions):
    """A folder with the files of a run at threshold 0.8."""
    folder = tmp_path / "older"
    folder.mkdir()
    for name, content in versions[0.8].items():
        (folder / name).write_bytes(content)
    return folder


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


def test_from_python_the_same_files_are_written_and_paths_may_be_text(tiny, tmp_path, versions):
    args = ska.Args(runs_root=str(tiny), out=str(tmp_path / "o"), threshold=0.9, dpi=20, survival=False)
    paths = ska.write(ska.read(args))
    assert {path.parent for path in paths} == {tmp_path / "o"}
    assert {path.name: path.read_bytes() for path in paths} == contents(tmp_path / "o") == versions[0.9]


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
    rc = tmp_path / "matplotlibrc"
    rc.write_text(
        "text.usetex: True\nfont.size: 30\nsavefig.dpi: 40\nsavefig.bbox: tight\nbackend: TkAgg\nno.such.key: 1\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "LANG")}
    environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "MPLBACKEND": "QtAgg"}
    environment |= {"HOME": str(tmp_path / "nowhere"), "MATPLOTLIBRC": str(rc)}
    environment |= {"MPLCONFIGDIR": matplotlib.get_cachedir()}  # its list of fonts takes seconds to make
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


# ---------------------------------------------------------------------- streams that take nothing

WHOLE = ["--runs-root", "{sweep}", "--out", "o", "--dpi", "20", "--no-survival"]
STREAMS = {  # what stdout and stderr are, the command line, the exit status
    "reader of stdout gone": ("gone", "file", WHOLE, 0),
    "reader of help gone": ("gone", "file", ["--help"], 0),
    "reader of stderr gone": ("file", "gone", WHOLE, 0),
    "stdout closed": ("closed", "file", WHOLE, 0),
    "stdout full": ("full", "file", WHOLE, 0),
    "help into a full stdout": ("full", "file", ["--help"], None),
    "stderr closed": ("file", "closed", WHOLE, 0),
    "stderr full": ("file", "full", WHOLE, 0),
    "both closed": ("closed", "closed", WHOLE, 0),
    "wrong use and a full stderr": ("file", "full", ["--rows", "nothing"], 2),
    "bad data and a closed stderr": ("file", "closed", ["--runs-root", "nowhere"], 1),
}
HOST = """
import json, os, sys
import loguru, spaghetti_kl_alive as ska

cases = json.loads(sys.argv[1])
ska.write(ska.read(ska.Args(cases[0][2][1], out="first", survival=False)))  # once, for all that it imports and caches
pids = []
for i, (out, err, argv, _) in enumerate(cases):
    os.mkdir(str(i))
    pid = os.fork()
    if pid == 0:  # the streams as Python finds them when it starts, and it ends as it does
        os.chdir(str(i))
        for fd, kind, name in ((1, out, "stdout"), (2, err, "stderr")):
            if kind == "closed":
                os.close(fd)
            elif kind == "gone":
                reader, writer = os.pipe()
                os.close(reader)
                os.dup2(writer, fd)
            else:
                os.dup2(os.open({"file": name, "full": "/dev/full"}[kind], os.O_WRONLY | os.O_CREAT), fd)
            stream = None if kind == "closed" else open(fd, "w", fd, errors="backslashreplace", closefd=False)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        sys.exit(ska.main(argv))
    pids.append(pid)
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]))
"""


@pytest.fixture(scope="module")
def streams(tiny, tmp_path_factory):
    """How runs with such streams ended: exit status, what they said on stderr, and the files they wrote."""
    folder = tmp_path_factory.mktemp("streams")
    cases = json.dumps([*STREAMS.values()]).replace("{sweep}", str(tiny))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-W", "ignore", "-c", HOST, cases]
    statuses = json.loads(subprocess.run(argv, cwd=folder, env=environment, stdout=subprocess.PIPE, check=True).stdout)
    ended = {}
    for i, (name, status) in enumerate(zip(STREAMS, statuses, strict=True)):
        held = {path.name: path for path in (folder / str(i)).rglob("*")}
        ended[name] = (status, held["stderr"].read_text() if "stderr" in held else "", OUTPUTS & held.keys())
    return ended


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_that_takes_nothing_is_no_traceback_and_loses_no_file(streams, name):
    *_, argv, expected = STREAMS[name]
    status, err, written = streams[name]
    assert "Traceback" not in err and "Exception ignored" not in err and "working folder" not in err
    assert status == expected or (expected is None and status in (0, 1))
    assert written == (OUTPUTS if argv == WHOLE else set())


def test_the_first_line_of_help_may_be_all_that_is_read():
    argv = ["bash", "-c", '"$0" "$1" --help | head -1; exit ${PIPESTATUS[0]}', sys.executable, SCRIPT]
    result = subprocess.run(argv, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: spaghetti_kl_alive") and result.stdout.count("\n") == 1


# ------------------------------------------------------------------------------------ interrupted


@pytest.mark.parametrize("module", ["numpy", "tyro", "loguru", "matplotlib"])
def test_ctrl_c_while_importing_ends_with_130_and_no_traceback(tiny, tmp_path, module):
    (tmp_path / module).mkdir()
    (tmp_path / module / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nx = 0\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    heeding = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # a job in the background does not
    result = shell("--runs-root", tiny, "--out", tmp_path / "o", env=environment, **heeding)
    assert result.returncode == 130, result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "o").exists()


def at_drawing() -> None:
    matplotlib.figure.Figure.add_subplot = send(signal.SIGINT)


def at_saving() -> None:
    matplotlib.figure.Figure.savefig = send(signal.SIGINT)


MOMENTS = {
    "reading": whenever("open", "trajectory.json", send(signal.SIGINT)),
    "drawing": at_drawing,
    "saving": at_saving,
    "writing": whenever("open", ska.ROLLOUTS, send(signal.SIGINT)),
    "renaming": whenever("os.rename", ska.ROLLOUTS, send(signal.SIGINT)),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_while_running_ends_with_130_and_leaves_whole_files_only(tiny, older, versions, tmp_path, moment):
    argv = ("--runs-root", tiny, "--out", older, *SMALL, "--threshold", 0.9)
    result = Fork(tmp_path / "log", *argv, first=MOMENTS[moment]).wait()
    assert (result.status, result.out) == (130, "")
    assert "Traceback" not in result.err
    after = contents(older)
    assert after.keys() == OUTPUTS
    changed = {name for name in OUTPUTS if after[name] != versions[0.8][name]}
    assert all(after[name] == versions[0.9][name] for name in changed)
    assert changed <= ({ska.TABLES} if moment == "renaming" else set())


def test_at_every_moment_each_file_is_the_old_or_the_new_one(tiny, older, versions, tmp_path):
    moments = tmp_path / "moments"
    moments.mkdir()

    def look() -> None:
        shutil.copytree(older, moments / str(len([*moments.iterdir()])))

    def first() -> None:
        for event in ("open", "os.rename", "os.remove"):
            whenever(event, str(older), look)()

    argv = ("--runs-root", tiny, "--out", older, *SMALL, "--threshold", 0.9)
    assert Fork(tmp_path / "log", *argv, first=first).wait().status == 0
    seen = [contents(moment) for moment in moments.iterdir()]
    assert len(seen) >= 6
    for moment in seen:
        for name in OUTPUTS:
            assert moment[name] in (versions[0.8][name], versions[0.9][name])
    assert contents(older) == versions[0.9]


def limited(size: int, kill: bool) -> Callable[[], None]:
    """For a fork: no file may grow beyond so many bytes, be it that the process is killed or that writing fails."""

    def first() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kill else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return first


@pytest.mark.parametrize("which", [min, max])
def test_killed_in_the_middle_of_a_file_leaves_the_old_ones(tiny, older, versions, tmp_path, which):
    size = which(map(len, versions[0.9].values())) - 1
    argv = ("--runs-root", tiny, "--out", older, *SMALL, "--threshold", 0.9)
    assert Fork(tmp_path / "log", *argv, first=limited(size, kill=True)).wait().status == -signal.SIGXFSZ
    assert contents(older).items() >= versions[0.8].items()
    assert len(contents(older)) > len(OUTPUTS)


def test_killed_between_writing_and_renaming_leaves_the_old_files_and_a_later_run_cleans_up(
    tiny, older, versions, tmp_path
):
    argv = ("--runs-root", tiny, "--out", older, *SMALL, "--threshold", 0.9)
    killed = whenever("os.rename", ska.ROLLOUTS, send(signal.SIGKILL))
    assert Fork(tmp_path / "log", *argv, first=killed).wait().status == -signal.SIGKILL
    after = contents(older)
    assert all(after[name] in (versions[0.8][name], versions[0.9][name]) for name in OUTPUTS)
    for path in older.iterdir():
        os.utime(path, (1e9, 1e9))
    assert run(*argv).status == 0
    assert contents(older) == versions[0.9]


@pytest.mark.parametrize("which", [min, max])
def test_a_disk_that_is_full_is_an_error_and_keeps_the_old_files(tiny, older, versions, tmp_path, which):
    size = which(map(len, versions[0.9].values())) - 1
    argv = ("--runs-root", tiny, "--out", older, *SMALL, "--threshold", 0.9)
    result = Fork(tmp_path / "log", *argv, first=limited(size, kill=False)).wait()
    assert (result.status, result.out) == (1, "")
    assert contents(older) == versions[0.8]
    assert f"ERROR: {older}: cannot be written (File too large)" in result.err
    assert "Traceback" not in result.err


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs takes root")
def test_a_disk_that_is_really_full_is_an_error_and_keeps_the_old_files(tiny, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs here: {mounted.stderr.strip()}")
    try:
        (disk / ska.TABLES).write_text("older")
        (disk / "ballast").write_bytes(bytes(140_000))
        result = run("--runs-root", tiny, "--out", disk)
        assert result.status == 1
        assert "No space left on device" in result.err
        assert (disk / ska.TABLES).read_text() == "older"
        assert sorted(path.name for path in disk.iterdir()) == ["ballast", ska.TABLES]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_runs_at_once_into_one_folder_leave_whole_files_only(tiny, tmp_path, versions):
    out = tmp_path / "o"
    argv = ("--runs-root", tiny, "--out", out, *SMALL, "--threshold")
    racers = [Fork(tmp_path / str(i), *argv, threshold) for i, threshold in enumerate((0.8, 0.9) * 2)]
    assert [racer.wait().status for racer in racers] == [0] * 4
    after = contents(out)
    assert after.keys() == OUTPUTS
    assert all(after[name] in (versions[0.8][name], versions[0.9][name]) for name in OUTPUTS)


@pytest.mark.parametrize("event", ["open", "os.rename"])
def test_a_run_does_not_wait_for_one_that_is_stopped_in_the_same_folder(tiny, tmp_path, versions, event):
    out = tmp_path / "o"
    argv = ("--runs-root", tiny, "--out", out, *SMALL, "--threshold")
    stopped = Fork(tmp_path / "log", *argv, 0.8, first=whenever(event, ska.ROLLOUTS, send(signal.SIGSTOP)))
    os.waitpid(stopped.pid, os.WUNTRACED)
    try:
        assert run(*argv, 0.9).status == 0
        assert {name: content for name, content in contents(out).items() if name in OUTPUTS} == versions[0.9]
    finally:
        os.kill(stopped.pid, signal.SIGCONT)
    assert stopped.wait().status == 0
    after = contents(out)
    assert after.keys() == OUTPUTS
    assert all(after[name] in (versions[0.8][name], versions[0.9][name]) for name in OUTPUTS)


def test_a_sweep_still_being_written_gives_a_whole_result_or_an_error_that_says_so(sweep):
    path = sweep / "a" / "trajectory.json"
    writing = (
        "import pathlib, sys, time; path = pathlib.Path(sys.argv[1]); text = path.read_text()\n"
        "while True:\n"
        "    with path.open('w') as file:\n"
        "        for i in range(0, len(text), 500): file.write(text[i : i + 500]); file.flush()\n"
        "    time.sleep(0.002)\n"
    )
    with subprocess.Popen([sys.executable, "-c", writing, path]) as writer:
        try:
            for _ in range(200):
                try:
                    assert [panel.n for panel in ska.read(ska.Args(sweep)).panels] == [12]
                except ska.SweepError as error:
                    assert str(path) in str(error) and "is the sweep still writing it?" in str(error)
        finally:
            writer.kill()


# ------------------------------------------------------------------- what the system may withhold


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_what_may_not_be_read_or_written_is_named(tiny, tmp_path):
    root = tmp_path / "sweep"
    shutil.copytree(tiny, root)
    for folder in (tmp_path, *tmp_path.parents):
        if not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    (tmp_path / "locked").mkdir(mode=0o755)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)

    def as_nobody(out: Path) -> str:
        result = Fork(
            tmp_path / "log", "--runs-root", root, "--out", out, *SMALL, first=lambda: os.setuid(65534)
        ).wait()
        assert result.status == 1
        assert "Traceback" not in result.err
        return result.err.split("ERROR: ")[1]

    locked = as_nobody(tmp_path / "locked" / "o")
    assert str(tmp_path / "locked" / "o") in locked and "Permission denied" in locked
    for path in (root / "a" / "pmass.json", root / "a", root):
        mode = path.stat().st_mode
        path.chmod(0)
        error = as_nobody(tmp_path / "open" / "o")
        assert str(path) in error and "Permission denied" in error
        path.chmod(mode)
    assert [*(tmp_path / "open").iterdir()] == []


def test_a_working_folder_that_was_deleted_is_no_matter_or_named(tiny, tmp_path):
    def gone() -> None:
        (tmp_path / "gone").mkdir()
        os.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()

    whole = Fork(tmp_path / "log", "--runs-root", tiny, "--out", tmp_path / "o", *SMALL, first=gone).wait()
    assert whole.status == 0, whole.err
    for root, named in ((tiny, "figs/sweep_kl_alive"), ("sweep", "sweep"), (".", ".")):
        result = Fork(tmp_path / "log", "--runs-root", root, *SMALL, first=gone).wait()
        assert result.status == 1
        assert "Traceback" not in result.err
        assert result.err.split("ERROR: ")[1].startswith(f"{named}: ")


MEMORY = """
import json, os, re, resource, sys
import spaghetti_kl_alive as ska, loguru, tabulate, matplotlib.figure, matplotlib.backends.backend_agg

statuses = []
for i, (more, argv) in enumerate(json.loads(sys.argv[1])):
    pid = os.fork()
    if pid == 0:
        for fd, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{i}.{name}", os.O_WRONLY | os.O_CREAT), fd)
        size = 1024 * int(re.search(r"VmSize:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
        resource.setrlimit(resource.RLIMIT_AS, (size + more, size + more))
        sys.exit(ska.main(argv))
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(json.dumps(statuses))
"""


def test_too_little_memory_is_an_error_that_says_what_takes_less(tiny, tmp_path):
    long = write_cell(tmp_path / "long" / "a", {"1": [[0.125] * 10**6]}, {"1": [[1, 1, 1]]}).parent
    cases = [(25_000_000, [long, *SMALL]), (80_000_000, [tiny, "--dpi", 2400])]  # bytes more than what it begins with
    cases = [(more, ["--out", str(tmp_path / "o"), "--runs-root", *map(str, argv)]) for more, argv in cases]
    argv = [sys.executable, "-W", "ignore", "-c", MEMORY, json.dumps(cases)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(argv, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, check=True)
    assert json.loads(ended.stdout) == [1, 1]
    for i in range(2):
        err = (tmp_path / f"{i}.stderr").read_text()
        assert (tmp_path / f"{i}.stdout").read_text() == "" and "Traceback" not in err
        error = err.split("ERROR: ")[1]
        assert "memory" in error and "--alphas" in error
    assert not (tmp_path / "o").exists()
