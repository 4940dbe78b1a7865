"""`diffjax evaluate`."""

import json
from collections.abc import Sequence
from pathlib import Path

from absl import flags as absl_flags

from diffjax.cli import flags
from diffjax.runs.workdir import RunError

ABOUT = """diffjax evaluate: measure a trained model.

  diffjax evaluate --workdir=W --metrics=loss,bpd
  diffjax evaluate --workdir=W --metrics=frechet,quality --num=500 --solver=heun --steps=20
  diffjax evaluate --workdir=W --metrics=quality --samples=W/samples.npz

Writes <workdir>/eval/<metric>.json. Metrics:
  loss      training loss of held-out images
  bpd       bits/dim of held-out images by the probability flow, beside two baselines
  bound     the variational bound in bits/dim
  frechet   distance in the features of a small classifier trained here (not a FID)
  quality   share of samples recognised, shares of the classes, distance to the training images"""


def run(argv: Sequence[str]) -> int:
    """Parses and evaluates."""
    return flags.guarded("evaluate", lambda: _evaluate(argv))


def _evaluate(argv: Sequence[str]) -> int:
    values = absl_flags.FlagValues()
    define = {"flag_values": values}
    absl_flags.DEFINE_string("workdir", None, "the run to measure", **define)
    absl_flags.DEFINE_list("metrics", ["loss", "bpd"], "what to measure", **define)
    absl_flags.DEFINE_integer("step", None, "checkpoint; the newest by default", **define)
    absl_flags.DEFINE_integer("num", None, "images to draw; the config's", **define)
    absl_flags.DEFINE_integer("limit", None, "held-out images for bpd and bound; all", **define)
    absl_flags.DEFINE_integer("seed", 0, "seed of everything drawn", **define)
    absl_flags.DEFINE_string("samples", None, "an .npz of samples to judge", **define)
    absl_flags.DEFINE_string("solver", None, "solver; the config's by default", **define)
    absl_flags.DEFINE_integer("steps", None, "intervals of the grid; the config's", **define)
    if not flags.parse(values, argv, ABOUT):
        return 0
    if values.workdir is None:
        raise RunError("--workdir is missing: the run to measure.")
    flags.enable_compilation_cache()
    from diffjax.runs.evaluate import evaluate

    found = evaluate(
        values.workdir,
        values.metrics,
        step=values.step,
        samples=values.samples,
        num=values.num,
        limit=values.limit,
        seed=values.seed,
        solver=values.solver,
        steps=values.steps,
    )
    for name, figures in found.items():
        print(f"{name}: {json.dumps(figures)}")
    print(f"Written to {Path(values.workdir) / 'eval'}.")
    return 0
