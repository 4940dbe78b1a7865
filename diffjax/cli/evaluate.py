"""`diffjax evaluate`."""

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
    define = flags.Definer(values)
    define.text("workdir", None, "the run to measure")
    define.words("metrics", ["loss", "bpd"], "what to measure")
    define.integer("step", None, "checkpoint; the newest by default")
    define.integer("num", None, "images to draw; the config's")
    define.integer("limit", None, "held-out images for bpd and bound; all")
    define.integer("seed", 0, "seed of everything drawn")
    define.text("samples", None, "an .npz of samples to judge")
    define.text("solver", None, "solver; the config's by default")
    define.integer("steps", None, "intervals of the grid; the config's")
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
        print(f"{name}:")
        for line in DESCRIPTIONS[name]:
            print("  " + line.format(**figures))
    print(f"Written to {Path(values.workdir) / 'eval'}.")
    return 0


# What a person reads; the files have all figures.
DESCRIPTIONS = {
    "loss": ["{mean:.4f} +- {standard_error:.4f} over {images} held-out images"],
    "bpd": [
        "{mean:.3f} +- {standard_error:.3f} bits/dim of {images} held-out images",
        "beside {uniform:.3f} = log2({levels}) and {histogram:.3f} of a histogram for each pixel",
    ],
    "bound": ["{mean:.3f} +- {standard_error:.3f} bits/dim at most, over {images} held-out images"],
    "frechet": [
        "{distance:.3f} in {features} features of {n} samples against {n} held-out images",
        "beside {real_versus_real:.3f} +- {real_versus_real_std:.3f} of real against real",
    ],
    "quality": [
        "recognised: {recognised:.1%} of {samples} samples, {recognised_ratio:.2f} of the held-out "
        "images' {recognised_real:.1%}",
        "classes: {least_class_share:.1%} to {largest_class_share:.1%} of the samples each",
        "nearest training image: {nearest_train:.2f} away, {nearest_ratio:.2f} of the held-out "
        "images' {nearest_train_real:.2f}",
    ],
}
