"""How good samples and models are: distances in features, scores, neighbours, plain figures.

What is summed over a stream is used through its module: `moments.zeros`, `moments.update`,
`moments.merge`, `moments.mean` and `moments.cov`; `classifier_score.zeros`, `.update`, `.merge` and
`.score`. What compares two kept sets of features is in `kernel` and `neighbours`. The networks that
make features are `inception.Inception` (FID's) and `feature_net.FeatureNet` (trained here).
"""

from diffjax.metrics import classifier_score, feature_net, inception, kernel, moments, neighbours
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
    "classifier_score",
    "feature_net",
    "frechet_distance",
    "gaussian_distance",
    "histogram_bits_per_dim",
    "inception",
    "kernel",
    "moments",
    "nearest_distance",
    "neighbours",
    "recognised_share",
    "split_reference",
    "train_classifier",
]
