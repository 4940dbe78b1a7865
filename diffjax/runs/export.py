"""A trained model's sampler as one file that runs without this package."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffjax import builders
from diffjax.core.types import Array, Key, PyTree
from diffjax.interop.export import export_sampler, require_flatbuffers, write_sampler
from diffjax.runs.model import Model
from diffjax.runs.workdir import RunError
from diffjax.search import Schedule, aligned
from diffjax.solvers import AdaptiveFlow, Solver, sample


class Written(NamedTuple):
    """What `export_to` wrote. program_bytes: without the weights."""

    file: Path
    program_bytes: int
    platforms: tuple[str, ...]


def export_to(
    model: Model,
    out: str | Path,
    *,
    solver: str | Solver | None = None,
    steps: int | None = None,
    schedule: Schedule | None = None,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> Written:
    """Writes the sampler of a model: seeds, and labels (b,) int32 where it has classes, to images.

    The images are uint8 levels (b, H, W, C), those of `Model.sample` with keys of the same seeds up
    to rounding. solver, steps, schedule: as of `Model.sample`; they are fixed in the file, as is
    the step of the weights. `diffjax.interop.export` has the file's layout and how to draw with it.

    Raises ModuleNotFoundError without flatbuffers, before any work; RunError for an adaptive
    solver, which may give a sample up, and what `export_sampler` raises.
    """
    require_flatbuffers()
    parts = model.parts
    plan = builders.build_sampling(
        model.config, parts.process, solver=solver, steps=steps, schedule=schedule
    )
    if isinstance(plan.solver, AdaptiveFlow):
        raise RunError(
            "An exported sampler has no way to tell that an adaptive solver gave a sample up; "
            "choose a solver of a grid, such as solver='heun'."
        )
    if plan.restarts:
        raise RunError("An exported sampler has no restarts; set config.sampling.restarts to ().")
    chosen, times, final = plan.solver, plan.times, plan.final

    def draw(params: PyTree, keys: Key, *labels: Array) -> Array:
        result = sample(
            keys,
            aligned(parts.denoiser(params, *labels), parts.process, times, plan.asked),
            model.prior(keys),
            times,
            solver=chosen,
            process=parts.process,
            final=final,
        )
        return parts.quantisation.from_model(result.x)

    classes = [] if parts.num_classes is None else [jax.ShapeDtypeStruct((), jnp.int32)]
    exported = export_sampler(draw, model.params, *classes, platforms=platforms)
    size = write_sampler(out, exported, model.params)
    return Written(Path(out), size, tuple(exported.platforms))
