"""Frozen dataclasses that are pytrees.

A class decorated with `@pytree` is a frozen dataclass that JAX can map over, trace, differentiate
and shard. Its fields are children (numbers, arrays, other pytrees) unless they are declared with
`static`, which puts them in the tree's structure: integers that set a shape, names of a mode,
callables.

    @pytree
    class Langevin:
        snr: float = 0.16                 # a leaf: a new value never recompiles
        n_steps: int = static(default=1)          # structure: a new value is a new program

Why not `jax.tree_util.register_dataclass` or `flax.struct`: both run `__post_init__` each time a
tree is put together again, when the leaves may be tracers, shapes or placeholders. Here a check in
`__post_init__` runs where a person writes the constructor, and nowhere else.
"""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax

T = TypeVar("T")

_STATIC = "diffjax_static"


def static(*, default: Any = dataclasses.MISSING) -> Any:
    """Declares a field as part of the tree's structure. It must be hashable."""
    return dataclasses.field(default=default, metadata={_STATIC: True})


@dataclass_transform(frozen_default=True, field_specifiers=(static, dataclasses.field))
def pytree(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen dataclass and registers it with JAX; see the module's docstring."""
    cls = dataclasses.dataclass(frozen=True, eq=True, repr=True)(cls)
    # Equality of arrays is not a bool, so a generated hash would fail late: trees compare by
    # structure in JAX and by identity elsewhere.
    cls.__hash__ = object.__hash__  # type: ignore[method-assign]
    cls.__eq__ = object.__eq__  # type: ignore[method-assign]
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    leaves = tuple(f.name for f in fields if not f.metadata.get(_STATIC))
    statics = tuple(f.name for f in fields if f.metadata.get(_STATIC))

    def flatten_with_keys(self):
        children = [(jax.tree_util.GetAttrKey(n), getattr(self, n)) for n in leaves]
        return children, tuple(getattr(self, n) for n in statics)

    def flatten(self):
        return [getattr(self, n) for n in leaves], tuple(getattr(self, n) for n in statics)

    def unflatten(aux, children):
        self = object.__new__(cls)
        for name, value in zip(leaves, children, strict=True):
            object.__setattr__(self, name, value)
        for name, value in zip(statics, aux, strict=True):
            object.__setattr__(self, name, value)
        return self

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def replace(tree: T, **changes: Any) -> T:
    """A copy of a `@pytree` value with some fields changed; the checks run again."""
    return dataclasses.replace(tree, **changes)  # type: ignore[type-var]


def taken(value: Any, index: Any) -> Any:
    """A value for the samples `index`, (k,): its `take` where it holds something for each."""
    return value.take(index) if hasattr(value, "take") else value


def leaf_name(path: Any) -> str:
    """The keys on the way to a leaf, `block/conv/kernel`. path: as JAX gives it."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by `leaf_name`, in the order of the tree."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


__all__ = ["leaf_name", "named", "pytree", "replace", "static", "taken"]
