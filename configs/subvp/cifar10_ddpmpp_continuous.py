"""DDPM++ under the sub-VP SDE on CIFAR-10, continuous times.

    diffjax train --config=subvp/cifar10_ddpmpp_continuous --workdir=W

Expected (Song et al. 2021, tables 2 and 3): FID 2.61, IS 9.56 with the sampler below at the best
checkpoint; FID 3.16 by the ODE sampler and 3.02 bits/dim at the last. 61.8 M parameters, 21.7
GFLOP a forward image.
"""

from configs import common, networks, score_sde


def get_config(mode: str = "full"):
    config = score_sde.continuous("subvp", networks.ddpmpp())
    return common.shaped(config, mode)
