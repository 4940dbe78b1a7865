"""A run with one bad image: its label makes the network take the root of a negative number."""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from diffjax.data import array_source
from diffjax.data.pipeline import epoch_order
from diffjax.runs.workdir import load_config

MARK = 9
SIZE, BATCH, BAD_BATCH, BAD_ROW = 200, 8, 6, 3
BAD_IMAGE = int(epoch_order(SIZE, 0, 0)[BAD_BATCH * BATCH + BAD_ROW])


class Net(nn.Module):
    """One dense layer, and NaN for the label MARK."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x, label, cond, train=False):
        del label, train
        scale = jnp.sqrt(jnp.where(cond == MARK, -1.0, 1.0))  # planted
        out = nn.Dense(x[0].size)(jnp.tanh(nn.Dense(8)(x.reshape(len(x), -1))))
        return x * 0.1 + out.reshape(x.shape) * scale[:, None, None, None]


def source(split):
    """Random images of 4 x 4 pixels, one of them labelled MARK."""
    del split
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, SIZE)
    labels[BAD_IMAGE] = MARK
    return array_source(rng.integers(0, 16, (SIZE, 4, 4, 1)).astype(np.uint8), labels, levels=16)


def config(policy, n_jitted_steps=1, **training):
    """12 updates with a checkpoint every second; the bad image is in the seventh."""
    found = load_config("tests/runs/tiny_config.py").copy_and_resolve_references().unlock()
    found.model = ConfigDict({"name": "tests.runs.planted:Net"})
    found.data.update({"name": "tests.runs.planted:source", "image_size": 4, "levels": 16})
    found.data.uniform_dequantization = False
    found.mesh.data = 1
    found.training.update(
        {
            "batch_size": BATCH,
            "n_jitted_steps": n_jitted_steps,
            "log_freq": n_jitted_steps,
            "eval_freq": 1000,
            "snapshot_freq_for_preemption": 2,
            "snapshot_sampling": False,
            "on_divergence": policy,
            **training,
        }
    )
    found.training.keep.newest = 10
    return found
