"""From a config to objects: the only room that reads configs.

A config is an `ml_collections.ConfigDict` of sections. A section names a member of a family and
gives its arguments:

    config.process = {"name": "vp", "beta_min": 0.1, "beta_max": 20.0}

Each family is one explicit dict in these files. `name` may also be "package.module:callable": it is
called with the section's other fields, so your own nets, processes and data need no change here. An
argument that the callable does not take raises, with the nearest name it does take.
"""

from diffjax.builders.data import build_source
from diffjax.builders.make import BuildError, make
from diffjax.builders.model import (
    LEARNED_VARIANCES,
    NETS,
    PRECONDITIONS,
    PROCESSES,
    Parts,
    build_parts,
    build_quantisation,
)
from diffjax.builders.sampling import (
    CORRECTORS,
    FINALS,
    GRIDS,
    PREDICTORS,
    SOLVERS,
    Sampling,
    build_sampling,
    with_tolerances,
)
from diffjax.builders.training import (
    REDUCES,
    TIMES,
    WEIGHTS,
    build_augment,
    build_ema,
    build_loss,
    build_optimizer,
    build_times,
    is_classifier,
)

__all__ = [
    "CORRECTORS",
    "FINALS",
    "GRIDS",
    "LEARNED_VARIANCES",
    "NETS",
    "PRECONDITIONS",
    "PREDICTORS",
    "PROCESSES",
    "REDUCES",
    "SOLVERS",
    "TIMES",
    "WEIGHTS",
    "BuildError",
    "Parts",
    "Sampling",
    "build_augment",
    "build_ema",
    "build_loss",
    "build_optimizer",
    "build_parts",
    "build_quantisation",
    "build_sampling",
    "build_source",
    "build_times",
    "is_classifier",
    "make",
    "with_tolerances",
]
