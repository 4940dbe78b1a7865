"""What a network's output means, and how it becomes a denoiser."""

from diffjax.prediction import precondition
from diffjax.prediction.centre import anchored, centre, to_centred, uncentre
from diffjax.prediction.kinds import (
    EDMF,
    X0,
    Eps,
    Kind,
    KindName,
    Negated,
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
from diffjax.prediction.learned import LearnedLog, LearnedRange, LearnedVariance, StepVariance
from diffjax.prediction.wrap import Denoiser, make_denoiser

__all__ = [
    "EDMF",
    "X0",
    "Denoiser",
    "Eps",
    "Kind",
    "KindName",
    "LearnedLog",
    "LearnedRange",
    "LearnedVariance",
    "Negated",
    "Row",
    "Score",
    "SigmaScore",
    "StepVariance",
    "V",
    "Velocity",
    "anchored",
    "as_kind",
    "centre",
    "decode",
    "determinant",
    "make_denoiser",
    "precondition",
    "target",
    "to_centred",
    "uncentre",
]
