"""Runs of the reference protocol, its loop written in NumPy, against `sample` with the same noise.

The loop (Score-SDE's `get_pc_sampler`): N points t_i from 1 to the cut-off; at each the corrector,
then the predictor through the tables at k = int(t (N - 1)); the last mean is the sample. Ours is
eq. (5) of `diffjax.solvers.grids`: N - 1 intervals and `Tweedie()`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import random
from diffjax.core.types import Prediction
from diffjax.prediction import make_denoiser, precondition
from diffjax.processes import EDM, VE, VP, SubVP, Tabulated, transition
from diffjax.solvers import (
    Ancestral,
    AnnealedLangevin,
    EulerMaruyama,
    Keep,
    Langevin,
    NoCorrector,
    NoiselessPredictor,
    NoPredictor,
    PredictorCorrector,
    ReverseDiffusion,
    Tweedie,
    grids,
    sample,
)
from tests.solvers.helpers import standard_normal

pytestmark = pytest.mark.usefixtures("x64")

B, D, N, STEPS = 5, 3, 30, 2
X = standard_normal(0, (B, D))
KEY = jax.random.key(3)


def raw_score(x, level, xp):
    """Some score that depends on x and the noise level, for NumPy and JAX."""
    return (0.3 - x + 0.1 * xp.cos(x)) / (0.2 + level**2)


def denoiser(process):
    """The denoiser of `raw_score`: eps = -sigma s."""

    def denoise(x, t):
        c = process.coeffs(t)
        eps = -c.sigma * raw_score(x, c.sigma, jnp)
        return Prediction((x - c.sigma * eps) / c.alpha, eps)

    return denoise


# Without LLVM's optimiser: faster to compile, and all that these small runs need.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def noise(name):
    """The draws of that name that the driver hands to a solver, interval by interval.

    (N - 1, B, D); for "langevin" (N, STEPS, B, D), where the last is the settling corrector's.
    """
    keys = random.sample_keys(KEY, B)
    x = jnp.asarray(X)

    def draw(i):
        own = random.step_keys(keys, jnp.minimum(i, N - 2))
        if name != "langevin":
            return random.normal_like(own, name, x)
        settling = random.step_keys(own, random.tag("settle"))
        data = jnp.where(i < N - 1, jax.random.key_data(own), jax.random.key_data(settling))
        own = jax.random.wrap_key_data(data)
        steps = jnp.arange(STEPS)
        return jax.lax.map(lambda j: random.normal_like(random.step_keys(own, j), name, x), steps)

    return np.asarray(compiled(lambda: jax.lax.map(draw, jnp.arange(N)))())


def reference(x, predict, correct, end, denoise=True):
    """The loop. predict: (x, t, k) -> (mean, spread, name); correct: (x, t, k, z) -> x."""
    mean = x
    for i, t in enumerate(np.linspace(1.0, end, N)):
        k = int(t * (N - 1) + 1e-9)  # the truncation, without float64's last digit
        for j in range(STEPS):
            x = correct(x, t, k, noise("langevin")[i, j])
        mean, spread, name = predict(x, t, k)
        last = i == N - 1
        x = mean if last else mean + spread * noise(name)[i]
    return mean if denoise else x


def ours(process, predictor, corrector, end, x, final=Tweedie()):
    solver = PredictorCorrector(predictor, corrector)
    times = grids.uniform(process, N - 1, end=end)
    run = compiled(
        lambda x: (
            sample(KEY, denoiser(process), x, times, solver=solver, process=process, final=final).x
        )
    )
    return np.asarray(run(jnp.asarray(x)))


def langevin(snr, alpha, level):
    """The reference's rule, with batch means."""

    def correct(x, t, k, z):
        g = raw_score(x, level(t), np)
        size_z, size_g = (np.linalg.norm(a, axis=1).mean() for a in (z, g))
        e = 2 * alpha(k) * (snr * size_z / size_g) ** 2
        return x + e * g + np.sqrt(2 * e) * z

    return correct


def nothing(x, t, k, z):
    return x


LEVEL = np.exp(np.linspace(np.log(0.01), np.log(50), N))
BETA = np.linspace(0.1 / N, 20 / N, N)


def ve_sigma(t):
    return 0.01 * 5000**t


