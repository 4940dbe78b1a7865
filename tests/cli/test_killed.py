"""`diffjax train` as a process of its own: killed, terminated, and started again."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import diffjax as dj
from diffjax.train.telemetry import read_jsonl

pytestmark = pytest.mark.slow

STEPS = 2000
FLAGS = [
    f"--config={Path(__file__).parents[1] / 'runs' / 'tiny_config.py'}",
    "--noprogress",
    f"--config.training.n_iters={STEPS}",
    "--config.training.snapshot_freq_for_preemption=50",
    "--config.training.snapshot_freq=1000",
    "--config.training.eval_freq=500",
    "--config.training.log_freq=10",
    "--config.training.n_jitted_steps=5",
]


@contextlib.contextmanager
def started(workdir, flags=FLAGS, **options):
    """A run in a process of its own, which is over, with its pipe closed, when this is left.

    options: further ones of Popen.
    """
    environment = os.environ | {"XLA_FLAGS": ""}
    command = [sys.executable, "-m", "diffjax", "train", f"--workdir={workdir}", *flags]
    options |= {"stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def finish(workdir, flags=FLAGS):
    """Runs to the end."""
    with started(workdir, flags) as process:
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors


def wait_for_step(workdir, step, process):
    """Returns once the metrics show `step`."""
    for _ in range(3000):
        rows = read_jsonl(workdir / "metrics.jsonl") if workdir.exists() else []
        if rows and rows[-1]["step"] >= step:
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    raise AssertionError(f"step {step} did not come")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, digits_dir, compilation_cache):
    workdir = tmp_path_factory.mktemp("whole")
    finish(workdir)
    return workdir


def equal_runs(a, b, steps=STEPS):
    """The same weights to the last bit, and the same loss at every step."""
    jax.tree.map(np.testing.assert_array_equal, dj.load(a).params, dj.load(b).params)
    assert dj.load(a).step == steps
    losses = [[(r["step"], r["loss"]) for r in read_jsonl(d / "metrics.jsonl")] for d in (a, b)]
    assert losses[0] == losses[1]


def test_killed_at_random_steps_ends_at_the_same_weights(uninterrupted, tmp_path):
    rng = np.random.default_rng()
    for low, high in ((50, 600), (600, 1200), (1200, 1800)):
        with started(tmp_path) as process:
            wait_for_step(tmp_path, int(rng.integers(low, high)), process)
            time.sleep(rng.uniform(0, 0.5))
            process.send_signal(signal.SIGKILL)
            process.wait()
    finish(tmp_path)
    equal_runs(uninterrupted, tmp_path)


def test_terminated_saves_before_leaving(uninterrupted, tmp_path):
    with started(tmp_path) as process:
        wait_for_step(tmp_path, 310, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=300) == 3
    stopped = dj.load(tmp_path).step
    # Nothing that was logged is lost.
    assert stopped >= read_jsonl(tmp_path / "metrics.jsonl")[-1]["step"] >= 310
    finish(tmp_path)
    equal_runs(uninterrupted, tmp_path)
