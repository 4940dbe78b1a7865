"""The members of every family, for the laws: a new member is one entry in a list.

Symbols: B samples of D numbers; n intervals. The laws run every solver with one process and every
process with one solver (`PAIRS`), not the product. Pairs that cannot work are in `INCOMPATIBLE`,
each with its reason, and a law asserts that they raise.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import losses
from diffjax.core.numerics import safe_sqrt
from diffjax.core.pytree import pytree
from diffjax.core.types import Array, Coeffs, Number
from diffjax.inverse import Mask, Replace
from diffjax.prediction import kinds, precondition
from diffjax.processes import (
    EDM,
    VE,
    VP,
    Cosine,
    MeanReverting,
    RectifiedFlow,
    SubVP,
    Tabulated,
)
from diffjax.solvers import (
    BDIADDIM,
    BDIAEDM,
    DDIM,
    DEIS,
    GDDIM,
    PLMS,
    SEEDS2,
    Ancestral,
    AnnealedLangevin,
    DPMSolver,
    DPMSolverPP,
    DPMSolverV3,
    EDMChurn,
    Euler,
    EulerMaruyama,
    Heun,
    InLogSNR,
    Langevin,
    ModelStatistics,
    NoPredictor,
    PredictorCorrector,
    ReverseDiffusion,
    RungeKutta,
    SDEDPMSolverPP,
    TimeShift,
    ToEnd,
    Tweedie,
    Unified,
    UniPC,
    grids,
)
from diffjax.solvers.tableaus import BOGACKI_SHAMPINE

D = 16  # numbers a sample; never a batch size, so that a schedule per pixel is not ambiguous
N = 5  # intervals


def ids(member: Any) -> str:
    """The name of a member, for pytest."""
    return member.name


def by_name(family, name: str):
    """The member of that name."""
    return next(m for m in family if m.name == name)


# Processes.


@pytree
class Trigonometric:
    """A user's process: alpha = cos(pi t/2), sigma = sin(pi t/2), and nothing but `coeffs`."""

    t_min: Number = 1e-3
    t_max: Number = 0.99

    def coeffs(self, t: Array) -> Coeffs:
        u = jnp.asarray(t) * (np.pi / 2)
        return Coeffs(jnp.cos(u), jnp.zeros_like(u), jnp.sin(u))


@pytree
class PerPixel:
    """A user's schedule per pixel: alpha = exp(-rate t), variance preserving; rate: a sample."""

    rate: Array
    t_min: Number = 1e-3
    t_max: Number = 1.0

    def coeffs(self, t: Array) -> Coeffs:
        t = jnp.asarray(t)
        u = t.reshape(t.shape + (1,) * self.rate.ndim) * self.rate.reshape(
            (1,) * t.ndim + self.rate.shape
        )
        return Coeffs(jnp.exp(-u), jnp.zeros_like(u), safe_sqrt(-jnp.expm1(-2 * u)))


class ProcessMember(NamedTuple):
    """A process with what the laws must know of it.

    low, high: where all its rates are finite and automatic differentiation is exact.
    clean: sigma(0) = 0, so grids end at 0. scalar: its coefficients have t's shape.
    default: builds it without arguments (its defaults must work).
    """

    name: str
    make: Callable[[], Any]
    low: float = 1e-2
    high: float = 0.98
    clean: bool = True
    scalar: bool = True

    @property
    def process(self):
        return self.make()

    @property
    def final(self):
        """How a solve of this process ends."""
        return ToEnd() if self.clean else Tweedie()


PROCESSES = [
    ProcessMember("vp", VP),
    ProcessMember("subvp", SubVP),
    ProcessMember("ve", VE, clean=False),
    ProcessMember("edm", EDM, low=0.1, high=60.0),
    ProcessMember("cosine", Cosine),
    ProcessMember("rectified_flow", RectifiedFlow),
    # Rates jump at a knot: the ends lie between two.
    ProcessMember("tabulated", lambda: Tabulated.ddpm(100), low=0.025, high=0.985),
    ProcessMember("mean_reverting", MeanReverting, low=0.1),  # in its centred coordinates
    ProcessMember("coeffs_only", Trigonometric),
    ProcessMember("per_pixel", lambda: PerPixel(jnp.linspace(1.0, 4.0, D)), scalar=False),
]


