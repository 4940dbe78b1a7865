"""A trained model, ready to sample and to score: `load(workdir)`."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike

from diffjax import builders
from diffjax.core import checks, random
from diffjax.core.numerics import batch_size as size_of
from diffjax.core.numerics import canonical
from diffjax.core.pytree import taken
from diffjax.core.types import Array, DenoiseFn, Key, PyTree
from diffjax.guidance import Guide
from diffjax.inverse import Grey, LinearOperator, Mask, Replace
from diffjax.likelihood import BitsPerDim, bits_per_dim, check_log_prob, summarise
from diffjax.processes import prior
from diffjax.runs import spread
from diffjax.runs.restore import read_weights
from diffjax.runs.workdir import RunError, read_config
from diffjax.search import Schedule, aligned
from diffjax.solvers import (
    AdaptiveFlow,
    PIController,
    Result,
    Solver,
    encode,
    grids,
    sample_with_restarts,
    slerp,
    solve_adaptive,
    temper,
)
from diffjax.solvers.driver import check_solve, sample
from diffjax.solvers.ode import check_flow

_draw = jax.jit(sample, static_argnames="save")
_flow = jax.jit(solve_adaptive, static_argnames="method")
_restarting = jax.jit(sample_with_restarts)
_encode = jax.jit(encode)
_score = jax.jit(bits_per_dim, static_argnames=("repeats", "probe_repeats", "prior"))


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """Averaged weights with everything that gives them meaning.

    config: as trained. parts: process, network, conventions. params: the averaged weights. step:
    updates behind them. Sampling compiles once for each batch size, kind of solver and bucket of 64
    steps (`grids.padded`). Where the weights lie says on which devices; see `runs.spread`.
    """

    config: Any
    parts: builders.Parts
    params: PyTree
    step: int

    def denoiser(self, cond: Array | None = None):
        """(x_t, t) -> Prediction with these weights. cond: labels (B,) for a conditional model."""
        return spread.denoiser(self.parts, self.params, cond)

    @property
    def mesh(self) -> Mesh | None:
        """The devices over which batches are split; None where the weights lie on one device."""
        return spread.mesh_of(self.params)

    def sample(
        self,
        key: Key,
        num: int,
        *,
        solver: str | Solver | AdaptiveFlow | None = None,
        steps: int | None = None,
        schedule: Schedule | None = None,
        labels: ArrayLike | None = None,
        latents: ArrayLike | None = None,
        temperature: float = 1.0,
        guide: Guide | None = None,
        batch_size: int | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> np.ndarray:
        """Draws `num` images, uint8 levels (num, H, W, C).

        key: one key, or (num,), one an image; image i depends on its key alone, not on batch_size.
        solver: a name in `builders.SOLVERS` or a solver; None and steps=None are the config's.
        schedule: a searched one in place of the grid, for its own solver.
        labels: (num,) for a conditional model. latents: (num, H, W, C), where to start instead of
        drawing from the prior. temperature: a factor on the start. guide: what leads the images,
        such as `TrainedClassifier.guide`; where it holds something for each image it has `take`.
        batch_size: images at once, up to a multiple of what the mesh splits; the config's by
        default. progress: called with the images done.
        """
        plan = builders.build_sampling(
            self.config, self.parts.process, solver=solver, steps=steps, schedule=schedule
        )
        return self.draw(
            key,
            num,
            plan,
            labels=labels,
            latents=latents,
            temperature=temperature,
            guide=guide,
            batch_size=batch_size,
            progress=progress,
        )

    def draw(
        self,
        key: Key,
        num: int,
        plan: builders.Sampling,
        *,
        labels: ArrayLike | None = None,
        latents: ArrayLike | None = None,
        temperature: float = 1.0,
        guide: Guide | None = None,
        batch_size: int | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> np.ndarray:
        """`sample` along a plan of `builders.build_sampling`."""
        checks.at_least("num", num, 1)
        keys = random.sample_keys(key, num)
        labels = self._labels(labels, num)
        given = None if latents is None else self._latents(latents, num)
        checks.positive("temperature", temperature)
        self._check(plan, labels, guide)
        images = []
        size = spread.padded(self.mesh, min(num, batch_size or self.config.eval.batch_size))
        for start, index in _batches(num, size):
            own = spread.placed(self.mesh, keys[index])
            cond = None if labels is None else labels[index]
            latent = temper(self.prior(own) if given is None else given[index], temperature)
            solver = plan._replace(solver=taken(plan.solver, index))
            result = self.path(own, solver, cond, latent, guide=taken(guide, index))
            if plan.adaptive:
                _check_arrived(np.asarray(result.state.arrived))
            images.append(np.asarray(self.parts.quantisation.from_model(result.x)))
            progress(min(start + len(index), num))
        return np.concatenate(images)[:num]

    def prior(self, keys: Key) -> Array:
        """One latent a key, (B, H, W, C)."""
        return prior(keys, self.parts.process, (keys.shape[0], *self.parts.image_shape))

    def path(
        self,
        keys: Key,
        plan: builders.Sampling,
        cond: Array | None = None,
        latent: Array | None = None,
        save: Callable[[Any], PyTree] | None = None,
        guide: Guide | None = None,
    ) -> Result:
        """One batch from a latent, or the prior, through the solver, as `solvers.sample` returns.

        A batch that the mesh does not split is computed by each device. Raises RunError for `save`
        with an adaptive solver or restarts.
        """
        keys, cond = spread.placed(self.mesh, (keys, cond))
        x = spread.placed(self.mesh, self.prior(keys) if latent is None else latent)
        guide, solver = (spread.placed_each(self.mesh, a, len(x)) for a in (guide, plan.solver))
        # A number means one program, whether it came as a Python, NumPy or JAX scalar.
        denoise, solver, process = canonical(
            (self._denoiser(cond, guide, plan), solver, self.parts.process)
        )
        adaptive = isinstance(solver, AdaptiveFlow)
        if save is not None and (adaptive or plan.restarts):
            raise RunError(
                "An adaptive solve, or one with restarts, has no grid to keep states of; choose a "
                "solver of a grid, such as solver='heun', without."
            )
        if adaptive:
            return _flow(
                keys,
                denoise,
                x,
                *plan.times,
                process=process,
                method=solver.method,
                controller=solver.controller,
                final=plan.final,
            )
        given: dict[str, Any] = {"solver": solver, "process": process, "final": plan.final}
        if plan.restarts:
            return _restarting(keys, denoise, x, plan.times, restarts=plan.restarts, **given)
        # Padded, another number of steps is the same program; a path is kept as it is.
        times, n_steps = (plan.times, None) if save is not None else grids.padded(plan.times)
        return _draw(keys, denoise, x, times, n_steps=n_steps, save=save, **given)

    def restore(
        self,
        key: Key,
        operator: LinearOperator,
        y: ArrayLike,
        *,
        num: int | None = None,
        solver: str | Solver | None = None,
        steps: int | None = None,
        schedule: Schedule | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Draws images with a given measurement A x = y, uint8 levels (num, H, W, C).

        operator, y: A and its value, (num, ...) or (1, ...) for all images, of images in the
        model's range. num: by default the length of y. The method is `diffjax.inverse.Replace`,
        which is approximate: its page says how. solver, steps, schedule, options: as of `sample`.
        """
        plan = builders.build_sampling(
            self.config, self.parts.process, solver=solver, steps=steps, schedule=schedule
        )
        given = jax.tree.map(jnp.asarray, y)
        size = size_of(given)
        if num is not None and size not in (1, num):
            raise RunError(f"y must be one measurement an image, or one for all {num}; got {size}.")
        held = Replace(plan.solver, operator, given)  # type: ignore[arg-type]  # raises if adaptive
        return self.draw(key, num or size, plan._replace(solver=held), **options)

    def inpaint(self, key: Key, images: ArrayLike, mask: ArrayLike, **options: Any) -> np.ndarray:
        """Draws what the mask leaves open, uint8 levels; the rest stays as it is in `images`.

        images: uint8 levels (B, H, W, C), or one, (1, H, W, C), with num= in the options. mask: 1
        where known, (H, W), (H, W, C) or (H, W, 1), or one an image, (B, H, W, C) or (B, H, W, 1).
        options: those of `restore`.
        """
        known = jnp.asarray(mask)
        known = known[..., None] if known.ndim == 2 else known
        operator = Mask(known, per_sample=known.ndim == 4 and len(known) > 1)
        y = self.parts.quantisation.to_model(jnp.asarray(images))
        return self.restore(key, operator, y, **options)

    def colorize(self, key: Key, grey: ArrayLike, **options: Any) -> np.ndarray:
        """Draws the colours of grey images, whose mean over the channels is kept; uint8 levels.

        grey: uint8 levels (B, H, W, 1). options: those of `restore`.
        """
        channels = self.parts.image_shape[-1]
        if channels < 2:
            raise RunError(f"This model's images have {channels} channel: no colours to draw.")
        y = self.parts.quantisation.to_model(jnp.asarray(grey))
        return self.restore(key, Grey(channels), y, **options)

    def encode(
        self,
        images: ArrayLike,
        *,
        labels: ArrayLike | None = None,
        controller: PIController = PIController(),
    ) -> np.ndarray:
        """The latents of images: where the probability flow leads them, float32 (B, H, W, C).

        images: uint8 levels (B, H, W, C). labels: (B,) for a conditional model.
        """
        x = self.parts.quantisation.to_model(jnp.asarray(images))
        keys = random.sample_keys(jax.random.key(0), size_of(x))  # the flow draws nothing
        process, given = canonical((self.parts.process, controller))

        def solve(keys: Key, x: Array, cond: Array | None) -> tuple[Array, Array]:
            result = _encode(keys, canonical(self.denoiser(cond)), process, x, controller=given)
            return result.x, result.state.arrived

        latents, arrived = spread.over_rows(
            self.mesh, solve, keys, x, self._labels(labels, size_of(x))
        )
        _check_arrived(arrived)
        return latents

    def decode(
        self,
        latents: ArrayLike,
        *,
        labels: ArrayLike | None = None,
        controller: PIController = PIController(),
    ) -> np.ndarray:
        """The images of latents by the probability flow, uint8 levels (B, H, W, C).

        Ends where the config's sampling does, with one denoising. labels: (B,) for a conditional
        model.
        """
        return self.sample(
            jax.random.key(0),
            np.shape(latents)[0],
            solver=AdaptiveFlow(controller),
            labels=labels,
            latents=latents,
        )

    def interpolate(
        self,
        first: ArrayLike,
        second: ArrayLike,
        num: int,
        *,
        labels: ArrayLike | None = None,
        controller: PIController = PIController(),
    ) -> np.ndarray:
        """`num` images from each of `first` to each of `second`, uint8 (B, num, H, W, C).

        first, second: uint8 levels (B, H, W, C). They are encoded, interpolated along the sphere
        and decoded; the ends are the decoded images. labels: (B,) for a conditional model.
        """
        checks.at_least("num", num, 2)
        ends = [self.encode(a, labels=labels, controller=controller) for a in (first, second)]
        a, b = (jnp.repeat(jnp.asarray(end), num, axis=0) for end in ends)
        batch = ends[0].shape[0]
        between = slerp(a, b, jnp.tile(jnp.linspace(0.0, 1.0, num), batch))
        cond = None if labels is None else np.repeat(np.asarray(labels), num)
        images = self.decode(between, labels=cond, controller=controller)
        return images.reshape(batch, num, *images.shape[1:])

    def bits_per_dim(
        self, key: Key, images: Array, *, labels: ArrayLike | None = None, **options: Any
    ) -> BitsPerDim:
        """Bits/dim of uint8 images (B, H, W, C) over the data's levels; see `likelihood`.

        labels: (B,) for a conditional model, whose figure is then that of images given their class.
        It is compiled here; inside your own `jit` call `diffjax.bits_per_dim`.
        """
        keys = random.sample_keys(key, images.shape[0])
        process, quantisation, options = canonical(
            (self.parts.process, self.parts.quantisation, options)
        )
        check_log_prob(self.denoiser(), self.parts.process, options.get("t_min"))

        def solve(keys: Key, images: Array, cond: Array | None) -> tuple[Array, Array]:
            denoise = canonical(self.denoiser(cond))
            found = _score(keys, denoise, process, images, quantisation=quantisation, **options)
            return found.draws, found.nfe

        cond = self._labels(labels, images.shape[0])
        draws, nfe = spread.over_rows(self.mesh, solve, keys, images, cond)
        return summarise(jnp.asarray(draws), jnp.asarray(nfe))

    def _denoiser(
        self, cond: Array | None, guide: Guide | None, plan: builders.Sampling
    ) -> DenoiseFn:
        plain = aligned(self.denoiser(cond), self.parts.process, plan.times, plan.asked)
        return plain if guide is None else guide(plain)

    def _check(
        self, plan: builders.Sampling, cond: Array | None, guide: Guide | None = None
    ) -> None:
        """Raises what a solve would, before it is compiled."""
        denoise, process = self._denoiser(cond, guide, plan), self.parts.process
        if isinstance(plan.solver, AdaptiveFlow):
            ends = plan.times[0], plan.times[1]
            check_flow(denoise, *ends, process, plan.final, plan.solver.method)
        else:
            check_solve(denoise, plan.times, plan.solver, process, plan.final)

    def _latents(self, latents: ArrayLike, num: int) -> Array:
        found = jnp.asarray(latents)
        expected = (num, *self.parts.image_shape)
        if found.shape != expected or not jnp.issubdtype(found.dtype, jnp.floating):
            raise RunError(
                f"latents must be floating point of shape {expected}; got {found.dtype} of shape "
                f"{found.shape}."
            )
        return found

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


