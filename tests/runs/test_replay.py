"""Divergence in a whole run, by each policy, and one update repeated."""

import contextlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import diffjax as dj
from diffjax import builders
from diffjax.cli import main
from diffjax.data import TrainBatches, array_source
from diffjax.runs import divergence
from diffjax.runs.divergence import Course, Policy, Shifted, batch_number, past
from diffjax.runs.replay import replay
from diffjax.runs.train import prepare
from diffjax.runs.workdir import RunError
from diffjax.train import ema, mesh, preempt, step, telemetry
from diffjax.train.checkpoint import Checkpointer
from diffjax.train.examine import examine
from diffjax.train.loop import BadUpdate, Diverged, fit
from diffjax.train.telemetry import read_jsonl
from tests.runs import planted
from tests.train import toy


@pytest.fixture(autouse=True, scope="module")
def light():
    """No TensorFlow and no figures: neither is what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(telemetry, "tensorboard_writer", lambda path: telemetry.MultiWriter())
        patch.setattr("diffjax.runs.pictures.write_figure", lambda *arguments: None)
        yield


def run(workdir, *arguments, **training):
    return dj.train(planted.config(*arguments, **training), workdir, show_progress=False)


def by_hand(config, workdir, numbers):
    """The state after training on batches of these numbers, one an update, without the loop."""
    from diffjax.train import mesh

    job = prepare(config, workdir)
    state = jax.jit(job.create)(jax.random.key(config.seed))
    n = config.training.n_jitted_steps
    feed = mesh.dispatch_batches(job.devices, (job.batches[k] for k in numbers), n)
    for batch in feed:
        state, _ = job.step_fn(state, batch)
    return state


def final(workdir, config, step=12):
    with Checkpointer(workdir, writable=False) as checkpointer:
        return checkpointer.restore(prepare(config, workdir).like, step)[0]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The workdir of a run that ended at the bad image."""
    workdir = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Diverged, match="loss is nan at step 7"):
        run(workdir, "stop")
    return workdir


@pytest.fixture(scope="module")
def rolled(tmp_path_factory):
    """The workdir of a run that went back and on."""
    workdir = tmp_path_factory.mktemp("rolled")
    assert run(workdir, "rollback") == (12, True)
    return workdir


def test_a_bad_update_is_put_on_record(stopped):
    found = json.loads((stopped / "diverged" / "7.json").read_text())
    assert (found["step"], found["batch"], found["loss"]) == (7, planted.BAD_BATCH, "nan")
    assert found["images"][planted.BAD_ROW] == planted.BAD_IMAGE
    assert len(found["images"]) == planted.BATCH
    with Checkpointer(stopped, writable=False) as checkpointer:
        assert checkpointer.latest_step() == 6
    # The key of the run, whose fold with 6 drew the update's noise.
    key = final(stopped, planted.config("stop"), 6).key
    assert found["key"]["data"] == np.asarray(jax.random.key_data(key)).tolist()


def test_the_bad_image_is_named(stopped):
    found = replay(stopped, 7)
    assert found.checkpoint == 6 and found.batch == planted.BAD_BATCH and found.equal
    assert [(i["row"], i["index"], i["label"]) for i in found.bad_images()] == [
        (planted.BAD_ROW, planted.BAD_IMAGE, planted.MARK)
    ]
    assert found.first_bad == f"loss of image {planted.BAD_ROW}"
    lines = Path(planted.__file__).read_text().splitlines()
    line = next(n for n, text in enumerate(lines, 1) if "# planted" in text)
    assert "sqrt" in found.origin and found.origin.endswith(f"planted.py:{line}")


