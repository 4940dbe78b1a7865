"""`diffjax replay`."""

from collections.abc import Sequence
from pathlib import Path

from absl import flags as absl_flags

from diffjax.cli import flags
from diffjax.runs.workdir import RunError

ABOUT = """diffjax replay: repeat one update of a run and look inside.

  diffjax replay --workdir=W --step=1207

Restores the newest checkpoint before the update and repeats the run up to it, with the same data
and keys. Shows whether the loss is the logged one, which images have a loss that is not finite, and
where a NaN began; <workdir>/replay/<step>.json has the loss of every image and the gradient's norm
of every leaf. The run itself is not changed. A bad update is on record in
<workdir>/diverged/<step>.json."""

LARGEST = 5  # leaves and images that are shown


def run(argv: Sequence[str]) -> int:
    """Parses and replays."""
    return flags.guarded("replay", lambda: _replay(argv))


def _replay(argv: Sequence[str]) -> int:
    values = absl_flags.FlagValues()
    define = flags.Definer(values)
    define.text("workdir", None, "the run")
    define.integer("step", None, "the update, counted from 1")
    define.switch("deterministic", False, "as the run had it")
    if not flags.parse(values, argv, ABOUT):
        return 0
    if values.workdir is None:
        raise RunError("--workdir is missing: the run to repeat an update of.")
    if values.step is None:
        raise RunError("--step is missing: the update to repeat, counted from 1.")
    if values.deterministic:
        flags.make_deterministic()
    flags.enable_compilation_cache()
    if values.deterministic:
        flags.say_deterministic()
    from diffjax.runs.replay import replay

    found = replay(values.workdir, values.step)
    print("\n".join(describe(found, Path(values.workdir))))
    return 0


def describe(found, workdir: Path) -> list[str]:
    """What is shown of a `runs.replay.Replayed`."""
    shown = found.figures if found.alone else found.mean
    whose = "" if found.alone else " (means of its dispatch)"
    lines = [
        f"Step {found.step} again, from checkpoint {found.checkpoint}, batch {found.batch}:",
        *(f"  {name:<10} {value!r}" for name, value in found.figures.items()),
    ]
    if found.equal is None:
        lines.append("  Nothing was logged of this step.")
    elif found.equal:
        lines.append(f"  Equal bit for bit to what was logged{whose}.")
    else:
        pairs = [f"{name} {shown[name]!r}, logged {v!r}" for name, v in found.logged.items()]
        lines.append(f"  Not what was logged{whose}: {'; '.join(pairs)}.")
    bad = found.bad_images()
    for image in bad[:LARGEST]:
        lines.append(f"  {image['loss']} at row {image['row']}: image {image['index']}")
    if len(bad) > LARGEST:
        lines.append(f"  and {len(bad) - LARGEST} more images")
    if found.first_bad is not None:
        lines.append(f"First not finite: {found.first_bad}.")
    if found.origin is not None:
        lines.append(f"First NaN: {found.origin}.")
    lines.append("Largest gradients:")
    # A norm that is not a number comes first.
    order = sorted(found.gradients.items(), key=lambda item: (item[1] == item[1], -item[1]))
    lines += [f"  {norm:<10.4g} {name}" for name, norm in order[:LARGEST]]
    lines.append(f"All of it is in {workdir / 'replay' / f'{found.step}.json'}.")
    return lines
