"""Non-leaking augmentation: against SciPy and closed forms, and its labels against its draw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, signal

from diffjax.data import Augment
from diffjax.data.augment import SYM6, Change, apply, source_map
from tests.nets.common import QUICK

SIZE = 40
# The filter's centre of mass lies behind its middle by this many pixels, down and up again.
LAG = (np.arange(12) @ SYM6 / np.sum(SYM6) - 5) / 2
run = jax.jit(apply, compiler_options=QUICK)
pipeline = jax.jit(lambda augment, key, images: augment(key, images), compiler_options=QUICK)


def change(size=1, **values):
    """A change of `size` samples: zeros, or the values given."""
    zeros = {name: jnp.zeros((size,), jnp.float32) for name in Change._fields}
    given = {name: jnp.broadcast_to(jnp.float32(v), (size,)) for name, v in values.items()}
    return Change(**{**zeros, **given})


def applied(image, **values):
    return np.asarray(run(change(**values), jnp.asarray(image[None], jnp.float32))[0])


def bump(centre=(3.0, -2.0), widths=(2.0, 2.0), size=SIZE):
    """A Gaussian at (column, row) from the centre of the image: zero at the border."""
    at = np.arange(size) - (size - 1) / 2
    x, y = np.meshgrid(at - centre[0], at - centre[1])
    return np.exp(-(x**2) / (2 * widths[0] ** 2) - y**2 / (2 * widths[1] ** 2))[..., None]


def moments(image):
    """Mean and covariance of the image as a density over (column, row) from its centre."""
    at = np.arange(image.shape[0]) - (image.shape[0] - 1) / 2
    x, y = np.meshgrid(at, at)
    points, mass = np.stack([x.ravel(), y.ravel()]), image[..., 0].ravel()
    mean = points @ mass / mass.sum()
    centred = points - mean[:, None]
    return mean, (mass * centred) @ centred.T / mass.sum()


def counter_clockwise(angle):
    """The turn by an angle as one sees it, where rows run downwards."""
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def test_without_probability_images_are_as_they_are(key, rng):
    images = rng.uniform(-1, 1, (16, 6, 7, 3)).astype(np.float32)
    out, labels = pipeline(Augment(p=0.0), key, images)
    np.testing.assert_array_equal(out, images)
    np.testing.assert_array_equal(labels, np.zeros((16, 9)))


@pytest.mark.parametrize(("kind", "flip"), [("flip_columns", np.fliplr), ("flip_rows", np.flipud)])
def test_flips_are_exact_and_labelled(key, rng, kind, flip):
    images = rng.uniform(-1, 1, (64, 6, 7, 3)).astype(np.float32)
    only = dict.fromkeys(("flip_columns", "flip_rows"), 0.0) | {kind: 1e8}
    augment = Augment(p=1e-3, scale=0, turn=0, stretch=0, shift=0, **only)
    out, labels = pipeline(augment, key, images)
    flipped = labels[:, 0 if kind == "flip_columns" else 1]
    assert 16 < flipped.sum() < 48
    for image, got, w in zip(images, out, flipped, strict=True):
        np.testing.assert_array_equal(got, flip(image) if w else image)
    assert np.count_nonzero(labels) == flipped.sum()


@pytest.mark.parametrize(("columns", "rows"), [(3, 0), (0, -2), (5, 4)])
def test_shifts_by_whole_pixels_are_exact_and_mirror_at_the_border(rng, columns, rows):
    image = rng.uniform(-1, 1, (8, 16, 2))
    got = applied(image, shift_x=columns / 2, shift_y=rows)  # W / 8 = 2, H / 8 = 1
    padded = np.pad(image, ((7, 7), (15, 15), (0, 0)), mode="reflect")
    want = padded[7 - rows : 15 - rows, 15 - columns : 31 - columns]
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_quarter_turns_of_a_smooth_image():
    """Within a lag of LAG sqrt(8) = 0.14 pixels, as the filter is not quite symmetric."""
    image = bump() + 0.5 * bump((-4.0, 1.0), (3.0, 2.5))
    steepest = np.abs(np.diff(image, axis=0)).max() + np.abs(np.diff(image, axis=1)).max()
    for quarters in (1, 2, 3):
        got = applied(image, angle=quarters * np.pi / 2)
        np.testing.assert_allclose(got, np.rot90(image, quarters), atol=0.14 * steepest)


def test_a_turn_moves_a_smooth_image_where_it_should_be():
    """Against the turned function itself: within 1.2 % of its height beside the filter's lag."""
    for angle in (0.3, -1.0, 2.5):
        image = bump((5.0, -2.0), (2.5, 2.5))
        centre = counter_clockwise(angle) @ (np.array([5.0, -2.0]) + LAG) - LAG
        want = bump(centre, (2.5, 2.5))
        np.testing.assert_allclose(applied(image, angle=angle), want, atol=1.2e-2)


