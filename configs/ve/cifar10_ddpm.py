"""The DDPM network on CIFAR-10 under the VE SDE, trained on 1,000 levels.

    diffjax train --config=ve/cifar10_ddpm --workdir=W

Expected (Song et al. 2021, table 1): FID 3.60 with the sampler below, 4.79 without corrector.
35.2 M parameters, 12.0 GFLOP a forward image.
"""

from configs import common, networks, score_sde


def get_config(mode: str = "full"):
    config = score_sde.discrete_ve(networks.ddpm(), sigma_max=50.0)
    return common.shaped(config, mode)
