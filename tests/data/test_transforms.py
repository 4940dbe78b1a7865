"""Flips and the model's input: per sample, mirrored in width, in the right order."""

import jax
import numpy as np
import pytest

from diffjax.core.quantise import Quantisation
from diffjax.data import model_input, random_flip


@pytest.fixture
def images(rng):
    return rng.integers(0, 256, (512, 5, 4, 3), dtype=np.uint8)


def test_flips_mirror_the_width_with_probability_a_half(key, images):
    out = np.asarray(random_flip(key, images))
    assert out.dtype == np.uint8
    same = np.array([np.array_equal(a, b) for a, b in zip(out, images, strict=True)])
    mirrored = np.array([np.array_equal(a, np.fliplr(b)) for a, b in zip(out, images, strict=True)])
    assert (same ^ mirrored).all()
    # n = 512: 4 standard errors are 0.088, so 0.4 or 0.6 would be rejected.
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(images))


def test_flips_are_per_sample(key, images):
    out = random_flip(key, images)
    np.testing.assert_array_equal(random_flip(key, images[:7]), out[:7])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(512))
    np.testing.assert_array_equal(random_flip(keys[100:103], images[100:103]), out[100:103])
    other = random_flip(jax.random.key(1), images)
    assert 0.3 < np.mean(np.any(np.asarray(other != out), axis=(1, 2, 3))) < 0.7


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("dequantise", [False, True])
def test_model_input_holds_the_flipped_levels(key, images, flip, dequantise):
    q = Quantisation(placement="centres")
    x = jax.jit(model_input, static_argnames=("flip", "dequantise"))(
        key, images, q, flip=flip, dequantise=dequantise
    )
    levels = random_flip(key, images) if flip else images
    np.testing.assert_array_equal(q.from_model(x), levels)
    in_the_middle = np.asarray(x) == np.asarray(q.to_model(levels))
    assert in_the_middle.mean() < 0.01 if dequantise else in_the_middle.all()


def test_model_input_is_per_sample(key, images):
    q = Quantisation()
    draw = jax.jit(lambda k: model_input(key, k, q, flip=True, dequantise=True))
    np.testing.assert_array_equal(draw(images)[:9], draw(images[:9]))
