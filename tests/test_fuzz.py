"""Mutated sweeps: whatever is wrong with the input, a run ends in one of three ways and loses nothing.

python tests/test_fuzz.py 2000    # the long form; the ordinary tests take a sample
"""

import csv
import json
import math
import os
import sys
import tempfile
import warnings
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sweeps import random_cell, run, table

import spaghetti_kl_alive as ska

NASTY = [
    "a b",
    "it's",
    'say "x"',
    "new\nline",
    "$x^2$",
    "a|b",
    "\\frac",
    "tab\t",
    "`tick`",
    "ελ",
    "-dash",
    "{0}",
    "<b>",
]
JUNK = [None, True, "x", "", -1, 0, 3, 2.5, 10**400, math.nan, math.inf, -math.inf, 1e308, -1e308, [], {}, [[]], [None]]
FLAGS = [(), ("--skip-bad-cells",), ("--keep-duplicates",), ("--rows", "cell"), ("--rows", "seed", "--no-survival")]
FLAGS += [("--edges", "shrink"), ("--calib-on", "raw"), ("--no-normalize-kl",), ("--kl-log",), ("--roll", "1")]
FLAGS += [("--window", "25"), ("--alphas", "1", "7"), ("--metric", "pmass"), ("--model-contains", "m")]


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
        name = data.draw(st.sampled_from(["1", "1.0", "1e0", "x", "nan", "inf", "-0.0", "-2", "1_0", " 2 ", "pmass"]))
        holder[name] = holder[key] if action == "copy" else holder.pop(key)


def change_file(data: st.DataObject, path: Path) -> None:
    """One change to a file of a cell: to its content, its bytes or its kind."""
    kind = data.draw(
        st.sampled_from(["json"] * 6 + ["cut", "bom", "byte", "huge", "deep", "gone", "folder", "loop", "link"])
    )
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
        at = data.draw(st.integers(0, len(raw)))
        path.write_bytes(
            raw[:at] + data.draw(st.sampled_from([b"\xff", b"\x00", b",", b"}", b"9", b"-", b"e"])) + raw[at + 1 :]
        )
    elif kind == "huge":
        path.write_bytes(raw.replace(b"0.", data.draw(st.sampled_from([b"1e400", b"1e30", b"-1e5"])) + b"\n, 0.", 1))
    elif kind == "deep":
        path.write_bytes(b"[" * 100_000)
    else:
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind != "gone":
            path.symlink_to(path.name if kind == "loop" else "nowhere")


def expected_rows(cell: Path, alpha: float, threshold: float, window: int | None) -> list[tuple]:
    """Observed length, death and censoring of each rollout of a readable cell, by plain loops."""
    content = {name: json.loads((cell / name).read_text(encoding="utf-8-sig")) for name in ska.FILES}
    window = window or content["calib.json"]["window"]

    def at(lists: dict) -> list:
        return next(value for key, value in lists.items() if float(key) == alpha)

    kl, measured = at(content["trajectory.json"]["per_prompt_per_t_kl"]), content["pmass.json"]
    lengths = at(measured["gen_lens_eval"]) if "gen_lens_eval" in measured else [len(row) for row in kl]
    rows = []
    for curve, masses, g in zip(kl, at(measured["pmass_eval"]), lengths, strict=True):
        length = int(min(len(curve), g, window))
        deaths = [
            int(s) for s, mass in zip(measured["fork_points"], masses, strict=True) if mass < threshold and s < length
        ]
        death = min(deaths, default=None)
        rows.append((length, death, int(g < window and death is None)))
    return rows


def check_success(root: Path, out: Path, flags: tuple[str, ...], err: str) -> None:
    """Every rollout of every cell and alpha is in the list and in the counts, or what is missing was named."""
    with (out / ska.ROLLOUTS).open(newline="") as file:
        listed = list(csv.DictReader(file))
    rows = table(out)
    assert len(listed) == sum(int(row["n"]) for row in rows) + sum(bool(row["left_out_as_copy_of"]) for row in listed)
    for row in rows:
        assert int(row["n_died"]) + int(row["n_censored"]) <= int(row["n"])
    window = 25 if "--window" in flags else None
    asked = [1.0, 7.0] if "--alphas" in flags else None
    for cell in sorted(root.iterdir()):
        name = ska.printable(cell.name)
        if f"Left out `{name}`: " in err or "neither folder name nor model contains" in err:
            continue
        kl = json.loads((cell / "trajectory.json").read_text(encoding="utf-8-sig"))["per_prompt_per_t_kl"]
        for alpha in {float(key) for key in kl}:
            if (asked and alpha not in asked) or f"Left out alpha {alpha:g} of `{name}`" in err:
                continue
            held = [row for row in listed if row["cell"] == name and float(row["alpha"]) == alpha]
            found = [(int(r["observed_tokens"]), int(r["death_token"] or -1), int(r["censored"])) for r in held]
            wanted = [(t, -1 if d is None else d, c) for t, d, c in expected_rows(cell, alpha, 0.8, window)]
            assert found == wanted


def one_of_three_ways(data: st.DataObject) -> None:
    """Mutate a sweep, run, and check how the run ended."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        root, out = folder / "sweep", folder / "out"
        names = data.draw(st.lists(st.sampled_from(["a", "b", *NASTY]), min_size=1, max_size=3, unique=True))
        for seed, name in enumerate(names):
            random_cell(root / name, data.draw(st.integers(0, seed)), n=3, method=name)
        for _ in range(data.draw(st.integers(0, 3))):
            change_file(data, root / data.draw(st.sampled_from(names)) / data.draw(st.sampled_from(ska.FILES)))
        flags = data.draw(st.sampled_from(FLAGS))
        if data.draw(st.integers(0, 24)):  # most runs need no picture
            stack.enter_context(mock.patch.object(ska, "draw_figure"))
            stack.enter_context(mock.patch.object(ska, "rendered", lambda *_: b"picture"))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("error")
        result = run("--runs-root", root, "--out", out, *flags)
        assert "Traceback" not in result.err
        assert "Warning" not in result.err
        if result.status == 0:
            assert sorted(path.name for path in out.iterdir()) == sorted([ska.TABLE, ska.ROLLOUTS, f"{ska.FIGURE}.png"])
            check_success(root, out, flags, result.err)
        else:
            assert result.status == 1
            assert not out.exists()
            error = result.err[result.err.index("ERROR: ") :]
            assert any(
                f"{ska.printable(root)}{os.sep}" in error or word in error for word in (str(root), "`", "calib.json")
            )


SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@settings(max_examples=120, derandomize=True, **SETTINGS)
@given(st.data())
def test_mutated_sweep_ends_in_one_of_three_ways(data):
    one_of_three_ways(data)


if __name__ == "__main__":
    count = int(sys.argv[1])
    settings(max_examples=count, **SETTINGS)(given(st.data())(one_of_three_ways))()
    print(f"{count} mutated sweeps: all ended in one of the three ways")
