"""`diffjax train`."""

from collections.abc import Sequence
from pathlib import Path

from absl import flags as absl_flags
from ml_collections import config_flags

from diffjax.cli import flags
from diffjax.runs.workdir import RunError, load_config, read_config

ABOUT = """diffjax train: train a model into a workdir, or go on with one.

  diffjax train --config=digits --workdir=runs/digits
  diffjax train --config=vp/cifar10_ddpmpp_continuous --workdir=W --config.optim.lr=1e-4
  diffjax train --config=my/config.py:argument --workdir=W
  diffjax train --workdir=W                      goes on with the config stored there

A workdir with a checkpoint goes on by itself. SIGTERM or Ctrl-C saves before leaving (exit code 3).
Configs by name: `diffjax` lists them.
Every field of a config is a flag: --config.training.batch_size=64, --config.seed=1.
Data sets are looked for in $TFDS_DATA_DIR, else in ~/tensorflow_datasets."""


def run(argv: Sequence[str]) -> int:
    """Parses and trains."""
    return flags.guarded("train", lambda: _train(argv))


def _train(argv: Sequence[str]) -> int:
    values = absl_flags.FlagValues()
    absl_flags.DEFINE_string("workdir", None, "the run's directory", flag_values=values)
    absl_flags.DEFINE_bool("progress", True, "shows a progress bar", flag_values=values)
    argv, name, workdir = _separate(argv)
    if not flags.wants_help(argv):
        if workdir is None:
            raise RunError("--workdir is missing: the directory of the run.")
        config = _config(name, workdir)
        overrides = [a for a in argv if a.lstrip("-").startswith(("config.", "noconfig."))]
        try:
            config_flags.DEFINE_config_dict(
                "config", config, flag_values=values, sys_argv=overrides
            )
        except (AttributeError, KeyError) as error:
            hint = " ".join(str(error).replace("\\n", " ").split())
            raise RunError(f"The config has no such field: {hint}") from error
    if not flags.parse(values, argv, ABOUT):
        return 0
    flags.enable_compilation_cache()
    from diffjax.runs.train import train

    outcome = train(values.config, values.workdir, show_progress=values.progress)
    if outcome.finished:
        print(f"Trained {outcome.step} steps; everything is in {Path(values.workdir)}.")
        return 0
    print(f"Stopped and saved at step {outcome.step}; the same command goes on from there.")
    return flags.STOPPED


def _separate(argv: Sequence[str]) -> tuple[list[str], str | None, str | None]:
    """argv without --config=NAME, that name, and the workdir, which the config may come from."""
    rest = [argv[0]]
    found: dict[str, str | None] = {"config": None, "workdir": None}
    arguments = iter(argv[1:])
    for argument in arguments:
        key, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and key in found:
            found[key] = value if equals else next(arguments, None)
            if key == "workdir":
                rest.append(f"--workdir={found[key]}")
        else:
            rest.append(argument)
    return rest, found["config"], found["workdir"]


def _config(name: str | None, workdir: str):
    if name is not None:
        return load_config(name)
    if not (Path(workdir) / "config.json").exists():
        raise RunError(f"--config is missing, and {workdir} holds none to go on with.")
    return read_config(workdir)
