"""Small networks with random weights whose calls are recorded, for the readers to find again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.nets.ddpm import DDPM
from diffjax.nets.ncsnpp import NCSNpp
from tests.interop import layouts
from tests.nets import numpy_ncsnpp, numpy_nets
from tests.nets.common import QUICK, batch, weights


def like_of(params):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), params)


def assert_equal(found, params):
    assert jax.tree.structure(found) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, found, params)


def outputs(cases, first):
    """Each case by its parameters, the first by its output too; the others' outputs are slow."""
    slow = [name for name in cases if name != first]
    return [pytest.param(name, name == first, id=name) for name in cases] + [
        pytest.param(name, True, id=f"{name}, output", marks=pytest.mark.slow) for name in slow
    ]


class Case:
    """A small network with random weights, its calls recorded from the NumPy one."""

    def __init__(self, net, reference, image, cond=None, **options):
        self.net, (self.x, self.label), self.cond = net, image, cond
        self.height = self.x.shape[1]
        self.params = jax.tree.map(np.float32, weights(net, self.x, self.label, cond)["params"])
        self.like = like_of(self.params)
        numbers = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), self.params)
        fields = {name: getattr(net, name) for name in net.__dataclass_fields__}
        fields |= {"nonlinearity": "swish"} if "nonlinearity" in fields else {}
        run = layouts.recording(reference)(numbers, **options, **fields)
        self.want = run(np.asarray(self.x, float), np.asarray(self.label, float), cond)
        # float32 again, as files hold them.
        self.order = [(n, jax.tree.map(np.float32, own)) for n, own in run.order]

    def assert_same(self, found, output):
        """Equal parameters and, where asked for, equal output."""
        assert_equal(found, self.params)
        if output:
            self.assert_output(found)

    def assert_output(self, found):
        """The imported network's output is the NumPy one's on the weights before their export."""
        arguments = (self.x, self.label) if self.cond is None else (self.x, self.label, self.cond)
        apply = jax.jit(self.net.apply, compiler_options=QUICK)
        got = np.asarray(apply({"params": found}, *arguments))
        np.testing.assert_allclose(got, self.want, atol=1e-4 * np.abs(self.want).max())


def small_unet(**options):
    shape = {"nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,)}
    return {**shape, **options}


def ncsnpp_case(**options):
    return Case(NCSNpp(**small_unet(**options)), numpy_ncsnpp.Network, batch())


def ddpm_case(**options):
    net = DDPM(**small_unet(nf=32, **options))
    return Case(net, numpy_nets.DDPM, (batch()[0], jnp.asarray([3.0, 700.0])))


SKIPS = {"progressive": "output_skip", "progressive_input": "input_skip", "scale_by_sigma": True}
