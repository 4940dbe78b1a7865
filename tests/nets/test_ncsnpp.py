"""NCSNpp: sizes, names, dropout, conditions, precision, memory, refusals."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from diffjax.nets import NCSNpp
from tests.nets.common import QUICK, batch, small, weights

DDPMPP = {"fir": False, "progressive_input": "none", "embedding_type": "positional"}
LARGE = {"num_res_blocks": 2, "progressive": "output_skip", "progressive_input": "input_skip"}

# The published networks: parameters counted from the authors' code.
COUNTS = {
    "DDPM++": (61_804_419, 32, DDPMPP),
    "DDPM++ deep": (106_632_579, 32, {**DDPMPP, "num_res_blocks": 8}),
    "NCSN++ positional": (62_693_251, 32, {"embedding_type": "positional"}),
    "NCSN++ positional deep": (
        107_521_411,
        32,
        {"embedding_type": "positional", "num_res_blocks": 8},
    ),
    "NCSN++ continuous": (62_758_915, 32, {}),
    "NCSN++ continuous deep": (107_587_075, 32, {"num_res_blocks": 8}),
    "NCSN++ 256": (65_574_549, 256, {**LARGE, "ch_mult": (1, 1, 2, 2, 2, 2, 2)}),
    "NCSN++ 1024": (
        105_785_896,
        1024,
        {**LARGE, "nf": 16, "num_res_blocks": 1, "ch_mult": (1, 2, 4, 8, 16, 32, 32, 32)},
    ),
}


def shapes(net, size=8):
    x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    label = jax.ShapeDtypeStruct((1,), jnp.float32)
    return jax.eval_shape(net.init, jax.random.key(0), x, label)["params"]


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_of_the_published_networks(name):
    count, size, options = COUNTS[name]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes(NCSNpp(**options), size))) == count


def test_parameter_names_of_the_published_network():
    """The names of the released checkpoints: what an import copies to."""
    params = shapes(NCSNpp(), 32)
    kinds = {
        "GaussianFourierProjection": 1,
        "Dense": 2,
        "Conv": 2,
        "ResnetBlockBigGANpp": 44,
        "AttnBlockpp": 6,
        "Downsample": 3,
        "GroupNorm": 1,
    }
    assert set(params) == {f"{kind}_{i}" for kind, n in kinds.items() for i in range(n)}
    leaves = flatten_dict(params, sep="/")
    assert leaves["Downsample_1/Conv2d_0/weight"].shape == (3, 3, 128, 256)
    assert leaves["ResnetBlockBigGANpp_33/Conv_0/kernel"].shape == (3, 3, 512, 256)
    assert leaves["ResnetBlockBigGANpp_9/Conv_2/kernel"].shape == (1, 1, 256, 256)
    assert leaves["AttnBlockpp_0/NIN_3/W"].shape == (256, 256)
    assert leaves["GaussianFourierProjection_0/W"].shape == (128,)
    assert "ResnetBlockDDPMpp_1/NIN_0/W" in flatten_dict(
        shapes(small(resblock_type="ddpm")), sep="/"
    )


def test_initial_values():
    """Uniform fan-average kernels, zero biases, nearly zero last layers, N(0, 16^2) frequencies."""
    net = small(nf=32, ch_mult=(1,), attn_resolutions=())
    x, label = batch()
    out, variables = jax.jit(net.init_with_output, compiler_options=QUICK)(
        jax.random.key(0), x, label
    )
    params = variables["params"]
    block = params["ResnetBlockBigGANpp_1"]
    kernel = np.asarray(block["Conv_0"]["kernel"])
    bound = np.sqrt(3 / (9 * (kernel.shape[2] + kernel.shape[3]) / 2))
    assert 0.98 * bound < np.abs(kernel).max() <= bound
    assert abs(kernel.std() / (bound / np.sqrt(3)) - 1) < 0.03
    assert np.abs(block["Conv_1"]["kernel"]).max() < 1e-5
    assert np.abs(block["Conv_1"]["kernel"]).max() > 0
    nin = np.asarray(params["AttnBlockpp_0"]["NIN_0"]["W"])
    assert abs(nin.std() / np.sqrt(0.1 / nin.shape[0]) - 1) < 0.05
    assert abs(np.std(params["GaussianFourierProjection_0"]["W"]) / 16 - 1) < 0.5
    assert not np.any(block["Conv_0"]["bias"])
    assert float(jnp.max(jnp.abs(out))) < 1e-3


@pytest.fixture(scope="module")
def made():
    """One network with its random weights and one compiled function for each mode."""
    net = small(dropout=0.5)
    x, label = batch(size=4)
    params = weights(net, x, label)

    def train(params, x, label, key):
        return net.apply(params, x, label, train=True, rngs={"dropout": key})

    quick = partial(jax.jit, compiler_options=QUICK)
    return net, params, quick(net.apply), quick(train)


def test_dropout_acts_in_training_only(made):
    _, params, apply, train = made
    x, label = batch(size=4)
    plain, first = apply(params, x, label), train(params, x, label, jax.random.key(0))
    assert not np.allclose(first, plain, atol=1e-3)
    assert not np.allclose(first, train(params, x, label, jax.random.key(1)), atol=1e-3)
    np.testing.assert_array_equal(first, train(params, x, label, jax.random.key(0)))
    np.testing.assert_array_equal(apply(params, x, label), plain)


def test_a_sample_does_not_depend_on_its_neighbours(made):
    _, params, apply, train = made
    x, label = batch(size=4)
    other = x.at[2:].set(-x[2:])
    for call, key in ((apply, ()), (train, (jax.random.key(3),))):
        whole = call(params, x, label, *key)
        np.testing.assert_array_equal(whole[:2], call(params, other, label, *key)[:2])
        part = call(params, x[:2], label[:2], *key)
        np.testing.assert_allclose(whole[:2], part, rtol=1e-4, atol=1e-5)


def test_one_label_for_all_and_vmap(made):
    net, params, apply, _ = made
    x, _ = batch(size=4)
    want = apply(params, x, jnp.full((4,), 0.7))
    np.testing.assert_allclose(apply(params, x, jnp.float32(0.7)), want, rtol=1e-5, atol=1e-6)
    mapped = jax.jit(
        jax.vmap(lambda one: net.apply(params, one, jnp.float32(0.7))), compiler_options=QUICK
    )(x)
    np.testing.assert_allclose(mapped, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_forward_and_reverse_derivatives_agree(made):
    net, params, _, _ = made
    x, label = batch(size=4)
    v = jax.random.normal(jax.random.key(5), x.shape)

    @partial(jax.jit, compiler_options=QUICK)
    def both(x):
        out, tangent = jax.jvp(lambda x: net.apply(params, x, label), (x,), (v,))
        grad = jax.vjp(lambda x: net.apply(params, x, label), x)[1](out)[0]
        return jnp.vdot(grad, v), jnp.vdot(out, tangent)

    np.testing.assert_allclose(*both(x), rtol=1e-4)


def test_bfloat16_keeps_parameters_and_result_in_float32(made):
    _, params, apply, _ = made
    x, label = batch(size=4)
    low = small(dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes(low))} == {jnp.dtype("float32")}
    got, want = (
        jax.jit(low.apply, compiler_options=QUICK)(params, x, label),
        apply(params, x, label),
    )
    assert got.dtype == jnp.float32
    gap = float(jnp.sqrt(jnp.mean((got - want) ** 2) / jnp.mean(want**2)))
    assert 1e-4 < gap < 0.03


def test_float64_where_asked_for(x64):
    net = small(dtype=jnp.float64)
    x = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float64)
    label = jax.ShapeDtypeStruct((), jnp.float32)
    out, params = jax.eval_shape(net.init_with_output, jax.random.key(0), x, label)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert out.dtype == jnp.float64


def step(net, params, x, label):
    """Compiles the gradient of a squared error in training mode."""

    def loss(params):
        out = net.apply(params, x, label, train=True, rngs={"dropout": jax.random.key(7)})
        return jnp.mean((out - x) ** 2)

    return jax.jit(jax.grad(loss)).lower(params).compile()


@pytest.mark.slow
def test_remat_saves_memory_and_changes_nothing():
    options = {"ch_mult": (1,), "num_res_blocks": 3, "attn_resolutions": (), "dropout": 0.2}
    x, label = batch(size=8)
    params = weights(small(**options), x, label)
    plain, remat = (step(small(remat=flag, **options), params, x, label) for flag in (False, True))
    for a, b in zip(jax.tree.leaves(plain(params)), jax.tree.leaves(remat(params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5)
    before, after = (c.memory_analysis().temp_size_in_bytes for c in (plain, remat))
    assert after < 0.75 * before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resblock_type": "resnet"}, "resblock_type must be one of 'ddpm', 'biggan'"),
        ({"progressive": "input_skip"}, "progressive must be one of"),
        ({"progressive_input": "skip"}, "progressive_input must be one of"),
        ({"progressive_combine": "mean"}, "progressive_combine must be one of"),
        ({"embedding_type": "sine"}, "embedding_type must be one of"),
        ({"progressive_combine": "cat"}, "'cat' is used by progressive_input='input_skip' only"),
        ({"resamp_with_conv": False}, "no meaning for resblock_type='biggan'"),
        ({"num_classes": 3, "conditional": False}, "needs conditional=True"),
        (
            {"scale_by_sigma": True, "embedding_type": "positional", "sigma_min": 0.01},
            "give sigma_max, num_scales as well",
        ),
        ({"scale_by_sigma": True, "num_scales": 10}, "the label of a 'fourier' network is sigma"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"ch_mult": ()}, "ch_mult"),
        ({"ch_mult": (1, 0)}, "ch_mult"),
        ({"num_res_blocks": 0}, "num_res_blocks"),
        ({"fir_kernel": (1, -1)}, "fir_kernel"),
        ({"num_classes": 0}, "num_classes"),
        ({"dtype": jnp.int32}, "dtype"),
    ],
)
def test_options_that_cannot_be_used_raise_at_construction(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        small(**options)


def test_inputs_that_do_not_fit_raise():
    x, label = batch()

    def init(net, x=x, label=label, cond=None):
        return jax.eval_shape(net.init, jax.random.key(0), x, label, cond)

    with pytest.raises(ValueError, match="divisible by 2; got 7 x 8"):
        init(small(), x[:, :7])
    with pytest.raises(ValueError, match=r"heights of the levels, here \[8, 4\]; got \[16\]"):
        init(small(attn_resolutions=(16,)))
    with pytest.raises(ValueError, match=r"label must have shape \(\) or \(2,\)"):
        init(small(), label=jnp.ones((3,)))
    with pytest.raises(ValueError, match="shape"):
        init(small(), x[0, 0])
    with pytest.raises(ValueError, match="if and only if num_classes is set"):
        init(small(num_classes=3))
    with pytest.raises(ValueError, match="if and only if num_classes is set"):
        init(small(), cond=jnp.zeros((2,), int))
    with pytest.raises(ValueError, match=r"cond must lie in \[-1, 2\]"):
        net = small(num_classes=3)
        jax.eval_shape(lambda key: net.init(key, x, label, np.array([0, 3])), jax.random.key(0))
    with pytest.raises(ValueError, match="9 channels do not split"):
        init(small(nf=9))


def test_an_image_as_high_as_an_attention_level_gets_attention_there():
    """Heights decide, not widths."""
    x, label = batch(height=8, width=16)
    names = jax.eval_shape(small(attn_resolutions=(8,)).init, jax.random.key(0), x, label)["params"]
    at_height = [name for name in names if name.startswith("AttnBlockpp")]
    assert len(at_height) == 3  # one block down, the middle, one up
