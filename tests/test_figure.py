"""What is drawn, read as data from the figures: lines, marks, words, limits, strips, layout, the overview."""

from __future__ import annotations

import io
import itertools
import math
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from layout import LONG, faults, faults_of, grid_of, kl_axes, sweep_of, words
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from oracles import beta_product, lifelines_survival, lives_of, percentile
from PIL import Image
from sweeps import FORKS, drawn, random_cell, read, write_cell

import spaghetti_kl_alive as ska

PLAIN = {"roll": 1, "calib_on": "raw"}
NATS = {"roll": 1, "normalize_kl": False}
ALIVE, DEAD, INK, GREY = map(to_hex, (ska.ALIVE_COLOUR, ska.DEAD_COLOUR, ska.INK, ska.UNMEASURED_COLOUR))
WELL, NAN = [1.0, 1.0, 1.0], math.nan  # pmass at the forks of a rollout that lives, or that nobody measured


def picture(folder, kl, pmass=None, calib=None, **flags):
    """The figure of one cell, whose rollouts live if nothing else is said."""
    pmass = pmass or {alpha: [WELL] * len(rows) for alpha, rows in kl.items()}
    write_cell(folder / "r" / "a", kl, pmass, **calib or {})
    return drawn(folder / "r", **flags)[0]


def polylines(ax):
    """Colour and vertices of the lines with any ink, in the order in which they are drawn: one collection."""
    (lines,) = ax.collections
    shades = [to_hex(colour) for colour in lines.get_edgecolor()]
    parts = [np.round(path.vertices, 5).tolist() for path in lines.get_paths()]
    return [(shades[i % len(shades)], part) for i, part in enumerate(parts) if len(part) > 1]


def points(ax, marker):
    return sorted(np.round(row, 5).tolist() for m in ax.lines if m.get_marker() == marker for row in m.get_xydata())


def dashed(ax):
    return sorted(line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == "--")


def medians(ax):
    """Height per token of the solid and of the dotted median, -1 where there is none."""
    lines = [line for line in ax.lines if line.get_linestyle() in ("-", ":")]
    return {line.get_linestyle(): np.nan_to_num(line.get_ydata(), nan=-1).tolist() for line in lines}


def badges(artist):
    """The texts in a box, with the colours of the box, of its edge and of the text."""
    boxed = [(text, text.get_bbox_patch()) for text in artist.findobj(Text) if text.get_bbox_patch()]
    shades = [(box.get_facecolor(), box.get_edgecolor(), text.get_color()) for text, box in boxed]
    return [(text.get_text(), *map(to_hex, shade)) for (text, _), shade in zip(boxed, shades, strict=True)]


def header(figure):
    return " ".join(text.get_text() for text in figure.texts).replace("\N{NO-BREAK SPACE}", " ")


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def over_rows(figure):
    """What stands over each row of panels, its lines joined."""
    titles = []
    for first, *_ in grid_of(kl_axes(figure)):
        height = {text.get_text(): text.get_window_extent().y0 for text in first.texts if text.get_text()}
        alpha = next(text for text in height if text.startswith("α = "))
        titles.append(" ".join(sorted((t for t in height if height[t] > height[alpha] + 9), key=height.get)[::-1]))
    return titles


def span_at(area, x):
    """Lowest and highest point of a polygon at x."""
    (path,) = area.get_paths()
    edges = itertools.pairwise([*path.vertices, path.vertices[0]])
    crossed = [a[1] + (b[1] - a[1]) * (x - a[0]) / (b[0] - a[0]) for a, b in edges if (a[0] - x) * (b[0] - x) < 0]
    return min(crossed), max(crossed)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    for seed, name in enumerate("ab"):
        random_cell(root / name, seed)
    return *drawn(root, **PLAIN, calib_tokens=10), root


def test_a_rollout_is_an_alive_and_a_dead_line_that_share_the_vertex_of_death(tmp_path):
    kl = [[2.0, 1.0, 4.0, 3.0, 1.0, 2.0, 1.0], [1.0] * 7, [3.0, 1.0, 2.0], [5.0, 5.0], [2.0, 2.0, 7.0, 6.0, 6.0, 8.0]]
    pmass = [[0.9, 0.5, 0.9], [0.95, 0.9, 0.1], [0.9, 0.9, 0.9], [0.2, 0.9, 0.9], [0.8, 0.8, 0.7], [1, 0, 0]]
    lengths = {"forks": [0, 2, 6], "gen_len": {"1": [40, 40, 3, 2, 6, 40]}}
    (ax,) = kl_axes(picture(tmp_path, {"1": [*kl, [2.0, math.inf, NAN, 4.0, 2.0]]}, {"1": pmass}, lengths, **NATS))
    alive = [[2, 1, 4], [1] * 7, [3, 1, 2], [2, 2, 7, 6, 6, 8], [2, NAN, NAN]]  # the last one dies in a gap
    dead = [[4, 3, 1, 2, 1], [5, 5], [NAN, 4, 2]]
    for colour, expected in ((ALIVE, alive), (DEAD, dead)):
        held = [[y for _, y in part] for shade, part in polylines(ax) if shade == colour]
        assert sorted(map(str, held)) == sorted(str([float(y) for y in part]) for part in expected)
    assert sorted(part[0][0] for shade, part in polylines(ax) if shade == DEAD) == [0, 2, 2]
    assert points(ax, "x") == [[0, 5], [2, 4], [2, 4], [5, 8], [6, 1]]  # after the last token: a cross on that
    assert points(ax, "|") == [[1, 5], [2, 2], [5, 8]]  # a record cut short has no tick


