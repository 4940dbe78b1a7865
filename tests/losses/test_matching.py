"""Denoising score matching against closed forms on Gaussian data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy import integrate

from diffjax.core.pytree import pytree
from diffjax.core.random import sample_keys
from diffjax.core.types import Prediction
from diffjax.losses import (
    ImportanceTimes,
    Likelihood,
    LogNormalTimes,
    MinSNR,
    Sigmoid,
    StratifiedTimes,
    UniformTimes,
    denoising_score_matching,
    half_sum,
    mean,
)
from diffjax.prediction import EDMF, X0, Eps, V, Velocity, decode, make_denoiser
from diffjax.processes import EDM, VE, VP, RectifiedFlow, SubVP
from tests.losses.common import NoisierBy, mean_and_error, silent, vp
from tests.oracles import PointMass, gaussian

N = 60_000  # samples of three elements
LOW, HIGH = 1e-3, 0.6

# Each weighting as a weight on |eps^ - eps|^2 under VP, from its paper and not from our rows.
SNR = lambda a, s2: a**2 / s2  # noqa: E731
WEIGHTS = {
    "eps": (Eps(), lambda a, s2, b: 1.0),
    "x0": (X0(), lambda a, s2, b: 1 / SNR(a, s2)),
    "v": (V(), lambda a, s2, b: (SNR(a, s2) + 1) / SNR(a, s2)),
    "edm": (EDMF(0.5), lambda a, s2, b: (s2 / a**2 + 0.25) / (0.25 * s2 / a**2) / SNR(a, s2)),
    "likelihood": (Likelihood(), lambda a, s2, b: b / s2),
    "min_snr": (MinSNR(5.0), lambda a, s2, b: np.minimum(SNR(a, s2), 5.0) / SNR(a, s2)),
    "sigmoid": (Sigmoid(-3.0), lambda a, s2, b: b / s2 / (1 + np.exp(3.0) * SNR(a, s2))),
}
# d x_t/dt moves by alpha' D_x + sigma' D_e = (sigma' - alpha' sigma/alpha) D_e; with
# alpha' = -beta alpha/2 and sigma' = beta alpha^2/(2 sigma) that is beta/(2 sigma) D_e.
WEIGHTS["velocity"] = (Velocity(), lambda a, s2, b: b**2 / (4 * s2))


@pytree
class Contrary:
    """eps^ = -x_t: a loss far from its minimum, so that it moves with every part of the formula."""

    process: object = VP()

    def __call__(self, x_t, t):
        return decode(Eps(), self.process, x_t, -x_t, t)


def exact_loss(on_eps, data, contrary):
    """The mean over t and over the elements, by quadrature.

    Var(eps | x_t) = alpha^2 d^2/V for the posterior mean, E(x_t + eps)^2 for the contrary.
    """
    m, variance = np.asarray(data.mean, np.float64), np.asarray(data.std, np.float64) ** 2

    def integrand(t):
        alpha, s2, beta = vp(t)
        V_t = alpha**2 * variance + s2
        if contrary:
            error = V_t + alpha**2 * m**2 + 2 * np.sqrt(s2) + 1
        else:
            error = alpha**2 * variance / V_t
        return on_eps(alpha, s2, beta) * np.mean(error)

    total = integrate.quad(integrand, LOW, HIGH, epsabs=0, epsrel=1e-9, limit=200)[0]
    return total / (HIGH - LOW)


@functools.cache
def monte_carlo(process, contrary):
    """The losses of N samples under every weighting, from one program."""
    data = gaussian(3)
    denoise = Contrary() if contrary else data.denoiser(VP())

    @jax.jit
    def losses(key, x0):
        # The second sampler estimates the same mean, with lighter tails under the last three.
        heavy = ("likelihood", "sigmoid", "velocity")
        return {
            name: denoising_score_matching(
                key,
                denoise,
                process,
                x0,
                times=(ImportanceTimes if name in heavy else UniformTimes)(LOW, HIGH),
                weight=weight,
            )[0]
            for name, (weight, _) in WEIGHTS.items()
        }

    return losses(jax.random.key(2), data.draw(jax.random.key(1), N))


def check_weight(name, process, contrary):
    """The Monte Carlo loss is within 4 standard errors, which are below 5 % of it.

    n = 60,000 samples of three elements. A weight that is 5 % off is rejected everywhere; a noise
    scale that is 3 % off moves the contrary denoiser's loss by 3 to 6 %, which is rejected where
    the standard error is smallest.
    """
    got, error = mean_and_error(monte_carlo(process, contrary)[name])
    want = exact_loss(WEIGHTS[name][1], gaussian(3), contrary)
    assert abs(got - want) < 4 * error < 0.05 * want


EXACT, NOISIER = VP(), NoisierBy(VP())


@pytest.mark.parametrize("contrary", [False, True], ids=["exact", "contrary"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_expected_loss_of_each_weighting(name, contrary):
    check_weight(name, EXACT, contrary)


@pytest.mark.parametrize("name", ["eps", "x0", "v", "min_snr"])
def test_mutant_noise_scale(name):
    with pytest.raises(AssertionError):
        check_weight(name, NOISIER, contrary=True)


@pytest.mark.parametrize("process", [VP(), SubVP(), VE(), EDM(), RectifiedFlow()], ids=str)
def test_point_mass_has_no_loss(x64, process):
    data = PointMass(jnp.asarray([0.3, -0.8]))
    x0 = jnp.broadcast_to(data.mean[None], (256, 2))
    denoise = data.denoiser(process)

    @jax.jit
    def loss(key):
        return [
            denoising_score_matching(key, denoise, process, x0, weight=weight)
            for weight in (Eps(), EDMF(0.5), MinSNR())
        ]

    for losses, watch in loss(jax.random.key(0)):
        # What is left is the rounding of (x_t - alpha m)/sigma, largest for sub-VP's sigma of 1e-6.
        assert losses.max() < 1e-18
        assert watch["eps_error"].max() < 1e-18
        assert watch["x0_error"].max() == 0


def test_silent_network():
    """E|eps|^2: 1 as a mean and D/2 as half a sum; 4 standard errors are 0.4 %."""
    x0 = jnp.zeros((5000, 10, 10, 1)).at[:].set(0.7)
    for reduce, want in ((mean, 1.0), (half_sum, 50.0)):
        losses, _ = denoising_score_matching(jax.random.key(0), silent, VP(), x0, reduce=reduce)
        got, error = mean_and_error(losses)
        assert abs(got - want) < 4 * error < 0.01 * want
    # VE before training: half the sum is D/2 whatever its sigma.
    losses, _ = denoising_score_matching(jax.random.key(0), silent, VE(), x0, reduce=half_sum)
    assert abs(losses.mean() - 50) < 0.4


def test_likelihood_weighting_gains_from_importance_times():
    """The same mean from at least three times less variance; 4 standard errors are under 8 %."""
    data = gaussian(3)
    denoise = data.denoiser(VP())
    x0 = data.draw(jax.random.key(1), N)

    @jax.jit
    def losses(times):
        return denoising_score_matching(
            jax.random.key(3), denoise, VP(), x0, times=times, weight=Likelihood(), reduce=half_sum
        )[0]

    # From 0.01: below, uniform times have tails too heavy for a standard error to be trusted.
    plain, plain_error = mean_and_error(losses(UniformTimes(0.01)))
    got, error = mean_and_error(losses(ImportanceTimes(0.01)))
    both = 4 * np.hypot(error, plain_error)
    assert abs(got - plain) < both < 0.08 * plain
    assert (plain_error / error) ** 2 > 3


def linear_loss(slope, key, x0, t):
    """eps^ = slope x_t at a single time."""

    def denoise(x_t, t):
        return Prediction(x_t, slope * x_t)

    times = UniformTimes(t, t + 1e-6)
    return denoising_score_matching(key, denoise, VP(), x0, times=times)[0]


def test_gradient_leads_to_the_posterior_mean():
    """On N(0, d^2) the loss is slope^2 V - 2 slope sigma + 1, least at the posterior's sigma/V."""
    d, t = 0.5, 0.4
    alpha, s2, _ = vp(t)
    V_t, sigma = alpha**2 * d**2 + s2, np.sqrt(s2)
    x0 = d * jax.random.normal(jax.random.key(1), (N, 1))
    gradients = jax.jit(jax.jacfwd(linear_loss), static_argnums=3)

    def at(slope):
        return mean_and_error(gradients(slope, jax.random.key(2), x0, t))

    best = sigma / V_t
    got, error = at(best)
    assert abs(got) < 4 * error
    for slope in (0.0, 0.5, 1.5 * best):
        got, error = at(slope)
        want = 2 * (slope * V_t - sigma)
        assert abs(got - want) < 4 * error < 0.05 * abs(want)
    assert at(1.03 * best)[0] > 4 * at(1.03 * best)[1]  # the resolution of the first assertion


