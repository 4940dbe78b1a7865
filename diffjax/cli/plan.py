"""`diffjax plan`."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags as absl_flags
from ml_collections import config_flags

from diffjax.cli import flags
from diffjax.runs.chips import CHIPS
from diffjax.runs.workdir import RunError, load_config

ABOUT = f"""diffjax plan: what a config needs on a mesh of chips, without the chips.

  diffjax plan --config=vp/cifar10_ddpmpp_continuous --mesh=data:64,fsdp:4 --device=tpu-v5p
  diffjax plan --config=dit/imagenet256_xl2 --mesh=data:8 --device=h100 --nocompile --scaling
  diffjax plan --config=edm/cifar10_uncond_vp --device=h200 --what=sample --batch_size=2048 --json

Devices: {", ".join(CHIPS)}.
Every figure says how it was got: exact, from shapes and shardings; model, from the program's
equations and the makers' figures for the chip; compiled:<backend>, from XLA's program for the mesh.
Compiling a published config takes minutes; --nocompile takes seconds. Exit code 1: does not fit.
Every field of a config is a flag: --config.model.dtype=bfloat16."""


def run(argv: Sequence[str]) -> int:
    """Parses and plans."""
    return flags.guarded("plan", lambda: _plan(argv))


def _plan(argv: Sequence[str]) -> int:
    values = absl_flags.FlagValues()
    define = flags.Definer(values)
    define.text("mesh", None, "devices along the axes, as data:64,fsdp:4; the config's")
    define.text("device", None, "the chip")
    define.text("what", "train", "train, an update, or sample, a batch")
    define.integer("batch_size", None, "images of a batch over the whole mesh; the config's")
    define.switch("compile", True, "also compiles the program for the mesh")
    define.switch("scaling", False, "also a table of weak scaling, to 4,096 chips")
    define.switch("json", False, "prints JSON")
    argv, name = _separate(argv)
    if not flags.wants_help(argv):
        if name is None:
            raise RunError("--config is missing: a name (`diffjax` lists them) or a path.")
        overrides = [a for a in argv if a.lstrip("-").startswith(("config.", "noconfig."))]
        try:
            config_flags.DEFINE_config_dict(
                "config", load_config(name), flag_values=values, sys_argv=overrides
            )
        except (AttributeError, KeyError) as error:
            hint = " ".join(str(error).replace("\\n", " ").split())
            raise RunError(f"The config has no such field: {hint}") from error
    if not flags.parse(values, argv, ABOUT):
        return 0
    if values.device is None:
        raise RunError(f"--device is missing: one of {', '.join(CHIPS)}.")
    if values.device.startswith("tpu"):
        import jax

        # Another process compiles for TPUs; this one shall neither look for some nor take them.
        jax.config.update("jax_platforms", "cpu")
    flags.enable_compilation_cache()
    from diffjax.runs import plan

    with _progress(hint=values.compile) as say:
        found = plan.plan(
            values.config,
            values.device,
            None if values.mesh is None else axes(values.mesh),
            what=values.what,
            batch_size=values.batch_size,
            compile=values.compile,
            scales=plan.SCALES if values.scaling else (),
            say=say,
        )
    if values.json:
        print(json.dumps(plan.to_json(found), indent=2))
    else:
        _show(found)
    return 0 if found.fits else 1


@contextlib.contextmanager
def _progress(*, hint: bool) -> Iterator[Callable[[str], None]]:
    """What is done now and for how long, on stderr; only a line each where that is no terminal.

    hint: says before a compilation that there is a shorter way.
    """
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    def line(doing: str) -> str:
        shorter = hint and doing.startswith("compiling")
        return f"{doing}; --nocompile has the model's figures in seconds" if shorter else doing

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda doing: print(f"diffjax plan: {line(doing)}", file=sys.stderr, flush=True)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda doing: bar.update(task, description=line(doing))


def _separate(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """argv without --config=NAME, and that name: its fields are flags."""
    rest, name = [argv[0]], None
    arguments = iter(argv[1:])
    for argument in arguments:
        key, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and key == "config":
            name = value if equals else next(arguments, None)
        else:
            rest.append(argument)
    return rest, name


def axes(text: str) -> dict[str, int]:
    """Reads "data:64,fsdp:4". Raises RunError."""
    found: dict[str, int] = {}
    for part in text.split(","):
        name, colon, size = part.strip().partition(":")
        if not (colon and size.isdecimal()) or name in found:
            raise RunError(f"--mesh takes axes and sizes, as data:64,fsdp:4; got {text!r}.")
        found[name] = int(size)
    return found


def _show(found: Any) -> None:
    """Prints a plan for a person."""
    from rich.console import Console

    console = Console()
    mesh = ", ".join(f"{name} {size}" for name, size in found.axes.items() if size > 1) or "1 chip"
    step = "an update" if found.what == "train" else "drawing a batch"
    console.print(
        f"{found.chip.name}: {mesh}; {step} of {found.batch_size:,} images, "
        f"{found.parameters.value:,} parameters"
    )
    for table in (_memory(found), _work(found), _collectives(found)):
        console.print(table)
    limit = found.chip.memory
    verdict = "fits" if found.fits else "does NOT fit"
    console.print(
        f"It {verdict}: {_bytes(found.total.value)} ({found.total.how}) of {_bytes(limit)}."
    )
    if found.changes:
        console.print(_changes(found))
    if found.scaling:
        console.print(_scaling(found))
    for note in found.notes:
        console.print(f"Note: {note}")
    console.print("Chip: " + "; ".join(found.chip.sources))


def _table(title: str, *columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def _memory(found: Any) -> Any:
    table = _table("memory of a device", "what", "bytes", "how")
    for name, figure in found.memory.items():
        table.add_row(name, _bytes(figure.value), figure.how)
    return table


def _work(found: Any) -> Any:
    table = _table("work of a device in a step", "what", "value", "how")
    for figure in found.flops:
        table.add_row("FLOPs", f"{figure.value:.4g}", figure.how)
    table.add_row("memory traffic", _bytes(found.traffic.value), found.traffic.how)
    table.add_row("FLOPs a byte", f"{found.intensity.value:.1f}", found.intensity.how)
    for name, figure in found.seconds.items():
        table.add_row(_SECONDS[name], f"{1e3 * figure.value:.3f} ms", figure.how)
    table.add_row("MFU, at best", f"{found.mfu.value:.1%}", found.mfu.how)
    rate = found.images_per_second
    table.add_row("images/s, at best", f"{rate.value:,.0f}", rate.how)
    return table


_SECONDS = {
    "arithmetic": "time of arithmetic alone",
    "memory": "time of memory alone",
    "operations": "time of the operations",
    "links": "time of the links",
    "best": "step, links hidden",
    "worst": "step, links waited for",
}


def _collectives(found: Any) -> Any:
    table = _table("collectives of a step", "kind", "devices", "runs", "bytes", "how")
    for c, how in found.collectives:
        table.add_row(c.kind, str(c.devices), str(c.runs), _bytes(c.bytes), how)
    return table


def _changes(found: Any) -> Any:
    table = _table("what would help, each alone", "change", "bytes", "step", "fits")
    for change in found.changes:
        fits = "yes" if change.fits else "no"
        seconds = f"{1e3 * change.seconds.value:.3f} ms"
        table.add_row(change.what, _bytes(change.memory.value), seconds, fits)
    return table


def _scaling(found: Any) -> Any:
    columns = ("chips", "batch", "links", "step", "links waited for", "images/s", "MFU")
    table = _table("weak scaling (model): the same batch a device", *columns)
    for row in found.scaling:
        times = (f"{1e3 * t:.3f} ms" for t in (row.links, row.best, row.worst))
        rest = (f"{row.images_per_second:,.0f}", f"{row.mfu:.1%}")
        table.add_row(f"{row.chips:,}", f"{row.batch_size:,}", *times, *rest)
    return table


def _bytes(value: float) -> str:
    """Bytes in powers of ten, as the makers of chips count."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:,.0f} B" if unit == "B" else f"{value:,.3g} {unit}"
