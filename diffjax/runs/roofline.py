"""The least time of a step on a chip: arithmetic, memory, links.

Symbols: an operation has f FLOPs and moves b bytes; the chip does P FLOP/s and moves W bytes/s of
its memory. A collective has a payload of p bytes on each of n devices, as `programs` counts it; a
chip sends L bytes/s to the others of its domain (a slice of a TPU pod, the GPUs behind one NVLink
switch) and N bytes/s beyond.

    time of the operations    sum_i max(f_i / P, b_i / W)                                     (1)
    time of a collective      c (n - 1) / n  p / L                      within a domain       (2)
                              c (m - 1) / m  p / L  +  c (k - 1) / k  (p / m) / N   over k    (3)
    c = 2 for an all-reduce, which is a reduce-scatter and an all-gather; else 1

(2) is that of a ring, which no algorithm beats; in (3) k domains with m devices each first reduce
within, and then each device exchanges its m-th part with those of the same place in the others.
Latencies are left out: small payloads take longer.

At best the links work while the chip computes, and a step takes the longer of the two; at worst
they take turns. MFU is FLOPs / (time P), with P the peak in bfloat16 whatever the dtype.

Reference: Williams, Waterman, Patterson, "Roofline: an insightful visual performance model for
multicore architectures", 2009, https://doi.org/10.1145/1498765.1498785; Patarasuk, Yuan,
"Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009,
https://doi.org/10.1016/j.jpdc.2008.09.002.
"""

from collections.abc import Iterable
from typing import NamedTuple

from diffjax.runs.chips import Chip
from diffjax.runs.counting import Work
from diffjax.runs.programs import Collective
from diffjax.runs.workdir import RunError


class Times(NamedTuple):
    """Seconds of a step: (1) and how much of it is arithmetic or memory alone, and (2) or (3)."""

    operations: float
    arithmetic: float
    memory: float
    links: float

    @property
    def best(self) -> float:
        """The links' work hidden behind the operations."""
        return max(self.operations, self.links)

    @property
    def worst(self) -> float:
        """One after the other."""
        return self.operations + self.links


def times(chip: Chip, work: Work, traffic: float, links: float) -> Times:
    """The time of a step of one device.

    work: of that device. traffic: bytes moved beside it, such as the optimizer's. links: seconds.
    """
    narrow = ("bfloat16", "float16")
    each = [(op, chip.bfloat16 if op.dtype in narrow else chip.float32) for op in work.operations]
    beside = traffic / chip.bandwidth
    return Times(
        sum(op.times * max(op.flops / r, op.traffic / chip.bandwidth) for op, r in each) + beside,
        sum(op.times * op.flops / rate for op, rate in each),
        work.traffic / chip.bandwidth + beside,
        links,
    )


def link_seconds(chip: Chip, collectives: Iterable[Collective]) -> float:
    """The time of collectives one after the other."""
    return sum(seconds(chip, collective) for collective in collectives)


def seconds(chip: Chip, collective: Collective) -> float:
    """The time of a collective, eqs. (2) and (3).

    The domain holds as many of its devices as fit, so far apart. Raises RunError where it leaves
    the domain and the chip's `network` is unknown.
    """
    n, payload, stride = collective.devices, collective.bytes, collective.stride
    factor = 2 if collective.kind == "all-reduce" else 1
    within = min(n, max(1, chip.domain // stride))
    domains = -(-n // within)
    found = factor * (within - 1) / within * payload / chip.link
    if domains == 1:
        return found
    if chip.network is None:
        raise RunError(
            f"{n * stride} chips are more than the {chip.domain} that the links of {chip.name} "
            "join, and there is no figure for the network beyond. Use a smaller mesh or another "
            "--device."
        )
    return found + factor * (domains - 1) / domains * payload / within / chip.network
