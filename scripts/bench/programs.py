"""What an accelerator's compiler makes of a config's step or sampler, without the accelerator.

    python scripts/bench/programs.py vp/cifar10_ddpmpp_continuous --chip v5e:2x2
    python scripts/bench/programs.py ve/cifar10_ncsnpp_continuous --target h200.txtpb --batch 128
    python scripts/bench/programs.py edm/cifar10_uncond_vp --hlo step.txt --set model.nf=64

A TPU's compiler comes with libtpu; --chip names a slice of a pod, of which one chip is used. That
of an NVIDIA GPU comes with the package jax-cuda12-plugin; --target is XLA's description of the card
as text, such as xla/backends/gpu/target_config/specs/h200.txtpb of its repository (fields that the
installed version does not know must be left out). Without the card XLA cannot time the algorithms
of convolutions and takes its defaults: which kernels a GPU runs is not told, which arrays they read
and write is.

It prints JSON lines. The first is the whole: `bytes` that all instructions read and write, were
each to go to memory (of an operand that is only sliced, the slices), the temporary memory, and
`wide_products`, the convolutions and dots with a float32 operand that is no small matrix. Then a
line for each kind of instruction, and one for each group of like instructions that moves more than
a hundredth of the bytes.
"""

import argparse
import ast
import collections
import json
import os
import re
import time
from pathlib import Path

from jax.experimental import topologies

from diffjax.runs import dryrun, programs
from diffjax.runs.workdir import load_config
from diffjax.train.mesh import make_mesh

FREE = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "iota", "after-all")
SLICES = ("slice", "dynamic-slice", "gather")
PRODUCT = re.compile(r"(?:convolution|dot)\(|__cudnn\$conv|__cublas")
SMALL = 2**20  # elements of a matrix below which float32 does not matter


class Instruction:
    """A line of HLO. type: its result's; tail: the text behind the operands."""

    def __init__(self, line):
        self.name, rest = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$", line).groups()
        end = _closing(rest) if rest.startswith("(") else rest.index(" ")
        self.type, rest = rest[:end], rest[end:].lstrip()
        self.kind, _, rest = rest.partition("(")
        end = _closing("(" + rest) - 2
        self.literal = rest[:end]
        self.operands = re.findall(r"%([\w.\-]+)", rest[:end])
        self.tail = rest[end + 1 :]

    @property
    def bytes(self):
        return sum(programs.shape_bytes(self.type))

    @property
    def called(self):
        found = re.search(r"calls=%?([\w.\-]+)", self.tail)
        return found and found[1]


def _closing(text):
    """The place behind the bracket that closes the first one."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return i + 1
    raise ValueError(text)


def modules(text):
    """The instructions of each computation by its name, and the entry's name."""
    found, entry, current = {}, None, None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            current = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and " = " in line:
            current.append(Instruction(line))
    return found, entry


def reads(instruction, sizes, bodies):
    """The bytes that an instruction reads of its operands."""
    whole = {name: sizes[name] for name in instruction.operands if name in sizes}
    for inner in bodies.get(instruction.called, ()):
        if inner.kind != "parameter":
            continue
        users = [i for i in bodies[instruction.called] if inner.name in i.operands]
        if users and all(user.kind in SLICES for user in users):
            name = instruction.operands[int(inner.literal)]
            whole[name] = min(whole[name], sum(user.bytes for user in users))
    return sum(whole.values())


def kind_of(instruction, bodies):
    """The kind of an instruction, of a fusion with what it holds."""
    target = re.search(r'custom_call_target="([^"]*)"', instruction.tail)
    if target:
        return target[1]
    if instruction.kind != "fusion":
        return instruction.kind
    held = [inner.kind for inner in bodies[instruction.called]]
    marks = [k for k in ("convolution", "dot", "reduce", "transpose", "copy") if k in held]
    if held.count("shift-right-logical") > 8:
        marks.append("random bits")
    return "fusion: " + (", ".join(marks) or "element by element")


def shape(type_text):
    """A type without its layout."""
    return re.sub(r"\{[^}]*\}|/\*.*?\*/", "", type_text)


