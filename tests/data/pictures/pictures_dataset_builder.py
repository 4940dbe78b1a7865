"""A tiny tfds set of PNGs of unequal sizes, as image sets are declared: (None, None, 3)."""

import io

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds


def picture(i: int) -> np.ndarray:
    """Picture i: noise of (8 + i) x 9 pixels."""
    return np.random.default_rng(i).integers(0, 256, (8 + i, 9, 3), dtype=np.uint8)


class Builder(tfds.core.GeneratorBasedBuilder):
    """Four pictures in two classes."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.ClassLabel(num_classes=2),
                    "height": tfds.features.Scalar(np.int64),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(4):
            file = io.BytesIO()
            PIL.Image.fromarray(picture(i)).save(file, "PNG")
            file.seek(0)
            yield i, {"image": file, "label": i % 2, "height": 8 + i}
