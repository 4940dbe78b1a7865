"""Learned variances by config: what is refused, and imported files that sample with theirs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import diffjax as dj
from diffjax import builders
from diffjax.builders import BuildError
from diffjax.prediction import LearnedRange
from diffjax.runs import weights
from diffjax.runs.weights import import_weights
from diffjax.runs.workdir import RunError, load_config
from tests.interop import layouts, torchfiles


def small(config_name="dit/imagenet256_xl2:quick", **model):
    config = load_config(config_name).copy_and_resolve_references().unlock()
    config.model.update({"num_classes": 3, **model})
    return config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precondition.learned_variance": "rnage"}, "Did you mean 'range'"),
        ({"precondition.learned_variance": None}, "learned_variance = 'range'"),
        ({"loss.times.placement": "ends"}, "placement 'right'"),
        ({"loss.times": {"name": "uniform"}}, "defined on discrete levels"),
        ({"loss.name": "denoising"}, "bound_weight belongs to config.loss.name = 'hybrid'"),
        ({"loss.name": "hybird"}, "'hybrid' .with a learned variance."),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    config = small()
    for name, value in change.items():
        section, _, field = name.rpartition(".")
        node = config
        for part in section.split("."):
            node = node[part]
        if isinstance(value, dict):
            del node[field]
        if value is None:
            del node[field]
        else:
            node[field] = value
    with pytest.raises(BuildError, match=message):
        parts = builders.build_parts(config)
        builders.is_classifier(config)
        builders.build_loss(config, parts, train=True)


def test_a_network_without_the_channels_is_refused():
    config = small(return_sigma=False)
    parts = builders.build_parts(config)
    params = jax.eval_shape(parts.init_params, jax.random.key(0))
    loss = builders.build_loss(config, parts, train=False)
    batch = {"image": np.zeros((2, *parts.image_shape), np.uint8), "label": np.zeros(2, int)}
    with pytest.raises(ValueError, match="twice the channels of x"):
        jax.eval_shape(loss, params, jax.random.key(0), batch)


def dit_file(path, config):
    """A DiT file with random weights, and these."""
    parts = builders.build_parts(config)
    shapes = jax.eval_shape(parts.init_params, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: np.float32(0.1 * rng.standard_normal(s.shape)), shapes)
    tensors = layouts.dit(params, config.model.get("patch_size", 2), 4)
    path.write_bytes(torchfiles.zip_bytes(torchfiles.state_dict(tensors)))
    return path


def test_an_imported_dit_samples_with_its_variance(tmp_path):
    """A config that says nothing of a variance: the import records it, and sampling uses it."""
    config = small()
    file = dit_file(tmp_path / "dit.pt", config)
    del config.precondition["learned_variance"]
    del config.sampling.solver["variance"]
    config.loss = {k: v for k, v in config.loss.items() if k not in ("name", "bound_weight")}
    import_weights("dit", file, config, tmp_path / "W", check=False)
    model = dj.load(tmp_path / "W")
    assert isinstance(model.parts.learned_variance, LearnedRange)
    assert model.config.sampling.solver.variance == "learned"
    plan = builders.build_sampling(model.config, model.parts.process)
    assert plan.solver.variance == "learned"
    drawn = model.sample(jax.random.key(0), 2, labels=[0, 1], steps=2)
    assert drawn.shape == (2, *model.parts.image_shape)
    assert "learned_variance" not in config.precondition  # the caller's own is not touched


@pytest.mark.parametrize(("channels", "doubled"), [(6, True), (3, False), (None, False)])
def test_an_adm_of_twice_the_channels_has_a_variance(channels, doubled):
    config = load_config("edm/imagenet64_cond_adm:quick").copy_and_resolve_references().unlock()
    config.model.out_channels = channels
    config.sampling.solver = {"name": "ancestral", "variance": "large"}
    parts = builders.build_parts(config)
    like = jax.eval_shape(parts.init_params, jax.random.key(0))
    assert weights._doubled(parts, like) == doubled
    recorded = weights._with_learned_variance(config)
    assert isinstance(builders.build_parts(recorded).learned_variance, LearnedRange)
    assert recorded.sampling.solver.variance == "large"  # a choice that the config makes itself


def test_sit_s_file_must_be_asked_as_sit(tmp_path):
    config = small("sit/imagenet256_xl2:quick")
    file = dit_file(tmp_path / "sit.pt", config)
    import_weights("sit", file, config, tmp_path / "W", check=False)
    assert dj.load(tmp_path / "W").parts.learned_variance is None
    config.precondition = {"name": "plain", "kind": "velocity"}
    with pytest.raises(RunError, match="precondition.name is 'plain', the file says 'sit'"):
        import_weights("sit", file, config, tmp_path / "V", check=False)


class SiTVelocity(nn.Module):
    """SiT's exact velocity, data minus noise in its own clock, for N(mean, var) pixels."""

    @nn.compact
    def __call__(self, x, label, cond=None, train=False):
        mean = self.param("mean", nn.initializers.zeros, x.shape[1:], jnp.float32)[None]
        var = self.param("var", nn.initializers.ones, x.shape[1:], jnp.float32)[None]
        t = label.reshape(-1, 1, 1, 1)  # 0 is noise
        centred = (x - t * mean) / (t**2 * var + (1 - t) ** 2)
        data, noise = mean + t * var * centred, (1 - t) * centred
        return data - noise


def test_a_model_in_sit_s_clock_samples_its_data():
    config = small("sit/imagenet256_xl2:quick")
    config.model = {"name": "tests.runs.test_hybrid_config:SiTVelocity"}
    parts = builders.build_parts(config)
    rng = np.random.default_rng(0)
    shape = parts.image_shape
    params = {
        "mean": jnp.asarray(rng.uniform(-0.3, 0.3, shape), jnp.float32),
        "var": jnp.asarray(rng.uniform(0.01, 0.04, shape), jnp.float32),
    }
    from diffjax.runs.model import Model

    model = Model(config, parts, params, 0)
    latents = rng.standard_normal((2, *shape)).astype(np.float32)
    found = model.sample(jax.random.key(0), 2, latents=latents).astype(float) / 127.5 - 1
    want = np.asarray(params["mean"]) + np.sqrt(np.asarray(params["var"])) * latents
    # Half a level, and the tolerance of the solver; beyond the range the levels are clipped.
    np.testing.assert_allclose(found, np.clip(want, -1, 1), atol=0.5 / 127.5 + 5e-3)
