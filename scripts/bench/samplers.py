"""Times the samplers over an exact, cheap model; one JSON line a measurement.

    python scripts/bench/samplers.py                       # batch 64 of 32x32x3, 50 steps, float32
    python scripts/bench/samplers.py --only ddim heun --reps 30
    python scripts/bench/samplers.py --measure compile knobs devices

Solvers are those of `diffjax.builders.SOLVERS` that take a grid, with their defaults; one that
cannot be built without more, or does not fit the process, gives a line that says so. Measures:

    compile   seconds, program size and temporary memory at 10, 100 and 1000 steps
    time      against a bare scan of the same model, and alone with a model of one multiplication
    knobs     programs compiled over 20 settings of the solver's numbers, the schedule and the range
    devices   collectives in the program of the batch over 1, 2, 4 and 8 (simulated) devices

The model of `time` is the posterior mean of a mixture of eight isotropic Gaussians in pixel space
(means from NumPy's seed 0, uniform on +-0.5; standard deviation 0.25) under VP with beta 0.1..20.

`ms` is a whole batch's time. `overhead_ms_per_step` is that minus a bare `lax.scan` over as many
calls of the same model, over the steps: the sampler's own work. Sampler and bare scan are timed in
turn, so that both see the same machine; figures are medians of the repetitions, and the quartiles
of the overhead say how quiet it was. `trivial_us_per_step` is a whole solve over the steps with a
model of one multiplication, which the other measures have too. `temp_states` is XLA's temporary
memory over the size of x.
"""

import argparse
import functools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import diffjax as dj
from diffjax.builders.make import make
from diffjax.builders.sampling import SOLVERS
from diffjax.core.numerics import canonical
from diffjax.core.pytree import pytree
from diffjax.core.types import Prediction

MEANS = np.random.default_rng(0).uniform(-0.5, 0.5, (8, 32 * 32 * 3)).astype(np.float32)
STD = 0.25
PROCESS = dj.VP()

# Options where the defaults are not what is worth timing; names that are not in SOLVERS.
OWN = {
    "ddim_eta_1": {"name": "ddim", "eta": 1.0},
    "pc": {"name": "pc", "snr": 0.01},
    "edm_stochastic": {"name": "edm_stochastic", "s_churn": 10.0, "n_steps": 50},
}
NAMES = sorted({*SOLVERS, *OWN})


@functools.cache
def solver_of(name):
    """The solver of a name; None if its steps are its own. Raises BuildError."""
    solver = make(SOLVERS, OWN.get(name, {"name": name}), "sampling.solver")
    return None if isinstance(solver, dj.solvers.AdaptiveFlow) else canonical(solver)


def posterior_mean(x, alpha, sigma):
    """E[x0 | x_t] of the mixture: one product with the means, a softmax, one back."""
    flat = x.reshape(x.shape[0], -1)
    means = jnp.asarray(MEANS)[:, : flat.shape[1]]
    variance = alpha**2 * STD**2 + sigma**2
    logits = (alpha * flat @ means.T - alpha**2 * jnp.sum(means**2, 1)[None] / 2) / variance
    centre = jax.nn.softmax(logits, axis=-1) @ means
    gain = alpha * STD**2 / variance
    return (centre + gain * (flat - alpha * centre)).reshape(x.shape)


@pytree
class Mixture:
    """The exact model as a denoiser."""

    def __call__(self, x, t):
        c = PROCESS.coeffs(t)
        x0 = posterior_mean(x, c.alpha, c.sigma)
        return Prediction(x0, (x - c.alpha * x0) / c.sigma)


@pytree
class Trivial:
    """One multiplication: what is left is the sampler."""

    gain: float = 0.9

    def __call__(self, x, t):
        return Prediction(self.gain * x, x)


draw = jax.jit(
    lambda key, denoise, x, times, solver, process=PROCESS: (
        dj.sample(key, denoise, x, times, solver=solver, process=process).x
    )
)


@jax.jit
def bare(x, times):
    """The model alone at every time, each call on the last one's output."""

    def body(x, t):
        c = PROCESS.coeffs(t)
        return posterior_mean(x, c.alpha, c.sigma), None

    return jax.lax.scan(body, x, times)[0]


def milliseconds(function):
    start = time.perf_counter()
    jax.block_until_ready(function())
    return 1e3 * (time.perf_counter() - start)


def timing(name, args):
    """One line: the sampler against the bare scan of as many calls, timed in turn."""
    solver, key = solver_of(name), jax.random.key(0)
    x = dj.prior(key, PROCESS, (args.batch, *args.shape))
    times = dj.grids.quadratic(PROCESS, args.steps)
    calls = (args.steps - 1) * solver.stages + solver.final_stages
    levels = jnp.linspace(1.0, 0.01, calls)
    denoise = Mixture()
    run = lambda: draw(key, denoise, x, times, solver)  # noqa: E731
    alone = lambda: bare(x, levels)  # noqa: E731
    milliseconds(run), milliseconds(alone)
    ours, model = [], []
    for _ in range(args.reps):
        model.append(milliseconds(alone))
        ours.append(milliseconds(run))
    gaps = [(a - b) / args.steps for a, b in zip(ours, model, strict=True)]
    low, _, high = statistics.quantiles(gaps, n=4)
    trivial = lambda: draw(key, Trivial(), x, times, solver)  # noqa: E731
    milliseconds(trivial)
    own = statistics.median(milliseconds(trivial) for _ in range(args.reps))
    return {
        "solver": name,
        "batch": args.batch,
        "steps": args.steps,
        "calls": calls,
        "ms": round(statistics.median(ours), 3),
        "bare_ms": round(statistics.median(model), 3),
        "overhead_ms_per_step": round(statistics.median(gaps), 4),
        "overhead_quartiles": [round(low, 4), round(high, 4)],
        "trivial_us_per_step": round(1e3 * own / args.steps, 2),
        "best_ms": round(min(ours), 3),
        "best_bare_ms": round(min(model), 3),
    }


