"""The host's loop: feed the device, read its figures late, save, and leave when asked.

The device is never kept waiting: batch k + 1 is read and step k + 1 dispatched while step k
runs, and figures are read two dispatches late. The host waits for the device only where it must:
before a hook and before a save. So too with divergence: the step itself says on the device whether
an update was bad, its loss or gradient not finite, and the host reads it with the other figures.

Order at step s: figures of s, then hooks, then the writers are flushed, then the save. So a run
that is killed at any time and goes on from its last save writes again all that came after it, and
nothing else.
"""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from diffjax.core import checks
from diffjax.core.types import PyTree
from diffjax.train import probes
from diffjax.train.state import TrainState
from diffjax.train.step import Metrics, StepFn
from diffjax.train.telemetry import Machine, MetricWriter, MultiWriter, Progress, no_progress
from diffjax.train.tracing import NoTracer, Tracer

_LAG = 2  # dispatches that the host may be ahead of the device


class Hook(NamedTuple):
    """Something done every `every` steps: a grid of samples, a loss on held-out images.

    run: (step, state) -> None. It must not keep the state, whose memory the next step takes over.
    """

    every: int
    run: Callable[[int, TrainState], None]


class FitResult(NamedTuple):
    """state: the last one. finished: False where `stop` ended the run early, after a save."""

    state: TrainState
    finished: bool


class BadUpdate(NamedTuple):
    """An update whose loss or gradient is not finite. step: counted from 1."""

    step: int
    loss: float
    grad_norm: float

    def __str__(self) -> str:
        name = "grad_norm" if np.isfinite(self.loss) else "loss"
        return f"{name} is {getattr(self, name)} at step {self.step}"


class Tolerance(NamedTuple):
    """What is done about bad updates.

    in_a_row: as many one after another are passed over, and one more ends training. Above 0 the
    step must skip them, `compile_step(skip_bad=True)`. so_far: passed over before this call; the
    figure "skipped" counts from there. row: of these, the last ones without a good update between
    or after. note: told of each, in order, before anything else.
    """

    in_a_row: int = 0
    so_far: int = 0
    row: int = 0
    note: Callable[[BadUpdate], None] = lambda bad: None


class Diverged(FloatingPointError):
    """Training cannot go on: `bad` is the update that ended it, `step` its number from 1."""

    def __init__(self, bad: BadUpdate, in_a_row: int = 1):
        before = f", after {in_a_row - 1} others in a row that were skipped" if in_a_row > 1 else ""
        super().__init__(
            f"Training diverged: {bad}{before}. Nothing was saved since; resume from the last "
            "checkpoint with a lower learning rate, gradient clipping or a longer warm-up."
        )
        self.bad = bad
        self.step = bad.step


def fit(
    state: TrainState,
    batches: Iterator[PyTree],
    *,
    step_fn: StepFn,
    n_steps: int,
    n_jitted_steps: int = 1,
    log_every: int = 50,
    writer: MetricWriter | None = None,
    progress: Progress = no_progress,
    hooks: Sequence[Hook] = (),
    save: Callable[[int, TrainState], None] | None = None,
    checkpoint_every: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    tolerance: Tolerance = Tolerance(),
    machine: Machine = Machine(),
    tracer: Tracer = NoTracer(),
) -> FitResult:
    """Trains from `state.step` to `n_steps` updates.

    state: donated. batches: groups (n_jitted_steps, B, ...) as `mesh.dispatch_batches` gives them,
    the first of them for update `state.step`. step_fn: from `step.compile_step`. n_steps and every
    frequency: in updates, multiples of n_jitted_steps. What is logged at a step is the mean over
    the updates of its dispatch that were not skipped, not over the interval, so that a resumed run
    logs the same (but for `telemetry.MEASURED`).
    save: (step, state) -> None, every `checkpoint_every` updates (None: only at the end) and where
    `stop` becomes True, which is asked after each dispatch. tolerance: of bad updates; by default
    the first ends training. machine: what speeds are compared with. tracer: see `tracing`.
    Raises Diverged at a bad update that is not tolerated, without saving, and ValueError for a
    frequency that does not fit or batches that run out.
    """
    step = int(state.step)
    _check_frequencies(
        n_jitted_steps,
        {
            "n_steps": n_steps,
            "log_every": log_every,
            "checkpoint_every": checkpoint_every,
            "the step to go on from": step,
        }
        | {f"hooks[{i}].every": hook.every for i, hook in enumerate(hooks)},
    )
    writer = MultiWriter() if writer is None else writer
    journal = _Journal(writer, progress, log_every, n_steps, tolerance, machine)
    stopped = False
    while step < n_steps and not stopped:
        with journal.waiting():
            batch = _next(batches, step)
        with tracer(step):
            state, metrics = step_fn(state, batch)
        step += n_jitted_steps
        tracer.done(step, metrics)
        journal.add(step, metrics, images=jax.tree.leaves(batch)[0].shape[1])
        stopped = stop()
        due = [hook for hook in hooks if step % hook.every == 0]
        saving = save is not None and (
            stopped or step == n_steps or (checkpoint_every and step % checkpoint_every == 0)
        )
        if not due and not saving:
            journal.read(lag=_LAG)
            continue
        journal.read(lag=0)
        for hook in due:
            hook.run(step, state)
        journal.flush()
        if save is not None and saving:
            save(step, state)
        journal.restart_clock(step)
    journal.read(lag=0)
    journal.flush()
    return FitResult(state, finished=step >= n_steps)