@pytest.mark.parametrize("kind", ["v", "F", "velocity"])
def test_own_row_is_the_error_of_the_output(kind, x64):
    """|out - target|^2 by hand, with targets from the papers, equals the loss under that row."""
    process = VP()
    denoise = make_denoiser(lambda x, t: jnp.sin(3 * x), process, kind=kind)
    x0 = jax.random.normal(jax.random.key(0), (64, 5)) * 0.4
    seen = {}

    def spy(x_t, t):
        seen.update(x_t=np.asarray(x_t), t=np.asarray(t))
        return denoise(x_t, t)

    losses, _ = denoising_score_matching(
        jax.random.key(1), spy, process, x0, weight=denoise.kind, times=UniformTimes(0.01)
    )
    alpha, s2, beta = (c[:, None] for c in vp(seen["t"]))
    sigma, x = np.sqrt(s2), np.asarray(x0)
    eps = (seen["x_t"] - alpha * x) / sigma
    if kind == "v":
        target = alpha * eps - sigma * x
    elif kind == "velocity":
        target = -beta / 2 * seen["x_t"] + beta / (2 * sigma) * eps
    else:
        level, noisy = sigma / alpha, seen["x_t"] / alpha
        c_skip, c_out = 0.25 / (level**2 + 0.25), level * 0.5 / np.sqrt(level**2 + 0.25)
        target = (x - c_skip * noisy) / c_out
    want = np.mean((np.sin(3 * seen["x_t"]) - target) ** 2, axis=1)
    np.testing.assert_allclose(losses, want, rtol=1e-9)


