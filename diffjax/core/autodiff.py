"""A mark for results that reverse mode cannot reach, so that it says what to do about it.

JAX has no reverse mode through a `while_loop`; its own message names no way out of a solver's.
"""

import functools
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from diffjax.core.types import PyTree

_forward_only = Primitive("forward_only")


def forward_only(tree: PyTree, message: str) -> PyTree:
    """The tree as it is; differentiating through it backwards raises TypeError with `message`."""
    return jax.tree.map(functools.partial(_forward_only.bind, message=message), tree)


def _refuse(cotangent: Any, *arguments: Any, message: str) -> Any:
    raise TypeError(message)


_forward_only.def_impl(lambda x, *, message: x)
_forward_only.def_abstract_eval(lambda x, *, message: x)
ad.deflinear2(_forward_only, _refuse)
batching.defvectorized(_forward_only)
mlir.register_lowering(_forward_only, lambda context, x, *, message: [x])
