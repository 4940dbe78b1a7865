"""Classifier guidance of a Gaussian mixture, where the class posterior and each class are known.

Symbols: p = sum_k w_k N(m_k, d^2) the data, y = k the class; p(y | x_t) is the softmax of the log
joint densities, and E[x0 | x_t, y] is the denoiser of one Gaussian.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core.numerics import expand
from diffjax.core.pytree import pytree, replace
from diffjax.core.types import Prediction
from diffjax.guidance import (
    CarriedClassifier,
    ClassifierGuidance,
    class_score,
    make_classifier,
)
from diffjax.prediction import make_denoiser
from diffjax.prediction.precondition import NoiseLevel, UnitVariance
from diffjax.processes import EDM, VE, VP, RectifiedFlow, prior
from diffjax.solvers import Ancestral, Heun, ToEnd, grids, sample
from tests.oracles import Gaussian, Mixture, mixture
from tests.solvers.helpers import Counter

MIXTURE = mixture(dim=2)
K, B = 3, 12
LABELS = np.arange(B) % K
PROCESSES = {
    "vp": (VP(), 0.3),
    "ve": (VE(), 0.6),
    "edm": (EDM(), 0.8),
    "flow": (RectifiedFlow(), 0.4),
}
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytree
class ExactClassifier:
    """(x_t, t) -> ln p(y, x_t), (B, K)."""

    mixture: Mixture
    process: object

    def __call__(self, x_t, t):
        alpha, _, sigma = self.process.coeffs(t)
        return self.mixture._parts(expand(alpha, x_t), expand(sigma, x_t), x_t)[2]


def points(process, t, seed=0):
    """x_t of the data, (B, 2)."""
    alpha, _, sigma = process.coeffs(jnp.asarray(t))
    rng = np.random.default_rng(seed)
    x0 = np.asarray(MIXTURE.means)[rng.integers(0, K, B)]
    return jnp.asarray(alpha * x0 + sigma * rng.standard_normal((B, 2)), jnp.float32)


def class_denoiser(process, x_t, t, labels=LABELS):
    """E[x0 | x_t, y] and the noise, from the Gaussian of each sample's class."""
    parts = [
        Gaussian(MIXTURE.means[k], jnp.full((2,), MIXTURE.std)).denoiser(process)(x_t, t)
        for k in range(K)
    ]
    rows = np.arange(x_t.shape[0])
    return Prediction(*(np.stack([p[half] for p in parts])[labels, rows] for half in (0, 1)))


def guide(process, labels=LABELS, scale=1.0):
    return ClassifierGuidance(ExactClassifier(MIXTURE, process), process, labels, scale)


def guided_is_the_classs_own(denoise, process, t):
    x = points(process, t)
    found, exact = denoise(x, jnp.asarray(t)), class_denoiser(process, x, jnp.asarray(t))
    np.testing.assert_allclose(found.x0, exact.x0, atol=1e-5)
    np.testing.assert_allclose(found.eps, exact.eps, atol=1e-5)


@pytest.mark.parametrize("name", PROCESSES)
def test_at_scale_one_it_is_the_classs_own_denoiser(name):
    process, t = PROCESSES[name]
    guided_is_the_classs_own(guide(process)(MIXTURE.denoiser(process)), process, t)


MUTANTS = {
    "x0 unguided": lambda process, plain, x, t: guide(process)(plain)(x, t)._replace(
        x0=plain(x, t).x0
    ),
    "eps unguided": lambda process, plain, x, t: guide(process)(plain)(x, t)._replace(
        eps=plain(x, t).eps
    ),
    "scale 3% off": lambda process, plain, x, t: guide(process, scale=1.03)(plain)(x, t),
    "neighbour's label": lambda process, plain, x, t: guide(process, labels=np.roll(LABELS, 1))(
        plain
    )(x, t),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name):
    process, t = PROCESSES["vp"]
    mutant = functools.partial(MUTANTS[name], process, MIXTURE.denoiser(process))
    with pytest.raises(AssertionError):
        guided_is_the_classs_own(mutant, process, t)


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_the_scale_leads_from_all_data_to_the_class_and_beyond(scale):
    """By Bayes' rule s + w g = (1 - w) s + w s_y, in both halves; times may be one a sample."""
    process = VP()
    t = jnp.linspace(0.2, 0.9, B)
    x = points(process, 0.4)
    plain = MIXTURE.denoiser(process)
    found, free = guide(process, scale=scale)(plain)(x, t), plain(x, t)
    own = class_denoiser(process, x, t)
    for half in (0, 1):
        np.testing.assert_allclose(
            found[half], (1 - scale) * free[half] + scale * own[half], atol=2e-5
        )


