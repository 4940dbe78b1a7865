r"""Where each number of a training state lies on the mesh.

Symbols: F and T devices along the axes "fsdp" and "tensor" of `mesh`; a parameter is named by the
keys on the way to it, "block_0/fc1/kernel".

The layout of a parameter, in this order:

    (1)  the axes that the first matching rule gives it, a pattern for its name and a
         `PartitionSpec`: the user's rules first, then those of this file;
    (2)  "fsdp" on the largest of its other axes that F divides, where it has `min_size` elements.

Below the key "stack" a parameter is that of all layers of a loop, one after another: (depth, ...).
(1) and (2) then speak of one layer, and the first axis stays whole, so that each pass of the loop
finds its slice of every device's part.

So a network that no rule knows is split by (2) alone, and what is small or divides by nothing is
held by every device. A rule of this file that does not divide an axis leaves it whole; one of the
user that does not, or that matches nothing, raises.

Everything else in the state follows its parameter: a leaf whose path ends in the name of a
parameter and which has its shape (the optimizer's moments, each average) lies as that one does. The
rest is laid out by (2), so that scalars and keys are on every device.

The rules of this file split pairs of linear maps with something elementwise in between, the first
by its outputs and the second by its inputs: y = f(x A) B = sum_k f(x A_k) B_k, one sum over the
devices a pair (Shoeybi et al.). f may act on groups of channels or on heads of attention where
these lie whole on one device; else the compiler moves data, and the result is the same. It moves
some for a "qkv" (D, 3 D), whose outputs are q, k and v before they are heads, none for (D, 3, D).

References: Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter
models", 2020, https://arxiv.org/abs/1910.02054. Shoeybi et al., "Megatron-LM: training
multi-billion parameter language models using model parallelism", 2019,
https://arxiv.org/abs/1909.08053.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffjax.core.pytree import leaf_name, named
from diffjax.core.types import PyTree
from diffjax.train.mesh import FSDP, TENSOR
from diffjax.train.state import TrainState

Rule = tuple[str, PartitionSpec]
Shape = tuple[int, ...]
Spec = tuple[Any, ...]  # one entry an axis, as in a PartitionSpec
Loss = Callable[..., Any]
Layer = Callable[..., Any]  # (weights, arrays ...) -> arrays

MIN_SIZE = 2**14  # elements; below, fetching a parameter costs more than keeping it

# Operations, by JAX's names, that give a parameter back: fetched, or in another type.
_VIEWS = frozenset({"sharding_constraint", "reshard", "convert_element_type", "transpose", "copy"})
_P = PartitionSpec
_STACKED = re.compile(r"(^|/)stack/")
_RESIDUAL = r"(^|/)ResnetBlock(DDPM|BigGAN)pp_\d+/"

TENSOR_RULES: tuple[Rule, ...] = (
    # Transformer blocks: the perceptron, and attention by heads.
    (r"(^|/)qkv/kernel$", _P(None, None, TENSOR)),
    (r"(^|/)qkv/bias$", _P(None, TENSOR)),
    (r"(^|/)(qkv|fc1)/kernel$", _P(None, TENSOR)),
    (r"(^|/)(qkv|fc1)/bias$", _P(TENSOR)),
    (r"(^|/)(proj|fc2)/kernel$", _P(TENSOR, None)),
    # Residual blocks: channels between the two convolutions, with their shift and normalisation.
    (_RESIDUAL + "Conv_0/kernel$", _P(None, None, None, TENSOR)),
    (_RESIDUAL + "Dense_0/kernel$", _P(None, TENSOR)),
    (_RESIDUAL + "(Conv_0/bias|Dense_0/bias|GroupNorm_1/scale|GroupNorm_1/bias)$", _P(TENSOR)),
    (_RESIDUAL + "Conv_1/kernel$", _P(None, None, TENSOR, None)),
)


def state_sharding(
    mesh: Mesh, state: TrainState, *, rules: Sequence[Rule] = (), min_size: int = MIN_SIZE
) -> PyTree:
    """A `NamedSharding` for each leaf of a state, as a tree like it.

    state: arrays, or what `jax.eval_shape` returns. rules: the user's; a pattern is searched for in
    the names of parameters. min_size: elements from which on a parameter is split over "fsdp".
    Raises ValueError for a rule that matches no parameter or does not fit one that it matches.
    """
    leaves = {name: leaf.shape for name, leaf in named(state.params).items()}
    for pattern, _ in rules:
        if not any(re.search(pattern, name) for name in leaves):
            raise ValueError(
                f"The rule {pattern!r} matches no parameter; names look like "
                f"{', '.join(list(leaves)[:3])}."
            )
    specs = {name: _spec(mesh, name, shape, rules, min_size) for name, shape in leaves.items()}

    def place(path: Any, leaf: Any) -> NamedSharding:
        # The longest name that the path ends in, so that "a/w" is not taken for "w".
        owner = next((n for n in _endings(leaf_name(path)) if leaves.get(n) == leaf.shape), None)
        spec = _split(leaf.shape, (), mesh.shape[FSDP], min_size) if owner is None else specs[owner]
        while spec and spec[-1] is None:
            spec = spec[:-1]
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(place, state)


def fetched(loss_fn: Loss, sharding: PyTree) -> Loss:
    """`loss_fn(params, ...)` of parameters that lie as `sharding` says, each fetched for its use.

    sharding: a tree of `NamedSharding` like params. Within the loss a parameter is whole along
    "fsdp". It is fetched for the forward pass, let go, and fetched again for the backward pass, and
    its gradient lies as it does: the weights travel and never the activations, and an optimizer's
    update needs its own slice only. A stack of layers is left to the loop over it, see
    `around_layer`. Without "fsdp" in any of them the loss is returned as it is.
    """
    if not _is_split(sharding):
        return loss_fn
    whole = jax.tree_util.tree_map_with_path(
        lambda path, s: s if _STACKED.search(leaf_name(path)) else _without_fsdp(s), sharding
    )

    def fetching(params: PyTree, *args: Any) -> Any:
        return loss_fn(_fetch(params, sharding, whole), *args)

    def call(params: PyTree, *args: Any) -> Any:
        shapes = {leaf.shape for leaf in jax.tree.leaves(params)}

        def kept(operation: Any, *inputs: Any, **_: Any) -> bool:
            # Everything but whole parameters, and what is one in another type.
            return operation.name not in _VIEWS or inputs[0].shape not in shapes

        return jax.checkpoint(fetching, policy=kept)(params, *args)

    return call


def around_layer(sharding: PyTree) -> Callable[[Layer], Layer] | None:
    """What makes of one layer in a loop a layer that fetches its weights inside of the loop.

    sharding: a tree of `NamedSharding` like all the parameters. A layer is a function of the
    weights below the key "stack", without the first axis, and of arrays. Its backward pass keeps
    products with weights and makes the rest again, and there is reverse mode only. None where there
    is no stack, or "fsdp" splits none of it.
    """
    stack = sharding.get("stack") if isinstance(sharding, Mapping) else None
    if stack is None or not _is_split(stack):
        return None
    split = jax.tree.map(lambda s: NamedSharding(s.mesh, PartitionSpec(*s.spec[1:])), stack)
    return functools.partial(_fetched_layer, split=split)


def _fetched_layer(layer: Layer, split: PyTree) -> Layer:
    whole = jax.tree.map(_without_fsdp, split)
    products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable

    def fetching(weights: PyTree, *args: Any) -> Any:
        return layer(_fetch(weights, split, whole), *args)

    def forward(weights: PyTree, *args: Any) -> Any:
        # The two passes are loops of their own: there is nothing that the compiler could merge.
        again = jax.checkpoint(fetching, policy=products, prevent_cse=False)
        return jax.vjp(again, weights, *args)

    # By a rule of its own, as `fetched` around the loop would gather all layers in a loop before
    # the backward one.
    call = jax.custom_vjp(fetching)
    call.defvjp(forward, lambda pull, cotangent: pull(cotangent))
    return call


def _fetch(params: PyTree, split: PyTree, whole: PyTree) -> PyTree:
    """Parameters that lie as `split` laid out as `whole`, their gradients as `split` again."""
    params = jax.lax.with_sharding_constraint(params, split)
    return jax.lax.with_sharding_constraint(params, whole)


def _is_split(sharding: PyTree) -> bool:
    """Whether "fsdp" splits any of these."""
    return any(FSDP in axes_of(entry) for s in jax.tree.leaves(sharding) for entry in s.spec)


def _spec(mesh: Mesh, name: str, shape: Shape, rules: Sequence[Rule], min_size: int) -> Spec:
    """The layout of a parameter, one entry an axis."""
    if _STACKED.search(name):
        return (None, *_layer_spec(mesh, name, shape[1:], rules, min_size))
    return _layer_spec(mesh, name, shape, rules, min_size)


def _layer_spec(mesh: Mesh, name: str, shape: Shape, rules: Sequence[Rule], min_size: int) -> Spec:
    return _split(shape, _by_rule(mesh, name, shape, rules), mesh.shape[FSDP], min_size)


def _by_rule(mesh: Mesh, name: str, shape: Shape, rules: Sequence[Rule]) -> Spec:
    """The axes that the first matching rule gives, one entry an axis; () without a rule."""
    for pattern, spec in rules:
        if re.search(pattern, name):
            _check_fits(mesh, name, shape, pattern, spec)
            return tuple(spec)
    for pattern, spec in TENSOR_RULES:
        if re.search(pattern, name) and len(spec) <= len(shape):
            sizes = zip(spec, shape, strict=False)
            return tuple(axis if n % _devices(mesh, axis) == 0 else None for axis, n in sizes)
    return ()


def _split(shape: Shape, spec: Spec, fsdp: int, min_size: int) -> Spec:
    """`spec` with "fsdp" on the largest free axis that it divides, where the leaf is large."""
    spec = (*spec, *[None] * (len(shape) - len(spec)))
    taken = any(FSDP in axes_of(entry) for entry in spec)
    if fsdp == 1 or taken or math.prod(shape) < min_size:
        return spec
    free = [i for i, n in enumerate(shape) if spec[i] is None and n % fsdp == 0 and n]
    if not free:
        return spec
    widest = max(free, key=lambda i: shape[i])
    return (*spec[:widest], FSDP, *spec[widest + 1 :])


def _check_fits(mesh: Mesh, name: str, shape: Shape, pattern: str, spec: PartitionSpec) -> None:
    """Raises ValueError for a rule with other axes than the mesh's or that do not divide."""
    rule = f"The rule {pattern!r}, {spec}, does not fit {name} of shape {shape}"
    unknown = [axis for entry in spec for axis in axes_of(entry) if axis not in mesh.shape]
    if unknown:
        raise ValueError(f"{rule}: the mesh has the axes {', '.join(mesh.shape)}; got {unknown}.")
    if len(spec) > len(shape):
        raise ValueError(f"{rule}: it has {len(spec)} axes; give at most {len(shape)}.")
    for size, entry in zip(shape, spec, strict=False):
        if size % _devices(mesh, entry):
            raise ValueError(
                f"{rule}: {_devices(mesh, entry)} devices along {entry} do not divide {size}. "
                "Leave that axis None."
            )


def axes_of(entry: Any) -> tuple[str, ...]:
    """The mesh's axes of one entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _devices(mesh: Mesh, entry: Any) -> int:
    return math.prod(mesh.shape[axis] for axis in axes_of(entry))


def _without_fsdp(sharding: NamedSharding) -> NamedSharding:
    spec = (tuple(a for a in axes_of(entry) if a != FSDP) or None for entry in sharding.spec)
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _endings(name: str) -> Iterator[str]:
    """The name, without its first key, without its first two, ..., and ""."""
    keys = name.split("/")
    return ("/".join(keys[i:]) for i in range(len(keys) + 1))
