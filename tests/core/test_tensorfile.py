"""Tensor files: what is written in the published formats is read, and code in them never runs."""

import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

from diffjax.core import tensorfile
from diffjax.core.tensorfile import TensorFileError
from tests.interop import torchfiles as tf

FORMATS = {"zip": tf.zip_bytes, "legacy": tf.legacy_bytes}
VALUES = {
    "f32": np.array([[1.5, -2.0, 3.0], [4.0, 5.0, np.pi]], np.float32),
    "f64": np.array([np.pi, -1e300]),
    "f16": np.array([0.1, 65504.0], np.float16),
    "bf16": np.array([0.1, 3e38], tf.BFLOAT16),
    "i64": np.array([[2**60, -3]]),
    "flag": np.array([True, False, True]),
    "scalar": np.array(7.25, np.float32),
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.fixture
def file(tmp_path):
    """Writes bytes and returns the path."""

    def write(data):
        path = tmp_path / "file"
        path.write_bytes(data)
        return path

    return write


def assert_same(found, wanted):
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == np.ascontiguousarray(array).tobytes()


@pytest.mark.parametrize("kind", FORMATS)
def test_dtypes_and_nested_containers(file, kind):
    tree = {
        "model": tf.state_dict(VALUES),
        "ema": {"decay": 0.999, "shadow_params": [tf.tensor(VALUES["f32"]), tf.tensor([1, 2])]},
        "step": 12,
    }
    path = file(FORMATS[kind](tree))
    wanted = {f"model.{name}": array for name, array in VALUES.items()}
    wanted |= {"ema.shadow_params.0": VALUES["f32"], "ema.shadow_params.1": np.array([1, 2])}
    assert_same(tensorfile.read(path), wanted)
    assert tensorfile.read_pickled(path)["step"] == 12


@pytest.mark.parametrize("kind", FORMATS)
def test_views_share_a_storage(file, kind):
    numbers = np.arange(12, dtype=np.float32)
    storage = tf.Storage(numbers)
    tree = OrderedDict(
        rows=tf.tensor(numbers[2:8].reshape(2, 3), storage, offset=2),
        columns=tf.tensor(numbers.reshape(3, 4).T, storage, stride=(1, 4)),
        repeated=tf.tensor(np.full((2, 2), 5.0), storage, offset=5, stride=(0, 0)),
    )
    found = tensorfile.read(file(FORMATS[kind](tree)))
    np.testing.assert_array_equal(found["rows"], [[2, 3, 4], [5, 6, 7]])
    np.testing.assert_array_equal(found["columns"], numbers.reshape(3, 4).T)
    np.testing.assert_array_equal(found["repeated"], np.full((2, 2), 5.0))
    found["rows"][:] = 0
    assert found["columns"].any()


def test_other_byte_order(file):
    found = tensorfile.read(file(tf.zip_bytes(tf.state_dict({"a": VALUES["f32"]}), order="big")))
    assert_same(found, {"a": VALUES["f32"]})


def test_parts_of_a_storage_in_the_oldest_format(file):
    part = tf.Storage(np.arange(6, dtype=np.float32), view=("view", 2, 3))
    found = tensorfile.read(file(tf.legacy_bytes({"a": tf.tensor(np.zeros(3), part)})))
    np.testing.assert_array_equal(found["a"], [2, 3, 4])


def test_a_pickled_network_is_a_record(file):
    weights = {
        "model.enc.conv.weight": VALUES["f32"],
        "model.enc.conv.resample_filter": VALUES["f64"],
        "model.out.bias": np.arange(3, dtype=np.float32),
    }
    tree = tensorfile.read_pickled(
        file(tf.plain_pickle({"ema": tf.as_modules(weights, "Precond"), "options": {"a": (1, 2)}}))
    )
    assert tree["options"] == {"a": (1, 2)}
    assert tree["ema"].name == "Precond"
    assert_same(tensorfile.flatten(tree["ema"]), weights)


@pytest.mark.parametrize("protocol", [2, 4])
def test_numbers_and_arrays_of_numpy(file, protocol):
    tree = {
        "scale": np.float64(np.sqrt(0.5)),
        "rows": np.arange(6).reshape(2, 3),
        "columns": np.asfortranarray(VALUES["f32"]),
        "swapped": np.arange(3, dtype=">i4"),
    }
    found = tensorfile.read_pickled(file(pickle.dumps(tree, protocol)))
    assert found["scale"] == tree["scale"]
    for name in ("rows", "columns", "swapped"):
        np.testing.assert_array_equal(found[name], tree[name])
    with pytest.raises(TensorFileError, match="not of numbers"):
        tensorfile.read(file(pickle.dumps(np.array([None]), protocol)))


def test_safetensors_by_the_published_layout(file):
    raw = np.arange(4, dtype=np.float32).tobytes() + np.array([1.5, -2], tf.BFLOAT16).tobytes()
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "BF16", "shape": [2], "data_offsets": [16, 20]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    found = tensorfile.read(file(struct.pack("<Q", len(text)) + text + raw))
    np.testing.assert_array_equal(found["a"], [[0, 1], [2, 3]])
    np.testing.assert_array_equal(found["b"], np.array([1.5, -2], tf.BFLOAT16))


def test_safetensors_written_are_the_published_layout(tmp_path):
    path = tmp_path / "deep" / "a.safetensors"
    values = {name: VALUES[name] for name in ("f32", "f16", "bf16", "i64")}
    values["transposed"] = VALUES["f32"].T
    tensorfile.write_safetensors(path, values, {"format": "pt"})
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    assert header["__metadata__"] == {"format": "pt"}
    start, end = header["transposed"]["data_offsets"]
    got = np.frombuffer(data[8 + size :][start:end], np.float32)
    np.testing.assert_array_equal(got, VALUES["f32"].T.reshape(-1))
    found = tensorfile.read(path)
    assert_same({name: found[name] for name in values}, values)


class Harm:
    """Runs a command in whoever unpickles it."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def with_global(module, name, *arguments):
    return tf.Call(tf.Global(module, name), *arguments)


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain"])
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("torch", "load"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("numpy", "load"),
        ("collections", "namedtuple"),
    ],
)
def test_foreign_names_are_refused(file, kind, module, name):
    writers = {**FORMATS, "plain": tf.plain_pickle}
    path = file(writers[kind]({"a": with_global(module, name, "touch harm")}))
    with pytest.raises(TensorFileError, match=f"wants {module}.{name}.*save its state_dict"):
        tensorfile.read(path)


def test_a_command_does_not_run(file, tmp_path):
    mark = tmp_path / "mark"
    inner = pickle.dumps(Harm(mark))
    pickle.loads(inner)
    assert mark.exists()  # this would be the harm
    mark.unlink()
    hidden = with_global("torch.storage", "_load_from_bytes", inner)
    for data in (inner, tf.plain_pickle({"a": hidden}), tf.zip_bytes({"a": hidden})):
        with pytest.raises(TensorFileError, match=r"wants (posix|nt|os)\.system"):
            tensorfile.read(file(data))
    assert not mark.exists()


def test_source_code_in_a_network_does_not_run(file, tmp_path):
    mark = tmp_path / "mark"
    source = f"import pathlib; pathlib.Path({str(mark)!r}).touch()"
    network = tf.persistent("Net", tf.module_state([("w", tf.loose(VALUES["f32"]))]), source)
    found = tensorfile.read(file(tf.plain_pickle({"ema": network})))
    assert_same(found, {"ema.w": VALUES["f32"]})
    assert not mark.exists()


def test_a_pickle_cannot_change_our_functions(file):
    changed = pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n" + b"}" + pickle.BUILD
    changed += pickle.STOP
    with pytest.raises(TensorFileError, match="made to harm"):
        tensorfile.read(file(pickle.PROTO + b"\x02" + changed))
    ordered = pickle.GLOBAL + b"collections\nOrderedDict\n" + b"}U\x04keysK\x01s" + pickle.BUILD
    with pytest.raises(TensorFileError):
        tensorfile.read(file(pickle.PROTO + b"\x02" + ordered + pickle.STOP))
    assert OrderedDict(a=1).keys() == {"a"}


@pytest.mark.parametrize(
    ("shape", "offset", "stride"),
    [((5,), 0, (1,)), ((4,), 1, (1,)), ((2, 2), 0, (4, 1)), ((2,), 3, (-1,)), ((1,), -1, (1,))],
)
def test_a_view_that_leaves_its_storage_is_refused(file, shape, offset, stride):
    storage = tf.Storage(np.zeros(4, np.float32))
    made = tf.tensor(np.zeros(shape), storage, offset=offset, stride=stride)
    with pytest.raises(TensorFileError, match="leaves its storage"):
        tensorfile.read(file(tf.zip_bytes({"a": made})))


def test_damage_is_named(file, tmp_path):
    whole = tf.legacy_bytes(tf.state_dict(VALUES))
    zipped = tf.zip_bytes(tf.state_dict(VALUES))
    for data in (whole[:-4], whole[:40], zipped[: len(zipped) // 2], b"", b"not a file at all"):
        path = file(data)
        with pytest.raises(TensorFileError, match=str(path)):
            tensorfile.read(path)
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("notes.txt", "hello")
    with pytest.raises(TensorFileError, match="no file of torch.save"):
        tensorfile.read(tmp_path / "other.pt")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/data.pkl", b"")
        archive.writestr("script/constants.pkl", b"")
    with pytest.raises(TensorFileError, match="TorchScript"):
        tensorfile.read(tmp_path / "script.pt")


@pytest.mark.slow
def test_our_writer_is_torch_s_format(tmp_path):
    """The files of these tests are what PyTorch reads, and its files are what we read."""
    torch = pytest.importorskip("torch")
    plain = {k: v for k, v in VALUES.items() if k != "bf16"}
    for data in (tf.zip_bytes(tf.state_dict(plain)), tf.legacy_bytes(tf.state_dict(plain))):
        path = tmp_path / "ours.pt"
        path.write_bytes(data)
        loaded = torch.load(path, weights_only=True)
        assert_same({k: v.numpy() for k, v in loaded.items()}, plain)
    big = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tree = {"t": big.T, "part": big[1:3, 2:], "half": big.bfloat16(), "p": torch.nn.Linear(2, 3)}
    tree["p"] = tree["p"].state_dict()
    for new in (True, False):
        path = tmp_path / "theirs.pt"
        torch.save(tree, path, _use_new_zipfile_serialization=new)
        found = tensorfile.read(path)
        np.testing.assert_array_equal(found["t"], big.T.numpy())
        np.testing.assert_array_equal(found["part"], big[1:3, 2:].numpy())
        np.testing.assert_array_equal(found["half"].astype(np.float32), big.numpy())
        np.testing.assert_array_equal(found["p.weight"], tree["p"]["weight"].numpy())
