"""Checks that are known only when a compiled program runs."""

import functools
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import jax
from jax.experimental import checkify

P = ParamSpec("P")
R = TypeVar("R")


def checked(function: Callable[P, R], *, static_argnames: Sequence[str] = ()) -> Callable[P, R]:
    """`jax.jit(function)` that also checks what is known only at run time.

    Inside `jit` the values of a grid are tracers, so `sample` cannot raise. It leaves debug checks
    instead, which cost nothing in ordinary use; here a failed one raises ValueError:

        draw = checked(sample)
        draw(key, denoise, x, times, solver=solver, process=process)

    static_argnames: as of `jax.jit`. Make it once and use it often: it holds the compiled program.
    """
    functional = checkify.checkify(function, errors=checkify.user_checks)
    named = functools.wraps(function)(lambda *args, **kwargs: functional(*args, **kwargs))
    compiled = jax.jit(named, static_argnames=tuple(static_argnames))

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        error, result = compiled(*args, **kwargs)
        message = error.get()
        if message is not None:
            raise ValueError(message)
        return result

    return call
