"""DiT's blocks as a loop over stacked weights: the network that it is one after another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.nets import DiT
from diffjax.nets.dit import stacked, unstacked
from tests.nets.common import QUICK, batch
from tests.nets.test_edm_dit import weights

quick = functools.partial(jax.jit, compiler_options=QUICK)
NET = DiT(depth=3, width=16, num_heads=2, num_classes=3, label_dropout=0.5)
quick_apply = quick(NET.apply)
CLASSES = np.array([0, 1, 2, 1])


@functools.cache
def inputs():
    x, label = batch(size=4, channels=4)
    return x, label, jax.tree.map(np.float32, weights(NET, x, label, CLASSES)["params"])


@functools.cache
def gradient(net):
    """The loss in training and its gradient, as those of a network with scan=False."""
    x, label, params = inputs()

    def loss(params):
        out = net.apply({"params": params}, x, label, CLASSES, train=True, rngs=rngs)
        return jnp.mean((out - jnp.tile(x, 2)) ** 2)

    rngs = {"label_dropout": jax.random.key(3)}
    value, grads = quick(jax.value_and_grad(loss))(stacked(params) if net.scan else params)
    return value, unstacked(grads) if net.scan else grads


def agree(found, wanted, rtol=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=rtol * np.abs(b).max() + 1e-12),
        found,
        wanted,
    )


@pytest.mark.parametrize("remat", [False, True])
def test_loss_and_gradient_are_those_of_blocks_one_after_another(remat):
    agree(gradient(NET.clone(scan=True, remat=remat)), gradient(NET), rtol=2e-6)


def test_forward_mode_and_sampling():
    x, label, params = inputs()

    def slope(net, params):
        run = functools.partial(net.apply, {"params": params}, label=label, cond=CLASSES)
        return jax.jvp(run, (x,), (jnp.cos(x),))

    scan = NET.clone(scan=True, remat=True)  # which is for training only
    agree(
        quick(slope, static_argnums=0)(scan, stacked(params)),
        quick(slope, static_argnums=0)(NET, params),
    )


def test_agreement_sees_blocks_in_another_order():
    _, _, params = inputs()
    swapped = params | {"block_0": params["block_1"], "block_1": params["block_0"]}
    found, wanted = (quick_apply({"params": p}, *inputs()[:2], CLASSES) for p in (swapped, params))
    with pytest.raises(AssertionError):
        agree(found, wanted)


def instructions(depth, scan):
    net = NET.clone(depth=depth, scan=scan, remat=True)
    x, label, _ = inputs()
    rngs = {"label_dropout": jax.random.key(0)}
    shapes = jax.eval_shape(net.init, jax.random.key(0), x, label, CLASSES)
    loss = jax.grad(lambda p: jnp.sum(net.apply(p, x, label, CLASSES, train=True, rngs=rngs)))
    return jax.jit(loss).lower(shapes).as_text().count(" = ")


def test_a_program_does_not_grow_with_depth():
    assert instructions(12, True) <= 1.01 * instructions(4, True)
    assert instructions(3, False) > 1.5 * instructions(1, False)  # one after another it does


def test_a_new_network_has_blocks_of_their_own():
    x, label, params = inputs()
    net = NET.clone(scan=True)
    out, new = quick(net.init_with_output)(jax.random.key(0), x, label, CLASSES)
    assert not np.any(out)
    assert jax.tree.map(jnp.shape, unstacked(new["params"])) == jax.tree.map(jnp.shape, params)
    kernels = new["params"]["stack"]["fc1"]["kernel"]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.1
    bound = np.sqrt(6 / (16 + 64))  # Glorot's of one block, which takes no account of the others
    assert 0.95 * bound < np.abs(kernels).max() <= bound
    packed = new["params"]["stack"]["qkv"]["kernel"]
    assert 0.95 < np.abs(packed).max() / np.sqrt(6 / (16 + 3 * 16)) <= 1


def test_the_other_layout_is_named():
    x, label, params = inputs()
    jax.tree.map(np.testing.assert_array_equal, unstacked(stacked(params)), params)
    for net, given, message in [
        (NET.clone(scan=True), params, r"scan=True, .*'block_0'.*nets.dit.stacked\(params\)"),
        (NET, stacked(params), r"scan=False, .*'stack'.*nets.dit.unstacked\(params\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(net.apply, {"params": given}, x, label, CLASSES)
    with pytest.raises(ValueError, match="no block_0 .*stacked already"):
        stacked(stacked(params))
    with pytest.raises(ValueError, match="no 'stack' .*unstacked already"):
        unstacked(params)
    with pytest.raises(ValueError, match="around acts in the loop.*scan=True"):
        DiT(around=lambda layer: layer)
