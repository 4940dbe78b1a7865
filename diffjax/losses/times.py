"""Which times a batch is trained or evaluated at.

Symbols: u uniform on [0, 1); t the time; i = 0 ... B-1 a sample's place in the batch; lam the
log-SNR, sigma~ = sigma/alpha the noise level; N a number of levels.

    uniform      t = t_min + u (t_max - t_min)                       weight 1                    (1)
    importance   lam(t) = lam_0 + u (lam_1 - lam_0), the ends at t_min and t_max
                 weight (lam_0 - lam_1) / ((t_max - t_min) (-d lam/dt))                          (2)
    log-normal   ln sigma~(t) = mean + std Phi^-1(u)                 weight 1                    (3)
    discrete     t = (k + 1)/N, or k/(N - 1),  k = floor(u N)        weight 1                    (4)
    stratified   u_i = (u + i/B) mod 1, one u for the batch, in (1) ... (4)                      (5)

A sampler says which mean over t a loss estimates, and how. (1) and (2) estimate the same, that over
uniform t: (2) asks more often where the likelihood weighting g^2/sigma^2 = -d lam/dt is large and
divides by that density, so that weight times weighting is constant [1, 2]. (3) and (4) are other
means: the density belongs to the objective, as in EDM [3] and DDPM.

Each of (1) to (4) draws sample i's time from sample i's key. (5) is the one exception to batch
invariance in this room: B evenly spaced times, whose mean has less variance, cannot be chosen
without knowing i and B. A single time is still distributed as the inner sampler's, so per-sample
losses stay unbiased. Under a mesh i and B are those of the whole batch; inside `shard_map` they are
the shard's. Where a batch comes in parts, `strata` of the whole says each sample's u_i beforehand.

The first form of (4) is the grid of `processes.Tabulated`: level k stands at t = (k + 1)/N. The
second takes in both ends of [0, 1]: the geometric levels of NCSN on `processes.VE`.

References:
[1] Song, Durkan, Murray, Ermon, "Maximum Likelihood Training of Score-Based Diffusion Models",
    2021, https://arxiv.org/abs/2101.09258, section 5.
[2] Kingma, Salimans, Poole, Ho, "Variational Diffusion Models", 2021,
    https://arxiv.org/abs/2107.00630, appendix I, for (2) and (5).
[3] Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022,
    https://arxiv.org/abs/2206.00364, table 1.
"""

from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core import checks, random
from diffjax.core.pytree import pytree, static
from diffjax.core.types import Array, Key, Number
from diffjax.processes.base import Process
from diffjax.processes.calculus import inverse_log_snr, log_snr, rates


class Times(NamedTuple):
    """t (B,), and the factor (B,) that each sample's loss is multiplied by."""

    t: Array
    weight: Array


class TimeSampler(Protocol):
    """Draws one time a sample; see the module's docstring."""

    def __call__(self, keys: Key, process: Process) -> Times: ...


class TimeDistribution(TimeSampler, Protocol):
    """A sampler given by its quantile function."""

    def quantile(self, process: Process, u: Array) -> Times:
        """The times at the fractions u in [0, 1), of any shape."""
        ...


def _uniforms(keys: Key) -> Array:
    """One u a key, (B,), in JAX's default float dtype."""
    return random.uniform_like(keys, "t", jnp.empty(keys.shape, float))


class _ByQuantile:
    """A sampler that maps each sample's u by its quantile function."""

    def __call__(self: TimeDistribution, keys: Key, process: Process) -> Times:
        """keys: (B,)."""
        return self.quantile(process, _uniforms(keys))


@pytree
class _Ranged(_ByQuantile):
    """A distribution over a range of times. t_min, t_max: None for the process's own."""

    t_min: Number | None = None
    t_max: Number | None = None

    def __post_init__(self):
        checks.non_negative("t_min", self.t_min)
        checks.less("t_min", self.t_min, "t_max", self.t_max)

    def range(self, process: Process) -> tuple[Number, Number]:
        """(t_min, t_max)."""
        low = process.t_min if self.t_min is None else self.t_min
        high = process.t_max if self.t_max is None else self.t_max
        return low, high


@pytree
class UniformTimes(_Ranged):
    """Eq. (1). t_min, t_max: None for the process's own."""

    def quantile(self, process: Process, u: Array) -> Times:
        """Eq. (1)."""
        low, high = self.range(process)
        return Times(low + u * (high - low), jnp.ones_like(u))


