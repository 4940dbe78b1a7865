"""A program of `dryrun` compiled ahead of time, for devices that need not exist.

In this order: for a slice of a TPU pod, by libtpu's description of it where libtpu is installed;
for the devices of this process, where they suffice; for simulated CPU devices. There are at most
`SIMULATED` of these; a larger mesh is compiled with fewer devices along "data", then "fsdp", at the
same batch a device, so that what a device does stays as it is.

The first and the last are the work of another process: libtpu may be loaded there beside a job that
has the chips, and the number of simulated devices is fixed when a process starts.
"""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from diffjax.runs import dryrun, programs
from diffjax.runs.dryrun import Axes, What
from diffjax.runs.workdir import RunError, plain

SIMULATED = 64

# What libtpu calls the chips, and the dimensions of their torus.
_TOPOLOGIES = {
    "tpu-v4": ("v4", 3),
    "tpu-v5e": ("v5e", 2),
    "tpu-v5p": ("v5p", 3),
    "tpu-v6e": ("v6e", 2),
}
# libtpu without chips: it asks no metadata server, which only a TPU's host has, and minds no lock.
_NO_CHIPS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_REFUSED = re.compile(r"\(([\d.]+)([KMGT])\) exceeds available \w+ \(([\d.]+)([KMGT])\)")
_USED = re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT])")  # as older compilers have it
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Compiled(NamedTuple):
    """What one device of a compiled program does. axes: of the mesh that it was compiled for.

    note: why it was not compiled for a chip that this compiler knows.
    """

    backend: str
    axes: dict[str, int]
    memory: programs.Memory
    flops: float
    instructions: int
    collectives: tuple[programs.Collective, ...]
    note: str = ""


class Refused(NamedTuple):
    """A program that the compiler finds too large: bytes in all, and those that a program gets."""

    backend: str
    axes: dict[str, int]
    needed: float
    available: float


class _Unknown(Exception):
    """A slice that libtpu does not know."""


def compile_for(
    config: Any, what: What, axes: Axes, chip: str, say: Callable[[str], None] = lambda line: None
) -> Compiled | Refused:
    """Compiles the program for a mesh, where and how the module's docstring says.

    axes: sizes along "data", "fsdp" and "tensor". chip: a name in `chips.CHIPS`. say: called with
    what is done next. Raises RunError where compiling fails.
    """
    devices, note = math.prod(axes.values()), ""
    if chip in _TOPOLOGIES and importlib.util.find_spec("libtpu") is not None:
        say(f"compiling for {devices} chips of {chip}")
        try:
            return _compile_elsewhere(config, what, axes, chip)
        except _Unknown as error:
            note = f"libtpu knows no slice of {devices} chips of {chip}: {error}"
    if len(jax.devices()) >= devices:
        say(f"compiling for {devices} of this process's devices")
        found = compile_on(jax.devices(), config, what, axes)
    else:
        small = shrunk(axes)
        say(f"compiling for {math.prod(small.values())} simulated CPU devices")
        rows = dryrun.batch_size(config, what) // (axes["data"] * axes["fsdp"])
        rows *= small["data"] * small["fsdp"]
        found = _compile_elsewhere(dryrun.with_batch(config, what, rows), what, small)
    return found._replace(note=note) if isinstance(found, Compiled) else found


