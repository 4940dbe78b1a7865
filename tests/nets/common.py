"""Small networks with weights that matter, shared by the tests of this folder."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.nets import NCSNpp

ACTIVATIONS = {
    "swish": jax.nn.swish,
    "elu": jax.nn.elu,
    "relu": jax.nn.relu,
    "lrelu": partial(jax.nn.leaky_relu, negative_slope=0.2),
}
# For functions that run once: a third of the compile time, the same operations.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
SMALL = {"nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,)}


def small(**options):
    """A network of two levels for images 8 pixels high."""
    return NCSNpp(**{**SMALL, **options})


def weights(net, x, label, cond=None, seed=0):
    """Random values for every parameter, near enough to 1 / sqrt(fan in) that all of them count."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: net.init(key, x, label, cond), jax.random.key(0))

    def fill(path, leaf):
        draw = rng.standard_normal(leaf.shape).astype(np.float32)
        if path[-1].key == "W" and leaf.ndim == 1:  # Fourier frequencies
            return draw
        if leaf.ndim == 1:
            return 0.1 * draw + (path[-1].key == "scale")
        return draw / np.sqrt(np.prod(leaf.shape[:-1]))

    return jax.tree_util.tree_map_with_path(fill, shapes)


def batch(size=2, height=8, width=8, channels=3, seed=1):
    """Images and noise levels."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (size, height, width, channels)).astype(np.float32)
    return jnp.asarray(x), jnp.linspace(0.4, 5.0, size, dtype=jnp.float32)
