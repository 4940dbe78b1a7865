"""The optimizer against a NumPy transcription of the papers' formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax.train import optim


def adam_numpy(p, grads, *, lr, warmup, beta1, beta2, eps, clip=None, decay=0.0):
    """Kingma and Ba's algorithm 1 over flat float64 vectors, after clipping to the norm `clip`.

    The rate ramps up with the count of the updates made before; decay as in AdamW's algorithm 2.
    """
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(grads, start=1):
        norm = np.sqrt(np.sum(g * g))
        if clip is not None and norm > clip:
            g = g / norm * clip
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        rate = lr if warmup == 0 else lr * min((t - 1) / warmup, 1.0)
        adaptive = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
        p = p - rate * (adaptive + decay * p)
    return p


CASES = {
    "published": {"lr": 2e-4, "warmup": 5, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "clip": 1.0},
    # eps as large as the root, so that its place shows; no warm-up; decay.
    "eps": {"lr": 1e-2, "warmup": 0, "beta1": 0.8, "beta2": 0.9, "eps": 0.5, "decay": 0.1},
    "clip": {"lr": 1e-2, "warmup": 2, "beta1": 0.9, "beta2": 0.99, "eps": 0.3, "clip": 0.2},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_updates_equal_the_papers(case):
    rng = np.random.default_rng(0)
    p = rng.normal(size=10)
    # Norms from 0.02 to 200: some are clipped, some are not.
    grads = [rng.normal(size=10) * 10.0**e for e in (-2, 0, 1, -1, 2, 0, -2, 1)]
    optimizer = optim.adam(
        optim.learning_rate(case["lr"], warmup=case["warmup"]),
        beta1=case["beta1"],
        beta2=case["beta2"],
        eps=case["eps"],
        weight_decay=case.get("decay", 0.0),
        grad_clip=case.get("clip"),
    )

    def split(flat):  # two leaves: the norm is the global one
        return {"a": jnp.asarray(flat[:4], jnp.float32), "b": jnp.asarray(flat[4:], jnp.float32)}

    params = split(p)
    state = optimizer.init(params)
    for g in grads:
        updates, state = optimizer.update(split(g), state, params)
        params = optax.apply_updates(params, updates)
    ours = np.concatenate([params["a"], params["b"]])
    truth = adam_numpy(p, grads, **case)
    moved = np.abs(truth - p).max()
    assert np.abs(ours - truth).max() < 2e-6 + 1e-4 * moved
    # What the tolerance rejects: each neighbouring rule is further away than that.
    for wrong in (
        {"warmup": case["warmup"] + 1},
        {"clip": 0.5 * case.get("clip", 1.0)},
        {"eps": case["eps"] * 1.5 + 1e-3},
        {"decay": case.get("decay", 0.0) + 0.05},
    ):
        other = adam_numpy(p, grads, **(case | wrong))
        assert np.abs(other - truth).max() > 2e-6 + 1e-4 * moved, wrong


def test_a_negative_clip_clips_nothing():
    grads = {"a": jnp.full((3,), 1e3)}
    outs = []
    for clip in (None, -1.0):
        optimizer = optim.adam(optim.learning_rate(1.0), eps=1e3, grad_clip=clip)
        outs.append(optimizer.update(grads, optimizer.init(grads), grads)[0]["a"])
    # One Adam step with eps = |g|: g / (|g| + |g|) = 1/2; any clipping gives less.
    np.testing.assert_allclose(outs[0], -0.5, rtol=1e-5)
    np.testing.assert_array_equal(*outs)


def test_warmup_counts_before_the_update():
    rate = optim.learning_rate(2e-4, warmup=5000)
    assert rate(0) == 0
    np.testing.assert_allclose(rate(1), 2e-4 / 5000, rtol=1e-6)
    np.testing.assert_allclose(rate(2500), 1e-4, rtol=1e-6)
    np.testing.assert_allclose([rate(5000), rate(1_300_001)], 2e-4, rtol=1e-6)
    assert optim.learning_rate(2e-4)(0) == np.float32(2e-4)


def test_cosine_decay_closed_form():
    rate = optim.learning_rate(1.0, warmup=100, decay_steps=1100, final_fraction=0.1)
    # Quarter points of the half wave between the peak 1 and the end 0.1.
    steps = jnp.array([50, 100, 350, 600, 1100, 5000])
    wave = 0.55 + 0.45 * np.array([np.nan, 1, np.sqrt(0.5), 0, -1, -1])
    wave[0] = 0.5
    np.testing.assert_allclose(jax.vmap(rate)(steps), wave, rtol=2e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.learning_rate(0.0), "peak must be positive"),
        (lambda: optim.learning_rate(1.0, warmup=-1), "warmup must be at least 0"),
        (lambda: optim.learning_rate(1.0, warmup=5, decay_steps=5), "must exceed warmup=5; got 5"),
        (lambda: optim.learning_rate(1.0, final_fraction=0.1), "give decay_steps"),
        (lambda: optim.adam(optim.learning_rate(1.0), beta1=1.0), r"beta1 must lie in \[0, 1\)"),
        (lambda: optim.adam(optim.learning_rate(1.0), eps=0.0), "eps must be positive"),
        (lambda: optim.adam(optim.learning_rate(1.0), weight_decay=-1.0), "weight_decay"),
        (lambda: optim.adam(optim.learning_rate(1.0), grad_clip=0), "-1 turns clipping off"),
    ],
)
def test_bad_input_raises(make, message):
    with pytest.raises(ValueError, match=message):
        make()
