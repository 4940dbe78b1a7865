"""Times the training step and the forward pass of DDPM++ and NCSN++; one JSON line a measurement.

    python scripts/bench/train_step.py                         # nf 32, batch 16 of 32x32x3, float32
    python scripts/bench/train_step.py --nf 128 --batch 2
    python scripts/bench/train_step.py --full --batch 128 --dtype bfloat16    # CIFAR-10 size, a GPU

A step is loss, gradients, clipping, Adam and EMA, as `diffjax train` runs it. The networks are
timed in turn, so that their ratio is of one run; times are medians. `temp_mb` is XLA's temporary
memory, `alias` the share of the state that is donated and reused: neither depends on the clock.
`mfu` counts 3 forward passes of the given GFLOP against --peak TFLOP/s.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import diffjax as dj
from diffjax.core.random import sample_keys
from diffjax.nets.ncsnpp import NCSNpp
from diffjax.prediction import precondition
from diffjax.train import mesh, optim, state, step
from diffjax.train.ema import ConstantEMA

NETS = {
    "ddpmpp": {"fir": False, "progressive_input": "none", "embedding_type": "positional"},
    "ncsnpp": {"fir": True, "progressive_input": "residual", "embedding_type": "fourier"},
}


def build(name, args):
    """(network, loss function, parameters, precondition, process) of one measurement."""
    small = {"nf": args.nf, "ch_mult": (1, 2, 2), "num_res_blocks": 2, "attn_resolutions": (16,)}
    net = NCSNpp(
        **NETS[name],
        **({"nf": 128} if args.full else small),
        dtype=jnp.dtype(args.dtype),
        remat=args.remat,
    )
    process, convention = (
        (dj.VP(), precondition.score_sde_vp())
        if name == "ddpmpp"
        else (dj.VE(), precondition.score_sde_ve())
    )

    def loss_fn(params, key, batch):
        keys = sample_keys(key, batch.shape[0])

        def apply(variables, x, label):
            return net.apply(variables, x, label, train=True, rngs={"dropout": key})

        denoise = dj.make_denoiser(
            apply, process, variables={"params": params}, **convention._asdict()
        )
        return dj.denoising_score_matching(keys, denoise, process, batch)

    x = jnp.zeros((1, args.size, args.size, 3))
    params = net.init(jax.random.key(0), x, jnp.ones((1,)))["params"]
    return net, loss_fn, params


def timed(call, repetitions):
    """Seconds of each call after the first, waiting for the result."""
    seconds = []
    for _ in range(repetitions):
        began = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - began)
    return seconds


def compiled(function, *arguments):
    """(executable, seconds to trace and compile)."""
    began = time.perf_counter()
    return function.lower(*arguments).compile(), time.perf_counter() - began


class StepBench:
    """One network's compiled step with its state, to be called in turn with the others."""

    def __init__(self, name, args):
        net, loss_fn, params = build(name, args)
        devices = mesh.make_mesh(data=1)
        schedule = optim.learning_rate(2e-4, warmup=5000)
        optimizer = optim.adam(schedule, grad_clip=1.0)
        self.state = state.create_state(jax.random.key(1), params, optimizer)
        self.batch = jnp.asarray(
            np.random.default_rng(0).uniform(
                -1, 1, (args.jitted, args.batch, args.size, args.size, 3)
            ),
            jnp.float32,
        )
        run = step.compile_step(
            devices, loss_fn=loss_fn, optimizer=optimizer, ema={"main": ConstantEMA(0.9999)}
        )
        self.step, self.compile_s = compiled(run, self.state, self.batch)
        memory = self.step.memory_analysis()
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))
        self.temp_mb = memory.temp_size_in_bytes / 1e6
        self.alias = memory.alias_size_in_bytes / size
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        x, label = self.batch[0], jnp.ones((args.batch,))
        forward = jax.jit(lambda params, x: net.apply({"params": params}, x, label))
        executable, self.forward_compile_s = compiled(forward, params, x)
        self.forward_temp_mb = executable.memory_analysis().temp_size_in_bytes / 1e6
        cost = executable.cost_analysis() or {}
        self.forward_gflop = cost.get("flops", 0.0) / args.batch / 1e9
        kept = jax.tree.map(jnp.copy, params)
        self.forward = lambda: executable(kept, x)

    def advance(self):
        """One dispatch; the state moves on, since its buffers are donated."""
        self.state, metrics = self.step(self.state, self.batch)
        return metrics["loss"]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--nf", type=int, default=32, help="width of the small network")
    parser.add_argument("--full", action="store_true", help="the CIFAR-10 networks of the paper")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--remat", action="store_true", help="recompute blocks going backwards")
    parser.add_argument("--jitted", type=int, default=1, help="updates in one dispatch")
    parser.add_argument("--reps", type=int, default=10)
    parser.add_argument("--peak", type=float, default=None, help="TFLOP/s of the device, for mfu")
    args = parser.parse_args()

    benches = {name: StepBench(name, args) for name in args.nets}
    for bench in benches.values():
        jax.block_until_ready((bench.advance(), bench.forward()))
    steps = {name: [] for name in benches}
    forwards = {name: [] for name in benches}
    for _ in range(args.reps):
        for name, bench in benches.items():
            steps[name] += timed(bench.advance, 1)
            forwards[name] += timed(bench.forward, 1)
    for name, bench in benches.items():
        seconds = statistics.median(steps[name]) / args.jitted
        line = {
            "bench": "train_step",
            "net": name,
            "parameters": bench.parameters,
            "batch": args.batch,
            "dtype": args.dtype,
            "remat": args.remat,
            "updates_per_dispatch": args.jitted,
            "step_ms": round(seconds * 1e3, 1),
            "step_min_ms": round(min(steps[name]) / args.jitted * 1e3, 1),
            "forward_ms": round(statistics.median(forwards[name]) * 1e3, 1),
            "compile_s": round(bench.compile_s, 1),
            "temp_mb": round(bench.temp_mb, 1),
            "forward_temp_mb": round(bench.forward_temp_mb, 1),
            "alias": round(bench.alias, 3),
            "forward_gflop_per_image": round(bench.forward_gflop, 3),
            "device": jax.devices()[0].device_kind,
        }
        if args.peak:
            flops = 3 * bench.forward_gflop * args.batch
            line["mfu"] = round(flops / 1e3 / seconds / args.peak, 3)
        print(json.dumps(line), flush=True)
    if len(steps) == 2:
        ratios = [b / a for a, b in zip(steps["ddpmpp"], steps["ncsnpp"], strict=True)]
        ratio = round(statistics.median(ratios), 3)
        print(json.dumps({"bench": "ratio", "ncsnpp_over_ddpmpp": ratio}))


if __name__ == "__main__":
    main()
