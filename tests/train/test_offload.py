"""Averages in the host's memory: where they lie, and that nothing else changes."""

import types

import jax
import numpy as np
import pytest

from diffjax import builders
from diffjax.runs.workdir import load_config
from diffjax.train import ema, mesh, offload, step
from tests.train import toy


def kinds(tree):
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


@pytest.mark.parametrize("n", [1, 2])
def test_the_numbers_are_those_without(n):
    on = mesh.make_mesh()
    rules = {"main": ema.ConstantEMA(0.9)}
    plain = toy.new_state(on)
    layout = jax.tree.map(lambda _: mesh.replicated(on), plain)
    assert not offload.is_on_host(layout)
    layout = offload.averages_on_host(layout)
    fn = step.compile_step(
        on,
        loss_fn=toy.loss_fn,
        optimizer=toy.OPTIMIZER,
        ema=rules,
        schedule=toy.SCHEDULE,
        skip_bad=True,  # which compares averages too
        state_sharding=layout,
    )
    far = jax.device_put(toy.new_state(on), layout)
    for batch in [batch for batch, _ in zip(toy.feed(on, n=n), range(4 // n), strict=False)]:
        plain, _ = toy.compiled(on)(plain, batch)
        far, _ = fn(far, batch)
    assert kinds(far.ema) == {"pinned_host"} and "pinned_host" not in kinds(far.params)
    for a, b in zip(jax.tree.leaves(far.ema), jax.tree.leaves(plain.ema), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-6)
        assert np.abs(np.asarray(a)).max() > 0


def test_devices_without_such_memory_are_refused():
    memory = types.SimpleNamespace(kind="device")
    device = types.SimpleNamespace(addressable_memories=lambda: [memory])
    sharding = types.SimpleNamespace(addressable_devices=[device])
    layout = toy.new_state(mesh.make_mesh(data=1))
    layout = jax.tree.map(lambda _: sharding, layout)
    config = load_config("digits:quick").unlock()
    assert builders.build_offload(config, layout) is layout
    config.ema.offload = True
    assert set(builders.build_ema(config)) == {"main"}
    with pytest.raises(builders.BuildError, match="no pinned_host memory, only device"):
        builders.build_offload(config, layout)
