"""SongUNet, ADM and DiT written out in float64 NumPy and SciPy, from the papers.

Plain definitions and loops, nothing shared with the package but the names of the parameters.
"""

from collections import Counter

import numpy as np
from scipy.special import expit, softmax

from tests.nets.numpy_ncsnpp import Network, conv


def silu(v):
    return v * expit(v)


def linear(p, x):
    return x @ p["kernel"] + p.get("bias", 0.0)


def filtered(p, x):
    return conv(x, p["kernel"]) + p["bias"]


def waves(label, count, divisor, order):
    """`count` frequencies from 1 down; divisor count - 1 reaches 1 / 10000."""
    phase = label[:, None] * 10000.0 ** (-np.arange(count) / divisor)
    return np.concatenate([getattr(np, name)(phase) for name in order], axis=1)


class Song(Network):
    """The trunk of NCSN++ under EDM's embedding."""

    def __init__(self, params, augment, **options):
        trunk = {
            "resblock_type": "biggan",
            "skip_rescale": True,
            "fir": True,
            "centered": True,
            "scale_by_sigma": False,
            "progressive_combine": "sum",
            "resamp_with_conv": True,
        }
        super().__init__(params["unet"], **{**trunk, **options})
        self.outer, self.augment = params, augment

    def embed(self, label, cond):
        width = self.nf * self.embedding_mult
        if self.embedding_type == "fourier":
            phase = 2 * np.pi * label[:, None] * self.outer["GaussianFourierProjection_0"]["W"]
            e = np.concatenate([np.sin(phase), np.cos(phase)], axis=1)
        else:
            e = waves(label, width // 2, width // 2 - 1, ("sin", "cos"))
        if self.num_classes:
            rows = np.sqrt(self.num_classes) * np.eye(self.num_classes)
            e = e + linear(self.outer["map_label"], np.where(cond[:, None] >= 0, rows[cond], 0))
        if self.augment is not None:
            e = e + linear(self.outer["map_augment"], self.augment)
        return linear(self.outer["map_layer1"], silu(linear(self.outer["map_layer0"], e)))


def norm(p, x):
    """Group normalisation with epsilon 1e-5, before any scale and shift."""
    groups = min(x.shape[-1] // 4, 32)
    g = x.reshape(*x.shape[:3], groups, -1)
    centred = g - g.mean(axis=(1, 2, 4), keepdims=True)
    g = centred / np.sqrt((centred**2).mean(axis=(1, 2, 4), keepdims=True) + 1e-5)
    return g.reshape(x.shape) * p["scale"] + p["bias"]


class ADM:
    """One forward pass; `options` are the fields of the network."""

    def __init__(self, params, **options):
        self.params = params
        self.count = Counter()
        self.__dict__.update(options)

    def take(self, kind):
        name = f"{kind}_{self.count[kind]}"
        self.count[kind] += 1
        return self.params[name]

    def block(self, x, temb, resize=None):
        p = self.take("ADMBlock")
        h = silu(norm(p["norm0"], x))
        if resize == "up":
            h, x = (v.repeat(2, axis=1).repeat(2, axis=2) for v in (h, x))
        if resize == "down":
            h, x = (
                (v[:, ::2, ::2] + v[:, 1::2, ::2] + v[:, ::2, 1::2] + v[:, 1::2, 1::2]) / 4
                for v in (h, x)
            )
        h = filtered(p["conv0"], h)
        film = linear(p["affine"], temb)[:, None, None]
        scale, shift = film[..., : h.shape[-1]], film[..., h.shape[-1] :]
        h = filtered(p["conv1"], silu(norm(p["norm1"], h) * (1 + scale) + shift))
        return (filtered(p["skip"], x) if "skip" in p else x) + h

    def attention(self, x):
        p = self.take("ADMAttention")
        batch, channels = x.shape[0], x.shape[-1]
        heads = self.num_heads or channels // self.channels_per_head
        d = channels // heads
        qkv = linear(p["qkv"], norm(p["norm"], x)).reshape(batch, -1, 3 * channels)
        out = np.zeros((batch, qkv.shape[1], channels))
        for head in range(heads):
            q, k, v = (qkv[..., i * channels + head * d :][..., :d] for i in range(3))
            weights = softmax(q @ k.transpose(0, 2, 1) / np.sqrt(d), axis=-1)
            out[..., head * d : (head + 1) * d] = weights @ v
        return x + linear(p["proj"], out).reshape(x.shape)

    def __call__(self, x, label, cond=None, augment=None):
        e = waves(label, self.nf // 2, self.nf // 2, ("cos", "sin"))
        if augment is not None:
            e = e + linear(self.params["map_augment"], augment)
        e = linear(self.params["map_layer1"], silu(linear(self.params["map_layer0"], e)))
        if self.num_classes:
            e = e + np.where(cond[:, None] >= 0, self.params["map_label"]["kernel"][cond], 0)
        temb = silu(e)

        def attend(h):
            return self.attention(h) if h.shape[1] in self.attn_resolutions else h

        stack = [filtered(self.params["in_conv"], x)]
        levels = len(self.ch_mult)
        for level in range(levels):
            if level:
                stack.append(self.block(stack[-1], temb, "down"))
            for _ in range(self.num_res_blocks):
                stack.append(attend(self.block(stack[-1], temb)))
        h = self.block(self.attention(self.block(stack[-1], temb)), temb)
        for level in reversed(range(levels)):
            for _ in range(self.num_res_blocks + 1):
                h = attend(self.block(np.concatenate([h, stack.pop()], axis=-1), temb))
            if level:
                h = self.block(h, temb, "up")
        return filtered(self.params["out_conv"], silu(norm(self.params["out_norm"], h)))


def layer_norm(z):
    return (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-6)


def gelu(v):
    return v / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3)))


