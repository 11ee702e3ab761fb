"""Odd and mutated sweeps: whatever the input is, a run ends in one of three ways, loses nothing and prints no nan.

SWEEPS=2000 python -m pytest -n 0 tests/test_fuzz.py    # the long form; the ordinary tests take a fixed sample
"""

import json
import math
import os
import random
import re
import shutil
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from zlib import crc32

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import Life, lives_of, panels_of
from sweeps import random_cell, read, run, table, write_cell

import spaghetti_kl_alive as ska

NAMES = ["a", "b", "a b", "it's", 'say "x"', "new\nline", "$x^2$", "a|b", "\\frac", "tab\t", "`tick`", "ελ", "-dash"]
NAMES += ["{0}", "<b>", os.fsdecode(b"raw\xff")]
NAN, INF, SWEEPS = math.nan, math.inf, int(os.environ.get("SWEEPS", 0))
JUNK = [None, True, "x", "", -1, 0, 3, 2.5, 10**400, NAN, INF, -INF, 1e308, -1e308, [], {}, [[]], [None]]
KEYS = ["1", "1.0", "1e0", "x", "nan", "inf", "-0.0", "-2", "1e150", "1_0", " 2 ", "pmass", "gen_lens_qa"]
FLAGS = [{}, {"skip_bad_cells": True}, {"keep_duplicates": True}, {"window": 20}, {"alphas": (1.0, 7.0)}]
FLAGS += [{"rows": "cell"}, {"rows": "method", "survival": False}, {"rows": "seed", "palette": "Set2"}]
FLAGS += [{"edges": "shrink", "roll": 5}, {"calib_on": "raw", "calib_tokens": 1}, {"kl_log": True, "roll": 1}]
FLAGS += [{"normalize_kl": False}, {"normalize_kl": False, "kl_log": True, "dose": False}, {"model_contains": "m"}]
FLAGS += [{"metric": "pmass"}, {"threshold": 1.0, "formats": ("pdf", "svg")}]
KL_ROWS = [[], [NAN] * 40, [0.0] * 40, [INF] * 40, [1e-9] * 40, [-1.0] * 40, [5e5] * 40, [1e308] * 3, [1e-320] * 30]
KL_ROWS += [[1.0], [None, INF, *[0.1] * 12], [0.5, 1.0] * 25, [2.0] * 60]
PMASS_ROWS = [[1.0] * 3, [NAN] * 3, [0.1] * 3, [1.0, None, 0.5], [NAN, 0.1, 0.9], [0.1, 0.9, 0.1], [1, 0.1, 1]]


def odd_cell(folder: Path, seed: int, **calib: object) -> None:
    """Rollouts with little in them, alone or as all of an alpha's; the forks may be none, or come too late."""
    rng = random.Random(seed)
    alphas = rng.choice([("0", "1"), ("0", "1", "2"), ("-1e150", "1e-150", "1"), ("0",)])
    forks = rng.choice([(0, 5, 20), (0, 5, 20), (39, 40, 41), (90, 91, 92), ()])
    kl, pmass = (
        {alpha: rng.choices([rng.choice(kinds)] + kinds * rng.randint(0, 1), k=4) for alpha in alphas}
        for kinds in (KL_ROWS, [row[: len(forks)] for row in PMASS_ROWS])
    )
    lengths = {alpha: rng.choices([0, 1, 30, 40, 60], k=4) for alpha in alphas}
    write_cell(folder, kl, pmass, rng.choice([None, lengths]), forks, **calib)


