"""The loss of a classifier of noisy data, for classifier guidance.

Symbols: y the class of x0, eps standard normal, p_c(. | x_t, t) the softmax of the classifier's
logits, w the time sampler's weight.

    x_t  = alpha(t) x0 + sigma(t) eps                                                          (1)
    loss = -w ln p_c(y | x_t, t)                                                               (2)

The minimiser over all functions is p(y | x_t), at every t that is drawn.

Reference: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations",
2021, https://arxiv.org/abs/2011.13456, appendix I.1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffjax.core.numerics import at_least_float32, batch_size
from diffjax.core.random import normal_like, sample_keys
from diffjax.core.types import Array, Key, PyTree
from diffjax.losses.times import TimeSampler, UniformTimes
from diffjax.processes.base import Process
from diffjax.processes.calculus import perturb


def classification(
    key: Key,
    classify: Callable[[PyTree, Array], Array],
    process: Process,
    x0: PyTree,
    labels: Array,
    *,
    times: TimeSampler = UniformTimes(),
) -> tuple[Array, dict[str, Array]]:
    """The loss of each sample, eq. (2), (B,) in nats, and what to watch, each (B,).

    key: a typed key, or (B,) keys, one a sample. classify: (x_t, t) -> logits (B, K). x0: clean
    data (B, *data), a tree. labels: (B,), integers in 0..K-1. times: see `losses.times`.
    The dict has "t" and "accuracy", 1 where the class of the largest logit is the label.
    """
    x0 = at_least_float32(x0)
    keys = sample_keys(key, batch_size(x0))
    t, importance = times(keys, process)
    logits = at_least_float32(classify(perturb(process, x0, t, normal_like(keys, "eps", x0)), t))
    log_p = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(log_p, labels[:, None], axis=-1, mode="fill")[:, 0]
    hit = (jnp.argmax(logits, axis=-1) == labels).astype(logits.dtype)
    return -importance * chosen, {"t": t, "accuracy": hit}