@pytest.mark.parametrize(
    ("values", "linear"),
    [
        ({"scale": 1.0}, 2**0.2 * np.eye(2)),
        ({"scale": -2.0}, 2**-0.4 * np.eye(2)),
        ({"angle": 0.7}, counter_clockwise(0.7)),
        ({"stretch": 1.5}, np.diag([2**0.3, 2**-0.3])),
        ({"angle": 0.7, "stretch": 1.5}, np.diag([2**0.3, 2**-0.3]) @ counter_clockwise(0.7)),
        (
            {"stretch": -1.0, "axis": 0.6},
            counter_clockwise(0.6) @ np.diag([2**-0.2, 2**0.2]) @ counter_clockwise(-0.6),
        ),
    ],
    ids=str,
)
def test_first_and_second_moments_follow_the_change(values, linear):
    """Linear interpolation widens a peak by less than 0.25 pixels here."""
    image = bump((2.0, 1.0), (2.5, 1.8))
    mean, covariance = moments(image)
    got_mean, got_covariance = moments(applied(image, **values))
    np.testing.assert_allclose(got_mean, linear @ (mean + LAG) - LAG, atol=2e-3)
    np.testing.assert_allclose(got_covariance, linear @ covariance @ linear.T, atol=0.25**2 + 1e-2)


def test_the_shift_comes_last():
    """It moves the result by itself, whatever the rest."""
    rest = {"scale": 0.8, "angle": 1.1, "stretch": 0.9, "axis": -0.4}
    still, _ = moments(applied(bump((1.0, 1.0)), **rest))
    moved, _ = moments(applied(bump((1.0, 1.0)), **rest, shift_x=1.0, shift_y=-0.5))
    np.testing.assert_allclose(moved - still, [SIZE / 8, -SIZE / 16], atol=2e-3)


def slow_warp(image, matrix, offset):
    """The warp by SciPy in float64: zeros between samples, convolutions, order 1 interpolation."""
    height, width, channels = image.shape
    pads = ((height - 1,) * 2, (width - 1,) * 2)
    out = np.zeros(image.shape)
    kernel = np.outer(SYM6, SYM6)
    for c in range(channels):
        padded = np.pad(image[..., c], pads, mode="reflect")
        fine = np.zeros((2 * padded.shape[0], 2 * padded.shape[1]))
        fine[::2, ::2] = padded
        fine = signal.convolve2d(fine, kernel)[5:-6, 5:-6]
        rows, columns = np.mgrid[-6 : 2 * height + 6, -6 : 2 * width + 6] / 2.0
        place = np.stack([columns - (width - 1) / 2, rows - (height - 1) / 2])
        x, y = np.einsum("ab,bij->aij", matrix, place) + offset[:, None, None]
        at = [2 * y + padded.shape[0] - 1, 2 * x + padded.shape[1] - 1]
        read = ndimage.map_coordinates(fine, at, order=1, mode="grid-constant")
        coarse = signal.correlate2d(np.pad(read, 5), kernel, mode="valid")[::2, ::2]
        out[..., c] = coarse[3:-3, 3:-3]
    return out


