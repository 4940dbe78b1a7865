"""Half precision: what stays in float32, loss scaling, moments in bfloat16."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core as jaxpr_core

from diffjax import builders
from diffjax.nets.mlp import MLP
from diffjax.runs.workdir import load_config
from diffjax.train import ema, optim, state, step
from diffjax.train.examine import examine
from diffjax.train.scaling import dynamic_scaling, loss_scale
from tests.train.test_optim import adam_numpy

# What loses digits in half precision, or overflows there.
DELICATE = {"exp", "exp2", "log", "log1p", "expm1", "rsqrt", "sqrt", "div", "erf_inv", "logistic"}
DELICATE |= {"sin", "cos", "pow", "reduce_sum", "reduce_max", "reduce_prod", "reduce", "cumsum"}
DELICATE |= {"cumprod", "cumlogsumexp", "reduce_window", "reduce_window_sum", "scatter-add"}
DELICATE |= {"scatter_add", "select_and_scatter_add"}
# Of swish and elu, which some networks take of half precision; since JAX 0.12 elu's slope is an
# exp. A softmax in half is still seen by its division and its sum.
ACTIVATIONS = {"logistic", "expm1", "exp"}


def equations(jaxpr):
    """All equations of a jaxpr and of those within."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            equation.params,
            is_leaf=lambda v: isinstance(v, (jaxpr_core.ClosedJaxpr, jaxpr_core.Jaxpr)),
        ):
            if isinstance(value, jaxpr_core.ClosedJaxpr):
                yield from equations(value.jaxpr)
            elif isinstance(value, jaxpr_core.Jaxpr):
                yield from equations(value)


def in_half(function, *arguments):
    """Names of the primitives that read float16 or bfloat16."""
    closed = jax.make_jaxpr(function)(*arguments)
    return {
        equation.primitive.name
        for equation in equations(closed.jaxpr)
        for v in equation.invars
        if getattr(v.aval, "dtype", None) in (jnp.float16, jnp.bfloat16)
    }


def test_delicate_primitives_are_seen():
    found = in_half(jax.jit(lambda x: jnp.exp(x) + jax.lax.rsqrt(x)), jnp.ones((), jnp.bfloat16))
    assert {"exp", "rsqrt"} <= found
    assert "exp" not in in_half(jnp.exp, jnp.ones(()))