def test_lines_are_the_normalised_kl_up_to_the_window_in_a_users_own_axes_too(small):
    figure, sweep, root = small
    for whole, whole_strip, panel in [*zip(figure.axes[::2], figure.axes[1::2], sweep.panels, strict=True)][1:]:
        ax, strip = Figure().subplots(2)
        ska.draw_panel(ax, panel, replace(sweep.args, line_lw=1.3, line_alpha=0.9))
        ska.draw_strip(strip, panel, sweep.args)
        assert (ax.collections[0].get_linewidths(), ax.collections[0].get_alpha()) == (1.3, 0.9)
        assert (polylines(ax), words(ax)) == (polylines(whole), words(whole))
        assert strip.lines[0].get_xydata().tolist() == whole_strip.lines[0].get_xydata().tolist()
        expected, ticks, crosses = [], [], []
        lives = lives_of(root, [panel.alpha], **PLAIN, calib_tokens=10)
        for life in lives:
            line = [[t, kl] for t, kl in enumerate(life.line)]
            dies = len(line) if life.death is None else life.death
            expected += [(ALIVE, line[: dies + 1] if dies else []), (DEAD, line[dies:])]
            ticks += [line[-1]] if life.eos else []
            crosses += [line[min(dies, len(line) - 1)]] if life.death is not None else []
        expected, held = sorted(part for part in expected if len(part[1]) > 1), sorted(polylines(ax))
        assert [shade for shade, _ in held] == [shade for shade, _ in expected] and len(ticks) > 2 < len(crosses)
        pairs = [(part, wanted) for (_, part), (_, wanted) in zip(held, expected, strict=True)]
        for part, wanted in [*pairs, (points(ax, "|"), sorted(ticks)), (points(ax, "x"), sorted(crosses))]:
            np.testing.assert_allclose(part, wanted, rtol=1e-4, atol=2e-5)
        scale = float(f"{np.median([life.scale for life in lives]):.2g}")
        assert dashed(ax) == [1] and f"1 = {scale:g} nats" in words(ax)


def test_the_ink_of_overlapping_lines_shows_the_true_share_of_the_dead(tmp_path):
    rng = np.random.default_rng(1)
    sizes = [(24, 7)] * 6 + [(12, 3), (60, 40), (300, 60)]
    walks = {str(k): np.abs(1 + np.cumsum(rng.normal(0, 0.06, (n, 120)), axis=1)) for k, (n, _) in enumerate(sizes, 1)}
    pmass = {str(k): [[0.1]] * dead + [[1.0]] * (n - dead) for k, (n, dead) in enumerate(sizes, 1)}
    kl = {alpha: rows.round(4).tolist() for alpha, rows in walks.items()}
    look = NATS | {"survival": False, "ncols": 3, "line_lw": 2, "dpi": 100}
    figure = picture(tmp_path, kl, pmass, {"forks": [0], "window": 120}, **look)
    assert [ax.collections[0].get_alpha() for ax in figure.axes[5:]] == pytest.approx([16 / 24, 0.8, 16 / 60, 16 / 300])
    crosses = [line for ax in figure.axes for line in ax.lines if line.get_marker() == "x"]
    looks = [(line.get_alpha(), line.get_markersize()) for line in crosses[6:]]
    assert (np.diff(looks, axis=0) < 0).all()  # the more there are, the fainter and smaller
    for ax in figure.axes:
        for other in (*ax.lines, *ax.patches, *ax.texts):
            other.set_visible(False)
    pixels = np.array(Image.open(io.BytesIO(figure._repr_png_())))[:, :, :3] / 255
    ends = np.vstack([np.array([to_rgb(ALIVE), to_rgb(DEAD), (1, 1, 1)]).T, [1, 1, 1]])
    shares = []
    for ax in figure.axes:
        x0, y0, x1, y1 = map(round, ax.bbox.extents)
        seen = pixels[len(pixels) - y1 + 2 : len(pixels) - y0 - 3, x0 + 4 : x1 - 2].reshape(-1, 3)
        parts = np.linalg.lstsq(ends, np.c_[seen, np.ones(len(seen))].T, rcond=None)[0]
        alive, dead = np.clip(parts[:2], 0, 1).sum(axis=1)
        shares.append(dead / (alive + dead))
    assert np.mean(shares[:6]) == pytest.approx(7 / 24, abs=0.03)
    assert shares == pytest.approx([dead / n for n, dead in sizes], abs=0.05)


def test_the_median_is_dotted_where_fewer_than_half_of_the_lines_run(tmp_path):
    kl = {
        "1": [[1.0] * 10, [2.0] * 10, [3.0] * 6, [4.0] * 4, [5.0] * 6],
        "2": [[1.0] * 6, [1.0] * 6, [1.0] * 3, [1.0] * 3, [NAN] * 6, [NAN] * 6, [NAN] * 6],  # three have no line
        "3": [[1.0] * 6, [2.0] * 6, [NAN] * 6],
        "4": [[1.0] * 6, [2.0] * 6, [4.0] * 6],
    }
    falls, half, two, three = kl_axes(picture(tmp_path, kl, calib={"window": 10}, **NATS, survival=False))
    assert medians(falls) == {"-": [3] * 4 + [2.5] * 2 + [-1] * 4, ":": [-1] * 6 + [1.5] * 4}
    assert medians(half) == {"-": [1] * 6, ":": [-1] * 6}  # half of them is not fewer than half
    assert medians(two) == {} and medians(three)["-"] == [2] * 6  # fewer than three lines have none


