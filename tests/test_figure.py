"""What is drawn, read as data from the figures: lines, marks, words, limits, strips, layout, the overview."""

from __future__ import annotations

import io
import itertools
import math
import re

import matplotlib
import numpy as np
import pytest
import seaborn
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image
from sweeps import drawn, random_cell, read, write_cell

import spaghetti_kl_alive as ska

NATS = {"roll": 1, "normalize_kl": False}
ALIVE, DEAD, GREY = map(to_hex, (ska.ALIVE_COLOUR, ska.DEAD_COLOUR, ska.UNMEASURED_COLOUR))
WELL, NAN = [1.0, 1.0, 1.0], math.nan  # pmass at the forks of a rollout that lives, or that nobody measured


def picture(folder, kl, pmass=None, calib=None, **flags):
    """The figure of one cell, whose rollouts live if nothing else is said."""
    pmass = pmass or {alpha: [WELL] * len(rows) for alpha, rows in kl.items()}
    write_cell(folder / "r" / "a", kl, pmass, **calib or {})
    return drawn(folder / "r", **flags)[0]


def words(ax):
    """The texts over and in a panel."""
    return [text.get_text() for text in ax.texts if text.get_text() not in ("", "token\nat risk", "token")]


def kl_axes(figure):
    return [ax for ax in figure.axes if any(text.startswith("α = ") for text in words(ax))]


def strips(figure):
    return [ax for ax in figure.axes if ax not in kl_axes(figure)]


def stretches(ax):
    """Colour, share of the full opacity, and vertices of each stretch of the rollouts' lines."""
    (lines,) = ax.collections
    colours = lines.get_edgecolor()
    opacity = [round(float(colour[3] / colours[:, 3].max()), 3) for colour in colours]
    vertices = [np.round(path.vertices, 5).tolist() for path in lines.get_paths()]
    return [*zip(map(to_hex, colours), opacity, vertices, strict=True)]


def points(ax, marker):
    rows = [line.get_xydata() for line in ax.lines if line.get_marker() == marker]
    return sorted(np.round(row, 5).tolist() for held in rows for row in held)


def dashed(ax):
    return sorted(line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == "--")


def medians(ax):
    """Heights by token of the solid and of the dotted median, -1 where there is none."""
    lines = [line for line in ax.lines if line.get_linestyle() in ("-", ":")]
    return {line.get_linestyle(): np.nan_to_num(line.get_ydata(), nan=-1).tolist() for line in lines}


def badges(artist):
    """The texts in a box, with the colours of the box and of its edge."""
    boxed = [
        (text.get_text(), text.get_bbox_patch()) for text in artist.findobj(Text) if text.get_bbox_patch()
    ]
    return [(text, to_hex(box.get_facecolor()), to_hex(box.get_edgecolor())) for text, box in boxed]


def header(figure):
    return " ".join(text.get_text() for text in figure.texts)


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    for seed, name in enumerate("ab"):
        random_cell(root / name, seed)
    return root


# ------------------------------------------------------------------------------------------- the lines


def test_a_rollout_is_an_alive_and_a_dead_stretch_that_share_the_vertex_of_death(tmp_path):
    kl = [[2.0, 1.0, 4.0, 3.0, 1.0, 2.0, 1.0], [1.0] * 7, [3.0, 1.0, 2.0], [5.0, 5.0], [2.0, 7.0, 6.0]]
    pmass = [[0.9, 0.5, 0.9], [0.95, 0.9, 0.1], [0.9, 0.9, 0.9], [0.2, 0.9, 0.9], [NAN, NAN, NAN]]
    calib = {"forks": [0, 2, 6], "gen_len": {"1": [40, 40, 3, 2, 40]}}
    (ax,) = kl_axes(picture(tmp_path, {"1": kl}, {"1": pmass}, calib, **NATS))
    held = {
        shade: [[y for _, y in part] for colour, _, part in stretches(ax) if colour == shade]
        for shade in (ALIVE, DEAD, GREY)
    }
    assert sorted(held[ALIVE]) == [[1.0] * 7, [2, 1, 4], [3, 1, 2]]
    assert sorted(held[DEAD]) == [[4, 3, 1, 2, 1], [5, 5]]
    assert held[GREY] == [[2, 7, 6]]
    assert points(ax, "x") == [[0, 5], [2, 4], [6, 1]]
    assert points(ax, "|") == [[1, 5], [2, 2]]  # a record that is cut short has no tick


def test_the_alive_mask_alone_decides_where_a_line_changes_its_colour(tmp_path, monkeypatch):
    monkeypatch.setattr(ska, "alive_mask", lambda pmass, forks, threshold, n: np.arange(n) < 4)
    (ax,) = kl_axes(picture(tmp_path, {"1": [[1.0] * 9]}, **NATS))
    assert [(shade, part[0][0]) for shade, _, part in stretches(ax)] == [(ALIVE, 0), (DEAD, 4)]
    assert points(ax, "x") == [[4, 1]] and badges(ax)[0][0] == "1 died"


