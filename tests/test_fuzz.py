"""Mutated sweeps: whatever is wrong with the input, a run ends in one of three ways and loses nothing.

python tests/test_fuzz.py 2000    # the long form; the ordinary tests take a sample
"""

import csv
import json
import math
import os
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sweeps import random_cell, run, table

import spaghetti_kl_alive as ska

NAMES = ["a", "b", "a b", "it's", 'say "x"', "new\nline", "$x^2$", "a|b", "\\frac", "tab\t", "`tick`", "ελ", "-dash"]
NAMES += ["{0}", "<b>", os.fsdecode(b"raw\xff")]
JUNK = [None, True, "x", "", -1, 0, 3, 2.5, 10**400, math.nan, math.inf, -math.inf, 1e308, -1e308, [], {}, [[]], [None]]
KEYS = ["1", "1.0", "1e0", "x", "nan", "inf", "-0.0", "-2", "1e200", "1_0", " 2 ", "pmass", "gen_lens_qa"]
FLAGS = [
    {},
    {"skip_bad_cells": True},
    {"keep_duplicates": True},
    {"rows": "cell"},
    {"rows": "method", "survival": False},
    {"edges": "shrink", "roll": 5},
    {"calib_on": "raw", "calib_tokens": 1},
    {"normalize_kl": False},
    {"kl_log": True, "roll": 1},
    {"window": 20},
    {"alphas": (1.0, 7.0)},
    {"metric": "pmass"},
    {"model_contains": "m"},
    {"threshold": 1.0, "formats": ("pdf", "svg")},
]


# ------------------------------------------------------------------------------------ the mutations


