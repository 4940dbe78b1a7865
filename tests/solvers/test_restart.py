"""Restart sampling: its path, its law on Gaussian data, the contraction of errors, calls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import random
from diffjax.core.numerics import combine
from diffjax.processes import EDM, VP
from diffjax.processes.calculus import transition
from diffjax.solvers import (
    DPMSolverPP,
    Heun,
    Keep,
    Midpoint,
    Restart,
    ToEnd,
    Tweedie,
    grids,
    sample,
    sample_with_restarts,
)
from diffjax.solvers.restart import restart_path
from tests.oracles import gaussian
from tests.solvers.helpers import Counter, standard_normal

MAIN = jnp.asarray([5.0, 3.0, 1.0, 0.5, 0.0])


def test_path_by_hand():
    """Two restarts, given in the wrong order, with ends that are moved to nodes."""
    low = Restart(jnp.asarray([2.0, 0.9, 0.4]), repeats=2)
    high = Restart(jnp.asarray([4.0, 2.9]), noise=0.5)
    level, start, end, noise = restart_path(MAIN, [low, high])
    moves = [
        (5.0, 5.0, 3.0, 0.0),
        (3.0, 4.0, 3.0, 0.5),
        (3.0, 3.0, 1.0, 0.0),
        (1.0, 1.0, 0.5, 0.0),
        (0.5, 2.0, 0.9, 1.0),
        (0.9, 0.9, 0.5, 0.0),
        (0.5, 2.0, 0.9, 1.0),
        (0.9, 0.9, 0.5, 0.0),
        (0.5, 0.5, 0.0, 0.0),
    ]
    np.testing.assert_array_equal(
        np.stack([level, start, end, noise], 1), np.asarray(moves, np.float32)
    )


def solve(key, x, restarts, solver=Heun(), process=EDM(), times=MAIN, denoise=None, **kwargs):
    denoise = gaussian(2, x.dtype).denoiser(process) if denoise is None else denoise
    return sample_with_restarts(
        key, denoise, x, times, solver=solver, process=process, restarts=restarts, **kwargs
    )


@pytest.mark.usefixtures("x64")
def test_restart_is_its_parts(key):
    """The same numbers as three calls of `sample` with the noise added by hand; jit is eager."""
    process, denoise = VP(), gaussian(2, jnp.float64).denoiser(VP())
    times, inner = grids.uniform(process, 4), jnp.asarray([0.9, 0.7, 0.5])
    x = jnp.asarray(standard_normal(1, (3, 2)))
    result = jax.jit(lambda x: solve(key, x, [Restart(inner, 1)], Heun(), process, times))(x)
    given = {"solver": Heun(), "process": process}
    x = sample(key, denoise, x, times[:3], final=Keep(), **given).x
    a, variance = transition(process, inner[0], times[2])
    z = random.normal_like(random.step_keys(random.sample_keys(key, 3), 2), "restart", x)
    x = combine((a, x), (jnp.sqrt(variance), z))
    x = sample(key, denoise, x, inner.at[-1].set(times[2]), final=Keep(), **given).x
    x = sample(key, denoise, x, times[2:], **given).x
    np.testing.assert_allclose(result.x, x, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("final", [ToEnd(), Tweedie()])
def test_declared_calls_are_the_calls_that_run(final, key):
    counter = Counter(gaussian(2).denoiser(EDM()))
    times = MAIN if isinstance(final, ToEnd) else MAIN[:-1]
    inner = Restart(jnp.asarray([3.0, 2.0, 1.0]), repeats=3)
    run = jax.jit(lambda x: solve(key, x, [inner], denoise=counter, times=times, final=final).nfe)
    expected = 3 * 2 + 3 * 2 * 2 + 1
    assert run(jnp.ones((2, 2))) == counter.read() == expected


def variances(key, repeats, noise=1.0, start=1.0, count=40_000):
    """Variance at the end over that of the data, each element, with a fine deterministic solver."""
    process, oracle = EDM(), gaussian(2)
    times = grids.karras(process, 24, t_max=5.0)
    deviation = jnp.sqrt(25.0 + oracle.std**2)
    z = jax.random.normal(jax.random.key(1), (count, 2))
    x = oracle.mean[None] + start * deviation[None] * z
    inner = [Restart(grids.karras(process, 12, t_max=2.0, end=0.3), repeats, noise)]
    end = jax.jit(lambda x: solve(key, x, inner, times=times, solver=Midpoint()).x)(x)
    node = times[1 + int(jnp.argmin(jnp.abs(times[1:-1] - 0.3)))]
    up, low = oracle.std**2 + 4.0, oracle.std**2 + node**2
    return end.var(0) / oracle.std**2, np.asarray(low / up)


@pytest.mark.slow
def test_the_law_is_kept_and_errors_contract(key):
    """Truth by hand: a repeat multiplies a relative error of the variance by V(t_min)/V(t_max).

    V' = V(t_min)/V(t_max) (V_now + s^2 b^2), b^2 = t_max^2 - t_min^2, with the closed form of the
    flow of Gaussian data. 40,000 samples: 4 standard errors are 2.8%.
    """
    error = 4 * np.sqrt(2 / 40_000)
    good, ratio = variances(key, 2)
    np.testing.assert_allclose(good, 1, atol=error)
    off, _ = variances(key, 1, start=2.0)
    np.testing.assert_allclose(off, 1 + 3 * ratio, rtol=error)
    assert (off - 1 > 2 * error).any()  # the start's error is still seen after one repeat
    # The mutant: noise 3% too strong in each repeat.
    wrong, _ = variances(key, 2, noise=1.03)
    assert np.abs(wrong - 1).max() > error


def test_batch_does_not_matter(key):
    """A sample depends on its own key and start alone."""
    x = jax.random.normal(jax.random.key(1), (4, 2))
    keys = random.sample_keys(key, 4)
    run = jax.jit(lambda keys, x: solve(keys, x, [Restart(jnp.asarray([3.0, 1.0]), 2)]).x)
    order = jnp.asarray([2, 0])
    np.testing.assert_allclose(run(keys, x)[order], run(keys[order], x[order]), rtol=1e-5)


def test_errors(key):
    x, inner = jnp.ones((2, 2)), Restart(jnp.asarray([3.0, 1.0]))
    for change, message in (
        ({"times": jnp.asarray([1.0, 0.0])}, "needs 2 intervals or more; got 1"),
        ({"times": MAIN[-2::-1], "final": Keep()}, "the grid must decrease"),
        ({"restarts": [Restart(jnp.asarray([0.9, 0.8]))]}, "must decrease to the node"),
        ({"solver": DPMSolverPP(2), "times": MAIN}, "keeps a history"),
    ):
        given = {"restarts": [inner]} | change
        with pytest.raises(ValueError, match=message):
            solve(key, x, given.pop("restarts"), **given)
    for bad, message in (
        ({"times": jnp.asarray([1.0, 2.0])}, "must decrease strictly"),
        ({"times": jnp.asarray([2.0, 1.0]), "repeats": 0}, "repeats must be at least 1"),
        ({"times": jnp.asarray([2.0, 1.0]), "noise": -1.0}, "noise must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            Restart(**bad)
