"""What a user's own JAX code asks of `sample`: gradients, one program, guidance, meshes, progress.

Symbols: B samples of D numbers, n intervals.
"""

import functools
import io
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from diffjax.core import random
from diffjax.core.pytree import pytree, replace
from diffjax.core.types import Prediction
from diffjax.guidance import ClassifierGuidance
from diffjax.processes import VP
from diffjax.solvers import (
    DDIM,
    Ancestral,
    EDMChurn,
    Heun,
    Keep,
    ProgressBar,
    ToEnd,
    Tweedie,
    grids,
    sample,
)
from tests.oracles import gaussian, mixture

PROCESS = VP()
D = 3
PLAIN = {"xla_backend_optimization_level": 0}
compiled = functools.partial(jax.jit, compiler_options=PLAIN)


def start(batch=4):
    return jnp.asarray(np.random.default_rng(1).standard_normal((batch, D)))


# --- gradients ---------------------------------------------------------------------------------


def end_of(x, mean, eta, solver=DDIM, **options):
    """A number of the whole solve, smooth in the start, the model and the solver."""
    denoise = replace(gaussian(D, x.dtype), mean=mean).denoiser(PROCESS)
    made = solver(eta=eta) if solver is DDIM else EDMChurn(solver(), s_churn=eta, n_steps=7)
    times = grids.uniform(PROCESS, 7, end=0.0)
    end = sample(jax.random.key(3), denoise, x, times, solver=made, process=PROCESS, **options).x
    return jnp.sum(jnp.sin(end) + end**2)


@functools.cache
def plain_end(solver):
    return compiled(functools.partial(end_of, solver=solver))


SLOW = pytest.mark.slow
OTHERS = [(DDIM, None), (DDIM, 1), (DDIM, 3), (Heun, 4)]
GRADIENTS = [(DDIM, 4), *(pytest.param(*pair, marks=SLOW) for pair in OTHERS)]


