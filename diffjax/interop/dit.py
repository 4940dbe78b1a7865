r"""Files of the DiT and SiT codes.

Their names differ from ours in little. The patches' convolution (D, C, p, p) becomes our linear map
of flattened patches (p p C, D), rows in the order (row, column, channel); the places (1, T, D) lose
their first axis; the map (3 D, D) to q, k and v becomes (D, 3, D). A training checkpoint holds
`ema`, which is taken; a published file is a bare state_dict.

The two codes' files look alike and mean different things: DiT's network is asked at the levels
0 ... 999 and says (eps, v), `precondition.ddpm` with `prediction.LearnedRange`; SiT's is asked at
t' in [0, 1] with the noise at 0 and says the velocity from noise to data, `precondition.sit`.

Reference: https://github.com/facebookresearch/DiT (models.py), https://github.com/willisma/SiT.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from diffjax.core.pytree import named
from diffjax.core.types import PyTree
from diffjax.interop.assign import Part, Source, WeightsError, convolution, fill, linear, sources
from diffjax.nets.dit import STACK, stacked, unstacked

_BLOCK = {
    "adaLN": "adaLN_modulation.1",
    "proj": "attn.proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}


def _patches(tensor: np.ndarray) -> np.ndarray:
    kernel = convolution(tensor)
    return kernel.reshape(-1, kernel.shape[-1])


def _packed(name: str) -> Callable[[str], Source]:
    """The source of the leaves of qkv: (3 D, D) -> (D, 3, D), the bias (3 D,) -> (3, D)."""

    def read(tensor: np.ndarray) -> np.ndarray:
        rows = tensor if tensor.ndim == 1 else linear(tensor)
        return rows.reshape(*rows.shape[:-1], 3, -1)

    return lambda last: Source(f"{name}.{'weight' if last == 'kernel' else 'bias'}", read)


def _places(tensor: np.ndarray) -> np.ndarray:
    if tensor.ndim != 3 or len(tensor) != 1:
        raise WeightsError(f"shape {tensor.shape} is no table of places")
    return tensor[0]


def from_torch(net: Any, like: PyTree, tensors: Mapping[str, np.ndarray]) -> PyTree:
    """The parameters of a `DiT`, averaged where the file has averages; raises WeightsError.

    net: the network; like: its parameters' shapes. tensors: of the file, flat.
    """
    averages = {n.removeprefix("ema."): t for n, t in tensors.items() if n.startswith("ema.")}
    tensors = averages or tensors
    if STACK in like:
        return stacked(from_torch(net, jax.eval_shape(unstacked, like), tensors))
    parts = {
        "t_embedder_0": Part("t_embedder.mlp.0"),
        "t_embedder_1": Part("t_embedder.mlp.2"),
        "y_embedder": Part("y_embedder.embedding_table"),
        "x_embedder": Part("x_embedder.proj"),
        "final_adaLN": Part("final_layer.adaLN_modulation.1"),
        "final_linear": Part("final_layer.linear"),
    }
    for i in range(net.depth):
        qkv = {"qkv": _packed(f"blocks.{i}.attn.qkv")}
        parts[f"block_{i}"] = Part(f"blocks.{i}", {**_BLOCK, **qkv})
    origin = sources(like, parts)
    origin["x_embedder/kernel"] = Source("x_embedder.proj.weight", _patches)
    if "pos_embed" in named(like):
        origin["pos_embed"] = Source("pos_embed", _places)
    return fill(like, origin, tensors)
