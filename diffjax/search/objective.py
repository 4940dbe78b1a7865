"""What a search makes small.

    FineSolution   the root mean square distance to a fine solution from the same start          (1)
    Statistic      a function of the samples alone, such as a Frechet distance                  (2)

(1) is the local truth of a deterministic solver and has a gradient with little noise; it says
nothing of what the model itself gets wrong. (2) is what the papers on evolutionary search use.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from diffjax.core.numerics import size_per_sample, sum_per_sample
from diffjax.core.pytree import pytree, static
from diffjax.core.types import Array, DenoiseFn, Key, PyTree
from diffjax.processes.base import Process
from diffjax.solvers.base import Final, Solver
from diffjax.solvers.driver import sample
from diffjax.solvers.runge_kutta import Heun


class Objective(Protocol):
    """What a search makes small.

    check: raises ValueError where grids like `times` have nothing to do with it. target: what the
    samples are compared with, computed once. score: (), lower is better.
    """

    def check(self, times: Array) -> None: ...

    def target(
        self, keys: Key, denoise: DenoiseFn, process: Process, x: PyTree, final: Final
    ) -> Any: ...

    def score(self, x: PyTree, target: Any) -> Array: ...


@pytree
class FineSolution:
    """Eq. (1). times: the fine grid, from the same time to the same end. solver: deterministic."""

    times: Array
    solver: Solver = Heun()

    def check(self, times: Array) -> None:
        """Raises ValueError where the fine grid has other ends."""
        for i, name in ((0, "first"), (-1, "last")):
            own, other = float(self.times[i]), float(times[i])
            if abs(own - other) > 1e-5 * max(abs(own), abs(other)):
                raise ValueError(
                    f"The fine grid's {name} time is {own} and the grid's {other}: solutions from "
                    "and to other times cannot be compared. Build both with the same ends."
                )

    def target(
        self, keys: Key, denoise: DenoiseFn, process: Process, x: PyTree, final: Final
    ) -> PyTree:
        """The fine solution, like x. Raises ValueError for a stochastic solver."""
        if self.solver.stochastic:
            raise ValueError(
                f"{type(self.solver).__name__} draws noise, so its solution is no target for one "
                "start; use a deterministic one, such as Heun()."
            )
        return sample(
            keys, denoise, x, self.times, solver=self.solver, process=process, final=final
        ).x

    def score(self, x: PyTree, target: PyTree) -> Array:
        """Eq. (1), ()."""
        squares = sum_per_sample(jax.tree.map(lambda a, b: jnp.square(a - b), x, target))
        return jnp.sqrt(jnp.mean(squares) / size_per_sample(x))


@pytree
class Statistic:
    """Eq. (2). function: samples -> (), lower is better; differentiable for `Gradient`."""

    function: Callable[[PyTree], Array] = static()

    def check(self, times: Array) -> None:
        """Any grid will do."""

    def target(
        self, keys: Key, denoise: DenoiseFn, process: Process, x: PyTree, final: Final
    ) -> None:
        """None."""

    def score(self, x: PyTree, target: None) -> Array:
        """Eq. (2), ()."""
        return self.function(x)