class _Journal:
    """The metrics of dispatches, in order, until they are read, checked and written."""

    def __init__(
        self,
        writer: MetricWriter,
        progress: Progress,
        log_every: int,
        n_steps: int,
        tolerance: Tolerance,
        machine: Machine,
    ):
        self._writer = writer
        self._progress = progress
        self._log_every = log_every
        self._n_steps = n_steps
        self._tolerance = tolerance
        self._machine = machine
        self._unread: collections.deque[tuple[int, Metrics, int]] = collections.deque()
        self._clock: tuple[int, float] | None = None  # a step, and when it was done
        self._waited = 0.0  # seconds since then
        self._skipped = tolerance.so_far
        self._row = tolerance.row  # bad updates since the last good one

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        begun = time.monotonic()
        yield
        self._waited += time.monotonic() - begun

    def add(self, step: int, metrics: Metrics, images: int) -> None:
        """Notes the metrics (n,) of the dispatch that ends at `step`; `images` in an update."""
        for value in jax.tree.leaves(metrics):
            value.copy_to_host_async()
        self._unread.append((step, metrics, images))

    def read(self, lag: int) -> None:
        """Reads all but the newest `lag` dispatches, waiting for them. Raises Diverged."""
        while len(self._unread) > lag:
            step, metrics, images = self._unread.popleft()
            values = jax.device_get(metrics)
            good = values.pop("bad") == 0
            self._check(step, values, good)
            if step % self._log_every == 0:
                self._log(step, probes.scalars(values, good), images)
            if self._clock is None:  # from here on, so that compiling does not count
                self.restart_clock(step)

    def flush(self) -> None:
        self._writer.flush()

    def restart_clock(self, step: int) -> None:
        """Measures speed from `step`, just done: hooks and saves are not training."""
        self._clock = (step, time.monotonic())
        self._waited = 0.0

    def _check(self, step: int, values: dict[str, Any], good: np.ndarray) -> None:
        """Notes each bad update of a dispatch. Raises Diverged at one too many in a row."""
        for i, fine in enumerate(good):
            if fine:
                self._row = 0
                continue
            self._row += 1
            loss, norm = (float(values[name][i]) for name in ("loss", "grad_norm"))
            bad = BadUpdate(step - len(good) + i + 1, loss, norm)
            self._tolerance.note(bad)
            if self._row > self._tolerance.in_a_row:
                raise Diverged(bad, self._row)
            self._skipped += 1

    def _log(self, step: int, scalars: dict[str, float], images: int) -> None:
        if self._tolerance.in_a_row:
            scalars["skipped"] = self._skipped
        scalars |= self._machine.memory()
        left = {}
        if self._clock is not None and step > self._clock[0]:
            updates = step - self._clock[0]
            seconds = max(time.monotonic() - self._clock[1], 1e-9) / updates
            scalars |= self._machine.speed(images, seconds, self._waited / updates)
            left["seconds_left"] = (self._n_steps - step) * seconds
            self.restart_clock(step)
        self._writer.write_scalars(step, scalars)
        self._progress(step, scalars | left)


def _next(batches: Iterator[PyTree], step: int) -> PyTree:
    try:
        return next(batches)
    except StopIteration:
        raise ValueError(
            f"The batches ran out at step {step}; training needs an endless iterator."
        ) from None


def _check_frequencies(n_jitted_steps: int, frequencies: dict[str, int | None]) -> None:
    checks.at_least("n_jitted_steps", n_jitted_steps, 1)
    for name, value in frequencies.items():
        if value is None:
            continue
        checks.at_least(name, value, 0 if name.startswith("the step") else 1)
        if value % n_jitted_steps:
            raise ValueError(
                f"{name} must be a multiple of n_jitted_steps={n_jitted_steps}, the updates in one "
                f"dispatch; got {value}."
            )
