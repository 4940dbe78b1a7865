r"""Files of named arrays: safetensors, PyTorch's two formats and pickled networks, without PyTorch.

    .safetensors    a header and raw bytes; nothing in it can run
    .pt, .pth       zip:    NAME/data.pkl, NAME/data/KEY (raw bytes), NAME/byteorder
                    legacy: pickles of a magic number, a version, system facts, the object and the
                    list of keys; then for each key its number of elements (int64) and raw bytes
    .pkl            a pickle that holds the legacy format inside, as EDM publishes its networks

A pickle may call any function of any module. Those read here may not: see `diffjax.core.unpickle`,
which also says what a tensor is.

References: https://github.com/huggingface/safetensors for the first;
https://docs.pytorch.org/docs/stable/notes/serialization.html for the second.
"""

import contextlib
import io
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.core.files import write_atomic
from diffjax.core.unpickle import Record, Storage, TensorFileError, Unpickler, as_dtype, resolve

_MAGIC = 0x1950A86A20F9469CFC6C  # the first object of a legacy file
_VERSION = 1001


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """All tensors of a file by name, whatever its format, as arrays of their own.

    Names inside nested containers are joined by dots: `model.conv.weight`, `ema.shadow_params.3`.
    bfloat16 arrays have the dtype of ml_dtypes.
    Raises TensorFileError for a file that is damaged, of another kind, or that wants to run code.
    """
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(9)
    if len(start) == 9 and start[8:] == b"{":
        return read_safetensors(path)
    return flatten(read_pickled(path))


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file by name."""
    safetensors = _safetensors()
    data = Path(path).read_bytes()
    try:
        entries = safetensors.deserialize(data)
    except Exception as error:  # its own class, which is an Exception and nothing closer
        raise TensorFileError(f"{path} is no safetensors file ({error}).") from error
    found = {}
    for name, entry in entries:
        dtype = as_dtype(_SAFETENSORS.get(entry["dtype"], ""), f"{path}: {name}")
        found[name] = np.frombuffer(entry["data"], dtype).reshape(entry["shape"]).copy()
    return found


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes arrays by name, in one step: the file is the old one or the new one.

    metadata: text that readers may show. Raises OSError where the system refuses.
    """
    _safetensors()
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    write_atomic(path, save(arrays, None if metadata is None else dict(metadata)))


def read_pickled(path: str | os.PathLike[str]) -> Any:
    """The object of a PyTorch file or of a pickled network, tensors as arrays.

    Containers are plain: dict, list, tuple. Objects are `Record`s. Raises as `read`.
    """
    path = Path(path)
    data = path.read_bytes()
    with _readable(path):
        return resolve(_load(data))


def flatten(tree: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """The arrays of a tree of containers and records by name, in the tree's order.

    A module's parameters, buffers and submodules lie directly below it, as in a `state_dict`.
    """
    if isinstance(tree, np.ndarray):
        return {prefix.removesuffix("."): tree}
    found: dict[str, np.ndarray] = {}
    for name, value in _children(tree):
        found |= flatten(value, f"{prefix}{name}.")
    return found


def _children(tree: Any) -> Iterator[tuple[str, Any]]:
    """Named parts of a container or record; none of anything else."""
    if isinstance(tree, Record):
        inner = [tree.state.get(key) or {} for key in ("_parameters", "_buffers", "_modules")]
        yield from ((str(name), value) for part in inner for name, value in part.items())
    elif isinstance(tree, Mapping):
        yield from ((str(name), value) for name, value in tree.items())
    elif isinstance(tree, (list, tuple)):
        yield from ((str(i), value) for i, value in enumerate(tree))


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what damaged bytes raise into one kind of error that names the file."""
    try:
        yield
    except TensorFileError as error:
        raise TensorFileError(f"{path}: {error}") from error
    except RecursionError as error:
        raise TensorFileError(f"{path} holds an object that contains itself.") from error
    except Exception as error:  # an unpickler raises nearly anything for bytes that are wrong
        raise TensorFileError(
            f"{path} cannot be read ({type(error).__name__}: {error}). Is it whole, and a PyTorch, "
            "safetensors or pickle file? Download it again, or save it anew with torch.save."
        ) from error


def _load(data: bytes) -> Any:
    """The object of any of the pickled formats, tensors as views."""
    if data.startswith(b"PK\x03\x04"):
        return _load_zip(data)
    file = io.BytesIO(data)
    first = Unpickler(file, _load).load()
    # A legacy file starts with its magic number; in a plain pickle the first object is all.
    return _load_legacy(file) if first == _MAGIC else first


def _load_zip(data: bytes) -> Any:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        roots = [n.removesuffix("data.pkl") for n in names if n.count("/") == 1]
        roots = [root for root in roots if root.endswith("/") and f"{root}data.pkl" in names]
        if not roots:
            raise TensorFileError("a zip without data.pkl: no file of torch.save.")
        root = roots[0]
        if f"{root}constants.pkl" in names:
            raise TensorFileError("a TorchScript program; save its state_dict() with torch.save.")
        order = archive.read(f"{root}byteorder") if f"{root}byteorder" in names else b"little"
        storages: dict[str, Storage] = {}

        def storage(pid: tuple[Any, ...]) -> Storage:
            _, dtype, key, *_ = pid
            if key not in storages:
                raw = archive.read(f"{root}data/{key}")
                storages[key] = Storage(dtype.dtype, _little(raw, dtype.dtype, order == b"big"))
            return storages[key]

        pickled = io.BytesIO(archive.read(f"{root}data.pkl"))
        return Unpickler(pickled, _load, storage).load()


def _load_legacy(file: io.BytesIO) -> Any:
    """The rest of a legacy file after its magic number."""
    version = Unpickler(file, _load).load()
    if version != _VERSION:
        raise TensorFileError(f"version {version} of the legacy format; 1001 is known.")
    system = Unpickler(file, _load).load()
    swapped = not system.get("little_endian", True)
    storages: dict[str, Storage] = {}
    parts: list[tuple[Storage, Storage, int, int]] = []

    def storage(pid: tuple[Any, ...]) -> Storage:
        kind, dtype, key, _, _, *view = pid
        if kind != "storage":
            raise TensorFileError(f"it holds a {kind!r} with source code, which is not run.")
        whole = storages.setdefault(key, Storage(dtype.dtype))
        if not view or view[0] is None:
            return whole
        _, offset, size = view[0]
        part = Storage(whole.dtype)
        parts.append((part, whole, offset, size))
        return part

    tree = Unpickler(file, _load, storage).load()
    for key in Unpickler(file, _load).load():
        (count,) = struct.unpack(">q" if swapped else "<q", file.read(8))
        dtype = storages[key].dtype
        raw = file.read(max(count, 0) * dtype.itemsize)
        if count < 0 or len(raw) != count * dtype.itemsize:
            raise TensorFileError("it ends before its data.")
        storages[key].data = _little(raw, dtype, swapped)
    for part, whole, offset, size in parts:
        part.data = whole.part(offset, size).data
    return tree


def _little(raw: bytes, dtype: np.dtype, swapped: bool) -> bytes:
    """The bytes in this machine's order; machines that run JAX are little-endian."""
    return np.frombuffer(raw, dtype).byteswap().tobytes() if swapped else raw


_SAFETENSORS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


def _safetensors() -> Any:
    try:
        import safetensors
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "safetensors files need the package 'safetensors'; pip install 'diffjax[import]'.",
            name="safetensors",
        ) from error
    return safetensors


__all__ = [
    "Record",
    "TensorFileError",
    "flatten",
    "read",
    "read_pickled",
    "read_safetensors",
    "write_safetensors",
]
