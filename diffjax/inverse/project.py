"""The replacement method: what is known of a sample is put back at every noise level.

Symbols: y = A x0 a measurement without noise, P = A^+ A the projection onto what A sees, (alpha,
sigma) the process's at time s, z standard normal and new at each step.

    x_s  <-  x_s - P x_s + alpha A^+ y + sigma P z                                             (1)
    x_0  <-  x_0 - P x_0 + A^+ y                                                               (2)

Of x0 with A x0 = y, P x_s has exactly the law of the last two terms of (1), since P z and z - P z
are independent; so any linear A will do, not only one with orthonormal rows. (1) follows every step
of the solver at the time s that it led to, and every sub-step of a predictor-corrector; (2) follows
the last denoising. The start has P x_T from the prior's own noise, as the network has seen it.

What the method is worth. The network sees the known part noised, and noised anew each time, where
the posterior's score wants it as it is. So the samples are those of the posterior where the unknown
part is independent of the known one, and too weakly tied to it elsewhere. Two unit Gaussians with
correlation 0.8 under VP, one of them known to be 1: the posterior of the other has mean 0.80 and
variance 0.36; this method with 1000 ancestral steps gives 0.50 and 0.49, and more steps change
nothing. A corrector helps, since it runs on the same level with the parts tied: with a step of
AnnealedLangevin(0.3) at each time it is 0.75 and 0.38.

What differs from the reference code, each with its default here:
- it starts from clean known pixels at the largest noise level; here they are noised to it, (1);
- after its predictor's step from t to s it puts the known part back noised to t, here to s;
- its final denoising takes the unknown part from before the denoising, so that it keeps the last
  step's noise; here it reaches the unknown part, and the known one is y by (2).

References:
[1] Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", 2021,
    https://arxiv.org/abs/2011.13456, section 5 and appendices I.2, I.3.
[2] Lugmayr et al., "RePaint: Inpainting using Denoising Diffusion Probabilistic Models", 2022,
    https://arxiv.org/abs/2201.09865 (on the weak tie between the parts).
"""

from typing import Any

import jax
import jax.numpy as jnp

from diffjax.core import random
from diffjax.core.numerics import combine
from diffjax.core.pytree import pytree, replace, taken
from diffjax.core.types import Array, DenoiseFn, Key, PyTree
from diffjax.inverse.operators import LinearOperator, projection
from diffjax.processes.base import Process
from diffjax.solvers.base import Around, Solver
from diffjax.solvers.corrector import Corrector


