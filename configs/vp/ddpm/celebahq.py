"""DDPM on CelebA-HQ at 256 x 256 pixels.

    diffjax train --config=vp/ddpm/celebahq --workdir=W

No score was published with these settings, which are those of Ho et al. 2020. 111.6 M parameters.
The reference repository's file names a set of 1024 pixels for this network of 256; 256 it is
here.
"""

from configs import common, datasets, networks, score_sde


def get_config(mode: str = "full"):
    config = score_sde.discrete_vp(networks.ddpm_256())
    score_sde.large(config, datasets.folder("celebahq", 256))
    config.optim.lr = 2e-5
    return common.shaped(config, mode)
