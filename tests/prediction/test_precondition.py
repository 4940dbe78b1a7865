"""Input scales and time labels against EDM's table 1, the Score-SDE code's conventions, SiT's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.prediction import make_denoiser, precondition
from diffjax.processes import EDM, VE, VP, RectifiedFlow, SubVP
from diffjax.solvers import Heun, sample
from tests import members, oracles

SIGMAS = np.asarray([0.01, 0.3, 1.0, 17.0, 79.0])


def d_of(conventions, process, t, x, c_in, label, network):
    """D(x) by the code, after checking what the network is given."""
    seen = {}

    def apply(inputs, noise):
        seen["scale"], seen["label"] = inputs / x, noise
        return network

    found = make_denoiser(apply, process, **conventions._asdict())(x, t)
    np.testing.assert_allclose(seen["scale"], c_in, rtol=1e-6)
    np.testing.assert_allclose(seen["label"], label, rtol=1e-6)
    return found.x0


def vp_time(sigma):
    """t(sigma) of EDM's table: beta_d = 19.9, beta_min = 0.1."""
    return (np.sqrt(0.1**2 + 2 * 19.9 * np.log(1 + sigma**2)) - 0.1) / 19.9


TABLE_1 = {
    # name: c_skip, c_out, c_in, c_noise as functions of sigma, for sigma_data = 0.5.
    "vp": (
        lambda s: 1.0,
        lambda s: -s,
        lambda s: 1 / np.sqrt(s**2 + 1),
        lambda s: 999 * vp_time(s),
    ),
    "ve": (lambda s: 1.0, lambda s: s, lambda s: 1.0, lambda s: np.log(s / 2)),
    "edm": (
        lambda s: 0.25 / (s**2 + 0.25),
        lambda s: s * 0.5 / np.sqrt(s**2 + 0.25),
        lambda s: 1 / np.sqrt(s**2 + 0.25),
        lambda s: np.log(s) / 4,
    ),
}


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("name", TABLE_1)
def test_table_1(name, sigma, x64):
    c_skip, c_out, c_in, c_noise = (f(sigma) for f in TABLE_1[name])
    x, network = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4)))
    conventions = getattr(precondition, name)()
    found = d_of(conventions, EDM(), jnp.asarray(sigma), x, c_in, c_noise, network)
    np.testing.assert_allclose(found, c_skip * x + c_out * network, rtol=1e-7, atol=1e-10)


def test_table_1_under_another_process(x64):
    # The same networks under VP: scaled by 1/alpha into EDM's coordinates.
    t = jnp.asarray(0.4)
    alpha, _, sigma = (float(c) for c in VP().coeffs(t))
    x, network = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4)))
    for name, (c_skip, c_out, c_in, c_noise) in TABLE_1.items():
        level = sigma / alpha
        conventions = getattr(precondition, name)()
        scale = c_in(level) / alpha
        found = d_of(conventions, VP(), t, x, scale, c_noise(level), network)
        expected = c_skip(level) * x / alpha + c_out(level) * network
        np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-10)


def test_vp_label_is_the_time_itself_under_vp(x64):
    t = jnp.asarray([1e-3, 0.3, 1.0])
    np.testing.assert_allclose(precondition.vp().label(VP(), t), 999 * t, rtol=1e-6)


def test_iddpm_levels():
    levels = np.asarray(precondition.iddpm().label.levels)
    assert levels.shape == (1000,)
    assert levels[0] == pytest.approx(0.00642, rel=1e-3)
    assert levels[-1] == pytest.approx(20291, rel=1e-4)
    assert (np.diff(levels) > 0).all()


def test_iddpm_label_is_999_minus_the_nearest_u():
    # u_j falls from u_0 = 20291 to u_999 = 0.00642; the label is 999 - argmin |sigma - u_j|.
    conventions = precondition.iddpm()
    u = np.asarray(conventions.label.levels)[::-1]
    sigma = np.asarray([0.001, 0.00642, 0.5, 40.0, 9e4], np.float32)
    expected = 999 - np.argmin(np.abs(sigma[:, None] - u), axis=1)
    found = conventions.label(EDM(), jnp.asarray(sigma))
    np.testing.assert_array_equal(found, expected)
    assert found[0] == 0 and found[-1] == 999
    assert conventions.label(EDM(), jnp.asarray(0.5)) == found[2]  # t of shape () too


def test_iddpm_scales_as_its_noise():
    np.testing.assert_allclose(
        precondition.iddpm().scaling(EDM(), jnp.asarray(3.0)), 1 / np.sqrt(10), rtol=1e-6
    )


