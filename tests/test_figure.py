"""What is drawn, as data: vertices, colours, titles, limits, reference, strip; and that nothing collides."""

import json
import re
import warnings
from itertools import combinations

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from sweeps import FORKS, drawn, random_cell, table, write_cell

import spaghetti_kl_alive as ska

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lifelines import KaplanMeierFitter

PLAIN = ("--roll", 1, "--calib-on", "raw")


def polylines(ax) -> dict[str, list[list[list[float]]]]:
    """The vertices of an axes' LineCollections, by colour."""
    return {
        to_hex(c.get_edgecolor()[0]): [np.round(path.vertices, 5).tolist() for path in c.get_paths()]
        for c in ax.collections
        if isinstance(c, LineCollection) and len(c.get_paths())
    }


def points(ax, marker: str) -> list[list[float]]:
    return [row for line in ax.lines if line.get_marker() == marker for row in np.round(line.get_xydata(), 5).tolist()]


def words(ax) -> str:
    return " ".join(text.get_text() for text in [*ax.texts, ax._left_title] if text.get_text())


def panels_of(figure) -> list:
    """The KL axes, without the survival strips."""
    return figure.axes[::2]


def test_a_rollout_is_an_alive_and_a_dead_polyline_that_share_the_vertex_of_death(tmp_path, monkeypatch):
    kl = [[2.0, 1.0, 4.0, 3.0, 1.0, 2.0, 1.0], [1.0] * 7, [3.0, 1.0, 2.0], [5.0, 5.0]]
    pmass = [[0.9, 0.5, 0.9], [0.95, 0.9, 0.1], [0.9, 0.9, 0.9], [0.2, 0.9, 0.9]]
    write_cell(tmp_path / "r" / "a", {"1.0": kl}, {"1.0": pmass}, {"1.0": [40, 40, 3, 2]}, forks=[0, 2, 6])
    figure, _, _ = drawn(monkeypatch, "--runs-root", tmp_path / "r", "--out", tmp_path, *PLAIN, "--no-normalize-kl")
    ax = figure.axes[0]
    alive = [[[0, 2], [1, 1], [2, 4]], [[t, 1.0] for t in range(7)], [[0, 3], [1, 1], [2, 2]]]
    dead = [[[2, 4], [3, 3], [4, 1], [5, 2], [6, 1]], [[6, 1.0]], [[0, 5], [1, 5]]]
    assert polylines(ax) == {to_hex(ska.ALIVE): alive, to_hex(ska.DEAD): dead}
    assert points(ax, "x") == [[2, 4], [6, 1], [0, 5]]
    assert points(ax, "|") == [[2, 2], [1, 5]]
    order = {to_hex(c.get_edgecolor()[0]): c.get_zorder() for c in ax.collections}
    assert order[to_hex(ska.ALIVE)] > order[to_hex(ska.DEAD)]
    assert "n = 4 3 died, 1 censored" in words(ax)


def raw_rollouts(folder, alpha: str, threshold: float = 0.8, window: int = 40) -> list[dict]:
    """Length, death and EOS of each rollout, from the raw JSON in the plainest way."""
    kl = json.loads((folder / "trajectory.json").read_text())["per_prompt_per_t_kl"][alpha]
    mass = json.loads((folder / "pmass.json").read_text())
    rows = []
    for curve, row, g in zip(kl, mass["pmass_eval"][alpha], mass["gen_lens_eval"][alpha], strict=True):
        length = min(len(curve), g, window)
        deaths = [s for s, m in zip(mass["fork_points"], row, strict=True) if m < threshold and s < length]
        rows.append({"kl": curve, "length": length, "death": min(deaths, default=None), "eos": g < window})
    return rows


@pytest.fixture
def sweep(tmp_path):
    cells = [random_cell(tmp_path / "sweep" / name, seed) for seed, name in enumerate(("a", "b"))]
    return tmp_path / "sweep", cells


