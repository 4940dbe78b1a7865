"""The train step: against NumPy, over meshes, its memory, compilations and collectives."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.train import ema, mesh, optim, state, step
from tests.train import toy


@pytest.fixture(scope="module")
def one():
    return mesh.make_mesh(data=1)


@pytest.fixture(scope="module")
def eight():
    return mesh.make_mesh()


def run(on, n_steps, n=1):
    """State and the losses (n_steps,) after n_steps of the toy."""
    s, losses = toy.new_state(on), []
    feed = toy.feed(on, n=n)
    for _ in range(n_steps // n):
        s, metrics = toy.compiled(on)(s, next(feed))
        losses.append(metrics["loss"])
    return s, np.concatenate(losses)


def test_step_equals_linear_regression_by_hand():
    # l_i = (w . x_i)^2: gradient mean_i 2 (w . x_i) x_i, one step of Adam is the gradient's sign.
    x = np.random.default_rng(1).normal(size=(8, 3)).astype(np.float32)
    w = np.array([1.0, -2.0, 0.5], np.float32)

    def loss_fn(params, key, batch):
        del key
        return jnp.square(batch @ params), {}

    schedule = optim.learning_rate(0.1)
    optimizer = optim.adam(schedule)
    s = state.create_state(jax.random.key(0), jnp.asarray(w), optimizer)
    s, metrics = step.train_step(
        s,
        x,
        loss_fn=loss_fn,
        optimizer=optimizer,
        ema={"main": ema.ConstantEMA(0.75)},
        schedule=schedule,
    )
    gradient = np.mean(2 * (x @ w)[:, None] * x, axis=0)
    after = w - 0.1 * np.sign(gradient)
    np.testing.assert_allclose(s.params, after, rtol=1e-5)
    np.testing.assert_allclose(s.ema["main"], 0.75 * w + 0.25 * after, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], np.mean((x @ w) ** 2), rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-5)
    np.testing.assert_allclose(metrics["lr"], 0.1, rtol=1e-6)
    assert s.step == 1 and s.step.dtype == jnp.int32


def test_first_update_with_warmup_leaves_the_weights(one):
    before = toy.new_state(one)
    expected = jax.tree.map(np.asarray, before.params)
    after, metrics = toy.compiled(one)(before, next(toy.feed(one)))
    jax.tree.map(np.testing.assert_array_equal, after.params, expected)
    assert metrics["lr"][0] == 0 and metrics["grad_norm"][0] > 0


def test_the_key_stays_and_the_noise_changes(one):
    s = toy.new_state(one)
    key = np.asarray(jax.random.key_data(s.key))
    same = np.stack([toy.batch(0)] * 2)
    # The rate is 0 at the first step, so both losses are of the same weights and images.
    s, metrics = toy.compiled(one)(s, mesh.global_batch(one, same, axis=1))
    np.testing.assert_array_equal(jax.random.key_data(s.key), key)
    assert metrics["loss"][0] != metrics["loss"][1]


def test_eight_devices_equal_one(one, eight):
    a, losses_a = run(one, 6)
    b, losses_b = run(eight, 6)
    np.testing.assert_allclose(losses_b, losses_a, rtol=1e-6)
    # Adam divides by the gradient's size, which lifts the rounding of small gradients.
    for x, y in zip(jax.tree.leaves(a.ema), jax.tree.leaves(b.ema), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_several_steps_in_one_dispatch_equal_as_many_dispatches(one):
    a, losses_a = run(one, 6)
    b, losses_b = run(one, 6, n=3)
    np.testing.assert_allclose(losses_b, losses_a, rtol=1e-6)
    assert a.step == b.step == 6
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def compile_(on, n):
    return toy.compiled(on).lower(toy.new_state(on), next(toy.feed(on, n=n))).compile()


def collectives(text):
    """Counts of the collectives in HLO by kind."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf" ({kinds})(?:-start)?\(", text)
    return {kind: found.count(kind) for kind in set(found)}


@pytest.mark.parametrize("n", [1, 2])
def test_data_parallel_costs_one_all_reduce(eight, n):
    assert collectives(compile_(eight, n).as_text()) == {"all-reduce": 1}


def test_collectives_are_counted(eight):
    # The counter finds what the law above forbids.
    gather = jax.jit(
        lambda x: x * 2,
        in_shardings=mesh.batch_sharding(eight),
        out_shardings=mesh.replicated(eight),
    )
    assert collectives(gather.lower(jnp.ones((16,))).compile().as_text()) == {"all-gather": 1}


@pytest.mark.parametrize("n", [1, 2])
def test_donation_aliases_the_state(one, n):
    size = sum(
        leaf.nbytes
        for leaf in jax.tree.leaves(toy.new_state(one))
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )
    assert compile_(one, n).memory_analysis().alias_size_in_bytes >= 0.95 * size


def test_the_given_state_is_taken_over(one):
    s = toy.new_state(one)
    toy.compiled(one)(s, next(toy.feed(one)))
    assert s.params["w"].is_deleted() and s.ema["main"]["w"].is_deleted()


def test_create_state_copies_what_it_is_given(one):
    params, key = toy.init_params(), jax.random.key(0)
    s = state.create_state(key, params, toy.OPTIMIZER)
    toy.compiled(one)(s, next(toy.feed(one)))
    assert not params["w"].is_deleted() and not key.is_deleted()
    # Also compiled, as for a state that is made where it will lie.
    make = jax.jit(lambda k, p: state.create_state(k, p, toy.OPTIMIZER))
    toy.compiled(one)(make(key, params), next(toy.feed(one)))
    assert not params["w"].is_deleted() and not key.is_deleted()


def test_one_compilation_over_twenty_steps(eight, caplog):
    fn = step.compile_step(
        eight, loss_fn=toy.loss_fn, optimizer=toy.OPTIMIZER, ema={"main": ema.WarmupEMA(0.9)}
    )
    s, feed = toy.new_state(eight), toy.feed(eight)
    with jax.log_compiles():
        for _ in range(20):
            s, _ = fn(s, next(feed))
        fn(toy.new_state(eight, seed=8), next(feed))
    compiled = [r.getMessage() for r in caplog.records if "XLA compilation" in r.getMessage()]
    assert len([message for message in compiled if "jit(multi_step)" in message]) == 1


def test_float64_mode():
    with jax.enable_x64(True):
        schedule = optim.learning_rate(1e-2, warmup=2, decay_steps=9)
        optimizer = optim.adam(schedule, grad_clip=1.0)
        on = mesh.make_mesh(data=1)
        for dtype in (jnp.float32, jnp.float64):
            params = jax.tree.map(lambda p, d=dtype: p.astype(d), toy.init_params())
            fn = step.compile_step(
                on,
                loss_fn=toy.loss_fn,
                optimizer=optimizer,
                ema={"main": ema.HalfLifeEMA(100, toy.BATCH)},
            )
            s = state.create_state(jax.random.key(0), params, optimizer)
            x = np.stack([toy.batch(0), toy.batch(1)]).astype(dtype)
            s, metrics = fn(s, mesh.global_batch(on, x, axis=1))
            assert s.params["w"].dtype == s.ema["main"]["w"].dtype == dtype
            assert s.step.dtype == jnp.int32 and np.isfinite(metrics["loss"]).all()


def test_bad_loss_functions_raise():
    s = state.create_state(jax.random.key(0), jnp.ones((2,)), toy.OPTIMIZER)
    with pytest.raises(ValueError, match=r"one loss an image, shape \(B,\); got shape \(\)"):
        step.train_step(
            s,
            jnp.ones((3, 2)),
            loss_fn=lambda p, k, x: (jnp.sum(p), {}),
            optimizer=toy.OPTIMIZER,
            ema={"main": ema.ConstantEMA()},
        )
    with pytest.raises(ValueError, match="may not report.*'loss'"):
        step.train_step(
            s,
            jnp.ones((3, 2)),
            loss_fn=lambda p, k, x: (x @ p, {"loss": x @ p}),
            optimizer=toy.OPTIMIZER,
            ema={"main": ema.ConstantEMA()},
        )
    with pytest.raises(TypeError, match=r"jax.random.key\(seed\)"):
        state.create_state(jax.random.PRNGKey(0), jnp.ones((2,)), toy.OPTIMIZER)
    with pytest.raises(TypeError, match="array of keys"):
        state.create_state(jax.random.split(jax.random.key(0)), jnp.ones((2,)), toy.OPTIMIZER)
