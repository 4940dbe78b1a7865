"""Sharded states, proved by counting: bytes a device, collectives, FLOPs, instructions, numbers."""

import dataclasses
import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from diffjax.train import ema, mesh, sharding, state, step
from tests.train import sharded, toy

MESHES = [(8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)]
# The toy's two maps as a pair along "tensor".
RULES = (
    (r"^w$", PartitionSpec(None, "tensor")),
    (r"^b$", PartitionSpec("tensor")),
    (r"^out/w$", PartitionSpec("tensor")),
)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


# --- Where the numbers lie ----------------------------------------------------------------------


def named(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def holds_an_eighth(current, small):
    """No device holds more than 1/8 of a part of the state, plus the leaves below `small`."""
    parts = {"params": current.params, "adam": current.opt_state}
    parts |= {f"ema/{name}": tree for name, tree in current.ema.items()}
    for name, tree in parts.items():
        leaves = jax.tree.leaves(tree)
        total = sum(leaf.nbytes for leaf in leaves)
        kept = sum(leaf.nbytes for leaf in leaves if leaf.size < small)
        assert kept < 0.25 * total  # or the law says nothing
        held = dict.fromkeys(jax.devices(), 0)
        for leaf in leaves:
            for shard in leaf.addressable_shards:
                held[shard.device] += shard.data.nbytes
        assert max(held.values()) <= (total - kept) / 8 + kept, name


@functools.cache
def placed(name, shape):
    on = sharded.mesh_of(shape)
    create = functools.partial(sharded.create, name)
    layout = sharding.state_sharding(on, jax.eval_shape(create), min_size=sharded.MIN_SIZE)
    return layout, jax.jit(create, out_shardings=layout)()


@pytest.mark.parametrize("name", ["dit", "unet"])
def test_a_device_holds_an_eighth(name):
    layout, current = placed(name, (1, 8, 1))
    holds_an_eighth(current, sharded.MIN_SIZE)
    assert current.step.sharding.is_fully_replicated and current.key.sharding.is_fully_replicated
    # A moment, or one average, that is whole everywhere breaks the law.
    whole = mesh.replicated(sharded.mesh_of((1, 8, 1)))
    slow_track = {"slow": jax.device_put(current.ema["slow"], whole)}
    for broken in (
        {"opt_state": jax.device_put(current.opt_state, whole)},
        {"ema": current.ema | slow_track},
    ):
        with pytest.raises(AssertionError):
            holds_an_eighth(dataclasses.replace(current, **broken), sharded.MIN_SIZE)


@pytest.mark.parametrize("shape", MESHES)
def test_moments_and_averages_lie_as_their_parameter(shape):
    layout, _ = placed("dit", shape)
    params = named(layout.params)
    for tree in (layout.opt_state[1].mu, layout.opt_state[1].nu, *layout.ema.values()):
        assert named(tree) == params
    assert layout.step.spec == layout.key.spec == layout.opt_state[1].count.spec == PartitionSpec()


def test_the_largest_axis_that_divides_is_split():
    shapes = {
        "a": (48, 64), "b": (64, 63), "c": (3, 3, 8, 40), "d": (63, 65), "e": (2, 8), "f": (24, 33),
    }  # fmt: skip
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    like = state.TrainState(tree["e"], tree, {"mu": tree}, {"main": tree}, tree["e"])
    specs = sharding.state_sharding(sharded.mesh_of((1, 8, 1)), like, min_size=100)
    P = PartitionSpec
    expected = {
        "a": P(None, "fsdp"), "b": P("fsdp"), "c": P(None, None, None, "fsdp"), "d": P(), "e": P(),
        "f": P("fsdp"),
    }  # fmt: skip
    for tree in (specs.params, specs.opt_state["mu"], specs.ema["main"]):
        assert {name: s.spec for name, s in tree.items()} == expected


def test_a_leaf_is_matched_by_its_whole_name():
    # "x/w" ends in "w", which is another parameter, of the same shape and with a rule of its own.
    leaf = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    tree = {"w": leaf, "x": {"w": leaf}}
    like = state.TrainState(leaf, tree, ({"mu": tree},), {"main": tree}, leaf)
    rules = ((r"^w$", PartitionSpec("tensor")),)
    found = sharding.state_sharding(sharded.mesh_of((1, 1, 8)), like, rules=rules)
    for part in (found.params, found.opt_state[0]["mu"], found.ema["main"]):
        assert part["w"].spec == PartitionSpec("tensor") and part["x"]["w"].spec == PartitionSpec()


def test_rules_that_do_not_fit_raise():
    like = jax.eval_shape(lambda: state.create_state(jax.random.key(0), toy.init_params(), TOY))
    on = sharded.mesh_of((1, 4, 2))
    P = PartitionSpec
    for rule, message in [
        (("weight", P("fsdp")), "'weight' matches no parameter; names look like b, out/w, w"),
        (("out/w", P("model")), r"axes data, fsdp, tensor; got \['model'\]"),
        (("^b$", P(None, "fsdp")), r"b of shape \(32,\): it has 2 axes; give at most 1"),
        (("^w$", P("fsdp")), "4 devices along fsdp do not divide 6"),
        (("^w$", P(("fsdp", "tensor"))), "8 devices along .* do not divide 6"),
    ]:
        with pytest.raises(ValueError, match=message):
            sharding.state_sharding(on, like, rules=(rule,))


def test_a_new_state_is_the_same_wherever_it_lies():
    _, split = placed("dit", (1, 8, 1))
    toy.assert_bitwise(jax.device_get(split), jax.device_get(sharded.create("dit")))


# --- The same numbers on every mesh --------------------------------------------------------------

TOY = toy.OPTIMIZER


@functools.cache
def toy_run(shape, steps=4):
    """Losses and parameters of the toy, its layers split by rules of its own."""
    on = sharded.mesh_of(shape)
    create = functools.partial(
        state.create_state, jax.random.key(7), toy.init_params(), toy.OPTIMIZER
    )
    layout = sharding.state_sharding(on, jax.eval_shape(create), rules=RULES, min_size=64)
    run = step.compile_step(
        on,
        loss_fn=toy.loss_fn,
        optimizer=toy.OPTIMIZER,
        ema={"main": ema.ConstantEMA(0.9)},
        state_sharding=layout,
    )
    current, feed, losses = jax.device_put(create(), layout), toy.feed(on), []
    for _ in range(steps):
        current, metrics = run(current, next(feed))
        losses.append(float(metrics["loss"][0]))
    return losses, current


def agree(found, alone, rtol):
    (losses, current), (losses_alone, one) = found, alone
    np.testing.assert_allclose(losses, losses_alone, rtol=rtol)
    for part in ("params", "ema"):
        parts = (jax.tree.leaves(getattr(s, part)) for s in (current, one))
        for x, y in zip(*parts, strict=True):
            # Adam divides by the gradient's size, which lifts the rounding of small gradients.
            np.testing.assert_allclose(x, y, atol=2e-5)


@pytest.mark.parametrize("shape", MESHES)
def test_the_toy_agrees_on_every_mesh(shape):
    agree(toy_run(shape), toy_run((1, 1, 1)), rtol=1e-6)


def test_agreement_sees_a_wrong_weight(monkeypatch):
    def stale(loss_fn, layout):
        fetched = sharding.fetched(loss_fn, layout)
        return lambda params, *args: fetched(jax.tree.map(lambda w: w * 1.00001, params), *args)

    alone = toy_run((1, 1, 1))
    monkeypatch.setattr(step, "fetched", stale)
    with pytest.raises(AssertionError):
        agree(toy_run.__wrapped__((1, 8, 1)), alone, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("dit", (1, 8, 1))]
    + [slow("dit", shape) for shape in MESHES if shape != (1, 8, 1)]
    + [slow("unet", shape) for shape in ((1, 8, 1), (2, 2, 2), (1, 1, 8))],
)
def test_networks_agree_on_every_mesh(name, shape):
    # Along "tensor" a sum over channels is cut in pieces, each rounded by itself.
    rtol = 1e-6 if shape[2] == 1 else 3e-6
    agree(sharded.trained(name, shape), sharded.trained(name, (1, 1, 1)), rtol)