@pytest.mark.parametrize("solver", [Ancestral(), Heun()], ids=["ancestral", "heun"])
def test_samples_are_the_classs(solver):
    """Moments of one component from the mixture's denoiser, within 4 standard errors, n = 6000."""
    process, n = VP(), 6000
    times = grids.log_snr(process, 600 if solver.stochastic else 40, t_min=1e-4)
    x = prior(jax.random.key(1), process, (n, 2))
    guided = guide(process, labels=np.full(n, 1))(MIXTURE.denoiser(process))
    found = compiled(sample)(
        jax.random.key(0), guided, x, times, solver=solver, process=process, final=ToEnd()
    ).x  # fmt: skip
    std = float(MIXTURE.std)
    scores = (np.asarray(found).mean(0) - np.asarray(MIXTURE.means)[1]) / (std / np.sqrt(n))
    spread = (np.asarray(found).std(0) / std - 1) * np.sqrt(2 * n)
    assert np.abs(scores).max() < 4, scores
    assert np.abs(spread).max() < 4, spread


def test_evaluations_count_both_networks():
    """Against run-time counts of the denoiser's calls and of the classifier's."""
    process = VP()
    denoise = Counter(MIXTURE.denoiser(process))
    classify = Counter(ExactClassifier(MIXTURE, process))
    guided = ClassifierGuidance(classify, process, LABELS)(denoise)
    x, times = points(process, 1.0), grids.uniform(process, 3)
    found = sample(jax.random.key(0), guided, x, times, solver=Heun(), process=process)
    ran = denoise.read()
    assert (found.nfe, found.evaluations) == (ran, ran + classify.read()) == (5, 10)


# --- a classifier of another process ----------------------------------------------------------


def of_the_other_range():
    """The exact classifier of (x0 + 1)/2 under VE: as the reference code trains it."""
    shrunk = replace(MIXTURE, means=(MIXTURE.means + 1) / 2, std=MIXTURE.std / 2)
    return ExactClassifier(shrunk, VE())


def a_carried_classifier_knows_the_classes(classify, process, t):
    x, t = points(process, t), jnp.asarray(t)
    exact = ExactClassifier(MIXTURE, process)
    np.testing.assert_allclose(
        jax.nn.softmax(classify(x, t)), jax.nn.softmax(exact(x, t)), atol=2e-5
    )
    np.testing.assert_allclose(
        class_score(classify, x, t, LABELS), class_score(exact, x, t, LABELS), atol=2e-4
    )


CARRIED = {"gain": 0.5, "offset": 0.5}


@pytest.mark.parametrize("name", ["vp", "edm", "flow"])
def test_a_classifier_serves_under_another_process(name):
    process, t = PROCESSES[name]
    carried = CarriedClassifier(of_the_other_range(), VE(), process, **CARRIED)
    a_carried_classifier_knows_the_classes(carried, process, t)


def test_a_classifier_is_carried_back():
    """From VP in [-1, 1] to VE in [0, 1]: a = 2, b = -1."""
    shrunk = of_the_other_range()
    carried = CarriedClassifier(ExactClassifier(MIXTURE, VP()), VP(), VE(), gain=2.0, offset=-1.0)
    x = (points(VE(), 0.55) + 1) / 2
    t = jnp.asarray(0.55)
    np.testing.assert_allclose(
        jax.nn.softmax(carried(x, t)), jax.nn.softmax(shrunk(x, t)), atol=2e-5
    )


@pytest.mark.parametrize(
    "wrong",
    [{"gain": 1.0, "offset": 0.5}, {"gain": 0.5, "offset": 0.0}, {"trained": VE(sigma_min=0.012)}],
    ids=["gain", "offset", "level"],
)
def test_a_wrongly_carried_classifier_is_caught(wrong):
    process, t = PROCESSES["vp"]
    given = {"trained": VE(), **CARRIED} | wrong
    carried = CarriedClassifier(of_the_other_range(), process=process, **given)
    with pytest.raises(AssertionError):
        a_carried_classifier_knows_the_classes(carried, process, t)


