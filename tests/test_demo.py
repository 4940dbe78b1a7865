"""What the demo promises, for three seeds: the digits are good, and new (five minutes a seed)."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def diffjax(*arguments):
    """The command in a process of its own, on one device as in the demo."""
    command = [sys.executable, "-m", "diffjax", *map(str, arguments)]
    run = subprocess.run(
        command, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_digits_are_good(seed, tmp_path, digits_dir, compilation_cache):
    workdir = f"--workdir={tmp_path}"
    diffjax("train", "--config=digits", workdir, f"--config.seed={seed}", "--noprogress")
    diffjax("evaluate", workdir, "--metrics=bpd,frechet,quality", f"--seed={seed}")
    bits, quality = (
        json.loads((tmp_path / "eval" / f"{name}.json").read_text()) for name in ("bpd", "quality")
    )
    print(seed, bits, quality)
    assert bits["levels"] == 17
    assert bits["mean"] + 3 * bits["standard_error"] < min(bits["uniform"], bits["histogram"])
    assert 0.80 < quality["recognised_real"] < 0.92, "the judge must not be sure of everything"
    assert quality["samples"] == 500
    assert quality["recognised_ratio"] >= 0.85
    assert quality["least_class_share"] >= 0.04
    assert quality["largest_class_share"] <= 0.18
    assert quality["nearest_ratio"] >= 0.8
