"""A dry run for a pod: `plan(config, chip, mesh)`, from a laptop and without the chips.

Every figure says how it was got:

    exact               from shapes and shardings
    model               from the program's jaxpr and the table of chips: `estimate`, `roofline`
    compiled:<backend>  from XLA's program for one device of the mesh: `dryrun`, `programs`

A figure of `compiled:cpu` is that of another compiler than the chip's: it pads nothing, computes in
float32 what a chip does in bfloat16, and makes an all-reduce of what is a reduce-scatter there.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from diffjax import builders
from diffjax.runs import dryrun, roofline
from diffjax.runs.chips import CHIPS, Chip
from diffjax.runs.dryrun import Axes, Compiled, What
from diffjax.runs.estimate import Estimate, collectives_at, estimate, link_seconds
from diffjax.runs.programs import Collective
from diffjax.runs.workdir import RunError

EXACT, MODEL = "exact", "model"
USABLE = 0.9  # of a chip's memory; the rest is the runtime's, and lost between arrays
SCALES = (8, 64, 512, 4096)


class Figure(NamedTuple):
    """A number and how it was got."""

    value: float
    how: str


class Change(NamedTuple):
    """What to change where a step does not fit. memory, seconds: bytes and a step's time then."""

    what: str
    memory: Figure
    seconds: Figure
    fits: bool


class Row(NamedTuple):
    """A line of weak scaling: the batch grows with the chips.

    links, best, worst: seconds of a step, as `roofline.Times`. images_per_second, mfu: at best.
    """

    chips: int
    axes: dict[str, int]
    batch_size: int
    links: float
    best: float
    worst: float
    images_per_second: float
    mfu: float


class Plan(NamedTuple):
    """The figures of one device and one step (of "train" an update, of "sample" a batch).

    memory: bytes by what they hold. total: of the model or the compiled program, whichever is more;
    it `fits` where it is at most USABLE of the chip's. flops: by how they were counted. traffic:
    bytes of memory read and written; intensity: FLOPs a byte. collectives: with how they were got.
    seconds: see `roofline.Times`. images_per_second: of the whole mesh. changes: where it does not
    fit. notes: what to know of these figures.
    """

    what: What
    chip: Chip
    axes: dict[str, int]
    batch_size: int
    parameters: Figure
    memory: dict[str, Figure]
    total: Figure
    fits: bool
    flops: tuple[Figure, ...]
    traffic: Figure
    intensity: Figure
    collectives: tuple[tuple[Collective, str], ...]
    seconds: dict[str, Figure]
    mfu: Figure
    images_per_second: Figure
    changes: tuple[Change, ...]
    scaling: tuple[Row, ...]
    notes: tuple[str, ...]


def plan(
    config: Any,
    device: str,
    mesh: Axes | None = None,
    *,
    what: What = "train",
    batch_size: int | None = None,
    compile: bool = True,
    scales: Sequence[int] = (),
) -> Plan:
    """What a config needs on a mesh of chips.

    device: a name in `chips.CHIPS`. mesh: sizes along "data", "fsdp" and "tensor"; those left out
    are 1. None for config.mesh, with 1 for its -1. what: "train" or "sample". batch_size: of the
    whole mesh; the config's by default. compile: False for the model alone, in seconds. scales:
    numbers of chips for a table of weak scaling.

    Raises RunError for an unknown device or mesh, ValueError or BuildError for a batch or a rule
    that does not fit the mesh.
    """
    chip, axes = _chip(device), _axes(config, mesh)
    if what not in ("train", "sample"):
        raise RunError(f"A plan is of 'train' or 'sample'; got {what!r}.")
    config = _prepared(config, what, axes, batch_size)
    found = estimate(config, what, axes)
    compiled = None
    if compile:
        one = _changed(config, "training", n_jitted_steps=1)
        compiled = dryrun.compile_for(one, what, axes, chip.name)
    links = _links(found, compiled, axes)
    times = roofline.times(
        chip, found.work, found.traffic, link_seconds(chip, [c for c, _ in links], axes)
    )
    memory, total = _memory(found, compiled)
    fits = total.value <= USABLE * chip.memory
    flops = [Figure(found.work.flops, MODEL)]
    if compiled is not None and not math.isnan(compiled.flops):
        flops.append(Figure(compiled.flops, _label(compiled)))
    traffic = found.work.traffic + found.traffic
    return Plan(
        what=what,
        chip=chip,
        axes=dict(axes),
        batch_size=found.images,
        parameters=Figure(found.parameters, EXACT),
        memory=memory,
        total=total,
        fits=fits,
        flops=tuple(flops),
        traffic=Figure(traffic, MODEL),
        intensity=Figure(found.work.flops / traffic, MODEL),
        collectives=_collectives(found, compiled),
        seconds={
            name: Figure(getattr(times, name), MODEL)
            for name in ("arithmetic", "memory", "operations", "links", "best", "worst")
        },
        mfu=Figure(found.work.flops / times.best / chip.bfloat16, MODEL),
        images_per_second=Figure(found.images / times.best, MODEL),
        changes=() if fits else tuple(_changes(config, what, chip, axes)),
        scaling=tuple(scaling(found, chip, axes, scales)),
        notes=tuple(_notes(found, compiled, what, axes)),
    )


