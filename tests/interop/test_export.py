"""Exported samplers: the same samples elsewhere, for any batch, in a file of bounded size."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import diffjax as dj
from diffjax import builders
from diffjax.cli.main import main
from diffjax.interop import export as interop_export
from diffjax.interop.export import export_sampler, write_sampler
from diffjax.processes import VP, prior
from diffjax.runs.export import export_to
from diffjax.runs.sample import seed_keys
from diffjax.runs.workdir import RunError, load_config
from diffjax.solvers import Ancestral, Tweedie, grids, sample
from tests.oracles import Gaussian

PROCESS = VP()
LABEL = jax.ShapeDtypeStruct((), jnp.int32)


def draw(weights, keys, labels):
    """Samples of a Gaussian whose mean depends on the label."""
    x = prior(keys, PROCESS, (keys.shape[0], weights["std"].shape[0]))
    denoise = Gaussian(jnp.zeros_like(weights["std"]), weights["std"]).denoiser(PROCESS)
    times = grids.uniform(PROCESS, 5, end=0.0)
    x = sample(keys, denoise, x, times, solver=Ancestral(), process=PROCESS).x
    return x + weights["means"][labels]


def weights_of(dim, dtype=jnp.float32):
    return {
        "means": jnp.arange(2.0 * dim, dtype=dtype).reshape(2, dim),
        "std": jnp.full((dim,), 0.5, dtype),
    }


def read(path):
    """What the recipe does, in this process."""
    with np.load(path) as saved:
        program = export.deserialize(bytearray(saved["program"].tobytes()))
        weights = [saved[f"weight_{i}"] for i in range(len(saved.files) - 1)]
    return program, weights


def test_the_program_draws_what_we_draw(tmp_path):
    """Samples by seed and label, for two batch sizes of one program; half precision is kept."""
    weights = weights_of(3, jnp.bfloat16)
    exported = export_sampler(draw, weights, LABEL)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    write_sampler(tmp_path / "s.npz", exported, weights)
    program, stored = read(tmp_path / "s.npz")
    assert all(leaf.dtype == np.float32 for leaf in stored)
    seeds, labels = np.asarray([7, 3, 3, 11], np.uint32), np.asarray([0, 1, 0, 1], np.int32)
    expected = draw(weights, seed_keys(seeds), labels)
    found = jax.jit(program.call)(stored, seeds, labels)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    fewer = jax.jit(program.call)(stored, seeds[:2], labels[:2])
    np.testing.assert_allclose(fewer, expected[:2], rtol=1e-5, atol=1e-5)
    shift = weights_of(3)["means"][1] - weights_of(3)["means"][0]
    np.testing.assert_allclose(found[1] - found[2], shift, rtol=1e-5)  # one seed, two labels


def test_the_program_does_not_hold_the_weights(tmp_path):
    """A million times the weights: the same program up to the digits of its shapes."""
    sizes = {}
    for dim in (4, 4_000_000):
        weights = jax.eval_shape(lambda dim=dim: weights_of(dim))
        sizes[dim] = len(export_sampler(draw, weights, LABEL, platforms=("cpu",)).serialize())
    assert abs(sizes[4] - sizes[4_000_000]) < 1024
    assert sizes[4] < 2**16


BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("diffjax", "flax"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
"""
KEPT = """
np.save("images.npy", images)
one = draw(jax.device_put(weights), np.arange(5, 6, dtype=np.uint32))
np.save("one.npy", one)
assert not {"diffjax", "flax"} & {name.split(".")[0] for name in sys.modules}
"""


def recipe():
    """The lines that the module's page gives for drawing."""
    lines = re.search(
        r"(?ms)^    import jax, numpy.*?images = .*?$", interop_export.__doc__
    ).group()
    return "\n".join(line.removeprefix("    ") for line in lines.splitlines())


def test_a_process_without_our_code_draws_it(trained, tmp_path, capsys):
    """`diffjax export`, then the documented recipe where diffjax and flax cannot be imported."""
    out = tmp_path / "sampler.npz"
    flags = [f"--workdir={trained}", f"--out={out}", "--solver=ancestral", "--steps=3"]
    assert main(["diffjax", "export", *flags]) == 0
    assert "the sampler of step 10 for cpu, cuda, tpu" in capsys.readouterr().out
    code = BLOCKED + recipe() + KEPT
    assert "diffjax" not in recipe()
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    images, one = (np.load(tmp_path / name).astype(int) for name in ("images.npy", "one.npy"))
    model = dj.load(trained)
    ours = model.sample(seed_keys(np.arange(16)), 16, solver="ancestral", steps=3).astype(int)
    assert images.shape == ours.shape == (16, 8, 8, 1)
    # Rounding may move a pixel that lies on a level's edge.
    assert np.abs(images - ours).max() <= 1 and (images != ours).mean() < 0.01
    assert np.abs(images[5:6] - one).max() <= 1 and (images[5:6] != one).mean() < 0.05
    assert len(np.unique(images)) > 3
    with np.load(out) as saved:
        assert saved["program"].size < 2**20


@pytest.mark.slow
def test_a_large_network_stays_below_the_limit():
    """62 million weights, lowered for three platforms: less than 2 MiB of program."""
    config = load_config("vp/cifar10_ddpmpp_continuous")
    parts = builders.build_parts(config)
    weights = jax.eval_shape(parts.init_params, jax.random.key(0))
    times = grids.uniform(parts.process, 10, end=1e-3)

    def draw(weights, keys):
        x = prior(keys, parts.process, (keys.shape[0], *parts.image_shape))
        final = Tweedie()
        denoise = parts.denoiser(weights)
        return sample(
            keys, denoise, x, times, solver=Ancestral(), process=parts.process, final=final
        ).x

    assert len(export_sampler(draw, weights).serialize()) < 2**21


def test_refusals(trained, tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="platforms must be one of 'cpu', 'cuda', 'rocm', 'tpu'"):
        export_sampler(draw, weights_of(2), LABEL, platforms=("gpu",))
    with pytest.raises(RunError, match="gave a sample up; choose a solver of a grid"):
        export_to(dj.load(trained), tmp_path / "s.npz", solver="ode")
    exported = export_sampler(draw, weights_of(2), LABEL, platforms=("cpu",))
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'diffjax\[export\]'"):
        write_sampler(tmp_path / "s.npz", exported, weights_of(2))
    assert not (tmp_path / "s.npz").exists()
    assert main(["diffjax", "export", f"--workdir={trained}"]) == 2
    assert "--out is missing" in capsys.readouterr().err