@pytest.mark.parametrize("log", [False, True])
def test_marks_stand_at_their_value_or_at_the_edge_whole_and_inside_of_the_axes(tmp_path, log):
    ends = [1.0, -1e4, -1.0, 0.0, 1e3, 9e5]
    kl = [[1.0] * 39 + [end] for end in ends * 2] + [[1.0] * 40] * 44 + [[0.0] * 40, [0.0], [1.0]]
    pmass = [[1.0, 0.1]] * 6 + [[1.0, 1.0]] * 49 + [[0.1, 0.1]] * 2 + [[1.0, 1.0]] * 2
    lengths = {"gen_len": {"1": [60] * 6 + [40] * 6 + [60] * 45 + [1, 1]}, "forks": [0, 39], "window": 60}
    (ax,) = kl_axes(picture(tmp_path, {"1": kl}, {"1": pmass}, lengths, **NATS, kl_log=log))
    ax.figure.draw_without_rendering()
    for marker in "x|":
        (line,) = [line for line in ax.lines if line.get_marker() == marker]
        centres = ax.transData.transform(line.get_xydata())
        room = line.get_markersize() / 2 * ax.figure.dpi / 72 - 0.01
        assert (centres - room >= ax.bbox.min).all() and (centres + room <= ax.bbox.max).all()
        held = np.array([y for x, y in points(ax, marker) if x == 39])
        assert len(held) == 6 and (held == 1).sum() == 1  # within the axis it stands where the line is
        assert (held < 0.1).sum() == 3 and (held > 1.1).sum() == 2
        assert [y for x, y in points(ax, marker) if x == 0] == pytest.approx([0, 1], abs=0.05)


def test_a_reference_above_the_axis_is_written_and_not_drawn(tmp_path):
    level, falling = [[1.0] * 1000] * 5, [[3.0] * 4 + [0.01] * 996] * 5
    cases = [(level, NATS, [], ["target 50: off-scale"]), (level, NATS | {"kl_log": True}, [50], [])]
    for kl, flags, levels, said in [*cases, (falling, PLAIN, [], ["1 = 3 nats: off-scale"])]:
        figure = picture(tmp_path, {"1": kl}, calib={"window": 1000, "target_kl": 50.0}, **flags)
        assert [text for text in words(figure.axes[0]) if "off-scale" in text] == said
        assert dashed(figure.axes[0]) == levels and faults_of(figure) == []
        assert ("target: α² · 50 nats" in legend(figure)) == ("normalize_kl" in flags)


def test_the_kl_axis_ends_above_the_99th_percentile_of_the_steered_values_in_all_panels(tmp_path):
    rng = np.random.default_rng(5)
    kl = {alpha: rng.gamma(1, level, (6, 40)) for alpha, level in (("0", 50.0), ("1", 1.0), ("2", 2.0))}
    kl["1"][0, :8], kl["2"][1, 3] = -3.0, np.nan
    steered = np.concatenate([kl["1"].ravel(), kl["2"].ravel()])
    figure = picture(tmp_path, {alpha: rows.tolist() for alpha, rows in kl.items()}, **NATS)
    ((bottom, top),) = {ax.get_ylim() for ax in kl_axes(figure)}
    assert top == pytest.approx(1.4 * np.percentile(steered[steered >= 0], 99), rel=1e-5) and -0.1 * top < bottom < 0
    (alone,) = kl_axes(drawn(tmp_path / "r", **NATS, alphas=(0,))[0])
    assert alone.get_ylim()[1] == pytest.approx(1.4 * np.percentile(kl["0"], 99), rel=1e-5)
    for level, flags, least in ((1e-5, NATS, 1e-3), (0.0, PLAIN, 1.1), (-1.0, NATS, 1.1)):
        figure = picture(tmp_path / str(level), {"1": [[level] * 9]}, **flags)
        assert figure.axes[0].get_ylim()[1] == pytest.approx(least)


def test_in_nats_on_a_log_axis_every_target_is_inside_the_frame_and_the_ticks_are_decades(tmp_path):
    for name, target in (("a", 1.0), ("b", 0.5)):
        kl = {a: [[0.3 * abs(float(a)) / target] * 40] * 4 for a in ("-4", "0", "0.5", "1", "2", "8")}
        write_cell(tmp_path / name, kl, {a: [WELL] * 4 for a in kl}, target_kl=target)
    figure, sweep = drawn(tmp_path, normalize_kl=False, kl_log=True)
    for ax, panel in zip(kl_axes(figure), sweep.panels, strict=True):
        assert dashed(ax) == ([panel.alpha**2 / 2, panel.alpha**2] if panel.alpha else [])
        highest = ax.transData.transform((0, max(dashed(ax), default=0)))[1]
        assert ax.bbox.y1 - highest > 2 * figure.dpi / 72
    assert "50% over 0.5, 1" in words(kl_axes(figure)[3])  # where targets differ, the share above them
    assert faults_of(figure) == []
    first = kl_axes(figure)[0]
    ticks = [tick for tick in first.yaxis.get_major_ticks() if 0 <= tick.get_loc() <= first.get_ylim()[1]]
    assert [tick.label1.get_text() for tick in ticks] == ["0", "0.1", "1", "10"]
    assert (first.get_yscale(), first.yaxis.get_transform().linthresh) == ("symlog", 0.1)


def test_a_pale_band_marks_where_padding_made_the_line(tmp_path):
    kl = {"0": [[0.0] * 100], "1": [[1.0] * 100, [1.0] * 30], "2": [[1.0] * 9], "3": [[1.0] * 64], "4": [[1.0] * 200]}
    figure = picture(tmp_path, kl, calib={"window": 100}, roll=21)
    # no line; the longest rollout's ends; shorter than the mean; a longest of its own; its end lies beyond the window
    expected = [[], [(0, 10), (90, 100)], [], [(0, 10), (54, 64)], [(0, 10)]]
    for ax, spans in zip(kl_axes(figure), expected, strict=True):
        boxes = [patch.get_extents().transformed(ax.transData.inverted()) for patch in ax.patches]
        assert sorted((round(box.x0, 6), round(box.x1, 6)) for box in boxes) == spans
    assert "padded" in " ".join(legend(figure))
    for flags in ({"roll": 21, "edges": "shrink"}, {"roll": 1}, {"roll": 201}):
        figure, _ = drawn(tmp_path / "r", **flags, survival=False, alphas=(1, 4))
        assert not any(ax.patches for ax in kl_axes(figure)) and "padded" not in " ".join(legend(figure))


