"""Solvers of the reverse SDE and the probability flow, and the driver that runs them."""

from diffjax.solvers import grids
from diffjax.solvers.adaptive import PIController
from diffjax.solvers.ancestral import DDIM, Ancestral
from diffjax.solvers.base import Final, Keep, NoiselessPredictor, Solver, ToEnd, Tweedie, XState
from diffjax.solvers.corrector import (
    AnnealedLangevin,
    Corrector,
    Langevin,
    NoCorrector,
    NoPredictor,
    PredictorCorrector,
)
from diffjax.solvers.driver import Result, sample
from diffjax.solvers.euler import Euler, EulerMaruyama, ReverseDiffusion
from diffjax.solvers.latent import decode, encode, slerp, temper
from diffjax.solvers.ode import AdaptiveFlow, solve_adaptive
from diffjax.solvers.runge_kutta import EDMChurn, Heun

__all__ = [
    "DDIM",
    "AdaptiveFlow",
    "Ancestral",
    "AnnealedLangevin",
    "Corrector",
    "EDMChurn",
    "Euler",
    "EulerMaruyama",
    "Final",
    "Heun",
    "Keep",
    "Langevin",
    "NoCorrector",
    "NoPredictor",
    "NoiselessPredictor",
    "PIController",
    "PredictorCorrector",
    "Result",
    "ReverseDiffusion",
    "Solver",
    "ToEnd",
    "Tweedie",
    "XState",
    "decode",
    "encode",
    "grids",
    "sample",
    "slerp",
    "solve_adaptive",
    "temper",
]
