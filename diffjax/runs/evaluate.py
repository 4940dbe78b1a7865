"""Measuring a trained model: `evaluate(workdir, metrics)`. Each metric is one file of eval/.

    loss      the training loss of held-out images with the averaged weights
    bpd       bits/dim of held-out images over the data's levels by the probability flow, beside
              log2(levels) and a histogram for each pixel
    bound     the variational bound on the same, in bits/dim
    fid       Fréchet distance of samples to the training split in FID's Inception features
    is        Inception Score of samples
    kid       kernel distance in Inception's features
    pr        precision, recall, density and coverage, by nearest neighbours of features
    frechet   Fréchet distance in the features of a small network trained here, named with the
              figure; not comparable with a FID
    accuracy  of a classifier of noisy images (loss.name = "classification"), against time
    quality   share of samples that a small classifier recognises, shares of the classes, distance
              to the nearest training image; each beside the held-out images' own

Every figure says how many images and which weights, seed and sampler are behind it. Samples are
drawn in batches; what was gathered of them, for frechet and quality by the small classifier the
samples themselves, is saved below eval/partial until all metrics are done, so that an evaluation
that was stopped goes on.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from diffjax import builders
from diffjax.core.files import write_atomic
from diffjax.runs import classifiers, hosts, judges, likelihoods
from diffjax.runs.evaluation import Evaluation, Figures
from diffjax.runs.model import Model, load
from diffjax.runs.shards import Stored
from diffjax.runs.workdir import RunError, read_config

METRICS: dict[str, Callable[[Evaluation], Figures]] = {
    "loss": likelihoods.loss,
    "bpd": likelihoods.bpd,
    "bound": likelihoods.bound,
    "fid": judges.fid,
    "is": judges.inception_score,
    "kid": judges.kid,
    "pr": judges.precision_recall,
    "frechet": judges.frechet_distance,
    "quality": judges.sample_quality,
}
OF_SAMPLES = ("fid", "is", "kid", "pr", "frechet", "quality")
# These keep features, so they come first: one pass over the samples then serves all.
_FIRST = ("kid", "pr")


def evaluate(
    workdir: str | Path,
    metrics: Sequence[str] = ("loss", "bpd"),
    *,
    step: int | None = None,
    ema: str = "main",
    samples: str | Path | None = None,
    mesh: Mesh | None = None,
    **options: Any,
) -> dict[str, Figures]:
    """Measures a checkpoint (the newest by default) and writes eval/<metric>.json for each metric.

    ema: which of its averages of the weights, "main" or a name in config.ema.others. samples: an
    `.npz` with `images`, or a folder of shards, to judge instead of drawing. mesh: of the model, as
    of `load`. options: those of `Evaluation`.

    A process computes on all its devices. Of several processes each gathers its share of the images
    for fid, is, kid, pr, frechet and quality; all find the same, and the first writes.
    Raises RunError for an unknown metric, samples that do not fit, and for a metric whose network
    is missing.
    """
    names = {**METRICS, **classifiers.METRICS}
    unknown = [m for m in metrics if m not in names]
    if unknown or not metrics:
        raise RunError(f"Unknown metrics {unknown}; choose among {', '.join(names)}.")
    if builders.is_classifier(read_config(workdir)):
        return classifiers.evaluate(workdir, metrics, step=step, ema=ema, mesh=mesh, **options)
    model = load(workdir, step=step, ema=ema, mesh=mesh)
    given = None if samples is None else _read_samples(samples, model)
    folder = Path(workdir) / "eval"
    run = Evaluation(model, samples=given, folder=folder, **options)
    if "accuracy" in metrics:
        raise RunError("The metric accuracy is a classifier's; this run is a model of images.")
    found: dict[str, Figures] = {name: {} for name in metrics}
    for name in sorted(metrics, key=lambda name: name not in _FIRST):
        figures = METRICS[name](run) | {"step": model.step, "ema": ema, "seed": run.seed}
        if samples is not None and name in OF_SAMPLES:
            figures["judged"] = str(samples)
        if hosts.is_first():
            write_atomic(folder / f"{name}.json", json.dumps(figures, indent=2) + "\n")
        found[name] = figures
    shutil.rmtree(folder / "partial", ignore_errors=True)
    return found


def _read_samples(path: str | Path, model: Model) -> np.ndarray | Stored:
    """Images of an `.npz` or in shards. Raises RunError where they are not this model's kind."""
    from diffjax.data import array_source

    levels = model.parts.quantisation.levels
    images: np.ndarray | Stored
    if Path(path).is_dir():
        images = Stored(path)
        shape, found = images.shards.shape, images.shards.levels
        if found != levels:
            raise RunError(f"{path} holds images of {found} levels; the model's have {levels}.")
    else:
        try:
            source = array_source(path, levels=levels)
        except (ValueError, TypeError) as error:
            raise RunError(f"The samples do not fit: {error}") from error
        images, shape = source.images, source.info.shape
    if tuple(shape) != tuple(model.parts.image_shape):
        raise RunError(
            f"{path} holds images of shape {tuple(shape)}; the model's are "
            f"{model.parts.image_shape}."
        )
    return images
