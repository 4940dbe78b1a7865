"""Sources over prepared TensorFlow Datasets: ArrayRecord files, read without TensorFlow.

`tensorflow_datasets` keeps each set in a directory that is prepared once. Reading one needs neither
TensorFlow nor a download; preparing most sets needs both, so it is never done here behind the
user's back: the error says the command. The digits are the exception: they ship inside
scikit-learn, and `digits_source` prepares them at first use.
"""

import dataclasses
import difflib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from diffjax.core.checks import at_least
from diffjax.data.extras import require
from diffjax.data.images import Size, as_size, fit
from diffjax.data.sources import ArraySource, DataInfo, Example, checked_example, in_memory

Directory = str | os.PathLike


@dataclasses.dataclass(frozen=True, eq=False)
class TfdsSource:
    """Records of a prepared split; built by `tfds_source`."""

    info: DataInfo
    records: Sequence[dict[str, Any]] = dataclasses.field(repr=False)
    image_key: str
    label_key: str | None
    size: Size | None = None
    crop: int | None = None

    def __len__(self) -> int:
        return self.info.size

    def __getitem__(self, index: int) -> Example:
        record = self.records[index]
        image = record[self.image_key]
        if self.size is not None or self.crop is not None:
            image = fit(image, self.size, self.crop)
        label = None if self.label_key is None else record[self.label_key]
        return checked_example(self.info, image, label, f"{self.info.name}[{index}]")


def tfds_source(
    name: str,
    split: str,
    data_dir: Directory | None = None,
    *,
    image_key: str = "image",
    label_key: str | None = "label",
    size: int | Size | None = None,
    crop: int | None = None,
    levels: int = 256,
) -> TfdsSource:
    """A source over one split of any prepared tfds set with images.

    name: as tfds spells it, "cifar10", "lsun/bedroom", "celeb_a:2.1.0". split: any tfds split,
    also "test[:1000]" or "train+test". data_dir: where sets are kept; None is tfds's own default
    ($TFDS_DATA_DIR, else ~/tensorflow_datasets). label_key: a ClassLabel feature, or None for a
    set without classes. size, crop: see `diffjax.data.images`; needed where sizes differ.

    Raises ValueError for an unknown set, split or key, and for a set that is not prepared as
    random-access files, with the command that prepares it.
    """
    tfds = require("tensorflow_datasets")
    # tfds expects str or its own path type, and expands "~" in neither.
    data_dir = None if data_dir is None else os.path.expanduser(os.fspath(data_dir))
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        near = difflib.get_close_matches(
            name.split("/")[0], tfds.list_builders(with_community_datasets=False)
        )
        raise ValueError(
            f"There is no tfds data set {name!r}, neither known by name nor prepared in "
            f"{data_dir or 'the default data_dir'}; near names: {', '.join(near) or 'none'}. "
            "tfds.list_builders() lists them all."
        ) from error
    if not (builder.data_path / "dataset_info.json").exists():
        raise ValueError(
            f"The tfds data set {name!r} is not prepared in {builder.data_dir}. Preparing it may "
            f"download and needs TensorFlow, once; reading does not. {_how_to_prepare(name)}"
        )
    return source_of_builder(
        builder, split, image_key=image_key, label_key=label_key, size=size, crop=crop,
        levels=levels,
    )  # fmt: skip


def digits_source(split: str, data_dir: Directory | None = None) -> ArraySource:
    """The 8 x 8 handwritten digits of scikit-learn, 17 levels, 10 classes, held in memory (92 kB).

    split: "train" (1,437 images), "test" (360) or any tfds split of them. data_dir: where the
    ArrayRecord files are kept; None is tfds's own default. They are prepared at first use, without
    TensorFlow or network. See `diffjax.data.digits` for the data and the rule of the split.
    """
    tfds = require("tensorflow_datasets")
    from diffjax.data.digits.prepare import prepare  # imports tfds

    builder = tfds.builder_from_directory(prepare(data_dir))
    return in_memory(source_of_builder(builder, split, levels=17))


def source_of_builder(
    builder: Any,
    split: str,
    *,
    image_key: str = "image",
    label_key: str | None = "label",
    size: int | Size | None = None,
    crop: int | None = None,
    levels: int = 256,
) -> TfdsSource:
    """A source over one split of a prepared tfds builder: what `tfds_source` does after finding it.

    Raises ValueError for an unknown split or key and for files without random access.
    """
    tfds = require("tensorflow_datasets")
    size = as_size(size)
    if crop is not None:
        at_least("crop", crop, 1)
    features = builder.info.features
    for argument, key in (("image_key", image_key), ("label_key", label_key)):
        if key is not None and key not in features:
            raise ValueError(
                f"{argument} must name a feature of {builder.info.full_name}; got {key!r}, and it "
                f"has {', '.join(map(repr, features))}. label_key=None reads without labels."
            )
    try:
        records = builder.as_data_source(split)
    except NotImplementedError as error:
        raise ValueError(
            f"{builder.info.full_name} in {builder.data_dir} is stored as "
            f"{builder.info.file_format.value}, which has no random access. Prepare it as "
            f"array_record in another data_dir. {_how_to_prepare(builder.info.full_name)}"
        ) from error
    num_classes = None
    if label_key is not None:
        if not isinstance(features[label_key], tfds.features.ClassLabel):
            raise ValueError(
                f"label_key must name a ClassLabel; {label_key!r} of {builder.info.full_name} is "
                f"{features[label_key]}. label_key=None reads without labels."
            )
        num_classes = features[label_key].num_classes
    info = DataInfo(
        name=f"{builder.info.full_name}:{split}",
        shape=_shape(builder, features[image_key], image_key, size, crop),
        levels=levels,
        num_classes=num_classes,
        size=len(records),
    )
    return TfdsSource(info, records, image_key, label_key, size, crop)


def _shape(
    builder: Any, feature: Any, key: str, size: Size | None, crop: int | None
) -> tuple[int, int, int]:
    """(H, W, C) from the feature's declaration and what fitting makes of it."""
    declared = feature.shape
    if len(declared) != 3 or declared[2] is None or feature.np_dtype != np.uint8:
        raise ValueError(
            f"image_key must name uint8 images (H, W, C); {key!r} of {builder.info.full_name} is "
            f"{feature}."
        )
    window = declared[:2] if crop is None else (crop, crop)
    height, width = window if size is None else size
    if height is None or width is None:
        raise ValueError(
            f"The images of {builder.info.full_name} have many sizes. Pass size= to fit them to "
            "one, or crop= to cut one from each."
        )
    return height, width, declared[2]


def _how_to_prepare(name: str) -> str:
    """The commands, through tfds's Python interface: its own command needs Apache Beam as well."""
    return (
        "Run: pip install 'diffjax[prepare]'; python -c \"import tensorflow_datasets as tfds; "
        f"tfds.builder('{name}', data_dir='<where>', file_format='array_record')"
        '.download_and_prepare()". Then pass that data_dir.'
    )
