"""A start from the weights of another run: `config.training.init_from`, `--init_from=`.

The source is a workdir: of a training run, or of `diffjax import`, which makes one of another
code's weights. Taken are the averaged weights "main" of its newest checkpoint, or of step S as
WORKDIR:S. Leaves go by name ("Dense_0/kernel"), each on its own:

    loaded           the same name and shape in both
    shape differs    the same name, another shape; starts afresh
    missing          only in the network here; starts afresh
    unused           only in the source

Blocks that are stacked in one of the two and apart in the other (`config.model.scan`) are named as
in the source, and take its layout or leave it on the way.

The optimizer and the step start afresh, every average starts at the weights. The first checkpoint
is written at once, at step 0: from then on the source is not needed again.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax.traverse_util import unflatten_dict

from diffjax.core.pytree import leaf_name, named
from diffjax.core.types import Array, PyTree
from diffjax.runs import stacking
from diffjax.runs.workdir import RunError

LOADED, DIFFERS, MISSING, UNUSED = "loaded", "shape differs", "missing", "unused"

Shapes = Mapping[str, tuple[int, ...]]


class Row(NamedTuple):
    """What becomes of one leaf. here, there: its shapes; None where it is not."""

    name: str
    fate: str
    here: tuple[int, ...] | None
    there: tuple[int, ...] | None


class Start(NamedTuple):
    """leaves: what was loaded, by name. rows: of all leaves. source: the checkpoint."""

    leaves: dict[str, Array]
    rows: list[Row]
    source: str

    def table(self) -> str:
        """One line a leaf, and a line of counts."""
        width = max(len(row.name) for row in self.rows)
        lines = [f"  {row.fate:<13}  {row.name:<{width}}  {_shapes(row)}" for row in self.rows]
        counts = Counter(row.fate for row in self.rows)
        summary = ", ".join(f"{counts[f]} {f}" for f in (LOADED, DIFFERS, MISSING, UNUSED))
        return "\n".join([f"Weights from {self.source}:", *lines, f"Leaves: {summary}."])


def wanted(config: Any, workdir: Path, like: PyTree) -> Start | None:
    """The weights that a run begins with; None where it goes on or begins afresh."""
    source = config.training.init_from
    begun = any(path.name.isdecimal() for path in (workdir / "checkpoints").glob("*"))
    return read(source, like) if source and not begun else None


def compare(here: Shapes, there: Shapes) -> list[Row]:
    """The fate of every leaf, by name."""
    rows = []
    for name in sorted(here.keys() | there.keys()):
        a, b = here.get(name), there.get(name)
        if b is None:
            fate = MISSING
        elif a is None:
            fate = UNUSED
        else:
            fate = LOADED if a == b else DIFFERS
        rows.append(Row(name, fate, a, b))
    return rows


def read(source: str, like: PyTree) -> Start:
    """The leaves of `source` that fit a network, by their names in the network.

    source: WORKDIR or WORKDIR:STEP. like: the network's abstract parameters; what is loaded has
    their dtypes and shardings, and nothing else is read.
    Raises RunError where no leaf fits, CheckpointError where there is no such checkpoint.
    """
    from diffjax.train.checkpoint import Checkpointer
    from diffjax.train.contents import shapes

    workdir, step = _parsed(source)
    own = named(like)
    with Checkpointer(workdir, writable=False) as checkpointer:
        there, meta = checkpointer.ema_shapes(step)
        asked = stacking.as_there(own, there)
        rows = compare(shapes(asked), there)
        names = [row.name for row in rows if row.fate == LOADED]
        if not names:
            raise RunError(
                f"Nothing in {source} fits this network: no leaf has the same name and shape. "
                f"There: {_some(there)}. Here: {_some(shapes(like))}."
            )
        wanted = unflatten_dict({name: asked[name] for name in names}, sep="/")
        loaded, _ = checkpointer.restore_ema(wanted, meta.step, partial=True)
    return Start(stacking.as_here(named(loaded), own), rows, f"{workdir}, step {meta.step}")


def replaced(params: PyTree, leaves: Mapping[str, Array]) -> PyTree:
    """`params` with these leaves, by name, in place of its own."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaves.get(leaf_name(path), leaf), params
    )


def _parsed(source: str) -> tuple[Path, int | None]:
    """The workdir and the step in WORKDIR or WORKDIR:STEP."""
    before, colon, step = source.rpartition(":")
    if colon and step.isdecimal() and not Path(source).exists():
        return Path(before), int(step)
    return Path(source), None


def _shapes(row: Row) -> str:
    if row.fate == DIFFERS:
        return f"{row.there} there, {row.here} here"
    return str(row.here if row.there is None else row.there)


def _some(shapes: Shapes) -> str:
    shown = [f"{name} {shape}" for name, shape in sorted(shapes.items())[:3]]
    return ", ".join(shown) + (", ..." if len(shapes) > 3 else "")
