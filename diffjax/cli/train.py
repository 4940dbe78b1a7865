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
  diffjax train --config=NAME --workdir=W --init_from=V    begins with the weights of workdir V

A workdir with a checkpoint goes on by itself. SIGTERM or Ctrl-C saves before leaving (exit code 3).
A disk that is full or broken ends the run with exit code 5; the checkpoints before are whole.
--init_from=V or V:STEP is short for --config.training.init_from; leaves that do not fit are named.
Several processes: the same command in each, with --coordinator, --num_processes and --process_id or
with --distributed; scripts/launch starts them. A SIGTERM to one of them saves in all. One that
loses another ends with exit code 4 or is aborted. Another number of processes may go on.
Configs by name: `diffjax` lists them.
Every field of a config is a flag: --config.training.batch_size=64, --config.seed=1.
Data sets are looked for in $TFDS_DATA_DIR, else in ~/tensorflow_datasets."""


def run(argv: Sequence[str]) -> int:
    """Parses and trains."""
    return flags.guarded("train", lambda: _train(argv))


def _train(argv: Sequence[str]) -> int:
    values = absl_flags.FlagValues()
    absl_flags.DEFINE_string("workdir", None, "the run's directory", flag_values=values)
    absl_flags.DEFINE_string(
        "init_from", None, "WORKDIR[:STEP] whose weights to begin with", flag_values=values
    )
    absl_flags.DEFINE_bool("progress", True, "shows a progress bar", flag_values=values)
    define = flags.Definer(values)
    define.text("profile", None, "writes a profiler's trace between two steps, as 100:105")
    define.switch("deterministic", False, "a GPU gives the same bits each time, at some cost")
    flags.define_processes(values)
    argv, name, workdir, source = _separate(argv)
    if not flags.wants_help(argv):
        if workdir is None:
            raise RunError("--workdir is missing: the directory of the run.")
        config = _config(name, workdir)
        if source is not None:
            with config.unlocked():
                config.training.init_from = source
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
    profile = None if values.profile is None else _steps(values.profile)
    if values.deterministic:
        flags.make_deterministic()
    flags.join(values, heed_notices=True)
    return _run(values, profile)


def _run(values: absl_flags.FlagValues, profile: tuple[int, int] | None) -> int:
    """Trains by the parsed flags. Returns the exit code."""
    flags.enable_compilation_cache()
    if values.deterministic:
        flags.say_deterministic()
    from diffjax.runs import compiling
    from diffjax.runs.train import train

    with compiling.counted() as compiled:
        outcome = train(
            values.config,
            values.workdir,
            show_progress=values.progress,
            report=print,
            profile=profile,
        )
    flags.say(compiled.line())
    if outcome.finished:
        flags.say(f"Trained {outcome.step} steps; everything is in {Path(values.workdir)}.")
        return 0
    flags.say(f"Stopped and saved at step {outcome.step}; the same command goes on from there.")
    return flags.STOPPED


def _steps(text: str) -> tuple[int, int]:
    """Reads "100:105". Raises RunError."""
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise RunError(
            f"--profile takes two steps, the first less, as 100:105 for the five updates after "
            f"step 100; got {text!r}."
        )
    return int(first), int(last)


def _separate(argv: Sequence[str]) -> tuple[list[str], str | None, str | None, str | None]:
    """argv without --config=NAME and --init_from, that name, the workdir, the weights' workdir.

    These are needed before the flags are known: the config may come from the workdir.
    """
    rest = [argv[0]]
    found: dict[str, str | None] = {"config": None, "workdir": None, "init_from": None}
    arguments = iter(argv[1:])
    for argument in arguments:
        key, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and key in found:
            found[key] = value if equals else next(arguments, None)
            if key == "workdir":
                rest.append(f"--workdir={found[key]}")
        else:
            rest.append(argument)
    return rest, found["config"], found["workdir"], found["init_from"]


def _config(name: str | None, workdir: str):
    if name is not None:
        return load_config(name)
    if not (Path(workdir) / "config.json").exists():
        raise RunError(f"--config is missing, and {workdir} holds none to go on with.")
    return read_config(workdir)
