"""The program in processes of its own, to be watched and disturbed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sweeps import Run

import spaghetti_kl_alive as ska

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "spaghetti_kl_alive.py"
OUTPUTS = {ska.SUMMARY_FILE, ska.ROLLOUTS_FILE, f"{ska.FIGURE_STEM}.png"}  # of a sweep with one steered alpha


def shell(*argv: object, **options: Any) -> subprocess.CompletedProcess:
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
            sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
            first()
            status = ska.main([str(arg) for arg in argv])
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def wait(self) -> Run:
        """Exit status, below zero if a signal ended it, and what it printed."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return Run(status, *(path.read_text() for path in self.logs))


def whenever(events: str, name: str, act: Callable[[], object]) -> Callable[[], None]:
    """For a fork: do something before each "open", "os.rename" or the like of a file with that in its path."""

    def first() -> None:
        busy: list[bool] = []

        def hook(seen: str, args: tuple) -> None:
            paths = [os.fsdecode(arg) for arg in args if isinstance(arg, str | Path)]
            if seen in events.split() and not busy and any(name in path for path in paths):
                busy.append(True)
                act()
                busy.clear()

        sys.addaudithook(hook)

    return first


def send(number: signal.Signals) -> Callable[..., None]:
    return lambda *_, **__: os.kill(os.getpid(), number)
