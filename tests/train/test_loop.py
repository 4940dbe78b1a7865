"""The loop: exact after every kind of stop, never ahead of itself, loud when training breaks."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.train import mesh, state
from diffjax.train.checkpoint import Checkpointer
from diffjax.train.loop import Diverged, Hook, fit
from diffjax.train.preempt import stop_on_signals
from diffjax.train.telemetry import JsonlWriter, read_jsonl
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
        return [
            {k: v for k, v in row.items() if k != "images_per_second"} for row in read_jsonl(path)
        ]

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
    for step, scalars in shown[1:]:
        left = (6 - step) * toy.BATCH / scalars["images_per_second"]
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
    def step_fn(s, batch):
        s, metrics = toy.compiled(on)(s, batch)
        return s, metrics | {"grad_norm": jnp.full((1,), jnp.inf)}

    saved = []
    with pytest.raises(Diverged, match="grad_norm is inf at step 1"):
        fit(
            toy.new_state(on),
            toy.feed(on),
            n_steps=1,
            save=lambda step, s: saved.append(step),
            **toy.fit_kwargs(on) | {"step_fn": step_fn},
        )
    assert saved == []


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
