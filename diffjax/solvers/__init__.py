"""Solvers of the reverse SDE and the probability flow, and the driver that runs them."""

from diffjax.solvers import grids
from diffjax.solvers.adaptive import PIController
from diffjax.solvers.adaptive_sde import AdaptiveSDE
from diffjax.solvers.ancestral import DDIM, Ancestral
from diffjax.solvers.base import (
    Final,
    Keep,
    NoiselessPredictor,
    Solver,
    ToEnd,
    Tweedie,
    XState,
    calls,
)
from diffjax.solvers.bdia import BDIADDIM, BDIAEDM, invert
from diffjax.solvers.corrector import (
    AnnealedLangevin,
    Corrector,
    Langevin,
    NoCorrector,
    NoPredictor,
    PredictorCorrector,
)
from diffjax.solvers.dpm_adaptive import DPMSolverAdaptive
from diffjax.solvers.dpm_v3 import DPMSolverV3, ModelStatistics
from diffjax.solvers.driver import Result, sample
from diffjax.solvers.euler import Euler, EulerMaruyama, ReverseDiffusion
from diffjax.solvers.gaussian_start import (
    GaussianDiagonal,
    GaussianDirections,
    fit_gaussian,
    fit_gaussian_diagonal,
    teleport,
)
from diffjax.solvers.gddim import GDDIM
from diffjax.solvers.langevin_gibbs import LangevinGibbs, level_logits, sample_chain
from diffjax.solvers.latent import decode, encode, slerp, temper
from diffjax.solvers.mean_reverting import mrs
from diffjax.solvers.methods import AdaptiveMethod, EmbeddedRungeKutta
from diffjax.solvers.multistep import Multistep
from diffjax.solvers.ode import AdaptiveFlow, sample_many, solve_adaptive
from diffjax.solvers.pndm import PNDM
from diffjax.solvers.presets import (
    DEIS,
    IPNDM,
    LMS,
    PLMS,
    DPMSolver,
    DPMSolverPP,
    SDEDPMSolver,
    SDEDPMSolverPP,
    UniPC,
)
from diffjax.solvers.progress import ProgressBar
from diffjax.solvers.restart import Restart, sample_with_restarts
from diffjax.solvers.reversible import sample_reversible
from diffjax.solvers.runge_kutta import (
    RK4,
    BogackiShampine,
    DormandPrince,
    EDMChurn,
    Heun,
    InLogSNR,
    InNoiseLevel,
    InTime,
    Midpoint,
    RungeKutta,
    Variable,
)
from diffjax.solvers.seeds import SEEDS, SEEDS2, SEEDS3, StochasticHeun
from diffjax.solvers.singlestep import SingleStep
from diffjax.solvers.time_shift import TimeShift
from diffjax.solvers.transport_start import TransportStart, fit_transport
from diffjax.solvers.unified import Unified, unified

__all__ = [
    "BDIADDIM",
    "BDIAEDM",
    "DDIM",
    "DEIS",
    "GDDIM",
    "IPNDM",
    "LMS",
    "PLMS",
    "PNDM",
    "RK4",
    "SEEDS",
    "SEEDS2",
    "SEEDS3",
    "AdaptiveFlow",
    "AdaptiveMethod",
    "AdaptiveSDE",
    "Ancestral",
    "AnnealedLangevin",
    "BogackiShampine",
    "Corrector",
    "DPMSolver",
    "DPMSolverAdaptive",
    "DPMSolverPP",
    "DPMSolverV3",
    "DormandPrince",
    "EDMChurn",
    "EmbeddedRungeKutta",
    "Euler",
    "EulerMaruyama",
    "Final",
    "GaussianDiagonal",
    "GaussianDirections",
    "Heun",
    "InLogSNR",
    "InNoiseLevel",
    "InTime",
    "Keep",
    "Langevin",
    "LangevinGibbs",
    "Midpoint",
    "ModelStatistics",
    "Multistep",
    "NoCorrector",
    "NoPredictor",
    "NoiselessPredictor",
    "PIController",
    "PredictorCorrector",
    "ProgressBar",
    "Restart",
    "Result",
    "ReverseDiffusion",
    "RungeKutta",
    "SDEDPMSolver",
    "SDEDPMSolverPP",
    "SingleStep",
    "Solver",
    "StochasticHeun",
    "TimeShift",
    "ToEnd",
    "TransportStart",
    "Tweedie",
    "UniPC",
    "Unified",
    "Variable",
    "XState",
    "calls",
    "decode",
    "encode",
    "fit_gaussian",
    "fit_gaussian_diagonal",
    "fit_transport",
    "grids",
    "invert",
    "level_logits",
    "mrs",
    "sample",
    "sample_chain",
    "sample_many",
    "sample_reversible",
    "sample_with_restarts",
    "slerp",
    "solve_adaptive",
    "teleport",
    "temper",
    "unified",
]
