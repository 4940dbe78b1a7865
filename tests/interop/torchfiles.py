"""Writes PyTorch's file formats, and EDM's pickles, without PyTorch: what torch.save would.

Written from the formats: https://docs.pytorch.org/docs/stable/notes/serialization.html.
"""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np

STORAGES = {
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}
BFLOAT16 = ml_dtypes.bfloat16


class Global:
    """A name that the pickle asks its reader for."""

    def __init__(self, module, name):
        self.line = f"{module}\n{name}\n".encode()

    def __call__(self):
        raise AssertionError("only a name")


class Call:
    """An object that its reader makes by calling `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments


class Module:
    """An object of a class of torch.nn.modules: made empty, then given its state."""

    def __init__(self, place, name, state):
        self.place, self.name, self.state = place, name, state


class Storage:
    """The bytes that tensors are views of. view: (key, offset, size) of the oldest format."""

    def __init__(self, values, view=None):
        self.values, self.view = np.ascontiguousarray(values).reshape(-1), view


def tensor(array, storage=None, offset=0, stride=None):
    """A tensor; of its own storage unless one is given. stride: in elements."""
    array = np.asarray(array)
    contiguous = [int(np.prod(array.shape[i + 1 :])) for i in range(array.ndim)]
    return Call(
        Global("torch._utils", "_rebuild_tensor_v2"),
        storage or Storage(array),
        offset,
        tuple(array.shape),
        tuple(stride or contiguous),
        False,
        OrderedDict(),
    )


def parameter(array):
    """A tensor that is a parameter of a module."""
    return Call(Global("torch._utils", "_rebuild_parameter"), tensor(array), True, OrderedDict())


class Pickler(pickle._Pickler):
    """Protocol 2, as torch.save writes. storages: filled in the order of their first use."""

    dispatch = dict(pickle._Pickler.dispatch)

    def __init__(self, file, outside=True):
        super().__init__(file, protocol=2)
        self.storages, self.outside = [], outside

    def persistent_id(self, obj):
        if not isinstance(obj, Storage):
            return None
        if obj not in self.storages:
            self.storages.append(obj)
        kind = Global("torch", STORAGES[obj.values.dtype.name])
        pid = ("storage", kind, str(self.storages.index(obj)), "cpu", obj.values.size)
        return pid if self.outside else (*pid, obj.view)

    def save_name(self, obj):
        self.write(pickle.GLOBAL + obj.line)

    def save_call(self, obj):
        self.save(obj.function)
        self.save(tuple(obj.arguments))
        self.write(pickle.REDUCE)

    def save_module(self, obj):
        self.write(pickle.GLOBAL + f"torch.nn.modules.{obj.place}\n{obj.name}\n".encode())
        self.write(pickle.EMPTY_TUPLE + pickle.NEWOBJ)
        self.save(obj.state)
        self.write(pickle.BUILD)

    def save_ordered(self, obj):
        self.write(pickle.GLOBAL + b"collections\nOrderedDict\n" + pickle.EMPTY_TUPLE)
        self.write(pickle.REDUCE)
        self._batch_setitems(obj.items())

    dispatch[Global] = save_name
    dispatch[Call] = save_call
    dispatch[Module] = save_module
    dispatch[OrderedDict] = save_ordered


def zip_bytes(obj, order="little"):
    """What torch.save writes today."""
    file, made = io.BytesIO(), io.BytesIO()
    pickler = Pickler(file)
    pickler.dump(obj)
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("archive/data.pkl", file.getvalue())
        archive.writestr("archive/byteorder", order)
        for i, storage in enumerate(pickler.storages):
            values = storage.values if order == "little" else storage.values.byteswap()
            archive.writestr(f"archive/data/{i}", values.tobytes())
        archive.writestr("archive/version", "3\n")
    return made.getvalue()


def legacy_bytes(obj):
    """What torch.save wrote before 1.6, and still writes inside of pickles."""
    file = io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        pickle.dump(value, file, protocol=2)
    pickler = Pickler(file, outside=False)
    pickler.dump(obj)
    keys = [str(i) for i in range(len(pickler.storages))]
    pickle.dump(keys, file, protocol=2)
    for storage in pickler.storages:
        file.write(struct.pack("<q", storage.values.size) + storage.values.tobytes())
    return file.getvalue()


def loose(array):
    """A parameter in a plain pickle: its storage is the bytes of a legacy file."""
    array = np.asarray(array)
    read = Call(Global("torch.storage", "_load_from_bytes"), legacy_bytes(Storage(array)))
    contiguous = [int(np.prod(array.shape[i + 1 :])) for i in range(array.ndim)]
    rebuild = Global("torch._utils", "_rebuild_tensor_v2")
    made = Call(rebuild, read, 0, array.shape, tuple(contiguous), False, OrderedDict())
    return Call(Global("torch._utils", "_rebuild_parameter"), made, False, OrderedDict())


def module_state(parameters=(), buffers=(), modules=(), **attributes):
    """The state of a torch.nn.Module, of which only the three tables matter here."""
    return {
        "training": False,
        "_parameters": OrderedDict(parameters),
        "_buffers": OrderedDict(buffers),
        "_non_persistent_buffers_set": set(),
        "_backward_hooks": OrderedDict(),
        "_modules": OrderedDict(modules),
        **attributes,
    }


def persistent(name, state, source="raise SystemExit('source code was run')"):
    """An object of EDM's persistence."""
    meta = {"type": "class", "version": 6, "module_src": source, "class_name": name}
    function = Global("torch_utils.persistence", "_reconstruct_persistent_obj")
    return Call(function, {**meta, "state": state})


def plain_pickle(obj):
    """A pickle as it is, such as EDM publishes."""
    file = io.BytesIO()
    Pickler(file).dump(obj)
    return file.getvalue()


def state_dict(tensors):
    """An ordered dict of contiguous tensors."""
    return OrderedDict((name, tensor(array)) for name, array in tensors.items())


def as_modules(tensors, name="Thing"):
    """Flat tensors as nested persistent modules: `a.b.weight` lies in module a's module b.

    Names that hold no dot belong to this one; "enc" and "dec" are ModuleDicts, as in EDM.
    """
    own, inner = {}, OrderedDict()
    for path, array in tensors.items():
        first, dot, rest = path.partition(".")
        if dot:
            inner.setdefault(first, OrderedDict())[rest] = array
        else:
            own[path] = array
    buffers = {k: v for k, v in own.items() if k in ("freqs", "resample_filter")}
    state = module_state(
        [(k, loose(v)) for k, v in own.items() if k not in buffers],
        [(k, loose(v)) for k, v in buffers.items()],
        [(k, as_modules(v, k)) for k, v in inner.items()],
    )
    if name in ("enc", "dec"):
        return Module("container", "ModuleDict", state)
    return persistent(name, state)
