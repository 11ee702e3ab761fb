"""The program from outside: its command line, its packaging, its Makefile target, and how it is killed."""

import ast
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
from sweeps import random_cell, run, table

import spaghetti_kl_alive as ska

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "spaghetti_kl_alive.py"
OUTPUTS = (ska.TABLE, ska.ROLLOUTS, f"{ska.FIGURE}.png")


def shell(*argv: object, **options: object) -> subprocess.CompletedProcess:
    """The script in a process of its own."""
    return subprocess.run([sys.executable, SCRIPT, *map(str, argv)], capture_output=True, text=True, **options)


@pytest.fixture
def sweep(tmp_path):
    for seed, name in enumerate(("a", "b")):
        random_cell(tmp_path / "sweep" / name, seed, method=name)
    return tmp_path / "sweep"


def test_success_ends_with_the_files_written(sweep, tmp_path):
    result = shell("--runs-root", sweep, "--formats", "pdf", "png", "svg", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    out = Path("figs/sweep_kl_alive")
    names = [ska.TABLE, ska.ROLLOUTS, *(f"{ska.FIGURE}.{ending}" for ending in ("pdf", "png", "svg"))]
    assert result.stdout == f"wrote {' '.join(str(out / name) for name in names)}\n"
    assert sorted(path.name for path in (tmp_path / out).iterdir()) == sorted(names)
    starts = {path.suffix: path.read_bytes()[:4] for path in (tmp_path / out).iterdir()}
    assert (starts[".pdf"], starts[".png"], starts[".svg"]) == (b"%PDF", b"\x89PNG", b"<?xm")
    assert "INFO: 2 cells, 36 rollouts: a, b" in result.stderr


def test_existing_makefiles_call_still_works(sweep, tmp_path):
    call = (
        "--window 512 --alphas 0.0 0.25 0.5 0.75 1.0 1.5 2.0 4.0 --threshold 0.8 "
        "--model-contains m --roll 301 --line-lw 0.4 --runs-root"
    )
    result = run(*shlex.split(call), sweep, "--out", tmp_path / "o")
    assert result.status == 0, result.err
    assert len(table(tmp_path / "o")) == 8


def test_help_is_complete_and_imports_nothing_that_draws():
    probe = (
        "import sys, spaghetti_kl_alive as s\n"
        "try: s.main(['--help'])\n"
        "except SystemExit: print(sorted({'matplotlib', 'seaborn', 'pandas', 'tabulate'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT, check=True)
    *text, imported = result.stdout.strip().split("\n")
    assert imported == "[]"
    text = "\n".join(text)
    assert text.index("How to read it") < text.index("--runs-root PATH")
    fields = next(node for node in ast.parse(SCRIPT.read_text()).body if getattr(node, "name", "") == "Args").body
    names = [node.target.id for node in fields if isinstance(node, ast.AnnAssign)]
    helps = [node.value.value for node in fields if isinstance(node, ast.Expr)]
    assert len(names) == len(helps) == 22
    words = re.sub(r"[\s│]+", "", text)
    for name, described in zip(names, helps, strict=True):
        assert f"--{name.replace('_', '-')}" in text
        assert re.sub(r"\s+", "", described) in words
    readme = (ROOT / "README.md").read_text()
    for name in names:
        assert f"`--{name.replace('_', '-')}" in readme


def test_script_metadata_and_pyproject_declare_the_same():
    block = re.search(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$", SCRIPT.read_text())["content"]
    inline = tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert inline["dependencies"] == project["dependencies"]
    assert inline["requires-python"] == project["requires-python"]
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
        for node in ast.walk(ast.parse(SCRIPT.read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    declared = {re.split("[<>=]", requirement)[0] for requirement in inline["dependencies"]}
    assert imported - set(sys.stdlib_module_names) == declared


def test_installed_command_answers():
    command = Path(sys.executable).parent / "spaghetti-kl-alive"
    result = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    assert "--runs-root" in result.stdout


def test_copy_of_the_single_file_runs_with_uv(sweep, tmp_path):
    (tmp_path / "empty").mkdir()
    shutil.copy(SCRIPT, tmp_path / "empty")
    uv = Path(sys.executable).parent / "uv"
    argv = [uv, "run", SCRIPT.name, "--runs-root", sweep, "--out", "o"]
    environment = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"} | {"UV_SYSTEM_CERTS": "1"}
    result = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path / "empty", env=environment)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "empty" / "o").iterdir()) == sorted(OUTPUTS)


def test_makefile_target_of_the_readme(sweep, tmp_path):
    target = re.search(r"```make\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    (tmp_path / "Makefile").write_text(target)
    shutil.copy(SCRIPT, tmp_path)
    sweep.rename(tmp_path / "runs")
    figure = tmp_path / "figs" / "runs_kl_alive" / f"{ska.FIGURE}.png"
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def make() -> subprocess.CompletedProcess:
        return subprocess.run(["make"], capture_output=True, text=True, cwd=tmp_path, env=environment)

    trajectory = tmp_path / "runs" / "a" / "trajectory.json"
    whole = trajectory.read_text()
    trajectory.write_text(whole[:1000])
    assert make().returncode != 0
    assert not figure.exists()
    trajectory.write_text(whole)
    assert make().returncode == 0
    first = figure.stat().st_mtime_ns
    again = make()
    assert "up to date" in again.stdout
    assert figure.stat().st_mtime_ns == first
    later = time.time() + 5
    os.utime(trajectory, (later, later))
    assert make().returncode == 0
    assert figure.stat().st_mtime_ns > first


def test_outputs_are_the_same_bytes_in_any_process_order_and_folder(sweep, tmp_path):
    formats = ("--formats", "png", "pdf", "svg")
    other = tmp_path / "elsewhere" / "sweep"
    for cell in sorted(sweep.iterdir(), reverse=True):
        shutil.copytree(cell, other / cell.name)
    results = []
    for root, hash_seed in ((sweep, "0"), (sweep, "123"), (other, "7")):
        out = tmp_path / f"out{hash_seed}"
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        shell("--runs-root", root, "--out", out, *formats, env=environment, check=True)
        results.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert results[0] == results[1] == results[2]
    assert len(results[0]) == 5


def test_cells_in_any_order_of_the_listing_give_the_same_bytes(sweep, tmp_path, monkeypatch):
    listing = Path.iterdir
    results = []
    for turn in (list, lambda entries: list(entries)[::-1]):
        monkeypatch.setattr(Path, "iterdir", lambda path, turn=turn: iter(turn(sorted(listing(path)))))
        assert run("--runs-root", sweep, "--out", tmp_path / "o").status == 0
        results.append([(tmp_path / "o" / name).read_bytes() for name in OUTPUTS])
    assert results[0] == results[1]


def test_hostile_surroundings_change_nothing(sweep, tmp_path):
    shell("--runs-root", sweep, "--out", tmp_path / "plain", check=True)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir()}
    home = tmp_path / "home"
    home.mkdir(mode=0o500)
    rc = tmp_path / "matplotlibrc"
    rc.write_text(
        "text.usetex: True\nfont.size: 30\nsavefig.dpi: 40\nsavefig.bbox: tight\nbackend: TkAgg\nno.such.key: 1\n"
    )
    hostile = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "HOME": str(home), "MPLBACKEND": "QtAgg"}
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MPLCONFIGDIR", "LANG")}
    environment |= hostile | {"MATPLOTLIBRC": str(rc)}
    result = shell("--runs-root", sweep, "--out", tmp_path / "hostile", env=environment, cwd="/")
    assert result.returncode == 0, result.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "hostile").iterdir()} == expected
    assert [line for line in result.stderr.splitlines() if not line.startswith(("INFO: ", "WARNING: "))] == []


