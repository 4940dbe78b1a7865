"""What compiling took, read from JAX's own events; chips by the names of devices."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from diffjax.cli import flags
from diffjax.runs import compiling, speed
from diffjax.runs.chips import CHIPS


def test_programs_read_from_the_cache_are_counted(tmp_path):
    code = """
import sys
import jax
import jax.numpy as jnp
from diffjax.runs import compiling
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
x = jnp.ones(7)
with compiling.counted() as found:
    jax.jit(lambda x: jnp.sin(x) + 3)(x)
    jax.jit(lambda x: jnp.cos(x) * 5)(x)
jax.jit(lambda x: jnp.cos(x) * 6)(x)  # nobody listens
assert found.programs == 2 and found.seconds > 0, vars(found)
print(found.read, found.line())
"""
    lines = []
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300
        )
        assert run.returncode == 0, run.stderr
        lines.append(run.stdout)
    assert lines[0].startswith("0 Compiling took") and "0 of 2 programs came from" in lines[0]
    assert f"2 of 2 programs came from the cache in {tmp_path}" in lines[1]


def test_seconds_saved_are_what_jax_reports():
    with compiling.counted() as found:
        for seconds in (2.5, 4.0):
            jax.monitoring.record_event_duration_secs(
                "/jax/compilation_cache/compile_time_saved_sec", seconds
            )
    jax.monitoring.record_event_duration_secs("/jax/compilation_cache/compile_time_saved_sec", 9.0)
    assert found.saved == 6.5


def test_without_a_cache_it_says_so():
    with compiling.counted() as found:
        jax.jit(lambda x: x * 17.5)(jnp.ones(3))
    assert found.programs >= 1 and found.read == 0
    if jax.config.values["jax_compilation_cache_dir"] is None:
        assert found.line().endswith("without a cache.")


def test_deterministic_is_a_flag_of_xla_given_once(monkeypatch, capsys):
    monkeypatch.setenv("XLA_FLAGS", "--a=1")
    flags.make_deterministic()
    flags.make_deterministic()
    assert os.environ["XLA_FLAGS"] == "--a=1 --xla_gpu_deterministic_ops=true"
    flags.say_deterministic()
    assert "on cpu there is nothing to switch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "tpu-v4"),
        ("TPU v5 lite", "tpu-v5e"),
        ("TPU v5", "tpu-v5p"),
        ("TPU v6 lite", "tpu-v6e"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
    ],
)
def test_chips_by_the_names_of_devices(kind, name):
    assert speed.chip_of(kind) == CHIPS[name]


def test_other_devices_have_no_peak():
    assert speed.chip_of("cpu") is None
    assert speed.chip_of("NVIDIA GeForce RTX 3090") is None
