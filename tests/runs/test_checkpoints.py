"""All checkpoints of a run, and the best of them."""

import json

import jax.numpy as jnp
import pytest

from diffjax.cli.main import main
from diffjax.runs import checkpoints
from diffjax.runs.workdir import RunError, claim, load_config
from diffjax.train import mesh, state
from diffjax.train.checkpoint import Checkpointer
from tests.train import toy


def a_run(workdir, losses):
    """Checkpoints at steps with these held-out losses; None where it was not measured."""
    config = load_config("digits:quick")
    claim(workdir, config)
    s = toy.new_state(mesh.make_mesh())
    with Checkpointer(workdir, keep=len(losses)) as checkpointer:
        for step, loss in losses.items():
            figures = {} if loss is None else {"eval_loss": loss}
            s = state.TrainState(jnp.int32(step), s.params, s.opt_state, s.ema, s.key)
            checkpointer.save(step, s, position={}, config={}, figures=figures)
    return workdir


def test_all_and_the_best(tmp_path):
    workdir = a_run(tmp_path / "run", {5: 0.3, 10: 0.2, 12: None, 15: 0.2, 20: 0.4})
    assert checkpoints.chosen(workdir, "all") == [5, 10, 12, 15, 20]
    assert checkpoints.chosen(workdir, "best") == [15]
    with pytest.raises(RunError, match="must be all or best; got 'some'"):
        checkpoints.chosen(workdir, "some")
    with pytest.raises(RunError, match=r"has the figure eval_loss; it holds steps \[3\]"):
        checkpoints.chosen(a_run(tmp_path / "unmeasured", {3: None}), "best")


def test_each_is_measured_and_all_figures_are_kept(tmp_path, monkeypatch, capsys):
    asked = []

    def evaluate(workdir, metrics, *, step, seed, **options):
        asked.append((step, seed))
        return {name: {"mean": step / 4, "standard_error": 0.0, "images": 8} for name in metrics}

    monkeypatch.setattr(checkpoints, "evaluate", evaluate)
    workdir = a_run(tmp_path, {5: 0.3, 10: 0.2})
    flags = [f"--workdir={workdir}", "--metrics=loss", "--seed=3"]
    assert main(["diffjax", "evaluate", *flags, "--checkpoints=all"]) == 0
    assert asked == [(5, 3), (10, 3)]
    stored = json.loads((workdir / "eval" / "checkpoints.json").read_text())
    assert {step: found["loss"]["mean"] for step, found in stored.items()} == {"5": 1.25, "10": 2.5}
    out = capsys.readouterr().out
    assert out.index("checkpoint 5") < out.index("1.2500") < out.index("checkpoint 10")
    assert main(["diffjax", "evaluate", *flags, "--checkpoints=all", "--step=5"]) == 2
    assert "exclude each other" in capsys.readouterr().err