@pytest.mark.parametrize(
    "step", [pytest.param(1, marks=pytest.mark.slow), 5, pytest.param(6, marks=pytest.mark.slow)]
)
def test_a_replayed_loss_is_the_logged_one_bit_for_bit(stopped, step):
    before = {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file()}
    found = replay(stopped, step)
    row = next(r for r in read_jsonl(stopped / "metrics.jsonl") if r["step"] == step)
    assert found.figures == {name: row[name] for name in ("loss", "grad_norm")} and found.equal
    assert found.checkpoint == (step - 1) // 2 * 2
    # What is looked at is the same update: the parts make the whole.
    losses = [image["loss"] for image in found.images]
    np.testing.assert_allclose(np.mean(losses), row["loss"], rtol=1e-5)
    norm = np.linalg.norm(list(found.gradients.values()))
    np.testing.assert_allclose(norm, row["grad_norm"], rtol=1e-5)
    assert found.first_bad is None and found.origin is None and not found.bad_images()
    written = json.loads((stopped / "replay" / f"{step}.json").read_text())
    assert written["equal"] and written["figures"] == found.figures
    assert all(p.read_bytes() == b for p, b in before.items() if "replay" not in p.parts)


@pytest.fixture(scope="module")
def parted(tmp_path_factory):
    """The config and workdir of such a run in four micro-batches, with stratified times."""
    workdir = tmp_path_factory.mktemp("parted")
    config = planted.config("stop", accumulate=4)
    config.loss.times.stratified = True
    with pytest.raises(Diverged, match="loss is nan at step 7"):
        dj.train(config, workdir, show_progress=False)
    return config, workdir


def test_micro_batches_have_the_times_of_the_whole_batch(parted, tmp_path):
    config, workdir = parted
    config = config.copy_and_resolve_references().unlock()
    config.training.update({"accumulate": 1, "n_iters": 1})
    dj.train(config, tmp_path, show_progress=False)
    whole, parts = (read_jsonl(path / "metrics.jsonl")[0] for path in (tmp_path, workdir))
    for name in ("loss", "grad_norm", "t"):
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-5)