@pytree
class ImportanceTimes(_Ranged):
    """Eq. (2): the mean over uniform t, from times that are uniform in the log-SNR.

    Lowers the variance under `weights.Likelihood`, whose product with the weight is constant.
    t_min, t_max: None for the process's own; the log-SNR must be finite at both (a flow needs
    t_max < 1).
    """

    def quantile(self, process: Process, u: Array) -> Times:
        """Eq. (2). Raises ValueError where the log-SNR is infinite at an end."""
        low, high = self.range(process)
        first, last = finite_log_snr(process, low, high)
        t = jnp.clip(inverse_log_snr(process, first + u * (last - first)), low, high)
        fall = rates(process, t).g2 / process.coeffs(t).sigma ** 2  # -d lam/dt
        return Times(t, (first - last) / ((high - low) * fall))


@pytree
class LogNormalTimes(_ByQuantile):
    """Eq. (3): ln sigma~ is normal, under any process; the defaults are EDM's [3].

    Times are clipped to the process's [t_min, t_max]: noise levels beyond are asked at the end. For
    the defaults on `processes.EDM` that moves 2e-5 of the draws.
    """

    mean: Number = -1.2
    std: Number = 1.2

    def __post_init__(self):
        checks.positive("std", self.std)

    def quantile(self, process: Process, u: Array) -> Times:
        """Eq. (3)."""
        half_step = jnp.finfo(u.dtype).eps / 2  # u = 0 would be a noise level of 0
        level = self.mean + self.std * jax.scipy.special.ndtri(jnp.maximum(u, half_step))
        t = inverse_log_snr(process, -2 * level)
        return Times(jnp.clip(t, process.t_min, process.t_max), jnp.ones_like(u))


@pytree
class DiscreteTimes(_ByQuantile):
    """Eq. (4): one of N levels with equal probability.

    levels: N. placement: "right" for t = (k + 1)/N, "ends" for t = k/(N - 1), N > 1.
    """

    levels: int = static()
    placement: Literal["right", "ends"] = static(default="right")

    def __post_init__(self):
        checks.one_of("placement", self.placement, ("right", "ends"))
        checks.at_least("levels", self.levels, 1 if self.placement == "right" else 2)

    def quantile(self, process: Process, u: Array) -> Times:
        """Eq. (4)."""
        k = jnp.minimum(jnp.floor(u * self.levels), self.levels - 1)
        t = (k + 1) / self.levels if self.placement == "right" else k / (self.levels - 1)
        return Times(t, jnp.ones_like(u))


@pytree
class StratifiedTimes:
    """Eq. (5): evenly spread over the batch; couples a sample's time to its place in the batch.

    u: (B,), the u_i of samples that are a part of a batch; None where they are all of it.
    """

    times: TimeDistribution = UniformTimes()
    u: Array | None = None

    def __call__(self, keys: Key, process: Process) -> Times:
        """keys: (B,), of which no draw is made where u is given."""
        return self.times.quantile(process, strata(keys) if self.u is None else self.u)


def strata(keys: Key) -> Array:
    """The u_i of eq. (5) of a whole batch, (B,), in [0, 1). keys: (B,); u comes from the first."""
    return spread(_uniforms(keys[:1]), keys.shape[0])


def spread(u: Array, n: int) -> Array:
    """(u + i/n) mod 1 for i = 0 ... n-1, eq. (5). u: (1,) in [0, 1). Returns (n,) in [0, 1)."""
    shifted = u + jnp.arange(n, dtype=u.dtype) / n
    return jnp.where(shifted >= 1, shifted - 1, shifted)


def finite_log_snr(process: Process, low: Number, high: Number) -> tuple[Array, Array]:
    """lam at two times, (). Raises ValueError if it is known to be infinite."""
    times = (low, high)
    with jax.ensure_compile_time_eval():
        known = [checks.concrete(log_snr(process, jnp.asarray(t, float))) for t in times]
    for t, lam in zip(times, known, strict=True):
        if lam is not None and not np.isfinite(lam):
            raise ValueError(
                f"The log-SNR must be finite at both ends; it is {lam} at t = {t}. Use a process "
                "with t_min above 0 and t_max inside its range (0.999 for a flow)."
            )
    first, last = (log_snr(process, jnp.asarray(t, float)) for t in times)
    return first, last
