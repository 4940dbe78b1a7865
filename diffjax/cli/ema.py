"""`diffjax ema`."""

from collections.abc import Sequence

from absl import flags as absl_flags

from diffjax.cli import flags
from diffjax.runs.workdir import RunError

ABOUT = """diffjax ema: averaged weights of another width, after training.

  diffjax ema --workdir=W --std=0.05
  diffjax sample --workdir=W/ema/0.05-400000
  diffjax ema --workdir=W --std=0.12 --step=200000 --out=W2

The run must have tracked power-function averages, best two:
  config.ema = {"name": "power", "std": 0.1, "others": {"narrow": {"name": "power", "std": 0.05}}}
All checkpoints up to --step are combined; how near their profiles come to the one asked for is
printed, and too far is refused.
--std is the standard deviation of the profile as a share of the updates so far."""


def run(argv: Sequence[str]) -> int:
    """Parses and reconstructs."""
    return flags.guarded("ema", lambda: _ema(argv))


def _ema(argv: Sequence[str]) -> int:
    values = absl_flags.FlagValues()
    define = flags.Definer(values)
    define.text("workdir", None, "the run whose averages to combine")
    define.number("std", None, "relative width, above 0 and at most 0.2886")
    define.integer(
        "step", None, "the updates behind the average; the newest checkpoint's by default"
    )
    define.text("out", None, "the workdir to write; <workdir>/ema/<std>-<step> by default")
    if not flags.parse(values, argv, ABOUT):
        return 0
    for name in ("workdir", "std"):
        if values[name].value is None:
            raise RunError(f"--{name} is missing; see diffjax ema --help.")
    from diffjax.runs.ema import reconstruct

    done = reconstruct(values.workdir, values.std, step=values.step, out=values.out)
    print(
        f"Wrote the average of width {done.std:g} after {done.step} updates into {done.workdir}, "
        f"from {done.averages} averages; its profile is {done.error:.2%} off."
    )
    return 0