def test_levels_beyond_the_trained_ones_are_told_as_the_nearest():
    told = []
    carried = CarriedClassifier(lambda x, t: told.append(float(t)), VE(), VP(), **CARRIED)
    carried(jnp.zeros((1, 2)), jnp.asarray(1.0))  # a level of 76, where VE has at most 50
    assert told == [1.0]


# --- the rest of the contract -----------------------------------------------------------------


def linear(variables, x, label):
    return x @ variables["w"] * label.reshape(-1, 1)


def test_a_network_is_called_by_its_convention():
    """c_in and the label of `make_classifier`, by hand."""
    process, t = VP(), jnp.full((B,), 0.3)
    x, w = points(process, 0.3), np.random.default_rng(0).standard_normal((2, K))
    classify = make_classifier(
        linear, process, variables={"w": w}, scaling=UnitVariance(2.0), label=NoiseLevel()
    )
    a = np.exp(-0.5 * (0.1 * 0.3 + 0.5 * 19.9 * 0.09))
    s2 = 1 - a**2
    expected = (x / np.sqrt(s2 + 4 * a**2)) @ w * np.sqrt(s2) / a
    np.testing.assert_allclose(classify(x, t), expected, rtol=1e-4)


def test_one_compilation_serves_labels_scales_and_weights():
    traces = []

    def apply(variables, x, label):
        traces.append(None)
        return linear(variables, x, label)

    process = VP()

    @jax.jit
    def run(denoise, x, t):
        return denoise(x, t).x0

    for i in range(3):
        classify = make_classifier(apply, process, variables={"w": jnp.full((2, K), 1.0 + i)})
        labels, weight = jnp.asarray((LABELS + i) % K), jnp.asarray(1.0 + i)
        guided = ClassifierGuidance(classify, process, labels, weight)(MIXTURE.denoiser(process))
        run(guided, points(process, 0.3), jnp.full((B,), 0.3))
    assert len(traces) == 1


def test_take_gives_the_guided_denoiser_of_some_samples():
    process, t = VP(), jnp.asarray(0.3)
    shift = jnp.arange(B, dtype=jnp.float32).reshape(B, 1)
    inner = make_denoiser(lambda x, t, c: x + c, process, kind="eps", cond=shift)
    guided, x, index = guide(process)(inner), points(process, 0.3), jnp.asarray([5, 2, 7])
    for some in (guided.take(index), guide(process).take(index)(inner.take(index))):
        np.testing.assert_allclose(some(x[index], t).x0, guided(x, t).x0[index], rtol=1e-6)


def test_vmap_is_the_batch():
    process, t = VP(), jnp.asarray(0.3)
    x = points(process, 0.3)
    w = jnp.asarray(np.random.default_rng(0).standard_normal((2, K)), jnp.float32)
    classify = make_classifier(lambda x, label: x @ w, process)
    inner = make_denoiser(lambda x, t: x, process, kind="eps")
    one = jax.vmap(
        lambda x, y: ClassifierGuidance(classify, process, y)(inner)(x, t).x0, in_axes=(0, 0)
    )
    together = ClassifierGuidance(classify, process, jnp.asarray(LABELS))(inner)(x, t).x0
    np.testing.assert_allclose(one(x, jnp.asarray(LABELS)), together, rtol=1e-6)


def test_what_cannot_be_used_raises():
    process = RectifiedFlow()
    guided = guide(process)(MIXTURE.denoiser(process))
    with pytest.raises(ValueError, match="alpha > 0 at every time"):
        guided.check_times(np.asarray([1.0, 0.5]))
    guided.check_times(np.asarray([0.9, 0.5]))
    with pytest.raises(TypeError, match="labels must be integers"):
        guide(VP(), labels=np.zeros(B))
    with pytest.raises(ValueError, match="labels must not be negative"):
        guide(VP(), labels=np.full(B, -1))
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\]"):
        guide(VP(), labels=np.full(B, K))(MIXTURE.denoiser(VP()))(points(VP(), 0.3), 0.3)
    with pytest.raises(ValueError, match="gain must be positive"):
        CarriedClassifier(linear, VE(), VP(), gain=0.0)
