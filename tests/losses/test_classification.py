"""The classifier's loss: cross-entropy by hand, and the class posterior as its minimiser."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core.random import normal_like, sample_keys
from diffjax.losses import ImportanceTimes, UniformTimes, classification
from diffjax.processes import VP
from tests.guidance.test_classifier import ExactClassifier
from tests.losses.common import mean_and_error, vp
from tests.oracles import mixture

MIXTURE, B = mixture(dim=2), 20_000


def data(n=B, seed=0):
    """(x0, y) of the mixture."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, n, p=np.asarray(MIXTURE.weights))
    x0 = np.asarray(MIXTURE.means)[labels] + 0.3 * rng.standard_normal((n, 2))
    return jnp.asarray(x0, jnp.float32), jnp.asarray(labels)


def the_posterior_is_the_minimiser(classify):
    """The loss does not change to first order along a change of the logits, within 4 errors."""
    x0, labels = data()

    def losses(step):
        nearby = lambda x, t: classify(x, t) + step * x @ MIXTURE.means.T  # noqa: E731
        times = UniformTimes(0.02, 0.4)  # where the class can be told
        return classification(jax.random.key(0), nearby, VP(), x0, labels, times=times)[0]

    slopes = jax.jit(lambda: jax.jvp(losses, (0.0,), (1.0,))[1])()
    mean, error = mean_and_error(slopes)
    assert abs(mean) < 4 * error, (mean, error)


def test_the_posterior_is_the_minimiser():
    the_posterior_is_the_minimiser(ExactClassifier(MIXTURE, VP()))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, t: ExactClassifier(MIXTURE, VP())(x, 1.1 * t),
        lambda x, t: 1.2 * ExactClassifier(MIXTURE, VP())(x, t),
    ],
    ids=["time", "temperature"],
)
def test_another_classifier_is_not(wrong):
    with pytest.raises(AssertionError):
        the_posterior_is_the_minimiser(wrong)


@pytest.mark.parametrize("times", [UniformTimes(), ImportanceTimes()], ids=["uniform", "weighted"])
def test_the_loss_is_the_cross_entropy(times):
    """In NumPy, at the times and with the noise of the same keys."""
    x0, labels = data(64)
    keys = sample_keys(jax.random.key(3), 64)
    t, weight = (np.asarray(v) for v in times(keys, VP()))
    alpha, variance, _ = vp(t)
    eps = np.asarray(normal_like(keys, "eps", x0))
    x_t = alpha[:, None] * np.asarray(x0) + np.sqrt(variance)[:, None] * eps
    mixing = np.random.default_rng(1).standard_normal((2, 3)).astype(np.float32)
    logits = x_t @ mixing + t[:, None]
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))

    losses, watch = classification(
        jax.random.key(3), lambda x, t: x @ mixing + t[:, None], VP(), x0, labels, times=times
    )
    rows = np.arange(64)
    np.testing.assert_allclose(losses, -weight * log_p[rows, np.asarray(labels)], rtol=1e-4)
    np.testing.assert_array_equal(watch["accuracy"], logits.argmax(1) == np.asarray(labels))
    np.testing.assert_array_equal(watch["t"], t)
