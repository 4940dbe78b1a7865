"""Checkpoints: exact, on other meshes, kept by rule, and clear about what cannot be read."""

import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.train import checksums, mesh, state
from diffjax.train.checkpoint import Checkpointer, CheckpointError
from tests.train import toy


@pytest.fixture(scope="module")
def on():
    return mesh.make_mesh(data=1)


def trained(on, n_steps):
    s, feed = toy.new_state(on), toy.feed(on)
    for _ in range(n_steps):
        s, _ = toy.compiled(on)(s, next(feed))
    return s


def save(checkpointer, s, config=None):
    step = int(s.step)
    checkpointer.save(step, s, position={"step": step}, config=config or {"lr": 0.5, "name": "toy"})


def like(on):
    return state.abstract(toy.new_state(on))


def test_everything_comes_back_bit_for_bit(on, tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() is None
        s = trained(on, 4)
        save(checkpointer, s)
        restored, meta = checkpointer.restore(like(on))
    toy.assert_bitwise(restored, s)
    assert restored.params["w"].sharding == s.params["w"].sharding
    assert meta[:3] == (4, {"step": 4}, {"lr": 0.5, "name": "toy"})
    assert meta.versions["jax"] == jax.__version__ and "diffjax" in meta.versions
    assert (tmp_path / "checkpoints" / "4").is_dir()


def test_a_save_holds_the_state_of_its_moment(on, tmp_path):
    # The next steps take over the buffers while the files are still being written.
    with Checkpointer(tmp_path, keep=20) as checkpointer:
        s, feed = toy.new_state(on), toy.feed(on)
        copies = []
        for _ in range(10):
            s, _ = toy.compiled(on)(s, next(feed))
            copies.append(jax.tree.map(jnp.copy, s))
            save(checkpointer, s)
        for copy in copies:
            toy.assert_bitwise(checkpointer.restore(like(on), step=int(copy.step))[0], copy)


def test_another_mesh_restores_the_same_numbers(on, tmp_path):
    s = trained(on, 2)
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, s)
    eight = mesh.make_mesh()
    with Checkpointer(tmp_path) as checkpointer:
        restored, _ = checkpointer.restore(like(eight))
    toy.assert_bitwise(restored, s)
    assert restored.params["w"].sharding.mesh.size == 8


def test_a_reader_loads_the_average_alone(on, tmp_path):
    s = trained(on, 5)
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, s)
    # Not a byte of the rest is needed.
    shutil.rmtree(tmp_path / "checkpoints" / "5" / "train")
    eight = mesh.make_mesh()
    shapes = jax.eval_shape(toy.init_params)
    with Checkpointer(tmp_path, writable=False) as reader:
        average, meta = reader.restore_ema(state.abstract(shapes, mesh.replicated(eight)))
        assert reader.meta().config == {"lr": 0.5, "name": "toy"}
    toy.assert_bitwise(average, s.ema["main"])
    assert average["w"].sharding.mesh.size == 8 and meta.step == 5
    assert not np.array_equal(average["w"], s.params["w"])


def test_newest_and_every_kth_are_kept(on, tmp_path):
    with Checkpointer(tmp_path, keep=2, keep_every=4) as checkpointer:
        s = trained(on, 1)
        for step in (2, 4, 6, 8, 9, 10):
            checkpointer.save(step, s, position={}, config={})
        checkpointer.wait()
        kept = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {4, 8, 9, 10}


@pytest.fixture
def two(on, tmp_path):
    """A workdir with checkpoints 2 and 3, and the state of 2."""
    s, feed = trained(on, 2), toy.feed(on)
    copy = jax.tree.map(jnp.copy, s)
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, s)
        s, _ = toy.compiled(on)(s, next(feed))
        save(checkpointer, s)
    return tmp_path, copy


