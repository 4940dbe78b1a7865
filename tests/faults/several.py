"""Faults of a run of several processes, for `driver.strike` with a `Victim` of `started`.

Each fault starts as many processes as it likes, so that their number changes from one to the next.
"""

import contextlib
import functools
import itertools
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.faults.driver import FULL, SAVED, Victim
from tests.runs.group import Group, running

LOST = 4  # exit code
COUNTS = (1, 2, 4)
PEER_TIMEOUT = 10  # seconds


class _Said:
    """What the processes have written, read as from a pipe."""

    def __init__(self, group: Group):
        self._group = group

    def read(self) -> str:
        return self._group.everything()


class Several:
    """A group with what `Victim` asks of one process."""

    def __init__(self, group: Group):
        self.group, self.stderr = group, _Said(group)

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        """The exit code of the first that has ended."""
        codes = [process.poll() for process in self.group.processes]
        return next((code for code in codes if code is not None), None)


def starter(logs: Path, *command: str, devices: int = 2) -> Any:
    """`start` for a `Victim`: `start(count)` runs the command in so many processes."""
    numbers = itertools.count()

    @contextlib.contextmanager
    def start(count: int) -> Iterator[Several]:
        known = [*command, f"--peer_timeout={PEER_TIMEOUT}"]
        with running(logs / str(next(numbers)), count, *known, devices=devices) as group:
            yield Several(group)

    return start


def kill_one(victim: Victim, count: int = 2) -> str:
    """SIGKILL to one process: the others say why and end by themselves, in bounded time."""
    with victim.start(count) as run:
        victim.get_on(run)
        lost = victim.rng.randrange(count)
        run.group.kill(lost)
        began = time.monotonic()
        codes = run.group.wait(PEER_TIMEOUT + 80)
        others = [code for index, code in enumerate(codes) if index != lost]
        # Where the coordinator is gone the runtime may end a process first: an abort.
        assert all(code in (LOST, -6) for code in others), (codes, run.stderr.read())
        said = run.stderr.read()
        assert "lost touch with another" in said or "another task died" in said, said
        seconds = time.monotonic() - began
    return f"1 of {count} killed" if seconds < 60 else f"1 of {count} killed, slowly"


def limit_one(victim: Victim, count: int = 2) -> str:
    """One process may write no large file, as on a full disk: all end by themselves."""
    with victim.start(count) as run:
        victim.get_on(run)
        limited = victim.rng.randrange(count)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.prlimit(run.group.processes[limited].pid, resource.RLIMIT_FSIZE, (2000, hard))
        codes = run.group.wait(PEER_TIMEOUT + 120)
        others = [code for index, code in enumerate(codes) if index != limited]
        assert codes[limited] == FULL, (codes, limited, run.stderr.read())
        assert all(code in (LOST, -6) for code in others), (codes, limited, run.stderr.read())
    return f"1 of {count} limited"


def kill_all(victim: Victim, count: int = 2) -> str:
    """SIGKILL to all at once."""
    with victim.start(count) as run:
        victim.get_on(run)
        run.group.kill_all()
    return f"all of {count} killed"


def terminate_one(victim: Victim, count: int = 2) -> str:
    """SIGTERM to one process: all save at the same step and leave with the exit code of that."""
    with victim.start(count) as run:
        victim.get_on(run)
        run.group.terminate(victim.rng.randrange(count))
        codes = run.group.wait(120)
        assert codes == [SAVED] * count, (codes, run.stderr.read())
    return f"1 of {count} terminated"


FAULTS = {
    f"{fault.__name__} {count}": functools.partial(fault, count=count)
    for fault in (kill_one, terminate_one, kill_all)
    for count in COUNTS
    if count > 1 or fault is not kill_one
} | {"limit_one 2": limit_one}
