"""NCSN++ on CIFAR-10 under the VE SDE, trained on 1,000 levels.

    diffjax train --config=ve/cifar10_ncsnpp --workdir=W

Expected (Song et al. 2021, tables 2 and 3): FID 2.45, IS 9.73 at the best checkpoint. 62.7 M
parameters, 21.8 GFLOP a forward image.
"""

from configs import common, networks, score_sde


def get_config(mode: str = "full"):
    config = score_sde.discrete_ve(networks.ncsnpp(embedding_type="positional"), sigma_max=50.0)
    return common.shaped(config, mode)
