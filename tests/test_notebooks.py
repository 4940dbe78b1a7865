"""Notebooks: the paired scripts run as they are, and the pairs say the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
SCRIPTS = sorted(NOTEBOOKS.glob("*.py"))


def check_tour(printed):
    """The exact denoiser's log-densities are the mixture's."""
    gaps = {line.split(":")[0]: line for line in printed.splitlines() if "truth" in line}
    exact = float(gaps["exact"].split("=")[1].split()[0])
    assert abs(exact) < 0.05, printed


def check_controllable(printed):
    """Samples are of the class, and meet their measurements."""
    lines = dict(line.split(": ") for line in printed.splitlines())
    shares = [float(text.split("%")[0]) for name, text in lines.items() if "scale" in name]
    errors = [float(text.split()[-1]) for text in lines.values() if "measurement" in text]
    assert len(shares) == 2, printed
    assert min(shares) > 99, printed
    assert len(errors) == 3, printed
    assert max(errors) < 1e-6, printed


CHECKS = {"tour": check_tour, "controllable": check_controllable}


@pytest.mark.parametrize(
    "script",
    # One by default: a notebook is half a minute.
    [pytest.param(s, marks=() if s.stem == "tour" else pytest.mark.slow) for s in SCRIPTS],
    ids=lambda path: path.stem,
)
def test_a_notebook_runs(script, tmp_path):
    environment = os.environ | {"MPLBACKEND": "Agg", "XLA_FLAGS": ""}
    run = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    CHECKS[script.stem](run.stdout)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_pair_has_the_same_cells(script):
    notebook = json.loads(script.with_suffix(".ipynb").read_text(encoding="utf-8"))
    text = script.read_text(encoding="utf-8")
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert "".join(cell["source"]).strip() in text
            assert not cell["outputs"]
