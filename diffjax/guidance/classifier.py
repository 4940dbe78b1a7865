"""Classifier guidance: samples of a class from an unconditional model and a classifier.

Symbols: y a class of K, x_t noisy data at time t, w the scale, g = grad_x ln p(y | x_t) by
automatic differentiation, s = -eps/sigma the score. By Bayes' rule

    grad_x ln p(x_t | y) = s + g                                                               (1)

and guidance takes s + w g, which moves both halves of the prediction at a fixed x_t:

    eps' = eps - w sigma g,     x0' = x0 + w (sigma^2/alpha) g                                 (2)

At w = 1 the guided denoiser is the class's own, E[x0 | x_t, y], if the classifier is exact. Another
w stands for p(x_t) p(y | x_t)^w, which is not the noised law of any data, so its samples follow no
stated law: larger scales give surer and less varied ones. The reference code [1] has no scale; its
author suggests to divide the logits by a temperature instead, which is another change: a scale acts
on ln p(y | x_t) with its normalisation, a temperature before it.

The classifier must know noisy data: it is trained on x_t at random t (`losses.classification`). One
that was trained under another process P' on z0 = a x0 + b serves at the time t' with the same noise
level in its units, on data in its units:

    sigma'(t')/alpha'(t') = a sigma(t)/alpha(t),     z = alpha'(t') (a x_t/alpha(t) + b)       (3)

since z is then alpha' z0 + sigma' eps exactly, and p(y | x_t) = p'(y | z at t'). The chain rule's
factor a alpha'/alpha comes with the differentiation. The classifier of [1] was trained under VE on
images in [0, 1]; under VP on images in [-1, 1] that is a = b = 1/2.

(1) and (2) need alpha > 0: at pure noise no classifier can tell how E[x0] moves.

References:
[1] Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", 2021,
    https://arxiv.org/abs/2011.13456, section 5 and appendix I.1.
[2] Dhariwal, Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021,
    https://arxiv.org/abs/2105.05233, section 4 (the scale).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.core import checks
from diffjax.core.numerics import combine, scale
from diffjax.core.pytree import pytree, replace, static, taken
from diffjax.core.types import Array, DenoiseFn, Number, Prediction, PyTree, evaluations
from diffjax.prediction.precondition import OfTime, Time, Unscaled
from diffjax.processes.base import Process
from diffjax.processes.calculus import inverse_log_snr, log_snr

Classify = Callable[[PyTree, Array], Array]  # (x_t, t) -> logits (B, K)


def class_score(classify: Classify, x_t: PyTree, t: Array, labels: Array) -> PyTree:
    """g of eq. (1), like x_t. labels: (B,), integers; one outside 0..K-1 raises, or gives NaN."""

    def log_likelihood(x):
        logits = classify(x, t)
        checks.in_range("labels", labels, 0, logits.shape[-1] - 1)
        log_p = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, "float32")))
        # A sum over samples, each of which depends on its own x only.
        return jnp.sum(jnp.take_along_axis(log_p, labels[..., None], axis=-1, mode="fill"))

    return jax.grad(log_likelihood)(x_t)


@pytree
class ClassifierGuided:
    """A denoiser guided by a classifier, eq. (2): a pytree callable (x_t, t) -> Prediction.

    cond: the labels, (B,). scale: one, or (B,), one a sample.
    """

    denoise: DenoiseFn
    classify: Classify
    process: Process
    cond: Array
    scale: Number = 1.0

    def __call__(self, x_t: PyTree, t: Array) -> Prediction:
        """Eq. (2). x_t: (B, *data), a tree. t: () or (B,), where alpha > 0."""
        t = jnp.asarray(t)
        prediction = self.denoise(x_t, t)
        g = class_score(self.classify, x_t, t, self.cond)
        alpha, _, sigma = self.process.coeffs(t)
        one = jnp.ones_like(sigma)
        x0 = combine((one, prediction.x0), (self.scale * sigma**2 / alpha, g))
        eps = combine((one, prediction.eps), (-self.scale * sigma, g))
        return prediction._replace(x0=x0, eps=eps)

    @property
    def evaluations(self) -> int:
        """Of networks in a call: the denoiser's and the classifier."""
        return evaluations(self.denoise) + 1

    def take(self, index: Array) -> "ClassifierGuided":
        """The guided denoiser of the samples `index`, (k,)."""
        scale = _taken(self.scale, index)
        return replace(self, denoise=taken(self.denoise, index), cond=self.cond[index], scale=scale)

    def check_times(self, times: Array) -> None:
        """Raises ValueError for a time at which alpha = 0, and what the inner denoiser refuses."""
        if hasattr(self.denoise, "check_times"):
            self.denoise.check_times(times)
        alpha = checks.evaluated(lambda: self.process.coeffs(jnp.asarray(times)).alpha)
        if alpha is not None and (alpha == 0).any():
            raise ValueError(
                "Classifier guidance needs alpha > 0 at every time, since it moves x0 by "
                "sigma^2/alpha times the classifier's gradient. Start the grid inside (t_max=...)."
            )