# --- Collectives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [slow("dit"), slow("unet")])
def test_data_parallel_costs_one_all_reduce(name):
    assert sharded.collectives(sharded.case(name, (8, 1, 1)).text) == {"all-reduce": 1}


def fetches_weights_only(found):
    """Two gathers a split leaf at most, forward and backward; no activation is moved."""
    counts = sharded.collectives(found.text)
    assert counts.pop("all-gather") <= 2 * sharded.split_leaves(found.layout)
    assert counts.keys() == {"all-reduce"}


@pytest.mark.parametrize("name", ["dit", slow("unet")])
def test_fsdp_moves_weights_only(name):
    fetches_weights_only(sharded.case(name, (1, 8, 1)))


@pytest.mark.slow
def test_without_fetching_activations_are_moved(monkeypatch):
    monkeypatch.setattr(step, "fetched", lambda loss_fn, layout: loss_fn)
    with pytest.raises(AssertionError):
        fetches_weights_only(sharded.case.__wrapped__("dit", (1, 8, 1)))


@pytest.mark.parametrize("name", ["dit", slow("unet")])
def test_a_forward_pass_fetches_each_leaf_once(name):
    on = sharded.mesh_of((1, 8, 1))
    layout, current = placed(name, (1, 8, 1))
    loss = sharding.fetched(sharded.loss_fn(sharded.NETS[name]), layout.params)
    forward = jax.jit(
        lambda params, x: jnp.mean(loss(params, jax.random.key(0), x)[0]),
        in_shardings=(layout.params, mesh.batch_sharding(on)),
    )
    text = forward.lower(current.params, sharded.images(0)[0]).compile().as_text()
    counts = sharded.collectives(text)
    assert counts == {"all-gather": sharded.split_leaves(layout), "all-reduce": 1}


