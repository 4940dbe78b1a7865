"""Closed-form denoisers: the truth that solvers, losses and likelihoods are compared with.

For data x0 ~ p and x_t = alpha x0 + sigma eps:

    Gaussian     p = N(m, d^2):      x_t ~ N(alpha m, V),  V = alpha^2 d^2 + sigma^2           (1)
                 E[x0 | x_t] = m + alpha d^2/V (x_t - alpha m)
                 E[eps | x_t] = sigma/V (x_t - alpha m)
                 probability flow from t to s:  x_s = alpha_s m + sqrt(V_s/V_t) (x_t - alpha_t m)
    mixture      p = sum_k w_k N(m_k, d^2):  (1) for each k, with the weights p(k | x_t)       (2)
    point mass   p = delta(x0 - m): (1) with d = 0                                             (3)
    isotropic    p = N(0, d^2) in every element: (1) with m = 0, for x any tree                (4)

Each oracle is a pytree and works in the dtype of x, for x of shape (B, D) unless (4).
"""

from typing import Any

import jax
import jax.numpy as jnp

from diffjax.core.numerics import expand, scale
from diffjax.core.pytree import pytree
from diffjax.core.types import Number, Prediction
from diffjax.processes.base import Process


def _broadcast(process, x, t):
    """alpha and sigma as (B, 1) or () in x's dtype."""
    alpha, _, sigma = process.coeffs(t)
    return expand(alpha, x), expand(sigma, x)


@pytree
class OracleDenoiser:
    """`oracle.predict` bound to a process: a pytree DenoiseFn."""

    oracle: Any
    process: Process

    def __call__(self, x_t, t):
        alpha, sigma = _broadcast(self.process, x_t, t)
        return self.oracle.predict(alpha, sigma, x_t)


class _Oracle:
    def denoiser(self, process):
        """x_t, t -> Prediction, exact."""
        return OracleDenoiser(self, process)


@pytree
class Gaussian(_Oracle):
    """Diagonal Gaussian, eq. (1). mean, std: (D,)."""

    mean: jax.Array
    std: jax.Array

    def predict(self, alpha, sigma, x_t):
        m, d = self.mean[None].astype(x_t.dtype), self.std[None].astype(x_t.dtype)
        centred = x_t - alpha * m
        variance = alpha**2 * d**2 + sigma**2
        return Prediction(m + alpha * d**2 / variance * centred, sigma / variance * centred)

    def flow(self, process, x_t, t, s):
        """The exact probability flow from t to s."""
        m, d = self.mean[None].astype(x_t.dtype), self.std[None].astype(x_t.dtype)
        at, st = _broadcast(process, x_t, t)
        as_, ss = _broadcast(process, x_t, s)
        ratio = jnp.sqrt((as_**2 * d**2 + ss**2) / (at**2 * d**2 + st**2))
        return as_ * m + ratio * (x_t - at * m)

    def marginal(self, process, t):
        """Mean (D,) and covariance (D, D) of p_t, t: ()."""
        alpha, _, sigma = process.coeffs(t)
        return alpha * self.mean, jnp.diag(alpha**2 * self.std**2 + sigma**2)

    def log_prob(self, process, x_t, t):
        """ln p_t(x_t), (B,)."""
        m, d = self.mean[None].astype(x_t.dtype), self.std[None].astype(x_t.dtype)
        alpha, sigma = _broadcast(process, x_t, t)
        variance = jnp.broadcast_to(alpha**2 * d**2 + sigma**2, x_t.shape)
        z2 = (x_t - alpha * m) ** 2 / variance
        return -0.5 * jnp.sum(z2 + jnp.log(2 * jnp.pi * variance), axis=-1)

    def draw(self, key, n, dtype=jnp.float32):
        """n samples of the data, (n, D)."""
        z = jax.random.normal(key, (n, self.mean.shape[0]), dtype)
        return self.mean[None].astype(dtype) + self.std[None].astype(dtype) * z


