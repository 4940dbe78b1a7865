"""One update of the weights as a pure function, several in one dispatch, and both compiled.

Symbols: B is the global batch; n the updates in one dispatch. With l_i(p) the loss of image i, an
update follows the gradient of mean_i l_i(p) over the *global* batch, whatever the mesh; then the
optimizer (`optim`), then the average of the weights (`ema`).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from diffjax.core.types import Array, Key, PyTree
from diffjax.train.ema import EMARule, average
from diffjax.train.mesh import batch_sharding, replicated
from diffjax.train.optim import Schedule
from diffjax.train.state import TrainState

Metrics = dict[str, Array]
LossFn = Callable[[PyTree, Key, PyTree], tuple[Array, Mapping[str, Array]]]
StepFn = Callable[[TrainState, PyTree], tuple[TrainState, Metrics]]


def train_step(
    state: TrainState,
    batch: PyTree,
    *,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    ema: EMARule,
    schedule: Schedule | None = None,
) -> tuple[TrainState, Metrics]:
    """The state after one more update, and its metrics, float32 scalars.

    batch: a tree of arrays (B, ...). loss_fn: (params, key, batch) -> per-image losses (B,) and a
    dict of further values, whose means are reported under their names. The key is
    `fold_in(state.key, state.step)`. schedule: the optimizer's rate, only reported, as "lr".
    metrics: "loss", "grad_norm" (before clipping), "lr" and loss_fn's own.
    Raises ValueError for losses that are not (B,) and for a name used twice.
    """
    key = jax.random.fold_in(state.key, state.step)

    def objective(params):
        losses, aux = loss_fn(params, key, batch)
        if losses.ndim != 1:
            raise ValueError(
                f"loss_fn must return one loss an image, shape (B,); got shape {losses.shape}."
            )
        return _mean(losses), {name: _mean(value) for name, value in aux.items()}

    (loss, aux), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads).astype(loss.dtype)}
    if schedule is not None:
        metrics["lr"] = schedule(state.step)
    if taken := metrics.keys() & aux.keys():
        raise ValueError(f"loss_fn may not report {sorted(taken)}: the step reports these itself.")
    state = TrainState(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        ema=average(ema(state.step), state.ema, params),
        key=state.key,
    )
    return state, metrics | aux


def multi_step(state: TrainState, batches: PyTree, **step: Any) -> tuple[TrainState, Metrics]:
    """n updates by a scan. batches: arrays (n, B, ...). Metrics: (n,), one entry an update.

    step: the keyword arguments of `train_step`. On a CPU take n = 1: XLA's fast form of the
    gradients of convolutions is for code outside of loops, and inside it is some 30 times slower.
    """
    run: StepFn = functools.partial(train_step, **step)
    if jax.tree.leaves(batches)[0].shape[0] > 1:
        return jax.lax.scan(run, state, batches)
    state, metrics = run(state, jax.tree.map(lambda leaf: leaf[0], batches))
    return state, jax.tree.map(lambda value: value[None], metrics)


def compile_step(
    mesh: Mesh,
    *,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    ema: EMARule,
    schedule: Schedule | None = None,
    state_sharding: PyTree | None = None,
) -> StepFn:
    """`multi_step` jitted over a mesh: (state, batches (n, B, ...)) -> (state, metrics (n,)).

    The batch is split over the axis "data"; the state has `state_sharding` (a sharding, or a tree
    of them like the state), by default a copy on each device. The given state is donated: its
    buffers become the result's, and it must not be used again.
    """
    state_sharding = replicated(mesh) if state_sharding is None else state_sharding
    run = functools.partial(
        multi_step, loss_fn=loss_fn, optimizer=optimizer, ema=ema, schedule=schedule
    )
    return jax.jit(
        run,
        in_shardings=(state_sharding, batch_sharding(mesh, axis=1)),
        out_shardings=(state_sharding, replicated(mesh)),
        donate_argnums=0,
    )


def _mean(values: Array) -> Array:
    """The mean over all elements, in at least float32."""
    values = jnp.asarray(values)
    return jnp.mean(values, dtype=jnp.promote_types(values.dtype, jnp.float32))
