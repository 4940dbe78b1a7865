"""Inputs: defaults work, and what cannot be used raises, naming the rule and the way out."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax.prediction.kinds
import diffjax.prediction.precondition
import diffjax.processes
import diffjax.solvers
from diffjax.prediction import EDMF, V, make_denoiser
from diffjax.processes import EDM, VE, VP, Cosine, RectifiedFlow, SubVP, Tabulated
from diffjax.solvers import (
    DDIM,
    Ancestral,
    AnnealedLangevin,
    EDMChurn,
    Euler,
    Heun,
    Keep,
    Langevin,
    NoiselessPredictor,
    NoPredictor,
    PredictorCorrector,
    Tweedie,
    grids,
    sample,
)
from tests import members, oracles
from tests.laws import cases

ROOMS = (
    diffjax.processes,
    diffjax.solvers,
    diffjax.prediction.kinds,
    diffjax.prediction.precondition,
)


def statistics():
    """A table of two equal levels."""
    ends = jnp.asarray([-5.0, 5.0])
    return diffjax.solvers.ModelStatistics(ends, jnp.ones(2), jnp.zeros(2), jnp.zeros(2))


# Classes without defaults for every field: what they need.
NEEDS = {
    "Tabulated": lambda: Tabulated.ddpm(),
    "EDMChurn": lambda: EDMChurn(Heun(), s_churn=1.0, n_steps=5.0),
    "PredictorCorrector": lambda: PredictorCorrector(Euler(), Langevin()),
    "NearestLevel": lambda: diffjax.prediction.precondition.NearestLevel(jnp.arange(3.0)),
    "DescendingIndex": lambda: diffjax.prediction.precondition.DescendingIndex(10),
    "GaussianDirections": lambda: diffjax.solvers.GaussianDirections(
        jnp.zeros(3), jnp.eye(2, 3), jnp.ones(2)
    ),
    "GaussianDiagonal": lambda: diffjax.solvers.GaussianDiagonal(jnp.zeros(3), jnp.ones(3)),
    "LangevinGibbs": lambda: diffjax.solvers.LangevinGibbs(len, jnp.asarray([0.5, 0.1])),
    "Restart": lambda: diffjax.solvers.Restart(jnp.asarray([0.5, 0.4, 0.3])),
    "RungeKutta": lambda: diffjax.solvers.RungeKutta(diffjax.solvers.tableaus.RK4),
    "TimeShift": lambda: diffjax.solvers.TimeShift(Euler()),
    "TransportStart": lambda: diffjax.solvers.TransportStart(jnp.zeros((4, 2)), jnp.zeros(4), 0.5),
    "ModelStatistics": statistics,
    "DPMSolverV3": lambda: diffjax.solvers.DPMSolverV3(statistics()),
    "Unified": lambda: diffjax.solvers.Unified(
        (diffjax.solvers.DPMSolverPP(2),), jnp.zeros(3, jnp.int32)
    ),
    "ProgressBar": lambda: diffjax.solvers.ProgressBar(5),
    "LevelIndex": lambda: diffjax.prediction.precondition.LevelIndex(10),
}


def is_final_class(value) -> bool:
    """Whether a name is a class to construct: no protocol, no tuple of results."""
    return (
        inspect.isclass(value)
        and not getattr(value, "_is_protocol", False)
        and not issubclass(value, tuple)
    )


CLASSES = {
    name: value
    for room in ROOMS
    for name, value in vars(room).items()
    if is_final_class(value) and value.__module__.startswith("diffjax")
}


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_defaults_are_constructible(name):
    assert isinstance(NEEDS.get(name, CLASSES[name])(), CLASSES[name])


@pytest.mark.parametrize("member", members.PROCESSES, ids=members.ids)
def test_defaults_are_usable(member):
    c = member.process.coeffs(jnp.asarray(member.process.t_max))
    assert all(np.isfinite(leaf).all() for leaf in c)


X = jnp.ones((4, 2))
DOWN = jnp.asarray([1.0, 0.5, 0.0])
KEY = jax.random.key(0)


def solve(key=KEY, x=X, times=DOWN, solver=None, process=None, denoise=None, **rest):
    """`sample` with everything right but what is given; raises before it computes."""
    process = VP() if process is None else process
    denoise = oracles.Isotropic(process) if denoise is None else denoise
    solver = DDIM() if solver is None else solver
    return sample(key, denoise, x, times, solver=solver, process=process, **rest)


def eps_net(process):
    return make_denoiser(lambda x, t: x, process, kind="eps")


BAD = {
    # What is wrong: (call, exception, what the message must say).
    "vp negative beta": (lambda: VP(beta_min=-1.0), ValueError, r"beta_min .*negative; got -1.0"),
    "vp betas swapped": (lambda: VP(20.0, 0.1), ValueError, "beta_min must be below beta_max"),
    "subvp times swapped": (lambda: SubVP(t_min=1.0, t_max=0.5), ValueError, "below t_max"),
    "ve sigma": (lambda: VE(sigma_min=0.0), ValueError, "sigma_min must be positive; got 0.0"),
    "edm t_min": (lambda: EDM(t_min=-1.0), ValueError, "t_min must not be negative"),
    "cosine t_max": (lambda: Cosine(t_max=1.5), ValueError, r"\[0.0, 1.0\]; got 1.5"),
    "flow t_max": (lambda: RectifiedFlow(t_max=2.0), ValueError, "t_max must lie in"),
    "table empty": (lambda: Tabulated.from_betas([]), ValueError, r"shape \(N,\)"),
    "table betas": (lambda: Tabulated.from_betas([0.1, 1.0]), ValueError, r"within \(0, 1\)"),
    "table rises": (
        lambda: Tabulated.from_alphas_cumprod([0.5, 0.6]),
        ValueError,
        "decrease strictly",
    ),
    "table 2d": (lambda: Tabulated.from_alphas_cumprod([[0.5]]), ValueError, r"got \(1, 1\)"),
    "table n": (lambda: Tabulated.ddpm(n=2.5), TypeError, "n must be an int; got 2.5"),
    "eta": (lambda: DDIM(eta=1.5), ValueError, r"eta must lie in \[0.0, 1.0\]; got 1.5"),
    "churn around a history": (
        lambda: solve(solver=EDMChurn(diffjax.solvers.DPMSolverPP(2), 1.0, 2.0)),
        ValueError,
        "keeps a history, which churn would break",
    ),
    "shift around a history": (
        lambda: solve(solver=diffjax.solvers.TimeShift(diffjax.solvers.UniPC(2))),
        ValueError,
        "keeps a history, which a shifted time",
    ),
    "ancestral": (lambda: Ancestral("medium"), ValueError, "'large', 'learned'; got 'medium'"),
    "churn": (lambda: EDMChurn(Heun(), -1.0, 5.0), ValueError, "s_churn must not be negative"),
    "churn bounds": (
        lambda: EDMChurn(Heun(), 1.0, 5.0, s_min=2.0, s_max=1.0),
        ValueError,
        "s_min must be below s_max",
    ),
    "snr": (lambda: Langevin(snr=0.0), ValueError, "snr must be positive; got 0.0"),
    "corrector steps": (lambda: Langevin(n_steps=0), ValueError, "at least 1; got 0"),
    "coupling": (lambda: Langevin(coupling="mesh"), ValueError, "'sample', 'batch'; got 'mesh'"),
    "noise norm": (
        lambda: Langevin(noise_norm="expected"),
        ValueError,
        "'drawn', 'sqrt_dim'; got 'expected'",
    ),
    "annealed snr": (lambda: AnnealedLangevin(snr=-1.0), ValueError, "snr must be positive"),
    "annealed steps": (lambda: AnnealedLangevin(n_steps=0), ValueError, "at least 1; got 0"),
    "order": (
        lambda: PredictorCorrector(Euler(), Langevin(), order="both"),
        ValueError,
        "'corrector_first', 'predictor_first'; got 'both'",
    ),
    "no predictor's noise": (
        lambda: solve(
            times=jnp.asarray([1.0, 0.5]),
            solver=PredictorCorrector(NoPredictor(), Langevin()),
            final=NoiselessPredictor(),
        ),
        ValueError,
        r"NoPredictor adds no noise.*final=Tweedie\(\)",
    ),
    "sigma_data": (lambda: EDMF(sigma_data=-0.5), ValueError, "sigma_data must be positive"),
    "kind": (lambda: make_denoiser(abs, VP(), kind="noise"), ValueError, "'eps', 'x0'.*'noise'"),
    "grid n": (lambda: grids.uniform(VP(), 0), ValueError, "n must be at least 1; got 0"),
    "grid end": (lambda: grids.uniform(VP(), 5, end=2.0), ValueError, "end must be below t_max"),
    "grid rho": (lambda: grids.karras(EDM(), 5, rho=0.0), ValueError, "rho must be positive"),
    "grid flow": (lambda: grids.log_snr(RectifiedFlow(), 5), ValueError, "Pass t_max="),
    "grid given": (
        lambda: grids.given([1.0, 0.4, 0.4]),
        ValueError,
        r"times\[2\] = 0.4.* after 0.4",
    ),
    "times repeat": (
        lambda: solve(times=jnp.asarray([1.0, 0.5, 0.5, 0.0])),
        ValueError,
        r"times\[2\] = 0.5 after 0.5",
    ),
    "times shape": (lambda: solve(times=jnp.asarray(1.0)), ValueError, r"\(n\+1,\)"),
    "times int": (lambda: solve(times=jnp.asarray([1, 0])), TypeError, "floating point; got int32"),
    "untyped key": (lambda: solve(key=jnp.zeros(2, jnp.uint32)), TypeError, "jax.random.key"),
    "keys of another batch": (
        lambda: solve(key=jax.random.split(KEY, 3)),
        ValueError,
        r"one a sample, \(4,\); got shape \(3,\)",
    ),
    "integer x": (lambda: solve(x=jnp.ones((4, 2), jnp.int32)), TypeError, "got dtype int32"),
    "ragged x": (
        lambda: solve(x={"a": jnp.ones((4, 2)), "b": jnp.ones((3, 2))}),
        ValueError,
        "share one leading batch axis",
    ),
    "ends noisy": (
        lambda: solve(times=jnp.asarray([1.0, 0.5])),
        ValueError,
        r"still noisy. Pass final=Tweedie\(\)",
    ),
    "tweedie at 0": (lambda: solve(final=Tweedie()), ValueError, r"use final=ToEnd\(\)"),
    "no noise to leave out": (
        lambda: solve(final=NoiselessPredictor()),
        ValueError,
        "DDIM adds no noise",
    ),
    "inversion with an end": (lambda: solve(times=DOWN[::-1]), ValueError, r"pass final=Keep\(\)"),
    "inversion with noise": (
        lambda: solve(times=DOWN[::-1], solver=DDIM(eta=0.5), final=Keep()),
        ValueError,
        r"must decrease. Use a deterministic solver",
    ),
    "eps without signal": (
        lambda: solve(process=RectifiedFlow(), denoise=eps_net(RectifiedFlow())),
        ValueError,
        "kind Eps does not determine x0 and eps at t = 1",
    ),
    "steps": (lambda: solve(n_steps=3), ValueError, r"n_steps must lie in \[1, 2\]; got 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_raises_and_teaches(name):
    call, exception, message = BAD[name]
    with pytest.raises(exception, match=message):
        call()


def test_the_right_call_passes():
    # The mutant of the law above: with nothing wrong, nothing raises.
    assert np.isfinite(solve().x).all()
    assert np.isfinite(solve(times=DOWN[::-1] + 0.1, final=Keep()).x).all()


@pytest.mark.parametrize("pair", members.INCOMPATIBLE, ids=members.ids)
def test_what_cannot_work_raises(pair):
    process = members.by_name(members.PROCESSES, pair.process).process
    solver = members.by_name(members.SOLVERS, pair.solver).solver
    times = grids.uniform(process, 3)
    x = jnp.ones((cases.B, members.D))
    with pytest.raises(ValueError, match=pair.match):
        sample(KEY, oracles.Isotropic(process), x, times, solver=solver, process=process)


def test_tracers_pass_every_check():
    # A check that looks at a tracer's value would fail here, not in the user's program.
    @jax.jit
    def build(a):
        made = (VP(a, 2 * a), SubVP(a, 2 * a), VE(a, 2 * a), EDM(a, 2 * a), Cosine(a, 0 * a))
        return (*made, DDIM(a), EDMChurn(Heun(), a, a), Langevin(a), EDMF(a), V())

    assert jax.tree.leaves(build(0.3))
