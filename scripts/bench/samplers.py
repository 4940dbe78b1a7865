"""Times the samplers over an exact, cheap model; one JSON line a measurement.

    python scripts/bench/samplers.py                       # batch 64 of 32x32x3, 50 steps, float32
    python scripts/bench/samplers.py --only ddim heun --reps 30
    python scripts/bench/samplers.py --compile-only

The model is the posterior mean of a mixture of eight isotropic Gaussians in pixel space (means from
NumPy's seed 0, uniform on +-0.5; standard deviation 0.25) under VP with beta 0.1..20.

`ms` is a whole batch's time. `overhead_ms_per_step` is that minus a bare `lax.scan` over as many
calls of the same model, over the steps: the sampler's own work. Sampler and bare scan are timed in
turn, so that both see the same machine; figures are medians of the repetitions, and the quartiles
of the overhead say how quiet it was. `temp_states` is XLA's temporary memory over the size of x,
with a model of one multiplication, as are `compile_s` and `instructions` at 10, 100 and 1000 steps.
"""

import argparse
import json
import math
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import diffjax as dj
from diffjax.core.pytree import pytree
from diffjax.core.types import Prediction

MEANS = np.random.default_rng(0).uniform(-0.5, 0.5, (8, 32 * 32 * 3)).astype(np.float32)
STD = 0.25
PROCESS = dj.VP()

SOLVERS = {
    "euler": dj.solvers.Euler(),
    "ddim": dj.solvers.DDIM(),
    "heun": dj.solvers.Heun(),
    "ancestral": dj.solvers.Ancestral(),
    "ddim_eta_1": dj.solvers.DDIM(eta=1.0),
    "euler_maruyama": dj.solvers.EulerMaruyama(),
    "reverse_diffusion": dj.solvers.ReverseDiffusion(),
    "heun_churn": dj.solvers.EDMChurn(dj.solvers.Heun(), 10.0, 50.0),
    "reverse_diffusion_langevin": dj.solvers.PredictorCorrector(
        dj.solvers.ReverseDiffusion(), dj.solvers.Langevin(snr=0.01)
    ),
}


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
    lambda key, denoise, x, times, solver: (
        dj.sample(key, denoise, x, times, solver=solver, process=PROCESS).x
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
    solver, key = SOLVERS[name], jax.random.key(0)
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
    return {
        "solver": name,
        "batch": args.batch,
        "steps": args.steps,
        "calls": calls,
        "ms": round(statistics.median(ours), 3),
        "bare_ms": round(statistics.median(model), 3),
        "overhead_ms_per_step": round(statistics.median(gaps), 4),
        "overhead_quartiles": [round(low, 4), round(high, 4)],
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
            .lower(jax.random.key(0), Trivial(), x, times, SOLVERS[name])
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


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--shape", type=int, nargs=3, default=(32, 32, 3))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--reps", type=int, default=15)
    parser.add_argument("--compile-only", action="store_true", help="no timing of runs")
    args = parser.parse_args()
    if math.prod(args.shape) > MEANS.shape[1]:
        parser.error(f"--shape may hold at most {MEANS.shape[1]} numbers")
    about = {"backend": jax.default_backend(), "jax": jax.__version__}
    # The first compilation of a process starts the compiler, which is not the sampler's cost.
    jax.block_until_ready(bare(jnp.zeros((1, *args.shape)), jnp.ones((2,))))
    for name in args.only:
        print(json.dumps({"measure": "compile", **compilation(name, args), **about}), flush=True)
        if not args.compile_only:
            print(json.dumps({"measure": "time", **timing(name, args), **about}), flush=True)


if __name__ == "__main__":
    main()