def test_titles_badges_and_colours_say_what_became_of_the_rollouts(tmp_path):
    """Rollouts of six tokens, forks at 0, 2 and 6: pmass there, tokens recorded, tokens generated."""
    lives, ends, cut, late = (WELL, 6, 6), (WELL, 5, 5), (WELL, 4, 6), ([1, 1, 0.5], 6, 6)
    dies, back, nobody = ([1, 0.5, 0.5], 6, 6), ([1, 0.5, 1], 6, 6), ([NAN] * 3, 6, 6)
    cases = {
        "0": ([lives, ends], "0 died", "", "1 EOS", set()),
        "1": ([lives] * 3, "0 died", "", "", {ALIVE}),
        "2": ([dies, back, late, ends, cut], "3 died", DEAD, "1 recovered", {ALIVE, DEAD}),
        "3": ([back, back, dies], "3 died", "#ffffff", "2 recovered", {ALIVE, DEAD}),
        "4": ([back, dies, lives], "2 died", DEAD, "1 recovered", {ALIVE, DEAD}),  # half are not more than half
        "5": ([late, late, ends, cut], "2 died", DEAD, "2 at the end", {ALIVE}),
        "6": ([ends, cut, ends], "0 died", "", "2 EOS", {ALIVE}),
        "7": ([cut, cut], "0 died", "", "2 cut", {ALIVE}),
        "8": ([nobody, nobody], "not measured", "", "", {GREY}),
        "9": ([nobody, lives, ends], "0 died", "", "1 not measured", {GREY, ALIVE}),
    }
    kl = {alpha: [[float(alpha != "0")] * row[1] for row in rows] for alpha, (rows, *_) in cases.items()}
    kl["1"][2] = [0.0] * 6  # has no scale
    pmass, gen_len = ({alpha: [row[k] for row in rows] for alpha, (rows, *_) in cases.items()} for k in (0, 2))
    calib = {"gen_len": gen_len, "forks": [0, 2, 6], "window": 6, "target_kl": 1.1}
    figure = picture(tmp_path, kl, pmass, calib, **PLAIN)
    for ax, (alpha, (rows, deaths, face, became, shades)) in zip(kl_axes(figure), cases.items(), strict=True):
        against = f"KL 1 < {1.1 * int(alpha) ** 2:.3g}" if alpha != "0" else "unsteered"
        unit = ["1 not drawn"] * (alpha == "1") + ["1 = 1 nats"] * (alpha != "0")
        title = [part for part in (f"α = {alpha}", deaths, f"n = {len(rows)}", became, against, *unit) if part]
        assert words(ax)[: len(title)] == title
        assert badges(ax) == ([(deaths, face, DEAD, INK)] if face else [])
        assert {shade for shade, _ in polylines(ax)} == shades if shades else not ax.collections
    assert len(badges(figure)) == 4  # and nothing else has a box


def test_kl_is_compared_with_its_target_in_bold_only_where_it_is_clearly_over(tmp_path):
    """Cells of prompts of 40 tokens: at so many of each, KL has the second level, at the others the first."""
    uneven = [0, 6, 1, 3, 0, 5, 2, 1]  # 5.6% of the tokens, but by how much over 5% the eight prompts cannot say
    cases = {
        "all_of_them": (0.5, 1.004, [40] * 8, "KL 1.004 > 1", "bold"),
        "clearly_over": (0.5, 2.0, [8] * 8, "KL 2 > 1", "bold"),
        "infinite": (0.5, math.inf, [8] * 8, "KL ∞ > 1", "bold"),
        "clearly_under": (0.5, 2.0, [1] * 8, "KL 0.5 < 1", "normal"),
        "close": (0.9, 1.123, uneven, "KL 1.1 ≈ 1", "normal"),
        "far_above": (0.5, 3.0, uneven, "KL 3 > 1", "normal"),
        "far_below": (0.5, 3.0, [0, 5, 1, 2, 0, 5, 1, 1], "KL 0.5 < 1", "normal"),
        "two_prompts": (0.5, 2.0, [3] * 2, "KL 2 > 1", "normal"),
        "not_more_than_5_percent": (0.5, 2.0, [2] * 2, "KL 0.57 < 1", "normal"),
        "no_number": (NAN, NAN, [8] * 8, "KL not measured", "normal"),
    }
    for name, (low, high, counts, *_) in cases.items():
        kl = [[low] * (40 - count) + [high] * count for count in counts]
        write_cell(tmp_path / name, {"1": kl}, {"1": [WELL] * len(kl)})
    figure, sweep = drawn(tmp_path, rows="cell", survival=False)
    said = [[(t.get_text(), t.get_weight()) for t in ax.texts if t.get_text()[:3] == "KL "] for ax in kl_axes(figure)]
    by_name = {panel.facet: texts[0] for panel, texts in zip(sweep.panels, said, strict=True)}
    assert by_name == {name: case[3:] for name, case in cases.items()}


def test_the_page_says_which_model_what_is_drawn_and_how(tmp_path):
    random_cell(tmp_path / "a", alphas=[1.0], model="org/the-model")
    plain = header(drawn(tmp_path, roll=5)[0])
    assert plain.startswith("the-model: KL(steered || base) per token; orange once the model can no longer answer")
    assert plain.endswith("mean_diff · window 40 tokens · mean of 5 tokens, ends padded · alive while pmass_eval ≥ 0.8")
    shrunk = header(drawn(tmp_path, roll=5, edges="shrink", window=30, palette="deep")[0])
    assert "window 30 tokens · mean of 5 tokens, fewer at the ends" in shrunk and "orange" not in shrunk
    random_cell(tmp_path / "b", 3, alphas=[1.0], method="pca", model="org/other")
    pooled, by_method = header(drawn(tmp_path)[0]), header(drawn(tmp_path, rows="method", roll=1)[0])
    assert "2 models pooled: the-model, other · 2 methods pooled: mean_diff, pca" in pooled
    assert "mean_diff" not in by_method and "models pooled: the-model, other" in by_method
    assert all("not smoothed" in said and "mean of" not in said for said in (pooled, by_method))  # too short; roll 1


