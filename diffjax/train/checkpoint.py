"""Checkpoints: the state, the place in the data, the config and the versions, saved as one.

Layout, one directory a step, complete as soon as it has its name:

    workdir/checkpoints/<step>/train     step, params, opt_state, key
                               ema       the averaged weights, readable without the rest
                               meta      JSON: schema, step, position, config, versions

Saving copies the state off the devices and returns; the files are written meanwhile by Orbax. A
process killed in between leaves a temporary directory that no reader takes for a checkpoint.
"""

import dataclasses
import importlib.metadata
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import orbax.checkpoint as ocp

from diffjax.core.types import PyTree
from diffjax.train.state import TrainState
from diffjax.version import __version__

T = TypeVar("T")

SCHEMA = 1  # of the layout above; a change that old readers cannot read adds one

_TRAIN, _EMA, _META = "train", "ema", "meta"
_log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of something else; the message is for people."""


class Meta(NamedTuple):
    """What a checkpoint says about itself; all plain JSON values."""

    step: int
    position: dict[str, Any]
    config: dict[str, Any]
    versions: dict[str, str]


class Checkpointer:
    """The checkpoints of one workdir. A context manager: leaving it finishes the writing.

    keep: the newest `keep` >= 1 checkpoints stay; from two on there is one to fall back to.
    keep_every: those at multiples of it stay for good; None for none. writable: False for a reader,
    which leaves the directory as it is, also while a run writes there.
    Raises OSError naming the directory where it cannot be written, CheckpointError where a reader
    finds none.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        keep: int = 2,
        keep_every: int | None = None,
        writable: bool = True,
    ):
        if keep < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(
                f"keep and keep_every must be at least 1; got {keep} and {keep_every}. "
                "keep_every=None keeps none for good."
            )
        self.directory = Path(workdir).absolute() / "checkpoints"
        self._writable = writable
        if writable:
            _check_writable(self.directory)
        elif not self.directory.is_dir():
            raise CheckpointError(f"There are no checkpoints in {self.directory}. Train first.")
        policies = ocp.checkpoint_managers
        kept: list[Any] = [policies.LatestN(keep)]
        if keep_every is not None:
            kept.append(policies.EveryNSteps(keep_every))
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers={
                _TRAIN: ocp.StandardCheckpointHandler(),
                _EMA: ocp.StandardCheckpointHandler(),
                _META: ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                create=False,
                cleanup_tmp_directories=writable,
                preservation_policy=policies.AnyPreservationPolicy(kept) if writable else None,
                # Whether a step is due is the loop's decision.
                save_interval_steps=1,
            ),
        )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def latest_step(self) -> int | None:
        """The newest step that has a checkpoint, also one still being written; None without."""
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        state: TrainState,
        *,
        position: Mapping[str, Any],
        config: Mapping[str, Any],
    ) -> None:
        """Saves `state` as checkpoint `step`, with the data's position and the config (plain JSON).

        Returns once the state is copied, so that it may be donated; an error in writing the one
        before is raised here. Raises CheckpointError where a newer checkpoint exists.
        """
        meta = {
            "schema": SCHEMA,
            "step": step,
            "position": dict(position),
            "config": dict(config),
            "versions": _versions(),
        }
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(
                **{
                    # Without its average, which is an item of its own.
                    _TRAIN: ocp.args.StandardSave(dataclasses.replace(state, ema=None)),
                    _EMA: ocp.args.StandardSave(state.ema),
                    _META: ocp.args.JsonSave(meta),
                }
            ),
        )
        if not saved:
            raise CheckpointError(
                f"Cannot save step {step}: {self.directory} holds step {self.latest_step()}. "
                "Remove the newer checkpoints or use another workdir."
            )

    def restore(self, like: TrainState, step: int | None = None) -> tuple[TrainState, Meta]:
        """The state of checkpoint `step`, by default the newest that can be read.

        like: `state.abstract` of such a state; the result has its dtypes and shardings, so it may
        lie on another mesh than the one that saved. Where the newest is damaged, the one
        before is taken, a warning names the damaged one, and it is set aside as `<step>.damaged`.
        Raises CheckpointError where nothing can be read, where the checkpoint is of another model,
        and for a schema from the future.
        """

        def read(step):
            train = self._restore(step, _TRAIN, dataclasses.replace(like, ema=None))
            return dataclasses.replace(train, ema=self._restore(step, _EMA, like.ema))

        return self._newest(read, step)

    def restore_ema(self, like: PyTree, step: int | None = None) -> tuple[PyTree, Meta]:
        """The averaged weights alone, otherwise as `restore`. like: abstract, as params."""
        return self._newest(lambda step: self._restore(step, _EMA, like), step)

    def meta(self, step: int | None = None) -> Meta:
        """What checkpoint `step`, by default the newest readable, says about itself."""
        return self._newest(lambda step: None, step)[1]

    def wait(self) -> None:
        """Returns when all saves are on disk; raises what went wrong there."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes the writing and frees the threads."""
        self._manager.close()

    def _newest(self, read: Callable[[int], T], step: int | None) -> tuple[T, Meta]:
        """`read` and the metadata of `step`, or of the newest step where both can be read."""
        self.wait()
        steps = sorted(self._manager.all_steps(), reverse=True)
        if not steps or (step is not None and step not in steps):
            found = f"it holds steps {steps[::-1]}" if steps else "train first"
            wanted = "a checkpoint" if step is None else f"checkpoint {step}"
            raise CheckpointError(f"There is not {wanted} in {self.directory}: {found}.")
        damaged: list[int] = []
        for candidate in steps if step is None else [step]:
            try:
                result = read(candidate), self._meta(candidate)
            except CheckpointError:
                raise
            except Exception as error:  # Orbax and its storage raise many kinds for bad bytes
                _log.warning(
                    "Checkpoint %s cannot be read (%s).", self._path(candidate), _first_line(error)
                )
                damaged.append(candidate)
                last_error = error
            else:
                self._set_aside(damaged, candidate)
                return result
        names = ", ".join(str(self._path(d)) for d in damaged)
        raise CheckpointError(
            f"Damaged: {names} cannot be read ({_first_line(last_error)}). Remove it, or start "
            "again in another workdir; the rest of the directory is untouched."
        ) from last_error

    def _set_aside(self, damaged: list[int], good: int) -> None:
        """Renames damaged checkpoints, so that the run can save these steps again."""
        if not damaged or not self._writable:
            return
        for step in damaged:
            # Only now that an older one was read: what fails for all of them is not damage.
            aside = self._path(step).with_name(f"{step}.damaged")
            self._path(step).rename(aside)
            _log.warning("Set aside as %s; going on from step %d.", aside, good)
        self._manager.reload()

    def _path(self, step: int) -> Path:
        return self.directory / str(step)

    def _meta(self, step: int) -> Meta:
        raw = self._read_item(step, _META, ocp.args.JsonRestore())
        if raw["schema"] != SCHEMA:
            raise CheckpointError(
                f"{self._path(step)} has schema {raw['schema']} and this diffjax {__version__} "
                f"reads {SCHEMA}; it was written by diffjax {raw['versions']['diffjax']}, use that."
            )
        return Meta(raw["step"], raw["position"], raw["config"], raw["versions"])

    def _restore(self, step: int, item: str, like: PyTree) -> PyTree:
        self._check_matches(step, item, like)
        return self._read_item(step, item, ocp.args.StandardRestore(like))

    def _read_item(self, step: int, item: str, args: Any) -> Any:
        return self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]

    def _check_matches(self, step: int, item: str, like: PyTree) -> None:
        """Raises CheckpointError where the stored leaves have other names or shapes than `like`."""
        metadata = self._manager.item_metadata(step)[item]
        if metadata is None:
            raise FileNotFoundError(f"{self._path(step) / item} is missing or empty")
        stored, wanted = _shapes(metadata.tree), _shapes(like)
        for name in sorted(stored.keys() | wanted.keys()):
            if stored.get(name) != wanted.get(name):
                raise CheckpointError(
                    f"{self._path(step)} is of another model or optimizer: {item}/{name} has shape "
                    f"{stored.get(name, 'none')} there and {wanted.get(name, 'none')} here. Use "
                    "the config that it was trained with."
                )


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    """Shapes by name. Keys are left out: they are stored as the numbers that they are made of."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        name: tuple(leaf.shape)
        for path, leaf in leaves
        if (name := jax.tree_util.keystr(path, simple=True, separator="/")) != "key"
    }


def _versions() -> dict[str, str]:
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")
    return {"diffjax": __version__} | {p: importlib.metadata.version(p) for p in packages}


def _check_writable(directory: Path) -> None:
    """Makes the directory and a file in it. Raises OSError naming it, with the way out."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise OSError(
            error.errno,
            f"Cannot write checkpoints ({error.strerror}); choose another workdir",
            str(directory),
        ) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__
