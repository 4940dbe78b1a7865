"""Checks of numbers at construction time that let tracers pass.

A message names the rule, the value and the way out. Only concrete numbers are checked: Python and
NumPy scalars and concrete arrays. Tracers, `ShapeDtypeStruct`s and placeholders of a tree pass, so
the same constructor works inside `jit`, `vmap` and `grad`.
"""

from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np


def concrete(value: Any) -> np.ndarray | None:
    """The value as a NumPy array, or None where it cannot be known (a tracer, a placeholder)."""
    if isinstance(value, jax.core.Tracer) or not isinstance(
        value, (bool, int, float, np.ndarray, np.generic, jax.Array)
    ):
        return None
    return np.asarray(value)


def evaluated(function: Callable[..., Any], *arguments: Any) -> np.ndarray | None:
    """What a function of known numbers gives, also inside `jit`; None where they are tracers."""
    with jax.ensure_compile_time_eval():
        return concrete(function(*arguments))


def positive(name: str, value: Any) -> None:
    """Raises ValueError unless value > 0 (every element)."""
    known = concrete(value)
    if known is not None and not np.all(known > 0):
        raise ValueError(f"{name} must be positive; got {value}.")


def non_negative(name: str, value: Any) -> None:
    """Raises ValueError unless value >= 0 (every element)."""
    known = concrete(value)
    if known is not None and not np.all(known >= 0):
        raise ValueError(f"{name} must not be negative; got {value}.")


def in_range(name: str, value: Any, low: float, high: float) -> None:
    """Raises ValueError unless low <= value <= high (every element)."""
    known = concrete(value)
    if known is not None and not np.all((known >= low) & (known <= high)):
        raise ValueError(f"{name} must lie in [{low}, {high}]; got {value}.")


def less(low_name: str, low: Any, high_name: str, high: Any) -> None:
    """Raises ValueError unless low < high."""
    a, b = concrete(low), concrete(high)
    if a is not None and b is not None and not np.all(a < b):
        raise ValueError(f"{low_name} must be below {high_name}; got {low} and {high}.")


def one_of(name: str, value: Any, allowed: Collection[Any]) -> None:
    """Raises ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        choices = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"{name} must be one of {choices}; got {value!r}.")


def at_least(name: str, value: Any, low: int) -> None:
    """Raises TypeError unless `value` is an int, ValueError unless value >= low."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int; got {value!r}.")
    if value < low:
        raise ValueError(f"{name} must be at least {low}; got {value}.")
