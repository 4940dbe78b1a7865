"""Whole samplers as one file that runs without this package: StableHLO by `jax.export`.

Symbols: b the batch size, left open in the program; seed i the seed of sample i.

    program(weights, seeds (b,) uint32, inputs (b, ...)...) -> samples (b, ...)

keys_i = jax.random.key(seed_i), so sample i depends on its own seed alone: not on b, nor on its
neighbours, and is the one that `diffjax sample --seeds=` draws. Grid, solver and process are
constants of the program. The weights are an argument: the program's size does not depend on them,
and they may exceed the 2 GiB that a program with constants could hold.

The file is an .npz archive of `program` and `weight_0`, `weight_1`, ... To draw with it takes JAX
(and flatbuffers) and NumPy:

    import jax, numpy as np
    from jax import export

    with np.load("sampler.npz") as saved:
        program = export.deserialize(bytearray(saved["program"].tobytes()))
        weights = [saved[f"weight_{i}"] for i in range(len(saved.files) - 1)]
    draw = jax.jit(program.call)
    images = draw(jax.device_put(weights), np.arange(16, dtype=np.uint32))

A program serves JAX versions as `jax.export` promises: those of the next six months, and older ones
of the last three weeks. It runs on the platforms that it was exported for.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.experimental import checkify

from diffjax.core import checks
from diffjax.core.files import write_atomic
from diffjax.core.types import Array, Key, PyTree

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
NO_FLATBUFFERS = "An exported program is written by flatbuffers; pip install 'diffjax[export]'."


def export_sampler(
    draw: Callable[..., PyTree],
    weights: PyTree,
    *inputs: jax.ShapeDtypeStruct,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> export.Exported:
    """The program of a sampler, for any batch size.

    draw: (weights, keys (b,), *inputs) -> samples, a tree of arrays with the leading axis b.
    weights: a tree of arrays. inputs: what else there is one of a sample, such as a class: shape
    and dtype without the batch's axis. platforms: among `PLATFORMS`.

    Half-precision weights are float32 in the program's signature, since NumPy's files know none.
    Raises ValueError for an unknown platform; what fails for a batch of unknown size raises as JAX
    has it.
    """
    for platform in platforms:
        checks.one_of("platforms", platform, PLATFORMS)
    leaves, treedef = jax.tree.flatten(weights)
    dtypes = [jnp.result_type(leaf) for leaf in leaves]

    def program(stored: list[Array], seeds: Array, *given: Array) -> PyTree:
        own = [leaf.astype(dtype) for leaf, dtype in zip(stored, dtypes, strict=True)]
        keys: Key = jax.vmap(jax.random.key)(seeds)
        return draw(jax.tree.unflatten(treedef, own), keys, *given)

    (b,) = export.symbolic_shape("b")
    shapes = [jax.ShapeDtypeStruct(np.shape(leaf), _stored(leaf)) for leaf in leaves]
    batched = [jax.ShapeDtypeStruct((b, *spec.shape), spec.dtype) for spec in inputs]
    seeds = jax.ShapeDtypeStruct((b,), jnp.uint32)
    return export.export(jax.jit(_unchecked(program)), platforms=tuple(platforms))(
        shapes, seeds, *batched
    )


def write_sampler(path: str | Path, exported: export.Exported, weights: PyTree) -> int:
    """Writes the file of a sampler and returns the program's own size in bytes.

    Raises ModuleNotFoundError, naming the pip command, without flatbuffers.
    """
    require_flatbuffers()
    program = exported.serialize()
    arrays: dict[str, Any] = {"program": np.frombuffer(program, np.uint8)}
    for i, leaf in enumerate(jax.tree.leaves(weights)):
        arrays[f"weight_{i}"] = np.asarray(leaf, _stored(leaf))
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomic(Path(path), buffer.getvalue())
    return len(program)


def require_flatbuffers() -> None:
    """Raises ModuleNotFoundError, naming the pip command, where flatbuffers is missing."""
    try:
        import flatbuffers  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(NO_FLATBUFFERS, name="flatbuffers") from error


def _unchecked(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """The function without the debug checks that `sample` leaves, which no file can hold."""
    functional = checkify.checkify(function, errors=frozenset())
    return lambda *arguments: functional(*arguments)[1]


def _stored(leaf: Any) -> Any:
    """A leaf's dtype in the file."""
    dtype = jnp.result_type(leaf)
    half = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    return jnp.dtype(jnp.float32) if half else dtype
