"""Which checkpoints stay when a new one is written.

One stays if any of these rules says so; the rest are removed after the new one is whole:

    newest n     to go on from, and one to fall back to
    every n      at multiples of n steps, for good
    best n       those with the lowest figure, such as the loss on held-out images
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import orbax.checkpoint as ocp


class Best(NamedTuple):
    """The `n` >= 1 checkpoints with the lowest `metric`; of equal ones the newer.

    A checkpoint that was saved without this figure is none of them.
    """

    metric: str
    n: int = 1


def policy(newest: int, every: int | None, best: Best | None, figures: Mapping[int, float]) -> Any:
    """The rules as Orbax asks for them. figures: of `best`, by step; read at each decision."""
    policies = ocp.checkpoint_managers
    rules: list[Any] = [policies.LatestN(newest)]
    if every is not None:
        rules.append(policies.EveryNSteps(every))
    if best is not None:
        if best.n < 1:
            raise ValueError(f"best.n must be at least 1; got {best.n}. best=None keeps none.")
        rules.append(_Lowest(best.n, figures))
    return policies.AnyPreservationPolicy(rules)


class Newest:
    """A metric writer that remembers the newest value of one figure, for `Checkpointer.save`."""

    def __init__(self, name: str):
        self._name = name
        self._at: tuple[int, float] | None = None

    def of(self, step: int) -> dict[str, float]:
        """The figure by its name, or {} where step `step` has none that is finite."""
        if self._at is None or self._at[0] != step or not math.isfinite(self._at[1]):
            return {}
        return {self._name: self._at[1]}

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        if self._name in scalars:
            self._at = (int(step), float(scalars[self._name]))

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        del step, images

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Holds nothing."""


class _Lowest:
    """Keeps the n steps of the lowest figures.

    Orbax's own rule reads a file of each checkpoint when a run starts, and one that is damaged
    stops it; the figures here come from a reader that goes on.
    """

    def __init__(self, n: int, figures: Mapping[int, float]):
        self._n = n
        self._figures = figures

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        del context
        known = [info.step for info in checkpoints if info.step in self._figures]
        best = sorted(known, key=lambda step: (self._figures[step], -step))[: self._n]
        return [info.step in best for info in checkpoints]