def test_micro_batches_are_looked_at_one_by_one(parted, monkeypatch):
    config, workdir = parted
    build, seen = builders.build_loss, []

    def watched(*arguments, **options):
        loss_fn = build(*arguments, **options)

        def spy(params, key, batch):
            seen.append(len(batch["image"]))
            return loss_fn(params, key, batch)

        return spy

    monkeypatch.setattr(builders, "build_loss", watched)
    found = replay(workdir, 7)
    assert set(seen) == {planted.BATCH // 4} and found.equal
    assert found.first_bad == f"loss of image {planted.BAD_ROW}"
    assert [(i["row"], i["index"], i["label"]) for i in found.bad_images()] == [
        (planted.BAD_ROW, planted.BAD_IMAGE, planted.MARK)
    ]
    assert "sqrt" in found.origin and "planted.py" in found.origin
    good = replay(workdir, 5)
    losses = [image["loss"] for image in good.images]
    np.testing.assert_allclose(np.mean(losses), good.figures["loss"], rtol=1e-5)
    norm = np.linalg.norm(list(good.gradients.values()))
    np.testing.assert_allclose(norm, good.figures["grad_norm"], rtol=1e-5)
    # Each image's own time, as the whole batch at once has it.
    job = prepare(config, workdir)
    with Checkpointer(workdir, writable=False) as checkpointer:
        state = checkpointer.restore(job.like, 4)[0]
    whole = examine(state, job.batches[4], build(config, job.parts, train=True))
    np.testing.assert_allclose([i["t"] for i in good.images], whole.aux["t"], rtol=1e-6)
    np.testing.assert_allclose(losses, whole.losses, rtol=1e-4)


def test_another_figure_is_told_apart(stopped, tmp_path, capsys):
    copy = shutil.copytree(stopped, tmp_path / "copy")
    rows = read_jsonl(copy / "metrics.jsonl")
    rows[4]["loss"] = float(np.nextafter(np.float32(rows[4]["loss"]), np.float32(9)))
    (copy / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert main.main(["diffjax", "replay", f"--workdir={copy}", "--step=5"]) == 0
    assert f"Not what was logged: loss {read_jsonl(stopped / 'metrics.jsonl')[4]['loss']!r}" in (
        capsys.readouterr().out
    )


def test_a_step_that_was_not_made_is_refused(stopped):
    with pytest.raises(RunError, match="came to step 7"):
        replay(stopped, 8)
    with pytest.raises(RunError, match="counts updates from 1"):
        replay(stopped, 0)


def stops(answers):
    @contextlib.contextmanager
    def stop_on_signals():
        yield lambda: next(answers, False)

    return stop_on_signals


@pytest.fixture(scope="module")
def skipped(tmp_path_factory):
    """The workdir of a run, two updates a dispatch, that passed over the bad image."""
    workdir = tmp_path_factory.mktemp("skipped")
    assert run(workdir, "skip", 2) == (12, True)
    return workdir


def test_skip_passes_over_and_counts(skipped):
    config = planted.config("skip", 2)
    rows = read_jsonl(skipped / "metrics.jsonl")
    assert [(r["step"], r["skipped"]) for r in rows] == [
        (2, 0), (4, 0), (6, 0), (8, 1), (10, 1), (12, 1)
    ]  # fmt: skip
    assert all(np.isfinite(r["loss"]) for r in rows)
    assert divergence.dumped(skipped) == [7]
    state = final(skipped, config)
    toy.assert_bitwise(state, by_hand(config, skipped, range(12)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_a_skipped_update_is_repeated_within_its_dispatch(skipped):
    found = replay(skipped, 7)
    assert found.equal and found.checkpoint == 6
    assert [i["index"] for i in found.bad_images()] == [planted.BAD_IMAGE]


def test_a_row_of_bad_updates_goes_on_where_it_was_cut(tmp_path):
    """Of five in a row three are borne; a run killed after two of them bears one more."""

    def batches(start):
        for n in range(start, 12):
            x = toy.batch(n)
            x[0, 0] = np.nan if n in (1, 4, 5, 6, 7, 8) else 0.0
            yield x

    one = mesh.make_mesh(jax.devices()[:1])
    step_fn = step.compile_step(
        one,
        loss_fn=toy.loss_fn,
        optimizer=toy.OPTIMIZER,
        ema={"main": ema.ConstantEMA(0.9)},
        skip_bad=True,
    )

    def until(workdir, n_steps, state):
        course = Course(Policy("skip", 3), workdir, toy_data())
        start = int(state.step)
        course.begin(start, state.key)
        feed = mesh.dispatch_batches(one, batches(start), 1)
        tolerance = course.tolerance(start)
        return fit(state, feed, step_fn=step_fn, n_steps=n_steps, tolerance=tolerance).state

    with pytest.raises(Diverged) as whole:
        until(tmp_path / "whole", 12, toy.new_state(one))
    assert whole.value.step == 8
    for cut in (5, 6, 7):  # in the middle of the row, begun by update 5
        workdir = tmp_path / str(cut)
        state = until(workdir, cut, toy.new_state(one))
        (workdir / "diverged" / "8.json").write_text("{}")  # of a run that was further, and killed
        assert Course(Policy("skip"), workdir, toy_data()).tolerance(cut).so_far == cut - 3
        with pytest.raises(Diverged) as parts:
            until(workdir, 12, state)
        assert str(parts.value) == str(whole.value)


@pytest.mark.slow
def test_stopped_behind_a_skipped_update_it_is_the_same_run(skipped, tmp_path, monkeypatch):
    config = planted.config("skip", 2)
    monkeypatch.setattr(preempt, "stop_on_signals", stops(iter([False] * 3 + [True])))
    assert run(tmp_path, "skip", 2) == (8, False)
    assert run(tmp_path, "skip", 2) == (12, True)
    toy.assert_bitwise(final(tmp_path, config), final(skipped, config))
    counts = [[r["skipped"] for r in read_jsonl(d / "metrics.jsonl")] for d in (tmp_path, skipped)]
    assert counts[0] == counts[1]


def test_rollback_leaves_the_bad_batch_out(rolled):
    config = planted.config("rollback")
    assert json.loads((rolled / "diverged" / "shifts.json").read_text()) == [[6, 1]]
    numbers = [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12]
    toy.assert_bitwise(final(rolled, config), by_hand(config, rolled, numbers))
    rows = read_jsonl(rolled / "metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(1, 13))
    assert all(np.isfinite(r["loss"]) for r in rows)


def test_a_run_killed_after_a_rollback_takes_the_same_batches(rolled, tmp_path):
    copy = shutil.copytree(rolled, tmp_path / "copy")
    for later in (8, 10, 12):
        shutil.rmtree(copy / "checkpoints" / str(later))
    (copy / "diverged" / "7.json").unlink()
    assert run(copy, "rollback") == (12, True)
    assert divergence.dumped(copy) == []  # nothing was bad this time
    toy.assert_bitwise(*(final(d, planted.config("rollback")) for d in (copy, rolled)))


def test_replay_follows_the_way_of_each_update(rolled):
    good = replay(rolled, 8)  # from the checkpoint of both ways, with the shift
    assert (good.checkpoint, good.batch, good.equal) == (6, 8, True)
    later = replay(rolled, 10)
    assert (later.checkpoint, later.batch, later.equal) == (8, 10, True)
    bad = replay(rolled, 7)  # the one that was given up
    assert (bad.checkpoint, bad.batch, bad.equal) == (6, 6, True)
    assert [i["index"] for i in bad.bad_images()] == [planted.BAD_IMAGE]


def test_shifts_add_up():
    # Bad at update 8 from checkpoint 5, then, gone on, at 9 from 5 again and at 12 from 10.
    one = past((), 5, 8)
    assert [batch_number(one, n) for n in range(4, 10)] == [4, 9, 10, 11, 12, 13]
    two = past(one, 5, 9)
    assert [batch_number(two, n) for n in range(4, 13)] == [4, *range(14, 22)]
    three = past(two, 10, 12)
    assert [batch_number(three, n) for n in (4, 5, 9, 10, 11)] == [4, 14, 18, 22, 23]
    assert divergence.leads_to(three, 10, two) and not divergence.leads_to(three, 10, one)
    assert divergence.leads_to(three, 5, ())
    assert Shifted(list(range(100)), two)[7] == batch_number(two, 7)


def toy_data():
    """What a course asks of the data of `tests.train.toy`."""
    return TrainBatches(
        array_source(np.zeros((toy.BATCH, 1, 1, 1), np.uint8)), batch_size=toy.BATCH, seed=0
    )


class Numbers(list):
    """Batches that are their numbers."""

    def position(self, step):
        return {"step": step}


def test_too_many_rollbacks_to_one_checkpoint_end_the_run(tmp_path):
    course = Course(Policy("rollback", 2), tmp_path, Numbers(range(99)))
    seen = []

    def attempt():
        seen.append(course.begin(4, jax.random.key(0))[4])
        raise Diverged(BadUpdate(5, float("nan"), 1.0))

    with pytest.raises(Diverged, match="step 5"):
        course.run(attempt)
    assert seen == [4, 5, 6]


def test_policies_are_checked(tmp_path):
    with pytest.raises(RunError, match="on_divergence must be one of stop, skip, rollback; got"):
        run(tmp_path / "a", "jump")
    with pytest.raises(RunError, match="divergence_limit counts .* got 0"):
        run(tmp_path / "b", "skip", divergence_limit=0)
    assert not list(tmp_path.iterdir())


def test_steps_to_profile_are_checked(tmp_path, capsys):
    flags = ["diffjax", "train", "--config=digits:quick", f"--workdir={tmp_path}"]
    for bad in ("5", "9:4", "a:b"):
        assert main.main([*flags, f"--profile={bad}"]) == 2
        assert "as 100:105" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
