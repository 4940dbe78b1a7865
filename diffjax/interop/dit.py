r"""Files of the DiT and SiT codes.

Their names differ from ours in little. The patches' convolution (D, C, p, p) becomes our linear map
of flattened patches (p p C, D), rows in the order (row, column, channel); the places (1, T, D) lose
their first axis. A training checkpoint holds `ema`, which is taken; a published file is a bare
state_dict.

The two codes' files look alike and mean different things: DiT's network is asked at the levels
0 ... 999 and says (eps, v), `precondition.ddpm` with `prediction.LearnedRange`; SiT's is asked at
t' in [0, 1] with the noise at 0 and says the velocity from noise to data, `precondition.sit`.

Reference: https://github.com/facebookresearch/DiT (models.py), https://github.com/willisma/SiT.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffjax.core.pytree import named
from diffjax.core.types import PyTree
from diffjax.interop.assign import Part, Source, WeightsError, convolution, fill, sources

_BLOCK = {
    "adaLN": "adaLN_modulation.1",
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}


def _patches(tensor: np.ndarray) -> np.ndarray:
    kernel = convolution(tensor)
    return kernel.reshape(-1, kernel.shape[-1])


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
    parts = {
        "t_embedder_0": Part("t_embedder.mlp.0"),
        "t_embedder_1": Part("t_embedder.mlp.2"),
        "y_embedder": Part("y_embedder.embedding_table"),
        "x_embedder": Part("x_embedder.proj"),
        "final_adaLN": Part("final_layer.adaLN_modulation.1"),
        "final_linear": Part("final_layer.linear"),
    }
    parts |= {f"block_{i}": Part(f"blocks.{i}", _BLOCK) for i in range(net.depth)}
    origin = sources(like, parts)
    origin["x_embedder/kernel"] = Source("x_embedder.proj.weight", _patches)
    if "pos_embed" in named(like):
        origin["pos_embed"] = Source("pos_embed", _places)
    return fill(like, origin, tensors)