def shrunk(axes: Axes, limit: int = SIMULATED) -> dict[str, int]:
    """A mesh of at most `limit` devices: fewer along "data", then "fsdp", then "tensor"."""
    small = dict(axes)
    for name in ("data", "fsdp", "tensor"):
        while math.prod(small.values()) > limit and small[name] > 1:
            small[name] = next(
                (n for n in range(small[name] // 2, 1, -1) if small[name] % n == 0), 1
            )
    return small


def compile_on(devices: Any, config: Any, what: What, axes: Axes) -> Compiled | Refused:
    """Compiles the program for some of these devices, which need not exist."""
    from diffjax.train.mesh import make_mesh

    mesh = make_mesh(devices, **axes)
    lowered = dryrun.lower(config, what, mesh)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return refusal(str(error), devices[0].platform, axes)
    text = compiled.as_text()
    return Compiled(
        devices[0].platform,
        dict(axes),
        programs.memory(compiled),
        programs.flops(compiled),
        programs.instructions(text),
        programs.collectives(text, mesh.size),
    )


def refusal(message: str, backend: str, axes: Axes) -> Refused:
    """What a compiler's error says of memory. Raises RunError for an error of another kind."""
    found = _REFUSED.search(message) or _USED.search(message)
    if "RESOURCE_EXHAUSTED" not in message or found is None:
        raise RunError(f"The compiler for {backend} failed: {message.strip().splitlines()[0]}")
    needed, unit, available, other = found.groups()
    return Refused(
        backend, dict(axes), float(needed) * _UNITS[unit], float(available) * _UNITS[other]
    )


def _slice(chip: str, devices: int) -> Any:
    """The devices of a slice of a TPU pod. Raises _Unknown where libtpu does not know it."""
    from jax.experimental import topologies

    name, dimensions = _TOPOLOGIES[chip]
    shape = torus(devices, dimensions)
    options: dict[str, Any] = {"topology_name": f"{name}:{'x'.join(map(str, shape))}"}
    if devices < 4:  # less than a host of 2 x 2 chips
        options["chips_per_host_bounds"] = (*shape, 1)[:3]
    if name == "v4":
        options["chip_config_name"] = "megacore"  # its two cores as one device
    try:
        return topologies.get_topology_desc(platform="tpu", **options).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise _Unknown(str(error).strip().splitlines()[0]) from error


def torus(chips: int, dimensions: int) -> tuple[int, ...]:
    """The most even shape of so many chips, largest side first: 32 in three are 4 x 4 x 2."""
    if dimensions == 1:
        return (chips,)
    ideal = round(chips ** (1 / dimensions))
    side = max(n for n in range(1, ideal + 1) if chips % n == 0)
    return tuple(sorted((side, *torus(chips // side, dimensions - 1)), reverse=True))


def _compile_elsewhere(
    config: Any, what: What, axes: Axes, chip: str | None = None
) -> Compiled | Refused:
    """Compiles in a process of its own: for a slice of chips, or for simulated CPU devices."""
    count = math.prod(axes.values())
    # libtpu ends the process at a flag of other backends.
    others = "device_count" if chip is None else "device_count|xla_cpu|xla_gpu"
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if not re.search(others, f)]
    if chip is None:
        flags.append(f"--xla_force_host_platform_device_count={count}")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
    environment |= {} if chip is None else _NO_CHIPS
    request = {"config": plain(config), "what": what, "axes": dict(axes), "chip": chip}
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-m", "diffjax.runs.ahead", str(asked), str(answer)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            where = "simulated devices" if chip is None else f"chips of {chip}"
            raise RunError(
                f"Compiling for {count} {where} failed: {lines[-1]} Use --nocompile for the "
                "figures of the model alone."
            )
        return from_json(json.loads(answer.read_text(encoding="utf-8")))


def to_json(found: Compiled | Refused) -> dict[str, Any]:
    """Plain values; `from_json` makes them what they were again."""
    if isinstance(found, Refused):
        return found._asdict()
    return found._asdict() | {
        "memory": found.memory._asdict(),
        "collectives": [c._asdict() for c in found.collectives],
        "flops": None if math.isnan(found.flops) else found.flops,
    }


def from_json(found: Mapping[str, Any]) -> Compiled | Refused:
    """What `to_json` wrote. Raises _Unknown where it says so."""
    if "unknown" in found:
        raise _Unknown(found["unknown"])
    if "needed" in found:
        return Refused(**found)
    rebuilt = {
        "memory": programs.Memory(**found["memory"]),
        "flops": math.nan if found["flops"] is None else found["flops"],
        "collectives": tuple(programs.Collective(**c) for c in found["collectives"]),
    }
    return Compiled(**{**found, **rebuilt})


def _main(asked: str, answer: str) -> None:
    request = json.loads(Path(asked).read_text(encoding="utf-8"))
    axes, chip = request["axes"], request["chip"]
    try:
        devices = jax.devices() if chip is None else _slice(chip, math.prod(axes.values()))
        config = ConfigDict(request["config"])
        found = to_json(compile_on(devices, config, request["what"], axes))
    except _Unknown as error:
        found = {"unknown": str(error)}
    Path(answer).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    _main(*sys.argv[1:])
