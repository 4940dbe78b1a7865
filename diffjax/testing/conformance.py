"""What is promised of a solver, checked for one of your own: `check_solver`.

    report = check_solver(MySolver(), order=2)
    print(report)
    report.raise_if_failed()

Symbols: n intervals between two times whose noise levels sigma/alpha are 5 and 0.2, e(n) the median
error of a solve, p an order.

    order        deterministic: slope of ln e(n) on a mixture of Gaussians, against the flow by
                 Dormand and Prince's method at 1e-11; stochastic: slope of the error of mean and
                 covariance on Gaussian data, exact (`orders.propagate_moments`)
    uneven       deterministic: e(n) falls on a grid whose steps alternate 3 : 1
    round_trip   deterministic: up an increasing grid and down again falls to 0 with n
    moments      stochastic: mean and variance of samples on the alternating grid, within 4 standard
                 errors and twice the change from n/2 to n
    calls        the declared calls of the denoiser are those that run, for n = 1, 2 and 5
    times        no call at sigma = 0, or at a time that is not finite
    end          data of one point end at that point
    gradient     finite in x, the times and the solver's numbers, and not 0 in x
    batch        a sample depends on its own start and key, bit for bit
    retrace      other keys, times, numbers of the solver and of the process are one program

Each is a check of `diffjax.solvers.base`'s contract that a wrong solver fails. All runs on the CPU,
in float64 where an order is asked, and takes seconds.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core import checks, random
from diffjax.core.numerics import canonical
from diffjax.processes import VP, Process
from diffjax.solvers import Solver, sample
from diffjax.solvers.base import keeps_history
from diffjax.testing.case import PLAIN, ROUNDING, Case
from diffjax.testing.oracles import Gaussian, gaussian, mixture
from diffjax.testing.orders import median_error, order_of_convergence, propagate_moments


@dataclasses.dataclass(frozen=True)
class Check:
    """One finding. passed: None where it was left out or does not apply."""

    name: str
    passed: bool | None
    found: str
    wanted: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What `check_solver` found; `print` it for a table."""

    solver: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return all(check.passed is not False for check in self.checks)

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of the checks that failed."""
        return tuple(check.name for check in self.checks if check.passed is False)

    def raise_if_failed(self) -> None:
        """Raises AssertionError with the table if a check failed."""
        if not self.passed:
            raise AssertionError(str(self))

    def __str__(self) -> str:
        words = {True: "passed", False: "FAILED", None: "-"}
        rows = [("check", "", "found", "wanted")]
        rows += [(c.name, words[c.passed], c.found, c.wanted) for c in self.checks]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ("  ".join([*map(str.ljust, row, widths), row[3]]).rstrip() for row in rows)
        return "\n".join([self.solver, *lines])


def check_solver(
    solver: Solver,
    *,
    process: Process = VP(),
    order: float | None = None,
    dim: int = 4,
    steps: Sequence[int] = (64, 128, 256),
    skip: Collection[str] = (),
) -> Report:
    """Checks a solver against its contract; see the module's docstring.

    solver: a pytree. process: a Gaussian process with one schedule for all numbers.
    order: what you claim, within 0.2: the global order of a deterministic method, the weak order of
      a stochastic one. None asks only that errors fall at order 0.8, and of a stochastic method
      leaves the exact orders out: they need one-step methods, affine in x, without inner loops. Of
      a stochastic method with a history they are left out in any case.
    dim: D, numbers a sample. steps: n, each the double of the last.
    skip: names of checks to leave out: what your method does not promise.

    Raises ValueError for a name that is no check.
    """
    for name in skip:
        checks.one_of("skip", name, _CHECKS)
    case = Case(solver, process, order, dim, tuple(steps))
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        found = tuple(
            Check(name, None, "left out", "") if name in skip else _made(name, check, case)
            for name, check in _CHECKS.items()
        )
    return Report(repr(solver), found)


def _made(name: str, check: Callable[["Case"], Check], case: "Case") -> Check:
    """The check's finding; a solver that raises has failed."""
    try:
        return check(case)
    except Exception as error:  # whatever a solver may raise is a finding
        line = (str(error).splitlines() or [""])[0]
        return Check(name, False, f"{type(error).__name__}: {line}"[:100], "no error")


def _slope(case: Case, errors: Sequence[float]) -> float | None:
    """The order fitted to the errors above rounding; None where there are not two."""
    kept = [(n, e) for n, e in zip(case.steps, errors, strict=True) if not e < ROUNDING]
    return order_of_convergence(*zip(*kept, strict=True)) if len(kept) > 1 else None


