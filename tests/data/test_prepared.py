"""tfds sets: the digits against scikit-learn's arrays, PNGs against their pixels, no TensorFlow."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from diffjax.data import digits_source, tfds_source
from diffjax.data.digits import prepare as preparation
from tests.data.pictures.pictures_dataset_builder import Builder, picture

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A tfds directory with the pictures and the digits prepared."""
    path = tmp_path_factory.mktemp("tfds")
    Builder(data_dir=path, file_format="array_record").download_and_prepare()
    preparation.prepare(path)
    return path


def python(program, *arguments, wait=True):
    """Runs a program in a fresh interpreter."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if not wait:
        return process
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def in_split(source):
    return source.images, source.labels


def test_the_digits_are_scikit_learns(data_dir):
    truth = load_digits()
    pictures, classes = truth.images[..., None].astype(np.uint8), truth.target
    splits = {split: in_split(digits_source(split, data_dir)) for split in ("train", "test")}
    assert {split: len(labels) for split, (_, labels) in splits.items()} == {
        "train": 1437, "test": 360
    }  # fmt: skip

    # Which rows are held out, by the stated rule, said differently: go through the classes.
    held_out, count = np.zeros(1797, bool), 0
    for c in range(10):
        for row in np.flatnonzero(classes == c):
            held_out[row] = count % 5 == 0
            count += 1
    for split, rows in (("train", ~held_out), ("test", held_out)):
        images, labels = splits[split]
        np.testing.assert_array_equal(images, pictures[rows])
        np.testing.assert_array_equal(labels, classes[rows])
    share = np.bincount(splits["test"][1]) / np.bincount(classes)
    assert (abs(share - 0.2) < 0.006).all()  # one image of the smallest class's 174


def test_what_is_known_of_the_digits(data_dir):
    info = digits_source("train", data_dir).info
    assert (info.shape, info.levels, info.num_classes, info.size) == ((8, 8, 1), 17, 10, 1437)
    images = digits_source("train", data_dir).images
    assert (images.dtype, images.min(), images.max()) == (np.uint8, 0, 16)
    whole = digits_source("train+test", data_dir)
    np.testing.assert_array_equal(
        np.unique(whole.images.reshape(1797, 64), axis=0),
        np.unique(load_digits().data.astype(np.uint8), axis=0),
    )


def test_pngs_of_a_tfds_set_come_back(data_dir):
    source = tfds_source("pictures", "train", data_dir, crop=8)
    assert (source.info.shape, source.info.num_classes, source.info.size) == ((8, 8, 3), 2, 4)
    for i in range(4):
        top = i // 2
        np.testing.assert_array_equal(source[i]["image"], picture(i)[top : top + 8, :8])
        assert source[i]["label"] == i % 2
    bare = tfds_source("pictures", "train[1:3]", data_dir, label_key=None, size=(8, 9))
    assert (bare.info.size, bare.info.num_classes, set(bare[0])) == (2, None, {"image"})
    # The digits are a tfds set like any other, and the other door opens on the same data.
    digits = tfds_source("digits", "test", data_dir, levels=17)
    np.testing.assert_array_equal(
        np.stack([digits[i]["image"] for i in range(360)]), digits_source("test", data_dir).images
    )


@pytest.mark.parametrize(
    ("name", "split", "options", "words"),
    [
        ("cifr10", "train", {}, "no tfds data set 'cifr10'.*near names: cifar10"),
        ("cifar10", "train", {}, "'cifar10' is not prepared in .*diffjax.prepare.*array_record"),
        ("pictures", "valid", {}, "Unknown split 'valid'.*train"),
        ("pictures", "train", {"size": 8, "image_key": "pixels"}, "image_key must name.*'pixels'"),
        ("pictures", "train", {"size": 8, "label_key": "class"}, "label_key must name.*'class'"),
        ("pictures", "train", {"size": 8, "label_key": "height"}, "ClassLabel; 'height'"),
        ("pictures", "train", {"image_key": "height"}, "uint8 images .*'height'"),
        ("pictures", "train", {}, "many sizes. Pass size="),
        ("pictures", "train", {"size": "big"}, "size"),
    ],
)
def test_bad_sets(data_dir, name, split, options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        tfds_source(name, split, data_dir, **options)


def test_pixels_beyond_the_levels_raise(data_dir):
    with pytest.raises(ValueError, match="below its 16 levels; got 16"):
        list(tfds_source("digits", "test", data_dir, levels=16))


def test_sets_without_random_access_raise(data_dir, monkeypatch):
    import tensorflow_datasets as tfds

    def refuse(self, split):
        raise NotImplementedError

    monkeypatch.setattr(tfds.core.DatasetBuilder, "as_data_source", refuse)
    with pytest.raises(ValueError, match="no random access. Prepare it as array_record in another"):
        tfds_source("pictures", "train", data_dir, size=8)


def test_digits_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cannot be written to .*file.*TFDS_DATA_DIR"):
        digits_source("train", tmp_path / "file")


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'diffjax\[data\]'"):
        tfds_source("cifar10", "train")


def test_reading_imports_no_tensorflow(data_dir):
    python(
        """
