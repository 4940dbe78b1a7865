"""Readers of the Score-SDE code's checkpoints, JAX and PyTorch, and what they say of misfits."""

import jax
import numpy as np
import pytest
from flax import serialization

from diffjax.core import tensorfile
from diffjax.interop import score_sde
from diffjax.interop.assign import WeightsError
from diffjax.nets.ddpm import DDPM
from diffjax.nets.ncsnpp import NCSNpp
from tests.interop import layouts, torchfiles
from tests.interop.cases import (
    SKIPS,
    assert_equal,
    ddpm_case,
    like_of,
    ncsnpp_case,
    outputs,
    small_unet,
)
from tests.nets.common import weights

# Published networks and the places of their modules in the port's list, as the reference's
# documentation of the format has them: {our name: range or list of indices}.
CIFAR = {"nf": 128, "ch_mult": (1, 2, 2, 2), "num_res_blocks": 4, "attn_resolutions": (16,)}
BLOCK, ATTENTION = "ResnetBlockBigGANpp", "AttnBlockpp"
PORT = {
    "ncsnpp": (
        NCSNpp(**CIFAR),
        32,
        {
            "GaussianFourierProjection": [0],
            "Dense": [1, 2],
            "Conv": [3, 58],
            BLOCK: [*range(4, 9), 10, 12, 14, 16, 18, *range(20, 25), *range(26, 31)]
            + [*range(32, 50), *range(51, 57)],
            ATTENTION: [11, 13, 15, 17, 31, 50],
            "Downsample": [9, 19, 25],
            "GroupNorm": [57],
        },
    ),
    "ddpmpp": (
        NCSNpp(**CIFAR, fir=False, progressive_input="none", embedding_type="positional"),
        32,
        {
            "Dense": [0, 1],
            "Conv": [2, 54],
            BLOCK: [*range(3, 9), 10, 12, 14, *range(16, 27), *range(28, 46), *range(47, 53)],
            ATTENTION: [9, 11, 13, 15, 27, 46],
            "GroupNorm": [53],
        },
    ),
    "ddpm": (
        DDPM(),
        32,
        {
            "Dense": [0, 1],
            "Conv": [2, 36],
            "ResnetBlockDDPM": [3, 4, 6, 8, 11, 12, *range(14, 17), *range(18, 22)]
            + [*range(23, 26), *range(27, 30), *range(32, 35)],
            "AttnBlock": [7, 9, 17, 30],
            "Downsample": [5, 10, 13],
            "Upsample": [22, 26, 31],
            "GroupNorm": [35],
        },
    ),
    "ncsnpp_256": (
        NCSNpp(
            nf=128,
            ch_mult=(1, 1, 2, 2, 2, 2, 2),
            num_res_blocks=2,
            attn_resolutions=(16,),
            progressive="output_skip",
            progressive_input="input_skip",
        ),
        256,
        {
            "GaussianFourierProjection": [0],
            "Dense": [1, 2],
            "Conv": [3, 39, 45, 52, 58, 64, 70, 76],
            "Combine": [7, 11, 15, 19, 25, 29],
            ATTENTION: [21, 23, 33, 50],
            "GroupNorm": [38, 44, 51, 57, 63, 69, 75],
        },
    ),
}


@pytest.mark.parametrize("case", PORT)
def test_the_port_s_list_of_modules(case):
    net, height, given = PORT[case]
    found = score_sde.modules(net, height)
    used = sorted(j for places in given.values() for j in places)
    assert len(found) == {"ncsnpp": 59, "ddpmpp": 55, "ddpm": 37, "ncsnpp_256": 77}[case]
    for kind, places in given.items():
        # Modules without weights are counted by their class alone.
        numbers = [int(found[j].removeprefix(f"{kind}_")) for j in places]
        assert numbers == sorted(numbers)
        assert numbers == list(range(len(places)))
    rest = [found[j] for j in range(len(found)) if j not in used]
    assert rest == [f"{BLOCK}_{i}" for i in range(len(rest))]


PORTED = {
    "residual input": lambda: ncsnpp_case(),
    "positional": lambda: ncsnpp_case(
        embedding_type="positional", fir=False, progressive_input="none"
    ),
    "skip pyramids": lambda: ncsnpp_case(**SKIPS),
    "ddpm blocks, residual": lambda: ncsnpp_case(resblock_type="ddpm", progressive="residual"),
    "ddpm blocks, skip pyramids": lambda: ncsnpp_case(
        resblock_type="ddpm", ch_mult=(1, 1, 2), **SKIPS
    ),
    "ddpm": lambda: ddpm_case(),
}