def ve_predict(kind, x, t, k):
    gap = LEVEL[k] ** 2 - (LEVEL[k - 1] ** 2 if k else 0.0)
    mean = x + gap * raw_score(x, ve_sigma(t), np)
    if kind == "ancestral":
        return mean, np.sqrt((LEVEL[k - 1] ** 2 if k else 0.0) * gap) / LEVEL[k], kind
    return mean, np.sqrt(gap), kind


def vp_predict(kind, x, t, k):
    std = np.sqrt(1 - np.cumprod(1 - BETA)[k])
    score = raw_score(x, std, np)
    if kind == "ancestral":
        mean = (x + BETA[k] * score) / np.sqrt(1 - BETA[k])
    else:
        mean = (2 - np.sqrt(1 - BETA[k])) * x + BETA[k] * score
    return mean, np.sqrt(BETA[k]), kind


PREDICTORS = {"reverse_diffusion": ReverseDiffusion(), "ancestral": Ancestral("small")}


@pytest.mark.parametrize("kind", PREDICTORS)
@pytest.mark.parametrize(("end", "tolerance"), [(0.0, 1e-9), (1e-5, 2e-4)])
def test_ve_with_langevin(kind, end, tolerance):
    """The published protocol for VE. At the cut-off 1e-5 the tables' levels are off by 1e-4."""
    predict = functools.partial(ve_predict, kind)
    want = reference(50 * X, predict, langevin(0.16, lambda k: 1.0, ve_sigma), end)
    corrector = Langevin(0.16, STEPS, coupling="batch")
    got = ours(VE(), PREDICTORS[kind], corrector, end, 50 * X)
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)
    # A step of the corrector left out, and one predictor's step off, are seen.
    other = ours(VE(), PREDICTORS[kind], Langevin(0.16, 1, coupling="batch"), end, 50 * X)
    assert np.abs(other - want).max() > 100 * tolerance


@pytest.mark.parametrize("kind", PREDICTORS)
def test_vp_on_the_table_of_ddpm(kind):
    """N points at the trained levels; the ancestral rule ends on Tweedie exactly.

    Reverse diffusion ends on (2 - sqrt(1 - beta_0)) x + beta_0 s in the reference, which differs
    from (x + beta_0 s)/sqrt(1 - beta_0) by beta_0^2 and beta_0 s beta_0/2.
    """
    predictor = Ancestral("large") if kind == "ancestral" else ReverseDiffusion()
    want = reference(X, functools.partial(vp_predict, kind), nothing, 1 / N)
    got = ours(Tabulated.ddpm(N), predictor, NoCorrector(), 1 / N, X)
    tolerance = 1e-8 if kind == "ancestral" else 2e-4
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def test_vp_with_langevin_on_the_table():
    """alpha is 1 - beta_k, but at the last time, where ours has that of the interval before."""
    level = lambda t: np.sqrt(1 - np.cumprod(1 - BETA)[int(round(t * N)) - 1])  # noqa: E731
    alpha = lambda k: 1 - BETA[max(k, 1)]  # noqa: E731
    predict = functools.partial(vp_predict, "ancestral")
    want = reference(X, predict, langevin(0.05, alpha, level), 1 / N)
    corrector = Langevin(0.05, STEPS, coupling="batch")
    got = ours(Tabulated.ddpm(N), Ancestral("large"), corrector, 1 / N, X)
    np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-8)


RATES = {
    "vp": lambda b, B: (b, np.sqrt(-np.expm1(-B))),
    "sub_vp": lambda b, B: (b * -np.expm1(-2 * B), -np.expm1(-B)),
}


