"""DDPM++, twice as deep, under the sub-VP SDE on CIFAR-10, continuous times.

    diffjax train --config=subvp/cifar10_ddpmpp_deep_continuous --workdir=W

Expected (Song et al. 2021, tables 2 and 3): FID 2.41, IS 9.57 with the sampler below at the best
checkpoint; FID 2.92 by the ODE sampler and 2.99 bits/dim at the last. 106.6 M parameters, 37.1
GFLOP a forward image.
"""

from configs import common, networks, score_sde


def get_config(mode: str = "full"):
    config = score_sde.continuous("subvp", networks.ddpmpp(num_res_blocks=8))
    config.training.n_iters = 950_001
    return common.shaped(config, mode)