def test_a_line_is_faint_where_padding_made_it(tmp_path):
    kl = {"1": [[1.0] * 100], "2": [[1.0] * 30], "3": [[1.0] * 9], "4": [[1.0] * 200]}
    figure = picture(
        tmp_path, kl, calib={"window": 100, "gen_len": {"1": [100], "2": [30], "3": [9], "4": [200]}}, roll=21
    )
    expected = [
        [(0, 10), (90, 99)],
        [(0, 10), (20, 29)],
        [],
        [(0, 10)],
    ]  # the last one's end lies beyond the window
    for ax, spans in zip(kl_axes(figure), expected, strict=True):
        faint = [(part[0][0], part[-1][0]) for _, opacity, part in stretches(ax) if opacity == 0.3]
        assert faint == spans
    for flags in ({"roll": 21, "edges": "shrink"}, {"roll": 1}):
        figure, _ = drawn(tmp_path / "r", **flags)
        assert {opacity for ax in kl_axes(figure) for _, opacity, _ in stretches(ax)} == {1}
        assert "faint" not in header(figure)


def test_in_a_crowded_panel_nothing_is_faint_and_lines_are_thinned_but_keep_their_extremes(tmp_path):
    rng = np.random.default_rng(0)
    kl = rng.gamma(2, 1, (251, 900))
    kl[0, 450] = NAN  # a line with a gap stays as it is
    (ax,) = kl_axes(
        picture(tmp_path, {"1": kl.tolist()}, calib={"window": 900, "gen_len": {"1": [900] * 251}}, **NATS)
    )
    assert {opacity for _, opacity, _ in stretches(ax)} == {1}
    parts = [np.array(part) for _, _, part in stretches(ax)]
    whole, *parts = sorted(parts, key=len, reverse=True)
    assert len(whole) == 900 and max(map(len, parts)) < 900 / 2
    for part in parts:
        row = kl[np.abs(kl[:, 0] - part[0, 1]).argmin()]
        np.testing.assert_allclose(part[:, 1], row[part[:, 0].astype(int)], rtol=1e-4, atol=1e-5)
        assert (part[:, 1].max(), part[:, 1].min()) == pytest.approx(
            (row.max(), row.min()), rel=1e-4, abs=1e-5
        )
        assert part[-1, 0] == 899


def test_opacity_falls_with_the_number_of_lines_and_flags_set_it_and_the_width(small, tmp_path):
    kl = {str(n): [[1.0] * 9] * n for n in (8, 40, 1000)}
    figure = picture(tmp_path, kl, **NATS)
    found = [ax.collections[0].get_edgecolor()[0, 3] for ax in kl_axes(figure)]
    assert found == pytest.approx([0.8, 16 / 40, 0.02])
    figure, _ = drawn(tmp_path / "r", **NATS, line_alpha=0.5, line_lw=2.0)
    assert kl_axes(figure)[0].collections[0].get_edgecolor()[0, 3] == pytest.approx(0.5)
    assert kl_axes(figure)[0].collections[0].get_linewidth() == [2.0]


def test_the_ink_of_overlapping_lines_shows_the_true_share_of_the_dead(tmp_path):
    rng = np.random.default_rng(1)
    kl = np.abs(1 + np.cumsum(rng.normal(0, 0.06, (60, 120)), axis=1)).round(4).tolist()
    pmass = {"1": [[0.1]] * 20 + [[1.0]] * 40}
    figure = picture(
        tmp_path, {"1": kl}, pmass, {"forks": [0], "window": 120}, **NATS, survival=False, line_lw=2
    )
    (ax,) = figure.axes
    order = [shade for shade, _, _ in stretches(ax)]
    thirds = [order[start : start + 15].count(DEAD) for start in range(0, 60, 15)]
    assert thirds == [5, 5, 5, 5]  # each fate is spread evenly through the drawing order


def test_the_median_is_dotted_where_fewer_than_half_of_the_lines_have_an_unpadded_value(tmp_path):
    kl = {
        "1": [[1.0] * 10, [2.0] * 10, [3.0] * 6, [4.0] * 4, [5.0] * 6],
        "2": [[1.0] * 6, [1.0] * 6, [1.0] * 3, [1.0] * 3, [NAN] * 6],  # one has no line
        "3": [[1.0] * 6, [2.0] * 6, [NAN] * 6],
    }
    falls, half, two = kl_axes(picture(tmp_path, kl, calib={"window": 10}, **NATS))
    assert medians(falls) == {"-": [3] * 4 + [2.5] * 2 + [-1] * 4, ":": [-1] * 6 + [1.5] * 4}
    assert medians(half) == {"-": [1] * 6, ":": [-1] * 6}  # half of them is not fewer than half
    assert medians(two) == {}  # fewer than three lines have none
    (ax,) = kl_axes(picture(tmp_path, {"1": [[1.0] * 30] * 3}, roll=11))
    assert np.flatnonzero(np.array(medians(ax)["-"]) > 0).tolist() == [*range(5, 25)]


