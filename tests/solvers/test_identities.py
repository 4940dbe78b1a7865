"""Equalities with the published update rules, written in NumPy from the papers, for given noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import random
from diffjax.core.types import Prediction
from diffjax.processes import EDM, VE, VP, RectifiedFlow, SubVP, Tabulated
from diffjax.solvers import (
    DDIM,
    Ancestral,
    EDMChurn,
    Euler,
    EulerMaruyama,
    Heun,
    Langevin,
    NoiselessPredictor,
    PredictorCorrector,
    ReverseDiffusion,
    Tweedie,
    XState,
    grids,
    sample,
)
from diffjax.testing import given_noise
from tests.oracles import gaussian
from tests.solvers.helpers import SPANS, bent_denoiser, standard_normal

pytestmark = pytest.mark.usefixtures("x64")

X = standard_normal(0, (6, 4))
Z = standard_normal(1, (6, 4))
SCORE = -1.3 * X + 0.4 * np.cos(2 * X)  # any score will do


def one_step(solver, process, t, s, *, part="step"):
    """x_s from X and SCORE at t, with the noise Z."""

    def denoise(x, t):
        c = process.coeffs(t)
        eps = -c.sigma * jnp.asarray(SCORE)
        return Prediction((x - c.sigma * eps) / c.alpha, eps)

    keys, t, s = random.sample_keys(jax.random.key(0), 6), jnp.asarray(t), jnp.asarray(s)
    state = solver.init(process, jnp.asarray(X), t)
    with given_noise(lambda name, like: jnp.asarray(Z)):
        return np.asarray(getattr(solver, part)(keys, denoise, process, state, t, s).x)


def close(a, b, rtol=1e-11):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


# --- the discrete tables of score_sde --------------------------------------------------------

N = 1000
BETA = np.linspace(0.1 / N, 20 / N, N)
LEVEL = np.exp(np.linspace(np.log(0.01), np.log(50), N))


@pytest.mark.parametrize("k", [1, 7, 500, 999])
def test_vp_rules_on_the_ddpm_grid(k):
    process, beta = Tabulated.ddpm(), BETA[k]
    t, s = (k + 1) / N, k / N
    mean = (2 - np.sqrt(1 - beta)) * X + beta * SCORE
    close(one_step(ReverseDiffusion(), process, t, s), mean + np.sqrt(beta) * Z, 1e-8)
    close(one_step(ReverseDiffusion(), process, t, s, part="finish"), mean, 1e-8)
    mean = (X + beta * SCORE) / np.sqrt(1 - beta)
    close(one_step(Ancestral("large"), process, t, s), mean + np.sqrt(beta) * Z, 1e-8)
    # DDPM's other choice: beta~ = beta (1 - abar_{k-1})/(1 - abar_k).
    abar = np.cumprod(1 - BETA)
    small = beta * (1 - abar[k - 1]) / (1 - abar[k])
    close(one_step(Ancestral("small"), process, t, s), mean + np.sqrt(small) * Z, 1e-8)


def test_vp_ancestral_at_the_first_level_is_tweedie():
    """k = 0: (x + beta_0 s)/sqrt(1 - beta_0), which is E[x0 | x]."""
    end = one_step(Ancestral("large"), Tabulated.ddpm(), 1 / N, 0.0, part="finish")
    close(end, (X + BETA[0] * SCORE) / np.sqrt(1 - BETA[0]), 1e-10)
    close(one_step(Ancestral("small"), Tabulated.ddpm(), 1 / N, 0.0), end, 1e-10)  # no noise


@pytest.mark.parametrize("k", [1, 7, 500, 999])
def test_ve_rules_on_the_smld_grid(k):
    """On VE's own times k/(N-1), and on EDM's process, whose time is the level."""
    gap = LEVEL[k] ** 2 - LEVEL[k - 1] ** 2
    mean = X + gap * SCORE
    spread = np.sqrt(LEVEL[k - 1] ** 2 * gap / LEVEL[k] ** 2)
    for process, t, s in (
        (VE(), k / (N - 1), (k - 1) / (N - 1)),
        (EDM(), LEVEL[k], LEVEL[k - 1]),
    ):
        close(one_step(ReverseDiffusion(), process, t, s), mean + np.sqrt(gap) * Z, 1e-8)
        close(one_step(Ancestral(), process, t, s), mean + spread * Z, 1e-8)


def _signal(name, t):
    """alpha and sigma of the paper's three processes."""
    integral = 0.1 * t + 19.9 * t**2 / 2
    return {
        "vp": (np.exp(-integral / 2), np.sqrt(-np.expm1(-integral))),
        "sub_vp": (np.exp(-integral / 2), -np.expm1(-integral)),
        "ve": (1.0, 0.01 * 5000**t),
    }[name]


