r"""Do imported weights denoise? And if not: under which convention would they?

A network that is asked in the wrong way (noise for data, a sign, a time for a noise level) still
returns numbers, and they look like a bad model. Here they are held against what any trained
denoiser reaches.

Symbols: x0 data of second moment r^2 an element, x_t = alpha x0 + sigma eps; eps^, x0^ the
estimates.

    (1)  error(t) = mean (eps^ - eps)^2
    (2)  bound(t) = alpha^2 r^2 / (alpha^2 r^2 + sigma^2)
    (3)  slope(t) = mean (eps^ eps) / mean eps^^2,  and the same of x0^

(2) is the error of the best estimate proportional to x_t. The mean of eps given x_t is the best of
all estimates, so a network that is near it has error <= bound at every noise level. Its error is
uncorrelated with it, so (3) is 1: an estimate for another noise level than the true one is too
large or too small, which (1) hardly shows where x_t itself is a good estimate. Weights pass where
error <= 2 bound throughout, and both slopes lie within 1.4 of 1 where sigma <= 3 alpha: at more
noise a few images do not determine that of x0^. Somewhere the error must be <= 0.9 bound: networks
of kind v or F that have learnt nothing return small numbers, and these mean the linear estimate.

Without data x0 = 0 and r = 1 stand in, at high noise only, where the estimate hardly depends on
the image: then eps^ must be nearly x_t / sigma.

Weights that fail are asked again under other conventions: all kinds of output, time labels and
input scales that published codes use. Those that pass, the nearest to the configured one first,
are named. A network that returns zeros is called untrained, whatever it would mean.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.numerics import scale
from diffjax.core.types import Array, Key
from diffjax.prediction import kinds
from diffjax.prediction import precondition as pre
from diffjax.prediction.precondition import Precondition

TOLERANCE = 2.0  # of error over bound
LEARNT = 0.9  # of error over bound, at one level at least
SLOPE = 1.4  # of a slope over 1, or 1 over it
SLOPE_LEVEL = 3.1  # sigma/alpha to which slopes count
DATA_LEVELS = (0.1, 0.3, 1.0, 3.0, 10.0)  # sigma/alpha
NOISE_LEVELS = (5.0, 10.0, 20.0)

Apply = Callable[[Array, Array], Array]


KINDS: tuple[kinds.Kind, ...] = (
    kinds.Eps(),
    kinds.SigmaScore(),
    kinds.X0(),
    kinds.V(),
    kinds.Negated(kinds.V()),
    kinds.Score(),
    kinds.EDMF(),
    kinds.Negated(kinds.X0()),
    kinds.Velocity(),
    kinds.Negated(kinds.Velocity()),
)
SCALINGS: tuple[pre.OfTime, ...] = (
    pre.Unscaled(),
    pre.OverAlpha(),
    pre.UnitVariance(1.0),
    pre.UnitVariance(0.5),
)


def labels() -> tuple[pre.OfTime, ...]:
    """The labels of published codes."""
    return (
        pre.Time(999.0),
        pre.Time(1.0),
        pre.ReversedTime(),
        pre.NoiseLevel(),
        pre.LogNoiseLevel(1.0),
        pre.LogNoiseLevel(0.25),
        pre.LogNoiseLevel(1.0, 2.0),
        pre.VPTime(),
        pre.DescendingIndex(1000),
        pre.iddpm().label,
    )


class Report(NamedTuple):
    """What the check found.

    levels: sigma/alpha; errors, bounds: eqs. (1) and (2) there; slopes: eq. (3) of eps^ and x0^,
    two a level, 1 where they do not count. on_data: False where noise alone was asked, which shows
    a wrong kind of output and hardly a wrong time or scale. alternatives: conventions under which
    the weights pass, in words; sought only where the configured one fails.
    """

    passed: bool
    levels: tuple[float, ...]
    errors: tuple[float, ...]
    bounds: tuple[float, ...]
    slopes: tuple[tuple[float, float], ...]
    on_data: bool
    alternatives: tuple[str, ...] = ()

    def summary(self) -> str:
        """For people: the figures and, for weights that fail, what to change."""
        rows = zip(self.levels, self.errors, self.bounds, self.slopes, strict=True)
        figures = ", ".join(
            f"{error:.3g} of {bound:.3g} (slopes {slopes[0]:.2f}, {slopes[1]:.2f}) "
            f"at sigma/alpha = {level:.3g}"
            for level, error, bound, slopes in rows
        )
        if self.passed and self.on_data:
            return f"The weights denoise: error {figures}."
        if self.passed:
            return f"The weights take noise for noise (no data to see more): error {figures}."
        text = f"The weights do not denoise under this config: error {figures}."
        if self.alternatives:
            return f"{text} They do with {', or '.join(self.alternatives[:3])}."
        return (
            f"{text} No convention known here fits: untrained weights, data of another range or "
            "size, or options of the network that change no shape (fir_kernel, skip_rescale, "
            "attention order, centered)."
        )


def times_of(process: Any, levels: Sequence[float]) -> Array:
    """The times of a process nearest to noise levels sigma/alpha, one each."""
    grid = jnp.linspace(process.t_min, process.t_max, 4001)
    alpha, _, sigma = process.coeffs(grid)
    with np.errstate(divide="ignore"):  # no signal, or no noise, at an end
        known = np.log(np.asarray(sigma, np.float64)) - np.log(np.asarray(alpha, np.float64))
    index = [int(np.abs(known - np.log(level)).argmin()) for level in levels]
    return grid[jnp.asarray(sorted(set(index)))]


def check(
    apply: Apply,
    process: Any,
    convention: Precondition,
    *,
    key: Key,
    shape: Sequence[int],
    x0: Array | None = None,
) -> Report:
    """Asks the weights to denoise, under `convention` and, where that fails, under others.

    apply: (x, label) -> out, the network with its weights and conditions, on the whole batch.
    shape: of the batch, (B, *data). x0: data of that shape in the model's range; None for noise
    alone, which sees less.
    """
    levels = NOISE_LEVELS if x0 is None else DATA_LEVELS
    data = jnp.zeros(shape, jnp.float32) if x0 is None else jnp.asarray(x0)
    moment = 1.0 if x0 is None else float(jnp.mean(jnp.square(data)))
    probe = Probe(jax.jit(apply), process, data, moment, times_of(process, levels), key)
    found = probe.ask(convention)
    alive = probe.alive(convention)
    passed = alive and probe.passes(found)
    return Report(
        passed=passed,
        levels=tuple(map(float, probe.levels)),
        errors=tuple(map(float, found.errors)),
        bounds=tuple(map(float, probe.bounds)),
        slopes=tuple((float(a), float(b)) for a, b in found.slopes),
        on_data=x0 is not None,
        alternatives=tuple(_alternatives(probe, convention)) if alive and not passed else (),
    )


class Found(NamedTuple):
    """Eqs. (1) and (3) at each time: (T,) and (T, 2); infinite where an output is not finite."""

    errors: np.ndarray
    slopes: np.ndarray


class Probe:
    """Noisy data at a few times, and the errors of a network on them."""

    def __init__(
        self, apply: Apply, process: Any, x0: Array, moment: float, times: Array, key: Key
    ):
        self.apply, self.process, self.times, self.x0 = apply, process, times, x0
        self.has_data = bool(jnp.any(x0 != 0))
        keys = jax.random.split(key, len(times))
        self.eps = [jax.random.normal(k, x0.shape, jnp.float32) for k in keys]
        alpha, _, sigma = (np.asarray(c, np.float64) for c in process.coeffs(times))
        self.noisy = [
            float(a) * x0 + float(s) * e for a, s, e in zip(alpha, sigma, self.eps, strict=True)
        ]
        self.levels = sigma / alpha
        self.bounds = moment / (moment + self.levels**2)
        self._known: dict[tuple[int, float, float], Array] = {}

    def ask(self, convention: Precondition) -> Found:
        """What the network finds under this convention."""
        errors, slopes = [], []
        outputs = self._ask(convention.scaling, convention.label)
        rows = zip(self.times, self.levels, self.noisy, self.eps, outputs, strict=True)
        for t, level, x, eps, out in rows:
            found = kinds.decode(convention.kind, self.process, x, out, t)
            errors.append(_finite(jnp.mean(jnp.square(found.eps - eps))))
            few = level > SLOPE_LEVEL
            blank = few or not self.has_data
            slopes.append(
                (
                    1.0 if few else _slope(found.eps, eps),
                    1.0 if blank else _slope(found.x0, self.x0),
                )
            )
        return Found(np.asarray(errors), np.asarray(slopes))

    def passes(self, found: Found) -> bool:
        """Whether these are a denoiser's."""
        ratio = found.errors / self.bounds
        small = np.all(ratio <= TOLERANCE) and (np.min(ratio) <= LEARNT or not self.has_data)
        even = np.all((found.slopes <= SLOPE) & (found.slopes >= 1 / SLOPE))
        return bool(small and even)

    def alive(self, convention: Precondition) -> bool:
        """Whether the output is anything: zero is what new networks return.

        As v or F, zero is the best linear estimate, which would pass.
        """
        outputs = self._ask(convention.scaling, convention.label)
        return any(float(jnp.sqrt(jnp.mean(jnp.square(out)))) > 1e-2 for out in outputs)

    def _ask(self, scaling: pre.OfTime, label: pre.OfTime) -> list[Array]:
        """The network's outputs, each asked for once."""
        outputs = []
        for i, (t, x) in enumerate(zip(self.times, self.noisy, strict=True)):
            factor, told = scaling(self.process, t), label(self.process, t)
            known = (i, float(factor), float(told))
            if known not in self._known:
                self._known[known] = self.apply(scale(factor, x), told.astype(jnp.float32))
            outputs.append(self._known[known])
        return outputs


