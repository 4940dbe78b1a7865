"""A profiler's trace of chosen steps, to be looked at in TensorBoard or Perfetto."""

import contextlib
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import jax

_log = logging.getLogger(__name__)


class Tracer(Protocol):
    """Told of each dispatch by the loop."""

    def __call__(self, step: int, /) -> AbstractContextManager[Any]:
        """What the dispatch that goes on from `step` runs in."""

    def done(self, step: int, figures: Any, /) -> None:
        """The dispatch up to `step` is on its way; `figures` are arrays of its last results."""


class NoTracer:
    """Traces nothing."""

    def __call__(self, step: int) -> AbstractContextManager[Any]:
        del step
        return contextlib.nullcontext()

    def done(self, step: int, figures: Any) -> None:
        del step, figures


class StepTracer:
    """Traces the updates after `first` up to `last` into `directory`; whole dispatches.

    first, last: steps, 0 <= first < last. Build it with `trace_steps`. Raises ValueError otherwise.
    """

    def __init__(self, directory: str | os.PathLike[str], first: int, last: int):
        if not 0 <= first < last:
            raise ValueError(
                f"Steps to profile go from one that is at least 0 to a later one; got {first}:"
                f"{last}. 100:105 traces the five updates after step 100."
            )
        self._directory, self._first, self._last = Path(directory), first, last
        self._running = False
        self.traced = 0  # dispatches

    def __call__(self, step: int) -> AbstractContextManager[Any]:
        if self._first <= step < self._last and not self._running:
            jax.profiler.start_trace(self._directory)
            self._running = True
        self.traced += self._running
        return jax.profiler.StepTraceAnnotation("update", step_num=step)

    def done(self, step: int, figures: Any) -> None:
        if self._running and step >= self._last:
            jax.block_until_ready(figures)
            self.close()

    def close(self) -> None:
        """Writes what was traced."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            _log.info("The trace of the steps is in %s.", self._directory)


@contextlib.contextmanager
def trace_steps(directory: str | os.PathLike[str], first: int, last: int) -> Iterator[StepTracer]:
    """A `StepTracer` that is closed on leaving, also by an error; warns where it traced nothing."""
    tracer = StepTracer(directory, first, last)
    try:
        yield tracer
    finally:
        tracer.close()
        if not tracer.traced:
            _log.warning("No update between steps %d and %d was made here: no trace.", first, last)
