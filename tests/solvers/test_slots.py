"""Refilled slots against the solve of all samples at once, and against a queue counted by hand."""

import heapq

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import random
from diffjax.core.pytree import pytree
from diffjax.core.types import Prediction
from diffjax.processes import VP, prior
from diffjax.solvers import (
    AdaptiveSDE,
    DPMSolverAdaptive,
    EmbeddedRungeKutta,
    Keep,
    PIController,
    Tweedie,
    sample_many,
    solve_adaptive,
)
from diffjax.solvers.tableaus import BOGACKI_SHAMPINE, DORMAND_PRINCE
from tests.oracles import Gaussian, mixture
from tests.solvers.helpers import Counter, standard_normal

# Without LLVM's optimiser: what is equal is equal in every bit, and it compiles faster.
PLAIN = {"xla_backend_optimization_level": 0}
solve = jax.jit(solve_adaptive, static_argnames=("method", "slots"), compiler_options=PLAIN)
KEY = jax.random.key(0)
PROCESS, HIGH, LOW = VP(), 1.0, 1e-3
METHODS = {
    "dormand_prince": DORMAND_PRINCE,
    "dpm_3": DPMSolverAdaptive(3),
    "sde": AdaptiveSDE(),
}
LOOSE = PIController(0.05, 0.01)


@pytree
class Spread:
    """Data N(mean_i, std_i^2) for sample i: std 1 is no flow at all, a small one many steps."""

    mean: jax.Array  # (B, 1)
    std: jax.Array  # (B, 1)

    def __call__(self, x, t):
        alpha, _, sigma = (jnp.broadcast_to(c, (x.shape[0],))[:, None] for c in PROCESS.coeffs(t))
        centred, variance = x - alpha * self.mean, (alpha * self.std) ** 2 + sigma**2
        return Prediction(
            self.mean + alpha * self.std**2 / variance * centred, sigma / variance * centred
        )

    def take(self, index):
        return Spread(self.mean[index], self.std[index])


def spread(count, dtype=jnp.float32):
    """Samples of very different difficulty, in no order."""
    order = np.arange(count) * 5 % count
    std = np.geomspace(1.0, 0.01, count)[order][:, None]
    return Spread(jnp.asarray(standard_normal(2, (count, 1)), dtype), jnp.asarray(std, dtype))


def starts(count, dtype=jnp.float32):
    return jnp.asarray(standard_normal(0, (count, 3)), dtype)


def rounds_of_a_queue(attempts, slots):
    """When the last of the samples has left: each goes to the slot that is free first."""
    free = [0] * slots
    for needed in attempts:
        heapq.heapreplace(free, free[0] + int(needed))
    return max(free)


