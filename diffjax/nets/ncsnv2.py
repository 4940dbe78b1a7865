"""NCSNv2: the RefineNet that sees no label, its output divided by the noise level.

The network is that of `refine`, unconditional: the noise level enters by the division alone. Larger
images get more levels:

    resolution  encoder, multiples of nf   halved    decoder
    64          1 2 2* 2*                  once      2 2 2 1      (* dilated, size kept)
    128         1 2 2 4* 4*                twice     4 2 2 1 1
    256         1 2 2 2 4* 4*              3 times   4 2 2 2 1 1

Reference: Song, Ermon, "Improved Techniques for Training Score-Based Generative Models", 2020,
https://arxiv.org/abs/2006.09011, section 3.2 and appendix B.
"""

from typing import Literal

import jax.numpy as jnp
from flax import linen as nn

from diffjax.core import checks
from diffjax.core.types import Array
from diffjax.nets import frame, refine
from diffjax.nets.embed import Activation, Dtype, per_sample, wide


class NCSNv2(nn.Module):
    """The network: `net.apply(variables, x, label)`.

    nf: width of the first level.
    resolution: the size of images that the network was designed for, see above; any size that its
      levels divide can be given.
    nonlinearity: the activation, a function of arrays.
    variant: which of the authors' codes to follow, see `refine`.
    centered: x lies in [-1, 1]; False maps x in [0, 1] to 2 x - 1 first.
    scale_by_sigma: divides the result by level number `label` of num_scales geometric ones from
      sigma_max (label 0) down to sigma_min, as the published networks do; without it the label has
      no effect.
    dtype, remat: as in `NCSNpp`.
    """

    nf: int = 128
    resolution: Literal[64, 128, 256] = 64
    nonlinearity: Activation = nn.elu
    variant: refine.Variant = "jax"
    centered: bool = True
    scale_by_sigma: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    num_scales: int | None = None

    dtype: Dtype = jnp.float32
    remat: bool = False

    def __post_init__(self) -> None:
        """Checks the options that do not depend on the data; __call__ checks the rest."""
        refine.check_options(self)
        checks.one_of("resolution", self.resolution, (64, 128, 256))
        frame.check_scales(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, label: Array, cond: None = None, train: bool = False) -> Array:
        """Maps images at some noise level to the network's raw output.

        x: (B, H, W, C), or (H, W, C) under `vmap`; H and W divisible by 2, 4 or 8 (see above).
        label: () or (B,), the number of the level.  cond: None.  train: has no effect but that of
        `remat`.  Returns x's shape, in float32 or wider.
        """
        frame.refuse_cond(cond)
        batched = x.ndim == 4
        x = frame.as_batch(x)
        plan = self._plan()
        frame.check_size(x, plan.halvings, "choose a smaller resolution")
        frame.check_index(label, self)
        label = per_sample("label", label, x.shape[:1]).astype(wide(self.dtype))
        x = x.astype(self.dtype)
        x = x if self.centered else 2 * x - 1

        style = refine.Style(self.nonlinearity, None, self.variant, self.dtype)
        h = refine.refine_net(self, x, None, self.nf, plan, style, self.remat and train)

        h = h.astype(wide(self.dtype))
        if self.scale_by_sigma:
            h = frame.divide(h, frame.index_sigma(label, self))
        return h if batched else h[0]

    def _plan(self) -> refine.Plan:
        """The sizes of the table above."""
        if self.resolution == 64:
            return refine.small_plan(self.variant)
        if self.resolution == 128:
            return refine.Plan((1, 2, 2, 4, 4), (1, 1, 1, 2, 4), (4, 2, 2, 1, 1))
        return refine.Plan((1, 2, 2, 2, 4, 4), (1, 1, 1, 1, 2, 4), (4, 2, 2, 2, 1, 1))
