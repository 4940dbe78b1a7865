"""Our solvers against diffusers' and k-diffusion's, where these are installed (extra `peers`).

Both sides get the same denoiser (a closed form), the same levels and the same start, in float64;
the peers' casts to float32 are promoted. What is compared with what:

    levels      a variance-preserving process whose time is sigma/alpha, on the peer's own sigmas
    table       one whose time is an index into the peer's alphas, for PNDM and DDIM
    EDM, flow   for k-diffusion's and the flow-matching schedulers
"""

import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core.pytree import pytree
from diffjax.core.types import Array, Coeffs, Number
from diffjax.processes import EDM, RectifiedFlow
from diffjax.solvers import (
    DDIM,
    DEIS,
    IPNDM,
    LMS,
    PLMS,
    PNDM,
    DPMSolver,
    DPMSolverPP,
    Euler,
    Heun,
    Keep,
    SDEDPMSolver,
    SDEDPMSolverPP,
    ToEnd,
    UniPC,
    sample,
)
from diffjax.testing import given_noise
from tests.oracles import mixture
from tests.solvers.helpers import standard_normal

torch = pytest.importorskip("torch", reason="the extra `peers` is not installed")
diffusers = pytest.importorskip("diffusers", reason="the extra `peers` is not installed")

pytestmark = [pytest.mark.usefixtures("x64", "promoted"), pytest.mark.slow]

