r"""Checkpoints of the Score-SDE code, of its JAX version and of its PyTorch port.

JAX: flax's msgpack of a State with `params_ema`, a tree under the names that our networks have too.
Older flax kept the scale and bias of a group normalisation as (1, 1, 1, C) and a state replicated
over devices has one more leading axis; both are undone. The optimizer's state is not read.

PyTorch: `model` is a state_dict whose modules are a list, `module.all_modules.{j}`, in calling
order. The input pyramid's "input_skip" and the output pyramid's "output_skip" resampling have no
weights and lie outside the list. The averaged weights are a list too, `ema.shadow_params.{i}`, of
the parameters that are trained, in the order of `model`: the Fourier frequencies and the table of
noise levels are left out of it, and the first is taken from `model`.

Reference: https://github.com/yang-song/score_sde (State in run_lib.py) and
https://github.com/yang-song/score_sde_pytorch (utils.py, models/ema.py).
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.core.pytree import named
from diffjax.core.tensorfile import TensorFileError
from diffjax.core.types import PyTree
from diffjax.interop import trunk
from diffjax.interop.assign import Part, Source, WeightsError, as_it_is, fill, sources

_BUFFERS = ("sigmas",)
_FOURIER = re.compile(r"all_modules\.\d+\.W")  # frozen, directly in the list


def read_jax(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state of a JAX checkpoint as a dict. Raises TensorFileError where it is none."""
    from flax import serialization

    try:
        state = serialization.msgpack_restore(Path(path).read_bytes())
    except OSError:
        raise
    except Exception as error:  # msgpack raises many kinds for bytes that are not its own
        raise TensorFileError(
            f"{path} is no flax checkpoint ({type(error).__name__}: {error})."
        ) from error
    if not isinstance(state, dict) or "params_ema" not in state:
        held = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise TensorFileError(f"{path} holds no params_ema, but {held}.")
    return state


def from_jax(like: PyTree, params_ema: Mapping[str, Any]) -> PyTree:
    """The parameters of the averaged weights of a JAX checkpoint; raises WeightsError.

    like: the network's parameters' shapes. params_ema: a tree of arrays, with or without an outer
    "params".
    """
    inner = params_ema.get("params")
    tensors = named(inner if isinstance(inner, Mapping) else params_ema)
    wanted = named(like)
    tensors = _unreplicated(tensors, wanted)
    for path, tensor in tensors.items():
        parent = path.split("/")[-2] if "/" in path else ""
        if parent.startswith("GroupNorm") and tensor.shape[:-1] == (1, 1, 1):
            tensors[path] = tensor.reshape(-1)
    return fill(like, {path: Source(path, as_it_is) for path in wanted}, tensors)


def _unreplicated(
    tensors: Mapping[str, np.ndarray], wanted: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The first copy of each where every one has a leading axis of the same length too many."""
    # A group normalisation of old flax has other axes too many: it says nothing here.
    known = [
        (tensors[path].shape, tuple(leaf.shape))
        for path, leaf in wanted.items()
        if path in tensors and "GroupNorm" not in path
    ]
    replicated = known and all(got[1:] == want and len(got) for got, want in known)
    if not replicated or len({got[0] for got, _ in known}) != 1:
        return dict(tensors)
    return {path: tensor[0] for path, tensor in tensors.items()}


def averaged(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The averaged weights of a PyTorch checkpoint under the names of its `model`.

    tensors: of the whole file, flat. Raises WeightsError where the two lists do not match. A file
    that is a bare state_dict, with no averages, is returned as it is.
    """
    if not any(name.startswith("model.") for name in tensors):
        return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    model = {
        name.removeprefix("model.").removeprefix("module."): tensor
        for name, tensor in tensors.items()
        if name.startswith("model.")
    }
    trained = [n for n in model if n not in _BUFFERS and not _FOURIER.fullmatch(n)]
    prefix = "ema.shadow_params."
    shadows = [tensors[n] for n in tensors if n.startswith(prefix)]
    if len(shadows) != len(trained):
        raise WeightsError(
            f"The checkpoint has {len(shadows)} averaged weights and {len(trained)} trained ones; "
            "they go by their order, so they must be as many. Is the file whole?"
        )
    for name, shadow in zip(trained, shadows, strict=True):
        if shadow.shape != model[name].shape:
            raise WeightsError(
                f"The averaged weights are not in the order of the model's: {name} has shape "
                f"{model[name].shape} and its average {shadow.shape}."
            )
    return model | dict(zip(trained, shadows, strict=True))


def modules(net: Any, height: int) -> list[str]:
    """Our name of each entry of the port's `all_modules`, for images of this height."""
    return [step.name for step in trunk.steps(net, height)]


def from_torch(net: Any, like: PyTree, height: int, tensors: Mapping[str, np.ndarray]) -> PyTree:
    """The parameters of the averaged weights of a PyTorch checkpoint; raises WeightsError.

    net: an `NCSNpp` or a `DDPM`; like: its parameters' shapes; height: of its images. tensors: of
    the file, flat.
    """
    parts = {name: Part(f"all_modules.{j}") for j, name in enumerate(modules(net, height))}
    return fill(like, sources(like, parts, nin="W"), averaged(tensors), unused=_BUFFERS)