def test_reader_that_closes_the_pipe_is_no_error(sweep, tmp_path):
    for stream, buffered in (("stdout", ""), ("stderr", ""), ("stdout", "1"), ("stderr", "1")):
        reader, writer = os.pipe()
        os.close(reader)
        other = "stderr" if stream == "stdout" else "stdout"
        streams = {stream: writer, other: subprocess.PIPE}
        argv = [sys.executable, SCRIPT, "--runs-root", sweep, "--out", tmp_path / stream]
        result = subprocess.run(argv, text=True, env=os.environ | {"PYTHONUNBUFFERED": buffered}, **streams)
        os.close(writer)
        assert result.returncode == 0
        assert "Traceback" not in (result.stderr or "")
        assert sorted(path.name for path in (tmp_path / stream).iterdir()) == sorted(OUTPUTS)


def test_killed_at_any_moment_each_file_is_the_old_or_the_new_one(sweep, tmp_path):
    out = tmp_path / "o"
    versions = []
    for threshold in (0.8, 0.9):
        shell("--runs-root", sweep, "--out", out, "--threshold", threshold, check=True)
        versions.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert all(versions[0][name] != versions[1][name] for name in OUTPUTS)
    start = time.perf_counter()
    shell("--runs-root", sweep, "--out", out, check=True)
    lasts = time.perf_counter() - start
    rng = np.random.default_rng()
    for turn in range(12):
        argv = [sys.executable, SCRIPT, "--runs-root", sweep, "--out", out, "--threshold", (0.8, 0.9)[turn % 2]]
        victim = subprocess.Popen(list(map(str, argv)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(lasts * rng.uniform(0.5, 1.1))
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        for name in OUTPUTS:
            assert (out / name).read_bytes() in [version[name] for version in versions]


def test_killed_between_writing_and_renaming_leaves_the_old_files_and_the_next_run_cleans_up(sweep, tmp_path):
    out = tmp_path / "o"
    shell("--runs-root", sweep, "--out", out, check=True)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    suicide = (
        "import os, signal, sys, pathlib, spaghetti_kl_alive as s\n"
        "pathlib.Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "s.main(sys.argv[1:])"
    )
    argv = [sys.executable, "-c", suicide, "--runs-root", sweep, "--out", out, "--threshold", "0.9"]
    assert subprocess.run(argv, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    assert before.items() <= after.items()
    assert len(after) == 2 * len(before)
    shell("--runs-root", sweep, "--out", out, check=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_runs_at_once_into_one_folder_leave_one_run_whole(sweep, tmp_path):
    versions = {}
    for threshold in ("0.8", "0.9"):
        shell("--runs-root", sweep, "--out", tmp_path / threshold, "--threshold", threshold, check=True)
        versions[threshold] = {path.name: path.read_bytes() for path in (tmp_path / threshold).iterdir()}
    for _ in range(2):
        racers = [
            subprocess.Popen(
                [sys.executable, SCRIPT, "--runs-root", sweep, "--out", tmp_path / "o", "--threshold", threshold],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for threshold in ("0.8", "0.9", "0.8", "0.9")
        ]
        assert [racer.wait() for racer in racers] == [0] * 4
        assert {path.name: path.read_bytes() for path in (tmp_path / "o").iterdir()} in versions.values()


def test_sweep_still_writing_gives_a_whole_result_or_a_clear_error(sweep, tmp_path):
    writer = (
        "import pathlib, sys\n"
        "path = pathlib.Path(sys.argv[1]); text = path.read_text()\n"
        "while True:\n"
        "    with path.open('w') as file:\n"
        "        for i in range(0, len(text), 500): file.write(text[i:i + 500]); file.flush()\n"
    )
    path = sweep / "a" / "trajectory.json"
    busy = subprocess.Popen([sys.executable, "-c", writer, path])
    try:
        time.sleep(0.2)
        results = [run("--runs-root", sweep, "--out", tmp_path / "o") for _ in range(8)]
    finally:
        busy.kill()
        busy.wait()
    for result in results:
        assert result.status in (0, 1)
        if result.status == 1:
            assert str(path) in result.err and "is the sweep still writing it?" in result.err
        else:
            assert [row["n"] for row in table(tmp_path / "o")] == ["12"] * 3


def test_full_disk_is_an_error_that_keeps_the_old_files(sweep, tmp_path, monkeypatch):
    out = tmp_path / "o"
    assert run("--runs-root", sweep, "--out", out).status == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    write = Path.write_bytes

    def fill(path: Path, content: bytes) -> int:
        if path.name.startswith(f".{ska.FIGURE}"):
            write(path, content[: len(content) // 2])
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", fill)
    result = run("--runs-root", sweep, "--out", out, "--threshold", 0.9)
    assert result.status == 1
    assert f"{out}: cannot be written (No space left on device)" in result.err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs takes root")
def test_really_full_disk_is_an_error_that_keeps_the_old_files(sweep, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs here: {mounted.stderr.strip()}")
    try:
        (disk / ska.TABLE).write_text("older")
        (disk / "ballast").write_bytes(bytes(130_000))
        result = shell("--runs-root", sweep, "--out", disk)
        assert result.returncode == 1
        assert "No space left on device" in result.stderr
        assert (disk / ska.TABLE).read_text() == "older"
        assert sorted(path.name for path in disk.iterdir()) == ["ballast", ska.TABLE]
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_unreadable_file_and_unwritable_folder_are_named(sweep, tmp_path):
    for folder in (tmp_path, *tmp_path.parents):
        if not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    probe = (  # Python's own modules may lie where nobody may read: parse the flags before becoming nobody
        "import loguru, os, sys; sys.path.insert(0, sys.argv[1]); import spaghetti_kl_alive as s\n"
        "args = s.tyro.cli(s.Args, args=sys.argv[2:]); s.tyro.cli = lambda *_, **__: args\n"
        "b' '.decode('utf-8-sig'); b''.decode('utf-8-sig'); os.setuid(65534); sys.exit(s.main())"
    )

    def as_nobody(*argv: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", probe, ROOT, *argv]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd="/")

    (tmp_path / "locked").mkdir(mode=0o755)
    result = as_nobody("--runs-root", sweep, "--out", tmp_path / "locked" / "o")
    assert (result.returncode, "no permission in" in result.stderr) == (1, True), result.stderr
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (sweep / "a" / "pmass.json").chmod(0)
    result = as_nobody("--runs-root", sweep, "--out", tmp_path / "open" / "o")
    assert result.returncode == 1
    assert f"{sweep / 'a' / 'pmass.json'}: Permission denied" in result.stderr
    assert list((tmp_path / "open").iterdir()) == []
    (sweep / "a").chmod(0)
    result = as_nobody("--runs-root", sweep, "--out", tmp_path / "open" / "o")
    assert (result.returncode, "Permission denied" in result.stderr) == (1, True)
    assert "Traceback" not in result.stderr
