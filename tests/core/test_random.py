"""Random draws: a pure function of (the sample's key, the name, the leaf), nothing else."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from diffjax.core import random

KEY = jax.random.key(5)
DRAWS = [random.normal_like, random.uniform_like, random.rademacher_like]


@pytest.mark.parametrize("draw", DRAWS)
def test_a_prefix_is_a_smaller_batch(draw):
    x = jnp.empty((9, 4, 2))
    whole = draw(random.sample_keys(KEY, 9), "noise", x)
    for k in (1, 2, 8):
        part = draw(random.sample_keys(KEY, k), "noise", x[:k])
        np.testing.assert_array_equal(part, whole[:k])
    one = draw(random.sample_keys(KEY, 9)[4:5], "noise", x[:1])
    np.testing.assert_array_equal(one[0], whole[4])


@pytest.mark.parametrize("draw", DRAWS)
def test_a_mesh_draws_the_same_bits_in_silence(draw):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    keys, x = random.sample_keys(KEY, 16), jnp.empty((16, 5))
    run = jax.jit(lambda keys, x: draw(keys, "noise", x))
    alone = run(keys, x)
    compiled = run.lower(*jax.device_put((keys, x), NamedSharding(mesh, PartitionSpec("data"))))
    text = compiled.compile().as_text()
    assert not any(word in text for word in ("all-gather", "all-reduce", "collective-permute"))
    spread = run(*jax.device_put((keys, x), NamedSharding(mesh, PartitionSpec("data"))))
    np.testing.assert_array_equal(spread, alone)


def test_shard_map_draws_the_same_bits():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    keys, x = random.sample_keys(KEY, 16), jnp.empty((16, 5))
    rows = PartitionSpec("data")
    local = jax.shard_map(
        lambda keys, x: random.normal_like(keys, "noise", x),
        mesh=mesh,
        in_specs=(rows, rows),
        out_specs=rows,
    )
    np.testing.assert_array_equal(jax.jit(local)(keys, x), random.normal_like(keys, "noise", x))


# n = 40,000 a pair: independent streams correlate within 4/sqrt(n) = 0.02; equal ones at 1.
def test_streams_are_independent():
    n = 40_000
    x = jnp.empty((2, n))
    keys = random.sample_keys(KEY, 2)
    tree = random.normal_like(keys, "noise", {"a": x, "b": x})
    other = random.normal_like(keys, "churn", x)
    later = random.normal_like(random.step_keys(keys, 1), "noise", x)
    streams = [*tree["a"], *tree["b"], *other, *later]
    for a, b in itertools.combinations(np.asarray(streams), 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(n)


def test_laws_of_the_draws():
    keys, x = random.sample_keys(KEY, 50), jnp.empty((50, 400))
    normal = np.asarray(random.normal_like(keys, "a", x)).ravel()
    assert scipy.stats.kstest(normal, "norm").pvalue > 1e-3
    uniform = np.asarray(random.uniform_like(keys, "a", x)).ravel()
    assert scipy.stats.kstest(uniform, "uniform").pvalue > 1e-3
    signs = np.asarray(random.rademacher_like(keys, "a", x))
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert abs(signs.mean()) < 4 / np.sqrt(signs.size)


def test_draws_are_shaped_and_typed_like_x(x64):
    x = {"a": jnp.empty((3, 2), jnp.float64), "b": jnp.empty((3,), jnp.float32)}
    found = random.normal_like(random.sample_keys(KEY, 3), "noise", x)
    assert {k: (v.shape, v.dtype) for k, v in found.items()} == {
        k: (v.shape, v.dtype) for k, v in x.items()
    }


def test_keys_are_folded_not_split():
    keys = random.sample_keys(KEY, 3)
    expected = [jax.random.fold_in(KEY, i) for i in range(3)]
    assert all(a == b for a, b in zip(keys, expected, strict=True))
    assert (random.sample_keys(keys, 3) == keys).all()
    steps = random.step_keys(keys, 7)
    assert all(a == jax.random.fold_in(b, 7) for a, b in zip(steps, keys, strict=True))


def test_keys_that_cannot_be_used():
    with pytest.raises(TypeError, match=r"jax.random.key\(seed\)"):
        random.sample_keys(jax.random.PRNGKey(0), 3)
    with pytest.raises(TypeError, match="typed key"):
        random.sample_keys(0, 3)
    with pytest.raises(ValueError, match=r"\(3,\); got shape \(2,\)"):
        random.sample_keys(jax.random.split(KEY, 2), 3)
    for name in ("rbg", "unsafe_rbg"):
        coupled = jax.random.key(0, impl=name)
        with pytest.raises(ValueError, match="draw one stream.*threefry2x32"):
            random.sample_keys(coupled, 3)
        assert random.sample_keys(coupled, 3, allow_batch_coupled_noise=True).shape == (3,)


def test_names_are_fixed_numbers():
    # The number of a name is part of what a seed means: it must not change between runs.
    import zlib

    assert random.tag("noise") == zlib.crc32(b"noise") & 0x7FFFFFFF
    assert len({random.tag(name) for name in ("noise", "prior", "churn", "ddim", "langevin")}) == 5
