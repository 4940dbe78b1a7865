# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Controllable generation
#
# One model, trained once, and three wishes that it was not trained for: samples of a class, a
# sample of which a part is known, and a sample of which any linear measurement is known. In two
# dimensions, where every answer is known exactly. Under a minute on a CPU.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import diffjax as dj

key = jax.random.key(0)
process = dj.VP()

# %% [markdown]
# ## A model without wishes
#
# Six Gaussians, two of each of three classes. The exact denoiser stands in for a trained network.

# %%
angles = jnp.arange(6) * (2 * jnp.pi / 6)
means, std = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1), 0.15
classes = jnp.arange(6) % 3


def log_joint(x_t, t):
    """ln p(x_t, component), (B, 6), up to a constant; and what it is made of."""
    alpha, _, sigma = process.coeffs(t)
    alpha, sigma = jnp.reshape(alpha, (-1, 1)), jnp.reshape(sigma, (-1, 1))
    variance = alpha**2 * std**2 + sigma**2
    offsets = x_t[:, None] - alpha[..., None] * means[None]
    return -jnp.sum(offsets**2, axis=-1) / (2 * variance), offsets, alpha, sigma, variance


def denoise(x_t, t):
    """E[x0 | x_t] and the noise that goes with it."""
    logits, offsets, alpha, sigma, variance = log_joint(x_t, t)
    weights = jax.nn.softmax(logits, axis=-1)[..., None]
    x0 = jnp.sum(weights * (means[None] + (alpha * std**2 / variance)[..., None] * offsets), axis=1)
    return dj.Prediction(x0, (x_t - alpha * x0) / sigma)


def show(axis, x, title):
    axis.scatter(*np.asarray(x).T, s=2)
    axis.set(title=title, xlim=(-1.7, 1.7), ylim=(-1.7, 1.7), aspect="equal")


x_T = dj.prior(key, process, (1000, 2))
times = dj.grids.log_snr(process, 200)
solver = dj.solvers.Ancestral()
free = dj.sample(key, denoise, x_T, times, solver=solver, process=process).x

# %% [markdown]
# ## A class: classifier guidance
#
# A classifier of *noisy* data, (x_t, t) -> logits, adds its gradient to the score. Here it is
# exact; `diffjax train --config=digits_classifier` trains one. At scale 1 the samples are the
# class's own. A larger scale follows no stated law: it moves samples to where the classifier is
# surest.


# %%
def classify(x_t, t):
    logits = log_joint(x_t, t)[0]
    return jnp.stack([jax.nn.logsumexp(logits[:, k::3], axis=1) for k in range(3)], axis=1)


labels = jnp.zeros(1000, jnp.int32)
figure, axes = plt.subplots(1, 3, figsize=(9, 3))
show(axes[0], free, "all")
for axis, scale in zip(axes[1:], (1.0, 8.0), strict=True):
    guide = dj.guidance.ClassifierGuidance(classify, process, labels, scale)
    x = dj.sample(key, guide(denoise), x_T, times, solver=solver, process=process).x
    show(axis, x, f"class 0, scale {scale:g}")
    own = jnp.min(jnp.linalg.norm(x[:, None] - means[None, ::3], axis=-1), axis=1) < 0.6
    print(f"class 0 at scale {scale:g}: {own.mean():.1%} of the samples beside its modes")
figure.tight_layout()

# %% [markdown]
# ## A known part: the replacement method
#
# Inpainting knows some coordinates, colorization a mean over channels, and both are the same thing:
# `A x = y`. After each step of any solver the part that A sees is put back at the step's noise
# level. The samples meet the measurement exactly; how the rest follows from it is approximate, and
# the page of `diffjax.inverse.project` says by how much. Here the known coordinate is 0.5.

# %%
mask = dj.inverse.Mask(jnp.asarray([1, 0]))
sum_of_both = dj.inverse.Linear.of([[1.0, 1.0]], (2,))
corrected = dj.solvers.PredictorCorrector(solver, dj.solvers.AnnealedLangevin(0.3, n_steps=2))
wishes = {
    "x = 0.5": (mask, jnp.asarray([[0.5, 0.0]]), solver),
    "x = 0.5, with a corrector": (mask, jnp.asarray([[0.5, 0.0]]), corrected),
    "x + y = 0.3": (sum_of_both, jnp.asarray([[0.3]]), corrected),
}
figure, axes = plt.subplots(1, 3, figsize=(9, 3))
for axis, (title, (operator, y, inner)) in zip(axes, wishes.items(), strict=True):
    held = dj.inverse.Replace(inner, operator, y)
    x = dj.sample(key, denoise, x_T, times, solver=held, process=process).x
    show(axis, free, title)
    axis.scatter(*x.T, s=2)
    error = jnp.abs(operator(x) - operator(operator.pinv(y))).max()
    print(f"{title}: the measurement is off by {error:.0e}")
figure.tight_layout()

# %% [markdown]
# ## On images
#
# A trained run has the same as methods, on levels of pixels:
#
#     model = dj.load("runs/digits")
#     model.inpaint(key, images, mask)                    # mask: 1 where known
#     model.colorize(key, grey)                           # of a model of coloured images
#     model.restore(key, operator, y)                     # any A x = y
#     classifier = dj.load_classifier("runs/classifier")
#     model.sample(key, 100, guide=classifier.guide(model, labels, scale=2.0))
