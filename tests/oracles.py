"""The closed-form denoisers of `diffjax.testing`, under the name that the tests use."""

from diffjax.testing.oracles import (
    Gaussian,
    Isotropic,
    Mixture,
    OracleDenoiser,
    PointMass,
    gaussian,
    mixture,
)

__all__ = [
    "Gaussian",
    "Isotropic",
    "Mixture",
    "OracleDenoiser",
    "PointMass",
    "gaussian",
    "mixture",
]
