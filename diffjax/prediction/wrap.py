"""From a network to a denoiser: the one place where a network is called.

    out    = apply(variables, c_in(t) x_t, label(t), cond)                                     (1)
    x0, eps = the solution of  out = a x0 + b eps,  x_t = alpha x0 + sigma eps                 (2)

A network that learns the variance of a step too returns twice the channels: the first half is out,
the second is read by `prediction.learned`.

(1) is computed in the network's own dtype, (2) in that of x_t: float32, or float64 where x is.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

from diffjax.core import checks
from diffjax.core.numerics import scale
from diffjax.core.pytree import pytree, replace, static
from diffjax.core.types import Array, Prediction, PyTree
from diffjax.prediction import kinds
from diffjax.prediction.kinds import Kind, KindName
from diffjax.prediction.learned import VARIANCE, LearnedVariance, StepVariance, split_channels
from diffjax.prediction.precondition import OfTime, Time, Unscaled
from diffjax.processes.base import Process


@pytree
class Denoiser:
    """A network with its convention: a pytree callable (x_t, t) -> Prediction.

    Everything that is a number is a leaf, so one compilation serves all weights, processes and
    conditions of the same shapes. Build it with `make_denoiser`.
    """

    process: Process
    kind: Kind
    scaling: OfTime
    label: OfTime
    variables: PyTree
    cond: PyTree
    apply: Callable[..., Any] = static()
    dtype: Any = static(default=None)
    learned_variance: LearnedVariance | None = None

    def __call__(self, x_t: PyTree, t: Array) -> Prediction:
        """Eqs. (1) and (2). x_t: (B, *data), a tree. t: () or (B,), positive.

        A learned variance is in `extras["variance"]`, a `prediction.learned.StepVariance`.
        """
        t = jnp.asarray(t)
        inputs = scale(self.scaling(self.process, t), x_t)
        if self.dtype is not None:
            inputs = jax.tree.map(lambda leaf: leaf.astype(self.dtype), inputs)
        label = self.label(self.process, t).astype(jnp.float32)
        before = () if self.variables is None else (self.variables,)
        after = () if self.cond is None else (self.cond,)
        out = self.apply(*before, inputs, label, *after)
        _check_structure(out, x_t)
        out = jax.tree.map(lambda o, leaf: o.astype(leaf.dtype), out, x_t)
        if self.learned_variance is None:
            _check_shapes(out, x_t)
            return kinds.decode(self.kind, self.process, x_t, out, t)
        out, values = split_channels(out, x_t)
        extras: Any = FrozenDict({VARIANCE: StepVariance(values, self.learned_variance)})
        return kinds.decode(self.kind, self.process, x_t, out, t)._replace(extras=extras)

    def take(self, index: Array) -> "Denoiser":
        """The denoiser of the samples `index`, (k,): gathers the leaves of `cond`."""
        return replace(self, cond=jax.tree.map(lambda leaf: leaf[index], self.cond))

    def check_times(self, times: Array) -> None:
        """Raises ValueError if the output does not determine x0 and eps at one of `times`."""
        det = checks.evaluated(
            lambda: kinds.determinant(self.kind, self.process, jnp.asarray(times))
        )
        known = checks.concrete(times)
        if det is None or known is None:
            return
        # A score has no finite row at sigma = 0.
        bad = (det == 0) | ~np.isfinite(det)
        if bad.any():
            t = known.reshape(-1)[bad.reshape(-1).argmax()]
            raise ValueError(
                f"A network of kind {type(self.kind).__name__} does not determine x0 and eps at "
                f"t = {t}, where its row is parallel to x_t's or has no limit. Use kind 'v' "
                "or 'F', or a grid that starts inside (t_max=...)."
            )


def _check_structure(out: PyTree, x_t: PyTree) -> None:
    got, wanted = (str(jax.tree.structure(tree)) for tree in (out, x_t))
    if got != wanted:
        raise ValueError(f"The network's output must have the structure of x; got {got}, {wanted}.")


def _check_shapes(out: PyTree, x_t: PyTree) -> None:
    for o, leaf in zip(jax.tree.leaves(out), jax.tree.leaves(x_t), strict=True):
        if o.shape == (*leaf.shape[:-1], 2 * leaf.shape[-1]):
            raise ValueError(
                f"The network's output must have the shape of x, {leaf.shape}; got {o.shape}, "
                "twice the channels. If the second half is a learned variance, pass "
                "learned_variance=LearnedRange(); else check out_channels."
            )
        if o.shape != leaf.shape:
            raise ValueError(
                f"The network's output must have the shape of x, {leaf.shape}; got {o.shape}. "
                "Check out_channels."
            )


def make_denoiser(
    apply: Callable[..., Any],
    process: Process,
    *,
    kind: Kind | KindName,
    variables: PyTree = None,
    cond: PyTree = None,
    scaling: OfTime | None = None,
    label: OfTime | None = None,
    dtype: Any = None,
    learned_variance: LearnedVariance | None = None,
) -> Denoiser:
    """Makes a denoiser of a network.

    apply: called as `apply(variables, x, label, cond)`; `variables` and `cond` are left out where
      they are None, so a bare function of (x, label) works. x: (B, *data); label: () or (B,),
      float32. It returns a tree like x, of any float dtype.
    kind: what the output means, a value or a name; see `diffjax.prediction.kinds`.
    cond: per-sample conditions, a tree whose leaves have the leading axis B.
    scaling, label: c_in and the time label; the defaults are x_t itself and t itself. A whole
      convention is given by `**precondition.edm()._asdict()`.
    dtype: what x is cast to for the network; None leaves it.
    learned_variance: what the second half of the network's channels means, such as
      `prediction.learned.LearnedRange()`; None for a network with the channels of x. Each raises
      ValueError, at the first call, for the other's network.
    """
    return Denoiser(
        process=process,
        kind=kinds.as_kind(kind),
        scaling=Unscaled() if scaling is None else scaling,
        label=Time() if label is None else label,
        variables=variables,
        cond=cond,
        apply=apply,
        dtype=dtype,
        learned_variance=learned_variance,
    )
