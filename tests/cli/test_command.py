"""The command: what it prints, its exit codes, and that mistakes damage nothing."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from diffjax.cli import flags
from diffjax.cli.main import main
from diffjax.cli.sample import numbers
from diffjax.runs.workdir import RunError


def call(capsys, *arguments):
    """Exit code, stdout, stderr."""
    code = main(["diffjax", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_teaches(capsys):
    code, out, _ = call(capsys)
    assert code == 0
    assert "diffjax train    --config=digits" in out
    for verb, flag in (("train", "--workdir"), ("sample", "--solver"), ("evaluate", "--metrics")):
        code, out, _ = call(capsys, verb, "--help")
        assert code == 0
        assert flag in out
        assert f"diffjax {verb}" in out


def test_sample_and_evaluate(capsys, trained, tmp_path):
    code, out, _ = call(
        capsys, "sample", f"--workdir={trained}", "--num=3", f"--out={tmp_path}", "--steps=3"
    )
    assert code == 0
    assert "Drew 3 images of step 10" in out
    with np.load(tmp_path / "samples.npz") as archive:
        assert archive["images"].shape == (3, 8, 8, 1)
    code, out, _ = call(
        capsys, "evaluate", f"--workdir={trained}", "--metrics=loss,bpd", "--limit=4"
    )
    assert code == 0
    assert "bits/dim of 4 held-out images" in out
    assert "= log2(17)" in out


def test_training_goes_on_with_the_stored_config(capsys, trained):
    code, out, _ = call(capsys, "train", f"--workdir={trained}", "--noprogress")
    assert code == 0
    assert "Trained 10 steps" in out


MISTAKES = {
    "unknown verb": (["trian"], "there is no verb 'trian'"),
    "no workdir": (["train", "--config=digits"], "--workdir is missing"),
    "no config": (["train", "--workdir={tmp}"], "--config is missing"),
    "unknown config": (
        ["train", "--config=digit", "--workdir={tmp}"],
        "There is no config 'digit'",
    ),
    "unknown key": (
        ["train", "--config=digits:quick", "--workdir={tmp}", "--config.optim.lrr=1"],
        "lrr",
    ),
    "wrong type": (
        ["train", "--config=digits:quick", "--workdir={tmp}", "--config.training.n_iters=many"],
        "n_iters",
    ),
    "bad value": (
        ["train", "--config=digits:quick", "--workdir={tmp}", "--config.process.beta_min=-1"],
        "beta_min must not be negative",
    ),
    "unknown flag": (["sample", "--workdir={run}", "--sovler=heun"], "sovler"),
    "other config": (
        ["train", "--config=digits:quick", "--workdir={run}", "--config.optim.lr=0.5"],
        "belongs to another config (optim.lr",
    ),
    "no run": (["sample", "--workdir={tmp}"], "no config.json"),
    "unwritable": (
        ["train", "--config=digits:quick", "--workdir={file}/inside"],
        "another workdir",
    ),
    "unknown solver": (["sample", "--workdir={run}", "--solver=hean"], "Did you mean 'heun'"),
    "solver that does not fit": (
        ["sample", "--workdir={run}", "--solver=euler", "--steps=0"],
        "must be at least 1",
    ),
    "path without a grid": (
        ["sample", "--workdir={run}", "--solver=ode", "--path", "--out={tmp}"],
        "no grid whose states could be shown as a path",
    ),
    "tolerance of a grid": (
        ["sample", "--workdir={run}", "--solver=heun", "--rtol=1e-3", "--out={tmp}"],
        "rtol belong to an adaptive solver, and RungeKutta steps along a grid",
    ),
    "tolerance out of range": (
        ["sample", "--workdir={run}", "--solver=ode", "--rtol=-1", "--out={tmp}"],
        "rtol must not be negative",
    ),
    "unknown metric": (["evaluate", "--workdir={run}", "--metrics=fed"], "choose among"),
    "no such checkpoint": (["sample", "--workdir={run}", "--step=3"], "holds steps"),
    "stray argument": (["sample", "--workdir={run}", "heun"], "Unexpected argument 'heun'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, trained, tmp_path, case):
    arguments, expected = MISTAKES[case]
    (tmp_path / "file").write_text("")
    (tmp_path / "work").mkdir()
    places = {"run": trained, "tmp": tmp_path / "work", "file": tmp_path / "file"}
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*") if p.is_file()}
    code, _, err = call(capsys, *(a.format(**places) for a in arguments))
    assert code == 2
    assert expected in err
    assert len(err.strip().splitlines()) == 1, err
    assert {p: p.stat().st_mtime_ns for p in trained.rglob("*") if p.is_file()} == before
    assert not list((tmp_path / "work").iterdir())


def test_tolerances_reach_the_solver(capsys, trained, monkeypatch, tmp_path):
    from diffjax.runs import sample

    seen = {}

    def draws_nothing(model, out, **options):
        seen.update(options)
        return sample.Written(None, (out / "a",))

    monkeypatch.setattr(sample, "sample_to", draws_nothing)
    arguments = ["sample", f"--workdir={trained}", "--num=2", f"--out={tmp_path}", "--solver=ode"]
    assert call(capsys, *arguments, "--rtol=1e-3", "--atol=0.01")[0] == 0
    controller = seen["solver"].controller
    assert (controller.rtol, controller.atol) == (1e-3, 0.01)
    assert call(capsys, *arguments, "--atol=0.02")[0] == 0
    controller = seen["solver"].controller
    assert (controller.rtol, controller.atol) == (1e-5, 0.02)
    assert call(capsys, *arguments)[0] == 0
    assert seen["solver"] == "ode"


def test_many_images_are_shards_that_evaluate_reads(capsys, trained, tmp_path):
    """As the two commands print it; another request into the same place is one line."""
    arguments = ["sample", f"--workdir={trained}", "--num=10", f"--out={tmp_path}", "--steps=3"]
    arguments += ["--batch_size=4", "--shard_size=4", "--format=png"]
    code, out, _ = call(capsys, *arguments)
    assert code == 0
    assert f"--samples={tmp_path / 'samples'}." in out
    assert len(list((tmp_path / "samples").glob("*.png"))) == 10
    code, _, err = call(capsys, *arguments, "--seeds=1-10")
    assert code == 2
    assert "of another request (" in err
    assert "seeds: 0-9 -> 1-10" in err
    assert len(err.strip().splitlines()) == 1


def test_export_misses_its_package_before_it_works(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    code, _, err = call(capsys, "export", f"--workdir={tmp_path}", f"--out={tmp_path / 's.npz'}")
    assert code == 2
    assert "pip install 'diffjax[export]'" in err


def test_a_damaged_checkpoint_is_named(capsys, trained, tmp_path):
    import shutil

    shutil.copytree(trained, tmp_path / "run")
    for step in ("5", "10"):
        for file in (tmp_path / "run" / "checkpoints" / step).rglob("*"):
            if file.is_file() and file.name != "commit_success.txt":
                file.write_bytes(b"")
    code, _, err = call(capsys, "sample", f"--workdir={tmp_path / 'run'}")
    assert code == 2
    assert "Damaged" in err


def test_numbers_read_ranges():
    assert numbers("seeds", "0-3,7") == [0, 1, 2, 3, 7]
    for text in ("", "a", "3-", "-2"):
        with pytest.raises(RunError, match="--seeds takes numbers"):
            numbers("seeds", text)
    with pytest.raises(RunError, match=r"below 2\*\*32; got 4294967296"):
        numbers("seeds", "0,4294967296")


def test_a_log_on_the_full_disk_does_not_change_the_exit_code():
    """Neither what is said last nor what waits to be written can be."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("there is no /dev/full")
    code = """
import sys
from diffjax.cli import flags
from diffjax.train.storage import SaveError
def work():
    print("waits")
    raise SaveError(28, "no space")
sys.exit(flags.guarded("train", work))
"""
    with full.open("w") as log:
        done = subprocess.run([sys.executable, "-c", code], stdout=log, stderr=log)
    assert done.returncode == flags.FULL
