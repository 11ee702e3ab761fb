"""Each definition against an oracle that is written another way."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import beta_product, lifelines_survival, smoothed
from sweeps import write_cell

import spaghetti_kl_alive as ska

LEVELS = [0.0, 0.5, 0.79, 0.8, 0.81, 1.0, math.nan]  # pmass, on a grid that holds the threshold itself
KL = st.lists(st.one_of(st.floats(0, 20), st.sampled_from([math.nan, math.inf, -math.inf])), max_size=60)
EDGES = ("pad", "shrink")


# ---------------------------------------------------------------------------- how a rollout ended


@given(
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from(LEVELS)), max_size=8),
    st.sampled_from([0.01, 0.8, 1.0]),
    st.integers(0, 30),
)
def test_alive_mask_is_the_double_loop_over_tokens_and_forks(measured, threshold, n_tokens):
    expected = []
    for t in range(n_tokens):
        alive = True
        for s, mass in measured:
            if s <= t and mass < threshold:
                alive = False
        expected.append(alive)
    forks = np.array([s for s, _ in measured], dtype=int)
    pmass = np.array([mass for _, mass in measured], dtype=float)
    assert ska.alive_mask(pmass, forks, threshold, n_tokens).tolist() == expected


def fate_by_loop(measured: Sequence[tuple[int, float]], n_tokens: int, threshold: float, ended: bool) -> tuple:
    """A fork at a time, in the order of the tokens: end, death, recovered, followed."""
    death = followed = None
    recovered = False
    for s, mass in measured:
        if s > n_tokens or math.isnan(mass):
            continue
        if death is not None:
            recovered = recovered or mass >= threshold
        elif mass < threshold:
            death = followed = s
        else:
            followed = s
    if death is not None:
        return ("died" if death < n_tokens else "died_last"), death, recovered, followed
    return ("censored" if ended else "alive"), None, False, followed


@settings(max_examples=300)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.sampled_from(LEVELS)), max_size=6, unique_by=lambda fork: fork[0]),
    st.integers(0, 12),
    st.sampled_from([0.5, 0.8, 1.0]),
    st.booleans(),
)
@example([(0, 1.0), (5, 0.5), (9, 0.8)], 9, 0.8, False)  # died, and back at the fork after the last token
@example([(0, 1.0), (5, 0.5), (9, 0.8)], 8, 0.8, False)  # back only after what was observed
@example([(0, 1.0), (9, 0.5)], 9, 0.8, True)  # died at the last token
@example([(0, 0.5), (4, 1.0)], 0, 0.8, True)  # nothing generated
def test_fate_is_the_loop_over_the_forks(measured, n_tokens, threshold, ended):
    measured = sorted(measured)
    forks = np.array([s for s, _ in measured], dtype=int)
    pmass = np.array([mass for _, mass in measured], dtype=float)
    expected = fate_by_loop(measured, n_tokens, threshold, ended)
    assert tuple(ska.fate(pmass, forks, n_tokens, threshold, ended)) == expected


def read_cell(folder: Path, **flags: object) -> ska.Sweep:
    return ska.read(ska.Args(runs_root=folder, **flags))


@settings(max_examples=40)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 50), st.integers(0, 50), st.tuples(*4 * [st.sampled_from(LEVELS)])),
        min_size=1,
        max_size=8,
    ),
    window=st.integers(1, 50),
)
@example([(9, 10, (1, 1, 1, 1)), (10, 10, (1, 0, 1, 1)), (9, 10, (1, 0, 1, 1)), (50, 50, (1, 1, 1, 1))], 50)
@example([(39, 40, (1, 1, 0, 1)), (40, 40, (1, 1, 0, 1)), (41, 50, (1, 1, 1, 0)), (50, 45, (1, 1, 1, 0))], 40)
def test_every_rollout_ends_in_exactly_one_of_four_ways(tmp_path_factory, rows, window):
    """Recorded tokens, generated tokens and pmass of each rollout, also where the record is short of the rollout."""
    forks = [0, 10, 40, 50]
    folder = tmp_path_factory.mktemp("ends")
    kl = {"1.0": [length * [0.1] for length, _, _ in rows]}
    pmass = {"1.0": [mass for _, _, mass in rows]}
    write_cell(folder / "cell", kl, pmass, {"1.0": [g for _, g, _ in rows]}, forks, window=window)
    (panel,) = read_cell(folder).panels
    ends = [panel.ends[end] for end in ("died", "died_last", "censored", "alive")]
    assert sum(ends) == panel.n == len(rows)
    assert panel.n_deaths == ends[0] + ends[1]
    for (length, g, mass), rollout in zip(rows, panel.rollouts, strict=True):
        n_tokens = min(length, g, window)
        ended = g < window or length < min(g, window)
        assert len(rollout.kl) == n_tokens
        assert tuple(rollout.fate) == fate_by_loop(list(zip(forks, mass, strict=True)), n_tokens, 0.8, ended)
        assert rollout.cut == (length < min(g, window))
        assert rollout.eos == (g < window and length >= g)


# ------------------------------------------------------------------------- the line and its scale


@settings(max_examples=200)
@given(KL, st.integers(1, 80), st.sampled_from(EDGES))
@example([], 3, "pad")
@example([], 3, "shrink")
@example([1.0, 2.0, 4.0], 3, "pad")
@example([1.0, 2.0, 4.0], 4, "pad")
@example([1.0, 2.0, 4.0], 1000, "shrink")
@example([math.inf, 1.0, math.nan, math.nan, math.nan, 2.0], 3, "pad")
def test_rolling_mean_is_the_per_token_loop(kl, roll, edges):
    result = ska.rolling_mean(np.array(kl, dtype=float), roll, edges)
    np.testing.assert_allclose(result, smoothed(kl, roll, edges), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("roll", [1, 2, 7, 64, 65, 199, 200])
def test_finite_padded_rolling_mean_is_the_plain_convolution(roll):
    kl = np.random.default_rng(roll).gamma(1, 1, 200)
    padded = np.concatenate([np.repeat(kl[0], roll // 2), kl, np.repeat(kl[-1], roll // 2)])
    plain = np.convolve(padded, np.full(roll, 1 / roll), mode="valid")[: len(kl)]
    np.testing.assert_allclose(ska.rolling_mean(kl, roll, "pad"), plain, rtol=1e-12)


def test_padded_rolling_mean_leaves_kl_shorter_than_the_roll_as_it_is():
    kl = np.array([3.0, math.inf, 1.0, 7.0])
    np.testing.assert_array_equal(ska.rolling_mean(kl, 5, "pad"), [3, math.nan, 1, 7])
    np.testing.assert_array_equal(ska.rolling_mean(kl[2:], 3, "pad"), [1, 7])


@pytest.mark.parametrize("edges", EDGES)
def test_rolling_mean_forgets_the_greatest_kl_outside_its_window(edges):
    kl = np.r_[ska.MAX_KL, np.full(10_000, 0.1)]
    np.testing.assert_allclose(ska.rolling_mean(kl, 5, edges)[3:], 0.1, atol=1e-6)


@given(KL)
def test_p95_is_numpy_linear_percentile_of_the_finite_values(kl):
    finite = [value for value in kl if math.isfinite(value)]
    expected = np.percentile(finite, 95, method="linear") if finite else math.nan
    assert ska.p95(np.array(kl, dtype=float)) == pytest.approx(expected, rel=1e-12, nan_ok=True)


def lines_of(folder: Path, kl: Sequence[Sequence[float]], lengths: Sequence[int], **flags: object) -> list[ska.Rollout]:
    """What is read of such rollouts, all measured to be alive."""
    alive = {"1.0": [[1.0, 1.0, 1.0] for _ in kl]}
    window = flags.pop("window", 40)
    write_cell(folder / "cell", {"1.0": kl}, alive, {"1.0": lengths}, window=window)
    return read_cell(folder, **flags).rollouts


@settings(max_examples=40)
@given(
    kl=st.lists(st.one_of(st.floats(0.125, 20), st.just(math.nan), st.just(math.inf)), min_size=1, max_size=60),
    calib_tokens=st.integers(1, 30),
    calib_on=st.sampled_from(["smoothed", "raw"]),
    edges=st.sampled_from(EDGES),
    normalize_kl=st.booleans(),
    window=st.sampled_from([3, 10, 100]),
)
@example([1.0, 2.0, 4.0, 8.0, 16.0], 5, "smoothed", "pad", True, 3)  # both see generated tokens beyond the window
def test_scale_is_the_95th_percentile_of_the_head_and_the_line_is_in_its_units(
    tmp_path_factory, kl, calib_tokens, calib_on, edges, normalize_kl, window
):
    flags = {"calib_tokens": calib_tokens, "calib_on": calib_on, "edges": edges, "normalize_kl": normalize_kl}
    folder = tmp_path_factory.mktemp("scale")
    (rollout,) = lines_of(folder, [kl], [len(kl)], roll=5, window=window, **flags)
    smooth = smoothed(kl, 5, edges)
    head = [value for value in (kl if calib_on == "raw" else smooth)[:calib_tokens] if math.isfinite(value)]
    scale = np.percentile(head, 95) if head else math.nan
    unit = scale if normalize_kl else 1
    assert rollout.scale == pytest.approx(scale, rel=1e-9, nan_ok=True)
    drawn = np.array(smooth[:window]) / unit if math.isfinite(unit) else []
    np.testing.assert_allclose(rollout.line, drawn, rtol=1e-6)


def test_a_rollout_is_drawn_where_any_of_its_line_is_there(tmp_path):
    kl = [[math.nan, 1.0], [1.0, 1.0], [math.nan, math.nan], [0.0, 0.0], []]
    lines_of(tmp_path, kl, [2, 2, 2, 2, 0])
    ((normalised,), (in_nats,)) = (read_cell(tmp_path, roll=1, normalize_kl=by).panels for by in (True, False))
    assert [r.prompt for r in normalised.drawn] == [0, 1]
    assert [r.prompt for r in in_nats.drawn] == [0, 1, 3]


@pytest.mark.parametrize(("kl", "has_one"), [(1e-8, False), (1.01e-8, True), (0.0, False), (-1.0, False)])
def test_a_scale_of_at_most_1e_8_nats_is_none(tmp_path, kl, has_one):
    normalised, *_ = lines_of(tmp_path / "a", [20 * [kl]], [20], roll=1)
    in_nats, *_ = lines_of(tmp_path / "b", [20 * [kl]], [20], roll=1, normalize_kl=False)
    for rollout in (normalised, in_nats):
        assert rollout.scale == (kl if has_one else pytest.approx(math.nan, nan_ok=True))
    np.testing.assert_allclose(normalised.line, 20 * [1.0] if has_one else [])
    np.testing.assert_allclose(in_nats.line, 20 * [kl], rtol=1e-6)


def test_kl_of_more_than_a_million_nats_of_either_sign_is_not_finite(tmp_path):
    kl = [1.0, 1e6, 1.00001e6, -1.00001e6, -1e6, 1.0]
    (rollout,) = lines_of(tmp_path, [kl], [6], roll=1, normalize_kl=False)
    np.testing.assert_array_equal(rollout.line, [1, 1e6, math.nan, math.nan, -1e6, 1])
    np.testing.assert_array_equal(rollout.kl, rollout.line)


PADDING = {"NaN": math.nan, "null": None, "infinite": math.inf, "loud": 1000.0, "zero": 0.0}


@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize("padding", PADDING)
def test_a_rollout_of_constant_kl_1_followed_by_padding_is_1_to_its_end(tmp_path, padding, edges):
    (rollout,) = lines_of(tmp_path, [30 * [1.0] + 10 * [PADDING[padding]]], [30], roll=9, edges=edges)
    assert len(rollout.kl) == 30
    assert rollout.scale == pytest.approx(1, rel=1e-12)
    np.testing.assert_allclose(rollout.line, 30 * [1.0], rtol=1e-6)


@pytest.mark.parametrize("flags", [{}, {"edges": "shrink"}, {"calib_on": "raw"}, {"normalize_kl": False}, {"roll": 9}])
def test_kl_beyond_the_rollouts_length_changes_no_byte(tmp_path, flags):
    rng = np.random.default_rng(0)
    lengths = [0, 1, 2, 8, 9, 15, 39, 40]
    kl = [rng.gamma(2, 0.5, g).tolist() for g in lengths]
    pmass = {"2.0": rng.choice([0.7, 0.9], (len(kl), 3)).tolist()}
    texts = []
    for name, padding in {"none": None, **PADDING}.items():
        padded = [row + (0 if name == "none" else 45 - len(row)) * [padding] for row in kl]
        write_cell(tmp_path / name / "sweep" / "cell", {"2.0": padded}, pmass, {"2.0": lengths})
        sweep = read_cell(tmp_path / name / "sweep", **{"roll": 5} | flags)
        lines = [(r.line.tolist(), r.scale, r.kl.tolist()) for r in sweep.rollouts]
        texts.append([json.dumps(lines), ska.summary_text(sweep), ska.rollouts_csv(sweep.rollouts)])
    assert all(text == texts[0] for text in texts[1:])


# -------------------------------------------------------------------------------------- survival


def survival(lives: Sequence[tuple[int, bool]], forks: Sequence[int], weight: float = 1.0) -> ska.Survival:
    followed = np.array([t for t, _ in lives], dtype=int)
    died = np.array([dead for _, dead in lives], dtype=bool)
    return ska.kaplan_meier(followed, died, np.array(forks, dtype=int), weight)


LIVES = st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=1, max_size=40)


@settings(max_examples=60)
@given(LIVES, st.sets(st.integers(0, 15), max_size=4))
def test_survival_at_each_fork_is_that_of_lifelines(lives, more_forks):
    forks = sorted({t for t, _ in lives} | more_forks)
    curve = survival(lives, forks)
    assert curve.forks.tolist() == forks
    assert curve.s == pytest.approx(lifelines_survival(lives, forks), abs=1e-12)
    assert sorted(curve.followed.tolist()) == sorted(t for t, _ in lives)


@settings(max_examples=40)
@given(LIVES, st.sampled_from([1.0, 0.5, 1 / 3]))
def test_interval_is_the_product_of_betas_step_by_step(lives, weight):
    forks = sorted({t for t, _ in lives})
    curve = survival(lives, forks, weight)
    for k in {0, len(forks) // 2, len(forks) - 1}:
        assert (curve.low[k], curve.high[k]) == pytest.approx(beta_product(lives, forks[: k + 1], weight), abs=1e-4)
        assert 0 <= curve.low[k] <= curve.s[k] + 1e-4
        assert curve.s[k] - 1e-4 <= curve.high[k] <= 1


def test_interval_is_the_published_one_of_four_deaths_one_by_one():
    """From the vignette of R's bpcp."""
    curve = survival([(3, True), (7, True), (8, True), (14, True)], [3, 7, 8, 14])
    assert curve.s == pytest.approx([0.75, 0.5, 0.25, 0], abs=1e-12)
    assert curve.low == pytest.approx([0.194120450, 0.067585986, 0.006309463, 0], abs=1e-4)
    assert curve.high == pytest.approx([0.9936905, 0.9324140, 0.8058796, 0.6023646], abs=1e-4)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 24, 100, 500, 2000])