def checkpoint(case):
    """A checkpoint of the port: the model is not the average, and the Fourier W is not averaged."""
    average = layouts.port(case.params, case.order)
    model = {f"module.{name}": np.zeros_like(array) for name, array in average.items()}
    if "all_modules.0.W" in average:
        model["module.all_modules.0.W"] = average["all_modules.0.W"]
    model = {"module.sigmas": np.ones(7, np.float32)} | model
    shadows = [torchfiles.tensor(t) for n, t in average.items() if n != "all_modules.0.W"]
    ema = {"decay": 0.999, "num_updates": 5, "shadow_params": shadows}
    adam = {"state": {0: {"exp_avg": torchfiles.tensor(np.ones(3, np.float32))}}}
    return {
        "optimizer": adam,
        "model": torchfiles.state_dict(model),
        "ema": ema,
        "step": 8,
    }


@pytest.mark.parametrize(("name", "output"), outputs(PORTED, first="residual input"))
def test_the_port_s_averaged_weights(name, output, tmp_path):
    case = PORTED[name]()
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(torchfiles.zip_bytes(checkpoint(case)))
    tensors = tensorfile.read(path)
    kept = {n: t for n, t in tensors.items() if n.startswith(("model.", "ema."))}
    found = score_sde.from_torch(case.net, case.like, case.height, kept)
    case.assert_same(found, output)


def test_a_list_of_averages_that_does_not_fit_is_refused():
    case = PORTED["positional"]()
    tensors = tensorfile.flatten(as_arrays(checkpoint(case)))
    last = max((n for n in tensors if n.startswith("ema.")), key=lambda n: int(n.split(".")[-1]))
    short = {n: t for n, t in tensors.items() if n != last}
    with pytest.raises(WeightsError, match="must be as many"):
        score_sde.from_torch(case.net, case.like, case.height, short)
    names = [n for n in tensors if n.startswith("ema.")]
    swapped = tensors | {names[0]: tensors[names[1]], names[1]: tensors[names[0]]}
    with pytest.raises(WeightsError, match="not in the order"):
        score_sde.from_torch(case.net, case.like, case.height, swapped)


def as_arrays(tree):
    """A tree for `torchfiles` as one of arrays."""
    if isinstance(tree, torchfiles.Call):
        storage, _, shape = tree.arguments[:3]
        return storage.values.reshape(shape)
    if isinstance(tree, dict):
        return {k: as_arrays(v) for k, v in tree.items() if k != "optimizer"}
    return [as_arrays(v) for v in tree] if isinstance(tree, list) else tree


@pytest.mark.parametrize("replicas", [0, 2])
def test_a_jax_checkpoint(tmp_path, replicas):
    params = PORTED["residual input"]().params

    def old(path, leaf):
        leaf = np.asarray(leaf)
        if "GroupNorm" in path[-2].key:
            leaf = leaf.reshape(1, 1, 1, -1)
        return np.stack([leaf] * replicas) if replicas else leaf

    tree = jax.tree_util.tree_map_with_path(old, params)
    step = np.full((replicas,), 40) if replicas else 40
    optimizer = {"target": tree, "state": {"param_states": {"grad_ema": tree}}}
    state = {"step": step, "optimizer": optimizer, "params_ema": {"params": tree}, "lr": 2e-4}
    path = tmp_path / "checkpoint_1"
    path.write_bytes(serialization.msgpack_serialize(state))
    read = score_sde.read_jax(path)
    assert_equal(score_sde.from_jax(like_of(params), read["params_ema"]), params)


def test_a_jax_checkpoint_keeps_kernels_of_one_pixel():
    """A 1 x 1 convolution of one channel has a norm's old shape, and is none."""
    tree = {"Conv_0": {"kernel": np.ones((1, 1, 1, 4), np.float32)}}
    assert_equal(score_sde.from_jax(like_of(tree), tree), tree)


def test_other_files_are_no_jax_checkpoints(tmp_path):
    path = tmp_path / "file"
    for data in (b"\xc1", serialization.msgpack_serialize({"params": {}})):
        path.write_bytes(data)
        with pytest.raises(tensorfile.TensorFileError, match=r"no flax checkpoint|no params_ema"):
            score_sde.read_jax(path)


def test_faults_are_listed_with_their_cause():
    case = PORTED["positional"]()
    tensors = layouts.port(case.params, case.order)

    def read(net, found):
        like = like_of(weights(net, case.x, case.label)["params"])
        return score_sde.from_torch(net, like, case.height, found)

    first, *rest = tensors
    with pytest.raises(WeightsError, match=rf"1 missing: {first} \(for .*more levels"):
        read(case.net, {name: tensors[name] for name in rest})
    with pytest.raises(WeightsError, match="1 left over: extra.*file's network has more"):
        read(case.net, tensors | {"extra": tensors[first]})
    options = {"embedding_type": "positional", "fir": False, "progressive_input": "none"}
    wide = NCSNpp(**small_unet(nf=16, **options))
    with pytest.raises(WeightsError, match=r"of another shape: .*; \.\.\.\. .*widths"):
        read(wide, tensors)
    deep = NCSNpp(**small_unet(num_res_blocks=2, **options))
    with pytest.raises(WeightsError, match="another family or code"):
        read(deep, tensors)
