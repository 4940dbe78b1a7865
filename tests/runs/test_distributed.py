"""Several processes train, sample and stop as one; and what becomes of them when one is lost.

The real processes here have two simulated devices each and talk by gloo on this machine.
"""

import json
import re
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

import diffjax as dj
from diffjax.cli import flags
from diffjax.runs import distributed
from diffjax.runs.distributed import ADDRESS, INDEX, NUMBER, Place, place
from diffjax.runs.workdir import RunError
from diffjax.train.telemetry import read_jsonl
from tests.runs import group

CONFIG = str(Path(__file__).with_name("tiny_config.py"))

# Where a process belongs.


def test_a_place_comes_from_arguments_or_the_environment():
    variables = {ADDRESS: "a:1", NUMBER: "4", INDEX: "3"}
    assert place(environment={}) is None
    assert place(environment=variables) == Place("a:1", 4, 3)
    assert place("b:2", None, 0, variables) == Place("b:2", 4, 0)
    assert place("[::1]:80", 2, 1, {}) == Place("[::1]:80", 2, 1)


@pytest.mark.parametrize("given", [(None, 1, None), ("a:1", 1, 0)])
def test_one_process_needs_no_meeting(given):
    assert place(*given, {}) is None
    distributed.join(None)
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("a:1", 2, None), "missing: --process_id"),
        ((None, None, 1), "--coordinator .* and --num_processes"),
        (("a", 2, 0), "must be host:port"),
        ((":1", 2, 0), "must be host:port"),
        (("a:1", 2, 2), "below --num_processes=2; got 2"),
        (("a:1", 0, 0), "from 1 on; got 0"),
        (("a:1", 2, -1), "from 0 on; got -1"),
    ],
)
def test_a_place_that_does_not_fit_is_refused(given, said):
    with pytest.raises(RunError, match=said):
        place(*given, {})


def test_words_for_numbers_are_refused():
    with pytest.raises(RunError, match="JAX_NUM_PROCESSES.*'two'"):
        place(environment={ADDRESS: "a:1", NUMBER: "two", INDEX: "0"})


def test_a_place_and_a_cluster_at_once_are_refused():
    with pytest.raises(RunError, match="leave it out"):
        distributed.join(Place("a:1", 2, 0), detect=True)


# Stopping at one step.


class Service:
    """JAX's preemption service as its documentation has it, for several in one process.

    A notice fixes the greatest number that any process has asked for, plus one; that number alone
    is answered with yes.
    """

    def __init__(self, count):
        self.asked, self.point = [0] * count, None

    def notice(self):
        self.point = max(self.asked) + 1

    def reached(self, process, step):
        self.asked[process] = step
        return step == self.point


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("start", [0, 20])
@pytest.mark.parametrize(("before", "when"), [(0, 0), (3, 3), (1, 4), (4, 1)])
def test_all_stop_after_the_same_dispatch(k, start, before, when, monkeypatch):
    """Also where the notice came before the first dispatch of a run that goes on."""
    service = Service(2)
    monkeypatch.setattr(
        multihost_utils, "reached_preemption_sync_point", lambda step: service.reached(now, step)
    )
    asks = [distributed._agreed(start, k) for _ in range(2)]
    done = []
    for now, dispatches in enumerate((before, when)):
        assert not any(next(asks[now]) for _ in range(dispatches))
        done.append(dispatches)
    service.notice()
    stopped = []
    for now in (0, 1):
        for more in range(1, 20):
            if next(asks[now]):
                stopped.append(done[now] + more)
                break
    # The dispatch after the furthest one, and the first where nothing was begun.
    assert stopped == [max(before, when) + 1] * 2


@pytest.mark.parametrize("ahead", [0, 1])
def test_the_yes_stays_where_the_run_goes_back(ahead, monkeypatch):
    """The update that all were to save was a bad one, and another attempt begins."""
    service = Service(2)
    monkeypatch.setattr(
        multihost_utils, "reached_preemption_sync_point", lambda step: service.reached(now, step)
    )
    asks = [distributed._agreed(0, 1) for _ in range(2)]
    for now, dispatches in enumerate((5, 5 + ahead)):
        assert not any(next(asks[now]) for _ in range(dispatches))
    service.notice()
    for now, left in enumerate((1 + ahead, 1)):
        answers = [next(asks[now]) for _ in range(left + 2)]
        assert answers == [False] * (left - 1) + [True] * 3


