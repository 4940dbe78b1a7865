"""FID's Inception in NumPy, NCHW, from the tensors of the published file by their names.

Written from the graph's description (and its quirks), with no code of the library: each convolution
is an explicit window sum, each pool says what it does with its padding.
"""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view


def conv(state, name, x, stride=1, pad=(0, 0)):
    """Convolution without bias, normalisation with eps = 0.001, ReLU. x: (B, C, H, W)."""
    w = state[f"{name}.conv.weight"]
    x = np.pad(x, ((0, 0), (0, 0), (pad[0],) * 2, (pad[1],) * 2))
    windows = sliding_window_view(x, w.shape[2:], axis=(2, 3))[:, :, ::stride, ::stride]
    b, c, h, v = windows.shape[:4]
    flat = windows.transpose(0, 2, 3, 1, 4, 5).reshape(b * h * v, -1)
    y = (flat @ w.reshape(len(w), -1).T).reshape(b, h, v, -1).transpose(0, 3, 1, 2)
    bn = {k: state[f"{name}.bn.{k}"][None, :, None, None]
          for k in ("weight", "bias", "running_mean", "running_var")}  # fmt: skip
    y = (y - bn["running_mean"]) / np.sqrt(bn["running_var"] + 0.001) * bn["weight"] + bn["bias"]
    return np.maximum(y, 0)


def average_pool(x):
    """3x3, stride 1: the sum of what is inside, over the number inside."""
    ones = np.ones_like(x[:1, :1])
    sums = [sliding_window_view(np.pad(a, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), axis=(2, 3))
            .sum(axis=(4, 5)) for a in (x, ones)]  # fmt: skip
    return sums[0] / sums[1]


def max_pool(x, stride, pad=0):
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)), constant_values=-np.inf)
    return sliding_window_view(x, (3, 3), axis=(2, 3))[:, :, ::stride, ::stride].max(axis=(4, 5))


def chain(state, name, x, *steps):
    """Convolutions name_1, name_2, ... with (pad) or (pad, stride)."""
    for i, (pad, *stride) in enumerate(steps, 1):
        x = conv(state, f"{name}_{i}", x, *(stride or [1]), pad=pad)
    return x


def block_a(s, n, x):
    return np.concatenate([
        conv(s, f"{n}.branch1x1", x),
        chain(s, f"{n}.branch5x5", x, [(0, 0)], [(2, 2)]),
        chain(s, f"{n}.branch3x3dbl", x, [(0, 0)], [(1, 1)], [(1, 1)]),
        conv(s, f"{n}.branch_pool", average_pool(x)),
    ], axis=1)  # fmt: skip


def block_b(s, n, x):
    return np.concatenate([
        conv(s, f"{n}.branch3x3", x, 2),
        chain(s, f"{n}.branch3x3dbl", x, [(0, 0)], [(1, 1)], [(0, 0), 2]),
        max_pool(x, 2),
    ], axis=1)  # fmt: skip


def block_c(s, n, x):
    row, column = [(0, 3)], [(3, 0)]
    return np.concatenate([
        conv(s, f"{n}.branch1x1", x),
        chain(s, f"{n}.branch7x7", x, [(0, 0)], row, column),
        chain(s, f"{n}.branch7x7dbl", x, [(0, 0)], column, row, column, row),
        conv(s, f"{n}.branch_pool", average_pool(x)),
    ], axis=1)  # fmt: skip


def block_d(s, n, x):
    return np.concatenate([
        chain(s, f"{n}.branch3x3", x, [(0, 0)], [(0, 0), 2]),
        chain(s, f"{n}.branch7x7x3", x, [(0, 0)], [(0, 3)], [(3, 0)], [(0, 0), 2]),
        max_pool(x, 2),
    ], axis=1)  # fmt: skip


def block_e(s, n, x, pool):
    a = conv(s, f"{n}.branch3x3_1", x)
    b = chain(s, f"{n}.branch3x3dbl", x, [(0, 0)], [(1, 1)])
    return np.concatenate([
        conv(s, f"{n}.branch1x1", x),
        conv(s, f"{n}.branch3x3_2a", a, pad=(0, 1)),
        conv(s, f"{n}.branch3x3_2b", a, pad=(1, 0)),
        conv(s, f"{n}.branch3x3dbl_3a", b, pad=(0, 1)),
        conv(s, f"{n}.branch3x3dbl_3b", b, pad=(1, 0)),
        conv(s, f"{n}.branch_pool", pool(x)),
    ], axis=1)  # fmt: skip


def stem(s, x):
    x = conv(s, "Conv2d_1a_3x3", x, 2)
    x = conv(s, "Conv2d_2a_3x3", x)
    x = max_pool(conv(s, "Conv2d_2b_3x3", x, pad=(1, 1)), 2)
    x = conv(s, "Conv2d_4a_3x3", conv(s, "Conv2d_3b_1x1", x))
    return max_pool(x, 2)


def last_maximum(x):
    return max_pool(x, 1, pad=1)


