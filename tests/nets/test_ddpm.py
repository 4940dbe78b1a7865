"""DDPM: its forward pass in both of its codes, its names, its refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from diffjax.nets import DDPM
from tests.nets.common import ACTIVATIONS, QUICK, batch, weights
from tests.nets.numpy_nets import DDPM as Reference

TINY = {"nf": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,)}
SCALES = {"scale_by_sigma": True, "sigma_min": 0.01, "sigma_max": 50.0, "num_scales": 1000}


def images(size=2):
    return batch(size)[0], jnp.asarray([3.0, 870.0, 41.0])[:size]


def compare(cond=None, size=2, **options):
    """Our float32 forward pass and NumPy's float64 one on the same random weights."""
    activation = options.pop("nonlinearity", "swish")
    net = DDPM(nonlinearity=ACTIVATIONS[activation], **{**TINY, **options})
    x, label = images(size)
    params = weights(net, x, label, cond)
    got = np.asarray(jax.jit(net.apply, compiler_options=QUICK)(params, x, label, cond))
    fields = {name: getattr(net, name) for name in net.__dataclass_fields__}
    numbers = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"])
    reference = Reference(numbers, **{**fields, "nonlinearity": activation})
    want = reference(np.asarray(x, np.float64), np.asarray(label, np.float64), cond)
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"up_attention": "block", "num_res_blocks": 2, "nonlinearity": "elu"},
        pytest.param({"attn_resolutions": (8, 4)}, marks=pytest.mark.slow),
        {"conditional": False, "resamp_with_conv": False},
        {**SCALES, "centered": False},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_forward_pass(options):
    compare(**options)


def test_class_labels_and_no_class():
    compare(cond=np.array([2, -1, 0]), size=3, num_classes=3)


def shapes(**options):
    x = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    net = DDPM(**{**TINY, **options})
    return jax.eval_shape(net.init, jax.random.key(0), x, jnp.ones((1,)))["params"]


def test_parameter_names():
    """The names of the released checkpoints: what an import copies to."""
    kinds = {
        "Dense": 2,
        "Conv": 2,
        "GroupNorm": 1,
        "ResnetBlockDDPM": 8,
        "AttnBlock": 3,
        "Downsample": 1,
        "Upsample": 1,
    }
    params = shapes()
    assert set(params) == {f"{kind}_{i}" for kind, n in kinds.items() for i in range(n)}
    leaves = flatten_dict(params, sep="/")
    assert leaves["Downsample_0/Conv_0/kernel"].shape == (3, 3, 32, 32)
    assert leaves["Upsample_0/Conv_0/kernel"].shape == (3, 3, 64, 64)
    assert leaves["ResnetBlockDDPM_1/NIN_0/W"].shape == (32, 64)
    assert leaves["AttnBlock_0/NIN_3/W"].shape == (64, 64)


def test_initial_scale_of_the_linear_maps():
    """As asked for q, k, v and the shortcut; nearly zero for what ends a block, and the network."""
    x, label = images()
    init = jax.jit(DDPM(**TINY, nin_init_scale=0.5).init, compiler_options=QUICK)
    params = init(jax.random.key(0), x, label)["params"]
    query = np.asarray(params["AttnBlock_0"]["NIN_0"]["W"])
    assert abs(query.std() / np.sqrt(0.5 / 64) - 1) < 0.05
    shortcut = np.asarray(params["ResnetBlockDDPM_1"]["NIN_0"]["W"])
    assert abs(shortcut.std() / np.sqrt(0.5 / 48) - 1) < 0.05
    last = [params["ResnetBlockDDPM_0"]["Conv_1"]["kernel"], params["Conv_1"]["kernel"]]
    for weight in (*last, params["AttnBlock_0"]["NIN_3"]["W"]):
        assert 0 < np.abs(weight).max() < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"up_attention": "all"}, "up_attention must be one of 'level', 'block'"),
        ({"nin_init_scale": -1.0}, "nin_init_scale"),
        ({"dropout": 1.0}, "dropout"),
        ({"num_classes": 3, "conditional": False}, "needs conditional=True"),
        ({"num_scales": 10}, "num_scales of this network are used by scale_by_sigma=True only"),
        ({"scale_by_sigma": True}, "give sigma_min, sigma_max, num_scales as well"),
        ({**SCALES, "sigma_max": 0.001}, "sigma_min must be below sigma_max"),
        ({**SCALES, "sigma_min": 0.0}, "sigma_min must be positive"),
        ({**SCALES, "num_scales": 1}, "num_scales must be at least 2"),
    ],
)
def test_options_that_cannot_be_used_raise_at_construction(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        DDPM(**{**TINY, **options})


def test_inputs_that_do_not_fit_raise():
    with pytest.raises(ValueError, match="48 channels do not split into 32 equal groups"):
        shapes(nf=48)
    with pytest.raises(ValueError, match=r"heights of the levels, here \[8, 4\]; got \[16\]"):
        shapes(attn_resolutions=(16,))
    with pytest.raises(ValueError, match=r"label must lie in \[0, 999\]"):
        x = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
        net = DDPM(**TINY, **SCALES)
        jax.eval_shape(lambda key, x: net.init(key, x, np.float32(1000)), jax.random.key(0), x)