def places(node: object, path: tuple = ()) -> list[tuple]:
    """The paths of all nodes below a JSON value."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for key, value in items for place in ((*path, key), *places(value, (*path, key)))]


def change_json(data: st.DataObject, content: dict) -> None:
    """One structural change, anywhere in the file."""
    spots = places(content)
    if not spots:
        return
    depth = data.draw(st.integers(1, max(map(len, spots))))
    *path, key = data.draw(st.sampled_from([spot for spot in spots if len(spot) <= depth]))
    holder = content
    for step in path:
        holder = holder[step]
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
        holder[data.draw(st.sampled_from(KEYS))] = holder[key] if action == "copy" else holder.pop(key)


def change_file(data: st.DataObject, path: Path) -> None:
    """One change to a file of a cell: to its content, its bytes or its kind."""
    kinds = ["json"] * 8 + ["cut", "bom", "byte", "huge", "deep", "gone", "folder", "loop", "nowhere", "cell"]
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
    elif kind in ("cut", "byte"):
        k, byte = data.draw(st.integers(0, len(raw))), data.draw(st.sampled_from(list(b"\xff\0,}9-e")))
        path.write_bytes(raw[:k] + (b"" if kind == "cut" else bytes([byte]) + raw[k + 1 :]))
    elif kind in ("bom", "deep"):
        path.write_bytes(b"\xef\xbb\xbf" + raw if kind == "bom" else b"[" * 100_000)
    elif kind == "huge":
        number = data.draw(st.sampled_from([b"1e400", b"1e30", b"-1e5", b"null"]))
        path.write_bytes(raw.replace(b"0.", number + b"\n, 0.", 1))
    elif kind == "cell":  # a link to a file where the cell was
        shutil.rmtree(path.parent)
        path.parent.symlink_to(ska.__file__)
    else:
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind != "gone":
            path.symlink_to(path.name if kind == "loop" else kind)


def check_read(root: Path, sweep: ska.Sweep) -> None:
    """Every rollout of every cell and alpha is there with its fate and counted once, or what is missing was named."""
    args = sweep.args
    left_out = [note for note in sweep.notes if note.startswith("Left out ")]
    every: list[Life] = []
    for cell in root.iterdir():
        name = f"`{ska.escaped(cell.name)}`"
        rollouts = [r for r in sweep.rollouts if r.cell.folder == cell]
        is_cell = cell.is_dir() and any(os.path.lexists(cell / file) for file in ska.CELL_FILES)
        if not is_cell or any(name in note for note in left_out if not note.startswith("Left out alpha")):
            assert not rollouts
            continue
        found = {r.alpha for r in rollouts}
        flags = {flag: getattr(args, flag) for flag in ("window", "threshold", "metric", "rows")}
        lives = lives_of(cell, sorted(found), **flags)
        assert [(r.prompt_index, r.alpha, len(r.kl), r.eos, r.fate) for r in rollouts] == [
            (x.prompt, x.alpha, x.n_tokens, x.eos, (x.end, x.death, x.recovered, x.followed_to)) for x in lives
        ]
        every += lives
        recorded = {float(key) for key in json.loads((cell / ska.TRAJECTORY_FILE).read_bytes())["per_prompt_per_t_kl"]}
        for alpha in recorded.intersection(args.alphas or recorded) - found:
            assert any(f"alpha {alpha + 0.0:.12g} of {name}" in note for note in left_out)
    expected = panels_of(every, args.keep_duplicates).items()
    assert Counter((alpha, len(lives)) for (_, alpha), lives in expected if lives) == Counter(
        (panel.alpha, panel.n) for panel in sweep.panels if panel.n
    )


def check_words(sweep: ska.Sweep) -> None:
    """No number that is none is printed; what is said of a damaged file, or a seed of [None], quotes it."""
    words = [line for line in ska.summary_text(sweep).splitlines() if not line.startswith("- Left out")]
    words += [ska.terminal_text(sweep), *(repr(ska.title_lines(panel, sweep.args)) for panel in sweep.panels)]
    assert re.findall(r".*\b(?:nan|inf|None)\b.*", "\n".join(words).replace("[None]", "")) == []


@settings(max_examples=SWEEPS or 120, derandomize=not SWEEPS, suppress_health_check=[*HealthCheck], database=None)
@given(st.data())
def test_an_odd_or_mutated_sweep_ends_in_one_of_three_ways_and_prints_no_nan(data):
    """Make and mutate a sweep, read it, and check how that ended; now and then draw it, and run the program on it."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        root, out = Path(folder) / "sweep", Path(folder) / "out"
        names = data.draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True))
        seeds: list[int] = []
        for name in names:
            seeds.append(data.draw(st.sampled_from([0, 1, *seeds]) | st.integers(0, 9999)))  # the same one makes copies
            if seeds[-1] % 2:
                odd_cell(root / name, seeds[-1], method=ska.escaped(name))
            else:
                random_cell(root / name, seeds[-1], alphas=(0.0, 1.0), n=3, method=ska.escaped(name))
        n_changes = data.draw(st.integers(0, 3))
        for _ in range(n_changes):
            change_file(data, root / data.draw(st.sampled_from(names)) / data.draw(st.sampled_from(ska.CELL_FILES)))
        flags = data.draw(st.sampled_from(FLAGS))
        chance = crc32(b"".join(path.read_bytes() for path in sorted(root.glob("*/*.json")) if path.is_file()))
        try:
            sweep = read(root, out=out, dpi=20, **flags)
        except ska.SweepError as error:
            assert n_changes or "metric" in flags or "alphas" in flags
            text, starts = str(error), (f"{root}: ", f"{root}{os.sep}", "the cells have no window in common")
            assert text.lstrip("'").startswith(starts)
            assert (error.exit_status, text.count("\n") <= 1, out.exists()) == (1, True, False)
            if not flags and chance % 5 == 0:
                assert run("--runs-root", root, "--out", out).err == f"ERROR: {text}\n"
                assert not out.exists()
        else:
            check_read(root, sweep)
            check_words(sweep)
            if chance % 15 == 0:  # most need no picture
                ska.write(sweep)
                stems = [ska.FIGURE_STEM] + [ska.DOSE_STEM] * (sweep.args.dose and sweep.has_dose)
                figures = {f"{stem}.{ending}" for stem in stems for ending in sweep.args.formats}
                assert {path.name for path in out.iterdir()} == {ska.SUMMARY_FILE, ska.ROLLOUTS_FILE} | figures
                assert [int(row["n"]) for row in table(out, 1)] == [panel.n for panel in sweep.panels]