# --------------------------------------------------------------------- marks, references, limits, words


@pytest.mark.parametrize("log", [False, True])
def test_marks_stand_at_their_value_or_inside_of_the_frame_at_its_edge(tmp_path, log):
    kl = [[1.0] * 39 + [end] for end in (1.0, -1e4, 1e3)] * 2 + [[1.0] * 40] * 300
    pmass = [[1.0, 0.1]] * 3 + [[1.0, 1.0]] * 303
    calib = {"gen_len": {"1": [60] * 3 + [40] * 3 + [60] * 300}, "forks": [0, 39], "window": 60}
    (ax,) = kl_axes(picture(tmp_path, {"1": kl}, {"1": pmass}, calib, **NATS, kl_log=log))
    for marker in "x|":
        at_edge, at_value, over = [y for _, y in points(ax, marker)]
        assert at_value == 1
        assert ax.get_ylim()[0] < at_edge < 0.2 and 1.1 < over < ax.get_ylim()[1]


def test_the_dashed_line_says_what_1_is_worth_or_what_the_target_is_also_where_it_is_off_the_scale(tmp_path):
    level, falling = [[1.0] * 1000] * 5, [[3.0] * 4 + [0.01] * 996] * 5
    cases = [
        (level, NATS, [], "target 50: off-scale", "target: α² · 50 nat"),
        (level, NATS | {"kl_log": True}, [50], "target 50", "target: α² · 50 nat"),
        (level, {"roll": 1}, [1], "1 ≈ 1 nats", "1 = p95 of a line's first 20 tokens"),
        (falling, {"roll": 1}, [], "1 ≈ 3 nats: off-scale", "1 = p95 of a line's first 20 tokens"),
    ]
    for kl, flags, levels, said, entry in cases:
        figure = picture(tmp_path, {"1": kl}, calib={"window": 1000, "target_kl": 50.0}, **flags)
        assert dashed(figure.axes[0]) == levels and said in words(figure.axes[0])
        assert entry in legend(figure)


def test_cells_with_different_budgets_have_a_target_each(tmp_path):
    for name, target in (("a", 1.0), ("b", 0.5)):
        kl = {alpha: [[target] * 9] for alpha in ("0", "2")}
        write_cell(tmp_path / name, kl, {alpha: [WELL] for alpha in kl}, target_kl=target)
    figure, _ = drawn(tmp_path, **NATS, kl_log=True)
    control, steered = kl_axes(figure)
    assert dashed(control) == [] and dashed(steered) == [2, 4] and "target 2, 4" in words(steered)
    assert "target: α² · 0.5, 1 nat" in legend(figure)


def test_the_kl_axis_ends_above_the_99th_percentile_of_the_steered_values_in_all_panels(tmp_path):
    rng = np.random.default_rng(5)
    kl = {alpha: rng.gamma(1, level, (6, 40)) for alpha, level in (("0", 50.0), ("1", 1.0), ("2", 2.0))}
    kl["1"][0, :8], kl["2"][1, 3] = -3.0, np.nan
    steered = np.concatenate([kl["1"].ravel(), kl["2"].ravel()])
    figure = picture(tmp_path, {alpha: rows.tolist() for alpha, rows in kl.items()}, **NATS)
    ((bottom, top),) = {ax.get_ylim() for ax in kl_axes(figure)}
    assert top == pytest.approx(1.4 * np.percentile(steered[steered >= 0], 99), rel=1e-5)
    assert -0.1 * top < bottom < 0
    (alone,) = kl_axes(drawn(tmp_path / "r", **NATS, alphas=(0,))[0])
    assert alone.get_ylim()[1] == pytest.approx(1.4 * np.percentile(kl["0"], 99), rel=1e-5)
    tiny = picture(tmp_path / "tiny", {"1": [[1e-5] * 9]}, **NATS)
    assert tiny.axes[0].get_ylim()[1] == pytest.approx(1e-3)


@pytest.mark.parametrize("level", [0.04, 0.3, 2.0, 30.0])
def test_a_logarithmic_axis_has_ticks_in_view_and_holds_every_target(tmp_path, level):
    kl = {alpha: [[level * float(alpha)] * 40] * 4 for alpha in ("0.5", "1")}
    figure = picture(tmp_path, kl, calib={"target_kl": level}, **NATS, kl_log=True)
    low, top = figure.axes[0].get_ylim()
    assert 1.2 * level < top
    ticks = [tick for tick in figure.axes[0].get_yticks() if low <= tick <= top]
    assert 3 <= len(ticks) <= 6
    assert figure.axes[0].get_yscale() == ("symlog" if level > 0.1 else "linear")


