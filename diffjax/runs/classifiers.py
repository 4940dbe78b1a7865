"""A trained classifier of noisy images: `load(workdir)`, its accuracy, and its use as a guide."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike

from diffjax import builders
from diffjax.core import checks, random
from diffjax.core.files import write_atomic
from diffjax.core.types import Array, Key, Number, PyTree
from diffjax.guidance import CarriedClassifier, ClassifierGuidance, NoisyClassifier
from diffjax.processes import perturb
from diffjax.runs import spread
from diffjax.runs.model import Model
from diffjax.runs.restore import read_weights
from diffjax.runs.workdir import RunError, read_config


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedClassifier:
    """Averaged weights of a classifier with everything that gives them meaning; see `Model`."""

    config: Any
    parts: builders.Parts
    params: PyTree
    step: int

    @property
    def classify(self) -> NoisyClassifier:
        """(x_t, t) -> logits (B, K), under its own process and on data in its own range."""
        return self.parts.classifier(self.params)

    def guide(self, model: Model, labels: ArrayLike, *, scale: Number = 1.0) -> ClassifierGuidance:
        """What leads a model to classes: `model.sample(key, num, guide=...)`.

        labels: one an image. scale: see `diffjax.guidance.classifier`. The model may have another
        process and another range of pixels than the classifier was trained with; its images must
        have the same shape.
        """
        if self.parts.image_shape != model.parts.image_shape:
            raise RunError(
                f"The classifier knows images of shape {self.parts.image_shape}; the model's are "
                f"{model.parts.image_shape}."
            )
        own, other = (1 - parts.quantisation.low for parts in (self.parts, model.parts))
        classify: Any = self.classify
        if own != other or not _same(self.parts.process, model.parts.process):
            gain = own / other  # both ranges end at 1
            classify = CarriedClassifier(
                classify, self.parts.process, model.parts.process, gain, 1 - gain
            )
        return ClassifierGuidance(classify, model.parts.process, jnp.asarray(labels), scale)

    def accuracy(self, key: Key, images: ArrayLike, labels: ArrayLike, t: Number) -> np.ndarray:
        """Whether each image is recognised from x_t, with noise of its own; (B,), 0 or 1.

        images: uint8 levels (B, H, W, C). labels: (B,).
        """
        process = self.parts.process
        checks.in_range("t", t, float(process.t_min), float(process.t_max))
        levels = jnp.asarray(images)
        keys = random.sample_keys(key, levels.shape[0])
        x0 = self.parts.quantisation.to_model(levels)

        def hit(keys: Key, x0: Array, labels: Array) -> Array:
            return _recognised(keys, self.classify, process, x0, labels, jnp.asarray(t))

        return spread.over_rows(spread.mesh_of(self.params), hit, keys, x0, jnp.asarray(labels))


def _same(a: Any, b: Any) -> bool:
    """Whether two processes are one: the same class with the same numbers."""
    leaves, others = jax.tree.leaves(a), jax.tree.leaves(b)
    return str(jax.tree.structure(a)) == str(jax.tree.structure(b)) and all(
        np.array_equal(x, y) for x, y in zip(leaves, others, strict=True)
    )


@jax.jit
def _recognised(
    keys: Key, classify: NoisyClassifier, process: Any, x0: Array, labels: Array, t: Array
) -> Array:
    x_t = perturb(process, x0, t, random.normal_like(keys, "eps", x0))
    return jnp.argmax(classify(x_t, t), axis=-1) == labels


def load(
    workdir: str | Path, *, step: int | None = None, ema: str = "main", mesh: Mesh | None = None
) -> TrainedClassifier:
    """The averaged weights of a classifier's run, by default of the newest checkpoint.

    ema: which of the averages, "main" or a name in config.ema.others. mesh: as of
    `runs.model.load`; that of the model which it is to guide.

    Raises RunError where the directory holds no classifier, CheckpointError where no checkpoint
    can be read.
    """
    if not builders.is_classifier(read_config(workdir)):
        raise RunError(f"{workdir} holds a model of images, no classifier: use diffjax.load.")
    return TrainedClassifier(*read_weights(workdir, step, ema, mesh))


def accuracy(model: TrainedClassifier, *, seed: int, limit: int | None) -> dict[str, Any]:
    """Shares of held-out images recognised at 10 times from t_min to t_max, and their mean."""
    from diffjax.data import in_memory

    held = in_memory(builders.build_source(model.config, "eval"))
    if held.labels is None:
        raise RunError("The metric accuracy needs labelled held-out images.")
    images, labels = held.images[:limit], held.labels[:limit]
    process, size = model.parts.process, model.config.eval.batch_size
    times = np.linspace(process.t_min, process.t_max, 10)
    shares = []
    for i, t in enumerate(times):
        keys = random.sample_keys(jax.random.fold_in(jax.random.key(seed), i), len(images))
        hits = [
            model.accuracy(keys[a : a + size], images[a : a + size], labels[a : a + size], float(t))
            for a in range(0, len(images), size)
        ]
        shares.append(float(np.concatenate(hits).mean()))
    return {
        "mean": float(np.mean(shares)),
        "first": shares[0],
        "last": shares[-1],
        "times": times.tolist(),
        "accuracy": shares,
        "num_times": len(times),
        "images": len(images),
    }


def loss(model: TrainedClassifier, *, seed: int, limit: int | None) -> dict[str, Any]:
    """The mean cross-entropy of held-out images at random times, and its standard error."""
    from diffjax.data import in_memory

    held = in_memory(builders.build_source(model.config, "eval"))
    loss_fn = jax.jit(builders.build_loss(model.config, model.parts, train=False))
    images, size = held.images[:limit], model.config.eval.batch_size
    values = []
    for a in range(0, len(images), size):
        batch = {"image": images[a : a + size]}
        if held.labels is not None:
            batch["label"] = held.labels[:limit][a : a + size]
        batch = spread.placed(spread.mesh_of(model.params), batch)
        key = jax.random.fold_in(jax.random.key(seed), a)
        values.append(np.asarray(loss_fn(model.params, key, batch)[0]))
    each = np.concatenate(values)
    error = each.std(ddof=1) / np.sqrt(len(each))
    return {"mean": float(each.mean()), "standard_error": float(error), "images": len(each)}


METRICS = {"loss": loss, "accuracy": accuracy}


def evaluate(
    workdir: str | Path,
    metrics: Sequence[str],
    *,
    step: int | None = None,
    ema: str = "main",
    seed: int = 0,
    limit: int | None = None,
    mesh: Mesh | None = None,
    **unused: Any,
) -> dict[str, dict[str, Any]]:
    """Measures a classifier and writes eval/<metric>.json: what `runs.evaluate` does for a model.

    seed: of the noise. limit: held-out images. mesh: as of `load`. unused: options of metrics of
    samples, of which a classifier has none. Raises RunError for a metric that is not a
    classifier's.
    """
    others = [name for name in metrics if name not in METRICS]
    if others:
        raise RunError(f"A classifier is measured by {', '.join(METRICS)}; got {others}.")
    model = load(workdir, step=step, ema=ema, mesh=mesh)
    found = {}
    for name in metrics:
        found[name] = METRICS[name](model, seed=seed, limit=limit) | {
            "step": model.step,
            "ema": ema,
            "seed": seed,
        }
        write_atomic(
            Path(workdir) / "eval" / f"{name}.json", json.dumps(found[name], indent=2) + "\n"
        )
    return found
