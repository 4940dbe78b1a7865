"""Configs: every field of the unshrunk ones against the published table, and all of them build.

The tables of the Score-SDE reference repository stand in `tests.published`, those of EDM and of DiT
below. Fields that a table has and ours do not are those that have no effect in that config.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import builders
from diffjax.runs.model import Model
from diffjax.runs.workdir import config_names, load_config, plain
from diffjax.train import mesh, state, step
from tests import published

# EDM's options (README and training code): network; classes; ch_mult; dropout; data, pixels;
# millions of images; batch; learning rate; augmentation; sampler's steps; parameters.
EDM = {
    "edm/cifar10_cond_vp": ("vp", 10, (2, 2, 2), 0.13, "cifar10", 32, 200, 512, 1e-3, 0.12, 18, 55_735_299),
    "edm/cifar10_uncond_vp": ("vp", None, (2, 2, 2), 0.13, "cifar10", 32, 200, 512, 1e-3, 0.12, 18, 55_733_891),
    "edm/cifar10_cond_ve": ("ve", 10, (2, 2, 2), 0.13, "cifar10", 32, 200, 512, 1e-3, 0.12, 18, 56_400_643),
    "edm/cifar10_uncond_ve": ("ve", None, (2, 2, 2), 0.13, "cifar10", 32, 200, 512, 1e-3, 0.12, 18, 56_397_827),
    "edm/ffhq_uncond_vp": ("vp", None, (1, 2, 2, 2), 0.05, "ffhq", 64, 200, 256, 2e-4, 0.15, 40, 61_805_571),
    "edm/ffhq_uncond_ve": ("ve", None, (1, 2, 2, 2), 0.05, "ffhq", 64, 200, 256, 2e-4, 0.15, 40, 62_761_091),
    "edm/afhqv2_uncond_vp": ("vp", None, (1, 2, 2, 2), 0.25, "afhqv2", 64, 200, 256, 2e-4, 0.15, 40, 61_805_571),
    "edm/afhqv2_uncond_ve": ("ve", None, (1, 2, 2, 2), 0.25, "afhqv2", 64, 200, 256, 2e-4, 0.15, 40, 62_761_091),
    "edm/imagenet64_cond_adm": ("adm", 1000, (1, 2, 3, 4), 0.1, "imagenet2012", 64, 2500, 4096, 1e-4, 0, 256, 295_899_267),
}  # fmt: skip

DIT = {"dit/imagenet256_xl2": 32, "dit/imagenet512_xl2": 64, "sit/imagenet256_xl2": 32}

# One for each distinct family of networks, loss and process (the digits are trained elsewhere, and
# NCSN is NCSNv2's RefineNet with other norms); the others are slow tests, as are EDM's networks with
# their augmentation, a minute to compile, SiT, which is DiT with another loss, and sub-VP.
DISTINCT = [
    "vp/cifar10_ddpmpp",
    "ve/cifar10_ncsnpp_continuous",
    "ve/ncsnv2/cifar10",
    "dit/imagenet256_xl2",
]

# Classifiers of noisy images: tests/runs/test_controllable.py trains one.
CLASSIFIERS = {"digits_classifier", "ve/cifar10_classifier"}

# What `quick` may change.
SHRUNK = {
    "model.nf", "model.ch_mult", "model.num_res_blocks", "model.attn_resolutions",
    "model.blocks_per_group", "model.channel_multiplier",
    "model.channels_per_head", "model.depth", "model.width", "model.num_heads",
    "data.image_size",
    "training.batch_size", "training.n_iters", "training.n_jitted_steps", "training.log_freq",
    "training.eval_freq", "training.snapshot_freq", "training.snapshot_freq_for_preemption",
    "optim.warmup", "sampling.steps", "sampling.solver.n_steps_each",
    "eval.batch_size", "eval.num_samples",
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


def count(name):
    """The parameters of a config's network."""
    config = load_config(name)
    parts = builders.build_parts(config)
    return _count(parts.net, parts.image_shape)


@functools.cache  # many configs share a network
def _count(net, image_shape):
    cond = None if getattr(net, "num_classes", None) is None else jnp.zeros((1,), jnp.int32)
    x, label = jnp.zeros((1, *image_shape)), jnp.ones((1,))
    shapes = jax.eval_shape(net.init, jax.random.key(0), x, label, cond)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


@pytest.mark.parametrize("name", published.names())
def test_every_field_is_the_published_one(name):
    assert flat(plain(load_config(name))) == published.expected(name)


@pytest.mark.parametrize("name", published.names())
def test_the_network_has_the_published_size(name):
    assert count(name) == published.parameters(name)


