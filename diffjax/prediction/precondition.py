"""What a network is given: the scale of its input and its label for the time.

Symbols: sigma~ = sigma/alpha, the noise level in the coordinates x_t/alpha (EDM's sigma); s_d the
data's standard deviation; c_in the factor on x_t; c_noise the label.

    D(x; sigma~) = c_skip x + c_out F(c_in x; c_noise)                                         (1)

EDM's table 1 written as (kind of output, input scale, label), all in x_t's own coordinates:

    preset       kind          c_in                           label
    vp           eps           1/sqrt(sigma^2 + alpha^2)      999 t_VP(sigma~)                 (2)
    ve           sigma_score   1/alpha                        ln(sigma~/2)                     (3)
    iddpm        eps           1/sqrt(sigma^2 + alpha^2)      index of the nearest level       (4)
    edm          F             1/sqrt(sigma^2 + alpha^2 s_d^2)  ln(sigma~)/4                   (5)

and the conventions of the Score-SDE code (unscaled inputs):

    VP, sub-VP continuous   999 t, whatever the number of levels        score_sde_vp()
    VP discrete             (N - 1) t, not rounded                      score_sde_vp(levels=N)
      trained, at a level   k = N t - 1, as DDPM's loss and sampler     ddpm(levels=N)
    VE continuous           sigma                                       score_sde_ve()
    VE discrete             round((1 - t)(N - 1)): 0 is the noisiest    score_sde_ve(levels=N)   (6)

and of SiT, whose clock runs from noise at 0 to data at 1, t' = 1 - t:

    flow                    t', and out = d x/dt' = -d x_t/dt           sit()                    (7)

References:
[1] Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022,
    https://arxiv.org/abs/2206.00364, table 1 and appendix C.
[2] Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", 2021,
    https://arxiv.org/abs/2011.13456, and its code, https://github.com/yang-song/score_sde.
[3] Nichol, Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021,
    https://arxiv.org/abs/2102.09672.
[4] Ma et al., "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant
    Transformers", 2024, https://arxiv.org/abs/2401.08740, and its code,
    https://github.com/willisma/SiT.
"""

import math
from typing import NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from diffjax.core import checks
from diffjax.core.pytree import pytree, static
from diffjax.core.types import Array, Number
from diffjax.prediction.kinds import EDMF, Eps, Kind, Negated, Score, SigmaScore, Velocity
from diffjax.processes.base import Process
from diffjax.processes.calculus import log_snr
from diffjax.processes.variance import VP


class OfTime(Protocol):
    """A number that depends on the process and the time: an input scale or a label."""

    def __call__(self, process: Process, t: Array) -> Array: ...


@pytree
class Unscaled:
    """c_in = 1: the network sees x_t."""

    def __call__(self, process: Process, t: Array) -> Array:
        """Ones shaped like t."""
        return jnp.ones_like(jnp.asarray(t))


@pytree
class OverAlpha:
    """c_in = 1/alpha: the network sees data plus noise of level sigma~, eq. (3)."""

    def __call__(self, process: Process, t: Array) -> Array:
        """1/alpha, shaped like t."""
        return 1 / process.coeffs(t).alpha


@pytree
class UnitVariance:
    """c_in = 1/sqrt(sigma^2 + alpha^2 s_d^2): the input has unit variance, eqs. (2), (4), (5)."""

    sigma_data: Number = 1.0

    def __post_init__(self):
        checks.positive("sigma_data", self.sigma_data)

    def __call__(self, process: Process, t: Array) -> Array:
        """Shaped like t."""
        alpha, _, sigma = process.coeffs(t)
        return 1 / jnp.sqrt(sigma**2 + (alpha * self.sigma_data) ** 2)


@pytree
class Time:
    """label = factor t."""

    factor: Number = 1.0

    def __call__(self, process: Process, t: Array) -> Array:
        """Shaped like t."""
        return self.factor * jnp.asarray(t)


@pytree
class ReversedTime:
    """label = factor (end - t), eq. (7): a clock that runs from noise at 0 to data at `end`."""

    end: Number = 1.0
    factor: Number = 1.0

    def __call__(self, process: Process, t: Array) -> Array:
        """Shaped like t."""
        return self.factor * (self.end - jnp.asarray(t))


@pytree
class NoiseLevel:
    """label = sigma~."""

    def __call__(self, process: Process, t: Array) -> Array:
        """Shaped like t."""
        alpha, _, sigma = process.coeffs(t)
        return sigma / alpha


@pytree
class LogNoiseLevel:
    """label = factor ln(sigma~/unit), eqs. (3) and (5)."""

    factor: Number = 0.25
    unit: Number = 1.0

    def __call__(self, process: Process, t: Array) -> Array:
        """Shaped like t."""
        return self.factor * (-log_snr(process, t) / 2 - jnp.log(jnp.asarray(self.unit)))


@pytree
class VPTime:
    """label = factor t' where a VP process with these betas has the noise level of t, eq. (2)."""

    beta_min: Number = 0.1
    beta_max: Number = 20.0
    factor: Number = 999.0

    def __call__(self, process: Process, t: Array) -> Array:
        """Shaped like t."""
        vp = VP(self.beta_min, self.beta_max)
        return self.factor * vp.inverse_log_snr(log_snr(process, t))


