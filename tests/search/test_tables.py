"""Tables of solvers fitted to a model (the unified framework's search), and their file.

The claim. Case: three modes in 4 dimensions, exact denoiser, VP, 6 equal steps of the log-SNR.
Metric: the root mean square distance to a fine solution from the same starts, which the search has
not seen. Margin, for every seed: less than 0.8 of the error of the best single choice.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import search
from diffjax.core.pytree import replace
from diffjax.processes import VP
from diffjax.search.schedule import ScheduleError
from diffjax.solvers import DDIM, grids, unified
from diffjax.testing import mixture

PROCESS, DIM, STEPS = VP(), 4, 6
TIMES = grids.log_snr(PROCESS, STEPS)


def find(seed, solver, method, **space):
    return search.optimise_schedule(
        jax.random.key(seed),
        mixture(DIM).denoiser(PROCESS),
        PROCESS,
        shape=(128, DIM),
        solver=solver,
        times=TIMES,
        objective=search.FineSolution(grids.log_snr(PROCESS, 100)),
        method=method,
        space=search.table_space(PROCESS, solver, TIMES, **space),
    )


def test_a_search_ends_with_a_table(tmp_path):
    """Every entry is a choice; the file brings back the same solver; others refuse it."""
    method = search.Evolution(population=3, generations=1, parents=1)
    found = find(0, unified([0]), method)
    assert found.table["table"].shape == (STEPS,)
    found.save(tmp_path / "table.json")
    again = search.load_schedule(tmp_path / "table.json")
    solver = again.with_table(unified())
    np.testing.assert_array_equal(solver.table, found.table["table"])
    again.check_fits(PROCESS, solver)
    with pytest.raises(ScheduleError, match="which DDIM does not take"):
        again.with_table(DDIM())
    with pytest.raises(ScheduleError, match="searched for the solver"):
        again.check_fits(PROCESS, replace(solver, table=(solver.table + 1) % 7))


@pytest.mark.parametrize(
    ("fine", "times", "match"),
    [
        (grids.log_snr(PROCESS, 100, t_max=0.9), TIMES, "fine grid's first time"),
        (grids.log_snr(PROCESS, 100, t_max=0.9), TIMES.at[0].set(0.9), "prior at t_max"),
    ],
)
def test_grids_that_cannot_be_compared(fine, times, match):
    with pytest.raises(ValueError, match=match):
        search.optimise_schedule(
            jax.random.key(0),
            mixture(DIM).denoiser(PROCESS),
            PROCESS,
            shape=(2, DIM),
            solver=DDIM(),
            times=times,
            objective=search.FineSolution(fine),
        )


def test_the_gradient_refuses_integers():
    with pytest.raises(ValueError, match="floating-point"):
        find(0, unified([0]), search.Gradient(steps=1))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_table_is_better_than_any_choice(seed):
    method = search.PredictorSearch(initial=32, rounds=3, proposals=128, scored=16)
    alone = [
        find(seed, unified([place]), search.Evolution(population=2, generations=1, parents=1))
        for place in range(len(unified().choices))
    ]
    found = find(seed, unified([4]), method, move=True)
    best = min(each.before for each in alone)
    assert found.after < 0.8 * best, (found.before, found.after, best)


def test_entries_repeat_at_the_end():
    space = search.table_space(PROCESS, unified([1, 4]), TIMES)
    np.testing.assert_array_equal(space.first["table"], [1, 4, 4, 4, 4, 4])
    assert space.features(space.first).shape == (STEPS * len(unified().choices),)
    changed = space.mutate(jax.random.key(0), space.first)["table"]
    assert jnp.all((changed >= 0) & (changed < len(unified().choices)))
