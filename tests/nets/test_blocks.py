"""The layers against their definitions, and what dropout and recomputation promise."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import chi2

from diffjax.nets.blocks import GroupNorm, attend
from diffjax.nets.embed import positional_embedding
from diffjax.nets.pointwise import dropout_mask
from diffjax.nets.recompute import recompute


@pytest.mark.parametrize("channels", [8, 96, 160])
def test_group_norm_equals_its_definition(rng, channels):
    x = (3 + 2 * rng.standard_normal((2, 4, 3, channels))).astype(np.float32)
    scale, bias = rng.standard_normal((2, channels)).astype(np.float32)
    layer = GroupNorm(act=jnp.tanh)
    got = layer.apply({"params": {"scale": scale, "bias": bias}}, x)
    groups = min(channels // 4, 32)
    g = x.astype(np.float64).reshape(2, -1, groups, channels // groups)
    mean, var = g.mean((1, 3), keepdims=True), g.var((1, 3), keepdims=True)
    want = ((g - mean) / np.sqrt(var + 1e-6)).reshape(x.shape) * scale + bias
    np.testing.assert_allclose(got, np.tanh(want), atol=3e-5)


def test_group_norm_is_float32_inside_bfloat16(rng):
    """Values around 100 have a spacing of 0.5 in bfloat16: statistics in it would be lost."""
    x = jnp.asarray(100 + rng.standard_normal((1, 32, 32, 8)), jnp.bfloat16)
    params = {"params": {"scale": jnp.ones(8), "bias": jnp.zeros(8)}}
    got = GroupNorm(jnp.bfloat16).apply(params, x)
    assert got.dtype == jnp.bfloat16
    want = GroupNorm().apply(params, x.astype(jnp.float32))
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=1e-2, atol=1e-2)


def test_attention_equals_its_definition(rng):
    q, k, v = (4 * rng.standard_normal((3, 2, 6, 5))).astype(np.float32)
    weights = softmax(q.astype(float) @ k.transpose(0, 2, 1) / np.sqrt(5), axis=-1)
    np.testing.assert_allclose(attend(q, k, v), weights @ v, atol=3e-5)


def test_attention_survives_large_logits():
    q = jnp.full((1, 3, 4), 100.0)
    value, grad = jax.value_and_grad(lambda q: jnp.sum(attend(q, q, q)))(q)
    assert np.isfinite(value) and np.all(np.isfinite(grad))


def test_positional_embedding_at_known_points():
    got = np.asarray(positional_embedding(jnp.asarray([0.0, 2.0]), 6))
    angles = 2.0 * np.array([1.0, 1e-2, 1e-4])
    np.testing.assert_allclose(got[0], [0, 0, 0, 1, 1, 1], atol=1e-7)
    np.testing.assert_allclose(got[1], [*np.sin(angles), *np.cos(angles)], rtol=1e-5)
    assert positional_embedding(jnp.zeros((2,)), 7).shape == (2, 7)
    with pytest.raises(ValueError, match="at least 4; got 3"):
        positional_embedding(jnp.zeros((2,)), 3)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_rate_scale_and_independence(rate):
    keys = jax.random.split(jax.random.key(0), 8)
    x = jnp.ones((8, 15, 16, 33))
    y = np.asarray(dropout_mask(keys, (15, 16, 33), rate)(x))
    values = np.unique(y)
    np.testing.assert_allclose(values, [0, 1 / (1 - rate)], rtol=2e-4)
    kept = y > 0
    # Binomial counts within four standard errors: an error of 0.01 in the rate fails at 0.5.
    error = np.sqrt(rate * (1 - rate) / y.size)
    assert abs(kept.mean() - (1 - rate)) < 4 * error
    # Quarters of the rows (of 4, the last short) share a hash, the first two of them a word, and
    # samples a key's parent: no correlation.
    quarters = [kept[:, 4 * i : 4 * i + 3] for i in range(4)]
    for a, b in (*itertools.combinations(quarters, 2), (kept[:4], kept[4:])):
        correlation = np.corrcoef(a.ravel(), b.ravel())[0, 1]
        assert abs(correlation) < 4 / np.sqrt(a.size)
    counts = kept.sum((0, 1, 2))
    n = 8 * 15 * 16
    expected = n * (1 - rate)
    statistic = np.sum((counts - expected) ** 2) / (n * rate * (1 - rate))
    assert statistic < chi2.ppf(0.9999, 33)


def test_recompute_gives_the_same_gradients(rng):
    x = jnp.asarray(rng.standard_normal((3, 4)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((4, 4)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 3)

    def f(source, w):
        x, keys = source
        return jnp.tanh(x @ w) + jax.vmap(lambda key: jax.random.normal(key, (4,)))(keys) * x

    def loss(call):
        return lambda x, w: jnp.sum(call((x, keys), w) ** 2)

    want = jax.grad(loss(f), argnums=(0, 1))(x, w)
    got = jax.jit(jax.grad(loss(recompute(f)), argnums=(0, 1)))(x, w)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_recompute_computes_again_after_optimisation():
    """The compiled gradient holds the function twice; a plain checkpoint's is merged on a CPU."""

    def f(x, w):
        for _ in range(3):
            x = jnp.sin(x) @ w
        return x

    def dots(call):
        def loss(x, w):
            return jnp.sum(call(call(x, w), w) ** 2)

        text = jax.jit(jax.grad(loss)).lower(jnp.ones((64, 64)), jnp.eye(64)).compile().as_text()
        return text.count("sine(")

    assert dots(recompute(f)) > dots(f)
