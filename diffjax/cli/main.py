"""The command `diffjax`: parsing and printing only; the work is `diffjax.runs`."""

import importlib
import os
import sys
from collections.abc import Sequence

VERBS = {
    "train": "train a model into a workdir, or go on with one",
    "sample": "draw images from a trained model",
    "evaluate": "measure a trained model",
    "ema": "average a run's weights over another width",
    "replay": "repeat one update of a run, such as one that went wrong",
    "plan": "say what a config needs on a mesh of chips, without them",
    "import": "make a workdir of another code's weights",
    "export": "write a trained model's sampler as one file",
}
# A verb whose name no Python module can have.
_MODULES = {"import": "import_weights"}

USAGE = """diffjax: score-based diffusion models in JAX.

usage: diffjax <verb> [flags]

{verbs}

`diffjax <verb> --help` lists the flags of a verb. A first run, minutes on a laptop:

  diffjax train    --config=digits --workdir=runs/digits
  diffjax sample   --workdir=runs/digits --num=100 --solver=heun --steps=20
  diffjax evaluate --workdir=runs/digits --metrics=bpd,quality

Configs by name (--config=NAME, or the path of your own):

{configs}
"""


def usage() -> str:
    """The text of `diffjax --help`."""
    from diffjax.runs.workdir import config_listing

    verbs = "\n".join(f"  {name:<9} {what}" for name, what in VERBS.items())
    return USAGE.format(verbs=verbs, configs=config_listing())


def main(argv: Sequence[str]) -> int:
    """Runs one verb. Returns the exit code: 0, 2 for a request that cannot be served, 3 stopped."""
    arguments = list(argv[1:])
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        from diffjax.version import __version__

        print(f"diffjax {__version__}")
        return 0
    verb, *flags = arguments
    if verb not in VERBS:
        print(f"diffjax: there is no verb {verb!r}; choose {', '.join(VERBS)}.", file=sys.stderr)
        return 2
    # TensorFlow, which writes for TensorBoard, is talkative.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        module = importlib.import_module(f"diffjax.cli.{_MODULES.get(verb, verb)}")
    except ModuleNotFoundError as error:
        print(
            f"diffjax: the command needs the package {error.name!r}; pip install 'diffjax[train]'.",
            file=sys.stderr,
        )
        return 2
    return module.run([f"diffjax {verb}", *flags])


def run() -> None:
    """The console script."""
    sys.exit(main(sys.argv))


if __name__ == "__main__":
    run()
