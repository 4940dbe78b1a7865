"""Broken solvers and processes, one for each way of breaking a law.

Each is DDIM-like and right in everything but one point, so a law that passes it is not a law.
"""

from typing import Any

import jax
import jax.numpy as jnp

from diffjax.core import random
from diffjax.core.numerics import combine, safe_sqrt
from diffjax.core.pytree import pytree, static
from diffjax.core.types import Coeffs, Number
from diffjax.processes.calculus import between
from diffjax.solvers import DDIM, XState
from diffjax.solvers.euler import linear_step


class _OneCall:
    """The declarations of a one-step method, and a noiseless end."""

    stages = 1
    final_stages = 1
    stochastic = True

    def init(self, process, x, t):
        return XState(x)

    def finish(self, keys, denoise, process, state, t, s):
        return XState(linear_step(process, denoise(state.x, t), s))


def _ancestral(denoise, process, state, t, s, z, eta=1.0):
    """DDIM's update with the noise z."""
    prediction, move = denoise(state.x, t), between(process, t, s)
    sigma = move.at_s.sigma
    kept, added = sigma * safe_sqrt(1 - eta**2 * move.gain), eta * sigma * safe_sqrt(move.gain)
    terms = (move.at_s.alpha, prediction.x0), (kept, prediction.eps), (added, z)
    return XState(combine(*terms))


@pytree
class WholeBatchNoise(_OneCall):
    """Draws one array for the batch from the first sample's key."""

    def step(self, keys, denoise, process, state, t, s):
        z = jax.random.normal(keys[0], state.x.shape)
        return _ancestral(denoise, process, state, t, s, z)


@pytree
class SameNoiseInEveryLeaf(_OneCall):
    """Draws for each leaf of x from the same stream."""

    def step(self, keys, denoise, process, state, t, s):
        z = jax.tree.map(lambda leaf: random.normal_like(keys, "noise", leaf), state.x)
        return _ancestral(denoise, process, state, t, s, z)


@pytree
class BatchMean(_OneCall):
    """Centres the noise over the batch: a sample depends on its neighbours."""

    def step(self, keys, denoise, process, state, t, s):
        z = random.normal_like(keys, "noise", state.x)
        z = z - jnp.mean(z, axis=0, keepdims=True)
        return _ancestral(denoise, process, state, t, s, z)


@pytree
class BatchedStream(_OneCall):
    """Draws by XLA's own generator, whose stream under `vmap` is not that of one call."""

    def step(self, keys, denoise, process, state, t, s):
        data = jax.random.key_data(keys[0])
        rbg = jax.random.wrap_key_data(jnp.concatenate([data, data]), impl="rbg")
        return _ancestral(denoise, process, state, t, s, jax.random.normal(rbg, state.x.shape))


@pytree
class StaticEta(_OneCall):
    """Holds a number as structure: every new value is a new program."""

    eta: float = static(default=0.5)

    def step(self, keys, denoise, process, state, t, s):
        z = random.normal_like(keys, "noise", state.x)
        return _ancestral(denoise, process, state, t, s, z, self.eta)


@pytree
class RootOfEta(_OneCall):
    """Has eta under a square root: its derivative at 0 is infinite, and 0 times it NaN."""

    eta: Number = 0.5

    def step(self, keys, denoise, process, state, t, s):
        z = random.normal_like(keys, "noise", state.x)
        return _ancestral(denoise, process, state, t, s, z, jnp.sqrt(self.eta) ** 2)


@pytree
class Upcast(_OneCall):
    """Ends in JAX's default float dtype, whatever x's is."""

    def finish(self, keys, denoise, process, state, t, s):
        return XState(DDIM().finish(keys, denoise, process, state, t, s).x * jnp.ones((), float))

    def step(self, keys, denoise, process, state, t, s):
        return DDIM().step(keys, denoise, process, state, t, s)


