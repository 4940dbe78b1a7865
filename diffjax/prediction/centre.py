"""Processes with an anchor as processes without: shift, sample, shift back.

Symbols: y the anchor, x_t = alpha x0 + beta y + sigma eps.

    u_t = x_t - (alpha + beta) y = alpha (x0 - y) + sigma eps                                  (1)

u is a process without an anchor whose data are x0 - y. Solvers, grids, priors and losses work on u,
and none of them sees y:

    centred = centre(denoise, process, y)
    u = sample(key, centred, prior(key, process, y.shape), times, solver=..., process=process).x
    x = uncentre(u, process, y, times[-1])

The start that `prior` draws is x_T ~ N((alpha + beta) y, sigma^2): the data stand at the anchor,
up to the share alpha(t_max) that the process keeps.

A denoiser of an anchored process takes x_t and says x0 and eps of x_t = alpha x0 + beta y +
sigma eps. A network's output is solved for them by `make_denoiser`, which knows of no anchor:
`anchored` corrects it. One that was trained on u itself, x0 - y and eps, needs neither.

Reference: Luo et al., "Image Restoration with Mean-Reverting Stochastic Differential Equations",
2023, https://arxiv.org/abs/2301.11699.
"""

from typing import Any

import jax
import jax.numpy as jnp

from diffjax.core.numerics import combine
from diffjax.core.pytree import pytree, replace, taken
from diffjax.core.types import Array, DenoiseFn, Prediction, PyTree, evaluations
from diffjax.prediction import kinds
from diffjax.prediction.wrap import Denoiser
from diffjax.processes.base import Process


class _Around:
    """A denoiser around another one."""

    denoise: Any

    @property
    def evaluations(self) -> int:
        """Of networks in a call."""
        return evaluations(self.denoise)

    def check_times(self, times: Array) -> None:
        """What the denoiser inside checks, if it does."""
        if hasattr(self.denoise, "check_times"):
            self.denoise.check_times(times)


@pytree
class Centred(_Around):
    """A denoiser of u, eq. (1): x0 - y and eps. Build it with `centre`."""

    denoise: Any
    process: Process
    anchor: PyTree

    def __call__(self, u_t: PyTree, t: Array) -> Prediction:
        """u_t: (B, *data), a tree. t: () or (B,)."""
        x_t = uncentre(u_t, self.process, self.anchor, t)
        prediction = self.denoise(x_t, t)
        return prediction._replace(x0=jax.tree.map(jnp.subtract, prediction.x0, self.anchor))

    def take(self, index: Array) -> "Centred":
        """The denoiser of the samples `index`, (k,)."""
        anchor = jax.tree.map(lambda leaf: leaf[index], self.anchor)
        return replace(self, denoise=taken(self.denoise, index), anchor=anchor)


@pytree
class Anchored(_Around):
    """A network's denoiser that knows of the anchor. Build it with `anchored`."""

    denoise: Denoiser
    anchor: PyTree

    def __call__(self, x_t: PyTree, t: Array) -> Prediction:
        """x_t: (B, *data), a tree. t: () or (B,)."""
        inner = self.denoise
        prediction = inner(x_t, t)
        # The solution is linear in (x_t, out): that of (beta y, 0) was too much.
        beta = inner.process.coeffs(jnp.asarray(t)).beta
        shift = combine((beta, self.anchor))
        nothing = jax.tree.map(jnp.zeros_like, shift)
        excess = kinds.decode(inner.kind, inner.process, shift, nothing, t)
        return prediction._replace(
            x0=jax.tree.map(jnp.subtract, prediction.x0, excess.x0),
            eps=jax.tree.map(jnp.subtract, prediction.eps, excess.eps),
        )

    def take(self, index: Array) -> "Anchored":
        """The denoiser of the samples `index`, (k,)."""
        anchor = jax.tree.map(lambda leaf: leaf[index], self.anchor)
        return replace(self, denoise=self.denoise.take(index), anchor=anchor)


def centre(denoise: DenoiseFn, process: Process, anchor: PyTree) -> Centred:
    """The denoiser of u, eq. (1), from that of x.

    denoise: (x_t, t) -> Prediction, any callable. anchor: y, like x, (B, *data).
    """
    return Centred(denoise, process, anchor)


def anchored(denoise: Denoiser, anchor: PyTree) -> Anchored:
    """A network's denoiser, of `make_denoiser`, for its process with the anchor y.

    The network sees x_t itself and says a x0 + b eps, the row of its kind (`velocity` is
    alpha' x0 + sigma' eps, without the anchor's beta' y). anchor: y, like x, (B, *data).
    """
    return Anchored(denoise, anchor)


def to_centred(x_t: PyTree, process: Process, anchor: PyTree, t: Array) -> PyTree:
    """u_t of x_t, eq. (1), like x_t. t: () or (B,)."""
    c = process.coeffs(jnp.asarray(t))
    return combine((jnp.ones_like(c.alpha), x_t), (-(c.alpha + c.beta), anchor))


def uncentre(u_t: PyTree, process: Process, anchor: PyTree, t: Array) -> PyTree:
    """x_t of u_t, eq. (1), like u_t. t: () or (B,), the time of u_t."""
    c = process.coeffs(jnp.asarray(t))
    return combine((jnp.ones_like(c.alpha), u_t), (c.alpha + c.beta, anchor))
