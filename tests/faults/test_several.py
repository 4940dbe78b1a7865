"""A run survives faults while the number of its processes changes, and ends with the same numbers.

DIFFJAX_FAULTS_SEVERAL sets how many faults, DIFFJAX_FAULTS_SEED what happens when.
"""

import os
import random
from pathlib import Path

import jax
import numpy as np
import pytest

import diffjax as dj
from diffjax.train.telemetry import read_jsonl
from tests.faults import several
from tests.faults.driver import Victim, strike
from tests.runs import group

pytestmark = pytest.mark.slow

NUMBER = int(os.environ.get("DIFFJAX_FAULTS_SEVERAL", "9"))
EVERY, STEPS = 40, 160 * NUMBER
COMMAND = [
    *["-m", "diffjax", "train", "--noprogress"],
    f"--config={Path(__file__).parents[1] / 'runs' / 'tiny_config.py'}",
    f"--config.training.n_iters={STEPS}",
    "--config.training.log_freq=10",
    f"--config.training.eval_freq={STEPS}",
    "--config.training.snapshot_sampling=False",
    f"--config.training.snapshot_freq_for_preemption={EVERY}",
    f"--config.training.snapshot_freq={STEPS}",
    # Small steps: the rounding of sums over devices must not grow to other weights.
    "--config.optim.lr=1e-4",
]


def losses(workdir):
    return {row["step"]: row["loss"] for row in read_jsonl(workdir / "metrics.jsonl")}


def test_faults_and_other_numbers_of_processes_lose_nothing(
    tmp_path, digits_dir, compilation_cache, capsys
):
    seed = int(os.environ.get("DIFFJAX_FAULTS_SEED", random.randrange(10**6)))
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    group.finish(tmp_path / "logs" / "whole", 1, *COMMAND, f"--workdir={whole}", devices=2)
    command = [*COMMAND, f"--workdir={workdir}"]
    start = several.starter(tmp_path / "logs", *command)
    with capsys.disabled():
        print(f"\n{NUMBER} faults of several processes, seed {seed}")
        victim = Victim(start, workdir, random.Random(seed), EVERY, False)
        tally = strike(victim, NUMBER, several.FAULTS)
        group.finish(tmp_path / "logs" / "last", 2, *command)
        found, known = losses(workdir), losses(whole)
        assert list(found) == list(known) == list(range(10, STEPS + 1, 10))
        worst = max(abs(found[step] / known[step] - 1) for step in known)
        print(f"nothing lost, losses within {worst:.1e}; {dict(tally)}")
    assert worst < 1e-4
    here, there = (jax.tree.leaves(dj.load(d).params) for d in (workdir, whole))
    for leaf, other in zip(here, there, strict=True):
        np.testing.assert_allclose(leaf, other, rtol=0, atol=1e-4)
    assert tally.total() == NUMBER
