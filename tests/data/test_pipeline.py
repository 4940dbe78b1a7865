"""Batches against the plain statement: batch k is rows kB ... kB + B - 1 of the shuffled epochs."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from diffjax.data import (
    EvalBatches,
    RecordError,
    TrainBatches,
    array_source,
    folder_source,
    in_memory,
    placed_ahead,
    prefetch,
)
from diffjax.data.pipeline import epoch_order


def numbered(n, labels=True):
    """A source whose image i has the value i in every pixel and the label i."""
    images = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, 3, 2, 1))
    return array_source(images, np.arange(n) if labels else None, name="numbered")


def values(batch):
    """The examples in a batch, having checked that pixels and label agree."""
    assert batch["image"].dtype == np.uint8
    assert batch["label"].dtype == np.int32
    assert (batch["image"] == batch["label"][:, None, None, None]).all()
    return batch["label"].tolist()


def stream(batches, steps):
    return list(itertools.chain.from_iterable(values(batches[k]) for k in range(steps)))


def test_every_epoch_visits_every_example_once_in_a_new_order():
    # 7 does not divide 23: batches run across the ends of epochs.
    examples = stream(TrainBatches(numbered(23), batch_size=7, seed=3), 23)
    epochs = [tuple(examples[e * 23 : (e + 1) * 23]) for e in range(7)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len(set(epochs)) == 7
    assert tuple(range(23)) not in epochs


def test_a_batch_may_span_several_epochs():
    examples = stream(TrainBatches(numbered(3), batch_size=8, seed=0), 3)
    assert all(sorted(examples[i : i + 3]) == [0, 1, 2] for i in range(0, 24, 3))


def test_without_shuffle_the_order_is_the_source():
    examples = stream(TrainBatches(numbered(5), batch_size=4, seed=0, shuffle=False), 5)
    assert examples == list(range(5)) * 4


def test_orders_are_uniform_over_permutations():
    # All 24 orders of 4 examples over 2,400 epochs: the statistic has 23 degrees of freedom, and
    # 49.7 is its 1e-3 quantile.
    counts = Counter(tuple(epoch_order(4, 0, epoch)) for epoch in range(2400))
    assert len(counts) == 24
    assert sum((c - 100) ** 2 / 100 for c in counts.values()) < 49.7


def test_seeds_and_epochs_do_not_share_orders():
    # A generator seeded with seed + epoch would repeat itself along the diagonal.
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@pytest.mark.parametrize("start", [0, 1, 9, 1000])
@pytest.mark.parametrize("options", [{}, {"threads": 3, "ahead": 5}], ids=["one", "threads"])
def test_prefetching_from_any_step_equals_the_sequence(start, options):
    batches = TrainBatches(numbered(23), batch_size=6, seed=1)
    read = list(itertools.islice(prefetch(batches, start=start, **options), 6))
    assert [values(b) for b in read] == [values(batches[start + k]) for k in range(6)]


def test_worker_processes_keep_the_order():
    batches = TrainBatches(numbered(23), batch_size=6, seed=1)
    reader = prefetch(batches, start=4, workers=2)
    read = [values(next(reader)) for _ in range(5)]
    reader.close()
    assert read == [values(batches[4 + k]) for k in range(5)]


def test_dropping_the_iterator_stops_its_threads():
    def running():
        return [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]

    before = len(running())
    for _ in prefetch(TrainBatches(numbered(9), batch_size=4, seed=0), threads=2):
        break
    deadline = time.monotonic() + 10
    while len(running()) > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(running()) <= before


def test_an_error_in_the_background_reaches_the_caller():
    class Broken:
        info = numbered(4).info

        def __len__(self):
            return 4

        def __getitem__(self, index):
            raise ValueError(f"record {index} is damaged")

    with pytest.raises(ValueError, match="is damaged"):
        next(prefetch(TrainBatches(Broken(), batch_size=2, seed=0)))


def damaged_folder(tmp_path):
    """A source of nine image files of which the sixth is no image and the eighth is gone."""
    from PIL import Image

    for i in range(9):
        Image.fromarray(np.full((4, 4), i, np.uint8)).save(tmp_path / f"{i}.png")
    source = folder_source(tmp_path)
    (tmp_path / "5.png").write_bytes(b"no image")
    (tmp_path / "7.png").unlink()
    return source


@pytest.mark.parametrize("workers", [0, 1])
def test_a_record_that_cannot_be_read_is_named(tmp_path, workers):
    source = damaged_folder(tmp_path)
    reader = prefetch(TrainBatches(source, 1, 0, shuffle=False), start=4, workers=workers)
    assert next(reader)["image"][0, 0, 0, 0] == 4
    with pytest.raises(RecordError, match=r"Example 5 of '.*' cannot be read: .*5\.png.* Restore"):
        next(reader)
    if not workers:
        with pytest.raises(RecordError, match=r"Example 7 of .*7\.png"):
            TrainBatches(source, 1, 0, shuffle=False)[7]
        with pytest.raises(RecordError, match=r"Example 5 of .*5\.png"):
            EvalBatches(source, 6)[0]
        with pytest.raises(RecordError, match=r"Example 5 of .*5\.png"):
            in_memory(source)


@pytest.mark.parametrize(("ahead", "threads"), [(1, 1), (4, 1), (2, 3)])
def test_no_more_is_read_than_was_asked_for(ahead, threads):
    """A reader that is in no hurry finds `ahead` batches ready, and none beyond."""
    asked = []

    class Slow:
        def __len__(self):
            return 10_000

        def __getitem__(self, step):
            asked.append(step)
            return {"image": np.zeros(1)}

    reader = prefetch(Slow(), ahead=ahead, threads=threads)
    for _ in range(3):
        next(reader)
    settled = -1
    while settled != len(asked):
        settled = len(asked)
        time.sleep(0.2)
    assert 3 + ahead - 1 <= len(asked) <= 3 + max(ahead, threads) + 1
    reader.close()


class Group:
    """Something that shows whether it is still held."""


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_placed_ahead_holds_so_many_and_no_more(ahead):
    made, closed = [], []

    def groups():
        try:
            while len(made) < 10:
                group = Group()
                made.append(weakref.ref(group))
                yield group
                del group
        finally:
            closed.append(True)

    reader = placed_ahead(groups(), ahead)
    for k in range(10):
        group = next(reader)
        assert group is made[k]()
        assert len(made) == min(k + 1 + ahead, 10)
        assert sum(ref() is not None for ref in made) == min(1 + ahead, 10 - k)
        del group
    assert next(reader, None) is None
    assert closed == [True]
    made.clear()
    reader = placed_ahead(groups(), ahead)
    next(reader)
    reader.close()
    assert closed == [True, True]
    with pytest.raises(ValueError, match="ahead must be at least 0; got -1"):
        placed_ahead(iter(()), -1)


@pytest.mark.parametrize("process_count", [2, 3, 6])
def test_processes_share_the_global_batch(process_count):
    source = numbered(23)
    whole = TrainBatches(source, batch_size=6, seed=5)
    shares = [TrainBatches(source, 6, 5, True, p, process_count) for p in range(process_count)]
    for step in range(12):
        parts = [values(share[step]) for share in shares]
        assert list(itertools.chain.from_iterable(parts)) == values(whole[step])
        assert {len(part) for part in parts} == {6 // process_count}


@pytest.mark.parametrize(("n", "process_count"), [(23, 1), (24, 1), (23, 2), (19, 3), (2, 3)])
def test_evaluation_visits_all_once_and_masks_the_rest(n, process_count):
    shares = [EvalBatches(numbered(n), 6, p, process_count) for p in range(process_count)]
    seen = []
    for step in range(len(shares[0])):
        for share in shares:
            batch = share[step]
            assert batch["image"].shape == (6 // process_count, 3, 2, 1)
            assert batch["mask"].dtype == bool
            assert (batch["image"][~batch["mask"]] == 0).all()
            seen += batch["label"][batch["mask"]].tolist()
            assert (batch["image"][:, 0, 0, 0] == batch["label"]).all()
    assert seen == list(range(n))
    assert [len(share) for share in shares] == [-(-n // 6)] * process_count
    assert len(list(prefetch(shares[0]))) == len(shares[0])


def test_a_source_without_labels():
    source = numbered(5, labels=False)
    assert set(TrainBatches(source, 2, 0)[0]) == {"image"}
    assert set(EvalBatches(source, 2)[2]) == {"image", "mask"}


def test_a_position_survives_json_and_resumes():
    batches = TrainBatches(numbered(23), batch_size=6, seed=2**63)
    position = json.loads(json.dumps(batches.position(np.int64(41))))
    assert batches.resume(position) == 41
    assert TrainBatches(numbered(23), 6, 2**63, True, 1, 2).resume(position) == 41


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (TrainBatches(numbered(23), 6, 1), "seed"),
        (TrainBatches(numbered(23), 12, 0), "batch_size"),
        (TrainBatches(numbered(23), 6, 0, False), "shuffle"),
        (TrainBatches(numbered(22), 6, 0), "source"),
    ],
)
def test_a_position_of_other_batches_is_refused(other, name):
    position = TrainBatches(numbered(23), 6, 0).position(3)
    with pytest.raises(ValueError, match=f"began with; the checkpoint has.*{name}.*workdir"):
        other.resume(position)
    with pytest.raises(ValueError, match="step"):
        other.resume({})


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1; got 0"),
        ({"batch_size": 6.0}, TypeError, "batch_size must be an int; got 6.0"),
        ({"seed": -1}, ValueError, "seed must be at least 0; got -1"),
        ({"seed": 2**64}, ValueError, "seed must be below 2.64"),
        ({"process_count": 4}, ValueError, "multiple of the number of processes; got 6 for 4"),
        ({"process_index": 1}, ValueError, "process_index must lie in.*got 1 of 1"),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        TrainBatches(**({"source": numbered(4), "batch_size": 6, "seed": 0} | arguments))


def test_steps_outside_the_sequence_raise():
    with pytest.raises(ValueError, match="step must be at least 0; got -1"):
        TrainBatches(numbered(4), 2, 0)[-1]
    with pytest.raises(IndexError, match="There are 2 batches; got step 2"):
        EvalBatches(numbered(4), 2)[2]
    with pytest.raises(ValueError, match="start must be at least 0; got -3"):
        prefetch(TrainBatches(numbered(4), 2, 0), start=-3)


# Worker processes and memory, as the system sees them.


def status(pid, field):
    """A number of /proc/<pid>/status: kilobytes of VmRSS, or the parent's id."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    return 0  # a process that has just ended