def test_the_legend_has_an_entry_for_each_mark_and_at_most_seven(small):
    for own, strip, padded in itertools.product((True, False), repeat=3):
        figure, _ = drawn(small[2], normalize_kl=own, survival=strip, roll=5 if padded else 1, alphas=(1,))
        parts = ["alive", "dead, from the cross on", "EOS", "median", "own p95" if own else "target"]
        parts += ["padded"] * padded + ["95% interval"] * strip
        assert len(legend(figure)) == len(parts) <= 7 and len(figure.axes) == 1 + strip
        assert all(any(part in entry for entry in legend(figure)) for part in parts)


def test_a_panel_without_a_line_says_why(tmp_path):
    rows = [[0.0] * 40, [], [NAN] * 9, [1e-9] * 9, [0.0] * 30 + [5.0], [1.0], [1e9] * 40, [900.0] * 9, [-1.0] * 9]
    kl = {str(alpha): [row] for alpha, row in enumerate(rows)}
    kl |= {"9": [[900.0] * 9 + [1.0]], "10": [[1.0] * 40] * 50}
    picture(tmp_path, kl)
    reasons = ["KL = 0", "no KL measured", "no KL measured", "KL at most\n1e-09 nats"]
    reasons += ["no KL in the first\n20 tokens: no scale", "rollouts of 1 token", "KL above\n1e+06 nats"]
    reasons += ["all lines are\nabove the axis", "all KL is below 0", "", "", "no rollouts\nat this α"]
    for flags, without in (({"roll": 1}, (0, 1, 2, 3, 4, 5, 6, 11)), (NATS, (1, 2, 5, 6, 7, 8, 11))):
        figure, _ = drawn(tmp_path / "r", **flags, alphas=range(12), survival=False)
        for k, ax in enumerate(kl_axes(figure)):
            said = [text for text in words(ax) if text in reasons]
            assert said == ([reasons[k]] if k in without else []), k
            if k in without and k not in (5, 7, 8):
                assert not ax.collections and not points(ax, "x") and not medians(ax)
        assert words(ax) == ["α = 11", "n = 0", "no rollouts\nat this α"]
        assert faults_of(figure) == []


@pytest.mark.parametrize("noise", [1e-12, 1e-8, 1e-5, 1e-3])
def test_noise_without_steering_is_no_line_of_its_own_but_its_largest_kl(tmp_path, noise):
    rng = np.random.default_rng(3)
    kl = {"0": (noise * rng.random((6, 40))).tolist(), "1": rng.gamma(2, 0.2, (6, 40)).tolist()}
    control, steered = kl_axes(picture(tmp_path, kl, survival=False))
    (without,) = kl_axes(drawn(tmp_path / "r", alphas=(1,), survival=False)[0])
    largest = float(f"{max(map(max, kl['0'])):.2g}")
    assert words(control)[-2:] == ["unsteered", f"KL at most\n{largest:g} nats"]
    assert not control.collections and not control.lines and steered.get_ylim() == without.get_ylim()
    control, steered = kl_axes(drawn(tmp_path / "r", survival=False, **NATS)[0])
    assert len(polylines(control)) == 6 and control.get_ylim()[1] == pytest.approx(1.4 * np.percentile(kl["1"], 99))


def test_the_strip_holds_the_share_alive_its_interval_between_the_forks_and_numbers_at_risk(tmp_path):
    """Two cells of the same prompts, a first fork after the first token, and a third alpha not measured."""
    rng, forks = np.random.default_rng(8), [3, 8, 20, 31]
    for name in "ab":
        lengths = {"1": rng.choice([40, 40, 25, 9, 2], 14).tolist(), "2": [40] * 14, "3": [40] * 14}
        kl = {alpha: [rng.gamma(2, 0.5, g).tolist() for g in of_alpha] for alpha, of_alpha in lengths.items()}
        pmass = {"1": (1 - 0.25 * rng.random((14, 4))).tolist(), "2": [[1.0] * 4] * 14, "3": [[NAN] * 4] * 14}
        write_cell(tmp_path / name, kl, pmass, forks=forks)
    figure, _ = drawn(tmp_path)
    assert [ax.get_xlim() for ax in figure.axes] == [pytest.approx((-0.04 * 40, 1.04 * 40))] * 6
    for alpha, strip in enumerate(figure.axes[1::2], 1):
        lives = [(life.followed_to, life.death is not None) for life in lives_of(tmp_path, [alpha]) if life.forks]
        labels = [label.get_text().split("\n") for label in strip.get_xticklabels()]
        assert 3 <= len(labels) <= 6 and labels[0][0] == "0" and int(labels[-1][0]) > 31
        for token, number in labels:
            at_risk = sum(followed_to >= int(token) for followed_to, _ in lives)
            assert number == (str(at_risk) if int(token) <= 31 and lives else "–"), (alpha, token)
        if alpha == 3:
            assert not lives and not strip.lines and not strip.collections
            continue
        shares = [1.0, *lifelines_survival(lives, forks)]
        limits = [beta_product(lives, forks[: i + 1], weight=14 / 28) for i in range(4)]
        assert (0 < shares[-1] < 0.7) if alpha == 1 else shares[-1] == 1
        alive, dead, band = strip.collections
        assert [to_hex(area.get_facecolor()[0]) for area in (alive, dead)] == [ALIVE, DEAD]
        upper = [1.0, *(high for _, high in limits)]
        for i, (start, stop) in enumerate(itertools.pairwise([0, *forks])):
            for x in (start + 0.2, stop - 0.2):
                assert span_at(alive, x) == pytest.approx((0, shares[i]), abs=1e-9)
                assert span_at(dead, x) == pytest.approx((shares[i], 1), abs=1e-9)
                assert span_at(band, x) == pytest.approx((limits[i][0], upper[i]), abs=2e-4)
        (curve,) = strip.lines
        assert (curve.get_drawstyle(), curve.get_marker()) == ("steps-post", "o")
        np.testing.assert_allclose(curve.get_xydata(), [*zip([0, *forks], shares, strict=True)])
        assert curve.get_xdata()[curve.get_markevery()].tolist() == forks  # a dot at each


