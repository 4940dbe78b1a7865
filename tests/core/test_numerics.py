"""Numerics: alignment of coefficients, roots and norms with finite gradients, per-sample sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import numerics


def test_expand_aligns_on_the_left():
    leaf = np.random.default_rng(0).standard_normal((4, 2, 3)).astype(np.float32)
    c = np.arange(4.0, dtype=np.float32)
    np.testing.assert_array_equal(
        numerics.expand(c, jnp.asarray(leaf)) * leaf, np.einsum("b,bij->bij", c, leaf)
    )
    assert numerics.expand(2.0, jnp.asarray(leaf)).shape == ()
    field = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(numerics.expand(field, jnp.asarray(leaf))[0], field)
    batched = np.ones((4, 2, 3), np.float32)
    assert numerics.expand(batched, jnp.asarray(leaf)).shape == (4, 2, 3)


def test_expand_never_aligns_on_the_right():
    # (B, B): NumPy would take a coefficient a sample for one a column.
    leaf, c = jnp.ones((3, 3)), jnp.asarray([1.0, 2.0, 3.0])
    np.testing.assert_array_equal(
        numerics.expand(c, leaf) * leaf, np.diag([1, 2, 3]) @ np.ones((3, 3))
    )


@pytest.mark.parametrize("shape", [(3,), (2,), (1,), (2, 1), (4, 1, 3), (5, 2, 3)])
def test_expand_refuses_the_rest(shape):
    leaf = jnp.ones((4, 2, 3))
    if len(shape) == leaf.ndim and shape[0] in (1, 4):
        assert numerics.expand(jnp.ones(shape), leaf).shape == shape
        return
    with pytest.raises(ValueError, match=r"one number a sample.*got shape .* \(4, 2, 3\)"):
        numerics.expand(jnp.ones(shape), leaf)


def test_expand_takes_the_dtype_of_the_leaf(x64):
    leaf = jnp.ones((2, 3), jnp.float32)
    assert numerics.expand(jnp.asarray(0.1), leaf).dtype == jnp.float32
    assert (numerics.expand(jnp.ones(2), leaf) * leaf).dtype == jnp.float32


def test_combine_is_the_sum():
    x = {"a": jnp.asarray([[1.0, 2.0]]), "b": jnp.asarray([3.0])}
    y = {"a": jnp.asarray([[10.0, 20.0]]), "b": jnp.asarray([30.0])}
    found = numerics.combine((2.0, x), (jnp.asarray([0.5]), y))
    np.testing.assert_array_equal(found["a"], [[7.0, 14.0]])
    np.testing.assert_array_equal(found["b"], [21.0])
    np.testing.assert_array_equal(numerics.scale(3.0, x)["a"], [[3.0, 6.0]])


def test_safe_sqrt():
    x = jnp.asarray([-1.0, 0.0, 0.25, 4.0])
    np.testing.assert_array_equal(numerics.safe_sqrt(x), [0.0, 0.0, 0.5, 2.0])
    gradient = jax.vmap(jax.grad(numerics.safe_sqrt))(x)
    np.testing.assert_allclose(gradient, [0.0, 0.0, 1.0, 0.25])
    second = jax.vmap(jax.grad(jax.grad(numerics.safe_sqrt)))(x)
    np.testing.assert_allclose(second, [0.0, 0.0, -2.0, -1 / 32])
    # The mutant: the plain root has an infinite slope, and 0 times it is NaN.
    assert np.isnan(jax.grad(lambda v: jnp.sqrt(0 * v))(1.0))
    assert jax.grad(lambda v: numerics.safe_sqrt(0 * v))(1.0) == 0


def tree():
    rng = np.random.default_rng(0)
    return {"a": rng.standard_normal((3, 2, 2)), "b": rng.standard_normal((3,))}


def test_sums_and_norms_are_per_sample():
    x = tree()
    flat = np.concatenate([x["a"].reshape(3, -1), x["b"][:, None]], axis=1)
    leaves = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), x)
    np.testing.assert_allclose(numerics.sum_per_sample(leaves), flat.sum(axis=1), rtol=1e-5)
    norms = np.linalg.norm(flat, axis=1)
    np.testing.assert_allclose(numerics.norm_per_sample(leaves), norms, rtol=1e-5)
    assert numerics.size_per_sample(leaves) == 5
    assert numerics.batch_size(leaves) == 3
    gradient = jax.grad(lambda x: jnp.sum(numerics.norm_per_sample(x)))
    np.testing.assert_allclose(gradient(leaves)["b"], x["b"] / norms, rtol=1e-5)
    zero = jax.tree.map(jnp.zeros_like, leaves)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient(zero)))


def test_sums_of_half_precision_are_wide():
    x = jnp.full((1, 4096), 0.1, jnp.bfloat16)
    total = numerics.sum_per_sample(x)
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(total, 4096 * float(x[0, 0]), rtol=1e-5)


def test_batch_size_must_be_one():
    for x in ({"a": jnp.ones((2, 1)), "b": jnp.ones((3, 1))}, jnp.asarray(1.0)):
        with pytest.raises(ValueError, match="share one leading batch axis"):
            numerics.batch_size(x)


def test_states_are_at_least_float32(x64):
    for dtype, expected in (("float16", "float32"), ("bfloat16", "float32"), ("float64",) * 2):
        assert numerics.at_least_float32(jnp.ones(2, dtype)).dtype == expected
    for dtype in ("int32", "complex64"):
        with pytest.raises(TypeError, match=f"got dtype {dtype}"):
            numerics.at_least_float32(jnp.ones(2, dtype))


def test_canonical_numbers_share_one_program(fresh_cache):
    run = jax.jit(lambda tree: tree["rate"] * 2)
    plain = jax.jit(lambda tree: tree["rate"] * 2)
    for rate in (0.5, np.float32(0.5), np.float64(0.5), jnp.asarray(0.5), jnp.float32(0.5)):
        assert run(numerics.canonical({"rate": rate})) == 1.0
        plain({"rate": rate})
    assert run._cache_size() == 1
    assert plain._cache_size() > 1  # the mutant: without it they do not


def test_canonical_leaves_the_rest_alone(x64):
    key, table = jax.random.key(0), jnp.ones(3, jnp.float32)
    tree = {"key": key, "table": table, "n": 3, "flag": True, "rate": 0.1, "none": None}
    found = numerics.canonical(tree)
    assert found["rate"].dtype == jnp.float64 and not found["rate"].weak_type
    assert found["rate"] == 0.1
    for name in ("key", "table", "n", "flag", "none"):
        assert found[name] is tree[name]