def test_words_over_a_panel_say_what_became_of_the_rollouts_and_a_badge_how_many_died(tmp_path):
    """Rollouts of six tokens, forks at 0, 2 and 6: pmass there, tokens recorded, tokens generated."""
    lives, ends, cut, late = (WELL, 6, 6), (WELL, 5, 5), (WELL, 4, 6), ([1, 1, 0.5], 6, 6)
    dies, back, nobody = ([1, 0.5, 0.5], 6, 6), ([1, 0.5, 1], 6, 6), ([NAN] * 3, 6, 6)
    cases = {
        "1": ([lives] * 3, "0 died", None, ""),
        "2": ([dies, back, late, ends, cut], "3 died", DEAD, "1 recovered"),
        "3": ([back, back, dies], "3 died", "#ffffff", "2 recovered"),
        "4": ([back, dies, lives], "2 died", DEAD, "1 recovered"),  # half are not more than half
        "5": ([late, late, ends, cut], "2 died", DEAD, "1 EOS"),
        "6": ([ends, cut, ends], "0 died", None, "2 EOS"),
        "7": ([cut, cut], "0 died", None, "2 cut"),
        "8": ([nobody, nobody], "not measured", None, ""),
        "9": ([nobody, lives, ends], "0 died", None, "1 not measured"),
    }
    kl = {alpha: [[1.0] * row[1] for row in rows] for alpha, (rows, *_) in cases.items()}
    pmass, gen_len = (
        {alpha: [row[k] for row in rows] for alpha, (rows, *_) in cases.items()} for k in (0, 2)
    )
    figure = picture(tmp_path, kl, pmass, {"gen_len": gen_len, "forks": [0, 2, 6], "window": 6}, roll=1)
    for ax, (alpha, (rows, died, face, fate)) in zip(kl_axes(figure), cases.items(), strict=True):
        assert [text for text in words(ax) if "nats" not in text] == [
            text for text in (f"α = {alpha}", died, f"n = {len(rows)}", fate) if text
        ]
        assert badges(ax) == ([(died, face, DEAD)] if face else [])
    assert "hollow box: most that died recovered" in header(figure)
    assert "hollow" not in header(drawn(tmp_path / "r", alphas=(1, 2, 4))[0])


def test_a_panel_without_a_line_says_why(tmp_path):
    kl = {"0": [[0.25] * 9], "1": [[NAN] * 9], "2": [[0.0] * 9], "3": [[1.0] * 9]}
    figure = (picture(tmp_path, kl), drawn(tmp_path / "r", alphas=(0, 1, 2, 3, 5)))[1][0]
    reasons = ["unsteered:\nKL at most\n0.25 nats", "KL not measured", "no scale", None, "no rollouts"]
    for ax, reason in zip(kl_axes(figure), reasons, strict=True):
        assert bool(ax.collections) == (reason is None)
        assert reason is None or words(ax)[-1] == reason
    control, *_ = kl_axes(drawn(tmp_path / "r", **NATS)[0])
    assert len(control.collections) == 1  # in nats the control is drawn


def test_the_page_says_which_model_what_is_drawn_and_how(tmp_path):
    random_cell(tmp_path / "a", alphas=[1.0], model="models--org--the-model/snapshots/4ab9")
    plain = header(drawn(tmp_path, roll=3)[0]).replace("\n", " ")
    assert "the-model: KL(steered || base) per token, orange once pmass_eval fell below 0.8" in plain
    assert (
        "mean_diff; pmass_eval: probability of true or false; mean of 3 tokens, faint where padded" in plain
    )
    shrunk = header(drawn(tmp_path, roll=5, edges="shrink", palette="deep")[0])
    assert "faint" not in shrunk and "orange" not in shrunk
    random_cell(tmp_path / "b", 3, alphas=[1.0], method="pca", model="org/other")
    pooled, by_method = header(drawn(tmp_path)[0]), header(drawn(tmp_path, rows="method", roll=1)[0])
    assert "the-model, other: KL" in pooled and "pooled: mean_diff, pca" in pooled
    assert "mean_diff" not in by_method and "not smoothed" in by_method
    assert all(
        line == line.strip(" ·") for line in [text.get_text() for text in drawn(tmp_path)[0].texts][:-1]
    )


