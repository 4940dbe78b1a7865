"""A schedule that was searched for, and its file.

The file is JSON: the times, the times that the network is asked at, a solver's table, and where
they come from: the process, the solver, the method and the scores before and after on starts that
the search has not seen. Numbers are written with all their digits, and the file is either old or
new, never half written.

A schedule belongs to its process and its solver. `check_fits` refuses others: their numbers would
be right, and the samples worse than those of an ordinary grid.
"""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffjax.core import checks
from diffjax.core.files import write_atomic
from diffjax.core.pytree import replace
from diffjax.core.types import Array, DenoiseFn
from diffjax.processes.base import Process
from diffjax.search.aligner import Aligned, Held
from diffjax.search.space import Plan
from diffjax.solvers.base import Solver
from diffjax.solvers.grids import given

FORMAT = "diffjax schedule"
VERSION = 1


class ScheduleError(ValueError):
    """A file that is no schedule, or a schedule that does not fit."""


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """times: (n+1,). asked: (n+1,) or None. table: arrays of the solver by name, or None.

    process, solver, method: descriptions, see `describe`. before, after: the score of the grid that
    the search started from and of this one, on starts of their own; lower is better. evaluations:
    calls of the denoiser on a batch that the search took.
    """

    times: Array
    process: dict[str, Any]
    solver: dict[str, Any]
    method: dict[str, Any]
    before: float
    after: float
    evaluations: int
    asked: Array | None = None
    table: dict[str, Array] | None = None

    def __post_init__(self):
        given(self.times)
        if self.asked is not None:
            if self.asked.shape != self.times.shape:
                raise ScheduleError(
                    f"asked must be one time for each of the grid's, {self.times.shape}; got shape "
                    f"{self.asked.shape}."
                )
            checks.non_negative("asked", self.asked)

    def denoiser(self, denoise: DenoiseFn, process: Process) -> DenoiseFn:
        """`denoise` asked at the schedule's times; itself where they are the grid's."""
        return aligned(denoise, process, self.times, self.asked)

    def with_table(self, solver: Solver) -> Solver:
        """The solver with the schedule's table. Raises ScheduleError where it takes none."""
        if self.table is None:
            return solver
        if not self.table.keys() <= getattr(solver, "__dataclass_fields__", {}).keys():
            raise ScheduleError(
                f"The schedule has a table of {', '.join(self.table)}, which "
                f"{type(solver).__name__} does not take; use the solver that it was searched for, "
                f"{self.solver.get('name')}."
            )
        return replace(solver, **self.table)

    def check_fits(self, process: Process, solver: Solver) -> None:
        """Raises ScheduleError for another process or solver than it was searched for."""
        for name, own, other in (
            ("process", self.process, describe(process)),
            ("solver", self.solver, describe(solver)),
        ):
            if not _same(own, other):
                raise ScheduleError(
                    f"The schedule was searched for the {name} {json.dumps(own)}; got "
                    f"{json.dumps(other)}. Use that one, or search again."
                )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file, whole or not at all."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "times": _numbers(self.times),
            "asked": None if self.asked is None else _numbers(self.asked),
            "table": None
            if self.table is None
            else {name: np.asarray(leaf).tolist() for name, leaf in self.table.items()},
            "process": self.process,
            "solver": self.solver,
            "method": self.method,
            "before": self.before,
            "after": self.after,
            "evaluations": self.evaluations,
        }
        write_atomic(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def load_schedule(path: str | os.PathLike[str]) -> Schedule:
    """Reads `Schedule.save`'s file. Raises ScheduleError for anything else."""
    try:
        content = json.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise ScheduleError(f"There is no schedule at {path}.") from error
    except (OSError, ValueError) as error:
        raise ScheduleError(f"{path} is not JSON text, so no schedule: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ScheduleError(f"{path} is no schedule: its format is not {FORMAT!r}.")
    if content.get("version") != VERSION:
        raise ScheduleError(
            f"{path} is of version {content.get('version')}; this reads version {VERSION}."
        )
    try:
        fields = {f.name: content[f.name] for f in dataclasses.fields(Schedule)}
        fields["times"] = given(fields["times"])
        if fields["asked"] is not None:
            fields["asked"] = jnp.asarray(fields["asked"], fields["times"].dtype)
        if fields["table"] is not None:
            fields["table"] = {name: jnp.asarray(v) for name, v in fields["table"].items()}
        return Schedule(**fields)
    except KeyError as error:
        raise ScheduleError(f"{path} lacks the field {error}.") from error
    except (TypeError, ValueError) as error:
        raise ScheduleError(f"{path} holds no valid schedule: {error}") from error


def aligned(
    denoise: Any, process: Process, times: Array, asked: Array | None, held: Held | None = None
) -> Any:
    """`denoise` asked at `asked` in place of `times`, or as it is for None.

    held: as of `Aligned`; None is `held_for(process)`.
    """
    if asked is None:
        return denoise
    return Aligned(denoise, process, times, asked, held or held_for(process))


def held_for(process: Process) -> Held:
    """The network's answer to keep: x0 where the start has alpha = 0 (a flow at t = 1), else eps.

    Raises ValueError inside `jit`, where the process's numbers are unknown.
    """
    alpha = checks.evaluated(lambda: process.coeffs(jnp.asarray(process.t_max)).alpha)
    if alpha is None:
        raise ValueError(
            "Inside jit it is unknown whether the process starts with alpha = 0: align the "
            "denoiser outside, or say held='x0' (or 'eps') to diffjax.search.aligned."
        )
    return "x0" if (alpha == 0).any() else "eps"


def describe(value: Any) -> Any:
    """A value of this library as JSON: its class's name, its fields and theirs.

    Arrays become lists, callables their names, infinities and NaN text.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"name": type(value).__name__, **fields}
    if isinstance(value, (tuple, list)):
        return [describe(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return _listed(np.asarray(value, np.float64).tolist())


def _listed(numbers: Any) -> Any:
    if isinstance(numbers, list):
        return [_listed(item) for item in numbers]
    return numbers if math.isfinite(numbers) else str(numbers)


def _same(a: Any, b: Any) -> bool:
    """Whether two descriptions agree, numbers to float32's rounding."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12)
    return a == b


def _numbers(values: Array) -> list[float]:
    return np.asarray(values, np.float64).tolist()


def of_plan(plan: Plan, process: Process, method: Any, **scores: Any) -> Schedule:
    """The schedule of a plan."""
    return Schedule(
        times=plan.times,
        asked=plan.asked,
        table=plan.table,
        process=describe(process),
        solver=describe(plan.solver),
        method=describe(method),
        **scores,
    )
