"""Gain, shift, activation and dropout in one pass, and products in half precision."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy.special import expit

from diffjax.nets.blocks import attend
from diffjax.nets.ncsnpp import NCSNpp
from diffjax.nets.pointwise import affine_act, dropout_mask
from diffjax.runs.counting import inner_jaxprs


def equations(jaxpr):
    """All equations, also of jaxprs within."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in inner_jaxprs(eqn.params):
            yield from equations(inner)


@pytest.mark.parametrize("dropped", [False, True])
def test_value_and_gradients_are_those_of_the_formulas(rng, dropped):
    """Eqs. (1) to (3) in NumPy, with the derivative of x sigmoid(x) worked out by hand."""
    x, dy = rng.standard_normal((2, 3, 4, 5, 6)).astype(np.float32)
    gain, shift = rng.standard_normal((2, 3, 1, 1, 6)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 3)
    mask = dropout_mask(keys, (4, 5, 6), 0.4) if dropped else None

    def call(x, gain, shift):
        return affine_act(x, gain, shift, act=nn.silu, mask=mask, dtype=jnp.float32)

    y, pull = jax.vjp(call, x, gain, shift)
    got = pull(jnp.asarray(dy))
    z = x.astype(float) * gain + shift
    m = np.asarray(mask(jnp.ones(x.shape))) if dropped else 1.0
    assert not dropped or 0.2 < np.mean(m == 0) < 0.6
    np.testing.assert_allclose(y, m * z * expit(z), atol=1e-5)
    dz = m * (expit(z) + z * expit(z) * (1 - expit(z))) * dy
    want = (dz * gain, (dz * x).sum((1, 2), keepdims=True), dz.sum((1, 2), keepdims=True))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)

    along = [jnp.asarray(v) for v in rng.standard_normal((1, 3, 4, 5, 6)).astype(np.float32)]
    _, change = jax.jvp(lambda x: call(x, gain, shift), (x,), tuple(along))
    np.testing.assert_allclose(jnp.vdot(change, dy), jnp.vdot(along[0], got[0]), rtol=1e-4)


def test_between_its_two_passes_the_gradient_is_in_the_networks_type():
    """Of the arrays as large as x, what is stored behind a barrier."""
    x, vector = jnp.zeros((2, 4, 4, 8), jnp.bfloat16), jnp.ones((2, 1, 1, 8))

    def loss(x, gain, shift):
        y = affine_act(x, gain, shift, act=nn.silu, mask=None, dtype=jnp.bfloat16)
        return jnp.sum(y.astype(jnp.float32))

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(x, vector, vector).jaxpr
    barriers = [e for e in equations(jaxpr) if e.primitive.name == "optimization_barrier"]
    stored = [v.aval.dtype for e in barriers for v in e.outvars if v.aval.shape == x.shape]
    assert stored and set(stored) == {jnp.dtype("bfloat16")}


def test_a_hash_decides_on_four_values():
    """64 bits of each: the words drawn are those of a quarter of the rows, rounded up."""

    def drawn(rows):
        keys = jax.random.split(jax.random.key(0), 2)
        jaxpr = jax.make_jaxpr(lambda: dropout_mask(keys, (rows, 5, 6), 0.1).parts)().jaxpr
        splits = [e for e in equations(jaxpr) if e.primitive.name == "random_split"]
        return splits[-1].outvars[0].aval.shape

    assert drawn(8) == (2, 2, 5, 6)
    assert drawn(9) == (2, 3, 5, 6)


def test_products_of_a_bfloat16_network_stay_in_bfloat16():
    """Forwards and backwards, but for the matrices of the label's embedding."""
    net = NCSNpp(nf=8, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(4,), dtype=jnp.bfloat16)
    x, label = jnp.zeros((2, 8, 8, 3)), jnp.ones(2)
    params = jax.eval_shape(net.init, jax.random.key(0), x, label)

    def loss(params):
        y = net.apply(params, x, label, train=True, rngs={"dropout": jax.random.key(1)})
        return jnp.sum(y**2)

    found = Counter()
    for eqn in equations(jax.make_jaxpr(jax.grad(loss))(params).jaxpr):
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            operands = [v.aval for v in eqn.invars]
            if any(a.ndim > 2 for a in operands):
                found[tuple(str(a.dtype) for a in operands)] += 1
    assert set(found) == {("bfloat16", "bfloat16")} and found.total() > 60


def test_attention_in_bfloat16_has_the_gradients_of_float32(rng):
    q, k, v, w = (jnp.asarray(a, jnp.bfloat16) for a in rng.standard_normal((4, 2, 64, 32)))

    def gradients(*args):
        def loss(q, k, v):
            return jnp.sum(attend(q, k, v).astype(jnp.float32) * w)

        return jax.grad(loss, argnums=(0, 1, 2))(*args)

    exact = gradients(*(a.astype(jnp.float32) for a in (q, k, v)))
    for a, b in zip(gradients(q, k, v), exact, strict=True):
        assert a.dtype == jnp.bfloat16
        error = jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)
        assert error < 0.01
