"""DDPM on CIFAR-10, with the loss and sampler of its paper.

    diffjax train --config=vp/ddpm/cifar10 --workdir=W

Expected (Song et al. 2021, tables 1 and 2): FID 3.24 with the sampler below; FID 3.37 by the ODE
sampler and 3.28 bits/dim with the continuous schedule. 35.2 M parameters, 12.0 GFLOP a forward
image. Ho et al. 2020 report FID 3.17 and IS 9.46 for 35.7 M parameters: `up_attention="block"`
and `nin_init_scale=1.0`.
"""

from configs import common, networks, score_sde


def get_config(mode: str = "full"):
    config = score_sde.discrete_vp(networks.ddpm())
    return common.shaped(config, mode)
