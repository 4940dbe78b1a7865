"""A run that begins with the weights of another."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import diffjax as dj
from diffjax import builders
from diffjax.cli.main import main
from diffjax.runs import init_from
from diffjax.runs.workdir import RunError, claim, load_config, plain
from diffjax.train import mesh, state
from diffjax.train.checkpoint import Checkpointer, CheckpointError
from tests.train import toy

CONFIG = str(Path(__file__).with_name("tiny_config.py"))
SHORT = {"n_iters": 4, "eval_freq": 4, "snapshot_freq_for_preemption": 2}


def config_like(source, **model):
    config = ConfigDict(plain(load_config(CONFIG)))
    config.training.update(SHORT | {"snapshot_sampling": False, "init_from": str(source)})
    config.model.update(model)
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir of the same network, with averages that are not its weights."""
    workdir, config = tmp_path_factory.mktemp("trained"), config_like("")
    parts, (optimizer, _) = builders.build_parts(config), builders.build_optimizer(config)
    params = jax.jit(parts.init_params)(jax.random.key(5))
    s = state.create_state(jax.random.key(5), params, optimizer)
    ema = {"main": jax.tree.map(lambda leaf: leaf + 1, params)}
    claim(workdir, config)
    with Checkpointer(workdir) as checkpointer:
        s = state.TrainState(jnp.int32(7), s.params, s.opt_state, ema, s.key)
        checkpointer.save(7, s, position={}, config={})
    return workdir


def _here():
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A workdir of the toy's weights: w (6, 32), b (32,), out/w (32, 6), other averages beside."""
    workdir = tmp_path_factory.mktemp("source")
    s = toy.new_state(mesh.make_mesh())
    with Checkpointer(workdir) as checkpointer:
        for step in (3, 8):
            ema = {"main": jax.tree.map(lambda leaf, n=step: leaf + n, s.params), "slow": s.params}
            s = state.TrainState(jnp.int32(step), s.params, s.opt_state, ema, s.key)
            checkpointer.save(step, s, position={}, config={})
    return workdir, s.params


def like(**leaves):
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=_here()),
        leaves,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )


def test_every_leaf_is_named_and_those_that_fit_are_loaded(source):
    workdir, params = source
    wanted = like(w=(6, 33), out={"w": (32, 6)}, b=(32,), extra={"bias": (2,)})
    start = init_from.read(str(workdir), wanted)
    fates = {row.name: row.fate for row in start.rows}
    assert fates == {
        "w": "shape differs",
        "out/w": "loaded",
        "b": "loaded",
        "extra/bias": "missing",
    }
    assert start.leaves.keys() == {"out/w", "b"}
    # In the dtype asked for, and of the newest checkpoint's averages.
    expected = np.asarray((params["out"]["w"] + 8).astype(jnp.bfloat16))
    np.testing.assert_array_equal(np.asarray(start.leaves["out/w"]), expected)
    assert start.leaves["out/w"].dtype == jnp.bfloat16
    table = start.table()
    assert "(6, 32) there, (6, 33) here" in table and f"{workdir}, step 8" in table
    assert table.endswith("2 loaded, 1 shape differs, 1 missing, 0 unused.")
    assert all(name in table for name in fates)


def test_a_step_can_be_named_and_what_is_not_needed_is_unused(source):
    workdir, params = source
    start = init_from.read(f"{workdir}:3", like(b=(32,)))
    np.testing.assert_array_equal(
        np.asarray(start.leaves["b"], np.float32), np.asarray(params["b"] + 3)
    )
    assert {r.name for r in start.rows if r.fate == "unused"} == {"w", "out/w"}


def test_nothing_that_fits_is_an_error(source, tmp_path):
    workdir, _ = source
    with pytest.raises(RunError, match=r"Nothing in .* fits.*There: b \(32,\).*Here: c \(32,\)"):
        init_from.read(str(workdir), like(c=(32,)))
    with pytest.raises(CheckpointError, match="no checkpoints in .*nowhere"):
        init_from.read(str(tmp_path / "nowhere"), like(b=(32,)))
    with pytest.raises(CheckpointError, match=r"not checkpoint 4 in .*holds steps \[3, 8\]"):
        init_from.read(f"{workdir}:4", like(b=(32,)))


def test_leaves_take_the_places_of_their_names():
    params = {"a": {"w": jnp.zeros(2), "b": jnp.zeros(3)}, "w": jnp.zeros(4)}
    found = init_from.replaced(params, {"a/w": jnp.ones(2)})
    assert (found["a"]["w"].sum(), found["w"].sum(), found["a"]["b"].sum()) == (2, 0, 0)


def whole_state(workdir, config, step):
    parts = builders.build_parts(config)
    optimizer, _ = builders.build_optimizer(config)
    abstract = jax.eval_shape(
        lambda key: state.create_state(key, parts.init_params(key), optimizer), jax.random.key(0)
    )
    with Checkpointer(workdir, writable=False) as reader:
        return reader.restore(state.abstract(abstract, _here()), step)[0]


@pytest.mark.parametrize(
    "model",
    [pytest.param({}, marks=pytest.mark.slow), {"width": 24}],
    ids=["the same network", "a wider one"],
)
def test_a_run_begins_there_with_all_else_fresh(trained, tmp_path, model, digits_dir):
    config, said = config_like(trained, **model), []
    outcome = dj.train(config, tmp_path / "new", show_progress=False, report=said.append)
    assert outcome == (4, True)
    given = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(dj.load(trained).params)
    }
    begun = whole_state(tmp_path / "new", config, 0)
    loaded = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(begun.params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if given[name].shape == leaf.shape:
            np.testing.assert_array_equal(leaf, given[name])
            loaded += 1
    assert f"{loaded} loaded, {len(given) - loaded} shape differs, 0 missing, 0 unused" in said[0]
    assert (loaded == len(given)) == (not model) and loaded > 0
    jax.tree.map(np.testing.assert_array_equal, begun.ema["main"], begun.params)
    assert int(begun.step) == 0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(begun.opt_state))
    # It goes on without the source, and again without a word.
    config.training.init_from = str(tmp_path / "gone")
    stored = tmp_path / "new" / "config.json"
    stored.write_text(stored.read_text().replace(str(trained), str(tmp_path / "gone")))
    assert dj.train(config, tmp_path / "new", show_progress=False, report=said.append) == (4, True)
    assert len(said) == 1


def test_what_does_not_fit_claims_no_workdir(source, tmp_path, digits_dir):
    config = config_like(source[0])
    with pytest.raises(RunError, match="Nothing in"):
        dj.train(config, tmp_path / "new", show_progress=False)
    assert not (tmp_path / "new" / "config.json").exists()


def test_the_flag_is_the_field_of_the_config(source, tmp_path, digits_dir, capsys):
    flags = [f"--config={CONFIG}", f"--workdir={tmp_path / 'new'}", f"--init_from={source[0]}:3"]
    assert main(["diffjax", "train", *flags]) == 2
    assert f"Nothing in {source[0]}:3 fits" in capsys.readouterr().err