def places(node: object, path: tuple = ()) -> list[tuple]:
    """The paths of all nodes below a JSON value."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    below = [(*path, key) for key, _ in items]
    return below + [deeper for key in below for deeper in places(node[key[-1]], key)]


def parent(content: object, path: tuple) -> object:
    for key in path[:-1]:
        content = content[key]
    return content


def change_json(data: st.DataObject, content: dict) -> None:
    """One structural change, anywhere in the file."""
    spots = places(content)
    if not spots:
        return
    depth = data.draw(st.integers(1, max(map(len, spots))))
    path = data.draw(st.sampled_from([spot for spot in spots if len(spot) <= depth]))
    holder, key = parent(content, path), path[-1]
    action = data.draw(st.sampled_from(["junk", "delete", "nest", "copy", "rename", "reverse"]))
    if action == "junk":
        holder[key] = data.draw(st.sampled_from(JUNK))
    elif action == "delete":
        del holder[key]
    elif action == "nest":
        for _ in range(data.draw(st.sampled_from([1, 3, 300]))):
            holder[key] = [holder[key]]
    elif action == "reverse" and isinstance(holder[key], list):
        holder[key].reverse()
    elif isinstance(holder, list):
        holder.insert(key, holder[key])
    else:
        name = data.draw(st.sampled_from(KEYS))
        holder[name] = holder[key] if action == "copy" else holder.pop(key)


def change_file(data: st.DataObject, path: Path) -> None:
    """One change to a file of a cell: to its content, its bytes or its kind."""
    kinds = ["json"] * 8 + ["cut", "bom", "byte", "huge", "deep", "gone", "folder", "loop", "link", "cell"]
    kind = data.draw(st.sampled_from(kinds))
    if not path.is_file():
        return
    raw = path.read_bytes()
    if kind == "json":
        try:
            content = json.loads(raw)
        except (ValueError, RecursionError):  # changed before
            return
        change_json(data, content)
        path.write_text(json.dumps(content, indent=2))
    elif kind == "cut":
        path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    elif kind == "bom":
        path.write_bytes(b"\xef\xbb\xbf" + raw)
    elif kind == "byte":
        at, byte = data.draw(st.integers(0, len(raw))), data.draw(st.sampled_from(list(b"\xff\0,}9-e")))
        path.write_bytes(raw[:at] + bytes([byte]) + raw[at + 1 :])
    elif kind == "huge":
        number = data.draw(st.sampled_from([b"1e400", b"1e30", b"-1e5", b"null"]))
        path.write_bytes(raw.replace(b"0.", number + b"\n, 0.", 1))
    elif kind == "deep":
        path.write_bytes(b"[" * 100_000)
    elif kind == "cell":  # a link to a file where the cell was
        shutil.rmtree(path.parent)
        path.parent.symlink_to(ska.__file__)
    else:
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind != "gone":
            path.symlink_to(path.name if kind == "loop" else "nowhere")


# ---------------------------------------------------------------------- what must then be the case


def expected_ends(cell: Path, alpha: float, args: ska.Args) -> list[tuple]:
    """Prompt, observed length, end and death of each rollout of a readable cell, by plain loops."""
    calib, trajectory, measured = (json.loads((cell / name).read_text(encoding="utf-8-sig")) for name in ska.FILES)
    window = args.window or calib["window"]
    lengths_key = "gen_lens_qa" if args.metric == "pmass" else "gen_lens_eval"

    def at(lists: dict) -> list:
        return next(value for key, value in lists.items() if float(key) == alpha)

    kl = at(trajectory["per_prompt_per_t_kl"])
    lengths = at(measured[lengths_key]) if lengths_key in measured else [len(row) for row in kl]
    ends = []
    for i, (curve, masses, g) in enumerate(zip(kl, at(measured[args.metric]), lengths, strict=True)):
        length = int(min(len(curve), g, window))
        drops = [
            int(fork)
            for fork, mass in zip(measured["fork_points"], masses, strict=True)
            if mass is not None and mass < args.threshold and fork <= length
        ]
        death = min(drops, default=None)
        if death is not None:
            end = "died" if death < length else "died_last"
        else:
            end = "censored" if g < window or len(curve) < min(g, window) else "alive"
        ends.append((i, length, end, death))
    return ends


def ends_of(rollouts: Sequence[ska.Rollout], name: str, alpha: float) -> list[tuple]:
    held = [r for r in rollouts if r.cell.name == name and r.alpha == alpha]
    return [(r.prompt, len(r.kl), r.fate.end, r.fate.death) for r in held]


def check_read(root: Path, sweep: ska.Sweep) -> None:
    """Every rollout of every cell and alpha is there with its fate and counted once, or what is missing was named."""
    args, notes = sweep.args, "\n".join(sweep.notes)
    copies = [r for r in sweep.rollouts if r.copy_of]
    assert sum(panel.n for panel in sweep.panels) == len(sweep.rollouts) - len(copies) * (not args.keep_duplicates)
    assert ("opies of rollouts" in notes) == bool(copies)
    left_out = [note for note in sweep.notes if note.startswith("Left out ")]
    for cell in root.iterdir():
        name = ska.printable(cell.name)
        if cell.is_file() or any(f"`{name}`" in note for note in left_out if not note.startswith("Left out alpha")):
            assert not any(r.cell.name == name for r in sweep.rollouts)
            continue
        kl = json.loads((cell / "trajectory.json").read_text(encoding="utf-8-sig"))["per_prompt_per_t_kl"]
        for alpha in {float(key) for key in kl}:
            absent = any(f"alpha {alpha:.12g} of" in note and f"`{name}`" in note for note in left_out)
            wanted = not absent and alpha in (args.alphas or [alpha])
            expected = expected_ends(cell, alpha, args) if wanted else []
            assert ends_of(sweep.rollouts, name, alpha) == expected
            assert bool(expected) == wanted


def check_written(out: Path, sweep: ska.Sweep) -> None:
    """The figure, the tables and the list hold just what was read."""
    figures = [f"{ska.FIGURE}.{ending}" for ending in sweep.args.formats]
    assert {path.name for path in out.iterdir()} == {ska.TABLES, ska.ROLLOUTS, *figures}
    assert [int(row["n"]) for row in table(out)] == [panel.n for panel in sweep.panels]
    for row in table(out):
        assert int(row["n"]) == sum(int(row[kind]) for kind in ("n_died", "n_died_last", "n_censored", "n_alive"))
    with (out / ska.ROLLOUTS).open(newline="", encoding="utf-8") as file:
        listed = Counter(
            (row["cell"], int(row["prompt"]), float(row["alpha"]), row["end"]) for row in csv.DictReader(file)
        )
    assert listed == Counter((r.cell.name, r.prompt, r.alpha, r.fate.end) for r in sweep.rollouts)


def one_of_three_ways(data: st.DataObject) -> None:
    """Mutate a sweep, read it, and check how that ended; now and then draw it, and run the program on it."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        root, out = Path(folder) / "sweep", Path(folder) / "out"
        names = data.draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True))
        for seed, name in enumerate(names):
            like = data.draw(st.integers(0, seed))  # another cell's seed makes copies
            random_cell(root / name, like, alphas=(0.0, 1.0), n=3, method=ska.printable(name))
        for _ in range(data.draw(st.integers(0, 3))):
            change_file(data, root / data.draw(st.sampled_from(names)) / data.draw(st.sampled_from(ska.FILES)))
        flags = data.draw(st.sampled_from(FLAGS))
        chance = crc32(b"".join(path.read_bytes() for path in sorted(root.glob("*/*.json")) if path.is_file()))
        try:
            sweep = ska.read(ska.Args(runs_root=root, out=out, dpi=20, **flags))
        except ska.SweepError as error:
            text = str(error)
            assert error.status == 1
            assert text.startswith((f"{root}: ", f"{root}{os.sep}", "calib.json: the cells have no window in common"))
            assert text.count("\n") <= 1
            if not flags and chance % 5 == 0:
                assert run("--runs-root", root, "--out", out).err == f"ERROR: {text}\n"
            assert not out.exists()
        else:
            check_read(root, sweep)
            if chance % 25 == 0:  # most need no picture
                ska.write(sweep)
                check_written(out, sweep)


SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@settings(max_examples=150, derandomize=True, **SETTINGS)
@given(st.data())
def test_a_mutated_sweep_ends_in_one_of_three_ways(data):
    one_of_three_ways(data)


if __name__ == "__main__":
    count = int(sys.argv[1])
    settings(max_examples=count, **SETTINGS)(given(st.data())(one_of_three_ways))()
    print(f"{count} mutated sweeps: all ended in one of the three ways")