def test_a_loss_is_known_by_its_cause(monkeypatch):
    """Waiting for a save whose time is up is the loss that made it so; alone there is none."""
    late = TimeoutError("Timed out while waiting for async_write_complete barrier.")
    late.__cause__ = jax.errors.JaxRuntimeError("UNAVAILABLE: a task has stopped its heartbeats")
    assert not distributed.is_loss(late)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert distributed.is_loss(late) and distributed.is_loss(late.__cause__)
    assert not distributed.is_loss(TimeoutError("UNAVAILABLE"))
    ring = OSError("no space")
    ring.__cause__ = ValueError()
    ring.__cause__.__cause__ = ring  # as where it is raised again
    assert not distributed.is_loss(ring)
    assert not distributed.is_loss(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: memory"))


def test_two_processes_meet_compare_and_stop(tmp_path):
    with group.running(tmp_path, 2, "-m", "tests.runs.meeting", devices=1) as both:
        assert both.wait() == [0, 0], both.everything()
        said = [both.said(index) for index in (0, 1)]
    stops = [re.search(r"stopped after dispatch (\d+)", text).group(1) for text in said]
    assert stops[0] == stops[1] and int(stops[0]) > 5
    assert all("All processes must have the same name; process 1" in text for text in said)


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_one_that_nobody_meets_says_so(index, tmp_path):
    address = f"--coordinator=localhost:{group.free_port()}"
    alone = [address, "--num_processes=2", f"--process_id={index}", "--start_timeout=3"]
    with group.running(tmp_path, 1, "-m", "tests.runs.meeting", *alone) as one:
        assert one.wait(60) == [2]
        assert f"Process {index} of 2 did not meet the others" in one.said(0)


@pytest.mark.slow
def test_no_cluster_is_said(tmp_path):
    with group.running(tmp_path, 1, "-m", "tests.runs.meeting", "--distributed") as one:
        assert one.wait(60) == [2]
        assert "found no cluster" in one.said(0)


# Training.


def train(workdir, mode=None):
    config = f"--config={CONFIG}" + (f":{mode}" if mode else "")
    return ["-m", "diffjax", "train", config, f"--workdir={workdir}", "--noprogress"]


def figures(workdir):
    names = ("step", "loss", "grad_norm", "eval_loss")
    return [{n: row[n] for n in names if n in row} for row in read_jsonl(workdir / "metrics.jsonl")]


def assert_same_run(found, known):
    """Loss curve and weights up to the order in which sums over devices are added up."""
    rows, expected = figures(found), figures(known)
    assert [row.keys() for row in rows] == [row.keys() for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=2e-5)
    assert rows[-1]["step"] == dj.load(found).step == 12
    for leaf, other in zip(
        *(jax.tree.leaves(dj.load(d).params) for d in (found, known)), strict=True
    ):
        np.testing.assert_allclose(leaf, other, rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, digits_dir, compilation_cache):
    """Runs of one process with 4 and with 8 devices."""
    found = {}
    for devices in (4, 8):
        found[devices] = tmp_path_factory.mktemp(f"alone_{devices}")
        group.finish(found[devices] / "logs", 1, *train(found[devices]), devices=devices)
    return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory, digits_dir, compilation_cache):
    """A run of two processes."""
    workdir = tmp_path_factory.mktemp("pair")
    group.finish(workdir / "logs", 2, *train(workdir))
    return workdir


@pytest.mark.slow
def test_the_comparison_sees_another_run(alone, tmp_path):
    """One update on other data is far outside of the tolerance."""
    other = tmp_path / "run"
    group.finish(tmp_path, 1, *train(other), "--config.seed=1", devices=4)
    with pytest.raises(AssertionError):
        assert_same_run(other, alone[4])


@pytest.mark.slow
def test_two_processes_train_as_one(pair, alone):
    assert_same_run(pair, alone[4])
    # What there is one of is written once.
    assert len(list((pair / "tensorboard").iterdir())) == 1
    assert (pair / "loss.png").is_file() and list((pair / "samples").iterdir())


