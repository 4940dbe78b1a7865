"""The driver: calls counted as they run, padding, saving, memory, compilation, errors."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import random
from diffjax.core.pytree import pytree
from diffjax.core.types import Prediction
from diffjax.prediction import make_denoiser
from diffjax.processes import EDM, VE, VP, RectifiedFlow
from diffjax.solvers import (
    DDIM,
    Ancestral,
    DPMSolver,
    EDMChurn,
    Euler,
    EulerMaruyama,
    Heun,
    InLogSNR,
    Keep,
    Langevin,
    NoiselessPredictor,
    PredictorCorrector,
    ReverseDiffusion,
    RungeKutta,
    ToEnd,
    Tweedie,
    grids,
    sample,
)
from diffjax.solvers.tableaus import MIDPOINT
from diffjax.testing import checked, count_draws
from tests.oracles import gaussian
from tests.solvers.helpers import Counter, padded

# Each with the number of draws in one step; a corrector's loop body counts once.
SOLVERS = {
    "euler": (Euler(), 0),
    "heun": (Heun(), 0),
    "ddim": (DDIM(), 0),
    "ddim_eta": (DDIM(eta=0.3), 1),
    "ancestral": (Ancestral(), 1),
    "euler_maruyama": (EulerMaruyama(), 1),
    "reverse_diffusion": (ReverseDiffusion(), 1),
    "churned_heun": (EDMChurn(Heun(), 4.0, 6), 1),
    "corrected": (PredictorCorrector(ReverseDiffusion(), Langevin(n_steps=2)), 2),
}
PROCESS = VP()


@pytree
class Scaled:
    """A denoiser of one multiplication a half: what remains of a sampler is the sampler."""

    gain: object = 0.9

    def __call__(self, x, t):
        x0 = jax.tree.map(lambda leaf: self.gain * leaf, x)
        return Prediction(x0, x)


def start(batch=4, dim=3):
    return jax.random.normal(jax.random.key(1), (batch, dim))


# --- calls -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SOLVERS)
def test_declared_calls_are_the_calls_that_run(case, key, fresh_cache):
    """nfe against a run-time callback: with and without jit, for every end, with padding."""
    solver, _ = SOLVERS[case]
    counter = Counter(gaussian().denoiser(PROCESS))
    low, clean = grids.uniform(PROCESS, 6, end=0.1), grids.uniform(PROCESS, 6, end=0.0)

    def run(times, final, n_steps=None):
        return sample(
            key,
            counter,
            start(),
            times,
            solver=solver,
            process=PROCESS,
            final=final,
            n_steps=n_steps,
        ).nfe

    for final in [Tweedie(), NoiselessPredictor() if solver.stochastic else Keep()]:
        assert jax.jit(lambda t, f=final: run(t, f))(low) == counter.read() > 0
    if case == "heun":
        assert run(clean, ToEnd()) == counter.read()
    many = jax.jit(lambda t, n: run(t, ToEnd(), n))
    declared = {}
    for n in (1, 3, 6):
        declared[n] = int(many(padded(grids.uniform(PROCESS, n, end=0.0), 6), n))
        assert declared[n] == counter.read()
    assert declared[6] - declared[3] == 3 * solver.stages
    assert declared[1] == solver.final_stages
    assert many._cache_size() == 1


@pytest.mark.parametrize("case", ["heun", "ancestral"])
def test_padding_changes_nothing(case, key):
    """A padded grid gives the same bits as the plain one, and no matter how long the padding."""
    solver, _ = SOLVERS[case]
    denoise, times = gaussian().denoiser(PROCESS), grids.uniform(PROCESS, 4, end=0.0)

    @jax.jit
    def run(times, n_steps=None):
        return sample(
            key, denoise, start(), times, solver=solver, process=PROCESS, n_steps=n_steps
        ).x

    long = run(padded(times, 9), 4)
    np.testing.assert_array_equal(long, run(padded(times, 6), 4))
    np.testing.assert_array_equal(long, run(times, 4))
    # Without n_steps there is no `cond`, and XLA fuses differently: equal up to rounding.
    np.testing.assert_allclose(long, run(times), rtol=2e-5, atol=2e-6)


# --- draws -----------------------------------------------------------------------------------

IMAGES = (8, 16, 16, 3)


@functools.cache
def compiled(case, n, keep=False):
    """The optimised program of a solve of n steps; keep: with the path saved."""

    def run(key, x, times, denoise):
        result = sample(
            key,
            denoise,
            x,
            times,
            solver=SOLVERS[case][0],
            process=PROCESS,
            save=(lambda state: state.x) if keep else None,
        )
        return result.saved if keep else result.x

    x = jax.ShapeDtypeStruct(IMAGES, jnp.float32)
    times = jax.ShapeDtypeStruct((n + 1,), jnp.float32)
    return jax.jit(run).lower(jax.random.key(0), x, times, Scaled()).compile()


@pytest.mark.parametrize("case", SOLVERS)
def test_draws(case):
    """None in a deterministic solver, one for each update of a stochastic one."""
    solver, draws = SOLVERS[case]
    assert count_draws(solver, Scaled(), PROCESS, start()) == draws
    program = compiled(case, 10).as_text()
    assert solver.stochastic == (draws > 0)
    # Threefry is made of xors, and nothing else here is.
    assert (" xor(" in program) == (draws > 0)


def test_draws_are_those_of_the_sample_and_step(key):
    """x depends on fold_in(fold_in(key, sample), step) alone: not on the batch."""
    times, x = grids.uniform(PROCESS, 5, end=0.0), start(6)
    denoise = gaussian().denoiser(PROCESS)

    @jax.jit
    def run(keys, x):
        return sample(keys, denoise, x, times, solver=Ancestral(), process=PROCESS).x

    keys = random.sample_keys(key, 6)
    together = run(key, x)
    np.testing.assert_array_equal(together, run(keys, x))
    order = jnp.asarray([4, 1, 5])
    np.testing.assert_allclose(together[order], run(keys[order], x[order]), rtol=1e-6, atol=1e-7)


# --- saving, memory, compilation -------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 5])
def test_save(n, key):
    """The path has one entry an interval; the last is the result."""
    times = grids.uniform(PROCESS, n, end=0.0)
    denoise = gaussian().denoiser(PROCESS)
    kwargs = {"solver": Ancestral(), "process": PROCESS}
    result = sample(
        key, denoise, start(), times, save=lambda state: {"x": state.x, "n": 1.0}, **kwargs
    )
    assert result.saved["x"].shape == (n, 4, 3)
    assert result.saved["n"].shape == (n,)
    np.testing.assert_array_equal(result.saved["x"][-1], result.x)
    assert sample(key, denoise, start(), times, **kwargs).saved is None
    for i in range(2, n, 2):  # entry i - 1 is the partial solve over i intervals
        part = sample(key, denoise, start(), times[: i + 1], final=Keep(), **kwargs)
        np.testing.assert_allclose(result.saved["x"][i - 1], part.x, rtol=1e-5, atol=1e-6)


def test_state_continues_a_solve(key):
    """Two halves of a deterministic solve are the whole."""
    times, denoise = grids.quadratic(PROCESS, 8), gaussian().denoiser(PROCESS)
    kwargs = {"solver": Heun(), "process": PROCESS}
    whole = sample(key, denoise, start(), times, **kwargs)
    half = sample(key, denoise, start(), times[:5], final=Keep(), **kwargs)
    rest = sample(key, denoise, half.x, times[4:], state=half.state, **kwargs)
    np.testing.assert_allclose(rest.x, whole.x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["ddim", "heun", "ancestral", "churned_heun", "corrected"])
def test_memory_is_flat_and_small(case):
    """Temporary bytes: at most 6 times the state, the same for 10 steps and for 100."""
    state = 4 * math.prod(IMAGES)
    short, long = (compiled(case, n).memory_analysis().temp_size_in_bytes for n in (10, 100))
    assert long - short < 16 * 1024  # the grid and its indices
    assert long <= 6 * state


def test_saving_costs_its_path():
    """The same measure sees a kept path, so it would see one that was not asked for."""
    short, long = (compiled("ddim", n, keep=True).memory_analysis() for n in (10, 100))
    grown = sum(
        getattr(long, part) - getattr(short, part)
        for part in ("temp_size_in_bytes", "output_size_in_bytes")
    )
    assert grown >= 90 * 4 * math.prod(IMAGES)


@pytest.mark.parametrize("case", ["ddim", "heun", "ancestral", "churned_heun", "corrected"])
def test_the_program_does_not_grow_with_the_steps(case):
    """The number of HLO instructions is the same for 10 and 100 steps, and for 1000."""
    counts = (10, 100, 1000) if case == "heun" else (10, 100)
    programs = (compiled(case, n).as_text().splitlines() for n in counts)
    assert len({sum(" = " in line for line in program) for program in programs}) == 1


def test_numbers_never_retrace(key, fresh_cache):
    """A new key, weight, schedule constant, eta, number of steps or grid: one program."""
    draw = jax.jit(sample, static_argnames=("save",))
    for i in range(3):
        process = VP(beta_max=20.0 - i)
        draw(
            random.step_keys(random.sample_keys(key, 4), i),
            Scaled(0.9 - 0.1 * i),
            start(),
            grids.uniform(process, 5, end=0.0, t_max=1.0 - 0.1 * i),
            solver=EDMChurn(DDIM(eta=0.1 * i), s_churn=1.0 * i, n_steps=5),
            process=process,
            n_steps=3 + i % 2,
        )
    assert draw._cache_size() == 1


def test_half_precision_is_raised(key):
    """The state is float32 whatever x was; float64 stays."""
    times = grids.uniform(PROCESS, 3, end=0.0)
    for dtype in (jnp.bfloat16, jnp.float16):
        result = sample(key, Scaled(), start().astype(dtype), times, solver=Heun(), process=PROCESS)
        assert result.x.dtype == jnp.float32


# --- errors ----------------------------------------------------------------------------------

BAD = {
    "flat grid": (
        {"times": [1.0, 0.4, 0.4, 0.0]},
        r"times must decrease strictly; got times\[2\] = 0.4.* after 0.4.*diffjax.grids",
    ),
    "bent grid": ({"times": [1.0, 0.4, 0.5, 0.0]}, r"decrease strictly; got times\[2\] = 0.5"),
    "nan": ({"times": [1.0, float("nan"), 0.0]}, r"decrease strictly; got times\[1\] = nan"),
    "one time": ({"times": [1.0]}, r"times must have shape \(n\+1,\) with n >= 1; got \(1,\)"),
    "two axes": ({"times": [[1.0, 0.0]]}, r"shape \(n\+1,\).*got \(1, 2\)"),
    "noisy end": ({"times": [1.0, 0.5]}, r"ends at sigma = 0.9\d*.*final=Tweedie\(\)"),
    "tweedie at 0": ({"times": [1.0, 0.0], "final": Tweedie()}, r"use final=ToEnd\(\)"),
    "nothing to leave out": (
        {"times": [1.0, 0.1], "final": NoiselessPredictor(), "solver": Heun()},
        r"RungeKutta adds no noise.*final=Tweedie\(\)",
    ),
    "inversion with an end": ({"times": [0.1, 1.0]}, r"increases.*pass final=Keep\(\)"),
    "inversion with Tweedie": (
        {"times": [0.1, 1.0], "final": Tweedie()},
        r"final=Tweedie\(\) does not apply; pass final=Keep\(\)",
    ),
    "stochastic inversion": (
        {"times": [0.1, 1.0], "final": Keep()},
        r"Ancestral draws noise.*Euler, Heun, DDIM\(\)",
    ),
    "too many steps": ({"times": [1.0, 0.0], "n_steps": 2}, r"n_steps must lie in \[1, 1\]; got 2"),
    "no step": ({"times": [1.0, 0.0], "n_steps": 0}, r"n_steps must lie in \[1, 1\]; got 0"),
    "padding not declared": (
        {"times": [1.0, 1.0, 0.0]},
        r"times\[1\] = 1.0 after 1.0.*pass n_steps= if it is padded",
    ),
    "padding declared short": (
        {"times": [1.0, 1.0, 1.0, 0.0], "n_steps": 2},
        r"decrease strictly; got times\[2\]",
    ),
    "ragged batch": ({"x": {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 3))}}, r"share one leading"),
    "too few keys": ({"key": jax.random.split(jax.random.key(0), 3)}, r"\(4,\); got shape \(3,\)"),
    "coupled keys": ({"key": jax.random.key(0, impl="rbg")}, r"rbg keys.*threefry2x32"),
}


def solve_with(**changes):
    arguments = {
        "key": jax.random.key(0),
        "denoise": Scaled(),
        "x": start(),
        "times": [1.0, 0.5, 0.0],
        "solver": Ancestral(),
        "process": PROCESS,
    } | changes
    positional = [arguments.pop(name) for name in ("key", "denoise", "x", "times")]
    positional[3] = jnp.asarray(positional[3])
    return sample(*positional, **arguments)


@pytest.mark.parametrize("case", BAD)
def test_errors_say_what_and_how(case):
    changes, message = BAD[case]
    solve_with()  # the arguments are good but for the change
    with pytest.raises(ValueError, match=f"(?s){message}"):
        solve_with(**changes)


def test_type_errors():
    with pytest.raises(TypeError, match="floating point; got dtype int32"):
        solve_with(x=jnp.ones((4, 3), jnp.int32))
    with pytest.raises(TypeError, match="times must be floating point; got int32"):
        solve_with(times=[1, 0])
    with pytest.raises(TypeError, match=r"jax.random.key\(seed\)"):
        solve_with(key=jax.random.PRNGKey(0))


def test_refused_starts():
    """A flow's rates are infinite at t = 1, and eps says nothing about x0 there."""
    flow = RectifiedFlow()
    with pytest.raises(ValueError, match=r"g\^2 is infinite.*t_max=.*Heun\(\)"):
        solve_with(solver=EulerMaruyama(), process=flow)
    network = lambda x, label: x  # noqa: E731
    with pytest.raises(
        ValueError, match=r"kind Eps does not determine x0 and eps at t = 1.0.*t_max="
    ):
        solve_with(process=flow, denoise=make_denoiser(network, flow, kind="eps"))
    solve_with(process=flow, denoise=make_denoiser(network, flow, kind="velocity"))


