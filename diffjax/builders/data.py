"""The data of a config."""

from collections.abc import Callable
from typing import Any, NamedTuple

from diffjax.builders.make import BuildError, make
from diffjax.builders.model import image_size

# Fields of the data section that say what is done with a batch; the others choose the source.
_PREPROCESSING = (
    "image_size",
    "num_channels",
    "levels",
    "centered",
    "random_flip",
    "augment",
    "uniform_dequantization",
    "train_split",
    "eval_split",
    "workers",
    "ahead",
    "placed",
)


class Reading(NamedTuple):
    """How batches are read ahead in training.

    workers: processes that make batches, 0 for a thread of this one. ahead: batches that each has
    ready. placed: groups of `n_jitted_steps` batches on the devices beside the one in use.
    """

    workers: int = 0
    ahead: int = 2
    placed: int = 1


def build_reading(config: Any) -> Reading:
    """`config.data.workers`, `ahead` and `placed`. Raises BuildError for values out of range."""
    found = Reading(*(config.data.get(k, v) for k, v in Reading()._asdict().items()))
    for name, value in found._asdict().items():
        least = 1 if name == "ahead" else 0
        if not isinstance(value, int) or value < least:
            raise BuildError(
                f"config.data.{name} must be a whole number from {least} on; got {value!r}."
            )
    return found


def build_source(config: Any, split: str) -> Any:
    """The source of a split, "train" or "eval", held in memory where that saves decoding.

    Raises BuildError where the data are not what the config says.
    """
    from diffjax import data

    levels = config.data.levels

    def tfds(dataset: str, split: str, **options: Any) -> Any:
        return data.tfds_source(dataset, split, levels=levels, **options)

    def npz(train_path: str, eval_path: str, split: str) -> Any:
        path = train_path if split == config.data.train_split else eval_path
        return data.array_source(path, levels=levels)

    def folder(train_path: str, eval_path: str, split: str, **options: Any) -> Any:
        path = train_path if split == config.data.train_split else eval_path
        return data.folder_source(path, **options)

    families: dict[str, Callable[..., Any]] = {
        "digits": data.digits_source,
        "tfds": tfds,
        "npz": npz,
        "folder": folder,
    }
    chosen = {"train": config.data.train_split, "eval": config.data.eval_split}[split]
    section = {k: v for k, v in dict(config.data).items() if k not in _PREPROCESSING}
    source = make(families, section, "data", split=chosen)
    expected = (*image_size(config.data.image_size), config.data.num_channels)
    info = source.info
    if tuple(info.shape) != expected or info.levels != config.data.levels:
        raise BuildError(
            f"config.data says images of shape {expected} with {config.data.levels} levels; "
            f"{info.name} has {tuple(info.shape)} with {info.levels}. Set image_size, "
            "num_channels and levels to the data's."
        )
    return source
