"""Rolling back with several processes: all to one checkpoint, past the bad batch, to one end.

The planted image is in update 7, the checkpoint before is of step 6: all processes do updates 7 to
12 on batches 7 to 12 (from 0) instead of 6 to 11.
"""

import json

import jax
import numpy as np
import pytest

import diffjax as dj
from diffjax.runs.train import prepare
from diffjax.train import telemetry
from diffjax.train.checkpoint import Checkpointer
from diffjax.train.telemetry import read_jsonl
from tests.runs import group, planted
from tests.train import toy

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run of one process."""
    workdir = tmp_path_factory.mktemp("one")
    assert train(workdir) == (12, True)
    return workdir


def train(workdir):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(telemetry, "tensorboard_writer", lambda path: telemetry.MultiWriter())
        return dj.train(planted.config("rollback"), workdir, show_progress=False)


def final(workdir):
    config = planted.config("rollback")
    with Checkpointer(workdir, writable=False) as checkpointer:
        return checkpointer.restore(prepare(config, workdir).like, 12)[0]


def both(folder, at=0):
    """What two processes have done, the same in each."""
    command = ["-m", "tests.runs.rolling", f"--folder={folder}", f"--at={at}"]
    with group.running(folder / "logs", 2, *command, devices=1) as processes:
        assert processes.wait() == [0, 0], processes.everything()
        said = [processes.said(index) for index in (0, 1)]
    names = ("first ", "again ", "stopped ")
    outcomes = [[row for row in s.splitlines() if row.startswith(names)] for s in said]
    assert outcomes[0] == outcomes[1]
    for text in said:  # one rollback a run, in each process
        assert text.count("at step 7: back to step 6, on with batch 7.") == len(outcomes[0])
    return outcomes[0]


def assert_same_run(found, known):
    """The figures of every step and the last weights, up to the order of sums over devices."""
    assert json.loads((found / "diverged" / "shifts.json").read_text()) == [[6, 1]]
    rows, expected = (read_jsonl(workdir / "metrics.jsonl") for workdir in (found, known))
    assert [row["step"] for row in rows] == list(range(1, 13))
    for row, other in zip(rows, expected, strict=True):
        for name in ("loss", "grad_norm"):
            assert row[name] == pytest.approx(other[name], rel=2e-5)
    for name in ("params", "ema"):
        leaves = (jax.tree.leaves(getattr(final(d), name)) for d in (found, known))
        for leaf, other in zip(*leaves, strict=True):
            np.testing.assert_allclose(leaf, other, rtol=0, atol=2e-5)


def test_two_processes_roll_back_as_one_and_repeat_it(one, tmp_path):
    assert both(tmp_path) == ["first 12 True", "again 12 True"]
    assert_same_run(tmp_path / "first", one)
    toy.assert_bitwise(*(final(tmp_path / name) for name in ("first", "again")))


@pytest.mark.parametrize(("at", "stop"), [(8, 9), (6, 7)])
def test_a_notice_during_a_save_is_heeded(at, stop, one, tmp_path):
    """After the rollback; and before the bad update, where all were to save that very one.

    All stop behind the next update that is a good one, and one process goes on from there.
    """
    assert both(tmp_path, at) == [f"stopped {stop} False"]
    workdir = tmp_path / "stopped"
    with Checkpointer(workdir, writable=False) as checkpointer:
        assert checkpointer.latest_step() == stop
    assert train(workdir) == (12, True)
    assert_same_run(workdir, one)
