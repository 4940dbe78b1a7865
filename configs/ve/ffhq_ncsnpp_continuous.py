"""NCSN++ on FFHQ at 1024 x 1024 pixels under the VE SDE, continuous times.

    diffjax train --config=ve/ffhq_ncsnpp_continuous --workdir=W

Samples were published, no score. 105.8 M parameters. eval.batch_size is the reference's; ordinary
memory asks for less. The loss is a mean here and half a sum for CelebA-HQ: so in the reference
repository.
"""

from configs import common, datasets, networks, score_sde


def get_config(mode: str = "full"):
    config = score_sde.continuous_ve(networks.ncsnpp_1024(), sigma_max=1348.0, num_scales=2000)
    score_sde.huge(config, datasets.folder("ffhq", 1024))
    config.loss.reduce = "mean"
    return common.shaped(config, mode)
