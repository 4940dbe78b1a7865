"""Augmentation in a config: the network is told, in training only; what may not go together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import builders
from diffjax.builders import BuildError
from diffjax.runs.workdir import load_config
from tests.nets.common import QUICK

NET = {
    "name": "songunet",
    "nf": 8,
    "ch_mult": (1,),
    "num_res_blocks": 1,
    "attn_resolutions": (),
    "dropout": 0.0,
    "augment_dim": 9,
}


def config(p, **model):
    made = load_config("digits:quick").unlock()
    made.model = {**NET, **model}
    made.data.augment = p
    return made


def losses(made, train):
    """The losses of one image eight times: equal but for noise, times and augmentation."""
    parts = builders.build_parts(made)
    shapes = jax.eval_shape(parts.init_params, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.4 * rng.standard_normal(leaf.shape, np.float32), shapes)
    images = jnp.tile(jnp.arange(64, dtype=jnp.uint8).reshape(1, 8, 8, 1) // 4, (8, 1, 1, 1))
    loss_fn = jax.jit(builders.build_loss(made, parts, train=train), compiler_options=QUICK)
    return params, lambda params: loss_fn(params, jax.random.key(1), {"image": images})[0]


def test_images_are_changed_and_the_network_is_told_in_training_only():
    params, training = losses(config(1.0), True)
    _, scoring = losses(config(1.0), False)
    # There is no dropout and no flip: augmentation is the difference.
    assert not jnp.allclose(training(params), scoring(params))
    # The losses feel the weights of the labels in training, and only there.
    told = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 3 * leaf if path[0].key == "map_augment" else leaf, params
    )
    assert not jnp.allclose(training(told), training(params))
    assert jnp.array_equal(scoring(told), scoring(params))


def test_what_does_not_go_together():
    made = config(0.12)
    made.data.random_flip = True
    with pytest.raises(BuildError, match="mirrors them untold. Set random_flip = False"):
        builders.build_loss(made, builders.build_parts(made), train=True)
    made = config(0.12, augment_dim=0)
    with pytest.raises(BuildError, match=r"set config\.model\.augment_dim = 9"):
        builders.build_loss(made, builders.build_parts(made), train=True)
    made = config(1.5)
    with pytest.raises(BuildError, match=r"config\.data\.augment.*p must lie in \[0.0, 1.0\]"):
        builders.build_loss(made, builders.build_parts(made), train=True)


@pytest.mark.parametrize(
    "model",
    [
        {"name": "dit", "size": "S/2", "depth": 1, "learn_sigma": False},
        {"name": "sit", "size": "S/4", "depth": 1},
        {"name": "adm", "nf": 8, "ch_mult": (1, 2), "attn_resolutions": (4,), "dtype": "bfloat16"},
    ],
)
def test_the_other_networks_by_name(model):
    made = load_config("digits:quick").unlock()
    made.model = {**model, "num_classes": 10, "label_dropout": 0.1}
    parts = builders.build_parts(made)
    params = jax.eval_shape(parts.init_params, jax.random.key(0))
    batch = {
        "image": jax.ShapeDtypeStruct((4, 8, 8, 1), jnp.uint8),
        "label": jax.ShapeDtypeStruct((4,), jnp.int32),
    }
    loss_fn = builders.build_loss(made, parts, train=True)
    assert jax.eval_shape(loss_fn, params, jax.random.key(1), batch)[0].shape == (4,)


def test_a_size_that_no_transformer_has():
    made = load_config("digits:quick").unlock()
    made.model = {"name": "dit", "size": "XS/2"}
    with pytest.raises(BuildError, match=r"config\.model \(dit\).*size must be one of S, B, L, XL"):
        builders.build_parts(made)