def damage(directory, how):
    """Harms a checkpoint in one of the ways of a full disk or a lost file."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    if how == "truncated":
        for path in files:
            if path.parent.name == "d":  # where the arrays are
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "lost":
        shutil.rmtree(directory / "train")
    elif how == "meta":
        (directory / "meta" / "metadata").write_text("{")
    elif how == "empty":
        for path in files:
            path.write_bytes(b"")


@pytest.mark.parametrize("how", ["truncated", "lost", "meta", "empty"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(on, two, how, caplog):
    workdir, before = two
    damage(workdir / "checkpoints" / "3", how)
    with Checkpointer(workdir) as checkpointer, caplog.at_level(logging.WARNING):
        restored, meta = checkpointer.restore(like(on))
        toy.assert_bitwise(restored, before)
        assert meta.step == 2 and checkpointer.latest_step() == 2
        named = [r.getMessage() for r in caplog.records if r.name.startswith("diffjax")]
        assert str(workdir / "checkpoints" / "3") in named[0]
        assert (workdir / "checkpoints" / "3.damaged").is_dir()
        # The run gets to step 3 once more.
        save(checkpointer, trained(on, 3))
        assert checkpointer.restore(like(on))[1].step == 3


def test_damage_without_a_way_back_is_one_clear_error(on, two):
    workdir, _ = two
    for step in (2, 3):
        damage(workdir / "checkpoints" / str(step), "empty")
    listing = sorted(p.name for p in (workdir / "checkpoints").iterdir())
    with Checkpointer(workdir) as checkpointer:
        with pytest.raises(CheckpointError, match=r"Damaged: .*checkpoints/3.*another workdir"):
            checkpointer.restore(like(on))
        with pytest.raises(CheckpointError, match=r"Damaged: .*checkpoints/3 "):
            checkpointer.restore(like(on), step=3)
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == listing


def test_a_reader_sets_nothing_aside(on, two):
    workdir, before = two
    damage(workdir / "checkpoints" / "3", "empty")
    with Checkpointer(workdir, writable=False) as reader:
        average, meta = reader.restore_ema(state.abstract(before.ema["main"]))
    assert meta.step == 2 and (workdir / "checkpoints" / "3").is_dir()
    toy.assert_bitwise(average, before.ema["main"])


def test_another_model_is_not_damage(on, two):
    workdir, _ = two
    other = like(on)
    wide = jax.ShapeDtypeStruct((6, 33), jnp.float32, sharding=other.params["w"].sharding)
    other.params["w"] = wide
    with Checkpointer(workdir) as checkpointer:
        with pytest.raises(CheckpointError, match=r"params/w has shape \(6, 32\) there and \(6, 3"):
            checkpointer.restore(other)
        with pytest.raises(CheckpointError, match="ema/main/extra has shape none there"):
            average = state.abstract(toy.new_state(on).ema["main"])
            checkpointer.restore_ema(average | {"extra": wide})
        assert checkpointer.latest_step() == 3


def test_a_schema_from_the_future_is_refused(on, two):
    workdir, _ = two
    path = workdir / "checkpoints" / "3" / "meta" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 99}))
    checksums.write(workdir / "checkpoints" / "3")  # it is what that diffjax wrote
    with Checkpointer(workdir) as checkpointer, pytest.raises(CheckpointError, match="schema 99"):
        checkpointer.restore(like(on))


def test_missing_checkpoints(on, tmp_path, two):
    workdir, _ = two
    with pytest.raises(CheckpointError, match="no checkpoints in .*nowhere.*Train first"):
        Checkpointer(tmp_path / "nowhere", writable=False)
    assert not (tmp_path / "nowhere").exists()
    missing = pytest.raises(CheckpointError, match="not a checkpoint in .*train first")
    with Checkpointer(tmp_path / "new") as checkpointer, missing:
        checkpointer.restore(like(on))
    with Checkpointer(workdir) as checkpointer:
        with pytest.raises(CheckpointError, match=r"not checkpoint 7 in .*holds steps \[2, 3\]"):
            checkpointer.restore(like(on), step=7)
        with pytest.raises(CheckpointError, match="Cannot save step 2: .* holds step 3"):
            save(checkpointer, trained(on, 2))


def test_an_unwritable_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="Cannot write checkpoints.*another workdir.*file/work"):
        Checkpointer(tmp_path / "file" / "work")
    with pytest.raises(ValueError, match="keep and keep_every must be at least 1; got 0"):
        Checkpointer(tmp_path, keep=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]
