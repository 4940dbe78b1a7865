"""Sampling to files: images as `.npz` or PNG, a grid to look at, the denoising path."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import builders
from diffjax.core import checks
from diffjax.core.files import write_atomic
from diffjax.core.types import Key
from diffjax.runs import pictures
from diffjax.runs.model import Model
from diffjax.runs.workdir import RunError
from diffjax.search import Schedule

FORMATS = ("npz", "png")


class Written(NamedTuple):
    """What `sample_to` wrote. images: uint8 levels (num, H, W, C). files: in the order written."""

    images: np.ndarray
    files: tuple[Path, ...]


def seed_keys(seeds: Any) -> Key:
    """One key a seed, (n,): image i depends on its seed alone."""
    return jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))


def sample_to(
    model: Model,
    out: str | Path,
    *,
    key: Key,
    num: int,
    format: Literal["npz", "png"] = "npz",
    name: str = "samples",
    **options: Any,
) -> Written:
    """Draws `num` images into the directory `out`.

    Writes <name>.npz with `images` (levels) and, for a conditional model, `labels`, or one
    <name>/<i>.png each; and the first 100 as <name>.png. options: those of `Model.sample`.
    """
    checks.one_of("format", format, FORMATS)
    out = Path(out)
    images = model.sample(key, num, **options)
    shown = pictures.to_bytes(images, model.parts.quantisation.levels)
    files = []
    if format == "npz":
        arrays: dict[str, Any] = {"images": images}
        if options.get("labels") is not None:
            arrays["labels"] = np.asarray(options["labels"], np.int32)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        files.append(out / f"{name}.npz")
        write_atomic(files[-1], buffer.getvalue())
    else:
        for i, image in enumerate(shown):
            files.append(out / name / f"{i:06d}.png")
            pictures.write_png(files[-1], image, least=1)
    files.append(out / f"{name}.png")
    pictures.write_png(files[-1], pictures.grid(shown[:100]), least=600)
    return Written(images, tuple(files))


def write_path(
    model: Model,
    path: str | Path,
    *,
    seeds: Sequence[int],
    frames: int = 9,
    solver: str | None = None,
    steps: int | None = None,
    schedule: Schedule | None = None,
    labels: Sequence[int] | None = None,
) -> None:
    """Draws a sample a seed and writes their ways from noise to image, `frames` states each.

    The noisy states are shown divided by sqrt(alpha^2 + sigma^2), so that each fits the range.
    """
    plan = builders.build_sampling(
        model.config, model.parts.process, solver=solver, steps=steps, schedule=schedule
    )
    check_path(plan)
    cond = None if labels is None else jnp.asarray(labels[: len(seeds)], jnp.int32)
    result = model.path(seed_keys(seeds), plan, cond, save=_sample_of)
    states = np.asarray(result.saved)  # (n, len(seeds), H, W, C), at times[1:]
    times = np.asarray(plan.times)[1:]
    chosen = np.unique(np.linspace(0, len(states) - 1, frames).round().astype(int))
    alpha, _, sigma = model.parts.process.coeffs(jnp.asarray(times[chosen]))
    size = np.asarray(jnp.sqrt(alpha**2 + sigma**2)).reshape(-1, 1, 1, 1, 1)
    quantisation = model.parts.quantisation
    levels = np.asarray(quantisation.from_model(jnp.asarray(states[chosen] / size)))
    shown = pictures.to_bytes(levels, quantisation.levels)
    pictures.write_figure(path, pictures.denoising_path(shown, times[chosen]))


def check_path(plan: builders.Sampling) -> None:
    """Raises RunError where the plan has no states on the way, which `write_path` shows."""
    if plan.adaptive:
        raise RunError(
            "An adaptive solver has no grid whose states could be shown as a path; choose a solver "
            "of a grid, such as solver=heun."
        )


def _sample_of(state: Any) -> Any:
    return state.x
