"""What happens to a batch on the device: flips and the way into the model's range.

Images travel from the host as uint8 levels, four times smaller than floats; these functions are
pure and meant to be jitted into the train step. Randomness is per sample (`core.random`), so an
image's flip and noise depend on its key only, never on the batch, the mesh or the host count.
"""

import jax
import jax.numpy as jnp

from diffjax.core.quantise import Quantisation
from diffjax.core.random import sample_keys, step_keys, tag
from diffjax.core.types import Array, Key


def random_flip(key: Key, images: Array) -> Array:
    """Mirrors each image left to right with probability 1/2.

    images: (B, H, W, C), levels or reals. key: one key, or one a sample, (B,).
    """
    keys = step_keys(sample_keys(key, images.shape[0]), tag("flip"))
    flip = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1, :], images)


def model_input(
    key: Key,
    images: Array,
    quantisation: Quantisation,
    *,
    flip: bool = False,
    dequantise: bool = False,
) -> Array:
    """A batch of levels as the network's clean data x0: flip, then dequantise or place.

    images: (B, H, W, C), uint8 levels. Returns reals of the same shape in the quantisation's
    range. `flip` suits natural images, not digits or text; `dequantise` draws in the bins, eq. (4)
    of `core.quantise`, and goes with placement "centres".
    """
    if flip:
        images = random_flip(key, images)
    if dequantise:
        return quantisation.dequantise(key, images)
    return quantisation.to_model(images)
