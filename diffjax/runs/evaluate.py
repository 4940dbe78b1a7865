"""Measuring a trained model: `evaluate(workdir, metrics)`. Each metric is one file of eval/.

    loss      the training loss of held-out images with the averaged weights
    bpd       bits/dim of held-out images over the data's levels by the probability flow, beside
              log2(levels) and a histogram for each pixel
    bound     the variational bound on the same, in bits/dim
    frechet   Fréchet distance in the features of a small classifier trained here, beside that of
              real images against real images; not comparable with a FID
    quality   share of samples that this classifier recognises, shares of the classes, distance to
              the nearest training image; each beside the held-out images' own

Every figure says how many images and which weights, seed and sampler are behind it.
"""

import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import builders
from diffjax.core.files import write_atomic
from diffjax.likelihood import variational_bound
from diffjax.metrics import classifier, frechet, moments, quality
from diffjax.runs.model import Model, load
from diffjax.runs.workdir import RunError
from diffjax.solvers.adaptive import PIController

Figures = dict[str, Any]


class Evaluation:
    """What metrics share, made once when first asked for: images, samples, the judge.

    seed: of everything drawn here. num: images to sample. limit: held-out images for likelihoods.
    samples: uint8 levels to judge instead of drawing them.
    """

    def __init__(
        self,
        model: Model,
        *,
        seed: int = 0,
        num: int | None = None,
        limit: int | None = None,
        samples: np.ndarray | None = None,
        **sampling: Any,
    ):
        self.model = model
        self.key = jax.random.key(seed)
        self.seed = seed
        self.num = num or model.config.eval.num_samples
        self.limit = limit
        self.sampling = sampling
        self._samples = samples
        self._cache: dict[str, Any] = {}

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._cache:
            self._cache[name] = make()
        return self._cache[name]

    def real(self, split: str) -> tuple[np.ndarray, np.ndarray | None]:
        """(images, labels or None) of "train" or "eval", uint8 levels."""
        from diffjax.data import in_memory

        def read():
            held = in_memory(builders.build_source(self.model.config, split))
            return held.images, held.labels

        return self._once(split, read)

    def heldout(self) -> np.ndarray:
        """The held-out images of the likelihoods, the first `limit` of them."""
        return self.real("eval")[0][: self.limit]

    def samples(self) -> np.ndarray:
        """The samples to judge, uint8 levels."""

        def draw():
            labels = None
            if self.model.parts.num_classes is not None:
                labels = np.arange(self.num) % self.model.parts.num_classes
            key = jax.random.fold_in(self.key, 1)
            return self.model.sample(key, self.num, labels=labels, **self.sampling)

        return self._samples if self._samples is not None else self._once("samples", draw)

    def centred(self, images: np.ndarray) -> jax.Array:
        """Levels in [-1, 1], whatever the model's own range: what the judge sees."""
        levels = self.model.parts.quantisation.levels
        return jnp.asarray(images, jnp.float32) * (2 / (levels - 1)) - 1

    def judge(self) -> classifier.Classifier:
        """A classifier of the training split. Raises RunError for data without labels."""

        def train():
            images, labels = self.real("train")
            if labels is None:
                raise RunError("The metrics frechet and quality need labelled training images.")
            fit = jax.jit(classifier.train_classifier, static_argnames="num_classes")
            return fit(
                jax.random.fold_in(self.key, 2),
                self.centred(images),
                jnp.asarray(labels),
                num_classes=int(labels.max()) + 1,
            )

        return self._once("judge", train)


def loss(run: Evaluation) -> Figures:
    """The mean training loss over the held-out images and its standard error."""
    from diffjax.data import EvalBatches

    config = run.model.config
    loss_fn = jax.jit(builders.build_loss(config, run.model.parts, train=False))
    source = builders.build_source(config, "eval")
    key = jax.random.fold_in(run.key, 3)
    values = []
    batches = EvalBatches(source, batch_size=min(config.eval.batch_size, 512))
    for i in range(len(batches)):
        batch = batches[i]
        mask = batch.pop("mask")
        values.append(
            np.asarray(loss_fn(run.model.params, jax.random.fold_in(key, i), batch)[0])[mask]
        )
    return _mean_and_error(np.concatenate(values))


def bpd(run: Evaluation) -> Figures:
    """Bits/dim by the probability flow, with baselines."""
    images = run.heldout()
    levels = run.model.parts.quantisation.levels
    size = min(len(images), run.model.config.eval.batch_size)
    tolerance = run.model.config.eval.tolerance
    controller = PIController(rtol=tolerance, atol=tolerance)
    score = jax.jit(functools.partial(run.model.bits_per_dim, controller=controller))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.fold_in(run.key, 4), jnp.arange(len(images))
    )
    values = []
    for start in range(0, len(images), size):
        index = np.minimum(np.arange(start, start + size), len(images) - 1)
        result = score(keys[index], images[index])
        real = np.arange(start, start + size) < len(images)
        values.append(np.asarray(result.per_image)[real])
    histogram = quality.histogram_bits_per_dim(run.real("train")[0], images, levels)
    return _mean_and_error(np.concatenate(values)) | {
        "levels": levels,
        "uniform": math.log2(levels),
        "histogram": histogram.mean,
        "histogram_standard_error": histogram.standard_error,
    }


