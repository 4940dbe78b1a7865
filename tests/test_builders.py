"""Builders: names, fields, imports by name; what a config may not say."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import diffjax as dj
from diffjax import builders
from diffjax.builders import BuildError
from diffjax.runs.workdir import load_config


class OwnNet(nn.Module):
    """A user's network: x times one number."""

    start: float = 0.5
    num_classes = None

    @nn.compact
    def __call__(self, x, label, cond=None, train=False):
        return x * self.param("scale", nn.initializers.constant(self.start), ())


def test_a_callable_by_name_gets_the_sections_fields():
    config = load_config("digits").unlock()
    config.model = {"name": "tests.test_builders:OwnNet", "start": 0.25}
    parts = builders.build_parts(config)
    params = parts.init_params(jax.random.key(0))
    assert params["scale"] == 0.25
    x = jnp.ones((2, 8, 8, 1))
    prediction = parts.denoiser(params)(x, jnp.asarray(0.5))
    assert prediction.x0.shape == x.shape


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("process", {"name": "vpp"}, r"config\.process\.name = 'vpp'.*Did you mean 'vp'"),
        ("process", {"beta_mni": 0.1}, r"config\.process\.beta_mni.*Did you mean 'beta_min'"),
        ("process", {"beta_min": -1.0}, r"config\.process \(vp\).*must not be negative; got -1\.0"),
        ("model", {"resblock_type": "big"}, r"config\.model \(ncsnpp\).*resblock_type"),
        ("model", {"name": "nowhere.at_all:Net"}, "cannot be imported"),
        ("model", {"name": 3}, r"config\.model\.name must name one of"),
        ("precondition", {"name": "edmm"}, "Did you mean 'edm'"),
    ],
)
def test_what_cannot_be_built_says_the_field_and_the_way_out(section, change, message):
    config = load_config("digits").unlock()
    for name, value in change.items():
        with config[section].ignore_type():
            config[section][name] = value
    with pytest.raises(BuildError, match=message):
        builders.build_parts(config)


def test_unknown_solver_names_the_known_ones():
    config = load_config("digits")
    with pytest.raises(BuildError, match="'hean' is unknown; choose one of euler, heun"):
        builders.build_sampling(config, dj.VP(), solver="hean")


def test_every_solver_and_grid_can_be_named():
    config = load_config("digits").unlock()
    adaptive = {"ode", "dpm_adaptive", "adaptive_sde"}
    for name in set(builders.SOLVERS) - adaptive:
        plan = builders.build_sampling(config, dj.VP(), solver=name, steps=7)
        assert plan.times.shape == (8,)
    for name in adaptive:
        plan = builders.build_sampling(config, dj.VP(), solver=name)
        assert plan.adaptive and plan.times.shape == (2,)
    for name in builders.GRIDS:
        config.sampling.grid = {"name": name}
        assert builders.build_sampling(config, dj.VP()).times[-1] == 0


def test_the_ode_sampler_takes_the_ends_of_the_grid():
    """rtol and atol of the config; from t_max to the grid's end, or t_min where that is 0."""
    config = load_config("digits").unlock()
    config.sampling.solver = {"name": "ode", "rtol": 1e-3, "atol": 1e-4}
    config.sampling.grid = {"name": "uniform", "end": 0.01}
    plan = builders.build_sampling(config, dj.VP())
    assert plan.adaptive and plan.times.tolist() == pytest.approx([1.0, 0.01])
    assert (plan.solver.controller.rtol, plan.solver.controller.atol) == (1e-3, 1e-4)
    assert isinstance(plan.final, dj.Tweedie)
    config.sampling.grid = {"name": "uniform"}
    config.sampling.final = "keep"
    plan = builders.build_sampling(config, dj.VP(), solver="ode")
    assert plan.times.tolist() == pytest.approx([1.0, 1e-5])
    assert isinstance(plan.final, dj.Keep)
    plan = builders.build_sampling(config, dj.VP(), solver="heun", steps=4)
    assert not plan.adaptive and plan.times.shape == (5,)
    for solver in ("ode", dj.solvers.AdaptiveFlow()):
        with pytest.raises(BuildError, match="steps=20 does not apply.*rtol and atol"):
            builders.build_sampling(config, dj.VP(), solver=solver, steps=20)
    config.sampling.solver = {"name": "ode", "rtoll": 1e-3}
    with pytest.raises(BuildError, match="Did you mean 'rtol'"):
        builders.build_sampling(config, dj.VP())


