"""`diffjax import`: from a file to a workdir that samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import serialization

import diffjax as dj
from diffjax import builders
from diffjax.cli.main import main
from diffjax.core import tensorfile
from diffjax.interop import native
from diffjax.interop.assign import WeightsError
from diffjax.runs import weights
from diffjax.runs.weights import import_weights
from diffjax.runs.workdir import RunError, load_config
from tests.interop import layouts, torchfiles
from tests.nets import numpy_ncsnpp


class Shrink(nn.Module):
    """The denoiser of pixels that are independent Gaussians, under a VP process.

    A network whose weights are known: the mean and variance of each pixel.
    """

    factor: float = 999.0

    @nn.compact
    def __call__(self, x, label, cond=None, train=False):
        mean = self.param("mean", nn.initializers.zeros, x.shape[1:], jnp.float32)[None]
        var = self.param("var", nn.initializers.ones, x.shape[1:], jnp.float32)[None]
        alpha, _, sigma = (c.reshape(-1, 1, 1, 1) for c in dj.VP().coeffs(label / self.factor))
        return sigma / (alpha**2 * var + sigma**2) * (x - alpha * mean)


CONFIG = """
import diffjax as dj
from diffjax.runs.workdir import load_config


def get_config(preset="score_sde_vp"):
    config = load_config("digits:quick").copy_and_resolve_references().unlock()
    del config.model
    config.model = {"name": "tests.interop.test_import:Shrink"}
    del config.precondition
    config.precondition = {"name": "plain", "kind": "eps"}
    if preset == "score_sde_vp":
        config.precondition = {"name": "score_sde_vp"}
    return config
"""


@pytest.fixture
def config_path(tmp_path, digits_dir):
    path = tmp_path / "shrink.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def moments(digits_dir):
    """Mean and variance of each pixel of the held-out digits in [-1, 1]."""
    config = load_config("digits:quick")
    source = builders.build_source(config, "eval")
    levels = jnp.stack([jnp.asarray(source[i]["image"]) for i in range(len(source))])
    x = np.asarray(builders.build_quantisation(config).to_model(levels))
    return {"mean": x.mean(0), "var": x.var(0) + 1e-3}


def write_state(path, params):
    path.write_bytes(serialization.msgpack_serialize({"step": 7, "params_ema": params}))
    return path


def test_weights_that_denoise_become_a_workdir(tmp_path, config_path, moments, capsys):
    file = write_state(tmp_path / "checkpoint", moments)
    workdir = tmp_path / "W"
    arguments = [f"--path={file}", f"--config={config_path}", f"--workdir={workdir}"]
    code = main(["diffjax", "import", "--from=score_sde", *arguments])
    out = capsys.readouterr()
    assert code == 0, out.err
    assert "The weights denoise" in out.out
    assert "Imported as step 7" in out.out
    model = dj.load(workdir)
    assert model.step == 7
    jax.tree.map(np.testing.assert_array_equal, model.params, moments)
    assert model.sample(jax.random.key(0), 2, solver="ddim", steps=2).shape == (2, 8, 8, 1)


def test_a_wrong_clock_is_named_and_nothing_written(tmp_path, config_path, moments, capsys):
    file = write_state(tmp_path / "checkpoint", moments)
    workdir = tmp_path / "W"
    arguments = [f"--path={file}", f"--config={config_path}:t", f"--workdir={workdir}"]
    assert main(["diffjax", "import", "--from=score_sde", *arguments]) == 2
    err = capsys.readouterr().err
    assert "label Time(999) (not Time(1))" in err
    assert "Nothing was written; --nocheck" in err
    assert not workdir.exists()
    assert main(["diffjax", "import", "--from=score_sde", "--nocheck", *arguments]) == 0
    assert dj.load(workdir).step == 7


@pytest.fixture(scope="module")
def quick_weights():
    """Random weights of the quick digits network, and the same under the port's names."""
    parts = builders.build_parts(load_config("digits:quick"))
    net, rng = parts.net, np.random.default_rng(0)
    like = jax.eval_shape(parts.init_params, jax.random.key(3))
    params = jax.tree.map(lambda leaf: 0.1 * rng.standard_normal(leaf.shape), like)
    params = jax.tree.map(np.float32, params)
    fields = {name: getattr(net, name) for name in net.__dataclass_fields__}
    run = layouts.recording(numpy_ncsnpp.Network)(params, **{**fields, "nonlinearity": "swish"})
    run(np.zeros((1, *parts.image_shape)), np.ones(1))
    return params, layouts.port(params, run.order)