def test_lines_are_the_normalised_kl_and_limits_follow_the_spec(sweep, tmp_path, monkeypatch):
    root, cells = sweep
    figure, _, _ = drawn(monkeypatch, "--runs-root", root, "--out", tmp_path / "o", *PLAIN, "--calib-tokens", 10)
    values = []
    for ax, alpha in zip(panels_of(figure), ("0.0", "1.0", "2.0"), strict=True):
        expected = []
        for rollout in (r for cell in cells for r in raw_rollouts(cell, alpha)):
            scale = np.percentile(rollout["kl"][:10], 95)
            line = [[t, rollout["kl"][t] / scale] for t in range(rollout["length"])] if scale > 1e-8 else []
            values += [y for _, y in line]
            cut = rollout["death"] or 0
            parts = [line[: cut + 1], line[cut:]] if cut else [line]
            expected += [part for part in parts if part]
        held = [part for parts in polylines(ax).values() for part in parts]
        assert len(held) == len(expected)
        for part, wanted in zip(sorted(held, key=str), sorted(expected, key=str), strict=True):
            np.testing.assert_allclose(part, wanted, rtol=1e-4, atol=2e-5)
        assert ax.get_xlim() == (0, 40)
        assert [line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == "--"] == [1]
    tops = {ax.get_ylim() for ax in panels_of(figure)}
    assert len(tops) == 1
    bottom, top = tops.pop()
    assert top == pytest.approx(1.4 * np.percentile(values, 99), rel=1e-5)
    assert -0.1 * top < bottom < 0


def test_titles_table_and_raw_counts_agree(sweep, tmp_path, monkeypatch):
    root, cells = sweep
    figure, _, _ = drawn(monkeypatch, "--runs-root", root, "--out", tmp_path / "o")
    rows = table(tmp_path / "o")
    assert [row["alpha"] for row in rows] == ["0", "1", "2"]
    for ax, row, alpha in zip(panels_of(figure), rows, ("0.0", "1.0", "2.0"), strict=True):
        raw = [r for cell in cells for r in raw_rollouts(cell, alpha)]
        died = [r["death"] for r in raw if r["death"] is not None]
        censored = sum(r["eos"] and r["death"] is None for r in raw)
        titled = re.search(r"n = (\d+) (\d+) died, (\d+) censored", words(ax)).groups()
        assert titled == (row["n"], row["n_died"], row["n_censored"])
        assert list(map(int, titled)) == [len(raw), len(died), censored]
        assert row["median_death"] == (f"{np.median(died):g}" if died else "none")
        assert int(row["at_risk_end"]) == len(raw) - len(died) - censored
        assert int(row["no_scale"]) == (len(raw) if alpha == "0.0" else 0)


def test_strip_is_the_survival_curve_with_the_numbers_at_risk(sweep, tmp_path, monkeypatch):
    root, cells = sweep
    figure, _, _ = drawn(monkeypatch, "--runs-root", root, "--out", tmp_path / "o")
    rows = table(tmp_path / "o")
    for strip, row, alpha in zip(figure.axes[1::2], rows, ("0.0", "1.0", "2.0"), strict=True):
        raw = [r for cell in cells for r in raw_rollouts(cell, alpha)]
        duration = [r["length"] if r["death"] is None else r["death"] for r in raw]
        died = [r["death"] is not None for r in raw]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fitter = KaplanMeierFitter().fit(duration, died)
        x, y = strip.lines[0].get_data()
        for t in range(40):
            assert y[np.searchsorted(x, t, side="right") - 1] == pytest.approx(fitter.predict(t))
        assert x[-1] == max(r["length"] for r in raw)
        labels = [label.get_text().split("\n") for label in strip.get_xticklabels()]
        assert len(labels) >= 3
        for token, at_risk in labels:
            assert int(at_risk) == sum(d >= int(token) for d in duration)
        assert float(row["S_end"]) == pytest.approx(fitter.predict(40), abs=5e-4)
        if 0 < fitter.predict(40) < 1:
            low, high = fitter.confidence_interval_.iloc[-1]
            assert row["S_end_95ci"] == f"[{low:.3f}, {high:.3f}]"
        else:
            assert row["S_end_95ci"] == "–"


def test_median_is_dotted_where_fewer_than_half_remain(tmp_path, monkeypatch):
    kl = [[1.0] * 10, [2.0] * 10, [3.0] * 6, [4.0] * 4]
    write_cell(tmp_path / "r" / "a", {"1": kl}, {"1": [[1, 1, 1]] * 4}, {"1": [10, 10, 6, 4]}, window=10)
    write_cell(tmp_path / "r" / "b", {"1": [[5.0] * 6]}, {"1": [[1, 1, 1]]}, {"1": [6]}, window=10)
    figure, _, _ = drawn(monkeypatch, "--runs-root", tmp_path / "r", "--out", tmp_path, *PLAIN, "--no-normalize-kl")
    solid, dotted = ([line for line in figure.axes[0].lines if line.get_linestyle() == style] for style in "-:")
    solid, dotted = (np.where(np.isnan(line[0].get_ydata()), -1, line[0].get_ydata()) for line in (solid, dotted))
    assert solid.tolist() == [3] * 4 + [2.5] * 2 + [-1] * 4
    assert dotted.tolist() == [-1] * 6 + [1.5] * 4


