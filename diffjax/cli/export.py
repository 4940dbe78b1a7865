"""`diffjax export`."""

from collections.abc import Sequence

from absl import flags as absl_flags

from diffjax.cli import flags
from diffjax.runs.workdir import RunError

ABOUT = """diffjax export: a model's sampler as one file that needs neither diffjax nor flax.

  diffjax export --workdir=W --out=sampler.npz --solver=heun --steps=20

The file takes seeds (any number of them), and labels where the model has classes, to uint8 levels.
To draw with it, where there is JAX, NumPy and flatbuffers:

  import jax, numpy as np
  from jax import export
  with np.load("sampler.npz") as saved:
      program = export.deserialize(bytearray(saved["program"].tobytes()))
      weights = [saved[f"weight_{i}"] for i in range(len(saved.files) - 1)]
  draw = jax.jit(program.call)
  images = draw(jax.device_put(weights), np.arange(16, dtype=np.uint32))"""


def run(argv: Sequence[str]) -> int:
    """Parses and exports."""
    return flags.guarded("export", lambda: _export(argv))


def _export(argv: Sequence[str]) -> int:
    values = absl_flags.FlagValues()
    define = flags.Definer(values)
    define.text("workdir", None, "the run whose sampler is written")
    define.text("out", None, "the .npz to write")
    define.text("solver", None, "solver; the config's by default")
    define.integer("steps", None, "intervals of the grid; the config's")
    define.text("schedule", None, "a searched schedule's file, in place of the grid")
    define.integer("step", None, "checkpoint; the newest by default")
    define.words("platforms", ["cpu", "cuda", "tpu"], "what it shall run on; rocm is another")
    if not flags.parse(values, argv, ABOUT):
        return 0
    for name, what in (("workdir", "the run to export"), ("out", "the file to write")):
        if values[name].value is None:
            raise RunError(f"--{name} is missing: {what}.")
    from diffjax.cli.sample import schedule_of
    from diffjax.interop.export import require_flatbuffers
    from diffjax.runs.export import export_to
    from diffjax.runs.model import load

    require_flatbuffers()
    schedule = None if values.schedule is None else schedule_of(values.schedule)
    model = load(values.workdir, step=values.step)
    written = export_to(
        model,
        values.out,
        solver=values.solver,
        steps=values.steps,
        schedule=schedule,
        platforms=values.platforms,
    )
    print(
        f"Wrote {written.file}: the sampler of step {model.step} for "
        f"{', '.join(written.platforms)}, {written.file.stat().st_size:,} bytes, of which the "
        f"program {written.program_bytes:,}."
    )
    return 0