@pytest.mark.parametrize("name", EDM)
def test_edm_has_its_published_options(name):
    net, classes, ch_mult, dropout, data, pixels, millions, batch, lr, augment, steps, _ = EDM[name]
    config = flat(plain(load_config(name)))
    dataset = config["data.dataset" if data in ("cifar10", "imagenet2012") else "data.train_path"]
    assert (dataset, config["data.image_size"], config["data.centered"]) == (data, pixels, True)
    assert config["model.ch_mult"] == list(ch_mult)
    assert config["model.dropout"] == dropout
    assert config.get("model.num_classes") == classes
    assert config["model.nf"] == (192 if net == "adm" else 128)
    assert config["model.num_res_blocks"] == (3 if net == "adm" else 4)
    assert config["model.attn_resolutions"] == ([32, 16, 8] if net == "adm" else [16])
    if net != "adm":
        # DDPM++: positional, no FIR, no pyramid. NCSN++: Fourier twice as wide, FIR, residual.
        chosen = [
            config[f"model.{f}"] for f in ("embedding_type", "fir_kernel", "progressive_input")
        ]
        plus = {"vp": ["positional", [1, 1], "none"], "ve": ["fourier", [1, 3, 3, 1], "residual"]}
        assert chosen == plus[net]
        assert config.get("model.embedding_mult", 1) == (2 if net == "ve" else 1)
    assert config.get("data.augment", 0) == augment
    assert config.get("model.augment_dim", 0) == (9 if augment else 0)
    assert not config["data.random_flip"]
    assert config["training.batch_size"] == batch
    assert 0 <= config["training.n_iters"] * batch - millions * 10**6 < batch
    assert (config["optim.lr"], config["optim.optimizer"]) == (lr, "Adam")
    assert config["optim.warmup"] == 10**7 // batch  # 10 M images
    assert config["optim.grad_clip"] == -1
    assert config["ema.half_life_images"] == (50e6 if net == "adm" else 0.5e6)
    assert config["ema.ramp_up"] == 0.05
    assert (config["process.name"], config["loss.reduce"]) == ("edm", "sum")
    assert (config["process.t_min"], config["process.t_max"]) == (0.002, 80)
    assert (config["loss.times.mean"], config["loss.times.std"]) == (-1.2, 1.2)
    assert config["precondition.label"] == "log_noise_level"  # ln(sigma)/4, also for Fourier
    assert config["loss.weight.sigma_data"] == config["precondition.sigma_data"] == 0.5
    assert (config["sampling.steps"], config["sampling.grid.rho"]) == (steps, 7)


@pytest.mark.parametrize("name", EDM)
def test_edm_has_its_published_size(name):
    # EDM does not count the 128 frequencies of a Fourier embedding, which are not trained.
    assert count(name) == EDM[name][-1] + (128 if EDM[name][0] == "ve" else 0)


@pytest.mark.parametrize("name", DIT)
def test_dit_has_its_published_options(name):
    config = flat(plain(load_config(name)))
    assert config["data.image_size"] == DIT[name]
    assert (config["training.batch_size"], config["optim.lr"]) == (256, 1e-4)
    assert config["optim.warmup"] == config["optim.weight_decay"] == 0
    assert config["ema.rate"] == 0.9999
    if name.startswith("dit"):
        # A learned range, trained by the bound without a factor and used by the sampler.
        assert (config["loss.name"], config["loss.bound_weight"]) == ("hybrid", 1)
        assert config["loss.times.levels"] == config["process.n"] == 1000
        assert config["precondition.learned_variance"] == "range"
        assert config["sampling.solver.variance"] == "learned"
    else:
        assert config["precondition.name"] == "sit"
    # 675,129,632 with the positions of 256 patches of width 1152; 1,024 patches at 512 pixels.
    assert count(name) == 675_129_632 + 1152 * ((DIT[name] // 2) ** 2 - 256)


def test_no_published_config_is_left_out():
    assert len(published.names()) == 39
    models = set(published.names()) | set(EDM) | set(DIT) | {"digits", "cifar10_small"}
    assert set(config_names()) == models | CLASSIFIERS


@pytest.mark.parametrize("name", config_names())
def test_quick_changes_the_listed_fields_only(name):
    full, quick = flat(plain(load_config(name))), flat(plain(load_config(f"{name}:quick")))
    assert full.keys() <= quick.keys()
    assert {field for field in quick if full.get(field) != quick[field]} <= SHRUNK


@pytest.mark.parametrize("name", config_names())
@pytest.mark.parametrize("mode", ["full", "quick"])
def test_everything_builds(name, mode):
    config = load_config(f"{name}:{mode}")
    parts = builders.build_parts(config)
    builders.build_loss(config, parts, train=True)
    builders.build_optimizer(config)
    builders.build_ema(config)
    if name not in CLASSIFIERS:
        plan = builders.build_sampling(config, parts.process)
        assert plan.times.shape == (config.sampling.steps + 1,)


def random_like(shapes):
    """Small weights of these shapes: no layer starts at zero, and nothing is compiled for them."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(0.1 * rng.normal(size=s.shape), s.dtype), shapes)


def quick(name):
    """A default test for the distinct configs, a slow one for the others."""
    return name if name in DISTINCT else pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [quick(n) for n in config_names() if n not in CLASSIFIERS])
def test_a_quick_one_trains_a_step_and_samples(name, compilation_cache):
    config = load_config(f"{name}:quick")
    parts = builders.build_parts(config)
    optimizer, schedule = builders.build_optimizer(config)
    params = random_like(jax.eval_shape(parts.init_params, jax.random.key(0)))
    single = mesh.make_mesh(data=1)
    run = step.compile_step(
        single,
        loss_fn=builders.build_loss(config, parts, train=True),
        optimizer=optimizer,
        ema=builders.build_ema(config),
        schedule=schedule,
    )
    shape = (1, 4, *parts.image_shape)
    images = np.random.default_rng(0).integers(0, config.data.levels, shape, np.uint8)
    batch = {"image": jnp.asarray(images)}
    if parts.num_classes is not None:
        batch["label"] = jnp.arange(4)[None] % parts.num_classes
    current = state.create_state(jax.random.key(1), params, optimizer)
    current = jax.device_put(current, mesh.replicated(single))
    before = jax.tree.map(np.asarray, params)
    for _ in range(2):  # the rate of the first update is 0
        current, metrics = run(current, batch)
    assert np.isfinite(metrics["loss"][0])
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), current.params, before)
    assert np.mean(jax.tree.leaves(moved)) > 0.9
    labels = None if parts.num_classes is None else [0, 1]
    drawn = Model(config, parts, current.ema["main"], 2).sample(jax.random.key(2), 2, labels=labels)
    assert drawn.shape == (2, *parts.image_shape)
    assert drawn.max() < config.data.levels
