"""Losses, weightings and times: a sample's loss is a function of its key and data, and of numbers.

A law takes a `members.Training` or something called like one: (key, denoise, process, x0,
**changes) -> (B,). The mutants are losses that are right in everything but one point.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import losses
from diffjax.core import random
from diffjax.core.numerics import canonical
from diffjax.processes import VP
from diffjax.processes.calculus import perturb
from tests import members, oracles
from tests.laws import cases

B, D = 8, members.D
PROCESS = VP()


def data(batch=B, dtype=jnp.float32):
    """x0, (B, D)."""
    draw = np.random.default_rng(3).standard_normal((B, D))[:batch]
    return jnp.asarray(0.6 * draw, dtype)


def denoiser(process=PROCESS):
    """A denoiser that is wrong by a known amount, element by element."""
    exact = oracles.gaussian(D).denoiser(process)

    def denoise(x, t):
        found = exact(x, t)
        alpha, sigma = (
            c.reshape(-1, 1) for c in (process.coeffs(t).alpha, process.coeffs(t).sigma)
        )
        off = 0.1 * jnp.tanh(x)
        return found._replace(x0=found.x0 - sigma * off, eps=found.eps + alpha * off)

    return denoise


@functools.cache
def compiled(training):
    """(key, x0) -> losses, without LLVM's optimiser: equal is equal in every bit."""
    return jax.jit(
        lambda key, x0: training(key, denoiser(), PROCESS, x0), compiler_options=cases.PLAIN
    )


def a_prefix_is_a_smaller_batch(training):
    """f(x0)[:k] == f(x0[:k]) with the same keys."""
    run = compiled(training)
    whole = run(cases.keys(), data())
    np.testing.assert_array_equal(whole[:5], run(cases.keys()[:5], data(5)))


def neighbours_do_not_matter(training):
    """Other samples' data and keys leave a sample's loss as it is."""
    run = compiled(training)
    other = data().at[:-1].multiply(-1.7)
    keys = jnp.concatenate([cases.keys(7)[:-1], cases.keys()[-1:]])
    np.testing.assert_array_equal(run(cases.keys(), data())[-1], run(keys, other)[-1])


def jit_is_eager(training):
    """To rounding of fused operations."""
    eager = training(cases.keys(), denoiser(), PROCESS, data())
    np.testing.assert_allclose(compiled(training)(cases.keys(), data()), eager, rtol=2e-5)


def vmap_is_a_loop(training):
    """Two batches under `vmap` are the two batches."""
    xs, keys = jnp.stack([data(), 0.5 * data()]), jnp.stack([cases.keys(), cases.keys(3)])
    run = lambda key, x0: training(key, denoiser(), PROCESS, x0)  # noqa: E731
    together = jax.jit(jax.vmap(run), compiler_options=cases.PLAIN)(keys, xs)
    alone = [compiled(training)(key, x0) for key, x0 in zip(keys, xs, strict=True)]
    np.testing.assert_allclose(together, np.stack(alone), rtol=2e-5)


def gradients_are_finite(training):
    """With respect to the data, the process and the training's own numbers, and not all zero."""
    own = {
        "weight": training.weight_member.weight,
        "times": training.times_member.times,
    }

    def total(x0, process, own):
        return jnp.sum(training(cases.keys(), denoiser(process), process, x0, **own))

    run = jax.jit(jax.grad(total, argnums=(0, 1, 2)), compiler_options=cases.PLAIN)
    found = run(data(), canonical(PROCESS), canonical(own))
    for path, leaf in jax.tree_util.tree_flatten_with_path(found)[0]:
        assert np.isfinite(leaf).all(), f"gradient {jax.tree_util.keystr(path)} is {leaf}"
    assert np.abs(found[0]).max() > 0


def losses_have_the_dtype_of_the_data(training, dtype, expected=None):
    """Half precision is raised to float32; nothing is computed."""
    x0 = jax.ShapeDtypeStruct((B, D), dtype)
    found = jax.eval_shape(lambda x0: training(cases.keys(), denoiser(), PROCESS, x0), x0)
    assert (found.shape, found.dtype) == ((B,), jnp.dtype(expected or dtype))


ALONE = [t for t in members.TRAININGS if not t.times_member.coupled]
COUPLED = [t for t in members.TRAININGS if t.times_member.coupled]
LAWS = [jit_is_eager, vmap_is_a_loop, gradients_are_finite]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("training", members.TRAININGS, ids=members.ids)
def test_laws(law, training):
    law(training)


@pytest.mark.parametrize("training", ALONE, ids=members.ids)
def test_a_loss_belongs_to_its_sample(training):
    a_prefix_is_a_smaller_batch(training)
    neighbours_do_not_matter(training)


@pytest.mark.parametrize("training", COUPLED, ids=members.ids)
def test_what_is_declared_coupled_is_coupled(training):
    for law in (a_prefix_is_a_smaller_batch, neighbours_do_not_matter):
        with pytest.raises(AssertionError):
            law(training)


@pytest.mark.parametrize("training", members.TRAININGS, ids=members.ids)
def test_dtype(training):
    losses_have_the_dtype_of_the_data(training, jnp.float32)
    losses_have_the_dtype_of_the_data(training, jnp.bfloat16, expected=jnp.float32)