def test_alpha_0_counts_like_any_other_panel_and_says_why_it_has_no_line(tmp_path, monkeypatch):
    kl = {"0.0": [[0.0] * 40, [0.0] * 9, [0.0] * 40]}
    write_cell(tmp_path / "r" / "a", kl, {"0.0": [[1, 1, 0.3], [1, 1, 1], [1, 1, 1]]}, {"0.0": [40, 9, 40]})
    figure, _, _ = drawn(monkeypatch, "--runs-root", tmp_path / "r", "--out", tmp_path)
    assert "KL = 0: no scale" in words(figure.axes[0])
    assert "n = 3 1 died, 1 censored" in words(figure.axes[0])
    assert polylines(figure.axes[0]) == {}
    assert figure.axes[1].lines[0].get_ydata().tolist() == [1, 0.5, 0.5]
    figure, _, _ = drawn(monkeypatch, "--runs-root", tmp_path / "r", "--out", tmp_path, "--no-normalize-kl")
    assert sum(map(len, polylines(figure.axes[0]).values())) == 4


@pytest.mark.parametrize(
    ("kl", "reason"),
    [
        ([[1e-9] * 9], "KL ≤ 1e-8: no scale"),
        ([[float("nan")] * 9], "no finite KL"),
        ([[0.0] * 39 + [5.0]], "no scale"),
        ([[]], "rollouts of 0 tokens"),
        ([], "no rollouts at α = 1"),
    ],
)
def test_a_panel_without_a_line_says_why(tmp_path, monkeypatch, kl, reason):
    write_cell(tmp_path / "r" / "a", {"1.0": kl}, {"1.0": [[1, 1, 1]] * len(kl)}, {"1.0": [40] * len(kl)})
    figure, _, _ = drawn(monkeypatch, "--runs-root", tmp_path / "r", "--out", tmp_path, "--roll", 1)
    assert reason in words(figure.axes[0])
    assert table(tmp_path)[0]["n"] == str(len(kl))


def test_a_gap_breaks_the_line_and_its_death_mark_stands_at_the_nearest_value(tmp_path, monkeypatch):
    kl = [[2.0, float("inf"), float("nan"), 4.0, 2.0]]
    write_cell(tmp_path / "r" / "a", {"1": kl}, {"1": [[1, 0]]}, {"1": [40]}, forks=[0, 2])
    figure, _, result = drawn(
        monkeypatch, "--runs-root", tmp_path / "r", "--out", tmp_path, *PLAIN, "--no-normalize-kl"
    )
    alive, dead = (np.array(polylines(figure.axes[0])[to_hex(colour)][0]) for colour in (ska.ALIVE, ska.DEAD))
    assert np.array_equal(alive, [[0, 2], [1, np.nan], [2, np.nan]], equal_nan=True)
    assert np.array_equal(dead, [[2, np.nan], [3, 4], [4, 2]], equal_nan=True)
    assert points(figure.axes[0], "x") == [[2, 4]]
    assert "2 observed tokens have KL that is not finite" in result.err


def test_references_are_budgets_without_normalisation_and_off_scale_ones_are_written(tmp_path, monkeypatch):
    for name, target in (("a", 1.0), ("b", 0.5)):
        random_cell(tmp_path / "r" / name, seed=ord(name), alphas=[1.0, 4.0], target_kl=target)
    figure, _, _ = drawn(
        monkeypatch, "--runs-root", tmp_path / "r", "--out", tmp_path, "--no-normalize-kl", "--alphas", 1
    )
    (ax,) = panels_of(figure)
    assert [line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == "--"] == [0.5, 1]
    random_cell(tmp_path / "low" / "a", alphas=[1.0], target_kl=50.0)
    figure, _, _ = drawn(monkeypatch, "--runs-root", tmp_path / "low", "--out", tmp_path, "--no-normalize-kl")
    assert "reference 50 off-scale" in words(figure.axes[0])


@pytest.mark.parametrize(("n", "opacity"), [(4, 0.7), (20, 0.4), (100, 0.2)])
def test_lines_fade_with_their_number_and_the_legend_does_not(tmp_path, monkeypatch, n, opacity):
    random_cell(tmp_path / "r" / "a", n=n, alphas=[1.0])
    figure, _, _ = drawn(monkeypatch, "--runs-root", tmp_path / "r", "--out", tmp_path)
    assert {c.get_alpha() for c in figure.axes[0].collections} == {opacity}
    assert {handle.get_alpha() for handle in figure.legends[0].legend_handles} == {None}
    figure, _, _ = drawn(monkeypatch, "--runs-root", tmp_path / "r", "--out", tmp_path, "--line-alpha", 0.9)
    assert {c.get_alpha() for c in figure.axes[0].collections} == {0.9}