def _judged(name: str, slope: float | None, order: float | None) -> Check:
    """A fitted order against the claim, or against 0.8 where nothing is claimed."""
    if slope is None:
        return Check(name, True, "exact", "order")
    if order is None:
        return Check(name, slope > 0.8, f"order {slope:.2f}", "order above 0.8")
    return Check(
        name, abs(slope - order) < 0.2, f"order {slope:.2f}", f"order {order:g} within 0.2"
    )


def _order(case: Case) -> Check:
    with jax.enable_x64(True):
        if case.solver.stochastic:
            return _weak_order(case)
        x, exact = case.flow
        oracle = mixture(case.dim, jnp.float64)
        errors = [median_error(case.between(x, case.times(n), oracle), exact) for n in case.steps]
        return _judged("order", _slope(case, errors), case.order)


def _weak_order(case: Case) -> Check:
    if case.order is None:
        return Check("order", None, "not claimed", "")
    if keeps_history(case.solver.init(case.process, case.start(1), jnp.asarray(case.span[0]))):
        return Check("order", None, "keeps a history", "")
    oracle, process = gaussian(case.dim, jnp.float64), case.process
    denoise = oracle.denoiser(process)

    @functools.partial(jax.jit, compiler_options=PLAIN)
    def run(times):
        start = oracle.marginal(process, times[0])
        return propagate_moments(case.solver, denoise, process, times, *start)

    exact = oracle.marginal(process, jnp.asarray(case.span[1]))
    found = [run(case.times(n)) for n in case.steps]  # padding would be steps of length 0
    gaps = [[float(jnp.linalg.norm(a - b)) for a, b in zip(m, exact, strict=True)] for m in found]
    slopes = [_slope(case, errors) for errors in zip(*gaps, strict=True)]
    worst = min((s for s in slopes if s is not None), default=None)
    return _judged("order", worst, case.order)


def _uneven(case: Case) -> Check:
    if case.solver.stochastic:
        return Check("uneven", None, "see moments", "")
    with jax.enable_x64(True):
        x, exact = case.flow
        oracle = mixture(case.dim, jnp.float64)
        errors = [
            median_error(case.between(x, case.uneven_times(n), oracle), exact) for n in case.steps
        ]
        return _judged("uneven", _slope(case, errors), None)


def _round_trip(case: Case) -> Check:
    if case.solver.stochastic:
        return Check("round_trip", None, "draws noise", "")
    with jax.enable_x64(True):
        oracle = mixture(case.dim, jnp.float64)
        x, errors = case.flow[1], []
        for n in case.steps:
            times = case.times(n)
            encoded = case.between(x, times[::-1], oracle)
            errors.append(median_error(case.between(encoded, times, oracle), x))
        return _judged("round_trip", _slope(case, errors), None)