def test_the_legend_holds_only_marks_that_occur_and_at_most_seven(small, tmp_path):
    own = legend(drawn(small, roll=1)[0])
    assert own == [
        "alive: ≥ 0.8 so far",
        "died (×): fell below 0.8",
        "ended by itself (EOS)",
        "median (dotted: few or faint lines)",
        "1 = p95 of a line's first 20 tokens",
        "share that never died (95% interval)",
        "share ≥ 0.8 at that token",
    ]
    quiet = picture(
        tmp_path, {"1": [[1.0] * 40] * 2}, calib={"gen_len": {"1": [40, 40]}}, survival=False, roll=1
    )
    assert legend(quiet) == ["alive: ≥ 0.8 so far", "1 = p95 of a line's first 20 tokens"]
    dead = picture(tmp_path, {"1": [[1.0] * 40] * 2}, {"1": [[0.1] * 3, [NAN] * 3]}, survival=False, roll=1)
    assert legend(dead)[0] == "died (×): fell below 0.8"
    first = picture(tmp_path, {"1": [[9.0] + [0.1] * 99] * 2}, calib={"window": 100}, survival=False)
    assert legend(first)[-1] == "1 = p95 of a line's first 20 tokens (mostly the first)"


def test_a_palette_colours_lines_strips_and_badges_and_leaves_the_badges_legible(small):
    for palette in ("deep", "pastel", "rocket", "viridis"):
        alive, dead = map(to_hex, seaborn.color_palette(palette, 2))
        figure, _ = drawn(small, palette=palette)
        assert {shade for ax in kl_axes(figure)[1:] for shade, _, _ in stretches(ax)} == {alive, dead}
        assert {to_hex(area.get_facecolor()) for area in strips(figure)[-1].collections} >= {alive, dead}
        for text in [text for text in figure.findobj(Text) if text.get_bbox_patch()]:
            grey = [
                np.dot(to_rgb(c), (0.2, 0.7, 0.1))
                for c in (text.get_color(), text.get_bbox_patch().get_facecolor())
            ]
            assert abs(grey[0] - grey[1]) > 0.35


# ------------------------------------------------------------------------------------------ the strips


def span_at(area, x):
    """Lowest and highest point of a polygon at x, 0 and 0 where there is none."""
    (path,) = area.get_paths()
    edges = itertools.pairwise([*path.vertices, path.vertices[0]])
    crossed = [
        a[1] + (b[1] - a[1]) * (x - a[0]) / (b[0] - a[0]) for a, b in edges if (a[0] - x) * (b[0] - x) < 0
    ]
    return (min(crossed), max(crossed)) if crossed else (0, 0)


def test_the_strip_tells_never_died_recovered_and_below_now_apart(tmp_path):
    pmass = [[0.1, 0.9, 0.9]] * 3 + [[0.9, 0.9, 0.1]] + [[0.9, 0.9, 0.9]] * 4
    calib = {"forks": [4, 10, 30], "gen_len": {"1": [40] * 7 + [20]}}
    kl = {"1": [[1.0] * 40] * 7 + [[1.0] * 20]}
    figure, sweep = (picture(tmp_path, kl, {"1": pmass}, calib), drawn(tmp_path / "r"))[1]
    (strip,), curve = strips(figure), sweep.panels[0].survival
    never, recovered, below, interval = strip.collections
    share = [1, 5 / 8, 5 / 8, 5 / 8 * 3 / 4]  # between two forks; the last rollout is followed to 10
    now = [1, 5 / 8, 1, 6 / 7]
    for k, x in enumerate((2, 7, 20)):
        assert span_at(never, x) == pytest.approx((0, share[k]))
        assert span_at(recovered, x) == pytest.approx((share[k], now[k])) or share[k] == now[k]
        assert span_at(below, x) == pytest.approx((now[k], 1)) or now[k] == 1
        upper = curve.high[k - 1] if k else 1
        assert span_at(interval, x) == pytest.approx((curve.low[k], upper))
    step, dots = strip.lines
    assert (step.get_drawstyle(), step.get_linestyle()) == ("steps-post", "-")
    np.testing.assert_allclose(step.get_xydata(), [*zip([0, 4, 10, 30], share, strict=True)])
    assert (dots.get_marker(), dots.get_linestyle(), dots.get_markerfacecolor()) == ("o", ":", "white")
    np.testing.assert_allclose(dots.get_xydata(), [*zip([4, 10, 30], now[1:], strict=True)])


def test_the_numbers_at_risk_end_with_the_last_fork(tmp_path):
    pmass = {"1": [[0.1, 0.9, 0.9], [0.9, 0.9, 0.9], [0.9, 0.9, NAN], [NAN] * 3]}
    figure = picture(tmp_path, {"1": [[1.0] * 40] * 4}, pmass, {"forks": [0, 10, 30]}, rows="cell")
    (strip,) = strips(figure)
    assert "token\nat risk" in [text.get_text() for text in strip.texts]
    labels = [label.get_text().split("\n") for label in strip.get_xticklabels()]
    at_risk = {
        "0": "3",
        "10": "2",
        "20": "1",
        "25": "1",
        "30": "1",
        "40": "–",
    }  # one died at 0, one was followed to 10
    assert (
        len(labels) >= 3
        and labels == [[token, at_risk[token]] for token, _ in labels]
        and labels[-1][1] == "–"
    )


