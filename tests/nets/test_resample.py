"""The polyphase filters against zero insertion, padding and convolution written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.nets import resample
from tests.nets import numpy_ncsnpp as truth

# Symmetric and not, odd and even, shorter than a phase and longer than the image.
KERNELS = [(1, 3, 3, 1), (1, 1), (1,), (1, 2, 1), (1, 2, 3, 5), (3, 1, 4, 1, 5, 9), (1,) * 9]


def image(rng, channels=3):
    return rng.standard_normal((2, 6, 4, channels)).astype(np.float32)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_filters_equal_their_definitions(rng, kernel):
    x = image(rng)
    np.testing.assert_allclose(
        resample.fir_upsample(jnp.asarray(x), kernel), truth.fir_up(x, kernel), atol=2e-6
    )
    np.testing.assert_allclose(
        resample.fir_downsample(jnp.asarray(x), kernel), truth.fir_down(x, kernel), atol=2e-6
    )


@pytest.mark.parametrize("kernel", [(1, 3, 3, 1), (1, 2, 3, 5), (3, 1, 4, 1, 5, 9)], ids=str)
def test_fused_convolutions_equal_their_definitions(rng, kernel):
    x = image(rng)
    weight = rng.standard_normal((3, 3, 3, 5)).astype(np.float32)
    got = resample.conv_upsample(jnp.asarray(x), jnp.asarray(weight), kernel)
    np.testing.assert_allclose(got, truth.conv_up(x, weight, kernel), atol=2e-5)
    got = resample.conv_downsample(jnp.asarray(x), jnp.asarray(weight), kernel)
    np.testing.assert_allclose(got, truth.conv_down(x, weight, kernel), atol=2e-5)


def test_a_filter_turned_round_is_told_apart(rng):
    x = image(rng)
    turned = resample.fir_upsample(jnp.asarray(x), (5, 3, 2, 1))
    assert np.abs(turned - truth.fir_up(x, (1, 2, 3, 5))).max() > 0.1


def test_nearest_and_mean_are_the_filter_of_ones(rng):
    x = image(rng)
    np.testing.assert_allclose(
        resample.nearest_upsample(jnp.asarray(x)), x.repeat(2, 1).repeat(2, 2), rtol=1e-6
    )
    np.testing.assert_allclose(
        resample.mean_downsample(jnp.asarray(x)),
        x.reshape(2, 3, 2, 2, 2, 3).mean((2, 4)),
        atol=1e-6,
    )


def test_a_constant_shrinks_at_the_edges_only():
    ones = jnp.ones((1, 8, 8, 1))
    up = np.asarray(resample.fir_upsample(ones, (1, 3, 3, 1)))[0, :, :, 0]
    down = np.asarray(resample.fir_downsample(ones, (1, 3, 3, 1)))[0, :, :, 0]
    edge = np.array([0.75] + [1.0] * 14 + [0.75])
    np.testing.assert_allclose(up, np.outer(edge, edge), rtol=1e-6)
    edge = np.array([0.875, 1.0, 1.0, 0.875])
    np.testing.assert_allclose(down, np.outer(edge, edge), rtol=1e-6)


def test_down_after_up_keeps_a_smooth_image():
    grid = np.arange(16)[:, None] / 16 * np.pi
    x = jnp.asarray((np.sin(grid) * np.sin(grid.T))[None, :, :, None], jnp.float32)
    back = resample.fir_downsample(resample.fir_upsample(x, (1, 3, 3, 1)), (1, 3, 3, 1))
    assert float(jnp.max(jnp.abs(back - x)[:, 1:-1, 1:-1])) < 0.03


def test_the_type_is_kept(rng):
    x = jnp.asarray(image(rng), jnp.bfloat16)
    assert resample.fir_upsample(x, (1, 3, 3, 1)).dtype == jnp.bfloat16
    assert resample.fir_downsample(x, (1, 3, 3, 1)).dtype == jnp.bfloat16


def test_no_convolution_stands_behind_the_filter():
    """The speed rests on this: shifts and sums only, forward and backward."""
    x = jnp.ones((1, 8, 8, 4))

    def round_trip(x):
        return jnp.sum(
            resample.fir_downsample(resample.fir_upsample(x, (1, 3, 3, 1)), (1, 3, 3, 1))
        )

    assert "conv_general_dilated" not in str(jax.make_jaxpr(jax.grad(round_trip))(x))


def test_what_cannot_be_halved_or_normalised_raises():
    with pytest.raises(ValueError, match="even height and width; got 5 x 4"):
        resample.fir_downsample(jnp.ones((1, 5, 4, 1)), (1, 1))
    for kernel in ((), (0, 0), (1, -1)):
        with pytest.raises(ValueError, match="positive sum"):
            resample.normalised(kernel)
