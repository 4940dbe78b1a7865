"""Explicit Runge-Kutta methods as numbers.

Symbols: y' = f(t, y), h the step, k_i the slopes, (a, b, c) the tableau, p the order, e_i the
difference of the weights b to those of the embedded method of order p - 1.

    k_i = f(t + c_i h, y + h sum_j a_ij k_j),   y+ = y + h sum_i b_i k_i                         (1)
    error = h sum_i e_i k_i                                                                      (2)

A `Tableau` holds b as one more row of a, with c = 1: the point y+, at which the next step's first
slope is taken. For Bogacki-Shampine and Dormand-Prince the error (2) uses that slope too.

References:
[1] Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I", 1993, sections II.1 to
    II.5, https://doi.org/10.1007/978-3-540-78862-1.
[2] Bogacki, Shampine, "A 3(2) pair of Runge-Kutta formulas", 1989,
    https://doi.org/10.1016/0893-9659(89)90079-7.
[3] Dormand, Prince, "A family of embedded Runge-Kutta formulae", 1980,
    https://doi.org/10.1016/0771-050X(80)90013-3.
"""

from typing import NamedTuple

import numpy as np


class Tableau(NamedTuple):
    """The numbers of (1) and (2) for a method whose last row is the next step's first stage.

    a: the rows below the diagonal, from the second stage on; the last row is b. c: from the second
    stage on. e: the weights of the error, one more than b, or () where there is no embedded method.
    order: p, of the solution kept.
    """

    a: tuple[tuple[float, ...], ...]
    c: tuple[float, ...]
    e: tuple[float, ...]
    order: int

    @property
    def stages(self) -> int:
        """S: the calls of f in a step, where the first slope is either new or the last one kept."""
        return len(self.a)

    def matrix(self) -> np.ndarray:
        """The rows of a padded with zeros, (S, S + 1)."""
        width = self.stages + 1
        return np.asarray([(*row, *(0.0,) * (width - len(row))) for row in self.a])


EULER = Tableau(a=((1.0,),), c=(1.0,), e=(), order=1)

MIDPOINT = Tableau(a=((1 / 2,), (0.0, 1.0)), c=(1 / 2, 1.0), e=(), order=2)

HEUN = Tableau(  # 2(1), with Euler's method embedded
    a=((1.0,), (1 / 2, 1 / 2)), c=(1.0, 1.0), e=(-1 / 2, 1 / 2, 0.0), order=2
)

RK4 = Tableau(  # the classical one
    a=((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
    c=(1 / 2, 1 / 2, 1.0, 1.0),
    e=(),
    order=4,
)

BOGACKI_SHAMPINE = Tableau(  # 3(2) with four stages, [2]
    a=((1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    c=(1 / 2, 3 / 4, 1.0),
    e=(-5 / 72, 1 / 12, 1 / 9, -1 / 8),
    order=3,
)

DORMAND_PRINCE = Tableau(  # 5(4) with seven stages, [3]
    a=(
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    c=(1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    e=(71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
    order=5,
)
