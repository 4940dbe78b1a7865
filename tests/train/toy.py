"""A model small enough to train in milliseconds, with noise keyed by the image's global index."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.random import normal_like, sample_keys
from diffjax.train import ema, mesh, optim, state, step

DIM = 6
BATCH = 16


def init_params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "w": jnp.asarray(rng.normal(size=(DIM, 32)) / 4, jnp.float32),
        "b": jnp.zeros((32,), jnp.float32),
        "out": {"w": jnp.asarray(rng.normal(size=(32, DIM)) / 4, jnp.float32)},
    }


def loss_fn(params, key, x):
    """Denoising by a two-layer network; (B,) losses."""
    z = normal_like(sample_keys(key, x.shape[0]), "noise", x)
    h = jnp.tanh((x + z) @ params["w"] + params["b"][None])
    return jnp.sum(jnp.square(h @ params["out"]["w"] - x), axis=1), {"norm": jnp.abs(x).mean(1)}


def batch(n):
    """The host's batch of update n: random access, so that a resumed run reads the same."""
    return np.random.default_rng(n).normal(size=(BATCH, DIM)).astype(np.float32)


def batches(start=0):
    n = start
    while True:
        yield batch(n)
        n += 1


SCHEDULE = optim.learning_rate(1e-2, warmup=3)
OPTIMIZER = optim.adam(SCHEDULE, grad_clip=1.0)


def new_state(on, seed=7):
    fresh = state.create_state(jax.random.key(seed), init_params(), OPTIMIZER)
    return jax.device_put(fresh, mesh.replicated(on))


@functools.cache
def compiled(on):
    return step.compile_step(
        on,
        loss_fn=loss_fn,
        optimizer=OPTIMIZER,
        ema={"main": ema.ConstantEMA(0.9)},
        schedule=SCHEDULE,
    )


def fit_kwargs(on, n_jitted_steps=1):
    return {"step_fn": compiled(on), "n_jitted_steps": n_jitted_steps, "log_every": n_jitted_steps}


def feed(on, start=0, n=1):
    return mesh.dispatch_batches(on, batches(start), n)


def assert_bitwise(a, b):
    """Equal to the last bit, leaf by leaf, keys included."""

    def raw(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert raw(x).dtype == raw(y).dtype
        assert raw(x).tobytes() == raw(y).tobytes()
