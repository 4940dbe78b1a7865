r"""Unpickles tensors, and nothing else: what a pickle may ask for, and our stand-in for it.

A pickle is a program. It names functions and classes as (module, name), calls them and changes what
they return. Here it gets the entries of one table, each our own harmless stand-in: storages, the
functions that put a tensor together, ordered dicts and plain containers, numbers and arrays of
NumPy. Anything else raises `TensorFileError` with its name. Objects of PyTorch's modules, and those
that EDM saves with their source code, become a `Record`: a class name and a state. The source code
is never looked at.

A tensor is a view of a storage, which several tensors may share:

    tensor[i, j, ...] = storage[offset + i stride_0 + j stride_1 + ...]                        (1)

in elements. A view that leaves its storage is refused: reading it would read foreign memory.
"""

import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np


class TensorFileError(ValueError):
    """A file that cannot be read, or must not be; the message is for people."""


class Record(NamedTuple):
    """An object that was not built: the name of its class and its state, a dict."""

    name: str
    state: dict[str, Any]


class Storage:
    """Bytes of one dtype, which may come after the object that uses them."""

    __slots__ = ("dtype", "data")

    def __init__(self, dtype: np.dtype, data: Any = None):
        self.dtype, self.data = dtype, data

    def part(self, offset: int, size: int) -> "Storage":
        """Elements offset..offset + size, of a storage that is known."""
        width = self.dtype.itemsize
        return Storage(self.dtype, self.data[offset * width : (offset + size) * width])


class View(NamedTuple):
    """A tensor before its storage is known, eq. (1). dtype: None for the storage's."""

    storage: Any
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: np.dtype | None = None

    def array(self) -> np.ndarray:
        """A copy of its own. Raises TensorFileError where it leaves the storage."""
        flat = np.frombuffer(self.storage.data, self.dtype or self.storage.dtype)
        size, stride = tuple(self.size), tuple(self.stride)
        last = self.offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        sane = self.offset >= 0 and all(v >= 0 for v in (*size, *stride))
        if 0 in size and sane:
            return np.zeros(size, flat.dtype)
        if not sane or last >= flat.size:
            raise TensorFileError(
                f"a tensor of size {size}, stride {stride} and offset {self.offset} leaves its "
                f"storage of {flat.size} elements; the file is damaged or made to harm."
            )
        steps = [s * flat.itemsize for s in stride]
        return np.array(np.lib.stride_tricks.as_strided(flat[self.offset :], size, steps))


