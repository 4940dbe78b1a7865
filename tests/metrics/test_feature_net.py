"""The small feature network: it learns, repeats itself, and sees images one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from diffjax.metrics import feature_net
from diffjax.metrics.feature_net import ResNet, accuracy, augment, train_feature_net


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return data.images.astype(np.uint8)[..., None], data.target


@pytest.fixture(scope="module")
def net(digits):
    images, labels = digits
    return train_feature_net(
        jax.random.key(0), images[:1400], labels[:1400], ResNet(10, 8, 2, 16),
        levels=17, steps=200, batch_size=64, learning_rate=1e-2,
    )  # fmt: skip


def test_it_learns(net, digits):
    """More than eight in ten digits that it never saw; chance is one in ten."""
    images, labels = digits
    assert accuracy(net, images[1400:], labels[1400:]) > 0.8


def test_equal_keys_give_equal_weights(digits):
    images, labels = digits
    options = {"levels": 17, "steps": 3, "batch_size": 8, "mirror": True, "shift": 1}
    small = ResNet(10, 8, 1, 16)
    nets = [
        train_feature_net(jax.random.key(k), images, labels, small, **options) for k in (0, 0, 1)
    ]
    jax.tree.map(np.testing.assert_array_equal, nets[0].params, nets[1].params)
    assert np.abs(nets[0].params["Dense_0"]["kernel"] - nets[2].params["Dense_0"]["kernel"]).max()


def test_an_image_does_not_see_its_batch(net, digits):
    images, _ = digits
    whole, alone = net(images[:5]), net(images[2:3])
    np.testing.assert_allclose(whole.features[2:3], alone.features, atol=1e-5)


def test_augmentation_moves_and_mirrors(key):
    """Of an image with one bright pixel: it lands within the shift, or the shift of its mirror."""
    x = jnp.zeros((400, 6, 8, 1)).at[:, 2, 1].set(1.0)
    moved = np.asarray(augment(key, x, mirror=True, shift=1))[..., 0]
    places = {tuple(int(v) for v in p) for p in np.argwhere(moved == 1)[:, 1:]}
    assert places == {(r, c) for r in (1, 2, 3) for c in (0, 1, 2, 5, 6, 7)}
    np.testing.assert_array_equal(augment(key, x, mirror=False, shift=0), x)


def test_bad_input(digits):
    images, labels = digits
    with pytest.raises(TypeError, match="integer levels"):
        feature_net.FeatureNet({}, ResNet(10))(images / 16.0)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 4\]"):
        train_feature_net(jax.random.key(0), images, labels, ResNet(5))
    with pytest.raises(ValueError, match="one an image"):
        train_feature_net(jax.random.key(0), images, labels[:3], ResNet(10))
