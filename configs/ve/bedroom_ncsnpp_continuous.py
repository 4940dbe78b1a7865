"""NCSN++ on LSUN bedrooms at 256 x 256 pixels under the VE SDE, continuous times.

    diffjax train --config=ve/bedroom_ncsnpp_continuous --workdir=W

Samples were published, no score. 65.6 M parameters.
"""

from configs import common, datasets, networks, score_sde


def get_config(mode: str = "full"):
    config = score_sde.continuous_ve(networks.ncsnpp_256(), sigma_max=378.0, num_scales=2000)
    score_sde.large(config, datasets.lsun("bedroom"))
    return common.shaped(config, mode)
