"""DDPM++ under the VP SDE on CIFAR-10, continuous times.

    diffjax train --config=vp/cifar10_ddpmpp_continuous --workdir=W

Expected (Song et al. 2021, tables 2 and 3, 1.3 M steps): FID 2.55, IS 9.58 with the sampler below
at the best checkpoint; FID 3.93 and 3.16 bits/dim with the probability flow at the last.
61.8 M parameters, 21.7 GFLOP a forward image. FID rises after about 0.5 M steps: keep snapshots.
`get_config("quick")` shrinks it to seconds.
"""

from configs import common


def get_config(mode: str = "full"):
    config = common.base()
    config.process = {"name": "vp", "beta_min": 0.1, "beta_max": 20.0}
    config.precondition = {"name": "score_sde_vp"}
    config.model = common.ddpmpp_cifar10()
    config.sampling = {
        "steps": 1000,
        "grid": {"name": "uniform", "end": 1e-3},
        "solver": {"name": "euler_maruyama"},
        "final": "tweedie",
    }
    config.data = common.cifar10()
    return common.shaped(config, mode)
