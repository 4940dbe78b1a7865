"""A trained model, ready to sample and to score: `load(workdir)`."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from diffjax import builders
from diffjax.core import checks, random
from diffjax.core.numerics import canonical
from diffjax.core.types import Array, Key, PyTree
from diffjax.likelihood import BitsPerDim, bits_per_dim
from diffjax.processes import prior
from diffjax.runs.workdir import RunError, read_config
from diffjax.solvers import Result, Solver
from diffjax.solvers.driver import check_solve, sample

_draw = jax.jit(sample, static_argnames="save")


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """Averaged weights with everything that gives them meaning.

    config: as trained. parts: process, network, conventions. params: the averaged weights. step:
    updates behind them. Sampling compiles once for each batch size, kind of solver and grid length.
    """

    config: Any
    parts: builders.Parts
    params: PyTree
    step: int

    def denoiser(self, cond: Array | None = None):
        """(x_t, t) -> Prediction with these weights. cond: labels (B,) for a conditional model."""
        return self.parts.denoiser(self.params, cond)

    def sample(
        self,
        key: Key,
        num: int,
        *,
        solver: str | Solver | None = None,
        steps: int | None = None,
        labels: ArrayLike | None = None,
        batch_size: int | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> np.ndarray:
        """Draws `num` images, uint8 levels (num, H, W, C).

        key: one key, or (num,), one an image; image i depends on its key alone, not on batch_size.
        solver: a name in `builders.SOLVERS` or a solver; None and steps=None are the config's.
        labels: (num,) for a conditional model. progress: called with the images done.
        """
        checks.at_least("num", num, 1)
        plan = builders.build_sampling(self.config, self.parts.process, solver=solver, steps=steps)
        keys = random.sample_keys(key, num)
        labels = self._labels(labels, num)
        size = min(num, batch_size or self.config.eval.batch_size)
        check_solve(self.denoiser(labels), plan.times, plan.solver, self.parts.process, plan.final)
        images = []
        for start in range(0, num, size):
            # The tail is filled with repeats, so that every batch is one compiled shape.
            index = np.minimum(np.arange(start, start + size), num - 1)
            cond = None if labels is None else labels[index]
            x = self.path(keys[index], plan, cond).x
            images.append(np.asarray(self.parts.quantisation.from_model(x)))
            progress(min(start + size, num))
        return np.concatenate(images)[:num]

    def path(
        self,
        keys: Key,
        plan: builders.Sampling,
        cond: Array | None = None,
        save: Callable[[Any], PyTree] | None = None,
    ) -> Result:
        """One batch from the prior through the solver, as `solvers.sample` returns it."""
        shape = (keys.shape[0], *self.parts.image_shape)
        x = prior(keys, self.parts.process, shape)
        # A number means one program, whether it came as a Python, NumPy or JAX scalar.
        denoise, solver, process = canonical((self.denoiser(cond), plan.solver, self.parts.process))
        return _draw(
            keys,
            denoise,
            x,
            plan.times,
            solver=solver,
            process=process,
            final=plan.final,
            save=save,
        )

    def bits_per_dim(self, key: Key, images: Array, **options: Any) -> BitsPerDim:
        """Bits/dim of uint8 images (B, H, W, C) over the data's levels; see `likelihood`."""
        return bits_per_dim(
            key,
            self.denoiser(),
            self.parts.process,
            images,
            quantisation=self.parts.quantisation,
            **options,
        )

    def _labels(self, labels: Any, num: int) -> Array | None:
        classes = self.parts.num_classes
        if classes is None:
            if labels is not None:
                raise RunError("This model is unconditional: it takes no labels.")
            return None
        if labels is None:
            raise RunError(f"This model is conditional: give {num} labels in 0..{classes - 1}.")
        labels = jnp.asarray(labels, jnp.int32)
        if labels.shape != (num,):
            raise RunError(f"labels must be one an image, ({num},); got {labels.shape}.")
        checks.in_range("labels", labels, 0, classes - 1)
        return labels


def load(workdir: str | Path, *, step: int | None = None) -> Model:
    """The averaged weights of a run's checkpoint, by default the newest.

    Raises RunError where the directory is no workdir, CheckpointError where no checkpoint can be
    read.
    """
    from diffjax.train.checkpoint import Checkpointer
    from diffjax.train.state import abstract

    config = read_config(workdir)
    parts = builders.build_parts(config)
    shapes = jax.eval_shape(parts.init_params, jax.random.key(0))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with Checkpointer(workdir, writable=False) as checkpointer:
        params, meta = checkpointer.restore_ema(abstract(shapes, device), step)
    return Model(config, parts, params, meta.step)
