"""The ends of a solve: exact landing at sigma = 0, digits in float32, finite gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.processes import EDM, VP, Cosine, RectifiedFlow, SubVP, Tabulated
from diffjax.solvers import (
    DDIM,
    Ancestral,
    EDMChurn,
    Euler,
    EulerMaruyama,
    Heun,
    Langevin,
    PredictorCorrector,
    ReverseDiffusion,
    grids,
    sample,
)
from diffjax.solvers.driver import ToEnd
from tests.oracles import PointMass, gaussian
from tests.solvers.helpers import scaled_noise

SOLVERS = {
    "euler": Euler(),
    "heun": Heun(),
    "ddim": DDIM(),
    "ddim_eta": DDIM(eta=0.6),
    "ancestral": Ancestral(),
    "ancestral_large": Ancestral("large"),
    "euler_maruyama": EulerMaruyama(),
    "reverse_diffusion": ReverseDiffusion(),
    "churned_heun": EDMChurn(Heun(), 2.0, 5.0),
    "corrected": PredictorCorrector(ReverseDiffusion(), Langevin()),
}
PROCESSES = {
    "vp": VP(),
    "sub_vp": SubVP(),
    "edm": EDM(),
    "cosine": Cosine(),
    "flow": RectifiedFlow(),
    "ddpm": Tabulated.ddpm(100),
}
POINT = jnp.asarray([0.3, -0.9, 0.0, 1.0])


def lands(solver, process, n=5):
    """A solve of the point mass on a coarse even grid: the last interval starts at much noise."""
    t_max = 0.9 if isinstance(process, RectifiedFlow) else None
    times = grids.uniform(process, n, end=0.0, t_max=t_max)
    x = 2 * jax.random.normal(jax.random.key(1), (3, 4))
    oracle = PointMass(POINT)

    @jax.jit
    def run(x, times):
        return sample(
            jax.random.key(0),
            oracle.denoiser(process),
            x,
            times,
            solver=solver,
            process=process,
        ).x

    return run(x, times)


# Every solver with one process, every process with two solvers.
PAIRS = [(solver, "vp") for solver in SOLVERS]
PAIRS += [(s, p) for s in ("euler_maruyama", "heun") for p in PROCESSES if p != "vp"]


@pytest.mark.parametrize("case, name", PAIRS)
def test_every_solver_lands_on_the_point(case, name):
    """With all data at one point the last interval gives that point, whatever came before."""
    end = lands(SOLVERS[case], PROCESSES[name])
    np.testing.assert_allclose(end, jnp.broadcast_to(POINT, end.shape), atol=2e-6)


def test_landing_finds_a_last_step_like_the_others():
    """The mutant: Euler-Maruyama's mean as the last interval leaves noise."""

    class Through:
        stages = final_stages = 1
        stochastic, probability_flow = True, False
        init = EulerMaruyama.init
        step = EulerMaruyama.step

        def finish(self, *args):
            with scaled_noise(0.0):
                return self.step(*args)

        _mean, _spread = EulerMaruyama._mean, EulerMaruyama._spread

    end = lands(Through(), VP())
    assert jnp.abs(end - POINT[None]).max() > 0.01


# Rounding is 6e-8 a step. Euler and Heun add a small increment to x, so 1000 steps cost little more
# than one; DDIM builds x anew in each, which walks to about 30 times that on values of order 1. A
# digit lost in each step would show as 1e-4 and more.
DIGITS = {"euler": 1e-5, "heun": 1e-5, "ddim": 6e-5}


@pytest.mark.parametrize("name", ["vp", "edm", "cosine", "sub_vp"])
@pytest.mark.parametrize("case", DIGITS)
def test_float32_keeps_its_digits(case, name):
    """1000 steps in float32 and in float64 on the same times agree."""
    process, solver = PROCESSES[name], SOLVERS[case]
    times = np.asarray(grids.log_snr(process, 1000, t_min=1e-3 if name != "edm" else 0.002))
    scale = float(process.coeffs(jnp.asarray(process.t_max)).sigma)
    x = scale * np.random.default_rng(0).standard_normal((16, 3)).astype(np.float32)

    def run(dtype):
        denoise = gaussian(3, dtype).denoiser(process)
        solve = jax.jit(
            lambda x, times: (
                sample(jax.random.key(0), denoise, x, times, solver=solver, process=process).x
            )
        )
        return np.asarray(solve(jnp.asarray(x, dtype), jnp.asarray(times, dtype)), np.float64)

    single = run(jnp.float32)
    with jax.enable_x64(True):
        double = run(jnp.float64)
    assert np.abs(double).max() > 0.5
    np.testing.assert_allclose(single, double, atol=DIGITS[case])


@pytest.mark.parametrize("case", ["ddim", "heun", "ddim_eta", "reverse_diffusion", "churned_heun"])
def test_gradients_are_finite_to_the_end(case):
    """With respect to the start, the data's mean and the solver's numbers, over a whole solve."""
    process = VP()
    oracle = gaussian()
    x = jax.random.normal(jax.random.key(1), (3, 3))
    times = grids.quadratic(process, 6)
    solver = DDIM(eta=0.0) if case == "ddim_eta" else SOLVERS[case]

    def total(x, oracle, solver, process):
        denoise = oracle.denoiser(process)
        return jnp.sum(
            sample(
                jax.random.key(0),
                denoise,
                x,
                times,
                solver=solver,
                process=process,
                final=ToEnd(),
            ).x
            ** 2
        )

    gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))(x, oracle, solver, process)
    leaves = jax.tree.leaves(gradients)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in leaves)
    assert float(jnp.abs(gradients[0]).max()) > 0
