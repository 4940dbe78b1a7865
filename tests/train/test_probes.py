"""What the step reports: against NumPy, in one program, whatever is skipped or in micro-batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax.train import ema, mesh, probes, state, step
from diffjax.train.probes import BinMeans, ByNoise, Probes
from tests.train import toy
from tests.train.test_step import collectives

ALL = Probes(
    (ByNoise(edges=(-1.0, 0.5)),), (probes.group_norms, probes.update_ratio, probes.ema_gap)
)


def noisy_loss(params, key, x):
    """The toy's loss, at a log-SNR that each image brings itself."""
    losses, aux = toy.loss_fn(params, key, x)
    return losses, aux | {"log_snr": 3 * x[:, 0]}


@functools.cache
def compiled(on, accumulate=1, skip_bad=False):
    return step.compile_step(
        on,
        loss_fn=noisy_loss,
        optimizer=toy.OPTIMIZER,
        ema={"main": ema.ConstantEMA(0.9)},
        accumulate=accumulate,
        probes=ALL,
        skip_bad=skip_bad,
    )


@pytest.fixture(scope="module")
def one():
    return mesh.make_mesh(jax.devices()[:1])


def test_means_by_noise_against_a_loop():
    rng = np.random.default_rng(0)
    lam = np.array([-np.inf, -3, -1, -0.999, 0.5, 7, np.inf, *rng.normal(size=20)], np.float32)
    values = rng.normal(size=len(lam)).astype(np.float32)
    found = ByNoise(edges=(-1.0, 0.5, 9.0))(jnp.asarray(values), {"log_snr": jnp.asarray(lam)})
    expected = {}
    for value, at in zip(values, lam, strict=True):
        name = (
            "-inf..-1" if at < -1 else "-1..0.5" if at < 0.5 else "0.5..9" if at < 9 else "9..inf"
        )
        expected.setdefault(f"loss_by_log_snr/{name}", []).append(value)
    means = probes.scalars(jax.tree.map(np.asarray, stacked(found)))
    assert means.keys() == expected.keys()
    for name, some in expected.items():
        np.testing.assert_allclose(means[name], np.mean(some), rtol=1e-5, atol=1e-6)


def stacked(figures, n=1):
    return jax.tree.map(lambda x: jnp.stack([x] * n), figures)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_value_that_is_not_finite_stays_in_its_bin(compiled):
    aux = {"log_snr": jnp.asarray([-2.0, 2.0, 3.0])}
    # XLA may make a choice of a product with 0 and 1, and only operation by operation it shows.
    with jax.disable_jit(not compiled):
        found = ByNoise(edges=(0.0,))(jnp.asarray([jnp.nan, 1.0, 3.0]), aux)
    means = probes.scalars(jax.tree.map(np.asarray, stacked(found)))
    assert np.isnan(means["loss_by_log_snr/-inf..0"])
    assert means["loss_by_log_snr/0..inf"] == 2.0


def test_means_of_several_updates_are_over_their_images():
    bins = BinMeans(np.array([[2.0, 0], [9, 0]]), np.array([[1.0, 0], [2, 0]]), ("a", "b"))
    metrics = {"x": np.array([1.0, 4.0]), "y": bins}
    # Not 3.25, the mean of the updates' means; and nothing of the empty bin.
    assert probes.scalars(metrics) == {"x": 2.5, "y/a": pytest.approx(11 / 3)}
    assert probes.scalars(metrics, np.array([False, True])) == {"x": 4.0, "y/a": 4.5}
    assert np.isnan(probes.scalars(metrics, np.array([False, False]))["x"])


