"""N = 1000 of the reference protocol against the exact moments of a one-dimensional mixture.

Every element of x is a particle of its own: 32 samples of 1024 elements, n = 32,768 particles, of
weights 0.3 and 0.7 at -1 and 1 with deviation 0.5. The grid is the reference's, from the prior to
the cut-off, and Tweedie's denoising. Statistics with their exact values: the mean, E x^2, and the
variance within the modes, E sum_k p(k | x) (x - m_k)^2 / d^2 = 1. Each within 4 standard errors:
rejected are 0.024 in the mean (deviation 1.04), 2.4% in E x^2 and 3.1% in the variance within, so
noise 3% too strong, which raises that by 6%.

Particles of one sample share the Langevin step's norm over its 1024 elements, so the steps are
those of an image; the bias that this costs is 4/1024.
"""

import jax
import numpy as np
import pytest

from diffjax.core.pytree import pytree
from diffjax.core.types import Prediction
from diffjax.processes import VE, VP, SubVP, prior
from diffjax.solvers import (
    Ancestral,
    EulerMaruyama,
    Langevin,
    PredictorCorrector,
    ReverseDiffusion,
    Tweedie,
    grids,
    sample,
)
from tests.solvers.helpers import Mutant, noise_scaled_by, times_swapped

N, B, D = 1000, 32, 1024
WEIGHTS, MEANS, DEVIATION = np.asarray([0.3, 0.7]), np.asarray([-1.0, 1.0]), 0.5


@pytree
class Elementwise:
    """The exact denoiser of the mixture, element by element."""

    process: object

    def __call__(self, x, t):
        alpha, _, sigma = self.process.coeffs(t)
        variance = alpha**2 * DEVIATION**2 + sigma**2
        away = [x - alpha * m for m in MEANS]
        # p(1 | x) - p(0 | x) through one logistic function.
        logit = np.log(WEIGHTS[1] / WEIGHTS[0]) + (away[0] ** 2 - away[1] ** 2) / (2 * variance)
        p = jax.nn.sigmoid(logit)
        eps = sigma / variance * ((1 - p) * away[0] + p * away[1])
        return Prediction((x - sigma * eps) / alpha, eps)


def scores(x):
    """How many standard errors each statistic is away from its exact value."""
    x = np.asarray(x, np.float64).ravel()
    logits = np.log(WEIGHTS)[:, None] - (x - MEANS[:, None]) ** 2 / (2 * DEVIATION**2)
    joint = np.exp(logits - logits.max(0))  # far out too, where a mutant may lead
    inside = (joint / joint.sum(0) * (x - MEANS[:, None]) ** 2).sum(0) / DEVIATION**2
    mean = WEIGHTS @ MEANS
    exact = (mean, WEIGHTS @ MEANS**2 + DEVIATION**2, 1.0)
    values = (x, x**2, inside)
    return np.asarray(
        [(v.mean() - e) / (v.std() / np.sqrt(x.size)) for v, e in zip(values, exact, strict=True)]
    )


PROCESSES = {"vp": (VP(), 1e-3), "sub_vp": (SubVP(), 1e-3), "ve": (VE(), 1e-5)}
SOLVERS = {
    "pc": PredictorCorrector(ReverseDiffusion(), Langevin(snr=0.05)),
    "reverse_diffusion": ReverseDiffusion(),
    "ancestral": Ancestral(),
    "euler_maruyama": EulerMaruyama(),
}


def check(solver, name, seed=0):
    process, end = PROCESSES[name]

    @jax.jit
    def run(key, times):
        x = prior(jax.random.fold_in(key, 1), process, (B, D))
        return sample(
            key,
            Elementwise(process),
            x,
            times,
            solver=solver,
            process=process,
            final=Tweedie(),
        ).x

    x = run(jax.random.key(seed), grids.uniform(process, N - 1, end=end))
    assert np.isfinite(x).all()
    found = scores(x)
    assert np.abs(found).max() < 4, found


QUICK = [("pc", "ve"), ("reverse_diffusion", "vp"), ("ancestral", "sub_vp")]
CASES = [
    pytest.param(case, name, marks=() if (case, name) in QUICK else pytest.mark.slow)
    for case in SOLVERS
    for name in PROCESSES
]


@pytest.mark.parametrize(("case", "name"), CASES)
def test_moments_at_a_thousand_steps(case, name):
    check(SOLVERS[case], name)


MUTATIONS = {
    "noise 3% off": noise_scaled_by(1.03),
    "no noise": noise_scaled_by(0.0),
    "t and s swapped": times_swapped,
}


@pytest.mark.parametrize(
    ("mutation", "case", "name"),
    [
        ("noise 3% off", "ancestral", "sub_vp"),
        pytest.param("noise 3% off", "pc", "ve", marks=pytest.mark.slow),
        pytest.param("noise 3% off", "reverse_diffusion", "vp", marks=pytest.mark.slow),
        pytest.param("no noise", "reverse_diffusion", "vp", marks=pytest.mark.slow),
        pytest.param("t and s swapped", "ancestral", "ve", marks=pytest.mark.slow),
    ],
)
def test_mutants_are_found(mutation, case, name):
    with pytest.raises(AssertionError):
        check(Mutant(SOLVERS[case], MUTATIONS[mutation]), name)


def test_the_statistics_themselves():
    """Exact draws pass; a mode 3% wider does not."""
    rng = np.random.default_rng(0)
    k = rng.choice(2, p=WEIGHTS, size=B * D)
    z = rng.standard_normal(B * D)
    assert np.abs(scores(MEANS[k] + DEVIATION * z)).max() < 4
    assert np.abs(scores(MEANS[k] + 1.03 * DEVIATION * z)).max() > 4
