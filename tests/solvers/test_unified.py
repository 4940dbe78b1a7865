"""A table of methods: equal to each method alone, and to a mixture stepped by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core.pytree import replace
from diffjax.processes import VP, prior
from diffjax.solvers import (
    DDIM,
    DEIS,
    DPMSolver,
    DPMSolverPP,
    Multistep,
    SDEDPMSolverPP,
    Unified,
    UniPC,
    grids,
    sample,
    unified,
)
from diffjax.solvers.multistep import History
from diffjax.testing import mixture

PROCESS = VP()
CHOICES = unified().choices
N = 7
DRAW = jax.jit(sample, static_argnames="save")

pytestmark = pytest.mark.usefixtures("x64")


def problem():
    denoise = mixture(3, jnp.float64).denoiser(PROCESS)
    x = prior(jax.random.key(0), PROCESS, (32, 3), jnp.float64)
    return denoise, x, grids.log_snr(PROCESS, N)


def draw(solver):
    denoise, x, times = problem()
    return DRAW(jax.random.key(0), denoise, x, times, solver=solver, process=PROCESS).x


QUICK = [4, 6]


@pytest.mark.parametrize(
    "place",
    [pytest.param(i, marks=() if i in QUICK else pytest.mark.slow) for i in range(len(CHOICES))],
)
def test_the_same_method_everywhere(place):
    table = jnp.full((N,), place)
    np.testing.assert_allclose(draw(Unified(CHOICES, table)), draw(CHOICES[place]), atol=1e-12)


def test_a_mixture_by_hand():
    """Each step is the chosen method's own, given the true history of predictions."""
    choices = (Multistep(1), DPMSolverPP(3), DEIS(2), Multistep(2, "eps"))
    table = [0, 1, 2, 1, 3, 1, 0]
    denoise, x, times = problem()
    x0s, epss = [], []
    for i in range(N):
        choice, here = choices[table[i]], denoise(x, times[i])
        past = (x0s if choice.prediction == "x0" else epss)[: choice.order - 1]
        seen = times[max(i - choice.order + 1, 0) : i][::-1]
        missing = choice.order - 1 - len(past)
        past = (*past, *[jnp.zeros_like(x)] * missing)
        seen = jnp.concatenate([seen, jnp.full((missing,), times[0])])
        state = History(x, past, seen, jnp.zeros((choice.order - 1,)), jnp.asarray(i))
        move = choice.step if i < N - 1 else choice.finish
        x = move(None, denoise, PROCESS, state, times[i], times[i + 1]).x
        x0s, epss = [here.x0, *x0s], [here.eps, *epss]
    np.testing.assert_allclose(draw(Unified(choices, jnp.asarray(table))), x, atol=1e-12)


def test_a_corrector_corrects_the_step_before():
    """Table [DPM++2, UniPC]: the second step starts from x with the corrected polynomial."""
    denoise, x, times = problem()
    choices = (DPMSolverPP(2), UniPC(2))

    def path(table):
        solver = Unified(choices, jnp.asarray(table))
        given = {"solver": solver, "process": PROCESS, "save": lambda state: state.x}
        return DRAW(jax.random.key(0), denoise, x, times, **given).saved

    # The first two predictors agree, and from the third step on all is UniPC's.
    np.testing.assert_allclose(path([0, 1, 1, 1, 1, 1, 1]), path([1] * N), atol=1e-12)
    assert np.abs(path([0, 0, 1, 1, 1, 1, 1])[1] - path([1] * N)[1]).max() > 1e-4


def test_one_program_for_all_tables(fresh_cache):
    denoise, x, times = problem()
    run = lambda *args, **given: sample(*args, **given)  # noqa: E731
    runs = jax.jit(run)
    for table in ([0] * N, [4] * N, [1, 2, 3, 4, 5, 6, 0]):
        solver = replace(unified(), table=jnp.asarray(table))
        runs(jax.random.key(0), denoise, x, times, solver=solver, process=PROCESS)
    assert runs._cache_size() == 1


@pytest.mark.parametrize(
    ("choices", "table", "match"),
    [
        ((DDIM(),), [0], "deterministic members of the multistep family"),
        ((SDEDPMSolverPP(2),), [0], "deterministic members of the multistep family"),
        ((DPMSolver(3),), [0], "deterministic members of the multistep family"),
        ((UniPC(2),), [1], "integers from 0 to 0"),
        ((UniPC(2),), [[0]], r"shape \(n,\)"),
        ((UniPC(2),), [0.0], "must hold integers; got float"),
        ((), [0], "the number of choices"),
    ],
)
def test_refusals(choices, table, match):
    with pytest.raises(ValueError, match=match):
        Unified(choices, jnp.asarray(table))
