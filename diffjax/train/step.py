"""One update of the weights as a pure function, several in one dispatch, and both compiled.

Symbols: B is the global batch; n the updates in one dispatch. With l_i(p) the loss of image i, an
update follows the gradient of mean_i l_i(p) over the *global* batch, whatever the mesh; then the
optimizer (`optim`), then the averages of the weights (`ema`).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from diffjax.core.types import Array, PyTree
from diffjax.train.accumulate import LossFn, Prepare, as_it_is, loss_and_gradient
from diffjax.train.ema import EMARule, averages
from diffjax.train.mesh import batch_sharding, replicated
from diffjax.train.offload import is_on_host, through_device
from diffjax.train.optim import Schedule
from diffjax.train.probes import Probes, Update
from diffjax.train.scaling import loss_scale, reported_norm
from diffjax.train.sharding import fetched
from diffjax.train.state import TrainState

Metrics = dict[str, Any]  # arrays, and what probes give
StepFn = Callable[[TrainState, PyTree], tuple[TrainState, Metrics]]


def train_step(
    state: TrainState,
    batch: PyTree,
    *,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    ema: Mapping[str, EMARule],
    schedule: Schedule | None = None,
    accumulate: int = 1,
    unroll: bool = False,
    prepare: Prepare = as_it_is,
    probes: Probes = Probes(),
    skip_bad: bool = False,
) -> tuple[TrainState, Metrics]:
    """The state after one more update, and its metrics, float32 scalars.

    batch: a tree of arrays (B, ...). loss_fn: (params, key, batch) -> per-image losses (B,) and a
    dict of further values, whose means are reported under their names. The key is
    `fold_in(state.key, state.step)`. ema: the rules of the state's averages, by name. schedule: the
    optimizer's rate, only reported, as "lr". accumulate, unroll, prepare: see `accumulate`.
    probes: what else is reported. skip_bad: where the loss or the gradient's norm is not finite,
    all but the step stays as it was.
    metrics: "loss", "grad_norm" (before clipping), "bad" (1 where either is not finite, else 0),
    "lr", the probes' and loss_fn's own; of an optimizer with `scaling` also "loss_scale", the
    update's, and "grad_norm" is 0 where it is skipped.
    Raises ValueError for losses that are not (B,), for a name used twice and for rules whose names
    are not the state's.
    """
    key, scale = jax.random.fold_in(state.key, state.step), loss_scale(state.opt_state)
    loss, aux, grads = loss_and_gradient(
        loss_fn,
        state.params,
        key,
        batch,
        accumulate=accumulate,
        unroll=unroll,
        scale=scale,
        prepare=prepare,
        summarise=probes.of_images,
    )
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = _own_metrics(loss, grads, scale)
    if schedule is not None:
        metrics["lr"] = schedule(state.step)
    if taken := metrics.keys() & aux.keys():
        raise ValueError(f"loss_fn may not report {sorted(taken)}: the step reports these itself.")
    after = TrainState(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        ema=averages(ema, state.step, state.ema, params),
        key=state.key,
    )
    if skip_bad:
        after = _unless(metrics["bad"] > 0, after, state)
    figures = probes.of_update(Update(grads, updates, after.params, after.ema))
    return after, metrics | aux | figures


def _own_metrics(loss: Array, grads: PyTree, scale: Array | None) -> Metrics:
    """What the step itself reports of an update."""
    norm = optax.tree.norm(grads).astype(loss.dtype)
    scaled = {}
    if scale is not None:
        norm = reported_norm(norm, scale)
        scaled["loss_scale"] = scale
    bad = ~(jnp.isfinite(loss) & jnp.isfinite(norm))
    return {"loss": loss, "grad_norm": norm, "bad": bad.astype(loss.dtype)} | scaled


def _unless(bad: Array, after: TrainState, before: TrainState) -> TrainState:
    """`after`, or where it is bad `before` with the step of `after`."""

    def choose(new, old):
        return jax.tree.map(lambda n, o: jnp.where(bad, o, n), new, old)

    return dataclasses.replace(
        after,
        params=choose(after.params, before.params),
        opt_state=choose(after.opt_state, before.opt_state),
        ema=choose(after.ema, before.ema),
    )


def multi_step(
    state: TrainState, batches: PyTree, *, offload: bool = False, **step: Any
) -> tuple[TrainState, Metrics]:
    """n updates by a scan. batches: arrays (n, B, ...). Metrics: (n,), one entry an update.

    step: the keyword arguments of `train_step`. offload: the averages lie on the host. On a CPU
    take n = 1: XLA's fast form of the gradients of convolutions is for code outside of loops, and
    inside it is some 30 times slower.
    """
    run: StepFn = functools.partial(train_step, **step)
    if offload:
        run = through_device(run)
    if jax.tree.leaves(batches)[0].shape[0] > 1:
        return jax.lax.scan(run, state, batches)
    state, metrics = run(state, jax.tree.map(lambda leaf: leaf[0], batches))
    return state, jax.tree.map(lambda value: value[None], metrics)


def compile_step(
    mesh: Mesh,
    *,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    ema: Mapping[str, EMARule],
    schedule: Schedule | None = None,
    accumulate: int = 1,
    prepare: Prepare = as_it_is,
    probes: Probes = Probes(),
    skip_bad: bool = False,
    state_sharding: TrainState | None = None,
) -> StepFn:
    """`multi_step` jitted over a mesh: (state, batches (n, B, ...)) -> (state, metrics (n,)).

    The batch is split over "data" and "fsdp". state_sharding: how the state lies, a tree like it
    from `sharding.state_sharding`; None for a copy on each device. The given state is donated: its
    buffers become the result's, and it must not be used again.
    """
    if state_sharding is not None:
        loss_fn = fetched(loss_fn, state_sharding.params)
    layout = replicated(mesh) if state_sharding is None else state_sharding
    offload = state_sharding is not None and is_on_host(state_sharding)
    run = functools.partial(
        multi_step,
        offload=offload,
        loss_fn=loss_fn,
        optimizer=optimizer,
        ema=ema,
        schedule=schedule,
        accumulate=accumulate,
        prepare=prepare,
        probes=probes,
        skip_bad=skip_bad,
        unroll=mesh.devices.flat[0].platform == "cpu",  # for the same reason as in `multi_step`
    )
    return jax.jit(
        run,
        in_shardings=(layout, batch_sharding(mesh, axis=1)),
        out_shardings=(layout, replicated(mesh)),
        donate_argnums=0,
    )
