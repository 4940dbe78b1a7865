"""A run of training survives 25 faults in a row and ends where the uninterrupted one does.

DIFFJAX_FAULTS sets their number, DIFFJAX_FAULTS_SEED what happens when; both are printed.
"""

import contextlib
import os
import random
from pathlib import Path

import pytest

from tests import disk
from tests.cli.test_killed import equal_runs, finish, started
from tests.faults.driver import Victim, strike

pytestmark = pytest.mark.slow

NUMBER = int(os.environ.get("DIFFJAX_FAULTS", "25"))
EVERY, STEPS = 20, 3000
FLAGS = [
    f"--config={Path(__file__).parents[1] / 'runs' / 'tiny_config.py'}",
    "--noprogress",
    f"--config.training.n_iters={STEPS}",
    "--config.training.n_jitted_steps=5",
    "--config.training.log_freq=10",
    "--config.training.eval_freq=500",
    "--config.training.snapshot_sampling=False",
    f"--config.training.snapshot_freq_for_preemption={EVERY}",
    "--config.training.snapshot_freq=100000",
    "--config.training.keep.newest=3",
]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, digits_dir, compilation_cache):
    workdir = tmp_path_factory.mktemp("whole")
    finish(workdir, FLAGS)
    return workdir


def test_faults_in_a_row_lose_nothing(uninterrupted, tmp_path, capsys):
    seed = int(os.environ.get("DIFFJAX_FAULTS_SEED", random.randrange(10**6)))
    with contextlib.ExitStack() as stack:
        stack.enter_context(capsys.disabled())
        workdir = tmp_path / "disk"
        try:
            stack.enter_context(disk.mounted(workdir, 32 * 2**20))
            small = True
        except PermissionError:
            small = False
        print(f"\n{NUMBER} faults, seed {seed}, a disk of its own: {'yes' if small else 'no'}")

        def start(**options):
            return started(workdir, FLAGS, **options)

        victim = Victim(start, workdir, random.Random(seed), EVERY, small)
        tally = strike(victim, NUMBER)
        finish(workdir, FLAGS)
        equal_runs(uninterrupted, workdir, STEPS)
        print("nothing lost; " + ", ".join(f"{n} {done}" for done, n in sorted(tally.items())))
        assert tally.total() == NUMBER
