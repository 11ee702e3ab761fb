"""What is drawn, read as data from the figure: lines, marks, words, limits, strips, layout."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from layout import faults, grid_of
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from oracles import beta_product, lifelines_survival
from PIL import Image
from sweeps import drawn, random_cell, write_cell

import spaghetti_kl_alive as ska

PLAIN = {"roll": 1, "calib_on": "raw"}
NATS = {"roll": 1, "normalize_kl": False}
ALIVE, DEAD = to_hex(ska.ALIVE), to_hex(ska.DEAD)
WELL = [1.0, 1.0, 1.0]  # pmass at the forks of a rollout that lives


# ------------------------------------------------------------------------------ what a figure holds


def shown(ax: Axes) -> list[Text]:
    return [text for text in ax.texts if text.get_text() and text.get_visible()]


def words(ax: Axes) -> str:
    return " | ".join(text.get_text() for text in shown(ax))


def text_of(ax: Axes, pattern: str) -> Text:
    """The one text in an axes that holds the pattern."""
    (text,) = [text for text in shown(ax) if re.search(pattern, text.get_text())]
    return text


def kl_axes(figure: Figure) -> list[Axes]:
    """The panels without their strips, in reading order."""
    return [ax for ax in figure.axes if "α = " in words(ax)]


def strips(figure: Figure) -> list[Axes]:
    return [ax for ax in figure.axes if ax not in kl_axes(figure)]


def collection(ax: Axes) -> LineCollection:
    """The lines of all of a panel's rollouts: one collection."""
    (lines,) = [held for held in ax.collections if isinstance(held, LineCollection)]
    return lines


def polylines(ax: Axes) -> list[tuple[str, list[list[float]]]]:
    """Colour and vertices of the lines with any ink, in the order in which they are drawn."""
    lines = collection(ax)
    shades = [to_hex(colour) for colour in lines.get_edgecolor()]
    parts = [np.round(path.vertices, 5).tolist() for path in lines.get_paths()]
    return [(shades[i % len(shades)], part) for i, part in enumerate(parts) if len(part) > 1]


def marks(ax: Axes, marker: str) -> list:
    return [line for line in ax.lines if line.get_marker() == marker and len(line.get_xdata())]


def points(ax: Axes, marker: str) -> list[list[float]]:
    return sorted(np.round(row, 5).tolist() for line in marks(ax, marker) for row in line.get_xydata())


def dashed(ax: Axes) -> list[float]:
    """Heights of the dashed lines."""
    return sorted(line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == "--")


def medians(ax: Axes) -> dict[str, list[float]]:
    """Height per token of the solid and of the dotted median, -1 where there is none."""
    lines = [line for line in ax.lines if line.get_linestyle() in ("-", ":")]
    return {line.get_linestyle(): np.nan_to_num(line.get_ydata(), nan=-1).tolist() for line in lines}


def badge(text: Text) -> tuple[str, str, str] | None:
    """Colours of a text's box, of its edge and of the text itself."""
    box = text.get_bbox_patch()
    return box and (to_hex(box.get_facecolor()), to_hex(box.get_edgecolor()), to_hex(text.get_color()))


def header(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.texts).replace("\N{NO-BREAK SPACE}", " ")


def legend(figure: Figure) -> dict[str, object]:
    held = figure.legends[0]
    return {text.get_text(): handle for text, handle in zip(held.get_texts(), held.legend_handles, strict=True)}


def bands(ax: Axes) -> list[tuple[float, float]]:
    """From and to which token the pale bands run."""
    boxes = [patch.get_extents().transformed(ax.transData.inverted()) for patch in ax.patches]
    return sorted((round(box.x0, 6), round(box.x1, 6)) for box in boxes)


def span_at(area: PolyCollection, x: float) -> tuple[float, float]:
    """Lowest and highest point of a polygon at x."""
    (path,) = area.get_paths()
    edges = pairwise([*path.vertices, path.vertices[0]])
    crossed = [a[1] + (b[1] - a[1]) * (x - a[0]) / (b[0] - a[0]) for a, b in edges if (a[0] - x) * (b[0] - x) < 0]
    return min(crossed), max(crossed)


def raw_rollouts(folder: Path, alpha: str, threshold: float = 0.8, window: int = 40) -> list[dict]:
    """Each rollout's KL, length and fate, from the raw JSON in the plainest way."""
    kl = json.loads((folder / "trajectory.json").read_text())["per_prompt_per_t_kl"][alpha]
    mass = json.loads((folder / "pmass.json").read_text())
    rows = []
    for curve, row, g in zip(kl, mass["pmass_eval"][alpha], mass["gen_lens_eval"][alpha], strict=True):
        length = min(len(curve), g, window)
        seen = [s for s in mass["fork_points"] if s <= length]
        deaths = [s for s, m in zip(mass["fork_points"], row, strict=True) if m < threshold and s <= length]
        death = min(deaths, default=None)
        followed = max(seen, default=None) if death is None else death
        rows.append({"kl": curve[:g], "length": length, "death": death, "followed": followed, "eos": g < window})
    return rows


