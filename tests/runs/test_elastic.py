"""Sampling and evaluation that are stopped and go on with another number of processes."""

import time

import numpy as np
import pytest

import diffjax as dj
from diffjax.runs import hosts
from diffjax.runs.evaluation import Evaluation, SampleBatches
from tests.runs import group
from tests.runs.test_hosts import Processes, assert_same, gathered
from tests.runs.test_sample import contents


class Stopped(Exception):
    """The process ends here."""


def stopping(processes, index, rows):
    """Called with the images done: ends process `index` at so many, and with it all."""

    def progress(done):
        if hosts.index() == index and done >= rows:
            processes.barrier.abort()
            raise Stopped

    return progress


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2), (2, 1), (1, 2)])
def test_sums_go_on_with_another_number(before, after, monkeypatch, tmp_path):
    """The state of one number of processes is not taken for that of another."""
    alone, options = gathered(), {"folder": tmp_path, "every": 1}
    with monkeypatch.context() as patch:
        processes = Processes(before, patch)
        progress = stopping(processes, before - 1, 8)
        stopped = processes.run(lambda: gathered(progress=progress, **options))
        assert all(isinstance(result, Exception) for result in stopped)
    for result in Processes(after, monkeypatch).run(lambda: gathered(**options)):
        assert_same(result, alone)


@pytest.mark.slow
def test_drawn_by_two_killed_and_gone_on_by_one_and_three(trained, tmp_path):
    """Real processes, killed all at once: the files are those of one that was left alone."""

    def command(name):
        out = ["-m", "diffjax", "sample", f"--workdir={trained}", f"--out={tmp_path / name}"]
        return [*out, "--num=192", "--batch_size=8", "--shard_size=8", "--steps=8"]

    group.finish(tmp_path / "log", 1, *command("whole"), devices=1)
    folder = tmp_path / "killed" / "samples" / "done"

    def done():
        return len(list(folder.glob("0*")))

    for count in (2, 1):
        logs, goal = tmp_path / f"log{count}", done() + 3
        with group.running(logs, count, *command("killed"), devices=1) as some:
            while done() < goal:
                assert all(p.poll() is None for p in some.processes), some.everything()
                time.sleep(0.002)
            some.kill_all()
        assert done() < 24
    group.finish(tmp_path / "log3", 3, *command("killed"), devices=1)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_an_evaluation_judges_the_same_images(trained, monkeypatch, tmp_path):
    """Two processes draw what is judged, one of them is stopped, three go on."""
    model = dj.load(trained)
    options = {"num": 21, "solver": "euler", "steps": 2}
    alone = Evaluation(model, **options).samples()
    with monkeypatch.context() as patch:
        processes = Processes(2, patch)
        stop = {"folder": tmp_path, "progress": stopping(processes, 1, 8)}
        stopped = processes.run(lambda: Evaluation(model, **options, **stop).samples())
        assert all(isinstance(result, Exception) for result in stopped)
    known = {int(path.stem) for path in tmp_path.glob("partial/images/done/*.json")}
    assert known  # the first of these batches at least
    drawn, draw = [], SampleBatches.__getitem__

    def watched(batches, index):
        drawn.append(index)
        return draw(batches, index)

    monkeypatch.setattr(SampleBatches, "__getitem__", watched)
    three = Processes(3, monkeypatch)
    for images in three.run(lambda: Evaluation(model, folder=tmp_path, **options).samples()):
        np.testing.assert_array_equal(images, alone)
    assert sorted(drawn) == sorted(set(range(3)) - known)
