"""Grids of times: n intervals from t_max down to an end.

Symbols: n intervals, i = 0..n; lam the log-SNR, sigma~ = sigma/alpha the noise level.

    uniform     t linear in i                                                                  (1)
    quadratic   sqrt(t) linear in i                                                            (2)
    log_snr     lam linear in i                                                                (3)
    karras      sigma~^(1/rho) linear in i                                                     (4)

Where the process has sigma(0) = 0, a grid ends at 0. (1) and (2) reach it evenly; (3) and (4) put n
points from t_max to t_min and then 0, so a solver evaluates at t_min last, as EDM does. A process
that keeps noise at 0 (VE) ends at t_min with n intervals: finish with `Tweedie()`. `end=` decides
otherwise, and must be given inside `jit`, where the process's numbers are unknown.

Each returns (n+1,) times in the default float dtype, strictly decreasing, with the ends exact.

The reference code [4] asks the network at N points from 1 to a cut-off, and takes the last step,
from the cut-off on, without noise. Here that is

    uniform(process, N - 1, end=cut-off) with final=Tweedie()                                   (5)

whose N calls are at the same times. What differs:

- The last step is E[x0 | x] in place of the predictor's mean: the same for VE and for the ancestral
  rule; for Euler-Maruyama at 1e-3 the score's coefficient is 1.10e-4 in place of 1.20e-4 (VP).
- The reference's Euler-Maruyama steps by 1/N whatever the spacing: the same for VP's cut-off 1e-3
  and N = 1000.
- It tables VE's levels at k/(N - 1), up to 1e-5 below the times of its grid: 1e-4 of sigma.

On `Tabulated.ddpm(N)` the times of (5) with end = 1/N are the trained levels (k + 1)/N, from k =
N - 1 to 0. The reference finds k by truncating t (N - 1), one too high for all points i with i
times the cut-off at 1 or more: none at N = 1000 and 1e-3, half of them at N = 2000.

A discretely trained network on 2N levels (P2000 of [4], table 1) is a process with twice the
levels, `Tabulated.ddpm(2000)` for VP, which halves the betas, or VE itself, under the labels of N:
`precondition.score_sde_vp(levels=1000)`, `score_sde_ve(levels=1000, rounded=False)`. Their labels
lie between those of training, within half a label of i/2.

References:
[1] Song, Meng, Ermon, "Denoising Diffusion Implicit Models", 2020,
    https://arxiv.org/abs/2010.02502, appendix D (quadratic).
[2] Lu et al., "DPM-Solver", 2022, https://arxiv.org/abs/2206.00927 (log-SNR).
[3] Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022,
    https://arxiv.org/abs/2206.00364, eq. 5 (rho).
[4] Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", 2021,
    https://arxiv.org/abs/2011.13456, and its code, https://github.com/yang-song/score_sde.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from diffjax.core import checks
from diffjax.core.types import Array, Number
from diffjax.processes.base import Process
from diffjax.processes.calculus import inverse_log_snr
from diffjax.processes.calculus import log_snr as log_snr_at


def uniform(
    process: Process, n: int, *, t_max: Number | None = None, end: Number | None = None
) -> Array:
    """Eq. (1): n equal steps from t_max to the end."""
    return _ramp(process, n, t_max, end, lambda t: t, lambda u: u)


def quadratic(
    process: Process, n: int, *, t_max: Number | None = None, end: Number | None = None
) -> Array:
    """Eq. (2) [1]: steps shrink towards the data."""
    return _ramp(process, n, t_max, end, jnp.sqrt, jnp.square)


def log_snr(
    process: Process,
    n: int,
    *,
    t_max: Number | None = None,
    t_min: Number | None = None,
    end: Number | None = None,
) -> Array:
    """Eq. (3) [2]: equal steps of the log-SNR, the natural grid of exponential integrators."""
    to_time = lambda lam: inverse_log_snr(process, lam)  # noqa: E731
    return _nodes(process, n, t_max, t_min, end, lambda lam: lam, to_time)


def karras(
    process: Process,
    n: int,
    *,
    rho: Number = 7.0,
    t_max: Number | None = None,
    t_min: Number | None = None,
    end: Number | None = None,
) -> Array:
    """Eq. (4) [3]: rho = 7 is EDM's; larger values put more steps near the data."""
    checks.positive("rho", rho)
    return _nodes(
        process,
        n,
        t_max,
        t_min,
        end,
        lambda lam: jnp.exp(-lam / (2 * rho)),
        lambda u: inverse_log_snr(process, -2 * rho * jnp.log(u)),
    )