@pytree
class Replace(Around):
    """A solver that keeps to a measurement, eqs. (1) and (2); itself a solver.

    solver: of a grid; the calls of the denoiser stay the solver's. operator: A. y: A x0 of each
    sample, or with a leading axis of 1 for all of them, without noise and in the model's range.

    x given to `sample` is a draw of the prior. The solver may be deterministic: this one draws. Its
    state is the solver's; a multistep solver's history then holds predictions made before (1) moved
    the known part of x, so its extrapolation is that of a path that was left, in the known part by
    as much as (1) moves it, in the unknown part as far as the network's answer depends on that.
    Under `Keep()` the known part stays noised.
    """

    solver: Solver
    operator: LinearOperator
    y: PyTree

    def __post_init__(self):
        if not hasattr(self.solver, "step"):
            raise ValueError(
                f"Replace needs a solver that steps along a given grid, at whose levels the known "
                f"part is put back; {type(self.solver).__name__} chooses its own. Use a solver of "
                "a grid, such as Heun() or a PredictorCorrector."
            )

    @property
    def settle_stages(self) -> int:
        return getattr(self.solver, "settle_stages", 0)

    stochastic = True

    @property
    def predictor(self) -> Solver:
        """The part whose last step may leave its noise out."""
        return getattr(self.solver, "predictor", self.solver)

    def init(self, process: Process, x: PyTree, t: Array) -> Any:
        """The solver's state, with (1) in x, whose own noise serves as sigma z.

        Raises ValueError for a y that does not fit, and for a schedule per pixel.
        """
        _check_level(process, t)
        _check_measurement(self.operator, self.y, x)
        known = self._known(x)
        return self.solver.init(process, combine((1.0, x), (process.coeffs(t).alpha, known)), t)

    def step(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: Any, t: Array, s: Array
    ) -> Any:
        """The solver's step, then eq. (1) at s."""
        state = self._inner.step(keys, denoise, process, state, t, s)
        if self._in_parts:
            return state
        return state._replace(x=self._renoised(keys, "replace", process, state.x, s))

    def finish(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: Any, t: Array, s: Array
    ) -> Any:
        """The solver's last interval, then eq. (2)."""
        state = self._inner.finish(keys, denoise, process, state, t, s)
        return state._replace(x=self.constrain(state.x))

    def settle(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: Any, t: Array, s: Array
    ) -> Any:
        """The solver's, where it has one; a corrector is followed by eq. (1)."""
        inner = self._inner
        if not hasattr(inner, "settle"):
            return state
        return inner.settle(keys, denoise, process, state, t, s)

    def constrain(self, x0: PyTree) -> PyTree:
        """Eq. (2): x0 with A x0 = y, like x0."""
        return combine((1.0, x0), (-1.0, projection(self.operator, x0)), (1.0, self._known(x0)))

    def take(self, index: Array) -> "Replace":
        """The solver of the samples `index`, (k,)."""
        y = jax.tree.map(lambda leaf: leaf if leaf.shape[0] == 1 else leaf[index], self.y)
        return replace(self, operator=taken(self.operator, index), y=y)

    @property
    def _in_parts(self) -> bool:
        return hasattr(self.solver, "corrector")

    @property
    def _inner(self) -> Solver:
        """The solver; one with a corrector, with eq. (1) between its parts as well."""
        whole: Any = self.solver
        if not self._in_parts:
            return whole
        predictor = replace(self, solver=whole.predictor)
        return replace(whole, predictor=predictor, corrector=_ThenReplace(whole.corrector, self))

    def _known(self, x: PyTree) -> PyTree:
        """A^+ y, like x."""
        known = self.operator.pinv(self.y)
        return jax.tree.map(
            lambda leaf, like: jnp.broadcast_to(leaf.astype(like.dtype), like.shape), known, x
        )

    def _renoised(self, keys: Key, name: str, process: Process, x: PyTree, s: Array) -> PyTree:
        """Eq. (1) at s, like x."""
        at_s = process.coeffs(s)
        z = random.normal_like(keys, name, x)
        seen = projection(self.operator, combine((1.0, x), (-at_s.sigma, z)))
        return combine((1.0, x), (-1.0, seen), (at_s.alpha, self._known(x)))


@pytree
class _ThenReplace:
    """A corrector, then eq. (1) at its time."""

    corrector: Corrector
    replacement: Replace

    @property
    def stages(self) -> int:
        return self.corrector.stages

    def correct(
        self, keys: Key, denoise: DenoiseFn, process: Process, x: PyTree, t: Array, s: Array
    ) -> PyTree:
        """x, corrected and with its known part put back."""
        x = self.corrector.correct(keys, denoise, process, x, t, s)
        return self.replacement._renoised(keys, "replace_corrector", process, x, t)


def _check_level(process: Process, t: Array) -> None:
    shape = process.coeffs(t).sigma.shape
    if shape != jnp.shape(t):
        raise ValueError(
            "Replace noises the known part to one level a sample, so it cannot use a schedule per "
            f"pixel; got coefficients of shape {shape} at one time."
        )


def _check_measurement(operator: LinearOperator, y: PyTree, x: PyTree) -> None:
    wanted = jax.eval_shape(operator, x)
    structure, given = (str(jax.tree.structure(tree)) for tree in (wanted, y))
    if structure != given:
        raise ValueError(f"y must have the structure of A x, {structure}; got {given}.")
    for like, leaf in zip(jax.tree.leaves(wanted), jax.tree.leaves(y), strict=True):
        if leaf.shape not in (like.shape, (1, *like.shape[1:])):
            raise ValueError(
                f"y must be like A x, {like.shape}, or have 1 in the place of the batch; got "
                f"{leaf.shape}."
            )