# ------------------------------------------------------------------------------------------- lines


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two cells at three alphas, drawn as they are."""
    root = tmp_path_factory.mktemp("small")
    cells = [random_cell(root / name, seed) for seed, name in enumerate(("a", "b"))]
    return *drawn(root, **PLAIN, calib_tokens=10), cells


def test_a_rollout_is_an_alive_and_a_dead_line_that_share_the_vertex_of_death(tmp_path):
    kl = [[2.0, 1.0, 4.0, 3.0, 1.0, 2.0, 1.0], [1.0] * 7, [3.0, 1.0, 2.0], [5.0, 5.0], [2.0, 2.0, 7.0, 6.0, 6.0, 8.0]]
    pmass = [[0.9, 0.5, 0.9], [0.95, 0.9, 0.1], [0.9, 0.9, 0.9], [0.2, 0.9, 0.9], [0.8, 0.8, 0.7]]
    write_cell(tmp_path / "r" / "a", {"1.0": kl}, {"1.0": pmass}, {"1.0": [40, 40, 3, 2, 6]}, forks=[0, 2, 6])
    figure, _ = drawn(tmp_path / "r", **NATS)
    (ax,) = kl_axes(figure)
    assert sorted(polylines(ax)) == sorted(
        [
            (ALIVE, [[0, 2], [1, 1], [2, 4]]),
            (DEAD, [[2, 4], [3, 3], [4, 1], [5, 2], [6, 1]]),
            (ALIVE, [[t, 1.0] for t in range(7)]),
            (ALIVE, [[0, 3], [1, 1], [2, 2]]),
            (DEAD, [[0, 5], [1, 5]]),
            (ALIVE, [[0, 2], [1, 2], [2, 7], [3, 6], [4, 6], [5, 8]]),
        ]
    )
    assert points(ax, "x") == [[0, 5], [2, 4], [5, 8], [6, 1]]  # who dies after the last token has its cross on that
    assert points(ax, "|") == [[1, 5], [2, 2], [5, 8]]  # a record cut short has no tick


def test_lines_are_the_normalised_kl_up_to_the_window(small):
    figure, _, cells = small
    for ax, alpha in zip(kl_axes(figure)[1:], ("1.0", "2.0"), strict=True):
        expected, ticks, crosses = [], [], []
        for rollout in (r for cell in cells for r in raw_rollouts(cell, alpha)):
            scale = np.percentile(rollout["kl"][:10], 95)
            line = [[t, rollout["kl"][t] / scale] for t in range(rollout["length"])]
            dies = len(line) if rollout["death"] is None else rollout["death"]
            expected += [(ALIVE, line[: dies + 1] if dies else []), (DEAD, line[dies:])]
            ticks += [line[-1]] if rollout["eos"] else []
            crosses += [line[min(dies, len(line) - 1)]] if rollout["death"] is not None else []
        expected = sorted(part for part in expected if len(part[1]) > 1)
        held = sorted(polylines(ax))
        assert [shade for shade, _ in held] == [shade for shade, _ in expected]
        for (_, part), (_, wanted) in zip(held, expected, strict=True):
            np.testing.assert_allclose(part, wanted, rtol=1e-4, atol=2e-5)
        assert len(ticks) > 2 < len(crosses)
        for mark, wanted in (("|", ticks), ("x", crosses)):
            np.testing.assert_allclose(points(ax, mark), sorted(wanted), rtol=1e-4, atol=2e-5)


def test_a_gap_breaks_the_line_and_a_death_in_it_is_marked_at_the_nearest_value(tmp_path):
    kl = [[2.0, float("inf"), float("nan"), 4.0, 2.0]]
    write_cell(tmp_path / "r" / "a", {"1": kl}, {"1": [[1, 0]]}, {"1": [40]}, forks=[0, 2])
    (ax,) = kl_axes(drawn(tmp_path / "r", **NATS)[0])
    (_, alive), (_, dead) = sorted(polylines(ax))
    assert np.array_equal(alive, [[0, 2], [1, np.nan], [2, np.nan]], equal_nan=True)
    assert np.array_equal(dead, [[2, np.nan], [3, 4], [4, 2]], equal_nan=True)
    assert points(ax, "x") == [[2, 4]]


def test_the_order_of_drawing_depends_on_the_rollouts_place_and_not_on_their_fate(tmp_path):
    kl = [[1.0 + i, 1.0] for i in range(40)]
    orders, runs = [], []
    for name, dead in (("first", range(20)), ("last", range(20, 40)), ("none", ())):
        pmass = [[0.1 if i in dead else 0.9] for i in range(40)]
        write_cell(tmp_path / name / "a", {"1": kl}, {"1": pmass}, {"1": [2] * 40}, forks=[0])
        parts = polylines(kl_axes(drawn(tmp_path / name, **NATS)[0])[0])
        orders.append([vertices[0][1] for _, vertices in parts])
        shades = [shade for shade, _ in parts]
        runs.append(1 + sum(a != b for a, b in pairwise(shades)))
    assert orders[0] == orders[1] == orders[2]
    assert sorted(orders[0]) == [1.0 + i for i in range(40)]
    assert runs[0] > 12 < runs[1]  # 21 are to be expected of a random order


def test_a_long_line_is_drawn_with_few_vertices_and_all_its_peaks(tmp_path):
    rng = np.random.default_rng(4)
    kl = np.round(rng.gamma(0.3, 1, 5003), 5)
    write_cell(tmp_path / "r" / "a", {"1": [kl.tolist()]}, {"1": [[1, 0]]}, forks=[0, 2000], window=6000)
    parts = dict(polylines(kl_axes(drawn(tmp_path / "r", **NATS)[0])[0]))
    for shade, (start, stop) in {ALIVE: (0, 2001), DEAD: (2000, 5003)}.items():
        tokens, values = np.array(parts[shade]).T
        assert len(tokens) <= 1100
        assert (tokens[0], tokens[-1]) == (start, stop - 1)
        assert (np.diff(tokens) > 0).all()
        np.testing.assert_allclose(values, kl[tokens.astype(int)], atol=1e-5)
        for t in range(start, stop - 40, 13):
            near = values[(tokens > t - 12) & (tokens < t + 32)]
            assert near.max() >= kl[t : t + 20].max() - 1e-5
            assert near.min() <= kl[t : t + 20].min() + 1e-5


@pytest.fixture(scope="module")
def crowds(tmp_path_factory):
    """Panels of 1, 20, 24, 100, 800 and 2000 rollouts of two tokens."""
    root = tmp_path_factory.mktemp("crowds")
    sizes = {"1": 1, "2": 20, "3": 24, "4": 100, "5": 800, "6": 2000}
    kl = {alpha: [[1.0 + i % 7, 1.0] for i in range(n)] for alpha, n in sizes.items()}
    pmass = {alpha: [[0.5 if i % 9 == 4 else 1.0] for i in range(n)] for alpha, n in sizes.items()}
    write_cell(root / "a", kl, pmass, {alpha: [2] * n for alpha, n in sizes.items()}, forks=[0], window=2)
    return root


def test_lines_fade_with_their_number_and_the_legend_does_not(crowds):
    figure, _ = drawn(crowds, survival=False)
    opacities = [collection(ax).get_alpha() for ax in kl_axes(figure)]
    assert opacities == pytest.approx([0.8, 0.8, 16 / 24, 0.16, 0.02, 0.02])
    assert {tuple(collection(ax).get_linewidths()) for ax in kl_axes(figure)} == {(0.5,)}
    assert {handle.get_alpha() for name, handle in legend(figure).items() if "alive" in name or name == "dead"} == {
        None
    }


def test_width_and_opacity_are_those_asked_for(crowds):
    figure, _ = drawn(crowds, survival=False, line_lw=1.3, line_alpha=0.9, alphas=(1, 6))
    assert [collection(ax).get_alpha() for ax in kl_axes(figure)] == [0.9, 0.9]
    assert {tuple(collection(ax).get_linewidths()) for ax in kl_axes(figure)} == {(1.3,)}


@pytest.mark.parametrize("dpi", [50, 160])
def test_the_png_has_the_pixels_of_the_page_at_the_resolution_asked_for(tmp_path, dpi):
    random_cell(tmp_path / "r" / "a", alphas=[1.0])
    flags = {"dpi": 50} if dpi == 50 else {}
    args = ska.Args(runs_root=tmp_path / "r", out=tmp_path / "o", **flags)
    sweep = ska.read(args)
    ska.write(sweep)
    with Image.open(tmp_path / "o" / f"{ska.FIGURE}.png") as image:
        np.testing.assert_allclose(image.size, dpi * ska.draw(sweep).get_size_inches(), atol=1)
        assert image.info["dpi"] == pytest.approx((dpi, dpi), rel=1e-3)


def test_colours_are_true_to_the_share_of_the_dead_among_many_like_rollouts(tmp_path):
    rng = np.random.default_rng(1)
    kl = np.abs(1 + np.cumsum(rng.normal(0, 0.06, (500, 60)), axis=1)).round(4).tolist()
    pmass = [[0.1 if i % 25 < 7 else 1.0] for i in range(500)]  # 28 %
    write_cell(tmp_path / "r" / "a", {"1": kl}, {"1": pmass}, {"1": [60] * 500}, forks=[0], window=60)
    figure, sweep = drawn(tmp_path / "r", **NATS)
    assert sweep.panels[0].n_deaths == 140
    (ax,) = kl_axes(figure)
    for other in (*ax.lines, *ax.patches, *ax.texts):
        other.set_visible(False)
    png = io.BytesIO()
    figure.savefig(png, dpi=160)
    pixels = np.array(Image.open(png))[:, :, :3] / 255
    height, box = pixels.shape[0], ax.get_position()
    rows = slice(int(height * (1 - box.y1)) + 2, int(height * (1 - box.y0)) - 3)
    columns = slice(int(pixels.shape[1] * box.x0) + 4, int(pixels.shape[1] * box.x1) - 2)
    seen = pixels[rows, columns].reshape(-1, 3)
    ends = np.array([to_rgb(ska.ALIVE), to_rgb(ska.DEAD), (1, 1, 1)])
    shares = np.linalg.lstsq(np.vstack([ends.T, [1, 1, 1]]), np.c_[seen, np.ones(len(seen))].T, rcond=None)[0]
    alive, dead = np.clip(shares[:2], 0, 1).sum(axis=1)
    assert alive + dead > 0.05 * len(seen)
    assert 0.20 < dead / (alive + dead) < 0.36


# ---------------------------------------------------------------------------------- median and marks


def test_the_median_is_dotted_where_fewer_than_half_of_the_lines_run(tmp_path):
    kl = [[1.0] * 10, [2.0] * 10, [3.0] * 6, [4.0] * 4, [5.0] * 6]
    write_cell(tmp_path / "r" / "a", {"1": kl}, {"1": [WELL] * 5}, {"1": [10, 10, 6, 4, 6]}, window=10)
    (ax,) = kl_axes(drawn(tmp_path / "r", **NATS)[0])
    assert medians(ax) == {"-": [3] * 4 + [2.5] * 2 + [-1] * 4, ":": [-1] * 6 + [1.5] * 4}


def test_half_of_the_lines_is_not_fewer_than_half_and_rollouts_without_a_line_are_none_of_them(tmp_path):
    kl = [[1.0] * 6, [1.0] * 6, [1.0] * 3, [1.0] * 3, [0.0] * 6, [0.0] * 6, [0.0] * 6]
    write_cell(tmp_path / "r" / "a", {"1": kl}, {"1": [WELL] * 7}, {"1": [6, 6, 3, 3, 6, 6, 6]}, window=6)
    (ax,) = kl_axes(drawn(tmp_path / "r", **PLAIN)[0])
    assert medians(ax)["-"] == [1] * 6
    assert set(medians(ax).get(":", [-1])) == {-1}


@pytest.mark.parametrize(("n", "styles"), [(2, set()), (3, {"-", ":"})])
def test_fewer_than_three_lines_have_no_median(tmp_path, n, styles):
    kl = [[1.0 + i] * 4 for i in range(n)] + [[0.0] * 4] * 3
    write_cell(tmp_path / "r" / "a", {"1": kl}, {"1": [WELL] * (n + 3)})
    assert medians(kl_axes(drawn(tmp_path / "r", **PLAIN)[0])[0]).keys() == styles


@pytest.mark.parametrize("log", [False, True])
def test_marks_stand_at_their_value_or_at_the_edge_inside_of_the_axes(tmp_path, log):
    lows, highs = [-1e4, -1.0, 0.0], [1e3, 9e5]
    ends = [1.0, *lows, *highs]
    kl = [[1.0] * 39 + [end] for end in ends] + [[1.0] * 39 + [end] for end in ends] + [[1.0] * 40] * 44
    pmass = [[1.0, 0.1]] * 6 + [[1.0, 1.0]] * 49 + [[0.1, 0.1]]
    gen_len = [60] * 6 + [40] * 6 + [60] * 44
    write_cell(tmp_path / "r" / "a", {"1": kl}, {"1": pmass}, {"1": gen_len}, forks=[0, 39], window=60)
    figure, sweep = drawn(tmp_path / "r", **NATS, kl_log=log)
    (ax,) = kl_axes(figure)
    assert ax.get_ylim()[1] == pytest.approx(1.4)
    assert sweep.panels[0].n_deaths == 7
    figure.draw_without_rendering()
    for marker in "x|":
        (line,) = marks(ax, marker)
        centres = ax.transData.transform(line.get_xydata())
        room = line.get_markersize() / 2 * figure.dpi / 72
        assert (centres[:, 1] - room >= ax.bbox.y0).all() or marker == "|"
        assert (centres[:, 1] + room <= ax.bbox.y1).all() or marker == "|"
        assert (centres[:, 1] > ax.bbox.y0 + 1).all()
        assert (centres[:, 1] < ax.bbox.y1 - 1).all()
        assert (centres[:, 0] - room >= ax.bbox.x0).all()
        assert (centres[:, 0] + room <= ax.bbox.x1).all()
        held = np.array([y for x, y in points(ax, marker) if x == 39])
        assert len(held) == 6
        assert (held == 1).sum() == 1  # within the axis it stands where the line is
        assert (held < 0.1).sum() == 3
        assert (held > 1.1).sum() == 2
    assert points(ax, "x")[0] == [0, 1]


def test_marks_shrink_and_fade_together_with_the_number_of_both(tmp_path):
    sizes = {"1": (4, 6), "2": (1, 299), "3": (500, 4000), "4": (150, 150)}  # died, EOS
    kl = {alpha: [[1.0] * 9] * sum(counts) for alpha, counts in sizes.items()}
    pmass = {alpha: [[0.1]] * died + [[1.0]] * eos for alpha, (died, eos) in sizes.items()}
    gen_len = {alpha: [9] * died + [2] * eos for alpha, (died, eos) in sizes.items()}
    kl = {
        alpha: [row if g == 2 else [1.0] * 9 for row, g in zip(kl[alpha], gen_len[alpha], strict=True)] for alpha in kl
    }
    write_cell(tmp_path / "r" / "a", kl, pmass, gen_len, forks=[0], window=9)
    looks = []
    for ax, counts in zip(kl_axes(drawn(tmp_path / "r", survival=False)[0]), sizes.values(), strict=True):
        held = [marks(ax, marker)[0] for marker in "x|"]
        assert tuple(len(line.get_xdata()) for line in held) == counts
        looks.append([(line.get_markersize(), 1.0 if line.get_alpha() is None else line.get_alpha()) for line in held])
    few, many, most, both = np.array(looks)  # (mark, size and opacity)
    np.testing.assert_allclose(both, many)
    assert (few[:, 1] == 1).all()
    assert (few > many).all() and (many >= most).all() and (many[:, 1] > most[:, 1] - 1e-9).all()
    assert (most > 0.1).all()  # and are still to be seen
    np.testing.assert_allclose((many / few)[0], (many / few)[1])
    assert many[0, 0] / few[0, 0] < 0.6


# --------------------------------------------------------------------------- reference, limits, band


def test_the_dashed_line_is_one_and_says_what_one_is_worth(small):
    figure, _, cells = small
    figure.draw_without_rendering()
    for ax, alpha in zip(kl_axes(figure), ("0.0", "1.0", "2.0"), strict=True):
        raw = [r for cell in cells for r in raw_rollouts(cell, alpha)]
        scale = np.median([np.percentile(r["kl"][:10], 95) for r in raw])
        assert dashed(ax) == ([1] if scale else [])
        assert len(re.findall(r"\bnats\b", words(ax))) == bool(scale)  # none in a panel without lines
        if scale:
            (value,) = re.search(r"1 = (\S+) nats$", text_of(ax, "nats").get_text()).groups()
            assert float(value) == pytest.approx(scale, rel=0.05)
            assert len(value.replace(".", "").lstrip("0")) == 2
            above = text_of(ax, "nats").get_window_extent().y0 - ax.transData.transform((0, 1))[1]
            assert 0 < above / figure.dpi < 0.04  # it stands on the line


def test_without_normalisation_the_dashed_lines_are_the_budgets(tmp_path):
    for name, target in (("a", 1.0), ("b", 0.5)):
        random_cell(tmp_path / name, seed=ord(name), alphas=[0.0, 1.0], target_kl=target)
    control, steered = kl_axes(drawn(tmp_path, normalize_kl=False)[0])
    assert dashed(control) == []
    assert dashed(steered) == [0.5, 1]
    assert "off-scale" not in words(steered)


def test_a_budget_above_the_axis_is_written_and_not_drawn(tmp_path):
    random_cell(tmp_path / "a", alphas=[1.0], target_kl=50.0)
    (ax,) = kl_axes(drawn(tmp_path, normalize_kl=False)[0])
    assert dashed(ax) == []
    assert re.search(r"budget 50\b.*off-scale", words(ax))


def test_a_scale_above_the_axis_is_written_and_not_drawn(tmp_path):
    kl = [[3.0] * 4 + [0.01] * 996] * 5
    write_cell(tmp_path / "a", {"1": kl}, {"1": [WELL] * 5}, window=1000)
    (ax,) = kl_axes(drawn(tmp_path, **PLAIN)[0])
    assert dashed(ax) == []
    assert re.search(r"1 = 3 nats.*off-scale", words(ax))


def test_the_kl_axis_ends_above_the_99th_percentile_of_the_steered_values_in_all_panels(tmp_path):
    rng = np.random.default_rng(5)
    kl = {alpha: rng.gamma(1, level, (6, 40)) for alpha, level in (("0", 50.0), ("1", 1.0), ("2", 2.0))}
    kl["1"][0, :8] = -3.0
    kl["2"][1, 3] = np.nan
    listed = {alpha: rows.tolist() for alpha, rows in kl.items()}
    write_cell(tmp_path / "r" / "a", listed, {alpha: [WELL] * 6 for alpha in kl})
    steered = np.concatenate([kl["1"].ravel(), kl["2"].ravel()])
    limits = {ax.get_ylim() for ax in kl_axes(drawn(tmp_path / "r", **NATS)[0])}
    assert len(limits) == 1
    bottom, top = limits.pop()
    assert top == pytest.approx(1.4 * np.percentile(steered[steered >= 0], 99), rel=1e-5)
    assert -0.1 * top < bottom < 0
    (alone,) = kl_axes(drawn(tmp_path / "r", **NATS, alphas=(0,))[0])
    assert alone.get_ylim()[1] == pytest.approx(1.4 * np.percentile(kl["0"], 99), rel=1e-5)


@pytest.mark.parametrize(("kl", "flags", "top"), [(1e-5, NATS, 1e-3), (0.0, PLAIN, 1.1), (-1.0, NATS, 1.1)])
def test_the_kl_axis_has_a_least_height_and_one_for_no_lines(tmp_path, kl, flags, top):
    write_cell(tmp_path / "a", {"1": [[kl] * 9]}, {"1": [WELL]})
    (ax,) = kl_axes(drawn(tmp_path, **flags)[0])
    assert ax.get_ylim()[1] == pytest.approx(top)


def test_the_log_axis_is_linear_below_a_tenth(small, tmp_path):
    root = small[1].args.runs_root
    figure, _ = drawn(root, kl_log=True, survival=False)
    assert {ax.get_yscale() for ax in kl_axes(figure)} == {"symlog"}
    assert kl_axes(figure)[0].yaxis.get_transform().linthresh == 0.1
    assert {ax.get_yscale() for ax in kl_axes(small[0])} == {"linear"}


@pytest.mark.parametrize(("lengths", "longest"), [((5, 3), 20), ((100, 7), 100), ((400, 300), 200)])
def test_the_token_axis_runs_to_the_longest_rollout_with_room_at_both_ends(tmp_path, lengths, longest):
    kl = {str(alpha): [[1.0] * length] for alpha, length in enumerate(lengths)}
    write_cell(tmp_path / "a", kl, {alpha: [WELL] for alpha in kl}, {"0": [lengths[0]], "1": [lengths[1]]}, window=200)
    figure, _ = drawn(tmp_path)
    assert len(figure.axes) == 4
    for ax in figure.axes:
        assert ax.get_xlim() == pytest.approx((-0.025 * longest, 1.025 * longest))


def test_a_pale_band_marks_where_padding_made_the_line(tmp_path):
    kl = {"0": [[0.0] * 100], "1": [[1.0] * 100, [1.0] * 30], "2": [[1.0] * 9], "3": [[1.0] * 64], "4": [[1.0] * 200]}
    gen_len = {alpha: [len(row) for row in rows] for alpha, rows in kl.items()}
    write_cell(tmp_path / "a", kl, {a: [WELL] * len(rows) for a, rows in kl.items()}, gen_len, window=100)
    figure, _ = drawn(tmp_path, roll=21)
    # no line; the longest rollout's ends; shorter than the mean; a longest of its own; its end lies beyond the window
    assert [bands(ax) for ax in kl_axes(figure)] == [[], [(0, 10), (90, 100)], [], [(0, 10), (54, 64)], [(0, 10)]]
    assert sum("padded" in name for name in legend(figure)) == 1
    for flags in ({"roll": 21, "edges": "shrink"}, {"roll": 1}, {"roll": 201}):
        figure, _ = drawn(tmp_path, **flags, survival=False, alphas=(1, 4))
        assert [bands(ax) for ax in kl_axes(figure)] == [[], []]
        assert not any("padded" in name for name in legend(figure))


# ------------------------------------------------------------------------------------------- words


@pytest.fixture(scope="module")
def fates(tmp_path_factory):
    """A control, deaths within the budget, a budget exceeded, and deaths that recovered."""
    ends = [  # pmass at the forks, tokens recorded, tokens generated
        ([0.5, 0.5, 0.5], 5, 5),
        ([0.9, 0.5, 0.5], 5, 5),
        ([0.9, 0.5, 0.5], 5, 5),
        ([0.9, 0.9, 0.5], 5, 5),
        ([0.9, 0.9, 0.5], 5, 5),
        ([0.9, 0.9, 0.9], 4, 4),
        ([0.9, 0.9, 0.9], 3, 5),
        ([0.9, 0.9, 0.9], 5, 5),
    ]
    kl = {
        "0": [[0.0] * 5],
        "1": [[0.5] * length for _, length, _ in ends],
        "2": [[5.0] * 5] * 2,
        "3": [[1.0] * 5, [1.0] * 5, [0.0] * 5],
    }
    pmass = {"0": [WELL], "1": [masses for masses, _, _ in ends], "2": [WELL] * 2, "3": [[1, 0.5, 1]] * 2 + [WELL]}
    gen_len = {alpha: [5] * len(rows) for alpha, rows in kl.items()} | {"1": [g for *_, g in ends]}
    root = tmp_path_factory.mktemp("fates")
    write_cell(root / "a", kl, pmass, gen_len, forks=[0, 2, 5], window=5)
    return drawn(root, **PLAIN)


def test_titles_say_what_became_of_the_rollouts(fates):
    titles = [" ".join(text.get_text() for text in shown(ax)) for ax in kl_axes(fates[0])]
    expected = [
        "α = 0 n = 1 0 died unsteered control",
        "α = 1 n = 8 3 + 2 died 1 EOS, 1 cut KL 0.5 ≤ 1",
        "α = 2 n = 2 0 died KL 5 > 4",
        "α = 3 n = 3 2 died, 2 back KL 1 ≤ 9 1 no line",
    ]
    for title, wanted in zip(titles, expected, strict=True):
        assert title.startswith(wanted)
        assert not re.search("EOS|cut|back|no line", title.removeprefix(wanted).removeprefix(" KL ≤ 1e-8: no line"))


def test_badges_show_deaths_that_stayed_deaths_that_came_back_and_a_budget_exceeded(fates):
    control, within, over, back = kl_axes(fates[0])
    assert badge(text_of(within, "died")) == (DEAD, DEAD, to_hex(ska.INK))
    assert badge(text_of(back, "died")) == ("#ffffff", DEAD, to_hex(ska.INK))
    assert badge(text_of(over, "^KL ")) == (to_hex(ska.INK), to_hex(ska.INK), "#ffffff")
    for ax, plain in ((control, "died"), (over, "died"), (control, "control"), (within, "^KL "), (back, "^KL ")):
        assert badge(text_of(ax, plain)) is None
    assert text_of(over, "^KL ").get_bbox_patch().get_linewidth() == pytest.approx(0.8, abs=0.2)
    for text, weight in (("^α", "bold"), ("^n =", "normal"), ("died", "bold"), ("^KL ", "normal")):
        assert text_of(within, text).get_weight() == weight


def test_the_badge_is_one_of_recovery_only_where_more_than_half_of_the_dead_came_back(tmp_path):
    pmass = {"1": [[1, 0.5, 1], [1, 0.5, 0.5]], "2": [[1, 0.5, 1], [1, 0.5, 1], [1, 0.5, 0.5]]}
    write_cell(tmp_path / "a", {a: [[1.0] * 40] * len(rows) for a, rows in pmass.items()}, pmass)
    half, most = (text_of(ax, "died") for ax in kl_axes(drawn(tmp_path)[0]))
    assert (half.get_text(), badge(half)[0]) == ("2 died, 1 back", DEAD)
    assert (most.get_text(), badge(most)[0]) == ("3 died, 2 back", "#ffffff")


def test_where_pooled_budgets_differ_the_panel_says_the_share_above_them(tmp_path):
    for name, target, level in (("a", 1.0, 0.9), ("b", 0.5, 0.8)):
        kl = [[level] * 40, [2.0] * 2 + [0.1 * level] * 38]
        write_cell(tmp_path / name, {"1": kl}, {"1": [WELL] * 2}, target_kl=target)
    (ax,) = kl_axes(drawn(tmp_path)[0])
    text = text_of(ax, "over")
    assert text.get_text() == "27.5% over 0.5, 1"  # 2 of 80 tokens and 42 of 80
    assert badge(text)[0] == to_hex(ska.INK)


@pytest.mark.parametrize(
    ("pmass", "kl", "present"),
    [
        ([0.9, 0.9, 0.9], [0.5] * 40, set()),
        ([0.9, 0.9, 0.5], [0.5] * 20, {"a + b died", "cut:"}),
        ([0.9, 0.5, 0.9], [0.5] * 40, {"back:"}),
    ],
)
def test_the_header_explains_the_words_that_occur(tmp_path, pmass, kl, present):
    rows = [[0.5] * 40, kl] if len(kl) == 40 else [[0.5] * 20, kl]
    masses = [pmass, [1.0, 1.0, 1.0]]
    write_cell(tmp_path / "a", {"1": rows}, {"1": masses}, {"1": [40, 40]})
    text = header(drawn(tmp_path)[0])
    assert {what for what in ("a + b died", "back:", "cut:", "% over b") if what in text} == present
    assert re.search(r"KL a ≤ b or a > b: 95th percentile .* budget α² · target KL, in nats", text)


def test_the_header_names_model_methods_window_and_smoothing(tmp_path):
    random_cell(tmp_path / "one" / "a", alphas=[1.0])
    plain = header(drawn(tmp_path / "one", roll=5)[0])
    for part in ("org/m", "mean_diff", "window 40 tokens", "mean of 5 tokens, ends padded"):
        assert part in plain
    assert "pooled" not in plain and "not smoothed" not in plain
    assert "mean of 5 tokens, fewer at the ends" in header(drawn(tmp_path / "one", roll=5, edges="shrink")[0])
    assert "window 30 tokens" in header(drawn(tmp_path / "one", window=30)[0])
    random_cell(tmp_path / "one" / "b", seed=3, alphas=[1.0], method="pca", model="org/other")
    pooled = header(drawn(tmp_path / "one")[0])
    assert "models pooled: org/m, org/other" in pooled and "methods pooled: mean_diff, pca" in pooled
    by_method = header(drawn(tmp_path / "one", rows="method", survival=False)[0])
    assert "mean_diff" not in by_method and "models pooled: org/m, org/other" in by_method


@pytest.mark.parametrize("flags", [{"roll": 1}, {"roll": 1, "edges": "shrink"}, {"roll": 41}])
def test_the_header_says_where_nothing_is_smoothed(tmp_path, flags):
    random_cell(tmp_path / "a", alphas=[1.0])
    text = header(drawn(tmp_path, survival=False, **flags)[0])
    assert "not smoothed" in text and "mean of" not in text


def test_a_panel_without_a_line_says_why(tmp_path):
    kl = {
        "0": [[0.0] * 40],
        "1": [[]],
        "2": [[float("nan")] * 9],
        "3": [[1e-9] * 9],
        "4": [[0.0] * 30 + [5.0]],
        "5": [[1.0]],
        "6": [[1.0] * 40],
    }
    write_cell(tmp_path / "a", kl, {alpha: [WELL] for alpha in kl})
    figure, _ = drawn(tmp_path, roll=1, alphas=(*map(float, kl), 7))
    expected = {
        "0": "KL ≤ 1e-8: no line",
        "1": "no finite KL",
        "2": "no finite KL",
        "3": "KL ≤ 1e-8: no line",
        "4": "no KL in the first\n20 tokens: no scale",
        "5": "rollouts of 1 token",
        "6": "",
        "7": "no rollouts at α = 7",
    }
    reasons = [why for why in expected.values() if why]
    for ax, (alpha, reason) in zip(kl_axes(figure), expected.items(), strict=True):
        said = [text.get_text() for text in shown(ax) if text.get_text() in reasons]
        assert said == ([reason] if reason else []), alpha
        if alpha not in "56":
            assert [dashed(ax), marks(ax, "x"), marks(ax, "|"), medians(ax)] == [[], [], [], {}]


def test_lines_that_the_axis_does_not_show_are_said_to_be_above_or_below_it(tmp_path):
    kl = {"0": [[0.0] * 9], "1": [[1.0] * 40] * 50, "2": [[900.0] * 9], "3": [[-1.0] * 9], "4": [[900.0] * 9 + [1.0]]}
    write_cell(tmp_path / "a", kl, {alpha: [WELL] * len(rows) for alpha, rows in kl.items()})
    figure, _ = drawn(tmp_path, **NATS, survival=False)
    reasons = [text_of(ax, "all ").get_text() if "all " in words(ax) else "" for ax in kl_axes(figure)]
    assert reasons == ["", "", "all lines above the axis", "all KL below 0", ""]
    assert "no line" not in words(kl_axes(figure)[0])  # in nats a KL of 0 is a line


def test_an_alpha_found_nowhere_gets_a_panel_and_two_that_print_alike_enough_digits(tmp_path):
    random_cell(tmp_path / "a", alphas=[0.25, 1.0, 1.0000001])
    figure, _ = drawn(tmp_path, alphas=(1, 0.25, 3, 1.0000001))
    labels = [text_of(ax, "^α = ").get_text() for ax in kl_axes(figure)]
    assert labels == ["α = 0.25", "α = 1", "α = 1.0000001", "α = 3"]
    assert "no rollouts at α = 3" in words(kl_axes(figure)[3])
    assert "n = 0" in words(kl_axes(figure)[3]) and "died" not in words(kl_axes(figure)[3])


# ------------------------------------------------------------------------------------------- strip


@pytest.fixture(scope="module")
def survival(tmp_path_factory):
    """Two cells pooled, of the same prompts, with a first fork after the first token; a third alpha not measured."""
    root = tmp_path_factory.mktemp("survival")
    rng = np.random.default_rng(8)
    cells = []
    for name in "ab":
        gen_len = {"1": rng.choice([40, 40, 25, 9, 2], 14).tolist(), "2": [40] * 14, "3": [40] * 14}
        kl = {alpha: [rng.gamma(2, 0.5, g).tolist() for g in lengths] for alpha, lengths in gen_len.items()}
        pmass = {
            "1": (1 - 0.25 * rng.random((14, 4))).tolist(),
            "2": [[1.0] * 4] * 14,
            "3": [[float("nan")] * 4] * 14,
        }
        cells.append(write_cell(root / name, kl, pmass, gen_len, forks=[3, 8, 20, 31]))
    return *drawn(root), cells


@pytest.mark.parametrize("k", [0, 1])
def test_the_strip_holds_the_share_alive_and_its_interval_between_the_forks(survival, k):
    figure, _, cells = survival
    raw = [r for cell in cells for r in raw_rollouts(cell, str(k + 1))]
    seen = [r for r in raw if r["followed"] is not None]
    assert len(seen) == (len(raw) if k else 28 - sum(r["length"] < 3 for r in raw)) and len(seen) > 20
    lives = [(r["followed"], r["death"] is not None) for r in seen]
    forks = [3, 8, 20, 31]
    shares = [1.0, *lifelines_survival(lives, forks)]
    limits = [beta_product(lives, forks[: i + 1], weight=14 / 28) for i in range(4)]
    assert (0 < shares[-1] < 0.7) if k == 0 else shares[-1] == 1
    strip = strips(figure)[k]
    areas = [area for area in strip.collections if isinstance(area, PolyCollection)]
    alive, dead, band = sorted(areas, key=lambda area: area.get_zorder())
    colours = [area.get_facecolor()[0] for area in (alive, dead)]
    for colour, full in zip(colours, (ska.ALIVE, ska.DEAD), strict=True):
        tint = colour[3] * (1 - colour[:3]) / (1 - np.array(to_rgb(full)))  # a light shade of the line's colour
        assert tint.min() > 0.1 and tint.max() < 0.6 and np.ptp(tint) < 1e-6
    assert np.ptp(band.get_facecolor()[0][:3]) < 0.1 and band.get_facecolor()[0][3] < 1  # grey, on both
    upper = [1.0, *(high for _, high in limits)]
    for i, (start, stop) in enumerate(pairwise([0, *forks])):
        for x in (start + 0.2, stop - 0.2):
            assert span_at(alive, x) == pytest.approx((0, shares[i]), abs=1e-9)
            assert span_at(dead, x) == pytest.approx((shares[i], 1), abs=1e-9)
            assert span_at(band, x) == pytest.approx((limits[i][0], upper[i]), abs=2e-4)
    for area in (alive, dead, band):
        assert {area.get_paths()[0].vertices[:, 0].min(), area.get_paths()[0].vertices[:, 0].max()} == {0, 31}
    assert band.get_paths()[0].vertices[:, 1].min() == pytest.approx(min(low for low, _ in limits), abs=2e-4)


def test_the_curve_steps_at_the_forks_and_has_a_dot_at_each(survival):
    figure, _, cells = survival
    for k, strip in enumerate(strips(figure)[:2]):
        raw = [r for cell in cells for r in raw_rollouts(cell, str(k + 1)) if r["followed"] is not None]
        shares = lifelines_survival([(r["followed"], r["death"] is not None) for r in raw], [3, 8, 20, 31])
        (curve,) = strip.lines
        x, y = curve.get_data()
        assert (x[0], y[0], x[-1]) == (0, 1, 31)
        assert curve.get_drawstyle() == "steps-post"
        for t, share in zip((0.5, 2.5, 3.5, 7.5, 8.5, 19.5, 20.5, 30.5), np.repeat([1, *shares[:3]], 2), strict=True):
            assert y[np.searchsorted(x, t) - 1] == pytest.approx(share)
        every = curve.get_markevery()
        dots = curve.get_xydata()[every] if every is not None else curve.get_xydata()
        assert curve.get_marker() == "o"
        np.testing.assert_allclose(dots, [*zip((3, 8, 20, 31), shares, strict=True)])


def test_numbers_at_risk_stand_under_round_tokens_up_to_the_last_fork(survival):
    figure, _, cells = survival
    for k, strip in enumerate(strips(figure)):
        raw = [r for cell in cells for r in raw_rollouts(cell, str(k + 1))]
        labels = [label.get_text().split("\n") for label in strip.get_xticklabels()]
        assert [int(token) for token, _ in labels] == strip.get_xticks().tolist()
        assert 3 <= len(labels) <= 6 and labels[0][0] == "0"
        for token, number in labels:
            at_risk = sum(r["followed"] is not None and r["followed"] >= int(token) for r in raw)
            assert number == (str(at_risk) if int(token) <= 31 and k < 2 else "–"), (k, token)
    assert any(int(label.get_text().split("\n")[0]) > 31 for label in strips(figure)[0].get_xticklabels())
    assert not strips(figure)[2].lines and not strips(figure)[2].collections  # nobody was measured


def test_without_survival_there_is_no_strip_and_the_tokens_stand_under_the_panels(small):
    figure, _ = drawn(small[1].args.runs_root, survival=False)
    assert len(figure.axes) == 3 and not strips(figure)
    for ax in figure.axes:
        labels = [label.get_text() for label in ax.get_xticklabels()]
        assert 3 <= len(labels) <= 6 and all(re.fullmatch(r"\d+", label) for label in labels)
    assert not any("95 %" in name or "share" in name for name in legend(figure))
    assert any("95 %" in name for name in legend(small[0]))
    assert any("share alive" in name for name in legend(small[0]))
    widths = {handle.get_linewidth() for name, handle in legend(figure).items() if name[:5] in ("alive", "dead")}
    assert len(widths) == 1


# ------------------------------------------------------------------------------- layout and colours


@pytest.mark.parametrize(
    ("n", "rows"),
    [
        (1, [1]),
        (6, [6]),
        (7, [4, 3]),
        (8, [4, 4]),
        (9, [3, 3, 3]),
        (10, [5, 5]),
        (11, [6, 5]),
        (12, [6, 6]),
        (13, [5, 5, 3]),
    ],
)
def test_panels_wrap_in_balanced_rows_in_the_order_of_their_alphas(tmp_path, n, rows):
    alphas = [float(k) for k in range(-2, n - 2)]
    write_cell(tmp_path / "a", {str(a): [[1.0] * 9] for a in alphas}, {str(a): [WELL] for a in alphas})
    figure, _ = drawn(tmp_path, survival=False)
    grid = grid_of(kl_axes(figure))
    assert [len(row) for row in grid] == rows
    assert [text_of(ax, "^α").get_text() for row in grid for ax in row] == [f"α = {a:g}" for a in alphas]


@pytest.mark.parametrize(("ncols", "rows"), [(1, [1] * 5), (2, [2, 2, 1]), (9, [5])])
def test_ncols_sets_the_panels_side_by_side(tmp_path, ncols, rows):
    write_cell(tmp_path / "a", {str(a): [[1.0] * 9] for a in range(5)}, {str(a): [WELL] for a in range(5)})
    figure, _ = drawn(tmp_path, ncols=ncols)
    assert [len(row) for row in grid_of(kl_axes(figure))] == rows
    assert [len(row) for row in grid_of(strips(figure))] == rows


@pytest.mark.parametrize(
    ("by", "names"),
    [
        ("method", ["mean_diff", "pca|x$y$"]),
        ("model", ["org/l", "org/m"]),
        ("seed", ["2", "10"]),
        ("cell", ["a", "b", "c"]),
    ],
)
def test_rows_give_each_value_its_own_panels_and_every_alpha_a_column(tmp_path, by, names):
    random_cell(tmp_path / "a", seed=0, alphas=[0.0, 2.0])
    random_cell(tmp_path / "b", seed=0, alphas=[0.0, 1.0])
    random_cell(tmp_path / "c", seed=2, alphas=[0.0, 1.0])
    about = {"a": ("mean_diff", "org/l", 2), "b": ("pca|x$y$", "org/m", 10), "c": ("mean_diff", "org/m", 10)}
    for name, (method, model, seed) in about.items():
        path = tmp_path / name / "calib.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"method": method, "model": model, "seed": seed}))
    figure, sweep = drawn(tmp_path, rows=by)
    grid = grid_of(kl_axes(figure))
    assert [len(row) for row in grid] == [3] * len(names)
    for row, name in zip(grid, names, strict=True):
        assert [text_of(ax, "^α").get_text() for ax in row] == ["α = 0", "α = 1", "α = 2"]
        assert text_of(row[0], f"^{by}: ").get_text() == f"{by}: {name}"
        assert not any(f"{by}: " in words(ax) for ax in row[1:])
        index = {"method": 0, "model": 1, "seed": 2}
        held = [cell for cell, values in about.items() if name == (cell if by == "cell" else str(values[index[by]]))]
        for ax, panel in zip(row, [p for p in sweep.panels if p.row == name], strict=True):
            assert text_of(ax, "^n = ").get_text() == f"n = {panel.n}"
            assert {r.cell.name for r in panel.rollouts} <= {*held}
        assert text_of(row[0], "^n = ").get_text() == f"n = {6 * len(held)}"  # every row has its own control
    assert len({ax.get_ylim() for row in grid for ax in row}) == 1


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_how_far_the_drawing_is_is_said_panel_by_panel(tmp_path):
    for name in "ab":
        write_cell(tmp_path / name, {a: [[1.0] * 9] for a in "12"}, {a: [WELL] for a in "12"}, method=name)
    said: list[str] = []
    ska.draw(ska.read(ska.Args(tmp_path, rows="method")), said.append)
    assert said == [f"drawing panel {k} of 4" for k in (1, 2, 3, 4)]


def test_crosses_are_darker_than_the_lines_of_the_dead(fates):
    crosses = {to_hex(line.get_color()) for ax in kl_axes(fates[0]) for line in marks(ax, "x")}
    assert crosses == {to_hex(legend(fates[0])["death"].get_color())}
    assert max(map(luminance, crosses)) < 0.5 * luminance(DEAD)


SEABORN = ["deep", "muted", "pastel", "bright", "dark", "colorblind", "husl", "hls", "rocket"]
OTHERS = ["Set1", "Set2", "Dark2", "viridis", "Greys"]


@pytest.mark.parametrize("palette", SEABORN + OTHERS)
def test_a_palette_colours_lines_and_badges_and_leaves_their_text_legible(fates, palette):
    import seaborn

    alive, dead = (to_hex(colour) for colour in seaborn.color_palette(palette, 2))
    figure, _ = drawn(fates[1].args.runs_root, **PLAIN, palette=palette, alphas=(1, 2), survival=False)
    within, over = kl_axes(figure)
    assert {shade for shade, _ in polylines(within)} == {alive, dead}
    for text in (text_of(within, "died"), text_of(over, "^KL ")):
        face, _, ink = badge(text)
        assert face == (dead if "died" in text.get_text() else to_hex(ska.INK))
        light, dark = sorted((luminance(face), luminance(ink)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3
    for name, handle in legend(figure).items():
        if name.startswith("alive") or name == "dead":
            assert to_hex(handle.get_color()) == (dead if name == "dead" else alive)


@pytest.mark.parametrize("palette", ["no such palette", "", "ch:nonsense"])
def test_a_palette_that_nobody_knows_is_refused_before_anything_is_read(tmp_path, palette):
    with pytest.raises(ska.UsageError, match="--palette"):
        ska.read(ska.Args(runs_root=tmp_path / "nowhere", palette=palette))


FACES = [
    ([1.0], 8, 100, {}),
    ([-2.0, -1.0, 0.0], 24, 999, {"normalize_kl": False, "kl_log": True}),
    ([-1.0, -0.5, 0.0, 0.5, 1.0], 2000, 4096, {"survival": False}),
    ([float(k) for k in range(8)], 240, 10240, {"ncols": 2}),
    ([0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 8.0], 24, 10240, {"rows": "method"}),
    ([k / 4 for k in range(13)], 1, 256, {"normalize_kl": False}),
]


@pytest.mark.parametrize(("alphas", "n", "window", "flags"), FACES)
def test_no_text_touches_another_or_leaves_the_page(alphas, n, window, flags):
    assert faults(alphas, n, window, **flags) == []


def ink(figure: Figure, dpi: int = 100) -> np.ndarray:
    """Which pixels of the page are not white."""
    png = io.BytesIO()
    figure.savefig(png, dpi=dpi)
    return (np.array(Image.open(png))[:, :, :3] < 250).any(axis=2)


@pytest.mark.parametrize("flags", [{}, {"rows": "method"}, {"survival": False}, {"rows": "method", "survival": False}])
def test_no_room_is_wasted(small, flags):
    """In inches: the page's edges and the stripes between header, legend, titles and panels."""
    figure, _ = drawn(small[1].args.runs_root, **flags)
    marked = np.flatnonzero(ink(figure).any(axis=1)) / 100
    left, right = np.flatnonzero(ink(figure).any(axis=0))[[0, -1]] / 100
    width, height = figure.get_size_inches()
    assert 0.02 < left < 0.12 and 0.02 < width - right < 0.12
    assert 0.02 < marked[0] < 0.12 and 0.02 < height - marked[-1] < 0.16
    assert np.diff(marked).max() < 0.22
    legend_box, title = (what.get_window_extent() for what in (figure.legends[0], text_of(kl_axes(figure)[0], "^α")))
    assert 0.1 < (legend_box.y0 - title.y1) / figure.dpi - 0.22 * ("rows" in flags) < 0.22
    lines = [text.get_window_extent() for text in figure.texts]
    assert 0 <= (lines[-1].y0 - legend_box.y1) / figure.dpi < 0.07
    assert all(0 <= (above.y0 - below.y1) / figure.dpi < 0.06 for above, below in pairwise(lines))
    assert lines[-1].x0 == pytest.approx(legend_box.x0, abs=0.02 * figure.dpi)
    assert legend_box.x1 / figure.dpi > 0.6 * width


