"""A model's adaptive sampling and its latents, with a network of one number."""

import jax
import numpy as np
import pytest

from diffjax import builders
from diffjax.core import random
from diffjax.runs.model import Model
from diffjax.runs.workdir import RunError, load_config
from diffjax.solvers import AdaptiveFlow, PIController

KEY = jax.random.key(0)
LOOSE = PIController(1e-3, 1e-3)


@pytest.fixture(scope="module")
def model():
    """The digits' model with a network that is its input times a half."""
    config = load_config("digits:quick").unlock()
    config.model = {"name": "tests.test_builders:OwnNet"}
    parts = builders.build_parts(config)
    return Model(config, parts, parts.init_params(jax.random.key(1)), 0)


def test_the_ode_sampler(model):
    """Image i depends on its key alone; a latent in place of the key; a temperature."""
    images = model.sample(KEY, 4, solver=AdaptiveFlow(LOOSE))
    assert images.shape == (4, *model.parts.image_shape) and images.dtype == np.uint8
    again = model.sample(KEY, 4, solver=AdaptiveFlow(LOOSE), batch_size=2)
    np.testing.assert_array_equal(again, images)
    keys = random.sample_keys(KEY, 4)
    latents = np.asarray(model.prior(keys))
    np.testing.assert_array_equal(
        model.sample(KEY, 4, solver=AdaptiveFlow(LOOSE), latents=latents), images
    )
    cold = model.sample(KEY, 4, solver=AdaptiveFlow(LOOSE), temperature=0.5)
    np.testing.assert_array_equal(
        cold, model.sample(KEY, 4, solver=AdaptiveFlow(LOOSE), latents=0.5 * latents)
    )
    assert (cold != images).any()


def test_encoding_is_undone(model):
    """decode(encode(x)) is x to a level, but for the denoising at the end and the tolerance."""
    images = model.sample(KEY, 4, solver="heun", steps=4)
    controller = PIController(1e-5, 1e-5)
    latents = model.encode(images, controller=controller)
    assert latents.shape == images.shape and latents.dtype == np.float32
    back = model.decode(latents, controller=controller)
    gap = np.abs(back.astype(int) - images)
    assert gap.max() <= 1, gap.max()
    assert np.abs(back.astype(int) - model.decode(-latents, controller=controller)).max() > 1


def test_interpolation_has_its_ends(model):
    first, second = np.split(model.sample(KEY, 4, solver="heun", steps=4), 2)
    path = model.interpolate(first, second, 2, controller=LOOSE)
    assert path.shape == (2, 2, *model.parts.image_shape)
    for end, images in ((0, first), (-1, second)):
        assert np.abs(path[:, end].astype(int) - images).max() <= 1


def test_what_does_not_apply(model):
    with pytest.raises(ValueError, match="steps=5 does not apply"):
        model.sample(KEY, 1, solver="ode", steps=5)
    with pytest.raises(RunError, match=r"latents must be floating point of shape \(2, 8, 8, 1\)"):
        model.sample(KEY, 2, latents=np.zeros((1, 8, 8, 1)))
    with pytest.raises(ValueError, match="temperature must be positive"):
        model.sample(KEY, 1, temperature=0.0)
    with pytest.raises(RunError, match="1 of 1 samples did not arrive"):
        model.sample(KEY, 1, solver=AdaptiveFlow(PIController(max_steps=2)))
