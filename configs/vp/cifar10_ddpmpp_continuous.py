"""DDPM++ under the VP SDE on CIFAR-10, continuous times.

    diffjax train --config=vp/cifar10_ddpmpp_continuous --workdir=W

Expected (Song et al. 2021, tables 2 and 3): FID 2.55, IS 9.58 with the sampler below at the best
checkpoint; FID 3.93 by the ODE sampler and 3.16 bits/dim at the last. 61.8 M parameters, 21.7
GFLOP a forward image.
"""

from configs import common, networks, score_sde


def get_config(mode: str = "full"):
    config = score_sde.continuous("vp", networks.ddpmpp())
    return common.shaped(config, mode)
