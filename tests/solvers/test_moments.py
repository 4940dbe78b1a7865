"""Samples of the stochastic solvers against the exact law, with what the tests would reject.

The data are a three-mode mixture in 16 dimensions, n = 2048 samples of it are drawn. Statistics:
the mean in 2 random directions, E|x|^2, and E ln p(x), whose truth comes from 200,000 exact draws.
Each must lie within 4 standard errors (about 6 in 10,000 false alarms for all of a test's
statistics together if they were independent; the seed is fixed). Smallest errors that are
rejected: 0.05 in a mean of deviation 0.7, 2% in E|x|^2, 0.18 nats in E ln p, whose deviation is 2.8
nats: noise 3% too strong raises the variance within a mode by 6%, which costs 0.5 nats.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import random
from diffjax.processes import EDM, VE, VP, SubVP, perturb
from diffjax.solvers import (
    DDIM,
    Ancestral,
    EDMChurn,
    EulerMaruyama,
    Heun,
    Keep,
    Langevin,
    PredictorCorrector,
    ReverseDiffusion,
    grids,
    sample,
)
from tests.oracles import Isotropic, mixture
from tests.solvers.helpers import Mutant, noise_scaled_by, times_swapped

DIM, COUNT, STEPS = 16, 2048, 600
ORACLE = mixture(DIM)
PLANE = np.random.default_rng(0).standard_normal((DIM, 2)) / np.sqrt(DIM)


def statistics(x, log_prob):
    """(n, 4): two projections, |x|^2, ln p(x)."""
    x = np.asarray(x, np.float64)
    return np.column_stack([x @ PLANE, (x**2).sum(1), np.asarray(log_prob, np.float64)])


@functools.cache
def truth(process, t):
    """Mean and its standard error of each statistic under p_t."""
    key, n = jax.random.key(99), 200_000
    x0 = ORACLE.draw(key, n)
    z = jax.random.normal(jax.random.key(98), x0.shape)
    x = perturb(process, x0, jnp.asarray(t), z)
    values = statistics(x, ORACLE.log_prob(process, x, jnp.asarray(t)))
    return values.mean(0), values.std(0) / np.sqrt(n)


def check_law(x, process, t, *, standard_errors=4.0):
    """Every statistic of x within so many standard errors of its truth under p_t."""
    values = statistics(x, ORACLE.log_prob(process, x, jnp.asarray(t)))
    exact, exact_error = truth(process, t)
    error = np.sqrt(values.var(0) / len(values) + exact_error**2)
    scores = (values.mean(0) - exact) / error
    assert np.abs(scores).max() < standard_errors, scores


def check_solver(solver, process):
    """From p at t_high to p at t_low, both exact, so no error but the solver's."""
    low, high = RANGES[process]
    x0 = ORACLE.draw(jax.random.key(1), COUNT)
    z = jax.random.normal(jax.random.key(2), x0.shape)
    x = perturb(process, x0, jnp.asarray(high), z)
    times = grids.log_snr(process, STEPS, t_max=high, end=low)
    denoise = ORACLE.denoiser(process)

    @jax.jit
    def run(key, x, times):
        return sample(key, denoise, x, times, solver=solver, process=process, final=Keep()).x

    check_law(run(jax.random.key(3), x, times), process, low)


VP_, VE_, SUB, EDM_ = VP(), VE(), SubVP(), EDM()
RANGES = {VP_: (0.03, 0.9), VE_: (0.3, 0.8), SUB: (0.05, 0.9), EDM_: (0.1, 5.0)}
BATCHED = Langevin(snr=0.05, coupling="batch")
CASES = {
    "euler_maruyama": (EulerMaruyama(), VP_),
    "reverse_diffusion": (ReverseDiffusion(), VE_),
    "ancestral": (Ancestral(), SUB),
    "ddim_eta": (DDIM(eta=0.7), VP_),
    "churned_heun": (EDMChurn(Heun(), 40.0, STEPS), EDM_),
    "corrected": (
        PredictorCorrector(ReverseDiffusion(), Langevin(snr=0.05, coupling="batch")),
        VE_,
    ),
}
MUTATIONS = {
    "noise 3% off": noise_scaled_by(1.03),
    "no noise": noise_scaled_by(0.0),
    "t and s swapped": times_swapped,
}
QUICK = {
    "noise 3% off": ("euler_maruyama", "corrected"),
    "no noise": ("ddim_eta",),
    "t and s swapped": ("ancestral",),
}
PAIRS = [
    pytest.param(case, mutation, marks=() if case in QUICK[mutation] else pytest.mark.slow)
    for mutation in MUTATIONS
    for case in CASES
]