@pytree
class Downcast(Upcast):
    """Ends in float32, whatever x's dtype is."""

    def finish(self, keys, denoise, process, state, t, s):
        return XState(DDIM().finish(keys, denoise, process, state, t, s).x.astype(jnp.float32))


@pytree
class AsksForTheValue(_OneCall):
    """Does one thing where it sees numbers and another under `jit`."""

    def step(self, keys, denoise, process, state, t, s):
        return DDIM().step(keys, denoise, process, state, t, s)

    def finish(self, keys, denoise, process, state, t, s):
        x = DDIM().finish(keys, denoise, process, state, t, s).x
        return XState(x if isinstance(x, jax.core.Tracer) else 1.01 * x)


@pytree
class SecondCall(_OneCall):
    """Calls the network for a second stage, which it throws away, beside the first."""

    def step(self, keys, denoise, process, state, t, s):
        denoise(state.x, s)
        z = random.normal_like(keys, "noise", state.x)
        return _ancestral(denoise, process, state, t, s, z)


@pytree
class FirstLeafOnly(_OneCall):
    """Takes x for one array: the other leaves of a tree never move."""

    def step(self, keys, denoise, process, state, t, s):
        moved = DDIM().step(keys, denoise, process, state, t, s).x
        return XState(_first_of(moved, state.x))

    def finish(self, keys, denoise, process, state, t, s):
        return XState(_first_of(super().finish(keys, denoise, process, state, t, s).x, state.x))


def _first_of(moved: Any, kept: Any) -> Any:
    leaves, treedef = jax.tree.flatten(kept)
    return jax.tree.unflatten(treedef, [jax.tree.leaves(moved)[0], *leaves[1:]])


@jax.tree_util.register_pytree_node_class
class ForgetsStructure:
    """A node that loses a static field whenever a tree is put together again."""

    def __init__(self, rate=1.0, order=2):
        self.rate, self.order = rate, order

    def tree_flatten(self):
        return (self.rate,), ()

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children)

    def __eq__(self, other):
        return self.order == other.order


@jax.tree_util.register_pytree_node_class
class ChecksAgain(ForgetsStructure):
    """A node that checks its numbers whenever a tree is put together again."""

    def __init__(self, rate=1.0):
        if not rate > 0:
            raise ValueError("rate")
        super().__init__(rate)


# Processes.


@pytree
class FirstTimeForAll:
    """Uses one sample's time for the batch."""

    t_min: Number = 1e-3
    t_max: Number = 0.99

    def coeffs(self, t):
        t = jnp.broadcast_to(jnp.max(t), jnp.shape(t))
        return Coeffs(jnp.cos(t), jnp.zeros_like(t), jnp.sin(t))


@pytree
class PlainRoot:
    """sigma = sqrt(1 - alpha^2) as it stands: no gradient at t = 0."""

    rate: Number = 1.0
    t_min: Number = 1e-3
    t_max: Number = 0.99

    def coeffs(self, t):
        t = jnp.asarray(t)
        alpha = jnp.exp(-self.rate * t)
        return Coeffs(alpha, jnp.zeros_like(t), jnp.sqrt(1 - alpha**2))


@pytree
class WrongRates(PlainRoot):
    """Gives g where g^2 is asked."""

    def rates(self, t):
        t = jnp.asarray(t)
        return -self.rate * jnp.ones_like(t), jnp.sqrt(2 * self.rate * jnp.ones_like(t))


@pytree
class FloatsFromNumpy(PlainRoot):
    """Computes in NumPy's default dtype."""

    def coeffs(self, t):
        c = PlainRoot.coeffs(self, t)
        return c._replace(sigma=c.sigma * jnp.ones((), float))


@pytree
class NotInverse(PlainRoot):
    """Inverts half the log-SNR."""

    def inverse_log_snr(self, lam):
        return jnp.log1p(jnp.exp(-lam / 2)) / (2 * self.rate)
