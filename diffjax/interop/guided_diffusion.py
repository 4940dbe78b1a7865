r"""Files of the guided-diffusion code: ADM as OpenAI publishes it.

    time_embed.0, .2; label_emb
    input_blocks.{n}    0: the first convolution; then one entry a block, or a block that halves
    middle_block.0 | .1 | .2
    output_blocks.{n}   one entry a block: .0 the block, .1 its attention, last the one that doubles
    out.0, out.2

A block is in_layers.0 (norm), in_layers.2, emb_layers.1, out_layers.0 (norm), out_layers.3 and
skip_connection. The rows of a fused q, k, v are in the order (head, q/k/v, channel), "legacy", in
all published files but the 64-pixel model, which has (q/k/v, head, channel), "new": the file does
not say which. All of them return twice the channels of x: eps, and the v of
`prediction.LearnedRange`; the network is asked at the levels 0 ... 999, `precondition.ddpm`.

Reference: https://github.com/openai/guided-diffusion (unet.py).
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from diffjax.core import checks
from diffjax.core.pytree import named
from diffjax.core.types import PyTree
from diffjax.interop import trunk
from diffjax.interop.assign import Part, Source, as_it_is, fill, sources
from diffjax.interop.edm import grouped, head_count

_BLOCK = {
    "norm0": "in_layers.0",
    "conv0": "in_layers.2",
    "affine": "emb_layers.1",
    "norm1": "out_layers.0",
    "conv1": "out_layers.3",
    "skip": "skip_connection",
}
_ORDERS = {"legacy": "h3c", "new": "3hc"}


def _places(steps: list[trunk.Step]) -> dict[str, str]:
    """Our name of each step, and its place there."""
    down, up, inside_up, places = 0, -1, 0, {}
    for step in steps:
        if step.role in ("down_block", "halve"):
            down += 1
            place = f"input_blocks.{down}.0"
        elif step.role == "down_attention":
            place = f"input_blocks.{down}.1"
        elif step.role.startswith("middle"):
            order = 1 if step.role == "middle_attention" else 2 * step.number
            place = f"middle_block.{order}"
        else:
            if step.role == "up_block":
                up, inside_up = up + 1, -1
            inside_up += 1
            place = f"output_blocks.{up}.{inside_up}"
        places[step.name] = place
    return places


def from_torch(
    net: Any,
    like: PyTree,
    height: int,
    tensors: Mapping[str, np.ndarray],
    *,
    order: Literal["legacy", "new"] = "legacy",
) -> PyTree:
    """The parameters of an `ADM`; raises WeightsError.

    net: the network; like: its parameters' shapes; height: of its images. tensors: of the file.
    order: of q, k, v; "new" for the 64-pixel model. `interop.check` tells a wrong one by its error.
    """
    checks.one_of("order", order, tuple(_ORDERS))
    parts = {
        "in_conv": Part("input_blocks.0.0"),
        "map_layer0": Part("time_embed.0"),
        "map_layer1": Part("time_embed.2"),
        "out_norm": Part("out.0"),
        "out_conv": Part("out.2"),
    }
    steps = trunk.adm(net, height)
    places = _places(steps)
    for step in steps:
        name, inside = places[step.name], dict[str, Any](_BLOCK)
        if step.role.endswith("attention"):
            level = len(net.ch_mult) - 1 if step.role.startswith("middle") else step.level
            qkv = grouped(f"{name}.qkv", head_count(net, level), _ORDERS[order])
            inside = {"norm": "norm", "qkv": qkv, "proj": "proj_out"}
        parts[step.name] = Part(name, inside)
    origin = sources(like, parts)
    if "map_label/kernel" in named(like):
        # A table of rows, one a class: already as ours.
        origin["map_label/kernel"] = Source("label_emb.weight", as_it_is)
    return fill(like, origin, tensors)
