"""Our own weights as one safetensors file: each leaf under its name, `block/conv/kernel`, as it is.

For handing weights on without a workdir, its optimizer and its config.
"""

import os

import jax
import numpy as np

from diffjax.core.pytree import named
from diffjax.core.tensorfile import read_safetensors, write_safetensors
from diffjax.core.types import PyTree
from diffjax.interop.assign import Source, as_it_is, fill


def write(path: str | os.PathLike[str], params: PyTree) -> None:
    """Writes a tree of parameters, in one step. Raises OSError where the system refuses."""
    leaves = named(jax.tree.map(np.asarray, params))
    write_safetensors(path, leaves, {"format": "diffjax"})


def read(path: str | os.PathLike[str], like: PyTree) -> PyTree:
    """The parameters of such a file. like: their shapes. Raises WeightsError where they differ."""
    return fill(
        like, {name: Source(name, as_it_is) for name in named(like)}, read_safetensors(path)
    )