def wide_products(bodies):
    """The convolutions and dots with a large float32 operand."""
    found = collections.Counter()
    for body in bodies.values():
        types = {i.name: i.type for i in body}
        for i in body:
            if not PRODUCT.match(i.kind + "(") and not PRODUCT.search(i.tail):
                continue
            operands = [shape(types.get(name, "")) for name in i.operands[:2]]
            wide = [t for t in operands if t.startswith("f32")]
            if any(programs.shape_bytes(t)[0] >= 4 * SMALL for t in wide):
                found[" x ".join(operands)] += 1
    return found


def report(compiled, images):
    """The lines of a compiled program, largest first."""
    bodies, entry = modules(compiled.as_text())
    sizes = {i.name: i.bytes for i in bodies[entry]}
    types = {i.name: i.type for i in bodies[entry]}
    kinds, groups = collections.Counter(), collections.Counter()
    counts = collections.Counter()
    for i in bodies[entry]:
        if i.kind in FREE or i.kind.endswith("-done"):
            continue
        kind = kind_of(i, bodies)
        moved = i.bytes + reads(i, sizes, bodies)
        group = (kind, shape(i.type), tuple(shape(types.get(n, "")) for n in i.operands))
        for key in (kind, group):
            counts[key] += 1
        kinds[kind] += moved
        groups[group] += moved
    total = sum(kinds.values())
    temporary = compiled.memory_analysis().temp_size_in_bytes
    yield {
        "bytes": total,
        "temp_gb": round(temporary / 1e9, 3),
        "temp_mb_per_image": round(temporary / 1e6 / images, 2),
        "wide_products": wide_products(bodies),
    }
    for kind, moved in kinds.most_common():
        yield {"kind": kind, "count": counts[kind], "gb": round(moved / 1e9, 3)}
    for group, moved in groups.most_common():
        if moved > total / 100:
            kind, result, operands = group
            line = {"kind": kind, "count": counts[group], "gb": round(moved / 1e9, 3)}
            yield line | {"result": result, "operands": operands}


def devices(args):
    """The described device to compile for."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    if args.target is None:
        return topologies.get_topology_desc(platform="tpu", topology_name=args.chip).devices[:1]
    text = Path(args.target).read_text(encoding="utf-8")
    return topologies.get_topology_desc(
        platform="cuda", topology_name="1x1x1", topology="1x1x1", target_config=text
    ).devices


def changed(config, settings):
    """The config with the fields of `section.field=value`."""
    for setting in settings:
        path, _, value = setting.partition("=")
        *sections, field = path.split(".")
        node = config
        for section in sections:
            node = node[section]
        try:
            node[field] = ast.literal_eval(value)
        except ValueError:
            node[field] = value
    return config


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("--what", default="train", choices=["train", "sample"])
    parser.add_argument("--chip", default="v5e:2x2", help="a TPU slice, as libtpu names it")
    parser.add_argument("--target", help="file with XLA's description of a GPU")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--set", nargs="*", default=[], help="section.field=value ...")
    parser.add_argument("--hlo", help="file for the optimised program")
    args = parser.parse_args()

    config = load_config(args.config)
    config.training.n_jitted_steps = 1
    config.model.dtype = args.dtype
    config = dryrun.with_batch(changed(config, args.set), args.what, args.batch)
    mesh = make_mesh(devices(args), data=1, fsdp=1, tensor=1)
    lowered = dryrun.lower(config, args.what, mesh)
    began = time.perf_counter()
    # Without the card there is nothing to time algorithms on.
    options = {"xla_gpu_autotune_level": 0} if args.target else None
    compiled = lowered.compile(compiler_options=options)
    seconds = round(time.perf_counter() - began, 1)
    if args.hlo:
        Path(args.hlo).write_text(compiled.as_text(), encoding="utf-8")
    for i, line in enumerate(report(compiled, args.batch)):
        if i == 0:
            line = {"config": args.config, "what": args.what, "compile_s": seconds} | line
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
