"""NCSN: the RefineNet conditional on the number of the noise level.

The network is that of `refine`, with a row of scales and shifts for every noise level in each of
its normalisations. Its output is the score itself, undivided, unless scale_by_sigma is set.

Reference: Song, Ermon, "Generative Modeling by Estimating Gradients of the Data Distribution",
2019, https://arxiv.org/abs/1907.05600, appendix A.
"""

import jax.numpy as jnp
from flax import linen as nn

from diffjax.core import checks
from diffjax.core.types import Array
from diffjax.nets import frame, refine
from diffjax.nets.embed import Activation, Dtype, per_sample, wide


class NCSN(nn.Module):
    """The network: `net.apply(variables, x, label)`.

    nf: width of the first level.
    num_scales: how many noise levels there are; the label is 0 (the noisiest) .. num_scales - 1.
    nonlinearity: the activation, a function of arrays.
    variant: which of the authors' codes to follow, see `refine`.
    centered: x lies in [-1, 1]; False maps x in [0, 1] to 2 x - 1 first.
    scale_by_sigma: divides the result by level number `label` of the geometric ones from sigma_max
      down to sigma_min; the published networks leave that out.
    dtype, remat: as in `NCSNpp`.
    """

    nf: int = 128
    num_scales: int = 10
    nonlinearity: Activation = nn.elu
    variant: refine.Variant = "jax"
    centered: bool = True
    scale_by_sigma: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None

    dtype: Dtype = jnp.float32
    remat: bool = False

    def __post_init__(self) -> None:
        """Checks the options that do not depend on the data; __call__ checks the rest."""
        refine.check_options(self)
        checks.at_least("num_scales", self.num_scales, 2)
        frame.check_scales(self, counted=True)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, label: Array, cond: None = None, train: bool = False) -> Array:
        """Maps images at some noise level to the network's raw output.

        x: (B, H, W, C), or (H, W, C) under `vmap`; H and W even.  label: () or (B,), the number of
        the level, rounded to an integer; NaN comes of one that does not exist.  cond: None.
        train: has no effect but that of `remat`.  Returns x's shape, in float32 or wider.
        """
        frame.refuse_cond(cond)
        batched = x.ndim == 4
        x = frame.as_batch(x)
        plan = refine.small_plan(self.variant)
        frame.check_size(x, plan.halvings, "choose another network")
        checks.in_range("label", label, 0, self.num_scales - 1)
        label = per_sample("label", label, x.shape[:1]).astype(wide(self.dtype))
        x = x.astype(self.dtype)
        x = x if self.centered else 2 * x - 1

        level = jnp.round(label).astype(jnp.int32)
        style = refine.Style(self.nonlinearity, self.num_scales, self.variant, self.dtype)
        h = refine.refine_net(self, x, level, self.nf, plan, style, self.remat and train)

        h = h.astype(wide(self.dtype))
        if self.scale_by_sigma:
            h = frame.divide(h, frame.index_sigma(label, self))
        return h if batched else h[0]
