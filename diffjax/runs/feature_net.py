"""Training the network of an offline Fréchet distance on a config's labelled data, to one file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from diffjax import builders
from diffjax.metrics import feature_net
from diffjax.runs.extractors import save_feature_net
from diffjax.runs.workdir import RunError
from diffjax.version import __version__


class Trained(NamedTuple):
    """The file, and the share of held-out images whose label the network names."""

    path: Path
    accuracy: float


def train_feature_net(
    config: Any,
    out: str | Path,
    *,
    seed: int = 0,
    width: int = 32,
    stages: int = 3,
    dim: int = 128,
    shift: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
    **options: Any,
) -> Trained:
    """Trains on the config's training split and writes weights and provenance to `out` (.npz).

    width, stages, dim: of `metrics.feature_net.ResNet`. shift: an eighth of the size by default
    where the config mirrors its images at random, as those of CIFAR-10, and 0 where it does not, as
    digits. options: those of `metrics.feature_net.train_feature_net`.
    Raises RunError for data without labels and for another suffix.
    """
    from diffjax.data import in_memory

    out = Path(out)
    if out.suffix != ".npz":
        raise RunError(f"--out must end in .npz; got {str(out)!r}.")
    train = in_memory(builders.build_source(config, "train"))
    heldout = in_memory(builders.build_source(config, "eval"))
    if train.labels is None or heldout.labels is None or train.info.num_classes is None:
        raise RunError(
            f"A feature network is trained on labels; {train.info.name} has none. Take a config of "
            "labelled data."
        )
    mirror = bool(config.data.random_flip)
    if shift is None:
        shift = min(train.info.shape[:2]) // 8 if mirror else 0
    net = feature_net.train_feature_net(
        jax.random.key(seed),
        train.images,
        train.labels,
        feature_net.ResNet(train.info.num_classes, width, stages, dim),
        levels=train.info.levels,
        mirror=mirror,
        shift=shift,
        progress=progress,
        **options,
    )
    right = feature_net.accuracy(net, heldout.images, heldout.labels)
    about = {
        "dataset": train.info.name,
        "image_shape": list(train.info.shape),
        "trained_on": len(train),
        "heldout_accuracy": right,
        "seed": seed,
        "mirror": mirror,
        "shift": shift,
        **options,
        "diffjax": __version__,
    }
    save_feature_net(out, net, about)
    return Trained(out, right)
