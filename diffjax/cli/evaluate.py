"""`diffjax evaluate`, and `diffjax evaluate stats`."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags as absl_flags

from diffjax.cli import flags
from diffjax.runs.workdir import RunError

ABOUT = """diffjax evaluate: measure a trained model.

  diffjax evaluate --workdir=W --metrics=loss,bpd
  diffjax evaluate --workdir=W --metrics=frechet,quality --num=500 --solver=heun --steps=20
  diffjax evaluate --workdir=W --metrics=fid,is,kid,pr --inception=PATH
  diffjax evaluate --workdir=W --metrics=quality --samples=W/samples.npz
  diffjax evaluate --workdir=W --metrics=fid --checkpoints=all
  diffjax evaluate stats --help          reference statistics of a data set

Writes <workdir>/eval/<metric>.json. Stopped part-way, the same command goes on. All devices of a
process are used; --mesh=fsdp:4 splits weights that are too large for one. Several processes share
the samples among them; see `diffjax train --help`. Metrics:
  loss      training loss of held-out images
  bpd       bits/dim of held-out images by the probability flow, beside two baselines
  bound     the variational bound in bits/dim
  fid       Frechet distance to the training split in FID's Inception features
  is        Inception Score
  kid       kernel distance in Inception's features
  pr        precision, recall, density and coverage, in Inception's features or --feature_net's
  frechet   distance in the features of --feature_net, else of a small classifier trained here
            (not a FID)
  quality   share of samples recognised, shares of the classes, distance to the training images"""

ABOUT_STATS = """diffjax evaluate stats: reference statistics of a data set.

  diffjax evaluate stats --config=vp/cifar10_ddpmpp_continuous --inception=PATH --out=cifar10.npz
  diffjax evaluate stats --config=digits --feature_net=digits_net.npz --out=digits.npz