def _finite(value: Array) -> float:
    return float(value) if np.isfinite(float(value)) else np.inf


def _slope(estimate: Array, true: Array) -> float:
    """Eq. (3)."""
    return _finite(jnp.mean(estimate * true) / jnp.mean(jnp.square(estimate)))


def _alternatives(probe: Probe, convention: Precondition) -> Iterator[str]:
    """Conventions under which the weights pass, those that change least first."""
    ranked: dict[int, list[tuple[float, str]]] = {1: [], 2: [], 3: []}
    for changed in (1, 2, 3):
        for candidate in _candidates(convention, changed):
            found = probe.ask(candidate)
            if probe.passes(found):
                worst = float(np.max(found.errors / probe.bounds))
                ranked[changed].append((worst, _in_words(candidate, convention)))
        if ranked[changed]:
            break
    yield from (text for _, text in sorted(ranked[changed]))


def _candidates(convention: Precondition, changed: int) -> Iterator[Precondition]:
    """The conventions that differ from this one in `changed` of kind, input scale and label."""
    seen = set()
    for kind in (convention.kind, *KINDS):
        for scaling in (convention.scaling, *SCALINGS):
            for label in (convention.label, *labels()):
                candidate = Precondition(kind, scaling, label)
                words = tuple(map(in_words, candidate))
                if len(_differences(candidate, convention)) == changed and words not in seen:
                    seen.add(words)
                    yield candidate


def _differences(a: Precondition, b: Precondition) -> list[str]:
    return [f for f in a._fields if in_words(getattr(a, f)) != in_words(getattr(b, f))]


def _in_words(candidate: Precondition, convention: Precondition) -> str:
    parts = [
        f"{field} {in_words(getattr(candidate, field))} "
        f"(not {in_words(getattr(convention, field))})"
        for field in _differences(candidate, convention)
    ]
    return " and ".join(parts)


def in_words(value: Any) -> str:
    """A kind, scale or label with its numbers: `Time(999)`."""
    shown = []
    for name in value.__dataclass_fields__:
        part = getattr(value, name)
        if hasattr(part, "__dataclass_fields__"):
            shown.append(in_words(part))
        elif np.ndim(part) == 0:
            shown.append(f"{float(part):g}")
    return f"{type(value).__name__}({', '.join(shown)})"
