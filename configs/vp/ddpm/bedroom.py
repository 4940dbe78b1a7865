"""DDPM on LSUN bedrooms at 256 x 256 pixels.

    diffjax train --config=vp/ddpm/bedroom --workdir=W

No score was published with these settings, which are those of Ho et al. 2020. 111.6 M parameters.
"""

from configs import common, datasets, networks, score_sde


def get_config(mode: str = "full"):
    config = score_sde.discrete_vp(networks.ddpm_256())
    score_sde.large(config, datasets.lsun("bedroom"))
    config.optim.lr = 2e-5
    return common.shaped(config, mode)
