"""Processes: every function of the calculus, for every process, alone and in a batch.

The laws take a process and times inside its range; the mutants are processes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core.numerics import canonical
from diffjax.core.types import Prediction
from diffjax.processes import calculus
from tests import members
from tests.laws import mutants

B = 4
SCALAR = [m for m in members.PROCESSES if m.scalar]


def inputs(member):
    """(x, prediction, t, s): t, s of shape (B,), s < t, inside the member's range."""
    rng = np.random.default_rng(0)
    x, x0, eps = (jnp.asarray(rng.standard_normal((B, members.D)), jnp.float32) for _ in range(3))
    t = jnp.linspace(member.low, member.high, B + 1, dtype=jnp.float32)
    return x, Prediction(x0, eps), t[1:], t[:-1]


def everything(process, x, prediction, t, s):
    """All functions of (process, t, s, x), as one tuple."""
    return (
        process.coeffs(t),
        calculus.rates(process, t),
        calculus.rates_from_coeffs(process, t),
        calculus.derivatives(process, t),
        calculus.log_snr(process, t),
        calculus.diffusion(process, t),
        calculus.transition(process, t, s),
        calculus.drift(process, x, t),
        calculus.perturb(process, prediction.x0, t, prediction.eps, anchor=x),
        calculus.posterior(process, x, prediction.x0, t, s),
        calculus.score(process, prediction, t),
        calculus.reverse_drift(process, x, prediction, t),
        calculus.velocity(process, prediction, t),
    )


def a_batch_of_times_is_a_loop(process, member):
    """f(t)[i] is f(t[i]) under `vmap` and eagerly; there t is () and x has no batch axis."""
    x, prediction, t, s = inputs(member)
    batch = jax.jit(everything)(process, x, prediction, t, s)
    mapped = jax.jit(jax.vmap(everything, (None, 0, 0, 0, 0)))(process, x, prediction, t, s)
    alone = everything(process, *jax.tree.map(lambda leaf: leaf[1], (x, prediction, t, s)))
    for found, expected in ((mapped, batch), (alone, jax.tree.map(lambda leaf: leaf[1], batch))):
        same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)  # noqa: E731
        jax.tree.map(same, found, expected)


def constants_have_gradients(process, times):
    """Coefficients and what is made of them have finite gradients, at the ends of the range too."""

    def loss(process, t):
        alpha, _, sigma = process.coeffs(t)
        return jnp.sum(alpha + sigma)

    for t in times:
        found = jax.grad(loss, argnums=(0, 1))(canonical(process), jnp.asarray(t, jnp.float32))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found)), f"at t = {t}"


def rates_are_those_of_the_coefficients(process, low, high):
    """The closed forms of f and g^2 are what differentiating the coefficients gives, inside."""
    t = jnp.linspace(low, high, 23)
    closed, derived = process.rates(t), calculus.rates_from_coeffs(process, t)
    for a, b in zip(closed, derived, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def the_log_snr_falls_and_inverts(process, low, high):
    """lam falls strictly, and both inverses give the time back, with the exact derivative."""
    t = jnp.linspace(low, high, 23)
    lam, slope = jax.jvp(lambda t: calculus.log_snr(process, t), (t,), (jnp.ones_like(t),))
    assert (np.diff(lam) < 0).all()
    for inverse in (calculus.inverse_log_snr, calculus.inverse_log_snr_by_bisection):
        again, back = jax.jvp(lambda v, f=inverse: f(process, v), (lam,), (jnp.ones_like(lam),))
        np.testing.assert_allclose(again, t, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(back * slope, 1, rtol=1e-6)


@pytest.mark.parametrize("member", members.PROCESSES, ids=members.ids)
def test_a_batch_of_times_is_a_loop(member):
    a_batch_of_times_is_a_loop(member.process, member)


@pytest.mark.parametrize("member", members.PROCESSES, ids=members.ids)
def test_constants_have_gradients(member):
    process = member.process
    constants_have_gradients(process, (0.0, process.t_min, member.low, process.t_max))


CLOSED = [m for m in members.PROCESSES if hasattr(m.process, "rates")]


@pytest.mark.parametrize("member", CLOSED, ids=members.ids)
def test_rates_are_those_of_the_coefficients(member, x64):
    rates_are_those_of_the_coefficients(member.process, member.low, member.high)


@pytest.mark.parametrize("member", SCALAR, ids=members.ids)
def test_the_log_snr_falls_and_inverts(member, x64):
    the_log_snr_falls_and_inverts(member.process, member.low, member.high)


INVERTED = [m for m in SCALAR if hasattr(m.process, "inverse_log_snr")]


@pytest.mark.parametrize("member", INVERTED, ids=members.ids)
def test_both_inverses_carry_the_derivative_of_the_constants(member, x64):
    # The bisection holds its point constant and corrects it once: the closed form is the truth.
    process = canonical(member.process)
    t = jnp.linspace(member.low, member.high, 5)[1:-1]
    lam = jax.lax.stop_gradient(calculus.log_snr(process, t))
    gradients = [
        jax.jit(jax.grad(lambda p, f=inverse: jnp.sum(f(p, lam))))(process)
        for inverse in (calculus.inverse_log_snr, calculus.inverse_log_snr_by_bisection)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-12), *gradients)


def test_mutants_are_caught(x64):
    member = members.by_name(members.PROCESSES, "coeffs_only")
    for law, mutant, arguments in (
        (a_batch_of_times_is_a_loop, mutants.FirstTimeForAll(), (member,)),
        (constants_have_gradients, mutants.PlainRoot(), ((0.0,),)),
        (rates_are_those_of_the_coefficients, mutants.WrongRates(), (0.1, 0.9)),
        (the_log_snr_falls_and_inverts, mutants.NotInverse(), (0.1, 0.9)),
    ):
        with pytest.raises(AssertionError):
            law(mutant, *arguments)
