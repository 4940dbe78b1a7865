"""A saved schedule in use: the builder, the model and `diffjax sample --schedule=`."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import builders, search
from diffjax.builders import BuildError
from diffjax.cli.main import main
from diffjax.processes import VE
from diffjax.runs import sample as runs_sample
from diffjax.runs.model import Model
from diffjax.runs.workdir import load_config
from diffjax.search import describe
from diffjax.solvers import DDIM, grids


@pytest.fixture(scope="module")
def config():
    return load_config("digits:quick")


def schedule_for(process, solver=DDIM(), /, *, n=4, asked=None, **changes):
    times = grids.log_snr(process, n)
    given = {
        "times": times,
        "process": describe(process),
        "solver": describe(solver),
        "method": {"name": "by hand"},
        "before": 1.0,
        "after": 0.5,
        "evaluations": 0,
        "asked": None if asked is None else asked * times,
    }
    return search.Schedule(**given | changes)


def test_a_schedule_takes_the_grids_place(config):
    process = builders.build_parts(config).process
    schedule = schedule_for(process, asked=0.9)
    plan = builders.build_sampling(config, process, solver="ddim", schedule=schedule)
    np.testing.assert_array_equal(plan.times, schedule.times)
    np.testing.assert_array_equal(plan.asked, schedule.asked)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"process": describe(VE())}, {"solver": "ddim"}, "searched for the process"),
        ({}, {"solver": "heun"}, "searched for the solver"),
        ({}, {"solver": "ddim", "steps": 3}, "own number of steps"),
        ({}, {"solver": "ode"}, "chooses its own steps"),
        ({"table": {"order": jnp.ones(4)}}, {"solver": "ddim"}, "which DDIM does not take"),
    ],
)
def test_what_does_not_fit_is_refused(config, change, options, message):
    process = builders.build_parts(config).process
    with pytest.raises(BuildError, match=message):
        schedule = schedule_for(process, **change)
        builders.build_sampling(config, process, schedule=schedule, **options)


@pytest.mark.slow
def test_a_model_samples_along_a_schedule(config):
    """The schedule's grid gives what that grid gives; times asked elsewhere, other images."""
    parts = builders.build_parts(config)
    params = parts.init_params(jax.random.key(0))
    # The network of a new model answers 0; any other shows where it is asked.
    params = jax.tree.map(
        lambda leaf: leaf + 0.05 * jax.random.normal(jax.random.key(1), leaf.shape), params
    )
    model = Model(config, parts, params, 0)
    own = builders.build_sampling(config, parts.process, solver="ddim", steps=4)
    plain = schedule_for(parts.process, times=own.times)
    moved = dataclasses.replace(plain, asked=own.times * 0.7)
    key = jax.random.key(0)
    images = [
        model.sample(key, 2, solver="ddim", **options)
        for options in ({"steps": 4}, {"schedule": plain}, {"schedule": moved})
    ]
    np.testing.assert_array_equal(images[0], images[1])
    assert np.any(images[0] != images[2])


def command(monkeypatch, config, *arguments):
    """The code of `diffjax sample` with these, and the options that reach the drawing."""
    reached = {}

    def draws_nothing(model, out, **options):
        reached.update(options)
        return runs_sample.Written(None, (out / "a",))

    parts = builders.build_parts(config)
    model = types.SimpleNamespace(step=1, config=config, parts=parts)
    monkeypatch.setattr("diffjax.runs.model.load", lambda workdir, **options: model)
    monkeypatch.setattr(runs_sample, "sample_to", draws_nothing)
    code = main(["diffjax", "sample", "--workdir=w", "--num=1", *arguments])
    return code, reached


def test_the_command_takes_a_file(config, monkeypatch, tmp_path, capsys):
    path = tmp_path / "schedule.json"
    process = builders.build_parts(config).process
    schedule_for(process, n=3).save(path)
    code, reached = command(monkeypatch, config, "--solver=ddim", f"--schedule={path}")
    assert code == 0
    np.testing.assert_array_equal(reached["schedule"].times, grids.log_snr(process, 3))
    path.write_text("not JSON")
    code, _ = command(monkeypatch, config, f"--schedule={path}")
    assert code != 0
    assert "--schedule" in capsys.readouterr().err
