"""The reverse SDE with steps of its own: Euler-Maruyama against stochastic improved Euler.

Symbols: dx = d(x, t) dt + g dw the reverse SDE, d = f x - g^2 s, t running down; h > 0 the step
from t to t - h; w the increment of the Wiener process over it, the same in (1) and (2); z standard
normal.

    x'  = x - h d(x, t) + g(t) w,   w = sqrt(h) z            Euler-Maruyama                      (1)
    x~  = x - h d(x', t - h) + g(t - h) w
    x'' = (x' + x~)/2                                        stochastic improved Euler           (2)
    err = rms((x' - x'') / max(atol, rtol max(|x'|, |x' of the last accepted step|)))            (3)
    accept x'' if err <= 1;   h <- 0.9 h err^(-r), r = 0.9, no further than the end              (4)
    w over part of a known increment W over H:   (h/H) W + sqrt(h (1 - h/H)) z                   (5)

Two calls of the denoiser in an attempt. What is kept is x'', of the higher order ("extrapolation");
g does not depend on x, so Ito and Stratonovich agree and (2) needs no correction. The first step is
a hundredth of the way, the paper's 0.01 where t runs from 1 to 0.

The paper's algorithm and its code [2] draw w anew after a rejection. The err depends on w, so draws
that happen to agree with the drift are kept and others thrown away. In many dimensions |z| hardly
varies, rejections are few and nothing is lost; in few, about one attempt in six is rejected and the
law is wrong at any tolerance (a variance 20% too large for 3 numbers, 5% for 16). Here a rejected
increment stays known and the path of w is one Wiener process, whatever is tried on it: a shorter
step takes its part by (5), and no step passes the end of a known increment before it is used up
[3]. `kept` increments can be known at once; where more attempts in a row are rejected the farthest
is forgotten. kept=0 is the paper's rule.

The code's example configurations take rtol = atol = 0.01; the paper's atol is one level of 256,
0.0078 for data in [-1, 1] and half of it in [0, 1].

References:
[1] Jolicoeur-Martineau, Li, Piche-Taillefer, Kachman, Mitliagkas, "Gotta Go Fast When Generating
    Data with Score-Based Models", 2021, https://arxiv.org/abs/2105.14080, algorithm 1.
[2] https://github.com/AlexiaJM/score_sde_fast_sampling
[3] Rackauckas, Nie, "Adaptive methods for stochastic differential equations via natural embeddings
    and rejection sampling with memory", 2017, https://doi.org/10.3934/dcdsb.2017133
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffjax.core import checks, random
from diffjax.core.numerics import combine, safe_sqrt, scale
from diffjax.core.types import Array, Key, Number, PyTree
from diffjax.processes.base import Process
from diffjax.processes.calculus import diffusion, rates, reverse_drift
from diffjax.solvers.adaptive import PIController, Progress, Trial, staged
from diffjax.solvers.methods import Problem, small_step


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class AdaptiveSDE:
    """Algorithm 1 of [1], eqs. (1) to (5).

    kept: the rejected increments that can be known at once, each with memory like x; 0: none.
    """

    kept: int = 4

    def __post_init__(self):
        checks.at_least("kept", self.kept, 0)

    @property
    def order(self) -> int:
        """1: the exponent r of (4) is the controller's `icoeff` itself."""
        return 1

    stages = 2

    @property
    def start_stages(self) -> int:
        return 0

    stochastic = True

    def controller(self) -> PIController:
        """r = 0.9, rtol = 0.02, atol = 0.0078."""
        return PIController(rtol=0.02, atol=0.0078, icoeff=0.9)

    def check(self, process: Process, t0: Number, t1: Number) -> None:
        """Raises ValueError where g^2 is infinite at the start, and for t1 > t0."""
        first, last = checks.concrete(t0), checks.concrete(t1)
        if first is None or last is None:
            return
        if (last > first).any():
            raise ValueError(
                f"The reverse SDE runs towards the data only: t1 must be below t0; got {t0} and "
                f"{t1}. To encode use EmbeddedRungeKutta()."
            )
        g2 = checks.evaluated(lambda: rates(process, jnp.asarray(first, float)).g2)
        if g2 is not None and not (abs(g2) < float("inf")).all():
            raise ValueError(
                f"g^2 is infinite at t0 = {t0}, so the reverse SDE cannot start there. Start "
                "below, or use EmbeddedRungeKutta() or DPMSolverAdaptive()."
            )

    def clock(self, process: Process, t: Array) -> Array:
        """t."""
        return t

    def start(self, problem: Problem, x: PyTree) -> tuple[PyTree, Array]:
        """No call: x stands for the last x'."""
        h = small_step(problem, x, 0.01 * jnp.abs(problem.t1 - problem.t0))
        return (x, _Ahead.nothing(x, h, self.kept)), h

    def limit(self, memory: PyTree) -> Array | None:
        """Where the nearest known increment ends."""
        return memory[1].sizes[:, 0] if self.kept else None

    def attempt(self, keys: Key, problem: Problem, at: Progress, u_next: Array, h: Array) -> Trial:
        """Eqs. (1) to (3); here h < 0."""
        process, (previous, ahead) = problem.process, at.memory

        def drift(t: Array, x: PyTree) -> PyTree:
            return reverse_drift(process, x, problem.denoise(x, t), t)

        z = random.normal_like(keys, "adaptive_sde", at.y)
        w = ahead.increment(-h, z)
        none, one = jnp.zeros_like(h), jnp.ones_like(h)
        # A schedule per pixel has a g for each number, so the noise is scaled first.
        noise, noise_next = (scale(diffusion(process, t), w) for t in (at.t, u_next))
        maruyama, (_, _, slope) = staged(
            drift,
            at.y,
            [noise],
            jnp.stack([at.t, u_next]),
            jnp.stack([one, one]),
            jnp.stack([jnp.stack([none] * 3), jnp.stack([one, h, none])]),
        )
        other = combine((one, at.y), (h, slope), (one, noise_next))
        improved = combine((one / 2, maruyama), (one / 2, other))
        # Steps are held constant: what they are chosen by has no derivative where the error is 0.
        e, held, last = jax.lax.stop_gradient(
            (combine((one / 2, maruyama), (-one / 2, other)), maruyama, previous)
        )
        return Trial(
            improved,
            (maruyama, ahead.after(-h, w)),
            problem.controller.error_by_larger(e, held, last),
            (previous, ahead.with_known(-h, w)),
        )


