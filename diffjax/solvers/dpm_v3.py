"""DPM-Solver-v3: an exponential multistep method with coefficients measured from the model.

Symbols: lam = ln(alpha/sigma) the half log-SNR, growing from t to s, ' is d/dlam, y = x/alpha;
l, s, b numbers for each element of x, functions of lam (`ModelStatistics`; l is `ell` in the code);
tau = 0 at t and 1 at s, h the step of lam; L, S the integrals of l and s from t on.

    y' = -l y - f,   f = (sigma eps - l x)/alpha                                                (1)
    f' ~ s f + b,    so g(tau) = e^-S f - B, with B = int e^-S b, hardly moves                  (2)
    y_s = e^-L(1) (y_t - int e^(L + S) (g + B) dlam)                                            (3)

g is a polynomial in tau through its value at t and those at earlier times, and the integrals of (3)
are of known functions. (l, s, b) = (0, -1, 0) gives DPM-Solver, (1, 0, 0) DPM-Solver++: here they
are the ones that leave g as flat as it can be, element by element,

    l = E[diag(sigma d eps/dx)],   s, b: the regression of f' on f over x at lam                (4)

which `diffjax.search.model_statistics` finds. For Gaussian data one step of any size is exact.

The integrals are Gauss-Legendre sums, with the inner ones by integrating the interpolating
polynomial; between the levels of the table l, s and b are linear. g_j of an earlier time is kept
relative to t, and carried to s by g_j <- e^S(1) (g_j + B(1)), so nothing is summed from the grid's
start. As in `diffjax.solvers.multistep` the corrector adds the node at s once f is known there, at
the predicted x; the first step has order 1 and the last, onto sigma = 0, is DDIM's.

The paper's code rounds the grid to the table's levels and sums by the trapezoid rule over them. Its
"pseudo" orders, finite differences in the place of the polynomial's derivatives, are left out.

References:
[1] Zheng, Lu, Chen, Zhu, "DPM-Solver-v3: Improved Diffusion ODE Solver with Empirical Model
    Statistics", 2023, https://arxiv.org/abs/2310.13268, eqs. 5 to 16.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core import checks
from diffjax.core.numerics import combine, expand, scale, select
from diffjax.core.pytree import pytree, static
from diffjax.core.types import Array, DenoiseFn, Key, Number, Prediction, PyTree
from diffjax.processes.base import Process
from diffjax.processes.calculus import log_snr
from diffjax.solvers.euler import linear_step
from diffjax.solvers.exponential import on_differences

_NODES = 12  # of the quadrature


@pytree
class ModelStatistics:
    """l, s and b of eq. (2) at levels of the half log-SNR; linear between, constant outside.

    lam: (K,), K >= 2, increasing. ell, s, b: trees like x, each leaf (K, *data), or (K,) for all
    elements.
    """

    lam: Array
    ell: PyTree
    s: PyTree
    b: PyTree

    def __post_init__(self):
        known = checks.concrete(self.lam)
        if known is not None and (known.ndim != 1 or len(known) < 2 or (np.diff(known) <= 0).any()):
            raise ValueError(
                f"lam must hold 2 levels or more of the half log-SNR, increasing; got {known}."
            )

    def at(self, lam: Array) -> tuple[PyTree, PyTree, PyTree]:
        """(l, s, b) at lam (Q,): each leaf (Q, *data)."""
        last = self.lam.shape[0] - 1
        upper = jnp.clip(jnp.searchsorted(self.lam, lam), 1, last)
        lower = upper - 1
        share = (lam - self.lam[lower]) / (self.lam[upper] - self.lam[lower])
        share = jnp.clip(share, 0, 1)

        def read(leaf: Array) -> Array:
            weight = expand(share, leaf[lower]).astype(leaf.dtype)
            return leaf[lower] + weight * (leaf[upper] - leaf[lower])

        return jax.tree.map(read, self.ell), jax.tree.map(read, self.s), jax.tree.map(read, self.b)


class V3State(NamedTuple):
    """x: the sample. g: values of g at earlier times relative to now, newest first, each like x.

    lam: their half log-SNRs, (H,). start: the x of the last step's start, over its alpha, and step:
    that step's integrals, both for the corrector. done: the steps done.
    """

    x: PyTree
    g: tuple[PyTree, ...]
    lam: Array
    start: PyTree
    step: "Integrals"
    done: Array


class Integrals(NamedTuple):
    """Eq. (3) over one step; trees like a sample of x, without the batch.

    decay: e^-L(1). flat: int e^(L+S) B. totals: int e^(L+S) tau^i, i = 0..J, (J+1, *data) a leaf.
    growth: e^S(1). drift: B(1).
    """

    decay: PyTree
    flat: PyTree
    totals: PyTree
    growth: PyTree
    drift: PyTree


def _rule() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes (Q,) and weights (Q,) on [0, 1], and the integrals from 0 to each node, (Q, Q)."""
    points, weights = np.polynomial.legendre.leggauss(_NODES)
    nodes = (points + 1) / 2
    to_coefficients = np.linalg.inv(np.polynomial.legendre.legvander(points, _NODES - 1))
    inner = np.stack(
        [
            np.polynomial.legendre.legval(
                points, np.polynomial.legendre.legint(np.eye(_NODES)[k], lbnd=-1)
            )
            for k in range(_NODES)
        ],
        axis=1,
    )
    return nodes, weights / 2, inner @ to_coefficients / 2


