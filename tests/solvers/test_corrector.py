"""Correctors and orders: the published rules in NumPy for given noise, and who is called when."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import random
from diffjax.core.types import Prediction
from diffjax.processes import VE, VP, RectifiedFlow, SubVP, Tabulated
from diffjax.solvers import (
    AnnealedLangevin,
    EulerMaruyama,
    Heun,
    Keep,
    Langevin,
    NoCorrector,
    NoiselessPredictor,
    NoPredictor,
    PredictorCorrector,
    ReverseDiffusion,
    ToEnd,
    Tweedie,
    grids,
    sample,
)
from diffjax.testing import given_noise
from tests.oracles import gaussian
from tests.solvers.helpers import Counter, standard_normal
from tests.solvers.test_order import check_gaussian

X, Z = standard_normal(0, (6, 4)), standard_normal(1, (6, 4))
SCORE = -1.3 * X + 0.4 * np.cos(2 * X)
KEYS = random.sample_keys(jax.random.key(0), 6)
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def corrected(corrector, process, t, s, *, x=X, gain=1.0):
    """The corrector's x from X with score gain * SCORE and noise Z, in float64."""

    def denoise(x, t):
        return Prediction(x, -process.coeffs(t).sigma * gain * jnp.asarray(SCORE))

    with given_noise(lambda name, like: jnp.asarray(Z)):
        out = corrector.correct(
            KEYS, denoise, process, jnp.asarray(x), jnp.asarray(t), jnp.asarray(s)
        )
    return np.asarray(out)


def close(a, b, rtol=1e-10):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


# --- rules -----------------------------------------------------------------------------------


def test_annealed_langevin_is_the_reference_rule(x64):
    """e = 2 alpha (snr std)^2, alpha = 1 - beta_k for VP on its table and 1 for VE."""
    beta = np.linspace(0.1 / 1000, 20 / 1000, 1000)
    k, snr = 700, 0.3
    abar = np.cumprod(1 - beta)[k]
    for process, t, s, alpha, std in (
        (Tabulated.ddpm(), (k + 1) / 1000, k / 1000, 1 - beta[k], np.sqrt(1 - abar)),
        (VE(), 0.5, 0.4, 1.0, 0.01 * 5000**0.5),
    ):
        e = 2 * alpha * (snr * std) ** 2
        found = corrected(AnnealedLangevin(snr), process, t, s)
        close(found, X + e * SCORE + np.sqrt(2 * e) * Z, 1e-8)


@pytest.mark.parametrize(
    ("step_lr", "snr"), [(2e-5, 0.316), (6.2e-6, 0.176), (3.3e-6, 0.128), (1.8e-6, 0.095)]
)
def test_annealed_langevin_is_ncsn(step_lr, snr, x64):
    """NCSN's step_lr sigma_i^2/sigma_L^2, with the snr that the published configs give."""
    assert abs(np.sqrt(step_lr / 2) / 0.01 - snr) < 6e-4
    level = 0.01 * 100**0.7
    e = step_lr * level**2 / 0.01**2
    exact = X + e * SCORE + np.sqrt(2 * e) * Z
    rule = AnnealedLangevin(np.sqrt(step_lr / 2) / 0.01)
    close(corrected(rule, VE(sigma_max=1.0), 0.7, 0.6), exact)


def test_annealed_step_does_not_see_the_score(x64):
    """Three times the score is three times the drift, and the same noise."""
    rule = AnnealedLangevin(0.2)
    noise = corrected(rule, VE(), 0.5, 0.4, gain=0.0) - X
    once = corrected(rule, VE(), 0.5, 0.4) - X
    close(corrected(rule, VE(), 0.5, 0.4, gain=3.0) - X, 3 * (once - noise) + noise)


@pytest.mark.parametrize("coupling", ["sample", "batch"])
def test_sqrt_dim_has_the_expected_norm_of_the_noise(coupling, x64):
    """e = 2 (snr sqrt(D)/|g|)^2 with D = 4: appendix G's rule for small batches."""
    g = np.linalg.norm(SCORE, axis=1)
    g = g if coupling == "sample" else np.full(6, g.mean())
    e = (2 * (0.16 * 2.0 / g) ** 2)[:, None]
    rule = Langevin(0.16, coupling=coupling, noise_norm="sqrt_dim")
    close(corrected(rule, VE(), 0.5, 0.4), X + e * SCORE + np.sqrt(2 * e) * Z)


