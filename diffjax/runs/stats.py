"""Reference statistics of a data set in the features of a network, and the files that keep them.

A file is an `.npz` with `mu` (F,) and `sigma` (F, F), the mean and the unbiased covariance in
float64, under the names that published statistics use; `count`; `provenance`, which says of what
they are; and, where asked, `features` (count, F) for the metrics that need neighbours or kernels.
They are of the whole split in its stored order, the last, shorter batch included, without mirroring
and without dequantisation.
"""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffjax import builders
from diffjax.metrics import frechet
from diffjax.runs import hosts
from diffjax.runs.extractors import Extractor, write_npz
from diffjax.runs.gather import Gathered, gather
from diffjax.runs.workdir import RunError
from diffjax.version import __version__

# What must agree between two sets of features that are compared.
MUST_AGREE = ("features", "weights_sha256", "input", "levels")


class Statistics(NamedTuple):
    """Mean (F,) and covariance (F, F) of `num` images; their features (num, F) or None."""

    mean: np.ndarray
    cov: np.ndarray
    num: int | None
    provenance: dict[str, Any]
    features: np.ndarray | None


class SourceBatches:
    """A whole split in its order, as (images, mask)."""

    def __init__(self, source: Any, batch_size: int):
        from diffjax.data import EvalBatches

        self._batches = EvalBatches(source, batch_size)

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        batch = self._batches[index]
        return batch["image"], batch["mask"]


def of_split(
    config: Any,
    split: str,
    extractor: Extractor,
    *,
    keep: bool = False,
    batch_size: int | None = None,
    folder: Path | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Statistics:
    """The statistics of a config's "train" or "eval" split; going on from `folder` where stopped.

    keep: with the features.
    """
    source = builders.build_source(config, split)
    about = {
        "dataset": source.info.name,
        "split": split,
        "image_shape": list(source.info.shape),
        "range": f"levels 0 to {source.info.levels - 1} as 0 to 255",
    }
    size = min(len(source), batch_size or config.eval.batch_size)
    gathered = gather(
        extractor,
        SourceBatches(source, size),
        total=len(source),
        keep=keep,
        folder=folder,
        fingerprint=about | {"batch_size": size, "extractor": extractor.provenance},
        progress=progress,
    )
    return summary(gathered, extractor.provenance | about)


def summary(gathered: Gathered, about: dict[str, Any]) -> Statistics:
    """Mean and covariance of gathered features, with what is known of the images."""
    mean, cov = frechet.gaussian("of the images", gathered.moments)
    provenance = about | {
        "count": gathered.num,
        "images_sha256_sum": gathered.digest,
        "diffjax": __version__,
    }
    return Statistics(mean, cov, gathered.num, provenance, gathered.features)


def write_stats(path: str | Path, stats: Statistics) -> None:
    """Writes an `.npz`, whole or not at all; of several processes the first does."""
    if not hosts.is_first():
        return
    arrays: dict[str, Any] = {
        "mu": stats.mean,
        "sigma": stats.cov,
        "count": np.asarray(stats.num),
        "provenance": json.dumps(stats.provenance),
    }
    if stats.features is not None:
        arrays["features"] = stats.features
    write_npz(path, arrays)


def read_stats(path: str | Path, extractor: Extractor) -> Statistics:
    """Statistics from a file, made with this extractor.

    A file without provenance (the published ones have `mu` and `sigma` alone) is taken on trust,
    and its provenance says so. Raises RunError for a file of another network, input or number of
    features.
    """
    path = Path(path)
    if not path.is_file():
        raise RunError(f"There is no file {path}. `diffjax evaluate stats` writes one.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            mean, cov = archive["mu"], archive["sigma"]
            count = int(archive["count"]) if "count" in archive else None
            features = archive.get("features")
            known = json.loads(str(archive["provenance"])) if "provenance" in archive else None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise RunError(f"{path} is no file of statistics ({error}); make one anew.") from error
    if known is None:
        known = {"features": "unknown: the file does not say", "dataset": path.name}
    else:
        differing = [k for k in MUST_AGREE if known.get(k) != extractor.provenance.get(k)]
        if differing:
            was = {k: known.get(k) for k in differing}
            now = {k: extractor.provenance.get(k) for k in differing}
            raise RunError(f"{path} was made with {was}; this run has {now}. Make it anew.")
    width = extractor.sizes[0]
    if mean.shape != (width,) or cov.shape != (width, width):
        raise RunError(
            f"{path} holds {mean.shape} means and {cov.shape} covariances; {extractor.name} has "
            f"{width} features."
        )
    return Statistics(mean, cov, count, known, features)
