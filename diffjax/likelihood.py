r"""Log-densities and bits/dim: exact by the probability flow, or by the variational bound.

Symbols: v the velocity of the probability flow, p_t the density of x_t under the model, pi the
prior at T = t_max, lam the log-SNR, sigma~ = sigma/alpha, D the elements of one sample, z a probe
with E[z z^T] = 1.

    dx/dt = v(x, t) = alpha' x0^ + sigma' eps^
    ln p_{t_min}(x) = ln pi(x_T) + int_{t_min}^{T} div v(x_t, t) dt                            (1)
    div v = E[z^T (dv/dx) z] = sum_d e_d^T (dv/dx) e_d                                         (2)

(1) is a solve forward in time from the data. One Jacobian-vector product gives both v and a term of
(2), z^T ((dv/dx) z), from one call of the denoiser: it costs what a vector-Jacobian product costs,
stores no activations, and keeps clear of the gradients of convolutions, which XLA runs some 30
times slower inside a loop on a CPU. Probes stay fixed during a
solve, so that the right-hand side is smooth; (2) is then unbiased for the integral too. Per
evaluation Rademacher probes have variance 2 (|S|^2 - sum_d S_dd^2) and Gaussian ones 2 |S|^2, with
S the symmetric part of dv/dx and |.| Frobenius' norm: a diagonal Jacobian costs Rademacher nothing.

(1) is the density at t_min, where the data carry the noise of sigma(t_min), and it takes the prior
N(0, sigma(T)^2) for p_T. Where the data's mean is not 0, that moves ln p(x) by thousandths of a nat
for VP, and by up to 0.4 nats at single points for VE; pass `prior` where p_T is known.

The variational bound needs no ODE and no Jacobian:

    -ln p(x0) <= KL + 1/2 int (-d lam/dt) E|eps^ - eps|^2 dt + R                                (3)
    KL = alpha(T)^2 |x0|^2 / (2 sigma(T)^2)
    R  = D/2 (1 + ln(2 pi sigma~(t_min)^2))                           real-valued x0            (4)
    R  = -E ln softmax_k(-(x_t - alpha x_k)^2 / (2 sigma^2))[level], t = t_min     levels       (5)

In (4) the decoder is N(x_t/alpha, sigma~^2), in (5) it is the categorical distribution over the
levels' places x_k, so the bound is on the probability of the integers and needs no dequantisation.
The integral is taken over the log-SNR, uniformly, which must be finite at both ends.

Bits/dim are those of integers under uniform dequantisation, eq. (7) of `core.quantise`. A figure
y_iap of image i = 1..n, dequantisation a = 1..A and probe p = 1..P is taken as

    y_iap = mu + d_i + u_ia + z_iap,    variances D (data), U (dequantisation), Z (probes)

of independent terms, means over indices marked by a dot. The unbiased variances s^2 over one index,
averaged over those before it, have the expectations

    E s^2_i(y_i..) = D + U/A + Z/(AP)                                total                    (6)
    E s^2_a(y_ia.) = U + Z/P                                         within an image          (7)
    E s^2_p(y_iap) = Z                                               within a dequantisation  (8)

so (6)/n is the squared standard error of the mean whatever the three are, and its parts are
D/n = [(6) - (7)/A]/n, U/(nA) = [(7)/A - (8)/(AP)]/n and Z/(nAP) = (8)/(nAP). More images divide
all of it; more dequantisations and probes only the last two, so 1 - D/(6) is what they can gain.

References:
[1] Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", 2021,
    https://arxiv.org/abs/2011.13456, section 4.3 and appendix D.2.
[2] Grathwohl et al., "FFJORD", 2018, https://arxiv.org/abs/1810.01367 (2).
[3] Kingma, Salimans, Poole, Ho, "Variational Diffusion Models", 2021,
    https://arxiv.org/abs/2107.00630 (3, 5).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from diffjax.core import checks, random
from diffjax.core.numerics import (
    at_least_float32,
    batch_size,
    expand,
    scale,
    size_per_sample,
    sum_per_sample,
)
from diffjax.core.pytree import pytree, static
from diffjax.core.quantise import Quantisation
from diffjax.core.types import Array, DenoiseFn, Key, Number, PyTree
from diffjax.losses.times import ImportanceTimes, finite_log_snr, spread
from diffjax.processes.base import Process
from diffjax.processes.calculus import perturb, prior_log_prob, velocity
from diffjax.solvers.adaptive import PIController, integrate


class Divergence(Protocol):
    """How (2) is evaluated: by the probes z_k for which sum_k z_k^T J z_k is the trace."""

    def probes(self, keys: Key, x: PyTree) -> PyTree:
        """A tree like x with a leading axis K: (K, B, *data)."""
        ...


@pytree
class Hutchinson:
    """Random probes: an unbiased estimate of (2) from n_probes products an evaluation.

    draw: (keys, name, x) -> noise like x of unit covariance; `core.random.rademacher_like`, or
    `normal_like`, of higher variance. n_probes: their mean divides the variance.
    """

    draw: Callable[[Key, str, PyTree], PyTree] = static(default=random.rademacher_like)
    n_probes: int = static(default=1)

    def __post_init__(self):
        checks.at_least("n_probes", self.n_probes, 1)

    def probes(self, keys: Key, x: PyTree) -> PyTree:
        """(n_probes, B, *data), over sqrt(n_probes)."""
        draws = [
            self.draw(random.step_keys(keys, k), "probe", x)  # an own stream for each probe
            for k in range(self.n_probes)
        ]
        return jax.tree.map(lambda *z: jnp.stack(z) / math.sqrt(self.n_probes), *draws)


@pytree
class ExactDivergence:
    """The basis as probes: the exact trace for D products an evaluation, so for small D only."""

    def probes(self, keys: Key, x: PyTree) -> PyTree:
        """(D, B, *data)."""
        flat, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], x))
        basis = jax.vmap(unravel)(jnp.eye(flat.shape[0], dtype=flat.dtype))
        return jax.tree.map(
            lambda e, leaf: jnp.broadcast_to(e[:, None], (*e.shape[:1], *leaf.shape)), basis, x
        )


class LogProb(NamedTuple):
    """ln p(x) in nats, (B,); the latent x_T, like x; calls of the denoiser, (B,).

    A sample that the controller gave up has NaN for its value and its latent.
    """

    value: Array
    latent: PyTree
    nfe: Array


def log_prob(
    key: Key,
    denoise: DenoiseFn,
    process: Process,
    x: PyTree,
    *,
    divergence: Divergence = Hutchinson(),
    controller: PIController = PIController(),
    prior: Callable[[PyTree], Array] | None = None,
    t_min: Number | None = None,
) -> LogProb:
    """ln p_{t_min}(x) of each sample by the probability flow, eq. (1).

    key: a typed key, or (B,) keys, one a sample, for the probes.
    denoise: (x_t, t (B,)) -> Prediction, differentiable in x_t (forward mode).
    x: (B, *data), a tree of floating-point arrays; half precision is raised to float32.
    controller: the tolerances. Each sample has its own steps, so its value and its number of calls
      do not depend on its neighbours.
    prior: x_T -> ln pi(x_T), (B,); by default the process's, `prior_log_prob`.
    t_min: where the solve starts; None for the process's own.

    In float32 ask for no less than about 1e-6, and run networks at full matmul precision
    (`jax.default_matmul_precision("highest")`).
    """
    x = at_least_float32(x)
    batch = batch_size(x)
    start = process.t_min if t_min is None else t_min
    check_log_prob(denoise, process, t_min)
    probes = divergence.probes(random.sample_keys(key, batch), x)

    def field(t: Array, state: tuple[PyTree, Array]) -> tuple[PyTree, Array]:
        def flow(y):
            return velocity(process, denoise(y, t), t)

        def along(z):
            slope, change = jax.jvp(flow, (state[0],), (z,))
            return slope, sum_per_sample(jax.tree.map(jnp.multiply, z, change))

        if jax.tree.leaves(probes)[0].shape[0] == 1:
            # The same, but XLA on a CPU is up to ten times slower at a `vmap` over one.
            return along(jax.tree.map(lambda z: z[0], probes))
        slope, terms = jax.vmap(along, out_axes=(None, 0))(probes)
        return slope, jnp.sum(terms, axis=0)

    gained = jnp.zeros((batch,), jnp.result_type(*jax.tree.leaves(x)))
    solved = integrate(field, (x, gained), start, process.t_max, controller=controller)
    latent, gained = solved.y
    end = prior_log_prob(process, latent) if prior is None else prior(latent)
    return LogProb(end + gained, latent, solved.nfe)


def check_log_prob(denoise: DenoiseFn, process: Process, t_min: Number | None = None) -> None:
    """Raises what `log_prob` would for these: call it before a jitted one."""
    start = process.t_min if t_min is None else t_min
    checks.less("t_min", start, "t_max", process.t_max)
    if hasattr(denoise, "check_times"):
        denoise.check_times(jnp.asarray([start, process.t_max]))


class StandardErrors(NamedTuple):
    """The standard error of a mean over images, taken apart by eqs. (6) to (8); each ().

    total^2 = data^2 + noise^2 and noise^2 = dequantise^2 + probe^2, but for parts whose estimate
    came out negative, which are 0. NaN where the design cannot tell: `data` and `noise` need two
    dequantisations an image, `probe` two probes each, `dequantise` both.
    """

    total: Array
    data: Array
    noise: Array
    dequantise: Array
    probe: Array


class BitsPerDim(NamedTuple):
    """Bits/dim of each image, (B,), their mean and its standard error over the images, ().

    The standard error includes the noise of dequantisation and probes, drawn anew for every image;
    `errors` has its parts. It is NaN for one image. draws: (B, A, P), every solve's figure, of
    which `per_image` is the mean. nfe: (B, A, P), every solve's calls of the denoiser; None where
    there was no solve. Figures of several batches: join `draws`, then `summarise` again.
    """

    per_image: Array
    mean: Array
    stderr: Array
    errors: StandardErrors
    draws: Array
    nfe: Array | None = None


def summarise(draws: Array, nfe: Array | None = None) -> BitsPerDim:
    """Mean and standard errors of figures that are independent from image to image.

    draws: (B,), or (B, A, P) for P probes in each of A dequantisations, eqs. (6) to (8).
    """
    draws = draws.reshape(-1, 1, 1) if draws.ndim == 1 else draws
    n, dequantisations, probes = draws.shape
    per_dequantisation = jnp.mean(draws, axis=2)
    per_image = jnp.mean(per_dequantisation, axis=1)
    variance = _variance(per_image, 0)
    across = jnp.mean(_variance(per_dequantisation, 1)) / dequantisations
    within = jnp.mean(_variance(draws, 2)) / (dequantisations * probes)
    parts = variance, variance - across, across, across - within, within
    errors = StandardErrors(*(jnp.sqrt(jnp.maximum(part, 0) / n) for part in parts))
    return BitsPerDim(per_image, jnp.mean(per_image), errors.total, errors, draws, nfe)


def _variance(x: Array, axis: int) -> Array:
    """The unbiased variance along an axis; NaN for a single element."""
    centred = x - jnp.mean(x, axis=axis, keepdims=True)
    freedom = jnp.asarray(x.shape[axis] - 1, x.dtype)  # 0 / 0 is NaN
    return jnp.sum(centred**2, axis=axis) / freedom


def bits_per_dim(
    key: Key,
    denoise: DenoiseFn,
    process: Process,
    images: Array,
    *,
    quantisation: Quantisation,
    repeats: int = 1,
    probe_repeats: int = 1,
    divergence: Divergence = Hutchinson(),
    controller: PIController = PIController(),
    prior: Callable[[PyTree], Array] | None = None,
    t_min: Number | None = None,
) -> BitsPerDim:
    """Bits/dim of integer images by the probability flow, under uniform dequantisation.

    key: a typed key, or (B,) keys, one an image. images: (B, ...), integer levels (uint8).
    quantisation: the number of levels and the model's range. repeats: A, draws of the
    dequantisation noise, each with fresh probes. probe_repeats: P, solves with fresh probes for
    each of them; A and P of at least 2 tell the parts of the standard error apart. The rest as in
    `log_prob`.
    """
    checks.at_least("repeats", repeats, 1)
    checks.at_least("probe_repeats", probe_repeats, 1)
    keys = random.sample_keys(key, images.shape[0])
    dim = images.size // images.shape[0]

    def once(draw):
        own = random.step_keys(keys, draw // probe_repeats)
        x = quantisation.dequantise(own, images)
        nats = log_prob(
            random.step_keys(own, draw % probe_repeats),
            denoise,
            process,
            x,
            divergence=divergence,
            controller=controller,
            prior=prior,
            t_min=t_min,
        )
        bits = -nats.value / (dim * math.log(2)) - quantisation.log2_bin_width()
        return bits, nats.nfe

    drawn = jax.lax.map(once, jnp.arange(repeats * probe_repeats))
    shape = (images.shape[0], repeats, probe_repeats)
    draws, nfe = (leaf.T.reshape(shape) for leaf in drawn)
    return summarise(draws, nfe)


def score_sde_protocol(passes: int = 5) -> dict[str, Any]:
    """Options of `bits_per_dim` for the likelihoods of [1], table 2.

    passes: 5 over the test set, 1 over a training set, each with fresh dequantisation and fresh
    Rademacher probes, averaged for each image; the flow from t = 1e-5 with both tolerances 1e-5.
    What differs from the reference code: here each image has its own steps (there a batch shares
    them), all images count (there 9,216 of 10,000), the prior has the process's deviation at t_max
    (1 there; 0.99998 for VP), and the pair is Dormand and Prince's with a PI controller.
    """
    return {
        "repeats": passes,
        "divergence": Hutchinson(),
        "controller": PIController(1e-5, 1e-5),
        "t_min": 1e-5,
    }


class Bound(NamedTuple):
    """The three terms of (3), each (B,), in nats."""

    prior: Array
    diffusion: Array
    reconstruction: Array

    @property
    def total(self) -> Array:
        """An upper bound on -ln p(x0), (B,), up to the noise of its estimate."""
        return self.prior + self.diffusion + self.reconstruction

    def bits_per_dim(self, dim: int, log2_bin_width: Number = 0.0) -> BitsPerDim:
        """The total in bits for each of `dim` elements.

        Levels need no more; for dequantised reals give `quantisation.log2_bin_width()`.
        """
        return summarise(self.total / (dim * math.log(2)) - log2_bin_width)


def variational_bound(
    key: Key,
    denoise: DenoiseFn,
    process: Process,
    x0: PyTree,
    *,
    quantisation: Quantisation | None = None,
    n_times: int = 16,
) -> Bound:
    """The bound (3) for each sample, from n_times calls of the denoiser.

    key: a typed key, or (B,) keys, one a sample.
    x0: (B, *data) in the model's range; or, with `quantisation`, integer levels (B, ...), which
      are placed by `to_model` and bounded as integers, eq. (5).
    n_times: each sample's times are evenly spread over the log-SNR from an offset of its own.

    Raises ValueError where the log-SNR is infinite at t_min or t_max (a flow needs t_max < 1).
    """
    checks.at_least("n_times", n_times, 1)
    levels = x0
    x0 = at_least_float32(x0 if quantisation is None else quantisation.to_model(x0))
    keys = random.sample_keys(key, batch_size(x0))
    first, last = finite_log_snr(process, process.t_min, process.t_max)
    u = random.uniform_like(keys, "t", jnp.empty(keys.shape, float))
    times = ImportanceTimes().quantile(process, jax.vmap(lambda u: spread(u[None], n_times))(u)).t

    def error(t_and_index):
        t, index = t_and_index
        eps = random.normal_like(random.step_keys(keys, index), "eps", x0)
        off = jax.tree.map(jnp.subtract, denoise(perturb(process, x0, t, eps), t).eps, eps)
        return sum_per_sample(jax.tree.map(jnp.square, off))

    errors = jax.lax.map(error, (times.T, jnp.arange(n_times)))
    diffusion = (first - last) / 2 * jnp.mean(errors, axis=0)

    at_end = process.coeffs(jnp.asarray(process.t_max, float))
    signal = scale(at_end.alpha / at_end.sigma, x0)
    kl = sum_per_sample(jax.tree.map(jnp.square, signal)) / 2
    if quantisation is None:
        # ln sigma~^2 = -lam
        nats = size_per_sample(x0) / 2 * (1 + math.log(2 * math.pi) - first)
        reconstruction = jnp.broadcast_to(nats, kl.shape)
    else:
        reconstruction = _decode_levels(keys, process, levels, quantisation)
    return Bound(kl, diffusion, reconstruction)


def _decode_levels(keys: Key, process: Process, levels: Array, quantisation: Quantisation) -> Array:
    """Eq. (5), (B,), for one draw of eps; a scan over k, so memory does not grow with the levels.

    With r_k = alpha (x0 - x_k)/sigma the logits, less that of the true level, are
    -r_k (r_k/2 + eps). The places x_k are evenly spaced, so r_k is exactly 0 at the true level.
    """
    alpha, _, sigma = process.coeffs(jnp.asarray(process.t_min, float))
    first, second = quantisation.to_model(jnp.arange(2))
    level = jnp.asarray(levels).astype(first.dtype)
    eps = random.normal_like(keys, "reconstruction", level)
    spacing = expand(alpha / sigma, level) * (second - first)

    def add(total, k):
        r = spacing * (level - k)
        return jnp.logaddexp(total, -r * (r / 2 + eps)), None

    everything, _ = jax.lax.scan(
        add, jnp.full_like(level, -jnp.inf), jnp.arange(quantisation.levels, dtype=level.dtype)
    )
    return sum_per_sample(everything)
