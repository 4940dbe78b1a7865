"""The data sections of the published configs.

CIFAR-10, CelebA and LSUN come through tfds; a folder of image files takes the place of the record
files that the reference code reads FFHQ and CelebA-HQ from. Say where it is:
`--config.data.train_path=... --config.data.eval_path=...`; the reference evaluates these two on the
training images. Data lie in [-1, 1]; for the VE SDE set `centered = False`, which means [0, 1].
"""

from ml_collections import ConfigDict

_COMMON = {
    "num_channels": 3,
    "levels": 256,
    "centered": True,
    "random_flip": True,
    "uniform_dequantization": False,
}


def cifar10() -> ConfigDict:
    """CIFAR-10: 50,000 and 10,000 images of 32 x 32 pixels."""
    return _tfds("cifar10", "test", 32)


def celeba() -> ConfigDict:
    """CelebA: the middle 140 x 140 pixels, shrunk to 64 x 64."""
    data = _tfds("celeb_a", "validation", 64)
    data.update({"crop": 140, "size": 64})
    return data


def lsun(category: str, image_size: int = 256) -> ConfigDict:
    """A category of LSUN: the largest centred square, shrunk."""
    data = _tfds(f"lsun/{category}", "validation", image_size)
    data.size = image_size
    return data


def imagenet(image_size: int = 64) -> ConfigDict:
    """ImageNet with its 1,000 classes: the largest centred square, shrunk."""
    data = _tfds("imagenet2012", "validation", image_size)
    data.size = image_size
    return data


def folder(name: str, image_size: int) -> ConfigDict:
    """Image files below a folder `name`, for training and evaluation."""
    return ConfigDict(
        {
            "name": "folder",
            "train_path": name,
            "eval_path": name,
            "train_split": "train",
            "eval_split": "eval",
            "size": image_size,
            "image_size": image_size,
            "labels": False,
            **_COMMON,
        }
    )


def latents(image_size: int) -> ConfigDict:
    """Arrays of latents, (image_size, image_size, 4), in an `.npz`: shapes only as yet."""
    return ConfigDict(
        {
            "name": "npz",
            "train_path": "latents.npz",
            "eval_path": "latents.npz",
            "train_split": "train",
            "eval_split": "eval",
            "image_size": image_size,
            **_COMMON,
            "num_channels": 4,
        }
    )


def _tfds(dataset: str, eval_split: str, image_size: int) -> ConfigDict:
    return ConfigDict(
        {
            "name": "tfds",
            "dataset": dataset,
            "train_split": "train",
            "eval_split": eval_split,
            "image_size": image_size,
            **_COMMON,
        }
    )
