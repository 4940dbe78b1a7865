"""`diffjax plan` as it is typed."""

import json

import pytest

from diffjax.cli.main import main
from diffjax.cli.plan import axes
from diffjax.runs.plan import plan, to_json
from diffjax.runs.workdir import RunError, load_config

TINY = "tests/runs/tiny_config.py"


def typed(*arguments):
    return main(["diffjax", "plan", f"--config={TINY}", "--nocompile", *arguments])


def test_json_is_the_plan_from_python(capsys):
    code = typed("--mesh=data:4,fsdp:2", "--device=tpu-v5e", "--batch_size=32", "--json")
    found = json.loads(capsys.readouterr().out)
    mesh = {"data": 4, "fsdp": 2}
    expected = plan(load_config(TINY), "tpu-v5e", mesh, batch_size=32, compile=False)
    assert code == 0 and found == json.loads(json.dumps(to_json(expected)))


def test_the_tables_are_for_people(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert (
        typed("--device=h100", "--mesh=data:8", "--scaling", "--config.training.accumulate=2") == 0
    )
    shown = capsys.readouterr().out
    for text in ("parameters", "exact", "model", "all-reduce", "It fits", "4,096", "nvidia.com"):
        assert text in shown


def test_what_does_not_fit_is_exit_code_1(capsys, monkeypatch):
    from diffjax.runs.chips import CHIPS

    monkeypatch.setitem(CHIPS, "a100", CHIPS["a100"]._replace(memory=3.2e5))
    assert typed("--device=a100", "--mesh=data:1") == 1
    shown = capsys.readouterr().out
    assert (
        "does NOT fit" in shown and "remat" in shown and "--config.training.batch_size=8" in shown
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh=data:2"], "--device is missing"),
        (["--device=abacus"], "abacus"),
        (["--device=a100", "--mesh=data=2"], "data:64,fsdp:4"),
        (["--device=a100", "--config.training.nothing=1"], "no such field"),
    ],
)
def test_bad_requests_are_one_line(capsys, arguments, message):
    assert typed(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_config_is_needed(capsys):
    assert main(["diffjax", "plan", "--device=a100"]) == 2
    assert "--config is missing" in capsys.readouterr().err


def test_meshes_are_read():
    assert axes("data:64,fsdp:4") == {"data": 64, "fsdp": 4}
    for text in ("data", "data:", "data:2,data:2", "data:-1"):
        with pytest.raises(RunError, match="takes axes and sizes"):
            axes(text)
