"""The hybrid loss: its terms against quadrature and SciPy, and what it trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from diffjax.core.quantise import Quantisation
from diffjax.core.types import Prediction
from diffjax.losses import DiscreteTimes, denoising_score_matching, half_sum, hybrid
from diffjax.losses.hybrid import bound_term, log_probability
from diffjax.prediction import LearnedRange, StepVariance, make_denoiser
from diffjax.processes import Tabulated

N = 1000
BETAS = np.linspace(1e-4, 0.02, N)
ABAR = np.cumprod(1 - BETAS)
DDPM = Tabulated.ddpm()


TERM = jax.jit(bound_term, static_argnums=4)


def term(levels, x0, guess, v):
    """L_k of samples of one element, bits."""
    n = len(levels)  # seven samples always: one compilation
    levels, x0, guess, v = (np.resize(a, 7) for a in (levels, x0, guess, v))
    x0, guess, v = (jnp.asarray(a, jnp.float32)[:, None] for a in (x0, guess, v))
    variance = StepVariance(v, LearnedRange())
    prediction = Prediction(guess, guess, {"variance": variance})
    t = (jnp.asarray(levels) + 1.0) / N
    return np.asarray(TERM(DDPM, prediction, x0, t, N))[:n]


def ddpm_step(k):
    """alpha_k, beta_k, the posterior's variance and its two weights, by DDPM's formulas."""
    beta, abar, before = BETAS[k], ABAR[k], ABAR[k - 1] if k else 1.0
    small = beta * (1 - before) / (1 - abar)
    of_x0 = np.sqrt(before) * beta / (1 - abar)
    of_xt = np.sqrt(1 - beta) * (1 - before) / (1 - abar)
    return beta, small, of_x0, of_xt


def variance_of(k, v):
    clipped = ddpm_step(max(k, 1))[1]
    return np.exp((v + 1) / 2 * np.log(BETAS[k]) + (1 - v) / 2 * np.log(clipped))


def divergence(k, x0, x_t, guess, v):
    """KL of the posterior from the model's step, by quadrature, in bits."""
    _, small, of_x0, of_xt = ddpm_step(k)
    q = stats.norm(of_x0 * x0 + of_xt * x_t, np.sqrt(small))
    p = stats.norm(of_x0 * guess + of_xt * x_t, np.sqrt(variance_of(k, v)))
    ends = q.mean() - 12 * q.std(), q.mean() + 12 * q.std()
    integrand = lambda x: q.pdf(x) * (q.logpdf(x) - p.logpdf(x)) / np.log(2)  # noqa: E731
    return integrate.quad(integrand, *ends, epsabs=1e-13, epsrel=1e-9, limit=200)[0]


LEVELS = np.array([1, 2, 40, 300, 998, 999])
X0 = np.array([0.5, -1.0, 0.2, 0.9, -0.3, 0.7])
GUESS = X0 + np.array([0.003, -0.01, 0.05, -0.2, 0.8, 3.0])
V = np.array([-0.9, 0.4, 1.3, -0.2, 0.7, -1.1])


def check_divergences(found):
    want = [divergence(*row) for row in zip(LEVELS, X0, 0.4 * X0, GUESS, V, strict=True)]
    np.testing.assert_allclose(found, want, rtol=3e-3, atol=2e-6)


def test_divergences_against_quadrature():
    check_divergences(term(LEVELS, X0, GUESS, V))


@pytest.mark.parametrize(
    "mutant",
    [
        lambda: term(LEVELS, X0, X0, V),  # the mean's error left out
        lambda: term(LEVELS, X0, GUESS, -V),  # the range the other way round
        lambda: term(LEVELS + 1, X0, GUESS, V),  # a level further
        lambda: term(LEVELS, X0, GUESS, V) * np.log(2),  # nats
    ],
)
def test_mutants(mutant):
    with pytest.raises(AssertionError):
        check_divergences(mutant())


def decoder(x0, guess, v, levels=256):
    """-log2 of the bin's probability under the model's Gaussian, by SciPy."""
    p = stats.norm(guess, np.sqrt(variance_of(0, v)))
    h = 1 / (levels - 1)
    upper = np.where(x0 > 1 - h, 1.0, p.cdf(x0 + h))
    lower = np.where(x0 < -1 + h, 0.0, p.cdf(x0 - h))
    return -np.log2(upper - lower)


def test_the_decoder_against_scipy():
    k = np.array([0, 1, 128, 254, 255, 255, 0])
    x0 = 2 * k / 255 - 1
    guess = x0 + np.array([0.001, 0.004, -0.006, 0.01, -0.009, 0.3, -0.2])
    v = np.array([-1.0, 0.0, 1.0, 0.5, -0.5, 1.0, 0.3])
    found = term(np.zeros(7), x0, guess, v)
    np.testing.assert_allclose(found, decoder(x0, guess, v), rtol=2e-3, atol=1e-6)
    with pytest.raises(AssertionError):  # a bin of half the width
        np.testing.assert_allclose(found, decoder(x0, guess, v, 511), rtol=2e-3, atol=1e-6)


def test_far_from_the_bin():
    """Where a difference of probabilities is 0: ln p is -((x0 - h - mu)/d)^2/2 and less."""
    found = term([0], [0.2], [1.4], [0.0])[0] * np.log(2)
    p = stats.norm(1.4, np.sqrt(variance_of(0, 0.0)))
    upper = p.logcdf(0.2 + 1 / 255)
    want = -(upper + np.log1p(-np.exp(p.logcdf(0.2 - 1 / 255) - upper)))
    np.testing.assert_allclose(found, want, rtol=1e-3)


