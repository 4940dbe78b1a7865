"""The loop: exact after every kind of stop, never ahead of itself, loud when training breaks."""

import dataclasses
import functools
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.train import ema, mesh, state, step, tracing
from diffjax.train.checkpoint import Checkpointer
from diffjax.train.loop import Diverged, Hook, Tolerance, fit
from diffjax.train.preempt import stop_on_signals
from diffjax.train.telemetry import MEASURED, JsonlWriter, Machine, read_jsonl
from tests.train import toy


@pytest.fixture(scope="module")
def on():
    return mesh.make_mesh(data=1)


class Tape:
    """A writer that keeps (step, scalars) and what else happened, in order."""

    def __init__(self):
        self.events = []

    def write_scalars(self, step, scalars):
        self.events.append(("log", step, dict(scalars)))

    def write_images(self, step, images):
        raise NotImplementedError

    def flush(self):
        self.events.append(("flush",))

    def close(self):
        pass


def saver(checkpointer):
    return lambda step, s: checkpointer.save(step, s, position={"step": step}, config={})


def resume(on, checkpointer):
    return checkpointer.restore(state.abstract(toy.new_state(on)))[0]


@pytest.mark.parametrize("n", [1, 2])
def test_resumed_equals_uninterrupted_bit_for_bit(on, tmp_path, n):
    kwargs = toy.fit_kwargs(on, n) | {"checkpoint_every": 2}
    whole = fit(toy.new_state(on), toy.feed(on, n=n), n_steps=12, **kwargs)
    assert whole.finished and whole.state.step == 12
    with Checkpointer(tmp_path) as checkpointer:
        save = saver(checkpointer)
        fit(toy.new_state(on), toy.feed(on, n=n), n_steps=6, save=save, **kwargs)
    with Checkpointer(tmp_path) as checkpointer:
        s = resume(on, checkpointer)
        rest = fit(s, toy.feed(on, start=6, n=n), n_steps=12, save=saver(checkpointer), **kwargs)
        toy.assert_bitwise(rest.state, whole.state)
        toy.assert_bitwise(resume(on, checkpointer), whole.state)
    # The law can fail: other images after the resume give other weights.
    with Checkpointer(tmp_path) as checkpointer:
        s = checkpointer.restore(state.abstract(whole.state), step=10)[0]
    wrong = fit(s, toy.feed(on, start=9, n=n), n_steps=12, **kwargs)
    assert not np.array_equal(wrong.state.params["w"], whole.state.params["w"])


def test_logged_losses_of_a_resumed_run_are_the_uninterrupted_ones(on, tmp_path):
    def run(path, n_steps, s, start):
        writer = JsonlWriter(path, last_step=start)
        fit(s, toy.feed(on, start), n_steps=n_steps, writer=writer, **toy.fit_kwargs(on))
        writer.close()
        return [{k: v for k, v in row.items() if k not in MEASURED} for row in read_jsonl(path)]

    whole = run(tmp_path / "whole.jsonl", 8, toy.new_state(on), 0)
    s = fit(toy.new_state(on), toy.feed(on), n_steps=4, **toy.fit_kwargs(on)).state
    # A crash at step 6, after the save at step 4.
    path = tmp_path / "resumed.jsonl"
    run(path, 6, toy.new_state(on), 0)
    assert run(path, 8, s, 4) == whole
    assert [row["step"] for row in whole] == list(range(1, 9))
    assert set(whole[0]) == {"step", "loss", "grad_norm", "lr", "norm"}


def test_logged_is_the_mean_over_the_dispatch(on):
    tape = Tape()
    kwargs = toy.fit_kwargs(on, 3) | {"log_every": 6}
    fit(toy.new_state(on), toy.feed(on, n=3), n_steps=12, writer=tape, **kwargs)
    s, feed, means = toy.new_state(on), toy.feed(on, n=3), []
    for _ in range(4):
        s, metrics = toy.compiled(on)(s, next(feed))
        means.append(np.mean(metrics["loss"]))
    logged = [(e[1], e[2]["loss"]) for e in tape.events if e[0] == "log"]
    np.testing.assert_allclose(logged, [(6, means[1]), (12, means[3])], rtol=1e-6)