@pytest.mark.parametrize("t, s", [(0.9, 0.7), (0.5, 0.499), (0.02, 0.001)])
@pytest.mark.parametrize("name", ["vp", "sub_vp", "ve"])
def test_ancestral_is_bayes_rule(name, t, s):
    """q(x_s | x_t, x0) by adding precisions, also for sub-VP, which the reference code lacks."""
    (alpha, sigma), (alpha_s, sigma_s) = _signal(name, t), _signal(name, s)
    x0 = (X + sigma**2 * SCORE) / alpha
    a = alpha / alpha_s
    b2 = sigma**2 - (a * sigma_s) ** 2
    variance = 1 / (a**2 / b2 + 1 / sigma_s**2)
    mean = variance * (a * X / b2 + alpha_s * x0 / sigma_s**2)
    process = {"vp": VP(), "sub_vp": SubVP(), "ve": VE()}[name]
    close(one_step(Ancestral("small"), process, t, s), mean + np.sqrt(variance) * Z, 1e-8)
    close(one_step(Ancestral("large"), process, t, s), mean + np.sqrt(b2) * Z, 1e-8)


def test_ve_at_the_first_level():
    """k = 0 with sigma_{-1} = 0: x + smin^2 s, Tweedie's, and the ancestral rule adds no noise."""
    tweedie = X + LEVEL[0] ** 2 * SCORE
    close(one_step(ReverseDiffusion(), EDM(), LEVEL[0], 0.0, part="finish"), tweedie)
    close(one_step(Ancestral(), EDM(), LEVEL[0], 0.0), tweedie)
    close(one_step(Ancestral(), EDM(), LEVEL[0], 0.0, part="finish"), tweedie)


@pytest.mark.parametrize(
    "process, f, g2",
    [
        (VP(), lambda t: -(0.1 + 19.9 * t) / 2, lambda t: 0.1 + 19.9 * t),
        (VE(), lambda t: 0.0, lambda t: 2 * (0.01 * 5000**t) ** 2 * np.log(5000)),
        (
            SubVP(),
            lambda t: -(0.1 + 19.9 * t) / 2,
            lambda t: (0.1 + 19.9 * t) * (1 - np.exp(-2 * (0.1 * t + 19.9 * t**2 / 2))),
        ),
    ],
    ids=["vp", "ve", "sub_vp"],
)
def test_euler_maruyama_is_the_papers(process, f, g2):
    t, h = 0.6, 1 / N
    mean = X - (f(t) * X - g2(t) * SCORE) * h
    close(one_step(EulerMaruyama(), process, t, t - h), mean + np.sqrt(g2(t) * h) * Z, 1e-9)
    close(one_step(EulerMaruyama(), process, t, t - h, part="finish"), mean, 1e-9)


def test_reverse_diffusion_of_sub_vp_nears_euler_maruyama():
    """The reference uses Euler-Maruyama for sub-VP; the exact transition differs by O(h^2)."""
    gaps = []
    for h in (1e-3, 5e-4):
        pair = (one_step(s, SubVP(), 0.6, 0.6 - h) for s in (ReverseDiffusion(), EulerMaruyama()))
        gaps.append(np.abs(np.subtract(*pair)).max())
    assert gaps[0] < 1e-3
    assert 2**1.3 < gaps[0] / gaps[1] < 2**2.2  # 3/2 for the noise's share, 2 for the mean's


@pytest.mark.parametrize("name", SPANS)
def test_ddim_at_eta_1_is_ancestral(name):
    process, low, high = SPANS[name]
    for t, s in ((high, low), (low, low / 2), ((low + high) / 2, low)):
        close(
            one_step(DDIM(eta=1.0), process, t, s),
            one_step(Ancestral("small"), process, t, s),
            1e-9,
        )


