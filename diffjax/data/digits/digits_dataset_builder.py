"""The tfds builder of the digits; tfds names a set after the package that holds its module."""

from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds


def is_test(labels: np.ndarray) -> np.ndarray:
    """Which images are test images, (N,) bool, by the rule of the package's docstring."""
    test = np.zeros(len(labels), bool)
    test[np.argsort(labels, kind="stable")[::5]] = True
    return test


class Builder(tfds.core.GeneratorBasedBuilder):
    """Builds train and test from scikit-learn's copy. Needs neither TensorFlow nor network."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release: 1,437 training and 360 test images."}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits, 8 x 8 pixels with values 0 to 16.",
            # A plain tensor and not an Image: encoding PNGs in tfds would import TensorFlow.
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://doi.org/10.24432/C50P49",
            disable_shuffling=True,  # the order on disk is scikit-learn's
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager
        return {
            "train": self._generate_examples(test=False),
            "test": self._generate_examples(test=True),
        }

    def _generate_examples(self, test: bool) -> Iterator[tuple[int, dict]]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        for i in np.flatnonzero(is_test(digits.target) == test):
            image = digits.images[i].astype(np.uint8)[..., None]
            yield int(i), {"image": image, "label": int(digits.target[i])}
