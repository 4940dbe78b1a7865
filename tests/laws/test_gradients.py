"""Gradients are finite with respect to every number, also where a root or a norm meets zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core.numerics import canonical
from diffjax.solvers import sample
from tests import members
from tests.laws import cases, mutants


def gradient(pair):
    """solver -> the gradients of the sum of squares of a pair's samples, compiled once.

    With respect to x, the solver, the process and the grid, which ends at 0 where it can.
    """
    given = {name: cases.arguments(pair)[name] for name in ("denoise", "final")}
    process, times = canonical(pair.process), pair.times()

    def loss(x, solver, process, times):
        changes = given | {"solver": solver, "process": process, "times": times}
        return jnp.sum(cases.draw(pair, x=x, run=sample, **changes) ** 2)

    gradients = jax.grad(loss, argnums=(0, 1, 2, 3), allow_int=True)  # a table has integers
    run = jax.jit(gradients, compiler_options=cases.PLAIN)
    return lambda solver: run(cases.start(pair), canonical(solver), process, times)


def gradients_are_finite(pair, *solvers):
    """At the numbers of each of `solvers`, which share the pair's structure."""
    run = gradient(pair)
    for solver in solvers:
        found = run(solver)
        for path, leaf in jax.tree_util.tree_flatten_with_path(found)[0]:
            if leaf.dtype == jax.dtypes.float0:
                continue
            name = jax.tree_util.keystr(path)
            assert np.isfinite(leaf).all(), f"gradient {name} of {solver} is {leaf}"
        if solver is solvers[0]:  # at eta = 1 a flow forgets the x that it starts from
            assert np.abs(found[0]).max() > 0, "x does not reach the samples"


@pytest.mark.parametrize("pair", members.PAIRS, ids=members.ids)
def test_gradients_are_finite(pair):
    gradients_are_finite(pair, pair.solver, *pair.solver_member.edges)


def test_a_root_of_eta_is_caught():
    with pytest.raises(AssertionError, match="eta"):
        gradients_are_finite(cases.Mutated(mutants.RootOfEta()), mutants.RootOfEta(0.0))
