"""Times adaptive solves with refilled slots against batch after batch; one JSON line a method.

    python scripts/bench/adaptive.py                       # 512 samples, 32 at a time, of 16x16x3
    python scripts/bench/adaptive.py --only dpm_3 --reps 9
    python scripts/bench/adaptive.py --rare 0.5            # half of the samples are hard

The model is the posterior mean of a mixture in pixel space under VP with beta 0.1..20: one wide
Gaussian (standard deviation 1, where the probability flow of VP stands still and takes a handful of
steps) and, with weight `rare` in all, seven narrow ones (0.01) whose flow takes many. Which one a
sample goes to follows from its noise, so hard and easy ones are mixed in every batch.

`plain`: the samples in batches, one after the other, each as long as its slowest sample. `slots`:
`sample_many`, which refills a slot once its sample has arrived. Both give the same samples, but for
the rounding of two programs (`differs`: how many are apart by over 1e-3; a rounding can turn an
accepted step into a rejected one). Timed in turn, so that both see the same machine; figures are
medians of the repetitions. `rounds` are attempts of a batch, summed over the batches; their ratio
is what no overhead can change. `slowest_over_mean` says how different the samples are.
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
from diffjax.core import random
from diffjax.core.pytree import pytree
from diffjax.core.types import Prediction
from diffjax.solvers import tableaus

PROCESS = dj.VP()
NARROW = 7
METHODS = {
    "dormand_prince": (tableaus.DORMAND_PRINCE, dj.solvers.PIController(1e-3, 1e-3)),
    "bogacki_shampine": (tableaus.BOGACKI_SHAMPINE, dj.solvers.PIController(1e-3, 1e-3)),
    "dpm_3": (dj.solvers.DPMSolverAdaptive(3), None),
    "dpm_2": (dj.solvers.DPMSolverAdaptive(2), None),
    "sde": (dj.solvers.AdaptiveSDE(), None),
}


@pytree
class Mixture:
    """The exact model: means (K, D), std (K,), log_weights (K,)."""

    means: jax.Array
    std: jax.Array
    log_weights: jax.Array

    def __call__(self, x, t):
        alpha, _, sigma = PROCESS.coeffs(jnp.broadcast_to(t, (x.shape[0],))[:, None])
        flat, size = x.reshape(x.shape[0], -1), self.means.shape[1]
        variance = alpha**2 * self.std[None] ** 2 + sigma**2
        distance = (
            jnp.sum(flat**2, 1, keepdims=True)
            - 2 * alpha * (flat @ self.means.T)
            + alpha**2 * jnp.sum(self.means**2, 1)[None]
        )
        logits = self.log_weights[None] - distance / variance / 2 - size / 2 * jnp.log(variance)
        weights = jax.nn.softmax(logits, axis=1)
        gain = weights * alpha * self.std[None] ** 2 / variance
        share = jnp.sum(gain, 1, keepdims=True)
        x0 = share * flat + (weights - alpha * gain) @ self.means
        x0 = x0.reshape(x.shape)
        expand = lambda c: c.reshape(-1, *(1,) * (x.ndim - 1))  # noqa: E731
        return Prediction(x0, (x - expand(alpha) * x0) / expand(sigma))


def mixture(size, rare):
    """One wide component and seven narrow ones, with means from NumPy's seed 0."""
    means = np.random.default_rng(0).uniform(-0.5, 0.5, (NARROW + 1, size)).astype(np.float32)
    means[0] = 0
    std = np.asarray([1.0] + [0.01] * NARROW, np.float32)
    weights = np.asarray([1 - rare] + [rare / NARROW] * NARROW, np.float32)
    return Mixture(*map(jnp.asarray, (means, std, np.log(weights))))


def one_batch(keys, denoise, shape, t1, **options):
    """The plain way: the prior's draw and a solve."""
    x = dj.prior(keys, PROCESS, (keys.shape[0], *shape))
    return dj.solvers.solve_adaptive(keys, denoise, x, PROCESS.t_max, t1, **options)


plain = jax.jit(one_batch, static_argnames=("shape", "method"))
many = jax.jit(dj.solvers.sample_many, static_argnames=("n", "batch", "shape", "method"))


def seconds(function):
    start = time.perf_counter()
    out = jax.block_until_ready(function())
    return time.perf_counter() - start, out


def measure(name, args):
    """One line."""
    method, controller = METHODS[name]
    denoise = mixture(math.prod(args.shape), args.rare)
    keys = random.sample_keys(jax.random.key(args.seed), args.n)
    options = {"process": PROCESS, "method": method, "controller": controller}

    shape = tuple(args.shape)

    def in_batches():
        return [
            plain(keys[i : i + args.batch], denoise, shape=shape, t1=args.t_min, **options)
            for i in range(0, args.n, args.batch)
        ]

    def in_slots():
        return many(
            keys, denoise, n=args.n, batch=args.batch, shape=shape, t1=args.t_min, **options
        )

    compile_s = [round(seconds(run)[0], 2) for run in (in_batches, in_slots)]
    times = [[], []]
    for _ in range(args.reps):
        taken, batches = seconds(in_batches)
        times[0].append(taken)
        taken, refilled = seconds(in_slots)
        times[1].append(taken)
    first, second = (statistics.median(t) for t in times)
    nfe = np.asarray(refilled.nfe)
    together = np.concatenate([np.asarray(r.x) for r in batches])
    rounds = [sum(int(r.state.rounds) for r in batches), int(refilled.state.rounds)]
    return {
        "method": name,
        "n": args.n,
        "batch": args.batch,
        "rare": args.rare,
        "nfe_mean": round(float(nfe.mean()), 2),
        "nfe_quantiles": [int(q) for q in np.quantile(nfe, [0, 0.5, 0.9, 1])],
        "slowest_over_mean": round(float(nfe.max() / nfe.mean()), 2),
        "rounds": {"plain": rounds[0], "slots": rounds[1]},
        "rounds_ratio": round(rounds[0] / rounds[1], 3),
        "samples_per_s": {"plain": round(args.n / first, 1), "slots": round(args.n / second, 1)},
        "ratio": round(first / second, 3),
        "ratio_quartiles": [
            round(q, 3)
            for q in np.quantile([a / b for a, b in zip(*times, strict=True)], [0.25, 0.75])
        ],
        "first_call_s": {"plain": compile_s[0], "slots": compile_s[1]},
        "differs": int((np.abs(together - np.asarray(refilled.x)).max((1, 2, 3)) > 1e-3).sum()),
        "arrived": bool(np.asarray(refilled.state.arrived).all()),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--n", type=int, default=512, help="a multiple of the batch")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--shape", type=int, nargs=3, default=(16, 16, 3))
    parser.add_argument("--rare", type=float, default=0.1, help="weight of the hard samples")
    parser.add_argument("--t-min", type=float, default=1e-3)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.n % args.batch:
        parser.error("--n must be a multiple of --batch")
    about = {"backend": jax.default_backend(), "jax": jax.__version__}
    for name in args.only:
        print(json.dumps({**measure(name, args), **about}), flush=True)


if __name__ == "__main__":
    main()
