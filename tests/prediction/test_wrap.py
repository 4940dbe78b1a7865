"""`make_denoiser`: what reaches the network, what comes back, and in which dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from diffjax.prediction import X0, Eps, make_denoiser, precondition, target
from diffjax.processes import VE, VP, RectifiedFlow, calculus
from diffjax.solvers import DDIM, grids, sample
from tests import members, oracles

X = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3)), jnp.float32)
T = jnp.asarray(0.5)


def test_a_perfect_network_is_the_oracle():
    # A network that outputs the exact target of each kind, under scaling and label of its own.
    process, oracle = VP(), oracles.gaussian(3)
    truth = oracle.denoiser(process)(X, T)
    for member in members.KINDS:

        def apply(x, label, kind=member.kind):
            np.testing.assert_allclose(x, X / process.coeffs(T).alpha, rtol=1e-6)
            np.testing.assert_allclose(label, 3.5, rtol=1e-6)
            return target(kind, process, truth.x0, truth.eps, T)

        denoise = make_denoiser(
            apply,
            process,
            kind=member.kind,
            scaling=precondition.OverAlpha(),
            label=precondition.Time(7.0),
        )
        found = denoise(X, T)
        np.testing.assert_allclose(found.x0, truth.x0, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.eps, truth.eps, rtol=1e-4, atol=1e-5)


def record(*arguments):
    """A network that keeps what it was given."""
    record.seen = arguments
    return arguments[-1] if len(arguments) == 1 else X


@pytest.mark.parametrize("variables", [None, {"w": jnp.ones(2)}])
@pytest.mark.parametrize("cond", [None, jnp.arange(4)])
def test_only_what_is_given_is_passed(variables, cond):
    make_denoiser(record, VP(), kind="eps", variables=variables, cond=cond)(X, T)
    seen = list(record.seen)
    if variables is not None:
        assert seen.pop(0) is variables
    x, label = seen.pop(0), seen.pop(0)
    np.testing.assert_array_equal(x, X)
    assert label == 0.5 and label.dtype == jnp.float32
    assert seen == ([] if cond is None else [cond])


def test_labels_follow_the_times():
    t = jnp.asarray([0.1, 0.2, 0.3, 0.4])
    make_denoiser(record, VP(), kind="eps", label=precondition.Time(999.0))(X, t)
    np.testing.assert_allclose(record.seen[1], 999 * t, rtol=1e-6)


def test_a_wrong_output_raises():
    wide = make_denoiser(lambda x, t: jnp.concatenate([x, x], -1), VP(), kind="eps")
    with pytest.raises(ValueError, match=r"shape of x, \(4, 3\); got \(4, 6\).*out_channels"):
        wide(X, T)
    listed = make_denoiser(lambda x, t: [x], VP(), kind="eps")
    with pytest.raises(ValueError, match="structure of x"):
        listed(X, T)


def test_take_gathers_the_conditions_only():
    cond = {"label": jnp.arange(4), "text": jnp.arange(8.0).reshape(4, 2)}
    variables = {"w": jnp.arange(4.0)}
    denoise = make_denoiser(record, VP(), kind="eps", variables=variables, cond=cond)
    taken = denoise.take(jnp.asarray([2, 0]))
    np.testing.assert_array_equal(taken.cond["label"], [2, 0])
    np.testing.assert_array_equal(taken.cond["text"], [[4.0, 5.0], [0.0, 1.0]])
    assert taken.variables is variables and taken.process is denoise.process
    # And the samples are those of the whole, one by one.
    shift = lambda x, t, c: x * c["text"][:, :1]  # noqa: E731
    whole = make_denoiser(shift, VP(), kind="eps", cond=cond)
    part = whole.take(jnp.asarray([2, 0]))(X[jnp.asarray([2, 0])], T)
    np.testing.assert_array_equal(part.x0, whole(X, T).x0[jnp.asarray([2, 0])])


def test_half_precision_stays_inside_the_network():
    def apply(x, label):
        assert x.dtype == jnp.bfloat16 and label.dtype == jnp.float32
        return 0.5 * x

    denoise = make_denoiser(apply, VP(), kind="eps", dtype=jnp.bfloat16)
    prediction = denoise(X, T)
    assert prediction.x0.dtype == prediction.eps.dtype == jnp.float32
    # The network's rounding is bfloat16's; what is made of it keeps float32's digits.
    eps = (0.5 * X.astype(jnp.bfloat16)).astype(jnp.float32)
    np.testing.assert_array_equal(prediction.eps, eps)
    alpha, _, sigma = VP().coeffs(T)
    np.testing.assert_allclose(prediction.x0, (X - sigma * eps) / alpha, rtol=1e-5, atol=1e-5)
    result = sample(
        jax.random.key(0), denoise, X, grids.uniform(VP(), 3), solver=DDIM(), process=VP()
    )
    assert result.x.dtype == jnp.float32


def test_a_wide_state_stays_wide(x64):
    denoise = make_denoiser(lambda x, t: x.astype(jnp.float32), VP(), kind="eps")
    prediction = denoise(X.astype(jnp.float64), T)
    assert prediction.x0.dtype == prediction.eps.dtype == jnp.float64


def test_x_may_be_a_tree():
    x = {"a": X, "b": jnp.ones((4, 2, 2))}
    denoise = make_denoiser(lambda x, t: jax.tree.map(jnp.sin, x), VP(), kind="v")
    found = denoise(x, T)
    for name, leaf in x.items():
        alone = make_denoiser(lambda x, t: jnp.sin(x), VP(), kind="v")(leaf, T)
        np.testing.assert_allclose(found.x0[name], alone.x0, rtol=1e-6)
        np.testing.assert_allclose(found.eps[name], alone.eps, rtol=1e-6)


def test_new_weights_are_one_trace():
    traces = []

    def apply(variables, x, label, cond):
        traces.append(None)
        return variables["w"] * x + cond[:, None]

    @jax.jit
    def predict(denoise, x, t):
        return denoise(x, t).x0

    outputs = [
        predict(
            make_denoiser(
                apply,
                VP(0.1 + 0.01 * i),
                kind="eps",
                variables={"w": jnp.asarray(0.1 * i)},
                cond=jnp.full((4,), 0.3 * i),
                label=precondition.Time(1.0 + i),
            ),
            X,
            T,
        )
        for i in range(5)
    ]
    assert len(traces) == 1
    assert not np.allclose(outputs[0], outputs[1])


def test_a_prediction_is_a_tree():
    # What a denoiser returns must pass `jit`, `scan` and `cond`, without extras too.
    denoise = make_denoiser(lambda x, t: x, VP(), kind="eps")
    found = jax.jit(lambda x: denoise(x, T))(X)
    np.testing.assert_allclose(found.x0, denoise(X, T).x0, rtol=1e-4)
    assert dict(found.extras) == {}


@pytest.mark.parametrize(
    ("kind", "process", "times"),
    [
        ("eps", RectifiedFlow(), [1.0, 0.5]),
        ("sigma_score", RectifiedFlow(), [1.0, 0.5]),
        ("x0", VP(), [0.0, 0.5]),  # an inversion that starts at the data
        ("score", VP(), [0.0, 0.5]),
    ],
)
def test_times_at_which_the_output_is_not_enough(kind, process, times):
    denoise = make_denoiser(lambda x, t: x, process, kind=kind)
    with pytest.raises(ValueError, match=rf"does not determine x0 and eps at t = {times[0]}"):
        denoise.check_times(jnp.asarray(times))
    denoise.check_times(jnp.asarray(times[1:]))
    for enough in ("v", "F"):
        make_denoiser(lambda x, t: x, process, kind=enough).check_times(jnp.asarray(times))
    jax.jit(denoise.check_times)(jnp.asarray(times))  # tracers pass


def test_kinds_by_value_and_by_name():
    named, given = (make_denoiser(record, VP(), kind=kind).kind for kind in ("eps", Eps()))
    assert type(named) is type(given) is Eps
    assert isinstance(make_denoiser(record, VP(), kind=X0()).kind, X0)


class Linen(linen.Module):
    """One layer of flax.linen, the label appended to the input."""

    @linen.compact
    def __call__(self, x, label, cond=None):
        label = jnp.broadcast_to(label, x.shape[:1])[:, None]
        return linen.Dense(x.shape[-1])(jnp.concatenate([x, label], axis=-1))


class Nnx(nnx.Module):
    """The same layer of flax.nnx."""

    def __init__(self, rngs):
        self.layer = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x, label):
        label = jnp.broadcast_to(label, x.shape[:1])[:, None]
        return self.layer(jnp.concatenate([x, label], axis=-1))


def by_hand(kernel, bias):
    """x0 of an eps network with these weights under VP at T, in NumPy."""
    eps = np.concatenate([X, np.full((4, 1), 0.5)], axis=1) @ np.asarray(kernel)
    eps = eps + np.asarray(bias)
    alpha, _, sigma = (float(c) for c in VP().coeffs(T))
    return (np.asarray(X) - sigma * eps) / alpha


def test_flax_linen():
    net = Linen()
    variables = net.init(jax.random.key(0), X, T)
    denoise = make_denoiser(net.apply, VP(), kind="eps", variables=variables)
    layer = variables["params"]["Dense_0"]
    np.testing.assert_allclose(denoise(X, T).x0, by_hand(layer["kernel"], layer["bias"]), rtol=1e-4)


def test_flax_nnx():
    graph, state = nnx.split(Nnx(nnx.Rngs(0)))

    def apply(state, x, label):
        return nnx.merge(graph, state)(x, label)

    denoise = make_denoiser(apply, VP(), kind="eps", variables=state)
    layer = nnx.merge(graph, state).layer
    found = jax.jit(lambda denoise, x: denoise(x, T).x0)(denoise, X)
    np.testing.assert_allclose(found, by_hand(layer.kernel[...], layer.bias[...]), rtol=1e-4)


def test_equinox():
    eqx = pytest.importorskip("equinox")
    net = eqx.nn.Linear(4, 3, key=jax.random.key(0))
    arrays, static = eqx.partition(net, eqx.is_array)

    def apply(arrays, x, label):
        label = jnp.broadcast_to(label, x.shape[:1])[:, None]
        return jax.vmap(eqx.combine(arrays, static))(jnp.concatenate([x, label], axis=-1))

    found = make_denoiser(apply, VP(), kind="eps", variables=arrays)(X, T)
    np.testing.assert_allclose(found.x0, by_hand(np.asarray(net.weight).T, net.bias), rtol=1e-4)


def test_a_ve_network_divides_by_its_own_sigma():
    # Score-SDE's VE networks return the score: x0 = x + sigma^2 s.
    score = lambda x, sigma: -x / (1 + sigma**2)  # noqa: E731
    t = jnp.asarray(0.4)
    denoise = make_denoiser(score, VE(), **precondition.score_sde_ve()._asdict())
    sigma = float(VE().coeffs(t).sigma)
    np.testing.assert_allclose(denoise(X, t).x0, X / (1 + sigma**2), rtol=1e-5)
    tweedie = X + sigma**2 * calculus.score(VE(), denoise(X, t), t)
    np.testing.assert_allclose(tweedie, denoise(X, t).x0, rtol=1e-4)