T = np.asarray([1e-5, 0.25, 0.5, 1.0])
LABELS = {
    # The table of the Score-SDE code: (convention, process, labels at T).
    "vp continuous": (precondition.score_sde_vp(), VP(), 999 * T),
    "sub-vp continuous": (precondition.score_sde_vp(), SubVP(), 999 * T),
    "vp discrete": (precondition.score_sde_vp(1000), VP(), 999 * T),
    "vp discrete, 400": (precondition.score_sde_vp(400), VP(), 399 * T),
    "ve continuous": (precondition.score_sde_ve(), VE(), 0.01 * 5000.0**T),
    "ve discrete": (precondition.score_sde_ve(1000), VE(), [999, 749, 500, 0]),
}


@pytest.mark.parametrize("name", LABELS)
def test_score_sde_labels(name):
    conventions, process, expected = LABELS[name]
    found = conventions.label(process, jnp.asarray(T, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("n", [10, 100, 1000])
def test_ve_labels_count_the_grid(n):
    # On N times from 1 to 1e-5 the labels are 0, 1, ..., N - 1: level 0 is the noisiest.
    t = jnp.asarray(np.linspace(1, 1e-5, n), jnp.float32)
    found = precondition.score_sde_ve(n).label(VE(), t)
    np.testing.assert_array_equal(found, np.arange(n))


def test_score_sde_networks_give_the_score():
    # VP: score = -net/sigma. VE: the network is the score itself.
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4)), jnp.float32)
    net = lambda x, label: 0.3 * x  # noqa: E731
    t = jnp.asarray(0.5)
    for conventions, process, score in (
        (precondition.score_sde_vp(), VP(), -0.3 * x / 0.9596542),
        (precondition.score_sde_vp(), SubVP(), -0.3 * x / 0.92093619),
        (precondition.score_sde_ve(), VE(), 0.3 * x),
    ):
        prediction = make_denoiser(net, process, **conventions._asdict())(x, t)
        sigma = process.coeffs(t).sigma
        np.testing.assert_allclose(-prediction.eps / sigma, score, rtol=1e-5)


SIT_T = np.asarray([0.02, 0.3, 0.5, 0.97])  # SiT's clock: noise at 0


def sit_network(alpha, sigma, d_alpha, d_sigma, mean, std):
    """The exact velocity of SiT's code for Gaussian data: E[alpha' x1 + sigma' x0 | x], in its own
    symbols: x1 data, x0 noise, x = alpha x1 + sigma x0, t from noise to data.
    """

    def velocity(x, t):
        a, s, da, ds = (f(t.reshape(-1, 1)) for f in (alpha, sigma, d_alpha, d_sigma))
        variance = a**2 * std**2 + s**2
        centred = (x - a * mean) / variance
        return da * (mean + a * std**2 * centred) + ds * s * centred

    return velocity


def linear():
    """SiT's linear path: alpha = t, sigma = 1 - t."""
    return (lambda t: t, lambda t: 1 - t, jnp.ones_like, lambda t: -jnp.ones_like(t))


def trigonometric():
    """SiT's GVP path: alpha = sin(pi t/2), sigma = cos(pi t/2)."""
    h = np.pi / 2
    return (
        lambda t: jnp.sin(h * t),
        lambda t: jnp.cos(h * t),
        lambda t: h * jnp.cos(h * t),
        lambda t: -h * jnp.sin(h * t),
    )


@pytest.mark.parametrize(
    ("path", "process"),
    [(linear, RectifiedFlow()), (trigonometric, members.Trigonometric())],
    ids=["linear", "gvp"],
)
def test_sit_s_velocity_is_the_oracle(path, process, x64):
    """Their exact velocity, asked through `sit()`, is the posterior mean of the same data."""
    oracle = oracles.gaussian(3, jnp.float64)
    network = sit_network(*path(), oracle.mean[None], oracle.std[None])
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3)))
    t = 1 - jnp.asarray(SIT_T)
    want = oracle.denoiser(process)(x, t)

    def off(**changes):
        convention = precondition.sit()._asdict() | changes
        found = make_denoiser(network, process, **convention)(x, t)
        return max(np.abs(found.x0 - want.x0).max(), np.abs(found.eps - want.eps).max())

    assert off() < 1e-6  # labels are float32
    assert off(kind="velocity") > 0.1  # the sign
    assert off(label=precondition.Time()) > 0.1  # the clock


def test_sit_samples_the_data(x64):
    """The probability flow of their velocity, from our noise at t = 1 to our data at 0."""
    oracle = oracles.gaussian(3, jnp.float64)
    network = sit_network(*linear(), oracle.mean[None], oracle.std[None])
    process = RectifiedFlow()
    denoise = make_denoiser(network, process, **precondition.sit()._asdict())
    z = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3)))
    solve = jax.jit(
        lambda z: sample(
            jax.random.key(0), denoise, z, jnp.linspace(1.0, 0.0, 201), solver=Heun(),
            process=process,
        ).x
    )  # fmt: skip
    np.testing.assert_allclose(solve(z), oracle.mean[None] + oracle.std[None] * z, atol=1e-3)
