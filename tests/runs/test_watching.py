"""What a run tells while it trains: every figure is there, and is what NumPy makes of the run."""

import jax
import numpy as np
import pytest

import diffjax as dj
from diffjax import builders
from diffjax.runs import speed
from diffjax.runs.chips import CHIPS
from diffjax.runs.replay import replay
from diffjax.runs.train import prepare
from diffjax.runs.workdir import load_config
from diffjax.train import mesh, telemetry
from diffjax.train.checkpoint import Checkpointer
from diffjax.train.probes import LOG_SNR_EDGES
from diffjax.train.telemetry import JsonlWriter, read_jsonl
from tests.runs import planted

STEPS = 4


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run's config, workdir and terminal, on what it takes for an H200."""
    import contextlib
    import io

    workdir = tmp_path_factory.mktemp("watched")
    config = planted.config("stop", n_iters=STEPS, snapshot_freq_for_preemption=1)
    config.training.eval_freq = STEPS
    config.ema.others = {"slow": {"name": "constant", "rate": 0.99}}
    terminal = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(terminal):
        # TensorFlow is left out; a file takes what its writer is given.
        patch.setattr(
            telemetry, "tensorboard_writer", lambda path: JsonlWriter(path / "events.jsonl")
        )
        patch.setattr("diffjax.runs.pictures.write_figure", lambda *arguments: None)
        patch.setattr(speed, "chip_of", lambda kind: CHIPS["h200"])
        dj.train(config, workdir)
    return config, workdir, terminal.getvalue()


def test_every_figure_is_in_the_files_and_on_the_terminal(watched):
    _, workdir, terminal = watched
    rows = read_jsonl(workdir / "metrics.jsonl")
    assert rows == read_jsonl(workdir / "tensorboard" / "events.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    names = {
        "loss", "grad_norm", "grad_norm/Dense_0", "grad_norm/Dense_1", "update_ratio",
        "ema_gap/main", "ema_gap/slow", "output_rms", "lr", "images_per_second",
        "images_per_second_per_chip", "mfu", "data_wait", "eval_loss",
    }  # fmt: skip
    assert names <= rows[-1].keys()
    assert any(name.endswith("memory_peak_gib") for name in rows[-1])
    for part in (f"step {STEPS}/{STEPS}", "loss", "images/s", "left"):
        assert part in terminal.splitlines()[-1]


def test_weights_updates_and_averages_are_those_of_the_checkpoints(watched):
    config, workdir, _ = watched
    rows = {row["step"]: row for row in read_jsonl(workdir / "metrics.jsonl")}
    like = prepare(config, workdir).like

    def flat(tree):
        return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])

    with Checkpointer(workdir, writable=False) as checkpointer:
        states = [checkpointer.restore(like, step)[0] for step in (STEPS - 1, STEPS)]
    before, after = (flat(s.params) for s in states)
    row, size = rows[STEPS], np.linalg.norm(after)
    np.testing.assert_allclose(row["update_ratio"], np.linalg.norm(after - before) / size, 1e-4)
    for name, tree in states[1].ema.items():
        gap = np.linalg.norm(flat(tree) - after) / size
        np.testing.assert_allclose(row[f"ema_gap/{name}"], gap, rtol=1e-4)
    groups = [value for name, value in row.items() if name.startswith("grad_norm/")]
    np.testing.assert_allclose(np.linalg.norm(groups), row["grad_norm"], rtol=1e-6)


def test_figures_by_noise_are_those_of_the_images(watched):
    _, workdir, _ = watched
    row = read_jsonl(workdir / "metrics.jsonl")[1]
    images = replay(workdir, 2).images
    edges = (-np.inf, *LOG_SNR_EDGES, np.inf)
    for name, column in (("loss", "loss"), ("output_rms", "output_rms")):
        expected = {}
        for low, high in zip(edges[:-1], edges[1:], strict=True):
            some = [i[column] for i in images if low <= i["log_snr"] < high]
            if some:
                expected[f"{name}_by_log_snr/{low:g}..{high:g}"] = np.mean(some)
        found = {n: v for n, v in row.items() if n.startswith(f"{name}_by_log_snr/")}
        assert found.keys() == expected.keys() and len(found) > 2
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, rtol=1e-5)


def test_mfu_is_the_share_of_the_peak_that_the_products_need(watched):
    config, workdir, _ = watched
    row = read_jsonl(workdir / "metrics.jsonl")[-1]
    # Two dense layers, of 16 and 8 features in and out. Forward, and back to weights and, in the
    # second, to the features: five products of as many numbers, each once times and once plus.
    flops = 5 * 2 * 16 * 8 * planted.BATCH
    seconds = planted.BATCH / row["images_per_second"]
    assert row["mfu"] == pytest.approx(flops / (seconds * CHIPS["h200"].bfloat16), rel=1e-6)
    assert row["images_per_second_per_chip"] == row["images_per_second"]


def test_what_is_computed_again_is_no_use_of_the_chip(monkeypatch):
    monkeypatch.setattr(speed, "chip_of", lambda kind: CHIPS["h200"])
    one, flops = mesh.make_mesh(jax.devices()[:1]), []
    for remat in (False, True):
        config = load_config("tests/runs/tiny_config.py").copy_and_resolve_references().unlock()
        config.model.remat = remat
        flops.append(speed.machine(config, builders.build_parts(config), one).flops)
    assert flops[0] == flops[1] > 0