def test_panels_wrap_in_balanced_rows_in_the_order_of_their_alphas(tmp_path):
    for n, ncols, rows in (
        (6, None, [6]),
        (7, None, [4, 3]),
        (8, None, [4, 4]),
        (13, None, [5, 5, 3]),
        (5, 2, [2, 2, 1]),
    ):
        kl = {str(k - 2): [[1.0] * 9] for k in range(n)}
        grid = grid_of(kl_axes(picture(tmp_path, kl, ncols=ncols, survival=n < 7)))
        assert [len(row) for row in grid] == rows
        assert [words(ax)[0] for row in grid for ax in row] == [f"α = {alpha}" for alpha in kl]


def test_rows_give_each_value_its_own_panels_every_alpha_a_column_and_say_which_repeat_others(tmp_path):
    about = {"a": ("mean_diff", "org/l", 2), "b": ("pca|x$y$", "org/m", 10), "c": ("mean_diff", "org/m", 10)}
    about["d"] = ("mean_diff", "org/m", 11)  # a copy of c
    for k, (name, (method, model, seed)) in enumerate(about.items()):
        alphas = [0.0, 1.0 if k else 2.0]
        random_cell(tmp_path / name, min(k, 2), alphas, n=4, method=method, model=model, seed=seed)
    random_cell(tmp_path / "e", 0, [0.0], n=4, method="zero", model="org/l")  # only the control that mean_diff has, too
    assert over_rows(drawn(tmp_path, rows="method", survival=False)[0]) == ["mean_diff", "pca|x$y$", "zero"]
    shutil.rmtree(tmp_path / "e")
    of_method, of_model = {"mean_diff": "ac", "pca|x$y$": "b"}, {"l": "a", "m": "bc"}
    of_seed = {"seed 2": "a", "seed 10": "bc", "seed 11: some of the rollouts of seed 10 again": "d"}
    of_cell = {"a": "a", "b": "b", "c": "c", "d: the rollouts of c again": "d"}
    for rows, cells in {"method": of_method, "model": of_model, "seed": of_seed, "cell": of_cell}.items():
        figure, sweep = drawn(tmp_path, rows=rows)
        assert over_rows(figure) == [*cells] and len({ax.get_ylim() for ax in kl_axes(figure)}) == 1
        wanted = [held for names in map(set, cells.values()) for held in (names, names - {"a"}, names & {"a"})]
        assert [{r.cell.name for r in panel.rollouts} for panel in sweep.panels] == wanted  # each with its control
        assert not any(text.get_parse_math() for text in figure.findobj(Text) if "$" in text.get_text())
        in_order = [ax for row in grid_of(kl_axes(figure)) for ax in row]
        for k, (ax, held) in enumerate(zip(in_order, wanted, strict=True)):
            assert {f"α = {k % 3}", f"n = {4 * len(held)}"} <= {*words(ax)}


PATHS = [f"/mnt/{'a-folder-of-many/' * 9}{way}/{'experiments/' * 9}checkpoint" for way in ("mean-diff", "pca")]


@pytest.mark.parametrize("names", [PATHS, ["主成分", "主成文", "\N{SPARKLES}"], ["x" * 150, "x" * 149 + "y"]])
def test_two_rows_never_read_alike_and_no_name_is_cut(names):
    sweep = sweep_of((1.0, 2.0), 3, 100, facets=names, rows="model")
    for draw, titles in ((ska.draw, over_rows), (ska.draw_dose, lambda figure: legend(figure)[:-1])):
        figure = draw(sweep)
        assert len({*titles(figure)}) == len(names) and "".join(titles(figure)).isascii()  # spelled out if need be
        assert faults_of(figure) == []


