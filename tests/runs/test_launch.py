"""The launchers: what they would run, and how they end."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import diffjax as dj
from diffjax.cli import flags
from tests.runs.group import environment

LAUNCH = Path(__file__).parents[2] / "scripts" / "launch"
CONFIG = str(Path(__file__).with_name("tiny_config.py"))
TRAIN = ["train", "--config=digits", "--workdir=/shared/a run"]


def launch(name, *arguments, **options):
    command = [sys.executable, str(LAUNCH / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, **options)


def lines(name, *arguments):
    found = launch(name, *arguments)
    assert found.returncode == 0, found.stderr
    return found.stdout.splitlines()


def as_train_reads(words):
    """The place that `diffjax train` would find in a command's words."""
    from absl import flags as absl_flags

    from diffjax.runs import distributed

    values = absl_flags.FlagValues()
    flags.define_processes(values)
    values(
        ["train", *(w for w in words if w.startswith(("--coord", "--num_", "--process_", "--dis")))]
    )
    if values.distributed:
        return "asks the cluster"
    return distributed.place(values.coordinator, values.num_processes, values.process_id, {})


def test_local_names_each_process_once():
    found = lines("local", "--processes=3", "--devices=2", "--port=1234", "--dry-run", *TRAIN)
    for index, line in enumerate(found):
        words = shlex.split(line)
        assert as_train_reads(words) == ("localhost:1234", 3, index)
        assert any(word.endswith("device_count=2") for word in words)
        assert words[words.index("diffjax") + 1 :][:3] == TRAIN
    assert len(found) == 3


def test_ssh_goes_to_each_host(tmp_path):
    (tmp_path / "hosts").write_text("me@a\nme@b\n")
    found = lines(
        "ssh",
        f"--hosts-file={tmp_path / 'hosts'}",
        "--directory=/srv/diff jax",
        "--dry-run",
        *TRAIN,
    )
    for index, (line, host) in enumerate(zip(found, ("me@a", "me@b"), strict=True)):
        *_, there, remote = shlex.split(line)
        words = shlex.split(remote)
        assert there == host and words[:2] == ["cd", "/srv/diff jax"]
        assert as_train_reads(words) == ("a:8476", 2, index)
        assert words[words.index("exec") + 4 :][:3] == TRAIN


def test_slurm_writes_a_job_that_goes_on(tmp_path):
    text = "\n".join(
        lines("slurm", "--nodes=2", "--tasks-per-node=8", "--gpus-per-node=8", "--dry-run", *TRAIN)
    )
    given = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in text.splitlines()
        if line.startswith("#SBATCH")
    )
    assert given["nodes"] == "2" and given["ntasks-per-node"] == "8"
    assert given["signal"] == "TERM@180" and "requeue" in given
    (run,) = [line for line in text.splitlines() if line.startswith("srun")]
    assert as_train_reads(shlex.split(run)) == "asks the cluster"
    batch = text[: text.index("# then")]
    assert subprocess.run(["bash", "-n"], input=batch, text=True).returncode == 0
    # The job's end, with a Slurm that stops after a save.
    (tmp_path / "srun").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "$@"\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    done = subprocess.run(["bash"], input=batch, text=True, capture_output=True, env=path)
    assert (done.returncode, done.stdout.split()) == (flags.STOPPED, ["requeue", "77"])


def test_slurm_submits_what_it_wrote(tmp_path):
    (tmp_path / "sbatch").write_text('#!/bin/sh\nhead -1 "$1"\n')
    (tmp_path / "sbatch").chmod(0o755)
    path = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    found = launch("slurm", f"--file={tmp_path / 'job'}", *TRAIN, env=path)
    assert (found.returncode, found.stdout) == (0, "#!/usr/bin/env bash\n")
    (run,) = [x for x in (tmp_path / "job").read_text().splitlines() if x.startswith("srun")]
    assert as_train_reads(shlex.split(run)) is None  # one task is one process


def test_tpu_pod_asks_all_workers():
    name = ["--name=pod", "--zone=z", "--dry-run"]
    (line,) = lines("tpu_pod", *name, *TRAIN)
    words = shlex.split(line)
    assert words[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"]
    assert {"--zone=z", "--worker=all"} <= set(words)
    (remote,) = [w.removeprefix("--command=") for w in words if w.startswith("--command=")]
    assert as_train_reads(shlex.split(remote)) == "asks the cluster"
    (line,) = lines("tpu_pod", *name, "--stop", *TRAIN)
    assert "kill -TERM" in line


@pytest.mark.parametrize("name", ["local", "ssh", "slurm", "tpu_pod"])
def test_help_and_a_wrong_verb(name):
    given = {"local": ["--processes=2"], "ssh": ["--hosts=a"], "tpu_pod": ["--name=a", "--zone=b"]}
    assert "--dry-run" in launch(name, "--help").stdout
    wrong = launch(name, *given.get(name, []), "trian")
    assert wrong.returncode == 2 and "begins with train" in wrong.stderr


# Ends, with a program that does what its number says in place of diffjax.

PROGRAM = """#!{python}
import signal, sys, time
index = int(sys.argv[-1].rpartition("=")[2])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
print("I am", index, flush=True)
{body}
"""


def ending(tmp_path, body, *options):
    program = tmp_path / "python"
    program.write_text(PROGRAM.format(python=sys.executable, body=body))
    program.chmod(0o755)
    return launch("local", "--processes=3", f"--python={program}", *options, "train")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("", 0),
        ("sys.exit(3)", 3),
        ("sys.exit(3 * (index < 2))", 3),
        ("time.sleep(0.3 * index); sys.exit(4 * (index == 2) + 3)", 7),
        ("import os; index == 1 and os.kill(os.getpid(), 9)", 137),
    ],
)
def test_one_exit_code_for_all(body, code, tmp_path):
    found = ending(tmp_path, body)
    assert found.returncode == code
    assert "I am 0" in found.stdout and "[2] I am 2" in found.stderr


def test_the_rest_is_killed_when_one_has_failed(tmp_path):
    found = ending(tmp_path, "sys.exit(5) if index == 1 else time.sleep(100)", "--grace=0.5")
    assert found.returncode == 5 and "Killing [0, 2]" in found.stderr


@pytest.mark.slow
def test_local_really_trains(tmp_path, digits_dir, compilation_cache):
    given = environment(1)
    del given["XLA_FLAGS"]
    command = ["train", f"--config={CONFIG}", f"--workdir={tmp_path}", "--noprogress"]
    found = launch("local", "--processes=2", "--devices=2", *command, env=given)
    assert found.returncode == 0, found.stderr
    assert "Trained 12 steps" in found.stdout
    assert dj.load(tmp_path).step == 12
