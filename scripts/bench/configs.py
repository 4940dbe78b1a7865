"""Times the update and the sampler of shipped configs, as they run; one JSON line a config.

    python scripts/bench/configs.py edm/cifar10_uncond_vp --batch 512 --sample 2048 \
        --set model.dtype=bfloat16 sampling.steps=18 sampling.solver.name=heun
    python scripts/bench/configs.py dit/imagenet256_xl2 --batch 128 --set model.dtype=bfloat16
    python scripts/bench/configs.py digits:quick --batch 16 --sample 16 --reps 3      # on a laptop

The configs are timed in turn, so that ratios between them are of one run; times are medians over
the repetitions, of a dispatch that ends when its result is there. The update is that of
`diffjax train` on all devices, with random images; the sampler that of `Model.sample`, of new
weights. `mfu` is the FLOPs of the program's equations (`diffjax plan` counts them) over time and
the chips' peak in bfloat16, where the device is one that the table of chips knows. `temp_gb` is
XLA's temporary memory on a device and depends on no clock; `peak_gb` is what the device reports.
"""

import argparse
import ast
import json
import statistics
import time

import jax
import numpy as np

from diffjax import builders
from diffjax.runs import counting, dryrun, speed
from diffjax.runs.model import Model
from diffjax.runs.update import build_update
from diffjax.runs.workdir import load_config


def changed(name, settings, batch, sample):
    """The config of this name with other fields."""
    config = load_config(name)
    sizes = {"training.batch_size": batch, "eval.batch_size": sample}
    with config.unlocked():
        config.update_from_flattened_dict(settings | {k: v for k, v in sizes.items() if v})
    return config


def parsed(setting):
    """("a.b", value) of "a.b=value"."""
    field, _, text = setting.partition("=")
    try:
        return field, ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return field, text


class Training:
    """A config's update with a state and a batch on the device."""

    def __init__(self, config, parts):
        devices = builders.build_mesh(config)
        made = build_update(config, parts, devices)
        layout = jax.tree.map(lambda leaf: leaf.sharding, made.like)
        self.state = jax.jit(made.create, out_shardings=layout)(jax.random.key(config.seed))
        self.updates, size = config.training.n_jitted_steps, config.training.batch_size
        rng = np.random.default_rng(0)

        def filled(leaf):
            high = builders.build_quantisation(config).levels if leaf.ndim > 1 else 2
            shape = (self.updates, *leaf.shape)
            return rng.integers(0, high, shape).astype(leaf.dtype)

        from diffjax.train.mesh import global_batch

        images = jax.tree.map(filled, dryrun.train_batch(config, parts, size))
        self.batch = global_batch(devices, images, axis=1)
        began = time.perf_counter()
        self.step = made.step_fn.lower(self.state, self.batch).compile()
        self.compile_s = time.perf_counter() - began
        self.flops = counting.work(dryrun.gradient(config, parts, size)).flops

    def __call__(self):
        self.state, metrics = self.step(self.state, self.batch)
        jax.block_until_ready(metrics)

    def figures(self, seconds, peak):
        """What the median time of a dispatch says."""
        seconds = seconds / self.updates
        size = jax.tree.leaves(self.batch)[0].shape[1]
        found = {
            "batch": size,
            "step_ms": round(1e3 * seconds, 2),
            "images_per_s": round(size / seconds, 1),
            "compile_s": round(self.compile_s, 1),
            "temp_gb": round(self.step.memory_analysis().temp_size_in_bytes / 2**30, 3),
        }
        return found | ({"mfu": round(self.flops / seconds / peak, 4)} if peak else {})


class Sampling:
    """A config's sampler with new weights."""

    def __init__(self, config, parts):
        params = jax.jit(parts.init_params)(jax.random.key(config.seed))
        self.model, self.num = Model(config, parts, params, 0), config.eval.batch_size
        classes = parts.num_classes
        self.labels = None if classes is None else np.arange(self.num) % classes
        self.flops = counting.work(dryrun.sampler(config, parts, self.num)).flops

    def __call__(self):
        self.model.sample(jax.random.key(1), self.num, labels=self.labels)

    def figures(self, seconds, peak):
        """What the median time of a batch says."""
        found = {"batch": self.num, "images_per_s": round(self.num / seconds, 2)}
        return found | ({"mfu": round(self.flops / seconds / peak, 4)} if peak else {})


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="+", help="names of configs")
    parser.add_argument("--batch", type=int, default=0, help="images of an update; the config's")
    parser.add_argument("--sample", type=int, default=0, help="images to draw; 0 draws none")
    parser.add_argument("--set", nargs="*", default=[], type=parsed, metavar="FIELD=VALUE")
    parser.add_argument("--reps", type=int, default=10)
    args = parser.parse_args()

    first = jax.devices()[0]
    chip = speed.chip_of(first.device_kind)
    peak = chip.bfloat16 * jax.device_count() if chip else None
    benches = {}
    for name in args.configs:
        config = changed(name, dict(args.set), args.batch, args.sample)
        parts = builders.build_parts(config)
        benches[name, "train"] = Training(config, parts)
        if args.sample:
            benches[name, "sample"] = Sampling(config, parts)
    for bench in benches.values():
        bench()  # compiles what is not, and warms up
    seconds = {place: [] for place in benches}
    for _ in range(args.reps):
        for place, bench in benches.items():
            began = time.perf_counter()
            bench()
            seconds[place].append(time.perf_counter() - began)
    for (name, what), bench in benches.items():
        figures = bench.figures(statistics.median(seconds[name, what]), peak)
        memory = (first.memory_stats() or {}).get("peak_bytes_in_use")
        line = {"bench": "configs", "config": name, "what": what, **figures}
        line |= {"device": first.device_kind, "devices": jax.device_count()}
        line |= {"peak_gb": round(memory / 2**30, 2)} if memory else {}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
