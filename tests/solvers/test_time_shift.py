"""The time-shift sampler: it finds a level, and lowers few-step DDIM's error on a learned denoiser.

The claim. Case: elements from a mixture of weights 0.3 and 0.7 at -0.7 and 0.3 with deviation 0.2,
whose deviation is 0.5; samples of 1,024 independent elements, so that a sample's variance is known
to 4%; a network of an element and its log-SNR, trained for 1,500 steps; VP, ten steps even in the
log-SNR, DDIM. Metric: the Wasserstein distance W2 between the elements drawn and the mixture. Five
networks and starts. Margin: every seed at most 0.9 of plain DDIM (found: 0.64 to 0.82). The paper's
own rule, which leaves the data's variance out, is worse than no shift here (1.17 to 1.36), which is
asserted beside it. Not asserted: with a window of 0.3 one seed in five came out at 1.9.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax.core.types import Prediction
from diffjax.processes import EDM, VP, perturb, prior
from diffjax.solvers import DDIM, TimeShift, Tweedie, grids, sample
from diffjax.solvers.time_shift import variance_per_sample
from tests import members

WEIGHTS, MEANS, DEVIATION = np.asarray([0.3, 0.7]), np.asarray([-0.7, 0.3]), 0.2
VARIANCE = float(WEIGHTS @ MEANS**2 + DEVIATION**2)  # the mean is 0
PROCESS = VP()
B, D, SEEDS, HIDDEN = 32, 1024, 5, 32


def draws(key, shape):
    """Elements of the mixture."""
    first, second = jax.random.split(key)
    chosen = jax.random.bernoulli(first, WEIGHTS[1], shape).astype(int)
    return jnp.asarray(MEANS, jnp.float32)[chosen] + DEVIATION * jax.random.normal(second, shape)


def network(params, x, t):
    """eps of each element of x (B, D) at t, () or (B,)."""
    c = PROCESS.coeffs(t)
    level = jnp.broadcast_to(jnp.reshape(jnp.log(c.alpha / c.sigma) / 2, (-1, 1)), x.shape)
    h = jnp.stack([x, level, jnp.tanh(level)], axis=-1)
    for i, (w, b) in enumerate(params):
        h = jax.nn.silu(h) if i else h
        h = jnp.einsum("...i,ij->...j", h, w) + b[None, None]
    return h[..., 0]


@jax.jit
def train(key):
    """A network's parameters after 1,500 steps of denoising score matching."""
    start, steps = jax.random.split(key)
    widths = [(3, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 1)]
    keys = jax.random.split(start, len(widths))
    params = [
        (jax.random.normal(k, w) / w[0] ** 0.5, jnp.zeros(w[1]))
        for k, w in zip(keys, widths, strict=True)
    ]
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 1500))

    def update(carry, key):
        params, state = carry
        k0, k1, k2 = jax.random.split(key, 3)
        x0, t = draws(k0, (1024, 1)), jax.random.uniform(k1, (1024,), minval=1e-3)
        eps = jax.random.normal(k2, x0.shape)
        x = perturb(PROCESS, x0, t, eps)
        slope = jax.grad(lambda p: jnp.mean((network(p, x, t) - eps) ** 2))(params)
        change, state = optimizer.update(slope, state)
        return (optax.apply_updates(params, change), state), None

    keys = jax.random.split(steps, 1500)
    return jax.lax.scan(update, (params, optimizer.init(params)), keys)[0][0]


@jax.jit
def solve(params, solver, key):
    """Samples (B, D) of ten steps, with the network `params`."""

    def denoise(x, t):
        c = PROCESS.coeffs(t)
        alpha, sigma = (jnp.reshape(a, (-1, 1)) for a in (c.alpha, c.sigma))
        eps = network(params, x, t)
        return Prediction((x - sigma * eps) / alpha, eps)

    x = prior(key, PROCESS, (B, D))
    times = grids.log_snr(PROCESS, 10, end=0.0)
    return sample(key, denoise, x, times, solver=solver, process=PROCESS).x


@functools.cache
def exact_quantiles(n):
    """The mixture's quantiles at (i + 1/2)/n."""
    normal = jax.scipy.stats.norm.cdf
    x = np.linspace(-2, 2, 20001)
    cdf = sum(
        w * np.asarray(normal((x - m) / DEVIATION), np.float64)
        for w, m in zip(WEIGHTS, MEANS, strict=True)
    )
    return np.interp((np.arange(n) + 0.5) / n, cdf, x)


