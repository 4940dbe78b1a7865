"""The metrics of held-out images: loss, bits/dim by the flow, and the variational bound."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import builders
from diffjax.core import random
from diffjax.core.types import Array, DenoiseFn, Key
from diffjax.likelihood import BitsPerDim, Bound, score_sde_protocol, summarise, variational_bound
from diffjax.metrics import quality
from diffjax.runs import digests, spread
from diffjax.runs.evaluation import Evaluation, Figures
from diffjax.runs.extractors import write_npz
from diffjax.solvers.adaptive import PIController


def loss(run: Evaluation) -> Figures:
    """The mean training loss over the held-out images and its standard error."""
    from diffjax.data import EvalBatches

    config, mesh = run.model.config, run.model.mesh
    loss_fn = jax.jit(builders.build_loss(config, run.model.parts, train=False))
    source = builders.build_source(config, "eval")
    key = jax.random.fold_in(run.key, 3)
    values = []
    batches = EvalBatches(source, batch_size=min(config.eval.batch_size, 512))
    for i in range(len(batches)):
        batch = batches[i]
        mask = batch.pop("mask")
        # Not padded: the times of a loss may be spread over its batch.
        batch = spread.placed(mesh, batch)
        values.append(
            np.asarray(loss_fn(run.model.params, jax.random.fold_in(key, i), batch)[0])[mask]
        )
    return _mean_and_error(np.concatenate(values))


def bpd(run: Evaluation) -> Figures:
    """Bits/dim by the probability flow, with baselines; each image's solves in eval/bpd.npz."""
    images, labels = run.heldout()
    levels = run.model.parts.quantisation.levels
    found = _solve(run, images, labels)
    if run.folder is not None:
        arrays = {"draws": found.draws, "nfe": found.nfe, "per_image": found.per_image}
        write_npz(run.folder / "bpd.npz", {k: np.asarray(v) for k, v in arrays.items()})
    histogram = quality.histogram_bits_per_dim(run.real("train")[0], images, levels)
    parts = {
        f"{name}_error": None if np.isnan(value) else float(value)
        for name, value in found.errors._asdict().items()
        if name != "total"
    }
    return {
        "mean": float(found.mean),
        "standard_error": float(found.stderr),
        **parts,
        "images": len(images),
        "repeats": found.draws.shape[1],
        "probe_repeats": found.draws.shape[2],
        "nfe": float(np.mean(np.asarray(found.nfe))),
        "levels": levels,
        "uniform": math.log2(levels),
        "histogram": histogram.mean,
        "histogram_standard_error": histogram.standard_error,
    }


def _solve(run: Evaluation, images: np.ndarray, labels: np.ndarray | None) -> BitsPerDim:
    """Bits/dim of all images, in batches of one compiled shape, from where a call was stopped."""
    tolerance = run.model.config.eval.tolerance
    options: dict[str, Any] = {
        "controller": PIController(rtol=tolerance, atol=tolerance),
        "repeats": run.repeats,
        "probe_repeats": run.probe_repeats,
    }
    if run.score_sde_protocol:
        options = score_sde_protocol()
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.fold_in(run.key, 4), jnp.arange(len(images))
    )
    size = min(len(images), run.model.config.eval.batch_size)
    settings = digests.without_addresses(repr((size, sorted(options.items()))))
    made_of = digests.of_tree((run.model.params, keys, images, labels, settings))
    folder = None if run.folder is None else run.folder / "partial" / f"bpd_{made_of[:16]}"
    found = []
    for start in range(0, len(images), size):
        index = np.minimum(np.arange(start, start + size), len(images) - 1)
        real = np.arange(start, start + size) < len(images)

        def solve(index: np.ndarray = index, real: np.ndarray = real) -> dict[str, np.ndarray]:
            classes = {} if labels is None else {"labels": labels[index]}
            result = run.model.bits_per_dim(keys[index], images[index], **classes, **options)
            return {"draws": np.asarray(result.draws)[real], "nfe": np.asarray(result.nfe)[real]}

        found.append(_kept(None if folder is None else folder / f"{start:08d}.npz", solve))
    draws, nfe = (jnp.concatenate([part[name] for part in found]) for name in ("draws", "nfe"))
    return summarise(draws, nfe)


def _kept(path: Path | None, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What the file holds; made and written where it is not there."""
    if path is not None and path.is_file():
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    arrays = make()
    if path is not None:
        write_npz(path, arrays)
    return arrays


def bound(run: Evaluation) -> Figures:
    """Bits/dim by the variational bound."""
    images, labels = run.heldout()
    parts = run.model.parts

    @jax.jit
    def terms(denoise: DenoiseFn, keys: Key, images: Array) -> Bound:
        return variational_bound(
            keys, denoise, parts.process, images, quantisation=parts.quantisation
        )

    def of_rows(keys: Key, images: Array, labels: Array | None) -> Bound:
        return terms(run.model.denoiser(labels), keys, images)

    keys = random.sample_keys(jax.random.fold_in(run.key, 5), len(images))
    found = spread.over_rows(run.model.mesh, of_rows, keys, images, labels)
    return _mean_and_error(np.asarray(found.bits_per_dim(images[0].size).per_image))


def _mean_and_error(values: np.ndarray) -> Figures:
    """Mean, standard error and count of per-image values."""
    return {
        "mean": float(values.mean()),
        "standard_error": float(values.std(ddof=1) / math.sqrt(len(values))),
        "images": len(values),
    }
