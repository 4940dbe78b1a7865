"""A run of training that is hit by one fault after another, each at a random moment.

A fault is a function of a `Victim` in the dict `FAULTS`: it starts the run, lets it come to some
point, harms it, and returns what it did when all its processes are over. Between two faults nothing
is mended but what no program can: a full disk is emptied. Faults that need several processes are
further entries of such a dict, with a `Victim` whose `start` starts them.
"""

import collections
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from diffjax.train.telemetry import read_jsonl
from tests import disk

SAVED, FULL = 3, 5  # exit codes


class Victim(NamedTuple):
    """start: starts the run, or goes on with it: a context manager of a Popen. rng: of the faults.

    every: steps from one checkpoint to the next. small: whether `workdir` is a disk of its own that
    may be filled.
    """

    start: Callable[..., Any]
    workdir: Path
    rng: random.Random
    every: int
    small: bool

    def checkpoints(self) -> list[Path]:
        """The whole ones, the oldest first."""
        found = (self.workdir / "checkpoints").glob("*")
        return sorted((p for p in found if p.name.isdecimal()), key=lambda p: int(p.name))

    def newest(self) -> int:
        """The step of the newest checkpoint; 0 without."""
        return max((int(path.name) for path in self.checkpoints()), default=0)

    def wait(self, process: Any, ready: Callable[[], bool], *, slow: bool = True) -> None:
        """Returns when `ready()`, which is asked often. Raises where the run ends before."""
        for _ in range(6000):
            if ready():
                return
            if process.poll() is not None:
                raise AssertionError(f"ended with {process.returncode}: {process.stderr.read()}")
            time.sleep(0.1 if slow else 0.01)
        raise AssertionError("the run does not get on")

    def begun(self, process: Any) -> None:
        """Returns when the run just started has dropped the lines that it will write again."""
        metrics = self.workdir / "metrics.jsonl"
        before = metrics.stat().st_ino if metrics.exists() else None
        self.wait(process, lambda: metrics.exists() and metrics.stat().st_ino != before)

    def get_on(self, process: Any) -> None:
        """Lets it train for up to some two checkpoints' time, and a moment more."""
        self.begun(process)
        goal = self.newest() + self.rng.randint(1, 2 * self.every)
        metrics = self.workdir / "metrics.jsonl"
        self.wait(process, lambda: bool(rows := read_jsonl(metrics)) and rows[-1]["step"] >= goal)
        time.sleep(self.rng.uniform(0, 0.2))


def kill(victim: Victim) -> str:
    """SIGKILL while it trains."""
    with victim.start() as process:
        victim.get_on(process)
        process.kill()
    return "killed while training"


def kill_early(victim: Victim) -> str:
    """SIGKILL within seconds from the start: while importing, restoring or compiling."""
    with victim.start() as process:
        time.sleep(victim.rng.uniform(0, 12))
        process.kill()
    return "killed while starting"


def kill_saving(victim: Victim) -> str:
    """SIGKILL while a checkpoint is written."""
    with victim.start() as process:
        victim.begun(process)  # and what an earlier kill left of a checkpoint is gone
        folder = victim.workdir / "checkpoints"
        victim.wait(process, lambda: any(folder.glob("*-tmp*")), slow=False)
        time.sleep(victim.rng.uniform(0, 0.05))
        process.kill()
    return "killed while saving"


def terminate(victim: Victim) -> str:
    """SIGTERM: saves, and leaves with the exit code of that."""
    with victim.start() as process:
        victim.get_on(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=300) == SAVED, process.stderr.read()
    assert victim.newest() >= read_jsonl(victim.workdir / "metrics.jsonl")[-1]["step"]
    return "terminated"


def fill(victim: Victim) -> str:
    """The disk is full: the run ends by itself, with the exit code of that; then there is room."""
    if not victim.small:
        return limit(victim)
    with victim.start() as process:
        victim.get_on(process)
        balloon = disk.fill(victim.workdir, leaving=victim.rng.randrange(60_000))
        try:
            _, errors = process.communicate(timeout=300)
        finally:
            balloon.unlink()
        assert process.returncode == FULL, (process.returncode, errors)
        assert "No space left on device" in errors
    return "disk filled"


def limit(victim: Victim) -> str:
    """No file may grow beyond a few kilobytes, which ends it as a full disk does."""
    limits = (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    refused = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)}
    with victim.start(**refused) as process:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == FULL, (process.returncode, errors)
    return "files limited in size"


def damage(how: str) -> Callable[[Victim], str]:
    """SIGKILL, and harm to a file of the newest checkpoint, where one is left to fall back to."""

    def fault(victim: Victim) -> str:
        done = kill(victim)
        found = victim.checkpoints()
        if len(found) < 2:
            return done
        # Orbax's own two files at the top hold nothing that is read.
        files = sorted(p for p in found[-1].rglob("*") if p.is_file())
        files = [p for p in files if p.parent != found[-1] or p.name == "manifest.json"]
        path = victim.rng.choice([p for p in files if p.stat().st_size])
        content = bytearray(path.read_bytes())
        if how == "truncated":
            path.write_bytes(content[: victim.rng.randrange(len(content))])
        elif how == "flipped":
            content[victim.rng.randrange(len(content))] ^= 1 << victim.rng.randrange(8)
            path.write_bytes(content)
        else:
            path.unlink()
        return f"checkpoint {how}"

    return fault


FAULTS: dict[str, Callable[[Victim], str]] = {
    "kill": kill,
    "kill early": kill_early,
    "kill saving": kill_saving,
    "terminate": terminate,
    "fill": fill,
    "flip": damage("flipped"),
    "truncate": damage("truncated"),
    "lose": damage("lost"),
}


def strike(
    victim: Victim, number: int, faults: dict[str, Callable[[Victim], str]] = FAULTS
) -> collections.Counter[str]:
    """So many faults in a row, each kind as often as the others; what happened, counted.

    Raises AssertionError where a run ends otherwise than it should, or has lost more than the steps
    since its last whole checkpoint.
    """
    names = [name for _ in range(-(-number // len(faults))) for name in faults]
    victim.rng.shuffle(names)
    tally: collections.Counter[str] = collections.Counter()
    for count, name in enumerate(names[:number], start=1):
        held = victim.newest()
        done = faults[name](victim)
        tally[done] += 1
        print(f"{count:3d} {done:24s} newest checkpoint {victim.newest()}", flush=True)
        if done.startswith("checkpoint"):
            held = int(victim.checkpoints()[-2].name)
        # A checkpoint set aside takes the run back by one, and no further.
        aside = {int(p.name.split(".")[0]) for p in victim.workdir.glob("checkpoints/*.damaged")}
        assert victim.newest() >= held or held in aside, (done, victim.newest(), held)
    return tally