def test_ddim_between_the_ends_of_eta():
    """The paper's sigma: eta sqrt((1 - abar_s)/(1 - abar_t)) sqrt(1 - abar_t/abar_s)."""
    process, k, eta = Tabulated.ddpm(), 600, 0.4
    abar = np.cumprod(1 - BETA)
    at, as_ = abar[k], abar[k - 20]
    eps = -np.sqrt(1 - at) * SCORE
    x0 = (X - np.sqrt(1 - at) * eps) / np.sqrt(at)
    spread = eta * np.sqrt((1 - as_) / (1 - at)) * np.sqrt(1 - at / as_)
    exact = np.sqrt(as_) * x0 + np.sqrt(1 - as_ - spread**2) * eps + spread * Z
    t, s = (k + 1) / N, (k - 19) / N
    close(one_step(DDIM(eta=eta), process, t, s), exact, 1e-9)
    exact = np.sqrt(as_) * x0 + np.sqrt(1 - as_) * eps
    close(one_step(DDIM(), process, t, s), exact, 1e-9)
    close(one_step(DDIM(eta=0.0), process, t, s), exact, 1e-9)


# --- EDM -------------------------------------------------------------------------------------


def edm_denoiser(x, level, xp):
    """Some smooth D(x; sigma)."""
    return 0.2 + (x - 0.2) / (1 + level**2) + 0.3 * xp.sin(x) / (1 + level)


def karras_sampler(x, levels, noise, churn=0.0, s_min=0.0, s_max=np.inf, s_noise=1.0):
    """Karras et al. 2022, algorithm 2 (algorithm 1 for churn = 0); also counts calls of D."""
    count, calls = len(levels) - 1, 0
    for i in range(count):
        t, s = levels[i], levels[i + 1]
        gamma = min(churn / count, np.sqrt(2) - 1) if s_min <= t <= s_max else 0.0
        hat = t + gamma * t
        x_hat = x + np.sqrt(hat**2 - t**2) * s_noise * noise[i]
        d = (x_hat - edm_denoiser(x_hat, hat, np)) / hat
        calls += 1
        x = x_hat + (s - hat) * d
        if s != 0:
            slope = (x - edm_denoiser(x, s, np)) / s
            calls += 1
            x = x_hat + (s - hat) * (d + slope) / 2
    return x, calls


def driver_noise(key, name, x, n):
    """The draws that the driver hands to a solver, step by step, (n, *x.shape)."""
    keys = random.sample_keys(key, x.shape[0])
    draws = [random.normal_like(random.step_keys(keys, i), name, x) for i in range(n)]
    return np.stack([np.asarray(z) for z in draws])


@pytest.mark.parametrize(
    "options",
    [None, {"churn": 3.0, "s_noise": 1.007}, {"churn": 40.0, "s_min": 0.05, "s_max": 50.0}],
    ids=["algorithm 1", "algorithm 2", "algorithm 2 with bounds"],
)
def test_heun_on_edm_is_karras(options, key):
    n, process = 18, EDM()
    rho, steps = 7, np.arange(n)
    root = 80 ** (1 / rho) + steps / (n - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))
    levels = np.append(root**rho, 0.0)
    x = jnp.asarray(80 * X)

    def denoise(x, t):
        x0 = edm_denoiser(x, t, jnp)
        return Prediction(x0, (x - x0) / t)

    solver = Heun()
    if options is not None:
        fields = {k: v for k, v in options.items() if k != "churn"}
        solver = EDMChurn(Heun(), options["churn"], n, **fields)
    result = sample(key, denoise, x, grids.karras(process, n), solver=solver, process=process)
    exact, calls = karras_sampler(
        np.asarray(x), levels, driver_noise(key, "churn", x, n), **(options or {})
    )
    close(result.x, exact, 1e-9)
    assert result.nfe == calls == 2 * n - 1


def test_euler_is_ddim_where_sigma_is_t(key):
    """On EDM and on a straight flow the two are one rule."""
    x = jnp.asarray(X)
    for process in (EDM(t_max=5.0), RectifiedFlow(t_max=0.99)):
        times, denoise = grids.uniform(process, 9), bent_denoiser(process)
        a, b = (
            sample(key, denoise, x, times, solver=s, process=process).x for s in (Euler(), DDIM())
        )
        close(a, b)


# --- ends ------------------------------------------------------------------------------------


