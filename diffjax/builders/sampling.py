"""How a config samples: grid, solver, end."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from diffjax import processes, solvers
from diffjax.builders.make import BuildError, Section, make
from diffjax.core import checks
from diffjax.core.pytree import replace
from diffjax.core.types import Array
from diffjax.search import Schedule, ScheduleError
from diffjax.solvers import grids, tableaus
from diffjax.solvers.ode import as_method
from diffjax.solvers.restart import check_restarts

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
    "gddim": solvers.GDDIM,
    "seeds2": solvers.SEEDS2,
    "seeds3": solvers.SEEDS3,
    "stochastic_heun": solvers.StochasticHeun,
}

VARIABLES: dict[str, solvers.Variable] = {
    "t": solvers.InTime(),
    "noise_level": solvers.InNoiseLevel(),
    "log_snr": solvers.InLogSNR(),
}


def _runge_kutta(preset: Callable[..., solvers.RungeKutta], variable: str = "t") -> solvers.Solver:
    """A fixed-grid Runge-Kutta method in a variable by its name."""
    checks.one_of("variable", variable, VARIABLES)
    return preset(VARIABLES[variable])


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


TABLEAUS = {
    "dormand_prince": tableaus.DORMAND_PRINCE,
    "bogacki_shampine": tableaus.BOGACKI_SHAMPINE,
}


def _ode(
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 4096,
    tableau: Literal["dormand_prince", "bogacki_shampine"] = "dormand_prince",
) -> solvers.AdaptiveFlow:
    """The black-box ODE sampler under the reference code's name."""
    checks.one_of("tableau", tableau, TABLEAUS)
    controller = solvers.PIController(rtol, atol, max_steps=max_steps)
    return solvers.AdaptiveFlow(controller, TABLEAUS[tableau])


def _dpm_adaptive(
    rtol: float = 0.05, atol: float = 0.0078, max_steps: int = 4096, order: int = 3
) -> solvers.AdaptiveFlow:
    """DPM-Solver-12 or -23 with the paper's tolerances."""
    controller = solvers.PIController(rtol, atol, max_steps=max_steps)
    return solvers.AdaptiveFlow(controller, solvers.DPMSolverAdaptive(order))


def _adaptive_sde(
    rtol: float = 0.02, atol: float = 0.0078, max_steps: int = 4096, kept: int = 4
) -> solvers.AdaptiveFlow:
    """The SDE with steps of its own, by the paper's numbers; kept=0 is its rule for rejections."""
    controller = solvers.PIController(rtol, atol, icoeff=0.9, max_steps=max_steps)
    return solvers.AdaptiveFlow(controller, solvers.AdaptiveSDE(kept))


def _edm_stochastic(n_steps: int, s_churn: float = 40.0, **bounds: float) -> solvers.Solver:
    """EDM's algorithm 2: Heun with churn."""
    return solvers.EDMChurn(solvers.Heun(), s_churn=s_churn, n_steps=n_steps, **bounds)


def _time_shift(
    solver: str = "ddim", window: float = 0.03, cutoff: float = 0.3, data_variance: float = 0.25
) -> solvers.Solver:
    """A one-step solver of `PREDICTORS` with shifted times."""
    inner = make(PREDICTORS, {"name": solver}, "sampling.solver.solver")
    return solvers.TimeShift(inner, window, cutoff, data_variance)


FINALS: dict[str, Callable[..., solvers.Final]] = {
    "to_end": solvers.ToEnd,
    "tweedie": solvers.Tweedie,
    "noiseless_predictor": solvers.NoiselessPredictor,
    "keep": solvers.Keep,
}


class Sampling(NamedTuple):
    """How to sample: what `solvers.sample`, or `solvers.solve_adaptive`, takes beside the model.

    times: the grid, (n+1,); of an adaptive solve its two ends. asked: (n+1,), the times that the
    network is asked at, or None for the grid's own. restarts: of `solvers.sample_with_restarts`.
    """

    times: Array
    solver: solvers.Solver | solvers.AdaptiveFlow
    final: solvers.Final
    asked: Array | None = None
    restarts: tuple[solvers.Restart, ...] = ()

    @property
    def adaptive(self) -> bool:
        """Whether the steps are the solver's own."""
        return isinstance(self.solver, solvers.AdaptiveFlow)


SOLVERS: dict[str, Callable[..., solvers.Solver | solvers.AdaptiveFlow]] = {
    **PREDICTORS,
    "midpoint": functools.partial(_runge_kutta, solvers.Midpoint),
    "bosh3": functools.partial(_runge_kutta, solvers.BogackiShampine),
    "rk4": functools.partial(_runge_kutta, solvers.RK4),
    "dopri5": functools.partial(_runge_kutta, solvers.DormandPrince),
    "dpm_1": functools.partial(solvers.DPMSolver, 1),
    "dpm_2": functools.partial(solvers.DPMSolver, 2),
    "dpm_3": functools.partial(solvers.DPMSolver, 3),
    "dpmpp_2s": functools.partial(solvers.DPMSolverPP, 2, multistep=False),
    "dpmpp_2m": functools.partial(solvers.DPMSolverPP, 2),
    "dpmpp_3m": functools.partial(solvers.DPMSolverPP, 3),
    "dpmpp_2m_sde": functools.partial(solvers.SDEDPMSolverPP, 2),
    "dpmpp_3m_sde": functools.partial(solvers.SDEDPMSolverPP, 3),
    "deis": solvers.DEIS,
    "unipc": solvers.UniPC,
    "ipndm": solvers.IPNDM,
    "pndm": solvers.PNDM,
    "plms": solvers.PLMS,
    "lms": solvers.LMS,
    "pc": _pc,
    "edm_stochastic": _edm_stochastic,
    "ode": _ode,
    "dpm_adaptive": _dpm_adaptive,
    "adaptive_sde": _adaptive_sde,
    "bdia_ddim": solvers.BDIADDIM,
    "bdia_edm": solvers.BDIAEDM,
    "mrs": solvers.mrs,
    "unified": solvers.unified,
    "time_shift": _time_shift,
}


