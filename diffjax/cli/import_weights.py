"""`diffjax import`."""

from collections.abc import Sequence
from pathlib import Path

from absl import flags as absl_flags

from diffjax.cli import flags
from diffjax.runs.workdir import RunError, load_config

ABOUT = """diffjax import: make a workdir of another code's weights.

  diffjax import --from=score_sde --path=checkpoint_8.pth \\
      --config=ve/cifar10_ncsnpp_continuous --workdir=W
  diffjax sample --workdir=W

--from says which code wrote the file:
  score_sde   JAX checkpoint (flax msgpack) or its PyTorch port's .pth; the averaged weights
  edm         pickled network (.pkl); no code in it is run
  diffusers   UNet2DModel of DDPM or NCSN++ (.safetensors, .bin), config.json beside it
  adm         guided-diffusion (.pt)
  dit         DiT (.pt)
  sit         SiT (.pt)
  diffjax     diffjax.interop.native (.safetensors)
PyTorch is not needed. The config says how the network is built and asked; the weights must fit it
and must denoise under it, else nothing is written and the likely cause is named."""


def run(argv: Sequence[str]) -> int:
    """Parses and imports."""
    return flags.guarded("import", lambda: _import(argv))


def _import(argv: Sequence[str]) -> int:
    values = absl_flags.FlagValues()
    define = flags.Definer(values)
    define.text("from", None, "the code that wrote the file")
    define.text("path", None, "the file")
    define.text("config", None, "config by name or path")
    define.text("workdir", None, "where to write; new")
    define.text("attention_order", None, "of adm: legacy or new; by the image size by default")
    define.switch("check", True, "asks the weights to denoise before anything is written")
    if not flags.parse(values, argv, ABOUT):
        return 0
    for name in ("from", "path", "config", "workdir"):
        if values[name].value is None:
            raise RunError(f"--{name} is missing; see diffjax import --help.")
    path = Path(values.path)
    if not path.is_file():
        raise RunError(f"--path={path} is no file.")
    flags.enable_compilation_cache()
    from diffjax.runs.weights import import_weights

    done = import_weights(
        str(values["from"].value),
        path,
        load_config(values.config),
        values.workdir,
        check=values.check,
        attention_order=values.attention_order,
    )
    if done.report is not None:
        print(done.report.summary())
    print(f"Imported as step {done.step} into {Path(values.workdir)}.")
    return 0
