"""A run on one mesh, gone on with on another: the same numbers. A mesh is a config value."""

import shutil

import jax
import numpy as np
import pytest

import diffjax as dj
from diffjax import builders
from diffjax.builders import BuildError
from diffjax.runs.train import prepare
from diffjax.runs.workdir import load_config
from diffjax.train import state
from diffjax.train.telemetry import read_jsonl


def on_mesh(**fields):
    config = load_config("digits:quick")
    with config.unlocked():
        config.mesh.update(fields)
    return config


def test_a_mesh_is_a_config_value():
    assert builders.build_mesh(on_mesh(fsdp=4)).shape == {"data": 2, "fsdp": 4, "tensor": 1}
    with pytest.raises(BuildError, match="config.mesh: .*must divide the 8 devices"):
        builders.build_mesh(on_mesh(fsdp=3))
    with pytest.raises(BuildError, match=r"config.mesh has the fields data, fsdp.*\['expert'\]"):
        builders.build_mesh(on_mesh(expert=2))


def layout(config):
    parts = builders.build_parts(config)
    optimizer, _ = builders.build_optimizer(config)
    key = jax.random.key(0)
    like = jax.eval_shape(lambda: state.create_state(key, parts.init_params(key), optimizer))
    return builders.build_sharding(config, builders.build_mesh(config), like)


def test_rules_come_from_the_config():
    # As JSON gives them: lists.
    rules = [["^Dense_0/kernel$", [None, ["fsdp", "tensor"]]]]
    found = layout(on_mesh(data=1, fsdp=4, tensor=2, rules=rules))
    for tree in (found.params, found.ema["main"], found.opt_state[1].mu):
        assert tuple(tree["Dense_0"]["kernel"].spec) == (None, ("fsdp", "tensor"))
    with pytest.raises(BuildError, match="config.mesh: The rule 'none' matches no parameter"):
        layout(on_mesh(rules=[["none", ["fsdp"]]]))


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "10")
    config = on_mesh(data=2, fsdp=2, tensor=2, min_size=64)
    assert dj.train(config, workdir, show_progress=False) == (10, True)
    one, other = dj.load(trained), dj.load(workdir)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one.params, other.params)
    for name in ("loss", "eval_loss"):
        rows = [[row[name] for row in read_jsonl(d / "metrics.jsonl")] for d in (trained, workdir)]
        np.testing.assert_allclose(rows[1], rows[0], rtol=1e-5)
    assert np.mean(one.sample(jax.random.key(0), 4) != other.sample(jax.random.key(0), 4)) < 0.01
    # It was split: at most a quarter of a moment's large leaves is on a device.
    like = prepare(config, workdir).like.opt_state[1].mu
    held = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(like))
    assert held < 0.4 * sum(leaf.size for leaf in jax.tree.leaves(like))