@pytest.mark.parametrize("case", CASES)
def test_moments(case):
    check_solver(*CASES[case])


@pytest.mark.parametrize("case, mutation", PAIRS)
def test_moments_find_mutants(case, mutation):
    """The same check fails for every mutant."""
    solver, process = CASES[case]
    with pytest.raises(AssertionError):
        check_solver(Mutant(solver, MUTATIONS[mutation]), process)


# --- Langevin alone --------------------------------------------------------------------------

VARIANCE = {
    # e(x) ~ 1/|x|^2 on Gaussian data. The law that stays is ~ |x|^2 exp(-|x|^2/(2 V)), and
    # E |z|^2 z z^T = (D + 2) I makes V larger than it should be by (D + 2)/D: both raise E|x|^2.
    "sample": lambda dim: ((dim + 2) / dim) ** 2,
    "batch": lambda dim: 1.0,
}


@pytest.mark.parametrize(
    "coupling, dim, count",
    [
        ("sample", 16, 4000),
        pytest.param("sample", 256, 1000, marks=pytest.mark.slow),
        ("batch", 64, 2000),
    ],
)
def test_langevin_at_one_time(coupling, dim, count):
    """500 steps at snr 0.1 from p_t: E|x|^2 stays, but for the known bias of per-sample norms.

    Euler's step of relative size e/(2 V) = snr^2 adds a factor 1/(1 - snr^2). One standard error is
    below 0.7%, so 3% is rejected at four of them.
    """
    process, t, snr = VE(), jnp.asarray(0.5), 0.1
    denoise = Isotropic(process)
    spread = jnp.sqrt(process.coeffs(t).sigma ** 2 + denoise.std**2)
    x = spread * jax.random.normal(jax.random.key(0), (count, dim))
    x = x / jnp.sqrt(jnp.mean(x**2)) * spread  # the start's own error taken out
    corrector = Langevin(snr=snr, n_steps=500, coupling=coupling)
    keys = random.sample_keys(jax.random.key(1), count)
    y = jax.jit(lambda x: corrector.correct(keys, denoise, process, x, t, t))(x)
    assert jnp.abs(jnp.mean(x * y)) < 0.1 * spread**2  # it has forgotten where it started
    ratio = np.asarray(jnp.mean(y**2, axis=1) / spread**2, np.float64)
    exact = VARIANCE[coupling](dim) / (1 - snr**2)
    assert abs(ratio.mean() - exact) < 4 * ratio.std() / np.sqrt(count)
    assert abs(ratio.mean() * 1.03 - exact) > 4 * ratio.std() / np.sqrt(count)


@pytest.mark.slow
def test_per_sample_norms_serve_in_many_dimensions():
    """Predictor and corrector at D = 1024: E|x|^2 within the 4/D that per-sample norms cost."""
    process, dim, count = VE(), 1024, 256
    denoise = Isotropic(process)
    low, high = RANGES[VE_]
    times = grids.log_snr(process, 150, t_max=high, end=low)
    solver = PredictorCorrector(Ancestral(), Langevin(snr=0.05))
    at = lambda t: process.coeffs(jnp.asarray(t)).sigma ** 2 + denoise.std**2  # noqa: E731
    x = jnp.sqrt(at(high)) * jax.random.normal(jax.random.key(0), (count, dim))

    def ratios(solver):
        run = jax.jit(
            lambda x: (
                sample(
                    jax.random.key(1),
                    denoise,
                    x,
                    times,
                    solver=solver,
                    process=process,
                    final=Keep(),
                ).x
            )
        )
        return np.asarray(jnp.mean(run(x) ** 2, axis=1) / at(low), np.float64)

    bound = 4 / dim + 0.01 + 4 * np.sqrt(2 / dim / count)  # 0.01: the predictor's 150 steps
    assert abs(ratios(solver).mean() - 1) < bound
    assert abs(ratios(Mutant(solver, noise_scaled_by(1.03))).mean() - 1) > bound
