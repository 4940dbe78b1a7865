"""What a run's speed is compared with: the chips, their peak, and the FLOPs of an update."""

from typing import Any

import jax
from jax.sharding import Mesh

from diffjax import builders
from diffjax.runs.chips import CHIPS, Chip

# What JAX calls a device, in small letters, begins so; the longer of two that fit holds.
_KINDS = {
    "tpu v4": "tpu-v4",
    "tpu v5 lite": "tpu-v5e",
    "tpu v5e": "tpu-v5e",
    "tpu v5": "tpu-v5p",
    "tpu v5p": "tpu-v5p",
    "tpu v6 lite": "tpu-v6e",
    "tpu v6e": "tpu-v6e",
    "nvidia a100": "a100",
    "nvidia h100": "h100",
    "nvidia h200": "h200",
}


def chip_of(kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`; None for one that the table lacks, such as a CPU."""
    fitting = [name for name in _KINDS if kind.lower().startswith(name)]
    return CHIPS[_KINDS[max(fitting, key=len)]] if fitting else None


def machine(config: Any, parts: builders.Parts, devices: Mesh) -> Any:
    """The `telemetry.Machine` of a mesh.

    The FLOPs are those that the gradient needs, counted from its jaxpr, and only where the chip is
    known; its peak is that in bfloat16. What remat computes again does not count.
    """
    from diffjax.train.telemetry import Machine

    first: jax.Device = devices.devices.flat[0]
    chip = chip_of(first.device_kind)
    if chip is None:
        return Machine(devices.size)
    from diffjax.runs import counting, dryrun

    if getattr(parts.net, "remat", False):
        parts = parts._replace(net=parts.net.clone(remat=False))
    gradient = dryrun.gradient(config, parts, config.training.batch_size)
    return Machine(devices.size, counting.work(gradient).flops, chip.bfloat16)