@pytest.mark.parametrize("name", RATES)
def test_euler_maruyama_to_the_last_step(name):
    """Steps of 1/N, which is the spacing for the cut-off 1/N; the last mean is compared below."""
    process = {"vp": VP(), "sub_vp": SubVP()}[name]

    def predict(x, t, k):
        beta, integral = 0.1 + 19.9 * t, 0.1 * t + 19.9 * t**2 / 2
        g2, std = RATES[name](beta, integral)
        mean = x + (beta / 2 * x + g2 * raw_score(x, std, np)) / N
        return mean, np.sqrt(g2 / N), "euler_maruyama"

    seen = {}

    def remember(x, t, k, z):
        seen["last"] = x
        return x

    reference(X, predict, remember, 1 / N)
    got = ours(process, EulerMaruyama(), NoCorrector(), 1 / N, X, Keep())
    np.testing.assert_allclose(got, seen["last"], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("process", "noiseless", "tweedie"),
    [(VP(), 1.199e-4, 1.0995e-4), (SubVP(), 2.64e-8, 1.21e-8)],
    ids=["vp", "sub_vp"],
)
def test_the_last_mean_of_euler_maruyama_is_not_tweedie(process, noiseless, tweedie):
    """E1: the coefficient of the score at the cut-off 1e-3, for N = 1000, as published."""

    def coefficient(final, end):
        """From the response of the end to the score, times alpha for Tweedie's."""
        t = 1e-3

        def end_of(score):
            def denoise(x, t):
                c = process.coeffs(t)
                eps = jnp.broadcast_to(-c.sigma * score, x.shape)
                return Prediction((x - c.sigma * eps) / c.alpha, eps)

            times, x = jnp.asarray([t, end]), jnp.zeros((1, 1))
            solver = EulerMaruyama()
            state = solver.init(process, x, times[0])
            keys = random.sample_keys(KEY, 1)
            if final == "tweedie":
                return denoise(x, times[0]).x0[0, 0] * process.coeffs(times[0]).alpha
            return (
                NoiselessPredictor()
                .end(solver, keys, denoise, process, state, times[0], times[1])
                .x[0, 0]
            )

        return float(end_of(1.0) - end_of(0.0))

    assert abs(coefficient("noiseless", 1e-9) / noiseless - 1) < 2e-3
    assert abs(coefficient("tweedie", 0.0) / tweedie - 1) < 2e-3


def test_ncsn_is_annealed_langevin_alone():
    """Predictor none, N levels with their corrector steps, then x + sigma_L^2 s (NCSNv2)."""
    process = VE(0.01, 1.0)
    level = lambda t: 0.01 * 100**t  # noqa: E731

    def correct(x, t, k, z):
        e = 2 * (0.2 * level(t)) ** 2
        return x + e * raw_score(x, level(t), np) + np.sqrt(2 * e) * z

    def predict(x, t, k):
        mean = x if k else x + 0.01**2 * raw_score(x, 0.01, np)
        return mean, 0.0, "none"

    want = reference(X, predict, correct, 0.0)
    got = ours(process, NoPredictor(), AnnealedLangevin(0.2, STEPS), 0.0, X)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


# --- ends of VE ------------------------------------------------------------------------------


def test_keeping_the_last_noise_is_seen():
    """C1: without the special case at k = 0 the noise of sigma_min = 0.01 stays."""
    process = VE()
    ends = [
        ours(process, ReverseDiffusion(), NoCorrector(), 1e-5, 50 * X, final)
        for final in (Tweedie(), Keep())
    ]
    gap = (ends[1] - ends[0]) / 0.01
    # x - E[x0|x] = -sigma^2 s; for this score of data of deviation 0.45 it is small, the noise not.
    assert 1e-4 < np.abs(gap).max() < 1


# --- indices ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [100, 999, 1000])
def test_times_are_the_levels_of_training(n):
    """B1: in float32, every point stands on its level of `Tabulated.ddpm(n)`: alpha and the rates.

    The rates are those of the step that led to the level, -ln(1 - beta_k) n; one level further they
    are 20/n^2 off, 2e-4 of the last and more than the tolerance for small k.
    """
    with jax.enable_x64(False):
        process = Tabulated.ddpm(n)
        times = grids.uniform(process, n - 1, end=1 / n)
        level, rate = jax.jit(lambda t: (process.coeffs(t).alpha ** 2, process.rates(t).g2))(times)
    betas = np.linspace(0.1 / n, 20 / n, n)[::-1]
    np.testing.assert_allclose(level, np.cumprod(1 - betas[::-1])[::-1], rtol=3e-5)
    np.testing.assert_allclose(rate, -np.log1p(-betas) * n, rtol=5e-4, atol=2e-3)
    assert np.all(np.diff(np.asarray(times)) < 0)


def test_truncation_is_off_by_one_where_the_docs_say():
    """B1: int(t (N - 1)) for the cut-off 1e-3: right at N = 1000, from i = 1000 on one too high."""
    for n, wrong in ((1000, 0), (2000, 1000)):
        t = np.linspace(1, 1e-3, n)
        k = np.trunc(t * (n - 1) + 1e-9).astype(int)
        assert np.sum(k != n - 1 - np.arange(n)) == wrong


