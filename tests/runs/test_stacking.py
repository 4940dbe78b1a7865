"""A run begins with weights whose blocks are stacked where its own are apart, or the reverse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from diffjax import builders
from diffjax.core.pytree import named
from diffjax.nets import DiT
from diffjax.nets.dit import stacked, unstacked
from diffjax.runs import dryrun, init_from
from diffjax.runs.workdir import RunError, load_config
from diffjax.train import mesh, state
from diffjax.train.checkpoint import Checkpointer
from tests.train import sharded, toy

NET = DiT(depth=3, width=16, num_heads=2, num_classes=None)


def params_of(net, seed=0):
    x = jnp.zeros((1, 4, 4, 2))
    shapes = jax.eval_shape(net.init, jax.random.key(0), x, jnp.ones((1,)))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), shapes)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Workdirs with the same weights in both layouts."""
    apart = params_of(NET)
    found = {}
    for name, params in (("apart", apart), ("stacked", stacked(apart))):
        workdir = tmp_path_factory.mktemp(name)
        s = state.create_state(jax.random.key(1), params, toy.OPTIMIZER)
        with Checkpointer(workdir) as checkpointer:
            checkpointer.save(1, s, position={}, config={})
        found[name] = str(workdir)
    return apart, found


def like(params, axis=None):
    """Abstract leaves on 8 devices, the packed projections split along an axis of one block."""
    on = mesh.make_mesh(fsdp=8, data=1)

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        front = (None,) * name.startswith("stack/")
        spec = PartitionSpec(*front, "fsdp") if "qkv/kernel" in name else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(on, spec))

    return jax.tree_util.tree_map_with_path(place, params)


@pytest.mark.parametrize("here", ["apart", "stacked"])
def test_weights_of_the_other_layout_are_taken_whole(sources, here):
    apart, found = sources
    wanted = apart if here == "apart" else stacked(apart)
    abstract = like(wanted)
    start = init_from.read(found["stacked" if here == "apart" else "apart"], abstract)
    assert {row.fate for row in start.rows} == {"loaded"}
    jax.tree.map(np.testing.assert_array_equal, start.leaves, named(wanted))
    if here == "stacked":
        leaf = start.leaves["stack/qkv/kernel"]
        assert leaf.sharding == named(abstract)["stack/qkv/kernel"].sharding
    replaced = init_from.replaced(jax.tree.map(np.zeros_like, wanted), start.leaves)
    jax.tree.map(np.testing.assert_array_equal, replaced, wanted)


def test_another_depth(sources):
    apart, found = sources
    deep = params_of(NET.clone(depth=4))
    start = init_from.read(found["stacked"], like(deep))
    assert "block_3/qkv/kernel" not in start.leaves
    np.testing.assert_array_equal(
        start.leaves["block_2/fc1/bias"], unstacked(stacked(apart))["block_2"]["fc1"]["bias"]
    )
    with pytest.raises(RunError, match="holds 4 blocks and the source has 3.*model.scan = False"):
        init_from.read(found["apart"], like(stacked(deep)))


def test_a_config_with_scan_fetches_one_block_at_a_time():
    config = load_config("dit/imagenet256_xl2:quick")
    with config.unlocked():
        config.model.update(scan=True, num_classes=8)
        config.mesh.update(fsdp=8, min_size=512)
        config.training.n_jitted_steps = 1
    on = builders.build_mesh(config)
    text = dryrun.lower(config, "train", on).compile().as_text()
    forward, backward = sharded.in_loops(text)
    assert forward == {"all-gather": 5} and backward["all-gather"] == 5
