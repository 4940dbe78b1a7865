"""Exact numbers of parameters of the published SongUNets, ADMs, DiTs and SiTs."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from diffjax.nets import ADM, DiT, SongUNet

# Parameters counted from the authors' code; Fourier frequencies, a buffer there, are not among
# them.
LABELLED = {"num_classes": 10, "augment_dim": 9}
WIDE = {"ch_mult": (1, 2, 2, 2)}
GUIDED = {"nf": 256, "num_res_blocks": 2, "num_classes": 1000, "out_channels": 6}
COUNTS = {
    "DDPM++ 32": (55_733_891, 32, partial(SongUNet.ddpmpp, augment_dim=9)),
    "DDPM++ 32 classes": (55_735_299, 32, partial(SongUNet.ddpmpp, **LABELLED)),
    "NCSN++ 32": (56_397_827, 32, partial(SongUNet.ncsnpp, augment_dim=9)),
    "NCSN++ 32 classes": (56_400_643, 32, partial(SongUNet.ncsnpp, **LABELLED)),
    "DDPM++ 64": (61_805_571, 64, partial(SongUNet.ddpmpp, augment_dim=9, **WIDE)),
    "NCSN++ 64": (62_761_091, 64, partial(SongUNet.ncsnpp, augment_dim=9, **WIDE)),
    "ADM 64 EDM": (295_899_267, 64, partial(ADM, num_classes=1000)),
    "ADM 64": (295_904_454, 64, partial(ADM, num_classes=1000, out_channels=6)),
    "ADM 128": (421_529_606, 128, partial(ADM, ch_mult=(1, 1, 2, 3, 4), num_heads=4, **GUIDED)),
    "ADM 256": (553_838_086, 256, partial(ADM, ch_mult=(1, 1, 2, 2, 4, 4), **GUIDED)),
    "ADM 256 no classes": (
        552_814_086,
        256,
        partial(ADM, ch_mult=(1, 1, 2, 2, 4, 4), **{**GUIDED, "num_classes": None}),
    ),
    "ADM 512": (558_997_638, 512, partial(ADM, ch_mult=(0.5, 1, 1, 2, 2, 4, 4), **GUIDED)),
    "DiT S/2": (32_963_360, 32, partial(DiT.named, "S/2")),
    "DiT S/4": (32_945_024, 32, partial(DiT.named, "S/4")),
    "DiT S/8": (33_148_160, 32, partial(DiT.named, "S/8")),
    "DiT B/2": (130_512_416, 32, partial(DiT.named, "B/2")),
    "DiT B/4": (130_475_648, 32, partial(DiT.named, "B/4")),
    "DiT B/8": (130_881_536, 32, partial(DiT.named, "B/8")),
    "DiT L/2": (458_102_816, 32, partial(DiT.named, "L/2")),
    "DiT L/4": (458_053_760, 32, partial(DiT.named, "L/4")),
    "DiT L/8": (458_594_816, 32, partial(DiT.named, "L/8")),
    "DiT XL/2": (675_129_632, 32, DiT.named),
    "DiT XL/4": (675_074_432, 32, partial(DiT.named, "XL/4")),
    "DiT XL/8": (675_683_072, 32, partial(DiT.named, "XL/8")),
    "SiT XL/2": (675_129_632, 32, partial(DiT.sit, "XL/2")),
}


def shapes(net, size, channels=3):
    """Shapes and types of the parameters, without computing anything."""
    x = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    label = jax.ShapeDtypeStruct((1,), jnp.float32)
    cond = None if net.num_classes is None else jax.ShapeDtypeStruct((1,), jnp.int32)
    return jax.eval_shape(net.init, jax.random.key(0), x, label, cond)["params"]


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# The others are the same code with other numbers.
QUICK_COUNTS = {"DDPM++ 32 classes", "NCSN++ 32", "ADM 64", "DiT S/8", "DiT XL/2"}


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK_COUNTS else pytest.param(name, marks=pytest.mark.slow)
        for name in COUNTS
    ],
)
def test_parameter_counts_of_the_published_networks(name):
    wanted, size, build = COUNTS[name]
    params = shapes(build(), size, 4 if "iT" in name else 3)
    frozen = params.get("GaussianFourierProjection_0", {})
    assert count(params) - count(frozen) == wanted
    if name == "DiT XL/2":
        assert count(params) - params["pos_embed"].size == 674_834_720
