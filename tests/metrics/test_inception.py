"""FID's Inception: exact counts, every block and the whole against NumPy, the input, the file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.metrics import inception
from diffjax.metrics.inception import Inception, InceptionV3, bilinear, from_torch
from tests.metrics import numpy_inception as ref


def numbers(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def shapes():
    image = jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)
    return jax.eval_shape(InceptionV3().init, jax.random.key(0), image)


def test_counts(shapes):
    """From the layers, and from two published counts of the same graph.

    Keras's Inception v3 has 23,851,784 numbers: no scales (17,216 fewer), 1000 classes (8 x 2049
    fewer). torchvision's without its auxiliary head has 23,834,568 trained: 8 classes fewer.
    """
    assert len(ref.conv_shapes()) == 94
    trained, stored = numbers(shapes["params"]), numbers(shapes["batch_stats"])
    convs = ref.conv_shapes().values()
    by_layers = sum(int(np.prod(s)) + 2 * s[0] for s in convs) + 2048 * 1008 + 1008
    assert trained == by_layers == 23_850_960
    assert stored == sum(2 * s[0] for s in convs) == 34_432
    assert trained + stored == 23_885_392 == 23_851_784 + 17_216 + 8 * 2049
    assert trained == 23_834_568 + 8 * 2049


def test_sizes_of_the_graph():
    """Known sizes at 299 px: 2048 features and 1008 logits."""
    image = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.uint8)
    variables = jax.eval_shape(
        InceptionV3().init, jax.random.key(0), jax.ShapeDtypeStruct((1, 75, 75, 3), jnp.float32)
    )
    outputs = jax.eval_shape(lambda v, x: Inception(v)(x), variables, image)
    assert outputs.features.shape == (2, 2048)
    assert outputs.logits.shape == (2, 1008)


def variables_of(state, module):
    """A block's variables by the map that the whole network's file goes through."""
    tree: dict = {"params": {}, "batch_stats": {}}
    for name, value in state.items():
        _, conv, part, last = name.split(".")
        if part == "conv":
            value = value.transpose(2, 3, 1, 0)
        where, leaf = {
            ("conv", "weight"): ("params", "kernel"),
            ("bn", "weight"): ("params", "scale"),
            ("bn", "bias"): ("params", "bias"),
            ("bn", "running_mean"): ("batch_stats", "mean"),
            ("bn", "running_var"): ("batch_stats", "var"),
        }.get((part, last), (None, None))
        if where:
            tree[where].setdefault(conv, {}).setdefault(part, {})[leaf] = value
    return tree


BLOCKS = {
    "A": (inception.BlockA(32), "Mixed_5b", ref.block_a, 192),
    "C": (inception.BlockC(128), "Mixed_6b", ref.block_c, 768),
    "E_1": (inception.BlockE(False), "Mixed_7b",
            lambda s, n, x: ref.block_e(s, n, x, ref.average_pool), 1280),
    "E_2": (inception.BlockE(True), "Mixed_7c",
            lambda s, n, x: ref.block_e(s, n, x, ref.last_maximum), 2048),
}  # fmt: skip


def check_block(module, name, reference, channels):
    """On 5 x 4 pixels, all but six of which touch the padding."""
    rng = np.random.default_rng(0)
    state = ref.random_state(rng, {f"{name}.{k}": s for k, s in ref.SHAPES[name].items()})
    x = rng.uniform(0, 1, (2, channels, 5, 4)).astype(np.float32)
    want = reference(state, name, x).transpose(0, 2, 3, 1)
    got = jax.jit(module.apply)(variables_of(state, module), x.transpose(0, 2, 3, 1))
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("block", BLOCKS)
def test_quirky_blocks_against_numpy(block):
    check_block(*BLOCKS[block])


def test_mutant_pools():
    """The averages with padding, and an average in the last block, are seen."""
    module, name, _, channels = BLOCKS["E_2"]
    with pytest.raises(AssertionError):
        check_block(module, name, BLOCKS["E_1"][2], channels)

    def padded(s, n, x):
        windows = np.lib.stride_tricks.sliding_window_view(
            np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), axis=(2, 3)
        )
        return ref.block_e(s, n, x, lambda _: windows.mean(axis=(4, 5)))

    module, name, _, channels = BLOCKS["E_1"]
    with pytest.raises(AssertionError):
        check_block(module, name, padded, channels)


@pytest.fixture(scope="module")
def state():
    return ref.random_state(np.random.default_rng(0))


@pytest.mark.slow
def test_the_whole_network_against_numpy(state):
    """At 111 px, through the map of the file's names: features and logits."""
    x = np.random.default_rng(1).uniform(-1, 1, (2, 3, 111, 107)).astype(np.float32)
    features, logits = ref.forward(state, x)
    got = jax.jit(InceptionV3().apply)(from_torch(state), x.transpose(0, 2, 3, 1))
    assert features.std() > 0.01
    np.testing.assert_allclose(got.features, features, rtol=1e-3, atol=1e-3 * features.std())
    np.testing.assert_allclose(got.logits, logits, rtol=1e-3, atol=1e-3 * logits.std())