@pytest.mark.parametrize("training", members.TRAININGS, ids=members.ids)
def test_dtype_in_float64_mode(training, x64):
    losses_have_the_dtype_of_the_data(training, jnp.float64)


def test_numbers_never_retrace(fresh_cache):
    """New data, keys, process, weights and times: one program."""
    denoise = lambda x, t: oracles.gaussian(D).denoiser(PROCESS)(x, t)  # noqa: E731
    run = jax.jit(
        lambda key, process, x0, weight, times: losses.denoising_score_matching(
            key, denoise, process, x0, weight=weight, times=times
        )[0]
    )
    for i in range(3):
        process = canonical(VP(beta_max=20.0 - i))
        numbers = losses.MinSNR(5.0 - i), losses.LogNormalTimes(-1.2 + i, 1.2)
        run(cases.keys(i), process, data() * i, *canonical(numbers))
    assert run._cache_size() == 1


BAD = {
    "range": (lambda: losses.UniformTimes(0.5, 0.5), ValueError, "t_min must be below t_max"),
    "importance": (lambda: losses.ImportanceTimes(-1.0), ValueError, "t_min must not be negative"),
    "std": (lambda: losses.LogNormalTimes(std=0.0), ValueError, "std must be positive; got 0.0"),
    "levels": (lambda: losses.DiscreteTimes(0), ValueError, "levels must be at least 1; got 0"),
    "gamma": (lambda: losses.MinSNR(gamma=0.0), ValueError, "gamma must be positive; got 0.0"),
    "integer data": (
        lambda: members.TRAININGS[0](cases.keys(), denoiser(), PROCESS, jnp.ones((B, D), int)),
        TypeError,
        "got dtype int32",
    ),
    "keys of another batch": (
        lambda: members.TRAININGS[0](cases.keys(batch=3), denoiser(), PROCESS, data()),
        ValueError,
        r"one a sample, \(8,\); got shape \(3,\)",
    ),
    "untyped key": (
        lambda: members.TRAININGS[0](jnp.zeros(2, jnp.uint32), denoiser(), PROCESS, data()),
        TypeError,
        "jax.random.key",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_raises_and_teaches(name):
    call, exception, message = BAD[name]
    with pytest.raises(exception, match=message):
        call()


# --- mutants ---------------------------------------------------------------------------------


class Mutant:
    """A loss with the face of `members.Training`; `change(key, denoise, process, x0)` -> (B,)."""

    weight_member, times_member = members.WEIGHTS[0], members.TIMES[0]

    def __init__(self, change):
        self.change = change

    def __call__(self, key, denoise, process, x0, **changes):
        return self.change(key, denoise, process, x0)


def _errors(key, denoise, process, x0, t):
    eps = random.normal_like(key, "eps", x0)
    return denoise(perturb(process, x0, t, eps), t).eps - eps


def one_time_for_all(key, denoise, process, x0):
    """Every sample at the last sample's time."""
    t = random.uniform_like(key[-1:], "t", jnp.empty((1,)))
    t = jnp.broadcast_to(0.1 + 0.8 * t, (x0.shape[0],))
    return jnp.mean(_errors(key, denoise, process, x0, t) ** 2, axis=1)


def over_the_batch(key, denoise, process, x0):
    """Divides by the batch's mean."""
    found = members.TRAININGS[0](key, denoise, process, x0)
    return found / jnp.mean(found)


def asks_for_the_value(key, denoise, process, x0):
    """Does one thing where it sees numbers and another under `jit`."""
    found = members.TRAININGS[0](key, denoise, process, x0)
    return found if isinstance(found, jax.core.Tracer) else 1.01 * found


def batched_stream(key, denoise, process, x0):
    """Noise by XLA's own generator, whose stream under `vmap` is not that of one call."""
    bits = jax.random.key_data(key[0])
    rbg = jax.random.wrap_key_data(jnp.concatenate([bits, bits]), impl="rbg")
    return jnp.mean((x0 - jax.random.normal(rbg, x0.shape)) ** 2, axis=1)


def root_of_a_square(key, denoise, process, x0):
    """A norm without its guard, of an error that is 0."""
    return jnp.sqrt(jnp.sum((x0 - x0) ** 2, axis=1)) + jnp.sum(x0, axis=1)


def upcast(key, denoise, process, x0):
    """Ends in JAX's default float dtype."""
    return members.TRAININGS[0](key, denoise, process, x0).astype(jnp.float32)


@pytest.mark.parametrize(
    ("law", "change"),
    [
        (a_prefix_is_a_smaller_batch, one_time_for_all),
        (neighbours_do_not_matter, over_the_batch),
        (jit_is_eager, asks_for_the_value),
        (vmap_is_a_loop, batched_stream),
        (gradients_are_finite, root_of_a_square),
    ],
    ids=lambda value: value.__name__,
)
def test_mutants_are_caught(law, change):
    with pytest.raises(AssertionError):
        law(Mutant(change))


def test_a_wrong_dtype_is_caught(x64):
    with pytest.raises(AssertionError):
        losses_have_the_dtype_of_the_data(Mutant(upcast), jnp.float64)
