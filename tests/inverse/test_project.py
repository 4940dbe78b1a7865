"""The replacement method against exact laws, with the reference code's faults as mutants.

Symbols: m a mask, y the known data, (alpha, sigma) the process's at a time.

    element-wise data: the unknown part is that of the plain solver, the known one is y       (1)
    the known part of what the network sees at t: N(alpha y, sigma^2)                          (2)
    correlated Gaussian data: the law is affine and computed exactly, in NumPy too            (3)

Monte Carlo checks have n = 4000 particles or more and 4 standard errors: a mean off by 0.07 sigma
and a variance off by 9% are seen.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import random
from diffjax.core.pytree import pytree
from diffjax.core.types import Prediction
from diffjax.inverse import Grey, Linear, Mask, Replace, projection
from diffjax.processes import VE, VP, prior
from diffjax.solvers import (
    DDIM,
    AdaptiveFlow,
    Ancestral,
    AnnealedLangevin,
    EDMChurn,
    EulerMaruyama,
    Heun,
    Keep,
    Langevin,
    NoiselessPredictor,
    NoPredictor,
    PredictorCorrector,
    ReverseDiffusion,
    ToEnd,
    Tweedie,
    XState,
    grids,
    sample,
)
from diffjax.testing import propagate_moments
from tests.oracles import Gaussian, Isotropic, PointMass
from tests.solvers.helpers import Counter

D, B = 4, 4000
MEAN, STD = np.asarray([0.4, -0.3, 0.2, 0.5]), np.asarray([0.3, 0.5, 0.8, 0.6])
MASK = np.asarray([1, 0, 1, 0])
Y = np.asarray([[0.9, 0.0, -0.7, 0.0]], np.float32)
DATA = Gaussian(jnp.asarray(MEAN, jnp.float32), jnp.asarray(STD, jnp.float32))
KNOWN, UNKNOWN = MASK == 1, MASK == 0

CORRECTED = PredictorCorrector(ReverseDiffusion(), Langevin(0.1))
SOLVERS = {
    "ddim": DDIM(),
    "heun": Heun(),
    "ancestral": Ancestral(),
    "euler_maruyama": EulerMaruyama(),
    "churn": EDMChurn(Heun(), s_churn=2.0, n_steps=20.0),
    "corrector_first": PredictorCorrector(Ancestral(), AnnealedLangevin(0.1, n_steps=2)),
    "predictor_first": PredictorCorrector(
        Ancestral(), AnnealedLangevin(0.1), order="predictor_first"
    ),
    "corrector_alone": PredictorCorrector(NoPredictor(), AnnealedLangevin(0.3)),
}
FINALS = {
    "to_end": (VP(), 0.0, ToEnd()),
    "tweedie": (VE(sigma_max=5.0), 1e-5, Tweedie()),
    "noiseless": (VE(sigma_max=5.0), 1e-5, NoiselessPredictor()),
}


def replacing(solver, operator=None, y=Y):
    return Replace(solver, Mask(jnp.asarray(MASK)) if operator is None else operator, y)


# Without LLVM's optimiser: it takes longer than these solves.
FAST = {"xla_backend_optimization_level": 0}
compiled = functools.partial(jax.jit, compiler_options=FAST)


@functools.partial(compiled, static_argnames=("oracle", "n", "batch"))
def _draw(solver, process, final, end, key, *, oracle, n, batch):
    times = grids.uniform(process, n, end=end)
    x = prior(jax.random.fold_in(key, 1), process, (batch, D))
    denoise = oracle(process)
    return sample(key, denoise, x, times, solver=solver, process=process, final=final)


def draw(solver, name, *, oracle=DATA.denoiser, n=20, batch=B):
    process, end, final = FINALS[name]
    key = jax.random.key(0)
    return _draw(solver, process, final, end, key, oracle=oracle, n=n, batch=batch)


def within(values, mean, std, errors=4.0):
    """The mean and deviation of each column of `values`, (n, k), within so many standard errors."""
    values = np.asarray(values, np.float64)
    n = values.shape[0]
    scores = (values.mean(0) - mean) / (std / np.sqrt(n))
    spread = (values.std(0) / std - 1) * np.sqrt(2 * n)
    assert np.abs(scores).max() < errors, scores
    assert np.abs(spread).max() < errors, spread


# --- element-wise data: exact ------------------------------------------------------------------


def independent_parts_are_left_as_they_are(held, final):
    """(1), to rounding of fused operations: the posterior is exact whatever the solver."""
    inner = held.inner.solver if isinstance(held, Faulty) else held.solver
    plain = draw(inner, final, batch=8).x
    found = draw(held, final, batch=8).x
    np.testing.assert_allclose(found[:, UNKNOWN], plain[:, UNKNOWN], rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(found[:, KNOWN], np.repeat(Y[:, KNOWN], 8, axis=0))


def some(names, family):
    """The names of a family, all but `names` slow."""
    return [n if n in names else pytest.param(n, marks=pytest.mark.slow) for n in family]


@pytest.mark.parametrize("name", some(["heun", "corrector_first"], SOLVERS))
def test_independent_parts_are_left_as_they_are(name):
    independent_parts_are_left_as_they_are(replacing(SOLVERS[name]), "to_end")


def test_a_noiseless_end_leaves_independent_parts_as_they_are():
    independent_parts_are_left_as_they_are(replacing(Ancestral()), "noiseless")


@pytest.mark.parametrize("final", some(["tweedie"], FINALS))
def test_the_unknown_part_has_the_posteriors_moments(final):
    """200 steps with a corrector; the parts are independent, so the posterior is the prior's."""
    found = np.asarray(draw(replacing(SOLVERS["corrector_first"]), final, n=200).x)
    within(found[:, UNKNOWN], MEAN[UNKNOWN], STD[UNKNOWN], errors=5.0)
    np.testing.assert_array_equal(found[:, KNOWN], np.repeat(Y[:, KNOWN], B, axis=0))