def _check_arrived(arrived: np.ndarray) -> None:
    """Raises RunError where the controller gave samples up. arrived: (B,)."""
    lost = int(np.sum(~arrived))
    if lost:
        raise RunError(
            f"{lost} of {len(arrived)} samples did not arrive: their steps fell below the spacing "
            "of floats or they needed more than max_steps. Raise rtol, atol or max_steps, or use a "
            "solver of a grid."
        )


def _batches(num: int, size: int) -> Iterator[tuple[int, np.ndarray]]:
    """(start, indices) of batches; the tail is filled with repeats, so all have one shape."""
    for start in range(0, num, size):
        yield start, np.minimum(np.arange(start, start + size), num - 1)


def load(
    workdir: str | Path, *, step: int | None = None, ema: str = "main", mesh: Mesh | None = None
) -> Model:
    """The averaged weights of a run's checkpoint, by default the newest.

    ema: which of the averages, "main" or a name in config.ema.others. mesh: of this process's
    devices (`runs.spread.local_mesh`); by default all of them, with the whole weights on each. One
    with "fsdp" or "tensor" splits them as training does, by the rules of the config.

    Raises RunError where the directory is no workdir or holds a classifier, CheckpointError where
    no checkpoint can be read, BuildError for rules that do not fit the mesh.
    """
    if builders.is_classifier(read_config(workdir)):
        raise RunError(
            f"{workdir} holds a classifier, which draws nothing: load it with "
            "diffjax.load_classifier, and guide a model with it."
        )
    return Model(*read_weights(workdir, step, ema, mesh))
