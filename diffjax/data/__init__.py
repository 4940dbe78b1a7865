"""Data: sources with random access, batches that depend on (seed, step) only, device transforms.

    source = digits_source("train")                                # or tfds, folder, array
    for batch in prefetch(TrainBatches(source, batch_size=128, seed=0)):
        x0 = model_input(key, batch["image"], Quantisation(source.info.levels), flip=True)

Importing this needs no data package; each is imported where it is used (`pip install
'diffjax[data]'`), and none of them imports TensorFlow.
"""

from diffjax.data.augment import Augment
from diffjax.data.pipeline import Batches, EvalBatches, TrainBatches, placed_ahead, prefetch
from diffjax.data.prepared import TfdsSource, digits_source, tfds_source
from diffjax.data.sources import (
    ArraySource,
    DataInfo,
    Example,
    FolderSource,
    RecordError,
    Source,
    array_source,
    folder_source,
    in_memory,
)
from diffjax.data.transforms import model_input, random_flip

__all__ = [
    "ArraySource", "Augment", "Batches", "DataInfo", "EvalBatches", "Example", "FolderSource",
    "RecordError", "Source", "TfdsSource", "TrainBatches", "array_source", "digits_source",
    "folder_source", "in_memory", "model_input", "placed_ahead", "prefetch", "random_flip",
    "tfds_source",
]  # fmt: skip
