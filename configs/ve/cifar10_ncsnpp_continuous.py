"""NCSN++ under the VE SDE on CIFAR-10, continuous times.

    diffjax train --config=ve/cifar10_ncsnpp_continuous --workdir=W

Expected (Song et al. 2021, tables 2 and 3): FID 2.38, IS 9.83 with the sampler below at the best
checkpoint (1.2 M updates). 62.8 M parameters, 21.8 GFLOP a forward image. Images are in [0, 1]
here: sigma_max = 50 is the largest distance between two of them.
"""

from configs import common, networks, score_sde


def get_config(mode: str = "full"):
    config = score_sde.continuous_ve(networks.ncsnpp(), sigma_max=50.0)
    return common.shaped(config, mode)