# Each network of the builders, as small as it goes, with all that may compute in half precision.
TINY = {
    "ncsnpp": {
        "nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,), "fir": True,
        "progressive": "output_skip", "progressive_input": "residual", "num_classes": 3,
        "dropout": 0.1,
    },
    "ddpm": {"nf": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,)},
    "ncsn": {"nf": 8},
    "ncsnv2": {"nf": 8},
    "songunet": {
        "nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,),
        "fir_kernel": (1, 3, 3, 1), "progressive": "output_skip", "progressive_input": "residual",
        "num_classes": 3, "augment_dim": 9,
    },
    "adm": {
        "nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,),
        "channels_per_head": 8, "num_classes": 3, "augment_dim": 9,
    },
    "dit": {"size": "S/4", "depth": 1, "width": 16, "num_heads": 2, "num_classes": 3},
    "sit": {"size": "S/4", "depth": 2, "width": 16, "num_heads": 2, "num_classes": 3},
    "mlp": {"features": 8, "num_blocks": 1, "embed_dim": 4, "num_classes": 3},
    "wideresnet": {"blocks_per_group": 1, "channel_multiplier": 1},
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("ncsn", marks=pytest.mark.slow),
        *(name for name in builders.NETS if name != "ncsn"),
    ],
)
def test_every_network_has_its_sums_norms_and_softmax_in_float32(name, dtype):
    """Forward and backward, and its result, whatever it computes in."""
    net = builders.NETS[name](**TINY[name], dtype=dtype)
    side = 32 if name in ("ncsn", "ncsnv2") else 8
    x = jnp.zeros((2, 6) if name == "mlp" else (2, side, side, 3))
    cond = jnp.zeros((2,), jnp.int32) if TINY[name].get("num_classes") else None
    label = jnp.ones((2,))
    given = {} if cond is None else {"cond": cond}

    def objective(params, x, key):
        rngs = {"dropout": key, "label_dropout": key}
        augment = getattr(net, "augment_dim", 0)
        options = {"augment": jnp.ones((2, augment))} if augment else {}
        out = net.apply({"params": params}, x, label, **given, **options, train=True, rngs=rngs)
        assert out.dtype == jnp.float32
        return jnp.mean(jnp.square(out))

    key = jax.random.key(0)
    params = jax.eval_shape(lambda k: net.init(k, x, label, **given), key)["params"]
    used = in_half(jax.grad(objective, (0, 1)), params, x, key)
    assert used & {"dot_general", "conv_general_dilated"}  # the policy is on
    assert sorted(used & DELICATE - ACTIVATIONS) == []
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("digits", "bfloat16"),
        ("dit/imagenet256_xl2", "float16"),
        pytest.param("digits", "float16", marks=pytest.mark.slow),
        pytest.param("dit/imagenet256_xl2", "bfloat16", marks=pytest.mark.slow),
        pytest.param("ve/cifar10_ncsnpp_continuous", "bfloat16", marks=pytest.mark.slow),
        pytest.param("edm/imagenet64_cond_adm", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_norms_softmax_losses_and_sums_stay_in_float32(name, dtype):
    config = load_config(f"{name}:quick").unlock()
    config.model.dtype = dtype
    parts = builders.build_parts(config)
    params = jax.eval_shape(parts.init_params, jax.random.key(0))
    loss_fn = builders.build_loss(config, parts, train=True)
    batch = {"image": jnp.zeros((2, *parts.image_shape), jnp.uint8)}
    if parts.num_classes is not None:
        batch["label"] = jnp.zeros((2,), jnp.int32)

    def objective(params, key, batch):
        losses, watched = loss_fn(params, key, batch)
        return jnp.mean(losses), (losses, watched)

    run = jax.value_and_grad(objective, has_aux=True)
    used = in_half(run, params, jax.random.key(0), batch)
    assert "dot_general" in used  # the policy is on
    assert not used & DELICATE
    for leaf in jax.tree.leaves((params, jax.eval_shape(run, params, jax.random.key(0), batch))):
        assert leaf.dtype == jnp.float32


@functools.cache
def fit_plain():
    return fit(small(), PLAIN)


PLAIN = optim.adam(optim.learning_rate(1e-2), grad_clip=1.0)
small = functools.partial(MLP, features=16, num_blocks=1, embed_dim=4, init_scale=1.0)


def fit(net, optimizer, steps=20):
    """The weights after a regression by `net`, in the step of training, and the metrics."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(32, 4)), jnp.float32)
    y = jnp.sin(x[:, ::-1])

    def loss_fn(params, key, batch):
        del key
        out = net.apply({"params": params}, batch[0], jnp.ones((len(batch[0]),)))
        return jnp.mean(jnp.square(out - batch[1]), axis=1), {}

    params = net.init(jax.random.key(0), x, jnp.ones((32,)))["params"]
    s = state.create_state(jax.random.key(1), params, optimizer)
    run = jax.jit(
        functools.partial(
            step.train_step,
            loss_fn=loss_fn,
            optimizer=optimizer,
            ema={"main": ema.ConstantEMA(0.9)},
        )
    )
    rows = []
    for _ in range(steps):
        s, metrics = run(s, (x, y))
        rows.append(metrics)
    return s, rows


@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_small_network_learns_as_in_float32(dtype):
    _, truth = fit_plain()
    optimizer = dynamic_scaling(PLAIN, initial=2.0**10) if dtype == "float16" else PLAIN
    s, rows = fit(small(dtype=dtype), optimizer)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(s.params))
    first, last = (float(row["loss"]) for row in (truth[0], truth[-1]))
    assert last < 0.7 * first
    # 8 bits of bfloat16, 11 of float16.
    tolerance = {"bfloat16": 3e-2, "float16": 4e-3}[dtype]
    np.testing.assert_allclose(
        [row["loss"] for row in rows], [row["loss"] for row in truth], rtol=tolerance
    )
    np.testing.assert_allclose(rows[0]["grad_norm"], truth[0]["grad_norm"], rtol=tolerance)


SMALL = 2.0**-27  # below half of float16's least number, 2^-24


def underflowing(params, key, x):
    """w x in float16 times a factor whose gradient vanishes there."""
    del key
    return (params.astype(jnp.float16) * x.astype(jnp.float16)).astype(jnp.float32) * SMALL, {}


def advance(optimizer, s, x, loss_fn=underflowing):
    return step.train_step(
        s, x, loss_fn=loss_fn, optimizer=optimizer, ema={"main": ema.ConstantEMA(0.9)}
    )


def start(optimizer, value=1.0):
    return state.create_state(jax.random.key(0), jnp.asarray(value, jnp.float32), optimizer)


def test_scaling_rescues_a_gradient_that_underflows():
    x, sgd = jnp.full((4,), 2.0), optax.sgd(1.0)
    lost, _ = advance(sgd, start(sgd), x)
    assert lost.params == 1.0
    scaled = dynamic_scaling(sgd, initial=2.0**15)
    kept, metrics = advance(scaled, start(scaled), x)
    # Powers of two round nothing: exactly 1 - 2 SMALL in float32's own rounding.
    np.testing.assert_array_equal(metrics["grad_norm"], np.float32(2 * SMALL))
    np.testing.assert_array_equal(kept.params, np.float32(1 - 2 * SMALL))
    assert metrics["loss"] == np.float32(2 * SMALL) and metrics["loss_scale"] == 2.0**15


def large(params, key, x):
    """A gradient of 4 a sample, in float16: it overflows from a scale of 2^14 on."""
    del key
    return (params.astype(jnp.float16) * x.astype(jnp.float16)).astype(jnp.float32), {}


def test_the_scale_halves_and_skips_until_it_fits_then_doubles():
    x = jnp.full((1,), 4.0)
    optimizer = dynamic_scaling(optax.adam(0.5), initial=2.0**16, period=3)
    s = start(optimizer)
    scales, norms, weights, counts = [], [], [], []
    for _ in range(9):
        s, metrics = advance(optimizer, s, x, large)
        scales.append(float(metrics["loss_scale"]))
        norms.append(float(metrics["grad_norm"]))
        weights.append(float(s.params))
        counts.append(int(optax.tree.get(s.opt_state, "count")))
    # 65504 is the greatest number: 4 times 2^14 is beyond. Three good ones, and up again.
    exponents = [16, 15, 14, 13, 13, 13, 14, 13, 13]
    assert scales == [2.0**e for e in exponents]
    good = [e < 14 for e in exponents]
    assert norms == [4.0 if g else 0.0 for g in good]
    assert counts == list(np.cumsum(good))
    before = [1.0, *weights[:-1]]
    assert [a != b for a, b in zip(weights, before, strict=True)] == good
    assert loss_scale(s.opt_state) == 2.0**13 and s.step == 9


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_update_looked_at_again_has_its_scale(accumulate):
    x, found = jnp.full((2,), 4.0), []
    for initial in (2.0**14, 2.0**13):
        optimizer = dynamic_scaling(optax.sgd(0.5), initial=initial)
        found.append(examine(start(optimizer), x, large, accumulate=accumulate))
    assert not np.isfinite(found[0].gradients) and found[1].gradients == 4.0
    np.testing.assert_array_equal(found[0].losses, [4.0, 4.0])


def test_the_scale_has_a_greatest_value():
    x, optimizer = jnp.ones((1,)), dynamic_scaling(optax.sgd(0.0), initial=2.0**23, period=1)
    s, scales = start(optimizer, value=2.0**-30), []
    for _ in range(3):
        s, metrics = advance(optimizer, s, x)
        scales.append(float(metrics["loss_scale"]))
    assert scales == [2.0**23, 2.0**24, 2.0**24]


def test_a_gradient_that_no_scale_mends_is_reported():
    def broken(params, key, x):
        del key
        return jnp.sqrt(params - 1) * x, {}  # the root's slope at 0 is infinite

    optimizer = dynamic_scaling(optax.sgd(1.0), initial=2.0)
    s = start(optimizer)
    found = []
    for _ in range(3):
        s, metrics = advance(optimizer, s, jnp.ones((2,)), broken)
        found.append((float(metrics["loss_scale"]), bool(np.isfinite(metrics["grad_norm"]))))
    assert found == [(2.0, True), (1.0, False), (1.0, False)]
    assert s.params == 1.0


def test_moments_in_bfloat16():
    rng = np.random.default_rng(0)
    p, grads = rng.normal(size=64), rng.normal(size=(10, 64))
    schedule = optim.learning_rate(1e-2)
    optimizer = optim.adam(schedule, moment_dtype=jnp.bfloat16)
    params = jnp.asarray(p, jnp.float32)
    opt_state = optimizer.init(params)
    for g in grads:
        updates, opt_state = optimizer.update(jnp.asarray(g, jnp.float32), opt_state, params)
        params = optax.apply_updates(params, updates)
    assert params.dtype == jnp.float32
    assert optax.tree.get(opt_state, "mu").dtype == jnp.bfloat16
    assert optax.tree.get(opt_state, "nu").dtype == jnp.float32
    truth = adam_numpy(p, grads, lr=1e-2, warmup=0, beta1=0.9, beta2=0.999, eps=1e-8)
    moved = np.abs(truth - p).max()
    error = np.abs(params - truth).max() / moved
    assert 1e-5 < error < 8e-3  # rounding to 8 bits, and nothing worse


def config_with(**changes):
    config = load_config("digits:quick").unlock()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def test_configs_choose_the_precision():
    parts = builders.build_parts(load_config("digits:quick"))
    params = {"w": jnp.ones((1000,))}

    def size(**changes):
        optimizer, _ = builders.build_optimizer(config_with(**changes))
        leaves = jax.tree.leaves(jax.eval_shape(optimizer.init, params))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    assert jnp.dtype(parts.net.dtype) == jnp.float32
    plain = size()
    assert size(optim__moment_dtype="bfloat16") == plain - 2000
    config = config_with(model__dtype="float16")
    config.optim.loss_scale = {"initial": 2.0**12, "period": 100}
    optimizer, _ = builders.build_optimizer(config)
    assert loss_scale(optimizer.init(params)) == 2.0**12
    default, _ = builders.build_optimizer(config_with(model__dtype="float16"))
    assert loss_scale(default.init(params)) == 2.0**15
    assert loss_scale(builders.build_optimizer(config_with())[0].init(params)) is None


def test_bad_input_raises():
    for options in ({"initial": 3.0}, {"initial": 0.5}, {"initial": 2.0**25}):
        with pytest.raises(ValueError, match="a power of two from 1"):
            dynamic_scaling(optax.sgd(1.0), **options)
    with pytest.raises(ValueError, match="period must be at least 1"):
        dynamic_scaling(optax.sgd(1.0), period=0)
    for changes, message in (
        ({"optim__moment_dtype": "float16"}, "must be 'float32' or 'bfloat16'; got 'float16'"),
        ({"model__dtype": "fp16"}, "config.model.dtype must name a floating type"),
    ):
        with pytest.raises(builders.BuildError, match=message):
            builders.build_optimizer(config_with(**changes))
    config = config_with()
    config.optim.loss_scale = {"initial": 2.0}
    with pytest.raises(builders.BuildError, match="set config.model.dtype = 'float16'"):
        builders.build_optimizer(config)
    config.model.dtype = "float16"
    config.optim.loss_scale = {"intial": 2.0}
    with pytest.raises(builders.BuildError, match="Did you mean 'initial'"):
        builders.build_optimizer(config)
