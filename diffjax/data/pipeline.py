"""From a source to batches: sequences with random access, read ahead by grain.

`TrainBatches` and `EvalBatches` are sequences: batch k is a pure function of the source, the seed
and k, computed when it is asked for. So training that resumes at step s sees exactly the batches
of an uninterrupted run, with nothing to fast-forward, and the position in a checkpoint is a number.

    batches = TrainBatches(source, batch_size=128, seed=0)
    start = batches.resume(position)                     # or 0
    for step, batch in enumerate(prefetch(batches, start=start), start):
        ...
    position = batches.position(step)                    # a dict for json

Order. Position n of the endless stream belongs to epoch e = n // N and is example P_e[n % N], where
P_e is the permutation that sorts N random words of Philox with key (seed, e). Each epoch visits
every example once; batches run across the ends of epochs and no example is dropped. The stream of a
NumPy bit generator is fixed for good, so neither NumPy's nor grain's version changes the order.
(grain's own shuffle costs a walk of about 65,536 / N rounds an index: 4 ms a batch for the digits.)

Reading ahead. `prefetch` holds `ahead` batches, by threads of this process or by worker processes,
and `placed_ahead` as many groups of them on the devices as it is told: memory is bounded whatever
the speed of either side. Since batch k depends on k alone, what was read ahead is no state: a run
goes on at any step with any number of workers. Workers, and the memory that they share with this
process, outlive neither the iterator nor the process, killed as it may be. They leave Ctrl-C and
SIGTERM to it, as it may want to save first. A worker that dies (out of memory, say) and an example
that cannot be read raise here.

Hosts. Process p of P takes rows [p B / P, (p + 1) B / P) of each global batch of B, so the global
batch does not depend on P.
"""

import collections
import dataclasses
import functools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np

from diffjax.core.checks import at_least
from diffjax.data.extras import require
from diffjax.data.sources import DataInfo, Source, read

T = TypeVar("T")
Batch = dict[str, np.ndarray]


class Batches(Protocol):
    """A sequence of batches."""

    def __len__(self) -> int: ...

    def __getitem__(self, step: int, /) -> Batch: ...


@dataclasses.dataclass(frozen=True)
class TrainBatches:
    """The endless shuffled batches of one process.

    source: what is read. batch_size: B over all processes. seed: 0 to 2^64 - 1. shuffle: False
    keeps the source's order in every epoch. process_index, process_count: p and P, which must
    divide B. A batch is {"image": uint8 (B/P, H, W, C), "label": int32 (B/P,)}.
    """

    source: Source
    batch_size: int
    seed: int
    shuffle: bool = True
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self):
        _check_share(self.batch_size, self.process_index, self.process_count)
        at_least("seed", self.seed, 0)
        if self.seed >= 2**64:
            raise ValueError(f"seed must be below 2^64; got {self.seed}.")

    def __len__(self) -> int:
        return sys.maxsize // self.batch_size

    def __getitem__(self, step: int) -> Batch:
        at_least("step", step, 0)
        examples = [read(self.source, int(i)) for i in self.indices(step)]
        return {key: np.stack([e[key] for e in examples]) for key in examples[0]}

    def indices(self, step: int) -> np.ndarray:
        """The source's indices of this process's rows of batch `step`, (B/P,)."""
        share = self.batch_size // self.process_count
        first = step * self.batch_size + self.process_index * share
        epochs, places = np.divmod(np.arange(first, first + share), len(self.source))
        if not self.shuffle:
            return places
        order = functools.partial(epoch_order, len(self.source), self.seed)
        return np.array([order(int(e))[i] for e, i in zip(epochs, places, strict=True)])

    def position(self, step: int) -> dict[str, Any]:
        """Where training stands before batch `step`: plain values for a checkpoint."""
        return {
            "step": int(step),
            "seed": self.seed,
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "source": _fingerprint(self.source.info),
        }

    def resume(self, position: Mapping[str, Any]) -> int:
        """The step of a saved position. Raises ValueError where it belongs to other batches.

        The number of processes may differ; the data, batch size, seed and order may not.
        """
        here = self.position(position.get("step", 0))
        differing = [name for name in here if position.get(name) != here[name]]
        if differing:
            was = {name: position.get(name) for name in differing}
            now = {name: here[name] for name in differing}
            raise ValueError(
                f"Training can only resume on the batches that it began with; the checkpoint has "
                f"{was}, this run {now}. Restore these settings, or begin in a new workdir."
            )
        return here["step"]


