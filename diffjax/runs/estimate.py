"""What one device of a mesh holds and does in a step, without compiling: the `model` of `plan`.

Symbols: D, F, T devices along "data", "fsdp" and "tensor"; B images of a batch in a micro-batches.
A parameter has b bytes, b' = b / t on the devices that split it over "tensor" in t.

Exact are the bytes of the state and of the batch, from their shapes and shardings. Modelled are

    work            the products of the gradient of B / (D F) images, over T                  (1)
    temporaries     the peak of `liveness` for B / (D F a) images, with whole gradients until   (2)
                    they are summed and whole weights while they are used, and the sum of
                    gradients where a > 1
    collectives     of a parameter that "fsdp" splits: an all-gather of b' to F devices on     (3)
                    the way forward and one on the way back, a reduce-scatter of b' among F,
                    an all-reduce of b' / F among D; of any other: an all-reduce of b' among
                    D F. All that for each micro-batch.
    traffic         beside the products': the state read and written, the gradient read       (4)

What "tensor" makes of activations, their sums and their share of (2), is left out: compile.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax

from diffjax import builders
from diffjax.core.types import PyTree
from diffjax.runs import counting, dryrun, liveness, roofline
from diffjax.runs.chips import Chip
from diffjax.runs.dryrun import Axes, What
from diffjax.runs.programs import Collective


class Estimate(NamedTuple):
    """Of one device and one step. state: exact bytes by name; batch: exact bytes.

    traffic: (4), in bytes. leaves: of the parameters that gradients are summed of, in micro
    micro-batches. collectives: (3). parameters: their number in all. images: of a batch.
    """

    state: dict[str, int]
    batch: int
    temporaries: float
    work: counting.Work
    traffic: float
    leaves: tuple["Leaf", ...]
    micro: int
    collectives: tuple[Collective, ...]
    parameters: int
    images: int

    @property
    def total(self) -> float:
        """Bytes in all."""
        return sum(self.state.values()) + self.batch + self.temporaries


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
    if dict(config.ema).get("offload", False):
        state["averages"] = 0  # they are in the host's memory
    gradient = dryrun.gradient(config, parts, local // micro)
    leaves = _leaves(shapes.params, layout.params)
    temporaries = liveness.peak(
        gradient,
        gathered={i: leaf.fetched for i, leaf in enumerate(leaves) if leaf.split},
        results={i: leaf.held for i, leaf in enumerate(leaves)},
    )
    if micro > 1:
        temporaries += sum(leaf.held for leaf in leaves)
    batch = counting.tree_bytes(dryrun.train_batch(config, parts, local))
    return Estimate(
        state=state,
        batch=batch * config.training.n_jitted_steps,
        temporaries=temporaries,
        work=counting.work(gradient, times=micro).share(mesh.shape[TENSOR]),
        traffic=2 * sum(state.values()) + state["parameters"],
        leaves=leaves,
        micro=micro,
        collectives=collectives(leaves, mesh.shape, micro),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(shapes.params)),
        images=images,
    )


def _sampling(config: Any, parts: builders.Parts, mesh: Any) -> Estimate:
    from diffjax.train.mesh import TENSOR, batch_slices

    shapes = dryrun.sample_arguments(config, parts, config.eval.batch_size // batch_slices(mesh))
    program = dryrun.sampler(config, parts, config.eval.batch_size // batch_slices(mesh))
    return Estimate(
        state={"parameters": counting.tree_bytes(shapes[0])},
        batch=counting.tree_bytes(shapes[1:]),
        temporaries=liveness.peak(program),
        work=counting.work(program).share(mesh.shape[TENSOR]),
        traffic=0,
        leaves=(),
        micro=1,
        collectives=(),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(shapes[0])),
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


def collectives(leaves: Iterable[Leaf], axes: Axes, micro: int = 1) -> tuple[Collective, ...]:
    """(3), by kind and devices, of all micro-batches of a step."""
    data, fsdp = axes["data"], axes["fsdp"]
    leaves = list(leaves)
    split = [leaf for leaf in leaves if leaf.split]
    whole = [leaf for leaf in leaves if not leaf.split]
    fetched, held = sum(leaf.fetched for leaf in split), sum(leaf.held for leaf in split)
    found = [
        Collective("all-gather", fsdp, 2 * micro * len(split), int(2 * micro * fetched)),
        Collective("reduce-scatter", fsdp, micro * len(split), int(micro * fetched)),
        Collective("all-reduce", data, micro * len(split), int(micro * held)),
        Collective(
            "all-reduce", data * fsdp, micro * len(whole), int(micro * sum(f.held for f in whole))
        ),
    ]
    return tuple(c for c in found if c.devices > 1 and c.runs)


def link_seconds(chip: Chip, found: Iterable[Collective], axes: Axes) -> float:
    """The time of collectives whose devices lie on the chips in the order of the axes."""
    data, fsdp, tensor = (axes[name] for name in ("data", "fsdp", "tensor"))

    def stride(c: Collective) -> int:
        if c.devices == tensor > 1 and c.devices != fsdp:
            return 1
        along_data = c.kind == "all-reduce" and c.devices == data
        return fsdp * tensor if along_data else tensor

    return sum(roofline.seconds(chip, c, stride(c)) for c in found)


def collectives_at(found: Estimate, axes: Axes) -> tuple[Collective, ...]:
    """(3) on a mesh with another number of devices along "data"."""
    return collectives(found.leaves, axes, found.micro)
