"""Each function of the maths against an oracle that is written another way, or against published numbers."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import numpy as np
import oracles
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from sweeps import read, write_cell

import spaghetti_kl_alive as ska

NAN, INF = math.nan, math.inf
KL = st.lists(st.one_of(st.floats(0, 20), st.sampled_from([NAN, INF, 1e6])), max_size=60)
LIVES = st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=1, max_size=40)  # followed to, died
PUBLISHED = [(3, True), (7, True), (8, True), (14, True)]  # the example of R's bpcp


def array(values, dtype=float):
    return np.array(values, dtype=dtype)


# -------------------------------------------------------------------------- a rollout and its line
@given(
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from([0.0, 0.79, 0.8, 0.81, 1.0, NAN])), max_size=8),
    st.sampled_from([0.01, 0.8, 1.0]),
    st.integers(0, 30),
)
def test_alive_mask_is_the_double_loop_over_tokens_and_forks(measured, threshold, n_tokens):
    forks, pmass = array([s for s, _ in measured], int), array([mass for _, mass in measured])
    alive = [not any(s <= t and mass < threshold for s, mass in measured) for t in range(n_tokens)]
    assert ska.alive_mask(pmass, forks, threshold, n_tokens).tolist() == alive


@settings(max_examples=200)
@given(KL, st.integers(1, 80), st.sampled_from(["pad", "shrink"]))
@example([], 3, "pad")
@example([1.0, 2.0, 4.0], 1000, "shrink")
@example([INF, 1.0, NAN, NAN, NAN, 2.0], 3, "pad")
def test_rolling_mean_is_the_per_token_loop(kl, roll, edges):
    expected = oracles.smoothed(tuple(kl), roll, edges)
    np.testing.assert_allclose(ska.rolling_mean(array(kl), roll, edges), expected, rtol=1e-9, atol=1e-12)


def test_rolling_mean_by_hand():
    """pad repeats the first and last value roll // 2 times, and an even window reaches further back."""
    kl = array([1, 2, 6, 3])
    assert ska.rolling_mean(kl, 3, "pad").tolist() == [4 / 3, 3, 11 / 3, 4]
    assert ska.rolling_mean(kl, 4, "pad").tolist() == [5 / 4, 10 / 4, 12 / 4, 14 / 4]
    assert ska.rolling_mean(kl, 5, "pad").tolist() == [1, 2, 6, 3]  # too short, left as it is
    assert ska.rolling_mean(kl, 3, "shrink").tolist() == [1.5, 3, 11 / 3, 4.5]
    assert ska.rolling_mean(kl, 4, "shrink").tolist() == [1.5, 3, 3, 11 / 3]
    assert ska.rolling_mean(kl, 9, "shrink").tolist() == [3, 3, 3, 3]


@given(KL)
@example(19 * [1.0] + [3.0, INF])  # the 20th of 21
@example(19 * [1.0] + [INF])  # between the 19th and the 20th of 20
def test_p95_is_numpys_linear_percentile_without_nan_and_infinite_where_it_reaches_infinity(kl):
    measured = [x for x in kl if not math.isnan(x)]
    expected = oracles.p95(kl) if INF in kl else np.percentile(measured, 95) if measured else NAN
    assert ska.p95(array(kl)) == pytest.approx(NAN if expected is None else expected, rel=1e-9, nan_ok=True)


def one(folder, kl, roll=5, **flags):
    """The rollout of this KL at alpha 1."""
    write_cell(folder / "cell", {"1": [kl]}, {"1": [[1.0, 1.0, 1.0]]}, {"1": [len(kl)]})
    return read(folder, roll=roll, **flags).rollouts[0]


@pytest.mark.parametrize(("kl", "has_one"), [(1e-8, False), (1.01e-8, True), (0.0, False), (-1.0, False)])
def test_a_scale_of_at_most_1e_8_nats_is_none_and_neither_is_the_line_in_its_units(tmp_path, kl, has_one):
    r = one(tmp_path, 20 * [kl])
    assert math.isnan(r.scale) != has_one and len(r.line) == 20 * has_one
    assert len(one(tmp_path, 20 * [kl], normalize_kl=False).line) == 20


ONE_TOKEN = [(0.1, 40, {}, True), (0.05, 40, {}, False), (INF, 40, {}, False), (9.0, 4, {}, False)]
ONE_TOKEN += [(9.0, 4, {"roll": 4}, True), (9.0, 40, {"edges": "shrink"}, False)]


@pytest.mark.parametrize(("first", "n", "flags", "is_so"), ONE_TOKEN)
def test_a_scale_is_made_by_one_token_where_padding_repeats_it(tmp_path, first, n, flags, is_so):
    """The first mean is (3 * first + 2 * 0.1) / 5; what is shorter than the window is not smoothed."""
    assert one(tmp_path, [first] + (n - 1) * [0.1], **flags).has_one_token_scale == is_so