@pytest.mark.parametrize(
    "name", [n if n == "sde" else pytest.param(n, marks=pytest.mark.slow) for n in METHODS]
)
def test_each_sample_is_that_of_the_whole_batch(name):
    """Bit for bit, for every number of slots; and the rounds are those of a queue."""
    denoise, x = spread(13), starts(13)
    options = {"process": PROCESS, "method": METHODS[name], "controller": LOOSE}
    whole = solve(KEY, denoise, x, HIGH, LOW, **options)
    attempts = np.asarray(whole.state.accepted + whole.state.rejected)
    assert whole.state.rounds == attempts.max() and whole.state.arrived.all()
    assert attempts.max() > 1.15 * attempts.mean()
    for slots in (4, 1) if name == "dpm_3" else (4,):
        got = solve(KEY, denoise, x, HIGH, LOW, slots=slots, **options)
        np.testing.assert_array_equal(got.x, whole.x)
        for a, b in zip(got.state[:-1], whole.state[:-1], strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(got.nfe, whole.nfe)
        assert got.state.rounds == rounds_of_a_queue(attempts, slots)
        assert got.state.rounds <= attempts.sum() / slots + attempts.max()
        one_by_one = sum(attempts[i : i + slots].max() for i in range(0, 13, slots))
        assert got.state.rounds < one_by_one or slots == 1


def test_calls_that_ran():
    """Rounds of the loop, starts and ends in chunks: nothing else."""
    counter, x = Counter(mixture(3).denoiser(PROCESS)), starts(10)
    method = EmbeddedRungeKutta(BOGACKI_SHAMPINE)
    run = jax.jit(
        lambda x: solve_adaptive(
            KEY, counter, x, HIGH, LOW, process=PROCESS, method=method, controller=LOOSE, slots=4
        ),
        compiler_options=PLAIN,
    )
    got = run(x)
    chunks = 3
    assert counter.read() == got.state.rounds * method.stages + chunks * (2 + 1)


@pytest.mark.parametrize(
    "final",
    [
        pytest.param(Keep(), id="kept", marks=pytest.mark.slow),
        pytest.param(Tweedie(), id="denoised"),
    ],
)
def test_conditions_go_with_their_samples(final, x64):
    """A law for each sample, which `take` gathers: each ends where its own flow leads."""
    own, x = spread(7, jnp.float64), starts(7, jnp.float64)
    tight = PIController(1e-9, 1e-9)
    got = solve(KEY, own, x, HIGH, LOW, process=PROCESS, controller=tight, slots=3, final=final)
    for i in range(7):
        law = Gaussian(jnp.tile(own.mean[i], 3), jnp.tile(own.std[i], 3))
        end = law.flow(PROCESS, x[i : i + 1], jnp.asarray(HIGH), jnp.asarray(LOW))
        if isinstance(final, Tweedie):
            end = law.denoiser(PROCESS)(end, jnp.asarray(LOW)).x0
        np.testing.assert_allclose(got.x[i], end[0], atol=1e-6)


def test_sample_many_is_a_function_of_the_key():
    """The prior's draw of each key, solved, whatever n and batch: here of the first eight alone."""
    denoise = mixture().denoiser(PROCESS)
    options = {"process": PROCESS, "method": DPMSolverAdaptive(2), "controller": LOOSE}
    draw = jax.jit(
        sample_many,
        static_argnames=("n", "batch", "shape", "method"),
        compiler_options=PLAIN,
    )
    many = draw(KEY, denoise, n=9, batch=4, shape=(2,), **options)
    keys = random.sample_keys(KEY, 8)
    x = prior(keys, PROCESS, (8, 2))
    whole = solve(keys, denoise, x, PROCESS.t_max, PROCESS.t_min, **options)
    np.testing.assert_allclose(many.x[:8], whole.x, atol=1e-5)
    np.testing.assert_array_equal(many.nfe[:8], whole.nfe)


def test_reverse_mode_says_what_to_do():
    denoise, x = spread(3), starts(3)

    def total(x):
        return jnp.sum(solve_adaptive(KEY, denoise, x, HIGH, LOW, process=PROCESS, slots=2).x)

    with pytest.raises(TypeError, match=r"jax.jvp.*bounded=True"):
        jax.jit(jax.grad(total))(x)


@pytest.mark.slow
def test_a_sample_that_is_given_up_leaves_its_slot():
    denoise, x = spread(9), starts(9)
    options = {"process": PROCESS, "controller": PIController(0.05, 0.01, max_steps=5)}
    whole = solve(KEY, denoise, x, HIGH, LOW, **options)
    got = solve(KEY, denoise, x, HIGH, LOW, slots=2, **options)
    assert 0 < whole.state.arrived.sum() < 9
    np.testing.assert_array_equal(got.state.arrived, whole.state.arrived)
    np.testing.assert_array_equal(got.x, whole.x)
    assert jnp.isnan(got.x[~got.state.arrived]).all()


BAD = {
    "bounded": ({"slots": 2, "controller": PIController(bounded=True)}, ValueError, "leave out"),
    "none": ({"slots": 0}, ValueError, "slots must be at least 1"),
    "float": ({"slots": 2.0}, TypeError, "slots must be an int"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_say_what_and_how(case):
    options, kind, message = BAD[case]
    denoise = mixture().denoiser(PROCESS)
    with pytest.raises(kind, match=message):
        solve_adaptive(KEY, denoise, jnp.ones((3, 2)), HIGH, LOW, process=PROCESS, **options)


def test_sample_many_wants_one_way_to_start():
    with pytest.raises(ValueError, match="either shape=.*or draw="):
        sample_many(KEY, mixture().denoiser(PROCESS), 3, 2, process=PROCESS)
