"""What to watch of an update beside its loss: computed on the device, within the step.

Symbols: l_i the loss of image i of the batch and lam_i its log-SNR; e_0 < e_1 < ... the edges of
the bins; g the gradient and G one top-level entry of the tree of weights; u the optimizer's update;
p the weights and q_k the average k of them, both after the update; ||.|| over all leaves together.

    by noise        mean of l_i over the images with e_j <= lam_i < e_(j+1)                    (1)
    group           ||g_G||                                                                    (2)
    update ratio    ||u|| / ||p||                                                              (3)
    gap             ||q_k - p|| / ||p||                                                        (4)

A probe is a function that gives figures by name: of the images' values, or of the update. It is
traced into the step, so all probes together are still one program, and they read what is there
anyway: (1) costs B K comparisons, (2) shares the squares of the gradient's norm, (3) and (4) are
sums over the weights that XLA fuses with the update.

A healthy run has an update ratio about 1e-3 (far above: the rate is too high), and a gap that
settles. A loss that rises in one bin only is seen there long before it shows in the mean.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffjax.core.numerics import at_least_float32
from diffjax.core.pytree import pytree, static
from diffjax.core.types import Array, PyTree
from diffjax.train.accumulate import means

# In log-SNR. A level sigma/alpha is exp(-lam/2): from 20 down to 0.05 in steps of e.
LOG_SNR_EDGES = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)


class Update(NamedTuple):
    """One update as probes see it.

    grads, updates: trees like the weights, before and after the optimizer. params: after the
    update. ema: the averages after it, by name, each a tree like params.
    """

    grads: PyTree
    updates: PyTree
    params: PyTree
    ema: Mapping[str, PyTree]


@pytree
class BinMeans:
    """Sums by bin and how many values went in, (..., K) each: means that can still be pooled."""

    sums: Array
    counts: Array
    labels: tuple[str, ...] = static()


Aux = Mapping[str, Array]
ImageProbe = Callable[[Array, Aux], Mapping[str, Any]]
UpdateProbe = Callable[[Update], Mapping[str, Any]]


class Probes(NamedTuple):
    """What a step reports beside its loss.

    images: functions of the losses (B,) and of the loss function's aux, most of it (B,). What they
    give must be sums or means over the images, so that those of micro-batches can be averaged.
    updates: functions of an `Update`.
    """

    images: tuple[ImageProbe, ...] = ()
    updates: tuple[UpdateProbe, ...] = ()

    def of_images(self, losses: Array, aux: Aux) -> dict[str, Any]:
        """The mean of each value of aux, in float32 at least, and what the probes give."""
        return _merged([means(losses, aux), *(probe(losses, aux) for probe in self.images)])

    def of_update(self, update: Update) -> dict[str, Any]:
        """What the probes give."""
        return _merged([probe(update) for probe in self.updates])


@pytree
class ByNoise:
    """Eq. (1) of the per-image values `value` of aux; "loss" stands for the losses.

    The aux needs "log_snr", (B,). edges: increasing; the outer bins are open, so K is one more than
    there are edges. The figure is called "<value>_by_log_snr".
    """

    value: str = static(default="loss")
    edges: tuple[float, ...] = static(default=LOG_SNR_EDGES)

    def __post_init__(self):
        if not self.edges or any(a >= b for a, b in itertools.pairwise(self.edges)):
            raise ValueError(f"edges must be increasing, one at least; got {self.edges}.")

    def __call__(self, losses: Array, aux: Aux) -> dict[str, BinMeans]:
        """Raises ValueError where the aux lacks a value, or has it not as one number an image."""
        values = losses if self.value == "loss" else _per_image(losses, aux, self.value)
        bins = (-math.inf, *self.edges, math.inf)
        at = _per_image(losses, aux, "log_snr")[:, None]
        lower, upper = (jnp.asarray(e, at.dtype)[None] for e in (bins[:-1], bins[1:]))
        # The last bin takes +inf in.
        inside = (at >= lower) & ((at < upper) | jnp.isposinf(upper))
        # A choice, not a product: a value that is not finite stays in its own bin.
        sums = jnp.sum(jnp.where(inside, values[:, None], 0), axis=0)
        counts = jnp.sum(inside, axis=0, dtype=sums.dtype)
        labels = tuple(f"{a:g}..{b:g}" for a, b in itertools.pairwise(bins))
        return {f"{self.value}_by_log_snr": BinMeans(sums, counts, labels)}


def group_norms(update: Update) -> dict[str, Array]:
    """Eq. (2), "grad_norm/<entry>" for each top-level entry; {} where the weights are one array."""
    if not isinstance(update.grads, Mapping):
        return {}
    return {f"grad_norm/{name}": _norm(tree) for name, tree in update.grads.items()}


def update_ratio(update: Update) -> dict[str, Array]:
    """Eq. (3), "update_ratio"; 0 where the weights are all zero."""
    return {"update_ratio": _ratio(_norm(update.updates), _norm(update.params))}


def ema_gap(update: Update) -> dict[str, Array]:
    """Eq. (4), "ema_gap/<track>" for each average."""
    size = _norm(update.params)
    return {
        f"ema_gap/{track}": _ratio(_norm(jax.tree.map(jnp.subtract, tree, update.params)), size)
        for track, tree in update.ema.items()
    }


def scalars(metrics: Mapping[str, Any], keep: np.ndarray | None = None) -> dict[str, float]:
    """The figures of a dispatch, on the host: means over its updates.

    metrics: arrays (n,) and `BinMeans` (n, K), one entry an update, as NumPy. keep: (n,), which of
    the updates count; None for all. A mean over bins is over the images of all updates, as
    "<name>/<bin>"; a bin without an image is left out. nan where no update counts.
    """
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, BinMeans):
            sums, counts = (
                np.sum(_kept(np.asarray(x), keep), axis=0) for x in (value.sums, value.counts)
            )
            filled = [i for i, count in enumerate(counts) if count > 0]
            found |= {f"{name}/{value.labels[i]}": float(sums[i] / counts[i]) for i in filled}
        else:
            kept = _kept(value, keep)
            found[name] = float(np.mean(kept)) if len(kept) else math.nan
    return found


def _kept(values: np.ndarray, keep: np.ndarray | None) -> np.ndarray:
    return values if keep is None else values[keep]


def _per_image(losses: Array, aux: Aux, name: str) -> Array:
    value = aux.get(name)
    if value is None or value.shape != losses.shape:
        got = "nothing" if value is None else f"shape {value.shape}"
        raise ValueError(
            f"A probe needs {name!r} of each image in the loss's aux, {losses.shape}; got {got} "
            f"among {sorted(aux)}. Report it, or leave the probe out."
        )
    return value


def _merged(figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for some in figures:
        if taken := found.keys() & some.keys():
            raise ValueError(f"{sorted(taken)} is reported twice; rename one of them.")
        found |= some
    return found


def _norm(tree: PyTree) -> Array:
    """||.|| in at least float32."""
    norm = optax.tree.norm(at_least_float32(tree))
    return jnp.asarray(norm)


def _ratio(a: Array, b: Array) -> Array:
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)
