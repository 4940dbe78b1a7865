"""How good samples and models are: streamed moments, Fréchet distance, a judge, plain figures.

The moments of a stream are used through their module, as `moments.zeros`, `moments.update`,
`moments.merge`, `moments.mean` and `moments.cov`.
"""

from diffjax.metrics import moments
from diffjax.metrics.classifier import Classifier, train_classifier
from diffjax.metrics.frechet import (
    SplitReference,
    frechet_distance,
    gaussian_distance,
    split_reference,
)
from diffjax.metrics.quality import (
    BitsPerDim,
    class_shares,
    histogram_bits_per_dim,
    nearest_distance,
    recognised_share,
)

__all__ = [
    "BitsPerDim",
    "Classifier",
    "SplitReference",
    "class_shares",
    "frechet_distance",
    "gaussian_distance",
    "histogram_bits_per_dim",
    "moments",
    "nearest_distance",
    "recognised_share",
    "split_reference",
    "train_classifier",
]