def test_panels_and_strips_in_a_users_own_axes_have_labels_and_the_same_lines(small):
    figure, sweep = drawn(small)
    ax, strip = Figure().subplots(2)
    ska.draw_panel(ax, sweep.panels[-1], sweep.args)
    ska.draw_strip(strip, sweep.panels[-1], sweep.args)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("token", "KL / own first 20")
    assert (strip.get_xlabel(), strip.get_ylabel()) == ("token, number at risk", "share")
    assert stretches(ax) == stretches(kl_axes(figure)[-1])
    assert strip.lines[1].get_xydata().tolist() == strips(figure)[-1].lines[1].get_xydata().tolist()


# ------------------------------------------------------------------------------------------- the page


def lines_of(figure):
    """The alphas over the panels, line by line of the page."""
    axes = sorted(kl_axes(figure), key=lambda ax: (-round(ax.get_position().y0, 4), ax.get_position().x0))
    grouped = itertools.groupby(axes, key=lambda ax: round(ax.get_position().y0, 4))
    return [[words(ax)[0].removeprefix("α = ") for ax in line] for _, line in grouped]


@pytest.mark.parametrize(
    ("n", "ncols", "sizes"),
    [(6, None, [6]), (7, None, [4, 3]), (8, None, [4, 4]), (11, None, [6, 5]), (5, 2, [2, 2, 1])],
)
def test_panels_wrap_in_balanced_lines_with_rows_too(tmp_path, n, ncols, sizes):
    kl = {str(k): [[1.0] * 9] for k in range(n)}
    for mass, name in ((1.0, "pca"), (0.9, "mean")):
        write_cell(tmp_path / name, kl, {alpha: [[mass] * 3] for alpha in kl}, method=name)
    lines = lines_of(drawn(tmp_path, rows="method", ncols=ncols)[0])
    assert [len(line) for line in lines] == sizes * 2
    assert [alpha for line in lines for alpha in line] == [*kl] * 2


def test_rows_have_the_names_of_what_they_hold_and_share_their_axes(tmp_path):
    about = {"run2": ("mean_diff", "x/l", 2), "run10": ("pca|x$y$", "x/m", 10)}
    for k, (name, (method, model, seed)) in enumerate(about.items()):
        random_cell(tmp_path / name, k, [0.0, 1.0], n=4, method=method, model=model, seed=seed)
    rows = {
        "method": ["mean_diff", "pca|x$y$"],
        "model": ["l", "m"],
        "seed": ["seed 2", "seed 10"],
        "cell": [*about],
    }
    for kind, names in rows.items():
        figure, _ = drawn(tmp_path, rows=kind)
        assert [text for ax in kl_axes(figure) for text in words(ax) if text in names] == names
        assert (
            len({ax.get_ylim() for ax in kl_axes(figure)}) == len({ax.get_xlim() for ax in figure.axes}) == 1
        )


def faults_of(figure):
    """Texts that touch another or leave the page."""
    figure.draw_without_rendering()
    texts = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for ax in figure.axes:
        texts += [*ax.texts, ax.title, ax.xaxis.label, ax.yaxis.label, ax._left_title]
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    texts = [text for text in texts if text.get_visible() and text.get_text().strip()]
    boxes = []
    for text in texts:
        badge = text.get_bbox_patch()
        boxes.append(Bbox.union([text.get_window_extent(), *([badge.get_window_extent()] if badge else [])]))
    page = figure.bbox
    outside = [box.x0 < 0 or box.y0 < 0 or box.x1 > page.x1 or box.y1 > page.y1 for box in boxes]
    faults = [
        f"leaves the page: {text.get_text()!r}" for text, out in zip(texts, outside, strict=True) if out
    ]
    for (i, a), (j, b) in itertools.combinations(enumerate(boxes), 2):
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 0.5 and min(a.y1, b.y1) - max(a.y0, b.y0) > 0.5:
            faults.append(f"overlap: {texts[i].get_text()!r} and {texts[j].get_text()!r}")
    return faults


