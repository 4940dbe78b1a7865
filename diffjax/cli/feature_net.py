"""`scripts/train_feature_net`: the network of an offline Fréchet distance."""

from collections.abc import Sequence

from absl import flags as absl_flags

from diffjax.cli import flags
from diffjax.runs.workdir import RunError

ABOUT = """train_feature_net: train a small network whose features give a Frechet distance offline.

  scripts/train_feature_net --config=digits --out=digits_net.npz --steps=1000
  scripts/train_feature_net --config=vp/cifar10_ddpmpp_continuous --out=cifar10_net.npz

Then: diffjax evaluate --workdir=W --metrics=frechet,pr --feature_net=digits_net.npz
Its distances compare models under this one network; they are not FIDs."""


def run(argv: Sequence[str]) -> int:
    """Parses and trains."""
    return flags.guarded("train_feature_net", lambda: _train(argv))


def _train(argv: Sequence[str]) -> int:
    values = absl_flags.FlagValues()
    define = flags.Definer(values)
    define.text("config", None, "the config whose labelled data are learnt")
    define.text("out", None, "the .npz to write")
    define.integer("steps", 2000, "updates")
    define.integer("batch_size", 128, "images an update")
    define.integer("width", 32, "channels of the first stage")
    define.integer("stages", 3, "stages; each but the first halves the size")
    define.integer("dim", 128, "features")
    define.integer("seed", 0, "seed of weights and batches")
    if not flags.parse(values, argv, ABOUT):
        return 0
    for name in ("config", "out"):
        if values[name].value is None:
            raise RunError(f"--{name} is missing: {values[name].help}.")
    flags.enable_compilation_cache()
    from diffjax.runs.feature_net import train_feature_net
    from diffjax.runs.workdir import load_config

    names = ("steps", "batch_size", "width", "stages", "dim", "seed")
    with flags.bar("steps", values.steps) as progress:
        trained = train_feature_net(
            load_config(values.config),
            values.out,
            progress=progress,
            **{name: getattr(values, name) for name in names},
        )
    print(f"Wrote {trained.path}: it names {trained.accuracy:.1%} of the held-out images rightly.")
    return 0