@pytest.mark.parametrize(
    ("n", "flags", "n_first", "n_last"),
    [(30, {}, 2, 2), (30, {"roll": 4}, 2, 2), (60, {}, 2, 0), (4, {}, 0, 0), (30, {"edges": "shrink"}, 0, 0)],
)
def test_padding_makes_the_first_and_last_half_window_of_a_whole_rollout(tmp_path, n, flags, n_first, n_last):
    n_tokens = min(n, 40)  # the window hides the end of a longer one
    expected = n_first * [True] + (n_tokens - n_first - n_last) * [False] + n_last * [True]
    assert one(tmp_path, n * [0.1], **flags).is_padded.tolist() == expected


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0, 2.5, 7.0, NAN]), max_size=9), min_size=1, max_size=9))
def test_median_line_is_the_median_of_the_lines_that_are_left(lines):
    rollouts = [SimpleNamespace(line=array(x), is_padded=np.arange(len(x)) % 2 == 0) for x in lines]
    median, n_unpadded = ska.median_line(rollouts)
    assert len(median) == len(n_unpadded) == max(map(len, lines))
    for t in range(len(median)):
        there = [line[t] for line in lines if len(line) > t and not math.isnan(line[t])]
        assert median[t] == pytest.approx(np.median(there) if there else NAN, nan_ok=True)
        assert n_unpadded[t] == (len(there) if t % 2 else 0)


# --------------------------------------------------------------------------- shares and intervals
@settings(max_examples=100)
@given(st.lists(st.integers(1, 40).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), max_size=30))
@example([(1, 9), (2, 9)])  # too few prompts
@example([(0, 9), (0, 9), (0, 9)])
@example([(9, 9), (9, 9), (9, 9)])
@example([(3, 9), (3, 9), (3, 9)])  # all left-out shares are equal
@example([(4, 9), (0, 9), (0, 9)])  # without the first one nothing is over
@example([(1, 9), (9, 9), (9, 9)])  # without the first one all is
def test_share_of_tokens_has_the_interval_of_the_slow_jackknife_over_prompts(counts):
    over, total = (array([pair[k] for pair in counts]) for k in (0, 1))
    found = ska.share_of_tokens(over, total)
    low, high = oracles.jackknife(counts) or (NAN, NAN)
    assert found.x == pytest.approx(sum(over) / sum(total) if counts else NAN, nan_ok=True)
    assert found[1:] == pytest.approx((low, high), rel=1e-3, nan_ok=True)


def survival(lives, forks, weight=1.0):
    followed_to, died = array([t for t, _ in lives], int), array([dead for _, dead in lives], bool)
    return ska.kaplan_meier(followed_to, died, array(forks, int), weight)


@settings(max_examples=60)
@given(LIVES, st.sets(st.integers(0, 15), max_size=4))
def test_the_share_that_never_died_is_that_of_lifelines(lives, more_forks):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lifelines import KaplanMeierFitter  # not above, as it warns

        forks = sorted({t for t, _ in lives} | more_forks)
        fitter = KaplanMeierFitter().fit(*zip(*lives, strict=True), timeline=forks)
    expected = fitter.survival_function_.iloc[:, 0].tolist()
    assert survival(lives, forks)[0] == pytest.approx(expected, abs=1e-12)


@settings(max_examples=60)
@given(LIVES, st.sampled_from([1.0, 0.5, 1 / 3]))
@example([(20, False), (20, False), *6 * [(5, False)]], 1.0)  # at S = 1 those at risk at that fork count
@example([(5, True), (5, False), (5, False), (20, False)], 1.0)
def test_the_interval_is_the_product_of_betas_fork_by_fork(lives, weight):
    expected = oracles.survival(lives, range(14), weight)
    np.testing.assert_allclose(np.transpose(survival(lives, range(14), weight)), expected, atol=1e-4)


def test_the_interval_is_the_published_one_of_four_deaths_one_by_one():
    share, low, high = survival(PUBLISHED, [3, 7, 8, 14])
    assert share == pytest.approx([0.75, 0.5, 0.25, 0], abs=1e-12)
    for limits in ((low, high), np.transpose(oracles.survival(PUBLISHED, [3, 7, 8, 14], 1))[1:]):
        assert limits[0] == pytest.approx([0.194120450, 0.067585986, 0.006309463, 0], abs=1e-4)
        assert limits[1] == pytest.approx([0.9936905, 0.9324140, 0.8058796, 0.6023646], abs=1e-4)


@pytest.mark.parametrize("weight", [0.05, 1.0, 100.0])
@pytest.mark.parametrize(("left", "deaths"), [(1, 40), (1, 1), (3, 10), (10, 1), (40, 1)])
def test_quantiles_are_those_of_scipy(weight, left, deaths):
    left, deaths = weight * left, weight * deaths
    for q, a, b in ((0.025, left, deaths + 1), (0.975, left + 1, deaths)):
        expected = pytest.approx(stats.beta.ppf(q, a, b), abs=1e-4)
        assert ska.beta_quantile(q, a, b) == expected
        mean, variance = stats.beta.mean(a, b), stats.beta.var(a, b)
        assert ska.quantile_by_moments(q, mean, variance + mean**2) == expected


@pytest.mark.parametrize("mean", [0.0, 0.3, 1.0])
def test_the_quantile_of_a_point_is_the_point(mean):
    assert ska.quantile_by_moments(0.025, mean, mean**2) == mean
