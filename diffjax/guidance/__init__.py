"""Guides: functions from a denoiser to a denoiser, so that solvers need not know of them."""

from diffjax.guidance.base import Guide
from diffjax.guidance.classifier import (
    CarriedClassifier,
    ClassifierGuidance,
    ClassifierGuided,
    NoisyClassifier,
    class_score,
    make_classifier,
)

__all__ = [
    "CarriedClassifier",
    "ClassifierGuidance",
    "ClassifierGuided",
    "Guide",
    "NoisyClassifier",
    "class_score",
    "make_classifier",
]