@pytest.mark.parametrize(
    ("section", "built"),
    [
        ({"predictor": "ancestral", "variance": "large", "corrector": "none"}, "variance='large'"),
        ({"predictor": "none", "corrector": "ald", "snr": 0.3}, "NoPredictor(), corrector=Annea"),
        ({"n_steps_each": 2, "noise_norm": "sqrt_dim"}, "n_steps=2, coupling='sample', noise_nor"),
        ({"probability_flow": True, "order": "predictor_first"}, "probability_flow=True"),
    ],
)
def test_the_reference_names_of_predictors_and_correctors(section, built):
    config = load_config("digits").unlock()
    config.sampling.solver = {"name": "pc", **section}
    solver = builders.build_sampling(config, dj.VP()).solver
    assert built in repr(solver)
    assert solver.order == section.get("order", "corrector_first")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"predictor": "ancestral", "probability_flow": True}, "probability_flow is not a field"),
        ({"corrector": "ald", "coupling": "batch"}, "coupling is not a field"),
        ({"corrector": "langevine"}, "Did you mean 'langevin'"),
        ({"order": "both"}, "order must be one of"),
    ],
)
def test_what_a_predictor_or_corrector_does_not_take(section, message):
    config = load_config("digits").unlock()
    config.sampling.solver = {"name": "pc", **section}
    with pytest.raises(BuildError, match=message):
        builders.build_sampling(config, dj.VP())


def test_a_solver_by_value_is_taken_as_it_is():
    solver = dj.solvers.DDIM(eta=0.3)
    assert builders.build_sampling(load_config("digits"), dj.VP(), solver=solver).solver is solver


def test_the_configs_own_solver_keeps_its_options_by_name():
    config = load_config("ve/cifar10_ncsnpp_continuous")
    own = builders.build_sampling(config, dj.VE(), solver="pc").solver
    assert own.corrector.snr == config.sampling.solver.snr


def small(**model):
    config = load_config("digits:quick").unlock()
    config.model.update(model)
    return config


def test_a_class_conditional_model_uses_its_labels():
    config = small(num_classes=10)
    parts = builders.build_parts(config)
    assert parts.num_classes == 10
    params = jax.jit(parts.init_params)(jax.random.key(0))
    # At the start the last layers are all but zero: give them weight.
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    x, t = jnp.ones((2, 8, 8, 1)), jnp.asarray(0.5)
    call = jax.jit(lambda denoise: denoise(x, t).x0)
    zero, mixed = (call(parts.denoiser(params, jnp.asarray(c))) for c in ([0, 0], [0, 7]))
    assert jnp.array_equal(zero[0], zero[1])
    assert jnp.allclose(mixed[0], zero[0])
    assert not jnp.allclose(mixed[0], mixed[1])
    loss_fn = builders.build_loss(config, parts, train=True)
    batch = {"image": jnp.zeros((4, 8, 8, 1), jnp.uint8), "label": jnp.arange(4)}
    losses, _ = jax.jit(loss_fn)(params, jax.random.key(1), batch)
    same, _ = jax.jit(loss_fn)(params, jax.random.key(1), batch | {"label": jnp.zeros(4, int)})
    assert jnp.allclose(losses[0], same[0])
    assert not jnp.allclose(losses[1:], same[1:])


@pytest.mark.slow
def test_dropout_and_flips_act_in_training_only():
    config = small(dropout=0.5)
    config.data.random_flip = True
    config.data.uniform_dequantization = False
    parts = builders.build_parts(config)
    params = jax.jit(parts.init_params)(jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    images = jnp.zeros((4, 8, 8, 1), jnp.uint8).at[:, :, :4].set(16)
    mirrored = images[:, :, ::-1]
    key = jax.random.key(1)
    training, scoring = (builders.build_loss(config, parts, train=t) for t in (True, False))
    whole = small(dropout=0.0)
    whole.data = config.data
    plain_loss = builders.build_loss(whole, builders.build_parts(whole), train=False)
    score = scoring(params, key, {"image": images})[0]
    assert jnp.array_equal(score, plain_loss(params, key, {"image": images})[0])
    assert not jnp.allclose(training(params, key, {"image": images})[0], score)
    assert not jnp.allclose(score, scoring(params, key, {"image": mirrored})[0])


def test_sources_by_config(tmp_path):
    import numpy as np

    images = np.arange(3 * 8 * 8, dtype=np.uint8).reshape(3, 8, 8, 1) % 17
    for split in ("train", "eval"):
        np.savez(tmp_path / f"{split}.npz", images=images if split == "train" else images[:2])
    config = small()
    config.data.name = "npz"
    config.data.train_path = str(tmp_path / "train.npz")
    config.data.eval_path = str(tmp_path / "eval.npz")
    assert len(builders.build_source(config, "train")) == 3
    assert len(builders.build_source(config, "eval")) == 2
    config.data.levels = 8
    with pytest.raises(BuildError, match="must lie below its 8 levels; got 16"):
        builders.build_source(config, "train")
    config.data.trainpath = "typo"
    with pytest.raises(BuildError, match="Did you mean 'train_path'"):
        builders.build_source(config, "train")


def test_images_of_another_size_are_refused(digits_dir):
    config = small()
    assert len(builders.build_source(config, "train")) == 1437
    assert len(builders.build_source(config, "eval")) == 360
    config.data.image_size = 16
    with pytest.raises(BuildError, match=r"shape \(16, 16, 1\).*has \(8, 8, 1\)"):
        builders.build_source(config, "train")
