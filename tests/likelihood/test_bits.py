"""Bits/dim of known discrete distributions, by the flow and by the variational bound."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffjax.core.pytree import pytree
from diffjax.core.quantise import Quantisation
from diffjax.core.types import Prediction
from diffjax.likelihood import Bound, bits_per_dim, summarise, variational_bound
from diffjax.losses.times import ImportanceTimes
from diffjax.processes import EDM, VE, VP, RectifiedFlow
from diffjax.solvers.adaptive import PIController
from tests.oracles import Gaussian, Mixture, gaussian


@pytree
class Dequantised:
    """The exact denoiser of independent pixels with level probabilities P, dequantised uniformly.

    p_t(x) = sum_k P_k / (alpha w_k) [Phi((x - alpha lo_k)/sigma) - Phi((x - alpha hi_k)/sigma)].
    """

    process: object
    edges: jax.Array  # (L + 1,)
    probabilities: jax.Array  # (L,)

    def __call__(self, x_t, t):
        alpha, _, sigma = (c.reshape(-1, 1, 1) for c in self.process.coeffs(t))
        z = (x_t[..., None] - alpha * self.edges[None, None]) / sigma
        height = (self.probabilities / jnp.diff(self.edges))[None, None]
        cdf, pdf = jax.scipy.special.ndtr(z), jnp.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
        density = jnp.sum(height * (cdf[..., :-1] - cdf[..., 1:]), axis=-1)
        sigma_slope = jnp.sum(height * (pdf[..., :-1] - pdf[..., 1:]), axis=-1)
        eps = -sigma_slope / density
        alpha, sigma = alpha[..., 0], sigma[..., 0]
        return Prediction((x_t - sigma * eps) / alpha, eps)


def known(probabilities, quantisation, process):
    """(denoiser, images (B, 4), their bits/dim by -log2 P)."""
    levels = quantisation.levels
    edges = np.linspace(float(quantisation.low), float(quantisation.high), levels + 1)
    rng = np.random.default_rng(0)
    images = rng.choice(levels, size=(200, 4), p=probabilities)
    denoise = Dequantised(process, jnp.asarray(edges), jnp.asarray(probabilities))
    bits = -np.log2(probabilities)[images].mean(axis=1)
    return denoise, jnp.asarray(images, jnp.uint8), bits


run = jax.jit(bits_per_dim, static_argnames="repeats")


@pytest.mark.parametrize("range_", [(-1.0, 1.0), (0.0, 1.0)])
def test_uniform_over_256_levels_is_eight_bits(x64, key, range_):
    """Whatever the range: the offset is 7 on [-1, 1] and 8 on [0, 1].

    The tolerance is the default prior's mismatch, largest for [0, 1], whose mean is not 0.
    """
    quantisation = Quantisation(256, *range_)
    edges = jnp.asarray(range_)
    process = VP()
    denoise = Dequantised(process, edges, jnp.ones((1,)))
    images = np.random.default_rng(1).integers(0, 256, size=(100, 4))
    got = run(key, denoise, process, jnp.asarray(images, jnp.uint8), quantisation=quantisation)
    inside = ((images > 2) & (images < 253)).all(axis=1)  # the edges are blurred by sigma(t_min)
    np.testing.assert_allclose(got.per_image[inside], 8.0, atol=8e-3)
    assert abs(got.mean - 8) < 0.01


def check_known_distribution(process, told):
    """Per image -log2 P(levels)/D, away from the blurred edges of bins; and on average.

    Of 200 images of four pixels about a fifth have one within 3 sigma(t_min) of an edge. `told` is
    the quantisation that `bits_per_dim` is given; the smallest error rejected is 0.004 bits.
    """
    weights = np.abs(np.arange(17) - 8.0) + 1
    denoise, images, want = known(weights / weights.sum(), Quantisation(17), process)
    got = run(jax.random.key(0), denoise, process, images, quantisation=told)
    off = np.abs(np.asarray(got.per_image) - want)
    assert np.quantile(off, 0.7) < 3e-3
    assert abs(got.mean - want.mean()) < 4e-3
    np.testing.assert_allclose(got.stderr, want.std(ddof=1) / np.sqrt(want.size), rtol=0.02)


@pytest.mark.parametrize("process", [VP(), EDM(t_min=1e-3)], ids=["VP", "EDM"])
def test_known_distribution_over_17_levels(x64, process):
    check_known_distribution(process, Quantisation(17))


def test_mutant_width_of_the_bins(x64):
    with pytest.raises(AssertionError):
        check_known_distribution(VP(), Quantisation(17, low=-1.03))


def test_repeats_average_fresh_noise():
    """Four repeats of the Gaussian's bits/dim have a quarter of the variance in each image."""
    process, quantisation = VP(), Quantisation(8)
    denoise = gaussian(3).denoiser(process)
    images = jnp.broadcast_to(jnp.asarray([[1, 4, 6]], jnp.uint8), (600, 3))
    loose = PIController(1e-3, 1e-3)
    one, four = (
        run(
            jax.random.key(0),
            denoise,
            process,
            images,
            quantisation=quantisation,
            controller=loose,
            repeats=repeats,
        )
        for repeats in (1, 4)
    )
    np.testing.assert_allclose(np.var(four.per_image), np.var(one.per_image) / 4, rtol=0.25)
    assert abs(one.mean - four.mean) < 4 * np.hypot(one.stderr, four.stderr)


