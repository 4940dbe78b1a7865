"""Weights under the names of the published codes, laid out without the package's name maps.

The order of calls is recorded from the networks written out in NumPy; the names are listed in the
order in which the published constructors make their modules. Read side by side, each module of ours
meets its name there.
"""

from collections import Counter

import numpy as np


def recording(network):
    """A class of networks that keeps (name, parameters) of its modules in the order of calls."""

    class Recorded(network):
        def take(self, kind):
            before = Counter(self.count)
            params = super().take(kind)
            (taken,) = self.count - before
            self.order = [*getattr(self, "order", []), (f"{taken}_{before[taken]}", params)]
            return params

    return Recorded


def turn(path, array):
    """Our leaf in PyTorch's order of axes, and its name there."""
    last = path[-1]
    if array.ndim == 4:
        return "weight", np.transpose(array, (3, 2, 0, 1))
    if last == "kernel":
        return "weight", array.T
    return {"scale": "weight", "embedding": "weight"}.get(last, last), array


def leaves(tree, path=()):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name), value


def spell(params, prefix, inside=None):
    """All leaves of a module under `prefix`, its parts renamed by `inside`."""
    found = {}
    for path, array in leaves(params):
        name, value = turn(path, np.asarray(array))
        middle = [(inside or {}).get(part, part) for part in path[:-1]]
        found[".".join([prefix, *(m for m in middle if m), name])] = value
    return found


# --- score_sde_pytorch -----------------------------------------------------------------------


def port(params, order):
    """`all_modules` of the PyTorch port: every module with weights, in calling order."""
    found, j = {}, 0
    if "GaussianFourierProjection_0" in params:
        found["all_modules.0.W"], j = params["GaussianFourierProjection_0"]["W"], 1
    for _, own in order:
        if own:
            found |= spell(own, f"all_modules.{j}")
            j += 1
    return found


# --- EDM -------------------------------------------------------------------------------------


def edm_names(height, levels, blocks, encoder="standard", decoder="standard", aux=True):
    """Modules with weights of `enc` and `dec` in the order of their constructor."""
    for level in range(levels):
        r = f"{height >> level}x{height >> level}"
        if level == 0:
            yield f"enc.{r}_conv"
        else:
            yield f"enc.{r}_down"
            if encoder != "standard":
                yield f"enc.{r}_aux_{encoder}"
        for i in range(blocks):
            yield f"enc.{r}_block{i}"
    for level in reversed(range(levels)):
        r = f"{height >> level}x{height >> level}"
        yield from [f"dec.{r}_in0", f"dec.{r}_in1"] if level == levels - 1 else [f"dec.{r}_up"]
        for i in range(blocks + 1):
            yield f"dec.{r}_block{i}"
        if aux and (decoder == "skip" or level == 0):
            yield from [f"dec.{r}_aux_norm", f"dec.{r}_aux_conv"]


def interleave(parts, heads, position):
    """Rows of q, k, v, each (C, ...), put at position(head, channel, which, heads, size)."""
    size = len(parts[0]) // heads
    fused = np.zeros((3 * len(parts[0]), *parts[0].shape[1:]), parts[0].dtype)
    for which, part in enumerate(parts):
        for head in range(heads):
            for channel in range(size):
                row = position(head, channel, which, heads, size)
                fused[row] = part[head * size + channel]
    return fused


def edm_row(head, channel, which, heads, size):
    return (head * size + channel) * 3 + which


def legacy_row(head, channel, which, heads, size):
    return (head * 3 + which) * size + channel


def new_row(head, channel, which, heads, size):
    return (which * heads + head) * size + channel


SONG_BLOCK = {
    "GroupNorm_0": "norm0",
    "Conv_0": "conv0",
    "Dense_0": "affine",
    "GroupNorm_1": "norm1",
    "Conv_1": "conv1",
    "Conv_2": "skip",
}


