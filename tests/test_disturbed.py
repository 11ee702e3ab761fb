"""The program disturbed: streams that take nothing, interrupts, other runs, and what the system withholds."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import matplotlib.figure
import pytest
from processes import OUTPUTS, ROOT, SCRIPT, Fork, send, whenever
from sweeps import SMALL, Run, contents, run, write_cell

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


@pytest.fixture
def rerun(tiny, older):
    """The flags of a run at threshold 0.9 into that folder."""
    return ("--runs-root", tiny, "--out", older, *SMALL, "--threshold", 0.9)


def is_whole(folder: Path, versions: dict) -> bool:
    """Each output is there, as one of the two runs writes it."""
    held = contents(folder)
    return all(held[name] in (versions[0.8][name], versions[0.9][name]) for name in OUTPUTS)


# --------------------------------------------------------- streams that take nothing, and little memory

WHOLE = ["--runs-root", "{tiny}", "--out", "o", "--dpi", "20", "--no-survival"]
CASES = {  # what stdout and stderr are, bytes of memory more than at the start, the command line, the exit status
    "stdout's reader gone": ("gone", "file", None, WHOLE, 0),
    "stdout full": ("full", "file", None, WHOLE, 0),
    "stderr full": ("file", "full", None, WHOLE, 0),
    "both closed": ("closed", "closed", None, WHOLE, 0),
    "help and its reader gone": ("gone", "file", None, ["--help"], 0),
    "wrong use and stderr full": ("file", "full", None, ["--rows", "nothing"], 2),
    "bad data and stderr closed": ("file", "closed", None, ["--runs-root", "nowhere"], 1),
    "memory to read": ("file", "file", 25_000_000, ["--runs-root", "{long}", "--out", "o"], 1),
    "memory to draw": ("file", "file", 80_000_000, [*WHOLE[:4], "--dpi", "2400"], 1),
}
HOST = """
import json, os, re, resource, sys
import spaghetti_kl_alive as ska