def test_ends_of_ve(key):
    """Tweedie() after the last step, NoiselessPredictor() in its place: x + (s_t^2 - s_s^2) s."""
    process, oracle = VE(), gaussian(4, jnp.float64)
    denoise = oracle.denoiser(process)
    times = jnp.asarray([0.05, 0.02, 1e-5])
    x = jnp.asarray(0.1 * X)
    kwargs = {"solver": ReverseDiffusion(), "process": process}
    level = 0.01 * 5000 ** np.asarray(times)
    z = driver_noise(key, "reverse_diffusion", x, 2)

    def score(x, sigma):
        return -(x - np.asarray(oracle.mean)) / (np.asarray(oracle.std) ** 2 + sigma**2)

    mean = np.asarray(x) + (level[0] ** 2 - level[1] ** 2) * score(np.asarray(x), level[0])
    first = mean + np.sqrt(level[0] ** 2 - level[1] ** 2) * z[0]
    mean = first + (level[1] ** 2 - level[2] ** 2) * score(first, level[1])
    close(sample(key, denoise, x, times, final=NoiselessPredictor(), **kwargs).x, mean, 1e-9)
    last = mean + np.sqrt(level[1] ** 2 - level[2] ** 2) * z[1]
    exact = last + level[2] ** 2 * score(last, level[2])
    close(sample(key, denoise, x, times, final=Tweedie(), **kwargs).x, exact, 1e-9)


# --- Langevin --------------------------------------------------------------------------------


def corrected(process, t, s, *, gain=1.0, **fields):
    """Langevin's x from X with score gain * SCORE and noise Z."""
    keys = random.sample_keys(jax.random.key(0), 6)

    def denoise(x, t):
        eps = -process.coeffs(t).sigma * gain * jnp.asarray(SCORE)
        return Prediction(x, eps)

    with given_noise(lambda name, like: jnp.asarray(Z)):
        return np.asarray(
            Langevin(**fields).correct(
                keys, denoise, process, jnp.asarray(X), jnp.asarray(t), jnp.asarray(s)
            )
        )


def langevin_rule(alpha, snr, batch, gain=1.0):
    """Algorithms 4 and 5 with the reference code's alpha; norms a sample or their batch means."""
    z, g = np.linalg.norm(Z, axis=1), np.linalg.norm(gain * SCORE, axis=1)
    if batch:
        z, g = np.full(6, z.mean()), np.full(6, g.mean())
    e = (2 * alpha * (snr * z / g) ** 2)[:, None]
    return X + e * gain * SCORE + np.sqrt(2 * e) * Z, e


@pytest.mark.parametrize("coupling", ["sample", "batch"])
def test_langevin_is_the_papers(coupling):
    batch = coupling == "batch"
    k = 700
    t, s = (k + 1) / N, k / N
    vp = corrected(Tabulated.ddpm(), t, s, snr=0.1, coupling=coupling)
    close(vp, langevin_rule(1 - BETA[k], 0.1, batch)[0], 1e-9)
    ve = corrected(VE(), 0.5, 0.4, snr=0.16, coupling=coupling)
    close(ve, langevin_rule(1.0, 0.16, batch)[0], 1e-9)


def test_langevin_step_falls_with_the_square_of_the_score():
    """c times the score gives 1/c^2 of the step: noise/c, and drift/c."""
    step = corrected(VE(), 0.5, 0.4) - X
    close(corrected(VE(), 0.5, 0.4, gain=3.0) - X, step / 3, 1e-10)


def test_langevin_steps_chain():
    """n_steps = 3 is three single steps with the same noise."""
    twice = corrected(VE(), 0.5, 0.4, n_steps=3)
    x = X
    _, e = langevin_rule(1.0, 0.16, False)
    for _ in range(3):
        x = x + e * SCORE + np.sqrt(2 * e) * Z
    close(twice, x, 1e-10)


def test_predictor_corrector_corrects_first():
    """The corrector's x at t is what the predictor starts from."""
    process, t, s = VE(), 0.5, 0.4
    both = one_step(PredictorCorrector(ReverseDiffusion(), Langevin()), process, t, s)
    half = corrected(process, t, s)
    keys = random.sample_keys(jax.random.key(0), 6)
    with given_noise(lambda name, like: jnp.asarray(Z)):
        alone = ReverseDiffusion().step(
            keys,
            lambda x, t: Prediction(x, -process.coeffs(t).sigma * jnp.asarray(SCORE)),
            process,
            XState(jnp.asarray(half)),
            jnp.asarray(t),
            jnp.asarray(s),
        )
    close(both, alone.x, 1e-10)
