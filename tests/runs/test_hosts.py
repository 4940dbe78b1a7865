"""Evaluation over several processes is that of one.

Threads stand for the processes by default: only the exchange is another. Slow: real processes on
this machine.
"""

import json
import os
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.metrics import classifier_score, moments
from diffjax.metrics.inception import Outputs
from diffjax.runs import hosts
from diffjax.runs.extractors import Extractor
from diffjax.runs.feature_net import train_feature_net
from diffjax.runs.gather import gather
from diffjax.runs.workdir import load_config
from tests.runs.group import free_port

TOTAL, ROWS = 29, 8  # images, in four batches


class Images:
    """29 images in batches of 8, the last filled up with others."""

    def __init__(self):
        self.images = np.random.default_rng(0).integers(0, 256, (32, 4, 4, 1), np.uint8)

    def __len__(self):
        return 4

    def __getitem__(self, index):
        rows = np.arange(index * ROWS, (index + 1) * ROWS)
        return self.images[rows], rows < TOTAL


@jax.tree_util.Partial
def features_and_logits(images):
    x = images.reshape(images.shape[0], -1).astype(jnp.float32) / 255
    return Outputs(x[:, :6], 3 * x[:, 6:10])


EXTRACTOR = Extractor(features_and_logits, {"features": "pixels", "image_shape": [4, 4, 1]})


class Processes:
    """So many threads, each of which `hosts` takes for a process."""

    def __init__(self, count, monkeypatch):
        self.count, self.here = count, threading.local()
        self.parts, self.barrier = [None] * count, threading.Barrier(count, timeout=60)
        monkeypatch.setattr(hosts, "index", lambda: self.here.index)
        monkeypatch.setattr(hosts, "count", lambda: count)
        monkeypatch.setattr(hosts, "exchange", self.exchange)

    def exchange(self, part):
        self.parts[self.here.index] = jax.tree.map(np.asarray, part)
        self.barrier.wait()
        found = list(self.parts)
        self.barrier.wait()
        return found

    def run(self, work):
        """What `work()` returns, or raises, in each."""
        results = [None] * self.count

        def one(index):
            self.here.index = index
            try:
                results[index] = work()
            except Exception as error:
                results[index] = error

        threads = [threading.Thread(target=one, args=(i,)) for i in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def gathered(**options):
    return gather(EXTRACTOR, Images(), total=TOTAL, splits=3, keep=True, **options)


def assert_same(found, alone):
    if isinstance(found, Exception):
        raise found
    assert (found.num, found.digest) == (alone.num, alone.digest)
    np.testing.assert_array_equal(found.features, alone.features)
    for figure in (moments.mean, moments.cov):
        np.testing.assert_allclose(figure(found.moments), figure(alone.moments), atol=3e-7)
    here, there = (classifier_score.score(x.scores).splits for x in (found, alone))
    np.testing.assert_allclose(here, there, rtol=1e-6)


@pytest.mark.parametrize(
    "count", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(6, marks=pytest.mark.slow)]
)
def test_shares_come_together(count, monkeypatch):
    """Also with more processes than batches."""
    alone = gathered()
    x = Images().images[:TOTAL].reshape(TOTAL, -1)[:, :6] / 255
    np.testing.assert_allclose(moments.cov(alone.moments), np.cov(x.T), atol=1e-6)
    found = Processes(count, monkeypatch).run(gathered)
    for result in found:
        assert_same(result, alone)
        jax.tree.map(np.testing.assert_array_equal, result, found[0])


@pytest.mark.parametrize(
    "share",
    [
        lambda batches: range(batches),  # everything in each
        lambda batches: range(hosts.index(), batches - 1, hosts.count()),  # the last in none
        lambda batches: range(batches - 1 - hosts.index(), -1, -hosts.count()),  # in another order
    ],
)
def test_mutants_of_the_share(share, monkeypatch):
    alone = gathered()
    monkeypatch.setattr(hosts, "share", share)
    with pytest.raises((AssertionError, IndexError, ValueError)):
        assert_same(Processes(2, monkeypatch).run(gathered)[0], alone)


