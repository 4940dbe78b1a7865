"""NCSN and NCSNv2: their forward passes in both of their codes, their names, their refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from diffjax.nets import NCSN, NCSNv2, refine
from tests.nets.common import ACTIVATIONS, QUICK, batch, weights
from tests.nets.numpy_nets import RefineNet, interpolate

SCALES = {"scale_by_sigma": True, "sigma_min": 0.01, "sigma_max": 50.0}
DILATIONS = {64: (1, 1, 2, 4), 128: (1, 1, 1, 2, 4), 256: (1, 1, 1, 1, 2, 4)}


def compare(family, *, resolution=64, centered=True, size=8, **options):
    """Our float32 forward pass and NumPy's float64 one on the same random weights."""
    activation = options.pop("nonlinearity", "elu")
    if family is NCSNv2:
        options["resolution"] = resolution
    net = family(nf=8, nonlinearity=ACTIVATIONS[activation], centered=centered, **options)
    x, _ = batch(2, size, size + 8)
    label = jnp.asarray([4.0, 1.0])
    params = weights(net, x, label)
    got = np.asarray(jax.jit(net.apply, compiler_options=QUICK)(params, x, label))
    numbers = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"])
    levels = net.num_scales if family is NCSN else None
    reference = RefineNet(numbers, activation, net.variant, DILATIONS[resolution], levels)
    image = np.asarray(x, np.float64)
    want = reference(image if centered else 2 * image - 1, np.array([4, 1]))
    if net.scale_by_sigma:
        sigmas = np.geomspace(net.sigma_max, net.sigma_min, net.num_scales)
        want = want / sigmas[[4, 1], None, None, None]
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"variant": "torch"},
        pytest.param({"centered": False, "nonlinearity": "relu"}, marks=pytest.mark.slow),
        {"resolution": 128, **SCALES, "num_scales": 6},
        pytest.param({"resolution": 256, "size": 16}, marks=pytest.mark.slow),
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_forward_pass_of_ncsnv2(options):
    compare(NCSNv2, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"num_scales": 7},
        pytest.param(
            {"num_scales": 5, "variant": "torch", **SCALES, "centered": False},
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda options: "-".join(options),
)
def test_forward_pass_of_ncsn(options):
    compare(NCSN, **options)


@pytest.mark.parametrize("variant", ["jax", "torch"])
@pytest.mark.parametrize("old", [(3, 5), (1, 4)], ids=str)
def test_resize_equals_its_definition(rng, variant, old):
    x = rng.standard_normal((2, *old, 3)).astype(np.float32)
    new = (2 * old[0], 2 * old[1])
    resize = jax.jit(refine.resize, static_argnums=(1, 2), compiler_options=QUICK)
    got = resize(jnp.asarray(x), new, variant)
    np.testing.assert_allclose(got, interpolate(x, new, variant == "torch"), atol=1e-6)