def test_any_linear_measurement_of_isotropic_data_is_exact():
    """What A does not see is independent of A x for data N(0, 0.7^2 I); rows not orthonormal."""
    matrix = np.asarray([[1.0, 2.0, 0.0, 0.5], [0.0, 1.0, -1.0, 1.0]])
    operator = Linear.of(matrix, (D,))
    y = np.asarray([[0.8, -0.5]], np.float32)
    held = replacing(Ancestral(), operator, y)
    found = draw(held, "to_end", oracle=Isotropic, n=200).x
    np.testing.assert_allclose(found @ matrix.T, np.repeat(y, B, axis=0), atol=2e-6)
    free = np.linalg.svd(matrix)[2][2:].T  # what A does not see
    within(found @ free, 0.0, 0.7)


def test_colours_have_the_given_grey():
    """Isotropic colours: the mean over channels is y, the rest keeps the data's deviation."""
    process, grey = VP(), jnp.full((1, 1), 0.3)
    times = grids.uniform(process, 100)
    x = prior(jax.random.key(1), process, (B, 3))
    found = compiled(sample)(
        jax.random.key(0), Isotropic(process), x, times,
        solver=Replace(Ancestral(), Grey(), grey), process=process,
    ).x  # fmt: skip
    np.testing.assert_allclose(found.mean(1), 0.3, atol=1e-6)
    within((found[:, :1] - found[:, 1:2]) / np.sqrt(2), 0.0, 0.7)


# --- the reference's faults ----------------------------------------------------------------------


@pytree
class Faulty:
    """A mutant of `Replace`: the face of it, for one fault to be put back."""

    inner: Replace

    stages = property(lambda self: self.inner.stages)
    final_stages = property(lambda self: self.inner.final_stages)
    stochastic = property(lambda self: True)

    def init(self, process, x, t):
        return self.inner.init(process, x, t)

    def step(self, keys, denoise, process, state, t, s):
        return self.inner.step(keys, denoise, process, state, t, s)

    def finish(self, keys, denoise, process, state, t, s):
        return self.inner.finish(keys, denoise, process, state, t, s)


@pytree
class KeepsNoise(Faulty):
    """The unknown part of the result is that from before the denoising."""

    def finish(self, keys, denoise, process, state, t, s):
        state = self.inner.step(keys, denoise, process, state, t, s)
        return XState(self.inner.constrain(state.x))


