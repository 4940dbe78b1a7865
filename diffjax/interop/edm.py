r"""Pickled networks of EDM: SongUNet and DhariwalUNet, with what their preconditioning says.

A file holds `ema`, a preconditioning (EDMPrecond, VPPrecond, VEPrecond, iDDPMPrecond) around the
network `model`. The network's modules are named by the size of the image that they see:

    enc.{r}x{r}_conv | _block{i} | _down | _aux_skip | _aux_residual
    dec.{r}x{r}_in0 | _in1 | _block{i} | _up | _aux_norm | _aux_conv

A block and the attention after it are one module there. Its fused q, k, v has rows in the order
(head, channel, q/k/v): SongUNet's single head becomes our three maps, ADM's rows are put in the
order (q/k/v, head, channel).

Reference: https://github.com/NVlabs/edm (training/networks.py).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffjax.core.pytree import named
from diffjax.core.tensorfile import Record, TensorFileError, flatten
from diffjax.core.types import PyTree
from diffjax.interop import trunk
from diffjax.interop.assign import (
    Part,
    Source,
    WeightsError,
    as_it_is,
    fill,
    linear,
    sources,
)
from diffjax.nets.adm import ADM
from diffjax.nets.songunet import SongUNet

_BLOCK = {
    "GroupNorm_0": "norm0",
    "Conv_0": "conv0",
    "Dense_0": "affine",
    "GroupNorm_1": "norm1",
    "Conv_1": "conv1",
    "Conv_2": "skip",
}


def network(tree: Any) -> Record:
    """The preconditioned network of a file's object: `ema`, or the object itself."""
    found = tree.get("ema") if isinstance(tree, Mapping) else tree
    if not isinstance(found, Record):
        held = ", ".join(map(str, tree)) if isinstance(tree, Mapping) else type(tree).__name__
        raise TensorFileError(f"There is no network `ema` of EDM in this file, which holds {held}.")
    return found


def tensors(record: Record) -> dict[str, np.ndarray]:
    """The network's tensors under the names of its state_dict, without `model.`."""
    found = flatten(record)
    inner = {n.removeprefix("model."): t for n, t in found.items() if n.startswith("model.")}
    return inner or found


def _split(name: str, part: int) -> Any:
    """Row `part` (0 q, 1 k, 2 v) of a fused map with one head: rows (channel, q/k/v)."""

    def source(last: str) -> Source:
        def read(tensor: np.ndarray) -> np.ndarray:
            rows = tensor.reshape(-1, 3, *tensor.shape[1:])[:, part]
            return linear(rows) if last == "W" else rows

        return Source(f"{name}.{'weight' if last == 'W' else 'bias'}", read)

    return source