def integrals(statistics: ModelStatistics, lam: Array, h: Array, count: int) -> Integrals:
    """The integrals of eq. (3) from lam to lam + h, both (), for degrees up to `count`."""
    nodes, weights, inner = _rule()
    ell, s, b = statistics.at(lam + h * jnp.asarray(nodes, lam.dtype))
    powers = np.stack([nodes**i for i in range(count + 1)])

    def of(ell: Array, s: Array, b: Array) -> tuple[Array, ...]:
        def total(values, rule=weights):
            return h * jnp.tensordot(jnp.asarray(rule, values.dtype), values, axes=1)

        big_s = total(s, inner)
        drift = total(jnp.exp(-big_s) * b, inner)
        factor = jnp.exp(total(ell, inner) + big_s)
        totals = jnp.stack([total(factor, weights * p) for p in powers])
        end = total(jnp.exp(-big_s) * b)
        return jnp.exp(-total(ell)), total(factor * drift), totals, jnp.exp(total(s)), end

    leaves = [of(*parts) for parts in zip(*map(jax.tree.leaves, (ell, s, b)), strict=True)]
    treedef = jax.tree.structure(ell)
    return Integrals(*(jax.tree.unflatten(treedef, part) for part in zip(*leaves, strict=True)))


@pytree
class DPMSolverV3:
    """Eq. (3): order p = `order` of the predictor, the corrector through one node more.

    statistics: l, s and b; the same numbers at two levels give DPM-Solver or DPM-Solver++.
    corrector: whether x is corrected once f is known; it costs no call.
    n_steps: the grid's number of intervals, for an order that falls towards the end; or None.

    Global order 2 for p >= 2 with the start at order 1, 3 with the corrector; p and p + 1 with an
    exact history. The grid must start where alpha > 0.
    """

    statistics: ModelStatistics
    order: int = static(default=3)
    corrector: bool = static(default=True)
    n_steps: Number | None = None

    def __post_init__(self):
        checks.at_least("order", self.order, 1)
        if self.n_steps is not None:
            checks.positive("n_steps", self.n_steps)

    stages = 1
    final_stages = 1
    stochastic = False

    def init(self, process: Process, x: PyTree, t: Array) -> V3State:
        """No history. Raises ValueError where alpha = 0 or for a schedule per pixel."""
        coeffs = process.coeffs(t)
        if coeffs.alpha.ndim != jnp.ndim(t) or jnp.ndim(t) != 0:
            raise ValueError(
                "DPMSolverV3 needs one time and one log-SNR for all samples and elements; got "
                f"coefficients of shape {coeffs.alpha.shape}. A schedule per pixel has none."
            )
        known = checks.evaluated(lambda: process.coeffs(t).alpha)
        if known is not None and (known == 0).any():
            raise ValueError(
                f"alpha = 0 at the grid's noisy end {t}, where eq. (1) has no y = x/alpha. Start "
                "below (t_max= of the grid)."
            )
        like = jax.tree.leaves(x)[0]
        lam = jnp.zeros((), like.dtype)
        nothing = jax.eval_shape(lambda: integrals(self._own(x), lam, lam, self.order))
        empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), nothing)
        g = tuple(jax.tree.map(jnp.zeros_like, x) for _ in range(self.order))
        return V3State(
            x, g, jnp.zeros((self.order,), like.dtype), x, empty, jnp.zeros((), jnp.int32)
        )

    def _own(self, x: PyTree) -> ModelStatistics:
        """The table with one leaf for each of x's, in its dtypes."""
        lam = self.statistics.lam.astype(jax.tree.leaves(x)[0].dtype)

        def spread(tree):
            if str(jax.tree.structure(tree)) != str(jax.tree.structure(x)):
                leaves = jax.tree.leaves(tree)
                if len(leaves) != 1:
                    raise ValueError(
                        "The statistics' trees must have the structure of x, or be one array; got "
                        f"{jax.tree.structure(tree)} for {jax.tree.structure(x)}."
                    )
                tree = jax.tree.map(lambda leaf: leaves[0], x)

            def fit(values, leaf):
                if values.ndim == 1:
                    values = values.reshape((-1,) + (1,) * (leaf.ndim - 1))
                return values.astype(leaf.dtype)

            return jax.tree.map(fit, tree, x)

        parts = (
            spread(tree) for tree in (self.statistics.ell, self.statistics.s, self.statistics.b)
        )
        return ModelStatistics(lam, *parts)

    def _order(self, count: Array) -> Array:
        """p of step number `count`."""
        order = jnp.minimum(self.order, count + 1)
        if self.n_steps is None:
            return order
        return jnp.minimum(order, jnp.maximum(self.n_steps - count, 1).astype(order.dtype))

    def step(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: V3State, t: Array, s: Array
    ) -> V3State:
        """Eq. (3), after the corrector of the step before."""
        own = self._own(state.x)
        levels = log_snr(process, jnp.stack([jnp.asarray(t), jnp.asarray(s)])) / 2
        lam, h = (a.astype(own.lam.dtype) for a in (levels[0], levels[1] - levels[0]))
        x, new = self._corrected(process, own, state, denoise(state.x, t).eps, t, lam)
        y = scale(1 / process.coeffs(t).alpha, x)
        found = integrals(own, lam, h, self.order)
        valid = jnp.arange(1, self.order) < self._order(state.done)
        past = state.g[: self.order - 1]
        nodes = (state.lam[: self.order - 1] - lam) / h
        y_s = _led(y, found, new, past, nodes, valid)
        x_s = scale(process.coeffs(s).alpha, y_s)
        kept = (new, *state.g)[: self.order]
        carried = tuple(_carried(found, g) for g in kept)
        seen = jnp.concatenate([lam[None], state.lam])[: self.order]
        return V3State(x_s, carried, seen, y, found, state.done + 1)

    def finish(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: V3State, t: Array, s: Array
    ) -> V3State:
        """DDIM's step from the corrected x: x0 where sigma_s = 0."""
        prediction = denoise(state.x, t)
        own = self._own(state.x)
        lam = (log_snr(process, jnp.asarray(t)) / 2).astype(own.lam.dtype)
        x, _ = self._corrected(process, own, state, prediction.eps, t, lam)
        change = jax.tree.map(jnp.subtract, x, state.x)
        # f is kept where x is corrected: sigma eps moves by l times as much, alpha x0 by the rest.
        by_eps = jax.tree.map(lambda ell, leaf: ell * leaf, own.at(lam[None])[0], change)
        by_x0 = jax.tree.map(jnp.subtract, change, by_eps)
        alpha, _, sigma = process.coeffs(t)
        one = jnp.ones_like(alpha)
        x0 = combine((one, prediction.x0), (1 / alpha, by_x0))
        eps = combine((one, prediction.eps), (1 / sigma, by_eps))
        return state._replace(x=linear_step(process, Prediction(x0, eps), s))

    def _corrected(
        self,
        process: Process,
        own: ModelStatistics,
        state: V3State,
        eps: PyTree,
        t: Array,
        lam: Array,
    ) -> tuple[PyTree, PyTree]:
        """x at t with f in the polynomial of the step that led there, and f itself."""
        ell = jax.tree.map(lambda leaf: leaf[0], own.at(lam[None])[0])
        alpha, _, sigma = process.coeffs(t)

        def f_of(eps, x, ell):
            return (sigma.astype(x.dtype) * eps - ell[None] * x) / alpha.astype(x.dtype)

        f = jax.tree.map(
            f_of, jax.tree.map(lambda e, x: e.astype(x.dtype), eps, state.x), state.x, ell
        )
        if not self.corrector:
            return state.x, f
        begun = state.done > 0
        # Back at the last step's start all g are what they were there.
        step = state.step
        safe = jax.tree.map(lambda leaf: jnp.where(begun, leaf, 1), step.growth)

        def back(g: PyTree) -> PyTree:
            return jax.tree.map(lambda a, e, d: a / e[None] - d[None], g, safe, step.drift)

        base, past = back(state.g[0]), tuple(back(g) for g in state.g[1 : self.order])
        start = state.lam[0]
        gap = jnp.where(begun, lam - start, 1)
        nodes = jnp.concatenate(
            [jnp.ones((1,), lam.dtype), (state.lam[1 : self.order] - start) / gap]
        )
        order = self._order(jnp.maximum(state.done - 1, 0))
        valid = (jnp.arange(self.order) < order) & begun
        y = _led(state.start, step, base, (back(f), *past), nodes, valid)
        return select(begun, scale(alpha, y), state.x), f


def _led(
    y: PyTree, found: Integrals, g: PyTree, others: tuple[PyTree, ...], nodes: Array, valid: Array
) -> PyTree:
    """y_s of eq. (3) with g at tau = 0 and `others` at `nodes` (J,), of which some are valid."""
    count = len(others)

    def of(y, decay, flat, totals, g, *others):
        change = totals[0][None] * g + flat[None]
        if count:
            shaped = nodes.reshape((count,) + (1,) * (y.ndim - 1)).astype(y.dtype)
            safe = jnp.where(
                valid.reshape(shaped.shape), shaped, -1 - jnp.arange(count).reshape(shaped.shape)
            )
            weights = on_differences(safe, valid, totals[1 : count + 1])
            change = change + sum(weights[j][None] * (others[j] - g) for j in range(count))
        return decay[None] * (y - change)

    return jax.tree.map(of, y, found.decay, found.flat, found.totals, g, *others)


def _carried(found: Integrals, g: PyTree) -> PyTree:
    """g relative to the step's end."""
    return jax.tree.map(
        lambda g, growth, drift: growth[None] * (g + drift[None]), g, found.growth, found.drift
    )