def test_order_of_figures_hooks_flush_and_save(on):
    tape = Tape()
    fit(
        toy.new_state(on),
        toy.feed(on),
        n_steps=5,
        writer=tape,
        hooks=[Hook(2, lambda step, s: tape.events.append(("hook", step, int(s.step))))],
        save=lambda step, s: tape.events.append(("save", step, int(s.step))),
        checkpoint_every=4,
        **toy.fit_kwargs(on),
    )
    short = [e[:2] for e in tape.events]
    assert short == [
        ("log", 1), ("log", 2), ("hook", 2), ("flush",),
        ("log", 3), ("log", 4), ("hook", 4), ("flush",), ("save", 4),
        ("log", 5), ("flush",), ("save", 5), ("flush",),
    ]  # fmt: skip
    assert all(e[2] == e[1] for e in tape.events if e[0] in ("hook", "save"))


def test_figures_are_read_two_dispatches_late_and_batches_ahead(on):
    order = []

    def step_fn(s, batch):
        order.append(("dispatch", int(s.step) + 1))
        return toy.compiled(on)(s, batch)

    def feed():
        for n, batch in enumerate(toy.feed(on)):
            order.append(("batch", n + 1))
            yield batch

    class Late(Tape):
        def write_scalars(self, step, scalars):
            order.append(("read", step))

    kwargs = toy.fit_kwargs(on) | {"step_fn": step_fn}
    fit(toy.new_state(on), feed(), n_steps=4, writer=Late(), **kwargs)
    assert order == [
        ("batch", 1), ("dispatch", 1), ("batch", 2), ("dispatch", 2),
        ("batch", 3), ("dispatch", 3), ("read", 1), ("batch", 4), ("dispatch", 4), ("read", 2),
        ("read", 3), ("read", 4),
    ]  # fmt: skip


def test_speed_and_time_left_are_reported(on):
    shown = []
    fit(
        toy.new_state(on),
        toy.feed(on),
        n_steps=6,
        progress=lambda step, scalars: shown.append((step, scalars)),
        **toy.fit_kwargs(on),
    )
    assert "images_per_second" not in shown[0][1]  # the first step compiles
    for at, scalars in shown[1:]:
        left = (6 - at) * toy.BATCH / scalars["images_per_second"]
        np.testing.assert_allclose(scalars["seconds_left"], left, rtol=1e-9)
    assert shown[-1][1]["seconds_left"] == 0


@pytest.mark.parametrize("n", [1, 2])
def test_divergence_is_named_and_never_saved(on, tmp_path, n):
    def feed():
        for i in range(100):
            batch = toy.batch(i)
            if i == 6:  # the seventh update
                batch[3, 2] = np.nan
            yield batch

    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(Diverged, match="loss is nan at step 7.*lower learning rate") as error:
            fit(
                toy.new_state(on),
                mesh.dispatch_batches(on, feed(), n),
                n_steps=20,
                save=saver(checkpointer),
                checkpoint_every=2,
                **toy.fit_kwargs(on, n),
            )
        assert error.value.step == 7
        assert checkpointer.latest_step() == 6
        assert np.isfinite(resume(on, checkpointer).params["w"]).all()


def test_a_bad_gradient_under_a_good_loss_diverges(on):
    def loss_fn(params, key, x):  # 0 + loss: the slope of a root at 0 is infinite
        losses, aux = toy.loss_fn(params, key, x)
        return losses + jnp.sqrt(params["b"][0] ** 2 * 0), aux

    step_fn = step.compile_step(
        on, loss_fn=loss_fn, optimizer=toy.OPTIMIZER, ema={"main": ema.ConstantEMA(0.9)}
    )
    saved = []
    with pytest.raises(Diverged, match="grad_norm is nan at step 1"):
        fit(
            toy.new_state(on),
            toy.feed(on),
            n_steps=1,
            save=lambda step, s: saved.append(step),
            **toy.fit_kwargs(on) | {"step_fn": step_fn},
        )
    assert saved == []


@functools.cache
def skipping(on):
    return step.compile_step(
        on,
        loss_fn=toy.loss_fn,
        optimizer=toy.OPTIMIZER,
        ema={"main": ema.ConstantEMA(0.9)},
        skip_bad=True,
    )


def planted(bad):
    """The toy's batches with a NaN in those of the numbers `bad`."""
    for i in range(100):
        batch = toy.batch(i)
        if i in bad:
            batch[3, 2] = np.nan
        yield batch


