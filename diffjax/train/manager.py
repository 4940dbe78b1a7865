"""Orbax's manager of checkpoints, changed where several processes would wait for ever.

Two things: whether to stop is asked elsewhere, by those who number their questions; and a process
whose own save failed is told so, though the others wait for it in the middle of theirs. It then
ends, and they, having lost it, do too.
"""

import threading
from collections.abc import Callable

import jax
import orbax.checkpoint as ocp


class Manager(ocp.CheckpointManager):
    """Orbax's, but for what several processes need."""

    _failure: Exception | None = None  # of a save, in this process

    def reached_preemption(self, step: int) -> bool:
        """Leaves JAX's preemption service alone: whether to stop is the caller's to ask.

        The service takes the number it is asked for last as the step where a process is. Orbax asks
        for that of the checkpoint, also from the thread that ends a save, when the run is steps
        further, or after a rollback when it counts otherwise: the processes would then agree on a
        step that lies behind one of them, which would never stop.
        """
        del step
        return False

    def wait_until_finished(self) -> None:
        """Raises at once what failed here: the others, where all went well, wait for this one."""
        if jax.process_count() == 1:
            super().wait_until_finished()
            return
        done: list[Exception | None] = []

        def wait(finish: Callable[[], None] = super().wait_until_finished) -> None:
            try:
                finish()
                done.append(None)
            except Exception as error:
                done.append(error)

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        while thread.is_alive() and self._failure is None:
            thread.join(0.02)
        failure = self._failure or done[0]
        if failure is not None:
            raise failure

    def _wait_for_checkpointers(self) -> None:
        try:
            super()._wait_for_checkpointers()
        except Exception as error:
            self._failure = error
            raise
