"""What a run does about updates whose loss or gradient is not finite, and what it writes down.

config.training.on_divergence says what is done, and config.training.divergence_limit, L below, how
often:

    stop        the first bad update ends the run; its last checkpoint stays.
    skip        a bad update leaves all but the step as it was, decided on the device: the next one
                has the next batch and the next key. More than L in a row end the run, also where it
                was killed among them and went on.
    rollback    the run goes back to its newest checkpoint and on from there with the batches after
                the bad one. More than L times to the same checkpoint end the run.

Rolling back shifts the data and not the keys. Symbols: update n (counted from 0) takes the key
fold_in(key, n), always, and batch b(n). It begins with b(n) = n; when update m was bad and the
newest checkpoint is of step c, then from there on

    b(n) = n + (b(m) + 1 - c)      for n >= c                                                (1)

so the bad batch and those since the checkpoint are left out, and each batch meets another key than
it would have: both what the images and what the draws brought about is gone. The shifts are in
`diverged/shifts.json`, the one place that says them, and the data of every update follow from it;
a checkpoint carries a copy, which tells the way that led to it. So a run that is killed and goes on
takes the same batches.

    workdir/diverged/<step>.json     a bad update: its figures, key, batch and the images in it
    workdir/diverged/shifts.json     [[c, shift], ...], increasing in c

`diffjax.runs.replay` repeats an update from these.
"""

import dataclasses
import itertools
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from diffjax.core.files import write_atomic
from diffjax.core.types import Key
from diffjax.runs import hosts
from diffjax.runs.workdir import RunError
from diffjax.train.loop import BadUpdate, Diverged, FitResult, Tolerance

POLICIES = ("stop", "skip", "rollback")
DIRECTORY = "diverged"

_log = logging.getLogger(__name__)

Shifts = tuple[tuple[int, int], ...]  # (c, shift), increasing in c


class Policy(NamedTuple):
    """name: of POLICIES. limit: L of the module's docstring."""

    name: str = "stop"
    limit: int = 10


def build_policy(config: Any) -> Policy:
    """The policy of a config. Raises RunError."""
    section = dict(config.training)
    policy = Policy(section.get("on_divergence", "stop"), section.get("divergence_limit", 10))
    if policy.name not in POLICIES:
        raise RunError(
            f"config.training.on_divergence must be one of {', '.join(POLICIES)}; got "
            f"{policy.name!r}."
        )
    if not isinstance(policy.limit, int) or policy.limit < 1:
        raise RunError(
            "config.training.divergence_limit counts bad updates or rollbacks, at least 1; got "
            f"{policy.limit!r}. on_divergence = 'stop' ends at the first."
        )
    return policy


def batch_number(shifts: Shifts, n: int) -> int:
    """b(n), eq. (1)."""
    return n + next((shift for c, shift in reversed(shifts) if n >= c), 0)


def past(shifts: Shifts, back_to: int, bad: int) -> Shifts:
    """The shifts after update `bad` (from 0) was bad and the run went back to step `back_to`."""
    kept = tuple(s for s in shifts if s[0] < back_to)
    return (*kept, (back_to, batch_number(shifts, bad) + 1 - back_to))


def leads_to(shifts: Shifts, checkpoint: int, own: Shifts) -> bool:
    """Whether a run with `shifts` comes by a checkpoint of a step that was reached with `own`."""

    def before(some: Shifts) -> list[tuple[int, int]]:
        return [s for s in some if s[0] < checkpoint]

    return before(shifts) == before(own)


def as_shifts(rows: Any) -> Shifts:
    """From JSON."""
    return tuple((int(c), int(shift)) for c, shift in rows)


@dataclasses.dataclass(frozen=True)
class Shifted:
    """The batches b(0), b(1), ... of a sequence of batches."""

    batches: Any
    shifts: Shifts

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, n: int) -> Any:
        return self.batches[batch_number(self.shifts, n)]