@pytest.mark.parametrize("solver, checkpoint", GRADIENTS)
def test_gradients_are_finite_differences(solver, checkpoint, x64):
    """In x, the model's mean and eta or churn: central differences in float64, error ~ 1e-10.

    Six intervals are steps: 3 divides them, 4 does not.
    """
    arguments = (start(), jnp.asarray([0.2, -0.4, 0.6]), jnp.asarray(0.4))
    run = functools.partial(end_of, solver=solver, checkpoint=checkpoint)
    slopes = compiled(jax.grad(run, argnums=(0, 1, 2)))(*arguments)
    plain = plain_end(solver)
    rng, h = np.random.default_rng(0), 1e-5
    for i, slope in enumerate(slopes):
        along = jnp.asarray(rng.standard_normal(slope.shape))
        moved = [[*arguments[:i], arguments[i] + d * along, *arguments[i + 1 :]] for d in (h, -h)]
        difference = (plain(*moved[0]) - plain(*moved[1])) / (2 * h)
        np.testing.assert_allclose(jnp.sum(slope * along), difference, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "final, n_steps, checkpoints",
    [
        (ToEnd(), None, (2,)),
        pytest.param(ToEnd(), None, (1, 5, 100), marks=SLOW),
        pytest.param(ToEnd(), 4, (2,), marks=SLOW),
        pytest.param(Keep(), None, (4,), marks=SLOW),
    ],
)
def test_checkpointing_changes_no_sample(final, n_steps, checkpoints, key):
    """Samples, path and count of calls are the same, whether segments divide the steps or not."""

    @functools.partial(compiled, static_argnames="checkpoint")
    def run(x, final, checkpoint=None, n_steps=None):
        return sample(
            key,
            gaussian(D).denoiser(PROCESS),
            x,
            times,
            solver=DDIM(eta=0.5),
            process=PROCESS,
            final=final,
            save=lambda state: state.x,
            checkpoint=checkpoint,
            n_steps=n_steps,
        )

    times, x = grids.uniform(PROCESS, 6, end=0.0), start().astype(jnp.float32)
    plain = run(x, final, n_steps=n_steps)
    for checkpoint in checkpoints:
        found = run(x, final, checkpoint, n_steps)
        assert found.nfe == plain.nfe
        np.testing.assert_allclose(found.saved, plain.saved, rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(found.x, plain.x, rtol=2e-6, atol=2e-6)


def test_checkpoint_is_checked(key):
    with pytest.raises(ValueError, match="checkpoint must be at least 1; got 0"):
        end_of(start(), jnp.zeros(D), 0.1, checkpoint=0)


@pytree
class Deep:
    """A denoiser of five layers, whose activations a gradient stores."""

    weight: jax.Array

    def __call__(self, x, t):
        y = x
        for _ in range(5):
            y = jnp.tanh(y @ self.weight)
        return Prediction(0.5 * y, x)


@functools.cache
def memory_of_gradient(n, checkpoint):
    """Temporary bytes of the gradient of a solve of n intervals, over those of x."""

    def loss(weight, x, times):
        end = sample(
            jax.random.key(0),
            Deep(weight),
            x,
            times,
            solver=DDIM(),
            process=PROCESS,
            checkpoint=checkpoint,
        ).x
        return jnp.sum(end**2)

    shapes = ((32, 32), (64, 32), (n + 1,))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    program = compiled(jax.grad(loss)).lower(*arguments).compile()
    return program.memory_analysis().temp_size_in_bytes / (4 * math.prod(shapes[1]))


def test_memory_of_a_gradient_is_far_below_a_state_a_step():
    """At checkpoint sqrt(n); plainly it is several states a step."""
    assert memory_of_gradient(257, 16) < 257 / 2


@SLOW
def test_memory_of_gradients():
    """n times a step plainly, n states at checkpoint 1, 2 sqrt(n) states at sqrt(n)."""
    plain = [memory_of_gradient(n, None) for n in (65, 257)]
    steps = [memory_of_gradient(n, 1) for n in (65, 257)]
    roots = [memory_of_gradient(n, k) for n, k in ((65, 8), (257, 16))]
    assert plain[1] - plain[0] > 5 * 192  # five layers or more an interval
    assert 192 <= steps[1] - steps[0] < 1.2 * 192  # a state an interval
    assert 16 <= roots[1] - roots[0] < 20  # from 2 * 8 to 2 * 16 states
    assert roots[1] < plain[1] / 25


# --- one program -------------------------------------------------------------------------------


@pytree
class ExactClassifier:
    """(x_t, t) -> ln p(y, x_t) of the mixture's components, (B, K)."""

    process: VP

    def __call__(self, x_t, t):
        alpha, _, sigma = self.process.coeffs(t)
        return mixture(D)._parts(alpha, sigma, x_t)[2]


def guided(labels, scale, process=PROCESS):
    guide = ClassifierGuidance(ExactClassifier(process), process, jnp.asarray(labels), scale)
    return guide(mixture(D).denoiser(process))


def test_one_program_serves_every_knob(key, fresh_cache):
    """Twenty settings of guidance, eta, churn, range, number of steps, labels, schedule: one."""
    traces = []

    @jax.jit
    def draw(key, denoise, x, times, n_steps, solver, process):
        traces.append(None)
        return sample(key, denoise, x, times, solver=solver, process=process, n_steps=n_steps).x

    ends = []
    x = start(6).astype(jnp.float32)
    for i in range(20):
        process = VP(beta_max=20.0 - 0.1 * i)
        grid = np.linspace(1.0 - 0.01 * i, 0.0, 6 + i % 4, dtype=np.float32)
        times, n_steps = grids.padded(grid, 16)
        solver = EDMChurn(DDIM(eta=0.05 * i), s_churn=0.1 * i, n_steps=5.0 + i, s_min=0.01 * i)
        denoise = guided(jnp.arange(6) * i % 3, 0.2 * i, process)
        ends.append(
            draw(
                random.step_keys(random.sample_keys(key, 6), i),
                denoise,
                x,
                times,
                n_steps,
                solver,
                process,
            )
        )
    assert len(traces) == 1
    assert draw._cache_size() == 1
    assert len({float(jnp.sum(end)) for end in ends}) == 20  # and each of them matters
    draw(random.sample_keys(key, 6), denoise, x, times[1:], n_steps, solver, process)
    assert len(traces) == 2  # the count sees a new program


@pytest.mark.parametrize(
    "solver",
    [pytest.param(Heun(), id="heun"), pytest.param(Ancestral(), id="ancestral", marks=SLOW)],
)
def test_padded_grids(solver, key, fresh_cache):
    """The grid's own samples, bit for bit, in any bucket; one program for every length."""

    @compiled
    def run(times, n_steps):
        return sample(
            key,
            gaussian(D).denoiser(PROCESS),
            start().astype(jnp.float32),
            times,
            solver=solver,
            process=PROCESS,
            n_steps=n_steps,
        )

    for n in (1, 5, 16):
        grid = grids.quadratic(PROCESS, n)
        times, count = grids.padded(grid, 16)
        assert times.shape == (17,) and count == n
        np.testing.assert_array_equal(times[16 - n :], grid)
        result = run(times, count)
        assert result.nfe == (n - 1) * solver.stages + solver.final_stages
    assert run._cache_size() == 1
    grid, other = grid[-6:], grids.padded(grid[-6:], 7)
    found = run(grids.padded(grid, 16).times, 5).x
    np.testing.assert_array_equal(found, run(other.times, 5).x)
    np.testing.assert_array_equal(found, run(grid, 5).x)
    assert grids.padded(grid).times.shape == (65,)
    with pytest.raises(ValueError, match="bucket must be at least 1; got 0"):
        grids.padded(grid, 0)


# --- conditions and guidance -------------------------------------------------------------------


def test_a_batch_of_conditions_and_scales(key):
    """One call with a label and a scale a sample is a call for each; `take` gathers both."""
    labels, scales = np.asarray([0, 1, 2, 0, 1, 2]), jnp.asarray([0.0, 0.5, 1.0, 1.5, 2.0, 3.0])
    times, keys = grids.uniform(PROCESS, 5, end=0.0), random.sample_keys(key, 6)
    x = start(6).astype(jnp.float32)

    @compiled
    def run(keys, x, labels, scale):
        return sample(keys, guided(labels, scale), x, times, solver=Ancestral(), process=PROCESS).x

    together = run(keys, x, labels, scales)
    for i in range(6):
        alone = run(keys[i : i + 1], x[i : i + 1], labels[i : i + 1], scales[i])
        np.testing.assert_allclose(together[i : i + 1], alone, rtol=2e-5, atol=2e-6)
    index = jnp.asarray([4, 2])
    taken = guided(labels, scales).take(index)
    np.testing.assert_array_equal(taken.scale, scales[index])
    guide = ClassifierGuidance(ExactClassifier(PROCESS), PROCESS, labels, scales).take(index)
    np.testing.assert_array_equal(guide.scale, scales[index])
    np.testing.assert_array_equal(guide.labels, labels[index])
    assert guided(labels, 2.0).take(index).scale == 2.0


@SLOW
def test_conditions_may_be_closed_over(key):
    """Any callable is a denoiser: a closure over labels gives what the guide gives."""
    labels, times = np.asarray([0, 1, 2, 1]), grids.uniform(PROCESS, 3, end=0.0)
    guide = guided(labels, 1.5)
    x = start().astype(jnp.float32)
    run = compiled(
        lambda denoise: sample(key, denoise, x, times, solver=Heun(), process=PROCESS).x,
        static_argnums=0,
    )
    closed = run(lambda x, t: guide(x, t))
    np.testing.assert_array_equal(closed, run(guided_closure(labels)))


def guided_closure(labels):
    means = mixture(D)

    def denoise(x, t):
        return ClassifierGuidance(ExactClassifier(PROCESS), PROCESS, labels, 1.5)(
            means.denoiser(PROCESS)
        )(x, t)

    return denoise


# --- meshes ------------------------------------------------------------------------------------

COLLECTIVE = re.compile(r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter")
MESHES = {"1": (1,), "2": (2,), "4": (4,), "8": (8,), "4x2": (4, 2)}


def solve(keys, x):
    return sample(
        keys,
        gaussian(D).denoiser(PROCESS),
        x,
        grids.uniform(PROCESS, 5, end=0.0),
        solver=DDIM(eta=0.5),
        process=PROCESS,
    ).x


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "4x2" else SLOW) for n in MESHES],
)
def test_any_mesh_without_collectives(name, key):
    """The batch over one axis or two, by the partitioner and inside `shard_map`."""
    shape = MESHES[name]
    axes = ("data", "more")[: len(shape)]
    mesh = jax.make_mesh(
        shape,
        axes,
        axis_types=(AxisType.Auto,) * len(shape),
        devices=jax.devices()[: math.prod(shape)],
    )
    spec = PartitionSpec(axes)
    keys, x = random.sample_keys(key, 16), start(16).astype(jnp.float32)
    expected = compiled(solve)(keys, x)
    placed = jax.device_put((keys, x), NamedSharding(mesh, spec))
    mapped = jax.shard_map(solve, mesh=mesh, in_specs=spec, out_specs=spec)
    for function in (solve, mapped):
        program = compiled(function).lower(*placed).compile()
        spoken = COLLECTIVE.search(program.as_text())
        assert spoken is None, f"the devices exchange data: {spoken}"
        np.testing.assert_allclose(program(*placed), expected, rtol=1e-5, atol=1e-6)


# --- progress ----------------------------------------------------------------------------------


def test_progress_on_request(key, fresh_cache):
    """A bar to the end of every solve, one program for all of them, nothing kept."""
    out = io.StringIO()
    draw = jax.jit(sample, static_argnames="save")
    times = grids.uniform(PROCESS, 4, end=0.1)
    bar = ProgressBar(4, final=Tweedie(), file=out, mininterval=0)
    for _ in range(2):
        result = draw(
            key,
            gaussian(D).denoiser(PROCESS),
            start().astype(jnp.float32),
            times,
            solver=Heun(),
            process=PROCESS,
            final=Tweedie(),
            save=bar,
        )
        jax.effects_barrier()
    assert result.saved is None
    assert out.getvalue().count("0/5") == out.getvalue().count("1/5") == 2
    assert out.getvalue().count("100%") >= 2 and draw._cache_size() == 1
    keeping = ProgressBar(4, final=Tweedie(), file=out, save=lambda state: state.x)
    kept = sample(
        key,
        gaussian(D).denoiser(PROCESS),
        start(),
        times,
        solver=Heun(),
        process=PROCESS,
        final=Tweedie(),
        save=keeping,
    )
    assert kept.saved.shape == (4, 4, D)
