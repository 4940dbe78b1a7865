"""Operators: the four conditions of Moore and Penrose, the adjoint, and the reference's colours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core.pytree import pytree
from diffjax.inverse import Grey, Linear, Mask, adjoint, projection

SHAPE = (4, 3, 3)
RANK_2 = np.outer(np.arange(5) - 1.0, np.ones(36)) + np.outer(np.ones(5), np.cos(np.arange(36)))
OPERATORS = {
    "mask": Mask(np.arange(12).reshape(4, 3, 1) % 3 == 0),
    "mask_per_sample": Mask((np.arange(72).reshape(2, 4, 3, 3) % 5 < 2), per_sample=True),
    "grey": Grey(),
    "linear": Linear.of(np.random.default_rng(0).standard_normal((7, 36)), SHAPE),
    "linear_tall": Linear.of(np.random.default_rng(1).standard_normal((40, 36)), SHAPE),
    "linear_deficient": Linear.of(RANK_2, SHAPE),
}


@pytree
class WrongPseudoInverse:
    """A mutant: the transpose of a matrix whose rows are not orthonormal."""

    inner: Linear

    def __call__(self, x):
        return self.inner(x)

    def pinv(self, y):
        return adjoint(self.inner, y, jnp.zeros((*y.shape[:-1], *SHAPE), y.dtype))


def moore_penrose(operator):
    """A A+ A = A, A+ A A+ = A+, and A A+ and A+ A are symmetric, as matrices."""
    like = jnp.zeros((2, *SHAPE))
    forward = matrix(operator, like)
    back = matrix(operator.pinv, operator(like))
    close(forward @ back @ forward, forward)
    close(back @ forward @ back, back)
    close(forward @ back, (forward @ back).T)
    close(back @ forward, (back @ forward).T)


def matrix(function, like):
    """A linear function as a matrix, by its columns."""
    basis = np.eye(like.size, dtype=np.float32).reshape(-1, *like.shape)
    return np.stack([np.asarray(function(jnp.asarray(e))).ravel() for e in basis], axis=1)


def close(a, b):
    np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_pseudo_inverse_is_moore_and_penroses(name):
    moore_penrose(OPERATORS[name])


def test_a_wrong_pseudo_inverse_is_caught():
    with pytest.raises(AssertionError):
        moore_penrose(WrongPseudoInverse(OPERATORS["linear"]))


@pytest.mark.parametrize("name", OPERATORS)
def test_the_adjoint_is_the_transpose(name):
    operator, like = OPERATORS[name], jnp.zeros((2, *SHAPE))
    y = np.random.default_rng(2).standard_normal(operator(like).shape).astype(np.float32)
    found = adjoint(operator, jnp.asarray(y), like)
    close(np.asarray(found).ravel(), matrix(operator, like).T @ y.ravel())


@pytest.mark.parametrize("name", ["grey", "linear"])
def test_a_sample_alone_is_a_sample_of_the_batch(name):
    x = jnp.asarray(np.random.default_rng(3).standard_normal((2, *SHAPE)), jnp.float32)
    close(jax.vmap(OPERATORS[name])(x), OPERATORS[name](x))


def test_a_mask_alone_is_a_mask_of_the_batch():
    x = jnp.asarray(np.random.default_rng(3).standard_normal((2, *SHAPE)), jnp.float32)
    np.testing.assert_array_equal(
        jax.vmap(OPERATORS["mask"])(x), x * (np.arange(12).reshape(1, 4, 3, 1) % 3 == 0)
    )


def test_grey_is_the_references_first_coordinate():
    """Rotated by the reference code's matrix, masked to the first coordinate, rotated back."""
    rotation = np.asarray(
        [
            [5.7735014e-01, -8.1649649e-01, 4.7008697e-08],
            [5.7735026e-01, 4.0824834e-01, 7.0710671e-01],
            [5.7735026e-01, 4.0824822e-01, -7.0710683e-01],
        ]
    )
    x = np.random.default_rng(0).standard_normal((5, 2, 2, 3))
    masked = (x @ rotation) * [1, 0, 0] @ np.linalg.inv(rotation)
    np.testing.assert_allclose(projection(Grey(), jnp.asarray(x, jnp.float32)), masked, atol=1e-6)


def test_what_is_unknown_may_be_nan():
    x = jnp.asarray([[1.0, np.nan]])
    np.testing.assert_array_equal(Mask(jnp.asarray([1, 0]))(x), [[1.0, 0.0]])


def test_a_tree_has_a_tree_of_masks():
    x = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 2, 2))}
    found = Mask({"a": jnp.asarray([1, 0, 1]), "b": jnp.eye(2)})(x)
    np.testing.assert_array_equal(found["a"], [[1, 0, 1]] * 2)
    np.testing.assert_array_equal(found["b"], [np.eye(2)] * 2)


def test_take_gathers_what_is_per_sample():
    mask = OPERATORS["mask_per_sample"]
    x = jnp.ones((1, *SHAPE))
    np.testing.assert_array_equal(mask.take(jnp.asarray([1]))(x), mask(jnp.ones((2, *SHAPE)))[1:])
    assert OPERATORS["mask"].take(jnp.asarray([1])) is OPERATORS["mask"]


BAD = {
    "grey mask": (lambda: Mask(jnp.asarray([0.5, 1.0])), ValueError, r"0 \(unknown\).*got"),
    "mask shape": (lambda: Mask(jnp.ones((2,)))(jnp.ones((4, 3))), ValueError, r"got \(2,\)"),
    "mask rank": (lambda: Mask(jnp.ones((3,)))(jnp.ones((4, 3, 3))), ValueError, "one sample"),
    "mask batch": (
        lambda: Mask(jnp.ones((2, 3)), per_sample=True)(jnp.ones((4, 3))),
        ValueError,
        r"got \(2, 3\)",
    ),
    "grey channels": (lambda: Grey()(jnp.ones((2, 2, 2, 1))), ValueError, "3 channels"),
    "grey y": (lambda: Grey().pinv(jnp.ones((2, 2, 2, 3))), ValueError, "one channel"),
    "grey of one": (lambda: Grey(channels=1), ValueError, "at least 2; got 1"),
    "linear shape": (lambda: Linear.of(np.ones((2, 5)), (2, 2)), ValueError, "D = 4"),
    "linear x": (
        lambda: Linear.of(np.ones((2, 4)), (2, 2))(jnp.ones((3, 4))),
        ValueError,
        r"end in the shape \(2, 2\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_raises(name):
    call, error, match = BAD[name]
    with pytest.raises(error, match=match):
        call()