@pytest.mark.parametrize("solver", [DPMSolver(3), RungeKutta(MIDPOINT, InLogSNR())])
def test_refused_ends(solver):
    """An inversion to where the method cannot be, also under jit where the grid is known."""
    process, times = RectifiedFlow(), jnp.linspace(0.1, 1.0, 4)
    run = functools.partial(sample, solver=solver, process=process, final=Keep())
    denoise = gaussian().denoiser(process)
    with pytest.raises(ValueError, match="alpha.* 0 at the grid's noisy end 1.0"):
        run(jax.random.key(0), denoise, start(), times)
    with pytest.raises(ValueError, match="alpha.* 0 at the grid's noisy end 1.0"):
        jax.jit(lambda x: run(jax.random.key(0), denoise, x, times))(start())


def test_bad_fields():
    for build, message in (
        (lambda: DDIM(eta=1.2), r"eta must lie in \[0.0, 1.0\]; got 1.2"),
        (lambda: Ancestral("middling"), "variance must be one of 'small', 'large'"),
        (lambda: Langevin(snr=0.0), "snr must be positive; got 0.0"),
        (lambda: Langevin(n_steps=0), "n_steps must be at least 1; got 0"),
        (lambda: Langevin(coupling="all"), "coupling must be one of 'sample', 'batch'"),
        (lambda: EDMChurn(Heun(), -1.0, 5), "s_churn must not be negative; got -1.0"),
        (lambda: EDMChurn(Heun(), 1.0, 0), "n_steps must be positive; got 0"),
        (lambda: EDMChurn(Heun(), 1.0, 5, s_min=2.0, s_max=1.0), "s_min must be below s_max"),
    ):
        with pytest.raises(ValueError, match=message):
            build()