def test_summary_joins_batches(rng):
    values = jnp.asarray(rng.normal(size=50) + 3)
    got = summarise(values)
    np.testing.assert_allclose(got.mean, np.mean(values), rtol=1e-6)
    np.testing.assert_allclose(got.stderr, stats.sem(values), rtol=1e-5)
    assert jnp.isnan(summarise(values[:1]).stderr)


bound = jax.jit(variational_bound, static_argnames="n_times")


def gaussian_gap(oracle, process, x):
    """The bound's excess over -ln p(x), per point: of the prior, and of the decoder; NumPy."""
    m, d2 = np.asarray(oracle.mean, np.float64), np.asarray(oracle.std, np.float64) ** 2
    alpha, _, sigma = (np.float64(c) for c in process.coeffs(jnp.asarray(process.t_max)))
    V, s2 = alpha**2 * d2 + sigma**2, sigma**2
    end = (np.log(s2 / V) - ((alpha * (x - m)) ** 2 + s2) / V + (alpha**2 * x**2 + s2) / s2) / 2
    alpha, _, sigma = (np.float64(c) for c in process.coeffs(jnp.asarray(process.t_min)))
    V, s2 = alpha**2 * d2 + sigma**2, sigma**2
    spread = d2 * s2 / V  # of x0 given x_t
    miss = (s2 / V) ** 2 * (x - m) ** 2 + (alpha * d2 * sigma / V) ** 2
    decoder = (1 + np.log(s2 / alpha**2) - np.log(spread) - miss / spread) / 2
    return (end + decoder).sum(axis=1)


def check_bound(process, denoise, oracle):
    """5,000 draws at each of four points: the mean is -ln p and the gap, within 4 standard errors.

    The smallest error rejected is 0.2 nats (of 7 to 20 for the three terms).
    """
    points = np.repeat(
        np.asarray([[-0.5, 0.1, 0.7], [0, 0, 0], [1, 1, 1], [-1, 0.3, 2.0]]), 5000, 0
    )
    x = jnp.asarray(points, jnp.float32)
    got = np.asarray(bound(jax.random.key(3), denoise, process, x, n_times=64).total, np.float64)
    truth = stats.norm(np.asarray(oracle.mean), np.asarray(oracle.std)).logpdf(points).sum(axis=1)
    excess = (got + truth - gaussian_gap(oracle, process, points)).reshape(4, 5000)
    errors = excess.std(axis=1) / np.sqrt(5000)
    assert (np.abs(excess.mean(axis=1)) < 4 * errors).all()
    assert (4 * errors).max() < 0.2


@pytest.mark.parametrize(
    "process", [VP(), VE(), EDM(), RectifiedFlow(t_max=0.999)], ids=lambda p: type(p).__name__
)
def test_bound_is_tight_for_the_exact_denoiser(process):
    check_bound(process, gaussian(3).denoiser(process), gaussian(3))


def test_mutants_of_the_bound(monkeypatch):
    """Rejected: a noise prediction 3 % too large (a looser bound), and a wrong model's density."""
    process, oracle = VP(), gaussian(3)
    exact = oracle.denoiser(process)

    def loud(x_t, t):
        prediction = exact(x_t, t)
        return prediction._replace(eps=1.03 * prediction.eps)

    with pytest.raises(AssertionError):
        check_bound(process, jax.tree_util.Partial(loud), oracle)
    with pytest.raises(AssertionError):
        wrong = Gaussian(oracle.mean, oracle.std * 1.1)
        check_bound(process, exact, wrong)


