"""Every option of NCSNpp against the forward pass written out in NumPy, in float64."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.nets.common import ACTIVATIONS, QUICK, batch, small, weights
from tests.nets.numpy_ncsnpp import Network

INPUTS = [("none", "sum"), ("input_skip", "sum"), ("input_skip", "cat"), ("residual", "sum")]
OUTPUTS = ["none", "output_skip", "residual"]


def compare(rtol=1e-5, image=None, cond=None, **options):
    """Our float32 forward pass and NumPy's float64 one on the same random weights."""
    activation = options.pop("nonlinearity", "swish")
    net = small(nonlinearity=ACTIVATIONS[activation], **options)
    x, label = image or batch()
    params = weights(net, x, label, cond)
    got = np.asarray(jax.jit(net.apply, compiler_options=QUICK)(params, x, label, cond))
    fields = {name: getattr(net, name) for name in net.__dataclass_fields__}
    numbers = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"])
    reference = Network(numbers, **{**fields, "nonlinearity": activation})
    want = reference(np.asarray(x, np.float64), np.asarray(label, np.float64), cond)
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(got, want, atol=rtol * np.abs(want).max())


def grid(parity):
    """Block type x input x output; `fir` and `skip_rescale` alternate, so the two halves differ."""
    for i, (block, (way_in, combine), way_out) in enumerate(
        product(["ddpm", "biggan"], INPUTS, OUTPUTS)
    ):
        yield {
            "resblock_type": block,
            "progressive_input": way_in,
            "progressive_combine": combine,
            "progressive": way_out,
            "fir": bool((i + i // 3 + parity) % 2),
            "skip_rescale": bool((i // 2 + parity) % 2),
            "nonlinearity": list(ACTIVATIONS)[(i + 2 * parity) % 4],
        }


def name(case):
    return "-".join(str(value) for value in case.values())


@pytest.mark.parametrize("case", list(grid(0))[::8], ids=name)
def test_blocks_and_pyramids(case):
    compare(**case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*grid(0), *grid(1)], ids=name)
def test_blocks_and_pyramids_all(case):
    compare(**case)


@pytest.mark.parametrize(
    "case",
    [
        {"embedding_type": "positional", "fir": False, "progressive_input": "none"},
        {"conditional": False},
        {"scale_by_sigma": True, "centered": False},
        {
            "scale_by_sigma": True,
            "embedding_type": "positional",
            "sigma_min": 0.01,
            "sigma_max": 90.0,
            "num_scales": 1000,
        },
        {"resblock_type": "ddpm", "resamp_with_conv": False},
        {"resblock_type": "ddpm", "resamp_with_conv": False, "fir": False},
        {"fir_kernel": (1, 2, 3, 5)},
        {"attn_resolutions": (8, 4), "num_res_blocks": 2},
        {"attn_resolutions": (), "ch_mult": (1, 1, 2)},
        {"nf": 20, "ch_mult": (1, 2)},
        {"out_channels": 6},
    ],
    ids=name,
)
def test_other_options(case):
    image = batch()
    if case.get("embedding_type") == "positional":
        image = (image[0], jnp.asarray([3.0, 870.0]))
    compare(image=image, **case)


@pytest.mark.parametrize("channels", [1, 4])
def test_images_that_are_not_square_or_rgb(channels):
    compare(image=batch(height=8, width=12, channels=channels))


def test_class_labels_and_no_class():
    image = batch(size=3)
    compare(image=image, cond=np.array([2, -1, 0]), num_classes=3)


def test_the_comparison_notices_a_wrong_network():
    """Its mutants: one option said differently to the two sides."""
    x, label = batch()
    params = weights(small(), x, label)
    right = jax.jit(small().apply, compiler_options=QUICK)(params, x, label)
    for wrong in ({"skip_rescale": False}, {"fir_kernel": (1, 2, 2, 1)}, {"centered": False}):
        gap = jnp.abs(
            right - jax.jit(small(**wrong).apply, compiler_options=QUICK)(params, x, label)
        )
        assert float(jnp.max(gap)) > 1e-2