def test_each_goes_on_from_where_it_was(monkeypatch, tmp_path):
    """One of two processes is stopped after its first batch: the same, and nothing done twice."""
    alone, done = gathered(), []
    processes = Processes(2, monkeypatch)

    def stop_the_second(count):
        done.append((hosts.index(), count))
        if hosts.index() == 1:
            processes.barrier.abort()
            raise OSError("stopped")

    options = {"folder": tmp_path / "state", "every": 1}
    stopped = processes.run(lambda: gathered(progress=stop_the_second, **options))
    assert all(isinstance(result, Exception) for result in stopped)
    processes.barrier.reset()
    before = sorted(done)
    done.clear()
    found = processes.run(lambda: gathered(progress=lambda n: done.append(n), **options))
    assert before == [(0, 8), (0, 16), (1, 8)]
    assert done == [13]  # the second's second batch, of 5
    for result in found:
        assert_same(result, alone)


def test_alone_nothing_is_exchanged():
    assert hosts.is_first() and hosts.all_agree(True) and not hosts.all_agree(False)
    np.testing.assert_array_equal(hosts.in_order([np.ones(2), np.zeros(1)], 2), [1, 1, 0])


# Real processes.


def run_processes(count, workdir, net, out):
    """Runs `two_processes` in `count` processes of two devices each."""
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    rest = [str(count), str(free_port()), str(workdir), str(net), str(out)]
    command = [sys.executable, "-m", "tests.runs.two_processes"]
    with open(out / f"log_{count}", "w+") as log:
        processes = [
            subprocess.Popen([*command, str(i), *rest], env=environment, stderr=log)
            for i in range(count)
        ]
        try:
            codes = [process.wait(timeout=300) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        log.seek(0)
        assert codes == [0] * count, log.read()[-4000:]
    found = []
    for i in range(count):
        with np.load(out / f"{i}_of_{count}.npz") as archive:
            found.append((dict(archive), json.loads((out / f"{i}_of_{count}.json").read_text())))
    return found


@pytest.fixture(scope="module")
def results(trained, tmp_path_factory, digits_dir):
    out = tmp_path_factory.mktemp("hosts")
    train_feature_net(
        load_config("digits:quick"), out / "net.npz", steps=20, batch_size=32, width=8, stages=1,
        dim=6,
    )  # fmt: skip
    found = {}
    for count in (1, 2):
        workdir = shutil.copytree(trained, out / f"run_{count}")
        found[count] = run_processes(count, workdir, out / "net.npz", out)
        # What belongs to all is written once, and nothing is left of the parts.
        names = sorted(p.name.split("_")[0] for p in (workdir / "eval").iterdir())
        assert names == ["frechet.json", "pr.json", "reference"]
    return found


@pytest.mark.slow
def test_two_processes_find_what_one_does(results):
    [(alone, _)] = results[1]
    for here, _ in results[2]:
        for name in ("samples", "digest", "num", "few"):
            np.testing.assert_array_equal(here[name], alone[name])
        # Up to the rounding of the batches' own features; the sums add none of their own.
        scale = alone["features"].std()
        np.testing.assert_allclose(here["features"], alone["features"], atol=1e-5 * scale)
        np.testing.assert_allclose(here["mean"], alone["mean"], atol=1e-6 * scale)
        np.testing.assert_allclose(here["cov"], alone["cov"], atol=1e-5 * scale**2)
        np.testing.assert_allclose(here["scores"], alone["scores"], rtol=1e-6)
        assert here["few"].shape == (2, 3, 1)
        assert list(here["agree"]) == [False, True]


@pytest.mark.slow
def test_all_processes_find_the_same(results):
    (first, figures), (second, others) = results[2]
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    assert figures == others


@pytest.mark.slow
def test_the_figures_are_those_of_one_process(results):
    [(_, alone)], [(_, figures), _] = results[1], results[2]
    assert figures.keys() == alone.keys() == {"frechet", "pr"}
    for name, known in alone.items():
        assert figures[name].keys() == known.keys()
        for key, value in known.items():
            expected = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            assert figures[name][key] == expected
