"""Checkpoints under faults: damage anywhere, full disks, kills at the worst moment; and upkeep."""

import contextlib
import dataclasses
import errno
import gc
import json
import logging
import os
import random
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental import multihost_utils

from diffjax.train import checksums, mesh, state, storage
from diffjax.train.checkpoint import Checkpointer, CheckpointError
from diffjax.train.keep import Best, Newest
from diffjax.train.manager import Manager
from diffjax.train.storage import SaveError
from tests import disk
from tests.train import toy


@pytest.fixture(scope="module")
def on():
    return mesh.make_mesh(data=1)


@pytest.fixture(scope="module")
def fresh(on):
    return toy.new_state(on)


def moved(fresh, number):
    """Another state, as after `number` updates, without compiling any."""
    params = jax.tree.map(lambda leaf: leaf + number, fresh.params)
    return dataclasses.replace(fresh, step=jnp.int32(number), params=params)


def save(checkpointer, s, **options):
    checkpointer.save(int(s.step), s, position={"step": int(s.step)}, config={}, **options)


def steps_in(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal())


def harm(path, how, rng):
    content = path.read_bytes()
    if how == "lost":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: rng.randrange(len(content))])
    else:
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)


@pytest.mark.parametrize(
    "how",
    [
        "flipped",
        pytest.param("truncated", marks=pytest.mark.slow),
        pytest.param("lost", marks=pytest.mark.slow),
    ],
)
def test_harm_to_any_file_is_found_and_the_one_before_used(fresh, tmp_path, how, caplog):
    rng = random.Random(how)
    with Checkpointer(tmp_path) as checkpointer:
        for number in (1, 2):
            save(checkpointer, moved(fresh, number))
    newest, spare = tmp_path / "checkpoints" / "2", tmp_path / "spare"
    shutil.copytree(newest, spare)
    files = [path.relative_to(newest) for path in newest.rglob("*") if path.is_file()]
    assert len(files) > 20
    for file in files:
        harm(newest / file, how, rng)
        caplog.clear()
        with Checkpointer(tmp_path) as checkpointer, caplog.at_level(logging.WARNING, "diffjax"):
            restored, meta = checkpointer.restore(state.abstract(fresh))
        toy.assert_bitwise(restored, moved(fresh, meta.step))
        # Orbax's two own files hold nothing that is read.
        assert meta.step == (2 if len(file.parts) == 1 and file.name != checksums.NAME else 1)
        if meta.step == 1:
            assert str(newest) in caplog.text and file.name in caplog.text
            assert steps_in(tmp_path) == [1]
            # The second time that step 2 is damaged, the first remains give way.
            assert (tmp_path / "checkpoints" / "2.damaged").is_dir()
        shutil.rmtree(newest, ignore_errors=True)
        shutil.copytree(spare, newest)


def test_the_checksums_are_there_before_the_checkpoint_has_its_name(fresh, tmp_path, monkeypatch):
    """And the caller does not wait for them."""
    reached, go_on = threading.Event(), threading.Event()
    write = checksums.write

    def slowly(directory):
        reached.set()
        assert go_on.wait(60)
        write(directory)

    monkeypatch.setattr(checksums, "write", slowly)
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, moved(fresh, 1))
        assert reached.wait(60)  # back from `save`, and the hashing is under way
        assert steps_in(tmp_path) == []
        # What a process killed now would leave is no checkpoint for anybody.
        shutil.copytree(tmp_path, tmp_path / "killed" / "work")
        go_on.set()
        checkpointer.wait()
        assert (tmp_path / "checkpoints" / "1" / checksums.NAME).is_file()
    with Checkpointer(tmp_path / "killed" / "work") as checkpointer:
        assert checkpointer.latest_step() is None
        save(checkpointer, moved(fresh, 1))
    assert steps_in(tmp_path / "killed" / "work") == [1]


