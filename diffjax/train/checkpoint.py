"""Checkpoints: the state, the place in the data, the config and the versions, saved as one.

Layout, one directory a step, complete as soon as it has its name:

    workdir/checkpoints/<step>/train     step, params, opt_state, key
                               ema       the averaged weights by track, each readable alone
                               meta      JSON: schema, step, position, config, versions, figures
                               manifest.json    checksums of all files of these

Saving copies the state off the devices and returns. The files are written meanwhile by Orbax; when
all processes are done, the first one reads them once more for the manifest, and then renames the
directory. So a process killed at any moment leaves a temporary directory that no reader takes for a
checkpoint, and never a checkpoint without its checksums. All files are on the disk before the
manifest is, and the name is when `wait` returns: so it is with the machine's power too. Two small
files beside these, Orbax's own time stamps, are in no manifest: nothing is read from them.

Schema 1 had one averaged tree, which is now the track "main", and no manifest; it is still read.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from diffjax.core.files import sync_directory
from diffjax.core.types import PyTree
from diffjax.train import checksums, contents, storage
from diffjax.train.contents import CheckpointError, Meta
from diffjax.train.keep import Best, policy
from diffjax.train.manager import Manager
from diffjax.train.state import TrainState

T = TypeVar("T")

MAIN = "main"  # the track of averaged weights that there always is

_TRAIN, _EMA, _META = "train", "ema", "meta"
_log = logging.getLogger(__name__)


class Checkpointer:
    """The checkpoints of one workdir. A context manager: leaving it finishes the writing.

    keep: the newest `keep` >= 1 checkpoints stay; from two on there is one to fall back to.
    keep_every: those at multiples of it stay for good; None for none. best: those with the lowest
    figure stay too; None for no such rule. writable: False for a reader, which leaves the directory
    as it is, also while a run writes there.
    Of several processes each makes one. Raises OSError naming the directory where it cannot be
    written, CheckpointError where a reader finds none and where the processes see others.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        keep: int = 2,
        keep_every: int | None = None,
        best: Best | None = None,
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
            storage.check_writable(self.directory)
        elif not self.directory.is_dir():
            raise CheckpointError(f"There are no checkpoints in {self.directory}. Train first.")
        self._best = best
        self._figures: dict[int, float] = {}  # of `best`, by step
        self._saving: int | None = None
        self._manager = Manager(
            self.directory,
            item_handlers={
                _TRAIN: ocp.StandardCheckpointHandler(),
                _EMA: ocp.PyTreeCheckpointHandler(),
                _META: ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                create=False,
                cleanup_tmp_directories=writable,
                preservation_policy=(
                    policy(keep, keep_every, best, self._figures) if writable else None
                ),
                # Whether a step is due is the loop's decision.
                save_interval_steps=1,
                # In the first process, when all have written and before the directory has its name.
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
            ),
        )
        if not storage.same(self.steps()):
            raise CheckpointError(
                f"{self.directory} does not hold the same checkpoints in all processes, here those "
                f"of steps {self.steps()}. Use storage that all share, or start again once all see "
                "the same."
            )
        if best is not None:
            self._figures |= self.figures(best.metric)

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
        figures: Mapping[str, float] = {},
    ) -> None:
        """Saves `state` as checkpoint `step`, with the data's position and the config (plain JSON).

        figures: finite numbers that tell how good it is; `best` goes by one of them.
        Returns once the state is copied, so that it may be donated. Raises SaveError where this or
        the one before cannot be written; the older ones are then untouched. Raises CheckpointError
        where a newer checkpoint exists.
        """
        self.wait()
        self._saving = step
        if self._best is not None and self._best.metric in figures:
            self._figures[step] = figures[self._best.metric]
        meta = contents.describe(step, position, config, figures)
        args = ocp.args.Composite(
            **{
                # Without its average, which is an item of its own.
                _TRAIN: ocp.args.StandardSave(dataclasses.replace(state, ema=None)),
                _EMA: ocp.args.PyTreeSave(state.ema),
                _META: ocp.args.JsonSave(meta),
            }
        )
        with self._naming_failures():
            saved = self._manager.save(step, args=args)
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

        def read(meta: Meta) -> TrainState:
            train = self._restore(meta.step, _TRAIN, dataclasses.replace(like, ema=None))
            return dataclasses.replace(train, ema=self._read_tracks(meta, like.ema))

        return self._newest(read, step)

    def restore_ema(
        self,
        like: PyTree,
        step: int | None = None,
        track: str = MAIN,
        *,
        partial: bool = False,
    ) -> tuple[PyTree, Meta]:
        """The averaged weights of one track alone, otherwise as `restore`.

        like: abstract, as params. partial: leaves that `like` lacks are left out; nothing of them
        is read.
        """

        def read(meta: Meta) -> PyTree:
            self._has_track(meta, track)
            return self._read_tracks(meta, {track: like}, only=track, partial=partial)[track]

        return self._newest(read, step, (_EMA, _META))

    def ema_shapes(
        self, step: int | None = None, track: str = MAIN
    ) -> tuple[dict[str, tuple[int, ...]], Meta]:
        """The shapes of a track's leaves by name ("block/conv/kernel"); not a number is read."""

        def read(meta: Meta) -> dict[str, tuple[int, ...]]:
            self._has_track(meta, track)
            found, prefix = self._stored(meta.step, _EMA), f"{track}/"
            if meta.schema == 1:
                return found
            return {n.removeprefix(prefix): s for n, s in found.items() if n.startswith(prefix)}

        return self._newest(read, step, (_EMA, _META))

    def meta(self, step: int | None = None) -> Meta:
        """What checkpoint `step`, by default the newest readable, says about itself."""
        return self._newest(lambda meta: None, step, (_META,))[1]

    def steps(self) -> list[int]:
        """All steps that have a checkpoint, the oldest first."""
        return sorted(self._manager.all_steps())

    def figures(self, name: str) -> dict[int, float]:
        """The figure of each checkpoint that was saved with it, by step."""
        found: dict[int, float] = {}
        for step in self.steps():
            # A damaged one is for `restore` to name.
            with contextlib.suppress(Exception):
                figures = self._meta(step).figures
                found |= {step: figures[name]} if name in figures else {}
        return found

    def wait(self) -> None:
        """Returns when all saves are on disk; raises SaveError where one is not."""
        self._finish(self._manager.wait_until_finished)

    def close(self) -> None:
        """Finishes the writing and frees the threads. Raises SaveError."""
        self._finish(self._manager.close)

    def _finish(self, finish: Callable[[], None]) -> None:
        with self._naming_failures():
            finish()
        if self._writable:
            sync_directory(self.directory)

    def _write_manifest(self) -> None:
        # Only one save is under way at a time, and what a killed run left was removed before.
        [directory] = self.directory.glob(f"{self._saving}.orbax-checkpoint-tmp*")
        checksums.write(directory)

    @contextlib.contextmanager
    def _naming_failures(self) -> Iterator[None]:
        """Raises what goes wrong in writing as SaveError, with the place and the way out."""
        try:
            yield
        except Exception as error:  # Orbax and its storage raise many kinds
            code = storage.error_number(error)
            if code is None:  # not the system's doing
                raise
            # Of the disk's own: in memory those are gone that this save was to replace.
            names = [path.name for path in self.directory.iterdir() if path.name.isdecimal()]
            whole = max((int(n) for n in names if int(n) != self._saving), default=None)
            last = "there is no other" if whole is None else f"checkpoint {whole} is whole"
            raise storage.SaveError(
                code,
                f"Cannot save checkpoint {self._saving} ({os.strerror(code)}: "
                f"{storage.first_line(error)}); {last}. Free space or mend the disk, and start the "
                "same command again",
                str(self.directory),
            ) from error

    def _newest(
        self,
        read: Callable[[Meta], T],
        step: int | None,
        items: tuple[str, ...] = (_TRAIN, _EMA, _META),
    ) -> tuple[T, Meta]:
        """`read` and the metadata of `step`, or of the newest step where `items` are whole."""
        self.wait()
        steps = self.steps()[::-1]
        if not steps or (step is not None and step not in steps):
            found = f"it holds steps {steps[::-1]}" if steps else "train first"
            wanted = "a checkpoint" if step is None else f"checkpoint {step}"
            raise CheckpointError(f"There is not {wanted} in {self.directory}: {found}.")
        damaged: list[int] = []
        for candidate in steps if step is None else [step]:
            try:
                storage.agreed(functools.partial(self._verify, candidate, items))
                meta = storage.agreed(functools.partial(self._meta, candidate))
                result = storage.agreed(functools.partial(read, meta))
            except CheckpointError:
                raise
            except Exception as error:  # Orbax and its storage raise many kinds for bad bytes
                _log.warning(
                    "Checkpoint %s cannot be read (%s).",
                    self._path(candidate),
                    storage.first_line(error),
                )
                damaged.append(candidate)
                last_error = error
            else:
                self._set_aside(damaged, candidate)
                return result, meta
        names = ", ".join(str(self._path(d)) for d in damaged)
        raise CheckpointError(
            f"Damaged: {names} cannot be read ({storage.first_line(last_error)}). Remove it, or "
            "start again in another workdir; the rest of the directory is untouched."
        ) from last_error

    def _verify(self, step: int, items: tuple[str, ...]) -> None:
        """Raises Damaged unless the files of `items` are what was written."""
        directory = self._path(step)
        if not (directory / checksums.NAME).exists() and self._meta(step).schema == 1:
            return
        part, parts = jax.process_index(), jax.process_count()
        checksums.verify(directory, items, part=part, parts=parts)

    def _set_aside(self, damaged: list[int], good: int) -> None:
        """Renames damaged checkpoints, so that the run can save these steps again."""
        if not damaged or not self._writable:
            return
        for step in damaged:
            # Only now that an older one was read: what fails for all of them is not damage.
            aside = self._path(step).with_name(f"{step}.damaged")
            storage.agreed(functools.partial(self._move, step, aside))
            self._figures.pop(step, None)
            _log.warning("Set aside as %s; going on from step %d.", aside, good)
        self._manager.reload()

    def _move(self, step: int, aside: Path) -> None:
        if jax.process_index() == 0:
            shutil.rmtree(aside, ignore_errors=True)  # the same step, damaged once before
            self._path(step).rename(aside)

    def _path(self, step: int) -> Path:
        return self.directory / str(step)

    def _meta(self, step: int) -> Meta:
        raw = self._read_item(step, _META, ocp.args.JsonRestore())
        return contents.parse(raw, self._path(step))

    def _has_track(self, meta: Meta, track: str) -> None:
        """Raises CheckpointError where there is no such track."""
        known = [MAIN]
        if meta.schema > 1:
            known = sorted({name.partition("/")[0] for name in self._stored(meta.step, _EMA)})
        if track not in known:
            raise CheckpointError(
                f"{self._path(meta.step)} has no averaged weights {track!r}; it has "
                f"{', '.join(known)}."
            )

    def _read_tracks(self, meta: Meta, like: PyTree, **options: Any) -> PyTree:
        """The item of averages, {track: tree}, from any schema."""
        if meta.schema > 1:
            return self._restore(meta.step, _EMA, like, **options)
        if set(like) != {MAIN}:
            raise CheckpointError(
                f"{self._path(meta.step)} is of schema 1, with one average, {MAIN}; the config "
                f"asks for {', '.join(sorted(like))}. Use the config that it was trained with."
            )
        options.pop("only", None)
        return {MAIN: self._restore(meta.step, _EMA, like[MAIN], **options)}

    def _restore(
        self, step: int, item: str, like: PyTree, *, only: str = "", partial: bool = False
    ) -> PyTree:
        """An item like `like`. only: of the leaves below this name. partial: of those of `like`."""
        self._check_matches(step, item, like, only=only, partial=partial)
        args = (
            ocp.args.PyTreeRestore(
                like,
                restore_args=ocp.checkpoint_utils.construct_restore_args(like),
                partial_restore=bool(only) or partial,
            )
            if item == _EMA
            else ocp.args.StandardRestore(like)
        )
        return self._read_item(step, item, args)

    def _read_item(self, step: int, item: str, args: Any) -> Any:
        return self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]

    def _stored(self, step: int, item: str) -> dict[str, tuple[int, ...]]:
        """The shapes of the stored leaves by name."""
        metadata = self._manager.item_metadata(step)[item]
        if metadata is None:
            raise FileNotFoundError(f"{self._path(step) / item} is missing or empty")
        return contents.shapes(metadata.tree)

    def _check_matches(
        self, step: int, item: str, like: PyTree, *, only: str, partial: bool
    ) -> None:
        """Raises CheckpointError where the stored leaves have other names or shapes than `like`."""
        stored, wanted = self._stored(step, item), contents.shapes(like)
        if partial:
            stored = {name: shape for name, shape in stored.items() if name in wanted}
        elif only:
            stored = {n: shape for n, shape in stored.items() if n.startswith(f"{only}/")}
        contents.check_same(stored, wanted, self._path(step), item)