def test_a_is_that_of_the_interval_from_either_end(x64):
    """a^2 = alpha_t^2/alpha_s^2 with t the noisier time, whichever is given first."""
    ratio = (VP().coeffs(jnp.asarray(0.6)).alpha / VP().coeffs(jnp.asarray(0.5)).alpha) ** 2
    rule = Langevin(0.1)
    free = corrected(rule, VP(), 0.5, 0.5) - X
    down, up = (corrected(rule, VP(), 0.5, s) - X for s in (0.4, 0.6))
    e = (2 * (0.1 * np.linalg.norm(Z, axis=1) / np.linalg.norm(SCORE, axis=1)) ** 2)[:, None]
    close(free, e * SCORE + np.sqrt(2 * e) * Z)
    close(up, ratio * e * SCORE + np.sqrt(2 * ratio * e) * Z)
    assert np.abs(down - up).max() > 1e-4  # beta grows with t


@pytest.mark.parametrize("process", [VP(), SubVP(), VE()], ids=["vp", "sub_vp", "ve"])
@pytest.mark.parametrize("rule", [Langevin(), AnnealedLangevin()], ids=["langevin", "annealed"])
def test_every_process_can_be_corrected(rule, process, x64):
    """Sub-VP too, for which the reference code has no alphas."""
    t, s = jnp.asarray(0.3), jnp.asarray(0.299)
    moved = corrected(rule, process, t, s) - X
    assert np.isfinite(moved).all() and np.abs(moved).max() > 1e-3
    if not isinstance(process, VE):  # 1 - beta(t)/N
        beta = 0.1 + 0.3 * 19.9
        a2 = (process.coeffs(t).alpha / process.coeffs(s).alpha) ** 2
        assert abs(a2 - (1 - beta * 1e-3)) < 5e-5


def test_a_vanishing_score_gives_a_finite_step(x64):
    assert np.isfinite(corrected(Langevin(), VE(), 0.5, 0.4, gain=0.0)).all()


# --- orders and ends -------------------------------------------------------------------------


class Mark:
    """A corrector or predictor that leaves its name and time in `seen`, and moves x by nothing."""

    stages = 1
    final_stages = 1

    def __init__(self, name, seen, stochastic=True):
        self.name, self.seen, self.stochastic = name, seen, stochastic

    def _note(self, t, s):
        self.seen.append((self.name, round(float(t), 6), round(float(s), 6)))

    def correct(self, keys, denoise, process, x, t, s):
        self._note(t, s)
        return x

    def init(self, process, x, t):
        return NoPredictor().init(process, x, t)

    def step(self, keys, denoise, process, state, t, s):
        self._note(t, s)
        return state

    def finish(self, keys, denoise, process, state, t, s):
        self.seen.append((self.name + " finish", round(float(t), 6), round(float(s), 6)))
        return state


def calls(order, final, times):
    """Who is called, in order, over a grid run by hand as the driver does."""
    seen = []
    solver = PredictorCorrector(Mark("P", seen), Mark("C", seen), order)
    process, keys = VE(), KEYS
    state = solver.init(process, jnp.asarray(X), times[0])
    oracle = gaussian(4).denoiser(process)
    intervals = list(zip(times[:-1], times[1:], strict=True))
    for t, s in intervals if final.steps else intervals[:-1]:
        state = solver.step(keys, oracle, process, state, jnp.asarray(t), jnp.asarray(s))
    t, s = intervals[-1]
    final.end(solver, keys, oracle, process, state, jnp.asarray(t), jnp.asarray(s))
    return seen


def test_corrector_first_corrects_every_time_once():
    """The reference's N points, the last included where Tweedie denoises there."""
    times = [0.9, 0.5, 0.1]
    seen = calls("corrector_first", Tweedie(), times)
    assert seen == [
        ("C", 0.9, 0.5),
        ("P", 0.9, 0.5),
        ("C", 0.5, 0.1),
        ("P", 0.5, 0.1),
        ("C", 0.1, 0.5),
    ]
    seen = calls("corrector_first", NoiselessPredictor(), times)
    assert seen[2:] == [("C", 0.5, 0.1), ("P finish", 0.5, 0.1)]
    assert calls("corrector_first", Keep(), times)[2:] == [("C", 0.5, 0.1), ("P", 0.5, 0.1)]