def _moments(case: Case) -> Check:
    if not case.solver.stochastic:
        return Check("moments", None, "draws nothing", "")
    count = max(16384 // case.dim, 256)
    with jax.enable_x64(True):
        oracle, process = gaussian(case.dim, jnp.float64), case.process
        z = np.random.default_rng(2).standard_normal((count, case.dim))
        z = (z - z.mean(0)) / z.std(0)  # the start's own error taken out
        mean, covariance = oracle.marginal(process, jnp.asarray(case.span[0]))
        x = mean[None] + jnp.sqrt(jnp.diag(covariance))[None] * jnp.asarray(z)
        mean, covariance = oracle.marginal(process, jnp.asarray(case.span[1]))
        found = []
        for n in case.steps[-2:]:
            end = case.between(x, case.uneven_times(n), oracle)
            white = np.asarray((end - mean[None]) / jnp.sqrt(jnp.diag(covariance))[None])
            found.append(np.asarray([white.mean(), (white**2).mean() - 1]))
    size = white.size
    allowed = 4 * np.sqrt(np.asarray([1.0, 2.0]) / size) + 2 * np.abs(found[1] - found[0])
    return Check(
        "moments",
        bool((np.abs(found[1]) < allowed).all()),
        f"mean off by {found[1][0]:+.3f}, variance by {found[1][1]:+.3f}",
        f"within {allowed[0]:.3f} and {allowed[1]:.3f}",
    )


def _calls(case: Case) -> Check:
    oracle = gaussian(case.dim)
    found = {n: case.counted(n, oracle)[1:] for n in (1, 2, 5)}
    declared = [declared for declared, _ in found.values()]
    ran = [len(calls) for _, calls in found.values()]
    return Check("calls", declared == ran, f"{ran} ran", f"{declared} as declared")


def _times(case: Case) -> Check:
    calls = [t for n in (1, 5) for t in case.counted(n, gaussian(case.dim))[2]]
    times = np.concatenate([t.reshape(-1) for t in calls])
    sigma = np.asarray(case.process.coeffs(jnp.asarray(times)).sigma)
    good = np.isfinite(times).all() and (sigma > 0).all()
    return Check("times", bool(good), f"sigma from {sigma.min():.3g}", "sigma > 0 at every call")


def _end(case: Case) -> Check:
    point = gaussian(case.dim).mean
    oracle = Gaussian(point, jnp.zeros_like(point))
    gap = max(float(jnp.max(jnp.abs(case.counted(n, oracle)[0] - point[None]))) for n in (1, 5))
    return Check("end", gap < 1e-4, f"{gap:.1e} from the data", "below 1e-4")


def _gradient(case: Case) -> Check:
    denoise = gaussian(case.dim).denoiser(case.process)

    @functools.partial(jax.jit, compiler_options=PLAIN)
    @functools.partial(jax.grad, argnums=(0, 1, 2), allow_int=True)
    def slopes(x, times, solver):
        end = sample(
            jax.random.key(1),
            denoise,
            x,
            times,
            solver=solver,
            process=case.process,
            final=case.final,
        ).x
        return jnp.sum(end**2)

    x = case.start(4).astype(jnp.float32)
    found = slopes(x, case.whole_times(5), canonical(case.solver))
    reals = [leaf for leaf in jax.tree.leaves(found) if leaf.dtype != jax.dtypes.float0]
    finite = all(bool(np.isfinite(leaf).all()) for leaf in reals)
    largest = float(jnp.max(jnp.abs(found[0])))
    words = f"{'finite' if finite else 'not finite'}, {largest:.1e} in x"
    return Check("gradient", finite and largest > 0, words, "finite, not 0 in x")


def _batch(case: Case) -> Check:
    denoise = gaussian(case.dim).denoiser(case.process)
    times = case.whole_times(5)

    @functools.partial(jax.jit, compiler_options=PLAIN)
    def run(keys, x):
        return sample(
            keys,
            denoise,
            x,
            times,
            solver=case.solver,
            process=case.process,
            final=case.final,
        ).x

    keys = random.sample_keys(jax.random.key(1), 8)
    other = random.sample_keys(jax.random.key(2), 8)
    x = case.start(8).astype(jnp.float32)
    whole = np.asarray(run(keys, x))
    fewer = np.array_equal(whole[:5], run(keys[:5], x[:5]))
    beside = run(jnp.concatenate([other[:-1], keys[-1:]]), x.at[:-1].multiply(-1.7))
    alone = np.array_equal(whole[-1], beside[-1])
    words = [word for word, good in (("batch size", fewer), ("neighbours", alone)) if not good]
    return Check("batch", not words, f"depends on {' and '.join(words) or 'neither'}", "neither")


def _retrace(case: Case) -> Check:
    traces: list[None] = []
    denoise = gaussian(case.dim)

    def run(key, x, times, solver, process):
        traces.append(None)
        return sample(
            key,
            denoise.denoiser(process),
            x,
            times,
            solver=solver,
            process=process,
            final=case.final,
        ).x

    # Traced and lowered to count programs; nothing is computed.
    program = jax.jit(run)
    x, times = case.start(8).astype(jnp.float32), case.whole_times(5)
    for i in range(5):
        jax.eval_shape(
            program,
            jax.random.key(i),
            x,
            times,
            _other_numbers(canonical(case.solver), i),
            _shifted(canonical(case.process), i),
        )
    return Check("retrace", len(traces) == 1, f"{len(traces)} traces of 5 solves", "1")


def _shifted(tree: Any, i: int) -> Any:
    """The tree with other real numbers."""

    def shift(leaf):
        real = isinstance(leaf, float) or jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        return leaf * (1 - 0.01 * i) if real else leaf

    return jax.tree.map(shift, tree)


def _other_numbers(solver: Any, i: int) -> Any:
    """The solver with other numbers, also in static fields that hold reals, which none may."""
    shifted = copy.copy(_shifted(solver, i))  # without leaves it is the caller's own
    paths, _ = jax.tree_util.tree_flatten_with_path(solver)
    leaves = {getattr(path[0], "name", None) for path, _ in paths if path}
    for name, value in getattr(shifted, "__dict__", {}).items():
        if name not in leaves and isinstance(value, float):
            object.__setattr__(shifted, name, value * (1 - 0.01 * i))
    return shifted


_CHECKS: dict[str, Callable[[Case], Check]] = {
    "order": _order,
    "uneven": _uneven,
    "round_trip": _round_trip,
    "moments": _moments,
    "calls": _calls,
    "times": _times,
    "end": _end,
    "gradient": _gradient,
    "batch": _batch,
    "retrace": _retrace,
}

__all__ = ["Check", "Report", "check_solver"]