@pytree
class NearestLevel:
    """label = the index of the level nearest to sigma~, as a float, eq. (4).

    levels: (N,), increasing.
    """

    levels: Array

    def __call__(self, process: Process, t: Array) -> Array:
        """Shaped like t."""
        alpha, _, sigma = process.coeffs(t)
        level = (sigma / alpha)[..., None]
        table = self.levels.reshape((1,) * (level.ndim - 1) + (-1,))
        return jnp.argmin(jnp.abs(level - table), axis=-1).astype(level.dtype)


@pytree
class DescendingIndex:
    """label = round((1 - t)(N - 1)) as a float, eq. (6): level 0 has the most noise.

    Exact on a grid that ends at 1e-5; on one that ends at 1e-3 half of the labels are off by one,
    in the reference code too. rounded: False leaves the label between two levels, for grids finer
    than those of training.
    """

    levels: int = static()
    rounded: bool = static(default=True)

    def __post_init__(self):
        checks.at_least("levels", self.levels, 2)

    def __call__(self, process: Process, t: Array) -> Array:
        """Shaped like t."""
        index = (1 - jnp.asarray(t)) * (self.levels - 1)
        return jnp.round(index) if self.rounded else index


@pytree
class LevelIndex:
    """label = max(N t - 1, 0), a float: the index k of the level at t = (k + 1)/N.

    Exact on the levels of `processes.Tabulated`, between two of them in proportion.
    """

    levels: int = static()

    def __post_init__(self):
        checks.at_least("levels", self.levels, 1)

    def __call__(self, process: Process, t: Array) -> Array:
        """Shaped like t."""
        return jnp.maximum(self.levels * jnp.asarray(t) - 1, 0)


class Precondition(NamedTuple):
    """A network's convention: what it outputs, how its input is scaled, how time is told."""

    kind: Kind
    scaling: OfTime
    label: OfTime


def edm(sigma_data: Number = 0.5, label: OfTime = LogNoiseLevel(0.25)) -> Precondition:
    """Eq. (5). label: `NoiseLevel()` for a network that takes the logarithm itself (Fourier)."""
    return Precondition(EDMF(sigma_data), UnitVariance(sigma_data), label)


def vp(beta_min: Number = 0.1, beta_max: Number = 20.0) -> Precondition:
    """Eq. (2): a Score-SDE VP network under any process."""
    return Precondition(Eps(), UnitVariance(), VPTime(beta_min, beta_max))


def ve() -> Precondition:
    """Eq. (3); the unit 2 because those networks saw data in [0, 1], diffjax's is in [-1, 1]."""
    return Precondition(SigmaScore(), OverAlpha(), LogNoiseLevel(1.0, 2.0))


def iddpm(levels: int = 1000, c1: float = 0.001, c2: float = 0.008) -> Precondition:
    """Eq. (4), for networks trained on the cosine schedule with `levels` steps [3].

    The levels are u_{j-1} = sqrt((u_j^2 + 1)/max(abar_{j-1}/abar_j, c1) - 1) from u_M = 0 with
    abar_j = sin^2(pi/2 j/(M (c2 + 1))), as EDM's table 1 states them.
    """
    checks.at_least("levels", levels, 2)
    abar = np.sin(0.5 * math.pi * np.arange(levels + 1) / (levels * (c2 + 1))) ** 2
    u = np.zeros(levels + 1)
    for j in range(levels, 0, -1):
        u[j - 1] = math.sqrt((u[j] ** 2 + 1) / max(abar[j - 1] / abar[j], c1) - 1)
    return Precondition(Eps(), UnitVariance(), NearestLevel(jnp.asarray(u[:-1][::-1])))


def score_sde_vp(levels: int | None = None) -> Precondition:
    """VP and sub-VP networks of the Score-SDE code; levels: N of a discretely trained one."""
    return Precondition(Eps(), Unscaled(), Time(999.0 if levels is None else levels - 1.0))


def ddpm(levels: int = 1000) -> Precondition:
    """Networks trained on DDPM's N levels: level k is told by k, and stands at t = (k + 1)/N.

    The Score-SDE code trains them so and samples with the labels of `score_sde_vp(levels)`, which
    are off by up to one.
    """
    return Precondition(Eps(), Unscaled(), LevelIndex(levels))


def score_sde_ve(levels: int | None = None, rounded: bool = True) -> Precondition:
    """VE networks of the Score-SDE code, which divide by sigma themselves; eq. (6) with levels.

    rounded: see `DescendingIndex`.
    """
    label = NoiseLevel() if levels is None else DescendingIndex(levels, rounded)
    return Precondition(Score(), Unscaled(), label)


def sit() -> Precondition:
    """SiT's networks [4], eq. (7): of `processes.RectifiedFlow` for its linear path.

    In its clock x = t' x0 + (1 - t') eps, and the velocity is x0 - eps. Its other paths are asked
    in the same way, under a process with their alpha and sigma at 1 - t'.
    """
    return Precondition(Negated(Velocity()), Unscaled(), ReversedTime())
