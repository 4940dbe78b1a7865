"""What every image network promises: sizes as published, and the laws of batch, type and gradient.

NCSNpp has tables and tests of its own in `test_ncsnpp`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.nets import DDPM, NCSN, NCSNv2, WideResNet
from tests.nets.common import QUICK, batch, weights

LARGE = {"ch_mult": (1, 1, 2, 2, 4, 4)}
HO = {"up_attention": "block", "nin_init_scale": 1.0}

# The published networks: parameters counted from the authors' codes.
COUNTS = {
    "DDPM": (35_218_947, 32, DDPM()),
    "DDPM unconditional": (32_329_347, 32, DDPM(conditional=False)),
    "DDPM 256": (111_569_923, 256, DDPM(**LARGE)),
    "DDPM as Ho et al.": (35_746_307, 32, DDPM(**HO)),
    "NCSN 10": (34_428_675, 32, NCSN(num_scales=10)),
    "NCSN 232": (44_828_931, 32, NCSN(num_scales=232)),
    "NCSN 500": (57_384_195, 64, NCSN(num_scales=500)),
    "NCSN original": (30_117_635, 32, NCSN(variant="torch")),
    "NCSNv2 64": (33_970_563, 64, NCSNv2()),
    "NCSNv2 128": (83_445_379, 128, NCSNv2(resolution=128)),
    "NCSNv2 64 original": (29_694_083, 64, NCSNv2(variant="torch")),
    "NCSNv2 128 original": (83_445_379, 128, NCSNv2(resolution=128, variant="torch")),
    "NCSNv2 256": (94_132_611, 256, NCSNv2(resolution=256)),
    "WideResNet": (38_913_242, 32, WideResNet()),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_of_the_published_networks(name):
    count, size, net = COUNTS[name]
    x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    out, variables = jax.eval_shape(net.init_with_output, jax.random.key(0), x, jnp.ones((1,)))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == count
    assert out.shape == ((1, 10) if isinstance(net, WideResNet) else x.shape)


SCALES = {"scale_by_sigma": True, "sigma_min": 0.5, "sigma_max": 5.0, "num_scales": 10}
MEMBERS = {
    "ddpm": partial(
        DDPM,
        nf=32,
        ch_mult=(1, 1),
        num_res_blocks=1,
        attn_resolutions=(4,),
        dropout=0.5,
        **SCALES,
    ),
    "ncsn": partial(NCSN, nf=8),
    "ncsnv2": partial(NCSNv2, nf=8, **SCALES),
    "classifier": partial(WideResNet, blocks_per_group=1, channel_multiplier=2),
}
quick = partial(jax.jit, compiler_options=QUICK)


def slow(*names):
    """The members of this table, these of them in the slow lane."""
    return [pytest.param(n, marks=pytest.mark.slow) if n in names else n for n in MEMBERS]


@pytest.fixture(scope="module", params=slow("ncsn", "ncsnv2"))
def made(request):
    """A network of each family, its random weights and its compiled function."""
    make = MEMBERS[request.param]
    net = make()
    x, label = batch(size=4)
    params = weights(net, x, label)
    return make, params, quick(net.apply)


def test_a_sample_does_not_depend_on_its_neighbours(made):
    _, params, apply = made
    x, label = batch(size=4)
    whole = apply(params, x, label)
    other = apply(params, x.at[2:].set(-x[2:]), label)
    np.testing.assert_array_equal(whole[:2], other[:2])
    assert np.abs(whole[2:] - other[2:]).max() > 1e-2


def test_one_label_for_all_and_vmap(made):
    make, params, apply = made
    x, _ = batch(size=4)
    want = apply(params, x, jnp.full((4,), 2.0))
    mapped = quick(jax.vmap(lambda one: make().apply(params, one, jnp.float32(2))))(x)
    assert mapped.shape == want.shape
    np.testing.assert_allclose(mapped, want, rtol=1e-4, atol=1e-5)


def test_bfloat16_keeps_parameters_and_result_in_float32(made):
    make, params, apply = made
    x, label = batch(size=4)
    low = make(dtype=jnp.bfloat16)
    variables = jax.eval_shape(low.init, jax.random.key(0), x, label)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    got, want = quick(low.apply)(params, x, label), apply(params, x, label)
    assert got.dtype == jnp.float32
    gap = float(jnp.sqrt(jnp.mean((got - want) ** 2) / jnp.mean(want**2)))
    assert 1e-4 < gap < 0.05


@pytest.mark.parametrize("member", MEMBERS)
def test_float64_where_asked_for(x64, member):
    net = MEMBERS[member](dtype=jnp.float64)
    x = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float64)
    label = jax.ShapeDtypeStruct((), jnp.float32)
    out, params = jax.eval_shape(net.init_with_output, jax.random.key(0), x, label)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert out.dtype == jnp.float64


@pytest.mark.slow
@pytest.mark.parametrize("member", MEMBERS)
def test_gradients_are_finite_and_the_same_when_recomputed(member):
    make = MEMBERS[member]
    x, label = batch(size=4)
    params = weights(make(), x, label)
    rngs = {"dropout": jax.random.key(7)}

    def gradient(remat):
        def loss(params):
            out = make(remat=remat).apply(params, x, label, train=True, rngs=rngs)
            return jnp.mean(jnp.square(out))

        return quick(jax.grad(loss))(params)

    plain, remat = gradient(False), gradient(True)
    frozen = 0
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(plain), jax.tree.leaves(remat), strict=True
    ):
        assert np.all(np.isfinite(a)), path
        frozen += not np.any(a)
        scale = float(jnp.abs(a).max())
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4 * scale + 1e-7)
    # All parameters take part, but for the Fourier frequencies.
    assert frozen == (1 if isinstance(make(), WideResNet) else 0)


def test_dropout_acts_in_training_only():
    net = MEMBERS["ddpm"]()
    x, label = batch(size=4)
    params = weights(net, x, label)
    train = quick(lambda key: net.apply(params, x, label, train=True, rngs={"dropout": key}))
    first = train(jax.random.key(0))
    assert not np.allclose(first, train(jax.random.key(1)), atol=1e-3)
    np.testing.assert_array_equal(first, train(jax.random.key(0)))
    assert "random_bits" not in str(jax.make_jaxpr(net.apply)(params, x, label))


@pytest.mark.parametrize("member", ["ncsn", "classifier"])
def test_without_dropout_training_needs_no_key_and_changes_nothing(member):
    net = MEMBERS[member]()
    x, label = batch(size=2)
    variables = jax.eval_shape(net.init, jax.random.key(0), x, label)

    def trace(train):
        return str(
            jax.make_jaxpr(lambda params: net.apply(params, x, label, train=train))(variables)
        )

    assert trace(True) == trace(False)
