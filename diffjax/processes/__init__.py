"""Forward processes x_t = alpha x0 + beta y + sigma eps and their calculus."""

from diffjax.processes.anchored import ConstantReversion, CosineReversion, MeanReverting
from diffjax.processes.base import Process
from diffjax.processes.calculus import (
    between,
    derivatives,
    diffusion,
    drift,
    inverse_log_snr,
    log_snr,
    perturb,
    posterior,
    prior,
    prior_log_prob,
    rates,
    reverse_drift,
    score,
    transition,
    velocity,
)
from diffjax.processes.flows import RectifiedFlow
from diffjax.processes.shaped import Cosine, Tabulated
from diffjax.processes.variance import EDM, VE, VP, SubVP

__all__ = [
    "EDM",
    "VE",
    "VP",
    "ConstantReversion",
    "Cosine",
    "CosineReversion",
    "MeanReverting",
    "Process",
    "RectifiedFlow",
    "SubVP",
    "Tabulated",
    "between",
    "derivatives",
    "diffusion",
    "drift",
    "inverse_log_snr",
    "log_snr",
    "perturb",
    "posterior",
    "prior",
    "prior_log_prob",
    "rates",
    "reverse_drift",
    "score",
    "transition",
    "velocity",
]