import sys
import diffjax.data as data
heavy = {"tensorflow", "tensorflow_datasets", "grain", "PIL", "sklearn"} & set(sys.modules)
assert not heavy, heavy
directory = sys.argv[1]
for source in (
    data.digits_source("train", directory + "/fresh"),          # prepares them
    data.tfds_source("pictures", "train", directory, size=8),   # decodes PNGs
):
    batch = next(data.prefetch(data.TrainBatches(source, batch_size=4, seed=0)))
    assert batch["image"].shape == (4, 8, 8, source.info.shape[2])
assert "tensorflow" not in sys.modules
""",
        data_dir,
    )


# Prepares the digits, but waits for the file "go" when all is written and not yet renamed.
PREPARE = """
import sys, time
from pathlib import Path
from diffjax.data.digits import prepare
directory, name = Path(sys.argv[1]), sys.argv[2]
write = prepare.Builder.download_and_prepare
def write_and_wait(self):
    write(self)
    (directory / name).touch()
    while not (directory / "go").exists():
        time.sleep(0.001)
prepare.Builder.download_and_prepare = write_and_wait
prepare.prepare(directory / "data")
"""


def prepare_until_the_rename(directory, names):
    """Starts one process a name and returns them once all wait before the rename."""
    processes = [python(PREPARE, directory, name, wait=False) for name in names]
    deadline = time.monotonic() + 120
    while not all((directory / name).exists() for name in names):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    return processes


def test_two_processes_may_prepare_at_once(tmp_path):
    processes = prepare_until_the_rename(tmp_path, "ab")
    (tmp_path / "go").touch()
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert digits_source("train", tmp_path / "data").info.size == 1437
    assert os.listdir(tmp_path / "data") == ["digits"]  # no scratch is left


def test_a_killed_preparation_leaves_nothing_to_read(tmp_path):
    (process,) = prepare_until_the_rename(tmp_path, "a")
    process.kill()
    process.communicate(timeout=60)
    data = tmp_path / "data"
    assert list(data.glob(".digits-*/**/*.array_record*"))
    assert not list(data.glob("digits/*"))
    assert digits_source("test", data).info.size == 360


def test_the_loser_of_the_race_keeps_the_winners_files(tmp_path, data_dir):
    target = data_dir / "digits" / "1.0.0"
    before = {p.name: p.stat().st_ino for p in target.iterdir()}
    preparation._write(tmp_path, target)
    assert {p.name: p.stat().st_ino for p in target.iterdir()} == before
    with pytest.raises(OSError, match="nowhere"):  # any other failure to rename is an error
        preparation._write(tmp_path / "again", tmp_path / "nowhere" / "digits" / "1.0.0")