def test_all_is_on_the_disk_before_it_has_its_name(fresh, tmp_path, monkeypatch):
    """And the name when `wait` returns: a machine that loses its power keeps it too."""
    synced, before = set(), set()
    fsync, write = os.fsync, checksums.write

    def noting(handle):
        fsync(handle)
        synced.add(os.fstat(handle).st_ino)

    def then(directory):
        write(directory)
        before.update(synced)
        synced.clear()

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(checksums, "write", then)
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, moved(fresh, 1))
        checkpointer.wait()
        home = tmp_path / "checkpoints"
        inside = [path for path in (home / "1").rglob("*") if path.parent != home / "1"]
        manifest = home / "1" / checksums.NAME
        folders = [home / "1", *(path for path in (home / "1").iterdir() if path.is_dir())]
        assert len(inside) > 20
        assert {path.stat().st_ino for path in (*inside, manifest, *folders)} <= before
        assert home.stat().st_ino in synced


def test_saving_leaves_the_service_of_notices_alone(fresh, tmp_path, monkeypatch):
    """Who asks it moves the step at which all processes stop."""
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    with Checkpointer(tmp_path) as checkpointer:
        for number in (1, 2):
            save(checkpointer, moved(fresh, number))
    assert steps_in(tmp_path) == [1, 2] and asked == []


def test_processes_that_see_other_checkpoints_are_told(fresh, tmp_path, monkeypatch):
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, moved(fresh, 1))
    monkeypatch.setattr(storage.jax, "process_count", lambda: 2)
    other = {}
    monkeypatch.setattr(
        multihost_utils, "process_allgather", lambda own: np.stack([own, other.get("is", own)])
    )
    assert storage.same([1])
    other["is"] = np.zeros(32, np.uint8)
    assert not storage.same([1])
    monkeypatch.undo()
    monkeypatch.setattr(storage, "same", lambda steps: steps != [1])
    with pytest.raises(CheckpointError, match=r"same checkpoints in all .* steps \[1\]\."):
        Checkpointer(tmp_path)


def test_who_cannot_save_does_not_wait_for_the_others(monkeypatch):
    """The thread that ends a save waits for them, in the middle of a save that goes well there."""
    others, orbax = threading.Event(), ocp.CheckpointManager
    saving = Manager.__new__(Manager)

    def failing(self):
        raise OSError(errno.ENOSPC, "no space")

    def ending():
        with contextlib.suppress(OSError):
            saving._wait_for_checkpointers()

    monkeypatch.setattr(orbax, "wait_until_finished", lambda self: others.wait(60))
    monkeypatch.setattr(orbax, "_wait_for_checkpointers", failing)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    threading.Timer(0.1, ending).start()
    began = time.monotonic()
    for _ in range(2):  # and not when it closes either
        with pytest.raises(OSError, match="no space"):
            saving.wait_until_finished()
    assert time.monotonic() - began < 30
    others.set()
    well = Manager.__new__(Manager)
    well.wait_until_finished()
    monkeypatch.setattr(orbax, "wait_until_finished", failing)
    with pytest.raises(OSError, match="no space"):
        well.wait_until_finished()


def a_full_disk(kind, stack, tmp_path, monkeypatch):
    """A workdir with checkpoint 1 whose disk is full from `full()` on until `free()`."""
    if kind == "mounted":
        try:
            workdir = stack.enter_context(disk.mounted(tmp_path / "disk", 400_000))
        except PermissionError as error:
            pytest.skip(f"no mounting here: {error}")
        return workdir, lambda: disk.fill(workdir, 20_000), lambda: (workdir / "balloon").unlink()
    if kind == "limited":
        limit = disk.limited_files(1000)
        return tmp_path, lambda: limit.__enter__(), lambda: limit.__exit__(None, None, None)
    patch = stack.enter_context(monkeypatch.context())
    return tmp_path, lambda: patch.setattr(checksums, "write", disk.no_space), patch.undo