@pytest.mark.parametrize(("n", "width"), [(1, 3.3), (2, 3.3), (3, 5.23), (4, 6.8), (5, 6.8)])
def test_a_page_is_as_wide_as_a_papers_column_or_its_text(tmp_path, n, width):
    """Where the words are short; three panels stand as wide as four do."""
    alphas = [str(k) for k in range(1, n + 1)]
    write_cell(tmp_path / "a", {a: [[1.0] * 9] for a in alphas}, {a: [WELL] for a in alphas}, {a: [40] for a in alphas})
    assert drawn(tmp_path)[0].get_size_inches()[0] == pytest.approx(width, abs=0.02)


@pytest.mark.parametrize("longest", [20, 100, 999, 4096, 10240])
@pytest.mark.parametrize("axis", [0.5, 1.0, 1.5, 3.0])
@pytest.mark.parametrize("widest", [0.0, 0.3])
def test_ticks_are_3_to_6_round_tokens_whose_labels_have_room(longest, axis, widest):
    """Labels of 6.5 points, of which the outermost lean inwards, at least a little apart and no more than it takes."""
    ticks, need = ska.token_ticks(longest, axis, widest)
    step = ticks[1]
    assert ticks == list(range(0, longest + 1, step)) and 3 <= len(ticks) <= 6
    assert re.fullmatch("(1|2|25|5)0*", str(step))
    page = Figure(dpi=72)
    labels = [page.text(0, 0, str(t), size=6.5).get_window_extent().width / 72 for t in ticks]
    half = [max(width, widest) / 2 for width in labels]
    half[0], half[-1] = 2 * half[0], 2 * half[-1]
    apart = need / 1.05 * step / longest - max(a + b for a, b in pairwise(half))
    assert 0.04 < apart < 0.09
    assert need <= axis or len(ticks) <= 4  # too narrow an axis gets the fewest


