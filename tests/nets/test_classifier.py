"""The classifier: its forward pass, its names, its refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from diffjax.nets import WideResNet
from tests.nets.common import QUICK, batch, weights
from tests.nets.numpy_nets import classify

TINY = {"num_outputs": 5, "blocks_per_group": 1, "channel_multiplier": 2}


def forward(x, label, params=None, **options):
    net = WideResNet(**{**TINY, **options})
    params = weights(net, x, label) if params is None else params
    return jax.jit(net.apply, compiler_options=QUICK)(params, x, label), params


@pytest.mark.parametrize("blocks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_forward_pass(blocks):
    x, label = batch(3, 8, 12)
    got, params = forward(x, label, blocks_per_group=blocks)
    numbers = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"])
    want = classify(numbers, np.asarray(x, np.float64), np.asarray(label, np.float64), blocks)
    assert want.shape == (3, 5)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_channels_are_normalised_where_asked():
    x, label = batch(2)
    mean, std = np.array([0.3, -0.2, 0.1]), np.array([0.5, 0.7, 2.0])
    want, params = forward(jnp.asarray((np.asarray(x) - mean) / std, jnp.float32), label)
    got, _ = forward(x, label, params, channel_mean=list(mean), channel_std=list(std))
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    plain, _ = forward(x, label, params)
    assert np.abs(plain - want).max() > 1e-2


def test_contrast_and_brightness_do_not_matter_but_the_noise_level_does():
    x, label = batch(2)
    want, params = forward(x, label)
    got, _ = forward(30 * x - 7, label, params)
    np.testing.assert_allclose(got, want, atol=1e-4)
    other, _ = forward(x, 1.3 * label, params)
    assert np.abs(other - want).max() > 1e-2


def test_a_constant_image_has_finite_logits_and_gradients():
    x, label = jnp.zeros((1, 8, 8, 3)), jnp.ones((1,))
    net = WideResNet(**TINY)
    params = weights(net, x, label)
    grad = jax.jit(jax.grad(lambda x: net.apply(params, x, label).sum()), compiler_options=QUICK)(x)
    assert np.all(np.isfinite(grad))


def test_parameter_names():
    """The names of the reference code: what an import copies to."""
    x = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    params = jax.eval_shape(WideResNet(**TINY).init, jax.random.key(0), x, jnp.ones((1,)))["params"]
    tops = {"GaussianFourierProjection_0", "init_conv", "pre-pool-bn", "Dense_0", "Dense_1"}
    assert set(params) == tops | {"Dense_2"} | {f"WideResnetGroup_{i}" for i in range(3)}
    leaves = flatten_dict(params, sep="/")
    assert leaves["WideResnetGroup_1/WideResnetBlock_0/conv1/kernel"].shape == (3, 3, 32, 64)
    assert leaves["WideResnetGroup_1/WideResnetBlock_0/init_bn/scale"].shape == (32,)
    assert leaves["WideResnetGroup_2/WideResnetBlock_0/Dense_0/kernel"].shape == (512, 128)
    assert "init_conv/bias" not in leaves


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_outputs": 0}, "num_outputs must be at least 1"),
        ({"channel_std": (1.0, 0.0, 1.0)}, "channel_std must be positive"),
        ({"dtype": jnp.int32}, "dtype"),
        ({"fourier_scale": 0.0}, "fourier_scale must be positive"),
    ],
)
def test_options_that_cannot_be_used_raise_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        WideResNet(**options)


def test_inputs_that_do_not_fit_raise():
    x, label = batch()

    def init(x=x, label=label, **options):
        net = WideResNet(**{**TINY, **options})
        jax.eval_shape(lambda key: net.init(key, x, label), jax.random.key(0))

    with pytest.raises(ValueError, match="divisible by 4; got 6 x 8"):
        init(x[:, :6])
    with pytest.raises(ValueError, match="label must be positive"):
        init(label=np.float32(0))
    with pytest.raises(ValueError, match="channel_mean must have one value a channel of x, 3"):
        init(channel_mean=(0.5,))
