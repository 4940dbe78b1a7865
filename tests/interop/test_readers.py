"""Readers of other codes' weights, against layouts written down without our name maps."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import tensorfile
from diffjax.interop import diffusers, dit, edm, guided_diffusion
from diffjax.interop.assign import WeightsError
from diffjax.nets.adm import ADM
from diffjax.nets.dit import DiT, stacked
from diffjax.nets.ncsnpp import NCSNpp
from diffjax.nets.songunet import SongUNet
from tests.interop import layouts, torchfiles
from tests.interop.cases import (
    SKIPS,
    Case,
    assert_equal,
    ddpm_case,
    like_of,
    ncsnpp_case,
    outputs,
    small_unet,
)
from tests.nets import numpy_edm
from tests.nets.common import batch, weights

SONGS = {
    "ddpmpp": {"num_classes": 3, "augment_dim": 9},
    "ncsnpp": {
        "embedding_type": "fourier",
        "embedding_mult": 2,
        "progressive_input": "residual",
        "fir_kernel": (1, 3, 3, 1),
    },
    "skips": {"progressive_input": "input_skip", "progressive": "output_skip"},
}
ENCODERS = {"none": "standard", "input_skip": "skip", "residual": "residual"}


@pytest.mark.parametrize(("name", "output"), outputs(SONGS, first="ddpmpp"))
def test_edm_s_song_unet(name, output, tmp_path):
    net = SongUNet(**small_unet(**SONGS[name]))
    cond = np.array([2, -1]) if net.num_classes else None
    case = Case(net, numpy_edm.Song, batch(), cond, augment=None)
    names = list(
        layouts.edm_names(
            case.height,
            len(net.ch_mult),
            net.num_res_blocks,
            ENCODERS[net.progressive_input],
            "skip" if net.progressive == "output_skip" else "standard",
        )
    )
    tensors = layouts.song(case.params, case.order, names)
    tensors["enc.4x4_down.conv0.resample_filter"] = np.full((1, 1, 2, 2), 0.25, np.float32)
    whole = torchfiles.as_modules({f"model.{n}": t for n, t in tensors.items()}, "EDMPrecond")
    path = tmp_path / "network.pkl"
    path.write_bytes(torchfiles.plain_pickle({"ema": whole, "loss_fn": None}))
    record = edm.network(tensorfile.read_pickled(path))
    found = edm.from_torch(net, case.like, case.height, edm.tensors(record))
    case.assert_same(found, output)
    assert edm.says(record)["precondition"] == {"name": "edm"}


def test_what_an_edm_file_says_of_itself():
    inner = {
        "model_channels": 128,
        "channel_mult": [2, 2, 2],
        "augment_dim": 9,
        "encoder_type": "residual",
        "resample_filter": [1, 3, 3, 1],
    }
    outer = {"img_resolution": 32, "img_channels": 3, "label_dim": 10}
    model = tensorfile.Record("SongUNet", {"_init_kwargs": inner})
    record = tensorfile.Record("VEPrecond", {"_init_kwargs": outer, "_modules": {"model": model}})
    assert edm.says(record) == {
        "model": {
            "nf": 128,
            "ch_mult": (2, 2, 2),
            "augment_dim": 9,
            "progressive_input": "residual",
            "fir_kernel": (1, 3, 3, 1),
            "num_classes": 10,
        },
        "precondition": {"name": "edm_ve"},
        "data": {"image_size": 32, "num_channels": 3},
    }


def adm_case(**options):
    net = ADM(**small_unet(channels_per_head=4, **options))
    cond = np.array([2, 0]) if net.num_classes else None
    return Case(net, numpy_edm.ADM, (batch()[0], jnp.asarray([3.0, 700.0])), cond)


def heads_of(net):
    return lambda channels: net.num_heads or channels // net.channels_per_head


@pytest.mark.parametrize("output", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_edm_s_dhariwal_unet(output):
    case = adm_case(num_classes=3, augment_dim=9)
    net = case.net
    names = layouts.edm_names(case.height, 2, 1, aux=False)
    tensors = layouts.dhariwal(case.params, case.order, names, heads_of(net))
    found = edm.from_torch(net, case.like, case.height, tensors)
    case.assert_same(found, output)


@pytest.mark.parametrize(
    ("order", "row", "options", "output"),
    [
        ("legacy", layouts.legacy_row, {"num_classes": 3, "out_channels": 6}, True),
        ("new", layouts.new_row, {"attn_resolutions": (8, 4), "num_heads": 2}, False),
        ("legacy", layouts.legacy_row, {"ch_mult": (0.5, 1, 2), "attn_resolutions": (2,)}, False),
    ],
)
def test_guided_diffusion(order, row, options, output):
    case = adm_case(**{"num_res_blocks": 2, **options})
    net = case.net
    names = layouts.guided_names(case.height, net.ch_mult, 2, net.attn_resolutions)
    tensors = layouts.guided(case.params, case.order, names, heads_of(net), row)
    found = guided_diffusion.from_torch(net, case.like, case.height, tensors, order=order)
    case.assert_same(found, output)
    other = {"legacy": "new", "new": "legacy"}[order]
    wrong = guided_diffusion.from_torch(net, case.like, case.height, tensors, order=other)
    with pytest.raises(AssertionError):
        assert_equal(wrong, case.params)


def test_dit():
    net = DiT(depth=2, width=16, num_heads=2, patch_size=2, num_classes=5)
    x, label = batch(channels=4)
    cond = np.array([1, 5])
    params = jax.tree.map(np.float32, weights(net, x, label, cond)["params"])
    params["pos_embed"] = np.float32(numpy_places(4, 4, 16))
    tensors = layouts.dit(params, 2, 4)
    found = dit.from_torch(net, like_of(params), tensors)
    assert_equal(found, params)
    numbers = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    want = numpy_edm.dit(
        numbers, np.asarray(x, float), np.asarray(label, float), cond, **sizes_of(net)
    )
    got = np.asarray(net.apply({"params": found}, x, label, cond))
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    averaged = {f"model.{n}": 0 * t for n, t in tensors.items()}
    averaged |= {f"ema.{n}": t for n, t in tensors.items()}
    assert_equal(dit.from_torch(net, like_of(params), averaged), params)
    scan = net.clone(scan=True)
    looped = dit.from_torch(scan, jax.eval_shape(stacked, params), tensors)
    # Each block's from its own file's name: the loop's result is that of the blocks in turn.
    np.testing.assert_allclose(
        scan.apply({"params": looped}, x, label, cond), got, atol=1e-5 * np.abs(want).max()
    )


def sizes_of(net):
    return {n: getattr(net, n) for n in ("depth", "width", "num_heads", "patch_size")}


def numpy_places(high, wide, features):
    grid = [(i, j) for i in range(high) for j in range(wide)]
    return np.stack([numpy_edm.place(i, j, features) for i, j in grid])


DIFFUSED = {
    "ncsnpp": lambda: ncsnpp_case(**SKIPS),
    "ncsnpp, three levels": lambda: ncsnpp_case(**SKIPS, ch_mult=(1, 1, 2), num_res_blocks=2),
    "ddpm": lambda: ddpm_case(up_attention="block", num_res_blocks=2),
    "ddpm without attention": lambda: ddpm_case(attn_resolutions=()),
}


def diffused(case):
    net = case.net
    skip = type(net) is NCSNpp
    names = layouts.diffusers_names(
        case.height, len(net.ch_mult), net.num_res_blocks, net.attn_resolutions, skip=skip
    )
    return layouts.diffusers(case.params, case.order, names)


@pytest.mark.parametrize(("name", "output"), outputs(DIFFUSED, first="ncsnpp"))
def test_diffusers(name, output, tmp_path):
    case = DIFFUSED[name]()
    tensors = diffused(case)
    found = diffusers.from_torch(case.net, case.like, case.height, tensors)
    case.assert_same(found, output)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for tensor_name, tensor in tensors.items():
        for new, before in old.items():
            tensor_name = tensor_name.replace(new, before)
        renamed[tensor_name] = tensor
    assert_equal(diffusers.from_torch(case.net, case.like, case.height, renamed), case.params)
    written = diffusers.to_torch(case.net, case.params, case.height)
    assert written.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(written[key], tensor)
    diffusers.write(tmp_path, case.net, case.params, case.x.shape[1:])
    again = tensorfile.read(tmp_path / "diffusion_pytorch_model.safetensors")
    assert_equal(diffusers.from_torch(case.net, case.like, case.height, again), case.params)


def test_diffusers_config_there_and_back(tmp_path):
    case = DIFFUSED["ddpm"]()
    diffusers.write(tmp_path, case.net, case.params, case.x.shape[1:])
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["down_block_types"] == ["DownBlock2D", "AttnDownBlock2D"]
    assert stored["up_block_types"] == ["AttnUpBlock2D", "UpBlock2D"]
    assert stored["block_out_channels"] == [32, 64]
    says = diffusers.settings(tmp_path)
    assert says["data"] == {"image_size": 8, "num_channels": 3}
    for field, value in says["model"].items():
        assert getattr(case.net, field) == value, field
    (tmp_path / "config.json").write_text(json.dumps(stored | {"freq_shift": 0}))
    with pytest.raises(WeightsError, match="freq_shift is 0, not 1"):
        diffusers.settings(tmp_path)


def test_diffusers_has_no_such_network():
    case = ncsnpp_case()
    with pytest.raises(WeightsError, match="progressive must be 'output_skip', not 'none'"):
        diffusers.to_torch(case.net, case.params, case.height)