def test_norms_of_an_update_by_hand():
    # l_i = a . x_i + 3 b: the gradient is (mean x, 3), and one step of gradient descent of rate r.
    x = np.array([[1.0, 2.0], [3.0, 6.0]], np.float32)
    params = {"a": jnp.asarray([10.0, -20.0]), "deep": {"b": jnp.asarray(5.0)}}
    optimizer = optax.sgd(0.5)
    s = state.create_state(jax.random.key(0), params, optimizer, tracks=("main", "slow"))
    _, found = step.train_step(
        s,
        x,
        loss_fn=lambda p, key, batch: (batch @ p["a"] + 3 * p["deep"]["b"], {}),
        optimizer=optimizer,
        ema={"main": ema.ConstantEMA(0.75), "slow": ema.ConstantEMA(0.9)},
        probes=Probes((), (probes.group_norms, probes.update_ratio, probes.ema_gap)),
    )
    moved, after = 0.5 * np.array([2.0, 4.0, 3.0]), np.array([9.0, -22.0, 3.5])
    size = np.linalg.norm(after)
    expected = {
        "grad_norm/a": np.hypot(2, 4),
        "grad_norm/deep": 3.0,
        "update_ratio": np.linalg.norm(moved) / size,
        "ema_gap/main": 0.75 * np.linalg.norm(moved) / size,
        "ema_gap/slow": 0.9 * np.linalg.norm(moved) / size,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5)
    assert found.keys() == expected.keys() | {"loss", "grad_norm", "bad"}


def test_groups_make_the_whole_and_micro_batches_change_nothing(one):
    metrics = []
    for accumulate in (1, 2):
        _, found = compiled(one, accumulate)(toy.new_state(one), next(toy.feed(one)))
        metrics.append(probes.scalars(jax.device_get(found)))
    whole = metrics[0]
    groups = [v for name, v in whole.items() if name.startswith("grad_norm/")]
    assert len(groups) == 3
    np.testing.assert_allclose(np.linalg.norm(groups), whole["grad_norm"], rtol=1e-6)
    lam = 3 * toy.batch(0)[:, 0]
    shares = [np.mean(lam < -1), np.mean((lam >= -1) & (lam < 0.5)), np.mean(lam >= 0.5)]
    binned = [whole[f"loss_by_log_snr/{name}"] for name in ("-inf..-1", "-1..0.5", "0.5..inf")]
    np.testing.assert_allclose(np.dot(shares, binned), whole["loss"], rtol=1e-5)
    assert metrics[0].keys() == metrics[1].keys()
    for name, value in whole.items():
        np.testing.assert_allclose(metrics[1][name], value, rtol=1e-4, err_msg=name)


def test_probes_cost_no_collective_and_no_second_program(one, caplog):
    eight = mesh.make_mesh()
    lowered = compiled(eight).lower(toy.new_state(eight), next(toy.feed(eight)))
    assert collectives(lowered.compile().as_text()) == {"all-reduce": 1}
    fn = step.compile_step(
        one,
        loss_fn=noisy_loss,
        optimizer=toy.OPTIMIZER,
        ema={"main": ema.ConstantEMA(0.9)},
        probes=ALL,
    )
    s, feed = toy.new_state(one), toy.feed(one)
    with jax.log_compiles():
        for _ in range(5):
            s, _ = fn(s, next(feed))
    found = [r.getMessage() for r in caplog.records if "XLA compilation" in r.getMessage()]
    assert len([message for message in found if "jit(multi_step)" in message]) == 1


def test_what_does_not_fit_raises():
    losses, lam = jnp.zeros(3), {"log_snr": jnp.zeros(3)}
    with pytest.raises(ValueError, match=r"needs 'log_snr' of each image.*got nothing among \[\]"):
        ByNoise()(losses, {})
    with pytest.raises(ValueError, match=r"needs 'rms'.*got shape \(\) among"):
        ByNoise("rms")(losses, lam | {"rms": jnp.zeros(())})
    with pytest.raises(ValueError, match=r"edges must be increasing.*got \(1.0, 1.0\)"):
        ByNoise(edges=(1.0, 1.0))
    with pytest.raises(ValueError, match=r"\['loss_by_log_snr'\] is reported twice"):
        Probes((ByNoise(), ByNoise())).of_images(losses, lam)
    assert probes.group_norms(probes.Update(jnp.ones(3), jnp.ones(3), jnp.ones(3), {})) == {}
    zero = probes.Update({}, {"a": jnp.zeros(2)}, {"a": jnp.zeros(2)}, {"q": {"a": jnp.zeros(2)}})
    assert probes.update_ratio(zero) == {"update_ratio": 0}
    assert probes.ema_gap(zero) == {"ema_gap/q": 0}
