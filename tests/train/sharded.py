"""Small real networks on a mesh, for tests that count; also run alone with more devices.

python -m tests.train.sharded DATA,FSDP,TENSOR NET prints the program's counts as JSON.
"""

import collections
import functools
import json
import re
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.random import normal_like, sample_keys
from diffjax.nets.dit import DiT
from diffjax.nets.ncsnpp import NCSNpp
from diffjax.train import ema, mesh, optim, sharding, state, step

SHAPE = (8, 8, 1)
MIN_SIZE = 512
NETS = {
    "dit": DiT(depth=1, width=32, num_heads=2, num_classes=None, learn_sigma=False),
    # A loop over blocks; a block's weights are several times its activations.
    "scan": DiT(
        depth=3, width=64, num_heads=4, num_classes=None, learn_sigma=False, patch_size=4, scan=True
    ),
    # DDPM++, one level of five residual blocks.
    "unet": NCSNpp(
        nf=8, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), fir=False, dropout=0.0
    ),
}
BLOCKS = {"dit": 1, "scan": 3, "unet": 5}
SCHEDULE = optim.learning_rate(1e-3)
OPTIMIZER = optim.adam(SCHEDULE, grad_clip=1.0)
TRACKS = {"main": ema.ConstantEMA(0.9), "slow": ema.ConstantEMA(0.99)}


@functools.cache
def params(name):
    """Weights none of which is zero, as those of new networks are."""
    x = jnp.zeros((1, *SHAPE))
    shapes = jax.eval_shape(NETS[name].init, jax.random.key(0), x, jnp.ones((1,)))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: np.asarray(0.1 * rng.normal(size=s.shape), s.dtype), shapes)


def loss_fn(net):
    """A denoising loss whose times and noise are an image's own."""

    def loss(weights, key, x):
        keys = sample_keys(key, x.shape[0])
        noise = normal_like(keys, "noise", x)
        t = jax.nn.sigmoid(normal_like(keys, "time", x[:, 0, 0, 0]))
        out = net.apply({"params": weights}, x + noise, t, train=True)
        return jnp.mean(jnp.square(out - noise), axis=(1, 2, 3)), {}

    return loss


def network(name, layout):
    """The network as it is trained where its parameters lie so."""
    around = sharding.around_layer(layout)
    return NETS[name] if around is None else NETS[name].clone(around=around)


def create(name):
    return state.create_state(jax.random.key(1), params(name), OPTIMIZER, tracks=TRACKS)


class Case(NamedTuple):
    """A train step on a mesh, compiled."""

    on: Any
    layout: Any
    compiled: Any
    batch: int

    @property
    def text(self):
        return self.compiled.as_text()


def mesh_of(shape):
    return mesh.make_mesh(data=shape[0], fsdp=shape[1], tensor=shape[2])


@functools.cache
def case(name, shape, batch=16):
    """The step of a network on a mesh of this shape."""
    on = mesh_of(shape)
    shapes = jax.eval_shape(functools.partial(create, name))
    layout = sharding.state_sharding(on, shapes, min_size=MIN_SIZE)
    fn = step.compile_step(
        on,
        loss_fn=loss_fn(network(name, layout.params)),
        optimizer=OPTIMIZER,
        ema=TRACKS,
        schedule=SCHEDULE,
        state_sharding=layout,
    )
    images = jax.ShapeDtypeStruct((1, batch, *SHAPE), jnp.float32)
    lowered = fn.lower(state.abstract(shapes, layout), images)
    return Case(on, layout, lowered.compile(), batch)


def images(n, batch=16):
    return np.random.default_rng(n).normal(size=(1, batch, *SHAPE)).astype(np.float32)


def trained(name, shape, steps=3):
    """The losses and the state after so many updates."""
    run = case(name, shape)
    current, losses = jax.device_put(create(name), run.layout), []
    for n in range(steps):
        current, metrics = run.compiled(current, mesh.global_batch(run.on, images(n), axis=1))
        losses.append(float(metrics["loss"][0]))
    return losses, current


def collectives(text):
    """Counts of the collectives in HLO by kind."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    return dict(collections.Counter(re.findall(rf" ({kinds})(?:-start)?\(", text)))


def split_leaves(layout):
    """The parameters that lie in slices along "fsdp"."""
    return sum("fsdp" in tuple(s.spec) for s in jax.tree.leaves(layout.params))


def in_loops(text):
    """Counts of the collectives inside each loop of HLO, for those loops that have any."""
    bodies = set(re.findall(r" while\(.*body=%?([\w.\-]+)", text))
    parts = re.split(r"\n(?=%?[\w.\-]+ \(|ENTRY )", text)
    found = {part.split(" ", 1)[0].lstrip("%"): collectives(part) for part in parts}
    return [found[name] for name in sorted(bodies) if found.get(name)]


def main(shape, name):
    shape = tuple(int(n) for n in shape.split(","))
    found = case(name, shape, batch=2 * shape[0] * shape[1])
    counts = {
        "instructions": found.text.count(" = "),
        "collectives": collectives(found.text),
        "split": split_leaves(found.layout),
    }
    print(json.dumps(counts))


if __name__ == "__main__":
    main(*sys.argv[1:])
