"""Sources over arrays and files: pixel-exact, in a fixed order, clear about what they refuse."""

import numpy as np
import PIL.Image
import pytest

from diffjax.data import array_source, folder_source, in_memory
from diffjax.data.images import fit


@pytest.fixture
def images(rng):
    return rng.integers(0, 256, (6, 5, 7, 3), dtype=np.uint8)


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path)


def pixels(source):
    return np.stack([source[i]["image"] for i in range(len(source))])


def labels(source):
    return [source[i]["label"].tolist() for i in range(len(source))]


def test_arrays_come_back(images):
    source = array_source(images, np.array([0, 3, 1, 1, 0, 2]))
    np.testing.assert_array_equal(pixels(source), images)
    assert labels(source) == [0, 3, 1, 1, 0, 2]
    assert source[1]["label"].dtype == np.int32
    info = source.info
    assert (info.shape, info.levels, info.num_classes, info.size) == ((5, 7, 3), 256, 4, 6)


def test_an_npz_comes_back(tmp_path, images):
    np.savez(tmp_path / "both.npz", images=images, labels=np.arange(6))
    np.savez_compressed(tmp_path / "bare.npz", images=images)
    both, bare = array_source(tmp_path / "both.npz"), array_source(str(tmp_path / "bare.npz"))
    np.testing.assert_array_equal(pixels(both), images)
    np.testing.assert_array_equal(pixels(bare), images)
    assert labels(both) == list(range(6))
    assert (both.info.name, both.info.num_classes) == ("both.npz", 6)
    assert set(bare[0]) == {"image"}
    assert bare.info.num_classes is None


def test_few_levels_are_checked(images):
    source = array_source(images % 17, levels=17)
    assert source.info.levels == 17
    with pytest.raises(ValueError, match="lie below its 16 levels; got 16"):
        array_source(images % 17, levels=16)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("suffix", [".png", ".PNG"])
def test_a_folder_of_pngs_comes_back(tmp_path, rng, channels, suffix):
    images = rng.integers(0, 256, (11, 4, 6, channels), dtype=np.uint8)
    for i, image in enumerate(images):
        save(tmp_path / f"{i:02d}{suffix}", image)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / f".hidden{suffix}").write_text("no image")
    source = folder_source(tmp_path)
    np.testing.assert_array_equal(pixels(source), images)
    assert set(source[0]) == {"image"}
    info = source.info
    assert (info.shape, info.num_classes, info.size) == ((4, 6, channels), None, 11)


def test_subfolders_are_classes_in_sorted_order(tmp_path, images):
    # The order of the paths' text, whatever the order of creation; depth below a class is free.
    places = ["dog/b.png", "cat/z.png", "dog/a/c.png", "ape/a.png", "cat/a.png", "dog/a.png"]
    for place, image in zip(places, images, strict=True):
        save(tmp_path / place, image)
    source = folder_source(tmp_path)
    order = [3, 4, 1, 5, 2, 0]
    np.testing.assert_array_equal(pixels(source), images[order])
    assert labels(source) == [0, 1, 1, 2, 2, 2]
    assert source.info.num_classes == 3
    assert "label" not in folder_source(tmp_path, labels=False)[0]


def test_jpeg_decodes_as_pillow_does(tmp_path, images):
    PIL.Image.fromarray(images[0]).save(tmp_path / "a.jpeg", quality=75)
    with PIL.Image.open(tmp_path / "a.jpeg") as expected:
        np.testing.assert_array_equal(folder_source(tmp_path)[0]["image"], np.asarray(expected))


def test_channels_convert(tmp_path, images):
    save(tmp_path / "a.png", images[0])
    save(tmp_path / "b.png", images[1][..., :1])
    source = folder_source(tmp_path, channels=3)
    np.testing.assert_array_equal(source[0]["image"], images[0])
    np.testing.assert_array_equal(source[1]["image"], np.repeat(images[1][..., :1], 3, axis=2))
    assert folder_source(tmp_path, channels=1).info.shape == (5, 7, 1)
    palette = PIL.Image.fromarray(images[0]).quantize(8)
    palette.save(tmp_path / "a.png")
    np.testing.assert_array_equal(
        folder_source(tmp_path)[0]["image"], np.asarray(palette.convert("RGB"))
    )


def test_fit_crops_the_centre():
    ramp = np.arange(6 * 9, dtype=np.uint8).reshape(6, 9, 1)
    np.testing.assert_array_equal(fit(ramp, None, 4), ramp[1:5, 2:6])
    np.testing.assert_array_equal(fit(ramp, (4, 4), 4), ramp[1:5, 2:6])
    np.testing.assert_array_equal(fit(ramp, (6, 9), None), ramp)


