r"""The parts of a U-Net in calling order, with what each is for: the ground of all name maps.

Every U-Net here goes down, through a middle and up, so that one list of roles serves them all:

    fourier, dense 0 and 1, in
    down   at level l: block i, attention i; then halve, join (the input pyramid)
    middle block 0, attention, block 1
    up     at level l: block i, attention i; up_join or head_norm and head_conv (the output
           pyramid); then double
    out_norm, out_conv

`halve` and `join` carry the level that they leave, `double` too. The names are those of our
parameters: each class counts its own modules, also those without weights.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

from diffjax.nets.adm import ADM
from diffjax.nets.ddpm import DDPM
from diffjax.nets.ncsnpp import NCSNpp


class Step(NamedTuple):
    """A part: its role, the level and number in it, and its name among our parameters."""

    role: str
    level: int
    number: int
    name: str


class _Walk:
    """The list under construction, with a count for each class."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._counts: Counter[str] = Counter()

    def add(self, role: str, kind: str, level: int = 0, number: int = 0) -> None:
        """The next module of class `kind`."""
        self.steps.append(Step(role, level, number, f"{kind}_{self._counts[kind]}"))
        self._counts[kind] += 1

    def skip(self, kind: str) -> None:
        """A module without weights that is counted by its class alone."""
        self._counts[kind] += 1


def ncsnpp(net: Any, height: int) -> list[Step]:
    """The parts of an `NCSNpp` for images of this height."""
    walk, biggan = _Walk(), net.resblock_type == "biggan"
    block = "ResnetBlockBigGANpp" if biggan else "ResnetBlockDDPMpp"
    last = len(net.ch_mult) - 1
    if net.conditional and net.embedding_type == "fourier":
        walk.add("fourier", "GaussianFourierProjection")
    if net.conditional and net.embedding_type != "given":
        for i in range(2):
            walk.add("dense", "Dense", number=i)
    walk.add("in", "Conv")
    for level in range(last + 1):
        attends = height >> level in net.attn_resolutions
        for i in range(net.num_res_blocks):
            walk.add("down_block", block, level, i)
            if attends:
                walk.add("down_attention", "AttnBlockpp", level, i)
        if level != last:
            walk.add("halve", block if biggan else "Downsample", level)
            if net.progressive_input == "input_skip":
                walk.skip("Downsample")
                walk.add("join", "Combine", level)
            elif net.progressive_input == "residual":
                walk.add("join", "Downsample", level)
    _middle(walk, block, "AttnBlockpp")
    for level in reversed(range(last + 1)):
        for i in range(net.num_res_blocks + 1):
            walk.add("up_block", block, level, i)
        if height >> level in net.attn_resolutions:
            walk.add("up_attention", "AttnBlockpp", level, net.num_res_blocks)
        _output_pyramid(walk, net.progressive, level, last)
        if level:
            walk.add("double", block if biggan else "Upsample", level)
    if net.progressive != "output_skip":
        walk.add("out_norm", "GroupNorm")
        walk.add("out_conv", "Conv")
    return walk.steps


def _middle(walk: _Walk, block: str, attention: str) -> None:
    walk.add("middle_block", block, number=0)
    walk.add("middle_attention", attention)
    walk.add("middle_block", block, number=1)


def _output_pyramid(walk: _Walk, progressive: str, level: int, last: int) -> None:
    if progressive == "none":
        return
    if progressive == "residual" and level != last:
        walk.add("up_join", "Upsample", level)
        return
    if progressive == "output_skip" and level != last:
        walk.skip("Upsample")
    walk.add("head_norm", "GroupNorm", level)
    walk.add("head_conv", "Conv", level)


def ddpm(net: Any, height: int) -> list[Step]:
    """The parts of a `DDPM` for images of this height."""
    walk, block, attention = _Walk(), "ResnetBlockDDPM", "AttnBlock"
    last, blocks = len(net.ch_mult) - 1, net.num_res_blocks
    for i in range(2 if net.conditional else 0):
        walk.add("dense", "Dense", number=i)
    walk.add("in", "Conv")
    for level in range(last + 1):
        for i in range(blocks):
            walk.add("down_block", block, level, i)
            if height >> level in net.attn_resolutions:
                walk.add("down_attention", attention, level, i)
        if level != last:
            walk.add("halve", "Downsample", level)
    _middle(walk, block, attention)
    for level in reversed(range(last + 1)):
        for i in range(blocks + 1):
            walk.add("up_block", block, level, i)
            here = net.up_attention == "block" or i == blocks
            if here and height >> level in net.attn_resolutions:
                walk.add("up_attention", attention, level, i)
        if level:
            walk.add("double", "Upsample", level)
    walk.add("out_norm", "GroupNorm")
    walk.add("out_conv", "Conv")
    return walk.steps


def adm(net: Any, height: int) -> list[Step]:
    """The parts of an `ADM` for images of this height, whose in and out have names of their own."""
    walk, block, attention = _Walk(), "ADMBlock", "ADMAttention"
    last, blocks = len(net.ch_mult) - 1, net.num_res_blocks
    for level in range(last + 1):
        for i in range(blocks):
            walk.add("down_block", block, level, i)
            if height >> level in net.attn_resolutions:
                walk.add("down_attention", attention, level, i)
        if level != last:
            walk.add("halve", block, level)
    _middle(walk, block, attention)
    for level in reversed(range(last + 1)):
        for i in range(blocks + 1):
            walk.add("up_block", block, level, i)
            if height >> level in net.attn_resolutions:
                walk.add("up_attention", attention, level, i)
        if level:
            walk.add("double", block, level)
    return walk.steps


def song(net: Any, height: int) -> list[Step]:
    """The parts of a `SongUNet`'s trunk, whose embedding lies outside."""
    shared = ("ch_mult", "num_res_blocks", "attn_resolutions", "progressive", "progressive_input")
    fields = {name: getattr(net, name) for name in shared}
    return ncsnpp(SimpleNamespace(**fields, resblock_type="biggan", conditional=False), height)


_WALKS: Mapping[type, Callable[[Any, int], list[Step]]] = {
    NCSNpp: ncsnpp,
    DDPM: ddpm,
    ADM: adm,
}


def steps(net: Any, height: int) -> list[Step]:
    """The parts of a U-Net for images of this height. Raises ValueError for another network."""
    if type(net) not in _WALKS:
        known = ", ".join(kind.__name__ for kind in _WALKS)
        raise ValueError(f"No names are known for a {type(net).__name__}; only for {known}.")
    return _WALKS[type(net)](net, height)
