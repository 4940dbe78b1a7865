"""Metrics files and the terminal."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core.files import write_atomic
from diffjax.train import telemetry
from diffjax.train.telemetry import JsonlWriter, MultiWriter, progress_bar, read_jsonl


def test_one_line_a_step(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write_scalars(1, {"loss": jnp.float32(0.5)})
    writer.write_scalars(1, {"eval_loss": np.float64(0.25), "count": 3})
    writer.write_scalars(2, {"loss": float("nan"), "x": np.inf})
    writer.flush()
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 0.5, "eval_loss": 0.25, "count": 3},
        {"step": 2, "loss": None, "x": None},
    ]
    writer.close()


def test_flushed_figures_are_on_the_disk(tmp_path, monkeypatch):
    """Where a checkpoint follows; a line of its own does not wait for the disk."""
    path, sizes, fsync = tmp_path / "metrics.jsonl", [], os.fsync

    def noting(handle):
        fsync(handle)
        sizes.append(os.fstat(handle).st_size)

    writer = JsonlWriter(path)
    monkeypatch.setattr(os, "fsync", noting)
    for step in (1, 2):
        writer.write_scalars(step, {"loss": 1.0})
    assert len(read_jsonl(path)) == 1 and sizes == []
    writer.flush()
    assert len(read_jsonl(path)) == 2 and sizes == [path.stat().st_size]
    writer.close()


def test_resuming_drops_later_lines_and_a_torn_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": s, "loss": s / 10} for s in range(1, 7)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 7, "lo')
    assert read_jsonl(path) == rows
    writer = JsonlWriter(path, last_step=4)
    assert read_jsonl(path) == rows[:4]
    writer.write_scalars(5, {"loss": 9.0})
    writer.close()
    assert read_jsonl(path) == [*rows[:4], {"step": 5, "loss": 9.0}]
    JsonlWriter(path).close()  # a run from the start
    assert read_jsonl(path) == []


def test_a_line_that_is_not_ours_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is not a JSON object"):
        JsonlWriter(path, last_step=9)
    assert "nonsense" in path.read_text()


def test_multi_writer_hands_to_all(tmp_path):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    writer = MultiWriter(JsonlWriter(path) for path in paths)
    writer.write_scalars(3, {"loss": 1.0})
    writer.write_images(3, {"grid": np.zeros((1, 2, 2, 3))})
    writer.flush()
    writer.close()
    assert [read_jsonl(path) for path in paths] == [[{"step": 3, "loss": 1.0}]] * 2


@pytest.mark.slow
def test_tensorboard_reads_what_clu_writes(tmp_path):
    # In a process of its own: TensorFlow stays out of the other tests.
    code = """
import sys
import numpy as np
from diffjax.train.telemetry import MultiWriter, tensorboard_writer
assert "tensorflow" not in sys.modules
writer = MultiWriter([tensorboard_writer(sys.argv[1])])
writer.write_scalars(3, {"loss": 0.5})
writer.write_images(3, {"grid": np.zeros((1, 4, 4, 3), np.uint8)})
writer.close()
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1])
events.Reload()
from tensorboard.util.tensor_util import make_ndarray
loss, = events.Tensors("loss")
print(loss.step, make_ndarray(loss.tensor_proto), sorted(events.Tags()["tensors"]))
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert run.stdout.strip() == "3 0.5 ['grid', 'loss']", run.stderr


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_on_a_terminal_shows_figures():
    stream = Terminal()
    with progress_bar(200, stream=stream) as show:
        show(50, {"loss": 0.1234, "images_per_second": 480.0, "seconds_left": 3725.0})
    text = stream.getvalue()
    for part in ("50/200", "loss 0.1234", "480 images/s", "1:02:05 left"):
        assert part in text


@pytest.mark.parametrize(("share", "shown"), [(0.123, True), (0.04, False)])
def test_progress_shows_waiting_that_matters(share, shown):
    stream = Terminal()
    with progress_bar(200, stream=stream) as show:
        show(50, {"loss": 0.1, "data_wait": share})
    assert ("12% waiting for data" in stream.getvalue()) == shown
    assert shown or "waiting" not in stream.getvalue()


def test_memory_is_labelled_by_whose_it_is(monkeypatch):
    [(name, peak)] = telemetry.memory_peak().items()
    assert name == "process_memory_peak_gib"
    status = Path("/proc/self/status")
    if status.exists():  # Linux counts the same in another place
        [line] = [x for x in status.read_text().splitlines() if x.startswith("VmHWM")]
        np.testing.assert_allclose(peak, int(line.split()[1]) / 2**20, rtol=0.05)

    class Device:
        def __init__(self, peak):
            self.memory_stats = lambda: {"peak_bytes_in_use": peak}

    monkeypatch.setattr(telemetry.jax, "local_devices", lambda: [Device(2**30), Device(3 * 2**30)])
    assert telemetry.memory_peak() == {"device_memory_peak_gib": 3.0}


def test_speed_by_hand():
    known = telemetry.Machine(chips=8, flops=4e12, peak_flops=1e12)
    found = known.speed(images=512, seconds=2.0, waited=0.5)
    assert found == {
        "images_per_second": 256.0,
        "images_per_second_per_chip": 32.0,
        "data_wait": 0.25,
        "mfu": 0.25,  # 4 of the 2 x 8 TFLOP that the chips could have done
    }
    assert "mfu" not in telemetry.Machine(chips=8, flops=4e12).speed(512, 2.0, 0.5)
    assert found.keys() <= telemetry.MEASURED


def test_progress_elsewhere_is_a_line_now_and_then(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(telemetry.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with progress_bar(100, stream=stream, every_s=30) as show:
        for step in range(1, 101):
            now[0] += 1
            show(step, {"loss": 0.5})
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [f"{s}/100" for s in (1, 31, 61, 91, 100)]


def test_atomic_writes(tmp_path):
    path = tmp_path / "deep" / "config.json"
    write_atomic(path, "{}")
    assert path.read_text() == "{}"
    write_atomic(path, "ü".encode())
    assert path.read_text(encoding="utf-8") == "ü"
    plain = tmp_path / "plain"
    plain.write_text("")
    assert path.stat().st_mode == plain.stat().st_mode
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        write_atomic(tmp_path / "taken", "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "plain", "taken"]
    assert [p.name for p in path.parent.iterdir()] == ["config.json"]