def scaling(found: Estimate, chip: Chip, axes: Axes, scales: Sequence[int]) -> Iterator[Row]:
    """Rows for numbers of chips: "data" and the batch grow, a device does what it does.

    Raises RunError for a number that "fsdp" and "tensor" do not divide.
    """
    inner = axes["fsdp"] * axes["tensor"]
    for chips in scales:
        if chips % inner:
            raise RunError(f"{chips} chips cannot be shared among fsdp and tensor of {inner}.")
        wide = dict(axes) | {"data": chips // inner}
        links = link_seconds(chip, collectives_at(found, wide), wide)
        times = roofline.times(chip, found.work, found.traffic, links)
        images = found.images // axes["data"] * wide["data"]
        yield Row(
            chips,
            wide,
            images,
            times.links,
            times.best,
            times.worst,
            images / times.best,
            found.work.flops / times.best / chip.bfloat16,
        )


def _chip(device: str) -> Chip:
    if device not in CHIPS:
        raise RunError(f"There are no figures for {device!r}; choose one of {', '.join(CHIPS)}.")
    return CHIPS[device]


def _axes(config: Any, mesh: Axes | None) -> dict[str, int]:
    from diffjax.train.mesh import AXES

    given = dict(config.get("mesh", {})) if mesh is None else dict(mesh)
    if mesh is not None and (unknown := given.keys() - set(AXES)):
        raise RunError(f"A mesh has the axes {', '.join(AXES)}; got {', '.join(sorted(unknown))}.")
    axes = {name: int(given.get(name, 1)) for name in AXES}
    if mesh is None:
        axes = {name: 1 if size == -1 else size for name, size in axes.items()}
    if bad := {name: size for name, size in axes.items() if size < 1}:
        raise RunError(f"The sizes of a mesh must be at least 1; got {bad}.")
    return axes


def _prepared(config: Any, what: What, axes: Axes, batch_size: int | None) -> Any:
    """The config with the batch asked for, and without a mesh that these devices do not have."""
    if batch_size is not None:
        config = dryrun.with_batch(config, what, batch_size)
    if "mesh" in config:
        config = _changed(config, "mesh", **axes)
    return config


def _label(compiled: Compiled) -> str:
    return f"compiled:{compiled.backend}"


def _memory(found: Estimate, compiled: Compiled | None) -> tuple[dict[str, Figure], Figure]:
    """Bytes by what they hold; and in all, of model and compiled program the larger."""
    memory = {name: Figure(size, EXACT) for name, size in found.state.items()}
    memory["batch"] = Figure(found.batch, EXACT)
    memory["temporaries"] = Figure(found.temporaries, MODEL)
    total = Figure(found.total, MODEL)
    if compiled is None:
        return memory, total
    how, seen = _label(compiled), compiled.memory
    memory["temporaries, compiled"] = Figure(seen.temporaries, how)
    memory["arguments, compiled"] = Figure(seen.arguments, how)  # padded, on some chips
    held = seen.arguments + seen.results - seen.aliased + seen.temporaries
    return memory, max(total, Figure(held, how), key=lambda figure: figure.value)


def _links(
    found: Estimate, compiled: Compiled | None, axes: Axes
) -> tuple[tuple[Collective, str], ...]:
    """The collectives that a step is timed with: the compiled ones where the model lacks some."""
    modelled = tuple((c, MODEL) for c in found.collectives)
    whole = compiled is not None and compiled.axes == dict(axes)
    if compiled is None or not whole or (compiled.backend == "cpu" and axes["tensor"] == 1):
        return modelled
    return tuple((c, _label(compiled)) for c in compiled.collectives)


def _collectives(found: Estimate, compiled: Compiled | None) -> tuple[tuple[Collective, str], ...]:
    modelled = tuple((c, MODEL) for c in found.collectives)
    seen = () if compiled is None else compiled.collectives
    return modelled + tuple((c, _label(compiled)) for c in seen if compiled is not None)


def _changes(config: Any, what: What, chip: Chip, axes: Axes) -> Iterator[Change]:
    """What would help, each alone, by the model. Of a number the least that fits, else the most."""
    tried: dict[str, Change] = {}
    for name, changed, mesh in _options(config, what, axes):
        if name in tried and tried[name].fits:
            continue
        try:
            found = estimate(changed[1], what, mesh)
            links = link_seconds(chip, found.collectives, mesh)
        except ValueError:
            continue
        total = found.total
        best = roofline.times(chip, found.work, found.traffic, links).best
        fits = total <= USABLE * chip.memory
        tried[name] = Change(changed[0], Figure(total, MODEL), Figure(best, MODEL), fits)
    yield from tried.values()


def _options(
    config: Any, what: What, axes: Axes
) -> Iterator[tuple[str, tuple[str, Any], dict[str, int]]]:
    """(kind of change, (as flags, the config), the mesh), from the smallest to the largest."""
    same, size = dict(axes), dryrun.batch_size(config, what)
    slices = axes["data"] * axes["fsdp"]
    remat = _changed(config, "model", remat=True)
    net = builders.build_parts(config).net
    if what == "train" and getattr(net, "remat", None) is False:
        yield "remat", ("--config.model.remat=True", remat), same
    if what == "train":
        for n in _doublings(2 * config.training.get("accumulate", 1), size // slices):
            changed = _changed(config, "training", accumulate=n)
            yield "accumulate", (f"--config.training.accumulate={n}", changed), same
        for n in _doublings(2 * axes["fsdp"], slices):
            if slices % n == 0:
                mesh = same | {"fsdp": n, "data": slices // n}
                yield "fsdp", (_as_flag(mesh), config), mesh
    field = "--config.training.batch_size" if what == "train" else "--config.eval.batch_size"
    for n in _doublings(2, size // slices):
        changed = dryrun.with_batch(config, what, size // n)
        yield "batch", (f"{field}={size // n}", changed), same


def _as_flag(axes: Mapping[str, int]) -> str:
    return "--mesh=" + ",".join(f"{name}:{size}" for name, size in axes.items() if size > 1)


def _doublings(first: int, limit: int) -> Iterator[int]:
    while first <= limit:
        yield first
        first *= 2


def _changed(config: Any, section: str, **fields: Any) -> Any:
    config = copy.deepcopy(config)
    with config.unlocked():
        config[section].update(fields)
    return config


def _notes(found: Estimate, compiled: Compiled | None, what: What, axes: Axes) -> Iterator[str]:
    if found.state.get("averages") == 0:
        yield "The averages are in the host's memory, which is not counted here."
    if found.work.endless:
        yield "The program has a loop of unknown length: its body is counted once."
    if axes["tensor"] > 1:
        yield "The model splits no activations over tensor, and has no sums over it."
        if what == "sample":
            yield "Sampling keeps whole parameters on every device."
    if compiled is not None and compiled.axes != dict(axes):
        devices = math.prod(compiled.axes.values())
        yield (
            f"Compiled for {devices} devices ({_as_flag(compiled.axes)}) at the same batch a "
            "device: what is compiled is that mesh's, and its collectives have fewer devices."
        )
    if compiled is not None and compiled.backend == "cpu":
        yield "Compiled by XLA for CPU, which computes in float32 and forms no reduce-scatter."


def to_json(found: Plan) -> dict[str, Any]:
    """A plan as plain values: figures as {"value", "how"}."""

    def plain(value: Any) -> Any:
        if hasattr(value, "_asdict"):
            return plain(value._asdict())
        if isinstance(value, Mapping):
            return {key: plain(inner) for key, inner in value.items()}
        return [plain(inner) for inner in value] if isinstance(value, tuple) else value

    flat = [{**c._asdict(), "how": how} for c, how in found.collectives]
    return plain(found._replace(collectives=())) | {"collectives": flat}
