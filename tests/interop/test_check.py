"""The self-check on exact denoisers, asked rightly and wrongly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import processes
from diffjax.interop.check import DATA_LEVELS, Probe, check, times_of
from diffjax.prediction import as_kind, precondition
from diffjax.prediction.precondition import Precondition
from tests import oracles

SHAPE = (64, 2, 2, 2)


class Network:
    """The exact denoiser of a mixture as a network of some convention.

    It knows the time from the label alone, by a table over the times of the process.
    """

    def __init__(self, process, convention, mean=0.0):
        data = oracles.mixture(8)
        means = data.means + mean
        self.data = oracles.Mixture(means, data.std, data.weights)
        self.process, self.convention = process, convention
        times = jnp.linspace(process.t_min, process.t_max, 20001)
        told = convention.label(process, times)
        order = jnp.argsort(told)
        self.told, self.times = told[order], times[order]

    def __call__(self, x, label):
        # Outside the labels that it was trained with, the nearest it knows.
        t = jnp.interp(label, self.told, self.times)
        x_t = (x / self.convention.scaling(self.process, t)).reshape(x.shape[0], -1)
        exact = self.data.denoiser(self.process)(x_t, t)
        a, b = self.convention.kind.row(self.process, t)
        return (a * exact.x0 + b * exact.eps).reshape(x.shape)

    def images(self, key):
        return self.data.draw(key, SHAPE[0]).reshape(SHAPE)


def convention(kind, label, scaling=None):
    return Precondition(as_kind(kind), scaling or precondition.Unscaled(), label)


VP, VE, FLOW = processes.VP(), processes.VE(), processes.RectifiedFlow()
TIME999 = precondition.Time(999.0)
RIGHT = {
    "vp eps": (VP, precondition.score_sde_vp()),
    "ve score": (VE, precondition.score_sde_ve()),
    "edm F": (processes.EDM(), precondition.edm()),
    "vp by edm": (processes.EDM(), precondition.vp()),
    "ve by edm": (processes.EDM(), precondition.ve()),
    "flow velocity": (FLOW, convention("velocity", precondition.Time())),
    "sit": (FLOW, precondition.sit()),
    "vp v": (VP, convention("v", TIME999)),
    "vp x0": (VP, convention("x0", TIME999)),
}


@pytest.mark.parametrize("with_data", [True, False], ids=["data", "noise"])
@pytest.mark.parametrize("name", RIGHT)
def test_the_right_convention_passes(name, with_data, key):
    process, right = RIGHT[name]
    network = Network(process, right)
    x0 = network.images(key) if with_data else None
    report = check(network, process, right, key=key, shape=SHAPE, x0=x0)
    assert report.passed, report.summary()
    assert report.alternatives == ()


WRONG = {
    "noise for data": ("vp eps", convention("x0", TIME999), "kind Eps() (not X0())"),
    "data for noise": ("vp x0", convention("eps", TIME999), "kind X0() (not Eps())"),
    "v for noise": ("vp v", convention("eps", TIME999), "kind V() (not Eps())"),
    "sign of v": ("vp v", convention("F", TIME999), "kind V() (not EDMF(0.5))"),
    "sign": (
        "ve score",
        convention("eps", precondition.NoiseLevel()),
        "kind Score() (not Eps())",
    ),
    "score not divided by sigma": (
        "ve score",
        convention("sigma_score", precondition.NoiseLevel()),
        "kind Score() (not SigmaScore())",
    ),
    "t for 999 t": (
        "vp eps",
        convention("eps", precondition.Time()),
        "label Time(999) (not Time(1))",
    ),
    "a logarithm for sigma": (
        "ve score",
        convention("score", precondition.LogNoiseLevel(1.0)),
        "label NoiseLevel() (not LogNoiseLevel(1, 1))",
    ),
    "a quarter of the logarithm": (
        "edm F",
        precondition.edm(label=precondition.LogNoiseLevel(1.0)),
        "label LogNoiseLevel(0.25, 1) (not LogNoiseLevel(1, 1))",
    ),
    "scale of the input": (
        "edm F",
        precondition.edm()._replace(scaling=precondition.Unscaled()),
        "scaling UnitVariance(0.5) (not Unscaled())",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_convention_is_named(name, key):
    right, wrong, found = WRONG[name]
    process, true = RIGHT[right]
    network = Network(process, true)
    report = check(network, process, wrong, key=key, shape=SHAPE, x0=network.images(key))
    assert not report.passed
    assert found in report.alternatives[:2], report.summary()
    assert found in report.summary()


def test_two_mistakes_at_once_are_named(key):
    process, true = RIGHT["vp v"]
    network = Network(process, true)
    wrong = convention("eps", precondition.Time())
    report = check(network, process, wrong, key=key, shape=SHAPE, x0=network.images(key))
    assert "kind V() (not Eps()) and label Time(999) (not Time(1))" in report.alternatives


def test_a_reversed_clock_is_named(key):
    """SiT's weights under our own clock and sign: both are named."""
    process, true = RIGHT["sit"]
    network = Network(process, true)
    wrong = convention("velocity", precondition.Time())
    report = check(network, process, wrong, key=key, shape=SHAPE, x0=network.images(key))
    assert not report.passed
    words = "kind Negated(Velocity()) (not Velocity()) and label ReversedTime(1, 1) (not Time(1))"
    assert words in report.alternatives


def test_noise_alone_names_a_wrong_kind(key):
    process, true = RIGHT["vp v"]
    network = Network(process, true)
    report = check(network, process, convention("eps", TIME999), key=key, shape=SHAPE)
    assert not report.passed
    assert "kind V() (not Eps())" in report.alternatives


@pytest.mark.parametrize("out", [0.0, np.nan])
def test_no_convention_fits_untrained_weights(out, key):
    report = check(
        lambda x, label: jnp.full_like(x, out),
        VP,
        precondition.score_sde_vp(),
        key=key,
        shape=SHAPE,
        x0=jax.random.normal(key, SHAPE),
    )
    assert not report.passed
    assert report.alternatives == ()
    assert "untrained weights" in report.summary()


def test_errors_and_bounds_are_those_of_a_gaussian(key):
    """For Gaussian data the best linear estimate is the denoiser: error = bound."""
    std = 0.6
    oracle = oracles.Isotropic(VP, std)

    def network(x, label):
        return oracle(x, label / 999.0).eps

    x0 = std * jax.random.normal(key, (1024, 2, 2, 2))
    times = times_of(VP, DATA_LEVELS)
    probe = Probe(network, VP, x0, std**2, times, jax.random.key(1))
    found = probe.ask(precondition.score_sde_vp())
    np.testing.assert_allclose(probe.levels, DATA_LEVELS, rtol=0.01)
    alpha, _, sigma = VP.coeffs(times)
    want = (alpha * std) ** 2 / ((alpha * std) ** 2 + sigma**2)
    np.testing.assert_allclose(probe.bounds, want, rtol=1e-4)
    # Of 8,192 squares, each of relative deviation sqrt(2).
    np.testing.assert_allclose(found.errors, want, rtol=5 * np.sqrt(2 / 8192))
    np.testing.assert_allclose(found.slopes, 1, atol=0.05)