DIM, BATCH = 2, 6
PEERS = (
    "DDIMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


@pytree
class Levels:
    """Variance preserving, and time is sigma/alpha."""

    t_min: Number = 1e-3
    t_max: Number = 200.0

    def coeffs(self, t):
        t = jnp.asarray(t)
        alpha = 1 / jnp.sqrt(1 + t**2)
        return Coeffs(alpha, jnp.zeros_like(t), t * alpha)


@pytree
class Table:
    """Variance preserving, and time is an index into the squares of alpha."""

    squares: Array
    t_min: Number = 1.0
    t_max: Number = 1000.0

    def coeffs(self, t):
        square = self.squares[jnp.round(jnp.asarray(t)).astype(int)]
        return Coeffs(jnp.sqrt(square), jnp.zeros_like(square), jnp.sqrt(1 - square))


@pytree
class Angle:
    """Alpha = cos(pi t/2), sigma = sin(pi t/2)."""

    t_min: Number = 1e-3
    t_max: Number = 1.0

    def coeffs(self, t):
        u = jnp.asarray(t) * (np.pi / 2)
        return Coeffs(jnp.cos(u), jnp.zeros_like(u), jnp.sin(u))


class Promoted:
    """A module whose float32 is its float64."""

    def __init__(self, module):
        self.module = module

    def __getattr__(self, name):
        return getattr(self.module, "float64" if name == "float32" else name)


@pytest.fixture
def promoted(monkeypatch):
    """The peers in float64 throughout."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    for name in PEERS:
        getattr(diffusers, name)  # modules are imported on first use
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("diffusers.schedulers.scheduling_"):
            for name in ("torch", "np"):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, Promoted(getattr(module, name)))
    yield
    torch.set_default_dtype(before)


def scheduler(name, steps, **options):
    """A diffusers scheduler with its steps set, at the first of them."""
    made = getattr(diffusers, name)(**options)
    made.set_timesteps(steps)
    if hasattr(made, "set_begin_index"):
        made.set_begin_index(0)
    return made


def start(scale=1.0):
    return scale * standard_normal(5, (BATCH, DIM))


def predict(process, x, t):
    """The oracle's prediction for a torch x at our time t, as NumPy."""
    made = mixture(DIM, jnp.float64).denoiser(process)(
        jnp.asarray(x.numpy()), jnp.asarray(float(t))
    )
    return np.array(made.x0), np.array(made.eps)


def theirs(peer, process, times, x, kind="eps"):
    """The peer's samples, driven at our times[i] in its i-th call; one call an entry of times."""
    x = torch.as_tensor(x)
    for t, label in zip(times, peer.timesteps, strict=False):
        if hasattr(peer, "scale_model_input"):
            peer.scale_model_input(x, label)
        x0, eps = predict(process, x, t)
        c = process.coeffs(jnp.asarray(float(t)))
        output = {
            "eps": eps,
            "v": float(c.alpha) * eps - float(c.sigma) * x0,
            "velocity": eps - x0,
        }[kind]
        x = peer.step(torch.as_tensor(output), label, x).prev_sample
    return x.numpy()


def ours(solver, process, times, x, final):
    denoise = mixture(DIM, jnp.float64).denoiser(process)
    solve = jax.jit(sample)
    return solve(
        jax.random.key(0),
        denoise,
        jnp.asarray(x),
        jnp.asarray(times),
        solver=solver,
        process=process,
        final=final,
    ).x


def compare(solver, peer, process, times, scale=1.0, final=None, **kwargs):
    """The peer through all of `times` against ours."""
    times = np.asarray(times, np.float64)
    final = final or (ToEnd() if times[-1] == 0 else Keep())
    x = start(scale)
    expected = theirs(peer, process, times[:-1], x, **kwargs)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(ours(solver, process, times, x, final), expected, **TOLERANCE)


MULTISTEP = {
    "2m": (DPMSolverPP(2), {"solver_order": 2, "solver_type": "midpoint"}),
    "2m_heun": (DPMSolverPP(2, variant="heun"), {"solver_order": 2, "solver_type": "heun"}),
    "3m": (DPMSolverPP(3, published=True, n_steps=9.0), {"solver_order": 3}),
    "3m_heun": (
        DPMSolverPP(3, variant="heun", published=True, n_steps=9.0),
        {"solver_order": 3, "solver_type": "heun"},
    ),
}


@pytest.mark.parametrize("case", MULTISTEP)
def test_dpm_solver_pp_multistep(case):
    solver, options = MULTISTEP[case]
    peer = scheduler("DPMSolverMultistepScheduler", 9, **options)
    compare(solver, peer, Levels(), peer.sigmas.numpy())


@pytest.mark.parametrize("order, variant", [(2, "midpoint"), (2, "heun"), (3, "midpoint")])
def test_dpm_solver_multistep(order, variant):
    """The eps form, to sigma_min at full order."""
    peer = scheduler(
        "DPMSolverMultistepScheduler",
        9,
        algorithm_type="dpmsolver",
        solver_order=order,
        solver_type=variant,
        final_sigmas_type="sigma_min",
        lower_order_final=False,
    )
    solver = DPMSolver(order, variant=variant, multistep=True, published=True)
    compare(solver, peer, Levels(), peer.sigmas.numpy())


@pytest.mark.parametrize("kind, variant", [("x0", "midpoint"), ("x0", "heun"), ("eps", "midpoint")])
def test_sde_dpm_solver_multistep(kind, variant):
    """The stochastic forms with the same noise."""
    peer = scheduler(
        "DPMSolverMultistepScheduler",
        9,
        algorithm_type="sde-dpmsolver++" if kind == "x0" else "sde-dpmsolver",
        solver_type=variant,
        final_sigmas_type="sigma_min",
        lower_order_final=False,
    )
    make = SDEDPMSolverPP if kind == "x0" else SDEDPMSolver
    noise = 0.3 * standard_normal(8, (BATCH, DIM))
    step = peer.step
    peer.step = lambda *args: step(*args, variance_noise=torch.as_tensor(noise))
    with given_noise(lambda name, like: jnp.asarray(noise)):
        compare(make(2, variant=variant), peer, Levels(), peer.sigmas.numpy())


@pytest.mark.parametrize("order, variant", [(2, "midpoint"), (2, "heun"), (3, "heun")])
def test_dpm_solver_pp_singlestep(order, variant):
    """Their points in between are ours where theirs are even in the log-SNR; then to sigma = 0.

    Their third-order "midpoint" takes W_0/2 also for its second point, where the paper and
    k-diffusion integrate exactly: compared with the latter below.
    """
    steps = 2 * order + 1
    peer = scheduler(
        "DPMSolverSinglestepScheduler",
        steps,
        solver_order=order,
        solver_type=variant,
        use_exponential_sigmas=True,
        final_sigmas_type="zero",
        lower_order_final=True,
    )
    x, levels = start(), peer.sigmas.numpy()
    expected = theirs(peer, Levels(), levels[:-1], x)
    times = np.append(levels[:steps:order], 0.0)
    solver = DPMSolverPP(order, variant=variant, multistep=False)
    np.testing.assert_allclose(ours(solver, Levels(), times, x, ToEnd()), expected, **TOLERANCE)


@pytest.mark.parametrize("order", [2, 3])
def test_dpm_solver_singlestep(order):
    """The eps form, before the last step."""
    peer = scheduler(
        "DPMSolverSinglestepScheduler",
        2 * order + 1,
        algorithm_type="dpmsolver",
        solver_order=order,
        solver_type="heun",
        use_exponential_sigmas=True,
        final_sigmas_type="sigma_min",
        lower_order_final=True,
    )
    x, levels = start(), peer.sigmas.numpy()
    expected = theirs(peer, Levels(), levels[: 2 * order], x)
    times = levels[: 2 * order + 1 : order]
    np.testing.assert_allclose(
        ours(DPMSolver(order, variant="heun"), Levels(), times, x, Keep()), expected, **TOLERANCE
    )


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("variant", ["B1", "B2"])
@pytest.mark.parametrize("kind", ["x0", "eps"])
def test_unipc(kind, variant, order):
    """UniPC with its falling order, up to the last step; B1 has no step onto sigma = 0 there."""
    peer = scheduler(
        "UniPCMultistepScheduler",
        10,
        solver_order=order,
        solver_type=variant.replace("B", "bh"),
        predict_x0=kind == "x0",
        final_sigmas_type="sigma_min",
    )
    solver = UniPC(order, variant, prediction=kind, n_steps=10.0)
    compare(solver, peer, Levels(), peer.sigmas.numpy()[:-1])


def test_unipc_to_the_end():
    peer = scheduler("UniPCMultistepScheduler", 10, solver_order=3, final_sigmas_type="zero")
    compare(UniPC(3, n_steps=10.0), peer, Levels(), peer.sigmas.numpy())


def test_unip_alone():
    peer = scheduler(
        "UniPCMultistepScheduler", 10, solver_order=3, disable_corrector=list(range(10))
    )
    solver = UniPC(3, corrector=False, n_steps=10.0)
    compare(solver, peer, Levels(), peer.sigmas.numpy()[:-1])


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(order):
    """Their polynomial is one in ln rho."""
    peer = scheduler(
        "DEISMultistepScheduler",
        9,
        solver_order=order,
        lower_order_final=False,
    )
    compare(DEIS(order, "lambda"), peer, Levels(), peer.sigmas.numpy())


def squares(peer):
    """Alpha squared by index, with clean data at 0 and their index k at k + 1."""
    return jnp.concatenate([jnp.ones(1), jnp.asarray(peer.alphas_cumprod.numpy())])


@pytest.mark.parametrize("solver, steps", [(PNDM(), 10), (PLMS(), 10)], ids=["pndm", "plms"])
def test_pndm(solver, steps):
    """Pseudo Runge-Kutta start and linear multistep, and PLMS with its doubled first step."""
    warm = isinstance(solver, PNDM) and solver.start == "trapezoid"
    peer = scheduler("PNDMScheduler", steps, skip_prk_steps=warm, set_alpha_to_one=True)
    process = Table(squares(peer))
    labels = peer.timesteps.numpy() + 1
    x = start()
    expected = theirs(peer, process, labels, x)
    times = np.append(np.arange(steps)[::-1] * (1000 // steps) + 1, 0).astype(float)
    np.testing.assert_allclose(ours(solver, process, times, x, ToEnd()), expected, **TOLERANCE)


def test_ipndm():
    """From its second level, as at its first alpha = 0, where it divides by 1e-8."""
    peer = scheduler("IPNDMScheduler", 9)
    peer.set_begin_index(1)
    peer.timesteps = peer.timesteps[1:]
    times = np.append(peer.timesteps.numpy(), 0.0)
    compare(IPNDM(), peer, Angle(), times, kind="v")


def test_ddim():
    peer = scheduler("DDIMScheduler", 10, set_alpha_to_one=True, clip_sample=False)
    times = np.append(peer.timesteps.numpy() + 1.0, 0.0)
    compare(DDIM(), peer, Table(squares(peer)), times)


SIGMA = {
    "EulerDiscreteScheduler": Euler(),
    "LMSDiscreteScheduler": LMS(),
}


@pytest.mark.parametrize("name", SIGMA)
def test_schedulers_in_sigma(name):
    peer = scheduler(name, 9)
    compare(SIGMA[name], peer, EDM(), peer.sigmas.numpy(), scale=float(peer.sigmas[0]))


def test_heun():
    peer = scheduler("HeunDiscreteScheduler", 9)
    levels = peer.sigmas.numpy()
    x = start(float(levels[0]))
    expected = theirs(peer, EDM(), levels[: len(peer.timesteps)], x)
    times = np.append(levels[:1], levels[1::2])
    np.testing.assert_allclose(ours(Heun(), EDM(), times, x, ToEnd()), expected, **TOLERANCE)


def test_flow_euler():
    peer = scheduler("FlowMatchEulerDiscreteScheduler", 9)
    compare(Euler(), peer, RectifiedFlow(), peer.sigmas.numpy(), kind="velocity")


@pytest.fixture(scope="module")
def k_sampling():
    """k-diffusion's samplers, without what its package needs for training."""
    pytest.importorskip("torchsde", reason="the extra `peers` is not installed")
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None:
        pytest.skip("the extra `peers` is not installed")
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    utils = types.ModuleType("k_diffusion.utils")
    utils.append_dims = lambda x, ndim: x[(...,) + (None,) * (ndim - x.ndim)]
    package.utils = utils
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "k_diffusion", package)
        patch.setitem(sys.modules, "k_diffusion.utils", utils)
        yield importlib.import_module("k_diffusion.sampling")


NOISE = standard_normal(9, (BATCH, DIM))
K_DIFFUSION = {
    "euler": (Euler(), "sample_euler", {}),
    "heun": (Heun(), "sample_heun", {}),
    "lms": (LMS(), "sample_lms", {}),
    "dpmpp_2s": (DPMSolverPP(2, multistep=False), "sample_dpmpp_2s_ancestral", {"eta": 0.0}),
    "dpmpp_2m": (DPMSolverPP(2), "sample_dpmpp_2m", {}),
    "dpmpp_2m_sde": (SDEDPMSolverPP(2), "sample_dpmpp_2m_sde", {"eta": 1.0}),
    "dpmpp_2m_sde_half": (
        SDEDPMSolverPP(2, variant="heun", eta=0.5),
        "sample_dpmpp_2m_sde",
        {"eta": 0.5, "solver_type": "heun"},
    ),
    "dpmpp_3m_sde": (SDEDPMSolverPP(3, published=True), "sample_dpmpp_3m_sde", {"eta": 1.0}),
}


@pytest.mark.parametrize("case", K_DIFFUSION)
def test_k_diffusion(case, k_sampling):
    solver, name, options = K_DIFFUSION[case]
    if "sde" in name or "ancestral" in name:
        options = options | {"noise_sampler": lambda *_: torch.as_tensor(NOISE)}
    sigmas = torch.as_tensor(np.append(np.geomspace(10.0, 0.05, 8), 0.0))
    x = start(10.0)

    def model(x, sigma):
        return torch.as_tensor(predict(EDM(), x, sigma[0])[0])

    expected = getattr(k_sampling, name)(
        model, torch.as_tensor(x), sigmas, disable=True, **options
    ).numpy()
    with given_noise(lambda name, like: jnp.asarray(NOISE)):
        found = ours(solver, EDM(), sigmas.numpy(), x, ToEnd())
    # Its LMS integrates with a relative tolerance of 1e-4, which the polynomials do not need.
    np.testing.assert_allclose(found, expected, **TOLERANCE)


@pytest.mark.parametrize("order", [2, 3])
def test_k_diffusion_dpm_solver(order, k_sampling):
    """DPM-Solver-2 and -3 with other points in between than the defaults."""
    shares = {"r1": 0.4} if order == 2 else {"r1": 0.25, "r2": 0.7}
    sigmas = torch.as_tensor(np.geomspace(10.0, 0.3, 4))
    peer = k_sampling.DPMSolver(lambda x, sigma: torch.as_tensor(predict(EDM(), x, sigma[0])[0]))
    x = torch.as_tensor(start(10.0))
    for sigma, target in zip(sigmas[:-1], sigmas[1:], strict=True):
        step = getattr(peer, f"dpm_solver_{order}_step")
        x = step(x, peer.t(sigma), peer.t(target), **shares)[0]
    found = ours(DPMSolver(order, **shares), EDM(), sigmas.numpy(), start(10.0), Keep())
    np.testing.assert_allclose(found, x.numpy(), **TOLERANCE)
