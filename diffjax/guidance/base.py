"""What a guide is: a denoiser in, a denoiser out.

A guide is any callable of one denoiser. What it returns is a frozen pytree with the face of a
denoiser, so one compilation serves all its numbers:

    (x_t, t) -> Prediction       one stage of a solver, whatever it asks inside
    take(index)                  the same for some of the samples: per-sample leaves live in `cond`
    check_times(times)           raises where a grid asks for a time that it cannot serve
    evaluations                  how many networks a call asks; without it, one

A guide that holds something for each sample (labels) has a `take` of its own.
"""

from collections.abc import Callable

from diffjax.core.types import DenoiseFn

Guide = Callable[[DenoiseFn], DenoiseFn]
