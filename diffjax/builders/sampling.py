"""How a config samples: grid, solver, end."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from diffjax import processes, solvers
from diffjax.builders.make import BuildError, Section, make
from diffjax.core.types import Array
from diffjax.solvers import grids

GRIDS: dict[str, Callable[..., Array]] = {
    "uniform": grids.uniform,
    "quadratic": grids.quadratic,
    "log_snr": grids.log_snr,
    "karras": grids.karras,
}

PREDICTORS: dict[str, Callable[..., solvers.Solver]] = {
    "euler": solvers.Euler,
    "heun": solvers.Heun,
    "ddim": solvers.DDIM,
    "ancestral": solvers.Ancestral,
    "euler_maruyama": solvers.EulerMaruyama,
    "reverse_diffusion": solvers.ReverseDiffusion,
}


def _no_corrector(snr: float = 0.0, n_steps: int = 1) -> solvers.Corrector:
    """Takes, and leaves, what the reference code's configs say of a corrector all the same."""
    return solvers.NoCorrector()


CORRECTORS: dict[str, Callable[..., solvers.Corrector]] = {
    "langevin": solvers.Langevin,
    "ald": solvers.AnnealedLangevin,
    "none": _no_corrector,
}


def _pc(
    predictor: str = "reverse_diffusion",
    corrector: str = "langevin",
    snr: float = 0.16,
    n_steps_each: int = 1,
    probability_flow: bool = False,
    order: Literal["corrector_first", "predictor_first"] = "corrector_first",
    coupling: str | None = None,
    noise_norm: str | None = None,
    variance: str | None = None,
) -> solvers.Solver:
    """Predictor-corrector under the reference code's names; the last three as their classes say."""
    section: dict[str, Any] = {
        "name": predictor,
        "probability_flow": probability_flow or None,
        "variance": variance,
    }
    family = {**PREDICTORS, "none": solvers.NoPredictor}
    step = make(family, _given(section), "sampling.solver.predictor")
    section = {
        "name": corrector,
        "snr": snr,
        "n_steps": n_steps_each,
        "coupling": coupling,
        "noise_norm": noise_norm,
    }
    correct = make(CORRECTORS, _given(section), "sampling.solver.corrector")
    return solvers.PredictorCorrector(step, correct, order)


def _given(section: Section) -> Section:
    """The fields that are not None."""
    return {name: value for name, value in section.items() if value is not None}


def _ode(rtol: float = 1e-5, atol: float = 1e-5, max_steps: int = 4096) -> solvers.AdaptiveFlow:
    """The black-box ODE sampler under the reference code's name."""
    return solvers.AdaptiveFlow(solvers.PIController(rtol=rtol, atol=atol, max_steps=max_steps))


def _edm_stochastic(n_steps: int, s_churn: float = 40.0, **bounds: float) -> solvers.Solver:
    """EDM's algorithm 2: Heun with churn."""
    return solvers.EDMChurn(solvers.Heun(), s_churn=s_churn, n_steps=n_steps, **bounds)


FINALS: dict[str, Callable[..., solvers.Final]] = {
    "to_end": solvers.ToEnd,
    "tweedie": solvers.Tweedie,
    "noiseless_predictor": solvers.NoiselessPredictor,
    "keep": solvers.Keep,
}


class Sampling(NamedTuple):
    """How to sample: what `solvers.sample`, or `solvers.solve_adaptive`, takes beside the model.

    times: the grid, (n+1,); of an adaptive solve its two ends.
    """

    times: Array
    solver: solvers.Solver | solvers.AdaptiveFlow
    final: solvers.Final

    @property
    def adaptive(self) -> bool:
        """Whether the steps are the solver's own."""
        return isinstance(self.solver, solvers.AdaptiveFlow)


SOLVERS: dict[str, Callable[..., solvers.Solver | solvers.AdaptiveFlow]] = {
    **PREDICTORS,
    "pc": _pc,
    "edm_stochastic": _edm_stochastic,
    "ode": _ode,
}


def build_sampling(
    config: Any,
    process: processes.Process,
    *,
    solver: str | solvers.Solver | solvers.AdaptiveFlow | None = None,
    steps: int | None = None,
) -> Sampling:
    """The config's way of sampling, or another solver or number of steps.

    solver: a name among `SOLVERS`, a solver, or None for the config's. The grid and the end are the
    config's. An adaptive solver takes of the grid its ends, but goes no lower than the process's
    t_min, and denoises there unless the config keeps the noise. Raises BuildError.
    """
    section = config.sampling
    count = section.steps if steps is None else steps
    times = make(GRIDS, section.grid, "sampling.grid", process=process, n=count)
    final = make(FINALS, {"name": section.final}, "sampling.final")
    if solver is None or isinstance(solver, str):
        own = dict(section.solver)
        # The config's options belong to its own solver; another one comes with its defaults.
        chosen = own if solver in (None, own["name"]) else {"name": solver}
        given = {"n_steps": count} if chosen["name"] == "edm_stochastic" else {}
        made = make(SOLVERS, chosen, "sampling.solver", **given)
    else:
        made = solver
    plan = Sampling(times, made, final)
    if not plan.adaptive:
        return plan
    if steps is not None:
        raise BuildError(
            f"steps={steps} does not apply to an adaptive solver, which chooses its own: leave it "
            "out, and set rtol and atol (config.sampling.solver)."
        )
    ends = jnp.stack([times[0], jnp.maximum(times[-1], process.t_min)])
    return Sampling(ends, made, solvers.Keep() if section.final == "keep" else solvers.Tweedie())
