"""Tools to test a solver of your own against truth.

traced         checks of what is known only when a compiled program runs
orders         orders of convergence, and moments carried through a solve without sampling
oracles        data whose denoiser, score and flow are known in closed form
conformance    `check_solver`: all that is promised of a solver, in one report

All of it is here by name.
"""

from diffjax.testing.conformance import Check, Report, check_solver
from diffjax.testing.oracles import Gaussian, Isotropic, Mixture, PointMass, gaussian, mixture
from diffjax.testing.orders import (
    count_draws,
    given_noise,
    median_error,
    order_of_convergence,
    propagate_moments,
)
from diffjax.testing.traced import checked

__all__ = [
    "Check",
    "Gaussian",
    "Isotropic",
    "Mixture",
    "PointMass",
    "Report",
    "check_solver",
    "checked",
    "count_draws",
    "gaussian",
    "given_noise",
    "median_error",
    "mixture",
    "order_of_convergence",
    "propagate_moments",
]
