"""diffjax: score-based diffusion models in JAX and Flax, native to accelerators.

    import diffjax as dj

    process = dj.VP()
    denoise = dj.make_denoiser(net.apply, process, kind="eps", variables={"params": params})
    draw = jax.jit(dj.sample, static_argnames="save")
    x = draw(key, denoise, dj.prior(key, process, (16, 32, 32, 3)), dj.grids.log_snr(process, 20),
             solver=dj.solvers.Heun(), process=process).x

Importing this loads JAX and Flax only. `dj.train`, `dj.load`, `dj.load_classifier` and
`dj.evaluate` load the packages of the extra `train` when they are called.
"""

from typing import Any

# Imported here so that the room `diffjax.train` never takes the name of the function below.
import diffjax.train as _train_room
from diffjax import guidance, inverse, likelihood, losses, nets, prediction, processes, solvers
from diffjax.core.types import Coeffs, DenoiseFn, Prediction
from diffjax.likelihood import bits_per_dim, log_prob, variational_bound
from diffjax.losses import denoising_score_matching
from diffjax.prediction import Denoiser, make_denoiser, precondition
from diffjax.processes import (
    EDM,
    VE,
    VP,
    Cosine,
    Process,
    RectifiedFlow,
    SubVP,
    Tabulated,
    log_snr,
    perturb,
    prior,
    prior_log_prob,
)
from diffjax.solvers import Keep, NoiselessPredictor, Result, Solver, ToEnd, Tweedie, grids, sample
from diffjax.version import __version__

del _train_room


def train(config: Any, workdir: Any, **options: Any) -> Any:
    """Trains, or goes on with, a run: `diffjax.runs.train.train`. Needs `diffjax[train]`."""
    return _run("train").train(config, workdir, **options)


def load(workdir: Any, **options: Any) -> Any:
    """A trained model, ready to sample: `diffjax.runs.model.load`. Needs `diffjax[train]`."""
    return _run("model").load(workdir, **options)


def load_classifier(workdir: Any, **options: Any) -> Any:
    """A trained classifier of noisy images, to guide with: `diffjax.runs.classifiers.load`."""
    return _run("classifiers").load(workdir, **options)


def evaluate(workdir: Any, *arguments: Any, **options: Any) -> Any:
    """Measures a trained model: `diffjax.runs.evaluate.evaluate`. Needs `diffjax[train]`."""
    return _run("evaluate").evaluate(workdir, *arguments, **options)


def _run(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"diffjax.runs.{name}")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"This needs the package {error.name!r}; pip install 'diffjax[train]'."
        ) from error


__all__ = [
    "EDM",
    "VE",
    "VP",
    "Coeffs",
    "Cosine",
    "DenoiseFn",
    "Denoiser",
    "Keep",
    "NoiselessPredictor",
    "Prediction",
    "Process",
    "RectifiedFlow",
    "Result",
    "Solver",
    "SubVP",
    "Tabulated",
    "ToEnd",
    "Tweedie",
    "__version__",
    "bits_per_dim",
    "denoising_score_matching",
    "evaluate",
    "grids",
    "guidance",
    "inverse",
    "likelihood",
    "load",
    "load_classifier",
    "log_prob",
    "log_snr",
    "losses",
    "make_denoiser",
    "nets",
    "perturb",
    "precondition",
    "prediction",
    "prior",
    "prior_log_prob",
    "processes",
    "sample",
    "solvers",
    "train",
    "variational_bound",
]