@pytest.mark.parametrize("n", [1, 2])
def test_a_skipped_update_leaves_all_but_the_step(on, n):
    bad, tape, notes = (2, 3, 6), Tape(), []
    result = fit(
        toy.new_state(on),
        mesh.dispatch_batches(on, planted(bad), n),
        n_steps=8,
        writer=tape,
        tolerance=Tolerance(in_a_row=2, so_far=5, note=notes.append),
        **toy.fit_kwargs(on, n) | {"step_fn": skipping(on)},
    )
    assert [b.step for b in notes] == [3, 4, 7]
    assert all(np.isnan(b.loss) and np.isnan(b.grad_norm) for b in notes)
    # By hand: the good batches alone, with the step, and so the key, of their place.
    s = toy.new_state(on)
    for i in range(8):
        if i in bad:
            s = dataclasses.replace(s, step=s.step + 1)
        else:
            s, _ = toy.compiled(on)(s, mesh.global_batch(on, toy.batch(i)[None], axis=1))
    assert result.state.step == 8
    for x, y in zip(leaves(result.state), leaves(s), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)  # two programs round differently
    logged = {e[1]: e[2] for e in tape.events if e[0] == "log"}
    counts = {1: 5, 2: 5, 3: 6, 4: 7, 5: 7, 6: 7, 7: 8, 8: 8}
    assert {at: row["skipped"] for at, row in logged.items()} == {
        at: count for at, count in counts.items() if at % n == 0
    }
    if n == 2:  # 4 has no good update; 8 has one, whose loss it is
        assert np.isnan(logged[4]["loss"]) and np.isfinite(logged[8]["loss"])


def leaves(s):
    return jax.tree.leaves((s.params, s.opt_state, s.ema))


def test_too_many_bad_updates_in_a_row_end_it_late_and_unsaved(on):
    dispatched, saved = [], []

    def step_fn(s, batch):
        dispatched.append(int(s.step) + 1)
        return skipping(on)(s, batch)

    with pytest.raises(Diverged, match="at step 5, after 2 others in a row that were skipped"):
        fit(
            toy.new_state(on),
            mesh.dispatch_batches(on, planted((0, 2, 3, 4)), 1),
            n_steps=20,
            tolerance=Tolerance(in_a_row=2),
            save=lambda step, s: saved.append(step),
            **toy.fit_kwargs(on) | {"step_fn": step_fn},
        )
    assert saved == []
    # The host did not wait for the flag: two dispatches were on their way behind it.
    assert dispatched[-1] == 7


def test_speed_waiting_and_mfu_are_of_the_wall_clock(on):
    def feed():
        for batch in toy.feed(on):
            time.sleep(0.02)
            yield batch

    tape = Tape()
    machine = Machine(chips=4, flops=6e6, peak_flops=1e9, memory=lambda: {"memory": 1.5})
    began = time.monotonic()
    fit(toy.new_state(on), feed(), n_steps=12, writer=tape, machine=machine, **toy.fit_kwargs(on))
    # Without those that compile, and the last two, which are read at once.
    rows = [e[2] for e in tape.events if e[0] == "log"][3:-2]
    rate = np.mean([row["images_per_second"] for row in rows])
    assert toy.BATCH * 4 / (time.monotonic() - began) < rate < toy.BATCH / 0.02 * 1.5
    for row in rows:
        assert 0 < row["data_wait"] <= 1 and row["memory"] == 1.5
        assert row["images_per_second_per_chip"] == row["images_per_second"] / 4
        seconds = toy.BATCH / row["images_per_second"]
        np.testing.assert_allclose(row["mfu"], 6e6 / seconds / 4e9)
    # All but the updates themselves is waiting.
    assert np.median([row["data_wait"] for row in rows]) > 0.3


