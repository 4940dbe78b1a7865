"""`centre`: a process with an anchor, sampled by solvers that know of none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core.pytree import pytree
from diffjax.core.types import Coeffs, Number, Prediction
from diffjax.prediction import anchored, centre, kinds, make_denoiser, to_centred, uncentre
from diffjax.processes import MeanReverting, derivatives, perturb
from diffjax.solvers import DDIM, grids, sample
from tests import members
from tests.oracles import gaussian

D = 3
T = 0.4


@pytest.fixture
def given(x64):
    """x0, y and eps, (4, D)."""
    return (jnp.asarray(a) for a in np.random.default_rng(0).standard_normal((3, 4, D)))


@pytree
class Bridge:
    """A user's process with an anchor and alpha + beta = 1.5 at t = 1: no reversion to y."""

    t_min: Number = 1e-3
    t_max: Number = 1.0

    def coeffs(self, t):
        t = jnp.asarray(t)
        return Coeffs(1 - 0.9 * t, 1.4 * t, t)


PROCESSES = [MeanReverting(), Bridge()]


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_the_centred_law(process, given):
    """u_t is alpha (x0 - y) + sigma eps, the law of the shifted data without an anchor."""
    x0, y, eps = given
    u = to_centred(perturb(process, x0, T, eps, anchor=y), process, y, T)
    np.testing.assert_allclose(u, perturb(process, x0 - y, T, eps), rtol=1e-12, atol=1e-14)
    again = uncentre(u, process, y, T)
    np.testing.assert_allclose(again, perturb(process, x0, T, eps, anchor=y), rtol=1e-12)
    times = jnp.linspace(0.1, 0.9, 4)  # one a sample
    u = to_centred(perturb(process, x0, times, eps, anchor=y), process, y, times)
    np.testing.assert_allclose(u, perturb(process, x0 - y, times, eps), rtol=1e-11, atol=1e-13)


class Posterior:
    """E[x0 | x_t, y] for x0 ~ N(m + y/2, d^2), by the normal equations of x_t itself."""

    def __init__(self, process, y):
        self.process, self.y, self.oracle = process, y, gaussian(D, jnp.float64)

    def __call__(self, x, t):
        c = self.process.coeffs(t)
        mean, variance = self.oracle.mean[None] + self.y / 2, self.oracle.std[None] ** 2
        precision = 1 / variance + c.alpha**2 / c.sigma**2
        pull = mean / variance + c.alpha * (x - c.beta * self.y) / c.sigma**2
        x0 = pull / precision
        return Prediction(x0, (x - c.alpha * x0 - c.beta * self.y) / c.sigma)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_a_solve_samples_the_posterior(process, given):
    """In centred coordinates, many small DDIM steps follow the exact flow of N(m - y/2, d^2)."""
    _, y, eps = given
    times = grids.quadratic(process, 400)
    start = eps * process.coeffs(times[0]).sigma
    denoise = centre(Posterior(process, y), process, y)
    u = sample(jax.random.key(0), denoise, start, times, solver=DDIM(), process=process).x
    oracle = gaussian(D, jnp.float64)
    shift = lambda t: process.coeffs(t).alpha * y / 2  # noqa: E731
    first, last = times[0], times[-1]
    exact = oracle.flow(process, start + shift(first), first, last) - shift(last)
    np.testing.assert_allclose(u, exact, atol=5e-3)
    x = uncentre(u, process, y, last)
    np.testing.assert_allclose(x, u + y, rtol=1e-12)  # at t = 0 the anchor's own share is 0


KINDS = [m for m in members.KINDS if m.name not in ("velocity",)]


@pytest.mark.parametrize("member", KINDS, ids=members.ids)
def test_a_network_of_any_kind(member, given):
    """One that says a x0 + b eps at x_t: `anchored` finds x0 and eps, `make_denoiser` does not."""
    x0, y, eps = given
    process = PROCESSES[1]
    out = kinds.target(member.kind, process, x0, eps, T)
    x_t = perturb(process, x0, T, eps, anchor=y)
    plain = make_denoiser(lambda x, t: out, process, kind=member.kind)
    found = anchored(plain, y)(x_t, T)
    np.testing.assert_allclose(found.x0, x0, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.eps, eps, rtol=1e-9, atol=1e-12)
    ignorant = plain(x_t, T)
    gap = max(float(jnp.abs(a - b).max()) for a, b in zip(ignorant[:2], (x0, eps), strict=True))
    assert gap > 0.1
    through = centre(anchored(plain, y), process, y)(to_centred(x_t, process, y, T), T)
    np.testing.assert_allclose(through.x0, x0 - y, rtol=1e-9, atol=1e-12)


def test_velocity_is_without_the_anchors_part(given):
    x0, y, eps = given
    process = PROCESSES[1]
    rate = derivatives(process, T)
    out = rate.alpha * x0 + rate.sigma * eps
    plain = make_denoiser(lambda x, t: out, process, kind="velocity")
    found = anchored(plain, y)(perturb(process, x0, T, eps, anchor=y), T)
    np.testing.assert_allclose(found.x0, x0, rtol=1e-9)


def test_take_gathers_the_anchor(given):
    x0, y, eps = given
    process = PROCESSES[0]

    def net(x, label, cond):
        return x * cond[:, None]

    cond = jnp.arange(1.0, 5.0)
    denoise = make_denoiser(net, process, kind="eps", cond=cond)
    both = centre(anchored(denoise, y), process, y)
    index = jnp.asarray([2, 0])
    found = both.take(index)(x0[index], T)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b[index], rtol=1e-12), found[:2], both(x0, T)[:2]
    )


def test_times_are_checked_inside():
    process = PROCESSES[0]
    y = jnp.zeros((1, 2))
    denoise = centre(make_denoiser(lambda x, t: x, process, kind="score"), process, y)
    with pytest.raises(ValueError, match="does not determine"):
        denoise.check_times(jnp.asarray([0.5, 0.0]))
    centre(lambda x, t: x, process, y).check_times(jnp.asarray([0.0]))
