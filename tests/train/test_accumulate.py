"""Gradient accumulation: the whole batch's numbers, the memory of a part of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy import stats

from diffjax import builders
from diffjax.core.random import sample_keys
from diffjax.losses import strata
from diffjax.runs.workdir import load_config
from diffjax.train import ema, mesh, step
from diffjax.train.accumulate import loss_and_gradient
from tests.train import toy


def gradient(key, x, **options):
    run = functools.partial(loss_and_gradient, toy.loss_fn, **options)
    return jax.jit(run)(toy.init_params(), key, x)


@pytest.mark.parametrize(("n", "unroll"), [(4, False), (2, True), (16, False)])
def test_parts_give_the_gradient_of_the_whole(key, n, unroll):
    x = jnp.asarray(toy.batch(0))
    whole, parts = gradient(key, x), gradient(key, x, accumulate=n, unroll=unroll)
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6)
    # Other noise is no rounding: keys by the place in a part would differ by this much.
    other = gradient(jax.random.fold_in(key, 1), x)
    assert abs(other[0] - whole[0]) > 1e-3 * whole[0]


def test_what_is_watched_may_be_infinite(key):
    def loss_fn(params, key, x):
        losses, _ = toy.loss_fn(params, key, x)
        return losses, {"infinite": losses / 0}

    x = jnp.asarray(toy.batch(0))
    run = functools.partial(loss_and_gradient, loss_fn, toy.init_params(), key, x)
    whole, parts = run(), run(accumulate=2, unroll=True)
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-5)
    assert np.isinf(parts[1]["infinite"])


def test_the_sum_is_in_float32():
    # Per-part gradients of 1 in bfloat16, 4096 of them: sums in bfloat16 stop at 256.
    def loss_fn(params, key, batch):
        del key
        return (params * batch).astype(jnp.float32), {}

    params, batch = jnp.ones((), jnp.bfloat16), jnp.ones((4096,), jnp.bfloat16)
    run = jax.jit(functools.partial(loss_and_gradient, loss_fn, accumulate=4096))
    _, _, grads = run(params, jax.random.key(0), batch)
    assert grads.dtype == jnp.bfloat16 and grads == 1


def prepare(key, x):
    """What only the whole batch can say: each image's place among the strata."""
    return {"image": x, "u": strata(sample_keys(key, len(x)))}


def placed(params, key, batch):
    losses, aux = toy.loss_fn(params, key, batch["image"])
    return losses * batch["u"], aux | {"u": batch["u"]}


def compiled(on, n):
    return step.compile_step(
        on,
        loss_fn=placed,
        optimizer=toy.OPTIMIZER,
        ema={"main": ema.ConstantEMA(0.9)},
        accumulate=n,
        prepare=prepare,
    )


def test_steps_on_a_mesh_equal_and_move_no_images():
    eight = mesh.make_mesh()
    one, many = toy.new_state(eight), toy.new_state(eight)
    feed = toy.feed(eight)
    whole, parts = compiled(eight, 1), compiled(eight, 2)
    text = parts.lower(many, next(feed)).compile().as_text()
    for _ in range(3):
        batch = next(feed)
        one, a = whole(one, batch)
        many, b = parts(many, batch)
        for name in ("loss", "grad_norm", "u"):
            np.testing.assert_allclose(b[name], a[name], rtol=1e-5)
    for kind in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert f" {kind}" not in text


def deep(params, key, x):
    """Many activations a sample, few weights."""
    del key
    h = jnp.tile(x, (1, 64))
    for scale in params:
        h = jnp.tanh(h * scale[None])
    return jnp.mean(h, axis=1), {}


def test_memory_is_that_of_a_part(key):
    params = [jnp.ones((64 * toy.DIM,))] * 6
    x = jnp.zeros((512, toy.DIM))

    def compiled(n, unroll):
        run = functools.partial(loss_and_gradient, deep, accumulate=n, unroll=unroll)
        program = jax.jit(run).lower(params, key, x).compile()
        return program.memory_analysis().temp_size_in_bytes, program.as_text().count(" while(")

    (whole, _), (loop, whiles), (copies, others) = (
        compiled(1, False),
        compiled(4, False),
        compiled(4, True),
    )
    assert whole > 5 * 512 * 64 * toy.DIM * 4  # the activations are what it is
    assert loop < 0.3 * whole and copies < 0.3 * whole
    assert whiles == others + 1


