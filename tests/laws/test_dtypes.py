"""Precision: results have the dtype of x, half precision is raised to float32, in both modes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.processes import calculus
from diffjax.solvers import sample
from tests import members, oracles
from tests.laws import cases, mutants


def a_solve_keeps_the_dtype_of_x(pair, dtype, expected=None):
    """x, the state's numbers and what is saved have x's dtype; nothing is computed."""

    def run(key, x):
        given = cases.arguments(pair, save=lambda state: state.x)
        return sample(key, given.pop("denoise"), x, given.pop("times"), **given)

    x = jax.ShapeDtypeStruct((cases.B, members.D), dtype)
    result = jax.eval_shape(run, cases.keys(), x)
    leaves = jax.tree.leaves((result.x, result.state, result.saved))
    found = {leaf.dtype for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)}
    assert found == {jnp.dtype(expected or dtype)}


FUNCTIONS = {
    "coeffs": lambda process, t, s: process.coeffs(t),
    "rates": lambda process, t, s: calculus.rates(process, t),
    "rates_from_coeffs": lambda process, t, s: calculus.rates_from_coeffs(process, t),
    "log_snr": lambda process, t, s: calculus.log_snr(process, t),
    "transition": lambda process, t, s: calculus.transition(process, t, s),
}


def a_process_keeps_the_dtype_of_t(process, dtype):
    """Coefficients, rates and transitions have the dtype of the times."""
    t, s = jax.ShapeDtypeStruct((4,), dtype), jax.ShapeDtypeStruct((4,), dtype)
    for name, function in FUNCTIONS.items():
        out = jax.eval_shape(lambda t, s, f=function: f(process, t, s), t, s)
        found = {leaf.dtype for leaf in jax.tree.leaves(out)}
        assert found == {jnp.dtype(dtype)}, f"{name}: {found}"


@pytest.mark.parametrize("pair", members.PAIRS, ids=members.ids)
def test_a_solve_keeps_the_dtype_of_x(pair):
    a_solve_keeps_the_dtype_of_x(pair, jnp.float32)
    a_solve_keeps_the_dtype_of_x(pair, jnp.bfloat16, expected=jnp.float32)


@pytest.mark.parametrize("pair", members.PAIRS, ids=members.ids)
def test_a_solve_keeps_the_dtype_of_x_in_float64_mode(pair, x64):
    a_solve_keeps_the_dtype_of_x(pair, jnp.float32)
    a_solve_keeps_the_dtype_of_x(pair, jnp.float64)


@pytest.mark.parametrize("member", members.PROCESSES, ids=members.ids)
def test_a_process_keeps_the_dtype_of_t(member):
    a_process_keeps_the_dtype_of_t(member.process, jnp.float32)


@pytest.mark.parametrize("member", members.PROCESSES, ids=members.ids)
def test_a_process_keeps_the_dtype_of_t_in_float64_mode(member, x64):
    a_process_keeps_the_dtype_of_t(member.process, jnp.float64)
    if member.name not in ("tabulated", "per_pixel"):  # float64 tables widen float32 times
        a_process_keeps_the_dtype_of_t(member.process, jnp.float32)


def test_float64_reaches_the_values(x64):
    # One linear step is exact: its rounding error tells in what precision it was computed.
    pair = members.Pair(
        members.by_name(members.SOLVERS, "ddim"), members.by_name(members.PROCESSES, "vp")
    )
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, members.D)))
    oracle = oracles.PointMass(jnp.linspace(-1.0, 1.0, members.D))
    out = cases.draw(pair, x=x, denoise=oracle.denoiser(pair.process))
    assert np.abs(out - oracle.mean[None]).max() < 1e-12


def test_mutants_are_caught(x64):
    for mutant, dtype in ((mutants.Upcast(), jnp.float32), (mutants.Downcast(), jnp.float64)):
        with pytest.raises(AssertionError):
            a_solve_keeps_the_dtype_of_x(cases.Mutated(mutant), dtype)
    with pytest.raises(AssertionError):
        a_process_keeps_the_dtype_of_t(mutants.FloatsFromNumpy(), jnp.float32)
