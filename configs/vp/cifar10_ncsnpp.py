"""NCSN++ on CIFAR-10, trained on DDPM's 1,000 levels.

    diffjax train --config=vp/cifar10_ncsnpp --workdir=W

No score was published. 62.7 M parameters, 21.8 GFLOP a forward image.
"""

from configs import common, networks, score_sde


def get_config(mode: str = "full"):
    config = score_sde.discrete_vp(networks.ncsnpp(embedding_type="positional"))
    config.sampling.solver = {"name": "reverse_diffusion"}
    return common.shaped(config, mode)
