"""The adaptive solve of the probability flow against closed forms and SciPy, sample by sample."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from diffjax.processes import EDM, VE, VP, RectifiedFlow, SubVP, velocity
from diffjax.solvers import (
    AdaptiveFlow,
    Keep,
    NoiselessPredictor,
    PIController,
    ToEnd,
    Tweedie,
    solve_adaptive,
)
from tests.laws.cases import EXACT
from tests.oracles import Isotropic, gaussian, mixture
from tests.solvers.helpers import Counter, standard_normal

# Without LLVM's optimiser: what is equal is equal in every bit, and it compiles faster.
PLAIN = {"xla_backend_optimization_level": 0}
solve = jax.jit(solve_adaptive, static_argnames="method", compiler_options=PLAIN)
KEY = jax.random.key(0)
TIGHT = PIController(1e-9, 1e-9)
# Down to where sigma is small, up to where the prior begins.
SPANS = {
    "vp": (VP(), 1.0, 1e-3),
    "sub_vp": (SubVP(), 1.0, 1e-3),
    "ve": (VE(), 1.0, 1e-5),
    "edm": (EDM(), 80.0, 0.002),
    "flow": (RectifiedFlow(), 0.99, 1e-3),
}


def start(process, t, dim=3, count=6):
    return jnp.asarray(standard_normal(0, (count, dim))) * process.coeffs(jnp.asarray(t)).sigma


@pytest.mark.parametrize("name", SPANS)
def test_samples_are_the_exact_flow(name, x64):
    """Truth: the closed form of the flow of a Gaussian, both ways."""
    process, high, low = SPANS[name]
    oracle = gaussian(3, jnp.float64)
    denoise, x = oracle.denoiser(process), start(process, high)
    options = {"process": process, "controller": TIGHT, "final": Keep()}
    got = solve(KEY, denoise, x, high, low, **options)
    exact = oracle.flow(process, x, jnp.asarray(high), jnp.asarray(low))
    assert np.abs(exact - x).max() > 0.5  # it went somewhere
    np.testing.assert_allclose(got.x, exact, atol=2e-7)
    back = solve(KEY, denoise, got.x, low, high, **options)
    np.testing.assert_allclose(back.x, x, rtol=2e-6, atol=2e-6)


def test_default_tolerance_in_float32():
    """rtol = atol = 1e-5, the reference's: within 2e-4 of the exact flow."""
    process, high, low = SPANS["vp"]
    oracle = gaussian()
    x = start(process, high).astype(jnp.float32)
    got = solve(KEY, oracle.denoiser(process), x, high, low, process=process, final=Keep())
    exact = oracle.flow(process, x, jnp.asarray(high), jnp.asarray(low))
    np.testing.assert_allclose(got.x, exact, atol=2e-4)
    assert got.state.arrived.all() and got.x.dtype == jnp.float32


def test_ends_with_one_denoising(x64):
    """`Tweedie()` is E[x0 | x] of where `Keep()` stops, for one call more."""
    process, high, low = SPANS["ve"]
    oracle = gaussian(3, jnp.float64)
    denoise, x = oracle.denoiser(process), start(process, high)
    kept, ended = (
        solve(KEY, denoise, x, high, low, process=process, final=final)
        for final in (Keep(), Tweedie())
    )
    np.testing.assert_allclose(ended.x, denoise(kept.x, jnp.asarray(low)).x0, rtol=1e-12)
    assert (ended.nfe == kept.nfe + 1).all()
    # The reference's step without noise, at VE's first level: x + sigma_min^2 s.
    level = process.coeffs(jnp.asarray(low)).sigma
    score = -denoise(kept.x, jnp.asarray(low)).eps / level
    np.testing.assert_allclose(ended.x, kept.x + level**2 * score, rtol=1e-12)


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_each_sample_is_scipys_own_solve(name, x64):
    """The calls that `solve_ivp` makes for that sample alone, and its end (F2)."""
    process, high, low = SPANS[name]
    low = 0.05
    denoise = mixture(2, jnp.float64).denoiser(process)
    x = start(process, high, dim=2, count=5)
    got = solve(KEY, denoise, x, high, low, process=process, final=Keep())
    slope = jax.jit(lambda t, y: velocity(process, denoise(y, t[None]), t[None]))
    for i in range(5):
        want = solve_ivp(
            lambda t, y: np.asarray(slope(jnp.asarray(t), jnp.asarray(y)[None])[0]),
            (high, low),
            np.asarray(x[i]),
            rtol=1e-5,
            atol=1e-5,
        )
        assert got.nfe[i] == want.nfev
        np.testing.assert_allclose(got.x[i], want.y[:, -1], atol=1e-8)


def test_declared_calls_are_the_calls_that_run():
    """The slowest sample's count is the program's; alone, each sample's own."""
    process = VP()
    counter = Counter(mixture().denoiser(process))
    x = start(process, 1.0, dim=2, count=4).astype(jnp.float32) * jnp.linspace(0.1, 3, 4)[:, None]
    run = jax.jit(
        lambda x: solve_adaptive(KEY, counter, x, 1.0, 1e-3, process=process).nfe,
        compiler_options=PLAIN,
    )
    whole = run(x)
    assert whole.max() == counter.read()
    assert len(set(whole.tolist())) > 1
    for i in range(4):
        assert run(x[i : i + 1])[0] == counter.read() == whole[i]