@pytree
class ClassifierGuidance:
    """The guide: `ClassifierGuidance(classify, process, labels)(denoise)` is a guided denoiser.

    classify: (x_t, t) -> logits (B, K) under this process; a pytree if it is to pass through `jit`.
    process: the denoiser's. labels: (B,), integers in 0..K-1. scale: w of eq. (2), one or (B,).
    """

    classify: Classify
    process: Process
    labels: Array
    scale: Number = 1.0

    def __post_init__(self):
        known = checks.concrete(self.labels)
        if known is not None and known.dtype.kind not in "iu":
            raise TypeError(f"labels must be integers; got {known.dtype}.")
        checks.non_negative("labels", self.labels)

    def __call__(self, denoise: DenoiseFn) -> ClassifierGuided:
        """The denoiser of the classes."""
        return ClassifierGuided(
            denoise, self.classify, self.process, jnp.asarray(self.labels), self.scale
        )

    def take(self, index: Array) -> "ClassifierGuidance":
        """The guide of the samples `index`, (k,)."""
        labels = jnp.asarray(self.labels)[index]
        return replace(self, labels=labels, scale=_taken(self.scale, index))


def _taken(scale: Number, index: Array) -> Number:
    """The scales of the samples `index`, where each has its own."""
    return scale if jnp.ndim(scale) == 0 else jnp.asarray(scale)[index]


@pytree
class NoisyClassifier:
    """A network with its convention: a pytree callable (x_t, t) -> logits (B, K).

    Build it with `make_classifier`.
    """

    process: Process
    scaling: OfTime
    label: OfTime
    variables: PyTree
    apply: Callable[..., Any] = static()

    def __call__(self, x_t: PyTree, t: Array) -> Array:
        """The logits. x_t: (B, *data). t: () or (B,), positive."""
        t = jnp.asarray(t)
        before = () if self.variables is None else (self.variables,)
        inputs = scale(self.scaling(self.process, t), x_t)
        return self.apply(*before, inputs, self.label(self.process, t).astype(jnp.float32))


def make_classifier(
    apply: Callable[..., Any],
    process: Process,
    *,
    variables: PyTree = None,
    scaling: OfTime | None = None,
    label: OfTime | None = None,
) -> NoisyClassifier:
    """Makes a classifier of a network.

    apply: called as `apply(variables, x, label)`, without `variables` where they are None; x:
      (B, *data); label: () or (B,), float32. It returns logits (B, K).
    process: what it was trained under. scaling, label: c_in and the time label, as of
      `make_denoiser`; the defaults are x_t itself and t itself.
    """
    return NoisyClassifier(
        process=process,
        scaling=Unscaled() if scaling is None else scaling,
        label=Time() if label is None else label,
        variables=variables,
        apply=apply,
    )


@pytree
class CarriedClassifier:
    """A classifier trained under another process, and on data in another range, eq. (3).

    classify: (z, t') -> logits under `trained`. process: of the x_t that it is asked about here.
    gain, offset: a > 0 and b; 1/2 and 1/2 lead from [-1, 1] to [0, 1]. Where the noise level lies
    outside of `trained`'s range, the nearest time within it is told.
    """

    classify: Classify
    trained: Process
    process: Process
    gain: Number = 1.0
    offset: Number = 0.0

    def __post_init__(self):
        checks.positive("gain", self.gain)

    def __call__(self, x_t: PyTree, t: Array) -> Array:
        """The logits. x_t: (B, *data). t: () or (B,), where alpha > 0."""
        t = jnp.asarray(t)
        gain = jnp.asarray(self.gain)
        lam = log_snr(self.process, t) - 2 * jnp.log(gain)
        other = jnp.clip(inverse_log_snr(self.trained, lam), self.trained.t_min, self.trained.t_max)
        clean = scale(gain / self.process.coeffs(t).alpha, x_t)
        clean = jax.tree.map(lambda leaf: leaf + self.offset, clean)
        return self.classify(scale(self.trained.coeffs(other).alpha, clean), other)