@pytest.mark.slow
def test_four_processes_train_as_one(alone, tmp_path):
    group.finish(tmp_path / "logs", 4, *train(tmp_path))
    assert_same_run(tmp_path, alone[8])


@pytest.mark.slow
def test_state_split_over_processes_is_the_same_run(alone, tmp_path):
    """Four slices of the weights over two processes; the tiny network's, of 64 numbers or more."""
    group.finish(tmp_path / "logs", 2, *train(tmp_path), "--config.mesh.fsdp=4")
    assert_same_run(tmp_path, alone[4])


@pytest.mark.slow
def test_another_number_of_processes_goes_on(pair, alone, tmp_path):
    """Two processes to step 4, one to step 8, four to the end: the run that was never stopped."""
    workdir = shutil.copytree(pair, tmp_path / "run")

    def back_to(step):
        for folder in (workdir / "checkpoints").iterdir():
            if folder.name.isdigit() and int(folder.name) > step:
                shutil.rmtree(folder)

    back_to(4)
    group.finish(tmp_path / "one", 1, *train(workdir), devices=2)
    assert_same_run(workdir, alone[4])
    back_to(8)
    group.finish(tmp_path / "four", 4, *train(workdir))
    assert_same_run(workdir, alone[4])


@pytest.mark.slow
@pytest.mark.parametrize("lost", [1, 0])
def test_losing_one_ends_all_and_the_rest_goes_on(lost, tmp_path, digits_dir, compilation_cache):
    """Also the coordinator. Then another number of processes, stopped by a SIGTERM to one."""
    workdir, command = tmp_path / "run", train(tmp_path / "run", "endless")
    with group.running(tmp_path / "a", 2, *command, "--peer_timeout=10") as both:
        both.reach(workdir, 130)
        began = time.monotonic()
        both.kill(lost)
        codes = both.wait(60)
        seconds = time.monotonic() - began
        said = both.said(1 - lost)
    # Where the coordinator is lost JAX aborts the rest; it may be first elsewhere too.
    assert codes[lost] == -9 and codes[1 - lost] in (flags.LOST, -6)
    assert f"Process {1 - lost} of 2 lost touch with another" in said or "task died" in said
    assert seconds < 40
    saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    count = 1 + lost
    before = len(read_jsonl(workdir / "metrics.jsonl"))
    with group.running(tmp_path / "b", count, *command) as rest:
        rest.reach(workdir, saved + 200)
        rest.terminate(count - 1)
        assert rest.wait(120) == [flags.STOPPED] * count, rest.everything()
        stops = {re.search(r"saved at step (\d+)", rest.said(0)).group(1)}
    assert before
    # Nothing lost, nothing twice: one line for each tenth step.
    steps = [row["step"] for row in read_jsonl(workdir / "metrics.jsonl")]
    assert steps == list(range(10, steps[-1] + 1, 10))
    assert {str(dj.load(workdir).step)} == stops and int(stops.pop()) >= saved + 200


# Sampling and measuring.


@pytest.mark.slow
def test_two_processes_sample_and_measure_as_one(pair, tmp_path):
    """By the commands; the parts that two processes exchange are `test_hosts`'s."""
    found = {}
    for count in (1, 2):
        workdir = shutil.copytree(pair, tmp_path / str(count))
        sample = ["-m", "diffjax", "sample", f"--workdir={workdir}", "--num=10", "--batch_size=4"]
        group.finish(tmp_path / f"s{count}", count, *sample)
        measure = ["-m", "diffjax", "evaluate", f"--workdir={workdir}", "--metrics=loss,quality"]
        group.finish(tmp_path / f"e{count}", count, *measure, "--num=10")
        with np.load(workdir / "samples.npz") as archive:
            found[count] = (
                archive["images"],
                json.loads((workdir / "eval/quality.json").read_text()),
            )
    np.testing.assert_array_equal(found[2][0], found[1][0])
    (_, figures), (_, expected) = found[2], found[1]
    assert figures.pop("class_shares") == expected.pop("class_shares")
    assert figures == pytest.approx(expected)
