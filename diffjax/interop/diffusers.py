r"""Files of diffusers: its UNet2DModel of the DDPM and NCSN++ families, read and written.

    family   down_block_types                         ours
    DDPM     DownBlock2D, AttnDownBlock2D             `DDPM` with up_attention="block" where there
             UpBlock2D, AttnUpBlock2D                 is attention: it follows every block there
    NCSN++   SkipDownBlock2D, AttnSkipDownBlock2D     `NCSNpp` with both skip pyramids, added, FIR,
             SkipUpBlock2D, AttnSkipUpBlock2D         biggan blocks, Fourier embedding, sigma
                                                      divided out: the 256 and 1024 pixel models

Modules there are time_proj, time_embedding.linear_{1,2}, conv_in, {down,up}_blocks.{i} with
resnets.{j}, attentions.{j} and resamplers, mid_block, conv_norm_out and conv_out; up_blocks count
from the deepest level. Older files call to_q, to_k, to_v, to_out.0 query, key, value, proj_attn,
which is understood. `settings` reads a config.json beside the weights.

Two differences are of widths that nobody publishes: NCSN++ attention has 32 groups there whatever
the width, and the first block of a level on the way up another number of groups where its width is
below 128. DDPM's freq_shift must be 1 and flip_sin_to_cos False, downsample_padding 0.

Reference: https://github.com/huggingface/diffusers (models/unets/unet_2d.py).
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.core.pytree import named
from diffjax.core.tensorfile import write_safetensors
from diffjax.core.types import PyTree
from diffjax.interop import trunk
from diffjax.interop.assign import (
    Part,
    Source,
    WeightsError,
    convolution,
    fill,
    linear,
    sources,
)

_BLOCK = {
    "GroupNorm_0": "norm1",
    "Conv_0": "conv1",
    "Dense_0": "time_emb_proj",
    "GroupNorm_1": "norm2",
    "Conv_1": "conv2",
    "Conv_2": "conv_shortcut",
    "NIN_0": "conv_shortcut",
}
_ATTENTION = {
    "GroupNorm_0": "group_norm",
    "NIN_0": "to_q",
    "NIN_1": "to_k",
    "NIN_2": "to_v",
    "NIN_3": "to_out.0",
}
_OLD = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def _part(step: trunk.Step, levels: int) -> Part:
    """What a step of the trunk is there."""
    up = f"up_blocks.{levels - 1 - step.level}"
    down = f"down_blocks.{step.level}"
    resampler = not step.name.startswith("Resnet")
    attentions = 0 if step.name.startswith("AttnBlockpp") else step.number  # one a level, or each
    table: dict[str, Part] = {
        "fourier": Part("time_proj"),
        "dense": Part(f"time_embedding.linear_{step.number + 1}"),
        "in": Part("conv_in"),
        "down_block": Part(f"{down}.resnets.{step.number}", _BLOCK),
        "down_attention": Part(f"{down}.attentions.{step.number}", _ATTENTION),
        "halve": Part(f"{down}.downsamplers.0", {"Conv_0": "conv"})
        if resampler
        else Part(f"{down}.resnet_down", _BLOCK),
        "join": Part(f"{down}.skip_conv", {"Conv_0": ""}),
        "middle_block": Part(f"mid_block.resnets.{step.number}", _BLOCK),
        "middle_attention": Part("mid_block.attentions.0", _ATTENTION),
        "up_block": Part(f"{up}.resnets.{step.number}", _BLOCK),
        "up_attention": Part(f"{up}.attentions.{attentions}", _ATTENTION),
        # The last head belongs to the whole network.
        "head_norm": Part(f"{up}.skip_norm" if step.level else "conv_norm_out"),
        "head_conv": Part(f"{up}.skip_conv" if step.level else "conv_out"),
        "double": Part(f"{up}.upsamplers.0", {"Conv_0": "conv"})
        if resampler
        else Part(f"{up}.resnet_up", _BLOCK),
        "out_norm": Part("conv_norm_out"),
        "out_conv": Part("conv_out"),
    }
    return table[step.role]


def _origin(net: Any, like: PyTree, height: int) -> dict[str, Source]:
    _check_family(net)
    steps = trunk.steps(net, height)
    return sources(like, {step.name: _part(step, len(net.ch_mult)) for step in steps})


def _check_family(net: Any) -> None:
    """Raises WeightsError for options of a network that UNet2DModel cannot express."""
    wanted: dict[str, Any]
    if type(net) is trunk.DDPM:
        wanted = {"conditional": True, "num_classes": None, "scale_by_sigma": False}
        wanted |= {"up_attention": "block"} if net.attn_resolutions else {}
    else:
        wanted = {
            "resblock_type": "biggan",
            "fir": True,
            "fir_kernel": (1, 3, 3, 1),
            "skip_rescale": True,
            "progressive": "output_skip",
            "progressive_input": "input_skip",
            "progressive_combine": "sum",
            "embedding_type": "fourier",
            "conditional": True,
            "num_classes": None,
            "scale_by_sigma": True,
        }
    wrong = [
        f"{name} must be {value!r}, not {getattr(net, name)!r}"
        for name, value in wanted.items()
        if getattr(net, name) != value
    ]
    if wrong:
        raise WeightsError(f"UNet2DModel has no such {type(net).__name__}: {'; '.join(wrong)}.")


def from_torch(net: Any, like: PyTree, height: int, tensors: Mapping[str, np.ndarray]) -> PyTree:
    """The parameters of a `DDPM` or an `NCSNpp`; raises WeightsError.

    net: the network; like: its parameters' shapes; height: of its images. tensors: of the file.
    """
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in _OLD.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    # Old files hold the Fourier frequencies twice.
    return fill(like, _origin(net, like, height), renamed, unused=("time_proj.W",))


def to_torch(net: Any, params: PyTree, height: int) -> dict[str, np.ndarray]:
    """The tensors of a `DDPM` or an `NCSNpp` by diffusers' names; the inverse of `from_torch`."""
    leaves, found = named(params), {}
    for path, source in _origin(net, params, height).items():
        array = np.asarray(leaves[path])
        if source.read is convolution:
            array = array.transpose(3, 2, 0, 1)
        elif source.read is linear:
            array = array.T
        if "conv_shortcut.weight" in source.tensor and array.ndim == 2:
            array = array[..., None, None]
        found[source.tensor] = np.ascontiguousarray(array)
    return found


