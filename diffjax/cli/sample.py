"""`diffjax sample`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags as absl_flags

from diffjax.cli import flags
from diffjax.runs.workdir import RunError

ABOUT = """diffjax sample: draw images from a trained model.

  diffjax sample --workdir=W --num=100 --solver=heun --steps=20
  diffjax sample --workdir=W --seeds=0-49999 --format=png --out=W/images
  diffjax sample --workdir=W --solver=ode --rtol=1e-3 --atol=1e-4
  diffjax sample --workdir=W --solver=ddim --schedule=ddim8.json

Writes <out>/<name>.npz (`images`, uint8 levels) or <out>/<name>/<i>.png, and a grid <name>.png.
Image i depends on its seed alone: not on the batch size, nor on how many are drawn.
More images than --shard_size are written in shards to <out>/<name>/; killed, the same command goes
on. A batch is split over all devices of a process. Several processes share the shards, or of a
single one the batches, among them; see `diffjax train --help`. Where there are fewer than
processes, a smaller --batch_size gives work to all. Weights that are too large for one device are
split by --mesh=fsdp:4 or tensor:2, as in training."""


def run(argv: Sequence[str]) -> int:
    """Parses and samples."""
    return flags.guarded("sample", lambda: _sample(argv))


def _sample(argv: Sequence[str]) -> int:
    values = absl_flags.FlagValues()
    define = flags.Definer(values)
    define.text("workdir", None, "the run to sample from")
    define.text("out", None, "where to write; the workdir by default")
    define.text("name", "samples", "name of the files")
    define.integer("num", 64, "number of images, with seeds 0, 1, ...")
    define.text("seeds", None, "one seed an image, as 0-99 or 3,5,8")
    define.text("labels", None, "classes, as 0-9 or 3,3,8, repeated")
    define.text("solver", None, "solver; the config's by default")
    define.integer("steps", None, "intervals of the grid; the config's")
    define.number("rtol", None, "relative tolerance of an adaptive solver; its own by default")
    define.number("atol", None, "absolute tolerance of an adaptive solver; its own by default")
    define.text("schedule", None, "a searched schedule's file, in place of the grid")
    define.integer("step", None, "checkpoint; the newest by default")
    define.text("ema", "main", "which average of the weights; a name in config.ema.others")
    define.integer("batch_size", None, "images at once on all devices; the config's")
    define.text("format", "npz", "npz, png or arrayrecord")
    define.integer("shard_size", 1024, "images a file where there are more; up to a whole batch")
    define.switch("path", False, "also draws the denoising path")
    flags.define_mesh(values)
    flags.define_processes(values)
    from diffjax import builders

    about = f"{ABOUT}\nSolvers: {', '.join(builders.SOLVERS)}."
    if not flags.parse(values, argv, about):
        return 0
    if values.workdir is None:
        raise RunError("--workdir is missing: the run to sample from.")
    flags.join(values)
    flags.enable_compilation_cache()
    from diffjax.runs import hosts
    from diffjax.runs.model import load
    from diffjax.runs.sample import check_path, sample_to, seed_keys, write_path

    model = load(values.workdir, step=values.step, ema=values.ema, mesh=flags.local_mesh(values))
    seeds = numbers("seeds", values.seeds) if values.seeds else list(range(values.num))
    labels = numbers("labels", values.labels) if values.labels else None
    if labels is not None:
        labels = [labels[i % len(labels)] for i in range(len(seeds))]
    options = {"solver": values.solver, "steps": values.steps, "labels": labels}
    if values.schedule is not None:
        options["schedule"] = schedule_of(values.schedule)
    chosen = {name: options.get(name) for name in ("solver", "steps", "schedule")}
    plan = builders.build_sampling(model.config, model.parts.process, **chosen)
    if values.path:
        check_path(plan)
    if values.rtol is not None or values.atol is not None:
        options["solver"] = builders.with_tolerances(plan, values.rtol, values.atol).solver
    out = Path(values.out or values.workdir)
    with flags.bar("images", len(seeds)) as progress:
        written = sample_to(
            model,
            out,
            key=seed_keys(seeds),
            num=len(seeds),
            format=values.format,
            name=values.name,
            batch_size=values.batch_size,
            shard_size=values.shard_size,
            about={"seeds": ranges(seeds), "labels": values.labels},
            progress=progress,
            **options,
        )
    if not hosts.is_first():
        return 0
    files = [written.files[0], written.files[-1]] if len(written.files) > 3 else written.files
    if values.path:
        path = out / f"{values.name}_path.png"
        write_path(model, path, seeds=seeds[:6], **options)
        files = [*files, path]
    flags.say(f"Drew {len(seeds)} images of step {model.step}: {', '.join(map(str, files))}.")
    if written.digest is not None:
        flags.say(f"Judge them with diffjax evaluate --samples={out / values.name}.")
    return 0


def schedule_of(path: str) -> Any:
    """The schedule of a file. Raises RunError for anything else."""
    from diffjax.search import ScheduleError, load_schedule

    try:
        return load_schedule(path)
    except ScheduleError as error:
        raise RunError(f"--schedule: {error}") from error


def ranges(found: Sequence[int]) -> str:
    """The text that `numbers` reads as these: "0-3,7" for [0, 1, 2, 3, 7]."""
    runs: list[list[int]] = []
    for number in found:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def numbers(name: str, text: str) -> list[int]:
    """Reads "0-3,7" as [0, 1, 2, 3, 7]. Raises RunError for anything else."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdigit() and (last.isdigit() or not dash)):
            raise RunError(
                f"--{name} takes numbers and ranges such as 0-99 or 3,5,8; got {text!r}."
            )
        found += range(int(first), int(last) + 1) if dash else [int(first)]
    if not found:
        raise RunError(f"--{name} names no number; got {text!r}.")
    if max(found) >= 2**32:
        raise RunError(f"--{name} takes numbers below 2**32; got {max(found)}.")
    return found