def grouped(name: str, heads: int, order: str) -> Any:
    """A fused map with its rows brought to the order (q/k/v, head, channel).

    order: theirs, of the letters h (head), c (channel) and 3.
    """

    def source(last: str) -> Source:
        def read(tensor: np.ndarray) -> np.ndarray:
            if len(tensor) % (3 * heads):
                raise WeightsError(f"{len(tensor)} rows are not q, k and v of {heads} heads")
            sizes = {"h": heads, "c": len(tensor) // 3 // heads, "3": 3}
            rows = tensor.reshape(*(sizes[k] for k in order), *tensor.shape[1:])
            rows = np.moveaxis(rows, [order.index(k) for k in "3hc"], [0, 1, 2])
            rows = rows.reshape(tensor.shape)
            return linear(rows) if last == "kernel" else rows

        return Source(f"{name}.{'weight' if last == 'kernel' else 'bias'}", read)

    return source


def _place(step: trunk.Step, height: int, levels: int) -> str:
    """The module there that a step of the trunk is, or is in."""
    level = step.level + {"halve": 1, "join": 1, "double": -1}.get(step.role, 0)
    if step.role.startswith("middle"):
        level = levels - 1
    size = f"{height >> level}x{height >> level}"
    attention = {"middle_attention": "dec.{}_in0"}
    endings = {
        "in": "enc.{}_conv",
        "down_block": "enc.{}_block" + str(step.number),
        "down_attention": "enc.{}_block" + str(step.number),
        "halve": "enc.{}_down",
        "middle_block": "dec.{}_in" + str(step.number),
        "up_block": "dec.{}_block" + str(step.number),
        "up_attention": "dec.{}_block" + str(step.number),
        "double": "dec.{}_up",
        "head_norm": "dec.{}_aux_norm",
        "head_conv": "dec.{}_aux_conv",
        "out_norm": "dec.{}_aux_norm",
        "out_conv": "dec.{}_aux_conv",
    }
    return (attention | endings)[step.role].format(size)


def _song_parts(net: Any, height: int) -> dict[str, Part]:
    """Our parts of a SongUNet and what they are there."""
    parts = {name: Part(name) for name in ("map_label", "map_augment", "map_layer0", "map_layer1")}
    join = {"residual": "aux_residual", "input_skip": "aux_skip"}
    for step in trunk.song(net, height):
        if step.role == "join":
            size = height >> (step.level + 1)
            name = f"enc.{size}x{size}_{join[net.progressive_input]}"
            parts[f"unet/{step.name}"] = Part(name, {"Conv2d_0": "", "Conv_0": ""})
            continue
        name = _place(step, height, len(net.ch_mult))
        inside: dict[str, Any] = {}
        if step.role.endswith("attention"):
            inside = {"GroupNorm_0": "norm2", "NIN_3": "proj"}
            inside |= {f"NIN_{i}": _split(f"{name}.qkv", i) for i in range(3)}
        elif step.name.startswith("Resnet"):
            inside = _BLOCK
        parts[f"unet/{step.name}"] = Part(name, inside)
    return parts


def from_song(net: Any, like: PyTree, height: int, found: Mapping[str, np.ndarray]) -> PyTree:
    """The parameters of a `SongUNet`; raises WeightsError.

    net: the network; like: its parameters' shapes; height: of its images. found: `tensors` of the
    file.
    """
    origin = sources(like, _song_parts(net, height))
    for path in named(like):
        if path.endswith("GaussianFourierProjection_0/W"):
            origin[path] = Source("map_noise.freqs", as_it_is)
    filters = [name for name in found if name.endswith(".resample_filter")]
    return fill(like, origin, found, unused=filters)


def _adm_parts(net: Any, height: int) -> dict[str, Part]:
    own = ("map_label", "map_augment", "map_layer0", "map_layer1", "out_norm", "out_conv")
    parts = {name: Part(name) for name in own}
    parts["in_conv"] = Part(f"enc.{height}x{height}_conv")
    for step in trunk.adm(net, height):
        name, inside = _place(step, height, len(net.ch_mult)), {}
        if step.role.endswith("attention"):
            level = len(net.ch_mult) - 1 if step.role.startswith("middle") else step.level
            heads = head_count(net, level)
            inside = {"norm": "norm2", "qkv": grouped(f"{name}.qkv", heads, "hc3")}
        parts[step.name] = Part(name, inside)
    return parts


def head_count(net: Any, level: int) -> int:
    """Heads of the attentions of an `ADM` at this level."""
    width = int(net.nf * net.ch_mult[level])
    return net.num_heads or max(width // net.channels_per_head, 1)


def from_dhariwal(net: Any, like: PyTree, height: int, found: Mapping[str, np.ndarray]) -> PyTree:
    """The parameters of an `ADM` from a DhariwalUNet; raises WeightsError. As `from_song`."""
    filters = [name for name in found if name.endswith(".resample_filter")]
    return fill(like, sources(like, _adm_parts(net, height)), found, unused=filters)


_NETS: Mapping[type, Any] = {SongUNet: from_song, ADM: from_dhariwal}


def from_torch(net: Any, like: PyTree, height: int, found: Mapping[str, np.ndarray]) -> PyTree:
    """The parameters of a `SongUNet` or an `ADM`; as `from_song`."""
    if type(net) not in _NETS:
        raise WeightsError(
            f"EDM has SongUNet and ADM networks; the config's is {type(net).__name__}."
        )
    return _NETS[type(net)](net, like, height, found)


_PRECONDITIONS = {
    "EDMPrecond": "edm",
    "VPPrecond": "edm_vp",
    "VEPrecond": "edm_ve",
    "iDDPMPrecond": "iddpm",
}


def says(record: Record) -> dict[str, dict[str, Any]]:
    """What the file says of the config: fields of the sections model, precondition and data."""
    outer = dict(record.state.get("_init_kwargs") or {})
    inner = record.state.get("_modules", {}).get("model")
    own = dict(inner.state.get("_init_kwargs") or {}) if isinstance(inner, Record) else {}
    found: dict[str, dict[str, Any]] = {"model": {}, "precondition": {}, "data": {}}
    if record.name in _PRECONDITIONS:
        found["precondition"]["name"] = _PRECONDITIONS[record.name]
    if record.name == "EDMPrecond" and "sigma_data" in outer:
        found["precondition"]["sigma_data"] = float(outer["sigma_data"])
    ours = {
        "model_channels": "nf",
        "channel_mult": "ch_mult",
        "num_blocks": "num_res_blocks",
        "attn_resolutions": "attn_resolutions",
        "embedding_type": "embedding_type",
        "channel_mult_noise": "embedding_mult",
        "resample_filter": "fir_kernel",
    }
    for name, field in ours.items():
        if name in own:
            value = own[name]
            found["model"][field] = tuple(value) if isinstance(value, (list, tuple)) else value
    encoders = {"standard": "none", "skip": "input_skip", "residual": "residual"}
    if own.get("encoder_type") in encoders:
        found["model"]["progressive_input"] = encoders[own["encoder_type"]]
    if "label_dim" in outer:
        found["model"]["num_classes"] = outer["label_dim"] or None
    if "augment_dim" in own:
        found["model"]["augment_dim"] = own["augment_dim"] or 0
    if "img_resolution" in outer:
        found["data"] |= {"image_size": outer["img_resolution"]}
        found["data"] |= {"num_channels": outer.get("img_channels", 3)}
    return found
