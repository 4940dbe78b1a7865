"""Sources: data sets with random access, read one example at a time.

An example is {"image": uint8 (H, W, C), "label": int32 scalar}; the label is absent from data
without classes. Pixels are levels 0 ... levels - 1 and stay uint8 until they are on the device.

`array_source` holds arrays or an `.npz`, `folder_source` reads image files as they are asked for,
`diffjax.data.prepared` reads TensorFlow Datasets, and any object with the methods of `Source` will
do. Worker processes receive the source by pickle.
"""

import dataclasses
import os
import zipfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from diffjax.core.checks import at_least, in_range
from diffjax.data.images import Size, as_size, fit, read_image

Example = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """What is known of a data set before reading it.

    name: for messages, and to recognise the data when training resumes. shape: (H, W, C).
    levels: the number of values a pixel can take, 2 to 256. num_classes: None without labels.
    size: the number of examples.
    """

    name: str
    shape: tuple[int, int, int]
    levels: int
    num_classes: int | None
    size: int

    def __post_init__(self):
        in_range("levels", self.levels, 2, 256)
        if self.size < 1:
            raise ValueError(f"A source must hold at least one example; {self.name!r} is empty.")


class RecordError(ValueError):
    """An example that cannot be read; the message names it."""


class Source(Protocol):
    """Random access to examples: what the loader reads."""

    @property
    def info(self) -> DataInfo:
        """What is known without reading."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


def read(source: Source, index: int) -> Example:
    """The example. Raises RecordError, naming it, whatever the source raises."""
    try:
        return source[index]
    except Exception as error:  # a damaged record raises what its reader likes
        cause = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise RecordError(
            f"Example {index} of {source.info.name!r} cannot be read: {cause}. Restore the data "
            "and start again; training goes on from its last save."
        ) from error


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource:
    """Examples held in memory; built by `array_source` and `in_memory`."""

    info: DataInfo
    images: np.ndarray = dataclasses.field(repr=False)
    labels: np.ndarray | None = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return self.info.size

    def __getitem__(self, index: int) -> Example:
        return _example(self.images[index], None if self.labels is None else self.labels[index])


def array_source(
    images: np.ndarray | str | os.PathLike,
    labels: np.ndarray | None = None,
    *,
    levels: int = 256,
    name: str | None = None,
) -> ArraySource:
    """A source over arrays, or over an `.npz` file with the keys `images` and, if any, `labels`.

    images: uint8 (N, H, W, C), values below `levels`; or the file's path. labels: integers (N,)
    from 0; with a path they come from the file. name: the file's name, else "array".
    Raises ValueError or TypeError for a missing or foreign file, wrong shapes, types or values.
    """
    if isinstance(images, (str, os.PathLike)):
        if labels is not None:
            raise ValueError("labels come from the .npz file itself; pass arrays to give others.")
        path = Path(images)
        images, labels = _read_npz(path)
        name = name or path.name
    name = name or "array"
    images = np.asarray(images)
    if images.dtype != np.uint8:
        raise TypeError(
            f"Images of {name!r} must be uint8 levels; got {images.dtype}. Quantise them first: "
            "diffjax.core.quantise.Quantisation().from_model(x) does for x in [-1, 1]."
        )
    if images.ndim != 4:
        raise ValueError(
            f"Images of {name!r} must have shape (N, H, W, C); got {images.shape}. Grey images "
            "need a last axis of length 1: images[..., None]."
        )
    num_classes = None
    if labels is not None:
        labels = _checked_labels(np.asarray(labels), images, name)
        num_classes = int(labels.max()) + 1 if len(labels) else 0
    height, width, channels = images.shape[1:]
    info = DataInfo(name, (height, width, channels), levels, num_classes, len(images))
    if levels < 256:
        _check_levels(images, info)
    return ArraySource(info, images, labels)


def in_memory(source: Source) -> ArraySource:
    """Reads a whole source once and holds it: CIFAR-10 takes 154 MB and then costs no decoding."""
    examples = [read(source, i) for i in range(len(source))]
    images = np.stack([example["image"] for example in examples])
    labels = None
    if source.info.num_classes is not None:
        labels = np.stack([example["label"] for example in examples])
    return ArraySource(source.info, images, labels)


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource:
    """Image files decoded when they are asked for; built by `folder_source`."""

    info: DataInfo
    paths: tuple[Path, ...] = dataclasses.field(repr=False)
    labels: tuple[int, ...] | None = dataclasses.field(repr=False)
    channels: int | None = None
    size: Size | None = None
    crop: int | None = None

    def __len__(self) -> int:
        return self.info.size

    def __getitem__(self, index: int) -> Example:
        path = self.paths[index]
        image = fit(read_image(path, self.channels), self.size, self.crop)
        return checked_example(
            self.info, image, None if self.labels is None else self.labels[index], str(path)
        )


def folder_source(
    directory: str | os.PathLike,
    *,
    size: int | Size | None = None,
    crop: int | None = None,
    channels: int | None = None,
    labels: bool = True,
    suffixes: tuple[str, ...] = (".png", ".jpg", ".jpeg"),
) -> FolderSource:
    """A source over the image files below a directory, in the order of their relative paths.

    With sub-folders the label is the place of the top-level sub-folder among their sorted names;
    without, or with `labels=False`, there are none. Names that start with a dot are skipped.
    size, crop: see `diffjax.data.images`; without them all images must have one size.
    channels: 1, 3 or 4 converts every image; None asks that all have those of the first.
    Only the first image is read here. Raises ValueError for a missing directory, one without
    images, or images both beside and inside sub-folders; and when read, for one that differs.
    """
    root = Path(directory)
    size = as_size(size)
    if crop is not None:
        at_least("crop", crop, 1)
    paths = _image_paths(root, suffixes)
    classes, ids = _folder_classes(root, paths) if labels else (None, None)
    first = fit(read_image(root / paths[0], channels), size, crop)
    height, width, depth = first.shape
    info = DataInfo(
        name=root.resolve().name,
        shape=(height, width, depth),
        levels=256,
        num_classes=None if classes is None else len(classes),
        size=len(paths),
    )
    return FolderSource(info, tuple(root / p for p in paths), ids, channels, size, crop)


def checked_example(
    info: DataInfo, image: np.ndarray, label: int | np.integer | None, where: str
) -> Example:
    """An example that fits `info`. Raises ValueError or TypeError naming `where` otherwise."""
    if image.dtype != np.uint8:
        raise TypeError(f"Images must be uint8 levels; {where} has {image.dtype}.")
    if image.shape != info.shape:
        raise ValueError(
            f"All images of a source must have one shape; {where} has {image.shape} where the "
            f"source has {info.shape}. Pass size= (and channels= for a folder) to fit them."
        )
    if info.levels < 256:
        _check_levels(image, info)
    return _example(image, label)


def _example(image: np.ndarray, label: Any) -> Example:
    example = {"image": image}
    if label is not None:
        example["label"] = np.asarray(label, np.int32)
    return example


def _check_levels(images: np.ndarray, info: DataInfo) -> None:
    if images.size and images.max() >= info.levels:
        raise ValueError(
            f"Pixels of {info.name!r} must lie below its {info.levels} levels; got "
            f"{images.max()}. Pass the right number of levels."
        )


def _checked_labels(labels: np.ndarray, images: np.ndarray, name: str) -> np.ndarray:
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"Labels of {name!r} must be integers; got {labels.dtype}.")
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"Labels of {name!r} must be one an image, {images.shape[:1]}; got {labels.shape}."
        )
    if labels.size and labels.min() < 0:
        raise ValueError(f"Labels of {name!r} must count from 0; got {labels.min()}.")
    return labels.astype(np.int32)


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The arrays `images` and `labels` (or None) of an .npz file."""
    if not path.is_file():
        raise ValueError(f"There is no file {path}. Give the path of an .npz file.")
    try:
        archive = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as an .npz file ({error}).") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError(f"{path} must be an .npz archive; it holds one bare array.")
    with archive:
        if "images" not in archive:
            raise ValueError(
                f"An .npz of images must have the key 'images'; {path} has {sorted(archive)}. "
                "Write it with np.savez(path, images=..., labels=...)."
            )
        return archive["images"], archive.get("labels")


