"""The harness for a user's own solver: ours pass it, and each wrong solver fails its check."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from diffjax.core.numerics import combine
from diffjax.core.pytree import pytree
from diffjax.processes import EDM, VE, RectifiedFlow, velocity
from diffjax.solvers import DDIM, Ancestral, Heun, XState
from diffjax.solvers.euler import linear_step
from diffjax.testing import check_solver, conformance
from tests import members
from tests.laws import mutants
from tests.solvers.helpers import Mutant, noise_scaled_by


def only(*names):
    """What to leave out so that these checks are made."""
    return [name for name in conformance._CHECKS if name not in names]


def wrong_sign(solver, keys, denoise, process, state, t, s):
    """DDIM with the noise's sign turned."""
    prediction = denoise(state.x, t)
    return XState(linear_step(process, prediction._replace(eps=-prediction.eps), s))


def one_way(solver, keys, denoise, process, state, t, s):
    """Euler that takes every step for one towards the data."""
    slope = velocity(process, denoise(state.x, t), t)
    return XState(combine((1.0, state.x), (-jnp.abs(s - t), slope)))


@pytree
class AsksAtTheEnd(mutants._OneCall):
    """Corrects its last step at s, where there is no noise left."""

    stochastic = False
    final_stages = 2

    def step(self, keys, denoise, process, state, t, s):
        return DDIM().step(keys, denoise, process, state, t, s)

    def finish(self, keys, denoise, process, state, t, s):
        x = linear_step(process, denoise(state.x, t), s)
        return XState(combine((0.5, x), (0.5, denoise(x, s).x0)))


@pytree
class HalfDeclared(mutants._OneCall):
    """Heun's method that declares one call a step."""

    stochastic = False

    def step(self, keys, denoise, process, state, t, s):
        return Heun().step(keys, denoise, process, state, t, s)


@pytree
class LeavesNoise(mutants._OneCall):
    """Ends with a hundredth of the noise."""

    stochastic = False

    def step(self, keys, denoise, process, state, t, s):
        return DDIM().step(keys, denoise, process, state, t, s)

    def finish(self, keys, denoise, process, state, t, s):
        prediction = denoise(state.x, t)
        return XState(combine((1.0, prediction.x0), (0.01, prediction.eps)))


@pytree
class Counts(mutants._OneCall):
    """Takes steps of the first one's length, as weights for even grids do."""

    stochastic = False

    def init(self, process, x, t):
        return _Remembered(x, jnp.zeros_like(t))

    def step(self, keys, denoise, process, state, t, s):
        h = jnp.where(state.h == 0, s - t, state.h)
        slope = velocity(process, denoise(state.x, t), t)
        return _Remembered(combine((1.0, state.x), (h, slope)), h)


class _Remembered(NamedTuple):
    x: jax.Array
    h: jax.Array


@pytree
class Raises(mutants._OneCall):
    """Does not run."""

    def step(self, keys, denoise, process, state, t, s):
        raise RuntimeError("no such step")


WRONG = {
    "wrong sign": (Mutant(DDIM(), wrong_sign), "order"),
    "wrong order": (Heun(), "order"),
    "half the noise": (Mutant(Ancestral(), noise_scaled_by(0.5)), "moments"),
    "half the noise, exact": (Mutant(Ancestral(), noise_scaled_by(0.5)), "order"),
    "even grids only": (Counts(), "uneven"),
    "one way only": (Mutant(DDIM(), one_way), "round_trip"),
    "calls at sigma = 0": (AsksAtTheEnd(), "times"),
    "calls misdeclared": (HalfDeclared(), "calls"),
    "noise left": (LeavesNoise(), "end"),
    "root of eta": (mutants.RootOfEta(0.0), "gradient"),
    "batch mean": (mutants.BatchMean(), "batch"),
    "first key for all": (mutants.WholeBatchNoise(), "batch"),
    "number as structure": (mutants.StaticEta(), "retrace"),
    "raises": (Raises(), "retrace"),
}