class _Ahead(NamedTuple):
    """Increments of w that are known from here on, the nearest first.

    sizes: (B, K), how far each goes, infinite where nothing is known. values: trees of (B, K, ...).
    """

    sizes: Array
    values: PyTree

    @classmethod
    def nothing(cls, x: PyTree, h: Array, count: int) -> "_Ahead":
        """Nothing known, room for `count`."""
        batch = h.shape[0]
        values = jax.tree.map(lambda a: jnp.zeros((batch, count, *a.shape[1:]), a.dtype), x)
        return cls(jnp.full((batch, count), jnp.inf, h.dtype), values)

    def increment(self, size: Array, z: PyTree) -> PyTree:
        """w over `size`, eq. (5), or new where nothing is known."""
        if self.sizes.shape[1] == 0:
            return scale(safe_sqrt(size), z)
        share = jnp.minimum(size / self.sizes[:, 0], 1.0)
        known = jax.tree.map(lambda a: a[:, 0], self.values)
        return combine((share, known), (safe_sqrt(size * (1 - share)), z))

    def after(self, size: Array, w: PyTree) -> "_Ahead":
        """What is known once the step is made."""
        if self.sizes.shape[1] == 0:
            return self
        used = size >= self.sizes[:, 0]
        sizes = self.sizes - size[:, None]
        values = jax.tree.map(lambda a, b: a - b[:, None], self.values, w)
        ends = jnp.full_like(size, jnp.inf), jax.tree.map(jnp.zeros_like, w)
        shifted = _Ahead(*jax.tree.map(lambda a, b: _join(a[:, 1:], b), (sizes, values), ends))
        return _where(used, shifted, _Ahead(sizes, values))

    def with_known(self, size: Array, w: PyTree) -> "_Ahead":
        """What is known once the step is rejected."""
        if self.sizes.shape[1] == 0:
            return self
        new = size < self.sizes[:, 0]

        def push(first, stack):
            return jnp.concatenate([first[:, None], stack[:, :-1]], axis=1)

        return _where(new, _Ahead(*jax.tree.map(push, (size, w), tuple(self))), self)


def _join(stack: Array, last: Array) -> Array:
    return jnp.concatenate([stack, last[:, None]], axis=1)


def _where(mask: Array, a: _Ahead, b: _Ahead) -> _Ahead:
    return jax.tree.map(
        lambda x, y: jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 1)), x, y), a, b
    )
