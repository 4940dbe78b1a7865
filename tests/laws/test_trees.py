"""Trees: members survive being taken apart, and x may be any tree of arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core.pytree import replace
from diffjax.solvers import DDIM, sample
from tests import members, oracles
from tests.laws import cases, mutants

VP = members.PROCESSES[0]
VALUES = (
    [(m.name, m.process) for m in members.PROCESSES]
    + [(m.name, m.solver) for m in members.SOLVERS]
    + [(m.name, m.kind) for m in members.KINDS]
    + [(m.name, m.weight) for m in members.WEIGHTS[len(members.KINDS) :]]
    + [(m.name, m.times) for m in members.TIMES]
    + [(m.name, m.make().scaling) for m in members.PRECONDITIONS]
    + [(m.name, m.make().label) for m in members.PRECONDITIONS]
)
X = {"image": (2, 4, 3), "vector": (5,), "vector_again": (5,)}


def a_tree_survives(value):
    """Flatten and unflatten give it back, whatever the leaves are meanwhile."""
    leaves, treedef = jax.tree.flatten(value)
    again = jax.tree.unflatten(treedef, leaves)
    assert type(again) is type(value)
    assert vars_of(again) == vars_of(value), "a field was lost"
    assert jax.tree.structure(again) == treedef
    try:
        # Placeholders, negative numbers, shapes: nothing may be checked or computed here.
        holes = jax.tree.unflatten(treedef, [object()] * len(leaves))
        negative = jax.tree.map(lambda leaf: -leaf, value)
        shapes = jax.eval_shape(lambda tree: tree, value)
    except Exception as error:
        raise AssertionError(f"a tree is checked when put together: {error!r}") from error
    for tree in (holes, negative, shapes):
        assert jax.tree.structure(tree) == treedef
    assert members.leaves_match(jax.tree.map(lambda leaf: -leaf, negative), value)


def vars_of(value):
    """The fields in words: arrays have no truth."""
    return {name: repr(field) for name, field in vars(value).items()}


def tree_of(batch=cases.B):
    """A tree x of arrays of different ranks, standard normal; two leaves start equal."""
    rng = np.random.default_rng(2)
    draw = {
        name: jnp.asarray(rng.standard_normal((batch, *shape)), jnp.float32)
        for name, shape in X.items()
    }
    return draw | {"vector_again": draw["vector"]}


def solve_tree(solver, x):
    """A solve of isotropic data: what happens to an element does not depend on the others."""
    process = VP.process
    run = jax.jit(sample, compiler_options=cases.PLAIN)
    times = members.grids.uniform(process, 3)
    return run(cases.keys(), oracles.Isotropic(process), x, times, solver=solver, process=process).x


def a_tree_is_its_leaves(solver):
    """The first leaf goes as it would alone; the others move too, with noise of their own."""
    x = tree_of()
    together = solve_tree(solver, x)
    assert {name: leaf.shape[1:] for name, leaf in together.items()} == X
    alone = solve_tree(solver, x["image"])
    np.testing.assert_allclose(together["image"], alone, rtol=2e-5, atol=2e-5)
    for name in X:
        assert np.abs(together[name] - x[name]).max() > 1e-2, f"{name} stayed"
    gap = np.abs(together["vector"] - together["vector_again"]).max()
    if solver.stochastic:
        assert gap > 1e-2, "two leaves share their noise"
    else:
        assert gap < 1e-5


# Langevin's step size joins the leaves of a sample in one norm, a time shift in one variance;
# tests/solvers has their truth.
JOINING = ("predictor_corrector", "time_shift")
FREE = [m for m in members.SOLVERS if not m.shaped]
SEPARATE = [m for m in FREE if not m.name.startswith(JOINING)]
JOINED = [m for m in FREE if m.name.startswith(JOINING)]


@pytest.mark.parametrize("value", [v for _, v in VALUES], ids=[n for n, _ in VALUES])
def test_a_tree_survives(value):
    a_tree_survives(value)


@pytest.mark.parametrize("value", [v for _, v in VALUES], ids=[n for n, _ in VALUES])
def test_replace_changes_one_field(value):
    for field in dataclasses.fields(value):
        same = replace(value, **{field.name: getattr(value, field.name)})
        assert members.leaves_match(same, value)


@pytest.mark.parametrize("member", SEPARATE, ids=members.ids)
def test_a_tree_is_its_leaves(member):
    a_tree_is_its_leaves(member.solver)


@pytest.mark.parametrize("member", JOINED, ids=members.ids)
def test_a_tree_goes_through(member):
    out = solve_tree(member.solver, tree_of())
    assert {k: v.shape[1:] for k, v in out.items()} == X
    assert all(np.isfinite(leaf).all() for leaf in out.values())


@pytest.mark.parametrize("mutant", [mutants.FirstLeafOnly(), mutants.SameNoiseInEveryLeaf()])
def test_broken_solvers_are_caught(mutant):
    with pytest.raises(AssertionError):
        a_tree_is_its_leaves(mutant)


@pytest.mark.parametrize("mutant", [mutants.ForgetsStructure(order=3), mutants.ChecksAgain()])
def test_broken_trees_are_caught(mutant):
    with pytest.raises(AssertionError):
        a_tree_survives(mutant)


def test_eta_none_is_structure():
    # DDIM() draws nothing and DDIM(eta) always does: two programs, never one.
    assert jax.tree.structure(DDIM()) != jax.tree.structure(DDIM(eta=0.0))
    assert jax.tree.structure(DDIM(eta=0.0)) == jax.tree.structure(DDIM(eta=0.9))