def test_neighbours_do_not_matter():
    """Bit for bit: other samples, their number and their order."""
    process = VP()
    denoise = gaussian(4).denoiser(process)
    x = start(process, 1.0, dim=4, count=6).astype(jnp.float32)
    run = jax.jit(solve_adaptive, compiler_options=EXACT)
    whole = run(KEY, denoise, x, 1.0, 1e-3, process=process)
    hard = x.at[1:].multiply(100.0)
    for changed in (x[:1], x[:3], hard):
        other = run(KEY, denoise, changed, 1.0, 1e-3, process=process)
        np.testing.assert_array_equal(other.x[0], whole.x[0])
        assert other.nfe[0] == whole.nfe[0]
    turned = run(KEY, denoise, x[::-1], 1.0, 1e-3, process=process)
    np.testing.assert_array_equal(turned.x[::-1], whole.x)


def test_one_norm_for_the_batch_would_be_seen():
    """The mutant: the batch as one sample, as the reference has it; a neighbour changes the end."""
    process = VP()
    denoise = gaussian(4).denoiser(process)

    def as_one(x, t):
        """x (1, 3 * 4) as three samples."""
        prediction = denoise(x.reshape(3, 4), jnp.ravel(t)[0])
        return jax.tree.map(lambda leaf: leaf.reshape(1, -1), prediction)

    x = start(process, 1.0, dim=4, count=3).astype(jnp.float32)
    run = jax.jit(
        lambda x: solve_adaptive(KEY, as_one, x.reshape(1, -1), 1.0, 1e-3, process=process).x,
        compiler_options=PLAIN,
    )
    ends = [run(other)[0, :4] for other in (x, x.at[1:].multiply(100.0))]
    assert jnp.abs(ends[0] - ends[1]).max() > 0


def test_looser_tolerance_is_cheaper():
    process = VP()
    denoise = mixture().denoiser(process)
    x = start(process, 1.0, dim=2, count=32).astype(jnp.float32)
    results = [
        solve(KEY, denoise, x, 1.0, 1e-3, process=process, controller=PIController(tol, tol))
        for tol in (1e-5, 1e-1)
    ]
    assert results[1].nfe.mean() < 0.4 * results[0].nfe.mean()


def test_one_program_for_all_numbers(fresh_cache):
    run = jax.jit(lambda *args, **rest: solve_adaptive(*args, **rest), compiler_options=PLAIN)
    for i in range(3):
        process = VP(beta_max=20.0 - i)
        run(
            jax.random.key(i),
            gaussian().denoiser(process),
            start(process, 1.0).astype(jnp.float32),
            1.0 - 0.1 * i,
            1e-3 * (1 + i),
            process=process,
            controller=PIController(1e-3 * (1 + i), 1e-3),
        )
    assert run._cache_size() == 1


def test_any_tree_and_half_precision():
    """x may be a tree; bfloat16 is raised."""
    process = VP()
    tree = {"a": jnp.ones((3, 2, 2)), "b": jnp.ones((3, 5), jnp.bfloat16)}
    got = solve(KEY, Isotropic(process), tree, 1.0, 1e-3, process=process)
    assert {k: (v.shape, v.dtype) for k, v in got.x.items()} == {
        "a": ((3, 2, 2), jnp.float32),
        "b": ((3, 5), jnp.float32),
    }


# --- derivatives -----------------------------------------------------------------------------


def flow_end(x, mean, controller):
    """The end of a solve from t = 1 to 0.1."""
    process = VP()
    oracle = gaussian(3, jnp.float64)
    denoise = type(oracle)(mean, oracle.std).denoiser(process)
    return solve_adaptive(
        KEY, denoise, x, 1.0, 0.1, process=process, controller=controller, final=Keep()
    ).x


def closed_slopes():
    """Its derivatives in closed form: the ratio for x, alpha_s - ratio alpha_t for the mean."""
    process, oracle = VP(), gaussian(3, jnp.float64)
    at, as_ = (process.coeffs(jnp.asarray(t)) for t in (1.0, 0.1))
    d2 = oracle.std**2
    ratio = jnp.sqrt((as_.alpha**2 * d2 + as_.sigma**2) / (at.alpha**2 * d2 + at.sigma**2))
    return ratio, as_.alpha - ratio * at.alpha


def test_forward_mode(x64):
    """With respect to the start and to the network's numbers, against the closed form."""
    mean, x = gaussian(3, jnp.float64).mean, start(VP(), 1.0)
    ratio, shift = closed_slopes()
    slope = jax.jit(
        lambda *along: jax.jvp(lambda x, mean: flow_end(x, mean, TIGHT), (x, mean), along)[1],
        compiler_options=PLAIN,
    )
    by_x = slope(jnp.ones_like(x), jnp.zeros_like(mean))
    by_mean = slope(jnp.zeros_like(x), jnp.ones_like(mean))
    np.testing.assert_allclose(by_x, jnp.broadcast_to(ratio, x.shape), rtol=1e-6)
    np.testing.assert_allclose(by_mean, jnp.broadcast_to(shift, x.shape), rtol=1e-6)


