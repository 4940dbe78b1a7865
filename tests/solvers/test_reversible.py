"""Gradients by running backwards: those of plain reverse mode, without its memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core.numerics import canonical
from diffjax.prediction import make_denoiser
from diffjax.processes import VP
from diffjax.solvers import (
    BDIADDIM,
    BDIAEDM,
    DDIM,
    Keep,
    ToEnd,
    Tweedie,
    grids,
    sample,
    sample_reversible,
)

KEY = jax.random.key(0)
N = 8


def net(variables, x, t, label):
    """A small network with a condition, which may be an integer."""
    return jnp.tanh(x @ variables["a"] + (t + label / 3)[:, None]) @ variables["b"]


def problem(dtype=float):
    rng = np.random.default_rng(0)
    variables = {"a": 0.3 * rng.standard_normal((3, 8)), "b": 0.3 * rng.standard_normal((8, 3))}
    x = rng.standard_normal((4, 3))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (variables, x))


def loss(how, final, variables, x, times, solver, process, label=None):
    """The sum of squares of a solve by `how`."""
    label = jnp.arange(x.shape[0]) if label is None else label
    denoise = make_denoiser(net, process, kind="v", variables=variables, cond=label)
    end = how(KEY, denoise, x, times, solver=solver, process=process, final=final)
    return jnp.sum(end.x**2)


def gradients(how, final, *arguments):
    """Value and gradients with respect to weights, x, times, solver and process."""
    function = functools.partial(loss, how, final)
    return jax.jit(jax.value_and_grad(function, argnums=(0, 1, 2, 3, 4)))(*arguments)


def close(found, expected, rtol):
    """Leaf by leaf, relative to the leaf's largest value."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * max(np.abs(b).max(), 1e-12))


CASES = {
    "ddim to the end": (BDIADDIM(), ToEnd(), False),
    "ddim, gamma 0.8, tweedie": (BDIADDIM(0.8), Tweedie(), False),
    "ddim up": (BDIADDIM(0.9), Keep(), True),
    "edm to the end": (BDIAEDM(), ToEnd(), False),
    "edm up": (BDIAEDM(0.9), Keep(), True),
}
QUICK = "ddim, gamma 0.8, tweedie"
SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in CASES if case != QUICK]


def grid(final, up):
    process = VP(t_min=1e-2)
    times = grids.log_snr(process, N)
    times = times if isinstance(final, ToEnd) else times[:-1]
    return canonical(process), times[::-1] if up else times


@pytest.mark.parametrize("case", [QUICK, *SLOW])
def test_gradients_are_those_of_plain_reverse_mode(case, x64):
    solver, final, up = CASES[case]
    process, times = grid(final, up)
    arguments = (*problem(), times, canonical(solver), process)
    found, expected = (gradients(how, final, *arguments) for how in (sample_reversible, sample))
    close(found, expected, 1e-9)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found[1][:3]))


@pytest.mark.slow
def test_gradients_in_float32():
    process, times = grid(ToEnd(), False)
    arguments = (*problem(jnp.float32), times, canonical(BDIADDIM()), process)
    found, expected = (gradients(how, ToEnd(), *arguments) for how in (sample_reversible, sample))
    close(found, expected, 1e-4)


def test_gradients_are_finite_differences(x64):
    process, times = grid(ToEnd(), False)
    variables, x = problem()
    function = functools.partial(loss, sample_reversible, ToEnd())
    run = jax.jit(function)
    found = gradients(sample_reversible, ToEnd(), variables, x, times, BDIADDIM(0.9), process)[1]
    rng = np.random.default_rng(1)
    for which, tree in enumerate((variables, x, times)):
        way = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape)), tree)
        if which == 2:
            way = way.at[-1].set(0) * times  # the grid still ends at 0
        slope = sum(
            jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (found[which], way)), strict=True)
        )
        # The network's time label is float32, so a small change of a time is lost in its rounding.
        h, rtol = (1e-4, 1e-4) if which == 2 else (1e-6, 1e-7)
        values = []
        for sign in (1, -1):
            arguments = [variables, x, times]
            arguments[which] = jax.tree.map(lambda leaf, d, k=sign * h: leaf + k * d, tree, way)
            values.append(run(*arguments, BDIADDIM(0.9), process))
        np.testing.assert_allclose(slope, (values[0] - values[1]) / (2 * h), rtol=rtol)