def build_sampling(
    config: Any,
    process: processes.Process,
    *,
    solver: str | solvers.Solver | solvers.AdaptiveFlow | None = None,
    steps: int | None = None,
    schedule: Schedule | None = None,
) -> Sampling:
    """The config's way of sampling, or another solver, number of steps or schedule.

    solver: a name among `SOLVERS`, a solver, or None for the config's. The grid and the end are the
    config's. schedule: takes the grid's place, for the solver that it was searched for. An adaptive
    solver takes of the grid its ends, but goes no lower than the process's t_min, and denoises
    there unless the config keeps the noise. `config.sampling.restarts`, where there are any, are
    sections of `_restart` and go with the config's own solver. Raises BuildError.
    """
    section = config.sampling
    count = section.steps if steps is None else steps
    if schedule is not None:
        if steps is not None:
            raise BuildError("A schedule has its own number of steps: leave steps= out.")
        count = schedule.times.shape[0] - 1
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
    if section.get("restarts") and solver in (None, section.solver["name"]):
        return _with_restarts(plan, process, section, schedule)
    if schedule is not None:
        return _with_schedule(plan, process, schedule)
    if not plan.adaptive:
        return plan
    if steps is not None:
        raise BuildError(
            f"steps={steps} does not apply to an adaptive solver, which chooses its own: leave it "
            "out, and set rtol and atol (config.sampling.solver)."
        )
    ends = jnp.stack([times[0], jnp.maximum(times[-1], process.t_min)])
    return Sampling(ends, made, solvers.Keep() if section.final == "keep" else solvers.Tweedie())


def with_tolerances(
    plan: Sampling, rtol: float | None = None, atol: float | None = None
) -> Sampling:
    """The plan with other tolerances of its adaptive solver; None keeps its own.

    Raises BuildError for a solver of a grid, which has none, and for numbers out of range.
    """
    given = {k: v for k, v in (("rtol", rtol), ("atol", atol)) if v is not None}
    if not given:
        return plan
    if not isinstance(plan.solver, solvers.AdaptiveFlow):
        raise BuildError(
            f"{' and '.join(given)} belong to an adaptive solver, and {type(plan.solver).__name__} "
            "steps along a grid: leave them out, or choose a solver such as 'ode'."
        )
    try:
        own = plan.solver.controller or as_method(plan.solver.method).controller()
        controller = replace(own, **given)
    except ValueError as error:
        raise BuildError(str(error)) from error
    return plan._replace(solver=replace(plan.solver, controller=controller))


def _restart(
    grid: Section,
    process: processes.Process,
    t_max: float,
    t_min: float,
    steps: int,
    repeats: int = 1,
    noise: float = 1.0,
) -> solvers.Restart:
    """From t_min up to t_max and back in `steps` intervals of the config's kind of grid."""
    own = {k: v for k, v in dict(grid).items() if k not in ("t_max", "t_min", "end")}
    ends = {"t_max": t_max, "end": t_min}
    times = make(GRIDS, own | ends, "sampling.grid", process=process, n=steps)
    return solvers.Restart(times, repeats, noise)


def _with_restarts(
    plan: Sampling, process: processes.Process, section: Any, schedule: Schedule | None
) -> Sampling:
    """The plan with the config's restarts. Raises BuildError where they do not fit."""
    if plan.adaptive or schedule is not None:
        what = "a searched schedule" if schedule is not None else "an adaptive solver"
        raise BuildError(
            f"config.sampling.restarts go with a solver along the config's grid, not with {what}."
        )
    family = {"restart": functools.partial(_restart, section.grid, process)}
    where = "sampling.restarts"
    made = tuple(make(family, {**one, "name": "restart"}, where) for one in section.restarts)
    try:
        check_restarts(plan.times, made)
    except ValueError as error:
        raise BuildError(f"config.{where}: {error}") from error
    return plan._replace(restarts=made)


def _with_schedule(plan: Sampling, process: processes.Process, schedule: Schedule) -> Sampling:
    """The plan along a schedule. Raises BuildError where it does not fit."""
    if isinstance(plan.solver, solvers.AdaptiveFlow):
        raise BuildError("A schedule is a grid, and an adaptive solver chooses its own steps.")
    try:
        solver = schedule.with_table(plan.solver)
        schedule.check_fits(process, solver)
    except ScheduleError as error:
        raise BuildError(str(error)) from error
    return plan._replace(times=schedule.times, asked=schedule.asked, solver=solver)