# Solvers.


def constant_statistics(ell: float, s: float) -> ModelStatistics:
    """The same coefficients at all levels and elements."""
    ends = jnp.asarray([-6.0, 6.0])
    return ModelStatistics(ends, jnp.full(2, ell), jnp.full(2, s), jnp.full(2, 0.1))


class SolverMember(NamedTuple):
    """A solver with what the laws must know of it.

    order: the global order on the probability flow; weak_order: that of a stochastic method in
    distribution. rates: needs a finite g^2 at the first time. scalar: needs coefficients of t's
    shape. coupled: samples depend on their neighbours, by its own declaration. shaped: bound to
    samples of D numbers. edges: the solver with other numbers, at which a careless root or quotient
    breaks. variant: another form of a member beside it, held to the laws in the slow lane. copies:
    of the network in a program: one in the steps and one in the last interval, whatever the stages;
    a predictor and a corrector have their own.
    """

    name: str
    solver: Any
    order: int | None = None
    weak_order: int | None = None
    rates: bool = False
    scalar: bool = False
    coupled: bool = False
    shaped: bool = False
    edges: tuple[Any, ...] = ()
    variant: bool = False
    copies: int = 2


SOLVERS = [
    SolverMember("euler", Euler(), order=1, variant=True),
    SolverMember("heun", Heun(), order=2),
    SolverMember("ddim", DDIM(), order=1),
    SolverMember("ddim_eta", DDIM(eta=0.5), weak_order=1, edges=(DDIM(eta=0.0), DDIM(eta=1.0))),
    SolverMember("ancestral_small", Ancestral("small"), weak_order=1),
    SolverMember("ancestral_large", Ancestral("large"), weak_order=1, variant=True),
    SolverMember("reverse_diffusion", ReverseDiffusion(), weak_order=1, variant=True),
    SolverMember("euler_maruyama", EulerMaruyama(), weak_order=1, rates=True),
    SolverMember(
        "euler_maruyama_flow",
        EulerMaruyama(probability_flow=True),
        order=1,
        rates=True,
        variant=True,
    ),
    SolverMember(
        "reverse_diffusion_flow", ReverseDiffusion(probability_flow=True), order=1, variant=True
    ),
    SolverMember(
        "churn",
        EDMChurn(Heun(), s_churn=1.0, n_steps=float(N)),
        scalar=True,
        edges=(EDMChurn(Heun(), s_churn=0.0, n_steps=float(N)),),
    ),
    SolverMember(
        "predictor_corrector",
        PredictorCorrector(ReverseDiffusion(), Langevin(0.1)),
        scalar=True,
        copies=4,
    ),
    SolverMember(
        "predictor_corrector_batch",
        PredictorCorrector(ReverseDiffusion(), Langevin(0.1, coupling="batch")),
        scalar=True,
        coupled=True,
        copies=4,
    ),
    SolverMember(
        "predictor_corrector_paper",
        PredictorCorrector(
            Ancestral(), Langevin(0.1, noise_norm="sqrt_dim"), order="predictor_first"
        ),
        scalar=True,
        variant=True,
        copies=3,
    ),
    SolverMember("bdia_ddim", BDIADDIM(0.9), order=1),
    SolverMember("bdia_edm", BDIAEDM(), order=2, variant=True, copies=5),
    SolverMember(
        "annealed_langevin",
        PredictorCorrector(NoPredictor(), AnnealedLangevin(0.3, n_steps=2)),
        variant=True,
        copies=3,
    ),
    SolverMember("unipc", UniPC(3, n_steps=float(N)), order=3),
    SolverMember(
        "dpmpp_2m_sde",
        SDEDPMSolverPP(2, eta=0.5),
        weak_order=2,
        edges=(SDEDPMSolverPP(2, eta=0.0), SDEDPMSolverPP(2, eta=1.0)),
        variant=True,
    ),
    SolverMember("dpm_3", DPMSolver(3), order=3, scalar=True),
    SolverMember("plms", PLMS(), order=2, variant=True),
]