def test_names_and_layout_of_the_file(state):
    """Each tensor lands where its name says, transposed; also those no block test covers."""
    tree = from_torch(state)
    kernel = tree["params"]["Mixed_7a"]["branch7x7x3_3"]["conv"]["kernel"]
    np.testing.assert_array_equal(
        kernel[5, 0], state["Mixed_7a.branch7x7x3_3.conv.weight"][:, :, 5, 0].T
    )
    np.testing.assert_array_equal(tree["params"]["fc"]["kernel"], state["fc.weight"].T)
    stats = tree["batch_stats"]["Conv2d_4a_3x3"]["bn"]
    np.testing.assert_array_equal(stats["mean"], state["Conv2d_4a_3x3.bn.running_mean"])
    np.testing.assert_array_equal(stats["var"], state["Conv2d_4a_3x3.bn.running_var"])
    scale = tree["params"]["Mixed_6a"]["branch3x3"]["bn"]
    np.testing.assert_array_equal(scale["scale"], state["Mixed_6a.branch3x3.bn.weight"])
    np.testing.assert_array_equal(scale["bias"], state["Mixed_6a.branch3x3.bn.bias"])


def test_foreign_files_are_refused(state):
    with pytest.raises(ValueError, match="1 tensors are missing.*fc.bias.*Get https://github.com"):
        from_torch({k: v for k, v in state.items() if k != "fc.bias"})
    with pytest.raises(ValueError, match="1 foreign .AuxLogits.fc.weight"):
        from_torch(state | {"AuxLogits.fc.weight": np.zeros((1, 1), np.float32)})
    with pytest.raises(ValueError, match=r"fc.weight must have the shape \(2048, 1008\)"):
        from_torch(state | {"fc.weight": np.zeros((1000, 2048), np.float32)})


def by_hand(image, size, half_pixels):
    """Bilinear reading, pixel by pixel. image: (H, W)."""

    def read(n, i):
        p = (i + 0.5) * n / size - 0.5 if half_pixels else i * n / size
        p = min(max(p, 0.0), n - 1.0)
        low = int(p)
        return low, min(low + 1, n - 1), p - low

    out = np.zeros((size, size))
    for i in range(size):
        a, b, u = read(image.shape[0], i)
        for j in range(size):
            c, d, v = read(image.shape[1], j)
            top = (1 - v) * image[a, c] + v * image[a, d]
            low = (1 - v) * image[b, c] + v * image[b, d]
            out[i, j] = (1 - u) * top + u * low
    return out


@pytest.mark.parametrize("half_pixels", [True, False])
@pytest.mark.parametrize("shape", [(4, 6), (25, 17)])
def test_resize_against_reading_by_hand(rng, half_pixels, shape):
    """Up and down; down without antialiasing."""
    image = rng.uniform(0, 255, shape)
    got = bilinear(jnp.asarray(image, jnp.float32)[None, :, :, None], 11, half_pixels=half_pixels)
    np.testing.assert_allclose(got[0, :, :, 0], by_hand(image, 11, half_pixels), atol=1e-4)


def test_resize_is_the_known_one_where_it_enlarges(rng):
    """With half pixels, JAX's own bilinear enlargement."""
    x = rng.uniform(0, 1, (2, 8, 8, 3)).astype(np.float32)
    want = jax.image.resize(x, (2, 299, 299, 3), "bilinear")
    np.testing.assert_allclose(bilinear(x, 299, half_pixels=True), want, atol=1e-5)


def test_what_the_network_sees(monkeypatch):
    """Ends of the range by input and levels; grey is repeated."""
    seen = []

    class Spy:
        def apply(self, variables, x):
            seen.append(x)

    monkeypatch.setattr(inception, "InceptionV3", Spy)
    black, white = (jnp.full((1, 8, 8, 1), v, jnp.uint8) for v in (0, 16))
    for name, ends in (("pytorch_fid", (-1, 1)), ("tfgan", (-1, 1)), ("tf2015", (-1, 127 / 128))):
        for image, end in zip((black, white), ends, strict=True):
            Inception({}, levels=17, input=name)(image)
            assert seen[-1].shape == (1, 299, 299, 3)
            np.testing.assert_allclose(seen[-1], end, atol=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match="input must be one of"):
        Inception({}, input="torchvision")
    with pytest.raises(TypeError, match="integer levels"):
        Inception({})(jnp.zeros((1, 8, 8, 3)))
    with pytest.raises(ValueError, match="1 or 3"):
        Inception({})(jnp.zeros((1, 8, 8, 4), jnp.uint8))
