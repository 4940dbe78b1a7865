"""DDPM++ on CIFAR-10, trained on DDPM's 1,000 levels.

    diffjax train --config=vp/cifar10_ddpmpp --workdir=W

Expected (Song et al. 2021, tables 2 and 3): FID 2.78, IS 9.64 at the best checkpoint. 61.8 M
parameters, 21.7 GFLOP a forward image.
"""

from configs import common, networks, score_sde


def get_config(mode: str = "full"):
    config = score_sde.discrete_vp(networks.ddpmpp())
    return common.shaped(config, mode)
