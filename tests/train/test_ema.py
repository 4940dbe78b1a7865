"""The averages against their closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.train import ema


def run(rule, path):
    """Averages a path of weights (n, ...), started at its first point: (n - 1, ...)."""

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


@pytest.mark.parametrize("std", [0.05, 0.1, 0.25])
def test_power_profile_by_unit_impulses(std):
    # Weight s of the path is the unit vector e_s, so the average is its own profile.
    n = 400
    profile = run(ema.PowerEMA(std), np.vstack([np.zeros(n), np.eye(n)]))[-1]
    assert profile.sum() == pytest.approx(1, abs=1e-5)  # nothing of the start is left
    s = np.arange(1, n + 1) - 0.5  # in the middle of its update
    mean = profile @ s
    width = np.sqrt(profile @ (s - mean) ** 2 + 1 / 12)  # 1/12: of an update itself
    assert width == pytest.approx(std * n, rel=1e-4)
    # The shape: a power of s, so log-log straight, and no other power has this width.
    slope = np.polyfit(np.log(s[n // 2 :]), np.log(profile[n // 2 :]), 1)[0]
    mean_of_power = (slope + 1) / (slope + 2)
    assert mean / n == pytest.approx(mean_of_power, rel=1e-3)


def test_power_with_the_widest_std_is_the_plain_mean():
    path = np.random.default_rng(0).normal(size=50)
    averages = run(ema.PowerEMA(12**-0.5), path)
    np.testing.assert_allclose(averages, [path[1 : n + 1].mean() for n in range(1, 50)], atol=1e-6)


def test_power_late_in_a_long_run():
    # d(n) = (1 - 1/t)^(gamma + 1) near t = 2 10^6: 1 - d is (gamma + 1) / t, to rounding of d.
    gamma = float(ema.power_gamma(0.05))
    left = 1 - float(jax.jit(ema.PowerEMA(0.05))(jnp.int32(2 * 10**6 - 1)))
    assert left == pytest.approx((gamma + 1) / (2 * 10**6), rel=6e-3)


def test_several_averages_do_not_meet():
    path = np.random.default_rng(1).normal(size=20)
    rules = {"main": ema.ConstantEMA(0.9), "wide": ema.PowerEMA(0.2)}
    tracks = dict.fromkeys(rules, jnp.float32(path[0]))
    for n, p in enumerate(path[1:]):
        tracks = ema.averages(rules, n, tracks, jnp.float32(p))
    for name, rule in rules.items():
        np.testing.assert_allclose(tracks[name], run(rule, path)[-1], rtol=1e-6)
    with pytest.raises(
        ValueError, match=r"rules are of the averages \['main', 'wide'\].*\['main'\]"
    ):
        ema.averages(rules, 0, {"main": tracks["main"]}, jnp.float32(0))


def test_rules_are_trees_with_one_trace_for_all_values():
    traces = []

    @jax.jit
    def decay(rule, n):
        traces.append(None)
        return rule(n)

    for rate in (0.9, 0.99):
        decay(ema.WarmupEMA(rate), 3)
    assert len(traces) == 1
    for std in (0.05, 0.1):  # also where the exponent is found inside
        np.testing.assert_allclose(decay(ema.PowerEMA(std), 9), ema.PowerEMA(std)(9), rtol=1e-5)
    assert len(traces) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ema.ConstantEMA(1.0), r"rate must lie in \[0, 1\); got 1.0"),
        (lambda: ema.WarmupEMA(-0.1), "rate must lie"),
        (lambda: ema.HalfLifeEMA(0, 16), "half_life_images must be positive"),
        (lambda: ema.HalfLifeEMA(10, 0), "batch_size must be positive"),
        (lambda: ema.HalfLifeEMA(10, 1, ramp_up=0.0), "ramp_up must be positive"),
        (lambda: ema.PowerEMA(0.0), r"std.* must lie in \(0, 0.2887\]"),
        (lambda: ema.PowerEMA(0.29), "got 0.29"),
    ],
)
def test_bad_input_raises(make, message):
    with pytest.raises(ValueError, match=message):
        make()
