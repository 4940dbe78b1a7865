"""Solvers of the reverse SDE and the probability flow, and the driver that runs them."""

from diffjax.solvers import grids
from diffjax.solvers.ancestral import DDIM, Ancestral
from diffjax.solvers.base import Final, Keep, NoiselessPredictor, Solver, ToEnd, Tweedie, XState
from diffjax.solvers.corrector import Corrector, Langevin, PredictorCorrector
from diffjax.solvers.driver import Result, sample
from diffjax.solvers.euler import Euler, EulerMaruyama, ReverseDiffusion
from diffjax.solvers.runge_kutta import EDMChurn, Heun

__all__ = [
    "DDIM",
    "Ancestral",
    "Corrector",
    "EDMChurn",
    "Euler",
    "EulerMaruyama",
    "Final",
    "Heun",
    "Keep",
    "Langevin",
    "NoiselessPredictor",
    "PredictorCorrector",
    "Result",
    "ReverseDiffusion",
    "Solver",
    "ToEnd",
    "Tweedie",
    "XState",
    "grids",
    "sample",
]