def forward(s, x):
    """(features (B, 2048), logits (B, 1008)) of x (B, 3, H, W) in [-1, 1]."""
    x = stem(s, x)
    for name in ("5b", "5c", "5d"):
        x = block_a(s, f"Mixed_{name}", x)
    x = block_b(s, "Mixed_6a", x)
    for name in ("6b", "6c", "6d", "6e"):
        x = block_c(s, f"Mixed_{name}", x)
    x = block_d(s, "Mixed_7a", x)
    x = block_e(s, "Mixed_7b", x, average_pool)
    x = block_e(s, "Mixed_7c", x, last_maximum)
    features = x.mean(axis=(2, 3))
    return features, features @ s["fc.weight"].T + s["fc.bias"]


# Output channels, input channels and kernel of every convolution, block by block.
STEM = {"Conv2d_1a_3x3": (32, 3, 3, 3), "Conv2d_2a_3x3": (32, 32, 3, 3),
        "Conv2d_2b_3x3": (64, 32, 3, 3), "Conv2d_3b_1x1": (80, 64, 1, 1),
        "Conv2d_4a_3x3": (192, 80, 3, 3)}  # fmt: skip


def shapes_a(c, pooled):
    return {"branch1x1": (64, c, 1, 1), "branch5x5_1": (48, c, 1, 1),
            "branch5x5_2": (64, 48, 5, 5), "branch3x3dbl_1": (64, c, 1, 1),
            "branch3x3dbl_2": (96, 64, 3, 3), "branch3x3dbl_3": (96, 96, 3, 3),
            "branch_pool": (pooled, c, 1, 1)}  # fmt: skip


def shapes_c(c, w):
    return {"branch1x1": (192, c, 1, 1), "branch7x7_1": (w, c, 1, 1), "branch7x7_2": (w, w, 1, 7),
            "branch7x7_3": (192, w, 7, 1), "branch7x7dbl_1": (w, c, 1, 1),
            "branch7x7dbl_2": (w, w, 7, 1), "branch7x7dbl_3": (w, w, 1, 7),
            "branch7x7dbl_4": (w, w, 7, 1), "branch7x7dbl_5": (192, w, 1, 7),
            "branch_pool": (192, c, 1, 1)}  # fmt: skip


def shapes_e(c):
    return {"branch1x1": (320, c, 1, 1), "branch3x3_1": (384, c, 1, 1),
            "branch3x3_2a": (384, 384, 1, 3), "branch3x3_2b": (384, 384, 3, 1),
            "branch3x3dbl_1": (448, c, 1, 1), "branch3x3dbl_2": (384, 448, 3, 3),
            "branch3x3dbl_3a": (384, 384, 1, 3), "branch3x3dbl_3b": (384, 384, 3, 1),
            "branch_pool": (192, c, 1, 1)}  # fmt: skip


SHAPES = {
    "Mixed_5b": shapes_a(192, 32),
    "Mixed_5c": shapes_a(256, 64),
    "Mixed_5d": shapes_a(288, 64),
    "Mixed_6a": {"branch3x3": (384, 288, 3, 3), "branch3x3dbl_1": (64, 288, 1, 1),
                 "branch3x3dbl_2": (96, 64, 3, 3), "branch3x3dbl_3": (96, 96, 3, 3)},
    "Mixed_6b": shapes_c(768, 128),
    "Mixed_6c": shapes_c(768, 160),
    "Mixed_6d": shapes_c(768, 160),
    "Mixed_6e": shapes_c(768, 192),
    "Mixed_7a": {"branch3x3_1": (192, 768, 1, 1), "branch3x3_2": (320, 192, 3, 3),
                 "branch7x7x3_1": (192, 768, 1, 1), "branch7x7x3_2": (192, 192, 1, 7),
                 "branch7x7x3_3": (192, 192, 7, 1), "branch7x7x3_4": (192, 192, 3, 3)},
    "Mixed_7b": shapes_e(1280),
    "Mixed_7c": shapes_e(2048),
}  # fmt: skip


def conv_shapes():
    """Every convolution of the network by its full name."""
    return STEM | {f"{b}.{n}": s for b, inner in SHAPES.items() for n, s in inner.items()}


def random_conv(rng, name, shape):
    """A convolution and its normalisation, so that activations keep their size."""
    out, *inner = shape
    w = rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / np.prod(inner)))
    return {
        f"{name}.conv.weight": w,
        f"{name}.bn.weight": rng.uniform(0.7, 1.3, out).astype(np.float32),
        f"{name}.bn.bias": rng.uniform(-0.3, 0.3, out).astype(np.float32),
        f"{name}.bn.running_mean": rng.uniform(-0.2, 0.2, out).astype(np.float32),
        f"{name}.bn.running_var": rng.uniform(0.2, 2.0, out).astype(np.float32),
        f"{name}.bn.num_batches_tracked": np.asarray(0),
    }


def random_state(rng, shapes=None):
    """Tensors under the names of the published file. shapes: those of some blocks; None of all."""
    state = {}
    for name, shape in (conv_shapes() if shapes is None else shapes).items():
        state |= random_conv(rng, name, shape)
    if shapes is None:
        state["fc.weight"] = rng.standard_normal((1008, 2048), np.float32) * np.float32(0.02)
        state["fc.bias"] = rng.standard_normal(1008, np.float32)
    return state
