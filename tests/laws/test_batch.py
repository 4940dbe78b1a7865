"""The batch: a sample depends on its own key and start, not on batch size, neighbours or mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from diffjax.solvers import sample
from tests import members
from tests.laws import cases, mutants

# Every solver with one process; what the others do in a batch is in test_processes.py.
WITH_VP = members.PAIRS[: len(members.SOLVERS)]
ALONE = [pair for pair in WITH_VP if not pair.solver_member.coupled]
COUPLED = [pair for pair in WITH_VP if pair.solver_member.coupled]
COLLECTIVE = re.compile(r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter")


def a_prefix_is_a_smaller_batch(pair):
    """f(x)[:k] == f(x[:k]) with the same keys, bit for bit for an element-wise denoiser."""
    k = 5
    alone = cases.draw(pair, x=cases.start(pair, k), key=cases.keys()[:k])
    np.testing.assert_array_equal(cases.base(pair)[:k], alone)


def neighbours_do_not_matter(pair):
    """Other samples' starts and keys leave a sample as it is, bit for bit."""
    x = cases.start(pair).at[:-1].multiply(-1.7)
    key = jnp.concatenate([cases.keys(7)[:-1], cases.keys()[-1:]])
    np.testing.assert_array_equal(cases.base(pair)[-1], cases.draw(pair, x=x, key=key)[-1])


def a_mesh_changes_nothing(pair):
    """Eight devices give one device's samples and never speak to one another.

    Not bit for bit: the partitioner moves scalar functions of t in and out of vector loops, where
    XLA computes them by another polynomial. The noise is, see tests/core/test_random.py.
    """
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    x, key = jax.device_put((cases.start(pair), cases.keys()), rows)
    given = cases.arguments(pair)
    given = (key, given.pop("denoise"), x, given.pop("times")), given
    compiled = cases.DRAW.lower(*given[0], **given[1]).compile()
    spoken = COLLECTIVE.search(compiled.as_text())
    assert spoken is None, f"the devices exchange data: {spoken}"
    out = compiled(*given[0], **given[1]).x
    assert len({shard.device for shard in out.addressable_shards}) == 8
    expected = cases.base(pair)
    atol = 4 * np.finfo(np.float32).eps * np.abs(expected).max()
    np.testing.assert_allclose(out, expected, rtol=0, atol=atol)


def vmap_is_a_loop(pair):
    """Two solves under `vmap` are the two solves."""
    xs = jnp.stack([cases.start(pair), 0.5 * cases.start(pair)])
    keys = jnp.stack([cases.keys(), cases.keys(3)])
    given = cases.arguments(pair)
    solve = jax.vmap(lambda x, key: cases.draw(pair, x=x, key=key, run=sample, **given))
    together = jax.jit(solve, compiler_options=cases.PLAIN)(xs, keys)
    one_by_one = [cases.draw(pair, x=x, key=key) for x, key in zip(xs, keys, strict=True)]
    np.testing.assert_allclose(together, np.stack(one_by_one), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("pair", ALONE, ids=members.ids)
def test_a_prefix_is_a_smaller_batch(pair):
    a_prefix_is_a_smaller_batch(pair)


@pytest.mark.parametrize("pair", ALONE, ids=members.ids)
def test_neighbours_do_not_matter(pair):
    neighbours_do_not_matter(pair)


@pytest.mark.parametrize("pair", ALONE, ids=members.ids)
def test_a_mesh_changes_nothing(pair):
    a_mesh_changes_nothing(pair)


@pytest.mark.parametrize("pair", WITH_VP, ids=members.ids)
def test_vmap_is_a_loop(pair):
    vmap_is_a_loop(pair)


@pytest.mark.parametrize("pair", COUPLED, ids=members.ids)
def test_what_is_declared_coupled_is_coupled(pair):
    for law in (a_prefix_is_a_smaller_batch, neighbours_do_not_matter):
        with pytest.raises(AssertionError):
            law(pair)


@pytest.mark.parametrize(
    ("law", "mutant"),
    [
        (a_prefix_is_a_smaller_batch, mutants.BatchMean()),
        (neighbours_do_not_matter, mutants.WholeBatchNoise()),
        (a_mesh_changes_nothing, mutants.BatchMean()),
        (vmap_is_a_loop, mutants.BatchedStream()),
    ],
)
def test_mutants_are_caught(law, mutant):
    with pytest.raises(AssertionError):
        law(cases.Mutated(mutant))
