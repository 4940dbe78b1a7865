"""Averages of another width after training: `reconstruct(workdir, std)`.

The run must have tracked power-function averages: config.ema or one of config.ema.others named
"power", best two (std 0.05 and 0.1). Every checkpoint that is still there holds them all; those at
multiples of `training.snapshot_freq` are kept for good. See `diffjax.train.posthoc`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffjax import builders
from diffjax.core.types import PyTree
from diffjax.runs.weights import write
from diffjax.runs.workdir import RunError, plain, read_config

# Of a profile of which this share is missing (in L2) nobody would say that it is the one asked for.
_WORST = 0.25


class Reconstructed(NamedTuple):
    """workdir: what was written. step, std: of the average. error: of its profile, relative in L2.

    averages: how many stored ones were combined.
    """

    workdir: Path
    step: int
    std: float
    error: float
    averages: int


def reconstruct(
    workdir: str | Path, std: float, *, step: int | None = None, out: str | Path | None = None
) -> Reconstructed:
    """Writes a workdir whose averaged weights are the power-function average of width `std`.

    std: relative to `step`, the updates behind the average, by default those of the newest
    checkpoint; only checkpoints up to it are used. out: a new workdir; by default
    `<workdir>/ema/<std>-<step>`. `load` and `sample` take it; the optimizer starts anew there.

    Raises RunError where no power-function average was tracked, where the stored ones do not give
    this one, or where `out` holds checkpoints, CheckpointError for a step that is not there.
    """
    from diffjax.train.checkpoint import Checkpointer
    from diffjax.train.ema import WIDEST

    if not 0 < std <= WIDEST:
        raise RunError(f"std must lie in (0, {WIDEST:.4f}], a share of the run; got {std}.")
    config = read_config(workdir)
    tracks = _power_tracks(workdir, config)
    with Checkpointer(workdir, writable=False) as reader:
        step = reader.meta(step).step
        target = Path(out or Path(workdir) / "ema" / f"{std:g}-{step}")
        if (target / "checkpoints").exists():
            raise RunError(f"{target} holds checkpoints already; give another --out.")
        params, error, count = _combined(reader, config, tracks, std, step)
    written = ConfigDict(plain(config))
    written.ema = {"name": "power", "std": std}
    write(written.lock(), target, jax.tree.map(jnp.asarray, params), step)
    return Reconstructed(target, step, std, error, count)


def _power_tracks(workdir: str | Path, config: Any) -> dict[float, str]:
    """The names of the run's power-function averages by width; one of each."""
    from diffjax.train.ema import PowerEMA

    rules = builders.build_ema(config)
    found = {float(r.std): name for name, r in rules.items() if isinstance(r, PowerEMA)}
    if not found:
        raise RunError(
            f"{workdir} tracked no power-function average, of which others could be made: train "
            "with config.ema = {'name': 'power', 'std': 0.1} and another in config.ema.others."
        )
    return found


def _combined(
    reader: Any, config: Any, tracks: Mapping[float, str], std: float, step: int
) -> tuple[PyTree, float, int]:
    """The wanted average, the error of its profile, and of how many it was made."""
    from diffjax.train import posthoc, state

    steps = [at for at in reader.steps() if 0 < at <= step]
    stored = [(posthoc.Profile(at, width), name) for at in steps for width, name in tracks.items()]
    wanted = posthoc.Profile(step, std)
    found = posthoc.fit([profile for profile, _ in stored], wanted)
    if found.error > _WORST:
        widths = ", ".join(f"{width:g}" for width in sorted(tracks))
        raise RunError(
            f"The averages of widths {widths} at {len(steps)} checkpoints do not give one of width "
            f"{std:g}: {found.error:.0%} of its profile would be wrong. Choose std nearer to "
            "these, or train with a smaller config.training.snapshot_freq."
        )
    like = state.abstract(
        jax.eval_shape(builders.build_parts(config).init_params, jax.random.key(0)),
        jax.sharding.SingleDeviceSharding(jax.local_devices()[0]),
    )

    def trees() -> Iterator[PyTree]:
        for profile, name in stored:
            yield jax.tree.map(np.asarray, reader.restore_ema(like, profile.step, name)[0])

    return posthoc.combine(found.weights, trees()), found.error, len(stored)