def resolve(tree: Any) -> Any:
    """What was unpickled, with arrays for views, `Record`s and plain containers."""
    if isinstance(tree, View):
        return tree.array()
    if isinstance(tree, Storage):
        return np.frombuffer(tree.data, tree.dtype).copy()
    if isinstance(tree, _NumpyArray):
        return tree.array
    if isinstance(tree, _Inert):
        state = tree.state if isinstance(tree.state, dict) else {"state": tree.state}
        return Record(type(tree).__name__, {k: resolve(v) for k, v in state.items()})
    if isinstance(tree, dict):
        return {k: resolve(v) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(resolve(v) for v in tree)
    return tree


class Unpickler(pickle.Unpickler):
    """Unpickles what `_ALLOWED` and `_inert` give out; raises TensorFileError for all else.

    load: reads the bytes of a file within the pickle. storage: finds the storage of a persistent
    id; None where there are none.
    """

    def __init__(
        self,
        file: Any,
        load: Callable[[bytes], Any],
        storage: Callable[[tuple[Any, ...]], Storage] | None = None,
    ):
        super().__init__(file, encoding="utf-8")
        self._load, self._storage = load, storage

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for module.name."""
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _Function(self._load)
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]()
        if module == "torch" and name in _STORAGES:
            return _Dtype(as_dtype(_STORAGES[name], name))
        if module == "torch" and name in _DTYPES:
            return _Dtype(as_dtype(name, name))
        if module.startswith("torch.nn.modules."):
            return _inert(name)
        raise TensorFileError(
            f"its pickle wants {module}.{name}, which holds no tensor and might run code. Only "
            "tensors in plain containers are read: with PyTorch, and if you trust the file, save "
            "its state_dict() anew."
        )

    def persistent_load(self, pid: Any) -> Storage:
        if self._storage is None:
            raise TensorFileError("a storage outside of a PyTorch file.")
        return self._storage(pid)


class _Closed:
    """What a pickle may call or hand on, and not change: its BUILD opcode asks for __setstate__."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise TensorFileError("its pickle tries to change a function; it is made to harm.")


class _Dtype(_Closed):
    """A class of storages, or a dtype."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype


class _Function(_Closed):
    """A function of this file."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[..., Any]):
        self.call = call

    def __call__(self, *arguments: Any) -> Any:
        return self.call(*arguments)


class _NumpyDtype(_Closed):
    """A dtype of NumPy, for numbers only; its byte order comes with its state."""

    __slots__ = ("dtype",)

    def __init__(self, code: str, *_: Any):
        if len(code) < 2 or code[0] not in "fiub" or not code[1:].isdigit():
            raise TensorFileError(f"its pickle holds a NumPy array of {code!r}, not of numbers.")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _NumpyArray(_Closed):
    """An array of NumPy, which comes with its state."""

    __slots__ = ("array",)

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, raw = state
        order: Any = "F" if fortran else "C"
        self.array = np.frombuffer(raw, kind.dtype).reshape(shape, order=order).copy()


class _Inert:
    """An object whose class is not loaded: keeps the state that it is given."""

    state: Any = None

    def __init__(self, *arguments: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.__dict__["state"] = state


def _inert(name: str) -> type[_Inert]:
    """A new class each time, so that no pickle changes one that lasts."""
    return type(name, (_Inert,), {})


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> View:
    return View(storage, offset, size, stride)


def _tensor_v3(
    storage: Any, offset: int, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> View:
    return View(storage, offset, size, stride, dtype.dtype)


def _persistent(meta: Mapping[str, Any]) -> _Inert:
    """An object of EDM's persistence: its class name and state; its source code stays text."""
    record = _inert(str(meta["class_name"]))()
    record.__setstate__(dict(meta["state"]))
    return record


def _from_type(function: Any, _: Any, arguments: Any, state: Any) -> Any:
    """A tensor with attributes, which are left out."""
    return function(*arguments)


def _number(kind: _NumpyDtype, raw: bytes) -> Any:
    """A scalar of NumPy as Python's."""
    return np.frombuffer(raw, kind.dtype)[0].item()


def _bytes(text: str, coding: str) -> bytes:
    if coding != "latin1":
        raise TensorFileError(f"bytes in the coding {coding!r}.")
    return text.encode("latin1")


def _first(value: Any, *_: Any) -> Any:
    return value


# Makers, because a pickle must not change what others get.
_ALLOWED: dict[tuple[str, str], Callable[[], Any]] = {
    ("collections", "OrderedDict"): lambda: OrderedDict,
    ("builtins", "set"): lambda: set,
    ("__builtin__", "set"): lambda: set,
    # How pickles of protocol 2 write bytes.
    ("_codecs", "encode"): lambda: _Function(_bytes),
    ("numpy", "dtype"): lambda: _Function(_NumpyDtype),
    ("numpy", "ndarray"): lambda: None,
    **{
        (f"numpy.{core}.multiarray", name): make
        for core in ("core", "_core")
        for name, make in (
            ("scalar", lambda: _Function(_number)),
            ("_reconstruct", lambda: _Function(lambda *_: _NumpyArray())),
        )
    },
    ("torch", "Size"): lambda: tuple,
    ("torch", "device"): lambda: _Function(lambda *_: None),
    ("torch", "Tensor"): lambda: _inert("Tensor"),
    ("torch.nn.parameter", "Parameter"): lambda: _inert("Parameter"),
    ("torch._utils", "_rebuild_tensor"): lambda: _Function(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): lambda: _Function(_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): lambda: _Function(_tensor_v3),
    ("torch._utils", "_rebuild_parameter"): lambda: _Function(_first),
    ("torch._utils", "_rebuild_parameter_with_state"): lambda: _Function(_first),
    ("torch._tensor", "_rebuild_from_type_v2"): lambda: _Function(_from_type),
    ("torch.storage", "UntypedStorage"): lambda: _Dtype(np.dtype(np.uint8)),
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): lambda: _Function(_persistent),
    ("dnnlib.util", "EasyDict"): lambda: type("EasyDict", (dict,), {}),
    ("argparse", "Namespace"): lambda: _inert("Namespace"),
}

_STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}
_DTYPES = {*_STORAGES.values(), "uint16", "uint32", "uint64"}


def as_dtype(name: str, where: str) -> np.dtype:
    """The dtype of this name; raises TensorFileError, saying where, for an empty one."""
    if not name:
        raise TensorFileError(f"{where} has a dtype that is not known here.")
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)
