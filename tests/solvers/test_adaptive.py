"""The adaptive integrator against SciPy's, sample by sample, and against exact solutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from diffjax.solvers.adaptive import DORMAND_PRINCE, PIController, integrate
from tests.laws.cases import EXACT


def pendulum(t, y):
    """y (B, 2): angle and speed, driven; rows are independent."""
    angle, speed = y[:, 0], y[:, 1]
    return jnp.stack([speed, -4 * jnp.sin(angle) + jnp.cos(3 * t)], axis=1)


solve = jax.jit(integrate, static_argnums=0, static_argnames="tableau")
STARTS = np.asarray([[0.1, 0.0], [2.9, 0.4], [0.0, 9.0], [1.0, -1.0]])


@pytest.mark.parametrize(("t0", "t1"), [(0.0, 5.0), (3.0, -1.0)])
@pytest.mark.parametrize("tolerance", [1e-4, 1e-9])
def test_each_sample_is_scipys_own_solve(x64, t0, t1, tolerance):
    """The same calls of f and the same end as `solve_ivp` of that sample alone."""
    controller = PIController(tolerance, tolerance)
    got = solve(pendulum, jnp.asarray(STARTS), t0, t1, controller=controller)
    for i, start in enumerate(STARTS):
        field = lambda t, y: np.asarray([y[1], -4 * np.sin(y[0]) + np.cos(3 * t)])  # noqa: E731
        want = solve_ivp(field, (t0, t1), start, rtol=tolerance, atol=tolerance)
        assert got.nfe[i] == want.nfev
        assert got.accepted[i] == want.t.size - 1
        np.testing.assert_allclose(got.y[i], want.y[:, -1], atol=1e-10)
    assert got.arrived.all()
    assert len(set(got.nfe.tolist())) > 1  # the samples are of different difficulty


def test_tableau_has_its_orders():
    """Row sums, and the quadrature conditions to order 5 and, embedded, to order 4 only."""
    a, c, e = DORMAND_PRINCE.a, (0.0, *DORMAND_PRINCE.c), np.asarray(DORMAND_PRINCE.e)
    for row, node in zip(a, c[1:], strict=True):
        np.testing.assert_allclose(sum(row), node, atol=1e-14)
    b, c = np.asarray([*a[-1], 0.0]), np.asarray(c)
    for k in range(5):
        np.testing.assert_allclose(b @ c**k, 1 / (k + 1), atol=1e-14)
    for k in range(4):
        np.testing.assert_allclose(e @ c**k, 0, atol=1e-14)
    assert abs(e @ c**4) > 1e-5


def test_batch_invariance_bitwise():
    """A sample's path does not depend on its neighbours, their number or their order."""
    y = jnp.asarray(STARTS, jnp.float32)
    run = jax.jit(integrate, static_argnums=0, compiler_options=EXACT)
    whole = run(pendulum, y, 0.0, 5.0)
    part = run(pendulum, y[:2], 0.0, 5.0)
    turned = run(pendulum, y[::-1], 0.0, 5.0)
    for a, b, c in zip(*map(jax.tree.leaves, (whole, part, turned)), strict=True):
        np.testing.assert_array_equal(a[:2], b)
        np.testing.assert_array_equal(a, c[::-1])


def test_ends_per_sample_and_nothing_to_do():
    """t0 and t1 may differ by sample; where they are equal y is returned untouched."""
    t1 = jnp.asarray([1.0, -2.0, 0.0])
    y = jnp.asarray([[1.0], [2.0], [3.0]])
    got = solve(lambda t, y: -y, y, 0.0, t1, controller=PIController(1e-6, 1e-6))
    np.testing.assert_allclose(got.y[:, 0], y[:, 0] * np.exp(-t1), rtol=2e-6)
    assert got.y[2, 0] == 3.0 and got.accepted[2] == 0 and got.arrived.all()


def test_leaves_are_controlled_one_by_one(x64):
    """An integral beside 1,000 quiet elements takes the steps that it would take alone."""

    def field(t, y):
        return {"quiet": jnp.zeros_like(y["quiet"]), "sum": 30 * jnp.cos(30 * t)}

    y = {"quiet": jnp.zeros((1, 1000)), "sum": jnp.zeros((1,))}
    controller = PIController(1e-7, 1e-7)
    got = solve(field, y, 0.0, 1.0, controller=controller)
    alone = solve(lambda t, y: 30 * jnp.cos(30 * t), y["sum"], 0.0, 1.0, controller=controller)
    assert got.nfe[0] == alone.nfe[0]
    assert abs(got.y["sum"][0] - np.sin(30.0)) < 1e-6


def test_pi_rule_rejects_less(x64):
    """Where stability limits the step, as here, (3) with pc > 0 rejects less."""
    field = lambda t, y: -400 * (y - jnp.cos(t)[:, None])  # noqa: E731
    plain, smooth = (
        integrate(field, jnp.zeros((1, 1)), 0.0, 2.0, controller=PIController(1e-5, 1e-5, *pi))
        for pi in ((0.0, 1.0), (0.4, 0.3))
    )
    assert smooth.rejected[0] < plain.rejected[0] / 2
    for got in (plain, smooth):
        # y - cos t tends to (sin t)/400.
        assert abs(got.y[0, 0] - np.cos(2.0) - np.sin(2.0) / 400) < 1e-4


@pytest.mark.parametrize(
    ("field", "controller"),
    [
        (lambda t, y: y**2, PIController()),  # blows up at t = 1/y
        (lambda t, y: jnp.where(y > 2, jnp.nan, y), PIController()),
        (lambda t, y: jnp.cos(1e3 * t)[:, None] + 0 * y, PIController(max_steps=12)),
    ],
    ids=["pole", "nan", "max_steps"],
)
def test_giving_up_is_nan_and_ends(field, controller):
    """A sample that cannot arrive is NaN; its neighbour, which stands still, is not touched."""
    y = jnp.asarray([[0.9], [0.0]])
    field_of_first = lambda t, y: field(t, y) * jnp.asarray([[1.0], [0.0]])  # noqa: E731
    got = solve(field_of_first, y, 0.0, 3.0, controller=controller)
    assert jnp.isnan(got.y[0, 0]) and not got.arrived[0]
    assert got.y[1, 0] == 0.0 and got.arrived[1]


def test_forward_derivative(x64):
    """d y(1)/d y(0) of y' = -y^2 is 1/(1 + y0)^2."""

    def end(y0):
        return integrate(lambda t, y: -(y**2), y0, 0.0, 1.0, controller=PIController(1e-9, 1e-9)).y

    y0 = jnp.asarray([[0.7], [2.0]])
    _, slope = jax.jvp(end, (y0,), (jnp.ones_like(y0),))
    np.testing.assert_allclose(slope, 1 / (1 + y0) ** 2, rtol=1e-6)


def test_no_retrace_for_tolerances():
    traces = []

    def field(t, y):
        traces.append(1)
        return -y

    run = jax.jit(lambda y, controller: integrate(field, y, 0.0, 1.0, controller=controller).y)
    run(jnp.ones((2, 1)), PIController(1e-3, 1e-3))
    once = len(traces)
    run(jnp.ones((2, 1)), PIController(1e-4, 1e-5, 0.4, 0.3))
    assert len(traces) == once


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"atol": 0.0}, "atol must be positive"),
        ({"rtol": -1.0}, "rtol must not be negative"),
        ({"safety": 1.5}, "safety must lie in"),
        ({"max_factor": 0.5}, "max_factor"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
    ],
)
def test_bad_input_raises(kwargs, message):
    with pytest.raises(ValueError, match=message):
        PIController(**kwargs)
