"""A progress bar for a solve, on request: a `save` of `sample` that moves it.

    bar = ProgressBar(20)
    result = draw(key, denoise, x, times, solver=solver, process=process, save=bar)

The compiled program calls back to the host after each interval, and once more after a denoising
that follows the last one. Make a bar once and use it for every solve: it is part of the program's
structure, and a new one is a new program. Nothing in the library reports by itself. Under a mesh
each device calls back for itself; intervals that are skipped (a padded grid, the filling of
`checkpoint`) and those that are computed again on the way back are counted too.
"""

from collections.abc import Callable
from typing import Any

import jax

from diffjax.core import checks
from diffjax.core.types import PyTree
from diffjax.solvers.base import Final, ToEnd


class ProgressBar:
    """state -> what `save` keeps, and one interval more on a tqdm bar.

    steps: n, the intervals of a solve. final: how it ends. save: what to keep, as of `sample`;
    nothing by default. options: of `tqdm.tqdm`, such as desc and file. Needs the package tqdm.
    """

    def __init__(
        self,
        steps: int,
        *,
        final: Final = ToEnd(),
        save: Callable[[Any], PyTree] | None = None,
        **options: Any,
    ) -> None:
        checks.at_least("steps", steps, 1)
        total = steps + final.steps
        try:
            from tqdm import tqdm
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "A progress bar needs the package tqdm; pip install tqdm.", name="tqdm"
            ) from error
        self._open = lambda: tqdm(total=total, unit=" steps", **options)
        self._save = save
        self._total = total
        self._bar: Any = None

    def __call__(self, state: Any) -> PyTree:
        """Called by `sample` on the state after each interval."""
        jax.debug.callback(self._advance)
        return None if self._save is None else self._save(state)

    def _advance(self) -> None:
        if self._bar is None:
            self._bar = self._open()
        self._bar.update()
        if self._bar.n >= self._total:
            self._bar.close()
            self._bar = None
