"""What a checkpoint says it is: its schema, where it stands, and the names and shapes it holds."""

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from diffjax.core.pytree import named
from diffjax.core.types import PyTree
from diffjax.version import __version__

# Of the layout in `diffjax.train.checkpoint`; a change that old readers cannot read adds one.
SCHEMA = 2

Shapes = dict[str, tuple[int, ...]]


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of something else; the message is for people."""


class Meta(NamedTuple):
    """What a checkpoint says about itself; all plain JSON values."""

    step: int
    position: dict[str, Any]
    config: dict[str, Any]
    versions: dict[str, str]
    figures: dict[str, float]
    schema: int


def describe(
    step: int,
    position: Mapping[str, Any],
    config: Mapping[str, Any],
    figures: Mapping[str, float],
) -> dict[str, Any]:
    """What is written, which `parse` reads."""
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")
    versions = {"diffjax": __version__} | {p: importlib.metadata.version(p) for p in packages}
    return {
        "schema": SCHEMA,
        "step": step,
        "position": dict(position),
        "config": dict(config),
        "versions": versions,
        "figures": dict(figures),
    }


def parse(raw: Mapping[str, Any], path: Path) -> Meta:
    """Raises CheckpointError for a schema from the future."""
    schema = raw["schema"]
    if schema not in range(1, SCHEMA + 1):
        raise CheckpointError(
            f"{path} has schema {schema} and this diffjax {__version__} reads 1 to {SCHEMA}; it "
            f"was written by diffjax {raw['versions']['diffjax']}, use that."
        )
    fields = (raw["step"], raw["position"], raw["config"], raw["versions"])
    return Meta(*fields, raw.get("figures", {}), schema)


def shapes(tree: PyTree) -> Shapes:
    """Shapes by name. Keys are left out: they are stored as the numbers that they are made of."""
    return {name: tuple(leaf.shape) for name, leaf in named(tree).items() if name != "key"}


def check_same(stored: Shapes, wanted: Shapes, path: Path, item: str) -> None:
    """Raises CheckpointError where the stored leaves have other names or shapes than are wanted."""
    for name in sorted(stored.keys() | wanted.keys()):
        if stored.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{path} is of another model or optimizer: {item}/{name} has shape "
                f"{stored.get(name, 'none')} there and {wanted.get(name, 'none')} here. Use the "
                "config that it was trained with."
            )
