"""The pytree decorator: frozen, static fields in the structure, checks where a person writes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import checks
from diffjax.core.pytree import pytree, replace, static


@pytree
class Node:
    """A leaf that must be positive, a child, and a mode."""

    rate: float
    child: object = None
    order: int = static(default=2)

    def __post_init__(self):
        checks.positive("rate", self.rate)


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Node(1.0).rate = 2.0


def test_leaves_and_structure():
    leaves, structure = jax.tree.flatten(Node(1.0, {"a": 3.0}, order=5))
    assert leaves == [1.0, 3.0]
    assert structure == jax.tree.structure(Node(7.0, {"a": 8.0}, order=5))
    assert structure != jax.tree.structure(Node(1.0, {"a": 3.0}, order=4))
    again = jax.tree.unflatten(structure, [2.0, 4.0])
    assert (again.rate, again.child, again.order) == (2.0, {"a": 4.0}, 5)


def test_paths_have_the_fields_names():
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(Node(1.0, Node(2.0)))]
    assert paths == [".rate", ".child.rate"]


def test_checks_run_where_a_person_writes_and_nowhere_else():
    with pytest.raises(ValueError, match="rate must be positive; got -1.0"):
        Node(-1.0)
    with pytest.raises(ValueError, match="rate"):
        replace(Node(1.0), rate=0.0)
    minus = jax.tree.map(lambda v: -v, Node(1.0))
    assert minus.rate == -1.0
    assert jax.tree.structure(jax.eval_shape(lambda n: n, Node(1.0))) == jax.tree.structure(minus)
    assert jax.tree.map(lambda v: None, Node(1.0)).rate is None
    assert jax.vmap(lambda n: n.rate * 2)(Node(jnp.arange(1.0, 4.0))).tolist() == [2.0, 4.0, 6.0]
    assert jax.grad(lambda n: n.rate**2)(Node(3.0)).rate == 6.0


def test_replace_keeps_the_rest():
    child = object()
    changed = replace(Node(1.0, child, order=7), rate=2.0)
    assert (changed.rate, changed.child, changed.order) == (2.0, child, 7)
    with pytest.raises(TypeError):
        replace(Node(1.0), speed=2.0)


def test_a_number_is_no_new_program_and_a_mode_is():
    traces = []

    @jax.jit
    def run(node):
        traces.append(None)
        return node.rate * node.order

    assert [float(run(Node(v))) for v in (1.0, 2.0, 3.0)] == [2.0, 4.0, 6.0]
    assert len(traces) == 1
    assert run(Node(1.0, order=3)) == 3.0 and len(traces) == 2


def test_equality_is_identity():
    # Arrays have no single truth, so two trees with arrays must compare without looking inside.
    a, b = Node(jnp.ones(2)), Node(jnp.ones(2))
    assert a == a and a != b and len({a, b}) == 2


@pytest.mark.parametrize(
    ("check", "good", "bad", "message"),
    [
        (checks.positive, (0.1, 1, np.float32(2), jnp.ones(2)), (0.0, -1, np.zeros(1)), "positive"),
        (checks.non_negative, (0.0, 3), (-0.1, jnp.asarray([1.0, -1.0])), "must not be negative"),
    ],
)
def test_signs(check, good, bad, message):
    for value in good:
        check("snr", value)
    for value in (*bad, float("nan")):
        with pytest.raises(ValueError, match=rf"snr .*{message}.*; got|snr must.*; got"):
            check("snr", value)


def test_ranges_and_choices():
    checks.in_range("eta", 0.0, 0.0, 1.0)
    checks.in_range("eta", np.asarray([0.0, 1.0]), 0.0, 1.0)
    with pytest.raises(ValueError, match=r"eta must lie in \[0.0, 1.0\]; got 1.1"):
        checks.in_range("eta", 1.1, 0.0, 1.0)
    checks.less("lo", 1, "hi", 2.0)
    with pytest.raises(ValueError, match="lo must be below hi; got 2 and 2"):
        checks.less("lo", 2, "hi", 2)
    checks.one_of("mode", "a", {"a", "b"})
    with pytest.raises(ValueError, match="mode must be one of 'a', 'b'; got 'c'"):
        checks.one_of("mode", "c", ["a", "b"])
    checks.at_least("n", np.int64(3), 3)
    with pytest.raises(ValueError, match="n must be at least 3; got 2"):
        checks.at_least("n", 2, 3)
    for value in (2.0, True, "2"):
        with pytest.raises(TypeError, match="n must be an int"):
            checks.at_least("n", value, 1)


def test_what_has_no_value_passes():
    for placeholder in (None, object(), jax.ShapeDtypeStruct((), jnp.float32)):
        checks.positive("x", placeholder)
        checks.in_range("x", placeholder, 0, 1)
        checks.less("x", placeholder, "y", 0.0)

    @jax.jit
    def run(x):
        checks.positive("x", x)
        checks.less("x", x, "y", 0.0)
        return x

    assert run(-1.0) == -1.0
