r"""From the tensors of a file to a tree of parameters, leaf by leaf and by name.

A map says for each leaf of ours which tensor it comes from. PyTorch's layers differ from ours in
the order of axes:

    ours                                 theirs
    convolution  (H, W, in, out)         (out, in, H, W)
    linear       (in, out)               (out, in), also with trailing axes of length 1
    norm         scale, bias             weight, bias
    all else     as it is

The names follow from a few renamings: of a part (`ResnetBlockDDPM_3` is `down_blocks.1.resnets.0`)
and of what lies in it (`GroupNorm_0` is `norm1`).

A leaf without its tensor, a tensor without its leaf and a wrong shape are errors: weights that fit
by accident are worse than none.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from diffjax.core.pytree import named
from diffjax.core.types import PyTree

Read = Callable[[np.ndarray], np.ndarray]


class WeightsError(ValueError):
    """Weights that do not fit a network; the message is for people."""


class Source(NamedTuple):
    """Where a leaf comes from: the tensor's name, and what makes the leaf of it."""

    tensor: str
    read: Read


class Part(NamedTuple):
    """What a part of the network is called there: its name and those of what lies in it.

    inside: by our name, the name there, or a `Source` made of the leaf's shape where the tensor
    holds more than the leaf; "" leaves the name out. Names that are absent are the same there.
    """

    name: str
    inside: Mapping[str, "str | Callable[[str], Source]"] = {}


def as_it_is(tensor: np.ndarray) -> np.ndarray:
    """The tensor."""
    return tensor


def convolution(tensor: np.ndarray) -> np.ndarray:
    """(out, in, H, W) -> (H, W, in, out)."""
    if tensor.ndim != 4:
        raise WeightsError(f"shape {tensor.shape} is no convolution's")
    return tensor.transpose(2, 3, 1, 0)


def linear(tensor: np.ndarray) -> np.ndarray:
    """(out, in) -> (in, out); trailing axes of length 1 are dropped."""
    if tensor.ndim < 2 or any(n != 1 for n in tensor.shape[2:]):
        raise WeightsError(f"shape {tensor.shape} is no linear map's")
    return tensor.reshape(tensor.shape[:2]).T


def sources(like: PyTree, parts: Mapping[str, Part], *, nin: str = "weight") -> dict[str, Source]:
    """The source of each leaf that lies in one of `parts`.

    like: the parameters' shapes. parts: by our name, of one or more levels. nin: what the matrix of
    a linear map over channels is called there; "W" is one that keeps our order of axes.
    """
    found = {}
    for path, leaf in named(like).items():
        *modules, last = path.split("/")
        for depth in range(len(modules), 0, -1):
            part = parts.get("/".join(modules[:depth]))
            if part is not None:
                found[path] = _source(part, modules[depth:], last, len(leaf.shape), nin)
                break
    return found


def _source(part: Part, modules: list[str], last: str, rank: int, nin: str) -> Source:
    if len(modules) == 1 and callable(part.inside.get(modules[0])):
        made: Any = part.inside[modules[0]]
        return made(last)
    inside = [str(part.inside.get(m, m)) for m in modules]
    prefix = ".".join(filter(None, [part.name, *inside]))
    return Source(f"{prefix}.{_leaf_name(last, nin)}", _read(last, rank, nin))


def _leaf_name(last: str, nin: str) -> str:
    if last == "b":
        return "b" if nin == "W" else "bias"
    if last == "W":
        return nin
    return "bias" if last == "bias" else "weight"


def _read(last: str, rank: int, nin: str) -> Read:
    if rank == 4:
        return convolution
    if rank == 2 and (last == "kernel" or (last == "W" and nin == "weight")):
        return linear
    return as_it_is


def fill(
    like: PyTree,
    found: Mapping[str, Source],
    tensors: Mapping[str, np.ndarray],
    *,
    unused: Collection[str] = (),
) -> PyTree:
    """The parameters: a tree like `like`, each leaf read from its source, in like's dtype.

    unused: tensors that need not be read. Raises WeightsError that lists what is missing, left over
    or of another shape (the first ten) with the likely cause.
    """
    faults: dict[str, list[str]] = {"missing": [], "left over": [], "of another shape": []}
    leaves: dict[str, np.ndarray] = {}
    for path, leaf in named(like).items():
        source = found.get(path)
        if source is None or source.tensor not in tensors:
            faults["missing"].append(f"{source.tensor if source else '?'} (for {path})")
            continue
        try:
            array = np.asarray(source.read(tensors[source.tensor]), leaf.dtype)
        except ValueError as error:
            faults["of another shape"].append(f"{source.tensor}: {error} (for {path})")
            continue
        if array.shape != tuple(leaf.shape):
            faults["of another shape"].append(
                f"{source.tensor}: {array.shape} where {path} has {tuple(leaf.shape)}"
            )
        leaves[path] = array
    used = {source.tensor for source in found.values()} | set(unused)
    faults["left over"] = [name for name in tensors if name not in used]
    check(faults)
    structure = jax.tree.structure(like)
    return jax.tree.unflatten(structure, [leaves[path] for path in named(like)])


def check(faults: Mapping[str, list[str]]) -> None:
    """Raises WeightsError for weights with faults, each kind with its items."""
    total = sum(len(items) for items in faults.values())
    if not total:
        return
    shown, room = [], 10
    for kind, items in faults.items():
        if items:
            few = items[:room]
            room -= len(few)
            more = "; ..." if len(items) > len(few) else ""
            shown.append(f"{len(items)} {kind}: {'; '.join(few)}{more}")
    raise WeightsError(f"The weights do not fit the network. {'. '.join(shown)}. {_cause(faults)}")


def _cause(faults: Mapping[str, list[str]]) -> str:
    missing, left, shape = (bool(faults[k]) for k in ("missing", "left over", "of another shape"))
    if missing and left:
        return (
            "Likely cause: the file is of another family or code (--from), or the config's numbers "
            "of levels, blocks or attentions, or its options of pyramids, are not the file's."
        )
    if missing:
        return "Likely cause: the config's network has more levels, blocks, attentions or classes."
    if left:
        return "Likely cause: the file's network has more levels, blocks, attentions or classes."
    if shape:
        return "Likely cause: the config's widths (nf, ch_mult), channels or classes are others."
    return ""