class Course:
    """The way of one run through its bad updates. Build it once a call of `train`.

    batches: `data.TrainBatches`. updates: n_jitted_steps, the updates of a dispatch.
    """

    def __init__(self, policy: Policy, workdir: Path, batches: Any, updates: int = 1):
        self._policy = policy
        self._directory = workdir / DIRECTORY
        self._batches = batches
        self._updates = updates
        self._shifts: Shifts = ()
        self._key: dict[str, Any] = {}
        self._broken: Diverged | None = None  # what the run has to go back from
        self._back: list[int] = []  # checkpoints gone back to, one after another

    def run(self, attempt: Callable[[], FitResult]) -> FitResult:
        """Calls `attempt`, again after each rollback. Raises Diverged.

        attempt: trains from the newest checkpoint on; having read it, it calls `begin`.
        """
        while True:
            try:
                return attempt()
            except Diverged as error:
                # `begin` raises the same one again where it is too often.
                if self._policy.name != "rollback" or error is self._broken:
                    raise
                # Without its frames, which hold a state's memory.
                self._broken = error.with_traceback(None)

    def begin(self, start: int, key: Key, position: Any = None) -> Shifted:
        """The batches of an attempt that goes on from step `start` with the run's key.

        position: of the checkpoint. Raises Diverged after too many rollbacks.
        """
        # Numbers, because the step takes the key's memory over.
        data = np.asarray(jax.random.key_data(key)).tolist()
        self._key = {"impl": str(jax.random.key_impl(key)), "data": data}
        if self._broken is None:
            self._shifts = self._read(position)
        else:
            self._go_back(start, self._broken)
            self._broken = None
        return Shifted(self._batches, self._shifts)

    def position(self, step: int) -> dict[str, Any]:
        """Where the data stand before update `step`, for a checkpoint."""
        return self._batches.position(step) | {"shifts": [list(s) for s in self._shifts]}

    def tolerance(self, start: int) -> Tolerance:
        """For `train.loop.fit` from step `start`."""
        if self._policy.name != "skip":
            return Tolerance(note=self._dump)
        # What was bad is on record before the checkpoint behind it is saved.
        bad = {step for step in dumped(self._directory.parent) if step <= start}
        row = next(n for n in itertools.count() if start - n not in bad)
        return Tolerance(self._policy.limit, so_far=len(bad), row=row, note=self._dump)

    def _read(self, position: Any) -> Shifts:
        path = self._directory / "shifts.json"
        if path.exists():
            return as_shifts(json.loads(path.read_text(encoding="utf-8")))
        return as_shifts((position or {}).get("shifts", ()))

    def _go_back(self, start: int, error: Diverged) -> None:
        self._back = [c for c in self._back if c == start] + [start]
        if len(self._back) > self._policy.limit:
            _log.warning("Went back to step %d %d times.", start, self._policy.limit)
            raise error
        self._shifts = past(self._shifts, start, error.step - 1)
        if hosts.is_first():
            text = json.dumps([list(s) for s in self._shifts])
            write_atomic(self._directory / "shifts.json", text + "\n")
        number = batch_number(self._shifts, start)
        _log.warning("%s: back to step %d, on with batch %d.", error.bad, start, number)

    def _dump(self, bad: BadUpdate) -> None:
        """Writes diverged/<step>.json, in the first process."""
        if not hosts.is_first():
            return
        number = batch_number(self._shifts, bad.step - 1)
        whole = dataclasses.replace(self._batches, process_index=0, process_count=1)
        found = {
            "step": bad.step,
            "policy": self._policy.name,
            # As text: JSON has no nan.
            "loss": repr(bad.loss),
            "grad_norm": repr(bad.grad_norm),
            "key": self._key,
            "batch": number,
            "images": whole.indices(number).tolist(),
            "shifts": [list(s) for s in self._shifts],
            "n_jitted_steps": self._updates,
        }
        path = self._directory / f"{bad.step}.json"
        write_atomic(path, json.dumps(found, indent=2) + "\n")
        _log.warning(
            "%s; see %s. `diffjax replay --workdir=%s --step=%d` repeats it.",
            bad,
            path,
            self._directory.parent,
            bad.step,
        )


def dumped(workdir: Path) -> Sequence[int]:
    """The steps of the bad updates that a workdir has on record."""
    found = (workdir / DIRECTORY).glob("*.json")
    return sorted(int(path.stem) for path in found if path.stem.isdigit())


def read_dump(workdir: Path, step: int) -> dict[str, Any] | None:
    """What diverged/<step>.json says; None where there is none."""
    path = workdir / DIRECTORY / f"{step}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def read_shifts(workdir: Path, step: int) -> Shifts:
    """The shifts that update `step`, from 1, was made with: a bad one's own, else the latest."""
    dump = read_dump(workdir, step)
    if dump is not None:
        return as_shifts(dump["shifts"])
    path = workdir / DIRECTORY / "shifts.json"
    return as_shifts(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else ()
