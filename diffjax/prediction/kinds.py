"""What a network's output means: one row of a 2x2 system.

Symbols: out is the network's output, like x_t; a, b are functions of t; s_d the data's standard
deviation; ' is d/dt.

    x_t = alpha x0 + sigma eps                                                                 (1)
    out = a x0 + b eps                                                                         (2)

    kind        a                        b                       |a sigma - b alpha|
    eps         0                        1                       alpha
    x0          1                        0                       sigma
    score       0                        -1/sigma                alpha/sigma
    sigma_score 0                        -1                      alpha
    v           -sigma                   alpha                   alpha^2 + sigma^2
    velocity    alpha'                   sigma'                  |alpha' sigma - sigma' alpha|
    F (EDM)     sigma/(s_d q)            -alpha s_d/q            q/s_d                         (3)
    negated     -a, -b of another kind

with q = sqrt(sigma^2 + alpha^2 s_d^2). Training uses (2) forwards (`target`); sampling solves (1)
and (2) for (x0, eps) (`decode`). A zero in a row is the Python number 0.0: such a triangular system
is solved by substitution, so eps and x0 hand back their own half and nothing is divided by a
vanishing sigma or alpha on its account. v and F have a limit at both ends, velocity where alpha'
and sigma' are finite (sigma' is not at t = 0 of a variance-preserving process); eps has none where
alpha = 0, x0 none where sigma = 0, and score none at either.

(3) is EDM's D = c_skip x + c_out F in the coordinates x_t/alpha, sigma/alpha, solved for F: a
scaled rotation, as v is; with s_d = 1 on a variance-preserving process F = -v.

References:
[1] Salimans, Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", 2022,
    https://arxiv.org/abs/2202.00512 (v).
[2] Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022,
    https://arxiv.org/abs/2206.00364, table 1 (F).
[3] Lipman et al., "Flow Matching for Generative Modeling", 2022, https://arxiv.org/abs/2210.02747
    (velocity).
"""

from typing import Literal, NamedTuple, Protocol

import jax.numpy as jnp

from diffjax.core import checks
from diffjax.core.numerics import combine, scale
from diffjax.core.pytree import pytree
from diffjax.core.types import Array, Number, Prediction, PyTree
from diffjax.processes.base import Process
from diffjax.processes.calculus import derivatives


class Row(NamedTuple):
    """(a, b) of eq. (2), each () or (B,), or the Python number 0.0 where it is always zero."""

    a: Array | float
    b: Array | float


class Kind(Protocol):
    """A parameterisation: its row at time t."""

    def row(self, process: Process, t: Array) -> Row: ...


@pytree
class Eps:
    """The network predicts the noise."""

    def row(self, process: Process, t: Array) -> Row:
        """(0, 1)."""
        return Row(0.0, 1.0)


@pytree
class X0:
    """The network predicts the clean data."""

    def row(self, process: Process, t: Array) -> Row:
        """(1, 0)."""
        return Row(1.0, 0.0)


@pytree
class Score:
    """The network predicts the score, -eps/sigma."""

    def row(self, process: Process, t: Array) -> Row:
        """(0, -1/sigma)."""
        return Row(0.0, -1 / process.coeffs(t).sigma)


@pytree
class SigmaScore:
    """The network predicts sigma times the score, -eps: a VE network before its division."""

    def row(self, process: Process, t: Array) -> Row:
        """(0, -1)."""
        return Row(0.0, -1.0)


@pytree
class V:
    """The network predicts v = alpha eps - sigma x0 [1]."""

    def row(self, process: Process, t: Array) -> Row:
        """(-sigma, alpha)."""
        alpha, _, sigma = process.coeffs(t)
        return Row(-sigma, alpha)


@pytree
class Velocity:
    """The network predicts d x_t/dt = alpha' x0 + sigma' eps [3]; on a straight flow, eps - x0."""

    def row(self, process: Process, t: Array) -> Row:
        """(alpha', sigma')."""
        d_alpha, _, d_sigma = derivatives(process, t)
        return Row(d_alpha, d_sigma)


@pytree
class EDMF:
    """The network predicts F, eq. (3) [2]: unit variance for data of deviation sigma_data."""

    sigma_data: Number = 0.5

    def __post_init__(self):
        checks.positive("sigma_data", self.sigma_data)

    def row(self, process: Process, t: Array) -> Row:
        """Eq. (3)."""
        alpha, _, sigma = process.coeffs(t)
        q = jnp.sqrt(sigma**2 + (alpha * self.sigma_data) ** 2)
        return Row(sigma / (self.sigma_data * q), -alpha * self.sigma_data / q)


@pytree
class Negated:
    """The network predicts minus what another kind predicts.

    `Negated(Velocity())` is the velocity of a clock that runs the other way, from noise to data.
    """

    kind: Kind = Velocity()

    def row(self, process: Process, t: Array) -> Row:
        """The kind's row, negated."""
        a, b = self.kind.row(process, t)
        return Row(a if _is_zero(a) else -a, b if _is_zero(b) else -b)


KindName = Literal["eps", "x0", "score", "sigma_score", "v", "velocity", "F"]

_BY_NAME: dict[str, Kind] = {
    "eps": Eps(),
    "x0": X0(),
    "score": Score(),
    "sigma_score": SigmaScore(),
    "v": V(),
    "velocity": Velocity(),
    "F": EDMF(),
}


def as_kind(kind: Kind | KindName) -> Kind:
    """The kind itself, or the one of that name with its defaults. Raises ValueError if unknown."""
    if not isinstance(kind, str):
        return kind
    checks.one_of("kind", kind, _BY_NAME)
    return _BY_NAME[kind]


def _is_zero(entry: Array | float) -> bool:
    return isinstance(entry, float) and entry == 0.0


def target(kind: Kind, process: Process, x0: PyTree, eps: PyTree, t: Array) -> PyTree:
    """What a network of this kind should output, eq. (2), like x0."""
    a, b = kind.row(process, t)
    if _is_zero(a):
        return scale(b, eps)
    if _is_zero(b):
        return scale(a, x0)
    return combine((a, x0), (b, eps))


def determinant(kind: Kind, process: Process, t: Array) -> Array:
    """a sigma - b alpha: zero where (x_t, out) do not determine (x0, eps); shaped like t."""
    a, b = kind.row(process, t)
    alpha, _, sigma = process.coeffs(t)
    return a * sigma - b * alpha


def decode(kind: Kind, process: Process, x_t: PyTree, out: PyTree, t: Array) -> Prediction:
    """Solves eqs. (1) and (2) for (x0, eps), like x_t.

    In float32 the error is within a few units of rounding times the system's condition number.
    """
    a, b = kind.row(process, t)
    alpha, _, sigma = process.coeffs(t)
    if _is_zero(a):
        eps = scale(1 / b, out)
        return Prediction(combine((1 / alpha, x_t), (-sigma / alpha, eps)), eps)
    if _is_zero(b):
        x0 = scale(1 / a, out)
        return Prediction(x0, combine((1 / sigma, x_t), (-alpha / sigma, x0)))
    det = a * sigma - b * alpha
    x0 = combine((sigma / det, out), (-b / det, x_t))
    eps = combine((a / det, x_t), (-alpha / det, out))
    return Prediction(x0, eps)