@pytree
class KeepsNoiseTweedie:
    """`Tweedie` with the same fault."""

    steps = True

    def check(self, *args):
        pass

    def evaluations(self, solver):
        return solver.stages

    def end(self, solver, keys, denoise, process, state, t, s):
        return XState(solver.constrain(state.x))


@pytree
class StartsClean(Faulty):
    """The known part starts as it is, at the largest noise level."""

    def init(self, process, x, t):
        return self.inner.solver.init(process, self.inner.constrain(x), t)


@pytree
class OneLevelBehind(Faulty):
    """The known part is put back at the noise level of the step's beginning."""

    def step(self, keys, denoise, process, state, t, s):
        state = self.inner.solver.step(keys, denoise, process, state, t, s)
        return XState(self.inner._renoised(keys, "replace", process, state.x, t))


def the_denoising_reaches_the_unknown_part(solver, final):
    """Data of one point: after the denoising every unknown element is that point exactly."""
    process = VE(sigma_min=0.3, sigma_max=5.0)
    oracle = PointMass(jnp.asarray(MEAN, jnp.float32))
    x = prior(jax.random.key(1), process, (64, D))
    times = grids.uniform(process, 10, end=0.0)
    found = compiled(sample)(
        jax.random.key(0), oracle.denoiser(process), x, times,
        solver=solver, process=process, final=final,
    ).x  # fmt: skip
    np.testing.assert_allclose(found[:, UNKNOWN], np.tile(MEAN[UNKNOWN], (64, 1)), atol=1e-5)
    np.testing.assert_array_equal(found[:, KNOWN], np.repeat(Y[:, KNOWN], 64, axis=0))


def the_known_part_is_on_its_level(solver):
    """(2) at the start and after every step."""
    process = VP()
    times = grids.uniform(process, 6, end=0.05)
    x = prior(jax.random.key(1), process, (B, D))
    started = solver.init(process, x, times[0]).x
    path = compiled(sample, static_argnames="save")(
        jax.random.key(0), DATA.denoiser(process), x, times,
        solver=solver, process=process, final=Keep(), save=lambda state: state.x,
    ).saved  # fmt: skip
    for t, seen in zip(times, [started, *path], strict=True):
        alpha, _, sigma = (np.asarray(c) for c in process.coeffs(t))
        within(np.asarray(seen)[:, KNOWN], alpha * Y[0, KNOWN], sigma)


def test_the_denoising_reaches_the_unknown_part():
    the_denoising_reaches_the_unknown_part(replacing(CORRECTED), Tweedie())


@pytest.mark.parametrize("name", some(["corrector_first"], SOLVERS))
def test_the_known_part_is_on_its_level(name):
    the_known_part_is_on_its_level(replacing(SOLVERS[name]))


@pytest.mark.parametrize(
    ("law", "arguments"),
    [
        (independent_parts_are_left_as_they_are, (KeepsNoise, "noiseless")),
        (the_denoising_reaches_the_unknown_part, (lambda s: s, KeepsNoiseTweedie())),
        (the_known_part_is_on_its_level, (StartsClean,)),
        (the_known_part_is_on_its_level, (OneLevelBehind,)),
    ],
    ids=["keeps noise", "keeps noise, Tweedie", "starts clean", "one level behind"],
)
def test_the_references_faults_are_caught(law, arguments):
    fault, *rest = arguments
    with pytest.raises(AssertionError):
        law(fault(replacing(Ancestral())), *rest)


