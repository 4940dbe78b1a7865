"""EDM on CIFAR-10 with no classes and the DDPM++ network.

    diffjax train --config=edm/cifar10_uncond_vp --workdir=W

Expected (Karras et al. 2022, table 2): FID 1.97 with 35 calls, the least of three evaluations.
55.7 M parameters, 42.4 GFLOP a forward image; about two days on eight V100 (EDM's README).
"""

from configs import common, datasets, edm_recipe


def get_config(mode: str = "full"):
    config = edm_recipe.cifar10(edm_recipe.ddpmpp(), datasets.cifar10())
    return common.shaped(config, mode)