def test_a_torch_file_becomes_a_workdir(tmp_path, quick_weights):
    params, tensors = quick_weights
    file = tmp_path / "weights.pth"
    file.write_bytes(torchfiles.legacy_bytes(torchfiles.state_dict(tensors)))
    config = load_config("digits:quick")
    done = import_weights("score_sde", file, config, tmp_path / "W", check=False)
    assert done == (0, None)
    jax.tree.map(np.testing.assert_array_equal, dj.load(tmp_path / "W").params, params)
    with pytest.raises(RunError, match="holds checkpoints already"):
        import_weights("score_sde", file, config, tmp_path / "W", check=False)


@pytest.mark.slow
def test_untrained_weights_are_not_let_pass(tmp_path, digits_dir, quick_weights):
    _, tensors = quick_weights
    file = tmp_path / "weights.pth"
    file.write_bytes(torchfiles.zip_bytes(torchfiles.state_dict(tensors)))
    with pytest.raises(RunError, match="untrained weights"):
        import_weights("score_sde", file, load_config("digits:quick"), tmp_path / "W")
    assert not (tmp_path / "W").exists()


def test_our_own_file_there_and_back(tmp_path, quick_weights):
    params, _ = quick_weights
    native.write(tmp_path / "a.safetensors", params)
    tensors = tensorfile.read(tmp_path / "a.safetensors")
    assert "ResnetBlockBigGANpp_0/Conv_0/kernel" in tensors
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    found = native.read(tmp_path / "a.safetensors", like)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    del like["Conv_0"]
    with pytest.raises(WeightsError, match="2 left over: Conv_0/"):
        native.read(tmp_path / "a.safetensors", like)


def test_a_file_that_says_otherwise_is_refused(tmp_path):
    """The config's network has the file's shapes and another filter: only the file knows."""
    config = load_config("digits:quick")
    parts = builders.build_parts(config)
    says = {"model": {"nf": parts.net.nf, "fir_kernel": (1, 1)}, "data": {"image_size": 8}}
    with pytest.raises(
        RunError, match=r"model.fir_kernel is \(1, 3, 3, 1\), the file says \(1, 1\)"
    ):
        weights._agree(says, config, parts)
    weights._agree({"model": {"nf": parts.net.nf}, "data": {"image_size": 8}}, config, parts)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--from is missing"),
        (["--from=score_sde"], "--path is missing"),
        (["--from=score_sde", "--path=none", "--config=digits", "--workdir={tmp}"], "is no file"),
        (
            ["--from=sd", "--path={file}", "--config=digits", "--workdir={tmp}/W"],
            "source must be one of 'score_sde', 'edm'",
        ),
        (
            ["--from=edm", "--path={file}", "--config=digits", "--workdir={tmp}/W"],
            "cannot be read",
        ),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, arguments, expected):
    file = tmp_path / "file"
    file.write_bytes(b"nothing of use")
    code = main(["diffjax", "import", *(a.format(tmp=tmp_path, file=file) for a in arguments)])
    err = capsys.readouterr().err
    assert code == 2
    assert expected in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "W").exists()


def test_help_teaches(capsys):
    assert main(["diffjax", "import", "--help"]) == 0
    out = capsys.readouterr().out
    assert "guided-diffusion" in out
    assert "--attention_order" in out