def test_bound_of_a_wrong_model_is_above_the_entropy():
    """On average over the data no model beats -ln p; a model 20 % too wide loses 0.05 nats."""
    process, oracle = VP(), gaussian(3)
    x = oracle.draw(jax.random.key(0), 8000)
    entropy = stats.norm(0, np.asarray(oracle.std)).entropy().sum()
    wide = Gaussian(oracle.mean, oracle.std * 1.2)
    loss = 3 * (np.log(1.2) - (1 - 1.2**-2) / 2)  # KL of the two Gaussians
    # The same noise for both: their difference is far less noisy than either.
    right, wrong = (
        np.asarray(
            bound(jax.random.key(1), o.denoiser(process), process, x, n_times=64).total, np.float64
        )
        for o in (oracle, wide)
    )
    error = right.std() / np.sqrt(8000)
    assert abs(right.mean() - entropy) < 4 * error < 0.2
    gain = wrong - right
    assert abs(gain.mean() - loss) < 4 * gain.std() / np.sqrt(8000)


@pytest.mark.parametrize("placement", ["ends", "centres"])
def test_bound_of_levels(placement):
    """Data on 17 points with probabilities P, the exact posterior mean: the bound is -log2 P.

    n = 4,000 images of one pixel; the smallest error rejected is 0.1 bits.
    """
    process, quantisation = VP(), Quantisation(17, placement=placement)
    weights = np.abs(np.arange(17) - 8.0) + 1
    weights /= weights.sum()
    places = quantisation.to_model(jnp.arange(17))[:, None]
    oracle = Mixture(places, jnp.asarray(0.0), jnp.asarray(weights, jnp.float32))
    images = np.random.default_rng(0).choice(17, size=(4000, 1), p=weights)
    got = bound(
        jax.random.key(0),
        oracle.denoiser(process),
        process,
        jnp.asarray(images, jnp.uint8),
        quantisation=quantisation,
        n_times=128,
    )
    assert got.reconstruction.max() < 1e-6  # sigma(t_min) is far below a bin
    bits = got.bits_per_dim(1)
    off = np.asarray(bits.per_image, np.float64) + np.log2(weights)[images[:, 0]]
    error = off.std() / np.sqrt(off.size)
    assert abs(off.mean()) < 4 * error < 0.1


def test_levels_are_decoded_where_the_noise_is_large():
    """With sigma~(t_min) of half a bin the decoder costs what NumPy says."""
    process, quantisation = EDM(t_min=0.06), Quantisation(17)
    images = jnp.asarray(np.full((20_000, 1), 5), jnp.uint8)
    got = variational_bound(
        jax.random.key(0),
        lambda x, t: Prediction(x, x),
        process,
        images,
        quantisation=quantisation,
        n_times=1,
    ).reconstruction
    places = np.linspace(-1, 1, 17)
    z = np.random.default_rng(0).normal(size=200_000)
    logits = -((places[5] + 0.06 * z[:, None] - places) ** 2) / (2 * 0.06**2)
    want = np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[:, 5])
    assert abs(got.mean() - want) < 4 * np.asarray(got).std() / np.sqrt(20_000) < 0.05 * want


def test_bound_is_batch_invariant_and_refuses_an_infinite_log_snr():
    process, oracle = VP(), gaussian(3)
    x = oracle.draw(jax.random.key(0), 9)
    whole = bound(jax.random.key(1), oracle.denoiser(process), process, x)
    part = bound(jax.random.key(1), oracle.denoiser(process), process, x[:4])
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_array_equal(a[:4], b)
    with pytest.raises(ValueError, match=r"0\.999 for a flow"):
        variational_bound(jax.random.key(1), oracle.denoiser(process), RectifiedFlow(), x)


def test_times_of_a_sample_are_spread(key):
    """Sixteen times of one sample: one in each sixteenth of the log-SNR."""
    seen = []

    def spy(x_t, t):
        jax.debug.callback(lambda t: seen.append(np.asarray(t)), t)
        return Prediction(x_t, x_t)

    variational_bound(key, spy, EDM(), jnp.zeros((2, 3)), n_times=16)
    jax.effects_barrier()
    lam = np.sort(-2 * np.log(np.asarray(seen, np.float64)), axis=0)
    np.testing.assert_allclose(np.diff(lam, axis=0), 2 * np.log(80 / 0.002) / 16, rtol=1e-3)
    assert ImportanceTimes().t_min is None


def test_bound_in_bits():
    nats = jnp.asarray([1.0, 3.0])
    got = Bound(nats, nats, nats).bits_per_dim(3, log2_bin_width=-7.0)
    np.testing.assert_allclose(got.per_image, nats / np.log(2) + 7, rtol=1e-6)


def test_reals_are_refused_as_levels(key):
    with pytest.raises(TypeError, match="integer levels"):
        bits_per_dim(
            key, gaussian(3).denoiser(VP()), VP(), jnp.zeros((2, 3)), quantisation=Quantisation()
        )
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        bits_per_dim(
            key,
            gaussian(3).denoiser(VP()),
            VP(),
            jnp.zeros((2, 3), jnp.uint8),
            quantisation=Quantisation(),
            repeats=0,
        )