def luminance(colour):
    """Relative luminance of WCAG 2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_a_palette_colours_lines_strip_and_badges_and_leaves_their_text_legible():
    import seaborn

    panel = sweep_of((1.0,), 40, 70).panels[0]
    for palette in ("pastel", "bright", "dark", "husl", "rocket", "Set1", "Set2", "Dark2", "viridis", "Greys"):
        alive, dead = map(to_hex, seaborn.color_palette(palette, 2))
        ax, strip = Figure().subplots(2)
        ska.draw_panel(ax, panel, ska.Args("", palette=palette))
        ska.draw_strip(strip, panel, ska.Args("", palette=palette))
        assert {shade for shade, _ in polylines(ax)} == {alive, dead}
        assert [to_hex(area.get_facecolor()[0]) for area in strip.collections][:2] == [alive, dead]
        ((_, face, edge, ink),) = badges(ax)
        light, dark = sorted((luminance(face), luminance(ink)), reverse=True)
        assert (face, edge) == (dead, dead) and (light + 0.05) / (dark + 0.05) >= 3, palette


FACES = [
    ([1.0], 8, 100, {"facets": ["x" * 150]}),
    ([-2.0, -1.0, 0.0], 24, 999, {"normalize_kl": False, "rows": "method", "facets": ["a", "b"], "survival": False}),
    ([-1.0, 0.0, 0.5], 1000, 4096, {"survival": False, "normalize_kl": False, "kl_log": True}),
    ([float(k) for k in range(8)], 240, 10240, {"ncols": 2}),
    ([0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 8.0], 24, 10240, {"rows": "method", "facets": LONG}),
    ([0.0, 0.25], 8, 999, {"normalize_kl": False, "kl_log": True}),
    ([0.0, 0.5, 1.0], 8, 100, {"overview": True, "facets": ["x" * 150]}),
    ([0.0, 0.01, 0.0125], 8, 100, {"overview": True, "rows": "method", "facets": LONG, "growth": 0}),
    ([-4.0, 1.0, 4.0], 8, 100, {"overview": True, "rows": "cell", "facets": ["pca"] * 12}),
    ([-64.0, 64.0], 3, 100, {"overview": True, "growth": 9}),  # all KL is infinite
]


@pytest.mark.parametrize(("alphas", "n", "window", "flags"), FACES)
def test_no_text_touches_another_or_leaves_the_page(alphas, n, window, flags):
    assert faults(alphas, n, window, **flags) == []


def test_the_overview_shows_the_kl_and_the_share_alive_of_each_panel(tmp_path):
    rng = np.random.default_rng(2)
    for name in "ab":
        kl = {a: rng.gamma(2, 0.2 * abs(float(a)), (6, 40)).tolist() for a in ("-2", "-1", "0", "1", "2", "3", "4")}
        if name == "b":
            kl |= {"2": [[0.0] * 40] * 6, "3": [[math.inf] * 40] * 6}  # neither has a place on a logarithmic axis
        pmass = {a: (1 - rng.random((6, 3)) * (0.1 + 0.08 * abs(float(a)))).tolist() for a in kl}
        write_cell(tmp_path / name, kl, pmass, method=f"method {name}", target_kl=0.7)
    figure = ska.draw_dose(read(tmp_path, rows="method"))
    by_alpha, alive, by_kl = figure.axes
    assert legend(figure)[:2] == ["method a", "method b"]
    for name, handle in zip("ab", figure.legends[0].legend_handles, strict=False):
        kl, share, bars = {}, {}, []
        for alpha in range(-2, 5):
            lives = lives_of(tmp_path / name, [alpha])
            kl[alpha] = percentile(value for life in lives for value in life.kl)
            ends = [(life.followed_to, life.death is not None) for life in lives]
            share[alpha] = lifelines_survival(ends, FORKS)[-1]
            bars.append([(alpha, limit) for limit in beta_product(ends, FORKS, 1.0)])
        steered = [alpha for alpha in kl if alpha and 0 < kl[alpha] < math.inf]
        assert len(steered) == (6 if name == "a" else 4) and len({*share.values()}) > 2
        at_kl = {kl[a]: share[a] for a in steered}
        wanted = {a: kl[a] for a in steered}, {a: share[a] for a in share if a}, at_kl
        for ax, expected in zip(figure.axes, wanted, strict=True):
            lines = [line for line in ax.lines if line.get_color() == handle.get_color() and not line.is_dashed()]
            held = sorted(tuple(point) for line in lines for point in line.get_xydata() if point[0])
            np.testing.assert_allclose(held, sorted(expected.items()), rtol=1e-5)
        held = [bar for bar in alive.collections if to_hex(bar.get_edgecolor()[0]) == to_hex(handle.get_color())]
        segments = [part for bar in held for part in bar.get_segments() if part[0][0]]
        np.testing.assert_allclose(segments, [bar for bar in bars if bar[0][0]], atol=2e-4)
    targets = np.vstack([line.get_xydata() for line in by_alpha.lines if line.is_dashed()])
    np.testing.assert_allclose(targets[:, 1], 0.7 * targets[:, 0] ** 2)
    assert {-2, -1, 1, 4} <= {*np.round(targets[:, 0], 9)} and np.abs(targets[:, 0]).min() > 0.99
    assert (by_alpha.get_yscale(), by_kl.get_xscale()) == ("log", "log")
    assert header(figure) == "m: how much steering before it breaks, by method"
    for ax in (by_alpha, alive):
        assert -3 < ax.get_xlim()[0] < -2 and 4 < ax.get_xlim()[1] < 5
    for ax in (alive, by_kl):
        assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "0.5", "1"]
    for axis in (by_alpha.yaxis, by_kl.xaxis):
        assert 2 <= len(axis.get_majorticklocs()) <= 4 and len(axis.get_minorticklocs()) == 0


def test_intervals_in_the_overview_stand_on_their_points_side_by_side():
    figure = ska.draw_dose(sweep_of((-2.0, 1.0, 4.0), 8, 100, facets="abc", rows="method"))
    figure.draw_without_rendering()
    alive, at_one, shifts = figure.axes[1], (1.0, 0.5), []
    for handle in figure.legends[0].legend_handles[:3]:
        lines = [line for line in alive.lines if line.get_color() == handle.get_color() and line.get_marker() != "None"]
        bars = [bar for bar in alive.collections if to_hex(bar.get_edgecolor()[0]) == to_hex(handle.get_color())]
        places = [artist.get_transform().transform(at_one)[0] for artist in [*lines, *bars]]
        assert len(lines) == len(bars) == 2 and np.ptp(places) < 0.01
        shifts.append((places[0] - alive.transData.transform(at_one)[0]) / figure.dpi)  # inches
    assert shifts == pytest.approx([-shifts[2], 0, shifts[2]], abs=1e-6) and 0.02 < shifts[2] < 0.1


def test_rows_differ_in_the_overview_and_of_many_all_are_thin_and_grey():
    palette, taken = None, [ALIVE, DEAD]
    for _ in range(2):
        few = sweep_of((1.0, 2.0), 3, 100, facets="abcdef", rows="method", palette=palette)
        *handles, target = ska.draw_dose(few).legends[0].legend_handles
        assert len({handle.get_marker() for handle in handles}) == len(handles) == 6 and target.is_dashed()
        colours = [to_hex(handle.get_color()) for handle in handles]
        assert min(math.dist(to_rgb(a), to_rgb(b)) for a, b in itertools.combinations(colours + taken, 2)) > 0.15
        taken, palette = colours[1:3], f"blend:{colours[1]},{colours[2]}"  # alive and dead as two rows were
    figure = ska.draw_dose(sweep_of((1.0, 2.0), 3, 100, facets="abcdefg", rows="method"))
    assert "7 of them" in header(figure) and len(legend(figure)) == 2
    lines = [line for line in figure.axes[2].lines if len(line.get_xdata()) == 2]
    greys = [line for line in lines if np.ptp(to_rgb(line.get_color())) < 0.15 and line.get_marker() == "None"]
    assert len(greys) >= 7 and max(line.get_linewidth() for line in greys) < handles[0].get_linewidth()
    with pytest.raises(ska.SweepError, match="at least two steered alphas"):
        ska.draw_dose(sweep_of((0.0, 1.0), 3, 100))


STATE = """
import json, logging, os, random, signal, sys, threading, warnings
import matplotlib, numpy
from loguru import logger