def test_labels_of_discrete_ve():
    """B2, B6: 0 is the noisiest; exact for the cut-off 1e-5, half of them off by one at 1e-3."""
    label = precondition.score_sde_ve(levels=1000).label
    for end, wrong in ((1e-5, 0), (1e-3, 499)):
        index = label(VE(), grids.uniform(VE(), 999, end=end))
        off = np.abs(np.asarray(index) - np.arange(1000))
        assert off.max() <= 1 and int((off > 0).sum()) == wrong


def test_labels_of_vp():
    """B4: 999 t whatever the number of levels; t (N - 1), a float, for discrete ones (B3)."""
    times = grids.uniform(VP(), 999, end=1e-3)
    np.testing.assert_allclose(precondition.score_sde_vp().label(VP(), times), 999 * times)
    discrete = precondition.score_sde_vp(levels=500).label(VP(), times)
    np.testing.assert_allclose(discrete, 499 * times)
    assert 0 < float(discrete[-1]) < 1  # not rounded


def test_p2000():
    """Table 1: twice the levels of halved betas for VP, of one range for VE, under labels i/2."""
    n = 2000
    process = Tabulated.ddpm(n)
    times = grids.uniform(process, n - 1, end=1 / n)
    a, b2 = transition(process, times, times - 1 / n)
    betas = np.linspace(0.5e-4, 0.01, n)[::-1]
    np.testing.assert_allclose(b2[:-1], betas[:-1], rtol=1e-6)
    np.testing.assert_allclose(a[:-1] ** 2, 1 - betas[:-1], rtol=1e-9)
    j = n - 1 - np.arange(n)
    label = precondition.score_sde_vp(levels=1000).label(process, times)
    assert np.abs(label - j / 2).max() <= 0.5 + 1e-9
    np.testing.assert_allclose(np.diff(label), -0.5, atol=1e-3)

    times = grids.uniform(VE(), n - 1, end=0.0)
    levels = np.exp(np.linspace(np.log(50), np.log(0.01), n))
    np.testing.assert_allclose(VE().coeffs(times).sigma, levels, rtol=1e-9)
    i = np.arange(n)
    label = precondition.score_sde_ve(levels=1000, rounded=False).label(VE(), times)
    assert np.abs(label - i / 2).max() <= 0.5 + 1e-9
    np.testing.assert_allclose(np.diff(label), 0.5, atol=1e-3)
    whole = precondition.score_sde_ve(levels=1000).label(VE(), times)
    assert np.all(np.asarray(whole) == np.round(np.asarray(whole)))


def test_ve_grids_are_geometric_in_sigma():
    """C5: linear in t is geometric in sigma."""
    levels = np.asarray(VE().coeffs(grids.uniform(VE(), 99)).sigma)
    ratios = levels[1:] / levels[:-1]
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-9)


@pytest.mark.parametrize("sigma_max", [50, 90, 378, 1348])
def test_first_steps_of_ve_are_large(sigma_max):
    """C3: g(1), and that reverse diffusion's first step is below Euler-Maruyama's."""
    want = {50: 206, 90: 384, 378: 1736, 1348: 6552}[sigma_max]
    process = VE(sigma_max=sigma_max)
    g2 = float(process.rates(jnp.asarray(1.0)).g2)
    assert abs(np.sqrt(g2) - want) < 1
    gap = sigma_max**2 - (0.01 * (sigma_max / 0.01) ** 0.999) ** 2
    assert gap < g2 * 1e-3


def test_a_network_that_divides_by_sigma_is_a_score():
    """C6: kind `score` is used as it is; dividing again by sigma is another network."""
    x, t = jnp.asarray(X), jnp.asarray(0.5)
    network = lambda x, label: -(x - 0.3) / (0.2 + label**2)  # noqa: E731
    denoise = make_denoiser(network, VE(), **precondition.score_sde_ve()._asdict())
    level = ve_sigma(0.5)
    exact = X + level**2 * (-(X - 0.3) / (0.2 + level**2))
    np.testing.assert_allclose(denoise(x, t).x0, exact, rtol=1e-6)


def test_pixel_ranges_double_sigma():
    """C8: a VE network of [0, 1] under EDM in [-1, 1] is asked at sigma/2."""
    label = precondition.ve().label
    t = jnp.asarray(3.0)
    np.testing.assert_allclose(label(EDM(), t), np.log(1.5), rtol=1e-12)