def test_reverse_mode_says_what_to_do(x64):
    x = start(VP(), 1.0)
    mean = gaussian(3, jnp.float64).mean
    grad = jax.grad(lambda x: jnp.sum(flow_end(x, mean, TIGHT)))
    for run in (jax.jit(grad), lambda x: jax.jit(jax.vmap(grad))(x[None])):
        with pytest.raises(TypeError, match=r"jax.jvp.*bounded=True.*diffjax.sample"):
            run(x)


def test_bounded_form_has_reverse_mode(x64):
    """The same end and calls as the loop, and the closed form's gradients."""
    mean, x = gaussian(3, jnp.float64).mean, start(VP(), 1.0)
    bounded = PIController(1e-7, 1e-7, max_steps=64, bounded=True)
    ratio, shift = closed_slopes()

    @functools.partial(jax.jit, compiler_options=PLAIN)
    def run(x, mean):
        end, pull = jax.vjp(lambda x, mean: flow_end(x, mean, bounded), x, mean)
        return end, flow_end(x, mean, PIController(1e-7, 1e-7)), pull(jnp.ones_like(end))

    end, looped, (by_x, by_mean) = run(x, mean)
    np.testing.assert_allclose(end, looped, rtol=1e-12)
    np.testing.assert_allclose(by_x, jnp.broadcast_to(ratio, x.shape), rtol=1e-5)
    np.testing.assert_allclose(by_mean, shift * x.shape[0], rtol=1e-5)


def test_gradients_are_finite_where_nothing_moves(x64):
    """An error of exactly 0, where the norm's root has no derivative."""
    bounded = PIController(1e-5, 1e-5, max_steps=32, bounded=True)
    process = VE()

    def total(x):
        still = lambda x, t: Isotropic(process, 1e9)(x, t)._replace(eps=0 * x)  # noqa: E731
        out = solve_adaptive(
            KEY, still, x, 1.0, 0.5, process=process, controller=bounded, final=Keep()
        )
        return jnp.sum(out.x**2)

    grad = jax.jit(jax.grad(total), compiler_options=PLAIN)
    np.testing.assert_allclose(grad(jnp.ones((2, 3))), 2.0)


def test_vmap_is_a_loop():
    process = VP()
    denoise = gaussian().denoiser(process)
    xs = jnp.stack([start(process, 1.0), 0.3 * start(process, 1.0)]).astype(jnp.float32)
    run = lambda x: solve_adaptive(KEY, denoise, x, 1.0, 1e-3, process=process).x  # noqa: E731
    together = jax.jit(jax.vmap(run), compiler_options=PLAIN)(xs)
    alone = jax.jit(run, compiler_options=PLAIN)
    apart = jnp.stack([alone(x) for x in xs])
    np.testing.assert_allclose(together, apart, rtol=2e-5, atol=2e-5)


# --- errors ----------------------------------------------------------------------------------

BAD = {
    "same times": ({"t0": 0.5, "t1": 0.5}, "t0 and t1 must differ"),
    "below t_min": ({"t1": 0.0}, r"t1 must lie in the process's \[t_min, t_max\].*got 0.0"),
    "above t_max": ({"t0": 1.5}, "t0 must lie"),
    "no end": ({"final": ToEnd()}, r"Pass final=Tweedie\(\)"),
    "no noise": ({"final": NoiselessPredictor()}, r"ProbabilityFlow adds no noise.*Tweedie\(\)"),
    "encode and denoise": ({"t0": 1e-3, "t1": 1.0}, r"pass final=Keep\(\)"),
    "keys": ({"key": jax.random.split(KEY, 3)}, r"\(2,\); got shape \(3,\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_say_what_and_how(case):
    changes, message = BAD[case]
    given = {"key": KEY, "t0": 1.0, "t1": 1e-3, "final": Tweedie()} | changes
    with pytest.raises(ValueError, match=f"(?s){message}"):
        solve_adaptive(
            given["key"],
            gaussian().denoiser(VP()),
            jnp.ones((2, 3)),
            given["t0"],
            given["t1"],
            process=VP(),
            final=given["final"],
        )


def test_giving_up_is_told():
    """A sample that needs more than max_steps is NaN and has not arrived."""
    process = VP()
    got = solve(
        KEY,
        gaussian().denoiser(process),
        start(process, 1.0).astype(jnp.float32),
        1.0,
        1e-3,
        process=process,
        controller=PIController(max_steps=3),
    )
    assert jnp.isnan(got.x).all() and not got.state.arrived.any()


def test_the_value_that_configs_build():
    flow = AdaptiveFlow(PIController(1e-3, 1e-4))
    assert jax.tree.leaves(flow)[:2] == [1e-3, 1e-4]