def state():
    loggers = map(logging.getLogger, (None, "matplotlib", "PIL", "seaborn"))
    return {
        "rcParams": {key: repr(dict.__getitem__(matplotlib.rcParams, key)) for key in matplotlib.rcParams},
        "process": [dict(os.environ), os.getcwd(), os.umask(os.umask(0o022)), threading.active_count()],
        "logging": [repr(logger._core.handlers), [(each.level, repr(each.handlers)) for each in loggers]],
        "warnings": [repr(rule) for rule in warnings.filters] + [repr(warnings.showwarning)],
        "hooks": [*map(signal.getsignal, signal.valid_signals()), sys.stdout, sys.stderr, sys.excepthook],
        "numbers": [numpy.geterr(), repr(numpy.get_printoptions()), repr(numpy.random.get_state()), random.getstate()],
        "pyplot": not palette and "matplotlib.pyplot" in sys.modules,  # seaborn imports it
    }

def stage(name, result=None):
    changed.extend(f"{name}: {key}" for key, value in state().items() if value != before[key])
    return result

palette, changed = None, []
before = state()
import spaghetti_kl_alive as ska
stage("import")
for palette in (None, "deep"):
    sweep = stage("read", ska.read(ska.Args(sys.argv[1], out=sys.argv[2], alphas=(1, 2), dpi=20, palette=palette)))
    stage("draw", ska.draw(sweep))._repr_png_()
    stage("overview", ska.draw_dose(sweep))
stage("write", ska.write(sweep))
print(json.dumps(changed))
"""


def test_nothing_changes_the_state_of_the_process_or_imports_pyplot(small, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    argv = [sys.executable, "-c", STATE, small[2], tmp_path / "o"]
    ended = subprocess.run(argv, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ended.stdout, ended.stderr) == ("[]\n", "")
    assert {path.name for path in tmp_path.iterdir()} == {"o"}


def test_a_notebook_shows_figures_and_prints_a_sweep_in_a_line(small):
    for held in (small[0], ska.draw_dose(small[1])):
        size = held.get_size_inches() * small[1].args.dpi
        np.testing.assert_allclose(Image.open(io.BytesIO(held._repr_png_())).size, size, atol=1)
    assert "2 cells, 36 rollouts, 3 panels" in repr(small[1]) and "alpha 2: n 12" in repr(small[1].panels[2])
    assert max(len(repr(held)) for held in (small[1], *small[1].panels)) < 200


HOSTILE = {"font.size": 30, "font.family": "serif", "axes.grid": True, "axes.xmargin": 0.3, "savefig.bbox": "tight"}
HOSTILE |= {"figure.constrained_layout.use": True, "lines.marker": "D", "path.sketch": (3, 100, 2), "pdf.fonttype": 3}


def written(sweep):
    """What a sweep's files hold."""
    return {path.name: path.read_bytes() for path in ska.write(sweep)}


def test_neither_another_thread_nor_a_users_matplotlibrc_changes_a_byte_and_that_is_left_as_it_was(
    small, tmp_path, monkeypatch
):
    random_cell(tmp_path / "two", 9, [1.0, 1.00000001], n=3)  # titles so wide that they set the page's width
    one = read(small[2], out=tmp_path / "one_out", dpi=20, alphas=(1, 2))
    two = read(tmp_path / "two", out=tmp_path / "two_out", dpi=20, formats=ska.FIGURE_FORMATS)
    alone, draw_panel = [written(one), written(two)], ska.draw_panel
    first_draws, second_draws, first_done = threading.Event(), threading.Event(), threading.Event()

    def slow_draw_panel(ax, panel, *rest):  # each holds on while it draws, for the other to step in
        (first_draws if panel in one.panels else second_draws).set()
        (second_draws if panel in one.panels else first_done).wait(0.3)
        draw_panel(ax, panel, *rest)

    monkeypatch.setattr(ska, "draw_panel", slow_draw_panel)
    with matplotlib.rc_context(HOSTILE):
        before = {key: dict.__getitem__(matplotlib.rcParams, key) for key in matplotlib.rcParams}
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(written, one)
            first.add_done_callback(lambda _: first_done.set())
            first_draws.wait(5)
            second = pool.submit(written, two)
        monkeypatch.setattr(ska, "draw_panel", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ska.draw(one)
        assert {key: dict.__getitem__(matplotlib.rcParams, key) for key in matplotlib.rcParams} == before
    assert [len(plain) for plain in alone] == [4, 8]
    for plain, hostile in zip(alone, (first.result(), second.result()), strict=True):
        assert [name for name in plain if plain[name] != hostile[name]] == []
