"""The named methods of the exponential family, each a value of `Multistep`, `SingleStep`, `PNDM`.

Global orders in the step of the grid, on the probability flow; "start" is from the first step of
order 1, "exact" with an exact history (what the name says).

    name                      calls a step   start       exact   weak, of Gaussian data
    DPMSolver(p)              p              p                            1, 2, 3 single-step
    DPMSolverPP(p)            1              min(p, 2)   p                2M, 3M
    DPMSolverPP(2, multistep=False)   2      2                            2S
    SDEDPMSolver(p)           1                                  min(p, 2)   eps form
    SDEDPMSolverPP(p)         1                                  min(p, 2)   x0 form: 2M, 3M SDE
    DEIS(p)                   1              min(p, 2)   p
    UniPC(p)                  1              min(p, 2) + 1   p + 1        p without its corrector
    LMS(p)                    1              min(p, 2)   p
    IPNDM(), PLMS()           1              2           2, whatever their weights' order
    PNDM()                    1, 3 times 4   2

Where DPM-Solver's published code differs: its third-order multistep update (also that of diffusers
and k-diffusion) takes half of the second difference that the polynomial has, where its single-step
update takes it whole. Measured, it is of order 2. `DPMSolverPP(3)` is of order 3;
`published=True` gives the code's.

References: those of `diffjax.solvers.exponential`, and
[5] Liu et al., "Pseudo Numerical Methods for Diffusion Models on Manifolds", 2022,
    https://arxiv.org/abs/2202.09778 (PNDM, PLMS).
[6] Crowson, k-diffusion, 2022, https://github.com/crowsonkb/k-diffusion (LMS; 2M and 3M SDE).
"""

from typing import Literal

from diffjax.core import checks
from diffjax.core.types import Number
from diffjax.solvers.exponential import Kind, Slope
from diffjax.solvers.multistep import Multistep
from diffjax.solvers.pndm import PNDM
from diffjax.solvers.singlestep import SingleStep

Variant = Literal["midpoint", "heun"]


def _slope(variant: Variant) -> Slope:
    """The rule of order 2 by its name in DPM-Solver's code."""
    checks.one_of("variant", variant, ("midpoint", "heun"))
    return "b2" if variant == "midpoint" else "exact"


def _curvature(published: bool) -> float:
    """The factor of the second difference at order 3."""
    return 0.5 if published else 1.0


def DPMSolver(
    order: int = 2,
    *,
    variant: Variant = "midpoint",
    multistep: bool = False,
    r1: Number | None = None,
    r2: Number | None = None,
    n_steps: Number | None = None,
    published: bool = False,
) -> SingleStep | Multistep:
    """DPM-Solver-1, 2, 3 [1] on eps, single-step; or multistep with the same orders.

    r1, r2: of the single-step. n_steps, published: of the multistep, as in `DPMSolverPP`.
    """
    return _dpm_solver("eps", order, variant, multistep, r1, r2, n_steps, published)


def DPMSolverPP(
    order: int = 2,
    *,
    variant: Variant = "midpoint",
    multistep: bool = True,
    r1: Number | None = None,
    r2: Number | None = None,
    n_steps: Number | None = None,
    published: bool = False,
) -> SingleStep | Multistep:
    """DPM-Solver++ [2] on x0: 2M and 3M, and 2S with multistep=False.

    variant: the rule of order 2; "midpoint" is the paper's. n_steps: the grid's number of intervals
    lets the order fall by one a step towards the end, as the codes do on short grids. published:
    the third order as the codes have it.
    """
    return _dpm_solver("x0", order, variant, multistep, r1, r2, n_steps, published)


def _dpm_solver(
    prediction: Kind,
    order: int,
    variant: Variant,
    multistep: bool,
    r1: Number | None,
    r2: Number | None,
    n_steps: Number | None,
    published: bool,
) -> SingleStep | Multistep:
    if not multistep:
        if n_steps is not None or published:
            raise ValueError("n_steps and published belong to multistep=True; leave them out.")
        return SingleStep(order, prediction, variant, r1, r2)
    if r1 is not None or r2 is not None:
        raise ValueError("r1 and r2 are points of the single-step method: pass multistep=False.")
    return Multistep(
        order,
        prediction,
        slope=_slope(variant),
        curvature=_curvature(published),
        n_steps=n_steps,
    )


def SDEDPMSolver(
    order: int = 2,
    *,
    variant: Variant = "midpoint",
    eta: Number = 1.0,
    n_steps: Number | None = None,
) -> Multistep:
    """SDE-DPM-Solver [2] on eps, multistep. eta: the noise; 1 is the reverse SDE."""
    return Multistep(order, "eps", slope=_slope(variant), n_steps=n_steps, eta=eta)


def SDEDPMSolverPP(
    order: int = 2,
    *,
    variant: Variant | None = None,
    eta: Number = 1.0,
    n_steps: Number | None = None,
    published: bool = False,
) -> Multistep:
    """SDE-DPM-Solver++ [2] on x0, multistep: the 2M and 3M SDE of [6].

    variant: the rule of order 2; None is "midpoint" for 2M and "heun" for 3M, as in [6]. eta: the
    noise; 1 is the reverse SDE, 0 the flow. published: as in `DPMSolverPP`.
    """
    chosen = ("midpoint" if order <= 2 else "heun") if variant is None else variant
    return Multistep(
        order,
        "x0",
        slope=_slope(chosen),
        curvature=_curvature(published),
        n_steps=n_steps,
        eta=eta,
    )


def DEIS(
    order: int = 3,
    variable: Literal["t", "rho", "lambda"] = "t",
    *,
    n_steps: Number | None = None,
    lower_order_final: bool = True,
) -> Multistep:
    """DEIS [3] on eps: t-AB, rho-AB, or the polynomial in ln rho that diffusers has ("lambda")."""
    checks.one_of("variable", variable, ("t", "rho", "lambda"))
    return Multistep(order, "eps", variable, n_steps=n_steps, lower_order_final=lower_order_final)


def UniPC(
    order: int = 2,
    variant: Literal["B1", "B2"] = "B2",
    *,
    prediction: Kind = "x0",
    corrector: bool = True,
    n_steps: Number | None = None,
) -> Multistep:
    """UniPC [4] of any order: UniP-p corrected by UniC-p, or UniP-p alone.

    variant: B(h) of the paper, which matters where one node is used; the other orders solve for
    their weights, and B(h) falls out.
    """
    checks.one_of("variant", variant, ("B1", "B2"))
    slope: Slope = "b1" if variant == "B1" else "b2"
    return Multistep(
        order, prediction, slope=slope, corrector=order if corrector else 0, n_steps=n_steps
    )


def IPNDM(order: int = 4) -> Multistep:
    """iPNDM [3]: fixed Adams-Bashforth weights on eps, lower orders at the start."""
    return Multistep(order, "eps", "step", lower_order_final=False)


def LMS(order: int = 4) -> Multistep:
    """Linear multistep in sigma/alpha [6]: Adams-Bashforth for the grid's own steps, to the end."""
    return Multistep(order, "eps", "rho", lower_order_final=False)


def PLMS(order: int = 4) -> PNDM:
    """PLMS as in Stable Diffusion: a trapezoid start, one call more."""
    return PNDM("trapezoid", order)


__all__ = [
    "DEIS",
    "IPNDM",
    "LMS",
    "PLMS",
    "PNDM",
    "DPMSolver",
    "DPMSolverPP",
    "SDEDPMSolver",
    "SDEDPMSolverPP",
    "UniPC",
]