@dataclasses.dataclass(frozen=True)
class EvalBatches:
    """One pass in the source's order, for one process; no example is lost.

    All batches of all processes have B / P rows: the last ones are filled up with zeros, and "mask"
    (B/P,) is False there. Otherwise as `TrainBatches`.
    """

    source: Source
    batch_size: int
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self):
        _check_share(self.batch_size, self.process_index, self.process_count)

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size)

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < len(self):
            raise IndexError(f"There are {len(self)} batches; got step {step}.")
        share = self.batch_size // self.process_count
        first = step * self.batch_size + self.process_index * share
        last = min(first + share, len(self.source))
        examples = [read(self.source, i) for i in range(first, last)]
        info = self.source.info
        batch: Batch = {"image": np.zeros((share, *info.shape), np.uint8)}
        if info.num_classes is not None:
            batch["label"] = np.zeros(share, np.int32)
        for key, rows in batch.items():
            for row, example in enumerate(examples):
                rows[row] = example[key]
        batch["mask"] = np.arange(share) < len(examples)
        return batch


def prefetch(
    batches: Batches, *, start: int = 0, ahead: int = 2, threads: int = 1, workers: int = 0
) -> Generator[Batch, None, None]:
    """Iterates over batches[start:], computing `ahead` of them in the background.

    threads: threads that make batches, in each process. workers: processes that make batches, each
    `ahead` of them; 0 means none beside this one. One thread suits data in memory, several suit
    slow storage, and workers suit decoding, which Python's lock would serialise. Each worker is a
    new interpreter with a copy of the source, so a script that asks for some needs the usual
    `if __name__ == "__main__":`. The order is that of the sequence whatever the choice. Dropping
    the iterator, or its `close()`, stops the background work.

    Raises RecordError, when asked for the batch, for an example that cannot be read, and
    RuntimeError where a worker died.
    """
    at_least("start", start, 0)
    at_least("ahead", ahead, 1)
    at_least("threads", threads, 1)
    at_least("workers", workers, 0)
    grain = require("grain")
    reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(ahead, threads))
    data = grain.MapDataset.source(batches).slice(slice(start, None)).to_iter_dataset(reading)
    if workers:
        # grain reads absl flags when it starts workers, which fails outside of absl's app.run.
        flags = require("absl.flags").FLAGS
        if not flags.is_parsed():
            flags.mark_as_parsed()
        options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=ahead)
        data = data.mp_prefetch(options, worker_init_fn=_Bound(os.getpid()))
        data = data.map(_owned)
    return _closing(iter(data))


def placed_ahead(groups: Iterator[T], ahead: int) -> Generator[T, None, None]:
    """The same groups, each asked for when the one `ahead` of it is.

    Of groups that are placed on devices when they are asked for, without waiting, so many more than
    the one in use are on the devices or on their way. 0 is the iterator itself.
    """
    at_least("ahead", ahead, 0)
    return _placed_ahead(groups, ahead)


def _placed_ahead(groups: Iterator[T], ahead: int) -> Generator[T, None, None]:
    held: collections.deque[T] = collections.deque()
    try:
        for group in groups:
            held.append(group)
            del group
            if len(held) > ahead:
                yield held.popleft()
        while held:
            yield held.popleft()
    finally:
        if hasattr(groups, "close"):
            groups.close()


@dataclasses.dataclass(frozen=True)
class _Bound:
    """What a worker does first: it leaves signals to its parent, and ends when that is gone."""

    parent: int

    def __call__(self, index: int, count: int) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while os.getppid() == self.parent:
            time.sleep(1.0)
        os._exit(1)


def _owned(batch: Batch) -> Batch:
    """A copy outside of the workers' shared memory, which must not outlive grain's own objects."""
    return {key: np.array(value) for key, value in batch.items()}


def _closing(iterator: Any) -> Generator[Batch, None, None]:
    """Iterates, and stops the background work at the end, at an error or when it is dropped."""
    try:
        yield from iterator
    finally:
        iterator.close()


@functools.lru_cache(maxsize=4)
def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """P_e: a permutation of range(size), read-only; kept for the last few epochs asked for."""
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(size)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False
    return order


def _check_share(batch_size: int, process_index: int, process_count: int) -> None:
    at_least("batch_size", batch_size, 1)
    at_least("process_count", process_count, 1)
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index must lie in 0 ... process_count - 1; got {process_index} of "
            f"{process_count}."
        )
    if batch_size % process_count:
        raise ValueError(
            f"batch_size must be a multiple of the number of processes; got {batch_size} for "
            f"{process_count}. It counts the rows over all processes."
        )


def _fingerprint(info: DataInfo) -> dict[str, Any]:
    """The data set as plain json values (tuples become lists there)."""
    return json.loads(json.dumps(dataclasses.asdict(info)))