def _image_paths(root: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The images below root as relative paths, sorted by their text, the same on every machine."""
    if not root.is_dir():
        raise ValueError(f"There is no directory {root}. Give the path of a folder of images.")
    found = []
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [
            Path(folder, name).relative_to(root)
            for name in files
            if name.lower().endswith(suffixes) and not name.startswith(".")
        ]
    if not found:
        raise ValueError(
            f"{root} must hold at least one image ({', '.join(suffixes)}); found none in it or "
            "its sub-folders. Check the path, or pass suffixes=."
        )
    return sorted(found, key=Path.as_posix)


def _folder_classes(
    root: Path, paths: list[Path]
) -> tuple[list[str] | None, tuple[int, ...] | None]:
    """The sorted names of the top-level sub-folders and each path's place among them."""
    loose = [p for p in paths if len(p.parts) == 1]
    if len(loose) == len(paths):
        return None, None
    if loose:
        raise ValueError(
            f"Images must lie all beside or all inside sub-folders, which give their labels; "
            f"{root} has {len(loose)} beside (as {loose[0]}) and {len(paths) - len(loose)} inside. "
            "Move them, or pass labels=False."
        )
    names = sorted({p.parts[0] for p in paths})
    ids = {name: i for i, name in enumerate(names)}
    return names, tuple(ids[p.parts[0]] for p in paths)