def sweep_of(folder, alphas, n, window, names=("pca",), **flags):
    """A sweep of n rollouts of every fate per panel and name."""
    rng = np.random.default_rng(n)
    for k, name in enumerate(names):
        lengths = np.where(rng.random(n) < 0.2, window // 2, window).tolist()
        kl = {str(a): (1.2**k * abs(a) * rng.gamma(3, 0.5, (n, 30))).tolist() for a in alphas}
        pmass = {str(a): rng.choice([1.0, 0.9, 0.5 if a else 1.0], (n, 3)).tolist() for a in alphas}
        gen_len = {str(a): lengths for a in alphas}
        write_cell(folder / f"cell {k}", kl, pmass, gen_len, [0, 12, 25], window=window, method=name, seed=k)
    return read(folder, **flags)


LONG = ["runs/sweep-of-the-residual-stream/mean_difference_of_prompts", "another-quite-long-name-of-a-method"]
ARRANGEMENTS = [
    ([1.0], 8, 100, {}),
    ([1.0], 2000, 4096, {"names": ["a-name-of-a-method-with-fifty-letters-or-so-in-it"], "rows": "method"}),
    ([-2.0, -1.0, 0.0], 24, 999, {"normalize_kl": False, "rows": "method", "names": LONG}),
    ([-1.0, 0.0, 0.5], 240, 4096, {"survival": False, "normalize_kl": False, "kl_log": True}),
    ([0.0, 0.25], 8, 999, {"normalize_kl": False, "kl_log": True}),
    ([0.25, 0.5, 0.75, 1.0, 1.5], 1000, 512, {"rows": "seed", "names": ["pca", "mean"]}),
    ([float(k) for k in range(8)], 24, 10240, {"ncols": 2}),
    ([k / 4 for k in range(13)], 24, 256, {"rows": "method", "names": LONG}),
]


@pytest.mark.parametrize(("alphas", "n", "window", "flags"), ARRANGEMENTS)
def test_no_text_touches_another_or_leaves_the_page(tmp_path, alphas, n, window, flags):
    sweep = sweep_of(tmp_path, alphas, n, window, **flags)
    assert faults_of(ska.draw(sweep)) == []
    if len(sweep.steered_alphas) > 1:
        assert faults_of(ska.draw_dose(sweep)) == []


def test_over_one_panel_the_head_takes_at_most_a_third_of_the_height(tmp_path):
    figure = ska.draw(sweep_of(tmp_path, [2.0], 24, 256))
    ax, height = figure.axes[0], figure.bbox.height
    figure.draw_without_rendering()
    head = height - max(text.get_window_extent().y1 for text in ax.texts)
    assert head < height / 3 and figure.get_size_inches()[0] == pytest.approx(3.3)


# --------------------------------------------------------------------------------------- the overview


def plotted(ax, colour, style="-"):
    """The points of each line of a colour."""
    lines = [line for line in ax.lines if (line.get_color(), line.get_linestyle()) == (colour, style)]
    return [np.array(line.get_xydata()) for line in lines]


def test_the_overview_shows_the_kl_and_both_shares_of_each_row_with_intervals(tmp_path):
    sweep = sweep_of(tmp_path, [-2.0, -1.0, 0.0, 1.0, 2.0, 3.0], 12, 30, names=["a", "b"], rows="method")
    figure = ska.draw_dose(sweep)
    kl_ax, share_ax = figure.axes
    assert legend(figure)[:2] == ["a", "b"] and kl_ax.get_yscale() == "log"
    assert "m: how much steering before it breaks, by method" in header(figure)
    assert share_ax.get_title("left") == "Share that never died, 95% interval"
    assert all(ax.get_xlim()[0] < -2 and ax.get_xlim()[1] > 3 for ax in figure.axes)
    for name, handle in zip("ab", figure.legends[0].legend_handles, strict=False):
        colour, panels = handle.get_color(), [panel for panel in sweep.facets[name] if panel.alpha]
        negative, positive = ([p for p in panels if (p.alpha > 0) is up] for up in (False, True))
        arms = [negative[::-1], positive]
        kl = sorted(map(tuple, np.vstack(plotted(kl_ax, colour)).tolist()))
        assert kl == [(p.alpha, p.cost["kl_p95"]) for p in panels]
        for arm, held in zip(arms, sorted(plotted(share_ax, colour), key=lambda x: x[0, 0]), strict=True):
            np.testing.assert_allclose(held[:, 1], [p.fates["never_died"].x for p in arm])
            assert np.abs(held[:, 0] - [p.alpha for p in arm]).max() <= 0.1  # a tenth of the smallest step
        for arm, held in zip(
            arms, sorted(plotted(share_ax, colour, ":"), key=lambda x: x[0, 0]), strict=True
        ):
            np.testing.assert_allclose(held[:, 1], [p.fates["above_at_end"] for p in arm])
        bars = [c for c in share_ax.collections if to_hex(c.get_edgecolor()[0]) == to_hex(colour)]
        limits = sorted(segment[:, 1].tolist() for bar in bars for segment in bar.get_segments())
        np.testing.assert_allclose(limits, sorted([*p.fates["never_died"][1:]] for p in panels))
    targets = [line.get_xydata() for line in kl_ax.lines if line.is_dashed()]
    assert [(t[0, 0], t[-1, 0]) for t in targets] == [(-1, -2), (1, 3)]
    for target in targets:
        np.testing.assert_allclose(target[:, 1], target[:, 0] ** 2)


def test_an_open_marker_stands_only_where_the_share_at_the_end_is_another(tmp_path):
    kl = {alpha: [[1.0] * 40] * 4 for alpha in ("1", "2")}
    pmass = {"1": [WELL] * 4, "2": [[0.1, 1, 1]] * 3 + [[0.1] * 3]}
    write_cell(tmp_path / "r" / "a", kl, pmass)
    figure = ska.draw_dose(read(tmp_path / "r"))
    (dotted,) = [
        line for line in figure.axes[1].lines if line.get_linestyle() == ":" and line.get_marker() == "o"
    ]
    assert dotted.get_markevery() == [1] and dotted.get_ydata().tolist() == [1, 0.75]
    assert "open: pmass_eval ≥ 0.8 at the end" in legend(figure)
    kl, dipped = kl | {"0": [[0.0] * 40] * 4}, {"0": [[0.1, 1, 1]] * 4}  # unsteered, so not shown here
    write_cell(tmp_path / "r" / "a", kl, {alpha: [WELL] * 4 for alpha in kl} | dipped)
    assert legend(ska.draw_dose(read(tmp_path / "r"))) == ["α² · 1 nat, as for small steps"]


def test_twelve_rows_differ_in_the_overview_not_by_hue_alone(tmp_path):
    sweep = sweep_of(tmp_path, [1.0, 2.0], 3, 30, names=[f"m{k}" for k in range(12)], rows="method")
    handles = ska.draw_dose(sweep).legends[0].legend_handles[:12]
    assert len({(to_hex(handle.get_color()), handle.get_marker()) for handle in handles}) == 12
    for a, b in itertools.combinations(handles[:6], 2):
        assert a.get_marker() != b.get_marker() and a.get_color() != b.get_color()


@pytest.mark.parametrize("levels", [(1.5, 1.6), (0.001, 1000.0), (1.0, 1.01)])
def test_the_overviews_kl_axis_has_ticks_in_view_whatever_its_range(tmp_path, levels):
    kl = {str(k + 1): [[level] * 9] for k, level in enumerate(levels)}
    write_cell(tmp_path / "a", kl, {alpha: [WELL] for alpha in kl}, target_kl=levels[0])
    kl_ax, _ = ska.draw_dose(read(tmp_path)).axes
    low, high = kl_ax.get_ylim()
    assert 2 <= sum(low <= tick <= high for tick in kl_ax.get_yticks()) <= 6


def test_the_overview_needs_two_steered_alphas(tmp_path):
    write_cell(tmp_path / "a", {"0": [[1.0]], "1": [[1.0]]}, {"0": [WELL], "1": [WELL]})
    with pytest.raises(ska.SweepError, match="at least two steered alphas"):
        ska.draw_dose(read(tmp_path))


def test_infinite_kl_has_no_place_on_the_overview_and_does_no_harm(tmp_path):
    kl = {"1": [[1.0] * 9] * 3, "2": [[math.inf] * 9] * 3}
    write_cell(tmp_path / "a", kl, {alpha: [WELL] * 3 for alpha in kl})
    kl_ax, _ = ska.draw_dose(read(tmp_path)).axes
    assert [
        y for line in kl_ax.lines if not line.is_dashed() for y in line.get_ydata() if math.isfinite(y)
    ] == [1]


# ------------------------------------------------------------------------- the style, and the process


def test_a_users_matplotlibrc_changes_nothing_and_is_left_as_it_was(small):
    hostile = {
        "font.size": 30,
        "axes.grid": True,
        "savefig.bbox": "tight",
        "lines.marker": "D",
        "text.usetex": True,
    }
    plain = drawn(small)[0]._repr_png_()
    with matplotlib.rc_context(hostile):
        before = dict.copy(matplotlib.rcParams)
        assert drawn(small)[0]._repr_png_() == plain
        assert dict.copy(matplotlib.rcParams) == before
    assert Image.open(io.BytesIO(plain)).format == "PNG"


def test_every_word_of_a_figure_is_there_in_the_svg(small, tmp_path):
    sweep = read(small, formats=("svg",), out=tmp_path)
    (svg,) = [path.read_text() for path in ska.write(sweep) if path.name == f"{ska.FIGURE_STEM}.svg"]
    comments = " ".join(re.findall(r"<!-- (.*?) -->", svg))
    assert "α = 2" in comments and "share that never died" in comments