def song(params, order, names):
    """A SongUNet's tensors."""
    found, names = {}, iter(names)
    for ours, own in order:
        if not own:
            continue
        if not ours.startswith("Attn"):
            name = next(names)
            alone = {"Conv2d_0": "", "Conv_0": ""}
            found |= spell(own, name, SONG_BLOCK if ours.startswith("Resnet") else alone)
            continue
        found |= spell({"norm2": own["GroupNorm_0"]}, name)
        weights = [own[f"NIN_{i}"]["W"].T for i in range(3)]
        biases = [own[f"NIN_{i}"]["b"] for i in range(3)]
        found[f"{name}.qkv.weight"] = interleave(weights, 1, edm_row)[..., None, None]
        found[f"{name}.qkv.bias"] = interleave(biases, 1, edm_row)
        found[f"{name}.proj.weight"] = own["NIN_3"]["W"].T[..., None, None]
        found[f"{name}.proj.bias"] = own["NIN_3"]["b"]
    assert next(names, None) is None
    for name in ("map_label", "map_augment", "map_layer0", "map_layer1"):
        found |= spell(params[name], name) if name in params else {}
    if "GaussianFourierProjection_0" in params:
        found["map_noise.freqs"] = params["GaussianFourierProjection_0"]["W"]
    return found


def fused(own, heads, row, tail):
    """An ADMAttention's q, k, v as one tensor and bias; tail: trailing axes of the weight."""
    q, k, v = np.split(own["qkv"]["kernel"].T, 3)
    weight = interleave((q, k, v), heads, row)
    bias = interleave(np.split(own["qkv"]["bias"], 3), heads, row)
    return weight.reshape(*weight.shape, *[1] * tail), bias


def dhariwal(params, order, names, heads):
    """A DhariwalUNet's tensors."""
    found, names = {}, iter(names)
    found |= spell(params["in_conv"], next(names))
    for ours, own in order:
        if not ours.startswith("ADMAttention"):
            name = next(names)
            found |= spell(own, name)
            continue
        found |= spell({"norm2": own["norm"]}, name)
        weight, bias = fused(own, heads(len(own["proj"]["bias"])), edm_row, 2)
        found[f"{name}.qkv.weight"], found[f"{name}.qkv.bias"] = weight, bias
        found[f"{name}.proj.weight"] = own["proj"]["kernel"].T[..., None, None]
        found[f"{name}.proj.bias"] = own["proj"]["bias"]
    assert next(names, None) is None
    for name in ("map_label", "map_augment", "map_layer0", "map_layer1", "out_norm", "out_conv"):
        found |= spell(params[name], name) if name in params else {}
    return found


# --- guided-diffusion ------------------------------------------------------------------------


def guided_names(height, mults, blocks, attends):
    """Blocks and attentions in the order of the constructor."""
    n = 0
    for level in range(len(mults)):
        for _ in range(blocks):
            n += 1
            yield f"input_blocks.{n}.0"
            if height >> level in attends:
                yield f"input_blocks.{n}.1"
        if level != len(mults) - 1:
            n += 1
            yield f"input_blocks.{n}.0"
    yield from (f"middle_block.{i}" for i in range(3))
    n = -1
    for level in reversed(range(len(mults))):
        for i in range(blocks + 1):
            n += 1
            layers = 1 + (height >> level in attends) + (level != 0 and i == blocks)
            yield from (f"output_blocks.{n}.{k}" for k in range(layers))


GUIDED_BLOCK = {
    "norm0": "in_layers.0",
    "conv0": "in_layers.2",
    "affine": "emb_layers.1",
    "norm1": "out_layers.0",
    "conv1": "out_layers.3",
    "skip": "skip_connection",
}


def guided(params, order, names, heads, row):
    """An ADM's tensors as OpenAI publishes them."""
    found, names = spell(params["in_conv"], "input_blocks.0.0"), iter(names)
    for ours, own in order:
        name = next(names)
        if not ours.startswith("ADMAttention"):
            found |= spell(own, name, GUIDED_BLOCK)
            continue
        found |= spell({"norm": own["norm"]}, name)
        weight, bias = fused(own, heads(len(own["proj"]["bias"])), row, 1)
        found[f"{name}.qkv.weight"], found[f"{name}.qkv.bias"] = weight, bias
        found[f"{name}.proj_out.weight"] = own["proj"]["kernel"].T[..., None]
        found[f"{name}.proj_out.bias"] = own["proj"]["bias"]
    assert next(names, None) is None
    found |= spell(params["map_layer0"], "time_embed.0") | spell(
        params["map_layer1"], "time_embed.2"
    )
    found |= spell(params["out_norm"], "out.0") | spell(params["out_conv"], "out.2")
    if "map_label" in params:
        found["label_emb.weight"] = params["map_label"]["kernel"]
    return found


# --- diffusers -------------------------------------------------------------------------------