@pytest.fixture
def tidy():
    """What a test leaves to the collector of garbage is collected with it, not in a later one."""
    yield
    gc.collect()


# Orbax closes its event loop at the first write that fails, while others are under way: those then
# find it closed, or never begin. Both end in a message that nobody could catch, and in no file.
@pytest.mark.filterwarnings(
    "ignore:(?s).*Event loop is closed:pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.filterwarnings("ignore:coroutine 'async_serialize_from_host:RuntimeWarning")
@pytest.mark.usefixtures("tidy")
@pytest.mark.parametrize("kind", ["mounted", "limited", "injected"])
def test_a_full_disk_is_said_and_what_was_saved_is_whole(fresh, tmp_path, monkeypatch, kind):
    with contextlib.ExitStack() as stack:
        workdir, full, free = a_full_disk(kind, stack, tmp_path, monkeypatch)
        checkpointer = stack.enter_context(Checkpointer(workdir))
        save(checkpointer, moved(fresh, 1))
        checkpointer.wait()
        full()
        try:
            named = "Cannot save checkpoint 2 .*checkpoint 1 is whole"
            with pytest.raises(SaveError, match=named) as caught:
                save(checkpointer, moved(fresh, 2))
                checkpointer.wait()
        finally:
            free()
        number = errno.EFBIG if kind == "limited" else errno.ENOSPC
        assert caught.value.errno == number and os.strerror(number) in str(caught.value)
        with Checkpointer(workdir) as again:
            restored, _ = again.restore(state.abstract(fresh))
            toy.assert_bitwise(restored, moved(fresh, 1))
            save(again, moved(fresh, 2))
            assert again.restore(state.abstract(fresh))[1].step == 2
        assert steps_in(workdir) == [1, 2]


def test_the_best_the_newest_and_every_kth_are_kept(fresh, tmp_path):
    rng = np.random.default_rng(0)
    losses = {step: float(rng.normal()) for step in range(1, 13)}
    del losses[5]  # saved on request, between two measurements
    rules = {"keep": 2, "keep_every": 6, "best": Best("eval_loss", 2)}
    for step in range(1, 13):
        figures = {"eval_loss": losses[step]} if step in losses else {}
        with Checkpointer(tmp_path, **rules) as checkpointer:  # killed after every save
            save(checkpointer, moved(fresh, step), figures=figures)
        seen = [s for s in losses if s <= step]
        best = sorted(seen, key=losses.__getitem__)[:2]
        kept = {*best, step, max(step - 1, 1), *(s for s in (6, 12) if s <= step)}
        assert steps_in(tmp_path) == sorted(kept)
    with Checkpointer(tmp_path, writable=False) as reader:
        assert reader.figures("eval_loss") == {s: losses[s] for s in sorted(kept)}
        assert reader.meta(step=best[0]).figures == {"eval_loss": losses[best[0]]}


def test_a_damaged_figure_stops_nothing(fresh, tmp_path):
    best = Best("eval_loss")
    with Checkpointer(tmp_path, best=best) as checkpointer:
        for step, loss in ((1, 0.5), (2, 0.1), (3, 0.3)):
            save(checkpointer, moved(fresh, step), figures={"eval_loss": loss})
    (tmp_path / "checkpoints" / "2" / "meta" / "metadata").write_text("{")
    with Checkpointer(tmp_path, best=best) as checkpointer:
        assert checkpointer.figures("eval_loss") == {3: 0.3}
        save(checkpointer, moved(fresh, 4), figures={"eval_loss": 0.4})
    assert steps_in(tmp_path) == [3, 4]
    with pytest.raises(ValueError, match="best.n must be at least 1; got 0"):
        Checkpointer(tmp_path, best=Best("eval_loss", 0))


def test_a_figure_counts_for_its_own_step_only():
    newest = Newest("eval_loss")
    assert newest.of(0) == {}
    newest.write_scalars(5, {"loss": 1.0})
    assert newest.of(5) == {}
    newest.write_scalars(5, {"eval_loss": np.float32(0.25)})
    assert newest.of(5) == {"eval_loss": 0.25} and newest.of(10) == {}
    newest.write_scalars(10, {"eval_loss": float("nan")})
    assert newest.of(10) == {}


def test_tracks_are_read_one_at_a_time(on, fresh, tmp_path):
    slow = jax.tree.map(lambda leaf: leaf * 2 + 1, fresh.params)
    s = dataclasses.replace(moved(fresh, 1), ema={"main": fresh.params, "slow": slow})
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, s)
        toy.assert_bitwise(checkpointer.restore(state.abstract(s))[0], s)
        like = state.abstract(fresh.params)
        toy.assert_bitwise(checkpointer.restore_ema(like)[0], fresh.params)
        toy.assert_bitwise(checkpointer.restore_ema(like, track="slow")[0], slow)
        with pytest.raises(CheckpointError, match="no averaged weights 'fast'; it has main, slow"):
            checkpointer.restore_ema(like, track="fast")
        shapes, _ = checkpointer.ema_shapes(track="slow")
        assert shapes == {"w": (6, 32), "b": (32,), "out/w": (32, 6)}
        some, _ = checkpointer.restore_ema({"out": like["out"]}, track="slow", partial=True)
        toy.assert_bitwise(some, {"out": slow["out"]})