@pytest.mark.parametrize("window", [100, 230, 1000])
def test_the_outermost_token_labels_lean_inwards(tmp_path, window):
    write_cell(tmp_path / "a", {"1": [[1.0] * window]}, {"1": [WELL]}, window=window)
    figure, _ = drawn(tmp_path)
    figure.draw_without_rendering()
    (strip,) = strips(figure)
    ticks = strip.transData.transform([(t, 0) for t in strip.get_xticks()])[:, 0]
    boxes = [label.get_window_extent() for label in strip.get_xticklabels()]
    assert boxes[0].x0 == pytest.approx(ticks[0], abs=2)
    for tick, box in zip(ticks[1:-1], boxes[1:-1], strict=True):
        assert (box.x0 + box.x1) / 2 == pytest.approx(tick, abs=1)
    assert boxes[-1].x1 < strip.bbox.x1
    if window in (100, 1000):  # the last label stands at the very end
        assert boxes[-1].x1 == pytest.approx(ticks[-1], abs=2)
    else:
        assert (boxes[-1].x0 + boxes[-1].x1) / 2 == pytest.approx(ticks[-1], abs=1)


def test_axis_labels_stand_in_the_middle_of_their_axes_in_one_column(small):
    figure, _ = drawn(small[1].args.runs_root)
    figure.draw_without_rendering()
    labelled = [ax for ax in figure.axes if ax.get_ylabel()]
    boxes = [ax.yaxis.label.get_window_extent() for ax in labelled]
    for ax, box in zip(labelled, boxes, strict=True):
        assert (box.y0 + box.y1) / 2 == pytest.approx((ax.bbox.y0 + ax.bbox.y1) / 2, abs=1)
    assert len(boxes) == 2 and boxes[0].x1 == pytest.approx(boxes[1].x1, abs=1)
    assert 0.03 < boxes[0].x0 / figure.dpi < 0.1


