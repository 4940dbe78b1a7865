"""SongUNet, ADM and DiT: parity with NumPy, conditions, starts, refusals."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.nets import ADM, DiT, NCSNpp, SongUNet
from tests.nets import numpy_edm
from tests.nets.common import QUICK, batch
from tests.nets.test_edm_sizes import shapes

quick = partial(jax.jit, compiler_options=QUICK)
slow = partial(pytest.param, marks=pytest.mark.slow)

SONG = {"nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,)}
ADM_SMALL = {**SONG, "channels_per_head": 8, "attn_resolutions": (8, 4)}
DIT_SMALL = {"depth": 2, "width": 16, "num_heads": 2, "num_classes": 3}


def weights(net, *inputs, seed=0):
    """Random values for every parameter but the fixed sinusoids, so that all of them count."""
    rng = np.random.default_rng(seed)
    tree = jax.eval_shape(lambda key: net.init(key, *inputs), jax.random.key(0))

    def fill(path, leaf):
        draw = rng.standard_normal(leaf.shape).astype(np.float32)
        name = path[-1].key
        if name == "pos_embed":
            side = round(leaf.shape[0] ** 0.5)
            places = [(i, j) for i in range(side) for j in range(side)]
            return np.stack(
                [numpy_edm.place(i, j, leaf.shape[1]) for i, j in places], dtype=np.float32
            )
        if leaf.ndim == 1:
            return (1.0 if name == "W" else 0.1) * draw + (name == "scale")
        return draw / np.sqrt(np.prod(leaf.shape[:-1]))

    return jax.tree_util.tree_map_with_path(fill, tree)


def float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def fields(net):
    return {name: getattr(net, name) for name in net.__dataclass_fields__}


def agree(got, want, rtol=1e-5):
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(got, want, atol=rtol * np.abs(want).max(), rtol=0)


AUGMENT = np.random.default_rng(5).standard_normal((3, 9)).astype(np.float32)
CLASSES = np.array([2, -1, 0])


def compare_song(**options):
    net = SongUNet(**{**SONG, **options})
    x, _ = batch(size=3)
    label = jnp.asarray([0.3, -1.1, 0.8] if net.embedding_type == "fourier" else [3.5, 80.0, 870.0])
    cond = CLASSES if net.num_classes else None
    augment = AUGMENT if net.augment_dim else None
    params = weights(net, x, label, cond)
    got = quick(net.apply)(params, x, label, cond, augment=augment)
    reference = numpy_edm.Song(float64(params["params"]), augment, **fields(net))
    agree(got, reference(np.asarray(x, np.float64), np.asarray(label, np.float64), cond))


NCSN = {
    "embedding_type": "fourier",
    "embedding_mult": 2,
    "progressive_input": "residual",
    "fir_kernel": (1, 3, 3, 1),
}


@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": 3, "augment_dim": 9},
        {**NCSN, "num_classes": 3, "augment_dim": 9},
        slow({"progressive_input": "input_skip", "progressive": "output_skip"}),
        slow({"num_classes": 3}),
        slow({**NCSN, "fir_kernel": (1, 1)}),
    ],
    ids=["ddpmpp", "ncsnpp", "skips", "classes", "fused-nearest"],
)
def test_songunet_against_numpy(options):
    compare_song(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": 3, "augment_dim": 9},
        slow({"num_heads": 4, "out_channels": 6, "ch_mult": (1.5, 1, 2)}),
    ],
    ids=["labels", "heads"],
)
def test_adm_against_numpy(options):
    net = ADM(**{**ADM_SMALL, **options})
    x, label = batch(size=3)[0], jnp.asarray([3.5, 80.0, 870.0])
    cond = CLASSES if net.num_classes else None
    augment = AUGMENT if net.augment_dim else None
    params = weights(net, x, label, cond)
    got = quick(net.apply)(params, x, label, cond, augment=augment)
    reference = numpy_edm.ADM(float64(params["params"]), **fields(net))
    want = reference(np.asarray(x, np.float64), np.asarray(label, np.float64), cond, augment)
    agree(got, want)


def dit_case(**options):
    net = DiT(**{**DIT_SMALL, **options})
    x, label = batch(size=3, channels=4)[0], jnp.asarray([0.25, 80.0, 870.0])
    return net, x, label, weights(net, x, label, CLASSES)


@pytest.mark.parametrize("patch_size", [2, slow(4)])
def test_dit_against_numpy(patch_size):
    net, x, label, params = dit_case(patch_size=patch_size)
    got = quick(net.apply)(params, x, label, CLASSES)
    sizes = {name: getattr(net, name) for name in ("depth", "width", "num_heads", "patch_size")}
    want = numpy_edm.dit(
        float64(params["params"]), np.float64(x), np.float64(label), CLASSES % 4, **sizes
    )
    assert got.shape == (3, 8, 8, 8)
    agree(got, want)
    sit = DiT(**{**DIT_SMALL, "patch_size": patch_size, "return_sigma": False})
    out = quick(sit.apply)(params, x, label, CLASSES)
    np.testing.assert_allclose(out, got[..., :4], rtol=1e-5, atol=1e-6)


def test_the_place_of_a_patch_is_fixed_sinusoids_that_no_gradient_reaches():
    net = DiT(**{**DIT_SMALL, "depth": 1})
    x, label = jnp.zeros((1, 4, 12, 4)), jnp.ones((1,))
    params = quick(net.init)(jax.random.key(0), x, label, np.array([1]))["params"]
    want = [numpy_edm.place(i, j, 16) for i in range(2) for j in range(6)]
    np.testing.assert_allclose(params["pos_embed"], np.stack(want), atol=1e-6)
    random = weights(net, jnp.zeros((1, 8, 8, 4)), label, np.array([1]))
    x = batch(size=1, channels=4)[0]
    grads = quick(jax.grad(lambda p: jnp.sum(net.apply(p, x, label, np.array([1])) ** 2)))(random)
    assert not np.any(grads["params"]["pos_embed"])
    assert np.any(grads["params"]["x_embedder"]["bias"])


def test_a_new_dit_returns_exactly_zero():
    net, x, label, _ = dit_case()
    out, variables = quick(net.init_with_output)(jax.random.key(0), x, label, CLASSES)
    assert not np.any(out)
    zero = {"adaLN", "final_adaLN", "final_linear"}
    flat = jax.tree_util.tree_leaves_with_path(variables["params"])
    kernels = [(path, leaf) for path, leaf in flat if path[-1].key in ("kernel", "embedding")]
    assert all((path[-2].key in zero) == (not np.any(leaf)) for path, leaf in kernels)
    table = np.asarray(variables["params"]["y_embedder"]["embedding"])
    assert 0.01 < table.std() < 0.03


def test_a_new_adm_returns_exactly_zero_and_starts_as_pytorch_does():
    net = ADM(**{**ADM_SMALL, **LEVEL, "augment_dim": 9})
    x, label = batch(size=3)
    out, variables = quick(net.init_with_output)(jax.random.key(0), x, label, CLASSES)
    params = variables["params"]
    assert not np.any(out) and not np.any(params["map_augment"]["kernel"])
    block = params["ADMBlock_3"]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(block["conv1"]))
    bound = 1 / np.sqrt(np.prod(block["conv0"]["kernel"].shape[:-1]))
    for leaf in (block["conv0"]["kernel"], block["conv0"]["bias"]):
        assert 0.7 * bound < np.abs(leaf).max() <= bound
    assert 0.7 < np.std(params["map_label"]["kernel"]) < 1.3


@pytest.mark.slow
def test_songunet_starts_as_its_trunk_does():
    """EDM's sqrt(0.2) on a fused q, k, v is the trunk's scale 0.1 on each of the three."""
    net = SongUNet(**{**SONG, **LEVEL, "nf": 32})
    x, label = batch(size=3)
    params = quick(net.init)(jax.random.key(0), x, label, CLASSES)["params"]
    kernel = np.asarray(params["unet"]["AttnBlockpp_0"]["NIN_0"]["W"])
    channels = kernel.shape[0]
    fused = np.sqrt(6 / (channels + 3 * channels)) * np.sqrt(0.2)
    assert 0.95 * fused < np.abs(kernel).max() <= fused
    assert not np.any(params["map_label"]["bias"])


# One level each: the laws below do not depend on depth, and compile in a third of the time.
LEVEL = {"ch_mult": (1,), "attn_resolutions": (), "num_classes": 3}
NETS = {
    "songunet": (SongUNet, {**SONG, **LEVEL}),
    "adm": (ADM, {**ADM_SMALL, **LEVEL}),
    "dit": (DiT, {**DIT_SMALL, "depth": 1, "learn_sigma": False}),
}


@pytest.fixture(scope="module", params=list(NETS))
def made(request):
    """A network that drops classes and (the U-Nets) values, its weights and compiled functions."""
    build, options = NETS[request.param]
    rates = {"label_dropout": 0.5} | ({} if build is DiT else {"dropout": 0.3})
    net = build(**options, **rates)
    x, label = batch(size=4, channels=4)
    cond = np.array([0, 1, 2, 1])
    params = weights(net, x, label, cond)

    def train(params, x, label, cond, key):
        rngs = {"dropout": key, "label_dropout": key}
        return net.apply(params, x, label, cond, train=True, rngs=rngs)

    return net, params, quick(net.apply), quick(train), (x, label, cond)


def test_a_sample_does_not_depend_on_its_neighbours(made):
    _, params, apply, train, (x, label, cond) = made
    key = jax.random.key(3)
    whole = train(params, x, label, cond, key)
    part = train(params, x[:2], label[:2], cond[:2], key)
    np.testing.assert_allclose(whole[:2], part, rtol=1e-4, atol=1e-5)
    other = x.at[2:].set(-x[2:])
    np.testing.assert_array_equal(whole[:2], train(params, other, label, cond, key)[:2])
    whole, changed = (apply(params, images, label, cond) for images in (x, other))
    np.testing.assert_array_equal(whole[:2], changed[:2])


def test_one_image_under_vmap_and_one_label_for_all(made):
    net, params, apply, _, (x, _, cond) = made
    want = apply(params, x, jnp.full((4,), 0.7), cond)
    np.testing.assert_allclose(apply(params, x, jnp.float32(0.7), cond), want, rtol=1e-5, atol=1e-6)
    one = jax.vmap(lambda x, c: net.apply(params, x, jnp.float32(0.7), c))
    np.testing.assert_allclose(quick(one)(x, cond), want, rtol=1e-4, atol=1e-5)


def test_a_dropped_class_is_no_class(made):
    """With the rate 1 every class is -1; with the rate 0 none is."""
    net, params, apply, _, (x, label, cond) = made
    rngs = {"label_dropout": jax.random.key(0)}
    plain = {} if isinstance(net, DiT) else {"dropout": 0.0}
    for rate, classes in ((1.0, np.full(4, -1)), (0.0, cond)):
        forced = net.clone(label_dropout=rate, **plain)
        got = quick(partial(forced.apply, train=True, rngs=rngs))(params, x, label, cond)
        want = apply(params, x, label, classes)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    nothing, first = (apply(params, x, label, np.full(4, c)) for c in (-1, 0))
    assert not np.allclose(nothing, first, atol=1e-3)


def test_classes_are_dropped_at_the_rate():
    """n = 4096 equal samples: 4 standard errors are 0.025. The rarer result is that of no class."""
    net = DiT(**{**DIT_SMALL, "depth": 1, "label_dropout": 0.2, "patch_size": 2})
    x, label = jnp.ones((4096, 2, 2, 1)), jnp.zeros(())
    params = weights(net, x[:1], label, np.array([1]))
    rngs = {"label_dropout": jax.random.key(1)}
    out = quick(lambda: net.apply(params, x, label, np.int32(1), train=True, rngs=rngs))()
    out = np.asarray(out)
    changed = np.abs(out - np.median(out, axis=0)).max(axis=(1, 2, 3)) > 1e-3
    assert abs(changed.mean() - 0.2) < 4 * 0.4 / 64


def test_dropout_keys_and_repetition(made):
    _, params, _, train, inputs = made
    first, again, other = (train(params, *inputs, jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other, atol=1e-3)


@pytest.mark.parametrize("name", [slow("songunet"), slow("adm"), "dit"])
def test_remat_changes_nothing(name):
    build, options = NETS[name]
    net = build(**options)
    (x, label), cond = batch(size=4, channels=4), np.array([0, 1, 2, 1])
    params = weights(net, x, label, cond)

    def gradient(net):
        def loss(params):
            rngs = {"dropout": jax.random.key(7), "label_dropout": jax.random.key(8)}
            return jnp.mean((net.apply(params, x, label, cond, train=True, rngs=rngs) - x) ** 2)

        return quick(jax.grad(loss))(params)

    plain, remat = gradient(net), gradient(net.clone(remat=True))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(remat), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5)


@pytest.mark.slow
def test_bfloat16_keeps_parameters_and_result_in_float32(made):
    net, params, apply, _, inputs = made
    low = net.clone(dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes(low, 8, 4))} == {jnp.dtype("float32")}
    got, want = quick(low.apply)(params, *inputs), apply(params, *inputs)
    assert got.dtype == jnp.float32
    gap = float(jnp.sqrt(jnp.mean((got - want) ** 2) / jnp.mean(want**2)))
    assert 1e-4 < gap < 0.03


@pytest.mark.slow
def test_float64_where_asked_for(x64):
    x = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float64)
    label = jax.ShapeDtypeStruct((), jnp.float32)
    cond = jax.ShapeDtypeStruct((1,), jnp.int32)
    for build, options in NETS.values():
        net = build(**options, dtype=jnp.float64)
        out, params = jax.eval_shape(net.init_with_output, jax.random.key(0), x, label, cond)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
        assert out.dtype == jnp.float64


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SongUNet(embedding_type="sine"), "embedding_type must be one of"),
        (lambda: SongUNet(embedding_mult=0), "embedding_mult"),
        (lambda: SongUNet(label_dropout=0.1), "label_dropout needs num_classes"),
        (lambda: SongUNet(augment_dim=-1), "augment_dim"),
        (lambda: SongUNet(progressive="residual"), "progressive must be one of"),
        (lambda: SongUNet(ch_mult=(0.5,)), "ch_mult must be an int"),
        (lambda: SongUNet(fir_kernel=(1, -1)), "fir_kernel"),
        (lambda: SongUNet(dropout=1.0), "dropout"),
        (lambda: ADM(num_heads=0), "num_heads"),
        (lambda: ADM(channels_per_head=0), "channels_per_head"),
        (lambda: ADM(ch_mult=()), "ch_mult"),
        (lambda: ADM(label_dropout=1.5, num_classes=2), "label_dropout must lie in"),
        (lambda: ADM(dtype=jnp.int32), "dtype"),
        (lambda: DiT(width=18, num_heads=2), "width must be divisible by 4"),
        (lambda: DiT(width=16, num_heads=3), "width must be divisible by 4"),
        (lambda: DiT(implementation="flash"), "implementation must be one of"),
        (lambda: DiT(depth=0), "depth"),
        (lambda: DiT.named("XXL/2"), "size must be one of S, B, L, XL"),
        (lambda: DiT.named("XL"), "size must be one of"),
    ],
)
def test_options_that_cannot_be_used_raise_at_construction(build, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build()


def test_inputs_that_do_not_fit_raise():
    x, label = batch()
    song, adm, dit = SongUNet(**SONG), ADM(**ADM_SMALL), DiT(**DIT_SMALL)

    def init(net, x=x, label=label, cond=None, **options):
        make = partial(net.init, cond=cond, **options)
        return jax.eval_shape(make, jax.random.key(0), x, label)

    for net in (song, adm):
        with pytest.raises(ValueError, match="divisible by 2; got 7 x 8"):
            init(net, x[:, :7])
        with pytest.raises(ValueError, match="takes no augmentation labels"):
            init(net, augment=jnp.zeros((2, 9)))
        with pytest.raises(ValueError, match=r"augment must have shape \(2, 9\); got \(2, 8\)"):
            init(net.clone(augment_dim=9), augment=jnp.zeros((2, 8)))
    with pytest.raises(ValueError, match=r"heights of the levels, here \[8, 4\]; got \[16\]"):
        init(adm.clone(attn_resolutions=(16,)))
    with pytest.raises(ValueError, match="do not split into 3 heads"):
        init(adm.clone(num_heads=3))
    with pytest.raises(ValueError, match="patch_size=3 must divide"):
        init(dit.clone(patch_size=3), cond=np.zeros(2, int))
    for net in (song, adm, dit):
        with pytest.raises(ValueError, match=r"label must have shape \(\) or \(2,\)"):
            init(net, label=jnp.ones((3,)), cond=None if net is not dit else np.zeros(2, int))
        with pytest.raises(ValueError, match="x must have shape"):
            init(net, x[0, 0])
        with pytest.raises(ValueError, match="if and only if num_classes is set"):
            init(net, cond=None if net is dit else np.zeros(2, int))
        with pytest.raises(ValueError, match="cond must lie in"):
            jax.eval_shape(
                lambda key, net=net: net.clone(num_classes=3).init(key, x, label, np.array([0, 4])),
                jax.random.key(0),
            )


def test_an_image_as_it_is_has_augmentation_labels_of_zero():
    net = SongUNet(**{**SONG, **LEVEL, "num_classes": None, "augment_dim": 9})
    x, label = batch()
    params = weights(net, x, label)
    apply = quick(net.apply)
    plain, zero, changed = (
        apply(params, x, label, augment=augment)
        for augment in (None, jnp.zeros((2, 9)), jnp.ones((2, 9)))
    )
    np.testing.assert_allclose(plain, zero, rtol=1e-5, atol=1e-6)
    assert not np.allclose(plain, changed, atol=1e-3)


def test_a_trunk_whose_embedding_is_given_takes_no_label():
    given = partial(NCSNpp, **SONG, embedding_type="given")
    with pytest.raises(ValueError, match="leaves label and class to the caller"):
        given(num_classes=3)
    x, _ = batch()
    for wrong in (jnp.ones((2,)), jnp.ones((3, 32))):
        with pytest.raises(ValueError, match=r"must have shape \(2, D\)"):
            jax.eval_shape(given().init, jax.random.key(0), x, wrong)
