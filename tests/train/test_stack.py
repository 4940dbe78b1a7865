"""A loop over stacked blocks on a mesh: how they lie, what is fetched where, what is in memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from diffjax.nets import dit
from diffjax.train import mesh, sharding, state
from tests.train import sharded
from tests.train.test_sharding import agree, named

FSDP, TENSOR = (1, 8, 1), (1, 1, 4)
ZERO = jax.ShapeDtypeStruct((), jnp.int32)
LOCAL = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def lies(shape, leaves, rules=()):
    tree = {"stack": {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in leaves.items()}}
    like = state.TrainState(ZERO, tree, (), {}, ZERO)
    found = sharding.state_sharding(sharded.mesh_of(shape), like, rules=rules, min_size=64)
    return {name: leaf.spec for name, leaf in found.params["stack"].items()}


def test_the_axis_of_layers_stays_whole():
    leaves = {"w": (64, 24, 16), "b": (64, 8), "odd": (64, 9, 9)}  # small: 8 a layer
    assert lies(FSDP, leaves) == {"w": P(None, "fsdp"), "b": P(), "odd": P()}


def test_a_rule_speaks_of_one_layer():
    rule = ("stack/w$", P(None, "tensor"))
    assert lies((1, 4, 2), {"w": (3, 24, 16)}, [rule]) == {"w": P(None, "fsdp", "tensor")}
    with pytest.raises(ValueError, match=r"of shape \(24, 16\): it has 3 axes"):
        lies((1, 4, 2), {"w": (3, 24, 16)}, [("w$", P(None, None, "tensor"))])


def test_heads_and_hidden_channels_are_split_alike_in_both_layouts():
    specs = {}
    for name in ("dit", "scan"):
        like = jax.eval_shape(functools.partial(sharded.create, name))
        found = sharding.state_sharding(sharded.mesh_of((1, 1, 2)), like, min_size=64).params
        block, first = (found["stack"], 1) if name == "scan" else (found["block_0"], 0)
        specs[name] = {leaf: tuple(s.spec)[first:] for leaf, s in named(block).items()}
    assert specs["dit"] == specs["scan"]
    split = {name for name, spec in specs["scan"].items() if "tensor" in spec}
    assert split == {f"{n}/kernel" for n in ("qkv", "proj", "fc1", "fc2")} | {
        "qkv/bias",
        "fc1/bias",
    }


def trained(shape):
    """Losses and state but for the keys' biases: softmax does not see them, and Adam makes steps of
    the rounding that is their gradient."""
    losses, current = sharded.trained("scan", shape)

    def without(tree):
        keys = tree["stack"]["qkv"]["bias"][:, 1]
        assert jnp.abs(keys).max() > 0.1
        return tree | {"stack": tree["stack"] | {"qkv": tree["stack"]["qkv"] | {"bias": 0 * keys}}}

    averages = {name: without(tree) for name, tree in current.ema.items()}
    return losses, dataclasses.replace(current, params=without(current.params), ema=averages)


@pytest.mark.parametrize("shape", [FSDP, pytest.param((2, 2, 2), marks=pytest.mark.slow)])
def test_the_loop_agrees_on_every_mesh(shape):
    rtol = 1e-6 if shape[2] == 1 else 3e-6
    agree(*(trained(on) for on in (shape, (1, 1, 1))), rtol)


# --- Collectives ---------------------------------------------------------------------------------


def split_in_stack(layout):
    return sum("fsdp" in tuple(s.spec) for s in jax.tree.leaves(layout.params["stack"]))


def fetches_a_block_at_a_time(found):
    """One gather a split leaf in the forward loop, one in the backward, no other but outside."""
    leaves = split_in_stack(found.layout)
    forward, backward = sharded.in_loops(found.text)
    assert leaves == 5  # the kernels
    assert forward == {"all-gather": leaves}
    # XLA on CPU sums a gradient whole where others scatter it.
    assert backward == {"all-gather": leaves, "all-reduce": 1}
    outside = sharded.collectives(found.text)["all-gather"] - 2 * leaves
    assert outside <= 2 * (sharded.split_leaves(found.layout) - leaves)


def test_a_loop_fetches_a_block_at_a_time():
    fetches_a_block_at_a_time(sharded.case("scan", FSDP))


@pytest.mark.slow
def test_without_its_wrapper_a_loop_does_not(monkeypatch):
    monkeypatch.setattr(sharded, "network", lambda name, layout: sharded.NETS[name])
    with pytest.raises((AssertionError, ValueError)):
        fetches_a_block_at_a_time(sharded.case.__wrapped__("scan", FSDP))


@pytest.mark.parametrize("name", [pytest.param("dit", marks=pytest.mark.slow), "scan"])
def test_tensor_costs_two_all_reduces_a_block_and_pass(name):
    """After attention and after the perceptron, and for the gradients of their inputs."""
    shape = TENSOR if name == "scan" else (1, 1, 2)  # as many heads
    text = sharded.case(name, shape).text
    # The norm of the gradient is one more; in a program without a loop it joins another.
    assert sharded.collectives(text) in ({"all-reduce": 5}, {"all-reduce": 4})
    if name == "scan":
        assert sharded.in_loops(text) == [{"all-reduce": 2}] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dit", "scan"])
def test_on_three_axes_weights_are_gathered_and_activations_summed(name):
    found = sharded.case(name, (2, 2, 2))
    counts = sharded.collectives(found.text)
    assert counts.pop("all-gather") <= 2 * sharded.split_leaves(found.layout)
    assert counts.keys() == {"all-reduce"}


# --- Memory --------------------------------------------------------------------------------------


def gradient_memory(depth, remat=False, wrapped=True, shape=FSDP):
    """Temporary bytes a device of the gradient of 8 images' loss, its result and images aside."""
    net = sharded.NETS["scan"].clone(depth=depth, remat=remat)
    on = sharded.mesh_of(shape)
    x = jax.ShapeDtypeStruct((8, *sharded.SHAPE), jnp.float32)
    params = jax.eval_shape(net.init, jax.random.key(0), x, jnp.ones((8,)))["params"]
    like = state.TrainState(ZERO, params, (), {}, ZERO)
    layout = sharding.state_sharding(on, like, min_size=sharded.MIN_SIZE).params
    if wrapped:
        net = net.clone(around=sharding.around_layer(layout))
    loss = sharding.fetched(sharded.loss_fn(net), layout)
    gradient = jax.jit(
        jax.grad(lambda params, x: jnp.mean(loss(params, jax.random.key(0), x)[0])),
        in_shardings=(layout, mesh.batch_sharding(on)),
        out_shardings=layout,
    )
    compiled = gradient.lower(params, x).compile(LOCAL)
    return compiled.memory_analysis().temp_size_in_bytes