cases = json.loads(sys.argv[1])
assert ska.main([*cases[0][3], "--out", "first"]) == 0  # for all that it imports and caches
statuses = []
for i, (out, err, memory, argv, _) in enumerate(cases):
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
        if memory:
            size = 1024 * int(re.search(r"VmSize:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
            resource.setrlimit(resource.RLIMIT_AS, (size + memory, size + memory))
        sys.exit(ska.main(argv))
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(json.dumps(statuses), file=sys.__stderr__)
"""


@pytest.fixture(scope="module")
def ended(tiny, tmp_path_factory):
    """How each case ended: exit status, what it said on stderr, and the files it wrote."""
    folder = tmp_path_factory.mktemp("host")
    long = write_cell(folder / "long" / "a", {}, {"1": [[1, 1, 1]]})
    (long / ska.TRAJECTORY_FILE).write_text(json.dumps({"per_prompt_per_t_kl": {"1": [[0.125] * 2 * 10**6]}}))
    cases = json.dumps([*CASES.values()]).replace("{tiny}", str(tiny)).replace("{long}", str(long.parent))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}  # threads would take memory
    argv = [sys.executable, "-W", "ignore", "-c", HOST, cases]
    host = subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True)
    assert host.returncode == 0, host.stderr
    statuses = json.loads(host.stderr.splitlines()[-1])
    held = [{path.name: path for path in (folder / str(i)).rglob("*")} for i in range(len(CASES))]
    said = [files["stderr"].read_text() if "stderr" in files else "" for files in held]
    wrote = [{*files} & (OUTPUTS | {"o"}) for files in held]
    return dict(zip(CASES, zip(statuses, said, wrote, strict=True), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_streams_that_take_nothing_and_too_little_memory_are_no_traceback(ended, case):
    status, said, wrote = ended[case]
    assert "Traceback" not in said and "Exception ignored" not in said
    assert status == CASES[case][-1]
    assert wrote == (OUTPUTS | {"o"} if CASES[case][-2] == WHOLE else set())
    if case.startswith("memory"):
        error = said.split("ERROR: ")[1]
        assert "memory" in error and "--alphas" in error and "install" not in error.lower()


def test_the_first_line_of_help_may_be_all_that_is_read():
    argv = ["bash", "-c", '"$0" "$1" --help | head -1; exit ${PIPESTATUS[0]}', sys.executable, SCRIPT]
    result = subprocess.run(argv, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: spaghetti_kl_alive") and result.stdout.count("\n") == 1


# ------------------------------------------------------------------------------ interrupted and killed


def at_drawing() -> None:
    matplotlib.figure.Figure.add_subplot = send(signal.SIGINT)


def at_saving() -> None:
    matplotlib.figure.Figure.savefig = send(signal.SIGINT)


MOMENTS = {
    "reading": whenever("open", ska.TRAJECTORY_FILE, send(signal.SIGINT)),
    "drawing": at_drawing,
    "saving": at_saving,
    "writing": whenever("open", ska.ROLLOUTS_FILE, send(signal.SIGINT)),
    "renaming": whenever("os.rename", ska.ROLLOUTS_FILE, send(signal.SIGINT)),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_ends_with_130_and_leaves_whole_files_only(rerun, older, versions, tmp_path, moment):
    result = Fork(tmp_path / "log", *rerun, first=MOMENTS[moment]).wait()
    assert (result.status, result.out) == (130, "")
    assert "Traceback" not in result.err and result.err.endswith("ERROR: interrupted\n")
    assert contents(older).keys() == OUTPUTS and is_whole(older, versions)
    changed = {name for name, content in contents(older).items() if content != versions[0.8][name]}
    assert len(changed) < len(OUTPUTS) and (not changed or moment == "renaming")


def test_at_every_moment_each_file_is_the_old_or_the_new_one(rerun, older, versions, tmp_path):
    moments = tmp_path / "moments"
    moments.mkdir()
    look = whenever(
        "open os.rename", str(older), lambda: shutil.copytree(older, moments / str(len([*moments.iterdir()])))
    )
    assert Fork(tmp_path / "log", *rerun, first=look).wait().status == 0
    assert len([*moments.iterdir()]) >= 2 * len(OUTPUTS)
    assert all(is_whole(moment, versions) for moment in moments.iterdir())
    assert contents(older) == versions[0.9]


def limited(size: int, kill: bool) -> Callable[[], None]:
    """For a fork: no file may grow beyond so many bytes, be it that the process is killed or that writing fails."""

    def first() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kill else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return first


@pytest.mark.parametrize("moment", ["in a file", "renaming"])
def test_killed_while_writing_leaves_whole_files_and_nothing_that_disturbs_or_is_deleted_later(
    rerun, older, versions, tmp_path, moment
):
    largest = max(map(len, versions[0.9].values()))
    killed = {
        "in a file": limited(largest - 1, kill=True),
        "renaming": whenever("os.rename", ska.ROLLOUTS_FILE, send(signal.SIGKILL)),
    }
    status = Fork(tmp_path / "log", *rerun, first=killed[moment]).wait().status
    assert status == -(signal.SIGXFSZ if moment == "in a file" else signal.SIGKILL)
    assert is_whole(older, versions)
    left = {name: content for name, content in contents(older).items() if name not in OUTPUTS}
    assert left and all(name.startswith(".") for name in left)
    for path in older.iterdir():
        os.utime(path, (1e9, 1e9))
    assert run(*rerun).status == 0
    assert contents(older) == versions[0.9] | left


def test_a_full_disk_is_an_error_and_keeps_the_old_files(rerun, older, versions, tmp_path):
    largest = max(map(len, versions[0.9].values()))
    result = Fork(tmp_path / "log", *rerun, first=limited(largest - 1, kill=False)).wait()
    assert (result.status, result.out) == (1, "")
    assert contents(older) == versions[0.8]
    assert f"ERROR: {older}: cannot be written (File too large)" in result.err
    assert "Traceback" not in result.err


# ------------------------------------------------------------------------------------------ other runs


def test_runs_at_once_into_one_folder_leave_whole_files_only(tiny, tmp_path, versions):
    argv = ("--runs-root", tiny, "--out", tmp_path / "o", *SMALL, "--threshold")
    racers = [Fork(tmp_path / str(i), *argv, threshold) for i, threshold in enumerate((0.8, 0.9) * 2)]
    assert [racer.wait().status for racer in racers] == [0] * 4
    assert contents(tmp_path / "o").keys() == OUTPUTS and is_whole(tmp_path / "o", versions)


@pytest.mark.parametrize("event", ["open", "os.rename"])
def test_a_run_does_not_wait_for_one_that_is_stopped_in_the_same_folder(rerun, older, tmp_path, versions, event):
    stop = whenever(event, ska.ROLLOUTS_FILE, send(signal.SIGSTOP))
    stopped = Fork(tmp_path / "log", *rerun[:-1], 0.8, first=stop)
    assert os.WIFSTOPPED(os.waitpid(stopped.pid, os.WUNTRACED)[1])
    try:
        assert run(*rerun).status == 0
        assert contents(older).items() >= versions[0.9].items()
    finally:
        os.kill(stopped.pid, signal.SIGCONT)
    assert stopped.wait().status == 0
    assert contents(older).keys() == OUTPUTS and is_whole(older, versions)


# ------------------------------------------------------------------------- what the system may withhold


@pytest.fixture
def shared(tiny, tmp_path):
    """A folder with a sweep that anybody may read, not among pytest's own, which it closes at any start.

    A whole run has gone before, since nobody may not read all that a run imports and caches.
    """
    assert run("--runs-root", tiny, "--out", tmp_path / "before", *SMALL).status == 0
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o755)
        shutil.copytree(tiny, Path(name, "sweep"))
        Path(name, "out").mkdir()
        Path(name, "out").chmod(0o777)
        yield Path(name)


@pytest.mark.parametrize("place", ["out", "sweep/a/pmass.json", "sweep/a", "sweep"])
def test_what_may_not_be_read_or_written_is_named(shared, tmp_path, place):
    def as_nobody() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)

    def ask() -> Run:
        flags = ("--runs-root", shared / "sweep", "--out", shared / "out" / "o", *SMALL)
        return Fork(tmp_path / "log", *flags, first=as_nobody).wait()

    mode = (shared / place).stat().st_mode
    (shared / place).chmod(0o555 if place == "out" else 0)
    result = ask()
    (shared / place).chmod(mode)
    assert result.status == 1 and "Traceback" not in result.err
    error = result.err.split("ERROR: ")[1]
    assert str(shared / place) in error and "Permission denied" in error
    assert ("cannot be written to (" in error) == (place == "out")  # which is seen before any work is done
    assert [*(shared / "out").iterdir()] == []
    assert ask().status == 0