@pytree
class Mixture(_Oracle):
    """Isotropic Gaussian mixture, eq. (2). means: (K, D); std: scalar; weights: (K,), sum 1."""

    means: jax.Array
    std: jax.Array
    weights: jax.Array

    def _parts(self, alpha, sigma, x_t):
        """Centred x (B, K, D), variance (B or 1, 1, 1) and log joint (B, K)."""
        alpha, sigma = (c.reshape(-1, 1, 1) for c in (alpha, sigma))
        means = self.means[None].astype(x_t.dtype)
        variance = alpha**2 * self.std.astype(x_t.dtype) ** 2 + sigma**2
        centred = x_t[:, None] - alpha * means
        log_joint = jnp.log(self.weights.astype(x_t.dtype))[None] - 0.5 * jnp.sum(
            centred**2 / variance + jnp.log(2 * jnp.pi * variance), axis=-1
        )
        return centred, variance, log_joint

    def predict(self, alpha, sigma, x_t):
        centred, variance, log_joint = self._parts(alpha, sigma, x_t)
        weights = jax.nn.softmax(log_joint, axis=-1)[..., None]
        a = alpha.reshape(-1, 1, 1)
        gain = a * self.std.astype(x_t.dtype) ** 2 / variance
        x0 = jnp.sum(weights * (self.means[None].astype(x_t.dtype) + gain * centred), axis=1)
        eps = jnp.sum(weights * centred / variance, axis=1) * sigma
        return Prediction(x0, eps)

    def log_prob(self, process, x_t, t):
        """ln p_t(x_t), (B,)."""
        alpha, sigma = _broadcast(process, x_t, t)
        return jax.nn.logsumexp(self._parts(alpha, sigma, x_t)[2], axis=-1)

    def moments(self):
        """Mean (D,) and covariance (D, D) of the data."""
        mean = self.weights @ self.means
        c = self.means - mean[None]
        return mean, (self.weights[:, None] * c).T @ c + self.std**2 * jnp.eye(mean.shape[0])

    def draw(self, key, n, dtype=jnp.float32):
        """n samples of the data, (n, D)."""
        k1, k2 = jax.random.split(key)
        k = jax.random.choice(k1, self.weights.shape[0], (n,), p=self.weights)
        z = jax.random.normal(k2, (n, self.means.shape[1]), dtype)
        return self.means.astype(dtype)[k] + self.std.astype(dtype) * z


@pytree
class PointMass(_Oracle):
    """All data at one point, eq. (3). mean: (D,)."""

    mean: jax.Array

    def predict(self, alpha, sigma, x_t):
        m = jnp.broadcast_to(self.mean[None].astype(x_t.dtype), x_t.shape)
        return Prediction(m, (x_t - alpha * m) / sigma)


@pytree
class Isotropic:
    """Centred data of deviation `std`, eq. (4), bound to a process: a DenoiseFn for any tree x."""

    process: Process
    std: Number = 0.7

    def __call__(self, x_t, t):
        alpha, _, sigma = self.process.coeffs(t)
        variance = (alpha * self.std) ** 2 + sigma**2
        return Prediction(scale(alpha * self.std**2 / variance, x_t), scale(sigma / variance, x_t))


def gaussian(dim=3, dtype=jnp.float32):
    """A Gaussian with distinct means and deviations."""
    mean = jnp.linspace(-0.5, 0.7, dim, dtype=dtype)
    return Gaussian(mean, jnp.linspace(0.3, 0.8, dim, dtype=dtype))


def mixture(dim=2, dtype=jnp.float32):
    """Three unequal modes with overlap."""
    angle = jnp.arange(3, dtype=dtype) * 2.1
    means = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
    means = jnp.concatenate([means] * ((dim + 1) // 2), axis=1)[:, :dim]
    return Mixture(0.8 * means, jnp.asarray(0.3, dtype), jnp.asarray([0.5, 0.3, 0.2], dtype))