def write(
    directory: str | os.PathLike[str], net: Any, params: PyTree, shape: tuple[int, int, int]
) -> Path:
    """Writes config.json and the weights as `UNet2DModel.from_pretrained` reads them.

    shape: of the images, (H, W, C). Returns the directory. Raises WeightsError for a network that
    diffusers cannot express.
    """
    from diffjax.core.files import write_atomic

    directory = Path(directory)
    tensors = to_torch(net, params, shape[0])
    path = directory / "diffusion_pytorch_model.safetensors"
    write_safetensors(path, tensors, {"format": "pt"})
    text = json.dumps(config(net, shape), indent=2)
    write_atomic(directory / "config.json", text + "\n")
    return directory


def config(net: Any, shape: tuple[int, int, int]) -> dict[str, Any]:
    """The config.json of a network for images of this shape (H, W, C)."""
    _check_family(net)
    attends = [shape[0] >> level in net.attn_resolutions for level in range(len(net.ch_mult))]
    skip = "" if type(net) is trunk.DDPM else "Skip"
    down = [f"{'Attn' if a else ''}{skip}DownBlock2D" for a in attends]
    up = [f"{'Attn' if a else ''}{skip}UpBlock2D" for a in reversed(attends)]
    shared = {
        "_class_name": "UNet2DModel",
        "sample_size": shape[0] if shape[0] == shape[1] else list(shape[:2]),
        "in_channels": shape[2],
        "out_channels": net.out_channels or shape[2],
        "center_input_sample": not net.centered,
        "block_out_channels": [net.nf * mult for mult in net.ch_mult],
        "layers_per_block": net.num_res_blocks,
        "down_block_types": down,
        "up_block_types": up,
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "downsample_padding": 0,
        "attention_head_dim": None,
        "dropout": net.dropout,
        "act_fn": "silu",
        "norm_eps": 1e-6,
    }
    if not skip:
        own = {"time_embedding_type": "positional", "norm_num_groups": 32}
    else:
        own = {
            "time_embedding_type": "fourier",
            "norm_num_groups": None,
            "mid_block_scale_factor": float(np.sqrt(2)),
        }
    return shared | own


def settings(directory: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """What config.json says of the config: fields of the sections model and data.

    {} for a directory without config.json. Raises WeightsError for a UNet2DModel that no network
    here is.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        return {}
    stored = json.loads(path.read_text(encoding="utf-8"))
    widths = stored["block_out_channels"]
    skip = any("Skip" in kind for kind in stored["down_block_types"])
    wanted = (
        {"freq_shift": 1, "flip_sin_to_cos": False, "downsample_padding": 0} if not skip else {}
    )
    wrong = [
        f"{k} is {stored.get(k)!r}, not {v!r}" for k, v in wanted.items() if stored.get(k) != v
    ]
    if wrong:
        raise WeightsError(f"{path} is of another network than any here: {'; '.join(wrong)}.")
    model = {
        "nf": widths[0],
        "ch_mult": tuple(width / widths[0] for width in widths),
        "num_res_blocks": stored["layers_per_block"],
        "centered": not stored.get("center_input_sample", False),
    }
    found: dict[str, dict[str, Any]] = {"model": model}
    size = stored.get("sample_size")
    if isinstance(size, int):
        found["data"] = {"image_size": size, "num_channels": stored["in_channels"]}
        attends = [i for i, kind in enumerate(stored["down_block_types"]) if "Attn" in kind]
        model["attn_resolutions"] = tuple(size >> level for level in attends)
    return found
