"""Compilation: what runs compiled is what runs eagerly, and numbers never compile again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.solvers import sample
from tests import members
from tests.laws import cases, mutants


def jit_is_eager(pair):
    """`sample` gives the same under `jit` as called as it is, to rounding of fused operations."""
    np.testing.assert_allclose(
        cases.base(pair), cases.draw(pair, run=sample), rtol=2e-5, atol=2e-5 * _size(pair)
    )


def numbers_never_retrace(pair):
    """Five calls with new keys, constants, grid values and weights are one trace, one program."""
    cases.base(pair)  # compiled, here or before
    programs, traces = cases.DRAW._cache_size(), len(cases.TRACES)
    for i in range(1, 5):
        cases.draw(
            pair,
            key=cases.keys(i),
            denoise=_shifted(cases.denoiser(pair), i),
            solver=_other_numbers(pair.solver, i),
            process=_shifted(pair.process, i),
            times=_shifted(pair.times(), i),
        )
        assert len(cases.TRACES) == traces, "the denoiser was traced again"
        assert cases.DRAW._cache_size() == programs, "a new program was compiled"


def a_program_holds_few_networks(pair, copies=2):
    """Stages are a loop: compiling the network is what a first solve waits for."""
    before = len(cases.TRACES)
    run = jax.jit(lambda key, x: cases.draw(pair, x, key, run=sample))
    run.trace(cases.keys(), cases.start(pair))
    assert len(cases.TRACES) - before == copies


def _shifted(tree, i):
    """The tree with other numbers; integers stay, as a table's."""

    def shift(leaf):
        return leaf * (1 - 0.01 * i) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) else leaf

    return jax.tree.map(shift, tree)


def _other_numbers(solver, i):
    """The solver with other numbers, in its leaves and in static fields that hold floats."""
    solver = _shifted(solver, i)
    for name, value in vars(solver).items():
        if name not in _leaf_names(solver) and isinstance(value, float):
            object.__setattr__(solver, name, value * (1 - 0.01 * i))
    return solver


def _leaf_names(tree):
    return {path[0].name for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _size(pair):
    return float(np.max(np.abs(cases.base(pair))))


@pytest.mark.parametrize("pair", members.PAIRS, ids=members.ids)
def test_jit_is_eager(pair):
    jit_is_eager(pair)


@pytest.mark.parametrize("pair", members.PAIRS, ids=members.ids)
def test_numbers_never_retrace(pair):
    numbers_never_retrace(pair)


@pytest.mark.parametrize("member", members.SOLVERS, ids=members.ids)
def test_a_program_holds_few_networks(member):
    a_program_holds_few_networks(members.Pair(member, members.PROCESSES[0]), member.copies)


@pytest.mark.parametrize(
    ("law", "mutant"),
    [
        (jit_is_eager, mutants.AsksForTheValue()),
        (numbers_never_retrace, mutants.StaticEta()),
        (a_program_holds_few_networks, mutants.SecondCall()),
    ],
)
def test_mutants_are_caught(law, mutant):
    with pytest.raises(AssertionError):
        law(cases.Mutated(mutant))
