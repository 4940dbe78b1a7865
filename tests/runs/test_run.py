"""A whole run on real data: train, go on, sample, measure."""

import json
import logging

import jax
import numpy as np
import pytest

import diffjax as dj
from diffjax.runs.sample import sample_to, seed_keys, write_path
from diffjax.runs.workdir import RunError, load_config
from diffjax.train import preempt
from diffjax.train.telemetry import read_jsonl


def ema_of(workdir, step=None):
    return jax.tree.map(np.asarray, dj.load(workdir, step=step).params)


def test_a_run_leaves_what_it_promises(trained):
    rows = read_jsonl(trained / "metrics.jsonl")
    assert [row["step"] for row in rows] == [5, 10]
    assert all({"loss", "eval_loss", "grad_norm", "lr"} <= row.keys() for row in rows)
    assert {p.name for p in (trained / "checkpoints").iterdir()} == {"5", "10"}
    for name in ("config.json", "samples/10.png", "loss.png"):
        assert (trained / name).stat().st_size > 0
    assert list((trained / "tensorboard").iterdir())


def test_a_finished_run_stays_as_it_is(trained):
    before = ema_of(trained)
    assert dj.train(load_config("digits:quick"), trained, show_progress=False) == (10, True)
    jax.tree.map(np.testing.assert_array_equal, before, ema_of(trained))


def test_stopped_and_gone_on_equals_uninterrupted(trained, tmp_path, monkeypatch):
    asked = iter([True])  # the first dispatch, five updates, is followed by a stop
    monkeypatch.setattr(preempt, "stop_on_signals", _stops(asked))
    assert dj.train(load_config("digits:quick"), tmp_path, show_progress=False) == (5, False)
    assert dj.train(load_config("digits:quick"), tmp_path, show_progress=False) == (10, True)
    jax.tree.map(np.testing.assert_array_equal, ema_of(trained), ema_of(tmp_path))
    losses = [[r["loss"] for r in read_jsonl(d / "metrics.jsonl")] for d in (trained, tmp_path)]
    assert losses[0] == losses[1]


def _stops(answers):
    import contextlib

    @contextlib.contextmanager
    def stop_on_signals():
        yield lambda: next(answers, False)

    return stop_on_signals


def test_samples_are_levels_and_depend_on_their_key_alone(trained):
    model = dj.load(trained)
    key = jax.random.key(3)
    images = model.sample(key, 5)
    assert images.shape == (5, 8, 8, 1)
    assert images.dtype == np.uint8
    assert images.max() <= 16
    # Convolutions may round differently at another batch size: at most a pixel at a boundary.
    smaller = model.sample(key, 5, batch_size=2)
    assert np.mean(images != smaller) < 0.01
    other = model.sample(key, 5, solver="ancestral", steps=6)
    assert np.mean(images != other) > 0.1


def test_one_compilation_serves_keys_weights_and_batches(trained, caplog):
    model, older = dj.load(trained), dj.load(trained, step=5)
    model.sample(jax.random.key(0), 4)
    with caplog.at_level(logging.WARNING, "jax"), jax.log_compiles():
        model.sample(jax.random.key(1), 4)
        model.sample(jax.random.key(2), 10, batch_size=4)
        older.sample(jax.random.key(1), 4)
        model.sample(jax.random.key(1), 4, solver="heun")  # another program, to see that we look
    compiled = [r.getMessage() for r in caplog.records if "Finished XLA" in r.getMessage()]
    assert sum("jit(sample)" in message for message in compiled) == 1


def test_sampling_to_files(trained, tmp_path):
    model = dj.load(trained)
    written = sample_to(model, tmp_path, key=seed_keys([4, 5, 6]), num=3)
    with np.load(tmp_path / "samples.npz") as archive:
        np.testing.assert_array_equal(archive["images"], written.images)
    alone = model.sample(seed_keys([5]), 1, batch_size=3)
    np.testing.assert_array_equal(alone[0], written.images[1])
    sample_to(model, tmp_path, key=seed_keys([4]), num=1, format="png", name="one")
    assert (tmp_path / "one" / "000000.png").is_file()
    write_path(model, tmp_path / "path.png", seeds=[1, 2])
    assert (tmp_path / "path.png").stat().st_size > 1000


def test_evaluation_writes_what_it_returns(trained):
    found = dj.evaluate(trained, ("loss", "bpd", "frechet", "quality"), limit=8, num=8)
    for name, figures in found.items():
        assert json.loads((trained / "eval" / f"{name}.json").read_text()) == figures
        assert figures["step"] == 10
    assert found["bpd"]["uniform"] == pytest.approx(np.log2(17))
    assert found["bpd"]["images"] == 8
    assert found["loss"]["images"] == 360
    assert found["frechet"]["n"] == 8
    assert sum(found["quality"]["class_shares"]) == pytest.approx(1, abs=1e-3)


def test_held_out_images_judged_as_samples_look_real(trained, tmp_path):
    from sklearn.datasets import load_digits

    images = load_digits().images.astype(np.uint8)[..., None][:200]
    np.savez(tmp_path / "real.npz", images=images)
    found = dj.evaluate(trained, ("frechet", "quality"), samples=tmp_path / "real.npz")
    assert found["quality"]["recognised_ratio"] > 0.95
    # Most of these are training images: no distance at all from the nearest.
    assert found["quality"]["nearest_ratio"] < 0.5
    reference = found["frechet"]
    assert reference["distance"] < 2 * reference["real_versus_real"]


def test_what_does_not_fit_is_refused(trained, tmp_path):
    with pytest.raises(RunError, match="no config.json"):
        dj.load(tmp_path)
    with pytest.raises(ValueError, match=r"holds steps \[5, 10\]"):
        dj.load(trained, step=7)
    with pytest.raises(RunError, match="unconditional"):
        dj.load(trained).sample(jax.random.key(0), 2, labels=[0, 1])
    with pytest.raises(RunError, match=r"Unknown metrics \['fed'\]"):
        dj.evaluate(trained, ("fed",))
    np.savez(tmp_path / "large.npz", images=np.zeros((2, 9, 9, 1), np.uint8))
    with pytest.raises(RunError, match="the model's are"):
        dj.evaluate(trained, ("quality",), samples=tmp_path / "large.npz")
