"""DDPM, NCSN, NCSNv2 and the classifier written out in float64 NumPy and SciPy, from the papers.

Plain definitions and loops, nothing shared with the package but the names of the parameters.
"""

from collections import Counter

import numpy as np
from scipy import ndimage
from scipy.special import expit

from tests.nets.numpy_ncsnpp import ACTIVATIONS, Network, conv


class DDPM(Network):
    """The U-Net of DDPM: the blocks of DDPM++ with 32 groups and plain sums."""

    NAMES = {"ResnetBlockDDPMpp": "ResnetBlockDDPM", "AttnBlockpp": "AttnBlock"}

    def __init__(self, params, **options):
        fixed = {"resblock_type": "ddpm", "skip_rescale": False, "fir": False}
        super().__init__(params, **options, **fixed, embedding_type="positional")

    def take(self, kind):
        return super().take(self.NAMES.get(kind, kind))

    def norm(self, p, x):
        pixels = x.reshape(x.shape[0], -1, 32, x.shape[-1] // 32)
        mean, var = pixels.mean((1, 3), keepdims=True), pixels.var((1, 3), keepdims=True)
        return ((pixels - mean) / np.sqrt(var + 1e-6)).reshape(x.shape) * p["scale"] + p["bias"]

    def __call__(self, x, label, cond=None):
        temb = self.embed(label, cond)
        p = self.take("Conv")
        x = x if self.centered else 2 * x - 1
        stack = [conv(x, p["kernel"]) + p["bias"]]
        for level in range(len(self.ch_mult)):
            for _ in range(self.num_res_blocks):
                h = self.block(stack[-1], temb)
                stack.append(self.attention(h) if h.shape[1] in self.attn_resolutions else h)
            if level < len(self.ch_mult) - 1:
                stack.append(self.resample("Downsample", stack[-1], self.resamp_with_conv))
        h = self.block(self.attention(self.block(stack[-1], temb)), temb)
        for level in reversed(range(len(self.ch_mult))):
            for _ in range(self.num_res_blocks + 1):
                h = self.block(np.concatenate([h, stack.pop()], axis=-1), temb)
                if self.up_attention == "block" and h.shape[1] in self.attn_resolutions:
                    h = self.attention(h)
            if self.up_attention == "level" and h.shape[1] in self.attn_resolutions:
                h = self.attention(h)
            if level > 0:
                h = self.resample("Upsample", h, self.resamp_with_conv)
        out = self.head(h)
        return out / self.sigma(label)[:, None, None, None] if self.scale_by_sigma else out


class Scope:
    """The parameters of one module, taken in the order of the calls."""

    def __init__(self, params):
        self.params = params
        self.count = Counter()

    def take(self, kind):
        name = f"{kind}_{self.count[kind]}"
        self.count[kind] += 1
        return self.params[name]

    def conv(self, x, dilation=1):
        return convolve(x, self.take("Conv"), dilation)


def convolve(x, p, dilation=1):
    """A dilated convolution as a plain one whose kernel has zeros between its taps."""
    kernel = p["kernel"]
    size = (kernel.shape[0] - 1) * dilation + 1
    spread = np.zeros((size, size, *kernel.shape[2:]))
    spread[::dilation, ::dilation] = kernel
    return conv(x, spread) + p.get("bias", 0)


def interpolate(x, shape, aligned):
    """Linear along H, then along W: at the centres of the new pixels, or with equal corners."""
    for axis, new in zip((1, 2), shape, strict=True):
        old = x.shape[axis]
        at = (np.arange(new) + 0.5) * old / new - 0.5
        if aligned and new > 1:
            at = np.arange(new) * (old - 1) / (new - 1)
        x = np.apply_along_axis(lambda v, at=at: np.interp(at, np.arange(len(v)), v), axis, x)
    return x


def mean_pool(x):
    return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4


class RefineNet:
    """NCSN where `levels` is given, else NCSNv2, from `stages` of (width, dilation)."""

    def __init__(self, params, act, variant, dilations, levels=None):
        self.root = Scope(params)
        self.act = ACTIVATIONS[act]
        self.torch = variant == "torch"
        self.dilations = dilations
        self.conditional = levels is not None

    def norm(self, scope, x):
        mean, var = x.mean((1, 2)), x.var((1, 2))
        spread = mean.var(axis=1, keepdims=True, ddof=int(self.torch))
        plus = (mean - mean.mean(axis=1, keepdims=True)) / np.sqrt(spread + 1e-5)
        if self.conditional:
            table = scope.take("ConditionalInstanceNorm2dPlus")["Embed_0"]["embedding"]
            gamma, alpha, beta = np.split(table[self.index], 3, axis=1)
        else:
            p = scope.take("InstanceNorm2dPlus")
            gamma, alpha, beta = (p[name][:, 0, 0] for name in ("gamma", "alpha", "beta"))
        h = (x - mean[:, None, None]) / np.sqrt(var[:, None, None] + 1e-5)
        return gamma[:, None, None] * (h + (alpha * plus)[:, None, None]) + beta[:, None, None]

    def residual(self, x, coarser, dilation):
        scope = Scope(self.root.take(f"{'Conditional' * self.conditional}ResidualBlock"))
        h = scope.conv(self.act(self.norm(scope, x)), dilation)
        h = self.act(self.norm(scope, h))
        if coarser and dilation == 1:
            long, short = (scope.take("ConvMeanPool")["Conv_0"] for _ in range(2))
            return mean_pool(convolve(h, long)) + mean_pool(convolve(x, short))
        h = scope.conv(h, dilation)
        return h + (scope.conv(x, dilation) if coarser else x)

    def units(self, parent, x, count):
        scope = Scope(parent.take(f"{'Cond' * self.conditional}RCUBlock"))
        for _ in range(count):
            h = x
            for _ in range(2):
                h = self.norm(scope, h) if self.conditional else h
                h = scope.conv(self.act(h))
            x = x + h
        return x

    def fusion(self, parent, xs):
        scope = Scope(parent.take(f"{'Cond' * self.conditional}MSFBlock"))
        total = 0
        for x in xs:
            x = self.norm(scope, x) if self.conditional else x
            total = total + interpolate(scope.conv(x), xs[0].shape[1:3], self.torch)
        return total

    def pooling(self, parent, x):
        scope = Scope(parent.take(f"{'Cond' * self.conditional}CRPBlock"))
        x = h = self.act(x)
        for _ in range(2):
            if self.conditional:
                h = ndimage.uniform_filter(self.norm(scope, h), (1, 5, 5, 1), mode="constant")
            else:
                h = ndimage.maximum_filter(h, (1, 5, 5, 1), mode="constant", cval=-np.inf)
            h = scope.conv(h)
            x = x + h
        return x

    def __call__(self, x, index):
        self.index = index
        h = self.root.conv(x)
        skips = []
        for i, dilation in enumerate(self.dilations):
            h = self.residual(self.residual(h, i > 0, dilation), False, dilation)
            skips.append(h)
        refined = []
        while skips:
            scope = Scope(self.root.take(f"{'Cond' * self.conditional}RefineBlock"))
            hs = [self.units(scope, v, 2) for v in [skips.pop(), *refined]]
            h = self.fusion(scope, hs) if len(hs) > 1 else hs[0]
            refined = [self.units(scope, self.pooling(scope, h), 1 if skips else 3)]
        return self.root.conv(self.act(self.norm(self.root, refined[0])))


def classify(params, x, sigma, blocks):
    """The logits of the wide residual network."""

    def dense(p, x):
        return x @ p["kernel"] + p["bias"]

    def norm_relu(p, x):
        groups = min(x.shape[-1] // 4, 32)
        pixels = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
        mean, var = pixels.mean((1, 3), keepdims=True), pixels.var((1, 3), keepdims=True)
        x = ((pixels - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)
        return np.maximum(x * p["scale"] + p["bias"], 0)

    def swish(x):
        return x * expit(x)

    x = np.stack([(v - v.mean()) / max(v.std(), 1 / np.sqrt(v.size)) for v in x])
    phase = 2 * np.pi * np.outer(np.log(sigma), params["GaussianFourierProjection_0"]["W"])
    temb = dense(params["Dense_0"], np.concatenate([np.sin(phase), np.cos(phase)], axis=1))
    temb = dense(params["Dense_1"], swish(temb))
    h = conv(x, params["init_conv"]["kernel"])
    for group in range(3):
        for i in range(blocks):
            p = params[f"WideResnetGroup_{group}"][f"WideResnetBlock_{i}"]
            short, h = h, norm_relu(p["init_bn"], h)
            if group == i == 0:
                short = h
            if group > 0 and i == 0:
                h = conv(h, p["conv1"]["kernel"], 2, ((0, 1), (0, 1)))
                short = mean_pool(short)
            else:
                h = conv(h, p["conv1"]["kernel"])
            h = h + dense(p["Dense_0"], swish(temb))[:, None, None]
            h = conv(norm_relu(p["bn_2"], h), p["conv2"]["kernel"])
            h[..., : short.shape[-1]] += short
    h = norm_relu(params["pre-pool-bn"], h).mean((1, 2))
    return dense(params["Dense_2"], h)
