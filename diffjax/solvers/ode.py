"""The probability flow by an adaptive method: the black-box ODE sampler, and its inverse.

Symbols: v(x, t) = alpha' x0 + sigma' eps the velocity of the probability flow, t0 and t1 two times
in [t_min, t_max] of the process.

    dx/dt = v(x, t)   from t0 to t1 by `diffjax.solvers.adaptive.integrate`                     (1)

t1 < t0 samples, t1 > t0 encodes; the flow is a bijection, so one undoes the other up to the
tolerance. All is inside the compiled program, with no loop on the host.

The reference code [1] hands the batch to SciPy's RK45 as one vector, so that the steps and the
result of a sample depend on the others. Here each sample has its own steps, those that SciPy would
take for it alone at the same rtol and atol. The reference keeps the state in float64 around a
float32 network; here it has x's dtype, and in float32 tolerances below about 1e-6 ask for digits
that are not there.

It denoises at the end by a step of its reverse-diffusion predictor without noise, here by
`Tweedie()`: the same for VE at its last level, and for VP up to the difference between
2 - sqrt(1 - beta) and 1/sqrt(1 - beta).

References:
[1] Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", 2021,
    https://arxiv.org/abs/2011.13456, section 4.3 and appendix D.4.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core import checks, random
from diffjax.core.numerics import at_least_float32, batch_size
from diffjax.core.pytree import pytree, static
from diffjax.core.types import Array, DenoiseFn, Key, Number, PyTree
from diffjax.processes.base import Process
from diffjax.processes.calculus import velocity
from diffjax.solvers.adaptive import DORMAND_PRINCE, PIController, Tableau, integrate
from diffjax.solvers.base import Final, Tweedie
from diffjax.solvers.driver import Result


class FlowState(NamedTuple):
    """Where each sample ended: x, and (B,) counts as in `diffjax.solvers.adaptive.Solution`."""

    x: PyTree
    nfe: Array
    accepted: Array
    rejected: Array
    arrived: Array


@pytree
class AdaptiveFlow:
    """How eq. (1) is solved, as one value: what `Model.sample` takes beside solvers of a grid.

    controller: tolerances and the rule for steps. method: the tableau.
    """

    controller: PIController = PIController()
    method: Tableau = static(default=DORMAND_PRINCE)


@pytree
class ProbabilityFlow:
    """The flow where it has arrived, in the place of a solver for `Final`: no step, no noise."""

    @property
    def stages(self) -> int:
        return 0

    @property
    def final_stages(self) -> int:
        return 0

    @property
    def stochastic(self) -> bool:
        return False

    def init(self, process: Process, x: PyTree, t: Array) -> FlowState:
        zero = jnp.zeros((batch_size(x),), jnp.int32)
        return FlowState(x, zero, zero, zero, zero == 0)

    def step(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: FlowState, t: Array, s: Array
    ) -> FlowState:
        """The state."""
        return state

    finish = step


def solve_adaptive(
    key: Key,
    denoise: DenoiseFn,
    x: PyTree,
    t0: Number,
    t1: Number,
    *,
    process: Process,
    method: Tableau = DORMAND_PRINCE,
    controller: PIController = PIController(),
    final: Final = Tweedie(),
) -> Result:
    """Solves eq. (1) from x at t0 to t1, each sample with its own steps.

    key: a typed key, or (B,) keys, one a sample. The flow draws nothing; `final` may.
    denoise: (x_t, t (B,)) -> Prediction, any callable.
    x: (B, *data), a tree of floating-point arrays: a draw of the prior, a latent or, to encode,
      data. Half precision is raised to float32.
    t0, t1: (), within [t_min, t_max]; t1 > t0 encodes, with final=Keep().
    method: the tableau, static under `jit`. controller: the tolerances.
    final: `Tweedie()` denoises at t1 by one call more, `Keep()` leaves x there.

    Returns `Result` whose `nfe` is (B,), the calls that each sample needed; the batch takes as long
    as its slowest. `state` is a `FlowState`. A sample that the controller gave up is NaN, with
    `state.arrived` False.

    Raises ValueError for times outside the process's range or equal, or a `final` that does not
    fit. Reverse-mode differentiation raises TypeError unless `controller.bounded`.
    """
    x = at_least_float32(x)
    check_flow(denoise, t0, t1, process, final)
    dtype = jnp.result_type(*jax.tree.leaves(x))
    t0, t1 = (jnp.asarray(t, dtype) for t in (t0, t1))
    keys = random.sample_keys(key, batch_size(x))

    def field(t: Array, y: PyTree) -> PyTree:
        return velocity(process, denoise(y, t), t)

    solved = integrate(field, x, t0, t1, tableau=method, controller=controller)
    flow = ProbabilityFlow()
    state = final.end(flow, keys, denoise, process, FlowState(*solved), t0, t1)
    return Result(state.x, state, solved.nfe + final.evaluations(flow), None)


def check_flow(denoise: DenoiseFn, t0: Number, t1: Number, process: Process, final: Final) -> None:
    """Raises what `solve_adaptive` would for these arguments: call it before a jitted one."""
    first, last = checks.concrete(t0), checks.concrete(t1)
    low, high = checks.concrete(process.t_min), checks.concrete(process.t_max)
    if first is None or last is None:
        return
    if (first == last).any():
        raise ValueError(f"t0 and t1 must differ; got {t0} for both.")
    if low is not None and high is not None:
        for name, t in (("t0", first), ("t1", last)):
            # Times may have gone through float32.
            if not np.all((t >= low * (1 - 1e-6)) & (t <= high * (1 + 1e-6))):
                raise ValueError(
                    f"{name} must lie in the process's [t_min, t_max] = [{low}, {high}], where its "
                    f"velocity is finite; got {t}. To denoise at the end use final=Tweedie()."
                )
    with jax.ensure_compile_time_eval():
        end_sigma = checks.concrete(process.coeffs(jnp.asarray(last, float)).sigma)
    final.check(ProbabilityFlow(), end_sigma, bool((last > first).any()))
    if hasattr(denoise, "check_times"):
        denoise.check_times(jnp.stack([jnp.asarray(t, float) for t in (t0, t1)]))
