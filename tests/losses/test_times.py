"""Samplers of times against their distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from diffjax.core.random import sample_keys
from diffjax.losses import (
    DiscreteTimes,
    ImportanceTimes,
    LogNormalTimes,
    StratifiedTimes,
    UniformTimes,
)
from diffjax.processes import EDM, VE, VP, Cosine, RectifiedFlow, SubVP, Tabulated
from tests.losses.common import vp

N = 50_000
# Kolmogorov-Smirnov at p = 1e-4: rejects any distribution that is off by 0.01 anywhere.
KS = stats.kstwobign.isf(1e-4) / np.sqrt(N)
PROCESSES = [VP(), SubVP(), VE(), EDM(), Cosine(), RectifiedFlow(t_max=0.999), Tabulated.ddpm(100)]


def draw(times, process, seed=0, n=N):
    return times(sample_keys(jax.random.key(seed), n), process)


def test_uniform():
    t, weight = draw(UniformTimes(0.2, 0.7), VP())
    assert stats.kstest(t, stats.uniform(0.2, 0.5).cdf).statistic < KS < 0.01
    assert (weight == 1).all()
    t, _ = draw(UniformTimes(), EDM())
    assert t.min() >= 0.002 and t.max() <= 80
    with pytest.raises(AssertionError):  # mutant: a range 3 % too long
        assert stats.kstest(t, stats.uniform(0, 77.6).cdf).statistic < KS


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_importance_times_estimate_the_uniform_mean(process):
    """E[weight h(t)] is the mean of h over uniform t, for every process (4 standard errors)."""
    t, weight = (np.asarray(a, np.float64) for a in draw(ImportanceTimes(), process, seed=1))
    low, high = float(process.t_min), float(process.t_max)
    assert t.min() >= low * (1 - 1e-6) and t.max() <= high * (1 + 1e-6)
    for h in (lambda t: np.sqrt(t / high), lambda t: (t / high) ** 2):
        values = weight * h(t)
        error = values.std() / np.sqrt(N)
        want = integrate.quad(h, low, high)[0] / (high - low)
        assert abs(values.mean() - want) < 4 * error
        assert error < 0.02 * want


def test_importance_density_is_the_likelihood_weighting():
    """VP: the quantiles of density beta/(1 - exp(-B)), by quadrature in NumPy."""
    density = lambda log_t: np.exp(log_t) * vp(np.exp(log_t))[2] / vp(np.exp(log_t))[1]  # noqa: E731
    total = integrate.quad(density, np.log(1e-5), 0)[0]
    for t in (1e-4, 1e-2, 0.3, 0.8):
        # lam falls from t_min on, so u counts from the clean end.
        u = integrate.quad(density, np.log(1e-5), np.log(t))[0] / total
        got, weight = ImportanceTimes().quantile(VP(), jnp.asarray([u]))
        np.testing.assert_allclose(got[0], t, rtol=1e-4)
        np.testing.assert_allclose(weight[0], total / (1 - 1e-5) / (density(np.log(t)) / t), 1e-4)


def test_importance_times_need_a_finite_log_snr():
    with pytest.raises(ValueError, match=r"0\.999 for a flow"):
        draw(ImportanceTimes(), RectifiedFlow(), n=4)
    with pytest.raises(ValueError, match=r"0\.999 for a flow"):
        jax.jit(lambda: draw(ImportanceTimes(), RectifiedFlow(), n=4))()


@pytest.mark.parametrize("process", [EDM(), VP(), RectifiedFlow()], ids=str)
def test_log_normal(process):
    """ln sigma~ is N(-1.2, 1.2^2) under every process whose range holds it."""
    t, weight = draw(LogNormalTimes(), process)
    alpha, _, sigma = process.coeffs(t)
    level = np.log(np.asarray(sigma, np.float64) / np.asarray(alpha, np.float64))
    assert stats.kstest(level, stats.norm(-1.2, 1.2).cdf).statistic < KS
    assert abs(level.mean() + 1.2) < 4 * 1.2 / np.sqrt(N)
    assert abs(level.std() - 1.2) < 4 * 1.2 / np.sqrt(2 * N) < 0.02
    assert (weight == 1).all()


def test_log_normal_is_clipped():
    t, _ = draw(LogNormalTimes(0.0, 10.0), EDM())
    assert t.min() == np.float32(0.002) and t.max() == np.float32(80)
    below = stats.norm.cdf(np.log(0.002) / 10)
    got = float(jnp.mean(t == t.min()))
    assert abs(got - below) < 4 * np.sqrt(below / N)
    ends = LogNormalTimes().quantile(EDM(), jnp.asarray([0.0, 1 - 2.0**-24])).t
    assert jnp.isfinite(ends).all()


def test_discrete_levels_are_those_of_the_table():
    betas = np.linspace(1e-3, 0.2, 10)
    process = Tabulated.from_betas(betas)
    t, weight = draw(DiscreteTimes(10), process)
    k = np.round(np.asarray(t) * 10).astype(int) - 1
    np.testing.assert_allclose(t, (k + 1) / 10, rtol=1e-6)
    assert stats.chisquare(np.bincount(k, minlength=10)).pvalue > 1e-4
    abar = np.cumprod(1 - betas)
    np.testing.assert_allclose(process.coeffs(t).alpha ** 2, abar[k], rtol=1e-5)
    assert (weight == 1).all()
    assert DiscreteTimes(7).quantile(process, jnp.asarray([1 - 2.0**-24])).t[0] == 1.0


def many(times, runs, batch):
    """t of independent batches, (runs, batch)."""
    keys = jax.random.split(jax.random.key(5), runs)
    return jax.jit(jax.vmap(lambda key: times(sample_keys(key, batch), VP()).t))(keys)


def test_stratified_times_are_evenly_spaced_and_each_is_uniform():
    batch = 48
    t = many(StratifiedTimes(UniformTimes(0.0)), 400, batch)
    gaps = np.diff(np.sort(t, axis=1), axis=1)
    np.testing.assert_allclose(gaps, 1 / batch, atol=3e-7)
    for i in (0, 17, 47):
        assert stats.kstest(t[:, i], "uniform").pvalue > 1e-4


def test_stratification_lowers_the_variance():
    """The mean of a smooth function of t: 1/B^2 instead of 1/B, so over 20 times less at B = 32."""
    independent, even = (
        np.var(np.mean(np.asarray(many(times, 300, 32)) ** 2, axis=1))
        for times in (UniformTimes(), StratifiedTimes())
    )
    assert independent > 20 * even


def test_stratified_log_normal_keeps_its_law():
    t, _ = draw(StratifiedTimes(LogNormalTimes()), EDM())
    assert stats.kstest(np.log(t), stats.norm(-1.2, 1.2).cdf).statistic < 0.2 * KS


def test_float64(x64):
    for times in (UniformTimes(), ImportanceTimes(), LogNormalTimes(), StratifiedTimes()):
        assert draw(times, VP(), n=4).t.dtype == jnp.float64


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: UniformTimes(0.5, 0.5), "t_min must be below t_max"),
        (lambda: UniformTimes(-0.1), "t_min must not be negative"),
        (lambda: ImportanceTimes(0.9, 0.1), "t_min must be below t_max"),
        (lambda: LogNormalTimes(0.0, 0.0), "std must be positive"),
        (lambda: DiscreteTimes(0), "levels must be at least 1"),
    ],
)
def test_bad_input_raises(build, message):
    with pytest.raises(ValueError, match=message):
        build()
