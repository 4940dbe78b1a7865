"""Inverse problems: samples of the data given a measurement y = A x0."""

from diffjax.inverse.operators import Grey, Linear, LinearOperator, Mask, adjoint, projection
from diffjax.inverse.project import Replace

__all__ = ["Grey", "Linear", "LinearOperator", "Mask", "Replace", "adjoint", "projection"]