def one_block():
    leaves = sharded.params("scan")["stack"]
    return sum(leaf.nbytes // len(leaf) for leaf in jax.tree.leaves(leaves))


@pytest.mark.parametrize("remat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_memory_does_not_hold_the_weights_of_every_block(remat):
    """Each block adds its activations and 1/8 of its gradient: well below its weights."""
    added = (gradient_memory(10, remat) - gradient_memory(2, remat)) / 8
    assert added < (0.01 if remat else 0.25) * one_block()


def kept_of_a_block():
    """The memory that a block adds on one device, over that of the results of its products."""
    images, tokens, width = 8, 4, 64
    # q, k and v, the two results, the hidden layer and the block's input; adaLN's for an image.
    products = 4 * images * (tokens * (3 + 2 + 4 + 1) * width + 6 * width)
    return (
        (gradient_memory(6, shape=(1, 1, 1)) - gradient_memory(2, shape=(1, 1, 1))) / 4 / products
    )


def test_a_loop_keeps_products_with_weights_only():
    assert kept_of_a_block() == pytest.approx(1, rel=0.1)


@pytest.mark.slow
def test_left_to_itself_a_loop_keeps_more(monkeypatch):
    monkeypatch.setattr(dit, "_PRODUCTS", jax.checkpoint_policies.everything_saveable)
    assert kept_of_a_block() > 1.5


@pytest.mark.slow
def test_gathered_by_the_rest_of_the_program_they_are_all_held():
    added = (gradient_memory(10, wrapped=False) - gradient_memory(2, wrapped=False)) / 8
    assert added > 0.5 * one_block()
