"""Killed at each moment of a save: there always is a whole checkpoint, and the run ends the same.

One checkpoint is kept, so there is nothing to fall back to but the one before, until it goes.
"""

import signal
import subprocess
import sys

import pytest

from diffjax.train import mesh, state
from diffjax.train.checkpoint import Checkpointer
from tests.faults.phases import BEFORE, EVERY, PHASES, STEPS, STRUCK, train
from tests.train import toy

pytestmark = pytest.mark.slow


def run(workdir, phase):
    command = [sys.executable, "-m", "tests.faults.phases", str(workdir), phase]
    return subprocess.run(command, timeout=300, capture_output=True, text=True)


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """The states of uninterrupted runs to each of these steps."""
    folder = tmp_path_factory.mktemp("whole")
    return {step: train(folder / f"{step}", step) for step in (BEFORE, STRUCK, STEPS)}


def found(workdir):
    """The newest whole checkpoint."""
    like = state.abstract(toy.new_state(mesh.make_mesh(data=1)))
    with Checkpointer(workdir, writable=False) as reader:
        return reader.restore(like)


def steps_in(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal())


@pytest.mark.parametrize("phase", PHASES)
def test_killed_in_each_phase_of_a_save(phase, known, tmp_path):
    done = run(tmp_path, phase)
    assert done.returncode == -signal.SIGKILL, done.stderr
    named = phase.endswith("goes")
    left = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert f"{BEFORE}" in left  # whole, or what is left of it
    assert (f"{STRUCK}" in left) == named and (f"{STRUCK}.orbax-checkpoint-tmp" in left) != named
    restored, meta = found(tmp_path)
    assert meta.step == (STRUCK if named else BEFORE)
    toy.assert_bitwise(restored, known[meta.step])
    toy.assert_bitwise(train(tmp_path), known[STEPS])
    # Remains go with the next save.
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [f"{STEPS}"]


def test_killed_at_any_call_there_is_a_whole_checkpoint(known, tmp_path):
    done = run(tmp_path, "all")
    assert done.returncode == 0, done.stderr
    moments = sorted((tmp_path / "moments").iterdir(), key=lambda path: int(path.name))
    assert len(moments) > 50
    newest = []
    for moment in moments:
        restored, meta = found(moment)
        toy.assert_bitwise(restored, known[meta.step])
        newest.append(meta.step)
    # The one before until the new one has its name, and from then on the new one.
    assert newest == sorted(newest) and set(newest) == {BEFORE, STRUCK}
    assert min(newest.count(step) for step in (BEFORE, STRUCK)) > 20
    # Also the run itself goes on from there, over all remains.
    for moment in moments[:: len(moments) // 3]:
        toy.assert_bitwise(train(moment), known[STEPS])
        assert steps_in(moment) == [STRUCK + EVERY]
