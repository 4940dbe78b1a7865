"""A dry run for a pod: `plan(config, chip, mesh)`, from a laptop and without the chips.

Every figure says how it was got:

    exact               from shapes and shardings
    model               from the program's jaxpr and the table of chips: `estimate`, `roofline`
    compiled:<backend>  from XLA's program for one device of the mesh: `ahead`, `programs`

A figure of `compiled:cpu` is that of another compiler than the chip's: it pads nothing, computes in
float32 what a chip does in bfloat16, and makes an all-reduce of what is a reduce-scatter there.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from diffjax import builders
from diffjax.runs import ahead, dryrun, roofline
from diffjax.runs.ahead import Compiled, Refused
from diffjax.runs.chips import CHIPS, Chip
from diffjax.runs.dryrun import Axes, What
from diffjax.runs.estimate import Estimate, estimate
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
    it `fits` where it is at most USABLE of the chip's, and no compiler refuses it. flops: by how
    they were counted. traffic: bytes of memory read and written; intensity: FLOPs a byte.
    collectives: with how they were got. seconds: see `roofline.Times`. images_per_second: of the
    whole mesh. changes: where it does not fit. notes: what to know of these figures.
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
    say: Callable[[str], None] = lambda line: None,
) -> Plan:
    """What a config needs on a mesh of chips.

    device: a name in `chips.CHIPS`. mesh: sizes along "data", "fsdp" and "tensor"; those left out
    are 1. None for config.mesh, with 1 for its -1. what: "train" or "sample". batch_size: of the
    whole mesh; the config's by default. compile: False for the model alone, in seconds. scales:
    numbers of chips for a table of weak scaling. say: called with what is done next.

    Raises RunError for an unknown device or mesh, ValueError or BuildError for a batch or a rule
    that does not fit the mesh.
    """
    chip, axes = _chip(device), _axes(config, mesh)
    if what not in ("train", "sample"):
        raise RunError(f"A plan is of 'train' or 'sample'; got {what!r}.")
    config = _prepared(config, what, axes, batch_size)
    say("tracing")
    found = estimate(config, what, axes)
    program: Compiled | Refused | None = None
    if compile:
        one = _changed(config, "training", n_jitted_steps=1)
        program = ahead.compile_for(one, what, axes, chip.name, say)
    refused = isinstance(program, Refused)
    compiled = None if isinstance(program, Refused) else program
    links = roofline.link_seconds(chip, _timed(found, compiled, axes))
    times = roofline.times(chip, found.work, found.traffic, links)
    memory, total = _memory(found, program)
    fits = total.value <= USABLE * chip.memory and not refused
    flops = [Figure(found.work.flops, MODEL)]
    if compiled is not None and not math.isnan(compiled.flops):
        flops.append(Figure(compiled.flops, _label(compiled)))
    traffic = found.work.traffic + found.traffic
    if not fits:
        say("looking for what would fit")
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
        changes=()
        if fits
        else tuple(_changes(config, what, chip, axes, total.value / found.total)),
        scaling=tuple(scaling(found, chip, axes, scales)),
        notes=tuple(_notes(found, program, what, axes)),
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
        links = roofline.link_seconds(chip, found.collectives_on(wide))
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


def _label(program: Compiled | Refused) -> str:
    return f"compiled:{program.backend}"


def _memory(
    found: Estimate, program: Compiled | Refused | None
) -> tuple[dict[str, Figure], Figure]:
    """Bytes by what they hold; and in all, of model and compiled program the larger."""
    memory = {name: Figure(size, EXACT) for name, size in found.state.items()}
    memory["batch"] = Figure(found.batch, EXACT)
    memory["temporaries"] = Figure(found.temporaries, MODEL)
    total = Figure(found.total, MODEL)
    if program is None:
        return memory, total
    how = _label(program)
    if isinstance(program, Refused):
        memory["all, refused"] = Figure(program.needed, how)
        return memory, max(total, memory["all, refused"], key=lambda figure: figure.value)
    seen = program.memory
    memory["temporaries, compiled"] = Figure(seen.temporaries, how)
    memory["arguments, compiled"] = Figure(seen.arguments, how)  # padded, on some chips
    # On a CPU the host's memory is the device's.
    held = seen.held - (found.host if program.backend == "cpu" else 0)
    return memory, max(total, Figure(held, how), key=lambda figure: figure.value)


def _timed(found: Estimate, compiled: Compiled | None, axes: Axes) -> tuple[Collective, ...]:
    """The collectives that a step is timed with: those of the chip's own compiler, if any."""
    own = compiled is not None and compiled.backend != "cpu" and compiled.axes == dict(axes)
    return compiled.collectives if compiled is not None and own else found.collectives


def _collectives(found: Estimate, compiled: Compiled | None) -> tuple[tuple[Collective, str], ...]:
    modelled = tuple((c, MODEL) for c in found.collectives)
    seen = () if compiled is None else compiled.collectives
    return modelled + tuple((c, _label(compiled)) for c in seen if compiled is not None)


def _changes(config: Any, what: What, chip: Chip, axes: Axes, excess: float) -> Iterator[Change]:
    """What would help, each alone. Of a number the least that fits, else the most.

    excess: what the program as it is needs over the model's figure; the others are taken to need
    as much over theirs.
    """
    tried: dict[str, Change] = {}
    for name, changed, mesh in _options(config, what, axes):
        if name in tried and tried[name].fits:
            continue
        try:
            found = estimate(changed[1], what, mesh)
            links = roofline.link_seconds(chip, found.collectives)
        except ValueError:
            continue
        total = excess * found.total
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


def _notes(
    found: Estimate, program: Compiled | Refused | None, what: What, axes: Axes
) -> Iterator[str]:
    if found.host:
        yield (
            f"The averages, {found.host / 1e9:.3g} GB a device, are in the host's memory; each "
            "update moves them to the device and back, and that time is not counted here."
        )
    if found.work.endless:
        yield "The program has a loop of unknown length: its body is counted once."
    if program is None:
        yield (
            "Compilers allot 0.7 to 1.4 times the model's temporaries, and may move weights and "
            "gradients in the network's type, where the model has float32."
        )
        if axes["fsdp"] > 1:
            yield (
                "With fsdp they may fetch weights ahead and sum gradients late: 3 times the "
                "model's temporaries for DiT-XL/2 with remat and without a loop over its blocks."
            )
        return
    if isinstance(program, Refused):
        yield (
            f"The compiler for {program.backend} refuses the program: it needs "
            f"{program.needed / 1e9:.4g} GB where {program.available / 1e9:.4g} GB are a program's."
        )
    elif program.note:
        yield program.note
    if program.axes != dict(axes):
        devices = math.prod(program.axes.values())
        yield (
            f"Compiled for {devices} devices ({_as_flag(program.axes)}) at the same batch a "
            "device: what is compiled is that mesh's, and its collectives have fewer devices."
        )
    if program.backend == "cpu":
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