@pytest.mark.parametrize("channels", [1, 3])
def test_fit_shrinks_without_aliasing(channels):
    # Stripes one pixel wide have no content at half the size: the mean is the only right answer,
    # and taking every second pixel would give all black or all white.
    stripes = np.zeros((32, 64, channels), np.uint8)
    stripes[:, ::2] = 200
    small = fit(stripes, (16, 32), None)
    assert small.shape == (16, 32, channels)
    assert abs(small[:, 4:-4].astype(int) - 100).max() <= 2


def test_fit_keeps_proportions_and_axes():
    # A vertical edge in the middle stays vertical and in the middle.
    edge = np.zeros((40, 30, 3), np.uint8)
    edge[:, 15:] = 255
    small = fit(edge, (10, 10), None)
    assert (small[:, :4] == 0).all()
    assert (small[:, 6:] == 255).all()


def test_a_folder_is_fitted_to_one_size(tmp_path, rng):
    for i, shape in enumerate([(8, 9), (20, 12), (8, 8)]):
        save(tmp_path / f"{i}.png", rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
    assert pixels(folder_source(tmp_path, size=8)).shape == (3, 8, 8, 3)
    assert pixels(folder_source(tmp_path, size=(4, 6), crop=8)).shape == (3, 4, 6, 3)
    with pytest.raises(ValueError, match="crop must not exceed the image; got crop 10 for 8 x 9"):
        folder_source(tmp_path, crop=10)


def test_in_memory_is_the_same_source(tmp_path, images):
    for i, image in enumerate(images):
        save(tmp_path / str(i % 2) / f"{i}.png", image)
    source = folder_source(tmp_path)
    held = in_memory(source)
    assert held.info == source.info
    np.testing.assert_array_equal(pixels(held), pixels(source))
    assert labels(held) == labels(source)
    assert set(in_memory(folder_source(tmp_path, labels=False))[0]) == {"image"}


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((np.zeros((2, 3, 3, 1)),), TypeError, "must be uint8 levels; got float64.*from_model"),
        ((np.zeros((2, 3, 3), np.uint8),), ValueError, r"\(N, H, W, C\); got \(2, 3, 3\).*None"),
        ((np.zeros((0, 3, 3, 1), np.uint8),), ValueError, "at least one example; 'array' is empty"),
        ((np.zeros((2, 3, 3, 1), np.uint8), np.zeros(3, int)), ValueError, r"one an image, \(2,\)"),
        ((np.zeros((2, 3, 3, 1), np.uint8), np.zeros(2)), TypeError, "integers; got float64"),
        ((np.zeros((2, 3, 3, 1), np.uint8), np.array([0, -1])), ValueError, "from 0; got -1"),
        (("nowhere.npz",), ValueError, "no file nowhere.npz"),
        (("nowhere.npz", np.zeros(2, int)), ValueError, "labels come from the .npz file"),
    ],
)
def test_bad_arrays(arguments, error, words):
    with pytest.raises(error, match=words):
        array_source(*arguments)


def test_bad_npz(tmp_path, images):
    np.savez(tmp_path / "other.npz", arr_0=images, y=np.arange(6))
    with pytest.raises(ValueError, match=r"key 'images'; .*other.npz has \['arr_0', 'y'\]"):
        array_source(tmp_path / "other.npz")
    np.save(tmp_path / "bare.npy", images)
    with pytest.raises(ValueError, match="must be an .npz archive"):
        array_source(tmp_path / "bare.npy")
    (tmp_path / "text.npz").write_text("PK no zip file")
    with pytest.raises(ValueError, match="cannot be read as an .npz file"):
        array_source(tmp_path / "text.npz")


def test_bad_folders(tmp_path, images):
    with pytest.raises(ValueError, match="There is no directory .*nowhere"):
        folder_source(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="at least one image .*found none"):
        folder_source(tmp_path)
    save(tmp_path / "a.png", images[0])
    save(tmp_path / "dog" / "b.png", images[1])
    with pytest.raises(ValueError, match=r"1 beside \(as a.png\) and 1 inside.*labels=False"):
        folder_source(tmp_path)
    for bad, error in [({"channels": 2}, ValueError), ({"size": 0}, ValueError),
                       ({"size": (1, 2, 3)}, ValueError), ({"crop": 2.5}, TypeError)]:  # fmt: skip
        with pytest.raises(error, match=next(iter(bad))):
            folder_source(tmp_path, labels=False, **bad)


def test_files_that_do_not_fit_are_named_when_read(tmp_path, images):
    save(tmp_path / "a.png", images[0])
    save(tmp_path / "b.png", images[1][:4])
    save(tmp_path / "c.png", images[2][..., :1])
    (tmp_path / "d.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    PIL.Image.fromarray(np.zeros((5, 7), np.uint16)).save(tmp_path / "e.png")
    source = folder_source(tmp_path)
    np.testing.assert_array_equal(source[0]["image"], images[0])
    for i, words in enumerate(
        [r"b.png has \(4, 7, 3\).*Pass size=", r"c.png has \(5, 7, 1\).*channels=",
         "d.png cannot be read as an image", "e.png has Pillow's mode 'I;16'"], start=1
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            source[i]
