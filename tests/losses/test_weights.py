"""Weightings in float32 against the same ratios in float64, down to the smallest times."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.losses import Likelihood, MinSNR, Sigmoid
from diffjax.processes import EDM, VE, VP, RectifiedFlow, SubVP
from tests.losses.common import vp


def on_eps(weight, process, t):
    """The weight on |eps^ - eps|^2, in float64."""
    a, b = weight.row(process, jnp.asarray(t, jnp.float32))
    assert a == 0.0
    return np.asarray(b, np.float64) ** 2


T = np.asarray([1e-5, 1e-4, 1e-3, 0.05, 0.5, 1.0], np.float32).astype(np.float64)


def test_likelihood_ratio_in_float32():
    """g^2/sigma^2 from the paper's formulas; the plain 1 - exp(-B) would be off by a percent."""
    _, s2, beta = vp(T)
    np.testing.assert_allclose(on_eps(Likelihood(), VP(), T), beta / s2, rtol=2e-6)
    sub = beta * (1 - (1 - s2) ** 2) / s2**2
    np.testing.assert_allclose(on_eps(Likelihood(), SubVP(), T), sub, rtol=2e-6)
    np.testing.assert_allclose(on_eps(Likelihood(), VE(), T), 2 * np.log(5000) + 0 * T, rtol=2e-6)
    np.testing.assert_allclose(on_eps(Likelihood(), EDM(), T), 2 / T, rtol=2e-6)
    inside = T[:-1]
    want = 2 / (inside * (1 - inside))
    np.testing.assert_allclose(on_eps(Likelihood(), RectifiedFlow(), inside), want, rtol=2e-6)


def test_sigmoid_is_the_gated_likelihood():
    alpha, s2, beta = vp(T)
    want = beta / s2 / (1 + np.exp(2.0) * alpha**2 / s2)
    np.testing.assert_allclose(on_eps(Sigmoid(-2.0), VP(), T), want, rtol=1e-5)


def test_min_snr_at_both_ends():
    """snr = 0 gives 1 and snr = inf gives 0, with finite gradients."""
    flow = RectifiedFlow()
    t = np.asarray([0.0, 0.1, 0.5, 1.0])
    got = on_eps(MinSNR(5.0), flow, t)
    snr = ((1 - t[1:-1]) / t[1:-1]) ** 2
    np.testing.assert_allclose(got[1:-1], np.minimum(1, 5 / snr), rtol=1e-6)
    assert got[0] == 0 and got[-1] == 1
    slope = jax.vmap(jax.grad(lambda t: MinSNR(5.0).row(flow, t).b))(jnp.asarray(t))
    assert jnp.isfinite(slope).all()


def test_bad_gamma_raises():
    with pytest.raises(ValueError, match="gamma must be positive"):
        MinSNR(0.0)
