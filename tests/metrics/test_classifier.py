"""The judge on the real handwritten digits: right, cautious, and not fooled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from diffjax.metrics import recognised_share, train_classifier
from diffjax.metrics.classifier import SmallConvNet

HELD_OUT = 360
train = jax.jit(train_classifier, static_argnames="num_classes")
probabilities = jax.jit(lambda judge, x: judge.probabilities(x))


@pytest.fixture(scope="module")
def digits():
    """(train images, labels), (held-out images, labels); images in [-1, 1]."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = (data.images[order, ..., None] / 8 - 1).astype(np.float32)
    labels = data.target[order]
    return (images[:-HELD_OUT], labels[:-HELD_OUT]), (images[-HELD_OUT:], labels[-HELD_OUT:])


@pytest.fixture(scope="module", params=[0, 1], ids="seed{}".format)
def judge(request, digits):
    """The classifier with its default recipe."""
    return train(jax.random.key(request.param), *digits[0], num_classes=10)


def test_real_digits_are_recognised(judge, digits):
    images, labels = digits[1]
    p = probabilities(judge, images)
    np.testing.assert_allclose(jnp.sum(p, axis=1), 1.0, rtol=1e-5)
    assert np.mean(np.argmax(p, axis=1) == labels) > 0.97
    assert 0.80 < recognised_share(p) < 0.92


def test_garbage_is_not(judge, digits, rng):
    """What shares the digits' histograms, their strokes or their range, but shows no digit."""
    (seen, _), (images, labels) = digits
    shuffled = np.stack([rng.permutation(pixel) for pixel in seen.reshape(len(seen), -1).T], 1)
    other = np.roll(np.arange(HELD_OUT), 1)
    between = (0.5 * (images + images[other]))[labels != labels[other]]
    for garbage in (
        shuffled.reshape(seen.shape),
        between,
        rng.uniform(-1, 1, images.shape).astype(np.float32),
    ):
        assert recognised_share(probabilities(judge, garbage)) < 0.1


def test_features_are_the_penultimate_layer(judge, digits):
    """The last layer's matrix on the features gives the probabilities; no feature is dead."""
    images = digits[1][0]
    features = judge.features(images)
    last = judge.params["Dense_3"]
    logits = np.asarray(features) @ np.asarray(last["kernel"]) + np.asarray(last["bias"])[None]
    np.testing.assert_allclose(jax.nn.softmax(logits), judge.probabilities(images), atol=1e-5)
    assert features.shape == (HELD_OUT, 64)
    assert np.linalg.matrix_rank(np.cov(np.asarray(features).T)) == 64


def test_permuted_labels_teach_nothing(digits, rng):
    (images, labels), (held_out, truth) = digits
    judge = train(jax.random.key(0), images, rng.permutation(labels), num_classes=10)
    p = probabilities(judge, held_out)
    assert np.mean(np.argmax(p, axis=1) == truth) < 0.25
    assert recognised_share(p) < 0.02


def test_colour_odd_sizes_and_equal_keys():
    """Three colours on 7x5 images; the key alone decides the parameters."""
    images = jnp.linspace(-1, 1, 12 * 7 * 5 * 3).reshape(12, 7, 5, 3)
    labels = jnp.arange(12) % 2

    @jax.jit
    def small(key):
        return train_classifier(key, images, labels, 2, dim=6, width=4, epochs=2, batch_size=4)

    one, same, other = (small(jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert np.any(one.features(images) != other.features(images))
    assert one.features(images).shape == (12, 6)


def test_the_convolution_is_one(rng):
    """The first layers against lax's convolution, odd sizes and strides included."""
    x = rng.normal(size=(2, 7, 5, 3)).astype(np.float32)
    net = SmallConvNet(num_classes=2, width=4)
    variables = net.init(jax.random.key(0), x)
    _, layers = net.apply(variables, x, capture_intermediates=True, mutable="intermediates")

    def conv(layer, x, stride):
        p = variables["params"][layer]
        kernel = p["kernel"].reshape(3, 3, x.shape[-1], -1)
        out = jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return out + p["bias"][None, None, None]

    first = conv("Dense_0", x, 1)
    second = conv("Dense_1", jax.nn.silu(first), 2)
    (got,) = layers["intermediates"]["Dense_1"]["__call__"]
    assert second.shape == (2, 4, 3, 8)
    np.testing.assert_allclose(got, second, atol=1e-5)


def test_bad_input(key):
    images, labels = jnp.zeros((8, 4, 4, 1)), jnp.zeros(8, int)

    def rejected(images=images, labels=labels, batch_size=8):
        return train_classifier(key, images, labels, 2, batch_size=batch_size)

    with pytest.raises(TypeError, match="got uint8.*Scale levels"):
        rejected(images=images.astype(jnp.uint8))
    with pytest.raises(ValueError, match="lowest pixel.*got 255"):
        rejected(images=images + 255)
    with pytest.raises(ValueError, match="lowest label"):
        rejected(labels=labels + 2)
    with pytest.raises(ValueError, match="one an image"):
        rejected(labels=labels[:7])
    with pytest.raises(ValueError, match="number of images must be at least 64; got 8"):
        rejected(batch_size=64)
