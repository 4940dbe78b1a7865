"""Batches against the plain statement: batch k is rows kB ... kB + B - 1 of the shuffled epochs."""

import itertools
import json
import threading
import time
from collections import Counter

import numpy as np
import pytest

from diffjax.data import EvalBatches, TrainBatches, array_source, prefetch
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
