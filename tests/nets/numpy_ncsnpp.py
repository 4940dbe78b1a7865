"""DDPM++ / NCSN++ written out in float64 NumPy and SciPy, from the papers: the networks' truth.

Plain definitions and loops, nothing shared with the package but the names of the parameters.
"""

from collections import Counter

import numpy as np
from scipy import signal
from scipy.special import expit, softmax

ACTIVATIONS = {
    "swish": lambda v: v * expit(v),
    "elu": lambda v: np.where(v > 0, v, np.expm1(np.minimum(v, 0))),
    "relu": lambda v: np.maximum(v, 0),
    "lrelu": lambda v: np.where(v > 0, v, 0.2 * v),
}


def conv(x, kernel, stride=1, pads=None):
    """Cross-correlation, NHWC with HWIO; pads ((top, bottom), (left, right)), default centred."""
    size = kernel.shape[0]
    pads = pads or ((size // 2, size // 2),) * 2
    x = np.pad(x, ((0, 0), *pads, (0, 0)))
    high, wide = x.shape[1] - size + 1, x.shape[2] - size + 1
    out = 0.0
    for i in range(size):
        for j in range(size):
            out = out + x[:, i : i + high, j : j + wide] @ kernel[i, j]
    return out[:, ::stride, ::stride]


def zero_insert(x):
    out = np.zeros((x.shape[0], 2 * x.shape[1], 2 * x.shape[2], x.shape[3]))
    out[:, ::2, ::2] = x
    return out


def fir(x, kernel, low, high):
    """Pads by (low, high), negative crops, and convolves each channel with the outer product."""
    k = np.asarray(kernel, float)
    k = np.outer(k, k) / k.sum() ** 2
    if low < 0:
        x, low = x[:, -low:, -low:], 0
    if high < 0:
        x, high = x[:, :high, :high], 0
    x = np.pad(x, ((0, 0), (low, high), (low, high), (0, 0)))
    images = np.moveaxis(x, -1, 1)
    out = [[signal.convolve2d(c, k, mode="valid") for c in image] for image in images]
    return np.moveaxis(np.array(out), 1, -1)


def fir_up(x, kernel):
    spare = len(kernel) - 2
    return 4 * fir(zero_insert(x), kernel, (spare + 1) // 2 + 1, spare // 2)


def fir_down(x, kernel):
    spare = len(kernel) - 2
    return fir(x, kernel, (spare + 1) // 2, spare // 2)[:, ::2, ::2]


def conv_up(x, weight, kernel):
    """Zero insertion (with no zero after the last pixel), full correlation, filter."""
    x = conv(zero_insert(x)[:, :-1, :-1], weight, pads=((2, 2), (2, 2)))
    spare = len(kernel) - 2 - 2
    return 4 * fir(x, kernel, (spare + 1) // 2 + 1, spare // 2 + 1)


def conv_down(x, weight, kernel):
    spare = len(kernel) - 2 + 2
    return conv(fir(x, kernel, (spare + 1) // 2, spare // 2), weight, 2, ((0, 0), (0, 0)))


class Network:
    """One forward pass; `options` are the fields of the network, the activation by name."""

    def __init__(self, params, **options):
        self.params = params
        self.count = Counter()
        self.act = ACTIVATIONS[options.get("nonlinearity", "swish")]
        self.__dict__.update(options)

    def take(self, kind):
        """The parameters of the next module of this kind, if it has any."""
        name = f"{kind}_{self.count[kind]}"
        self.count[kind] += 1
        return self.params.get(name, {})

    def norm(self, p, x):
        groups = min(x.shape[-1] // 4, 32)
        g = x.reshape(*x.shape[:3], groups, -1)
        centred = g - g.mean(axis=(1, 2, 4), keepdims=True)
        g = centred / np.sqrt((centred**2).mean(axis=(1, 2, 4), keepdims=True) + 1e-6)
        return g.reshape(x.shape) * p["scale"] + p["bias"]

    def join(self, x, h):
        return (x + h) / np.sqrt(2) if self.skip_rescale else x + h

    def up(self, x):
        return fir_up(x, self.fir_kernel) if self.fir else x.repeat(2, 1).repeat(2, 2)

    def down(self, x):
        if self.fir:
            return fir_down(x, self.fir_kernel)
        return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4

    def block(self, x, temb, resize=None):
        biggan = self.resblock_type == "biggan"
        p = self.take("ResnetBlockBigGANpp" if biggan else "ResnetBlockDDPMpp")
        h = self.act(self.norm(p["GroupNorm_0"], x))
        if resize:
            h, x = resize(h), resize(x)
        h = conv(h, p["Conv_0"]["kernel"]) + p["Conv_0"]["bias"]
        if temb is not None:
            shift = self.act(temb) @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]
            h = h + shift[:, None, None]
        h = self.act(self.norm(p["GroupNorm_1"], h))
        h = conv(h, p["Conv_1"]["kernel"]) + p["Conv_1"]["bias"]
        if "Conv_2" in p:
            x = conv(x, p["Conv_2"]["kernel"]) + p["Conv_2"]["bias"]
        if "NIN_0" in p:
            x = x @ p["NIN_0"]["W"] + p["NIN_0"]["b"]
        return self.join(x, h)

    def attention(self, x):
        p = self.take("AttnBlockpp")
        h = self.norm(p["GroupNorm_0"], x).reshape(x.shape[0], -1, x.shape[-1])
        q, k, v = (h @ p[f"NIN_{i}"]["W"] + p[f"NIN_{i}"]["b"] for i in range(3))
        weights = softmax(q @ k.transpose(0, 2, 1) / np.sqrt(x.shape[-1]), axis=-1)
        h = (weights @ v) @ p["NIN_3"]["W"] + p["NIN_3"]["b"]
        return self.join(x, h.reshape(x.shape))

    def resample(self, kind, x, with_conv):
        """The Downsample or Upsample module."""
        p = self.take(kind)
        if with_conv and self.fir:
            fused = conv_down if kind == "Downsample" else conv_up
            return fused(x, p["Conv2d_0"]["weight"], self.fir_kernel) + p["Conv2d_0"]["bias"]
        if not with_conv:
            return self.down(x) if kind == "Downsample" else self.up(x)
        kernel, bias = p["Conv_0"]["kernel"], p["Conv_0"]["bias"]
        if kind == "Downsample":
            return conv(x, kernel, 2, ((0, 1), (0, 1))) + bias
        return conv(self.up(x), kernel) + bias

    def head(self, h):
        h = self.act(self.norm(self.take("GroupNorm"), h))
        p = self.take("Conv")
        return conv(h, p["kernel"]) + p["bias"]

    def embed(self, label, cond):
        if not self.conditional:
            return None
        if self.embedding_type == "fourier":
            w = self.params["GaussianFourierProjection_0"]["W"]
            phase = 2 * np.pi * np.log(label)[:, None] * w
        else:
            half = self.nf // 2
            phase = label[:, None] * 10000.0 ** (-np.arange(half) / (half - 1))
        e = np.concatenate([np.sin(phase), np.cos(phase)], axis=1)
        for i in range(2):
            p = self.take("Dense")
            e = (self.act(e) if i else e) @ p["kernel"] + p["bias"]
        if self.num_classes:
            rows = self.params["ClassDense"]["kernel"] * np.sqrt(self.num_classes)
            e = e + np.where(cond[:, None] >= 0, rows[cond], 0)
        return e

    def __call__(self, x, label, cond=None):
        temb = self.embed(label, cond)
        x = x if self.centered else 2 * x - 1
        pyramid = x
        p = self.take("Conv")
        stack = [conv(x, p["kernel"]) + p["bias"]]
        levels = len(self.ch_mult)
        biggan = self.resblock_type == "biggan"
        for level in range(levels):
            for _ in range(self.num_res_blocks):
                h = self.block(stack[-1], temb)
                if h.shape[1] in self.attn_resolutions:
                    h = self.attention(h)
                stack.append(h)
            if level == levels - 1:
                break
            if biggan:
                h = self.block(stack[-1], temb, self.down)
            else:
                h = self.resample("Downsample", stack[-1], self.resamp_with_conv)
            if self.progressive_input == "input_skip":
                pyramid = self.resample("Downsample", pyramid, False)
                p = self.take("Combine")["Conv_0"]
                brought = conv(pyramid, p["kernel"]) + p["bias"]
                cat = self.progressive_combine == "cat"
                h = np.concatenate([brought, h], axis=-1) if cat else brought + h
            elif self.progressive_input == "residual":
                h = pyramid = self.join(self.resample("Downsample", pyramid, True), h)
            stack.append(h)
        h = self.block(self.attention(self.block(stack[-1], temb)), temb)
        out = None
        for level in reversed(range(levels)):
            for _ in range(self.num_res_blocks + 1):
                h = self.block(np.concatenate([h, stack.pop()], axis=-1), temb)
            if h.shape[1] in self.attn_resolutions:
                h = self.attention(h)
            if self.progressive == "output_skip":
                doubled = 0 if out is None else self.resample("Upsample", out, False)
                out = doubled + self.head(h)
            elif self.progressive == "residual":
                if out is None:
                    out = self.head(h)
                else:
                    h = out = self.join(self.resample("Upsample", out, True), h)
            if level and biggan:
                h = self.block(h, temb, self.up)
            elif level:
                h = self.resample("Upsample", h, self.resamp_with_conv)
        out = out if self.progressive == "output_skip" else self.head(h)
        return out / self.sigma(label)[:, None, None, None] if self.scale_by_sigma else out

    def sigma(self, label):
        """The label itself, or the level that it counts."""
        if getattr(self, "embedding_type", "positional") == "fourier":
            return label
        return np.geomspace(self.sigma_max, self.sigma_min, self.num_scales)[label.astype(int)]
