"""Learned variances: which step they belong to, what splits them off, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core.types import Prediction
from diffjax.prediction import LearnedLog, LearnedRange, make_denoiser
from diffjax.prediction.learned import step_variance
from diffjax.processes import VP, Tabulated

X = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3)), jnp.float32)
V = jnp.asarray(np.random.default_rng(1).uniform(-1.2, 1.2, (4, 3)), jnp.float32)


def doubled(x, label):
    """An eps network whose extra channels are V."""
    return jnp.concatenate([0.3 * x, V], axis=-1)


def ddpm_betas(n=1000):
    return np.linspace(1e-4, 0.02, n) * (1000 / n)


def reference_std(k, v, abar):
    """iDDPM's interpolation at level k of the levels with these abar, in float64."""
    before = np.concatenate([[1.0], abar[:-1]])
    beta = 1 - abar / before
    small = beta * (1 - before) / (1 - abar)
    clipped = np.concatenate([small[1:2], small[1:]])
    share = (v + 1) / 2
    return np.exp(0.5 * (share * np.log(beta[k]) + (1 - share) * np.log(clipped[k])))


def range_std(t, s, floor=0.0, process=None):
    process = Tabulated.ddpm() if process is None else process
    return LearnedRange().std(V, process, jnp.asarray(t), jnp.asarray(s), floor)


@pytest.mark.parametrize("k", [1, 17, 500, 999])
def test_the_range_is_that_of_the_reference_code(k):
    abar = np.cumprod(1 - ddpm_betas())
    want = reference_std(k, np.asarray(V, float), abar)
    np.testing.assert_allclose(range_std((k + 1) / 1000, k / 1000), want, rtol=2e-4)
    with pytest.raises(AssertionError):  # a step of two levels is not it
        np.testing.assert_allclose(range_std((k + 1) / 1000, (k - 1) / 1000), want, rtol=0.1)


def test_the_range_follows_the_step():
    """On a tenth of the levels it is that of a chain with their abar, as the code's respacing."""
    chosen = np.arange(9, 1000, 10)
    abar = np.cumprod(1 - ddpm_betas())[chosen]
    want = reference_std(30, np.asarray(V, float), abar)
    got = range_std((chosen[30] + 1) / 1000, (chosen[29] + 1) / 1000)
    np.testing.assert_allclose(got, want, rtol=2e-4)


def test_the_step_onto_clean_data():
    """c is 0 there, so the deviation is; with a floor it is the code's clipped one."""
    assert not np.any(range_std(1e-3, 0.0))
    abar = np.cumprod(1 - ddpm_betas())
    floor = reference_std(1, -1.0, abar)
    want = reference_std(0, np.asarray(V, float), abar)
    np.testing.assert_allclose(range_std(1e-3, 0.0, floor), want, rtol=2e-4)


def test_gradients_are_finite_everywhere():
    def total(v, t, s):
        return jnp.sum(LearnedRange().std(v, VP(), t, s))

    # A step, one of no length as padding has, and one onto clean data.
    for t, s in ((0.5, 0.4), (0.5, 0.5), (0.5, 0.0)):
        grads = jax.grad(total, argnums=(0, 1, 2))(V, jnp.asarray(t), jnp.asarray(s))
        assert all(np.isfinite(g).all() for g in grads)


def test_the_logarithm_itself():
    found = LearnedLog().std(V, VP(), jnp.asarray(0.5), jnp.asarray(0.4))
    np.testing.assert_allclose(found, np.exp(np.asarray(V, float)) ** 0.5, rtol=1e-6)


@pytest.mark.parametrize("rule", [LearnedRange(), LearnedLog()], ids=str)
def test_channels_are_split(rule):
    t = jnp.asarray([0.2, 0.4, 0.6, 0.8])
    plain = make_denoiser(lambda x, label: 0.3 * x, VP(), kind="eps")(X, t)
    denoise = make_denoiser(doubled, VP(), kind="eps", learned_variance=rule)
    found = jax.jit(lambda d, x: d(x, t))(denoise, X)
    np.testing.assert_allclose(found.x0, plain.x0, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.eps, plain.eps, rtol=1e-5)
    variance = step_variance(found, "this")
    np.testing.assert_array_equal(variance.values, V)
    want = rule.std(V, VP(), t, t / 2)
    np.testing.assert_allclose(variance.std(VP(), t, t / 2), want, rtol=1e-6)


def test_trees_are_split_leaf_by_leaf():
    x = {"a": X, "b": jnp.ones((4, 2, 2))}
    twice = lambda x, label: jax.tree.map(lambda a: jnp.concatenate([a, 2 * a], -1), x)  # noqa: E731
    denoise = make_denoiser(twice, VP(), kind="eps", learned_variance=LearnedLog())
    values = step_variance(denoise(x, jnp.asarray(0.5)), "this").values
    jax.tree.map(lambda v, a: np.testing.assert_array_equal(v, 2 * a), values, x)


def test_a_mismatch_raises():
    half = jnp.asarray(0.5)
    with pytest.raises(ValueError, match=r"got \(4, 6\), twice the channels.*LearnedRange\(\)"):
        make_denoiser(doubled, VP(), kind="eps")(X, half)
    single = make_denoiser(lambda x, t: x, VP(), kind="eps", learned_variance=LearnedRange())
    with pytest.raises(ValueError, match=r"twice the channels of x, \(4, 6\); got \(4, 3\).*leave"):
        single(X, half)
    with pytest.raises(ValueError, match="this needs a learned variance.*learned_variance="):
        step_variance(Prediction(X, X), "this")
