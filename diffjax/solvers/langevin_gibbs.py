"""Denoising Langevin Gibbs: a Markov chain near the data, and few steps from it to clean data.

Symbols: x a sample at an unknown time t among L `levels`, p(t) their weights, p_t the law of x_t,
s(x, t) its score, e a step, z standard normal, rho the exponent of a grid.

    x <- x + e/2 s(x, t) + sqrt(e) z,      e = step sigma(t)^2                                  (1)
    t <- a draw of p(t | x), in proportion to p(t) p_t(x)                                       (2)
    a grid of n intervals from t to the end, even in (sigma/alpha)^(1/rho), for each sample     (3)

(1) and (2) in turn are a Gibbs sampler of p(t) p_t(x), exact but for the error of (1) in e. At a
high level the chain moves between modes, at a low one it is close to the data, and every n_skip
steps its state is led to clean data along (3) by any one-step solver. That is shorter than the way
from the prior, so that n_skip + n evaluations a sample may do what a solver needs more for. The
price is that successive samples of one chain depend on each other, and that a chain needs a start:
solve once from the prior, perturb to one of the levels and let a few steps pass.

(2) is asked of a classifier of noise levels, any callable x -> logits (B, L) trained by
cross-entropy on data perturbed to levels drawn from p(t). Where p_t is known, `level_logits` makes
one that is exact.

The paper treats variance-exploding processes; here t is the time of any process. Its public code
has one e for all levels (0.8 at CIFAR-10, `scaled=False` here); with a level-independent e, (1)
overshoots where sigma(t)^2 is below e/4. It takes the likeliest level in place of a draw, which is
`draw="mode"`: then (2) is no Gibbs step, and with a sharp classifier the level creeps up, since
each (1) leaves sigma^2 larger by e^2/(4 sigma^2). And it leads to clean data the state of the
lowest level among the last n_skip, here `pick="lowest"`.

References:
[1] Kim, Ye, "Denoising MCMC for Accelerating Diffusion-Based Generative Models", 2022,
    https://arxiv.org/abs/2209.14593, and its code, https://github.com/1202kbs/DMCMC.
[2] Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022,
    https://arxiv.org/abs/2206.00364, eq. 5 (the grid).
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from diffjax.core import checks, random
from diffjax.core.numerics import at_least_float32, batch_size, combine, safe_sqrt, select
from diffjax.core.pytree import pytree, static
from diffjax.core.types import Array, DenoiseFn, Key, Number, PyTree
from diffjax.processes.base import Process
from diffjax.processes.calculus import inverse_log_snr, log_snr, score
from diffjax.solvers.base import Final, Solver, ToEnd, calls


@pytree
class LevelLogits:
    """x -> ln p(t) + ln p_t(x) over the levels, (B, L), from a known log-density.

    log_prob: (x, t ()) -> (B,), a callable that is a pytree. levels: (L,). weights: p(t), (L,).
    """

    log_prob: Any
    levels: Array
    weights: Array

    def __call__(self, x: PyTree) -> Array:
        scores = jax.lax.map(lambda t: self.log_prob(x, t), self.levels)
        return scores.T + jnp.log(self.weights).astype(scores.dtype)[None]


@pytree
class LangevinGibbs:
    """The chain of eqs. (1) and (2).

    logits: x -> (B, L), a classifier of the levels, a callable that is a pytree; levels: (L,)
    times. step: e over sigma(t)^2, or e itself if not scaled; (1) is stable below 4. n_skip: steps
    between two samples. draw: "sample" (a Gibbs step) or "mode" (the public code). pick: which
    state is led to clean data, the last one or that of the lowest level among the last n_skip and
    the one before them.
    """

    logits: Any
    levels: Array
    step: Number = 0.5
    n_skip: int = static(default=5)
    scaled: bool = static(default=True)
    draw: Literal["sample", "mode"] = static(default="sample")
    pick: Literal["last", "lowest"] = static(default="last")

    def __post_init__(self):
        checks.positive("step", self.step)
        checks.positive("levels", self.levels)
        checks.at_least("n_skip", self.n_skip, 1)
        checks.one_of("draw", self.draw, ("sample", "mode"))
        checks.one_of("pick", self.pick, ("last", "lowest"))

    def move(
        self, keys: Key, denoise: DenoiseFn, process: Process, x: PyTree, t: Array
    ) -> tuple[PyTree, Array]:
        """(x, t) after eqs. (1) and (2); one call of the denoiser. t: (B,)."""
        e = self.step * (process.coeffs(t).sigma ** 2 if self.scaled else jnp.ones_like(t))
        z = random.normal_like(keys, "langevin_gibbs", x)
        slope = score(process, denoise(x, t), t)
        x = combine((1.0, x), (e / 2, slope), (safe_sqrt(e), z))
        return x, self.relevel(keys, x).astype(t.dtype)

    def relevel(self, keys: Key, x: PyTree) -> Array:
        """Eq. (2): the levels of x, (B,)."""
        logits = self.logits(x)
        if self.draw == "sample":
            # Gumbel's trick on each sample's own stream: the batch does not matter.
            u = random.uniform_like(keys, "level", logits)
            logits = logits - jnp.log(-jnp.log(jnp.maximum(u, jnp.finfo(u.dtype).tiny)))
        return jnp.asarray(self.levels)[jnp.argmax(logits, axis=1)]


class ChainResult(NamedTuple):
    """x: (n_samples, B, *data) clean. chain: (x, t) to go on from. levels: (n_samples, B), the
    times that the samples were led from. nfe: calls of the denoiser a sample.
    """

    x: PyTree
    chain: tuple[PyTree, Array]
    levels: Array
    nfe: int | Array


def sample_chain(
    key: Key,
    denoise: DenoiseFn,
    x: PyTree,
    t: Array,
    *,
    chain: LangevinGibbs,
    process: Process,
    solver: Solver,
    n_steps: int,
    n_samples: int,
    rho: Number = 7.0,
    final: Final = ToEnd(),
) -> ChainResult:
    """Draws n_samples from each of B chains.

    key: a typed key, or (B,) keys, one a chain. x: (B, *data), a tree, at times t, () or (B,).
    solver: takes times of shape (B,), as all one-step methods here do. n_steps: intervals of (3).
    final: `ToEnd()` for a process with sigma(0) = 0; else `Tweedie()`, which ends at t_min and
      costs a call more.

    Raises ValueError for a schedule per pixel and for a `final` that does not fit the process.
    """
    x = at_least_float32(x)
    checks.at_least("n_steps", n_steps, 1)
    checks.at_least("n_samples", n_samples, 1)
    _check_final(process, solver, final)
    batch = batch_size(x)
    keys = random.sample_keys(key, batch)
    t = jnp.broadcast_to(jnp.asarray(t, jnp.result_type(*jax.tree.leaves(x))), (batch,))

    def move(carry, i):
        x, t, best, low = carry
        x, t = chain.move(random.step_keys(keys, i), denoise, process, x, t)
        better = t < low if chain.pick == "lowest" else jnp.ones_like(t, bool)
        best = select(better, x, best)
        return (x, t, best, jnp.where(better, t, low)), None

    def one(carry, i):
        x, t = carry
        steps = i * chain.n_skip + jnp.arange(chain.n_skip)
        (x, t, best, low), _ = jax.lax.scan(move, (x, t, x, t), steps)
        own = random.step_keys(random.step_keys(keys, random.tag("denoise")), i)
        clean = denoise_from(
            own, denoise, process, best, low, solver=solver, n=n_steps, rho=rho, final=final
        )
        return (x, t), (clean, low)

    end, (clean, levels) = jax.lax.scan(one, (x, t), jnp.arange(n_samples))
    nfe = chain.n_skip + calls(solver, final, n_steps)
    return ChainResult(clean, end, levels, nfe)


def denoise_from(
    keys: Key,
    denoise: DenoiseFn,
    process: Process,
    x: PyTree,
    t: Array,
    *,
    solver: Solver,
    n: int,
    rho: Number = 7.0,
    final: Final = ToEnd(),
) -> PyTree:
    """Clean data from x at times t of its own, (B,), along eq. (3); like x. keys: (B,)."""
    times = grid_from(process, t, n, rho=rho, to_zero=not final.steps)
    state = solver.init(process, x, times[0])

    def body(state, i):
        step_keys = random.step_keys(keys, i)
        return solver.step(step_keys, denoise, process, state, times[i], times[i + 1]), None

    state, _ = jax.lax.scan(body, state, jnp.arange(n if final.steps else n - 1))
    last = random.step_keys(keys, n - 1)
    return final.end(solver, last, denoise, process, state, times[-2], times[-1]).x


def grid_from(
    process: Process, t: Array, n: int, *, rho: Number = 7.0, to_zero: bool = True
) -> Array:
    """Eq. (3): (n+1, B) from t, (B,), down to t_min, or to t_min and then 0."""
    low = jnp.maximum(jnp.asarray(process.t_min, t.dtype), 0)
    ends = [jnp.exp(-log_snr(process, u) / (2 * rho)) for u in (t, jnp.full_like(t, low))]
    share = jnp.linspace(0.0, 1.0, n if to_zero else n + 1, dtype=t.dtype)[:, None]
    nodes = ends[0][None] * (1 - share) + ends[1][None] * share
    times = inverse_log_snr(process, -2 * rho * jnp.log(nodes)).at[0].set(t)
    # Rounding, and a chain at t_min itself, may not lead a step upwards.
    times = jax.lax.cummin(jnp.clip(times, low, t[None]), axis=0)
    return jnp.concatenate([times, jnp.zeros_like(times[:1])]) if to_zero else times


def _check_final(process: Process, solver: Solver, final: Final) -> None:
    end = 0.0 if not final.steps else process.t_min
    sigma = checks.evaluated(lambda: process.coeffs(jnp.asarray(end, float)).sigma)
    final.check(solver, sigma, False)


def level_logits(
    log_prob: Callable[[PyTree, Array], Array], levels: Array, weights: Array | None = None
) -> LevelLogits:
    """An exact classifier of `levels`, (L,), where ln p_t(x) is known; weights: even by default."""
    levels = jnp.asarray(levels)
    even = jnp.full(levels.shape, 1 / levels.size, levels.dtype)
    return LevelLogits(log_prob, levels, even if weights is None else jnp.asarray(weights))
