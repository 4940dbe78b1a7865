"""The batch: a sample depends on its own key and start, not on batch size, neighbours or mesh."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests import members
from tests.laws import cases, mutants

ALONE = [pair for pair in members.PAIRS if not pair.solver_member.coupled]
COUPLED = [pair for pair in members.PAIRS if pair.solver_member.coupled]
COLLECTIVE = re.compile(r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter")


def a_prefix_is_a_smaller_batch(pair):
    """f(x)[:k] == f(x[:k]) with the same keys, bit for bit for an element-wise denoiser."""
    k = 5
    alone = cases.draw(pair, x=cases.start(pair, k), key=cases.keys()[:k])
    np.testing.assert_array_equal(cases.base(pair)[:k], alone)


def neighbours_do_not_matter(pair):
    """Other samples' starts and keys leave a sample as it is, bit for bit."""
    x = cases.start(pair).at[1:].multiply(-1.7)
    key = jax.numpy.concatenate([cases.keys()[:1], cases.keys(7)[1:]])
    np.testing.assert_array_equal(cases.base(pair)[0], cases.draw(pair, x=x, key=key)[0])


def a_mesh_changes_nothing(pair):
    """Eight devices give one device's bits, and never speak to one another."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    x, key = jax.device_put((cases.start(pair), cases.keys()), rows)
    arguments = {"solver": pair.solver, "process": pair.process, "final": pair.final}
    compiled = cases.DRAW.lower(key, cases.denoiser(pair), x, pair.times(), **arguments).compile()
    spoken = COLLECTIVE.search(compiled.as_text())
    assert spoken is None, f"the devices exchange data: {spoken}"
    out = compiled(key, cases.denoiser(pair), x, pair.times(), **arguments).x
    assert len({s.device for s in out.addressable_shards}) == 8
    np.testing.assert_array_equal(cases.base(pair), out)


def vmap_is_a_loop(pair):
    """Two solves under `vmap` are the two solves."""
    xs = jax.numpy.stack([cases.start(pair), 0.5 * cases.start(pair)])
    keys = jax.numpy.stack([cases.keys(), cases.keys(3)])
    times = pair.times()
    solve = jax.vmap(lambda x, key: cases.draw(pair, x=x, key=key, times=times))
    together = jax.jit(solve, compiler_options=cases.PLAIN)(xs, keys)
    one_by_one = [cases.draw(pair, x=x, key=key) for x, key in zip(xs, keys, strict=True)]
    np.testing.assert_allclose(together, np.stack(one_by_one), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("pair", ALONE, ids=members.ids)
def test_a_prefix_is_a_smaller_batch(pair):
    a_prefix_is_a_smaller_batch(pair)


@pytest.mark.parametrize("pair", ALONE, ids=members.ids)
def test_neighbours_do_not_matter(pair):
    neighbours_do_not_matter(pair)


# One member with every process adds nothing here: a process draws nothing.
@pytest.mark.parametrize("pair", ALONE[: len(members.SOLVERS) - 1], ids=members.ids)
def test_a_mesh_changes_nothing(pair):
    a_mesh_changes_nothing(pair)


@pytest.mark.parametrize("pair", members.PAIRS, ids=members.ids)
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
        (a_prefix_is_a_smaller_batch, mutants.WholeBatchNoise()),
        (neighbours_do_not_matter, mutants.BatchMean()),
        (a_mesh_changes_nothing, mutants.BatchMean()),
        (vmap_is_a_loop, mutants.BatchedStream()),
    ],
)
def test_mutants_are_caught(law, mutant):
    with pytest.raises(AssertionError):
        law(cases.Mutated(mutant))
