"""Each definition against an oracle that is written another way."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import spaghetti_kl_alive as ska

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lifelines import KaplanMeierFitter

MASS = st.one_of(st.just(math.nan), st.floats(0, 1))
KL = st.lists(st.one_of(st.floats(0, 20), st.sampled_from([math.nan, math.inf, -math.inf])), max_size=60)


@given(st.lists(st.tuples(st.integers(0, 30), MASS), max_size=8), st.floats(0.01, 1), st.integers(0, 30))
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


def smoothed_by_loops(kl: list[float], roll: int, edges: str) -> list[float]:
    """The definition, a token at a time."""
    if edges == "pad":
        if len(kl) < roll:
            return [value if math.isfinite(value) else math.nan for value in kl]
        kl = kl[:1] * (roll // 2) + kl + kl[-1:] * (roll // 2)
        windows = [kl[t : t + roll] for t in range(len(kl) - 2 * (roll // 2))]
    else:
        windows = [kl[max(0, t - roll // 2) : max(0, t - roll // 2 + roll)] for t in range(len(kl))]
    finite = [[value for value in window if math.isfinite(value)] for window in windows]
    return [math.fsum(values) / len(values) if values else math.nan for values in finite]


@given(KL, st.integers(1, 20), st.sampled_from(["pad", "shrink"]))
def test_rolling_mean_is_the_per_token_loop(kl, roll, edges):
    result = ska.rolling_mean(np.array(kl, dtype=float), roll, edges)
    np.testing.assert_allclose(result, smoothed_by_loops(kl, roll, edges), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("roll", [1, 2, 7, 64, 65, 200])
def test_finite_padded_rolling_mean_is_the_plain_convolution(roll):
    kl = np.random.default_rng(roll).gamma(1, 1, 200)
    padded = np.concatenate([np.repeat(kl[0], roll // 2), kl, np.repeat(kl[-1], roll // 2)])
    plain = np.convolve(padded, np.full(roll, 1 / roll), mode="valid")[: len(kl)]
    np.testing.assert_allclose(ska.rolling_mean(kl, roll, "pad"), plain, rtol=1e-12)


def test_rolling_mean_forgets_a_huge_value_outside_its_window():
    kl = np.r_[1e300, np.full(50, 0.1)]
    assert ska.rolling_mean(kl, 5, "pad")[3:] == pytest.approx(np.full(48, 0.1), rel=1e-14)


@given(KL, st.integers(1, 30), st.sampled_from(["smoothed", "raw"]), st.sampled_from(["pad", "shrink"]))
def test_scale_is_numpy_percentile_of_the_finite_head(kl, calib_tokens, calib_on, edges):
    head = (kl if calib_on == "raw" else smoothed_by_loops(kl, 5, edges))[:calib_tokens]
    finite = sorted(value for value in head if math.isfinite(value))
    line, scale = ska.drawn_line(np.array(kl), 5, edges, True, calib_tokens, calib_on)
    expected = np.quantile(finite, 0.95, method="linear") if finite else math.nan
    if expected > 1e-8 * (1 + 1e-9):
        assert scale == pytest.approx(expected, rel=1e-9)
        np.testing.assert_allclose(line, np.array(smoothed_by_loops(kl, 5, edges)) / expected, rtol=1e-9, atol=1e-9)
    elif not expected > 1e-8 * (1 - 1e-9):
        assert math.isnan(scale)
        assert len(line) == 0


LIVES = st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=1, max_size=40)


@given(LIVES)
def test_survival_its_band_and_the_numbers_at_risk_are_those_of_lifelines(lives):
    duration, died = (np.array(column) for column in zip(*lives, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitter = KaplanMeierFitter().fit(duration, died)
    curve = ska.kaplan_meier(duration, died)
    for t in range(14):
        step = np.searchsorted(curve.t, t, side="right") - 1
        assert curve.s[step] == pytest.approx(fitter.predict(t), abs=1e-12)
        band = fitter.confidence_interval_.loc[:t].iloc[-1]
        assert [curve.low[step], curve.high[step]] == pytest.approx(band.tolist(), abs=1e-9)
    ticks = fitter.event_table.index.to_numpy()
    assert ska.at_risk(duration, ticks).tolist() == fitter.event_table["at_risk"].tolist()


def test_survival_of_a_panel_in_which_all_die_reaches_zero_and_of_nobody_is_one():
    assert ska.kaplan_meier(np.array([3, 3, 7]), np.ones(3, bool)).s.tolist() == pytest.approx([1, 1 / 3, 0])
    assert ska.kaplan_meier(np.array([], int), np.array([], bool)).s.tolist() == [1]


@given(st.lists(st.lists(st.one_of(st.floats(0, 9, width=32), st.just(math.nan)), min_size=1, max_size=9), min_size=1))
def test_running_median_is_the_median_of_the_lines_that_reach_a_token(lines):
    median, count = ska.running_median([np.array(line, dtype=np.float32) for line in lines])
    for t in range(max(map(len, lines))):
        there = [line[t] for line in lines if len(line) > t and not math.isnan(line[t])]
        assert count[t] == len(there)
        assert median[t] == pytest.approx(np.median(there) if there else math.nan, nan_ok=True)


CELL = ska.Cell(None, "cell", "org/m", "mean_diff", 0, 3, 2.0, 1.0, 40)


@given(
    st.lists(
        st.tuples(st.lists(st.floats(0, 3), max_size=50), st.integers(0, 50), st.tuples(MASS, MASS, MASS, MASS)),
        max_size=6,
    ),
    st.integers(1, 50),
)
def test_every_rollout_is_exactly_one_of_died_censored_or_alive_at_the_end(rows, window):
    forks = np.array([0, 10, 40, 50])
    recorded = ska.Recorded(
        alpha=1.0,
        kl=[np.array(kl) for kl, _, _ in rows],
        pmass=np.array([mass for _, _, mass in rows]).reshape(len(rows), 4),
        forks=forks,
        gen_len=np.array([g for _, g, _ in rows], dtype=int),
    )
    rollouts = ska.observe(CELL, recorded, window, 0.5, lambda kl: (kl, 1.0))
    panel = ska.Panel("", 1.0, rollouts)
    at_the_end = 0
    for (kl, g, mass), rollout in zip(rows, rollouts, strict=True):
        length = min(len(kl), g, window)
        deaths = [s for s, m in zip(forks, mass, strict=True) if m < 0.5 and s < length]
        assert rollout.n_tokens == length
        assert rollout.death == (min(deaths) if deaths else None)
        assert rollout.censored == (g < window and not deaths)
        late = [m for s, m in zip(forks, mass, strict=True) if s == length]
        assert rollout.late_drop == (not deaths and any(m < 0.5 for m in late))
        at_the_end += not deaths and g >= window
    assert panel.n_died + panel.n_censored + at_the_end == panel.n == len(rows)


def test_vertices_are_all_there_up_to_the_limit_and_keep_every_extreme_beyond_it():
    short = np.arange(ska.MAX_VERTICES, dtype=np.float32)
    assert ska.thinned(3, short).tolist() == [[t + 3, t] for t in range(len(short))]
    line = np.random.default_rng(0).random(10_007).astype(np.float32)
    line[5_000] = 9
    vertices = ska.thinned(100, line)
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
