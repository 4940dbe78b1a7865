"""Gradients are finite with respect to every number, also where a root or a norm meets zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core.numerics import canonical
from diffjax.solvers import DDIM, EDMChurn, Heun
from tests import members
from tests.laws import cases, mutants

VP = members.PROCESSES[0]


class Vary:
    """One compiled gradient of the sum of squares of a pair's samples, for many numbers."""

    def __init__(self, pair):
        def loss(x, solver, process, times):
            samples = cases.draw(pair, x=x, solver=solver, process=process, times=times)
            return jnp.sum(samples**2)

        self.pair, self.gradient = (
            pair,
            jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)), compiler_options=cases.PLAIN),
        )

    def __call__(self, solver):
        """Gradients with respect to x, the solver, the process and the grid (which ends at 0)."""
        pair = self.pair
        return self.gradient(
            cases.start(pair), canonical(solver), canonical(pair.process), pair.times()
        )


def gradients_are_finite(pair, *solvers):
    """At the solver's own numbers, or at those of `solvers`."""
    gradient = Vary(pair)
    for solver in solvers or (pair.solver,):
        found = gradient(solver)
        for path, leaf in jax.tree_util.tree_flatten_with_path(found)[0]:
            name = jax.tree_util.keystr(path)
            assert np.isfinite(leaf).all(), f"gradient {name} of {solver} is {leaf}"
        assert np.abs(found[0]).max() > 0  # x reaches the samples


@pytest.mark.parametrize("pair", members.PAIRS, ids=members.ids)
def test_gradients_are_finite(pair):
    gradients_are_finite(pair)


def test_eta_at_its_ends():
    pair = members.Pair(members.by_name(members.SOLVERS, "ddim_eta"), VP)
    gradients_are_finite(pair, DDIM(eta=0.0), DDIM(eta=1.0))


def test_churn_at_zero():
    pair = members.Pair(members.by_name(members.SOLVERS, "churn"), VP)
    gradients_are_finite(pair, EDMChurn(Heun(), s_churn=0.0, n_steps=5.0))


def test_a_root_of_eta_is_caught():
    with pytest.raises(AssertionError, match="eta"):
        gradients_are_finite(cases.Mutated(mutants.RootOfEta()), mutants.RootOfEta(0.0))
