"""The averages against their closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.train import ema


def run(rule, path):
    """Averages a path of scalar weights, started at its first point."""

    def body(q, inputs):
        n, p = inputs
        q = ema.average(rule(n), q, p)
        return q, q

    path = jnp.asarray(path, jnp.float32)
    return np.asarray(jax.lax.scan(body, path[0], (jnp.arange(len(path) - 1), path[1:]))[1])


def test_constant_rate_is_a_geometric_sum():
    # Weights that jump from 0 to 1 and stay: after n updates 1 - r^n is left of the way.
    n = np.arange(1, 200)
    averages = run(ema.ConstantEMA(0.97), [0.0] + [1.0] * 199)
    np.testing.assert_allclose(averages[:199], 1 - 0.97 ** np.arange(1, 200), rtol=2e-6)
    # A ramp p = n lags by r (1 - r^n) / (1 - r).
    ramp = run(ema.ConstantEMA(0.9), np.arange(200.0))
    np.testing.assert_allclose(ramp, n - 0.9 * (1 - 0.9**n) / 0.1, rtol=1e-5)


def test_rate_zero_is_the_weights():
    path = np.array([1.0, 3.0, -2.0, 0.5])
    np.testing.assert_allclose(run(ema.ConstantEMA(0.0), path), path[1:], rtol=1e-6)


def test_weights_at_rest_keep_their_average_to_the_bit():
    still = {"w": jnp.asarray(np.random.default_rng(0).normal(size=1000), jnp.float32)}
    q = still
    for _ in range(20):
        q = ema.average(ema.ConstantEMA(0.9)(0), q, still)
    np.testing.assert_array_equal(q["w"], still["w"])


def test_warmup_closed_form():
    # With d(n) = (1 + m) / (10 + m) the initial weights keep the product of (1 + m) / (10 + m) over
    # m = 1..M, which telescopes to 10! (M + 1)! / (M + 10)! .
    start = run(ema.WarmupEMA(0.9999), [1.0] + [0.0] * 6)
    truth = [2 / 11, 6 / (11 * 12), 24 / (11 * 12 * 13), 120 / (11 * 12 * 13 * 14)]
    np.testing.assert_allclose(start[:4], truth, rtol=1e-6)
    rates = np.asarray(jax.vmap(ema.WarmupEMA(0.9))(jnp.arange(200)))
    np.testing.assert_allclose(rates[[79, 80, 199]], [81 / 90, 0.9, 0.9], rtol=1e-6)
    np.testing.assert_allclose(rates[40], 42 / 51, rtol=1e-6)


def test_half_life_in_images():
    # Half of the start is left after half_life images, whatever the batch size.
    for size in (10, 50):
        rule = ema.HalfLifeEMA(1000, batch_size=size, ramp_up=None)
        left = run(rule, [1.0] + [0.0] * (2000 // size))
        np.testing.assert_allclose(left[1000 // size - 1], 0.5, rtol=1e-5)
        np.testing.assert_allclose(left[2000 // size - 1], 0.25, rtol=1e-5)


def test_half_life_ramp():
    rule = ema.HalfLifeEMA(500_000, batch_size=512, ramp_up=0.05)
    assert rule(0) == 0  # no images seen: the average becomes the weights
    # At n = 100 the half-life is 5% of 51,200 images, 5 batches; later it is capped.
    np.testing.assert_allclose(rule(100), 0.5 ** (1 / 5), rtol=1e-6)
    np.testing.assert_allclose(rule(10**6), 0.5 ** (512 / 500_000), rtol=1e-6)
    # 5 million steps of 512 images are more than int32 can count.
    np.testing.assert_allclose(jax.jit(rule)(jnp.int32(5 * 10**6)), rule(10**6), rtol=1e-7)


def test_rules_are_trees_with_one_trace_for_all_values():
    traces = []

    @jax.jit
    def decay(rule, n):
        traces.append(None)
        return rule(n)

    for rate in (0.9, 0.99):
        decay(ema.WarmupEMA(rate), 3)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ema.ConstantEMA(1.0), r"rate must lie in \[0, 1\); got 1.0"),
        (lambda: ema.WarmupEMA(-0.1), "rate must lie"),
        (lambda: ema.HalfLifeEMA(0, 16), "half_life_images must be positive"),
        (lambda: ema.HalfLifeEMA(10, 0), "batch_size must be positive"),
        (lambda: ema.HalfLifeEMA(10, 1, ramp_up=0.0), "ramp_up must be positive"),
    ],
)
def test_bad_input_raises(make, message):
    with pytest.raises(ValueError, match=message):
        make()