def children(pid):
    """The processes that this one has started."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and status(entry.name, "PPid") == pid:
                found.append(int(entry.name))
        except OSError:
            pass
    return found


linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")

# Prints a line once a batch is there, and then waits to be killed.
READER = """
import os, sys, time
from tests.data.test_pipeline import numbered
from diffjax.data import TrainBatches, prefetch

if __name__ == "__main__":
    reader = prefetch(TrainBatches(numbered(23), batch_size=6, seed=1), workers=2)
    next(reader), next(reader)  # one of each worker
    print("reading", flush=True)
    for line in sys.stdin:
        print(len([next(reader) for _ in range(20)]), flush=True)
"""


def shared_memory():
    """The names of Python's segments of it."""
    return {path.name for path in Path("/dev/shm").glob("psm_*")}


@pytest.fixture
def before():
    """What was there before."""
    return shared_memory()


@pytest.fixture
def reading(tmp_path):
    """A process that reads with two workers, and theirs."""
    (tmp_path / "reader.py").write_text(READER)
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "reader.py")],
        stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "reading\n", process.stderr.read()
        workers = [pid for pid in children(process.pid) if b"spawn_main" in command(pid)]
        assert len(workers) == 2
        yield process, workers
        process.kill()


def command(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def ended(pids, seconds):
    """Whether these processes end in so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        alive = [p for p in pids if Path(f"/proc/{p}").exists() and status(p, "VmRSS")]
        if not alive:
            return True
        time.sleep(0.1)
    return False


@linux
@pytest.mark.slow
def test_workers_do_not_outlive_a_killed_process(before, reading):
    """Nor does the memory that they share with it."""
    process, workers = reading
    for _ in range(3):
        print("on", file=process.stdin, flush=True)
        assert process.stdout.readline() == "20\n"
    process.kill()
    process.wait()
    assert ended(workers, 10)
    time.sleep(1)  # what watches over it ends last
    assert shared_memory() <= before


@linux
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_leave_signals_to_their_parent(reading, number):
    """Ctrl-C and a scheduler's SIGTERM reach all processes of the group; reading goes on."""
    process, workers = reading
    for pid in workers:
        os.kill(pid, number)
    print("on", file=process.stdin, flush=True)
    assert process.stdout.readline() == "20\n"
    process.stdin.close()
    assert process.wait(60) == 0
    assert ended(workers, 10)


@linux
@pytest.mark.slow
def test_a_worker_that_dies_is_an_error(reading):
    process, workers = reading
    os.kill(workers[0], signal.SIGKILL)
    print("on", file=process.stdin, flush=True)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "RuntimeError" in errors
    assert "process" in errors.lower()


@linux
@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_memory_stays_where_it_was(workers):
    """Batches of 0.4 MB, 6,000 of them: 2.4 GB go by, and less than 30 MB stay."""
    images = np.random.default_rng(0).integers(0, 256, (500, 64, 64, 3), np.uint8)
    reader = prefetch(TrainBatches(array_source(images), 32, 0), workers=workers)

    def resident():
        pids = [os.getpid(), *(p for p in children(os.getpid()) if b"spawn_main" in command(p))]
        assert len(pids) == 1 + workers
        return sum(status(pid, "VmRSS") for pid in pids) / 1024

    total, seen = 0, []
    for k in range(6001):
        total += int(next(reader)["image"][0, 0, 0, 0])
        if k % 1000 == 0 and k:
            seen.append(resident())
    reader.close()
    print(f"resident MB with {workers} workers: {[round(x) for x in seen]}")
    assert max(seen) - seen[0] < 30
    assert total > 0


@pytest.mark.slow
def test_training_with_workers_is_training_without(trained, tmp_path, monkeypatch):
    """Stopped after five updates, it goes on with another number of them."""
    import contextlib

    import jax

    import diffjax as dj
    from diffjax.runs import distributed
    from diffjax.runs.workdir import load_config

    def train(workers):
        config = load_config("digits:quick")
        with config.unlocked():
            config.data.update({"workers": workers, "ahead": 3, "placed": 1})
        return dj.train(config, tmp_path / "run", show_progress=False)

    @contextlib.contextmanager
    def after_five(start, n_jitted_steps):
        yield lambda: start == 0

    monkeypatch.setattr(distributed, "stop_requested", after_five)
    assert train(2) == (5, False)
    assert train(1) == (10, True)
    jax.tree.map(
        np.testing.assert_array_equal, dj.load(trained).params, dj.load(tmp_path / "run").params
    )
    with pytest.raises(ValueError, match="data.workers must be a whole number from 0 on; got -1"):
        train(-1)
