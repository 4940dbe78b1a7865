"""What a solver is, and how a solve ends.

Symbols: t the current time, s the target time of a step (s < t when sampling), keys (B,) one a
sample and new at every step, x_t like x.

A solver is a frozen pytree with

    init(process, x, t) -> State          State is a NamedTuple; State.x is the sample
    step(keys, denoise, process, state, t, s) -> State
    finish(keys, denoise, process, state, t, s) -> State      the last interval, without noise

All history lives in the State. `finish` leads onto the end of the grid: where sigma(s) = 0 it must
land on the denoised data and never evaluate at s. `stages` and `final_stages` declare the calls of
the denoiser in `step` and `finish`; `stochastic` says whether `step` draws.

A solver whose first steps cost more (PNDM's start) has

    startup(steps) -> int       the calls beyond steps * stages of the first `steps` steps, which
                                may be traced; State.done counts them

A solver that works on x at a time before it leaves it (a corrector) may have

    settle(keys, denoise, process, state, t, s) -> State      the same at the last time s

with `settle_stages`; it is called before a denoising at s, where no step would follow. One that
knows something of the data (a measurement) may have

    constrain(x0) -> x0                                       what the denoised data must satisfy

which is called after such a denoising.

How a solve ends is a value, the `final` of `sample`:

    ToEnd()               `finish` on the last interval; the grid must end where sigma = 0
    Tweedie()             `step` on the last interval, `settle` where there is one, then
                          x0 = E[x0 | x_s]: one call more
    NoiselessPredictor()  `finish`, also at sigma(s) > 0: the reference code's noise removal
    Keep()                `step`: x_s stays as it is, for partial solves and inversion
"""

from typing import Any, NamedTuple, Protocol

from diffjax.core.pytree import pytree
from diffjax.core.types import Array, DenoiseFn, Key, PyTree
from diffjax.processes.base import Process


class XState(NamedTuple):
    """The state of a one-step method: the sample."""

    x: PyTree


class Solver(Protocol):
    """See the module's docstring."""

    @property
    def stages(self) -> int: ...

    @property
    def final_stages(self) -> int: ...

    @property
    def stochastic(self) -> bool: ...

    def init(self, process: Process, x: PyTree, t: Array) -> Any: ...

    def step(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: Any, t: Array, s: Array
    ) -> Any: ...

    def finish(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: Any, t: Array, s: Array
    ) -> Any: ...


class Around:
    """What a solver around another one, `solver`, takes from it."""

    solver: Solver

    @property
    def stages(self) -> int:
        return self.solver.stages

    @property
    def final_stages(self) -> int:
        return self.solver.final_stages

    @property
    def stochastic(self) -> bool:
        return self.solver.stochastic


class Final(Protocol):
    """How a solve ends; see the module's docstring.

    steps: whether the last interval is a `step` like the others, which `end` follows; else `end`
    takes its place. evaluations: calls of the denoiser from the last interval on.
    """

    @property
    def steps(self) -> bool: ...

    def check(self, solver: Solver, end_sigma: Any, increasing: bool) -> None: ...

    def evaluations(self, solver: Solver) -> int: ...

    def end(
        self,
        solver: Solver,
        keys: Key,
        denoise: DenoiseFn,
        process: Process,
        state: Any,
        t: Array,
        s: Array,
    ) -> Any: ...


def keeps_history(state: Any) -> bool:
    """Whether a solver's state holds more than x."""
    return getattr(state, "_fields", None) != ("x",)


def check_one_step(solver: Solver, state: Any, who: str) -> None:
    """Raises ValueError where a solver's fresh state holds more than x: `who` would break it."""
    if keeps_history(state):
        raise ValueError(
            f"{type(solver).__name__} keeps a history, which {who} would break; use a one-step "
            "solver (Heun(), DDIM(), RungeKutta(...))."
        )


def calls(
    solver: Solver, final: Final, intervals: int | Array, done: int | Array = 0
) -> int | Array:
    """The calls of the denoiser in a solve over so many intervals; done: steps taken before it."""
    total = (intervals - 1) * solver.stages + final.evaluations(solver)
    if hasattr(solver, "startup"):
        steps = intervals if final.steps else intervals - 1
        total = total + solver.startup(done + steps) - solver.startup(done)
    return total