def test_token_axis_ends_with_the_longest_rollout_within_20_tokens_and_the_window(tmp_path, monkeypatch):
    for length, right in ((5, 20), (100, 102), (200, 200)):
        root = tmp_path / str(length)
        write_cell(root / "a", {"1": [[1.0] * length]}, {"1": [[1, 1, 1]]}, {"1": [length]}, window=200)
        figure, _, _ = drawn(monkeypatch, "--runs-root", root, "--out", tmp_path)
        assert {ax.get_xlim() for ax in figure.axes} == {(0, right)}


def test_log_axis_is_linear_below_a_tenth(sweep, tmp_path, monkeypatch):
    figure, _, _ = drawn(monkeypatch, "--runs-root", sweep[0], "--out", tmp_path / "o", "--kl-log")
    assert {ax.get_yscale() for ax in panels_of(figure)} == {"symlog"}
    assert figure.axes[0].yaxis.get_transform().linthresh == 0.1


def test_rows_give_each_method_its_own_panels_and_its_own_control(tmp_path, monkeypatch):
    random_cell(tmp_path / "r" / "a", seed=0)
    random_cell(tmp_path / "r" / "b", seed=0, method="pca|x$y")
    out = tmp_path / "o"
    figure, rows, _ = drawn(monkeypatch, "--runs-root", tmp_path / "r", "--out", out, "--rows", "method")
    assert [[panel.n for panel in row] for row in rows] == [[6] * 3] * 2
    text = words(figure.axes[0]) + words(figure.axes[6])
    assert "method: mean_diff" in text and "method: pca|x$y" in text
    assert (out / ska.TABLE).read_text().count("pca\\|x$y") == 3
    figure, _, result = drawn(monkeypatch, "--runs-root", tmp_path / "r", "--out", out, "--no-survival")
    assert len(figure.axes) == 3
    assert "`b` is an exact copy of `a` (18 rollouts); left out" in result.err
    assert "pooled" not in result.err
    random_cell(tmp_path / "r" / "c", seed=1, method="pca")
    _, _, result = drawn(monkeypatch, "--runs-root", tmp_path / "r", "--out", out)
    assert "2 methods pooled: mean_diff, pca (--rows method separates them)" in result.err


LAYOUTS = [
    (1, 1, ()),
    (2, 1, ()),
    (3, 1, ()),
    (5, 1, ()),
    (8, 1, ()),
    (8, 3, ("--rows", "method")),
    (1, 3, ("--rows", "cell")),
]


@pytest.mark.parametrize("flags", [(), ("--no-survival",), ("--kl-log", "--no-normalize-kl")])
@pytest.mark.parametrize(("n_alphas", "n_cells", "rows"), LAYOUTS)
def test_nothing_overlaps_and_nothing_is_cut_off(tmp_path, monkeypatch, n_alphas, n_cells, rows, flags):
    alphas = [0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0][:n_alphas]
    for i in range(n_cells):
        random_cell(tmp_path / "r" / f"cell_{i}", seed=i, n=40, alphas=alphas, method=f"method_{i}")
    figure, _, _ = drawn(monkeypatch, "--runs-root", tmp_path / "r", "--out", tmp_path, *rows, *flags)
    with ska.styled():
        figure.draw_without_rendering()
    texts = [text for ax in figure.axes for text in (*ax.texts, ax._left_title, ax.yaxis.label)]
    for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)):
        low, high = axis.get_view_interval()
        texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    shown = [text for text in texts if text.get_text().strip() and text.get_visible()]
    assert not any("$" in text.get_text() for text in shown)
    boxes = [(text.get_text(), text.get_window_extent()) for text in shown]
    boxes.append(("legend", figure.legends[0].get_window_extent()))
    for name, box in boxes:
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert inside, f"{name} is cut off"
    for (name, box), (other, second) in combinations(boxes, 2):
        overlap = min(box.x1, second.x1) - max(box.x0, second.x0), min(box.y1, second.y1) - max(box.y0, second.y0)
        assert min(overlap) < 1, f"{name!r} overlaps {other!r}"
    for ax in figure.axes:
        assert ax.bbox.y1 <= boxes[-1][1].y0, "the legend covers data"


def test_every_fork_of_the_test_cells_lies_in_their_window():
    assert max(FORKS) < 40
