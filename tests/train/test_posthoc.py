"""Averages of any width from stored ones: against quadrature, and against averages tracked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.train import ema, posthoc
from diffjax.train.posthoc import Profile

STEPS = 4000


def exponent(std):
    """gamma >= 0 of a relative width, by bisection of the standard deviation of (6) in `ema`."""
    low, high = 0.0, 1e6
    for _ in range(200):
        g = (low + high) / 2
        mean, square = (g + 1) / (g + 2), (g + 1) / (g + 3)  # of u^g on (0, 1)
        low, high = (g, high) if square - mean**2 > std**2 else (low, g)
    return low


def profile(u, step, std):
    """The share of the weights at u, on a grid of midpoints."""
    g = exponent(std)
    with np.errstate(divide="ignore"):
        return np.where(u < step, (g + 1) * (u / step) ** g / step, 0.0)


def test_inner_products_equal_quadrature():
    pairs = [(700, 0.2), (1000, 0.05), (1000, 0.1), (250, 0.28)]
    n = 200_000
    u = (np.arange(n) + 0.5) * 1000 / n
    rows = np.stack([profile(u, *pair) for pair in pairs])
    truth = rows @ rows.T * 1000 / n
    steps, gammas = (np.array(v) for v in zip(*[(t, exponent(s)) for t, s in pairs], strict=True))
    found = posthoc.inner_products(steps.astype(float), gammas)
    # Midpoints miss a part of a cell at the jump at T.
    np.testing.assert_allclose(found, truth, rtol=2e-4)
    np.testing.assert_allclose(ema.power_gamma(np.array([0.05, 0.1, 0.28])), gammas[1:], rtol=1e-9)


def test_the_fit_is_the_least_squares_solution():
    # On a fine grid, by another solver: the condition put in as a row of great weight.
    stored = [Profile(t, std) for t in (500, 1000, 1500, 2000) for std in (0.05, 0.1)]
    wanted = Profile(2000, 0.07)
    n = 40_000
    u = (np.arange(n) + 0.5) * 2000 / n
    columns = np.stack([profile(u, *pair) for pair in stored], axis=1) * np.sqrt(2000 / n)
    target = profile(u, *wanted) * np.sqrt(2000 / n)
    row = 1e4 * np.linalg.norm(target)
    truth = np.linalg.lstsq(
        np.vstack([columns, row * np.ones((1, len(stored)))]), np.append(target, row), rcond=None
    )[0]
    found = posthoc.fit(stored, wanted)
    # 1e-4 of the quadrature; a gamma one percent off moves the weights by far more.
    np.testing.assert_allclose(found.weights, truth, atol=5e-3)
    residual = np.linalg.norm(columns @ found.weights - target) / np.linalg.norm(target)
    np.testing.assert_allclose(found.error, residual, rtol=1e-2)
    assert found.weights.sum() == pytest.approx(1, abs=1e-12)


def test_a_stored_average_is_itself():
    stored = [Profile(t, std) for t in (100, 200, 300) for std in (0.05, 0.1)]
    found = posthoc.fit(stored, Profile(300, 0.1))
    np.testing.assert_allclose(found.weights, [0, 0, 0, 0, 0, 1], atol=1e-6)
    assert found.error < 1e-6


@functools.cache
def tracked(stds, every):
    """{(step, std): average of a random walk in 64 dimensions}, by the rules of training."""
    rng = np.random.default_rng(0)
    walk = 3 + np.cumsum(rng.normal(size=(STEPS + 1, 64)) / np.sqrt(STEPS), axis=0)
    rules = {str(std): ema.PowerEMA(std) for std in stds}

    def body(tracks, inputs):
        n, p = inputs
        tracks = ema.averages(rules, n, tracks, p)
        return tracks, tracks

    path = jnp.asarray(walk, jnp.float32)
    start = dict.fromkeys(rules, path[0])
    history = jax.jit(lambda p: jax.lax.scan(body, start, (jnp.arange(STEPS), p[1:]))[1])(path)
    return {
        (step, std): np.asarray(history[str(std)][step - 1])
        for step in range(every, STEPS + 1, every)
        for std in stds
    }


def error(every, std, step=STEPS):
    """Relative error of a reconstruction, in units of the walk's own spread, and the fit's own."""
    found = tracked((0.05, 0.1, 0.03, 0.07, 0.15), 250)
    stored = [Profile(t, s) for t in range(every, step + 1, every) for s in (0.05, 0.1)]
    result = posthoc.fit(stored, Profile(step, std))
    ours = posthoc.combine(result.weights, (found[pair] for pair in stored))
    truth = found[step, std]
    return np.sqrt(np.mean((ours - truth) ** 2)) / np.std(truth), result.error


@pytest.mark.parametrize("std", [0.07, 0.15])
def test_reconstruction_equals_the_average_tracked(std):
    errors = {every: error(every, std) for every in (2000, 1000, 500, 250)}
    actual, predicted = zip(*errors.values(), strict=True)
    assert actual[-1] < 5e-4 and actual[0] > 20 * actual[-1]
    assert list(predicted) == sorted(predicted, reverse=True)
    # An average one std away is told apart with a wide margin.
    found = tracked((0.05, 0.1, 0.03, 0.07, 0.15), 250)
    off = found[STEPS, 0.1] - found[STEPS, std]
    assert np.sqrt(np.mean(off**2)) / np.std(found[STEPS, std]) > 20 * actual[-1]


def test_earlier_steps_and_widths_outside_are_told_by_the_error():
    at_half, predicted = error(250, 0.07, step=2000)
    assert at_half < 2e-3 and predicted < 2e-2
    assert error(250, 0.03)[1] > 5 * error(250, 0.07)[1]


def test_combine_keeps_dtypes_and_weights_at_rest():
    tree = {"a": np.float32([3.0, -1e4]), "b": jnp.asarray([0.5], jnp.bfloat16)}
    weights = posthoc.fit(
        [Profile(t, s) for t in (9, 18, 27) for s in (0.05, 0.1)], Profile(27, 0.07)
    ).weights
    assert np.abs(weights).max() > 0.5
    combined = posthoc.combine(weights, [tree] * 6)
    assert combined["a"].dtype == np.float32 and combined["b"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(combined["a"], tree["a"])
    np.testing.assert_array_equal(combined["b"], tree["b"])


@pytest.mark.parametrize(
    ("stored", "wanted", "message"),
    [
        ([], Profile(3, 0.1), "nothing to combine"),
        ([Profile(3, 0.1)] * 2, Profile(3, 0.1), "given once"),
        ([Profile(0, 0.1)], Profile(3, 0.1), "at least 1; got 0"),
        ([Profile(3, 0.1)], Profile(3, 0.3), r"must lie in \(0, 0.2887\].*got 0.3"),
    ],
)
def test_bad_input_raises(stored, wanted, message):
    with pytest.raises(ValueError, match=message):
        posthoc.fit(stored, wanted)
