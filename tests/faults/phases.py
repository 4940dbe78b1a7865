"""Training of a toy that is killed at a chosen moment of a save; `test_phases` starts it.

python -m tests.faults.phases WORKDIR PHASE

The moments are calls on the file system, as Python's audit events tell of them, in the order in
which a save makes them: what Orbax calls its functions does not matter. PHASE is one of `PHASES`,
at which the process ends by SIGKILL, or "all": it then goes on and leaves a copy of the checkpoints
as they are at each call, WORKDIR/moments/<number>, which is what a process killed there leaves.
"""

import contextlib
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from diffjax.train import loop, mesh, state
from diffjax.train.checkpoint import Checkpointer
from tests.train import toy

EVERY, STRUCK, STEPS = 2, 6, 8  # a checkpoint every second step; the save of step 6; to step 8
BEFORE = STRUCK - EVERY

# Phase -> (event, how its first argument ends, the number of such events from `SAVE` on).
SAVE = f"checkpoints/{STRUCK}.orbax-checkpoint-tmp"
PHASES = {
    "before the data": ("os.mkdir", "/meta.orbax-checkpoint-tmp", 1),
    "in the data": ("open", "train.orbax-checkpoint-tmp/_METADATA", 1),
    "between data and manifest": ("tempfile.mkstemp", "", 1),
    "between manifest and name": ("os.rename", SAVE, 1),
    "before the old one goes": ("shutil.rmtree", f"checkpoints/{BEFORE}", 1),
    "while the old one goes": ("os.rmdir", "", 3),
}
CALLS = ("open", "tempfile.mkstemp", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


def train(workdir: Path, stop: int = STEPS):
    """Trains from the newest checkpoint to step `stop`, with one checkpoint kept; the state."""
    on = mesh.make_mesh(data=1)
    with Checkpointer(workdir, keep=1) as checkpointer:
        current = toy.new_state(on)
        if checkpointer.latest_step() is not None:
            current, _ = checkpointer.restore(state.abstract(current))

        def save(step, current):
            checkpointer.save(step, current, position={"step": step}, config={})
            checkpointer.wait()  # so that the calls belong to this save

        feed = toy.feed(on, start=int(current.step))
        options = toy.fit_kwargs(on) | {"save": save, "checkpoint_every": EVERY, "n_steps": stop}
        return loop.fit(current, feed, **options).state


def watch(directory: Path, event: str, end: str, count: int, strike: Callable[[], None]) -> None:
    """Calls `strike` before the `count`-th such event from the beginning of the struck save on."""
    begun, seen = False, 0

    def hook(name, arguments):
        nonlocal begun, seen
        if not begun and name == "os.mkdir":
            begun = str(arguments[0]) == str(directory / SAVE)
        if begun and name == event and str(arguments[0]).endswith(end):
            seen += 1
            if seen == count:
                strike()

    sys.addaudithook(hook)


def copy_all(directory: Path) -> None:
    """Copies the checkpoints before each call of the struck save, until it is over."""
    lock, copying, numbers = threading.RLock(), threading.local(), iter(range(10_000))
    begun = over = False

    def one(source, target):
        with contextlib.suppress(FileNotFoundError):  # written and renamed by other threads
            shutil.copy2(source, target)

    def hook(name, arguments):
        nonlocal begun, over
        if name not in CALLS or over or getattr(copying, "now", False):
            return
        if name == "open" and not arguments[2] & os.O_ACCMODE:
            return  # to read
        with lock:
            begun |= name == "os.mkdir" and str(arguments[0]) == str(directory / SAVE)
            over = (directory / f"checkpoints/{STRUCK + EVERY}").exists()
            if begun and not over:
                copying.now = True
                target = directory / "moments" / f"{next(numbers)}" / "checkpoints"
                shutil.copytree(directory / "checkpoints", target, copy_function=one)
                copying.now = False

    sys.addaudithook(hook)


def main(workdir: str, phase: str) -> None:
    directory = Path(workdir)
    if phase == "all":
        copy_all(directory)
        train(directory, STRUCK)
        return
    watch(directory, *PHASES[phase], strike=lambda: os.kill(os.getpid(), signal.SIGKILL))
    train(directory)


if __name__ == "__main__":
    main(*sys.argv[1:])