@pytest.fixture
def schema_1(fresh, tmp_path):
    """A workdir as diffjax 0.1 wrote it, by Orbax alone: one average, no manifest."""
    s = moved(fresh, 3)
    meta = {"schema": 1, "step": 3, "position": {"step": 3}, "config": {"lr": 1}}
    meta["versions"] = {"diffjax": "0.1.0"}
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        args = ocp.args.Composite(
            train=ocp.args.StandardSave(dataclasses.replace(s, ema=None)),
            ema=ocp.args.StandardSave(s.ema["main"]),
            meta=ocp.args.JsonSave(meta),
        )
        manager.save(3, args=args)
    return tmp_path, s


def test_schema_1_is_read_as_the_track_main(fresh, schema_1):
    workdir, s = schema_1
    with Checkpointer(workdir) as checkpointer:
        restored, meta = checkpointer.restore(state.abstract(fresh))
        toy.assert_bitwise(restored, s)
        assert meta.schema == 1 and meta.config == {"lr": 1} and meta.figures == {}
        like = state.abstract(fresh.params)
        toy.assert_bitwise(checkpointer.restore_ema(like)[0], s.ema["main"])
        assert checkpointer.ema_shapes()[0]["out/w"] == (32, 6)
        some, _ = checkpointer.restore_ema({"b": like["b"]}, partial=True)
        toy.assert_bitwise(some, {"b": s.ema["main"]["b"]})
        with pytest.raises(CheckpointError, match="no averaged weights 'slow'; it has main"):
            checkpointer.restore_ema(like, track="slow")
        both = dataclasses.replace(fresh, ema={"main": fresh.params, "slow": fresh.params})
        with pytest.raises(CheckpointError, match="schema 1, with one average"):
            checkpointer.restore(state.abstract(both))
        save(checkpointer, moved(fresh, 4))  # the run goes on in the layout of today
        assert checkpointer.restore(state.abstract(fresh))[1].schema == 2


def test_todays_checkpoint_without_its_manifest_is_damaged(fresh, tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, moved(fresh, 1))
    (tmp_path / "checkpoints" / "1" / checksums.NAME).unlink()
    meta = json.loads((tmp_path / "checkpoints" / "1" / "meta" / "metadata").read_text())
    assert meta["schema"] == 2
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(CheckpointError, match=f"Damaged: .*{checksums.NAME} is missing"),
    ):
        checkpointer.restore(state.abstract(fresh))