def place(row, column, features):
    """The sinusoids of one patch: the column's half first."""
    w = 10000.0 ** (-np.arange(features // 4) / (features / 4))
    halves = [np.concatenate([np.sin(at * w), np.cos(at * w)]) for at in (column, row)]
    return np.concatenate(halves)


def dit(params, x, label, cond, *, depth, width, num_heads, patch_size):
    """All the channels that the weights give, (B, H, W, C_out)."""
    p, (batch, high, wide) = patch_size, x.shape[:3]
    places = [(i, j) for i in range(high // p) for j in range(wide // p)]
    patches = [x[:, p * i : p * i + p, p * j : p * j + p].reshape(batch, -1) for i, j in places]
    z = linear(params["x_embedder"], np.stack(patches, axis=1))
    z = z + np.stack([place(i, j, width) for i, j in places])
    c = linear(params["t_embedder_0"], waves(label, 128, 128, ("cos", "sin")))
    c = linear(params["t_embedder_1"], silu(c))
    c = silu(c + params["y_embedder"]["embedding"][cond])
    for i in range(depth):
        q = params[f"block_{i}"]
        b1, s1, g1, b2, s2, g2 = np.split(linear(q["adaLN"], c)[:, None], 6, axis=-1)
        packed = {"kernel": q["qkv"]["kernel"].reshape(width, -1), "bias": q["qkv"]["bias"].ravel()}
        qkv = linear(packed, layer_norm(z) * (1 + s1) + b1)
        d, heads = width // num_heads, []
        for head in range(num_heads):
            query, key, value = (qkv[..., n * width + head * d :][..., :d] for n in range(3))
            heads.append(softmax(query @ key.transpose(0, 2, 1) / np.sqrt(d), axis=-1) @ value)
        z = z + g1 * linear(q["proj"], np.concatenate(heads, axis=-1))
        hidden = gelu(linear(q["fc1"], layer_norm(z) * (1 + s2) + b2))
        z = z + g2 * linear(q["fc2"], hidden)
    shift, scale = np.split(linear(params["final_adaLN"], c)[:, None], 2, axis=-1)
    z = linear(params["final_linear"], layer_norm(z) * (1 + scale) + shift)
    out = np.zeros((batch, high, wide, z.shape[-1] // p**2))
    for n, (i, j) in enumerate(places):
        out[:, p * i : p * i + p, p * j : p * j + p] = z[:, n].reshape(batch, p, p, -1)
    return out