@pytest.fixture(scope="module")
def digits():
    """A quick config with dropout and stratified times, its parts and a batch."""
    config = load_config("digits:quick").unlock()
    config.model.dropout = 0.5
    assert config.loss.times.stratified
    parts = builders.build_parts(config)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(parts.init_params, jax.random.key(0))
    params = jax.tree.map(lambda s: jnp.asarray(0.2 * rng.normal(size=s.shape), s.dtype), shapes)
    images = rng.integers(0, 17, (4, *parts.image_shape), np.uint8)
    return config, parts, params, {"image": jnp.asarray(images)}


def test_every_draw_goes_by_the_image(digits, key):
    # Forward only: losses and what they watch show every draw.
    config, parts, params, batch = digits
    loss_fn = jax.jit(builders.build_loss(config, parts, train=True))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(4))
    whole, seen = loss_fn(params, key, batch)
    prepared = builders.build_prepare(config)(key, batch)
    for m in range(2):
        part = jax.tree.map(lambda leaf, m=m: leaf[m::2], prepared)
        found, watched = loss_fn(params, keys[m::2], part)
        np.testing.assert_allclose(watched["t"], seen["t"][m::2], rtol=1e-6)
        np.testing.assert_allclose(found, whole[m::2], rtol=1e-4)
    # The times are spread over the whole batch: of four, one lies in each quarter.
    level, times = -np.asarray(seen["log_snr"], float) / 2, config.loss.times
    u = np.sort(stats.norm.cdf((level - times.mean) / times.std))
    np.testing.assert_allclose(np.diff(u), 1 / 4, atol=1e-4)
    # There is dropout: the same times and noise without it give something else.
    without, _ = jax.jit(builders.build_loss(config, parts, train=False))(params, key, batch)
    assert (np.abs(without / whole - 1) > 1e-3).all()


class Brightness(nn.Module):
    """A classifier that looks at the mean only."""

    @nn.compact
    def __call__(self, x, label, train=False):
        del label, train
        return nn.Dense(10)(jnp.mean(x, axis=(1, 2)))


def test_a_classifiers_times_go_by_the_image_too(key):
    config = load_config("digits_classifier:quick").unlock()
    assert config.loss.times.stratified
    config.model = {"name": "tests.train.test_accumulate:Brightness"}
    parts = builders.build_parts(config)
    params = parts.init_params(jax.random.key(0))
    loss_fn = builders.build_loss(config, parts, train=True)
    batch = {"image": jnp.zeros((4, 8, 8, 1), jnp.uint8), "label": jnp.arange(4)}
    _, whole, _ = loss_and_gradient(loss_fn, params, key, batch, summarise=lambda _, aux: aux)
    t = np.sort(whole["t"])
    np.testing.assert_allclose(np.diff(t), (t[3] - t[0]) / 3, rtol=1e-3)
    _, found, _ = loss_and_gradient(
        loss_fn,
        params,
        key,
        batch,
        accumulate=2,
        prepare=builders.build_prepare(config),
        summarise=lambda _, aux: {"t": aux["t"]},
    )
    # What is summarised is averaged: of the first and second, and of the third and fourth.
    np.testing.assert_allclose(found["t"], whole["t"].reshape(2, 2).mean(axis=1), rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.accumulate": 3}, "must divide batch_size = 8; got 3"),
        ({"training.accumulate": 0}, "got 0"),
    ],
)
def test_configs_that_cannot_be_cut_raise(changes, message):
    config = load_config("digits:quick").unlock()
    config.update_from_flattened_dict(changes)
    with pytest.raises(builders.BuildError, match=message):
        builders.build_accumulate(config)


def test_parts_must_split_over_the_devices():
    config = load_config("digits:quick").unlock()
    config.training.accumulate = 2
    assert builders.build_accumulate(config, 4) == 2
    with pytest.raises(builders.BuildError, match="of 4 images.*8 devices.*multiple of 16"):
        builders.build_accumulate(config, 8)


def test_a_batch_that_cannot_be_cut_raises(key):
    with pytest.raises(ValueError, match="accumulate=3 must divide the batch of 16"):
        gradient(key, jnp.asarray(toy.batch(0)), accumulate=3)