Writes an .npz with mu, sigma, count and provenance (data set, split, range, resize, count, hashes)
of a whole split, for `diffjax evaluate --reference`. Stopped part-way, the same command goes on."""


def run(argv: Sequence[str]) -> int:
    """Parses and evaluates."""
    if list(argv[1:2]) == ["stats"]:
        rest = [f"{argv[0]} stats", *argv[2:]]
        return flags.guarded("evaluate stats", lambda: _stats(rest))
    return flags.guarded("evaluate", lambda: _evaluate(argv))


def _define_networks(define: flags.Definer) -> None:
    define.text("inception", None, "weights of FID's Inception; DIFFJAX_INCEPTION by default")
    define.text(
        "inception_input", "pytorch_fid", "how images reach it: pytorch_fid, tfgan or tf2015"
    )
    define.text("feature_net", None, "a network of scripts/train_feature_net")


def _evaluate(argv: Sequence[str]) -> int:
    values = absl_flags.FlagValues()
    define = flags.Definer(values)
    define.text("workdir", None, "the run to measure")
    define.words("metrics", ["loss", "bpd"], "what to measure")
    define.integer("step", None, "checkpoint; the newest by default")
    define.text("ema", "main", "which average of the weights; a name in config.ema.others")
    define.integer("num", None, "images to draw; the config's")
    define.integer("limit", None, "held-out images for bpd and bound; all")
    define.integer("seed", 0, "seed of everything drawn")
    define.text("samples", None, "an .npz of samples to judge, or a folder of shards")
    define.text("solver", None, "solver; the config's by default")
    define.integer("steps", None, "intervals of the grid; the config's")
    _define_networks(define)
    define.text("reference", None, "statistics from `diffjax evaluate stats`; computed by default")
    define.integer("splits", 1, "splits of the Inception Score; 10 as first published")
    define.integer("repeats", 1, "dequantisations of each image for bpd")
    define.integer("probe_repeats", 1, "solves with own probes for each dequantisation")
    define.switch("score_sde_protocol", False, "bpd by the 5 passes of the Score-SDE paper")
    options = [name for name in values if name not in ("workdir", "metrics")]
    flags.define_mesh(values)
    define.text("checkpoints", None, "all, or best by the held-out loss of training")
    flags.define_processes(values)
    if not flags.parse(values, argv, ABOUT):
        return 0
    if values.workdir is None:
        raise RunError("--workdir is missing: the run to measure.")
    flags.join(values)
    flags.enable_compilation_cache()
    given: dict[str, Any] = {name: values[name].value for name in options}
    given["mesh"] = flags.local_mesh(values)
    if values.checkpoints is None:
        from diffjax.runs.evaluate import evaluate

        _print(evaluate(values.workdir, values.metrics, **given))
    elif given.pop("step") is not None:
        raise RunError("--step and --checkpoints exclude each other.")
    else:
        from diffjax.runs.checkpoints import chosen, evaluate_each

        steps = chosen(values.workdir, values.checkpoints)
        for step, found in evaluate_each(values.workdir, values.metrics, steps, **given).items():
            flags.say(f"checkpoint {step}")
            _print(found)
    flags.say(f"Written to {Path(values.workdir) / 'eval'}.")
    return 0


def _stats(argv: Sequence[str]) -> int:
    values = absl_flags.FlagValues()
    define = flags.Definer(values)
    define.text("config", None, "the config whose data are measured")
    define.text("split", "train", "train or eval")
    define.text("out", None, "the .npz to write")
    define.integer("batch_size", None, "images at once; the config's")
    define.switch("keep_features", False, "also the features, which kid and pr need")
    _define_networks(define)
    flags.define_processes(values)
    if not flags.parse(values, argv, ABOUT_STATS):
        return 0
    for name in ("config", "out"):
        if values[name].value is None:
            raise RunError(f"--{name} is missing: {values[name].help}.")
    if values.split not in ("train", "eval"):
        raise RunError(f"--split must be train or eval; got {values.split!r}.")
    flags.join(values)
    flags.enable_compilation_cache()
    from diffjax import builders
    from diffjax.runs import extractors, stats
    from diffjax.runs.workdir import load_config

    config = load_config(values.config)
    info = builders.build_source(config, values.split).info
    if values.feature_net:
        extractor = extractors.load_feature_net(values.feature_net, info.shape, info.levels)
    else:
        extractor = extractors.load_inception(
            values.inception, info.shape, info.levels, input=values.inception_input
        )
    out = Path(values.out)
    partial = out.with_name(f".{out.name}.partial")
    with flags.bar("images", info.size) as progress:
        found = stats.of_split(
            config,
            values.split,
            extractor,
            keep=values.keep_features,
            batch_size=values.batch_size,
            folder=partial,
            progress=progress,
        )
    stats.write_stats(out, found)
    shutil.rmtree(partial, ignore_errors=True)
    flags.say(f"Wrote {out}: {found.num} images of {info.name} in {extractor.name}.")
    return 0


def _print(found: dict[str, dict]) -> None:
    for name, figures in found.items():
        flags.say(f"{name}:")
        for line in _description(name, figures):
            flags.say("  " + line.format(**figures))


def _description(name: str, figures: dict) -> list[str]:
    """The lines for a metric; those of figures that it does not have are left out."""
    return [line for needed, line in DESCRIPTIONS[name] if needed is None or needed in figures]


_OF = (None, "in {features} features of {of}")
# What a person reads, each line with the figure that it needs; the files have all figures.
DESCRIPTIONS: dict[str, list[tuple[str | None, str]]] = {
    "accuracy": [
        (
            None,
            "{mean:.1%} of {images} held-out images, over {num_times} times; {first:.1%} with the "
            "least noise, {last:.1%} with the most",
        ),
    ],
    "loss": [(None, "{mean:.4f} +- {standard_error:.4f} over {images} held-out images")],
    "bpd": [
        (None, "{mean:.3f} +- {standard_error:.3f} bits/dim of {images} held-out images"),
        (
            None,
            "beside {uniform:.3f} = log2({levels}) and {histogram:.3f} of a histogram for each "
            "pixel",
        ),
    ],
    "bound": [
        (None, "{mean:.3f} +- {standard_error:.3f} bits/dim at most, over {images} held-out images")
    ],
    "fid": [(None, "{distance:.4f} of {n} samples to {reference_images} images"), _OF],
    "is": [(None, "{mean:.4f} +- {std:.4f} over {num_splits} splits of {n} samples"), _OF],
    "kid": [
        (None, "{distance:.6f} of {n} samples to {reference_images} images, {blocks} blocks"),
        (None, "{subsets_mean:.6f} over random subsets of {subset_size}"),
        _OF,
    ],
    "pr": [
        (None, "precision {precision:.4f}, recall {recall:.4f} of {n} samples"),
        (None, "density {density:.4f}, coverage {coverage:.4f}"),
        _OF,
    ],
    "frechet": [
        ("reference_images", "{distance:.3f} of {n} samples to {reference_images} images"),
        ("reference_images", "in {features} features of {of}"),
        (
            "real_versus_real",
            "{distance:.3f} in {features} features of {n} samples against {n} held-out images",
        ),
        (
            "real_versus_real",
            "beside {real_versus_real:.3f} +- {real_versus_real_std:.3f} of real against real",
        ),
    ],
    "quality": [
        (
            None,
            "recognised: {recognised:.1%} of {samples} samples, {recognised_ratio:.2f} of the "
            "held-out images' {recognised_real:.1%}",
        ),
        (
            None,
            "classes: {least_class_share:.1%} to {largest_class_share:.1%} of the samples each",
        ),
        (
            None,
            "nearest training image: {nearest_train:.2f} away, {nearest_ratio:.2f} of the held-out "
            "images' {nearest_train_real:.2f}",
        ),
    ],
}