@pytest.mark.parametrize("order", ["corrector_first", "predictor_first"])
def test_every_call_of_a_predictor_corrector_sees_the_level(order):
    """(2) at each call of the network, also between the corrector and the predictor."""
    seen = []
    process = VP()

    def denoise(x, t):
        seen.append((float(t), np.asarray(x)))
        return DATA.denoiser(process)(x, t)

    parts = PredictorCorrector(Ancestral(), AnyStep(), order=order)
    solver, keys = replacing(parts), random.sample_keys(jax.random.key(0), B)
    times = [0.8, 0.5, 0.2]
    state = solver.init(process, prior(jax.random.key(1), VP(t_max=0.8), (B, D)), times[0])
    for i, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        own = random.step_keys(keys, i)
        state = solver.step(own, denoise, process, state, jnp.asarray(t), jnp.asarray(s))
    end = jnp.asarray(times[-2]), jnp.asarray(times[-1])
    Tweedie().end(solver, random.step_keys(keys, 9), denoise, process, state, *end)
    expected = {"corrector_first": [0.8, 0.8, 0.5, 0.5, 0.2, 0.2],
                "predictor_first": [0.8, 0.5, 0.5, 0.2, 0.2]}[order]  # fmt: skip
    np.testing.assert_allclose([t for t, _ in seen], expected, rtol=1e-6)
    for t, x in seen:
        alpha, _, sigma = (np.asarray(c) for c in process.coeffs(jnp.asarray(t)))
        within(x[:, KNOWN], alpha * Y[0, KNOWN], sigma)


@pytree
class AnyStep:
    """A corrector that asks the network and then moves x by a lot."""

    stages = 1

    def correct(self, keys, denoise, process, x, t, s):
        denoise(x, t)
        return x + 3.0


# --- correlated data: the bias ---------------------------------------------------------------

RHO = 0.8


@pytree
class Correlated:
    """Two unit Gaussians with correlation RHO: a DenoiseFn."""

    process: object

    def __call__(self, x, t):
        alpha, _, sigma = self.process.coeffs(t)
        total = alpha**2 * jnp.asarray([[1.0, RHO], [RHO, 1.0]]) + sigma**2 * jnp.eye(2)
        eps = sigma * x @ jnp.linalg.inv(total)
        return Prediction((x - sigma * eps) / alpha, eps)


@pytree
class GoesOn:
    """A solver in the middle of a solve: it takes x as it is."""

    solver: object

    def init(self, process, x, t):
        return XState(x)

    def step(self, keys, denoise, process, state, t, s):
        return self.solver.step(keys, denoise, process, state, t, s)


def law_of_the_second(solver, n):
    """Mean and variance of the second of two elements where the first is known to be 1, (3)."""
    process = VP()
    times = grids.uniform(process, n, end=1e-4)
    start = process.coeffs(times[0])
    mean = jnp.asarray([1.0, 0.0]) * start.alpha
    held = Replace(solver, Mask(jnp.asarray([1, 0])), jnp.asarray([[1.0, 0.0]]))
    mean, covariance = propagate_moments(
        GoesOn(held), Correlated(process), process, times, mean, start.sigma**2 * jnp.eye(2)
    )
    return float(mean[1]), float(covariance[1, 1])


def ancestral_by_hand(n):
    """The same for the ancestral sampler, from the formulas, in NumPy.

    u is the unknown element: u_s = r (sigma_s/sigma_t) u + alpha_s (1 - r^2) x0(u, k) + c z with
    x0 = the second of (x + sigma^2 score)/alpha and k = alpha_t + sigma_t z' the known one.
    """
    t = np.linspace(1, 1e-4, n + 1)
    integral = 0.1 * t + 0.5 * 19.9 * t**2
    alpha, sigma = np.exp(-integral / 2), np.sqrt(-np.expm1(-integral))
    mean, variance = 0.0, sigma[0] ** 2
    for i in range(n):
        a, b, c, d = alpha[i], sigma[i], alpha[i + 1], sigma[i + 1]
        r = a * d / (c * b)
        det = 1 - (a**2 * RHO) ** 2
        # score of u = (a^2 rho k - u)/det
        on_u, on_k = (1 - b**2 / det) / a, b**2 * a * RHO / det
        gain = r * d / b + c * (1 - r**2) * on_u
        pull = c * (1 - r**2) * on_k
        mean = gain * mean + pull * a
        variance = gain**2 * variance + pull**2 * b**2 + d**2 * (1 - r**2)
    return mean, variance


