"""Several averages in one run: kept, chosen, and combined to one of another width."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from ml_collections import ConfigDict

import diffjax as dj
from diffjax import builders
from diffjax.cli.main import main
from diffjax.runs.ema import reconstruct
from diffjax.runs.weights import write
from diffjax.runs.workdir import RunError, claim, load_config, plain, read_config
from diffjax.train import ema as rules
from diffjax.train import state
from diffjax.train.checkpoint import Checkpointer

STEPS = (8, 16, 24, 32)
STDS = {"main": 0.1, "narrow": 0.05}


@pytest.fixture(scope="module")
def config():
    found = load_config("digits:quick").unlock()
    found.model = {"name": "tests.runs.test_ema:Tiny"}
    found.ema = {"name": "power", "std": 0.1, "others": {"narrow": {"name": "power", "std": 0.05}}}
    return found.lock()


class Tiny(nn.Module):
    """One convolution and one number."""

    @nn.compact
    def __call__(self, x, label, cond=None, train=False):
        factor = self.param("factor", nn.initializers.ones, (), "float32")
        return factor * nn.Conv(x.shape[-1], (5, 5), name="conv")(x)


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """A workdir of a run whose weights walk at random, and its average of width 0.07."""
    workdir = tmp_path_factory.mktemp("walk")
    claim(workdir, config)
    parts = builders.build_parts(config)
    optimizer, _ = builders.build_optimizer(config)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(parts.init_params, jax.random.key(0))
    tracked = {name: rules.PowerEMA(std) for name, std in (STDS | {"truth": 0.07}).items()}
    weights = jax.tree.map(lambda s: 0.1 * rng.normal(size=s.shape).astype(np.float32), shapes)
    start = state.create_state(jax.random.key(0), weights, optimizer, tracks=STDS)
    averages = dict.fromkeys(tracked, weights)
    with Checkpointer(workdir, keep=len(STEPS)) as checkpointer:
        for n in range(STEPS[-1]):
            weights = jax.tree.map(
                lambda w: w + 0.02 * rng.normal(size=w.shape).astype(np.float32), weights
            )
            averages = _updated(tracked, n, averages, weights)
            if n + 1 in STEPS:
                kept = {name: averages[name] for name in STDS}
                at = jnp.asarray(n + 1, jnp.int32)
                checkpointer.save(
                    n + 1,
                    state.TrainState(at, start.params, start.opt_state, kept, start.key),
                    position={},
                    config=plain(config),
                )
        checkpointer.wait()
    return workdir, averages


@jax.jit
def _updated(tracked, n, averages, weights):
    return rules.averages(tracked, n, averages, weights)


def distance(a, b):
    """Root mean square difference of two trees."""
    gaps = [
        np.ravel(np.asarray(x) - np.asarray(y))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ]
    return float(np.sqrt(np.mean(np.concatenate(gaps) ** 2)))


def test_stored_averages_are_chosen_by_name(run):
    workdir, averages = run
    for name in STDS:
        assert distance(dj.load(workdir, ema=name).params, averages[name]) == 0
    assert distance(dj.load(workdir).params, averages["main"]) == 0
    with pytest.raises(ValueError, match="wide"):
        dj.load(workdir, ema="wide")


def test_any_average_is_measured(run, config, tmp_path, digits_dir):
    workdir, averages = run
    write(config, tmp_path, averages["narrow"], STEPS[-1])  # the other one, as the only one
    [alone] = dj.evaluate(tmp_path, ["loss"]).values()
    arguments = ["diffjax", "evaluate", f"--workdir={workdir}", "--metrics=loss"]
    found = {}
    for name, flags in (("narrow", ["--ema=narrow"]), ("main", [])):
        assert main([*arguments, *flags]) == 0
        found[name] = json.loads((workdir / "eval" / "loss.json").read_text())
        assert found[name]["ema"] == name
    assert found["narrow"]["mean"] == alone["mean"] != found["main"]["mean"]
    assert main([*arguments, "--ema=wide"]) == 2


def test_another_width_is_written_as_a_workdir(run, capsys):
    workdir, averages = run
    assert main(["diffjax", "ema", f"--workdir={workdir}", "--std=0.07"]) == 0
    out = workdir / "ema" / "0.07-32"
    assert f"into {out}, from 8 averages" in capsys.readouterr().out
    model = dj.load(out)
    assert model.step == 32 and plain(read_config(out))["ema"] == {"name": "power", "std": 0.07}
    truth = averages["truth"]
    error = distance(model.params, truth)
    # Nearer than any stored one by far; 32 updates of four checkpoints.
    assert error < 0.15 * min(distance(averages[name], truth) for name in STDS)
    assert jax.tree.leaves(model.params)[0].dtype == np.float32
    with pytest.raises(RunError, match="give another --out"):
        reconstruct(workdir, 0.07)
    # Of an earlier step, with no look ahead.
    early = reconstruct(workdir, 0.1, step=16, out=workdir / "early")
    assert early.step == 16 and early.averages == 4 and early.error < 1e-6
    assert distance(dj.load(early.workdir).params, dj.load(workdir, step=16).params) < 1e-6


def test_what_cannot_be_made_is_refused(run, tmp_path, capsys):
    workdir, _ = run
    claim(tmp_path, load_config("digits:quick"))
    with pytest.raises(RunError, match="tracked no power-function average"):
        reconstruct(tmp_path, 0.1)
    with pytest.raises(RunError, match=r"\(0, 0.2887\].*got 0.3"):
        reconstruct(workdir, 0.3)
    with pytest.raises(RunError, match="of its profile would be wrong"):
        reconstruct(workdir, 0.01)
    with pytest.raises(ValueError, match="9"):
        reconstruct(workdir, 0.07, step=9)
    assert main(["diffjax", "ema", "--std=0.1"]) == 2
    assert "--workdir is missing" in capsys.readouterr().err
    assert not (workdir / "ema" / "0.3-32").exists()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"ema.offload": True}, {"training.accumulate": 2}])
def test_a_run_tracks_what_its_config_says(
    config, changes, tmp_path, digits_dir, compilation_cache
):
    config = ConfigDict(config.to_dict())
    config.training.batch_size = 16
    config.ema.offload = False
    config.update_from_flattened_dict(changes)
    assert dj.train(config, tmp_path, show_progress=False) == (10, True)
    assert dj.train(config, tmp_path, show_progress=False) == (10, True)  # restored
    narrow, main_track = (dj.load(tmp_path, ema=name).params for name in ("narrow", "main"))
    assert distance(narrow, main_track) > 0
    done = reconstruct(tmp_path, 0.07)
    assert done.averages == 4
    between = dj.load(done.workdir).params
    assert distance(between, narrow) < distance(main_track, narrow)
    assert dj.load(done.workdir).sample(jax.random.key(0), 2).shape == (2, 8, 8, 1)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"main": {"name": "power"}}, "config.ema itself describes 'main'"),
        ({"a/b": {"name": "power"}}, "is no name of a track"),
        ({"wide": {"name": "power", "std": 0.5}}, r"config.ema.others.wide \(power\).*0.5"),
        ({"wide": {"name": "powr"}}, "Did you mean 'power'"),
    ],
)
def test_bad_sections_raise(others, message):
    found = load_config("digits:quick").unlock()
    found.ema = {"name": "power", "std": 0.1, "others": others}
    with pytest.raises(builders.BuildError, match=message):
        builders.build_ema(found)
