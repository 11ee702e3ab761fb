"""Each definition against an oracle that is written another way."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import beta_product, jackknife, lifelines_survival, lives_of, percentile, smoothed
from sweeps import read, write_cell

import spaghetti_kl_alive as ska

LEVELS = [0.0, 0.5, 0.79, 0.8, 0.81, 1.0, math.nan]  # pmass, on a grid that holds the threshold itself
KL = st.lists(st.one_of(st.floats(0, 20), st.sampled_from([math.nan, math.inf, -math.inf])), max_size=60)
EDGES = ("pad", "shrink")


@given(
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from(LEVELS)), max_size=8),
    st.sampled_from([0.01, 0.8, 1.0]),
    st.integers(0, 30),
)
def test_alive_mask_is_the_double_loop_over_tokens_and_forks(measured, threshold, n_tokens):
    expected = [not any(s <= t and mass < threshold for s, mass in measured) for t in range(n_tokens)]
    forks = np.array([s for s, _ in measured], dtype=int)
    pmass = np.array([mass for _, mass in measured], dtype=float)
    assert ska.alive_mask(pmass, forks, threshold, n_tokens).tolist() == expected


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


@pytest.mark.parametrize("edges", EDGES)
def test_rolling_mean_forgets_the_greatest_kl_outside_its_window(edges):
    kl = np.r_[ska.MAX_KL, np.full(10_000, 0.1)]
    np.testing.assert_allclose(ska.rolling_mean(kl, 5, edges)[3:], 0.1, atol=1e-6)


@given(st.lists(st.one_of(st.floats(0, 20), st.sampled_from([math.nan, math.inf])), max_size=60))
@example(19 * [1.0] + [3.0, math.inf])  # the 20th of 21
@example(19 * [1.0] + [math.inf])  # between the 19th and the 20th of 20
def test_p95_is_numpys_linear_percentile_without_nan_and_infinite_where_it_reaches_infinity(kl):
    finite = [value for value in kl if math.isfinite(value)]
    expected = np.percentile(finite, 95) if finite and math.inf not in kl else percentile(kl)
    assert ska.p95(np.array(kl, dtype=float)) == pytest.approx(expected, rel=1e-12, nan_ok=True)


@settings(max_examples=60)
@given(
    alpha=st.sampled_from([0.0, 1.0, 1.0]),
    kl=st.lists(st.one_of(st.floats(0.125, 20), st.just(math.nan), st.just(math.inf)), min_size=1, max_size=60),
    padding=st.sampled_from([[], 9 * [1000.0], [0.0, math.inf], [None]]),
    window=st.sampled_from([3, 10, 100]),
    calib_tokens=st.integers(1, 30),
    flags=st.sampled_from([{}, {"edges": "shrink"}, {"calib_on": "raw"}, {"normalize_kl": False}]),
)
@example(1.0, [1.0, 2.0, 4.0, 8.0, 16.0], [], 3, 5, {})  # both see generated tokens beyond the window
def test_scale_is_the_95th_percentile_of_the_head_and_the_line_is_in_its_units_to_the_end(
    tmp_path_factory, alpha, kl, padding, window, calib_tokens, flags
):
    flags = {"roll": 5, "calib_tokens": calib_tokens} | flags
    folder = tmp_path_factory.mktemp("scale")
    write_cell(folder / "cell", {alpha: [kl + padding]}, {alpha: [[1.0, 1.0, 1.0]]}, {alpha: [len(kl)]}, window=window)
    (rollout,), (life,) = read(folder, **flags).rollouts, lives_of(folder, **flags)
    assert rollout.scale == pytest.approx(life.scale, rel=1e-9, nan_ok=True)
    np.testing.assert_allclose(rollout.line, life.line, rtol=1e-6)


@pytest.mark.parametrize(("kl", "has_one"), [(1e-8, False), (1.01e-8, True), (0.0, False), (-1.0, False)])
def test_a_scale_of_at_most_1e_8_nats_is_none_and_neither_is_the_line_in_its_units(tmp_path, kl, has_one):
    rows = [20 * [kl], 20 * [math.nan], [math.nan] + 19 * [kl]]
    write_cell(tmp_path / "cell", {"1.0": rows}, {"1.0": 3 * [[1.0, 1.0, 1.0]]})
    (normalised,), (in_nats,) = (read(tmp_path, roll=1, normalize_kl=by).panels for by in (True, False))
    assert normalised.rollouts[0].scale == (kl if has_one else pytest.approx(math.nan, nan_ok=True))
    assert [r.prompt_index for r in normalised.with_line] == ([0, 2] if has_one else [])
    assert [r.prompt_index for r in in_nats.with_line] == [0, 2]


def test_kl_beyond_a_million_nats_is_infinite_and_a_gap_in_the_line(tmp_path):
    kl = [1.0, 1e6, 1.00001e6, math.inf, -1.00001e6, -1e6, 1.0]
    write_cell(tmp_path / "cell", {"1.0": [kl]}, {"1.0": [[1.0, 1.0, 1.0]]})
    (rollout,) = read(tmp_path, roll=1, normalize_kl=False).rollouts
    np.testing.assert_array_equal(rollout.kl, [1, 1e6, math.inf, math.inf, math.nan, -1e6, 1])
    np.testing.assert_array_equal(rollout.line, [1, 1e6, math.nan, math.nan, math.nan, -1e6, 1])


# ------------------------------------------------------- intervals, survival, and what is drawn


def test_t_quantile_is_scipys():
    from scipy import stats

    df = [*range(2, 201)]
    np.testing.assert_allclose([ska.t_quantile(each) for each in df], stats.t.ppf(0.975, df), rtol=2e-4)


@settings(max_examples=60)
@given(st.lists(st.integers(1, 40).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), max_size=30))
@example([(1, 9), (2, 9)])  # too few prompts
@example([(0, 9), (0, 9), (0, 9)])
@example([(9, 9), (9, 9), (9, 9)])
@example([(4, 9), (0, 9), (0, 9)])  # without the first one nothing is over
@example([(1, 9), (9, 9), (9, 9)])  # without the first one all is
def test_share_interval_is_the_slow_jackknife_over_prompts(counts):
    over, total = [k for k, _ in counts], [n for _, n in counts]
    found, expected = ska.share_interval(np.array(over, dtype=int), np.array(total, dtype=int)), jackknife(over, total)
    assert (found is None) == (expected is None)
    assert expected is None or found == pytest.approx(expected, rel=2e-3)


def test_at_a_true_share_of_5_percent_a_panel_is_seldom_clearly_over():
    """24 prompts with shares of their own, their tokens over or not in blocks of 16; a binomial interval is fooled."""
    from scipy import stats

    rng = np.random.default_rng(0)
    total = np.full(24, 256)
    clearly_over, by_tokens = 0, 0
    for _ in range(300):
        over = 16 * rng.binomial(16, rng.beta(3, 57, 24))
        low, _ = ska.share_interval(over, total)
        clearly_over += low > 0.05
        by_tokens += stats.beta.ppf(0.025, over.sum(), total.sum() - over.sum() + 1) > 0.05
    assert 0 < clearly_over < 0.05 * 300
    assert by_tokens > 0.2 * 300


def survival(lives: Sequence[tuple[int, bool]], forks: Sequence[int], weight: float = 1.0) -> ska.Survival:
    followed_to = np.array([t for t, _ in lives], dtype=int)
    died = np.array([dead for _, dead in lives], dtype=bool)
    return ska.kaplan_meier(followed_to, died, np.array(forks, dtype=int), weight)


LIVES = st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=1, max_size=40)


@settings(max_examples=60)
@given(LIVES, st.sets(st.integers(0, 15), max_size=4))
def test_survival_at_each_fork_is_that_of_lifelines(lives, more_forks):
    forks = sorted({t for t, _ in lives} | more_forks)
    curve = survival(lives, forks)
    assert curve.forks.tolist() == forks
    assert curve.s == pytest.approx(lifelines_survival(lives, forks), abs=1e-12)
    assert sorted(curve.followed_to.tolist()) == sorted(t for t, _ in lives)
    assert [len(column) for column in survival([], [])] == [0, 0, 0, 0, 0]


@settings(max_examples=40)
@given(LIVES, st.sampled_from([1.0, 0.5, 1 / 3]))
@example([(20, False), (20, False), *6 * [(5, False)]], 1.0)  # at S = 1 those at risk at that fork count
@example([(5, True), (5, False), (5, False), (20, False)], 1.0)
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


@pytest.mark.parametrize("n", [1, 2, 3, 24, 200])
def test_interval_without_censoring_is_that_of_clopper_and_pearson(n):
    from scipy import stats

    curve = survival([(t, True) for t in range(n)], range(n))
    left = np.arange(n - 1, -1, -1)
    low, high = stats.beta.ppf(0.025, np.maximum(left, 1), n - left + 1), stats.beta.ppf(0.975, left + 1, n - left)
    np.testing.assert_allclose(curve.s, left / n, atol=1e-12)
    np.testing.assert_allclose([curve.low, curve.high], [np.where(left, low, 0), high], atol=1e-4)


@pytest.mark.parametrize("weight", [0.05, 1.0, 100.0])
def test_quantiles_are_scipys_for_the_limits_of_any_share(weight):
    from scipy import stats

    for left, deaths in ((1, 40), (1, 1), (3, 10), (10, 1), (40, 1)):
        for q, a, b in ((0.025, left * weight, deaths * weight + 1), (0.975, left * weight + 1, deaths * weight)):
            expected = pytest.approx(stats.beta.ppf(q, a, b), abs=1e-4)
            mean, variance = stats.beta.mean(a, b), stats.beta.var(a, b)
            assert ska.beta_quantile(q, a, b) == expected
            assert ska.quantile_by_moments(q, mean, variance + mean**2) == expected
    assert [ska.quantile_by_moments(0.025, mean, mean**2) for mean in (0.0, 1.0, 0.3)] == [0, 1, 0.3]


@given(st.lists(st.lists(st.one_of(st.floats(0, 9, width=32), st.just(math.nan)), min_size=1, max_size=9), min_size=1))
def test_median_line_is_the_median_of_the_lines_that_reach_a_token(lines):
    median, count = ska.median_line([np.array(line, dtype=np.float32) for line in lines])
    assert len(median) == len(count) == max(map(len, lines))
    for t in range(len(median)):
        there = [line[t] for line in lines if len(line) > t and not math.isnan(line[t])]
        assert count[t] == len(there)
        assert median[t] == pytest.approx(np.median(there) if there else math.nan, nan_ok=True)


def test_vertices_are_all_there_up_to_the_limit_and_keep_every_extreme_beyond_it():
    short = np.arange(ska.MAX_VERTICES, dtype=np.float32)
    assert ska.decimated(3, short).tolist() == [[t + 3, t] for t in range(len(short))]
    line = np.random.default_rng(0).random(10_007).astype(np.float32)
    line[[0, 5_000]] = 8, 9
    vertices = ska.decimated(100, line)
    token = vertices[:, 0].astype(int) - 100
    assert len(token) <= 1.1 * ska.MAX_VERTICES
    assert token[0] == 0 and token[-1] == len(line) - 1
    assert np.all(np.diff(token) > 0)
    assert np.array_equal(vertices[:, 1], line[token])
    width = math.ceil(2 * len(line) / ska.MAX_VERTICES)  # 2 vertices a block
    for start in range(0, len(line) - width + 1, width):
        block = line[start : start + width]
        held = line[token[(token >= start) & (token < start + width)]]
        assert held.max() == block.max() and held.min() == block.min()
    line[9_999] = 0.5  # the last one of a whole number of blocks, and no extreme
    assert ska.decimated(100, line[:10_000])[-1].tolist() == [100 + 9_999, 0.5]
    line[1_000] = math.nan  # in a line with gaps, all
    np.testing.assert_array_equal(ska.decimated(0, line), np.stack([np.arange(len(line)), line], axis=1))


def test_a_log_axis_has_few_round_ticks_or_its_middle_where_there_is_no_round_number():
    assert ska.log_ticks(0.5, 50) == [1, 3, 10, 30] and ska.log_ticks(1, 4) == [1, 1.5, 2, 3]
    assert len(ska.log_ticks(0.00045, 0.00066)) == 2 and ska.log_ticks(1.021, 1.0213) == [1.021]