def test_instance_norm_plus_brings_the_means_back(rng):
    """Plain instance normalisation would forget them: contrast between channels stays, by alpha."""
    x = jnp.asarray(rng.standard_normal((2, 6, 6, 8)) + 3 * np.arange(8), jnp.float32)
    ones = {name: jnp.ones((1, 1, 1, 8)) for name in ("alpha", "gamma")}
    y = refine.InstanceNorm2dPlus().apply({"params": {**ones, "beta": jnp.zeros((1, 1, 1, 8))}}, x)
    means = np.asarray(y).mean((1, 2))
    np.testing.assert_allclose(means.mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(means.std(1), 1, atol=1e-3)
    np.testing.assert_allclose(np.asarray(y).std((1, 2)), 1, atol=1e-3)


def shapes(net, size=8):
    x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return jax.eval_shape(net.init, jax.random.key(0), x, jnp.ones((1,)))["params"]


def test_parameter_names():
    """The names of the reference code: what an import copies to."""
    unconditional = shapes(NCSNv2(nf=8))
    kinds = {"Conv": 2, "ResidualBlock": 8, "RefineBlock": 4, "InstanceNorm2dPlus": 1}
    assert set(unconditional) == {f"{kind}_{i}" for kind, n in kinds.items() for i in range(n)}
    leaves = flatten_dict(unconditional, sep="/")
    assert leaves["RefineBlock_0/RCUBlock_1/Conv_1/kernel"].shape == (3, 3, 16, 16)
    assert leaves["RefineBlock_3/RCUBlock_2/Conv_5/kernel"].shape == (3, 3, 8, 8)
    assert leaves["RefineBlock_1/MSFBlock_0/Conv_1/bias"].shape == (16,)
    assert "RefineBlock_0/MSFBlock_0/Conv_0/kernel" not in leaves
    assert leaves["ResidualBlock_2/ConvMeanPool_1/Conv_0/kernel"].shape == (1, 1, 8, 16)
    assert leaves["ResidualBlock_4/Conv_2/kernel"].shape == (3, 3, 16, 16)
    assert leaves["InstanceNorm2dPlus_0/gamma"].shape == (1, 1, 1, 8)

    leaves = flatten_dict(shapes(NCSN(nf=8, num_scales=5)), sep="/")
    table = "ConditionalInstanceNorm2dPlus_{}/Embed_0/embedding"
    refine_block = "CondRefineBlock_1"
    assert leaves[f"ConditionalResidualBlock_0/{table.format(1)}"].shape == (5, 24)
    assert leaves[f"{refine_block}/CondRCUBlock_2/{table.format(1)}"].shape == (5, 48)
    assert leaves[f"{refine_block}/CondMSFBlock_0/{table.format(1)}"].shape == (5, 48)
    assert leaves[f"{refine_block}/CondCRPBlock_0/{table.format(1)}"].shape == (5, 48)


def test_initial_values():
    """Weights and biases U(-b, b) with b = fan_in^{-1/2}; scales N(1, 0.02^2), shifts zero."""
    style = refine.Style(jax.nn.elu, 50, "jax", jnp.float32)
    block = refine.ResidualBlock(32, False, 2, style)
    init = jax.jit(block.init, compiler_options=QUICK)
    params = init(jax.random.key(0), jnp.ones((1, 4, 4, 32)), jnp.zeros((1,), int))["params"]
    for name in ("kernel", "bias"):
        values = np.asarray(params["Conv_0"][name]) * np.sqrt(9 * 32)
        assert np.abs(values).max() <= 1
        assert np.abs(values).max() > 0.9
        assert abs(values.std() * np.sqrt(3) - 1) < (0.05 if name == "kernel" else 0.25)
    table = np.asarray(params["ConditionalInstanceNorm2dPlus_0"]["Embed_0"]["embedding"])
    assert abs(table[:, :64].mean() - 1) < 4 * 0.02 / np.sqrt(3200)
    assert abs(table[:, :64].std() / 0.02 - 1) < 0.1
    assert not table[:, 64:].any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NCSNv2(resolution=32), "resolution must be one of 64, 128, 256; got 32"),
        (lambda: NCSNv2(variant="tf"), "variant must be one of 'jax', 'torch'"),
        (lambda: NCSNv2(scale_by_sigma=True), "give sigma_min, sigma_max, num_scales as well"),
        (lambda: NCSN(sigma_min=0.01), "sigma_min of this network are used by"),
        (lambda: NCSN(num_scales=1), "num_scales must be at least 2"),
        (lambda: NCSN(nf=0), "nf must be at least 1"),
        (lambda: NCSN(dtype=jnp.int32), "dtype"),
    ],
)
def test_options_that_cannot_be_used_raise_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_inputs_that_do_not_fit_raise():
    with pytest.raises(ValueError, match="divisible by 8; got 12 x 12"):
        shapes(NCSNv2(nf=8, resolution=256), 12)
    with pytest.raises(ValueError, match="divisible by 2; got 7 x 7"):
        shapes(NCSN(nf=8), 7)
    x, label = batch()
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="cond must be None"):
        jax.eval_shape(lambda key: NCSNv2(nf=8).init(key, x, label, np.array([0, 1])), key)
    with pytest.raises(ValueError, match=r"label must lie in \[0, 9\]"):
        jax.eval_shape(lambda key: NCSN(nf=8).init(key, x, np.float32(10)), key)
