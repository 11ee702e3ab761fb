"""The program disturbed: streams that take nothing, interrupts, other runs, and what the system withholds."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib.figure
import pytest
from processes import OUTPUTS, ROOT, SCRIPT, Fork, send, shell, whenever
from sweeps import SMALL, contents, run, write_cell

import spaghetti_kl_alive as ska


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