def test_random_changes_against_scipy(rng):
    images = rng.uniform(-1, 1, (6, 10, 12, 2))
    keys = jax.random.split(jax.random.key(4), 6)
    drawn = Augment(p=1.0, flip_columns=0, flip_rows=0).draw(keys)
    got = run(drawn, jnp.asarray(images, jnp.float32))
    matrix, offset = (np.asarray(v, np.float64) for v in source_map(drawn, 10, 12))
    for i in range(6):
        want = slow_warp(images[i], matrix[i], offset[i])
        np.testing.assert_allclose(got[i], want, atol=2e-4)


def test_a_sample_does_not_depend_on_its_neighbours(key, rng):
    images = jnp.asarray(rng.uniform(-1, 1, (5, 8, 8, 1)), jnp.float32)
    augment = Augment(p=0.7)
    out, labels = pipeline(augment, key, images)
    part, part_labels = pipeline(augment, key, images[:2])
    np.testing.assert_allclose(out[:2], part, atol=1e-6)
    np.testing.assert_array_equal(labels[:2], part_labels)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(5))
    np.testing.assert_array_equal(pipeline(augment, keys, images)[1], labels)


@pytest.fixture(scope="module")
def drawn():
    """Ten thousand draws at p = 0.3: 4 standard errors of a rate are below 0.02."""
    keys = jax.random.split(jax.random.key(9), 10_000)
    change = jax.jit(Augment(p=0.3).draw)(keys)
    return change, np.asarray(change.labels())


def test_how_often_each_change_happens(drawn):
    _, labels = drawn
    active = labels != 0
    wanted = [0.5, 0.15, 0.3, 0.3, 0.3, 0.3, 0.15, 0.3, 0.3]  # half of the axes are 0
    np.testing.assert_allclose(active.mean(0), wanted, atol=0.02)
    together = {(0, 2): 0.15, (2, 3): 0.09, (3, 5): 0.09, (5, 7): 0.09, (3, 4): 0.3, (7, 8): 0.3}
    for (a, b), rate in together.items():
        assert abs(np.mean(active[:, a] & active[:, b]) - rate) < 0.02


def test_how_large_the_changes_are(drawn):
    """Standard normal numbers, uniform angles; about 3000 draws of each: 4 errors are 0.055."""
    change, labels = drawn
    for column in (2, 7, 8):
        w = labels[labels[:, column] != 0, column]
        assert abs(w.mean()) < 0.08 and abs(w.std() - 1) < 0.055
    radius = np.hypot(labels[:, 5], labels[:, 6])
    np.testing.assert_allclose(radius, np.abs(change.stretch), atol=1e-6)
    assert abs(np.mean(radius[radius > 0] ** 2) - 1) < 0.11
    np.testing.assert_allclose(np.hypot(1 + labels[:, 3], labels[:, 4]), 1, atol=1e-5)
    turn = np.arctan2(labels[:, 4], 1 + labels[:, 3])
    np.testing.assert_allclose(turn, change.angle, atol=1e-5)
    turned = turn[labels[:, 3] != 0]
    assert abs(np.mean(turned**2) - np.pi**2 / 3) < 0.22 and turned.min() < -3 and turned.max() > 3


def test_gradients_and_precision():
    image = jnp.asarray(bump(size=8), jnp.float32)[None]
    moved = change(angle=0.4)
    total = jax.grad(lambda v: apply(moved, v).sum())
    gradient = jax.jit(total, compiler_options=QUICK)(image)
    assert np.isfinite(gradient).all() and np.any(gradient)
    low = jax.ShapeDtypeStruct(image.shape, jnp.bfloat16)
    assert jax.eval_shape(apply, moved, low).dtype == jnp.bfloat16


def test_what_it_refuses(key):
    with pytest.raises(ValueError, match=r"p must lie in \[0.0, 1.0\]"):
        Augment(p=1.2)
    with pytest.raises(ValueError, match="shift must not be negative"):
        Augment(shift=-1)
    for wrong in (np.zeros((2, 4, 4, 3), np.uint8), np.zeros((4, 4, 3), np.float32)):
        with pytest.raises(ValueError, match=r"reals of shape \(B, H, W, C\)"):
            Augment()(key, wrong)