@pytest.mark.parametrize(
    "quantisation",
    [Quantisation(), Quantisation(17, placement="centres"), Quantisation(200, 0.0, 1.0)],
)
@pytest.mark.parametrize("centre", [-0.98, 0.013, 1.3])
def test_the_decoder_is_a_distribution(quantisation, centre):
    x = quantisation.to_model(jnp.arange(quantisation.levels))
    stds = jnp.asarray([[0.005], [0.1], [2.0]])
    x, stds = jnp.broadcast_arrays(x[None], stds)
    found = jax.jit(log_probability)(x, centre, stds, quantisation)
    np.testing.assert_allclose(jnp.sum(jnp.exp(found), axis=1), 1.0, rtol=1e-4)


def network(params, x, label):
    """eps and v, a parameter each."""
    return jnp.concatenate([params["eps"] * x, params["v"] + 0 * x], axis=-1)


def gradients():
    """The loss's value and gradient, and those of the simple loss alone, at some parameters."""
    x0 = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (64, 3)), jnp.float32)

    def of(loss, *weights, **options):
        def value(params, **more):
            denoise = make_denoiser(
                network, DDPM, kind="eps", variables=params, learned_variance=LearnedRange()
            )
            losses, watch = loss(jax.random.key(0), denoise, DDPM, x0, **options, **more)
            return jnp.mean(losses), watch

        run = jax.jit(jax.value_and_grad(value, has_aux=True))
        params = {"eps": jnp.asarray(0.7), "v": jnp.asarray(0.1)}
        return [run(params, **more) for more in weights]

    [plain] = of(denoising_score_matching, {}, times=DiscreteTimes(N), reduce=half_sum)
    return plain, of(hybrid, {"bound_weight": 1.0}, {"bound_weight": 3.0}, reduce=half_sum)


def test_the_bound_trains_the_variance_alone():
    ((plain, _), plain_grads), [((value, watch), grads), (_, other)] = gradients()
    assert plain_grads["v"] == 0
    np.testing.assert_allclose(grads["eps"], plain_grads["eps"], rtol=1e-6)
    np.testing.assert_allclose(other["v"], 3 * grads["v"], rtol=1e-5)
    assert abs(grads["v"]) > 1e-6
    np.testing.assert_allclose(value, plain + np.mean(watch["bound"]), rtol=1e-5)


def test_the_best_variance_is_the_true_one():
    """On N(0, d^2) with the exact mean, dL/dv = 0 at the variance of x_s | x_t, and not 3 % off.

    n = 40,000 draws at one level; 4 standard errors of the slope are below 2 % of the variance.
    """
    d2, k, n = 0.25, 60, 40_000
    abar = ABAR[k]
    _, small, of_x0, _ = ddpm_step(k)
    spread = d2 * (1 - abar) / (abar * d2 + 1 - abar)  # Var(x0 | x_t)
    true = small + of_x0**2 * spread
    best = 2 * np.log(true / small) / np.log(BETAS[k] / small) - 1
    a, b = jax.random.normal(jax.random.key(0), (2, n, 1))
    x0 = np.sqrt(d2) * a
    x_t = np.sqrt(abar) * x0 + np.sqrt(1 - abar) * b
    guess = np.sqrt(abar) * d2 / (abar * d2 + 1 - abar) * x_t
    t = jnp.full((n,), (k + 1) / N)

    @jax.jit
    def slopes(v):
        def loss(v):
            extras = {"variance": StepVariance(jnp.full_like(x0, v), LearnedRange())}
            return bound_term(DDPM, Prediction(guess, guess, extras), x0, t, N)

        return jax.jvp(loss, (v,), (jnp.ones_like(v),))[1]

    per_log = np.log(BETAS[k] / small) / 2  # of the variance's logarithm, per v
    for factor, zero in ((1.0, True), (1.03, False), (0.97, False)):
        found = np.asarray(slopes(jnp.asarray(best + np.log(factor) / per_log)), np.float64)
        error = 4 * found.std() / np.sqrt(n)
        assert (abs(found.mean()) < error) == zero


def test_rare_levels_keep_finite_gradients():
    """Every level, a network that is far off: what is not taken has no part in the gradient."""
    t = (jnp.arange(N) + 1.0) / N
    x0 = jnp.full((N, 2), 0.3)

    def value(v, guess):
        extras = {"variance": StepVariance(v, LearnedRange())}
        return jnp.sum(bound_term(DDPM, Prediction(guess, guess, extras), x0, t, N))

    grads = jax.jit(jax.grad(value, argnums=(0, 1)))(jnp.zeros((N, 2)), jnp.full((N, 2), 300.0))
    assert np.isfinite(grads[0]).all()
    assert not np.any(grads[1])


def test_bad_input_raises():
    x0 = jnp.zeros((4, 3))
    plain = make_denoiser(lambda x, label: x, DDPM, kind="eps")
    with pytest.raises(ValueError, match="losses.hybrid needs a learned variance"):
        jax.eval_shape(lambda x0: hybrid(jax.random.key(0), plain, DDPM, x0), x0)
    with pytest.raises(ValueError, match="levels must be at least 2"):
        hybrid(jax.random.key(0), plain, DDPM, x0, levels=1)
    with pytest.raises(ValueError, match="bound_weight must not be negative"):
        hybrid(jax.random.key(0), plain, DDPM, x0, bound_weight=-1.0)
