"""Configs: every field of the unshrunk ones against the published table, and all of them build.

The table is transcribed from the reference repository's configs as its code receives them (id S2
subvp/cifar10_ddpmpp_continuous, E8 ve/cifar10_ncsnpp_continuous, P2 vp/cifar10_ddpmpp_continuous).
Fields that the table has and ours do not are those that have no effect in that config.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import builders
from diffjax.runs.model import Model
from diffjax.runs.workdir import config_names, load_config, plain
from diffjax.train import mesh, state, step

COMMON = {
    "seed": 42,
    "loss.times.name": "uniform",  # t ~ U(1e-5, 1)
    "loss.times.stratified": False,
    "loss.weight.name": "simple",  # likelihood_weighting False
    "optim.optimizer": "Adam",
    "optim.lr": 2e-4,
    "optim.beta1": 0.9,
    "optim.beta2": 0.999,
    "optim.eps": 1e-8,
    "optim.weight_decay": 0.0,
    "optim.warmup": 5000,
    "optim.grad_clip": 1.0,
    "optim.decay": "constant",
    "ema.name": "constant",
    "training.batch_size": 128,
    "training.n_iters": 1_300_001,
    "training.n_jitted_steps": 5,
    "training.log_freq": 50,
    "training.eval_freq": 100,
    "training.snapshot_freq": 50_000,
    "training.snapshot_freq_for_preemption": 10_000,
    "training.snapshot_sampling": True,
    "eval.batch_size": 1024,
    "eval.num_samples": 50_000,
    "eval.tolerance": 1e-5,  # rtol and atol of the likelihood's ODE
    "model.name": "ncsnpp",
    "model.nf": 128,
    "model.ch_mult": [1, 2, 2, 2],
    "model.num_res_blocks": 4,
    "model.attn_resolutions": [16],
    "model.dropout": 0.1,
    "model.resamp_with_conv": True,
    "model.conditional": True,
    "model.skip_rescale": True,
    "model.resblock_type": "biggan",
    "model.progressive": "none",
    "model.progressive_combine": "sum",
    "model.init_scale": 0.0,
    "data.name": "tfds",
    "data.dataset": "cifar10",
    "data.train_split": "train",
    "data.eval_split": "test",
    "data.image_size": 32,
    "data.num_channels": 3,
    "data.levels": 256,
    "data.random_flip": True,
    "data.uniform_dequantization": False,
    "sampling.steps": 1000,  # num_scales
    "sampling.grid.name": "uniform",
    "sampling.final": "tweedie",  # noise_removal True
}

DDPMPP = {
    "process.beta_min": 0.1,
    "process.beta_max": 20.0,
    "precondition.name": "score_sde_vp",  # 999 t, no division by sigma
    "loss.reduce": "mean",  # reduce_mean True
    "ema.rate": 0.9999,
    "model.fir": False,
    "model.progressive_input": "none",
    "model.embedding_type": "positional",
    "data.centered": True,
    "sampling.grid.end": 1e-3,
    "sampling.solver.name": "euler_maruyama",  # corrector none
}

PUBLISHED = {
    "vp/cifar10_ddpmpp_continuous": (61_804_419, DDPMPP | {"process.name": "vp"}),
    "subvp/cifar10_ddpmpp_continuous": (61_804_419, DDPMPP | {"process.name": "subvp"}),
    "ve/cifar10_ncsnpp_continuous": (
        62_758_915,
        {
            "process.name": "ve",
            "process.sigma_min": 0.01,
            "process.sigma_max": 50.0,
            "precondition.name": "score_sde_ve",
            "loss.reduce": "half_sum",  # reduce_mean False
            "ema.rate": 0.999,
            "model.fir": True,
            "model.fir_kernel": [1, 3, 3, 1],
            "model.progressive_input": "residual",
            "model.embedding_type": "fourier",
            "model.fourier_scale": 16.0,
            "model.centered": False,
            "model.scale_by_sigma": True,
            "data.centered": False,
            "sampling.grid.end": 1e-5,
            "sampling.solver.name": "pc",
            "sampling.solver.predictor": "reverse_diffusion",
            "sampling.solver.corrector": "langevin",
            "sampling.solver.snr": 0.16,
            "sampling.solver.n_steps_each": 1,
        },
    ),
}

# What `quick` may change.
SHRUNK = {
    "model.nf", "model.ch_mult", "model.num_res_blocks", "model.attn_resolutions",
    "data.image_size",
    "training.batch_size", "training.n_iters", "training.n_jitted_steps", "training.log_freq",
    "training.eval_freq", "training.snapshot_freq", "training.snapshot_freq_for_preemption",
    "optim.warmup", "sampling.steps", "eval.batch_size", "eval.num_samples",
}  # fmt: skip


def flat(tree, prefix=""):
    """{"a.b": value} of a plain config."""
    found = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_field_is_the_published_one(name):
    assert flat(plain(load_config(name))) == COMMON | PUBLISHED[name][1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_network_has_the_published_size(name):
    parts = builders.build_parts(load_config(name))
    shapes = jax.eval_shape(parts.init_params, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == PUBLISHED[name][0]


def test_no_published_config_is_left_out():
    assert set(config_names()) == set(PUBLISHED) | {"digits"}


@pytest.mark.parametrize("name", config_names())
def test_quick_changes_the_listed_fields_only(name):
    full, quick = flat(plain(load_config(name))), flat(plain(load_config(f"{name}:quick")))
    assert full.keys() == quick.keys()
    assert {field for field in full if full[field] != quick[field]} <= SHRUNK


@pytest.mark.parametrize("name", config_names())
@pytest.mark.parametrize("mode", ["full", "quick"])
def test_everything_builds(name, mode):
    config = load_config(f"{name}:{mode}")
    parts = builders.build_parts(config)
    builders.build_loss(config, parts, train=True)
    builders.build_optimizer(config)
    builders.build_ema(config)
    plan = builders.build_sampling(config, parts.process)
    assert plan.times.shape == (config.sampling.steps + 1,)


@pytest.mark.parametrize("name", config_names())
def test_a_quick_one_trains_a_step_and_samples(name, compilation_cache):
    config = load_config(f"{name}:quick")
    parts = builders.build_parts(config)
    optimizer, schedule = builders.build_optimizer(config)
    params = jax.jit(parts.init_params)(jax.random.key(0))
    run = step.compile_step(
        mesh.make_mesh(data=1),
        loss_fn=builders.build_loss(config, parts, train=True),
        optimizer=optimizer,
        ema=builders.build_ema(config),
        schedule=schedule,
    )
    shape = (1, 4, *parts.image_shape)
    images = np.random.default_rng(0).integers(0, config.data.levels, shape, np.uint8)
    current = state.create_state(jax.random.key(1), params, optimizer)
    for _ in range(2):  # the rate of the first update is 0
        current, metrics = run(current, {"image": jnp.asarray(images)})
    assert np.isfinite(metrics["loss"][0])
    moved = jax.tree.map(lambda a, b: jnp.any(a != b), current.params, params)
    frozen = {"GaussianFourierProjection_0"}
    assert all(
        jnp.stack(jax.tree.leaves(leaves)).any()
        for layer, leaves in moved.items()
        if layer not in frozen
    )
    drawn = Model(config, parts, current.ema, 2).sample(jax.random.key(2), 2)
    assert drawn.shape == (2, *parts.image_shape)
    assert drawn.max() < config.data.levels
