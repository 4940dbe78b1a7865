"""EDM on CIFAR-10 with classes and the NCSN++ network.

    diffjax train --config=edm/cifar10_cond_ve --workdir=W

Expected (Karras et al. 2022, table 2): FID 1.79 with 35 calls, the least of three evaluations.
56.4 M parameters, 42.8 GFLOP a forward image; about two days on eight V100 (EDM's README).
"""

from configs import common, datasets, edm_recipe


def get_config(mode: str = "full"):
    config = edm_recipe.cifar10(edm_recipe.ncsnpp(num_classes=10), datasets.cifar10())
    return common.shaped(config, mode)