# ------------------------------------------------------------------------------------ global state

STATE = """
import json, logging, os, random, signal, sys, warnings
from pathlib import Path
import matplotlib, numpy
from loguru import logger

def state():
    return {
        "rcParams": {key: repr(dict.__getitem__(matplotlib.rcParams, key)) for key in matplotlib.rcParams},
        "defaults": {key: repr(value) for key, value in dict.items(matplotlib.rcParamsDefault)},
        "environment": dict(os.environ),
        "loguru": {key: repr(value) for key, value in logger._core.handlers.items()},
        "logging": [logging.root.level, repr(logging.root.handlers), logging.root.manager.disable]
            + [logging.getLogger(name).level for name in ("matplotlib", "matplotlib.font_manager", "PIL", "seaborn")],
        "warnings": [repr(rule) for rule in warnings.filters] + [repr(warnings.showwarning)],
        "signals": [repr(signal.getsignal(s)) for s in signal.valid_signals()],
        "folder": [os.getcwd(), os.umask(os.umask(0o022))],
        "streams": [repr(sys.stdout), repr(sys.stderr), repr(sys.excepthook)],
        "numpy": [repr(numpy.geterr()), repr(numpy.get_printoptions()), repr(numpy.random.get_state()[1].tolist())],
        "random": hash(random.getstate()),
        "threads": __import__("threading").active_count(),
    }

before = state()
import spaghetti_kl_alive as ska
stages = {"import": state()}
args = ska.Args(runs_root=sys.argv[1], out=sys.argv[2], alphas=(1,), formats=("png", "pdf", "svg"), palette="deep")
sweep = ska.read(args)
stages["read"] = state()
figure = ska.draw(sweep)
stages["draw"] = state()
ska.write(sweep)
stages["write"] = state()
changed = [f"{stage}: {key}" for stage, now in stages.items() for key in before if now[key] != before[key]]
print(json.dumps(changed))
"""