def test_interval_without_censoring_is_that_of_clopper_and_pearson(n):
    from scipy import stats

    for deaths in sorted({0, 1, 2, n // 3, n // 2, n - 1, n} & {*range(n + 1)}):
        lives = [(5, True)] * deaths + [(20, False)] * (n - deaths)
        curve = survival(lives, [0, 5, 20])
        left = n - deaths
        low = stats.beta.ppf(0.025, left, deaths + 1) if left else 0
        high = stats.beta.ppf(0.975, left + 1, deaths) if deaths else 1
        assert curve.s[-1] == pytest.approx(left / n, abs=1e-12)
        assert (curve.low[-1], curve.high[-1]) == pytest.approx((low, high), abs=1e-4)
        assert (curve.low[0], curve.high[0]) == pytest.approx((0.025 ** (1 / n), 1), abs=1e-4)


def test_interval_without_censoring_is_that_of_clopper_and_pearson_however_many_steps_there_are():
    from scipy import stats

    n = 200
    curve = survival([(t, True) for t in range(n)], range(n))
    left = np.arange(n - 1, -1, -1)
    with np.errstate(invalid="ignore"):
        low = np.where(left > 0, stats.beta.ppf(0.025, left, n - left + 1), 0)
    np.testing.assert_allclose(curve.low, low, atol=1e-4)
    np.testing.assert_allclose(curve.high, stats.beta.ppf(0.975, left + 1, n - left), atol=1e-4)


def test_interval_where_all_or_none_of_eight_live():
    alive, dead = survival(8 * [(20, False)], [0, 20]), survival(8 * [(0, True)], [0, 20])
    assert [round(float(x), 3) for x in (alive.s[-1], alive.low[-1], alive.high[-1])] == [1, 0.631, 1]
    assert [round(float(x), 3) for x in (dead.s[-1], dead.low[-1], dead.high[-1])] == [0, 0, 0.369]


def test_interval_at_s_1_counts_those_at_risk_at_that_fork():
    curve = survival([(20, False)] * 2 + [(5, False)] * 6, [0, 5, 20])
    assert curve.s.tolist() == [1, 1, 1]
    assert curve.low == pytest.approx([0.025 ** (1 / 8), 0.025 ** (1 / 8), 0.025 ** (1 / 2)], abs=1e-4)
    assert curve.high.tolist() == [1, 1, 1]


def test_lower_limit_is_zero_where_nobody_is_at_risk_any_more():
    curve = survival([(5, True), (5, False), (5, False)], [0, 5, 20])
    assert curve.s == pytest.approx([1, 2 / 3, 2 / 3])
    assert curve.low[2] == 0 < curve.low[1]
    assert curve.high[2] == curve.high[1]


def test_weight_widens_the_interval_and_leaves_survival_as_it_is():
    lives = [(3, True), (7, False), (8, True), (8, True), (14, False), (20, True), (20, False), (20, False)]
    forks = [0, 3, 7, 8, 14, 20]
    whole, half = survival(2 * lives, forks), survival(2 * lives, forks, 0.5)
    once = survival(lives, forks)
    np.testing.assert_array_equal(half.s, whole.s)
    np.testing.assert_allclose([half.low, half.high], [once.low, once.high], atol=1e-12)  # each counted twice, by half
    assert np.all(half.low < whole.low)
    assert np.all(half.high[1:] > whole.high[1:])


def test_survival_of_nobody_is_empty():
    assert [len(column) for column in survival([], [])] == [0, 0, 0, 0, 0]


@pytest.mark.parametrize("weight", [0.05, 0.3, 1.0, 3.0, 100.0])
def test_beta_quantile_is_scipys_for_the_limits_of_any_share(weight):
    from scipy import stats

    left, deaths = (weight * np.array(count) for count in ([1, 1, 3, 9, 10, 40], [40, 1, 10, 3, 1, 1]))
    for q, a, b in ((0.025, left, deaths + 1), (0.975, left + 1, deaths)):
        mean, variance = stats.beta.mean(a, b), stats.beta.var(a, b)
        result = ska.beta_quantile(q, mean, variance + mean**2)
        np.testing.assert_allclose(result, stats.beta.ppf(q, a, b), rtol=0, atol=1e-4)


def test_beta_quantile_of_a_point_is_the_point():
    assert ska.beta_quantile(0.025, np.array([0.0, 1.0, 0.3]), np.array([0.0, 1.0, 0.09])).tolist() == [0, 1, 0.3]
    assert ska.beta_quantile(0.975, np.array([]), np.array([])).tolist() == []


@given(st.lists(st.integers(0, 12), max_size=20), st.lists(st.integers(0, 15), max_size=5))
def test_at_risk_is_the_count_of_those_followed_as_far_or_farther(followed, tokens):
    expected = [len([t for t in followed if t >= token]) for token in tokens]
    assert ska.at_risk(np.array(followed, dtype=int), tokens).tolist() == expected


# ------------------------------------------------------------------------------ what is drawn


@given(st.lists(st.lists(st.one_of(st.floats(0, 9, width=32), st.just(math.nan)), min_size=1, max_size=9), min_size=1))
def test_running_median_is_the_median_of_the_lines_that_reach_a_token(lines):
    median, count = ska.running_median([np.array(line, dtype=np.float32) for line in lines])
    assert len(median) == len(count) == max(map(len, lines))
    for t in range(len(median)):
        there = [line[t] for line in lines if len(line) > t and not math.isnan(line[t])]
        assert count[t] == len(there)
        assert median[t] == pytest.approx(np.median(there) if there else math.nan, nan_ok=True)


def test_vertices_are_all_there_up_to_the_limit_and_keep_every_extreme_beyond_it():
    short = np.arange(ska.MAX_VERTICES, dtype=np.float32)
    assert ska.thinned(3, short).tolist() == [[t + 3, t] for t in range(len(short))]
    line = np.random.default_rng(0).random(10_007).astype(np.float32)
    line[5_000] = 9
    vertices = ska.thinned(100, line)
    token = vertices[:, 0].astype(int) - 100
    assert 0.9 * ska.MAX_VERTICES <= len(token) <= 1.1 * ska.MAX_VERTICES
    assert token[0] == 0 and token[-1] == len(line) - 1
    assert np.all(np.diff(token) > 0)
    assert np.array_equal(vertices[:, 1], line[token])
    width = math.ceil(2 * len(line) / ska.MAX_VERTICES)  # 2 vertices a block
    for start in range(0, len(line) - width + 1, width):
        block = line[start : start + width]
        held = line[token[(token >= start) & (token < start + width)]]
        assert held.max() == block.max() and held.min() == block.min()


def test_vertices_of_a_line_with_gaps_are_all_there():
    line = np.random.default_rng(0).random(5_000).astype(np.float32)
    line[1_000] = math.nan
    vertices = ska.thinned(0, line)
    np.testing.assert_array_equal(vertices[:, 0], np.arange(5_000))
    np.testing.assert_array_equal(vertices[:, 1], line)