def _refuse_increasing(name: str, increasing: bool) -> None:
    if increasing:
        raise ValueError(
            f"A grid that increases (an inversion) has no end to denoise at, so final={name} does "
            "not apply; pass final=Keep()."
        )


@pytree
class ToEnd:
    """The last interval leads to clean data: sigma(end) = 0."""

    @property
    def steps(self) -> bool:
        return False

    def check(self, solver: Solver, end_sigma: Any, increasing: bool) -> None:
        """Raises ValueError if the grid ends with noise left."""
        _refuse_increasing("ToEnd()", increasing)
        if end_sigma is not None and (end_sigma > 0).any():
            raise ValueError(
                f"The grid ends at sigma = {float(end_sigma.max()):.3g}, so its last sample is "
                "still noisy. Pass final=Tweedie() to denoise it with one more call, "
                "final=NoiselessPredictor() for a last step without noise, or final=Keep()."
            )

    def evaluations(self, solver: Solver) -> int:
        """Calls of the denoiser."""
        return solver.final_stages

    def end(self, solver, keys, denoise, process, state, t, s):
        """`solver.finish`."""
        return solver.finish(keys, denoise, process, state, t, s)


@pytree
class Tweedie:
    """The last interval is a step like the others; then x = E[x0 | x_s], one call more."""

    @property
    def steps(self) -> bool:
        return True

    def check(self, solver: Solver, end_sigma: Any, increasing: bool) -> None:
        """Raises ValueError if there is no noise left to remove."""
        _refuse_increasing("Tweedie()", increasing)
        if end_sigma is not None and (end_sigma == 0).any():
            raise ValueError(
                "The grid ends at sigma = 0, where there is nothing left to denoise and no network "
                "may be asked: use final=ToEnd(), or a grid that ends above 0 (end=process.t_min)."
            )

    def evaluations(self, solver: Solver) -> int:
        """Calls of the denoiser."""
        return solver.stages + getattr(solver, "settle_stages", 0) + 1

    def end(self, solver, keys, denoise, process, state, t, s):
        """`solver.settle` where there is one, then the denoiser's x0 at s, held to `constrain`."""
        if hasattr(solver, "settle"):
            state = solver.settle(keys, denoise, process, state, t, s)
        x0 = denoise(state.x, s).x0
        return state._replace(x=solver.constrain(x0) if hasattr(solver, "constrain") else x0)


@pytree
class NoiselessPredictor:
    """The last interval without its noise, whatever noise level it leads to."""

    @property
    def steps(self) -> bool:
        return False

    def check(self, solver: Solver, end_sigma: Any, increasing: bool) -> None:
        """Raises ValueError for a predictor that draws nothing."""
        _refuse_increasing("NoiselessPredictor()", increasing)
        predictor = getattr(solver, "predictor", solver)
        if not predictor.stochastic:
            raise ValueError(
                f"{type(predictor).__name__} adds no noise, so NoiselessPredictor() has none to "
                "leave out; use final=Tweedie() or final=ToEnd()."
            )

    def evaluations(self, solver: Solver) -> int:
        """Calls of the denoiser."""
        return solver.final_stages

    def end(self, solver, keys, denoise, process, state, t, s):
        """`solver.finish`."""
        return solver.finish(keys, denoise, process, state, t, s)


@pytree
class Keep:
    """The last interval is a step like the others and x_s is returned."""

    @property
    def steps(self) -> bool:
        return True

    def check(self, solver: Solver, end_sigma: Any, increasing: bool) -> None:
        """Raises ValueError for a stochastic solver on an increasing grid."""
        if increasing and solver.stochastic:
            raise ValueError(
                f"{type(solver).__name__} draws noise and runs towards the data only; the grid "
                "must decrease. Use a deterministic solver (Euler, Heun, DDIM()) to invert."
            )

    def evaluations(self, solver: Solver) -> int:
        """Calls of the denoiser."""
        return solver.stages

    def end(self, solver, keys, denoise, process, state, t, s):
        """The state as it is."""
        return state