def test_correlated_parts_are_tied_too_weakly(x64):
    """The figures of the docstring, beside the posterior's 0.8 and 0.36."""
    found = law_of_the_second(Ancestral(), 1000)
    np.testing.assert_allclose(found, ancestral_by_hand(1000), rtol=1e-8)
    np.testing.assert_allclose(found, [0.50, 0.49], atol=5e-3)
    np.testing.assert_allclose(ancestral_by_hand(4000), found, atol=5e-3)
    corrected = PredictorCorrector(Ancestral(), AnnealedLangevin(0.3))
    np.testing.assert_allclose(law_of_the_second(corrected, 1000), [0.75, 0.38], atol=5e-3)


# --- the rest of the contract -----------------------------------------------------------------


@pytest.mark.parametrize("name", some(["corrector_first"], SOLVERS))
@pytest.mark.parametrize("final", some(["tweedie"], ["to_end", "tweedie"]))
def test_the_calls_are_the_solvers_own(name, final):
    process, end, how = FINALS[final]
    counter = Counter(DATA.denoiser(process))
    times = grids.uniform(process, 3, end=end)
    x = prior(jax.random.key(1), process, (2, D))
    counts = []
    for solver in (SOLVERS[name], replacing(SOLVERS[name])):
        result = sample(
            jax.random.key(0), counter, x, times, solver=solver, process=process, final=how
        )
        jax.block_until_ready(result.x)
        counts.append((result.nfe, counter.read()))
    assert counts[0] == counts[1]
    assert counts[0][0] == counts[0][1]


def test_it_draws_even_where_the_solver_does_not():
    held = replacing(DDIM())
    assert held.stochastic
    assert not DDIM().stochastic
    with pytest.raises(ValueError, match="Replace draws noise"):
        sample(
            jax.random.key(0), DATA.denoiser(VP()), jnp.zeros((2, D)), jnp.asarray([0.1, 0.5]),
            solver=held, process=VP(), final=Keep(),
        )  # fmt: skip


def test_a_tree_is_held_leaf_by_leaf():
    process = VP()
    x = {"a": jnp.ones((3, 2)), "b": jnp.full((3, 2, 2), 0.5)}
    mask = Mask({"a": jnp.asarray([1, 0]), "b": jnp.eye(2)})
    y = {"a": jnp.full((1, 2), 0.3), "b": jnp.full((3, 2, 2), -0.2)}
    found = sample(
        jax.random.key(0), Isotropic(process), x, grids.uniform(process, 4),
        solver=Replace(Heun(), mask, y), process=process,
    ).x  # fmt: skip
    np.testing.assert_array_equal(
        projection(mask, found)["a"], projection(mask, y)["a"].repeat(3, 0)
    )
    np.testing.assert_array_equal(projection(mask, found)["b"], projection(mask, y)["b"])


def test_take_gives_the_solver_of_some_samples():
    process, times = VP(), grids.uniform(VP(), 4)
    keys = random.sample_keys(jax.random.key(0), 5)
    x = prior(keys, process, (5, D))
    rng = np.random.default_rng(0)
    mask = Mask(jnp.asarray(rng.integers(0, 2, (5, D))), per_sample=True)
    held = Replace(DDIM(), mask, jnp.asarray(rng.standard_normal((5, D)), jnp.float32))
    index = jnp.asarray([3, 1])

    def run(keys, x, solver):
        return sample(keys, DATA.denoiser(process), x, times, solver=solver, process=process).x

    some = run(keys[index], x[index], held.take(index))
    np.testing.assert_allclose(some, run(keys, x, held)[index], rtol=1e-6, atol=1e-6)


BAD = {
    "adaptive": (lambda: replacing(AdaptiveFlow()), "AdaptiveFlow chooses its own"),
    "y's shape": (lambda: start(replacing(DDIM(), y=np.zeros((3, D)))), r"got \(3, 4\)"),
    "y's tree": (lambda: start(replacing(DDIM(), y={"a": Y})), "structure of A x"),
    "no noise to leave out": (
        lambda: NoiselessPredictor().check(replacing(Heun()), None, False),
        "RungeKutta adds no noise",
    ),
}


def start(solver):
    return solver.init(VP(), jnp.zeros((2, D)), jnp.asarray(1.0))


@pytest.mark.parametrize("name", BAD)
def test_bad_input_raises(name):
    call, match = BAD[name]
    with pytest.raises(ValueError, match=match):
        call()
