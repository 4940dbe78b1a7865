"""The model's statistics that DPM-Solver-v3 steps by, estimated from samples.

Symbols: lam the half log-SNR, ' = d/dlam along the probability flow, n samples x of the noised data
at each of K levels, v random signs, f and l, s, b of `diffjax.solvers.dpm_v3`.

    l = mean v (sigma d eps/dx v)                                                              (1)
    s = Cov(f, f')/Var(f),   b = mean f' - s mean f                                            (2)

element by element. (1) is Hutchinson's estimate of a diagonal; f' is one Jacobian-vector product
along (x', 1) with l' from the neighbouring levels. So a level costs two of them a sample, about
four calls. All levels share their draws, so l, s, b are smooth in lam for few samples too. Where f
hardly varies, as for Gaussian data, s is 0 and b the mean of f'.

Reference: Zheng et al., "DPM-Solver-v3: Improved Diffusion ODE Solver with Empirical Model
Statistics", 2023, https://arxiv.org/abs/2310.13268, section 3.1 and appendix C.
"""

import functools
import io
import os
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core import checks, random
from diffjax.core.files import write_atomic
from diffjax.core.numerics import at_least_float32, batch_size, combine
from diffjax.core.types import Array, DenoiseFn, Key, Number, PyTree
from diffjax.processes.base import Process
from diffjax.processes.calculus import inverse_log_snr, log_snr, perturb, velocity
from diffjax.solvers.dpm_v3 import ModelStatistics


def model_statistics(
    key: Key,
    denoise: DenoiseFn,
    process: Process,
    x0: PyTree,
    *,
    levels: int = 120,
    t_max: Number | None = None,
    t_min: Number | None = None,
) -> ModelStatistics:
    """Estimates eqs. (1) and (2) at `levels` equal steps of lam from t_max to t_min.

    x0: (n, *data), a tree: images of the data set or of the model, some hundreds. All n are
    in memory with their derivatives at once, a level after the other. t_max, t_min: the process's
    by default; alpha(t_max) must be positive. Raises ValueError for a range without a log-SNR.
    """
    checks.at_least("levels", levels, 2)
    x0 = at_least_float32(x0)
    keys = random.sample_keys(key, batch_size(x0))
    ends = jnp.asarray(
        [process.t_max if t_max is None else t_max, process.t_min if t_min is None else t_min],
        jax.tree.leaves(x0)[0].dtype,
    )
    first, last = log_snr(process, ends) / 2
    known = checks.concrete(jnp.stack([first, last]))
    if known is not None and not (np.isfinite(known).all() and known[0] < known[1]):
        raise ValueError(
            "The half log-SNR must be finite and grow from t_max to t_min; got "
            f"{known.tolist()} at {ends.tolist()}. Pass t_max= below the start, or t_min= above 0."
        )
    lam = jnp.linspace(first, last, levels)
    ell = jax.lax.map(lambda lam: _slope(denoise, process, keys, x0, lam), lam)
    d_ell = jax.tree.map(lambda leaf: jnp.gradient(leaf, lam[1] - lam[0], axis=0), ell)
    s, b = jax.lax.map(
        lambda level: _regression(denoise, process, keys, x0, *level), (lam, ell, d_ell)
    )
    return ModelStatistics(lam, ell, s, b)


def _noised(process: Process, keys: Key, x0: PyTree, lam: Array) -> tuple[PyTree, Array]:
    """x at lam, and its time."""
    t = inverse_log_snr(process, 2 * lam)
    return perturb(process, x0, t, random.normal_like(keys, "statistics", x0)), t


def _slope(denoise: DenoiseFn, process: Process, keys: Key, x0: PyTree, lam: Array) -> PyTree:
    """l at one level, eq. (1), each leaf (*data)."""
    x, t = _noised(process, keys, x0, lam)
    v = random.rademacher_like(keys, "signs", x)
    _, change = jax.jvp(lambda x: denoise(x, t).eps, (x,), (v,))
    sigma = process.coeffs(t).sigma
    return jax.tree.map(lambda v, dv: jnp.mean(sigma.astype(v.dtype) * v * dv, axis=0), v, change)


def _regression(
    denoise: DenoiseFn,
    process: Process,
    keys: Key,
    x0: PyTree,
    lam: Array,
    ell: PyTree,
    d_ell: PyTree,
) -> tuple[PyTree, PyTree]:
    """(s, b) at one level, eq. (2), each leaf (*data)."""
    x, t = _noised(process, keys, x0, lam)
    rate = jax.jvp(lambda t: log_snr(process, t) / 2, (t,), (jnp.ones_like(t),))[1]

    def f_of(x, t):
        """f with l moving along lam."""
        alpha, _, sigma = process.coeffs(t)
        ahead = log_snr(process, t) / 2 - lam

        def of(eps, x, ell, d_ell):
            return (sigma.astype(x.dtype) * eps - (ell + ahead * d_ell)[None] * x) / alpha.astype(
                x.dtype
            )

        return jax.tree.map(of, denoise(x, t).eps, x, ell, d_ell)

    along = velocity(process, denoise(x, t), t)
    f, change = jax.jvp(f_of, (x, t), (along, jnp.ones_like(t)))
    change = combine((1 / rate, change))
    alpha = process.coeffs(t).alpha

    def slope_of(f, change, x):
        mean = functools.partial(jnp.mean, axis=0, keepdims=True)
        centred = f - mean(f)
        variance = mean(centred**2)
        # Below the rounding of its terms, which are as large as x/alpha, f does not vary.
        rounding = jnp.finfo(f.dtype).eps / alpha.astype(f.dtype)
        enough = variance > 1e4 * rounding**2 * mean(x**2)
        covariance = mean(centred * (change - mean(change)))
        return jnp.where(enough, covariance / jnp.where(enough, variance, 1), 0)[0]

    s = jax.tree.map(slope_of, f, change, x)
    b = jax.tree.map(lambda s, f, change: jnp.mean(change, 0) - s * jnp.mean(f, 0), s, f, change)
    return s, b


def save_statistics(path: str | os.PathLike[str], statistics: ModelStatistics) -> None:
    """Writes an `.npz`, whole or not at all; of an x that is one array, such as images."""
    parts = {name: getattr(statistics, name) for name in ("lam", "ell", "s", "b")}
    for name, tree in parts.items():
        if not jax.tree_util.treedef_is_leaf(jax.tree.structure(tree)):
            raise ValueError(
                f"A file holds statistics of one array; {name} is a tree of "
                f"{len(jax.tree.leaves(tree))}. Save its leaves with Orbax."
            )
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {name: np.asarray(leaf) for name, leaf in parts.items()}
    np.savez(buffer, **arrays)
    write_atomic(path, buffer.getvalue())


def load_statistics(path: str | os.PathLike[str]) -> ModelStatistics:
    """Reads `save_statistics`'s file. Raises ValueError for anything else."""
    try:
        with np.load(Path(path), allow_pickle=False) as archive:
            return ModelStatistics(*(jnp.asarray(archive[n]) for n in ("lam", "ell", "s", "b")))
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} holds no model statistics ({error}). save_statistics writes them, for "
            "model_statistics(key, denoise, process, x0)."
        ) from error