def test_predictor_first_corrects_where_it_arrives():
    """Algorithm 1 of the paper; after a step without noise nothing is added (D7)."""
    times = [0.9, 0.5, 0.1]
    both = [("P", 0.9, 0.5), ("C", 0.5, 0.9), ("P", 0.5, 0.1), ("C", 0.1, 0.5)]
    for final in (Tweedie(), Keep()):
        assert calls("predictor_first", final, times) == both
    for final in (NoiselessPredictor(), ToEnd()):
        assert calls("predictor_first", final, times)[2:] == [("P finish", 0.5, 0.1)]


ORDERS = ("corrector_first", "predictor_first")
PARTS = {
    "pc": (ReverseDiffusion(), Langevin(n_steps=2)),
    "corrector only": (NoPredictor(), AnnealedLangevin(n_steps=3)),
    "predictor only": (ReverseDiffusion(), NoCorrector()),
    "flow": (ReverseDiffusion(probability_flow=True), NoCorrector()),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", PARTS)
def test_declared_calls_are_the_calls_that_run(case, order, key):
    """nfe against a run-time count, for every end; the reference over-reports (E5)."""
    process, solver = VP(), PredictorCorrector(*PARTS[case], order)
    counter = Counter(gaussian(4).denoiser(process))
    finals = [(Tweedie(), 0.1), (Keep(), 0.1), (ToEnd(), 0.0)]
    if PARTS[case][0].stochastic:
        finals.append((NoiselessPredictor(), 0.1))
    for final, end in finals:
        times = grids.uniform(process, 5, end=end)
        run = compiled(
            lambda x, times, final=final: (
                sample(key, counter, x, times, solver=solver, process=process, final=final).nfe
            )
        )
        assert run(jnp.asarray(X, jnp.float32), times) == counter.read()


def test_calls_of_the_reference_protocol():
    """N points, Tweedie at the last: N (n_steps + 1) calls."""
    seen, solver = [], PredictorCorrector(ReverseDiffusion(), Langevin(n_steps=2))
    times = grids.uniform(VE(), 99, end=1e-5)
    x, denoise = jnp.asarray(X, jnp.float32), gaussian(4).denoiser(VE())
    jax.eval_shape(
        lambda x: seen.append(
            sample(KEYS, denoise, x, times, solver=solver, process=VE(), final=Tweedie()).nfe
        ),
        x,
    )
    assert seen == [100 * 3]


def test_settling_draws_its_own_noise(key):
    """The corrector's noise at the last time is not that of the interval before."""
    seen = []

    class Keys:
        stages = 1

        def correct(self, keys, denoise, process, x, t, s):
            seen.append(jax.random.key_data(keys))
            return x

    solver = PredictorCorrector(NoPredictor(), Keys())
    process = VE()
    arguments = (KEYS, gaussian(4).denoiser(process), process)
    t, s = jnp.asarray(0.5), jnp.asarray(0.1)
    state = solver.init(process, jnp.asarray(X, jnp.float32), t)
    state = solver.step(*arguments, state, t, s)
    Tweedie().end(solver, *arguments, state, t, s)
    assert len(seen) == 2 and (seen[0] != seen[1]).any()


@pytest.mark.parametrize("order", ORDERS)
def test_a_corrector_alone_ends_denoised(order, key):
    """E2: with predictor none the last sample is E[x0 | x], at the level that x is at.

    Langevin on a Gaussian from its own p_t at every level, n = 8,000 numbers, a standard error of
    0.8%. The deviation of what comes out is that of the posterior mean, d^2/sqrt(d^2 + sigma^2);
    without denoising it is sqrt(d^2 + sigma^2), 12% more at the sigma = 0.35 d chosen.
    """
    deviation, low = 0.5, 0.175
    process = VE(sigma_min=low, sigma_max=2.0)
    oracle = gaussian(16)
    oracle = type(oracle)(jnp.zeros(16), jnp.full(16, deviation))
    solver = PredictorCorrector(NoPredictor(), AnnealedLangevin(0.2, n_steps=30), order)
    x = jnp.sqrt(4.0 + deviation**2) * jax.random.normal(jax.random.key(1), (500, 16))

    @jax.jit
    def run(times, x):
        result = sample(
            key,
            oracle.denoiser(process),
            x,
            times,
            solver=solver,
            process=process,
            final=Tweedie(),
        )
        return jnp.std(result.x)

    found = float(run(grids.uniform(process, 40, end=0.0), x))
    exact = deviation**2 / np.sqrt(deviation**2 + low**2)
    assert abs(found / exact - 1) < 0.04
    assert np.sqrt(deviation**2 + low**2) / exact > 1.1


@pytest.mark.parametrize(
    ("solver", "name"),
    [
        (PredictorCorrector(NoPredictor(), Langevin()), "NoPredictor"),
        (
            PredictorCorrector(ReverseDiffusion(probability_flow=True), Langevin()),
            "ReverseDiffusion",
        ),
        (EulerMaruyama(probability_flow=True), "EulerMaruyama"),
    ],
)
def test_there_is_no_noise_to_leave_out(solver, name):
    """The reference's noise removal does nothing without a predictor's noise: refused."""
    x = jnp.zeros((6, 4))
    times = grids.uniform(VE(), 3)
    with pytest.raises(ValueError, match=rf"{name} adds no noise.*Tweedie\(\)"):
        sample(
            KEYS,
            gaussian(4).denoiser(VE()),
            x,
            times,
            solver=solver,
            process=VE(),
            final=NoiselessPredictor(),
        )


def test_nothing_draws_without_noise_or_corrector():
    assert not PredictorCorrector(Heun(), NoCorrector()).stochastic
    assert not PredictorCorrector(EulerMaruyama(probability_flow=True), NoCorrector()).stochastic
    assert PredictorCorrector(NoPredictor(), Langevin()).stochastic


# --- the flow by the predictors --------------------------------------------------------------


@pytest.mark.parametrize("process", [VP(), SubVP(), VE()], ids=["vp", "sub_vp", "ve"])
def test_probability_flow_of_euler_maruyama(process, x64):
    """x + h (f x - g^2 s/2), with f and g^2 as the paper prints them."""
    beta, integral = 0.1 + 0.6 * 19.9, 0.1 * 0.6 + 19.9 * 0.18
    f, g2 = {
        "VP": (-beta / 2, beta),
        "SubVP": (-beta / 2, beta * (1 - np.exp(-2 * integral))),
        "VE": (0.0, 2 * (0.01 * 5000**0.6) ** 2 * np.log(5000)),
    }[type(process).__name__]
    h = 1e-3
    exact = X - h * (f * X - g2 * SCORE / 2)
    found = stepped(EulerMaruyama(probability_flow=True), process, 0.6, 0.6 - h)
    close(found, exact, 1e-9)


@pytest.mark.parametrize("k", [1, 400, 999])
def test_probability_flow_of_reverse_diffusion(k, x64):
    """Equations 43 and 44: half the score, no noise, on SMLD's and DDPM's tables."""
    level = np.exp(np.linspace(np.log(0.01), np.log(50), 1000))
    flow = ReverseDiffusion(probability_flow=True)
    gap = level[k] ** 2 - level[k - 1] ** 2
    close(stepped(flow, VE(), k / 999, (k - 1) / 999), X + gap * SCORE / 2, 1e-8)
    beta = np.linspace(0.1 / 1000, 20 / 1000, 1000)[k]
    exact = (2 - np.sqrt(1 - beta)) * X + beta * SCORE / 2
    close(stepped(flow, Tabulated.ddpm(), (k + 1) / 1000, k / 1000), exact, 1e-8)


def stepped(solver, process, t, s):
    """One step from X with SCORE; any draw would be Z."""

    def denoise(x, t):
        c = process.coeffs(t)
        eps = -c.sigma * jnp.asarray(SCORE)
        return Prediction((x - c.sigma * eps) / c.alpha, eps)

    t, s = jnp.asarray(t), jnp.asarray(s)
    with given_noise(lambda name, like: jnp.asarray(Z)):
        state = solver.init(process, jnp.asarray(X), t)
        return np.asarray(solver.step(KEYS, denoise, process, state, t, s).x)


@pytest.mark.parametrize("solver", [EulerMaruyama, ReverseDiffusion])
def test_probability_flow_is_of_first_order(solver, x64):
    """To the closed form of a Gaussian's flow, where the noisy step has no strong order."""
    check_gaussian("vp", solver(probability_flow=True), 1)


def test_probability_flow_still_needs_rates():
    with pytest.raises(ValueError, match="g.2 is infinite"):
        EulerMaruyama(probability_flow=True).init(RectifiedFlow(), jnp.asarray(X), jnp.asarray(1.0))