@pytest.mark.parametrize("times", [ImportanceTimes(), LogNormalTimes()], ids=str)
def test_batch_invariance(times):
    """Sample i is a function of its key and data: bitwise, for a prefix and in another order."""
    data = gaussian(3)
    x0 = data.draw(jax.random.key(1), 13)
    keys = sample_keys(jax.random.key(2), 13)
    loss = jax.jit(
        lambda key, x0: denoising_score_matching(
            key, data.denoiser(VP()), VP(), x0, times=times, weight=Likelihood()
        )
    )
    whole = loss(keys, x0)
    part = loss(keys[:5], x0[:5])
    flipped = loss(keys[::-1], x0[::-1])
    scalar = loss(jax.random.key(2), x0)
    for a, b, c, d in zip(*map(jax.tree.leaves, (whole, part, flipped, scalar)), strict=True):
        np.testing.assert_array_equal(a[:5], b)
        np.testing.assert_array_equal(a, c[::-1])
        np.testing.assert_array_equal(a, d)


@pytest.mark.parametrize("times", [UniformTimes(), StratifiedTimes()], ids=str)
def test_sharded_equals_single(times):
    data = gaussian(3)
    x0 = data.draw(jax.random.key(1), 16)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))

    def loss(key, x0):
        return denoising_score_matching(
            key, data.denoiser(VP()), VP(), x0, times=times, weight=EDMF()
        )

    single = jax.jit(loss)(jax.random.key(2), x0)
    sharded = jax.jit(loss, in_shardings=(None, rows))(jax.random.key(2), x0)
    for a, b in zip(jax.tree.leaves(single), jax.tree.leaves(sharded), strict=True):
        np.testing.assert_array_equal(a, b)


def test_trees_and_half_precision():
    """A tree of two leaves has the loss of their concatenation's size; bfloat16 is raised."""
    x0 = {"a": jnp.ones((6, 2), jnp.bfloat16), "b": jnp.ones((6, 4, 3), jnp.bfloat16)}

    def halves(x_t, t):
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(x_t))
        zero = jax.tree.map(jnp.zeros_like, x_t)
        return Prediction(zero, zero)

    losses, watch = denoising_score_matching(jax.random.key(0), halves, EDM(), x0, weight=X0())
    np.testing.assert_allclose(losses, np.ones(6), rtol=1e-6)
    assert losses.dtype == jnp.float32
    assert set(watch) == {"t", "eps_error", "x0_error"}


def test_no_retrace():
    """Constants of the weighting, the sampler and the process are leaves."""
    traces = []
    x0 = gaussian(3).draw(jax.random.key(1), 4)

    @jax.jit
    def loss(key, process, times, weight):
        traces.append(1)
        return denoising_score_matching(key, silent, process, x0, times=times, weight=weight)[0]

    for i in range(3):
        process, times = VP(beta_max=20.0 + i), LogNormalTimes(-1.0 + 0.1 * i)
        loss(jax.random.key(i), process, times, MinSNR(5.0 + i))
    assert len(traces) == 1


def test_bad_input_raises():
    x0 = jnp.zeros((4, 3))
    with pytest.raises(TypeError, match="floating point"):
        denoising_score_matching(jax.random.key(0), silent, VP(), x0.astype(jnp.int32))
    with pytest.raises(ValueError, match="one a sample"):
        denoising_score_matching(jax.random.split(jax.random.key(0), 3), silent, VP(), x0)
    with pytest.raises(TypeError, match="typed key"):
        denoising_score_matching(jax.random.PRNGKey(0), silent, VP(), x0)
