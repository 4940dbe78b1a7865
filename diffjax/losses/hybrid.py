"""The hybrid loss of a network that learns the variance of a step too.

Symbols: N levels at the times t = (k + 1)/N, s = k/N the one below; mu, c^2 the posterior's mean
and variance (`processes.calculus`, eq. 3); mu^ that mean with the network's x0^; d^2 the network's
variance (`prediction.learned`); D the elements of a sample; h half the distance of two levels of
the data; sg the stopped gradient.

    loss = w (simple + weight L_k)                                                             (1)
    L_k  = KL(N(mu, c^2) || N(sg mu^, d^2)) / (D ln 2)                        k > 0            (2)
         = mean over D of ln(d/c) + (c^2 + (mu - mu^)^2)/(2 d^2) - 1/2, in bits
    L_0  = -log2 p(x0) / D,   p = Phi((x0 + h - mu^)/d) - Phi((x0 - h - mu^)/d)                (3)

`simple` is the loss of `losses.matching`, which alone trains the mean; L_k trains the variance
alone. The sum of the L_k and a term of the prior is the variational bound in bits/dim, so a mean
over k times N estimates it. In (3) the bins of the least and the greatest level of the data reach
to infinity, and d^2 takes for c^2, which is 0 there, that of the step above.

weight = lambda N: the paper has lambda = 0.001 [1], its code N/1000 (`rescale_learned_sigmas`) or
1, and DiT 1 with N = 1000. The code finds Phi by a formula with tanh and takes no p below 1e-12;
here both are exact. It bins whatever it is given at 256 levels of [-1, 1], DiT's latents too.

Reference:
[1] Nichol, Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021,
    https://arxiv.org/abs/2102.09672, eqs. 4 to 6, 15 and 16.
"""

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr

from diffjax.core import checks
from diffjax.core.numerics import at_least_float32, expand
from diffjax.core.quantise import Quantisation
from diffjax.core.types import Array, DenoiseFn, Key, Number, Prediction, PyTree
from diffjax.losses.matching import Reduce, Watch, ask, match, mean, nothing
from diffjax.losses.times import DiscreteTimes, TimeSampler
from diffjax.losses.weights import Weight
from diffjax.prediction.kinds import Eps
from diffjax.prediction.learned import step_variance
from diffjax.processes.base import Process
from diffjax.processes.calculus import between


def hybrid(
    key: Key,
    denoise: DenoiseFn,
    process: Process,
    x0: PyTree,
    *,
    levels: int = 1000,
    bound_weight: Number = 1.0,
    times: TimeSampler | None = None,
    weight: Weight = Eps(),
    reduce: Reduce = mean,
    quantisation: Quantisation = Quantisation(),
    watch: Watch = nothing,
) -> tuple[Array, dict[str, Array]]:
    """The loss of each sample, eq. (1), (B,), and what to watch, each (B,).

    denoise: with a learned variance, `make_denoiser(..., learned_variance=...)`; else raises
      ValueError. levels: N. bound_weight: of eq. (1). times: which levels, drawn at (k + 1)/N; None
      for all alike. quantisation: of the data, for (3).
    The rest, and the dict, are as of `denoising_score_matching`, with "bound", L_k in bits/dim.
    """
    checks.at_least("levels", levels, 2)
    checks.non_negative("bound_weight", bound_weight)
    asked = ask(key, denoise, process, x0, DiscreteTimes(levels) if times is None else times)
    simple, seen = match(asked, process, weight, reduce)
    bound = bound_term(process, asked.prediction, asked.x0, asked.t, levels, quantisation)
    # `simple` has the sampler's weight already.
    losses = simple + bound_weight * asked.importance * bound
    return losses, seen | {"bound": bound} | dict(watch(asked))


def bound_term(
    process: Process,
    prediction: Prediction,
    x0: PyTree,
    t: Array,
    levels: int,
    quantisation: Quantisation = Quantisation(),
) -> Array:
    """L_k of eqs. (2) and (3) at the levels t = (k + 1)/N, in bits/dim, (B,).

    prediction: at (x_t, t), with a learned variance. x0: (B, *data), a tree. t: (B,).
    """
    x0 = at_least_float32(x0)
    # Whole numbers: t - 1/N would be off by a part of a step where t is rounded.
    k = jnp.round(t * levels) - 1
    s, first = k / levels, k < 0.5
    move = between(process, t, s)
    above = between(process, jnp.full_like(t, 2 / levels), jnp.full_like(t, 1 / levels))
    floor = jnp.where(first, above.at_s.sigma * jnp.sqrt(above.gain), 0.0)
    learned = step_variance(prediction, "losses.hybrid").std(process, t, s, floor)
    small = jnp.where(first, 1.0, move.at_s.sigma * jnp.sqrt(move.gain))  # not used at the first
    to_mean = move.at_s.alpha * move.gain

    def nats(x: Array, guess: Array, d: Array) -> Array:
        guess, at_first = jax.lax.stop_gradient(guess), expand(first, x) > 0
        error = expand(to_mean, x) * (x - guess)
        rise = 2 * (jnp.log(d) - expand(jnp.log(small), x))
        divergence = (rise + jnp.expm1(-rise) + (error / d) ** 2) / 2
        # At the first level mu^ is x0^ itself. Elsewhere x0^ may lie where (3) has no gradient.
        centre, std = jnp.where(at_first, guess, x), jnp.where(at_first, d, 1.0)
        return jnp.where(at_first, -log_probability(x, centre, std, quantisation), divergence)

    return mean(jax.tree.map(nats, x0, prediction.x0, learned)) / jnp.log(2.0)


def log_probability(x: Array, centre: Array, std: Array, quantisation: Quantisation) -> Array:
    """ln p(x) of eq. (3), a number for each of x: the discretised Gaussian."""
    width = jnp.asarray(quantisation.high, x.dtype) - jnp.asarray(quantisation.low, x.dtype)
    ends = quantisation.placement == "ends"
    half = width / (quantisation.levels - ends) / 2
    edge = half if ends else 2 * half  # where the least level's bin ends, from low
    # By the smaller tail: near 1 the difference of two probabilities has no digits.
    sign = jnp.where(x > centre, -1.0, 1.0).astype(x.dtype)
    middle = sign * (x - centre)
    upper, lower = (middle + half) / std, (middle - half) / std
    least, most = x < quantisation.low + edge, x > quantisation.high - edge
    open_below = jnp.where(sign > 0, least, most)
    open_above = jnp.where(sign > 0, most, least)
    log_upper = jnp.where(open_above, 0.0, log_ndtr(upper))
    gap = log_ndtr(lower) - log_upper
    within = jnp.log(jnp.maximum(-jnp.expm1(gap), jnp.finfo(x.dtype).tiny))
    return log_upper + jnp.where(open_below, 0.0, within)