def test_a_trace_has_the_asked_steps(on, tmp_path):
    toy.compiled(on)(toy.new_state(on), next(toy.feed(on)))  # compiled before
    with tracing.trace_steps(tmp_path, 2, 5) as tracer:
        fit(toy.new_state(on), toy.feed(on), n_steps=8, tracer=tracer, **toy.fit_kwargs(on))
    [path] = tmp_path.glob("plugins/profile/*/*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(path))
    events = [e for plane in data.planes for line in plane.lines for e in line.events]
    with warnings.catch_warnings():
        # On Python 3.12 a type of jaxlib's warns from C++, where an error ends the process.
        warnings.simplefilter("ignore", DeprecationWarning)
        steps = [dict(e.stats).get("step_num") for e in events if e.name == "update"]
    assert sorted(steps) == [2, 3, 4]


def test_a_trace_of_nothing_is_said(on, tmp_path, caplog):
    with tracing.trace_steps(tmp_path, 8, 9) as tracer:
        fit(toy.new_state(on), toy.feed(on), n_steps=2, tracer=tracer, **toy.fit_kwargs(on))
    assert "No update between steps 8 and 9" in caplog.text and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="got 5:5"):
        tracing.StepTracer(tmp_path, 5, 5)


def test_frequencies_must_fit_the_dispatch(on):
    for name, change in {
        "log_every": {"log_every": 3},
        "n_steps": {"n_steps": 5},
        "checkpoint_every": {"checkpoint_every": 7},
        r"hooks\[0\].every": {"hooks": [Hook(9, print)]},
    }.items():
        kwargs = {"n_steps": 4} | toy.fit_kwargs(on, 2) | change
        with pytest.raises(ValueError, match=f"{name} must be a multiple of n_jitted_steps=2"):
            fit(toy.new_state(on), toy.feed(on, n=2), **kwargs)
    with pytest.raises(ValueError, match="log_every must be at least 1"):
        fit(toy.new_state(on), iter(()), n_steps=1, step_fn=toy.compiled(on), log_every=0)
    with pytest.raises(ValueError, match="ran out at step 0"):
        fit(toy.new_state(on), iter(()), n_steps=1, step_fn=toy.compiled(on))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves(on, tmp_path, number):
    def feed():
        for n, batch in enumerate(toy.feed(on)):
            if n == 4:
                os.kill(os.getpid(), number)
            yield batch

    before = signal.getsignal(number)
    with Checkpointer(tmp_path) as checkpointer:
        with stop_on_signals() as stop:
            result = fit(
                toy.new_state(on),
                feed(),
                n_steps=100,
                save=saver(checkpointer),
                stop=stop,
                **toy.fit_kwargs(on),
            )
        assert not result.finished and result.state.step == 5
        toy.assert_bitwise(resume(on, checkpointer), result.state)
    assert signal.getsignal(number) is before


def test_a_second_interrupt_leaves_at_once():
    with pytest.raises(KeyboardInterrupt), stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_signals_outside_the_main_thread():
    answers = []

    def run():
        with stop_on_signals() as stop:
            answers.append(stop())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert answers == [False]


ROOT = Path(__file__).parents[2]
VICTIM = """
import sys, time
import jax
from diffjax.train import mesh, state
from diffjax.train.checkpoint import Checkpointer
from diffjax.train.loop import fit
from tests.train import toy

on = mesh.make_mesh(data=1)
def feed(start):
    for n, batch in enumerate(toy.feed(on, start)):
        print("batch", start + n, flush=True)
        time.sleep(0.01)
        yield batch

with Checkpointer(sys.argv[1]) as checkpointer:
    s = toy.new_state(on)
    if checkpointer.latest_step() is not None:
        s, _ = checkpointer.restore(state.abstract(s))
    save = lambda step, s: checkpointer.save(step, s, position={}, config={})
    result = fit(s, feed(int(s.step)), n_steps=40, save=save, checkpoint_every=2,
                 **toy.fit_kwargs(on))
print("done", flush=True)
"""


@pytest.mark.slow
def test_sigkill_at_any_time_changes_nothing(on, tmp_path):
    kills = np.random.default_rng(0).integers(4, 10, size=3)
    for kill_after in [*kills, None]:
        child = subprocess.Popen(
            [sys.executable, "-c", VICTIM, str(tmp_path)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        seen = 0
        for line in child.stdout:
            seen += line.startswith("batch")
            if kill_after is not None and seen == kill_after:
                child.kill()
                break
        child.stdout.close()
        code = child.wait()
        assert code == (0 if kill_after is None else -signal.SIGKILL)
    whole = fit(toy.new_state(on), toy.feed(on), n_steps=40, **toy.fit_kwargs(on))
    with Checkpointer(tmp_path) as checkpointer:
        toy.assert_bitwise(resume(on, checkpointer), whole.state)
        assert {p.name for p in checkpointer.directory.iterdir()} == {"38", "40"}