def test_import_read_draw_and_write_leave_the_state_of_the_process_as_it_was(small, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"}
    environment["PYTHONPATH"] = str(Path(ska.__file__).parent)
    argv = [sys.executable, "-c", STATE, small[1].args.runs_root, tmp_path / "o"]
    ended = subprocess.run(argv, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == []
    assert {path.name for path in tmp_path.iterdir()} == {"o"}


HOSTILE = {
    "font.size": 30,
    "font.family": "serif",
    "font.style": "italic",
    "font.weight": "bold",
    "font.stretch": "condensed",
    "font.variant": "small-caps",
    "text.color": "red",
    "text.hinting": "none",
    "axes.grid": True,
    "axes.titlesize": 40,
    "axes.facecolor": "#ffddaa",
    "axes.xmargin": 0.3,
    "axes.unicode_minus": False,
    "axes.spines.left": False,
    "axes.formatter.limits": (0, 0),
    "savefig.dpi": 40,
    "savefig.bbox": "tight",
    "savefig.transparent": True,
    "savefig.facecolor": "black",
    "figure.dpi": 33,
    "figure.facecolor": "yellow",
    "figure.constrained_layout.use": True,
    "lines.linewidth": 9,
    "lines.marker": "D",
    "lines.markersize": 20,
    "legend.fontsize": 22,
    "legend.loc": "center",
    "path.simplify": False,
    "path.sketch": (3, 100, 2),
    "patch.force_edgecolor": True,
    "xtick.direction": "in",
    "xtick.labelsize": 20,
    "xtick.minor.visible": True,
    "ytick.right": True,
    "svg.hashsalt": "another",
    "svg.fonttype": "none",
    "pdf.fonttype": 3,
    "pdf.compression": 1,
}


def written(root: Path, out: Path, **flags: object) -> dict[str, bytes]:
    """What a sweep's files hold."""
    return {path.name: path.read_bytes() for path in ska.write(ska.read(ska.Args(runs_root=root, out=out, **flags)))}


def test_a_users_matplotlibrc_changes_no_byte_and_is_left_as_it_was(tmp_path):
    random_cell(tmp_path / "r" / "a", alphas=[1.0, 1.00000000001])  # titles so wide that they set the page's width
    flags = {"formats": ("png", "pdf", "svg"), "roll": 5}
    plain = written(tmp_path / "r", tmp_path / "plain", **flags)
    with matplotlib.rc_context(HOSTILE):
        before = {key: dict.__getitem__(matplotlib.rcParams, key) for key in matplotlib.rcParams}
        hostile = written(tmp_path / "r", tmp_path / "hostile", **flags)
        assert {key: dict.__getitem__(matplotlib.rcParams, key) for key in matplotlib.rcParams} == before
    assert plain.keys() == hostile.keys() and len(plain) == 5
    assert [name for name in plain if plain[name] != hostile[name]] == []


def test_a_figure_that_cannot_be_drawn_leaves_matplotlib_as_it_was(small):
    def fail(how_far: str) -> None:
        raise RuntimeError(how_far)

    with matplotlib.rc_context({"font.size": 31}):
        with pytest.raises(RuntimeError, match="panel"):
            ska.draw(small[1], fail)
        assert matplotlib.rcParams["font.size"] == 31


def test_two_threads_write_the_bytes_that_each_alone_writes(small, tmp_path):
    random_cell(tmp_path / "other", seed=9, alphas=[1.0, 2.0], model="org/other")
    roots = {"one": small[1].args.runs_root, "two": tmp_path / "other"}
    sweeps = {
        name: ska.read(ska.Args(runs_root=root, out=tmp_path / f"{name}_both", alphas=(1, 2), roll=len(name)))
        for name, root in roots.items()
    }
    alone = {}
    for name, sweep in sweeps.items():
        alone[name] = {path.name: path.read_bytes() for path in ska.write(sweep)}
    started, second_draws, first_done = threading.Event(), threading.Event(), threading.Event()
    errors = []

    def one(how_far: str) -> None:  # hold on in the middle of the drawing, for the other thread to step in
        started.set()
        second_draws.wait(0.4)

    def two(how_far: str) -> None:
        second_draws.set()
        first_done.wait(5)

    def work(name: str) -> None:
        try:
            if name == "two":
                started.wait(5)
            ska.write(sweeps[name], one if name == "one" else two)
        except Exception as error:
            errors.append(error)
        if name == "one":
            first_done.set()

    with matplotlib.rc_context({"font.size": 15, "axes.grid": True, "lines.linewidth": 4}):
        threads = [threading.Thread(target=work, args=(name,)) for name in roots]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert errors == []
        assert matplotlib.rcParams["font.size"] == 15
    for name in roots:
        now = {path.name: path.read_bytes() for path in (tmp_path / f"{name}_both").iterdir()}
        assert [file for file in alone[name] if now[file] != alone[name][file]] == []