SOLVERS += [
    SolverMember("bosh3", RungeKutta(BOGACKI_SHAMPINE, InLogSNR()), order=3, scalar=True),
    SolverMember("seeds2", SEEDS2(), weak_order=2, scalar=True),
    SolverMember("gddim", GDDIM(0.5), weak_order=1, edges=(GDDIM(0.0), GDDIM(1.0)), variant=True),
]
SOLVERS += [
    SolverMember("dpm_v3", DPMSolverV3(constant_statistics(0.7, -0.2), 2), order=3, scalar=True),
    SolverMember(
        "unified",
        Unified((DPMSolverPP(2), UniPC(2), DEIS(2)), jnp.asarray([0, 1, 2, 1, 0])),
        order=2,
    ),
]
SOLVERS += [SolverMember("time_shift", TimeShift(DDIM(), 0.1, 0.2, 0.3), scalar=True)]

HALF_KNOWN = Mask(jnp.arange(D) % 2 * 1.0)  # a mask of a sample
SOLVERS += [
    SolverMember(
        "replace",
        Replace(Heun(), HALF_KNOWN, jnp.linspace(-1.0, 1.0, D)[None]),
        scalar=True,
        shaped=True,
    ),
    SolverMember(
        "replace_predictor_corrector",
        Replace(
            PredictorCorrector(ReverseDiffusion(), Langevin(0.1)),
            HALF_KNOWN,
            jnp.linspace(-1.0, 1.0, D)[None],
        ),
        scalar=True,
        shaped=True,
        variant=True,
        copies=4,
    ),
]

STOCHASTIC = [m for m in SOLVERS if m.solver.stochastic]
DETERMINISTIC = [m for m in SOLVERS if not m.solver.stochastic]


class Pair(NamedTuple):
    """A solver with a process, and the grid that both accept."""

    solver_member: SolverMember
    process_member: ProcessMember

    @property
    def name(self) -> str:
        return f"{self.solver_member.name}-{self.process_member.name}"

    @property
    def variant(self) -> bool:
        return self.solver_member.variant

    @property
    def solver(self):
        return self.solver_member.solver

    @property
    def process(self):
        return self.process_member.process

    @property
    def final(self):
        return self.process_member.final

    def times(self, n: int = N) -> Array:
        """A uniform grid of n intervals; below t_max for a solver that needs rates there."""
        start = self.process_member.high if self.solver_member.rates else None
        return grids.uniform(self.process, n, t_max=start)


PAIRS = [Pair(s, PROCESSES[0]) for s in SOLVERS] + [
    Pair(by_name(SOLVERS, "ddim_eta"), p) for p in PROCESSES[1:]
]


class Incompatible(NamedTuple):
    """A pair that must raise ValueError with `match`, and why it cannot work."""

    solver: str
    process: str
    reason: str
    match: str

    @property
    def name(self) -> str:
        return f"{self.solver}-{self.process}"


INCOMPATIBLE = [
    Incompatible("euler_maruyama", "rectified_flow", "g^2 is infinite at t = 1", "g.2 is infinite"),
    Incompatible("churn", "per_pixel", "no single noise level to raise", "per pixel"),
    Incompatible("time_shift", "per_pixel", "one level for a sample's variance", "per pixel"),
    Incompatible("dpm_v3", "per_pixel", "no single log-SNR to read the table at", "per pixel"),
    Incompatible("bosh3", "per_pixel", "no single log-SNR to step in", "per pixel"),
    Incompatible("replace", "per_pixel", "one level for the known part", "per pixel"),
    Incompatible("predictor_corrector", "per_pixel", "one step size a sample", "per pixel"),
]


# Grids: name, function (process, n) -> times, and whether it needs a finite log-SNR at t_max.


class GridMember(NamedTuple):
    name: str
    grid: Callable[..., Array]
    log_snr: bool = False


