"""Sampling to files: images as `.npz`, PNG or records, a grid to look at, the denoising path.

A few images are one file. Many are written in shards (`runs.shards`): a job that is killed and
started again goes on where it was, several processes draw a share each, and only one shard is held
in memory.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import builders
from diffjax.core import checks, random
from diffjax.core.files import write_atomic
from diffjax.core.pytree import taken
from diffjax.core.types import Key
from diffjax.runs import digests, hosts, pictures
from diffjax.runs.model import Model
from diffjax.runs.shards import FORMATS, Shards, claim, is_claimed, npz_bytes, require_format
from diffjax.runs.workdir import RunError
from diffjax.search import Schedule
from diffjax.solvers import AdaptiveFlow, Solver

SHARD = 1024  # images of a shard, up to the next whole batch
_SHOWN = 100  # images in the grid

Progress = Callable[[int], None]


class Written(NamedTuple):
    """What `sample_to` wrote.

    images: uint8 levels (num, H, W, C); None where they went into shards. files: in the order
    written, by this process; of shards the folder, then the grid. digest: of the images in shards,
    see `digests`.
    """

    images: np.ndarray | None
    files: tuple[Path, ...]
    digest: str | None = None


def seed_keys(seeds: Any) -> Key:
    """One key a seed, (n,): image i depends on its seed alone."""
    return jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))


def sample_to(
    model: Model,
    out: str | Path,
    *,
    key: Key,
    num: int,
    format: str = "npz",
    name: str = "samples",
    solver: str | Solver | AdaptiveFlow | None = None,
    steps: int | None = None,
    schedule: Schedule | None = None,
    batch_size: int | None = None,
    shard_size: int = SHARD,
    about: dict[str, Any] | None = None,
    progress: Progress = lambda done: None,
    **options: Any,
) -> Written:
    """Draws `num` images into the directory `out`.

    Up to `shard_size` of them are one <name>.npz with `images` (levels) and, for a conditional
    model, `labels`; or one <name>/<i>.png each. More, and any number in the format arrayrecord, are
    shards in <name>/: called again after a kill, it draws what is missing, and the files are those
    of a call that was never stopped, bit for bit. Several processes (`jax.distributed`) draw a
    share each into the directory, which they must all see. The first 100 are shown in <name>.png.

    format: npz, png or arrayrecord. shard_size: rounded up to whole batches. about: plain values
    that say more of the request in the manifest, such as the seeds. progress: called with the
    images done, by this process. solver, steps, schedule, batch_size, options: those of
    `Model.sample`.

    Raises RunError where other images than these lie in <name>/, ModuleNotFoundError without the
    package of the format, and what `Model.sample` raises.
    """
    checks.one_of("format", format, FORMATS)
    checks.at_least("num", num, 1)
    checks.at_least("shard_size", shard_size, 1)
    require_format(format)
    plan = builders.build_sampling(
        model.config, model.parts.process, solver=solver, steps=steps, schedule=schedule
    )
    job = _Job(
        model,
        plan,
        random.sample_keys(key, num),
        min(num, batch_size or model.config.eval.batch_size),
        {name: value for name, value in options.items() if value is not None},
    )
    size = -(-shard_size // job.batch) * job.batch
    shape, levels = model.parts.image_shape, model.parts.quantisation.levels
    shards = Shards(Path(out) / name, format, num, size, shape, levels)
    if num > size or format == "arrayrecord":
        _claim_by_all(shards, job.request() | (about or {}))
        return _in_shards(job, shards, progress)
    if is_claimed(shards.folder):
        raise RunError(
            f"{shards.folder} holds many images in shards, whose grid and files these would "
            "replace. Choose another --out or --name, or delete it."
        )
    return _at_once(job, shards, progress)


class _Job(NamedTuple):
    """What to draw. keys: (num,). batch: images at once. options: the rest of `Model.draw`."""

    model: Model
    plan: builders.Sampling
    keys: Key
    batch: int
    options: dict[str, Any]

    def draw(self, rows: range, progress: Progress) -> np.ndarray:
        """These images, in the batches in which they would come among all."""
        whole = -(-len(rows) // self.batch) * self.batch
        places = np.minimum(np.arange(rows.start, rows.start + whole), len(self.keys) - 1)
        given: dict[str, Any] = {k: v[places] for k, v in self._each().items()}
        if self.options.get("guide") is not None:
            given["guide"] = taken(self.options["guide"], places)
        if "temperature" in self.options:
            given["temperature"] = self.options["temperature"]
        images = self.model.draw(
            self.keys[places],
            len(places),
            self.plan._replace(solver=taken(self.plan.solver, places)),
            batch_size=self.batch,
            progress=lambda done: progress(min(done, len(rows))),
            **given,
        )
        return images[: len(rows)]

    def labels(self, rows: range) -> np.ndarray | None:
        """The classes of these images."""
        return None if "labels" not in self._each() else self._each()["labels"][rows]

    def _each(self) -> dict[str, np.ndarray]:
        """What there is one of for each image."""
        given = {name: self.options.get(name) for name in ("labels", "latents")}
        return {name: np.asarray(value) for name, value in given.items() if value is not None}

    def request(self) -> dict[str, Any]:
        """All that the images depend on, as plain values."""
        solver, grid = self.plan.solver, np.asarray(self.plan.times)
        return {
            "checkpoint_step": self.model.step,
            "weights_sha256": digests.of_tree(self.model.params),
            "solver": digests.without_addresses(repr(solver))[:400],
            "steps": None if self.plan.adaptive else len(grid) - 1,
            "times": [float(t) for t in grid],
            "final": digests.without_addresses(repr(self.plan.final)),
            "plan_sha256": digests.of_tree(tuple(self.plan)),
            "keys_sha256": digests.of_tree(self.keys),
            "options_sha256": digests.of_tree(self.options),
            "batch_size": self.batch,
        }


def _at_once(job: _Job, shards: Shards, progress: Progress) -> Written:
    """One file of all images, or a PNG each; of several processes each draws some batches."""
    batches = [range(at, min(at + job.batch, shards.num)) for at in range(0, shards.num, job.batch)]
    own: list[np.ndarray] = []
    for k in hosts.share(len(batches)):
        own.append(job.draw(batches[k], _after(sum(map(len, own)), progress)))
    images = hosts.in_order(own, len(batches))
    if not hosts.is_first():
        return Written(images, ())
    if shards.format == "npz":
        files = [shards.folder.with_name(f"{shards.folder.name}.npz")]
        write_atomic(files[0], npz_bytes(images, job.labels(shards.rows(0))))
    else:
        files = shards.files(0)
        for file, image in zip(files, pictures.to_bytes(images, shards.levels), strict=True):
            pictures.write_png(file, image, least=1)
    return Written(images, (*files, _write_grid(shards, images)))


def _in_shards(job: _Job, shards: Shards, progress: Progress) -> Written:
    """The share of this process; then, by the first, the grid."""
    mine = hosts.share(shards.count)
    shards.sweep(mine)
    done = 0
    for k in mine:
        rows = shards.rows(k)
        if shards.entry(k) is None:
            shards.write(k, job.draw(rows, _after(done, progress)), job.labels(rows))
        done += len(rows)
        progress(done)
    hosts.all_agree(True)  # returns when all are here
    digest = shards.digest()
    files = [shards.folder]
    if hosts.is_first():
        files.append(_write_grid(shards, shards.read(0)))
    return Written(None, tuple(files), digest)


def _claim_by_all(shards: Shards, request: dict[str, Any]) -> None:
    """`shards.claim` by the first process, and checked by all."""
    failed = None
    if hosts.is_first():
        try:
            claim(shards, request)
        except (OSError, RunError) as error:
            failed = error
    if not hosts.all_agree(failed is None):
        raise failed or RunError(f"Process 0 cannot have {shards.folder}; it says why.")
    if not hosts.all_agree(is_claimed(shards.folder)):
        raise RunError(
            f"{shards.folder} is not the same directory in all processes: the manifest that "
            "process 0 wrote is not there in all. Give an --out that all share."
        )
    claim(shards, request)


def _after(before: int, progress: Progress) -> Progress:
    """What counts on from there."""
    return lambda done: progress(before + done)


def _write_grid(shards: Shards, images: np.ndarray) -> Path:
    """The first images as one picture."""
    shown = pictures.to_bytes(images[:_SHOWN], shards.levels)
    pictures.write_png(shards.grid, pictures.grid(shown), least=600)
    return shards.grid


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
    if plan.adaptive or plan.restarts:
        raise RunError(
            "An adaptive solver, or one with restarts, has no grid whose states could be shown as "
            "a path; choose a solver of a grid, such as solver=heun, without."
        )


def _sample_of(state: Any) -> Any:
    return state.x
