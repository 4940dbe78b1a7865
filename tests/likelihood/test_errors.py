"""Where the uncertainty of bits/dim comes from: parts known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core.quantise import Quantisation
from diffjax.core.random import normal_like
from diffjax.core.types import Prediction
from diffjax.likelihood import (
    ExactDivergence,
    Hutchinson,
    bits_per_dim,
    score_sde_protocol,
    summarise,
)
from diffjax.processes import VP, prior_log_prob
from diffjax.solvers.adaptive import PIController
from tests.oracles import Gaussian, gaussian

SPREADS = {"data": 2.0, "dequantise": 0.8, "probe": 1.3}


def designed(rng, n, a, p, trials=1):
    """Figures with known components, (trials, n, a, p)."""
    return (
        5
        + SPREADS["data"] * rng.normal(size=(trials, n, 1, 1))
        + SPREADS["dequantise"] * rng.normal(size=(trials, n, a, 1))
        + SPREADS["probe"] * rng.normal(size=(trials, n, a, p))
    )


def known_parts(n, a, p):
    """Squared standard errors of the grand mean."""
    d, u, z = (SPREADS[k] ** 2 for k in ("data", "dequantise", "probe"))
    parts = {"data": d / n, "dequantise": u / (n * a), "probe": z / (n * a * p)}
    noise = parts["dequantise"] + parts["probe"]
    return parts | {"noise": noise, "total": parts["data"] + noise}


def check_parts(rng, n, a, p, known):
    """Means of the squared parts over 400 designs, within 4 standard errors: they are unbiased."""
    found = jax.vmap(lambda y: summarise(y).errors)(jnp.asarray(designed(rng, n, a, p, 400)))
    for name in known:
        squares = np.asarray(getattr(found, name)) ** 2
        want = known_parts(n, a, p)[name]
        error = squares.std(ddof=1) / np.sqrt(400)
        assert abs(squares.mean() - want) < 4 * error
        assert error < 0.05 * want  # the smallest error rejected is a fifth
    for name in set(found._fields) - set(known):
        assert np.isnan(getattr(found, name)).all()


ALL = ("total", "data", "noise", "dequantise", "probe")


@pytest.mark.parametrize(
    ("a", "p", "known"),
    [
        (3, 2, ALL),
        (2, 4, ALL),
        (5, 1, ("total", "data", "noise")),
        (1, 3, ("total", "probe")),
        (1, 1, ("total",)),
    ],
)
def test_parts_are_unbiased(x64, rng, a, p, known):
    check_parts(rng, 60, a, p, known)


def test_the_total_is_the_error_of_the_mean(x64, rng):
    """Its square is the variance of the grand mean over designs, within 4 standard errors."""
    y = designed(rng, 30, 2, 2, 3000)
    means = y.mean(axis=(1, 2, 3))
    want = known_parts(30, 2, 2)["total"]
    assert abs(means.var(ddof=1) - want) < 4 * want * np.sqrt(2 / 3000)
    one = summarise(jnp.asarray(y[0]))
    np.testing.assert_allclose(one.mean, means[0])
    np.testing.assert_allclose(one.per_image, y[0].mean(axis=(1, 2)))
    assert one.stderr == one.errors.total


def test_summaries_of_batches_join(x64, rng):
    y = jnp.asarray(designed(rng, 20, 2, 3)[0])
    halves = [summarise(half).draws for half in jnp.split(y, 2)]
    for a, b in zip(summarise(jnp.concatenate(halves)).errors, summarise(y).errors, strict=True):
        np.testing.assert_array_equal(a, b)


run = jax.jit(bits_per_dim, static_argnames=("repeats", "probe_repeats"))
DIM = 3
QUANTISATION = Quantisation(8)


def known_variances(oracle, process, images, n=400_000):
    """(data, dequantisation) variances of bits/dim of a Gaussian model, by its density in NumPy."""
    rng = np.random.default_rng(5)
    alpha, _, sigma = (float(c) for c in process.coeffs(jnp.asarray(process.t_min)))
    mean = alpha * np.asarray(oracle.mean, np.float64)
    variance = alpha**2 * np.asarray(oracle.std, np.float64) ** 2 + sigma**2

    def bits(x):
        nats = -0.5 * ((x - mean) ** 2 / variance + np.log(2 * np.pi * variance)).sum(axis=-1)
        return -nats / (DIM * np.log(2)) - np.log2(2 / 8)

    kinds = np.unique(images, axis=0)
    draws = [bits(-1 + 2 * (k + rng.uniform(size=(n // len(kinds), DIM))) / 8) for k in kinds]
    of_kind = {tuple(k): d.mean() for k, d in zip(kinds, draws, strict=True)}
    means = np.asarray([of_kind[tuple(image)] for image in images])
    counts = np.asarray([np.mean([tuple(i) == tuple(k) for i in images]) for k in kinds])
    return means.var(ddof=1), float(np.sum(counts * [d.var() for d in draws]))


def images_of(rng, n):
    """Six kinds of images, at random."""
    kinds = np.asarray([[1, 4, 6], [3, 3, 3], [4, 5, 4], [2, 5, 5], [5, 2, 4], [3, 4, 6]])
    return kinds[rng.integers(0, 6, n)].astype(np.uint8)


def check_gaussian(divergence, noisy):
    """A diagonal Jacobian costs Rademacher nothing and Gaussian probes 2 |S|^2 for each term."""
    rng = np.random.default_rng(0)
    process, oracle = VP(), gaussian(DIM)
    n, a, p = 1500, 3, 2
    images = images_of(rng, n)
    found = run(
        jax.random.key(0), oracle.denoiser(process), process, jnp.asarray(images),
        quantisation=QUANTISATION, repeats=a, probe_repeats=p, divergence=divergence,
        controller=PIController(1e-4, 1e-4),
    )  # fmt: skip
    data, dequantise = known_variances(oracle, process, images)
    errors = found.errors
    np.testing.assert_allclose(errors.data**2 * n, data, rtol=0.08)
    # The probes' part: the integral of div v is, element by element, ln of the flow's stretch.
    stretch = np.log(flow_stretch(oracle, process))
    probe = 2 * np.sum(stretch**2) / (DIM * np.log(2)) ** 2 if noisy else 0.0
    np.testing.assert_allclose(errors.probe**2 * n * a * p, probe, rtol=0.12, atol=1e-6)
    slack = 4 * probe / p * np.sqrt(2 / (n * a))
    np.testing.assert_allclose(errors.dequantise**2 * n * a, dequantise, rtol=0.08, atol=slack)


def flow_stretch(oracle, process):
    """dx_T/dx_{t_min} of each element: the ratio of deviations at the two ends."""
    std = np.asarray(oracle.std, np.float64)
    ends = [np.asarray(process.coeffs(jnp.asarray(t))) for t in (process.t_min, process.t_max)]
    first, last = (np.sqrt(float(c[0]) ** 2 * std**2 + float(c[2]) ** 2) for c in ends)
    return last / first


def test_parts_of_a_gaussian_with_noisy_probes():
    check_gaussian(Hutchinson(draw=normal_like), noisy=True)


def test_parts_of_a_gaussian_with_silent_probes():
    check_gaussian(Hutchinson(), noisy=False)


def test_calls_are_counted(key):
    """nfe holds what a callback sees, for every solve."""
    calls = []
    exact = gaussian(DIM).denoiser(VP())

    def counted(x_t, t):
        jax.debug.callback(lambda: calls.append(1))
        return exact(x_t, t)

    images = jnp.asarray([[1, 4, 6]], jnp.uint8)
    found = bits_per_dim(
        key, counted, VP(), images, quantisation=QUANTISATION, repeats=2, probe_repeats=2
    )
    jax.effects_barrier()
    assert found.nfe.shape == found.draws.shape == (1, 2, 2)
    assert int(found.nfe.sum()) == len(calls)


def test_probes_are_fresh_and_dequantisation_is_shared(key):
    """Within a dequantisation the exact divergence repeats itself; noisy probes do not."""
    images = jnp.asarray(images_of(np.random.default_rng(0), 4))
    arguments = (key, gaussian(DIM).denoiser(VP()), VP(), images)
    options = {"quantisation": QUANTISATION, "repeats": 2, "probe_repeats": 3}
    exact = run(*arguments, divergence=ExactDivergence(), **options).draws
    np.testing.assert_array_equal(exact[:, :, :1].repeat(3, axis=2), exact)
    assert (exact[:, 0] != exact[:, 1]).all()
    noisy = np.asarray(run(*arguments, divergence=Hutchinson(draw=normal_like), **options).draws)
    assert (np.diff(np.sort(noisy, axis=2), axis=2) > 0).all()


def test_prior_is_taken(x64, key):
    """The oracle's own terminal density gives the exact bits/dim; the process's default does not.

    Data of mean 3 and deviation 1 (at t_max the mean is 0.02): off by 1e-4 bits without it.
    """
    process = VP()
    oracle = Gaussian(jnp.full(DIM, 3.0), jnp.full(DIM, 0.5))
    images = jnp.asarray(np.full((3, DIM), 200), jnp.uint8)
    quantisation = Quantisation(256, low=0.0, high=4.0)
    tight = {"divergence": ExactDivergence(), "controller": PIController(1e-9, 1e-9)}

    def exact_prior(x):
        return oracle.log_prob(process, x, jnp.asarray(process.t_max))

    arguments = (key, oracle.denoiser(process), process, images)
    given = bits_per_dim(*arguments, quantisation=quantisation, prior=exact_prior, **tight)
    default = bits_per_dim(*arguments, quantisation=quantisation, **tight)
    moved = np.asarray(default.per_image - given.per_image)
    # Independent: the log-density of the same dequantised points under the oracle at t_min.
    from diffjax.core import random

    own = random.step_keys(random.sample_keys(key, 3), 0)
    x = quantisation.dequantise(own, images)
    truth = -oracle.log_prob(process, x, jnp.asarray(process.t_min)) / (DIM * np.log(2)) - np.log2(
        4 / 256
    )
    np.testing.assert_allclose(given.per_image, truth, atol=1e-6)
    assert np.abs(moved).min() > 1e-5
    assert prior_log_prob(process, x).shape == (3,)


def test_reference_protocol(key):
    """Five passes of one probe from 1e-5, with the paper's tolerances."""
    options = score_sde_protocol()
    images = jnp.asarray(images_of(np.random.default_rng(0), 3))
    seen = []
    exact = gaussian(DIM).denoiser(VP())

    def spy(x_t, t):
        jax.debug.callback(lambda t: seen.append(np.asarray(t)), t)
        return Prediction(*exact(x_t, t))

    found = bits_per_dim(key, spy, VP(), images, quantisation=QUANTISATION, **options)
    jax.effects_barrier()
    assert found.draws.shape == (3, 5, 1)
    np.testing.assert_allclose(np.min(seen), 1e-5, rtol=1e-4)
    assert (options["controller"].rtol, options["controller"].atol) == (1e-5, 1e-5)
    assert score_sde_protocol(1)["repeats"] == 1


def test_bad_input(key):
    with pytest.raises(ValueError, match="probe_repeats must be at least 1"):
        bits_per_dim(
            key, gaussian(DIM).denoiser(VP()), VP(), jnp.zeros((2, DIM), jnp.uint8),
            quantisation=QUANTISATION, probe_repeats=0,
        )  # fmt: skip
