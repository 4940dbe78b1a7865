"""NCSN++ on CelebA at 64 x 64 pixels under the VE SDE, trained on 1,000 levels.

    diffjax train --config=ve/celeba_ncsnpp --workdir=W

Expected: FID about 2.5, said by the author in the reference repository. 62.7 M parameters.
"""

from configs import common, datasets, networks, score_sde


def get_config(mode: str = "full"):
    net = networks.ncsnpp(embedding_type="positional")
    config = score_sde.discrete_ve(net, sigma_max=90.0, data=datasets.celeba())
    config.sampling.solver.snr = 0.17
    return common.shaped(config, mode)