@pytest.mark.slow
def test_tensor_costs_two_all_reduces_a_residual_block():
    # Two groups of channels, one a device.
    counts = sharded.collectives(sharded.case("unet", (1, 1, 2)).text)
    assert counts == {"all-reduce": 2 * sharded.BLOCKS["unet"]}


# --- Memory --------------------------------------------------------------------------------------


def deep(weights, x):
    for w in weights:
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2)


def fits_without_all_weights(loss_fn, layout):
    """Temporary memory below 3 of 8 weights, forward and backward, with none for gradients."""
    on = layout[0].mesh
    like = [jax.ShapeDtypeStruct((64, 64), jnp.float32) for _ in layout]
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32)
    for program in (loss_fn, jax.grad(loss_fn, argnums=1)):
        # XLA's default order on CPUs begins with all gathers, whatever the program.
        compiled = (
            jax.jit(program, in_shardings=(layout, mesh.batch_sharding(on)))
            .lower(like, x)
            .compile({"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"})
        )
        assert compiled.memory_analysis().temp_size_in_bytes < 3 * 64 * 64 * 4


def test_fetched_weights_are_let_go():
    on = sharded.mesh_of((1, 8, 1))
    layout = [NamedSharding(on, PartitionSpec("fsdp"))] * 8
    fits_without_all_weights(sharding.fetched(deep, layout), layout)

    # In a type of its own, as a network computes in bfloat16, a weight is let go too.
    def narrow(weights, x):
        return deep([w.astype(jnp.bfloat16) for w in weights], x)

    fits_without_all_weights(sharding.fetched(narrow, layout), layout)

    def keeping(weights, x):
        return deep(jax.lax.with_sharding_constraint(weights, mesh.replicated(on)), x)

    with pytest.raises(AssertionError):
        fits_without_all_weights(keeping, layout)


# --- Scaling -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_flops_a_device_do_not_grow_with_the_mesh(monkeypatch):
    flops = {}
    for shape in [(1, 1, 1), (2, 1, 1), (8, 1, 1), (1, 8, 1)]:
        batch = 16 * shape[0] * shape[1]
        flops[shape] = sharded.case("dit", shape, batch).compiled.cost_analysis()["flops"]
    alone = flops.pop((1, 1, 1))
    for shape, found in flops.items():
        if shape[1] == 1:
            assert found == pytest.approx(alone, rel=0.01)
        else:  # the optimizer's share is divided
            assert 0.9 * alone < found < 1.01 * alone
    # Images that every device computes would be seen.
    monkeypatch.setattr(step, "batch_sharding", lambda on, axis: mesh.replicated(on))
    everywhere = sharded.case.__wrapped__("dit", (2, 1, 1), 32).compiled.cost_analysis()["flops"]
    assert everywhere > 1.5 * alone


def counts_of(devices, shape, name):
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.train.sharded", ",".join(map(str, shape)), name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("eight", "many"), [((8, 1, 1), (64, 1, 1)), ((1, 8, 1), (8, 8, 1)), ((2, 2, 2), (16, 2, 2))]
)
def test_the_program_does_not_grow_with_the_mesh(eight, many):
    small, large = (counts_of(int(np.prod(s)), s, "dit") for s in (eight, many))
    assert large["instructions"] < 1.5 * small["instructions"]
    assert large["split"] == small["split"]
    if many[2] == 1:
        assert large["collectives"].keys() == small["collectives"].keys()
