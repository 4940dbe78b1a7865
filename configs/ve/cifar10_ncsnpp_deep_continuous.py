"""NCSN++, twice as deep, under the VE SDE on CIFAR-10, continuous times.

    diffjax train --config=ve/cifar10_ncsnpp_deep_continuous --workdir=W

Expected (Song et al. 2021, tables 2 and 3): FID 2.20, IS 9.89 with the sampler below at the best
checkpoint; a run with the PyTorch port was reported at 2.60. 107.6 M parameters, 37.2 GFLOP a
forward image.
"""

from configs import common, networks, score_sde


def get_config(mode: str = "full"):
    config = score_sde.continuous_ve(networks.ncsnpp(num_res_blocks=8), sigma_max=50.0)
    config.training.n_iters = 950_001
    return common.shaped(config, mode)
