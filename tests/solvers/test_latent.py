"""Latents: there and back, along the sphere, cooler."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.processes import VE, VP, SubVP
from diffjax.solvers import Keep, PIController, decode, encode, slerp, temper
from tests.oracles import Gaussian, mixture
from tests.solvers.helpers import standard_normal

KEY = jax.random.key(0)
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize("process", [VP(), SubVP(), VE()], ids=["vp", "sub_vp", "ve"])
def test_encode_then_decode_is_nothing(process, x64):
    """On a mixture, in both orders, to 20 times the tolerance times the flow's stretch."""
    denoise = mixture(2, jnp.float64).denoiser(process)
    x = mixture(2, jnp.float64).draw(jax.random.key(1), 16, jnp.float64)
    options = {"controller": PIController(1e-8, 1e-8), "t_min": 1e-3}
    there = compiled(lambda x: encode(KEY, denoise, process, x, **options).x)
    back = compiled(lambda z: decode(KEY, denoise, process, z, final=Keep(), **options).x)
    z = there(x)
    assert jnp.abs(z - x).max() > 0.5
    np.testing.assert_allclose(back(z), x, atol=1e-5)
    spread = process.coeffs(jnp.asarray(1.0)).sigma
    z = spread * jnp.asarray(standard_normal(2, (16, 2)))
    np.testing.assert_allclose(there(back(z)), z, atol=1e-5 * spread)


def test_latents_are_those_of_the_closed_form(x64):
    """Gaussian data: the latent of m + d u is alpha_T m + sqrt(V_T/V_0) (...), eq. (1)."""
    process, t_min = VP(), 1e-3
    oracle = Gaussian(jnp.asarray([0.3, -0.2]), jnp.asarray([0.5, 1.5]))
    x = jnp.asarray(standard_normal(0, (5, 2)))
    options = {"controller": PIController(1e-9, 1e-9), "t_min": t_min}
    denoise = oracle.denoiser(process)
    z = compiled(lambda x: encode(KEY, denoise, process, x, **options).x)(x)
    exact = oracle.flow(process, x, jnp.asarray(t_min), jnp.asarray(1.0))
    np.testing.assert_allclose(z, exact, atol=1e-6)
    again = compiled(lambda z: decode(KEY, denoise, process, z, **options).x)(z)
    np.testing.assert_allclose(again, denoise(x, jnp.asarray(t_min)).x0, atol=1e-6)


def test_slerp_keeps_norms_and_angles(x64):
    """From NumPy: the angle grows evenly, the norm of equal norms stays, the ends are the ends."""
    a, b = (standard_normal(i, (7, 3, 4)) for i in (1, 2))
    norm = lambda y: np.linalg.norm(np.reshape(y, (7, -1)), axis=1)  # noqa: E731
    b = b * (norm(a) / norm(b))[:, None, None]
    cosine = lambda y, z: np.sum(y * z, axis=(1, 2)) / norm(y) / norm(z)  # noqa: E731
    angle = lambda y, z: np.arccos(np.clip(cosine(y, z), -1, 1))  # noqa: E731
    for w in (0.0, 0.2, 0.5, 1.0):
        found = np.asarray(slerp(jnp.asarray(a), jnp.asarray(b), w))
        np.testing.assert_allclose(norm(found), norm(a), rtol=1e-12)
        np.testing.assert_allclose(angle(a, found), w * angle(a, b), atol=2e-7)
    np.testing.assert_allclose(slerp(jnp.asarray(a), jnp.asarray(b), 0.0), a, rtol=1e-12)
    np.testing.assert_allclose(slerp(jnp.asarray(a), jnp.asarray(b), 1.0), b, rtol=1e-12)
    straight = (a + b) / 2  # the mutant: shorter by the cosine of half the angle
    assert np.all(norm(straight) < 0.95 * norm(a))


def test_slerp_of_one_direction_is_straight():
    """Equal and nearly equal latents, in float32: no 0/0."""
    a = jnp.asarray(standard_normal(1, (4, 8)), jnp.float32)
    np.testing.assert_allclose(slerp(a, a, 0.3), a, rtol=1e-6)
    b = a * (1 + 1e-6)
    np.testing.assert_allclose(slerp(a, b, 0.5), a, rtol=1e-5)
    grad = jax.grad(lambda a: jnp.sum(slerp(a, b, 0.3)))(a)
    assert jnp.isfinite(grad).all()


def test_slerp_takes_a_weight_a_sample_and_trees():
    a = {"u": jnp.asarray(standard_normal(1, (3, 4))), "v": jnp.asarray(standard_normal(2, (3, 2)))}
    b = jax.tree.map(lambda leaf: leaf[::-1] + 1, a)
    w = jnp.asarray([0.0, 0.4, 1.0])
    found = slerp(a, b, w)
    flat = lambda tree: jnp.concatenate([tree["u"], tree["v"]], axis=1)  # noqa: E731
    np.testing.assert_allclose(flat(found), slerp(flat(a), flat(b), w), rtol=1e-5)
    for i in range(3):
        one = slerp(flat(a)[i : i + 1], flat(b)[i : i + 1], w[i])
        np.testing.assert_allclose(flat(found)[i], one[0], rtol=1e-5, atol=1e-6)


def test_temper():
    z = {"a": jnp.ones((3, 2)), "b": jnp.ones((3, 4, 4))}
    cooled = temper(z, jnp.asarray([0.5, 1.0, 2.0]))
    np.testing.assert_array_equal(cooled["b"][:, 0, 0], [0.5, 1.0, 2.0])
    with pytest.raises(ValueError, match=r"temperature must be positive; got 0"):
        temper(z, 0.0)


def test_cooler_latents_have_less_variety():
    """On a Gaussian the deviation of the samples is the latents', temperature times as large."""
    process = VP()
    oracle = Gaussian(jnp.zeros(2), jnp.asarray([0.5, 1.0]))
    z = jnp.asarray(standard_normal(3, (400, 2)), jnp.float32)
    run = compiled(lambda z: decode(KEY, oracle.denoiser(process), process, z).x)
    ratio = jnp.std(run(temper(z, 0.7)), axis=0) / jnp.std(run(z), axis=0)
    np.testing.assert_allclose(ratio, 0.7, rtol=1e-3)
