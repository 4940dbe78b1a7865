"""The perceptron: its equations in NumPy, shapes, conditions and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from diffjax.nets import MLP
from tests.nets.common import weights


def swish(v):
    return v * expit(v)


def forward(params, x, label, nf, cond=None, classes=0):
    """Equations (1) to (3) of the module, in float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"])
    count = iter(range(100))
    norms = iter(range(100))

    def dense(v):
        layer = p[f"Dense_{next(count)}"]
        return v @ layer["kernel"] + layer["bias"]

    def norm(v):
        layer = p[f"LayerNorm_{next(norms)}"]
        centred = v - v.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return scaled * layer["scale"] + layer["bias"]

    half = nf // 2
    phase = label[:, None] * 10000.0 ** (-np.arange(half) / (half - 1))
    temb = dense(np.concatenate([np.sin(phase), np.cos(phase)], axis=1))
    temb = dense(swish(temb))
    if classes:
        temb = temb + np.sqrt(classes) * p["ClassDense"]["kernel"][cond]
    temb = swish(temb)
    h = dense(x)
    for _ in range(2):
        r = dense(swish(norm(h)))
        r = r + dense(temb)
        h = h + dense(swish(r))
    return dense(swish(norm(h)))


@pytest.mark.parametrize("classes", [None, 4])
def test_equals_its_equations(rng, classes):
    net = MLP(features=16, num_blocks=2, embed_dim=8, num_classes=classes)
    x = jnp.asarray(rng.standard_normal((5, 2)), jnp.float32)
    label = jnp.linspace(1.0, 900.0, 5)
    cond = None if classes is None else np.array([0, 3, 1, 2, 0])
    params = weights(net, x, label, cond)
    want = forward(params, np.asarray(x), np.asarray(label), 8, cond, classes or 0)
    np.testing.assert_allclose(net.apply(params, x, label, cond), want, rtol=1e-4, atol=1e-4)


def test_shapes_labels_and_vmap(rng):
    net = MLP(features=8, num_blocks=1, embed_dim=8, out_features=3)
    x = jnp.asarray(rng.standard_normal((2, 4, 5)), jnp.float32)
    params = weights(net, x, jnp.ones(()))
    want = net.apply(params, x, jnp.full((2, 4), 7.0))
    assert want.shape == (2, 4, 3)
    np.testing.assert_allclose(net.apply(params, x, jnp.float32(7)), want, rtol=1e-5, atol=1e-6)
    flat = net.apply(params, x.reshape(8, 5), jnp.full((8,), 7.0))
    np.testing.assert_allclose(flat, want.reshape(8, 3), rtol=1e-4, atol=1e-5)
    mapped = jax.vmap(lambda v: net.apply(params, v, jnp.float32(7)))(x.reshape(8, 5))
    np.testing.assert_allclose(mapped, flat, rtol=1e-4, atol=1e-5)
    assert not np.allclose(net.apply(params, x, jnp.float32(600)), want, atol=1e-3)


def test_starts_at_almost_zero_and_takes_sigma():
    net = MLP(features=8, embedding_type="fourier")
    x = jnp.ones((3, 2))
    params = net.init(jax.random.key(0), x, jnp.float32(0.5))
    assert float(jnp.max(jnp.abs(net.apply(params, x, jnp.float32(0.5))))) < 1e-3


def test_refusals():
    x = jnp.ones((3, 2))
    with pytest.raises(ValueError, match="features must be at least 1"):
        MLP(features=0)
    with pytest.raises(ValueError, match="embedding_type"):
        MLP(embedding_type="none")
    with pytest.raises(ValueError, match=r"label must have shape \(\) or \(3,\)"):
        MLP().init(jax.random.key(0), x, jnp.ones((2,)))
    with pytest.raises(ValueError, match="num_classes is set"):
        MLP(num_classes=3).init(jax.random.key(0), x, jnp.ones((3,)))