def compilation(name, args):
    """One line: compile seconds, program size and temporary memory at three lengths."""
    x = jax.ShapeDtypeStruct((args.batch, *args.shape), jnp.float32)
    line = {"solver": name, "compile_s": {}, "instructions": {}, "temp_states": {}}
    for n in (10, 100, 1000):
        times = jax.ShapeDtypeStruct((n + 1,), jnp.float32)
        start = time.perf_counter()
        # A fresh function each time: nothing is taken from an earlier trace.
        program = (
            jax.jit(lambda *arguments: draw.__wrapped__(*arguments))
            .lower(jax.random.key(0), Trivial(), x, times, solver_of(name))
            .compile()
        )
        line["compile_s"][n] = round(time.perf_counter() - start, 3)
        lines = program.as_text().splitlines()
        line["instructions"][n] = sum(" = " in text for text in lines)
        memory = program.memory_analysis()
        if memory is not None:
            state = 4 * math.prod(x.shape)
            line["temp_states"][n] = round(memory.temp_size_in_bytes / state, 3)
    return line


def knobs(name, args):
    """One line: how many programs 20 settings of the numbers need; it must be 1."""
    x = jnp.ones((2, 4, 4, 1))
    run = jax.jit(lambda *arguments: draw.__wrapped__(*arguments))
    grid = np.linspace(1.0, 0.0, 6, dtype=np.float32)
    for i in range(20):
        settings = canonical((Trivial(), solver_of(name), PROCESS))
        denoise, solver, process = jax.tree.map(
            lambda leaf, by=1 - 0.01 * i: leaf * jnp.asarray(by, leaf.dtype), settings
        )
        run(jax.random.key(i), denoise, x, jnp.asarray(grid * (1 - 0.01 * i)), solver, process)
    return {"solver": name, "settings": 20, "programs": run._cache_size()}


COLLECTIVE = re.compile(r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter")


def devices(name, args):
    """One line: collectives in the programs of the batch over 1, 2, 4, 8 devices; none is right."""
    times = jax.ShapeDtypeStruct((args.steps + 1,), jnp.float32)
    found = {}
    for count in (n for n in (1, 2, 4, 8) if n <= jax.device_count()):
        kind = (jax.sharding.AxisType.Auto,)
        mesh = jax.make_mesh((count,), ("data",), axis_types=kind, devices=jax.devices()[:count])
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        x = jax.ShapeDtypeStruct((args.batch, *args.shape), jnp.float32, sharding=rows)
        keys = jax.device_put(jax.random.split(jax.random.key(0), args.batch), rows)
        program = draw.lower(keys, Trivial(), x, times, solver_of(name)).compile()
        found[count] = len(COLLECTIVE.findall(program.as_text()))
    return {"solver": name, "collectives": found}


MEASURES = {"compile": compilation, "time": timing, "knobs": knobs, "devices": devices}


def measure(kind, names, args):
    """Prints one line a solver."""
    about = {"backend": jax.default_backend(), "jax": jax.__version__}
    for name in names:
        try:
            if solver_of(name) is None:
                continue
            line = MEASURES[kind](name, args)
        except (TypeError, ValueError) as error:  # what does not fit this process
            line = {"solver": name, "skipped": str(error).splitlines()[0]}
        print(json.dumps({"measure": kind, **line, **about}), flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="SOLVER")
    parser.add_argument("--measure", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--shape", type=int, nargs=3, default=(32, 32, 3))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--reps", type=int, default=15)
    args = parser.parse_args()
    if math.prod(args.shape) > MEANS.shape[1]:
        parser.error(f"--shape may hold at most {MEANS.shape[1]} numbers")
    if args.reps < 2:
        parser.error("--reps must be at least 2, for quartiles")
    # The first compilation of a process starts the compiler, which is not the sampler's cost.
    jax.block_until_ready(bare(jnp.zeros((1, *args.shape)), jnp.ones((2,))))
    for kind in args.measure:
        if kind == "devices" and jax.device_count() < 8 and jax.default_backend() == "cpu":
            _with_eight_devices()
        else:
            measure(kind, args.only, args)


def _with_eight_devices():
    """Runs the measure in a process that simulates them: the others are timed without."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    command = [sys.executable, *sys.argv, "--measure", "devices"]
    subprocess.run(command, env={**os.environ, "XLA_FLAGS": flags}, check=True)


if __name__ == "__main__":
    main()
