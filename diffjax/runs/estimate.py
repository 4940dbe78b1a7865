"""What one device of a mesh holds and does in a step, without compiling: the `model` of `plan`.

Symbols: D, F, T devices along "data", "fsdp" and "tensor"; B images of a batch in a micro-batches.
A parameter has b bytes, b' = b / t on the devices that split it over "tensor" in t.

Exact are the bytes of the state and of the batch, from their shapes and shardings. Modelled are

    work            the products of the gradient of B / (D F) images, each split over T where  (1)
                    `partition` finds it so
    temporaries     the peak of `liveness` for B / (D F a) images, split as in (1), with whole  (2)
                    gradients until they are summed and whole weights while they are used, and
                    the sum of gradients where a > 1; or gradients and averages that come from
                    the host, if these are more
    collectives     of a parameter that "fsdp" splits: an all-gather of b' to F devices on     (3)
                    the way forward and one on the way back, a reduce-scatter of b' among F,
                    an all-reduce of b' / F among D; of any other: an all-reduce of b' among
                    D F; and the all-reduces of `partition` among T. All that for each
                    micro-batch.
    traffic         beside the products': the state read and written, the gradient read;      (4)
                    averages in the host's memory are written to the chip's and read from it too

A sampler has whole parameters, or fetches those that "fsdp" splits:

    collectives     an all-gather of b' to F devices in each call of the network; and the       (5)
                    all-reduces of `partition`
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from diffjax import builders
from diffjax.core.types import PyTree
from diffjax.runs import counting, dryrun, liveness, partition
from diffjax.runs.dryrun import Axes, What
from diffjax.runs.programs import Collective

Spoken = Callable[[Axes], tuple[Collective, ...]]


class Estimate(NamedTuple):
    """Of one device and one step. state: exact bytes by name; batch: exact bytes.

    host: exact bytes of averages in the host's memory, which are not in `state`. traffic: (4), in
    bytes. collectives_on: (3), or (5), on a mesh of these or other sizes, at the same batch a
    device. parameters: their number in all. images: of a batch.
    """

    axes: Axes
    state: dict[str, int]
    batch: int
    temporaries: float
    work: counting.Work
    traffic: float
    collectives_on: Spoken
    parameters: int
    images: int
    host: int = 0

    @property
    def total(self) -> float:
        """Bytes in all."""
        return sum(self.state.values()) + self.batch + self.temporaries

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """Those of a step."""
        return self.collectives_on(self.axes)


def estimate(config: Any, what: What, axes: Axes) -> Estimate:
    """The model's figures. Raises BuildError or ValueError where config and mesh do not fit."""
    from diffjax.train.mesh import check_batch_size

    parts = builders.build_parts(config)
    mesh: Any = dryrun.abstract_mesh(axes)  # has what is asked of a mesh of devices here
    micro = builders.build_accumulate(config) if what == "train" else 1
    check_batch_size(mesh, dryrun.batch_size(config, what) // micro)
    return (_training if what == "train" else _sampling)(config, parts, mesh)


def _training(config: Any, parts: builders.Parts, mesh: Any) -> Estimate:
    from diffjax.train.mesh import TENSOR, batch_slices

    shapes = dryrun.train_state(config, parts)
    layout = builders.build_sharding(config, mesh, shapes)
    micro = builders.build_accumulate(config)
    images = config.training.batch_size
    local = images // batch_slices(mesh)
    state = {
        "parameters": dryrun.shard_bytes(shapes.params, layout.params),
        "optimizer": dryrun.shard_bytes(shapes.opt_state, layout.opt_state),
        "averages": dryrun.shard_bytes(shapes.ema, layout.ema),
    }
    host = state.pop("averages") if dict(config.ema).get("offload", False) else 0
    leaves = _leaves(shapes.params, layout.params)
    gradient, sums = partition.on_one_device(
        dryrun.gradient(config, parts, local // micro),
        _split_axes(layout.params),
        mesh.shape[TENSOR],
    )
    temporaries = liveness.peak(
        gradient,
        gathered={i: leaf.fetched for i, leaf in enumerate(leaves) if leaf.split},
        results={i: leaf.held for i, leaf in enumerate(leaves)},
    )
    summed = sum(leaf.held for leaf in leaves)
    if micro > 1:
        temporaries += summed
    temporaries = max(temporaries, summed + host)
    batch = counting.tree_bytes(dryrun.train_batch(config, parts, local))
    return Estimate(
        axes=mesh.shape,
        collectives_on=functools.partial(collectives, leaves, micro=micro, sums=sums),
        state=state,
        host=host,
        batch=batch * config.training.n_jitted_steps,
        temporaries=temporaries,
        work=counting.work(gradient, times=micro),
        traffic=2 * (sum(state.values()) + 2 * host) + state["parameters"],
        parameters=sum(leaf.size for leaf in jax.tree.leaves(shapes.params)),
        images=images,
    )


def _sampling(config: Any, parts: builders.Parts, mesh: Any) -> Estimate:
    from diffjax.train.mesh import TENSOR, batch_slices

    local = config.eval.batch_size // batch_slices(mesh)
    params, *given = dryrun.sample_arguments(config, parts, local)
    layout = dryrun.sample_layout(config, params, mesh)
    leaves = _leaves(params, layout)
    program, sums = partition.on_one_device(
        dryrun.sampler(config, parts, local), _split_axes(layout), mesh.shape[TENSOR]
    )
    gathered = {i: leaf.fetched for i, leaf in enumerate(leaves) if leaf.split}
    calls = dryrun.sampler_calls(config, parts)
    return Estimate(
        axes=mesh.shape,
        collectives_on=functools.partial(fetches, leaves, calls=calls, sums=sums),
        state={"parameters": dryrun.shard_bytes(params, layout)},
        batch=counting.tree_bytes(given),
        temporaries=liveness.peak(program, gathered=gathered),
        work=counting.work(program),
        traffic=0,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        images=config.eval.batch_size,
    )


class Leaf(NamedTuple):
    """A parameter's bytes on one device: fetched, whole along "fsdp"; held, its own shard.

    split: whether "fsdp" splits it.
    """

    fetched: float
    held: float
    split: bool


def _leaves(params: PyTree, layout: PyTree) -> tuple[Leaf, ...]:
    from diffjax.train.mesh import FSDP
    from diffjax.train.sharding import axes_of

    def leaf(shape: Any, sharding: Any) -> Leaf:
        held = dryrun.shard_bytes(shape, sharding)
        names = [n for entry in sharding.spec for n in axes_of(entry)]
        split = FSDP in names and sharding.mesh.shape[FSDP] > 1
        return Leaf(held * (sharding.mesh.shape[FSDP] if split else 1), held, split)

    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(layout), strict=True)
    return tuple(leaf(*pair) for pair in pairs)


def _split_axes(layout: PyTree) -> dict[int, int]:
    """The axis that "tensor" splits of parameters, by their positions in the tree."""
    from diffjax.train.mesh import TENSOR
    from diffjax.train.sharding import axes_of

    return {
        i: axis
        for i, sharding in enumerate(jax.tree.leaves(layout))
        for axis, entry in enumerate(sharding.spec)
        if TENSOR in axes_of(entry) and sharding.mesh.shape[TENSOR] > 1
    }


def collectives(
    leaves: Iterable[Leaf], axes: Axes, micro: int = 1, sums: Iterable[partition.Sum] = ()
) -> tuple[Collective, ...]:
    """(3), by kind and devices, of all micro-batches of a step."""
    data, fsdp, tensor = (axes[name] for name in ("data", "fsdp", "tensor"))
    leaves, sums = list(leaves), list(sums)
    split = [leaf for leaf in leaves if leaf.split]
    whole = [leaf for leaf in leaves if not leaf.split]
    fetched, held = sum(leaf.fetched for leaf in split), sum(leaf.held for leaf in split)
    rest = sum(leaf.held for leaf in whole)
    summed = sum(s.times * s.bytes for s in sums)

    def found(kind: str, devices: int, runs: int, size: float, stride: int) -> Collective:
        return Collective(kind, devices, micro * runs, int(micro * size), stride)

    made = (
        found("all-gather", fsdp, 2 * len(split), 2 * fetched, tensor),
        found("reduce-scatter", fsdp, len(split), fetched, tensor),
        found("all-reduce", data, len(split), held, fsdp * tensor),
        found("all-reduce", data * fsdp, len(whole), rest, tensor),
        found("all-reduce", tensor, sum(s.times for s in sums), summed, 1),
    )
    return tuple(c for c in made if c.devices > 1 and c.runs)


def fetches(
    leaves: Iterable[Leaf], axes: Axes, calls: int, sums: Iterable[partition.Sum] = ()
) -> tuple[Collective, ...]:
    """(5), by kind and devices, of a batch."""
    split, sums = [leaf.fetched for leaf in leaves if leaf.split], list(sums)
    fsdp, tensor = axes["fsdp"], axes["tensor"]
    size, often = sum(s.times * s.bytes for s in sums), sum(s.times for s in sums)
    made = (
        Collective("all-gather", fsdp, calls * len(split), int(calls * sum(split)), tensor),
        Collective("all-reduce", tensor, often, size),
    )
    return tuple(c for c in made if c.devices > 1 and c.runs)
