"""Where a run's figures go: a JSON-lines file, TensorBoard, the terminal; and what is measured.

Writers follow the protocol of clu's `MetricWriter`, so any of clu's, or anybody's, plugs in. Only
the main process of a run should hold writers; the others hold `MultiWriter()`.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TextIO

import jax
import numpy as np

from diffjax.core.files import write_atomic


class MetricWriter(Protocol):
    """The part of clu's protocol that diffjax calls."""

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Figures by name; different calls may add to one step."""

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Pictures by name, (N, H, W, C) or (H, W, C), uint8 or floats in [0, 1]."""

    def flush(self) -> None:
        """Everything given so far is written on return."""

    def close(self) -> None:
        """Flushes, and frees the files."""


class MultiWriter:
    """Hands everything to each of `writers`; none of them: nothing is written."""

    def __init__(self, writers: Iterable[MetricWriter] = ()):
        self._writers = tuple(writers)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        for writer in self._writers:
            writer.write_scalars(step, scalars)

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        for writer in self._writers:
            writer.write_images(step, images)

    def flush(self) -> None:
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


class JsonlWriter:
    """One JSON object a line: {"step": 50, "loss": 0.031, ...}; each step once.

    path: made if absent. last_step: the step that the run goes on from; lines of later steps, and
    a last line cut short by a crash, are dropped, since the run writes them again. Figures of one
    step share a line, which is written when a later step begins or at `flush`. Numbers that JSON
    lacks (nan, inf) become null. Pictures are not for this file.
    """

    def __init__(self, path: str | os.PathLike[str], *, last_step: int = 0):
        self._path = Path(path)
        kept = [row for row in read_jsonl(self._path) if row["step"] <= last_step]
        write_atomic(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = self._path.open("a", encoding="utf-8")
        self._row: dict[str, Any] = {}

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        if self._row and self._row["step"] != step:
            self._end_line()
        self._row |= {"step": int(step)} | {name: _number(v) for name, v in scalars.items()}

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        del step, images

    def _end_line(self) -> None:
        if self._row:
            self._file.write(json.dumps(self._row) + "\n")
            self._row = {}
        self._file.flush()

    def flush(self) -> None:
        self._end_line()
        os.fsync(self._file.fileno())  # a checkpoint that lasts has its figures before it

    def close(self) -> None:
        self.flush()
        self._file.close()


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a metrics file; [] if there is none. A torn last line is left out.

    Raises ValueError naming any other line that is not a JSON object with a step.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
            int(row["step"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}, line {number} is not a JSON object with a step; mend or remove the file."
            ) from error
        rows.append(row)
    return rows


_DEVICE_MEMORY, _PROCESS_MEMORY = "device_memory_peak_gib", "process_memory_peak_gib"

# Figures of the machine and the moment: all others are the same in a run that was resumed.
MEASURED = frozenset(
    {
        "images_per_second",
        "images_per_second_per_chip",
        "data_wait",
        "mfu",
        _DEVICE_MEMORY,
        _PROCESS_MEMORY,
    }
)


def memory_peak() -> dict[str, float]:
    """The most memory in use so far, in GiB, under a name that says whose.

    "device_memory_peak_gib", of the fullest device of this process, where the backend counts it;
    elsewhere, as on a CPU, "process_memory_peak_gib", the process's largest resident size.
    """
    peaks = [
        stats["peak_bytes_in_use"]
        for device in jax.local_devices()
        if (stats := device.memory_stats()) and "peak_bytes_in_use" in stats
    ]
    if peaks:
        return {_DEVICE_MEMORY: max(peaks) / 2**30}
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return {_PROCESS_MEMORY: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}


class Machine(NamedTuple):
    """What speeds are compared with.

    chips: that share an update. flops: of one update, over all chips; None where not counted.
    peak_flops: FLOP/s of one chip; None where the chip is not known. memory: gives figures by name.
    """

    chips: int = 1
    flops: float | None = None
    peak_flops: float | None = None
    memory: Callable[[], Mapping[str, float]] = memory_peak

    def speed(self, images: int, seconds: float, waited: float) -> dict[str, float]:
        """Figures of updates that take `seconds` > 0 each, of which `waited` for the next batch.

        "data_wait" is the share of the time that the loop waited for data, "mfu" the share of the
        chips' peak that the counted FLOPs come to.
        """
        rate = images / seconds
        found = {
            "images_per_second": rate,
            "images_per_second_per_chip": rate / self.chips,
            "data_wait": min(waited / seconds, 1.0),
        }
        if self.flops is not None and self.peak_flops is not None:
            found["mfu"] = self.flops / (seconds * self.chips * self.peak_flops)
        return found


def tensorboard_writer(directory: str | os.PathLike[str]) -> MetricWriter:
    """clu's writer of TensorBoard summaries. Imports TensorFlow, which takes seconds."""
    from clu import metric_writers

    return metric_writers.SummaryWriter(os.fspath(directory))


class Progress(Protocol):
    """Shows how far a run is; one call for each logged step."""

    def __call__(self, step: int, scalars: Mapping[str, float], /) -> None: ...


def no_progress(step: int, scalars: Mapping[str, float]) -> None:
    """Shows nothing."""
    del step, scalars


@contextmanager
def progress_bar(
    n_steps: int, *, step: int = 0, stream: TextIO | None = None, every_s: float = 30.0
) -> Iterator[Progress]:
    """Shows loss, images a second, waiting for data and time left on `stream` (default: stderr).

    On a terminal a bar; elsewhere, as in a log file, one line every `every_s` seconds and one for
    the last step. step: where the run starts.
    """
    stream = sys.stderr if stream is None else stream
    if not stream.isatty():
        yield _lines(n_steps, stream, every_s)
        return
    from rich import console, progress

    columns = (
        progress.TextColumn("step"),
        progress.MofNCompleteColumn(),
        progress.BarColumn(),
        progress.TextColumn("{task.description}"),
    )
    with progress.Progress(
        *columns, console=console.Console(file=stream), auto_refresh=False
    ) as bar:
        task = bar.add_task("compiling", total=n_steps, completed=step)

        def show(step: int, scalars: Mapping[str, float]) -> None:
            bar.update(task, completed=step, description=_describe(scalars), refresh=True)

        yield show


def _lines(n_steps: int, stream: TextIO, every_s: float) -> Progress:
    last = -math.inf

    def show(step: int, scalars: Mapping[str, float]) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= every_s or step >= n_steps:
            last = now
            print(f"step {step}/{n_steps}  {_describe(scalars)}", file=stream, flush=True)

    return show


def _describe(scalars: Mapping[str, float]) -> str:
    parts = [f"loss {scalars['loss']:.4g}"]
    if "images_per_second" in scalars:
        parts.append(f"{scalars['images_per_second']:.4g} images/s")
    if scalars.get("data_wait", 0.0) > 0.05:
        parts.append(f"{scalars['data_wait']:.0%} waiting for data")
    if "seconds_left" in scalars:
        minutes, seconds = divmod(round(scalars["seconds_left"]), 60)
        hours, minutes = divmod(minutes, 60)
        parts.append(f"{hours}:{minutes:02d}:{seconds:02d} left")
    return "  ".join(parts)


def _number(value: Any) -> int | float | None:
    value = np.asarray(value).item()
    return value if isinstance(value, int) or math.isfinite(value) else None
