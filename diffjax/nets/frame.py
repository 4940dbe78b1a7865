"""What the image networks share around their blocks: batch, labels, refusals, recomputation.

A label that counts noise levels stands for one of N geometric ones, the noisiest first:

    (1)  sigma~_k = sigma_max (sigma_min / sigma_max)^{k / (N - 1)},   k = 0 .. N - 1

The functions that take a network are called in its compact method.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from diffjax.core import checks
from diffjax.core.types import Array, PyTree
from diffjax.nets.embed import check_dtype
from diffjax.nets.recompute import recompute

KEYS = "keys"  # the collection of keys of samples


def run(net: nn.Module, block: nn.Module, *args: PyTree, remat: bool) -> Array:
    """Calls a new block of the network, which keeps its values for the backward pass.

    remat: it is recomputed there instead; the leaves of args[0] and the result then share their
    leading axis, and there is reverse mode only.
    """
    if not remat or net.is_initializing():
        return cast(Array, cast(Any, block)(*args))
    free, variables = block.unbind()

    def apply(x: PyTree, variables: PyTree, *rest: PyTree) -> Array:
        return cast(Array, free.apply(variables, x, *rest))

    return recompute(apply)(args[0], variables, *args[1:])


def stream(net: nn.Module, name: str, size: int) -> Array:
    """Keys (size,), one a sample: variables[KEYS][name] where given, else of the one in `rngs`.

    Given, a sample keeps its draws whatever the batch that it is trained in.
    """
    if net.has_variable(KEYS, name):
        return cast(Array, net.get_variable(KEYS, name))
    return jax.random.split(net.make_rng(name), size)


def dropout_keys(net: nn.Module, size: int, blocks: int) -> Iterator[Array]:
    """Keys (size,), one a sample, for each of the blocks in turn."""
    keys = jax.vmap(lambda key: jax.random.split(key, blocks))(stream(net, "dropout", size))
    return (keys[:, i] for i in range(blocks))


def as_batch(x: Array) -> Array:
    """x with a batch axis, which (H, W, C) gets in front; raises ValueError for other shapes."""
    if x.ndim not in (3, 4):
        raise ValueError(f"x must have shape (B, H, W, C) or (H, W, C); got {x.shape}.")
    return x if x.ndim == 4 else x[None]


def check_size(x: Array, halvings: int, way_out: str) -> None:
    """Raises ValueError unless height and width can be halved so many times."""
    height, width = x.shape[1:3]
    factor = 2**halvings
    if height % factor or width % factor:
        raise ValueError(
            f"{halvings + 1} levels need a height and width divisible by {factor}; got "
            f"{height} x {width}. Pad the images, or {way_out}."
        )


def check_unet_image(x: Array, ch_mult: Sequence[float], attn_resolutions: Sequence[int]) -> None:
    """Raises ValueError for images that the levels or the attention of a U-Net do not fit."""
    check_size(x, len(ch_mult) - 1, "shorten ch_mult")
    heights = [x.shape[1] >> level for level in range(len(ch_mult))]
    unmet = [size for size in attn_resolutions if size not in heights]
    if unmet:
        raise ValueError(
            f"attn_resolutions must be heights of the levels, here {heights}; got {unmet}."
        )


def check_unet(net: Any) -> None:
    """Raises ValueError or TypeError for options, common to all U-Nets, that cannot be used."""
    checks.at_least("nf", net.nf, 4)
    checks.at_least("num_res_blocks", net.num_res_blocks, 1)
    checks.at_least("len(ch_mult)", len(net.ch_mult), 1)
    checks.positive("ch_mult", np.asarray(net.ch_mult))
    checks.non_negative("dropout", net.dropout)
    checks.less("dropout", net.dropout, "one", 1.0)
    check_dtype(net.dtype)
    for name in ("out_channels", "num_classes"):
        if getattr(net, name) is not None:
            checks.at_least(name, getattr(net, name), 1)
    if net.num_classes is not None and not net.conditional:
        raise ValueError(
            "num_classes needs conditional=True: classes enter through the label's embedding."
        )


def check_scales(net: Any, *, counted: bool = False) -> None:
    """Raises unless (1) is known to a network that divides by it, and to no other.

    counted: the network has num_scales on another account too.
    """
    names = ("sigma_min", "sigma_max", "num_scales")
    given = {name: getattr(net, name) for name in (names[:2] if counted else names)}
    if not net.scale_by_sigma:
        useless = [name for name, value in given.items() if value is not None]
        if useless:
            raise ValueError(
                f"{', '.join(useless)} of this network are used by scale_by_sigma=True only; "
                "leave them None, or set it."
            )
        return
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise ValueError(
            "scale_by_sigma needs the noise levels that the label counts; give "
            f"{', '.join(missing)} as well."
        )
    checks.at_least("num_scales", net.num_scales, 2)
    checks.positive("sigma_min", net.sigma_min)
    checks.less("sigma_min", net.sigma_min, "sigma_max", net.sigma_max)


def check_index(label: Array, net: Any) -> None:
    """Raises ValueError for a label that counts no noise level of a network that divides by it."""
    if net.scale_by_sigma:
        checks.in_range("label", label, 0, net.num_scales - 1)


def index_sigma(label: Array, net: Any) -> Array:
    """The noise level of a label, eq. (1), shaped like it."""
    ratio = np.log(net.sigma_min / net.sigma_max) / (net.num_scales - 1)
    return net.sigma_max * jnp.exp(label * float(ratio))


def divide(h: Array, sigma: Array) -> Array:
    """h of shape (B, H, W, C) divided by one number a sample, (B,)."""
    return h / sigma[:, None, None, None]


def refuse_cond(cond: Any) -> None:
    """Raises ValueError for a condition given to a network that takes none."""
    if cond is not None:
        raise ValueError(
            "cond must be None: this network takes no condition. NCSNpp and DDPM take classes."
        )
