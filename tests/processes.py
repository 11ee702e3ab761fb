"""The program in processes of its own, where a shell, an environment or a stream matters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "spaghetti_kl_alive.py"


def python(*words: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    """Python in a new process, with these environment variables set as well."""
    argv = [sys.executable, *map(str, words)]
    return subprocess.run(argv, capture_output=True, text=True, cwd=cwd, env=os.environ | environment)


def shell(line: str, *words: object) -> subprocess.CompletedProcess:
    """A line of bash in which "$@" is the script with these words behind it."""
    argv = ["bash", "-c", line, "bash", sys.executable, str(SCRIPT), *map(str, words)]
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}  # as it is by default
    return subprocess.run(argv, capture_output=True, text=True, env=buffered)