@pytest.mark.slow
def test_a_plain_callable_and_vmap(x64):
    """Weights that a function closes over get their gradient, and integers do no harm."""
    process, times = grid(ToEnd(), False)
    variables, x = problem()

    def through(how, scale, label):
        denoise = make_denoiser(net, process, kind="v", variables=variables, cond=label)
        plain = lambda x, t: denoise(scale * x, t)  # noqa: E731
        end = how(KEY, plain, x, times, solver=BDIADDIM(), process=process)
        return jnp.sum(end.x**2)

    labels = jnp.stack([jnp.arange(4), jnp.arange(4) + 2])
    scales = jnp.asarray([1.0, 0.9])
    found, expected = (
        jax.jit(jax.vmap(jax.grad(functools.partial(through, how))))(scales, labels)
        for how in (sample_reversible, sample)
    )
    close(found, expected, 1e-9)
    assert np.abs(found).min() > 0


@functools.cache
def compiled(how, n, batch=256):
    """The gradient's program for n steps."""
    process = VP(t_min=1e-2)
    variables, _ = problem(jnp.float32)
    x, label = jnp.zeros((batch, 3)), jnp.zeros(batch)
    times = grids.log_snr(process, n)

    def function(variables, x, times):
        return loss(how, ToEnd(), variables, x, times, BDIADDIM(), process, label)

    return jax.jit(jax.grad(function)).lower(variables, x, times).compile()


def test_memory_does_not_grow_with_steps():
    size = lambda how, n: compiled(how, n).memory_analysis().temp_size_in_bytes  # noqa: E731
    flat = size(sample_reversible, 64) / size(sample_reversible, 8)
    assert flat < 1.1
    assert size(sample, 64) / size(sample, 8) > 4  # what it saves


def test_one_call_serves_the_way_back_and_the_gradient():
    """Products of matrices: 2 there, then 2 again and 4 for the gradient, and 6 at the last step.

    Were the call of `undo` made apart from the step's, there would be 2 more.
    """
    products = re.findall(r" = \S+ (?:dot|custom-call)\(", compiled(sample_reversible, 8).as_text())
    plain = re.findall(r" = \S+ (?:dot|custom-call)\(", compiled(sample, 8).as_text())
    assert len(products) <= len(plain) + 2


def test_what_it_returns_is_what_sample_returns():
    process, times = grid(ToEnd(), False)
    variables, x = problem(jnp.float32)
    denoise = make_denoiser(net, process, kind="v", variables=variables, cond=jnp.arange(4))
    found, expected = (
        jax.jit(functools.partial(how, process=process))(KEY, denoise, x, times, solver=BDIAEDM())
        for how in (sample_reversible, sample)
    )
    np.testing.assert_allclose(found.x, expected.x, rtol=1e-5, atol=1e-6)
    assert found.nfe == expected.nfe


def test_what_cannot_work_raises():
    process, times = grid(ToEnd(), False)
    variables, x = problem(jnp.float32)
    denoise = make_denoiser(net, process, kind="v", variables=variables, cond=jnp.arange(4))
    call = functools.partial(sample_reversible, KEY, denoise, x, times, process=process)
    with pytest.raises(TypeError, match="DDIM has no inverse step"):
        call(solver=DDIM())
    with pytest.raises(ValueError, match="gamma = 0.1 and 8 intervals"):
        call(solver=BDIADDIM(0.1))
    with pytest.raises(ValueError, match="must decrease"):
        sample_reversible(KEY, denoise, x, times[:1].repeat(3), solver=BDIADDIM(), process=process)