def test_checked_finds_bad_grids_inside_jit(key):
    """Where jit hides the grid's values `sample` cannot raise; `checked(sample)` does."""
    traced = jax.jit(sample)
    careful = checked(sample)
    kwargs = {"solver": DDIM(), "process": PROCESS}
    arguments = (key, Scaled(), start())
    good = jnp.asarray([1.0, 0.6, 0.3, 0.0])
    np.testing.assert_array_equal(
        careful(*arguments, good, **kwargs).x, traced(*arguments, good, **kwargs).x
    )
    for bad in ([1.0, 0.6, 0.6, 0.0], [1.0, 0.6, 0.7, 0.0], [1.0, float("nan"), 0.5, 0.0]):
        traced(*arguments, jnp.asarray(bad), **kwargs)
        with pytest.raises(ValueError, match="times must decrease strictly"):
            careful(*arguments, jnp.asarray(bad), **kwargs)
    pad = jnp.asarray([1.0, 1.0, 0.5, 0.0])
    assert careful(*arguments, pad, n_steps=2, **kwargs).nfe == 2
    with pytest.raises(ValueError, match="padded in front"):
        careful(*arguments, pad, n_steps=3, **kwargs)
    with pytest.raises(ValueError, match=r"n_steps must lie in \[1, 3\].*got 4"):
        careful(*arguments, pad, n_steps=4, **kwargs)


def test_checked_takes_static_names(key):
    """`save` is a callable: static, as for jit."""
    careful = checked(sample, static_argnames=("save",))
    times = jnp.asarray([1.0, 0.5, 0.0])
    result = careful(
        key, Scaled(), start(), times, solver=DDIM(), process=PROCESS, save=lambda s: s.x
    )
    assert result.saved.shape == (2, 4, 3)


def test_solvers_are_told_by_process(key):
    """The end fits the process: VE keeps noise at its end, EDM does not."""
    x = start()
    for process, final in ((VE(), Tweedie()), (EDM(), ToEnd())):
        times = grids.karras(process, 5)
        result = sample(
            key,
            gaussian().denoiser(process),
            process.coeffs(jnp.asarray(process.t_max)).sigma * x,
            times,
            solver=Heun(),
            process=process,
            final=final,
        )
        assert jnp.abs(result.x).max() < 5  # data again
