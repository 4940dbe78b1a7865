"""What a network's output means, and how it becomes a denoiser."""

from diffjax.prediction import precondition
from diffjax.prediction.kinds import (
    EDMF,
    X0,
    Eps,
    Kind,
    KindName,
    Row,
    Score,
    SigmaScore,
    V,
    Velocity,
    as_kind,
    decode,
    determinant,
    target,
)
from diffjax.prediction.wrap import Denoiser, make_denoiser

__all__ = [
    "EDMF",
    "X0",
    "Denoiser",
    "Eps",
    "Kind",
    "KindName",
    "Row",
    "Score",
    "SigmaScore",
    "V",
    "Velocity",
    "as_kind",
    "decode",
    "determinant",
    "make_denoiser",
    "precondition",
    "target",
]