GRIDS = [
    GridMember("uniform", grids.uniform),
    GridMember("quadratic", grids.quadratic),
    GridMember("log_snr", grids.log_snr, log_snr=True),
    GridMember("karras", grids.karras, log_snr=True),
]


# Predictions.


class KindMember(NamedTuple):
    """A parameterisation; without_signal, without_noise: defined where alpha = 0, sigma = 0."""

    name: str
    kind: Any
    without_signal: bool
    without_noise: bool


KINDS = [
    KindMember("eps", kinds.Eps(), False, True),
    KindMember("x0", kinds.X0(), True, False),
    KindMember("score", kinds.Score(), False, False),
    KindMember("sigma_score", kinds.SigmaScore(), False, True),
    KindMember("v", kinds.V(), True, True),
    KindMember("velocity", kinds.Velocity(), True, True),
    KindMember("F", kinds.EDMF(), True, True),
]


class PreconditionMember(NamedTuple):
    name: str
    make: Callable[[], precondition.Precondition]


PRECONDITIONS = [
    PreconditionMember("edm", precondition.edm),
    PreconditionMember("vp", precondition.vp),
    PreconditionMember("ve", precondition.ve),
    PreconditionMember("iddpm", precondition.iddpm),
    PreconditionMember("score_sde_vp", precondition.score_sde_vp),
    PreconditionMember("score_sde_vp_discrete", lambda: precondition.score_sde_vp(1000)),
    PreconditionMember("score_sde_ve", precondition.score_sde_ve),
    PreconditionMember("score_sde_ve_discrete", lambda: precondition.score_sde_ve(1000)),
    PreconditionMember("sit", precondition.sit),
]


# Training: losses, their weightings and the samplers of their times.


class LossMember(NamedTuple):
    """A loss: (key, denoise, process, x0, times=, weight=) -> (losses (B,), what to watch)."""

    name: str
    loss: Callable[..., Any]


LOSSES = [
    LossMember("mean", losses.denoising_score_matching),
    LossMember(
        "half_sum", functools.partial(losses.denoising_score_matching, reduce=losses.half_sum)
    ),
]


class WeightMember(NamedTuple):
    name: str
    weight: Any


WEIGHTS = [
    *(WeightMember(m.name, m.kind) for m in KINDS),
    WeightMember("likelihood", losses.Likelihood()),
    WeightMember("min_snr", losses.MinSNR()),
    WeightMember("sigmoid", losses.Sigmoid()),
]


class TimesMember(NamedTuple):
    """A sampler of times. coupled: depends on the batch, by its own declaration."""

    name: str
    times: Any
    coupled: bool = False


TIMES = [
    TimesMember("uniform", losses.UniformTimes()),
    TimesMember("uniform_range", losses.UniformTimes(0.1, 0.6)),
    TimesMember("importance", losses.ImportanceTimes()),
    TimesMember("log_normal", losses.LogNormalTimes()),
    TimesMember("discrete", losses.DiscreteTimes(10)),
    TimesMember("stratified", losses.StratifiedTimes(), coupled=True),
]


class Training(NamedTuple):
    """A loss with a weighting and times: each member once, with the first of the others."""

    loss_member: LossMember
    weight_member: WeightMember
    times_member: TimesMember

    @property
    def name(self) -> str:
        return "-".join(member.name for member in self)

    def __call__(self, key, denoise, process, x0, **changes):
        """The losses of a batch, (B,)."""
        given = {"times": self.times_member.times, "weight": self.weight_member.weight} | changes
        return self.loss_member.loss(key, denoise, process, x0, **given)[0]


TRAININGS = (
    [Training(loss, WEIGHTS[0], TIMES[0]) for loss in LOSSES]
    + [Training(LOSSES[0], weight, TIMES[0]) for weight in WEIGHTS[1:]]
    + [Training(LOSSES[0], WEIGHTS[0], times) for times in TIMES[1:]]
)


def leaves_match(a: Any, b: Any) -> bool:
    """Whether two trees have one structure and equal leaves."""
    same = jax.tree.structure(a) == jax.tree.structure(b)
    return same and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
