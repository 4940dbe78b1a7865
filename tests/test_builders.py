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
    for name in builders.SOLVERS:
        plan = builders.build_sampling(config, dj.VP(), solver=name, steps=7)
        assert plan.times.shape == (8,)
    for name in builders.GRIDS:
        config.sampling.grid.name = name
        assert builders.build_sampling(config, dj.VP()).times[-1] == 0


def test_a_solver_by_value_is_taken_as_it_is():
    solver = dj.solvers.DDIM(eta=0.3)
    assert builders.build_sampling(load_config("digits"), dj.VP(), solver=solver).solver is solver


def test_the_configs_own_solver_keeps_its_options_by_name():
    config = load_config("ve/cifar10_ncsnpp_continuous")
    own = builders.build_sampling(config, dj.VE(), solver="pc").solver
    assert own.corrector.snr == config.sampling.solver.snr