def distance(x):
    """W2 between elements and the mixture."""
    found = np.sort(np.asarray(x, np.float64).ravel())
    return np.sqrt(np.mean((found - exact_quantiles(found.size)) ** 2))


def ratios(seed, plain=DDIM(), window=0.1):
    """W2 over plain DDIM's: with the data's variance, and by the paper's rule."""
    params, key = train(jax.random.key(seed)), jax.random.key(100 + seed)
    base = distance(solve(params, plain, key))
    return [
        distance(solve(params, TimeShift(DDIM(), window, 0.1, variance), key)) / base
        for variance in (VARIANCE, 0.0)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDS))
def test_the_shift_lowers_the_error_for_every_seed(seed):
    shifted, paper = ratios(seed)
    assert shifted < 0.9
    assert paper > 1


def test_the_distance_is_that_of_exact_draws():
    assert distance(draws(jax.random.key(0), (B, D))) < 0.01


@pytest.mark.parametrize("process", [VP(), EDM()], ids=["vp", "edm"])
def test_the_time_found_is_the_time_of_the_sample(process):
    """x at times spread about t, exactly distributed: found to the variance's own error."""
    t, s, size = 0.4, 0.1, 65536
    true = t + jnp.linspace(-0.08, 0.08, 9)
    x0 = draws(jax.random.key(1), (9, size))
    x = perturb(process, x0, true, jax.random.normal(jax.random.key(2), x0.shape))
    shift = TimeShift(DDIM(), 0.2, 0.0, VARIANCE, candidates=401)
    found = shift.shifted(process, x, jnp.asarray(t), jnp.asarray(s))
    # d E v/dt by differences, and the standard error of a variance of independent elements.
    level = lambda u: np.asarray(  # noqa: E731
        process.coeffs(u).alpha ** 2 * VARIANCE + process.coeffs(u).sigma ** 2, np.float64
    )
    slope = (level(true + 1e-2) - level(true - 1e-2)) / 2e-2
    error = 4 * level(true) * np.sqrt(2 / size) / slope + 0.2 / 400
    assert (np.abs(found - true) < error).all()
    assert np.abs(error).max() < 0.04  # so that the time given would not pass


def test_the_variance_of_a_sample_is_numpys():
    x = {"a": jax.random.normal(jax.random.key(0), (3, 4, 2)), "b": 2 + jnp.ones((3, 5))}
    flat = np.concatenate([np.reshape(leaf, (3, -1)) for leaf in x.values()], axis=1)
    np.testing.assert_allclose(variance_per_sample(x), flat.var(axis=1, ddof=1), rtol=1e-6)


def test_the_first_step_and_those_below_the_cut_off_are_plain():
    process = PROCESS
    x = prior(jax.random.key(0), process, (4, 64))
    denoise = lambda x, t: Prediction(0.3 * x, 0.8 * x + t.reshape(-1, 1))  # noqa: E731
    times = jnp.asarray([0.9, 0.6, 0.3])

    def end(solver, times):
        return sample(
            jax.random.key(0),
            denoise,
            x,
            times,
            solver=solver,
            process=process,
            final=Tweedie(),
        ).x

    np.testing.assert_array_equal(end(TimeShift(DDIM(), 0.2), times[:2]), end(DDIM(), times[:2]))
    np.testing.assert_array_equal(end(TimeShift(DDIM(), 0.2, 0.61), times), end(DDIM(), times))
    assert np.abs(end(TimeShift(DDIM(), 0.2, 0.59), times) - end(DDIM(), times)).max() > 1e-3


def test_a_window_wider_than_the_step_does_not_lead_behind_the_target():
    shift = TimeShift(DDIM(), 0.9, 0.0)
    t, s = jnp.asarray(0.5), jnp.asarray(0.45)
    low = shift.shifted(PROCESS, jnp.zeros((1, 64)), t, s)
    assert low == pytest.approx(0.475)
    # On the way up the window is cut above.
    noise = 9 * jax.random.normal(jax.random.key(0), (1, 64))
    assert shift.shifted(PROCESS, noise, s, t) == pytest.approx(0.475)
    assert shift.shifted(PROCESS, 0 * noise, s, t) < 0.1


def test_a_schedule_per_pixel_is_refused():
    process = members.PerPixel(jnp.linspace(1.0, 4.0, 16))
    with pytest.raises(ValueError, match="per pixel"):
        TimeShift(DDIM()).init(process, jnp.zeros((2, 16)), jnp.asarray(1.0))
