"""Training objectives: denoising score matching, its weightings and its times."""

from diffjax.losses.classification import classification
from diffjax.losses.hybrid import hybrid
from diffjax.losses.matching import (
    Asked,
    Reduce,
    Watch,
    denoising_score_matching,
    half_sum,
    mean,
    total,
)
from diffjax.losses.times import (
    DiscreteTimes,
    ImportanceTimes,
    LogNormalTimes,
    StratifiedTimes,
    TimeDistribution,
    Times,
    TimeSampler,
    UniformTimes,
    strata,
)
from diffjax.losses.weights import Likelihood, MinSNR, Sigmoid, Weight

__all__ = [
    "Asked",
    "DiscreteTimes",
    "ImportanceTimes",
    "Likelihood",
    "LogNormalTimes",
    "MinSNR",
    "Reduce",
    "Sigmoid",
    "StratifiedTimes",
    "TimeDistribution",
    "TimeSampler",
    "Times",
    "UniformTimes",
    "Watch",
    "Weight",
    "classification",
    "denoising_score_matching",
    "half_sum",
    "hybrid",
    "mean",
    "strata",
    "total",
]