def given(times: Sequence[float] | Array) -> Array:
    """Your own times as a grid, (n+1,). Raises ValueError unless they decrease strictly."""
    grid = jnp.asarray(times, dtype=jnp.result_type(float))
    known = checks.concrete(grid)
    if grid.ndim != 1 or grid.shape[0] < 2:
        raise ValueError(f"times must have shape (n+1,) with n >= 1; got {grid.shape}.")
    if known is not None and not (np.diff(known) < 0).all():
        i = int((np.diff(known) >= 0).argmax())
        raise ValueError(
            f"times must decrease strictly; got times[{i + 1}] = {known[i + 1]} after {known[i]}."
        )
    return grid


class Padded(NamedTuple):
    """A grid with its first time repeated in front, (m+1,), and its number of real intervals."""

    times: Array
    n_steps: int


def padded(times: Array, bucket: int = 64) -> Padded:
    """A grid padded to a multiple of `bucket` intervals, for `sample(..., n_steps=)`.

    All grids of one bucket share one compiled program:

        times, n_steps = grids.padded(grids.karras(process, 18))
        draw(key, denoise, x, times, n_steps=n_steps, solver=solver, process=process)

    Padded intervals are skipped: they call and draw nothing, and the samples are those of the grid
    itself with its own `n_steps`, bit for bit. times: (n+1,). Returns m+1 times.
    """
    checks.at_least("bucket", bucket, 1)
    known = checks.concrete(times)
    # NumPy where it can be: a program for each length would be compiled otherwise.
    numpy: Any = jnp if known is None else np
    real = jnp.asarray(times) if known is None else known
    n = real.shape[0] - 1
    front = numpy.broadcast_to(real[0], (-n % bucket,))
    return Padded(jnp.asarray(numpy.concatenate([front, real])), n)


def _end(process: Process, end: Number | None) -> Number:
    """Where the grid ends: as given, else 0 where sigma(0) = 0, else t_min."""
    if end is not None:
        checks.non_negative("end", end)
        return end
    sigma = checks.evaluated(lambda: process.coeffs(jnp.asarray(0.0)).sigma)
    if sigma is None:
        raise ValueError(
            "Inside jit it is unknown whether the process reaches sigma = 0 at t = 0; say where "
            "the grid ends: end=0.0, or end=process.t_min."
        )
    return 0.0 if (sigma == 0).all() else process.t_min


def _ramp(
    process: Process,
    n: int,
    t_max: Number | None,
    end: Number | None,
    of_time: Callable[[Array], Array],
    to_time: Callable[[Array], Array],
) -> Array:
    """n intervals, linear in of_time(t), from t_max to the end."""
    checks.at_least("n", n, 1)
    start = process.t_max if t_max is None else t_max
    end = _end(process, end)
    checks.less("end", end, "t_max", start)
    dtype = jnp.result_type(float)
    first, last = jnp.asarray(start, dtype), jnp.asarray(end, dtype)
    times = to_time(jnp.linspace(of_time(first), of_time(last), n + 1))
    return times.at[0].set(first).at[-1].set(last)


def _nodes(
    process: Process,
    n: int,
    t_max: Number | None,
    t_min: Number | None,
    end: Number | None,
    of_log_snr: Callable[[Array], Array],
    to_time: Callable[[Array], Array],
) -> Array:
    """Times linear in of_log_snr(lam): t_max to t_min and then 0, or straight to an end > 0."""
    checks.at_least("n", n, 1)
    start = process.t_max if t_max is None else t_max
    low = process.t_min if t_min is None else t_min
    end = _end(process, end)
    dtype = jnp.result_type(float)
    jumps = isinstance(end, (int, float)) and end == 0
    last = low if jumps else end
    checks.less("the last node", last, "t_max", start)
    first, stop = jnp.asarray(start, dtype), jnp.asarray(last, dtype)
    ends = log_snr_at(process, jnp.stack([first, stop]))
    known = checks.concrete(ends)
    if known is not None and not np.isfinite(known).all():
        raise ValueError(
            f"The log-SNR must be finite at both ends; got {known[0]} at t = {start} and "
            f"{known[1]} at t = {last}. Pass t_max= or t_min= inside, or use grids.uniform."
        )
    count = n if jumps else n + 1
    if count == 1:
        nodes = first[None]
    else:
        levels = of_log_snr(ends)
        nodes = to_time(jnp.linspace(levels[0], levels[1], count))
        nodes = nodes.at[0].set(first).at[-1].set(stop)
    return jnp.concatenate([nodes, jnp.zeros((1,), dtype)]) if jumps else nodes
