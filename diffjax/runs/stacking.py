"""Weights of equal blocks in either layout, leaf by leaf: apart, or stacked for a loop over them.

    apart       block_0/X, block_1/X, ...      each (...)
    stacked     stack/X                        (depth, ...)

as in `diffjax.nets.dit`. A run may begin with weights of the other layout (`init_from`).
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from diffjax.core.types import Array
from diffjax.runs.workdir import RunError

Shapes = Mapping[str, tuple[int, ...]]

_STACKED = re.compile(r"stack/(.*)")
_APART = re.compile(r"block_(\d+)/(.*)")


def as_there(own: Mapping[str, Any], there: Shapes) -> dict[str, Any]:
    """Abstract leaves by name in the layout of a source, whose shapes are `there`."""
    if _any(_STACKED, own) and _any(_APART, there):
        return dict(pair for name, leaf in own.items() for pair in _apart(name, leaf))
    if _any(_APART, own) and _any(_STACKED, there):
        depths = {name: shape[:1] for name, shape in there.items()}
        return dict(_stacked(name, leaf, depths) for name, leaf in own.items())
    return dict(own)


def as_here(loaded: Mapping[str, Array], own: Mapping[str, Any]) -> dict[str, Array]:
    """What was read of the leaves of `as_there`, by the names in `own`.

    Raises RunError for a stack of which some blocks are missing.
    """
    found: dict[str, Array] = {}
    piles: dict[str, dict[int, Array]] = {}
    for name, leaf in loaded.items():
        stack, block = _STACKED.fullmatch(name), _APART.fullmatch(name)
        if name in own:
            found[name] = leaf
        elif stack:
            rows = ((f"block_{i}/{stack[1]}", leaf[i]) for i in range(len(leaf)))
            found |= {row: value for row, value in rows if row in own}
        elif block:
            piles.setdefault(f"stack/{block[2]}", {})[int(block[1])] = leaf
    for name, pile in piles.items():
        like = own[name]
        if len(pile) < _depth(like):
            raise RunError(
                f"{name} holds {_depth(like)} blocks and the source has {len(pile)} of them that "
                "fit. Set config.model.scan = False to begin with some of the blocks."
            )
        stack_up = jax.jit(lambda *rows: jnp.stack(rows), out_shardings=like.sharding)
        found[name] = stack_up(*(pile[i] for i in range(_depth(like))))
    return found


def _depth(leaf: Any) -> int:
    return int(leaf.shape[0])


def _any(pattern: re.Pattern[str], names: Any) -> bool:
    return any(pattern.fullmatch(name) for name in names)


def _apart(name: str, leaf: Any) -> list[tuple[str, Any]]:
    """A leaf as the rows that it has in the other layout; what is not stacked as it is."""
    stack = _STACKED.fullmatch(name)
    if not stack:
        return [(name, leaf)]
    layout = _with_spec(leaf.sharding, lambda spec: spec[1:])
    row = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=layout)
    return [(f"block_{i}/{stack[1]}", row) for i in range(_depth(leaf))]


def _stacked(name: str, leaf: Any, depths: Shapes) -> tuple[str, Any]:
    """A leaf of one block as the stack that it is a row of there."""
    block = _APART.fullmatch(name)
    stack = f"stack/{block[2]}" if block else name
    if not block or stack not in depths:
        return name, leaf
    shape = (*depths[stack], *leaf.shape)
    layout = _with_spec(leaf.sharding, lambda spec: (None, *spec))
    return stack, jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=layout)


def _with_spec(sharding: Any, change: Callable[[Any], Any]) -> Any:
    """A layout on the same mesh; one without a mesh as it is."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*change(tuple(sharding.spec))))