# One for each check, but those that need many samples or a program of their own.
QUICK = (
    "wrong order",
    "calls at sigma = 0",
    "calls misdeclared",
    "noise left",
    "root of eta",
    "first key for all",
    "number as structure",
    "raises",
)


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow) for c in WRONG]
)
def test_a_wrong_solver_fails(case):
    solver, check = WRONG[case]
    report = check_solver(solver, order=1, skip=only(check))
    assert report.failed == (check,), report
    with pytest.raises(AssertionError, match=f"{check} +FAILED"):
        report.raise_if_failed()


@pytest.mark.parametrize(
    "name, order", [("heun", 2), pytest.param("ddim_eta", 1, marks=pytest.mark.slow)]
)
def test_ours_pass(name, order):
    report = check_solver(members.by_name(members.SOLVERS, name).solver, order=order)
    report.raise_if_failed()
    made = {check.name for check in report.checks if check.passed}
    apart = {"moments"} if name == "heun" else {"uneven", "round_trip"}
    assert made == set(conformance._CHECKS) - apart
    assert len(str(report).splitlines()) == 2 + len(conformance._CHECKS)


OTHERS = [
    pytest.param(VE(), id="ve"),
    pytest.param(EDM(), id="edm"),
    pytest.param(RectifiedFlow(), id="flow"),
]


@pytest.mark.slow
@pytest.mark.parametrize("process", OTHERS)
def test_other_processes(process):
    """Where sigma(0) = 0 or not, and where the start has no signal."""
    skip = only("order", "uneven", "calls", "times", "end")
    check_solver(Heun(), process=process, order=2, skip=skip).raise_if_failed()


def test_a_static_solver_keeps_its_numbers():
    """One without leaves has its numbers changed in copies, to count programs."""

    @jax.tree_util.register_static
    @dataclasses.dataclass(frozen=True)
    class Static(mutants._OneCall):
        share: float = 0.5

        def step(self, keys, denoise, process, state, t, s):
            return DDIM().step(keys, denoise, process, state, t, s)

    solver = Static()
    assert check_solver(solver, skip=only("retrace")).failed == ("retrace",)
    assert solver.share == 0.5


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="skip must be one of 'order'"):
        check_solver(DDIM(), skip=["ordre"])


# What the methods of the list do not promise, by name.
NOT_PROMISED = {
    "predictor_corrector": ["order", "moments"],  # Langevin's step size is biased where D is small
    "predictor_corrector_batch": ["order", "batch"],
    "predictor_corrector_paper": ["order", "moments"],
    "annealed_langevin": ["order", "moments", "end"],  # no predictor: it moves by its noise alone
    "replace": ["order", "uneven", "round_trip", "moments", "end"],  # holds to a measurement
    "replace_predictor_corrector": ["order", "uneven", "round_trip", "moments", "end"],
    "churn": ["order"],  # more noise a step on finer grids
    "bdia_ddim": ["round_trip"],  # its own inverse needs the whole state; rounding grows
    "bdia_edm": ["end"],  # its last step keeps the one before
    "unipc": ["order"],  # set to lower its order for grids of N intervals
    "dpm_v3": ["end"],  # its corrector moves x0 too where the statistics are not the model's
    "time_shift": ["order", "uneven", "round_trip"],  # moves the network's times at any n
}
# Where the default grids are too coarse to see the order.
FINER = {"deis_t": (128, 256, 512)}


@pytest.mark.slow
@pytest.mark.parametrize("member", members.SOLVERS, ids=members.ids)
def test_all_of_ours_pass(member):
    report = check_solver(
        member.solver,
        order=member.order or member.weak_order,
        dim=members.D,
        steps=FINER.get(member.name, (64, 128, 256)),
        skip=NOT_PROMISED.get(member.name, []),
    )
    report.raise_if_failed()