def diffusers_names(height, levels, blocks, attends, *, skip):
    """Modules with weights in the order of UNet2DModel's calls."""
    yield "conv_in"
    for i in range(levels):
        for j in range(blocks):
            yield f"down_blocks.{i}.resnets.{j}"
            if height >> i in attends:
                yield f"down_blocks.{i}.attentions.{j}"
        if i != levels - 1 and skip:
            yield from [f"down_blocks.{i}.resnet_down", f"down_blocks.{i}.skip_conv"]
        elif i != levels - 1:
            yield f"down_blocks.{i}.downsamplers.0"
    yield from ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")
    for i in range(levels):
        here = height >> (levels - 1 - i) in attends
        for j in range(blocks + 1):
            yield f"up_blocks.{i}.resnets.{j}"
            if here and not skip:
                yield f"up_blocks.{i}.attentions.{j}"
        if here and skip:
            yield f"up_blocks.{i}.attentions.0"
        if i != levels - 1 and skip:
            yield from (f"up_blocks.{i}.{part}" for part in ("skip_norm", "skip_conv", "resnet_up"))
        elif i != levels - 1:
            yield f"up_blocks.{i}.upsamplers.0"
    yield from ("conv_norm_out", "conv_out")


DIFFUSERS_BLOCK = {
    "GroupNorm_0": "norm1",
    "Conv_0": "conv1",
    "Dense_0": "time_emb_proj",
    "GroupNorm_1": "norm2",
    "Conv_1": "conv2",
    "Conv_2": "conv_shortcut",
}


def diffusers(params, order, names):
    """A UNet2DModel's tensors."""
    found, names = {}, iter(names)
    order = [(ours, own) for ours, own in order if own]
    for i in range(2):
        found |= spell(order[i][1], f"time_embedding.linear_{i + 1}")
    for ours, own in order[2:]:
        name = next(names)
        if ours.startswith("Attn"):
            found |= spell({"group_norm": own["GroupNorm_0"]}, name)
            for k, part in enumerate(("to_q", "to_k", "to_v", "to_out.0")):
                found[f"{name}.{part}.weight"] = own[f"NIN_{k}"]["W"].T
                found[f"{name}.{part}.bias"] = own[f"NIN_{k}"]["b"]
        elif ours.startswith("Resnet"):
            shortcut = own.get("NIN_0")
            found |= spell({k: v for k, v in own.items() if k != "NIN_0"}, name, DIFFUSERS_BLOCK)
            if shortcut:
                found[f"{name}.conv_shortcut.weight"] = shortcut["W"].T[..., None, None]
                found[f"{name}.conv_shortcut.bias"] = shortcut["b"]
        else:
            alone = {"Conv_0": "" if ours.startswith("Combine") else "conv"}
            found |= spell(own, name, alone)
    assert next(names, None) is None
    if "GaussianFourierProjection_0" in params:
        found["time_proj.weight"] = params["GaussianFourierProjection_0"]["W"]
    return found


# --- DiT -------------------------------------------------------------------------------------


def dit(params, patch, channels):
    """A DiT's tensors."""
    found = {}
    for i, name in enumerate(("t_embedder.mlp.0", "t_embedder.mlp.2")):
        found |= spell(params[f"t_embedder_{i}"], name)
    found |= spell(params["y_embedder"], "y_embedder.embedding_table")
    found |= spell(params["final_adaLN"], "final_layer.adaLN_modulation.1")
    found |= spell(params["final_linear"], "final_layer.linear")
    parts = {"adaLN": "adaLN_modulation.1", "qkv": "attn.qkv", "proj": "attn.proj"}
    parts |= {"fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    for i in range(sum(name.startswith("block_") for name in params)):
        block = params[f"block_{i}"]
        kernel, bias = (np.asarray(block["qkv"][name]) for name in ("kernel", "bias"))
        # One row an output there: all of q, then of k, then of v.
        flat = {"kernel": np.concatenate(np.moveaxis(kernel, 1, 0), axis=1), "bias": bias.ravel()}
        found |= spell({**block, "qkv": flat}, f"blocks.{i}", parts)
    # A convolution's weight w[d, c, row, column] multiplies the pixel (row, column, c) of a patch.
    kernel = params["x_embedder"]["kernel"]
    weight = np.zeros((kernel.shape[1], channels, patch, patch), kernel.dtype)
    for row in range(patch):
        for column in range(patch):
            for c in range(channels):
                weight[:, c, row, column] = kernel[(row * patch + column) * channels + c]
    found["x_embedder.proj.weight"] = weight
    found["x_embedder.proj.bias"] = params["x_embedder"]["bias"]
    found["pos_embed"] = params["pos_embed"][None]
    return found
