"""Averages of the weights in the host's memory, where the devices leave no room for them.

Between updates the averages lie in pinned memory of the host; each update copies them to the device
and back, twice their size over the bus. The compiler may place both copies where the activations
are gone, so that the averages need not be on the device together with these. It pays where
averages are many and updates long. The numbers are the same to the last bit.

Which memories a device has: `device.addressable_memories()`. CPUs have them too, as names of one
memory, so that a config with offload runs anywhere.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from diffjax.core.types import PyTree
from diffjax.train.state import TrainState

HOST = "pinned_host"

Step = Callable[[TrainState, PyTree], tuple[TrainState, Any]]


def averages_on_host(layout: TrainState) -> TrainState:
    """A layout of a state (a tree of shardings like it) with the averages in the host's memory.

    Raises ValueError for devices without such memory.
    """

    def on_host(sharding: jax.sharding.NamedSharding) -> jax.sharding.NamedSharding:
        device: Any = next(iter(sharding.addressable_devices))
        kinds = [memory.kind for memory in device.addressable_memories()]
        if HOST not in kinds:
            raise ValueError(f"{device} has no {HOST} memory, only {', '.join(kinds)}.")
        return sharding.with_memory_kind(HOST)

    return dataclasses.replace(layout, ema=jax.tree.map(on_host, layout.ema))


def is_on_host(layout: TrainState) -> bool:
    """Whether a layout is of `averages_on_host`."""
    return any(sharding.memory_kind == HOST for sharding in jax.tree.leaves(layout.ema))


def through_device(step: Step) -> Step:
    """`step` for a state whose averages lie in the host's memory, before and after."""

    def run(state, batch):
        near = jax.device_put(state.ema, jax.memory.Space.Device)
        state, metrics = step(dataclasses.replace(state, ema=near), batch)
        far = jax.device_put(state.ema, jax.memory.Space.Host)
        return dataclasses.replace(state, ema=far), metrics

    return run
