"""The optimizer of the score-based papers, in the order of the reference code.

Symbols: n = 0, 1, ... counts the updates already made; g is the gradient of the batch's mean loss,
p the weights, c the clipping norm, w the weight decay, N and W the steps in all and of warm-up, f
the fraction of the peak rate that is left at the end.

    g   <- g min(1, c / ||g||)                      ||.|| over all leaves together          (1)
    m   <- beta1 m + (1 - beta1) g,    v <- beta2 v + (1 - beta2) g^2                       (2)
    p   <- p - lr(n) ( m' / (sqrt(v') + eps) + w p ),                                       (3)
           m' = m / (1 - beta1^(n+1)),  v' = v / (1 - beta2^(n+1))
    lr(n) = peak min(n / W, 1) h(n),   h = 1, or with decay over u = (n - W) / (N - W):     (4)
           h = f + (1 - f) (1 + cos(pi clip(u, 0, 1))) / 2

n counts *before* the update in (4) as in the reference code, so with warm-up the first update has
rate 0. eps stands outside the root, and the decay w is decoupled from the moments.

References:
  Kingma, Ba, "Adam: a method for stochastic optimization", 2015, https://arxiv.org/abs/1412.6980.
  Loshchilov, Hutter, "Decoupled weight decay regularization", 2019,
    https://arxiv.org/abs/1711.05101; "SGDR", 2017, https://arxiv.org/abs/1608.03983.
  Song et al., "Score-based generative modeling through stochastic differential equations", 2021,
    https://arxiv.org/abs/2011.13456.
"""

from collections.abc import Callable

import jax.numpy as jnp
import optax

from diffjax.core import checks
from diffjax.core.types import Array

Schedule = Callable[[Array | int], Array]


def learning_rate(
    peak: float, *, warmup: int = 0, decay_steps: int | None = None, final_fraction: float = 0.0
) -> Schedule:
    """The learning rate lr(n), eq. (4).

    peak > 0. warmup: W >= 0 steps, 0 for none. decay_steps: N > W for a cosine decay that ends at
    `final_fraction` (in [0, 1]) of the peak; None for a constant rate, and then `final_fraction`
    must stay 0. Returns a function from n, () or any shape, to rates of that shape.
    """
    checks.positive("peak", peak)
    checks.at_least("warmup", warmup, 0)
    checks.in_range("final_fraction", final_fraction, 0.0, 1.0)
    if decay_steps is None and final_fraction:
        raise ValueError(
            f"final_fraction={final_fraction} says where a decay ends, and there is none; give "
            "decay_steps, the number of steps in all."
        )
    if decay_steps is not None and decay_steps <= warmup:
        raise ValueError(
            f"decay_steps counts all steps and must exceed warmup={warmup}; got {decay_steps}."
        )

    def schedule(n):
        n = jnp.asarray(n, float)
        rate = peak * (jnp.minimum(n / warmup, 1) if warmup else jnp.ones_like(n))
        if decay_steps is None:
            return rate
        u = jnp.clip((n - warmup) / (decay_steps - warmup), 0, 1)
        return rate * (final_fraction + (1 - final_fraction) * (1 + jnp.cos(jnp.pi * u)) / 2)

    return schedule


def adam(
    schedule: Schedule,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_clip: float | None = None,
    moment_dtype: jnp.dtype | None = None,
) -> optax.GradientTransformation:
    """Clipping, Adam, decoupled decay and the rate, eqs. (1) to (3), in this order.

    beta1, beta2 in [0, 1); eps > 0; weight_decay >= 0. grad_clip: the norm c > 0; None or a
    negative number, as in the published configs, clips nothing. moment_dtype: of m, such as
    bfloat16, which saves a quarter of the state; None for the weights'. v keeps the weights' type:
    it moves by a thousandth of itself, less than bfloat16 can tell.
    """
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name} must lie in [0, 1); got {beta}.")
    checks.positive("eps", eps)
    checks.non_negative("weight_decay", weight_decay)
    if grad_clip == 0:
        raise ValueError("grad_clip=0 would erase every gradient; None or -1 turns clipping off.")
    return optax.chain(
        optax.clip_by_global_norm(grad_clip)
        if grad_clip is not None and grad_clip > 0
        else optax.identity(),
        optax.scale_by_adam(beta1, beta2, eps, eps_root=0.0, mu_dtype=moment_dtype),
        optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity(),
        optax.scale_by_learning_rate(schedule),
    )