def bound(run: Evaluation) -> Figures:
    """Bits/dim by the variational bound."""
    images = run.heldout()
    parts = run.model.parts

    @jax.jit
    def bits(key, images):
        terms = variational_bound(
            key, run.model.denoiser(), parts.process, images, quantisation=parts.quantisation
        )
        return terms.bits_per_dim(images.size // images.shape[0]).per_image

    return _mean_and_error(np.asarray(bits(jax.random.fold_in(run.key, 5), images)))


def frechet_distance(run: Evaluation) -> Figures:
    """The distance of n samples to n held-out images, averaged over draws of both."""
    judge, splits = run.judge(), 10
    features = judge.features
    real, drawn = features(run.centred(run.real("eval")[0])), features(run.centred(run.samples()))
    n = min(len(real) // 2, len(drawn))
    dim = real.shape[1]

    def of(features, key):
        chosen = jax.random.permutation(key, len(features))[:n]
        return moments.update(moments.zeros(dim), features[chosen])

    distances = []
    for i in range(splits):
        k1, k2 = jax.random.split(jax.random.fold_in(run.key, 100 + i))
        distances.append(frechet.frechet_distance(of(drawn, k1), of(real, k2)))
    reference = frechet.split_reference(jax.random.fold_in(run.key, 6), real, n, splits)
    return {
        "distance": float(np.mean(distances)),
        "real_versus_real": reference.mean,
        "real_versus_real_std": reference.std,
        "n": n,
        "features": dim,
        "of": "a small classifier trained on the training split; not a FID",
    }


def sample_quality(run: Evaluation) -> Figures:
    """What the judge makes of the samples, beside held-out images."""
    judge = run.judge()
    train, heldout, drawn = jnp.asarray(run.real("train")[0]), run.real("eval")[0], run.samples()
    real_p = judge.probabilities(run.centred(heldout))
    drawn_p = judge.probabilities(run.centred(drawn))
    shares = np.asarray(quality.class_shares(drawn_p))
    nearest = [float(quality.nearest_distance(jnp.asarray(x), train)) for x in (drawn, heldout)]
    recognised = [float(quality.recognised_share(p)) for p in (drawn_p, real_p)]
    return {
        "samples": len(drawn),
        "recognised": recognised[0],
        "recognised_real": recognised[1],
        "recognised_ratio": recognised[0] / recognised[1],
        "class_shares": [round(float(s), 4) for s in shares],
        "least_class_share": float(shares.min()),
        "largest_class_share": float(shares.max()),
        "nearest_train": nearest[0],
        "nearest_train_real": nearest[1],
        "nearest_ratio": nearest[0] / nearest[1],
    }


METRICS: dict[str, Callable[[Evaluation], Figures]] = {
    "loss": loss,
    "bpd": bpd,
    "bound": bound,
    "frechet": frechet_distance,
    "quality": sample_quality,
}


def evaluate(
    workdir: str | Path,
    metrics: Sequence[str] = ("loss", "bpd"),
    *,
    step: int | None = None,
    samples: str | Path | None = None,
    **options: Any,
) -> dict[str, Figures]:
    """Measures a checkpoint (the newest by default) and writes eval/<metric>.json for each metric.

    samples: an `.npz` with `images` to judge instead of drawing. options: those of `Evaluation`.
    Raises RunError for an unknown metric or a samples file that does not fit.
    """
    unknown = [m for m in metrics if m not in METRICS]
    if unknown or not metrics:
        raise RunError(f"Unknown metrics {unknown}; choose among {', '.join(METRICS)}.")
    model = load(workdir, step=step)
    given = None if samples is None else _read_samples(samples, model)
    run = Evaluation(model, samples=given, **options)
    found = {}
    for name in metrics:
        figures = METRICS[name](run) | {"step": model.step, "seed": run.seed}
        if samples is not None and name in ("frechet", "quality"):
            figures["judged"] = str(samples)
        write_atomic(Path(workdir) / "eval" / f"{name}.json", json.dumps(figures, indent=2) + "\n")
        found[name] = figures
    return found


def _read_samples(path: str | Path, model: Model) -> np.ndarray:
    """The images of an `.npz`. Raises RunError where they are not this model's kind."""
    from diffjax.data import array_source

    try:
        source = array_source(path, levels=model.parts.quantisation.levels)
    except (ValueError, TypeError) as error:
        raise RunError(f"The samples do not fit: {error}") from error
    if tuple(source.info.shape) != tuple(model.parts.image_shape):
        raise RunError(
            f"{path} holds images of shape {source.info.shape}; the model's are "
            f"{model.parts.image_shape}."
        )
    return source.images


def _mean_and_error(values: np.ndarray) -> Figures:
    """Mean, standard error and count of per-image values."""
    return {
        "mean": float(values.mean()),
        "standard_error": float(values.std(ddof=1) / math.sqrt(len(values))),
        "images": len(values),
    }
