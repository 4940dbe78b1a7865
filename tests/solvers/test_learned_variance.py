"""Ancestral sampling with a learned variance: exact on Gaussian data, whatever the steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core.pytree import pytree
from diffjax.core.types import Prediction
from diffjax.prediction import LearnedLog, LearnedRange, StepVariance, make_denoiser
from diffjax.processes import VP
from diffjax.solvers import Ancestral, Keep, Tweedie, grids, sample
from diffjax.testing import propagate_moments
from tests.oracles import gaussian

SPAN = (0.9, 0.1)  # of times


@pytest.fixture
def oracle(x64):
    return gaussian(2, jnp.float64)


@pytest.fixture
def times(x64):
    return jnp.linspace(*SPAN, 5)


def marginal(oracle, t):
    c = VP().coeffs(jnp.asarray(t))
    return c.alpha * oracle.mean, jnp.diag(c.alpha**2 * oracle.std**2 + c.sigma**2)


@pytree
class Exact:
    """The oracle with the true variance of x_s | x_t, found by conditioning the joint Gaussian.

    It knows the grid, as a network knows the steps that it was trained on.
    """

    oracle: object
    times: object
    rule: object

    def __call__(self, x_t, t):
        found = self.oracle.denoiser(VP())(x_t, t)
        i = jnp.argmin(jnp.abs(self.times[:-1] - t))
        at_t, at_s = VP().coeffs(self.times[i]), VP().coeffs(self.times[i + 1])
        d2 = self.oracle.std[None] ** 2
        # x_t = a x_s + b z, so Cov(x_s, x_t) = a V_s.
        a = at_t.alpha / at_s.alpha
        v_s, v_t = (c.alpha**2 * d2 + c.sigma**2 for c in (at_s, at_t))
        variance = jnp.broadcast_to(v_s - (a * v_s) ** 2 / v_t, x_t.shape)
        if isinstance(self.rule, LearnedLog):
            values = jnp.log(variance)
        else:
            b2 = at_t.sigma**2 - a**2 * at_s.sigma**2
            c2 = b2 * at_s.sigma**2 / at_t.sigma**2
            values = 2 * jnp.log(variance / c2) / jnp.log(b2 / c2) - 1
        return Prediction(found.x0, found.eps, {"variance": StepVariance(values, self.rule)})


def end_moments(oracle, times, variance, rule):
    return propagate_moments(
        Ancestral(variance), Exact(oracle, times, rule), VP(), times, *marginal(oracle, SPAN[0])
    )


@pytest.mark.parametrize("rule", [LearnedRange(), LearnedLog()], ids=str)
def test_exact_on_gaussian_data_in_four_steps(oracle, times, rule):
    mean, covariance = end_moments(oracle, times, "learned", rule)
    exact = marginal(oracle, SPAN[1])
    np.testing.assert_allclose(mean, exact[0], rtol=1e-10)
    np.testing.assert_allclose(covariance, exact[1], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_fixed_variances_are_not(oracle, times, variance):
    """The resolution of the test above: 6 to 40 % of the variance."""
    covariance = end_moments(oracle, times, variance, LearnedLog())[1]
    gap = np.abs(np.diag(covariance / marginal(oracle, SPAN[1])[1]) - 1)
    assert gap.min() > 0.01


def extremes(value):
    """A network whose extra channels are all `value`."""
    return lambda x, label: jnp.concatenate([jnp.sin(x), jnp.full_like(x, value)], axis=-1)


@pytest.mark.parametrize(("value", "variance"), [(-1.0, "small"), (1.0, "large")])
def test_the_ends_of_the_range_are_the_fixed_variances(value, variance, key):
    x = jax.random.normal(key, (5, 3))
    times = grids.uniform(VP(), 6, end=1e-3)

    def draw(denoise, solver):
        solve = jax.jit(lambda: sample(key, denoise, x, times, solver=solver, process=VP(),
                                       final=Tweedie()).x)  # fmt: skip
        return solve()

    learned = make_denoiser(extremes(value), VP(), kind="eps", learned_variance=LearnedRange())
    plain = make_denoiser(lambda x, label: jnp.sin(x), VP(), kind="eps")
    want = draw(plain, Ancestral(variance))
    np.testing.assert_allclose(draw(learned, Ancestral("learned")), want, rtol=2e-4, atol=2e-4)
    # A denoiser with a variance serves the other solvers as well.
    np.testing.assert_allclose(draw(learned, Ancestral(variance)), want, rtol=1e-5, atol=1e-5)


def test_laws_of_the_member(key):
    """A prefix of the batch, gradients, float32 kept; the others are those of `Ancestral`."""
    x = jax.random.normal(key, (5, 3))
    keys = jax.random.split(key, 5)
    times = grids.uniform(VP(), 3, end=1e-2)

    def draw(keys, x, beta=0.1):
        own = make_denoiser(extremes(0.3), VP(beta), kind="eps", learned_variance=LearnedRange())
        return sample(
            keys, own, x, times, solver=Ancestral("learned"), process=VP(beta), final=Keep()
        ).x

    whole = jax.jit(draw)(keys, x)
    assert whole.dtype == jnp.float32
    np.testing.assert_allclose(jax.jit(draw)(keys[:2], x[:2]), whole[:2], rtol=1e-5, atol=1e-6)
    slope = jax.jit(jax.grad(lambda beta: jnp.sum(draw(keys, x, beta))))(jnp.asarray(0.1))
    assert np.isfinite(slope) and slope != 0


def test_a_denoiser_without_a_variance_is_refused(key):
    plain = make_denoiser(lambda x, label: x, VP(), kind="eps")
    with pytest.raises(ValueError, match=r"Ancestral\('learned'\) needs a learned variance"):
        sample(
            key, plain, jnp.ones((2, 3)), grids.uniform(VP(), 3, end=0.1),
            solver=Ancestral("learned"), process=VP(), final=Tweedie(),
        )  # fmt: skip
