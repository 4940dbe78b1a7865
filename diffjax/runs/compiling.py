"""How long compiling took, and how long it would have taken without the cache on disk."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

_COMPILE = "/jax/core/compile/backend_compile_duration"  # with what is read from the cache
_SAVED = "/jax/compilation_cache/compile_time_saved_sec"
_HIT = "/jax/compilation_cache/cache_hits"


class Compiling:
    """Counts of a time in which it listened: programs, those read from the cache, and seconds.

    seconds: spent on compiling and reading. saved: what compiling the programs that were read had
    taken when they were written, which JAX notes in whole seconds, less the reading.
    """

    def __init__(self) -> None:
        self.programs = 0
        self.read = 0
        self.seconds = 0.0
        self.saved = 0.0

    def on_event(self, event: str, **details: Any) -> None:
        """For `jax.monitoring`."""
        del details
        self.read += event == _HIT

    def on_duration(self, event: str, duration_secs: float, **details: Any) -> None:
        """For `jax.monitoring`."""
        del details
        if event == _COMPILE:
            self.programs += 1
            self.seconds += duration_secs
        if event == _SAVED:
            self.saved += duration_secs

    def line(self) -> str:
        """One line for people."""
        text = f"Compiling took {self.seconds:.1f} s"
        directory = jax.config.values["jax_compilation_cache_dir"]
        if directory is None:
            return f"{text}, without a cache."
        return (
            f"{text}; {self.read} of {self.programs} programs came from the cache in {directory}, "
            f"which saved {max(self.saved, 0.0):.1f} s."
        )


@contextlib.contextmanager
def counted() -> Iterator[Compiling]:
    """Listens while inside."""
    found = Compiling()
    jax.monitoring.register_event_listener(found.on_event)
    jax.monitoring.register_event_duration_secs_listener(found.on_duration)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_listener(found.on_event)
        jax.monitoring.unregister_event_duration_listener(found.on_duration)
